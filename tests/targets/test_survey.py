"""What settings ask for, on listed outcomes: known optima, modes, budgets over prompts, files, and what is said."""

import json
import math

import pytest
import torch
from tests.targets.example import SIX, TILT, P, Q, R, tensor
from torch.testing import assert_close

from keel.core.errors import ConfigError, DataError
from keel.divergences.family import f_divergence
from keel.targets.outcomes import listed_outcomes, outcome_rows
from keel.targets.survey import Listed, Survey, Wish

FIVE = Listed(tuple("abcde"), Q.log(), R, tuple("abcde"))
# two good answers written in two ways each, and a wrong one
ANSWERS = Listed(
    ("x+y", "y+x", "z", "z ", "w"), tensor(0.4, 0.2, 0.03, 0.02, 0.25).log(), tensor(1, 1, 1, 1, 0), tuple("sszzw"), "p"
)
OTHER = Listed(("u", "v"), tensor(0.5, 0.5).log(), tensor(0, 0), ("u", "v"), "q")


def test_the_tilt():
    found = Survey((FIVE,)).find(Wish(beta=0.5))
    assert_close(found.log_prob[0].exp(), TILT, **SIX)
    facts = found.facts
    numbers = tensor(facts.reward, facts.kl, facts.entropy, found.value, float(found.partition.log_z))
    assert_close(numbers, tensor(1.571596, 0.918026, 1.176253, 1.112583, 2.225165), **SIX)
    assert (facts.good, facts.largest_of_good, facts.surviving) == (pytest.approx(0.589931, abs=1e-6), 1, 1)


@pytest.mark.parametrize(
    ("wish", "prob"),
    [
        (Wish(f_divergence("pearson"), beta=0.2), (0, 0.390625, 0.0625, 0.40625, 0.140625)),
        (
            Wish(f_divergence("js").per_curvature(), beta=0.5),
            (0.053953, 0.119315, 0.048742, 0.721004, 0.056987),
        ),
        (Wish(best_of=4), (0.025600, 0.392406, 0.104000, 0.343900, 0.134094)),
        (Wish(moments={"b": 0.25, "reward": 0.625}), tuple(Q)),
        (Wish(moments={"good": 0.3}), tuple(torch.where(R == 2, 0.3, Q * 0.7 / 0.9))),
    ],
)
def test_other_wishes(wish, prob):
    assert_close(Survey((FIVE,)).find(wish).log_prob[0].exp(), tensor(*prob), **SIX)


def test_scaled_penalty_has_its_own_log_z():
    """2 KL with beta = 0.25 is KL with beta = 0.5."""
    found = Survey((FIVE,)).find(Wish(f_divergence("kl_policy_ref").scaled(2.0), beta=0.25))
    assert_close(float(found.partition.log_z), 2.225165, **SIX)
    assert_close(found.value, 1.112583, **SIX)
    assert_close(found.divergence, 2 * 0.918026, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["kl_ref_policy", "js", "pearson", "tv"])
def test_value_and_cost_of_other_divergences(name):
    d = f_divergence(name)
    found = Survey((FIVE,)).find(Wish(d, beta=0.5))
    assert_close(found.divergence, float(d.value(found.log_prob[0], Q.log())))
    assert_close(found.value, found.facts.reward - 0.5 * found.divergence)


def test_modes_are_counted_together():
    survey = Survey((ANSWERS,))
    assert survey.threshold == 1
    assert ANSWERS.unseen == pytest.approx(0.1)
    reference = survey.reference
    assert reference.good == pytest.approx(0.65 / 0.9)  # of what is listed
    assert reference.largest == pytest.approx(0.6 / 0.9)
    assert reference.largest_of_good == pytest.approx(0.6 / 0.65)
    share = 0.6 / 0.65
    worth = math.exp(-share * math.log(share) - (1 - share) * math.log(1 - share))
    tilted = survey.find(Wish(beta=0.01)).facts
    assert (tilted.good, tilted.largest) == (pytest.approx(1), pytest.approx(share))
    assert (tilted.effective, reference.effective) == (pytest.approx(worth), pytest.approx(worth))
    assert Survey((ANSWERS,), keep=0.08).find(Wish(beta=0.01)).facts.surviving == 1
    assert Survey((ANSWERS,), keep=0.07).find(Wish(beta=0.01)).facts.surviving == 2


def test_prompts_of_different_sizes():
    """Padding has no mass; a prompt without a good outcome has the reference as its target."""
    survey = Survey((ANSWERS, OTHER))
    for wish in (
        Wish(beta=0.1),
        Wish(f_divergence("jeffreys"), beta=0.1),
        Wish(best_of=3),
        Wish(moments={"good": 0.4}),
    ):
        found = survey.find(wish)
        assert_close(found.log_prob.exp().sum(-1), tensor(1, 1))
        assert_close(found.log_prob[1, :2].exp(), tensor(0.5, 0.5))
        assert bool((found.log_prob[1, 2:] == -math.inf).all())
    alone = Survey((ANSWERS,)).find(Wish(beta=0.1)).facts
    both = survey.find(Wish(beta=0.1)).facts
    assert both.good == pytest.approx(alone.good)  # over the prompts that have one
    assert both.reward == pytest.approx(alone.reward / 2)
    assert survey.find(Wish(moments={"good": 0.4})).facts.reward == pytest.approx(0.4)


