"""Decoding by a kernel, and value-augmented sampling, on the three-step chain: every number exact."""

import math
from dataclasses import dataclass

import pytest
import torch
from tests.sampling.chain3 import BETA, LOG_Z, MEAN, PRIOR, REWARD, SOFT, TILT, Z, chain, estimates, leaf_law, leaves
from tests.sampling.chain3 import total_variation as variation
from tests.sampling.test_soft_value import ByStep, UsedUp, ending

from keel.core.chance import Sample, law
from keel.core.errors import UserError
from keel.exact.chain import TabularChain
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.sampling.best_of import SoftBestOf
from keel.sampling.decode import Decode, ValueAugmented
from keel.sampling.kernels import Twisted

AUGMENTED = torch.tensor([0.025048, 0.046270, 0.009501, 0.445291, 0.000938, 0.092805, 0.014928, 0.365218]).double()
LEVEL = SequenceSpace(vocab=3, horizon=1)
LEVEL_PRIOR = torch.tensor([[[0.5, 0.3, 0.2]]], dtype=torch.float64)
LEVEL_REWARD = torch.tensor([[0.4, 1.0, 3.0]], dtype=torch.float64)


def level(copies: int, shift: float = 0.0) -> TabularChain:
    """One token of three, with rewards."""
    index = torch.zeros(copies, dtype=torch.long)
    return TabularChain(TabularPolicy(LEVEL, LEVEL_PRIOR.log()), LEVEL_REWARD + shift, index)


def level_law(sampler, shift: float = 0.0) -> list[float]:
    """The law of the token."""
    probability, found = law(lambda copies, rng: sampler(level(copies, shift), rng))
    return torch.zeros(3).double().index_add(0, found.states.tokens[:, 0], probability).tolist()


def test_the_mean_value_as_in_the_worked_example():
    found = leaf_law(ValueAugmented(k=2, beta=BETA), MEAN)
    torch.testing.assert_close(found, AUGMENTED, atol=1e-6, rtol=0)
    assert variation(found) == pytest.approx(0.241028, abs=1e-6)
    spent = float((found * (found / PRIOR).log()).sum())
    assert float((found * REWARD[0]).sum()) - BETA * spent == pytest.approx(0.988786, abs=1e-6)
    assert BETA * LOG_Z > 0.988786 + 0.1


def test_the_exact_value_is_the_tilt():
    exact = PRIOR * (REWARD[0] / BETA).exp()
    assert variation(leaf_law(ValueAugmented(k=None, beta=BETA), SOFT), exact / exact.sum()) < 1e-12


@pytest.mark.parametrize("sampler", [ValueAugmented(beta=math.inf), ValueAugmented(k=1, beta=BETA), Decode(beta=BETA)])
def test_limits_that_are_the_prior(sampler):
    torch.testing.assert_close(leaf_law(sampler, SOFT), PRIOR, atol=1e-12, rtol=0)


def test_a_constant_changes_nothing():
    sampler = ValueAugmented(k=2, beta=BETA)
    before = leaf_law(sampler, MEAN)
    moved = law(lambda copies, rng: sampler(_raised(copies, 0.7), rng))
    torch.testing.assert_close(torch.zeros(8).double().index_add(0, leaves(moved[1]), moved[0]), before)


def _raised(copies: int, constant: float) -> TabularChain:
    return TabularChain(chain().logits, REWARD + constant, torch.zeros(copies).long(), MEAN + constant)


def test_tokens_that_are_not_asked_have_the_mean_value():
    gain = [math.exp((v - 0.7) / BETA) for v in (0.4, 1.0)] + [1.0]
    mass = [p * g for p, g in zip((0.5, 0.3, 0.2), gain, strict=True)]
    expected = [each / sum(mass) for each in mass]
    assert level_law(ValueAugmented(k=2, beta=BETA)) == pytest.approx(expected, abs=1e-12)
    assert level_law(ValueAugmented(k=2, beta=BETA), shift=5.0) == pytest.approx(expected, abs=1e-12)
    assert level_law(ValueAugmented(k=1, beta=BETA)) == pytest.approx([0.5, 0.3, 0.2], abs=1e-12)


@pytest.mark.parametrize("n", [1, 2])
def test_the_kl_is_unbiased(n):
    probability, found = law(lambda copies, rng: ValueAugmented(n, 2, BETA)(chain(copies, MEAN), rng))
    exact = float((AUGMENTED * (AUGMENTED / PRIOR).log()).sum())
    assert float((probability * found.kl).sum()) == pytest.approx(exact, abs=1e-5)
    assert not found.kl_is_bound and found.log_z.isnan().all()


