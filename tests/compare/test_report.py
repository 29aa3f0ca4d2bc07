"""What people see of a comparison: the terminal, and the page."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from keel.compare.analysis import analyse
from keel.compare.courses import BLOCKS, course, learning_curves, trajectory, ways
from keel.compare.figures import DASHES, forest, frontier, improvement, looks, pass_curves, profiles
from keel.compare.outcomes import Arm, Outcome
from keel.compare.report import differing, head, page, sections, views, write_report
from keel.compare.table import terminal
from keel.report.style import ARMS, THEMES, resolve
from tests.compare.synthetic import synthetic

LONG = "reinforce_plus_plus beta=0.01 clip=0.2"
HOSTILE = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def comparison():
    made = synthetic({"grpo": 0.0, "kl_cov": 1.5, LONG: -1.5, HOSTILE: 0.0}, prompts=60, steps=20)
    cells = list(made.outcomes)
    cells[-1] = Outcome(HOSTILE, 2, "failed", "cell-x", "ValueError: <b>no</b>")
    arms = tuple(Arm(a.name, a.recipe, (("beta", 0.01),) if a.name == LONG else ()) for a in made.arms)
    return replace(made, arms=arms, outcomes=tuple(cells), settings=(("train.learning_rate", 1e-4),))


@pytest.fixture(scope="module")
def analysis(comparison):
    return analyse(comparison)


@pytest.fixture(scope="module")
def written(comparison, analysis):
    return page(comparison, analysis, "keel compare grpo kl_cov --seeds 3")


# -- the terminal ----------------------------------------------------------------------------------------------------


def shown(comparison, analysis, width=80):
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(terminal(comparison, analysis))
    return capture.get()


def test_the_table_fits_eighty_columns(comparison, analysis):
    said = shown(comparison, analysis)
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 80
    assert "…" not in said
    row = next(line for line in said.splitlines() if line.startswith("kl_cov"))
    d = analysis.difference("kl_cov", "pass@1")
    assert f"{d.mean.value:+.3f} [{d.mean.low:+.3f}, {d.mean.high:+.3f}]" in row
    assert "▲ better" in row  # colour is not the only sign
    assert "▼ worse" in said and "= none seen" in said


def test_the_terminal_says_it_in_words(comparison, analysis):
    said = " ".join(shown(comparison, analysis).split())
    assert "kl_cov is better than grpo: pass@1" in said
    assert f"1 cell failed and is in no average: {HOSTILE} seed 2 (ValueError: <b>no</b>)." in said
    assert re.search(r"To see one of that size would take about \d+ seeds|whatever the number of seeds", said)


def test_many_metrics_are_several_tables(comparison):
    names = ["pass@1", "pass@2", "pass@4", "pass@8", "pass@16", "kl", "entropy"]
    said = shown(comparison, analyse(comparison, names))
    assert all(name in said for name in names) and said.count("tokens") == 1
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 80


def test_nothing_finished_is_said():
    made = replace(synthetic(steps=2), outcomes=())
    assert "nothing to compare" in shown(made, analyse(made))


# -- the page --------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page and its text."""

    def __init__(self, content):
        super().__init__()
        self.found, self.said, self.inside = [], [], ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.said.append(data)

    def of(self, tag, **wanted):
        return [a for name, a in self.found if name == tag and all(a.get(k) == v for k, v in wanted.items())]


def test_the_page_stands_alone_and_holds_everything(written, analysis):
    elements = Elements(written)
    said = " ".join(" ".join(elements.said).split())
    assert not [
        a for _, a in elements.found if (a.get("src") or a.get("href", "data:")) not in (None, "data:,", "data:")
    ]
    ids = [a["id"] for _, a in elements.found if "id" in a]
    assert len(ids) == len(set(ids))
    for heading in (
        "What was found",
        "Against grpo",
        "Training",
        "Performance profiles",
        "All differences",
        "Settings",
    ):
        assert heading in said, heading
    assert "keel compare grpo kl_cov --seeds 3" in said and "budget of each 20 steps" in said
    assert "kl_cov is better than grpo" in said and "ValueError: <b>no</b>" in said
    assert said.index("kl_cov is better than grpo") < said.index("before training")
    assert f"{analysis.difference('kl_cov', 'pass@1').mean.value:+.3f}" in said


def test_names_cannot_become_markup(written):
    assert HOSTILE not in written and "<b>no" not in written
    assert "&lt;script&gt;alert(" in written


def test_every_figure_says_its_numbers(written):
    plots = Elements(written).of("div", **{"class": "plot"})
    assert len(plots) >= 14
    for plot in plots:
        assert plot["role"] == "img" and re.search(r"\d", plot["aria-label"]), plot
        figure = re.search(rf'id="{plot["data-figure"]}">(.*?)</script>', written, re.DOTALL).group(1)
        drawn = json.loads(figure)
        for theme in THEMES:
            resolve(drawn, theme)  # every colour has a name
        assert drawn["data"]


def test_choosers_have_labels_and_one_open_view(written):
    elements = Elements(written)
    assert len(elements.of("select")) == 2
    assert re.search(r"<label>Curves against <select", written)
    groups = [a for tag, a in elements.found if tag == "div" and "data-view" in a]
    assert sum("hidden" not in a for a in groups) == 2 and len(groups) > 4
    assert views("x", {"one": "<p>1</p>"}) == "<p>1</p>"


