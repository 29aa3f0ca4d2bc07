"""Values by rollouts, by odds, by sums and by regression: means that are known, and weights that stay right."""

import math

import pytest
import torch
import torch.nn.functional as F
from tests.sampling.chain3 import BETA, MEAN, POLICY, PREFIXES, REWARD, SOFT, TILT, Z, chain, leaves
from tests.sampling.test_soft_value import UsedUp, ending

from keel.core.chance import Sample, law
from keel.exact.chain import TabularChain, mean_value_table
from keel.exact.space import TabularPolicy
from keel.sampling.decode import ValueAugmented
from keel.sampling.kernels import Twisted
from keel.sampling.smc import SMC
from keel.sampling.soft_value import SoftValueDecoding
from keel.sampling.values import Combined, Learned, MonteCarlo, Odds, log_odds, regress, value_loss, value_targets

FULL = torch.ones(1, 3, dtype=torch.bool)


def valued(copies: int, value) -> TabularChain:
    """The chain with a value that is a function."""
    return TabularChain(POLICY, REWARD, torch.zeros(copies, dtype=torch.long), value)


def at(worth: TabularChain, prefix: str):
    """Every prompt of a chain in the same state."""
    tokens = torch.tensor([[int(bit) for bit in prefix.ljust(3, "0")]]).expand(worth.prompts, -1)
    return worth.at(tokens, torch.full((worth.prompts,), len(prefix)), torch.arange(worth.prompts))


def lookup(table):
    """A table of values as a value."""
    return lambda chain, x, rng: table[0, chain.prefix(x).clamp(max=6)]


# -- states made from tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_state_made_from_its_tokens(prefix):
    found = at(chain(2), prefix)
    assert found.text(1) == [int(bit) for bit in prefix] and not found.done.any()
    assert chain(2).prefix(found).tolist() == [PREFIXES.index(prefix)] * 2


