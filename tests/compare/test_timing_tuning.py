"""How long it takes, and which strength is chosen."""

import json

import pytest

from keel.compare.outcomes import Arm, Budget
from keel.compare.record import Record
from keel.compare.timing import Times, in_words, makespan
from keel.compare.tuning import Tuning, choose, skipped, trial_arms, tuned_setting
from keel.compare.workers import Room, failure, room_for
from keel.core.errors import ConfigError
from tests.compare.small import Pretending, asked, compared

TIMES = Times(startup=5.0, before=10.0, after=20.0, step=2.0, tokens=1000.0, share=0.5)


@pytest.mark.parametrize(
    ("budget", "done", "seconds"),
    [
        ("100steps", 0.0, 5 + 10 + 200 + 20),
        ("100steps", 0.75, 5 + 50 + 20),  # measured before already
        ("10k-tokens", 0.0, 5 + 10 + 2 * 10.5 + 20),  # half a step goes beyond it on average
        ("60s", 0.0, 5 + 10 + 2 * 60.5 + 20),  # a second of every two counts as training
    ],
)
def test_seconds_of_a_cell(budget, done, seconds):
    assert TIMES.cell(Budget.parse(budget), done) == pytest.approx(seconds)


def test_the_parts_of_a_cell_as_it_reports_them():
    found = {"startup": 1, "before": 2, "train": 30, "after": 4, "steps": 10, "tokens": 500, "seconds": 24}
    assert Times.of(found) == Times(1, 2, 4, step=3.0, tokens=50.0, share=0.8)


def test_cells_side_by_side():
    assert makespan([5.0, 1.0, 1.0, 1.0], 2) == 5.0
    assert makespan([1.0, 1.0, 5.0], 2) == 6.0, "in their order, as they are begun"
    assert makespan([2.0, 3.0], 1) == 5.0
    assert makespan([], 4) == 0.0


def test_words():
    assert [in_words(s) for s in (3, 60, 300, 3000, 7300)] == [
        "about 5 s",
        "about 60 s",
        "about 5 min",
        "about 50 min",
        "about 2 h",
    ]


