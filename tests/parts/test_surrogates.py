"""Policy losses, aggregation modes, corrections and gradients on K8, to six digits."""

import math

import pytest
import torch
from tests.parts.k8 import ALIKE, MASK, OLD_BEHAVIOUR, assert_gradient_of_value, k8_loss, k8_method, k8_rows, k8_stats

from keel.core.aggregate import Aggregation, masked_mean
from keel.parts.advantages.group import GroupCentre
from keel.parts.terms.surrogate import CISPO, Clipped, LogLikelihood, Surrogate, Unclipped
from keel.parts.weights.importance import TruncatedImportance
from keel.rollouts.rollout import Rollout
from keel.statistics.functionals import LogProb

OLD = LogProb(of=("old",))
MEAN, SEQUENCES = "token_mean", "sequence_mean_token_mean"
LOSSES = {
    "reinforce": (k8_method(LogLikelihood()), -0.238000),
    "unclipped": (k8_method(Unclipped()), 0.300505),
    "ppo": (k8_method(Clipped(0.2)), 0.350785),
    "dual clip": (k8_method(Clipped(0.2, dual=3.0)), 0.321804),
    "clip higher": (k8_method(Clipped(0.2, 0.28)), 0.339326),
    "gspo 0.2": (k8_method(Clipped(0.2), "sequence", SEQUENCES), -0.031253),
    "gspo": (k8_method(Clipped(3e-4, 4e-4), "sequence", SEQUENCES), 0.051166),
    "cispo verl": (k8_method(CISPO(0.8, 1.28)), -0.216462),
    "cispo trl": (k8_method(CISPO(0.0, 5.0)), -0.357786),
    "sequence mean of token means": (k8_method(Clipped(0.2), mode=SEQUENCES), 0.030034),
    "sequence mean of token sums": (k8_method(Clipped(0.2), mode="sequence_mean_token_sum"), 0.876964),
    "constant": (k8_method(Clipped(0.2), mode="constant"), 0.219241),
    "tis token": (k8_method(Clipped(0.2), weights={"tis": TruncatedImportance(2.0)}), 0.335862),
    "tis sequence": (k8_method(Clipped(0.2), weights={"tis": TruncatedImportance(2.0, "sequence")}), 0.268387),
    "dr_grpo token mean": (k8_method(Clipped(0.2)).replacing(advantage={"centre": GroupCentre()}), 0.191068),
    "dr_grpo constant": (
        k8_method(Clipped(0.2), mode="constant").replacing(advantage={"centre": GroupCentre()}),
        0.119417,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name, dtype):
    method, wanted = LOSSES[name]
    found, _ = k8_loss(method, dtype)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(wanted, abs=ALIKE if dtype == torch.float64 else 1.2e-6)


def test_constant_without_the_number_of_rows():
    method, _ = LOSSES["constant"]
    assert float(k8_loss(method)[0]) * 8 == pytest.approx(1.753927, abs=8 * ALIKE)


GRADIENTS = {
    "dual": (
        k8_method(Clipped(0.2, dual=3.0)),
        [-0.047855, -0.032078, 0],
        [0.041189, 0.055600, 0, 0],
    ),
    "ppo alone": (
        k8_method(Clipped(0.2)),
        [-0.047855, -0.032078, 0],
        [0.041189, 0.055600, 0, 0.866024 * math.exp(1.3) / 20],
    ),
    "cispo": (
        k8_method(CISPO(0.8, 1.28)),
        [-0.047855, -0.034641, -0.055426],
        [0.041189, 0.055426, 0.034641, 0.055426],
    ),
    "gspo": (k8_method(Clipped(0.2), "sequence", SEQUENCES), [-0.039879] * 3, [0.035630] * 4),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient(name):
    method, first, second = GRADIENTS[name]
    _, grad = k8_loss(method)
    assert grad[0, :3].tolist() == pytest.approx(first, abs=ALIKE)
    assert grad[1].tolist() == pytest.approx(second, abs=ALIKE)
    assert not grad[~MASK].any()


def test_the_clips_silence_six_tokens_and_the_dual_clip_one_more():
    """Shares .30 and .05 of twenty; the one is token 3 of row 1, with a ratio of 3.67 and A < 0."""
    silent = {name: (k8_loss(LOSSES[name][0])[1] == 0) & MASK for name in ("ppo", "dual clip")}
    assert int(silent["ppo"].sum()) == 6
    assert (silent["dual clip"] & ~silent["ppo"]).nonzero().tolist() == [[1, 3]] and int(silent["dual clip"].sum()) == 7


@pytest.mark.parametrize("name", ["ppo", "dual clip", "clip higher", "unclipped", "reinforce", "tis sequence"])
def test_gradient_by_finite_differences(name):
    """Of the losses whose gradient is that of their value."""
    assert_gradient_of_value(LOSSES[name][0])


def test_sequence_ratio_is_the_geometric_mean():
    surrogate = Surrogate(Clipped(), "sequence")
    found = surrogate.log_ratio(k8_rows(), k8_stats()).exp()
    wanted = torch.tensor([1.105171, 1.316531, 1.105171, 1.246077, 0.839457, 1.091442, 0.967216, 1.419068]).double()
    torch.testing.assert_close(found[:, 0], wanted, rtol=0, atol=ALIKE)


def test_trajectory_ratio_is_the_product():
    """Clipped PPO with exp(sum of log-ratios), mean over rows, the sums of K8 taken by hand."""
    advantages = [0.866024, -0.866024, -0.866024, 0.866024, -0.499999, -0.499999, -0.499999, 1.499997]
    sums = [0.3, 1.1, 0.2, 0.22, -0.35, 0.35, -0.1, 0.35]
    losses = []
    for a, s in zip(advantages, sums, strict=True):
        rho = math.exp(s)
        losses.append(max(-a * rho, -a * min(max(rho, 0.8), 1.2)))
    found, grad = k8_loss(k8_method(Clipped(0.2), "trajectory", SEQUENCES))
    assert float(found) == pytest.approx(sum(losses) / 8, abs=1e-6)
    assert grad[1].tolist() == pytest.approx([0.866024 * math.exp(1.1) / 8] * 4, abs=1e-6)
    assert not grad[0].any()  # clipped as a whole


@pytest.mark.parametrize("level", ["sequence", "trajectory"])
def test_sequence_ratios_ignore_an_unchosen_gap(level):
    rows, stats = k8_rows(), k8_stats()
    gap = MASK.clone()
    gap[1, 1] = False
    found = Surrogate(Clipped(), level).log_ratio(rows.with_(mask=gap), stats)[1]
    total = -0.05 - 0.40 + 1.30
    assert found[0].item() == pytest.approx(total / 3 if level == "sequence" else total, abs=1e-12)
    assert found[1] == 0


def test_importance_weights():
    """Products of the ratios between sampler and trainer, and their truncation."""
    products = [2.339647, 0.463013, 1.323130, 1, 0.990050, 1.803988, 6.171858, 0.990050]
    rows, stats = k8_rows(), k8_stats()
    whole = TruncatedImportance(100.0, "sequence")(rows, stats)
    assert whole[:, 0].tolist() == pytest.approx(products, abs=1e-6)
    cut = TruncatedImportance(2.0, "sequence")(rows, stats)
    assert cut[:, 0].tolist() == pytest.approx([min(p, 2.0) for p in products], abs=1e-6)
    tokens = TruncatedImportance(2.0)(rows, stats)
    wanted = [[min(math.exp(x), 2.0) for x in row] for row in OLD_BEHAVIOUR]
    for found, row in zip(tokens.tolist(), wanted, strict=True):
        assert found == pytest.approx(row + [1.0] * (4 - len(row)), abs=1e-12)
    assert float(masked_mean(tokens, rows)) == pytest.approx(1.129055, abs=ALIKE)
    learning = stats.merged({OLD: stats[OLD].clone().requires_grad_()})
    assert not TruncatedImportance(2.0)(rows, learning).requires_grad


def test_a_sampler_that_reports_nan_gets_weight_one():
    rows = k8_rows()
    behaviour = rows.logp["behaviour"].clone()
    behaviour[0, 0] = torch.nan
    weights = TruncatedImportance(2.0)(rows.with_(logp={"behaviour": behaviour}), k8_stats())
    assert weights[0, 0] == 1
    with pytest.raises(ValueError, match="behaviour"):
        TruncatedImportance()(rows.with_(logp={}), k8_stats())


def test_metrics():
    method = k8_method(Clipped(0.2))
    stats = k8_stats()
    rows = method.prepare(k8_rows(), stats, {})
    found = method.surrogate.metrics(rows, stats)
    assert float(found["approx_kl"]) == pytest.approx(0.106962, abs=ALIKE)
    assert float(found["clip_ratio/region_mean"]) == pytest.approx(0.30, abs=1e-7)
    assert float(found["clip_ratio/low_mean"]) == pytest.approx(0.15, abs=1e-7)
    assert float(found["clip_ratio/high_mean"]) == pytest.approx(0.15, abs=1e-7)
    log_ratio = method.surrogate.log_ratio(rows, stats).detach()
    assert float(masked_mean(-log_ratio, rows)) == pytest.approx(-0.103500, abs=ALIKE)


def test_ratios_do_not_overflow():
    """All ratios are e^1000, cut at e^20 and then by the clips; only CISPO keeps a gradient, 5 A / 20.

    Winners hold 4 tokens of A = sqrt(3) / 2 and 1 of 3 / 2, losers 6 of -sqrt(3) / 2 and 9 of -1 / 2.
    """
    won, lost = 2 * math.sqrt(3) + 1.5, 3 * math.sqrt(3) + 4.5
    stats = k8_stats()
    far = stats.merged({LogProb(): (stats[LogProb()].detach() + 1000).requires_grad_()})
    cispo = 5 * ((lost - won) / 20 * 1000 - 0.238)  # 1000 above the example, where REINFORCE is -0.238
    for f, wanted, slope in (
        (Unclipped(), (lost - won) / 20 * math.exp(20), 0.0),
        (Clipped(dual=3.0), (3 * lost - 1.2 * won) / 20, 0.0),
        (CISPO(), cispo, -5 * math.sqrt(3) / 2 / 20),
    ):
        method = k8_method(f)
        loss = method.loss(method.prepare(k8_rows(), far, {}), far, {})
        (grad,) = torch.autograd.grad(loss, far[LogProb()])
        assert float(loss.detach()) == pytest.approx(wanted, rel=5e-6)
        assert grad[0].tolist() == pytest.approx([slope] * 3 + [0.0], abs=1e-6)


def test_garbage_in_the_padding_does_not_matter():
    """NaN and infinity there, too, not only the 7 of the other tests."""
    for method, wanted in LOSSES.values():
        for garbage in (torch.nan, torch.inf, -torch.inf):
            stats = k8_stats()
            live = torch.where(MASK, stats[LogProb()].detach(), garbage).requires_grad_()
            dirty = stats.merged({LogProb(): live})
            loss = method.loss(method.prepare(k8_rows(), dirty, {}), dirty, {})
            assert float(loss.detach()) == pytest.approx(wanted, abs=ALIKE)
            (grad,) = torch.autograd.grad(loss, live)
            assert bool(torch.isfinite(grad[MASK]).all())


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Clipped(-0.1), "negative"),
        (lambda: Clipped(0.2, -0.1), "negative"),
        (lambda: Clipped(dual=1.0), "above 1"),
        (lambda: CISPO(2.0, 1.0), "low <= high"),
        (lambda: TruncatedImportance(0.0), "positive"),
        (lambda: Aggregation("constant"), "max_length"),
        (lambda: Rollout(temperature=0.0), "positive"),
    ],
)
def test_settings_out_of_range(make, what):
    with pytest.raises(ValueError, match=what):
        make()


def test_a_surrogate_needs_an_advantage():
    with pytest.raises(ValueError, match="advantage"):
        Surrogate(Clipped())(k8_rows(), k8_stats())