def test_states_of_different_lengths_made_from_their_tokens():
    world = chain(3)
    tokens = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    found = world.at(tokens, torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    assert world.key(found) == [(2, 1), (0, 0, 1), (1,)]
    torch.testing.assert_close(found.logp.sum(1).exp(), torch.tensor([0.6, 0.4 * 0.3, 1.0]).double(), atol=1e-7, rtol=0)
    assert not world.meter.generated.any()
    further = world.extend(found, torch.tensor([0, 1, 1]))
    assert world.key(further) == [(2, 1, 0), (0, 0, 1, 1), (1, 1)]


def test_what_a_scope_asks_for_changes_nothing_outside():
    def run(asked: int) -> list[float]:
        rng = Sample(3)
        for _ in range(2):
            inside = rng.scope("part")
            numbers = [inside.normal((4,), "x") for _ in range(asked)]
        return [*rng.normal((4,), "x").tolist(), *numbers[0].tolist()]

    assert run(1) == run(5) and len(set(run(1))) == 8


# -- Monte Carlo -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "0", "10"])
@pytest.mark.parametrize("rollouts", [1, 2])
def test_the_mean_over_rollouts_is_the_mean_value(prefix, rollouts):
    value = MonteCarlo(rollouts)
    probability, found = law(lambda copies, rng: value(chain(copies), at(chain(copies), prefix), rng))
    assert float((probability * found).sum()) == pytest.approx(float(MEAN[0, PREFIXES.index(prefix)]), abs=1e-9)
    assert rollouts == 1 or len(found.unique()) > 2


@pytest.mark.parametrize("rollouts", [1, 2])
def test_the_soft_mean_over_rollouts_has_an_unbiased_potential(rollouts):
    value = MonteCarlo(rollouts, BETA)
    probability, found = law(lambda copies, rng: value(chain(copies), at(chain(copies), "0"), rng))
    assert float((probability * (found / BETA).exp()).sum()) == pytest.approx(13.304725, abs=1e-6)
    assert float((probability * found).sum()) < float(SOFT[0, 1])


def test_many_rollouts_approach_the_soft_value():
    world = chain(400)
    found = MonteCarlo(400, BETA)(world, at(world, "1"), Sample(0))
    assert float(found.mean()) == pytest.approx(float(SOFT[0, 2]), abs=0.01)
    assert world.meter.generated.tolist() == [800] * 400 and world.meter.rewards.tolist() == [400] * 400


@pytest.mark.parametrize("kernel", [None, Twisted()])
def test_random_potentials_leave_the_weights_right(kernel):
    sampler = SMC(1 if kernel else 2, BETA, "multinomial", ess_threshold=2.0, kernel=kernel)
    probability, found = law(lambda copies, rng: sampler(valued(copies, MonteCarlo(1)), rng))
    weight = probability * found.log_z.exp()
    assert float(weight.sum()) == pytest.approx(Z, abs=1e-6)
    tilted = torch.zeros(8).double().index_add(0, leaves(found)[found.picked], weight) / Z
    torch.testing.assert_close(tilted, TILT, atol=1e-6, rtol=0)
    assert len(found.log_z.unique()) > 10  # it does vary


def test_finished_states_are_neither_rolled_out_nor_judged():
    world = chain(2)
    x = world.extend(at(world, "01"), torch.tensor([1, 1]))
    assert MonteCarlo(3, BETA)(world, x, Sample(0)).tolist() == [0.0, 0.0]
    assert not world.meter.generated.any() and not world.meter.rewards.any()


def test_rollouts_use_up_no_state_and_depend_on_no_other_prompt():
    sampler = SoftValueDecoding(2, 2, BETA)

    def run(index: list[int], first: int):
        world = ending(index, UsedUp)
        world.value_of = MonteCarlo(2)
        return sampler(world, Sample(7, torch.arange(first, first + len(index))))

    together = run([0, 1, 1], 20)
    for place, prompt in enumerate([0, 1, 1]):
        alone = run([prompt], 20 + place)
        assert together.states.tokens[2 * place : 2 * place + 2].tolist() == alone.states.tokens.tolist()
        torch.testing.assert_close(together.kl[place], alone.kl[0])


# -- other values ----------------------------------------------------------------------------------------------------


def test_odds_of_a_process_reward_model_that_is_right():
    psi = (SOFT / BETA).exp()
    right = Odds(lambda x: (psi / (1 + psi))[0, chain().prefix(x).clamp(max=6)], BETA)
    probability, found = law(lambda copies, rng: ValueAugmented(k=None, beta=BETA)(valued(copies, right), rng))
    torch.testing.assert_close(
        torch.zeros(8).double().index_add(0, leaves(found), probability), TILT, atol=1e-6, rtol=0
    )


def test_log_odds_are_clipped():
    ends = log_odds(torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([math.log(1e-7 / (1 - 1e-7)), -math.log(1e-7 / (1 - 1e-7)), 0.0], abs=1e-8)


def test_a_sum_of_values_is_the_value_of_the_sum():
    other = torch.tensor([[0.5, -1.0, 0.0, 1.0, 2.0, 0.25, -0.5, 0.0]], dtype=torch.float64)
    parts = {"first": lookup(MEAN), "second": lookup(mean_value_table(POLICY, other))}
    mixed = Combined(parts, {"first": 0.7, "second": 0.3})
    total = 0.7 * REWARD + 0.3 * other
    made = lambda value: lambda copies: TabularChain(POLICY, total, torch.zeros(copies).long(), value)  # noqa: E731

    def shares(make):
        probability, found = law(lambda copies, rng: ValueAugmented(k=2, beta=BETA)(make(copies), rng))
        return torch.zeros(8).double().index_add(0, leaves(found), probability)

    torch.testing.assert_close(shares(made(mixed)), shares(made(mean_value_table(POLICY, total))))


def test_a_value_of_weight_nothing_is_not_asked():
    def never(chain, x, rng):
        raise AssertionError

    value = Combined({"a": lookup(MEAN), "b": never}, {"a": 2.0, "b": 0.0})
    assert value(chain(), at(chain(), "1"), Sample(0)).tolist() == pytest.approx([0.7])


def test_a_module_learns_nothing_while_it_values():
    head = torch.nn.Linear(3, 1)
    value = Learned(lambda x: head(x.tokens.float()))
    found = value(chain(2), at(chain(2), "11"), Sample(0))
    expected = float(head(torch.tensor([1.0, 1.0, 0.0])).detach())
    assert found.tolist() == pytest.approx([expected] * 2) and not found.requires_grad


# -- regression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lam", "expected"), [(1.0, [1.0, 1.0, 1.0]), (0.0, [0.4, 0.6, 1.0]), (0.5, [0.6, 0.8, 1.0])])
def test_targets_by_hand(lam, expected):
    reward, value = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.4, 0.6]])
    torch.testing.assert_close(value_targets(reward, value, FULL, lam), torch.tensor([expected]))