def test_one_beta_for_the_budget_of_all_prompts():
    second = Listed(FIVE.names, P.log(), 2 * R, FIVE.modes)
    survey = Survey((FIVE, second))
    found = survey.find(Wish(kl_budget=0.3))
    assert found.facts.kl == pytest.approx(0.3)
    assert_close(survey.find(Wish(beta=found.beta)).log_prob, found.log_prob, rtol=0, atol=1e-9)
    most = survey.find(Wish(kl_budget=10.0))
    assert most.beta == 0
    assert most.facts.reward == pytest.approx(3)
    assert most.partition is None


def test_log_z_of_samples():
    samples = torch.tensor([0, 0, 1, 3])
    listed = Listed(FIVE.names, FIVE.log_ref, R, FIVE.modes, samples=samples)
    found = Survey((listed,)).find(Wish(beta=0.5))
    weights = tensor(1, 1, math.exp(2), math.exp(4))
    assert_close(found.partition.log_z, weights.mean().log()[None])
    assert found.partition.samples == 4
    assert_close(found.log_prob[0].exp(), TILT, **SIX)  # probabilities are known, and need no samples
    fitted = Survey((listed,)).find(Wish(moments={"reward": 1.0})).fit
    assert fitted.standard_error is not None
    tilted = (R[samples] * float(fitted.multipliers)).softmax(0)
    assert float((tilted * R[samples]).sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Wish(),
        lambda: Wish(beta=1.0, best_of=2),
        lambda: Listed((), tensor(), tensor(), ()),
        lambda: Listed(("a", "b"), tensor(0.0), tensor(1), ("a",)),
        lambda: Listed(("a",), tensor(0.1), tensor(1), ("a",)),
        lambda: Listed(("a",), tensor(0.0), tensor(math.inf), ("a",)),
        lambda: Survey((FIVE,)).find(Wish(moments={"f": 0.5})),
        lambda: Survey((FIVE,)).find(Wish(moments={"reward": 2.5})),
    ],
)
def test_what_has_no_meaning_is_refused(wrong):
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        wrong()


# -- files and columns -----------------------------------------------------------------------------------------------

CSV = "name,ref,reward,prompt\na,0.5,1,first\nb,0.5,0,first\nc,1,2,second\n"


def test_files(tmp_path):
    rows = [
        {"name": "a", "ref": 0.5, "reward": 1, "prompt": "first"},
        {"name": "b", "log_ref": math.log(0.5), "reward": 0, "prompt": "first"},
        {"name": "c", "ref": 1, "reward": 2, "prompt": "second"},
    ]
    contents = {
        "o.csv": CSV,
        "o.json": json.dumps({"outcomes": rows}),
        "o.jsonl": "\n".join(json.dumps(row) for row in rows),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        first, second = listed_outcomes(tmp_path / name)
        assert (first.prompt, first.names, second.names) == ("first", ("a", "b"), ("c",))
        assert_close(first.log_ref.exp(), tensor(0.5, 0.5))
        assert_close(torch.cat([first.reward, second.reward]), tensor(1, 0, 2))


def test_columns():
    (listed,) = listed_outcomes(outcome_rows([0.5, 0.25], [1, 0], modes=["m", "m"]))
    assert (listed.names, listed.modes) == (("1", "2"), ("m", "m"))
    assert listed.unseen == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"ref": 0.5}]', "outcome 1: reward must be a number"),
        ('[{"ref": "x", "reward": 1}]', "outcome 1: ref must be a number"),
        ('[{"ref": -0.5, "reward": 1}]', "must be a probability"),
        ('[{"ref": NaN, "reward": 1}]', "not NaN"),
        ('[{"ref": 0.8, "reward": 1}, {"ref": 0.8, "reward": 1}]', "sum to 1.6"),
        ('[{"ref": 0.5, "rewrad": 1}]', "unknown column 'rewrad'"),
        ('[{"ref": 0.5, "reward": Infinity}]', "must be finite"),
        ("[]", "there are no outcomes"),
        ("{}", "a list of outcomes"),
        ("{", "no JSON"),
    ],
)
def test_malformed_files(content, says, tmp_path):
    (tmp_path / "o.json").write_text(content)
    with pytest.raises(DataError, match=says):
        listed_outcomes(tmp_path / "o.json")


def test_missing_files_and_uneven_columns(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        listed_outcomes(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="2 ref, 1 reward"):
        outcome_rows([0.5, 0.5], [1])
    with pytest.raises(ConfigError, match="nothing to compute"):
        outcome_rows(None, None)
