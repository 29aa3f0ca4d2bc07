"""Contrast and guidance: known vectors, limiting cases, and laws of decoding that are products."""

import itertools
import math

import pytest
import torch
from jaxtyping import Bool, Float
from tests.sampling.chain3 import BETA, MEAN, PRIOR, REWARD, SPACE, Z, chain, leaves
from torch import Tensor

from keel.core.chance import Sample, law
from keel.core.errors import UserError
from keel.exact.chain import TabularChain
from keel.exact.space import TabularPolicy
from keel.sampling.contrast import Guidance, UncertaintyContrast, contrast, gate, guided
from keel.sampling.fusion import divergence
from keel.sampling.joint import JointChain
from keel.sampling.kernels import Kernel
from keel.sampling.smc import SMC

P, Q = torch.tensor([[0.40, 0.35, 0.25]], dtype=torch.float64), torch.tensor([[0.70, 0.20, 0.10]], dtype=torch.float64)
SURE = torch.tensor([[0.98, 0.01, 0.01]], dtype=torch.float64)
INF = math.inf
OTHER = TabularPolicy(SPACE, 1.5 * torch.randn(1, 7, 2, generator=torch.Generator().manual_seed(4)).double())
ALWAYS = {"gate": "always", "alpha": 0.0}


def joint(copies: int = 1, value: Float[Tensor, "Q X"] | None = None, other: TabularPolicy = OTHER) -> JointChain:
    second = TabularChain(other, torch.zeros(1, 8), torch.zeros(copies, dtype=torch.long))
    return JointChain(chain(copies, value), {"lame": second, "unconditional": second})


def decoded(kernel: Kernel, other: TabularPolicy = OTHER) -> Float[Tensor, "S"]:
    """The exact law of decoding with a kernel."""
    sampler = SMC(1, BETA, kernel=kernel, ess_threshold=0.0)
    probability, found = law(lambda copies, rng: sampler(joint(copies, other=other), rng))
    return torch.zeros(8).double().index_add(0, leaves(found), probability)


def by_hand(score) -> Float[Tensor, "S"]:
    """Products of conditionals proportional to score(p, q), in plain Python."""
    main, other = (policy.table[0].softmax(-1).tolist() for policy in (chain().logits, OTHER))
    found = []
    for leaf in itertools.product((0, 1), repeat=3):
        probability, place = 1.0, 0
        for token in leaf:
            scores = score(main[place], other[place])
            probability *= scores[token] / sum(scores)
            place = 2 * place + 1 + token
        found.append(probability)
    return torch.tensor(found, dtype=torch.float64)


def estimate(kernel: Kernel) -> float:
    """E[Z_hat] of SMC with the kernel as its proposal."""
    sampler = SMC(2, BETA, ess_threshold=0.9, kernel=kernel)
    probability, found = law(lambda copies, rng: sampler(joint(copies, MEAN), rng))
    return float((probability * found.log_z.exp()).sum())


def test_the_worked_example():
    found = contrast(P.log(), Q.log(), 0.5).softmax(-1)
    torch.testing.assert_close(found[0], torch.tensor([0.260516, 0.398916, 0.340568]).double(), atol=1e-6, rtol=0)
    assert float(P.std(correction=0)) == pytest.approx(0.062361, abs=1e-6)
    mixture = ((P + Q) / 2).log()
    js = (divergence(P.log(), mixture) + divergence(Q.log(), mixture)) / 2
    assert float(js) == pytest.approx(0.047678, abs=1e-6)


