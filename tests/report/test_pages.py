"""Pages: what they show, that they stand alone, that nothing in the data can break out of its place."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
import yaml

from keel.core.errors import RunError, UserError
from keel.evaluate.intervals import Interval
from keel.report.demo import demo, findings, write_demo, write_picture
from keel.report.figures import curves, frontier, pass_curves
from keel.report.page import cell, document, prose, write
from keel.report.run import RunData, read_run, report, training_figures, write_report
from keel.report.style import resolve
from keel.store.records import StoredRun
from keel.store.store import Store

STEPS = range(1, 101)
METRICS = {
    "reward": [(step, 0.4 + step / 400) for step in STEPS],
    "entropy": [(step, 0.6 - step / 250) for step in STEPS],
    "kl": [(step, step / 300) for step in STEPS],
    "grad_norm": [(step, math.nan if step == 50 else 1.0) for step in STEPS],
    "completions/mean_length": [(step, 6.0) for step in STEPS],
    "completions/clipped_ratio": [(step, 0.01) for step in STEPS],
    "clip_ratio/low_mean": [(step, 0.001) for step in STEPS],
    "clip_ratio/high_mean": [(step, 0.002) for step in STEPS],
    "clip_ratio/region_mean": [(step, 0.003) for step in STEPS],
    "frac_reward_zero_std": [(step, math.inf if step == 3 else 0.2) for step in STEPS],
    "rewards/countdown/mean": [(step, 0.4) for step in STEPS],
    "rewards/format/mean": [(step, 0.9) for step in STEPS],
    "terms/kl": [(step, 0.01) for step in STEPS],
}
CONFIG = {"recipe": {"name": "grpo", "arguments": {"beta": 0.0}}, "train": {"learning_rate": 7e-5}, "name": "first"}


class Elements(HTMLParser):
    """What a page is made of."""

    def __init__(self, page):
        super().__init__()
        self.found, self.words = [], []
        self.raw = None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.raw = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.raw = None

    def handle_data(self, data):
        if self.raw is None:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def stored(**changes):
    known = dict(id=1, name="first", recipe="grpo", task="countdown", model="tiny", seed=0, status="finished", step=100)
    return StoredRun(**known | dict(created=0.0, updated=92.0, finished=92.0, summary={}, config=CONFIG) | changes)


def run_data(wide, narrow, **changes):
    return RunData(stored(**changes), METRICS, [(0, "before", wide), (100, "after", narrow)], "recipe:\n  name: grpo\n")


def test_a_report_shows_what_happened(wide, narrow):
    page = Elements(report(run_data(wide, narrow)))
    for words in [
        "first",
        "took 1 min 32 s",
        "0.498 → 0.750",
        "pass@1 rose by 0.252",
        "pass@16 fell by 0.250",
        "Entropy fell from",
        "grad_norm was not a finite number on 1 step",
        "6-3+17",
        "17+6-3",
        "name: grpo",
    ]:
        assert words in page.text, words
    titles = {a["aria-label"].split(":")[0] for tag, a in page.found if tag == "div" and a.get("class") == "plot"}
    assert titles >= {
        "Solved within k tries",
        "One try against 16",
        "Reward",
        "Entropy",
        "KL to the reference",
        "Completion length",
        "Cut off by the length limit",
        "Tokens outside the clip range",
        "Gradient norm",
        "Terms of the loss",
        "Reward functions",
    }


def pages(wide, narrow, arms):
    return {
        "report": report(run_data(wide, narrow)),
        "no evaluation": report(RunData(stored(), METRICS)),
        "only before": report(RunData(stored(), METRICS, [(0, "before", wide)])),
        "nothing": report(RunData(stored(status="running", finished=None, config=None))),
        "demo": demo(arms),
        "one arm": demo(arms[:1]),
    }


def test_pages_ask_nothing_of_any_server(wide, narrow, arms):
    for name, page in pages(wide, narrow, arms).items():
        elements = Elements(page).found
        for tag, attributes in elements:
            for key in ("src", "href", "srcset", "data", "action", "poster"):
                if key in attributes:
                    assert (tag, key, attributes[key]) == ("link", "href", "data:,"), name
        policy = next(a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none';") and "http" not in policy and "unsafe-eval" not in policy
        style = re.search(r"<style>(.*?)</style>", page, re.S).group(1)
        assert "url(" not in style and "@import" not in style


def test_pages_are_whole(wide, narrow, arms):
    for name, page in pages(wide, narrow, arms).items():
        elements = Elements(page)
        tags = [tag for tag, _ in elements.found]
        assert tags.count("h1") == 1 and page.startswith("<!doctype html>") and page.endswith("</html>\n"), name
        assert ("html", {"lang": "en"}) in elements.found
        assert any(a.get("name") == "viewport" for _, a in elements.found)
        ids = [a["id"] for _, a in elements.found if "id" in a]
        assert len(ids) == len(set(ids))
        figures = [a for tag, a in elements.found if a.get("class") == "plot"]
        assert all(a["role"] == "img" and a["aria-label"] and a["data-figure"] in ids for a in figures)
        assert page.count("plotly.js v") == (1 if figures else 0)  # once, and only where something is drawn
        assert "@media (prefers-color-scheme: dark)" in page
        assert "nan" not in elements.text.lower().split()


def test_figures_on_a_page_are_json_that_plotly_takes(wide, narrow):
    go = pytest.importorskip("plotly.graph_objects")
    page = report(run_data(wide, narrow))
    blocks = re.findall(r'<script type="application/json" id="(?!palette)[^"]*">(.*?)</script>', page, re.S)
    assert len(blocks) >= 10
    for block in blocks:
        figure = json.loads(block, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        for theme in ("light", "dark"):
            go.Figure(resolve(figure, theme))  # refuses what plotly does not know


def test_curves_hold_the_numbers_and_gaps_where_there_are_none():
    figure = curves("Gradient norm", METRICS, {"grad_norm": "norm"})
    raw, smooth = figure.data
    assert raw["y"][49] is None and raw["y"][48] == 1.0 and smooth["y"][49] == 1.0
    assert figure.caption == "norm 1 → 1"
    assert curves("Reward", METRICS, {"reward": "reward"}).caption == "reward 0.414 → 0.639"
    flat = curves("Clipped", {"clip": [(1, 0.0), (2, 0.0)]}, {"clip": "clip"}, percent=True, floor=0.0)
    assert flat.layout["yaxis"]["range"] == [0.0, 0.01]
    assert curves("Nothing", METRICS, {"missing": "x"}) is None
    only_nan = curves("Broken", {"loss": [(1, math.nan), (2, math.inf)]}, {"loss": "loss"})
    assert only_nan.caption == "loss: no finite value"


def test_long_curves_are_thinned():
    long = {"reward": [(step, float(step)) for step in range(100_000)]}
    (raw, _) = curves("Reward", long, {"reward": "reward"}).data
    assert len(raw["y"]) <= 600 and raw["x"][-1] == 99_999
    assert sum(raw["y"]) / len(raw["y"]) == pytest.approx(49_999.5, rel=1e-3)


def test_ability_figures_hold_the_intervals(arms):
    figure = pass_curves(arms)
    line = next(trace for trace in figure.data if trace["name"] == "GRPO" and "customdata" in trace)
    interval = arms[1].evaluation.metrics["pass@16"]
    assert line["x"] == [1, 2, 4, 8, 16] and line["y"][-1] == 0.75
    assert line["customdata"][-1] == [interval.low, interval.high]
    point = next(trace for trace in frontier(arms).data if trace.get("name") == "GRPO")
    assert point["error_y"]["array"] == [interval.high - 0.75] and point["error_y"]["arrayminus"] == [
        0.75 - interval.low
    ]
    assert len({(t["marker"]["color"], t["marker"]["symbol"]) for t in frontier(arms).data if "marker" in t}) == 4


def test_the_demonstration_says_what_it_shows(arms):
    first, second, third = findings(arms)
    assert "GRPO solves 75.0% of the prompts, up from 49.8% before training" in first
    assert "With 16 tries it solves 75.0%, down from 100.0%" in first
    # The weaker policies solve the other quarter in one sample of 16, so that 16 tries always find it.
    assert second.startswith("GRPO + KL 0.1: 100.0% with 16 tries (+25.0 points against GRPO)")
    assert "67.2% with one (−7.8 points against GRPO" in second and third.startswith("GRPO + KL 0.3")
    page = Elements(demo(arms, command="keel demo --seed 3"))
    assert "keel demo --seed 3" in page.text and first in page.text
    with pytest.raises(ValueError, match="at least one arm"):
        demo([])


NASTY = "</script><script>alert(1)</script><!-- <b>&\"'\u2028"
HALF = "half \ud83d of a character"


def test_nothing_in_the_data_breaks_out(wide, narrow, arms):
    plain = [tag for tag, _ in Elements(report(run_data(wide, narrow))).found]
    metrics = METRICS | {f"terms/{NASTY}": [(1, 1.0), (2, 2.0)], f"rewards/{NASTY}/errors": [(1, 1.0)]}
    run = stored(name=NASTY, recipe=NASTY, task=NASTY, model=NASTY, status=NASTY, config={NASTY: NASTY})
    page = report(RunData(run, metrics, run_data(wide, narrow).evaluations, NASTY))
    elements = Elements(page)
    assert [tag for tag, _ in elements.found].count("script") == plain.count("script")
    assert "alert(1)</script>" not in page
    assert re.sub(r"\s+", " ", NASTY) in elements.text
    named = [type(arms[0])(arm.name, NASTY, arm.evaluation, arm.beta) for arm in arms]
    assert "alert(1)</script>" not in demo(named, NASTY, NASTY)


def test_a_report_from_a_run_directory(tmp_path, wide, narrow):
    directory = tmp_path / "runs" / "first"
    directory.mkdir(parents=True)
    with Store(tmp_path / "runs" / "keel.sqlite") as store:
        number = store.create_run("first", CONFIG, "grpo", "countdown", "tiny", 0)
        for step in STEPS:
            store.log_metrics(number, step, {name: dict(curve)[step] for name, curve in METRICS.items()})
        store.log_evaluation(number, 0, "before", wide.to_json())
        store.log_evaluation(number, 50, "during", wide.to_json())
        store.log_evaluation(number, 100, "after", narrow.to_json())
        (directory / "config.yaml").write_text("recipe:\n  name: from the file\n")
        path = write_report(directory)
        assert path == directory / "report.html" and [p.name for p in directory.iterdir() if p.suffix == ".html"] == [
            "report.html"
        ]
        shown = Elements(path.read_text()).text
        assert "name: from the file" in shown and "0.498 → 0.750" in shown and "Held-out success" in shown
        data = read_run(directory)
        assert data.before.metrics == wide.metrics and data.after.to_json() == narrow.to_json()
        (directory / "config.yaml").unlink()
        assert "learning_rate: 7.0e-05" in Elements(write_report(directory, tmp_path / "x.html").read_text()).text
        store.log_evaluation(number, 100, "after", {"metrics": 3})
        with pytest.raises(RunError, match="cannot be read"):
            read_run(directory)
    with pytest.raises(RunError, match="no run named 'second'"):
        write_report(tmp_path / "runs" / "second")
    with pytest.raises(UserError, match="no store here"):
        write_report(tmp_path / "elsewhere" / "first")


def test_half_a_character_is_no_obstacle(tmp_path, arms):
    named = [type(arm)(arm.name, HALF, arm.evaluation, arm.beta) for arm in arms]
    assert "half ? of a character" in write_demo(tmp_path / "demo.html", named).read_text(encoding="utf-8")
    assert "half ? of a character" in write_picture(tmp_path / "demo.svg", named).read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written(tmp_path, arms):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write_demo(tmp_path / "file" / "demo.html", arms)
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_small_pieces():
    assert cell(Interval(-0.5, -0.75, 0.25), signed=True) == "−0.500 <small>(−0.750 to +0.250)</small>"
    assert cell(Interval(0.5, math.nan, math.nan)) == "0.500" and cell(None) == "–"
    assert prose("raise `beta` <now>") == "raise <code>beta</code> &lt;now&gt;"
    assert "plotly" not in document("empty", ["<p>nothing</p>"])
    assert all(figure is None for figure in training_figures({}))
    assert yaml.safe_load("a: 1") == {"a": 1}


def test_the_picture_is_plain_svg(tmp_path, arms):
    import xml.etree.ElementTree as ElementTree

    for dark in (False, True):
        path = write_picture(tmp_path / "demo.svg", arms, dark=dark)
        text = path.read_text()
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not {"script", "image", "foreignObject", "use"} & {e.tag.split("}")[1] for e in root.iter()}
        assert "href" not in text and "nan" not in text
        words = [e.text for e in root.iter() if e.text]
        assert all(words.count(arm.label) == 1 for arm in arms)
        box = [float(side) for side in root.get("viewBox").split()]
        for element in root.iter():
            for key in ("x", "y", "cx", "cy"):
                if element.get(key):
                    assert 0 <= float(element.get(key)) <= max(box[2:])
    assert "GRPO: pass@1 0.75, pass@16 0.75" in text
    with pytest.raises(ValueError, match="at least two k"):
        write_picture(tmp_path / "none.svg", [])


def test_a_point_of_the_picture_stands_where_it_should(arms):
    from keel.report.picture import _BOTTOM, _LEFT, _TOP, Panel

    panel = Panel(*_LEFT, (1.0, 16.0), (0.0, 1.0), math.log2)
    assert panel.x(4.0) == pytest.approx((_LEFT[0] + _LEFT[1]) / 2)
    assert panel.y(0.25) == pytest.approx(_BOTTOM - (_BOTTOM - _TOP) / 4)