def test_rewards_on_the_way_add_up():
    reward = torch.tensor([[0.25, -1.0, 2.0]])
    torch.testing.assert_close(
        value_targets(reward, torch.tensor([[9.0, 8.0, 7.0]]), FULL, 1.0), torch.tensor([[1.25, 1.0, 2.0]])
    )


def test_padding_counts_for_nothing():
    reward, value = torch.tensor([[0.0, 1.0, 50.0, math.nan]]), torch.tensor([[0.2, 0.4, 60.0, math.nan]])
    mask = torch.tensor([[True, True, False, False]])
    found = value_targets(reward, value.requires_grad_(), mask, 0.5)
    torch.testing.assert_close(found, torch.tensor([[0.7, 1.0, 0.0, 0.0]]))
    assert not found.requires_grad
    loss = value_loss(value, found, mask)
    assert float(loss.detach()) == pytest.approx(0.5 * (0.5**2 + 0.6**2) / 2)
    (slope,) = torch.autograd.grad(loss, value)
    torch.testing.assert_close(slope, torch.tensor([[-0.25, -0.3, 0.0, 0.0]]))
    assert float(value_loss(value, found, torch.zeros_like(mask)).detach()) == 0.0


def one_of_each(x):
    """A feature for each prefix of the chain."""
    return F.one_hot(chain().prefix(x).clamp(max=6), 7).double()


def test_regression_learns_the_mean_value():
    learnt = regress(chain(), one_of_each, Sample(0), rollouts=20_000)
    found = torch.stack([learnt(chain(), at(chain(), prefix), Sample(0))[0] for prefix in PREFIXES])
    torch.testing.assert_close(found, MEAN[0], atol=0.03, rtol=0)  # 1 at most a sample, 2 400 at the rarest prefix


def test_regression_is_the_mean_of_the_rewards_seen():
    learnt = regress(chain(), one_of_each, Sample(3), rollouts=30)
    ends = chain().complete(chain().init(1), 30, Sample(3).scope("regression"))
    reward = REWARD[0][chain().leaf(ends)]
    below = (ends.tokens[:, 0] == 1) & (ends.tokens[:, 1] == 1)
    assert float(learnt(chain(), at(chain(), "11"), Sample(0))) == pytest.approx(float(reward[below].mean()), abs=1e-9)
    assert float(learnt(chain(), at(chain(), ""), Sample(0))) == pytest.approx(float(reward.mean()), abs=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.6])
def test_bootstrapped_regression_finds_the_same_when_repeated(lam):
    at_once = regress(chain(), one_of_each, Sample(1), rollouts=3000)
    bootstrapped = regress(chain(), one_of_each, Sample(1), rollouts=3000, lam=lam, sweeps=3)
    for prefix in PREFIXES:  # with a feature for each state, the fixed point does not depend on lam
        x = at(chain(), prefix)
        torch.testing.assert_close(bootstrapped(chain(), x, Sample(0)), at_once(chain(), x, Sample(0)))
    early = regress(chain(), one_of_each, Sample(1), rollouts=3000, lam=lam, sweeps=1)
    assert abs(float(early(chain(), at(chain(), ""), Sample(0)) - MEAN[0, 0])) > 0.1


def test_regression_on_sequences_of_different_lengths():
    world = ending([0])
    space = world.space
    generator = torch.Generator().manual_seed(3)
    policy = TabularPolicy(space, torch.randn(2, space.prefixes, 3, generator=generator).double())
    expected = mean_value_table(policy, world.rewards)[0]
    learnt = regress(world, lambda x: F.one_hot(world.prefix(x).clamp(max=12), 13).double(), Sample(0), rollouts=40_000)
    root = learnt(world, world.init(1), Sample(0))
    torch.testing.assert_close(root, expected[:1], atol=0.02, rtol=0)


# -- settings --------------------------------------------------------------------------------------------------------


def test_bad_settings():
    with pytest.raises(ValueError, match="rollouts"):
        MonteCarlo(0)
    with pytest.raises(ValueError, match="beta"):
        MonteCarlo(1, -1.0)
    with pytest.raises(ValueError, match="beta"):
        Odds(lambda x: x.length, 0.0)
    with pytest.raises(ValueError, match="weights"):
        Combined({"a": lookup(MEAN)}, {"b": 1.0})
    with pytest.raises(ValueError, match="lam"):
        value_targets(torch.zeros(1, 3), torch.zeros(1, 3), FULL, 1.5)
    with pytest.raises(ValueError, match="lam"):
        regress(chain(), one_of_each, Sample(0), lam=-0.1)