def test_reweighted_it_is_right_for_any_kernel():
    sampler = ValueAugmented(2, 2, BETA, reweight=True)
    mean, deviation, tilted = estimates(sampler, MEAN)
    assert mean == pytest.approx(Z, abs=1e-6)
    torch.testing.assert_close(tilted, TILT, atol=1e-6, rtol=0)
    _, prior, _ = estimates(Decode(2, None, BETA, reweight=True))
    assert deviation < prior / 2  # the value is worth something
    assert variation(leaf_law(sampler, MEAN)) < 0.241028  # and so are the weights
    probability, found = law(lambda copies, rng: sampler(chain(copies, MEAN), rng))
    shares = leaf_law(sampler, MEAN)
    assert float((probability * found.kl).sum()) > float((shares * (shares / PRIOR).log()).sum())


def test_the_exact_value_leaves_nothing_to_weigh():
    probability, found = law(lambda copies, rng: ValueAugmented(2, None, BETA, reweight=True)(chain(copies, SOFT), rng))
    torch.testing.assert_close(found.log_z, torch.full_like(found.log_z, math.log(Z)), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.ess, torch.full_like(probability, 2.0))


def test_the_prior_reweighted_is_soft_best_of():
    torch.testing.assert_close(leaf_law(Decode(3, None, BETA, reweight=True)), leaf_law(SoftBestOf(3, BETA)))
    deviation = estimates(Decode(3, None, BETA, reweight=True))[1]
    assert deviation == pytest.approx(estimates(SoftBestOf(3, BETA))[1], abs=1e-9)


def test_a_stronger_value_spends_more():
    spent = []
    for beta in (4.0, 2.0, 1.0, 0.5):
        found = leaf_law(ValueAugmented(k=2, beta=beta), MEAN)
        spent.append(float((found * (found / PRIOR).log()).sum()))
    assert spent == sorted(spent) and spent[0] < 0.1 < spent[-1]


@pytest.mark.parametrize("sampler", [Decode(3, Twisted(2), BETA), ValueAugmented(3, 2, BETA, reweight=True)])
def test_a_prompt_depends_on_no_other_and_ends_stay_ends(sampler):
    together = sampler(ending([0, 1, 0], UsedUp), Sample(2, torch.tensor([5, 6, 7])))
    for place, prompt in enumerate([0, 1, 0]):
        alone = sampler(ending([prompt]), Sample(2, torch.tensor([5 + place])))
        assert together.states.tokens[3 * place : 3 * place + 3].tolist() == alone.states.tokens.tolist()
        torch.testing.assert_close((together.kl[place], together.pick[place]), (alone.kl[0], alone.pick[0]))
    states = together.states
    assert len(states.length.unique()) > 1 and states.memory is None
    past = torch.arange(3) >= states.length[:, None]
    assert not states.tokens[past].any() and not states.logp[past].any()
    assert together.meter.generated.tolist() == states.length.view(3, 3).sum(1).tolist()


@dataclass(frozen=True)
class Reversed:
    """A kernel whose probabilities are those of the other token."""

    def log_q(self, chain, x, rng, beta):
        """See `Kernel`."""
        log_p = chain.log_probs(x)
        return torch.where(x.done[:, None], log_p, log_p.flip(1))


def test_any_kernel_will_do():
    mean, _, tilted = estimates(Decode(1, Reversed(), BETA, reweight=True))
    assert mean == pytest.approx(Z, abs=1e-6)
    torch.testing.assert_close(tilted, TILT, atol=1e-6, rtol=0)


def test_a_chain_by_steps_has_no_kernel():
    assert Decode(2, None, BETA)(ByStep(chain(2)), Sample(0)).count == 2
    with pytest.raises(UserError, match="by steps"):
        ValueAugmented(beta=BETA)(ByStep(chain(2)), Sample(0))


@pytest.mark.parametrize("part", [Decode, ValueAugmented])
@pytest.mark.parametrize("setting", [{"num_particles": 0}, {"beta": 0.0}], ids=str)
def test_bad_settings(part, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        part(**setting)


def test_no_token_asked():
    with pytest.raises(ValueError, match="k must"):
        ValueAugmented(k=0)