def test_the_gate():
    both = torch.cat([P, SURE]).log()
    assert gate(both, "std", 0.05).tolist() == [False, False]
    assert gate(both, "std", 0.0624).tolist() == [True, False]
    assert gate(both, "std", 0.1).tolist() == [True, False]  # the confident one has 0.457
    assert gate(both, "std", 0.4573).tolist() == [True, True]
    entropy = -(P * P.log()).sum().item()
    assert gate(both, "entropy", entropy - 1e-6).tolist() == [True, False]
    assert gate(both, "entropy", entropy + 1e-6).tolist() == [False, False]
    assert gate(both, "max", 0.59).tolist() == [True, False]
    assert gate(both, "max", 0.61).tolist() == [False, False]
    assert gate(both, "always", 0.0).tolist() == [True, True]
    assert not bool(gate(torch.zeros(1, 3), "std", 0.0))  # 0 is never, even for a flat one
    wide = torch.cat([P.log() - 1, torch.full((1, 97), -9.0).double()], 1)  # the others hold next to nothing
    assert gate(wide, "std", 0.07).tolist() == [True] and gate(wide, "std", 0.04).tolist() == [False]
    assert gate(wide, "std", 0.0624, top=3).tolist() == [True]
    assert gate(wide, "std", 0.0623, top=3).tolist() == [False]


def test_the_plausible_set():
    p = torch.tensor([[0.50, 0.44, 0.04, 0.02]], dtype=torch.float64)
    q = torch.tensor([[0.60, 0.39, 0.005, 0.005]], dtype=torch.float64)
    assert contrast(p.log(), q.log(), 0.5, alpha=0.1).exp()[0, 2:].tolist() == [0, 0]
    assert contrast(p.log(), q.log(), 0.5, alpha=0.079).exp()[0, 2:].gt(0).tolist() == [True, False]
    assert contrast(p.log(), q.log(), 0.5, alpha=0.1, floor="mean").exp()[0, 2:].gt(0).tolist() == [True, False]
    everything = contrast(p.log(), q.log(), 0.5, alpha=0.0)
    torch.testing.assert_close(everything, 1.5 * p.log() - 0.5 * q.log(), atol=1e-12, rtol=0)


def test_the_other_combinations():
    ratio = contrast(P.log(), Q.log(), 1.0, combine="ratio").softmax(-1)
    torch.testing.assert_close(ratio, (P / Q) / (P / Q).sum(), atol=1e-12, rtol=0)
    difference = contrast(P.log(), Q.log(), 0.5, combine="difference").exp()
    torch.testing.assert_close(difference, P - 0.5 * Q, atol=1e-12, rtol=0)
    cut = contrast(P.log(), Q.log(), 0.7, combine="difference").exp()
    torch.testing.assert_close(cut, torch.tensor([[0, 0.21, 0.18]], dtype=torch.float64), atol=1e-12, rtol=0)
    nothing_left = contrast(P.log(), P.log(), 1.0, combine="difference")
    torch.testing.assert_close(nothing_left, P.log(), atol=1e-12, rtol=0)


def test_impossible_tokens():
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    q = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).log()
    for combine in ("log", "ratio", "difference"):
        found = contrast(p, q, 0.5, combine=combine).softmax(-1)
        assert found[0, 2] == 0 and bool(found.isfinite().all())
    assert contrast(p, q, 0.5).softmax(-1)[0].tolist() == pytest.approx([0, 1, 0])
    assert guided(p, q, 2.0).softmax(-1)[0].tolist() == pytest.approx([0, 1, 0])
    assert guided(p, q, 0.5).softmax(-1)[0].tolist() == pytest.approx([1, 0, 0])
    assert guided(p, q, 0.0).exp()[0].tolist() == [1, 0, 0]
    disjoint = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).log()
    assert guided(p, disjoint, 0.5).softmax(-1)[0].tolist() == pytest.approx([0.5, 0.5, 0])


def test_without_a_gate_or_with_identical_prompts_it_is_standard_decoding():
    torch.testing.assert_close(decoded(UncertaintyContrast(threshold=0.0)), PRIOR, atol=1e-12, rtol=0)
    same = chain().logits
    for kernel in (UncertaintyContrast(**ALWAYS), Guidance(gamma=3.0)):
        torch.testing.assert_close(decoded(kernel, other=same), PRIOR, atol=1e-12, rtol=0)
    p = torch.rand(100, 8, generator=torch.Generator().manual_seed(0)).double().log()
    assert torch.equal(contrast(p, p, 0.5).argmax(-1), p.argmax(-1))  # greedy, whatever the plausible set


