"""Values and gradients over a whole vocabulary in fp32 against fp64 autograd: near and equal models, lost outcomes."""

import math

import pytest
import torch
from tests.worlds import noise
from torch import Tensor, nn

from keel.core.policy import Head
from keel.statistics.functionals import Divergence, Entropy, LogProb
from keel.statistics.positions import Positions
from keel.statistics.transforms import KeepTopK
from keel.statistics.workspace import LARGE, Workspace

KINDS = ("kl_policy_ref", "kl_ref_policy", "js", "jeffreys", "tv", "hellinger", "alpha:0.5", "3*kl_policy_ref")
GENERATORS = {
    "kl_policy_ref": lambda p, q: p * (p / q).log(),
    "kl_ref_policy": lambda p, q: q * (q / p).log(),
    "js": lambda p, q: (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()) / 2,
    "jeffreys": lambda p, q: (p - q) * (p / q).log(),
    "tv": lambda p, q: (p - q).abs() / 2,
    "hellinger": lambda p, q: (p.sqrt() - q.sqrt()).square() / 2,
    "alpha:0.5": lambda p, q: 2 * (p.sqrt() - q.sqrt()).square(),
    "3*kl_policy_ref": lambda p, q: 3 * p * (p / q).log(),
}


def positions(policy: Tensor, ref: Tensor) -> Positions:
    token = torch.arange(len(policy)) % policy.shape[1]
    return Positions(token, {"policy": policy, "ref": ref}, {"policy": Head(), "ref": Head()})


def found(functional, policy: Tensor, ref: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient; the gradient in a second pass that knows the numbers of the first."""
    first = positions(policy, ref)
    value = functional(first)
    again = positions(policy, ref)
    again.known = first.known
    dlogits = torch.zeros_like(policy)
    functional.backward(again, grad, dlogits)
    again.settle(dlogits)
    alone, other = positions(policy, ref), torch.zeros_like(policy)
    functional.backward(alone, grad, other)
    alone.settle(other)
    torch.testing.assert_close(other, dlogits, rtol=1e-5, atol=1e-9)
    return value, dlogits


def wanted(function, policy: Tensor, ref: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = policy.double().requires_grad_()
    value = function(leaf, ref.double())
    (slope,) = torch.autograd.grad(value, leaf, grad.double())
    return value.detach(), slope


def logits(offset: float = 0.0, n: int = 6, vocabulary: int = 5000) -> tuple[Tensor, Tensor, Tensor]:
    policy = 3 * noise("policy", shape=(n, vocabulary)).float()
    ref = policy + 0.3 * noise("ref", shape=(n, vocabulary)).float()
    return policy + offset, ref, noise("grad", shape=(n,)).float()


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_in_single_precision(kind):
    policy, ref, grad = logits()
    value, slope = found(Divergence(kind), policy, ref, grad)
    generator = GENERATORS[kind]
    true, gradient = wanted(lambda z, q: generator(z.softmax(-1), q.softmax(-1)).sum(-1), policy, ref, grad)
    torch.testing.assert_close(value.double(), true, rtol=3e-6, atol=0)
    torch.testing.assert_close(slope.double(), gradient, rtol=1e-4, atol=3e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("offset", [0.0, 50.0, -200.0])
def test_entropy_and_log_prob_in_single_precision(offset):
    policy, ref, grad = logits(offset)
    entropy, slope = found(Entropy(), policy, ref, grad)
    true, gradient = wanted(lambda z, q: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1), policy, ref, grad)
    torch.testing.assert_close(entropy.double(), true, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope.double(), gradient, rtol=1e-4, atol=2e-6 * float(gradient.abs().max()))
    chosen, slope = found(LogProb(), policy, ref, grad)
    true, gradient = wanted(lambda z, q: z.log_softmax(-1).diagonal(), policy, ref, grad)
    torch.testing.assert_close(chosen.double(), true, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope.double(), gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharp", [1.0, 10.0])
def test_a_model_does_not_differ_from_itself(kind, sharp):
    policy, _, grad = logits()
    value, slope = found(Divergence(kind), sharp * policy, sharp * policy, grad)
    assert float(value.abs().max()) < 1e-7 and float(slope.abs().max()) < 1e-8


@pytest.mark.parametrize("kind", ["kl_policy_ref", "kl_ref_policy"])
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_near_models(kind, distance):
    """KL of 1e-5, 1e-7 and 1e-9, without cancellation: half of chi-square, far below fp32's step at 1."""
    policy = 3 * noise("policy", shape=(6, 5000)).float()
    ref = policy + distance * noise("ref", shape=(6, 5000)).float()
    value, _ = found(Divergence(kind), policy, ref, torch.ones(6))
    true, _ = wanted(lambda z, q: GENERATORS[kind](z.softmax(-1), q.softmax(-1)).sum(-1), policy, ref, torch.ones(6))
    torch.testing.assert_close(value.double(), true, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lost_outcomes(dtype):
    """p = (1/4, 3/4, 0), both without the third; q = (1/2, 1/2, 0): known logarithms, and no nan anywhere."""
    lost = -math.inf
    policy = torch.tensor([[0.0, math.log(3), lost]], dtype=dtype)
    ref = torch.tensor([[1.0, 1.0, lost]], dtype=dtype)
    grad = torch.ones(1, dtype=dtype)
    h = math.log(4) - 0.75 * math.log(3)
    kl = math.log(2) - h
    for functional, value, slope in (
        (Entropy(), h, [-0.25 * (h - math.log(4)), -0.75 * (h + math.log(0.75)), 0.0]),
        (Divergence("kl_policy_ref"), kl, [0.25 * (math.log(0.5) - kl), 0.75 * (math.log(1.5) - kl), 0.0]),
        (Divergence("kl_ref_policy"), math.log(2 / math.sqrt(3)), [-0.25, 0.25, 0.0]),
        (Divergence("tv"), 0.25, [-0.1875, 0.1875, 0.0]),
    ):
        measured, dlogits = found(functional, policy, ref, grad)
        assert float(measured) == pytest.approx(value, abs=1e-6)
        assert dlogits[0].tolist() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "only_policy", "only_ref"),
    [
        ("kl_policy_ref", math.inf, math.log(2)),
        ("kl_ref_policy", math.log(2), math.inf),
        ("jeffreys", math.inf, math.inf),
        ("tv", 0.5, 0.5),
        ("chi2_policy_ref", math.inf, 1.0),
        ("chi2_ref_policy", 1.0, math.inf),
    ],
)
def test_outcomes_of_one_alone(kind, only_policy, only_ref):
    """(1/2, 1/2) against (1, 0), and the other way round: inf where the kind says so, and a finite gradient."""
    both, one = torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])
    for policy, ref, value in ((both, one, only_policy), (one, both, only_ref)):
        measured, slope = found(Divergence(kind), policy, ref, torch.ones(1))
        assert float(measured) == pytest.approx(value, rel=1e-6)
        assert bool(slope.isfinite().all())


