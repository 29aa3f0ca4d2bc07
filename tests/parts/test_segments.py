"""Contrastive preference learning: the paper's numbers, its limits, soft labels, ranks and discounts."""

import math
from dataclasses import replace

import pytest
import torch
from tests.parts.completions import ALIKE, V2, assert_gradient, completions, paired

from keel.core.errors import MethodError
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss, Side
from keel.parts.terms.scores import LogRatio
from keel.parts.terms.segments import ConservativeBias, RankedPairs, SegmentDiscount
from keel.recipes.listwise import cpl
from keel.recipes.preference import dpo
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

OWN = LogRatio(())


@pytest.mark.parametrize(
    ("advantages", "lam", "wanted"),
    [((-2, -3), 0.5, 0.974077), ((-2, -3), 1.0, 0.313262), ((-1, -2), 1.0, 0.313262), ((-1, -2), 0.5, 0.693147)],
)
def test_the_paper_numbers(advantages, lam, wanted):
    rows, stats = completions([10.0 * a for a in advantages], [0.0, 0.0])
    rows = paired(rows, [0], [1])
    assert float(PairLoss(ConservativeBias(lam), OWN, 0.1)(rows, stats)) == pytest.approx(wanted, abs=ALIKE)


def test_ranks():
    """A = (-1, -2, -3) from best to worst: the mean over the three ordered pairs."""
    rows, stats = completions([-10.0, -20.0, -30.0], [0.0] * 3)
    rows = paired(rows, [0, 0, 1], [1, 2, 2])
    loss = RankedPairs(PairLoss(ConservativeBias(0.5), OWN, 0.1))
    assert float(loss(rows, stats)) == pytest.approx(0.713767, abs=ALIKE)
    parts = [softplus(0.5 * b - a) for a, b in ((-1, -2), (-1, -3), (-2, -3))]
    assert parts == pytest.approx([0.693147, 0.474077, 0.974077], abs=ALIKE)
    assert loss.reads == "lists" and cpl(ranked=True).reads == "lists" and cpl().reads == "pairs"
    assert loss.needs == loss.pairs.needs and loss.heads_read == () and loss.coef == 1
    assert loss.metrics(rows, stats).keys() == loss.pairs.metrics(rows, stats).keys()


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_with_a_reference_and_without_a_bias_it_is_dpo_bit_for_bit(dtype):
    policy, ref = [-2.13, -3.57, -1.71, -4.09], [-3.01, -2.93, -3.11, -3.05]
    rows, stats = completions(policy, ref, [3, 2, 5, 4], dtype)
    rows = paired(rows, [0, 1], [2, 3])
    one, other = cpl(lam=1.0, reference=True), dpo()
    assert torch.equal(one.loss(rows, stats, {}), other.loss(rows, stats, {}))
    grads = [torch.autograd.grad(m.loss(rows, stats, {}), stats[LogProb()])[0] for m in (one, other)]
    assert torch.equal(*grads)


def test_cpl_kl_on_v2():
    """a = 1.5, d = -0.75 at beta 0.1, lam 0.75: softplus(-0.05625 - 0.15)."""
    rows, stats = completions(**V2)
    found = cpl(lam=0.75, reference=True).loss(paired(rows, [0], [1]), stats, {})
    assert float(found) == pytest.approx(softplus(0.75 * -0.075 - 0.15), abs=1e-9)


def test_a_label_that_is_turned_biases_the_other_side():
    """y l(A1, A2) + (1 - y) l(A2, A1): lam goes with whichever is not preferred."""
    rows, stats = completions([-20.0, -30.0], [0.0, 0.0])
    rows = paired(rows, [0], [1])
    rows = rows.with_(pairs=replace(rows.pairs, label=torch.tensor([0.5])))
    wanted = 0.5 * softplus(-1.5 + 2) + 0.5 * softplus(-1 + 3)
    assert float(PairLoss(ConservativeBias(0.5), OWN, 0.1)(rows, stats)) == pytest.approx(wanted, abs=1e-6)


def test_below_one_the_data_become_likelier():
    """The gradient in both log-likelihoods is -p and lam p; at lam 1 they cancel."""
    rows, stats = completions([-20.0, -30.0], [0.0, 0.0], [1, 1])
    rows = paired(rows, [0], [1])
    for lam in (0.5, 1.0):
        (grad,) = torch.autograd.grad(PairLoss(ConservativeBias(lam), OWN, 0.1)(rows, stats), stats[LogProb()])
        p = 1 / (1 + math.exp(-2 + lam * 3))
        assert grad[:, 0].tolist() == pytest.approx([-0.1 * p, 0.1 * lam * p], rel=1e-6)
    assert_gradient(PairLoss(ConservativeBias(0.5), OWN, 0.1), rows, stats)


def test_behaviour_cloning():
    """bc_coef times the mean over all tokens of -log pi: 50 over 4 tokens."""
    rows, stats = completions([-20.0, -30.0], [0.0, 0.0])
    rows = paired(rows, [0], [1])
    found = cpl(lam=1.0, bc_coef=0.5).contributions(rows, stats, {})
    assert float(found["bc"]) == pytest.approx(0.5 * 50 / 4)
    assert float(found["pairs"]) == pytest.approx(0.313262, abs=ALIKE)


def test_discount():
    """Log-likelihoods of -1 a token: 1 + 1/2 + 1/4; a gap does not count as a step."""
    rows, stats = completions([-3.0, -2.0], [0.0, 0.0], [3, 2])
    mask = rows.mask.clone()
    mask[0, 1] = False
    stats = Stats({LogProb(): torch.full(rows.mask.shape, -1.0)})
    score = LogRatio((), weight=SegmentDiscount(0.5))
    assert score(Side(rows, stats, torch.tensor([0, 1]))).tolist() == [-1.75, -1.5]
    assert score(Side(rows.with_(mask=mask), stats, torch.tensor([0, 1]))).tolist() == [-1.5, -1.5]
    assert cpl(gamma=0.5).terms["pairs"].score.weight == SegmentDiscount(0.5)


@pytest.mark.parametrize("make", [lambda: ConservativeBias(0.0), lambda: ConservativeBias(1.5),
                                  lambda: SegmentDiscount(0.0), lambda: SegmentDiscount(1.01)])  # fmt: skip
def test_bad_settings(make):
    with pytest.raises(ValueError):
        make()


def test_scores_that_leave_a_constant_open_need_lam_1():
    class Open:
        difference_only = True

        def __call__(self, log_ratio):
            return log_ratio

    PairLoss(ConservativeBias(1.0), LogRatio(map=Open()))
    with pytest.raises(MethodError, match="constant of the prompt"):
        PairLoss(ConservativeBias(0.5), LogRatio(map=Open()))
    assert LogSigmoid.both is False