def test_as_many_workers_as_there_is_room_for(monkeypatch):
    monkeypatch.setattr("keel.compare.workers.os.sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr("keel.compare.workers._free_memory", lambda: 40 << 30)
    small, large = 1 << 20, 2 << 30
    assert room_for(99, small, "cpu", None, None) == Room(8, 1, 0, "8 cores")
    assert room_for(99, small, "cpu", None, 3) == Room(2, 3, 0, "8 cores")
    assert room_for(3, small, "cpu", None, None) == Room(3, 1, 0, "3 cells")
    assert room_for(99, large, "cpu", None, None).workers == 40 // 13
    assert room_for(99, small, "cpu", 5, 2) == Room(5, 2)
    assert str(Room(2, 1, 0, "2 cores")) == "2 processes of 1 thread each (2 cores)"
    monkeypatch.setattr("keel.compare.workers._gpus", lambda device: 4)
    assert room_for(99, small, None, None, None) == Room(4, 1, 4, "4 GPUs")


def test_reasons_of_failures():
    assert failure(1, {"error": "a\nb"}) == "a b"
    assert failure(-11, {}) == "killed by SIGSEGV"
    assert failure(3, {}) == "ended with status 3"
    assert failure(0, {}) == "ended without a result"


def test_times_are_measured_once(model, tmp_path):
    """The second comparison knows what the first has measured: it launches no probe."""
    probes = []

    class Counts(Pretending):
        def __call__(self, order, slot):
            probes.extend([order.cell.arm.name] if order.probe else [])
            return super().__call__(order, slot)

    launch = Counts()
    _, said = compared(asked(model, tmp_path, "grpo", "dr_grpo", "rloo", name="one"), launch)
    assert sorted(set(probes)) == ["dr_grpo", "grpo", "rloo"]
    assert len(probes) == 4, "two at a time; the slot beside the third is filled, as it will be"
    assert any(text.startswith("about ") for text in said)
    compared(asked(model, tmp_path, "grpo", "rloo", name="two", seeds=3), launch)
    assert len(probes) == 4
    record = json.loads((tmp_path / "comparisons/two/comparison.json").read_text())
    assert record["announced"] > 0
    assert record["took"] >= 0


@pytest.mark.parametrize(("budget", "said"), [("49tokens", "takes 50 tokens"), ("9s", "takes 10.0 s")])
def test_a_budget_below_a_measured_step_is_refused(model, tmp_path, budget, said):
    """A pretended step takes 50 tokens and 10 s."""
    launch = Pretending()
    with pytest.raises(ConfigError, match=said):
        compared(asked(model, tmp_path, "grpo", name="one", budget=budget), launch)
    assert launch.begun == []


# -- strengths --------------------------------------------------------------------------------------------------------


def test_every_arm_has_as_many_trials():
    arms = [Arm("grpo", "grpo"), Arm("kl_cov", "kl_cov"), Arm("sft", "sft")]
    trials, notes = trial_arms(arms, Tuning())
    assert {name: [dict(arm.settings) for arm in some] for name, some in trials.items()} == {
        "grpo": [{"beta": 0.0}, {"beta": 0.01}, {"beta": 0.04}],
        "kl_cov": [{"coef": 0.3}, {"coef": 1.0}, {"coef": 3.0}],
    }
    assert notes == ["sft has no beta to tune: it is compared as it is"]
    trials, _ = trial_arms(arms[:2], Tuning("beta", (0.5, 1.0)))
    assert [dict(arm.settings) for arm in trials["kl_cov"]] == [{"coef": 0.5}, {"coef": 1.0}]
    assert tuned_setting("grpo", "train.learning_rate") == "train.learning_rate"


def test_what_cannot_be_tuned_is_refused():
    with pytest.raises(ConfigError, match="no arm has it"):
        trial_arms([Arm("sft", "sft")], Tuning())
    with pytest.raises(ConfigError, match="has a value already"):
        trial_arms([Arm("grpo beta=0.1", "grpo", (("beta", 0.1),))], Tuning())
    with pytest.raises(ConfigError, match="no default to start from"):
        trial_arms([Arm("grpo", "grpo")], Tuning("train.learning_rate"))


def test_trials_are_measured_on_other_prompts_where_there_are_some():
    assert (skipped(256, 512), skipped(100, 116), skipped(100, 115), skipped(8, 8)) == (256, 100, 0, 0)


def test_the_best_trial_is_compared_under_the_arms_own_name(model, tmp_path):
    """A made-up score is best at 0.3 of the coefficient; the same on seeds 0 and 1 as on that of the trials."""

    def score(cell):
        return 0.75 if cell.config.arguments.get("coef") == 0.3 else 0.25

    launch = Pretending(score=score)
    wanted = asked(model, tmp_path, "grpo", "kl_cov", name="one", tuning=Tuning(), seeds=1)
    found, said = compared(wanted, launch)
    assert launch.begun[:6] == [
        "grpo beta=0, seed 1000",
        "grpo beta=0.01, seed 1000",
        "grpo beta=0.04, seed 1000",
        "kl_cov coef=0.3, seed 1000",
        "kl_cov coef=1, seed 1000",
        "kl_cov coef=3, seed 1000",
    ]
    assert launch.begun[6:] == ["grpo, seed 0", "kl_cov, seed 0"]
    assert launch.skips == {0, 8}, "trials are measured on the eight prompts after those that are compared"
    comparison = found.comparison
    assert [(arm.name, dict(arm.settings)) for arm in comparison.arms] == [
        ("grpo", {"beta": 0.0}),
        ("kl_cov", {"coef": 0.3}),
    ]
    words = "coef = 0.3 of 0.3: 0.750, 1: 0.250, 3: 0.250 (pass@1 on 8 other held-out prompts, seed 1000)"
    assert comparison.tuned["kl_cov"] == words
    assert f"kl_cov: {words}" in said
    assert [o.values["pass@1"][0] for o in comparison.outcomes] == [0.25, 0.75]
    before = len(launch.begun)
    compared(wanted, launch)
    assert len(launch.begun) == before, "neither trials nor cells are run again"


def test_trials_that_fail_leave_the_default(model, tmp_path):
    ends = {f"grpo beta={beta}, seed 1000": [1] for beta in ("0", "0.01", "0.04")}
    found, _ = compared(asked(model, tmp_path, "grpo", name="one", tuning=Tuning(), seeds=1), Pretending(ends))
    assert found.comparison.tuned == {"grpo": "every trial failed: it is compared at its default"}
    assert found.comparison.arms == (Arm("grpo", "grpo"),)
    assert set(Record.read(found.path).trials) == {f"grpo beta={beta}/1000" for beta in ("0", "0.01", "0.04")}


def test_ties_go_to_the_first_that_is_tried():
    arms = [Arm("a beta=1", "grpo", (("beta", 1.0),)), Arm("a beta=2", "grpo", (("beta", 2.0),))]
    import numpy as np

    from keel.compare.outcomes import Outcome

    outcomes = [Outcome(arm.name, 1000, "finished", values={"pass@1": np.array([0.5, np.nan])}) for arm in arms]
    assert choose({"a": arms}, outcomes, "here")["a"][0] is arms[0]
