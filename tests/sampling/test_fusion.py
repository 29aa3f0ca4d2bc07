"""Logit fusion: coefficients known in closed form, and laws of decoding that are products."""

import itertools
import math

import pytest
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from tests.sampling.chain3 import BETA, MEAN, SPACE, Z, chain, leaves
from torch import Tensor

from keel.core.chance import Sample, law
from keel.core.errors import UserError
from keel.exact.chain import TabularChain
from keel.exact.space import TabularPolicy
from keel.sampling.fusion import (
    DynamicFusion,
    divergence,
    fused_logits,
    solve_coefficient,
    solve_coefficients,
    solve_one,
)
from keel.sampling.joint import JointChain
from keel.sampling.kernels import Kernel
from keel.sampling.smc import SMC

LARGE, SMALL, EXPERT = (torch.tensor([z]).double() for z in ([2.0, 0, 0], [1.0, 0, 0], [1.0, 2, 0]))
INF = math.inf


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() * 1.5


def fused(a: Float[Tensor, "B"], large=LARGE, small=SMALL, expert=EXPERT) -> Float[Tensor, "B V"]:
    return fused_logits(large, small, expert[:, None], a[:, None]).softmax(-1)


def test_the_worked_example():
    assert float(divergence(EXPERT, SMALL)) == pytest.approx(0.474321, abs=1e-6)
    static = fused_logits(LARGE, SMALL, EXPERT[:, None], torch.ones(1, 1))
    assert float(divergence(static, LARGE)) == pytest.approx(0.417542, abs=1e-6)
    a = solve_coefficient(LARGE, SMALL, EXPERT)
    assert float(a) == pytest.approx(1.055334, abs=1e-6)
    torch.testing.assert_close(fused(a)[0], torch.tensor([0.443979, 0.495935, 0.060086]).double(), atol=1e-6, rtol=0)
    assert int(fused(a).argmax()) == 1


def test_a_large_model_that_is_the_small_one_becomes_the_expert():
    small, expert = random(50, 7), random(50, 7, seed=1)
    a = solve_coefficient(small, small, expert)
    torch.testing.assert_close(a, torch.ones(50).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(fused(a, small, small, expert), expert.softmax(-1), atol=1e-9, rtol=0)


def test_the_root_is_a_root_or_the_limit():
    large, small, expert = random(200, 9), random(200, 9, seed=1), random(200, 9, seed=2)
    a = solve_coefficient(large, small, expert)
    moved = divergence(fused_logits(large, small, expert[:, None], a[:, None]), large)
    target, capped = divergence(expert, small), a == 2.0
    assert 0 < int(capped.sum()) < 100
    torch.testing.assert_close(moved[~capped], target[~capped], atol=1e-9, rtol=0)
    assert bool((moved[capped] <= target[capped]).all())


def test_an_expert_with_nothing_to_say_gets_nothing():
    assert float(solve_coefficient(LARGE, SMALL, SMALL)) == 0
    assert float(solve_coefficient(LARGE, SMALL, SMALL + 5)) == 0  # logits are known up to a constant
    assert float(solve_coefficient(LARGE, SMALL, SMALL + 1e-4 * EXPERT)) == 0
    peaked = torch.tensor([[60.0, 0, 0]]).double()  # no a up to the limit moves it
    assert float(solve_coefficient(peaked, SMALL, EXPERT)) == 2


def test_impossible_tokens():
    pad = torch.full((1, 2), -INF).double()
    padded = [torch.cat([z, pad], 1) for z in (LARGE, SMALL, EXPERT)]
    a = solve_coefficient(*padded)
    assert float(a) == pytest.approx(1.055334, abs=1e-6)
    p = fused(a, *padded)
    torch.testing.assert_close(p[:, :3], fused(a), atol=1e-12, rtol=0)
    assert p[0, 3:].tolist() == [0, 0]
    ruled_out = torch.tensor([[1.0, 2, -INF]]).double()
    a = solve_coefficient(LARGE, SMALL, ruled_out)
    assert 0 < float(a) <= 2 and float(fused(a, expert=ruled_out)[0, 2]) == 0
    silent = fused_logits(LARGE, SMALL, ruled_out[:, None], torch.zeros(1, 1))
    torch.testing.assert_close(silent, LARGE, atol=0, rtol=0)
    only_expert = torch.tensor([[1.0, -INF, 0]]).double()
    assert float(solve_coefficient(LARGE, only_expert, EXPERT)) == 2  # an infinite KL: as far as allowed
    assert float(fused(torch.ones(1), small=only_expert)[0, 1]) == pytest.approx(1)
    nothing_left = torch.tensor([[0.0, -INF, -INF]]).double()
    left = fused(torch.ones(1), torch.tensor([[-INF, 0.0, 0.0]]).double(), SMALL, nothing_left)
    assert left[0].tolist() == pytest.approx([0, 0.5, 0.5])


def test_several_experts_share_one_distance():
    large, small, experts = random(40, 6), random(40, 6, seed=1), random(40, 2, 6, seed=2) + random(40, 1, 6, seed=1)
    targets = divergence(experts, small[:, None].expand_as(experts))

    def objective(a):
        moved = divergence(fused_logits(large, small, experts, a), large)
        return (moved[:, None] - targets).square().sum(-1)

    ray = solve_coefficients(large, small, experts)
    grid = solve_coefficients(large, small, experts, search="grid")
    free = (ray < 2).all(-1)
    assert int(free.sum()) > 20
    least = (targets - targets.mean(-1, keepdim=True)).square().sum(-1)  # what no a can undercut
    torch.testing.assert_close(objective(ray)[free], least[free], atol=1e-9, rtol=1e-9)
    assert bool((objective(grid) >= least - 1e-12).all())
    assert float((objective(grid) - least)[free].max()) < 2e-3
    torch.testing.assert_close(ray[:, 0] * targets[:, 1], ray[:, 1] * targets[:, 0], atol=1e-9, rtol=1e-9)


def test_equal_experts_share_and_a_silent_one_adds_nothing():
    twice = torch.stack([EXPERT, EXPERT], 1)
    a = solve_coefficients(LARGE, SMALL, twice)
    assert a[0].tolist() == pytest.approx([1.055334 / 2] * 2, abs=1e-6)
    silent = torch.stack([SMALL, EXPERT], 1)
    assert float(solve_coefficients(LARGE, SMALL, silent)[0, 0]) == 0
    one = solve_one(LARGE, SMALL, silent)
    assert one[0].tolist() == pytest.approx([0, 1.055334], abs=1e-6)
    quiet = torch.stack([SMALL, SMALL], 1)
    for search in ("ray", "grid"):
        assert solve_coefficients(LARGE, SMALL, quiet, search=search).tolist() == [[0, 0]]


def table(seed: int) -> TabularPolicy:
    return TabularPolicy(SPACE, random(1, 7, 2, seed=seed))


SMALLER, FIRST, SECOND = table(5), table(6), table(7)
NAMES = {"small": SMALLER, "expert": FIRST, "second": SECOND}


def joint(copies: int = 1, value: Float[Tensor, "Q X"] | None = None) -> JointChain:
    nothing, index = torch.zeros(1, 8), torch.zeros(copies, dtype=torch.long)
    others = {name: TabularChain(policy, nothing, index) for name, policy in NAMES.items()}
    return JointChain(chain(copies, value), others)


def decoded(kernel: Kernel) -> Float[Tensor, "S"]:
    """The exact law of decoding with a kernel."""
    probability, found = law(lambda copies, rng: SMC(1, BETA, kernel=kernel, ess_threshold=0.0)(joint(copies), rng))
    return torch.zeros(8).double().index_add(0, leaves(found), probability)


def by_hand(coefficient) -> list[float]:
    """Products of fused conditionals, in plain Python."""
    main = chain().logits.table[0].log_softmax(-1).tolist()
    small, expert = (policy.table[0].log_softmax(-1).tolist() for policy in (SMALLER, FIRST))
    found = []
    for leaf in itertools.product((0, 1), repeat=3):
        probability, place = 1.0, 0
        for token in leaf:
            a = coefficient(main[place], small[place], expert[place])
            score = [math.exp(main[place][v] + a * (expert[place][v] - small[place][v])) for v in (0, 1)]
            probability *= score[token] / sum(score)
            place = 2 * place + 1 + token
        found.append(probability)
    return found


def root(large: list[float], small: list[float], expert: list[float]) -> float:
    """The same equation by another solver."""

    def kl(p, q):
        return sum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True))

    def gap(a):
        z = [large[v] + a * (expert[v] - small[v]) for v in (0, 1)]
        total = math.log(sum(map(math.exp, z)))
        return kl([value - total for value in z], large) - kl(expert, small)

    return 2.0 if gap(2.0) < 0 else brentq(gap, 0, 2, xtol=1e-12)


