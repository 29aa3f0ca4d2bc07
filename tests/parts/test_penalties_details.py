"""Corners of penalties and transforms: cut ratios, the lower end of a clip, rows that the loss leaves out."""

import math

import pytest
import torch

from keel.core.rows import Rows, Stream
from keel.divergences.sampled import term
from keel.parts.rewards.transforms import KLInReward, WhitenReward
from keel.parts.terms.penalties import (
    NegativeEntropy,
    RootChi2,
    SampledDivergence,
    SampledKL,
    Summand,
    ValueLoss,
    VocabularyDivergence,
)
from keel.parts.weights.importance import TruncatedImportance
from keel.statistics.functionals import LogProb, Value
from keel.statistics.stats import Stats

BASELINE = int(Stream.BASELINE)
CUT = math.exp(20.0)


def rows_of(mask: list[list[bool]], **known) -> Rows:
    shown = torch.tensor(mask)
    first = torch.zeros(len(mask), 1, dtype=torch.long)
    return Rows.build(first, first == 0, torch.zeros(shown.shape, dtype=torch.long), shown, **known)


def logs(**values: list[list[float]]) -> Stats:
    """Log-probabilities of models by name."""
    found = {LogProb(of=(name,)): torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    return Stats(found)


@pytest.mark.parametrize(("far", "rho"), [(40.0, CUT), (-40.0, 1 / CUT), (20.0, CUT), (3.0, math.exp(3.0))])
@pytest.mark.parametrize("ratio", ["detached", "differentiable"])
def test_the_ratio_beside_a_kl_is_cut_at_twenty(ratio, far, rho):
    """k1 = 0.5 times rho."""
    stats = logs(policy=[[-1.0]], ref=[[-1.5]], old=[[-1.0 - far]])
    found = SampledKL("k1", ratio=ratio)(rows_of([[True]]), stats)
    assert float(found) == pytest.approx(0.5 * rho, rel=1e-12)


@pytest.mark.parametrize("stream", [0, BASELINE])
def test_a_kl_of_a_whole_row_is_shared_by_its_tokens_whatever_its_stream(stream):
    """Log-ratios 0.5 and -0.1 where a model chose: k1 = 0.4, half of it each."""
    stats = logs(policy=[[-1.0, 7.0, -1.0, 7.0]], ref=[[-1.5, 0.0, -0.9, 0.0]])
    rows = rows_of([[True, False, True, False]], stream=torch.tensor([stream]))
    found = SampledKL("k1", level="sequence")(rows, stats)
    assert found[0].tolist() == pytest.approx([0.2, 0.0, 0.2, 0.0], abs=1e-15)


def test_the_number_of_a_term_has_no_gradient():
    x = torch.tensor(2.0, requires_grad=True)
    found = term(10 * x, 3 * x)
    found.backward()
    assert (float(found.detach()), float(x.grad)) == (20.0, 3.0)


@pytest.mark.parametrize(
    ("value", "before", "returns", "wanted"),
    [
        (0.0, 1.0, 0.0, 0.32),  # held at 0.8
        (2.0, 1.0, 2.0, 0.32),  # held at 1.2
        (1.1, 1.0, 2.0, 0.405),  # within
        (0.0, 1.0, 3.0, 4.5),  # held at 0.8, but the plain error is the larger one
    ],
)
def test_a_value_is_held_near_the_one_before_at_both_ends(value, before, returns, wanted):
    columns = {"returns": torch.tensor([[returns]]).double(), "values": torch.tensor([[before]]).double()}
    stats = Stats({Value("value"): torch.tensor([[value]], dtype=torch.float64)})
    found = ValueLoss(0.2)(rows_of([[True]], columns=columns), stats)
    assert float(found) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("level", "wanted"), [("token", math.exp(0.5)), ("sequence", math.exp(0.25))])
@pytest.mark.parametrize("stream", [0, BASELINE])
def test_weights_are_one_where_no_model_chose(level, wanted, stream):
    rows = rows_of([[True, False, True]], stream=torch.tensor([stream]))
    rows = rows.with_(logp={"behaviour": torch.tensor([[-1.5, 3.0, -0.75]], dtype=torch.float64)})
    found = TruncatedImportance(100.0, level)(rows, logs(old=[[-1.0, 0.0, -1.0]]))[0].tolist()
    assert found[0] == pytest.approx(wanted, rel=1e-12) and found[1] == 1.0
    low = TruncatedImportance(0.5, level)(rows, logs(old=[[-1.0, 0.0, -1.0]]))[0].tolist()
    assert low[0] == 0.5 and low[1] == 1.0


def test_whitening_adds_epsilon_to_the_deviation():
    """0, 2, 4: deviation 2, and 2 more."""
    rows = rows_of([[True]] * 3, reward=torch.tensor([[0.0], [2.0], [4.0]], dtype=torch.float64))
    assert WhitenReward(epsilon=2.0)(rows, Stats()).reward[:, 0].tolist() == [-0.5, 0.0, 0.5]


def test_a_kl_in_the_reward_of_rows_beside_the_main_stream():
    """A greedy completion pays it, too, so that the two returns can be compared."""
    rows = rows_of([[True, True, False]], stream=torch.tensor([BASELINE]))
    found = KLInReward(0.5)(rows, logs(old=[[-1.0, -1.0, 7.0]], ref=[[-1.5, -0.5, 0.0]])).token_reward
    assert found[0].tolist() == [-0.25, 0.25, 0.0]


@pytest.mark.parametrize("penalty", [SampledKL(), SampledDivergence(), VocabularyDivergence(), RootChi2()])
def test_a_divergence_is_never_sought(penalty):
    """Its loss would have no minimum; entropy may be sought (a coefficient above 0) or avoided."""
    with pytest.raises(ValueError, match=r"of a divergence must not be negative, got -0\.1"):
        Summand(penalty, -0.1)
    assert Summand(penalty, 0.0).coef == 0.0 and Summand(NegativeEntropy(), -0.1).coef == -0.1


def test_a_kl_is_no_bonus():
    with pytest.raises(ValueError, match=r"coef must not be negative, got -0\.1"):
        KLInReward(-0.1)