def test_the_law_of_decoding_is_a_product():
    def tilted(p, q):
        return [a**1.5 * b**-0.5 for a, b in zip(p, q, strict=True)]

    def gated(p, q):
        return tilted(p, q) if max(p) < 0.75 else p

    def cut(p, q):
        scores = gated(p, q)
        return [s if a >= 0.6 * max(p) or max(p) >= 0.75 else 0 for s, a in zip(scores, p, strict=True)]

    always = UncertaintyContrast(**ALWAYS)
    some = UncertaintyContrast(gate="max", threshold=0.25, alpha=0.0)
    for kernel, score in ((always, tilted), (some, gated), (UncertaintyContrast(**vars(some) | {"alpha": 0.6}), cut)):
        torch.testing.assert_close(decoded(kernel), by_hand(score), atol=1e-12, rtol=0)
    assert 0 < int((by_hand(cut) == 0).sum()) < 8


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 3.0])
def test_the_law_of_guided_decoding_is_a_product(gamma):
    score = lambda p, u: [b * (a / b) ** gamma for a, b in zip(p, u, strict=True)]  # noqa: E731
    torch.testing.assert_close(decoded(Guidance(gamma=gamma)), by_hand(score), atol=1e-12, rtol=0)


def test_guidance_by_one_is_the_conditional_to_the_bit():
    p, u = P.log(), Q.log()
    assert torch.equal(guided(p, u, 1.0), p) and torch.equal(guided(p, u, 0.0), u)


KERNELS = [
    UncertaintyContrast(**ALWAYS),
    UncertaintyContrast(gate="max", threshold=0.25, alpha=0.0),
    UncertaintyContrast(gate="entropy", threshold=0.6, alpha=0.0, combine="ratio"),
    Guidance(gamma=0.0),
    Guidance(gamma=1.5),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_as_a_proposal_it_is_corrected_towards_the_tilt(kernel):
    assert estimate(kernel) == pytest.approx(Z, abs=1e-6)


def test_what_is_cut_off_is_not_found():
    kernel = UncertaintyContrast(gate="max", threshold=0.25, alpha=0.6)
    reached = decoded(kernel) > 0
    kept = float((PRIOR * (REWARD[0] / BETA).exp())[reached].sum())
    assert kept < Z - 0.5
    assert estimate(kernel) == pytest.approx(kept, abs=1e-6)


def test_the_share_of_gated_tokens():
    kernel, both = UncertaintyContrast(gate="max", threshold=0.35), joint(3)
    x = both.extend(both.init(2), torch.tensor([0, 1, 0, 1, 0, 1]))
    found: Bool[Tensor, "B"] = kernel.gated(both.log_probs(x), x)
    assert found.tolist() == [False, True] * 3  # P(1 | 0) = 0.3, P(1 | 1) = 0.5
    done = both.extend(both.extend(x, torch.ones(6).long()), torch.ones(6).long())
    assert not bool(UncertaintyContrast(gate="always").gated(both.log_probs(done), done).any())


def test_bad_settings():
    for bad in (
        {"eta": -0.1},
        {"threshold": -1.0},
        {"alpha": 1.5},
        {"top": 1},
        {"gate": "margin"},
        {"floor": "min"},
        {"combine": "sum"},
    ):
        with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
            UncertaintyContrast(**bad)
    with pytest.raises(ValueError, match="gamma"):
        Guidance(gamma=-1.0)
    for kernel in (UncertaintyContrast(), Guidance()):
        with pytest.raises(UserError, match="one only"):
            SMC(2, kernel=kernel)(chain(), Sample(0))
