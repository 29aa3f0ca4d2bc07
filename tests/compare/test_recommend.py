"""What to try first."""

import json
import math

import pytest

from keel.compare.outcomes import Budget
from keel.compare.recommend import recommend
from keel.core.errors import ConfigError
from keel.recipes.registry import recipes
from tests.compare.small import Pretending, asked, compared


@pytest.fixture
def evidence(monkeypatch):
    """Made-up packaged evidence: the slow recipe gains more, but not in the same time."""
    facts = {
        "steps": 10,
        "completions": 8,
        "base": {"pass@1": [0.5, 0.4, 0.6]},
        "recipes": {
            "slow": {"seeds": 3, "settings": {}, "pass@1": [0.8, 0.7, 0.9], "gain": [0.3, 0.2, 0.4], "step": 4.0},
            "fast": {"seeds": 3, "settings": {}, "pass@1": [0.7, 0.6, 0.8], "gain": [0.2, 0.1, 0.35], "step": 1.0},
            "idle": {"seeds": 1, "settings": {}, "pass@1": [0.5, 0.4, 0.6], "gain": [0.0, -0.1, 0.1], "step": None},
        },
    }
    names = ("countdown", "sparse", "saturated", "number_guessing")
    rates = {"sparse": [0.05, 0, 0.1], "saturated": [0.95, 0.9, 1.0]}
    tasks = {name: {**facts, "base": {"pass@1": rates.get(name, [0.5, 0.4, 0.6])}} for name in names}
    monkeypatch.setattr("keel.compare.recommend._packaged", lambda: {"machine": "none", "tasks": tasks})


def test_the_largest_gain_comes_first(evidence, tmp_path):
    found = recommend(runs=tmp_path)
    assert [one.recipe for one in found.first] == ["slow", "fast", "idle"]
    assert found.tied == ("fast",), "its interval reaches 0.3"
    assert found.near is None
    assert "nothing was compared here" in found.text()
    assert found.command == "keel compare slow fast idle --seeds 3"


def test_time_makes_slow_steps_worth_less(evidence, tmp_path):
    """Four times the time of a step: a quarter of the gain."""
    found = recommend(budget=Budget.parse("5min"), runs=tmp_path)
    assert [(one.recipe, one.worth) for one in found.first][:2] == [("fast", 0.2), ("slow", pytest.approx(0.075))]
    assert recommend(budget=Budget.parse("100steps"), runs=tmp_path).first[0].recipe == "slow"
    assert "--budget 5min" in found.command


def test_what_was_compared_here_counts_more(evidence, model, tmp_path):
    """The pretended cells gain 0.1 over their base whatever the score."""
    task = "number_sorting"
    wanted = asked(model, tmp_path, "grpo", "rloo", name="mine", task=task, settings={"task.options.size": 40})
    compared(wanted, Pretending(score=lambda cell: 0.6 if cell.arm.name == "rloo" else 0.5))
    found = recommend(task, runs=tmp_path)
    first = found.first[0]
    assert (first.source, first.seeds, first.steps, first.step) == ("mine", 2, 2, 2.5)
    assert first.gain[0] == pytest.approx(0.1)
    assert {one.source for one in found.first[:2]} == {"mine"}
    assert {one.source for one in found.first[2:]} == {"Keel's benchmark"}


def test_tasks_without_evidence_are_told_what_is_nearest(evidence, tmp_path):
    found = recommend("number_sorting", runs=tmp_path)
    assert "countdown is nearest: single completions" in found.near
    with pytest.raises(ConfigError, match="unknown task"):
        recommend("countdwn", runs=tmp_path)


@pytest.mark.parametrize(("rate", "name"), [(0.02, "sparse"), (0.5, "countdown"), (0.97, "saturated")])
def test_the_rate_of_the_base_says_what_is_nearest(evidence, tmp_path, rate, name):
    from keel.store.store import Store

    with Store(tmp_path / "keel.sqlite") as store:
        number = store.create_run("run", {}, "grpo", "number_sorting", "m", 0)
        store.finish(number, "finished", {"before": {"pass@1": [rate, 0, 1]}})
    assert f"{name} is nearest" in recommend("number_sorting", runs=tmp_path).near


def test_what_comes_with_keel_is_of_recipes_that_exist(tmp_path):
    found = recommend(runs=tmp_path)
    assert len(found.first) == 5
    known, base = recipes(), 0.362  # of ten seeds; between sets of three its mean differs by some thousandths
    for one in found.first:
        assert one.recipe in known
        assert one.gain[1] <= one.gain[0] <= one.gain[2]
        assert one.score[0] == pytest.approx(base + one.gain[0], abs=8e-3), "over the base of the same seeds"
    data = found.to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert all(math.isfinite(one["worth"]) for one in data["first"])
