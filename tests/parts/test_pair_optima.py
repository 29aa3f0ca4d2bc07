"""What minimises losses of pairs over a whole population, and what moves while they are learnt."""

import math
from dataclasses import replace

import pytest
import torch
from tests.parts.k8 import ALIKE
from tests.parts.test_pair_losses import REF, make, pair
from tests.worlds import table
from torch import Tensor

from keel.core.rows import Pairs, Rows
from keel.exact.optima import optimum
from keel.method import Method
from keel.models.sources import EMA, build
from keel.parts.controllers.score_shift import ScoreShift
from keel.parts.terms.displacement import WatchedPairLoss
from keel.parts.terms.links import BCOPair, LogSigmoid
from keel.parts.terms.scores import LogRatio
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

# -- optima ----------------------------------------------------------------------------------------------------------


def population(ref: Tensor, reward: Tensor) -> Rows:
    """All ordered pairs of completions of one token, each as likely as Bradley and Terry say."""
    n = len(ref)
    first, second = (~torch.eye(n, dtype=torch.bool)).nonzero(as_tuple=True)
    ids = torch.arange(n)[:, None]
    ones = torch.ones(len(first), dtype=torch.float64)
    right = (reward[first] - reward[second]).sigmoid()
    return Rows.build(
        torch.zeros_like(ids),
        torch.ones_like(ids, dtype=torch.bool),
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        weight=torch.ones(n, dtype=torch.float64),
        masks={"nll": ids == 0},
        pairs=Pairs(first, second, right, ones, ones, 0 * ones),
    )


def minimised(method: Method, ref: Tensor, reward: Tensor) -> Tensor:
    logits = ref.log().clone().requires_grad_()
    rows = population(ref, reward)
    climber = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        climber.zero_grad()
        value = method.loss(rows, Stats({LogProb(): logits.log_softmax(0)[:, None], REF: ref.log()[:, None]}), {})
        value.backward()
        return value

    climber.step(closure)
    return logits.detach().softmax(0)


OPTIMA = {
    "reverse_kl": (0.179000, 0.291944, 0.529056),
    "forward_kl": (0.212456, 0.221659, 0.565885),
    "js": (0.060931, 0.125698, 0.813371),
    "alpha:0.5": (0.195427, 0.248146, 0.556427),
}


@pytest.mark.parametrize("divergence", OPTIMA)
def test_population_optimum_of_f_dpo(divergence):
    ref, reward = (torch.tensor(x, dtype=torch.float64) for x in ((0.5, 0.3, 0.2), (0.0, 0.5, 1.0)))
    method = make("f_dpo", divergence=divergence, beta=0.5)
    found = minimised(method, ref, reward)
    assert found.tolist() == pytest.approx(OPTIMA[divergence], abs=ALIKE)
    exact = optimum(reward[None], ref.log()[None], 0.5, method.terms["pairs"].score.map._f).log_prob.exp()[0]
    assert found.tolist() == pytest.approx(exact.tolist(), abs=1e-6)


@pytest.mark.parametrize("h", ["alpha:1.5", "reverse_kl", "chi2"])
def test_every_bregman_has_the_optimum_of_dpo(h):
    """With labels of every order, as in a population; with certain ones the loss has no minimum."""
    ref, reward = (torch.tensor(x, dtype=torch.float64) for x in ((0.5, 0.3, 0.2), (0.0, 0.5, 1.0)))
    found = minimised(make("bregman_po", h=h, beta=0.5), ref, reward)
    assert found.tolist() == pytest.approx(OPTIMA["reverse_kl"], abs=1e-6)


def test_optimum_of_ipo_is_the_tilt_by_the_win_rate():
    """Pairs drawn by the reference; of a completion with itself nothing is learnt."""
    ref, reward = (torch.tensor(x, dtype=torch.float64) for x in ((0.5, 0.3, 0.2), (0.0, 0.5, 1.0)))
    rows = population(ref, reward)
    drawn = rows.pairs.measure * ref[rows.pairs.chosen] * ref[rows.pairs.rejected]
    won = ((reward[:, None] - reward).sigmoid() * ref).sum(1)
    wanted = (ref.log() + won / 0.5).softmax(0)
    at = wanted.log().requires_grad_()
    rows = rows.with_(pairs=replace(rows.pairs, measure=drawn))
    stats = Stats({LogProb(): at.log_softmax(0)[:, None], REF: ref.log()[:, None]})
    value = make("ipo_sum", beta=0.5).loss(rows, stats, {})
    (grad,) = torch.autograd.grad(value, at)
    assert grad.abs().max() < 1e-12


RPO_TOY = {
    0.0: (0.003053, 0.000001, 0.996947),
    0.5: (0.896943, 0.000274, 0.102783),
    2.0: (0.975305, 0.000164, 0.024531),
}