def test_one_lost_outcome_in_a_chunk_leaves_the_others_alone():
    policy, ref, grad = logits(vocabulary=50)
    clean = [found(f, policy, ref, grad) for f in (Entropy(), Divergence("kl_policy_ref"))]
    policy[2, 7] = ref[2, 7] = ref[3, 1] = policy[3, 1] = -math.inf
    for functional, (value, slope) in zip((Entropy(), Divergence("kl_policy_ref")), clean, strict=True):
        other, gradient = found(functional, policy, ref, grad)
        keep = torch.tensor([0, 1, 4, 5])
        torch.testing.assert_close(other[keep], value[keep], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient[keep], slope[keep], rtol=1e-4, atol=1e-7)
        assert bool(other.isfinite().all()) and bool(gradient.isfinite().all())


def test_masks_of_the_most_negative_number():
    """A finite mask counts as a lost outcome: nothing overflows."""
    policy, ref, grad = logits(vocabulary=50)
    low = torch.finfo(torch.float32).min
    dense = [found(f, policy[:, 1:], ref[:, 1:], 5 * grad) for f in (Entropy(), Divergence("kl_policy_ref"))]
    policy[:, 0] = ref[:, 0] = low
    for functional, (value, slope) in zip((Entropy(), Divergence("kl_policy_ref")), dense, strict=True):
        other, gradient = found(functional, policy, ref, 5 * grad)
        torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient[:, 1:], slope, rtol=1e-4, atol=1e-6)
        assert not gradient[:, 0].any()


def test_a_filter_that_removed_the_token():
    policy, ref, grad = logits(vocabulary=50)
    value, slope = found(LogProb(transform=KeepTopK(1)), policy, ref, grad)
    gone = policy.argmax(-1) != torch.arange(6)
    assert bool((value[gone] == -math.inf).all()) and not slope[gone].any()


# -- memory that is used again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [50, LARGE // 8])
def test_positions_use_each_others_memory(vocabulary):
    """Chunks of several sizes one after the other, in either order of storage, give what each gives alone."""
    workspace = Workspace()
    module = nn.Linear(4, vocabulary).requires_grad_(False)
    with torch.no_grad():
        module.weight.copy_(noise("weight", shape=(vocabulary, 4)))
    head = Head(module, scale=0.5)
    for n in (8, 3, 9, 0):
        hidden, token = noise("hidden", n, shape=(n, 4)).float(), torch.zeros(n, dtype=torch.long)
        at = Positions(token, {"policy": hidden}, {"policy": head}, temperature=0.7, workspace=workspace)
        z = (module(hidden).double() * 0.5) / 0.7
        true = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
        torch.testing.assert_close(Entropy()(at).double(), true, rtol=1e-5, atol=0)
        torch.testing.assert_close(LogProb()(at).double(), z.log_softmax(-1)[:, 0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(at.logits("policy").double(), z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(at.log_z("policy").double(), z.logsumexp(-1), rtol=1e-5, atol=1e-6)
        at.close()


def test_a_table_of_logits_is_left_as_it_was():
    """Where the state is the logits, nothing is written over it."""
    policy, ref, grad = logits(vocabulary=50)
    before = policy.clone(), ref.clone()
    found(Divergence("kl_policy_ref"), policy, ref, grad)
    assert torch.equal(policy, before[0]) and torch.equal(ref, before[1])
