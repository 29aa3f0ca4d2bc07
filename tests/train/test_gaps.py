"""What pairs must state of their scores and margins, before a method that reads these begins."""

import json

import pytest
from typer.testing import CliRunner

import keel
from keel.cli.main import app
from keel.core.errors import ConfigError, DataError
from keel.recipes.registry import recipe_named
from keel.tasks.load import load_task
from keel.train.comparisons import Drawn, _made

PAIRS = [{"prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": "0"} for i in range(1, 9)]
RATED = [{**pair, "score_chosen": 3.0, "score_rejected": 1.0} for pair in PAIRS]
TURNED = [*RATED[:-1], {**RATED[-1], "score_chosen": 1.0}]
QUIET = {"max_steps": 1, "evaluate.before": False, "evaluate.after": False, "train.log_completions": 0}


@pytest.fixture
def train(base, tmp_path):
    def run(name: str, recipe: str, data: list, **options):
        return keel.train(recipe, model=base, data=data, runs=tmp_path, name=name, **QUIET, **options)

    return run


@pytest.mark.parametrize("recipe", ["odpo", "rebel_pairs"])
def test_scores_that_are_read_must_be_there(train, recipe):
    with pytest.raises(DataError, match=r"8 pairs of 8 \(the first: prompt '\d\+1='\) have none") as found:
        train("none", recipe, PAIRS)
    assert "score_chosen" in str(found.value)
    assert train("some", recipe, RATED).metrics["loss"] != train("other", "dpo", RATED).metrics["loss"]


def test_the_logarithm_of_a_gap_needs_gaps_above_0(train):
    with pytest.raises(DataError, match=r"1 pair of 8 \(prompt '8\+1='\) has none above 0.*gap=score"):
        train("turned", "odpo", TURNED)
    train("difference", "odpo", TURNED, gap="score")


def test_a_margin_that_no_pair_states_is_told(train):
    run = train("quiet", "bradley_terry", PAIRS, margin=1.0)
    assert any("no pair has a `margin`" in note for note in run.summary["notes"])
    stated = train("stated", "bradley_terry", [{**pair, "margin": 0.5} for pair in PAIRS], margin=1.0)
    assert not any("no pair has a `margin`" in note for note in stated.summary.get("notes", ()))


def test_built_in_pairs_are_rated_by_their_ranks():
    """Correct ones by length: 3 characters over 5 over wrong."""
    task = load_task("countdown")
    drawn = Drawn(0, ("1+2", "(1+2)", "9"), (1.0, 1.0, 0.0))
    (pair,) = _made(task.train[0], drawn, "pairs", task)
    assert pair.completions == ("1+2", "9") and pair.ratings == (2.0, 0.0) and pair.scores == (1.0, 0.0)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("recipe", ["dpo", "kto", "simpo", "list_dpo", "tdpo", "aot_unpaired", "online_dpo"])
def test_a_beta_that_learns_nothing_or_the_opposite_is_refused(recipe, wrong):
    with pytest.raises((ValueError, ConfigError), match="beta"):
        recipe_named(recipe)(beta=wrong)


def test_on_the_command_line(base, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    asked = ["train", "odpo", "--data", str(tmp_path / "pairs.jsonl"), "--model", base, "--runs", str(tmp_path)]
    found = CliRunner().invoke(app, asked)
    assert isinstance(found.exception, DataError) and "pairs.jsonl" in str(found.exception)