@pytest.mark.parametrize("eta", RPO_TOY)
def test_rpo_keeps_the_chosen_completion(eta):
    """Gradient descent on logits that share features: DPO alone loses the chosen completion to one never seen."""
    features = torch.tensor([[1.0, 0.0], [1.6, 0.3], [0.0, 1.0]], dtype=torch.float64)
    theta, ref = torch.zeros(2, dtype=torch.float64), torch.full((3, 1), 1 / 3, dtype=torch.float64).log()
    rows = population(torch.full((3,), 1 / 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    one = torch.ones(1, dtype=torch.float64)
    rows = rows.with_(pairs=Pairs(torch.tensor([0]), torch.tensor([1]), one, one, one, 0 * one))
    method = make("rpo", eta=eta)
    for _ in range(500):
        theta.requires_grad_()
        logits = (features @ theta).log_softmax(0)[:, None]
        (grad,) = torch.autograd.grad(method.loss(rows, Stats({LogProb(): logits, REF: ref}), {}), theta)
        theta = (theta - grad).detach()
    assert (features @ theta).softmax(0).tolist() == pytest.approx(RPO_TOY[eta], abs=ALIKE)


# -- what moves ------------------------------------------------------------------------------------------------------


def test_the_shift_follows_the_scores():
    """0.5 and 0.25 * 0.5 + 0.75 * 1 of a mean, corrected for its start."""
    shift, state = ScoreShift(decay=0.5), ScoreShift().init()
    found, state = shift.update({}, state, 0)
    assert found == {}
    found, state = shift.update({"rewards/chosen": 0.8, "rewards/rejected": 0.2}, state, 1)
    assert found == {"terms.pairs.link.shift": 0.5}
    found, state = shift.update({"rewards/chosen": 1.5, "rewards/rejected": 0.5}, state, 2)
    assert found["terms.pairs.link.shift"] == pytest.approx((0.5 * 0.5 + 1) / 1.5)
    method = make("bco_pair", shift="running")
    assert method.set(*next(iter(found.items()))).terms["pairs"].link == BCOPair(found["terms.pairs.link.shift"])


def test_the_reference_of_tr_dpo():
    """Every other step 0.6 of the policy and 0.4 of what it was."""
    assert make("tr_dpo").models == {"ref": EMA(0.4, 512)}
    policy = table("policy")
    source, before = build(make("tr_dpo", every=2).models["ref"], policy), policy.table.detach().clone()
    with torch.no_grad():
        policy.table += 1
    assert not source.update(1) and torch.equal(source.module.table, before)
    assert source.update(2)
    torch.testing.assert_close(source.module.table, before + 0.6)


def test_displacement():
    """Two prompts; the policy's probabilities of whole completions are known."""
    pi = torch.tensor([[0.2], [0.01], [0.5], [0.3]], dtype=torch.float64)
    ref = torch.tensor([[0.1], [0.02], [0.5], [0.3]], dtype=torch.float64)
    ids, ones = torch.arange(4)[:, None], torch.ones(2, dtype=torch.float64)
    rows = Rows.build(
        ids, torch.ones_like(ids).bool(), ids, torch.ones_like(ids).bool(), group=torch.tensor([0, 0, 1, 1]),
        pairs=Pairs(torch.tensor([0, 2]), torch.tensor([1, 3]), ones, ones, ones, 0 * ones),
    )  # fmt: skip
    term = WatchedPairLoss(LogSigmoid(), LogRatio(), 0.1)
    found = term.metrics(rows, Stats({LogProb(): pi.log(), REF: ref.log()}))
    assert float(found["displacement/drop"]) == pytest.approx(-math.log(2) / 2)
    assert float(found["displacement/chosen"]) == pytest.approx(math.log(2) / 2)
    slopes = [0.1 / (1 + math.exp(0.1 * m)) for m in (2 * math.log(2), 0.0)]
    assert float(found["displacement/degradation"]) == pytest.approx(sum(slopes) / 2)
    assert float(found["displacement/unseen"]) == pytest.approx(1 - (0.21 + 0.8) / 2)
    assert "rewards/chosen" in found
    flex = make("flex_dpo").terms["pairs"].metrics(rows, Stats({LogProb(): pi.log(), REF: ref.log()}))
    assert "rewards/chosen" not in flex and flex["displacement/unseen"] == found["displacement/unseen"]


def test_displacement_without_a_reference_is_of_log_probabilities():
    rows, stats = pair(0)
    found = WatchedPairLoss(LogSigmoid(), LogRatio(())).metrics(rows, stats)
    assert float(found["displacement/chosen"]) == pytest.approx(-12.0)
    assert float(found["displacement/drop"]) == pytest.approx(-15.0)