def test_arms_are_held_apart_by_more_than_colour():
    names = [f"arm{i}" for i in range(40)]
    found = looks(names)
    assert len({(look.colour, look.dash, look.marker) for look in found.values()}) == 40
    assert found["arm0"].colour == "base"
    ten = list(looks(names[:10]).values())
    assert len({look.colour for look in ten}) == 10 and len({look.marker for look in ten}) == 10
    assert set(ARMS) < set(THEMES["light"]) and len(DASHES) == 5


def test_pages_of_little(tmp_path):
    for made in (synthetic(["grpo"], seeds=1, steps=2), replace(synthetic(steps=2), outcomes=())):
        path = write_report(tmp_path / "page.html", made, analyse(made))
        assert "What was found" in path.read_text()
    bare = synthetic(steps=2)
    bare = replace(
        bare, outcomes=tuple(replace(o, curves={}, before={}, values={"kl": o.values["kl"]}) for o in bare.outcomes)
    )
    said = "".join(sections(bare, analyse(bare)))
    assert "Training" not in said and "KL, less grpo&#x27;s" in said


def test_settings_that_differ():
    found = differing({"a": {}, "b": {"beta": 0.1}, "c": {"beta": 0.1, "loss": {"clip": 1}}})
    assert found == {"beta": {"b": "0.1", "c": "0.1"}, "loss.clip": {"c": "1"}}
    assert differing({"a": {"x": 1}, "b": {"x": 1}}) == {}


def test_settings_are_shown(comparison, analysis, written):
    assert "<code>beta</code>" in written and "<code>train.learning_rate</code>" in written
    many = {name: {f"path{i}": f"{name} {i}" for i in range(20)} for name in analysis.arms}
    assert "<summary>20 settings in which the arms differ</summary>" in "".join(sections(comparison, analysis, many))


def test_facts(comparison, analysis):
    said = head(comparison, analysis)
    assert "<li>cells <b>11 of 12 finished</b></li>" in said and "Made by" not in said


# -- figures ---------------------------------------------------------------------------------------------------------


def test_forest_rows_are_differences(analysis):
    figure = forest(analysis, "kl")
    marks = {trace["name"]: trace for trace in figure.data}
    for arm in analysis.arms[1:]:
        d = analysis.difference(arm, "kl")
        assert marks[arm]["x"] == [d.mean.value]
        assert marks[arm]["error_x"]["array"] == [d.mean.high - d.mean.value]
    low, high = figure.layout["xaxis"]["range"]
    assert low < 0 < high  # the line of no difference is in the picture
    assert [len(name) <= 26 for name in figure.layout["yaxis"]["ticktext"]] == [True] * 3
    assert improvement(analysis, "kl").layout["shapes"][0]["x0"] == 0.5
    assert forest(analysis, "unknown") is None


def test_pass_curves_and_frontier(comparison, analysis):
    curves = pass_curves(comparison)
    lines = {t["name"]: t for t in curves.data if "fill" not in t}
    assert list(lines) == ["before training", *analysis.arms]
    assert lines["kl_cov"]["x"] == [1, 2, 4, 8, 16]
    assert lines["kl_cov"]["y"][0] == pytest.approx(analysis.estimate("kl_cov", "pass@1").mean.value)
    points = frontier(comparison, "pass@1")
    seeds, mean = [t for t in points.data if t["name"] == "kl_cov"]
    assert len(seeds["x"]) == 3 and np.mean(seeds["y"]) == pytest.approx(mean["y"][0])
    assert mean["x"] == [pytest.approx(analysis.estimate("kl_cov", "kl").mean.value)]


def test_profiles_fall(comparison):
    figure = profiles(comparison, "pass@1")
    line = next(t for t in figure.data if t["name"] == "grpo" and "fill" not in t)
    assert line["y"] == sorted(line["y"], reverse=True) and line["y"][-1] == 0.0
    values = np.concatenate([o.values["pass@1"] for o in comparison.of("grpo")])
    assert line["y"][20] == pytest.approx((values > 0.5).mean(), abs=1e-4)


def test_a_course_by_hand():
    def cell(seed, offset, pace):
        curve = [(step, step + offset) for step in range(1, 6)]
        return Outcome("a", seed, "finished", curves={"reward": curve, "num_tokens": [(s, pace * s) for s, _ in curve]})

    found = course([cell(0, 0.0, 10.0), cell(1, 2.0, 10.0)], "reward")
    assert list(found.at) == [1, 2, 3, 4, 5]
    assert list(found.mean) == [2, 3, 4, 5, 6]
    assert list(found.low) == [1, 2, 3, 4, 5] and list(found.high) == [3, 4, 5, 6, 7]
    # One seed spends twice as many tokens a step: curves are read off where both have been.
    spent = course([cell(0, 0.0, 10.0), cell(1, 0.0, 20.0)], "reward", "tokens")
    assert (spent.at[0], spent.at[-1]) == (20.0, 50.0)
    assert (spent.low[0], spent.high[0]) == (1.0, 2.0)
    assert course([cell(0, 0.0, 10.0)], "kl") is None
    assert course([], "reward") is None


def test_training_is_drawn_against_what_was_spent(comparison):
    assert ways(comparison) == ["steps", "tokens", "seconds"]
    steps, tokens = learning_curves(comparison), learning_curves(comparison, "tokens")
    assert [f.title for f in steps] == ["Reward", "Entropy", "KL to the reference", "Completion length"]
    assert steps[0].data[1]["x"][-1] == 20 and 15_000 < tokens[0].data[1]["x"][-1] < 25_000
    path = next(t for t in trajectory(comparison).data if t["name"] == "grpo")
    assert len(path["x"]) == BLOCKS and path["x"][0] > path["x"][-1] and path["y"][0] < path["y"][-1]