def test_the_law_of_decoding_is_the_product_of_fused_conditionals():
    assert decoded(DynamicFusion(coefficient=0.7)).tolist() == pytest.approx(by_hand(lambda *_: 0.7), abs=1e-12)
    assert decoded(DynamicFusion()).tolist() == pytest.approx(by_hand(root), abs=1e-9)


KERNELS = [
    DynamicFusion(),
    DynamicFusion(coefficient=0.5),
    DynamicFusion(experts=("expert", "second")),
    DynamicFusion(experts=("expert", "second"), active="one"),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_as_a_proposal_it_is_corrected_towards_the_tilt(kernel):
    sampler = SMC(2, BETA, ess_threshold=0.9, kernel=kernel)
    probability, found = law(lambda copies, rng: sampler(joint(copies, MEAN), rng))
    assert float((probability * found.log_z.exp()).sum()) == pytest.approx(Z, abs=1e-6)


def test_coefficients_are_reported_without_a_trace():
    kernel, both = DynamicFusion(), joint(2)
    x = both.init(3)
    a = kernel.coefficients(both, x)
    tables = [p.table[0, :1].log_softmax(-1) for p in (chain().logits, SMALLER, FIRST)]
    torch.testing.assert_close(a, solve_coefficient(*tables).detach().expand(6)[:, None], atol=1e-9, rtol=0)
    assert both.meter.scored.sum() == 0
    done = both.complete(x, 1, Sample(0))
    with pytest.raises(UserError, match="not read by the others"):
        kernel.coefficients(both, done)


def test_bad_settings():
    for bad in ({"experts": ()}, {"limit": 0.0}, {"limit": INF}, {"coefficient": -1.0}):
        with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
            DynamicFusion(**bad)
    with pytest.raises((ValueError, TypeError), match="search"):
        solve_coefficients(LARGE, SMALL, EXPERT[:, None], search="best")
    with pytest.raises(UserError, match="one only"):
        SMC(2, kernel=DynamicFusion())(chain(), Sample(0))
