"""Soft value decoding: the leaf laws of the worked example, exact; its bound on the KL; chains of other kinds."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.sampling.chain3 import (
    BETA,
    LEAVES,
    MEAN,
    ONE,
    PRIOR,
    REWARD,
    SOFT,
    chain,
    leaf_law,
    leaves,
    sampled_law,
    total_variation,
)

from keel.core.chain import Chain, TokenChain
from keel.core.chance import Sample, law
from keel.exact.chain import TabularChain, soft_value_table
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.sampling.best_of import SoftBestOf
from keel.sampling.soft_value import SoftValueDecoding

SAMPLED = [0.093758, 0.077554, 0.013699, 0.354634, 0.039757, 0.246048, 0.008188, 0.166362]
BEST = [0.085599, 0.123384, 0.005357, 0.656059, 0.015746, 0.105754, 0.000001, 0.008099]
ENDS = SequenceSpace(vocab=3, horizon=3, eos=2, prompts=2)  # sequences of different lengths, two prompts


def ending(index: list[int], kind: type[TabularChain] = TabularChain) -> TabularChain:
    """A chain whose sequences end at a symbol, with the exact value."""
    generator = torch.Generator().manual_seed(3)
    policy = TabularPolicy(ENDS, torch.randn(2, ENDS.prefixes, 3, generator=generator).double())
    reward = torch.randn(2, len(ENDS.sequences()[0]), generator=generator).double()
    return kind(policy, reward, torch.tensor(index), soft_value_table(policy, reward, BETA))


class UsedUp(TabularChain):
    """A chain whose states are used up by `extend`, as those of a language model with its caches in place."""

    def _start(self, prompt) -> list[bool]:
        return [False]

    def _moved(self, memory, index, x) -> list[bool]:
        assert memory is None or not memory[0], "selected from a state that was used up"
        return [False]

    def _stepped(self, memory, tokens, x) -> list[bool]:
        assert not memory[0], "extended a state that was used up"
        memory[0] = True
        return [False]

    def log_probs(self, x):
        """See `TokenChain`."""
        assert not x.memory[0], "asked a state that was used up"
        return super().log_probs(x)


@dataclass(frozen=True)
class Opaque:
    """Actions that can be indexed, and nothing else."""

    hidden: torch.Tensor

    def __getitem__(self, index: Any) -> "Opaque":
        return Opaque(self.hidden[index])


class ByStep:
    """A chain that is none over tokens, though one lies within."""

    def __init__(self, inner: TokenChain):
        self.inner, self.prompts, self.horizon, self.meter = inner, inner.prompts, inner.horizon, inner.meter
        for name in ("init", "select", "is_done", "complete", "reward", "value", "key"):
            setattr(self, name, getattr(inner, name))

    def propose(self, x, m, rng, name="action"):
        """See `Chain`."""
        action, logp = self.inner.propose(x, m, rng, name)
        return Opaque(action), logp

    def extend(self, x, action):
        """See `Chain`."""
        return self.inner.extend(x, action.hidden)


@pytest.mark.parametrize(("pick", "expected"), [("sample", SAMPLED), ("best", BEST)])
def test_the_rows_of_the_worked_example(pick, expected):
    found = leaf_law(SoftValueDecoding(1, 4, BETA, pick), SOFT)
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("value", "m", "variation"), [(SOFT, 1, 0.572008), (SOFT, 4, 0.175325), (MEAN, 4, 0.342493)])
def test_total_variation_of_the_worked_example(value, m, variation):
    assert total_variation(leaf_law(SoftValueDecoding(1, m, BETA), value)) == pytest.approx(variation, abs=1e-6)


def test_twenty_candidates():
    expected = torch.tensor([math.exp(_walk(leaf, 20)[0]) for leaf in LEAVES]).double()
    assert total_variation(expected) == pytest.approx(0.019511, abs=1e-6)
    runs = 20_000
    error = (sampled_law(SoftValueDecoding(1, 20, BETA), runs, value=SOFT) - expected).abs()
    assert bool((error < 4 * (expected * (1 - expected) / runs).sqrt()).all())


@pytest.mark.parametrize("pick", ["sample", "best"])
def test_one_candidate_is_the_prior(pick):
    torch.testing.assert_close(leaf_law(SoftValueDecoding(1, 1, BETA, pick), SOFT), PRIOR, atol=1e-12, rtol=0)


@pytest.mark.parametrize("pick", ["sample", "best"])
def test_equal_values_are_the_prior(pick):
    flat = lambda copies: TabularChain(chain().logits, torch.zeros(1, 8).double(), torch.zeros(copies).long())  # noqa: E731
    probability, found = law(lambda copies, rng: SoftValueDecoding(1, 3, BETA, pick)(flat(copies), rng))
    shares = torch.zeros(8).double().index_add(0, leaves(found), probability)
    torch.testing.assert_close(shares, PRIOR, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.kl, torch.zeros_like(found.kl), atol=1e-12, rtol=0)


def test_the_kl_is_a_bound_and_its_mean_is_known():
    probability, found = law(lambda copies, rng: SoftValueDecoding(1, 4, BETA)(chain(copies, SOFT), rng))
    shares = torch.zeros(8).double().index_add(0, leaves(found), probability)
    mean = float((probability * found.kl).sum())
    assert mean == pytest.approx(sum(math.exp(log_q) * spent for log_q, spent in map(_walk, LEAVES)), abs=1e-9)
    assert found.kl_is_bound and mean > float((shares * (shares / PRIOR).log()).sum()) > 0.4


def test_the_kl_of_the_greedy_limit_is_bounded_too():
    probability, found = law(lambda copies, rng: SoftValueDecoding(1, 4, BETA, "best")(chain(copies, SOFT), rng))
    shares = torch.tensor(BEST).double()
    assert math.log(4) * 3 > float((probability * found.kl).sum()) > float((shares * (shares / PRIOR).log()).sum()) > 1


def _walk(leaf: str, m: int = 4) -> tuple[float, float]:
    """log q of a leaf, and what the choices on its way spend in the mean, by the binomial law of the candidates."""
    log_q = total = 0.0
    for step, bit in enumerate(leaf):
        place = 2**step - 1 + int(leaf[:step] or "0", 2)
        value = [REWARD[0, int(leaf[:2] + b, 2)] if step == 2 else SOFT[0, 2 * place + 1 + int(b)] for b in "01"]
        cases = [_case(ones, m, float(ONE[place]), [float(v) for v in value]) for ones in range(m + 1)]
        log_q += math.log(sum(chance * kept[int(bit)] for chance, kept, _ in cases))
        total += sum(chance * spent for chance, _, spent in cases)
    return log_q, total


def _case(ones: int, m: int, one: float, value: list[float]) -> tuple[float, list[float], float]:
    """So many ones among m candidates: how likely, what is kept, and what the choice spends."""
    counts = [m - ones, ones]
    mass = [count * math.exp(v / BETA) for count, v in zip(counts, value, strict=True)]
    kept = [each / sum(mass) for each in mass]
    spent = sum(w * math.log(m * w / count) for w, count in zip(kept, counts, strict=True) if count)
    return math.comb(m, ones) * one**ones * (1 - one) ** (m - ones), kept, spent


@pytest.mark.parametrize("m", [1, 3])
def test_over_a_single_step_it_is_soft_best_of(m):
    space = SequenceSpace(vocab=3, horizon=1)
    policy = TabularPolicy(space, torch.tensor([[[0.1, 0.5, -0.4]]]).double())
    reward = torch.tensor([[0.3, -0.2, 0.7]]).double()

    def run(sampler):
        make = lambda copies: TabularChain(policy, reward, torch.zeros(copies).long())  # noqa: E731
        probability, found = law(lambda copies, rng: sampler(make(copies), rng))
        token = found.states.tokens[found.picked, 0]
        return torch.zeros(3).double().index_add(0, token, probability), float((probability * found.kl).sum())

    nested, once = run(SoftValueDecoding(1, m, BETA)), run(SoftBestOf(m, BETA))
    torch.testing.assert_close(nested[0], once[0])
    assert nested[1] == pytest.approx(once[1], abs=1e-12)


def test_the_chains_are_independent():
    probability, found = law(lambda copies, rng: SoftValueDecoding(2, 2, BETA)(chain(copies, SOFT), rng))
    pair = leaves(found).view(-1, 2)
    joint = torch.zeros(64).double().index_add(0, pair[:, 0] * 8 + pair[:, 1], probability).view(8, 8)
    alone = leaf_law(SoftValueDecoding(1, 2, BETA), SOFT)
    torch.testing.assert_close(joint, alone[:, None] * alone)
    assert found.log_z.isnan().all() and found.ess.tolist() == pytest.approx([2.0] * len(probability))


@pytest.mark.parametrize("pick", ["sample", "best"])
def test_steps_that_are_no_tokens(pick):
    sampler = SoftValueDecoding(1, 3, BETA, pick)
    assert isinstance(ByStep(chain()), Chain)
    probability, found = law(lambda copies, rng: sampler(ByStep(chain(copies, SOFT)), rng))
    shares = torch.zeros(8).double().index_add(0, leaves(found), probability)
    torch.testing.assert_close(shares, leaf_law(sampler, SOFT))


def test_a_prompt_depends_on_no_other_and_ends_stay_ends():
    sampler = SoftValueDecoding(4, 3, BETA)
    together = sampler(ending([1, 0, 1]), Sample(5, torch.tensor([11, 12, 13])))
    for place, prompt in enumerate([1, 0, 1]):
        alone = sampler(ending([prompt]), Sample(5, torch.tensor([11 + place])))
        rows = slice(4 * place, 4 * place + 4)
        assert together.states.tokens[rows].tolist() == alone.states.tokens.tolist()
        torch.testing.assert_close(together.kl[place], alone.kl[0])
    states = together.states
    assert len(states.length.unique()) > 1  # some end early
    past = torch.arange(3) >= states.length[:, None]
    assert bool(states.done.all()) and not states.tokens[past].any() and not states.logp[past].any()
    torch.testing.assert_close(together.reward.flatten(), ending([1, 0, 1]).reward(states))


def test_what_it_costs():
    policy = SoftValueDecoding(2, 5, BETA)
    found = policy(chain(3, SOFT), Sample(0))
    assert found.meter.generated.tolist() == [2 * 5 * 3] * 3
    assert bool((found.meter.rewards <= 2 * 2).all())  # two distinct ends each, however many candidates
    assert bool((found.meter.scored <= 2 * 2 * 3).all())
    assert policy(ending([0, 1], UsedUp), Sample(0)).states.memory is None


@pytest.mark.parametrize(
    "setting", [{"num_particles": 0}, {"num_candidates": 0}, {"beta": 0.0}, {"pick": "argmax"}], ids=str
)
def test_bad_settings(setting):
    with pytest.raises(
        (ValueError, TypeError), match=next(iter(setting))
    ):  # a type error where annotations are checked
        SoftValueDecoding(**setting)
