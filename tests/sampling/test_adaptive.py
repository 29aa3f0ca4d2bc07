"""Adaptive best-of-N: expected numbers of draws, what a stopped prompt costs, pruning, labels, a head that learns."""

import math

import pytest
import torch
from tests.exact.test_judge import Answers
from tests.rollouts.architectures import model
from tests.sampling.chain3 import PRIOR, REWARD, chain, leaves

from keel.core.chance import Sample, law
from keel.core.errors import UserError
from keel.exact.chain import TabularChain
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.rollouts.chain import LocalChain
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.sampling.adaptive import (
    AdaptiveBestOf,
    LinearRestart,
    OracleRestart,
    PromptedRestart,
    calibration_error,
    fit_restart,
    restart_labels,
    restart_loss,
    yes_no_logit,
)
from keel.sampling.best_of import BestOf


def uniform_chain(copies: int, levels: int) -> TabularChain:
    """One token, whose reward is uniform on the middles of `levels` intervals of (0, 1)."""
    policy = TabularPolicy(SequenceSpace(levels, 1), torch.zeros(1, 1, levels))
    reward = (torch.arange(levels, dtype=torch.float64)[None] + 0.5) / levels
    return TabularChain(policy, reward, torch.zeros(copies, dtype=torch.long))


def coin_chain(copies: int) -> TabularChain:
    """One token, good with probability .2."""
    policy = TabularPolicy(SequenceSpace(2, 1), torch.tensor([[[0.8, 0.2]]]).double().log())
    return TabularChain(policy, torch.tensor([[0.0, 1.0]]), torch.zeros(copies, dtype=torch.long))


def good(chain, x):
    """Low for the good token alone."""
    return torch.where(x.tokens[:, 0] == 1, 0.1, 0.9).double()


def constant(chain, x):
    return torch.full((len(x),), 0.5, dtype=torch.float64)


@pytest.mark.parametrize(("n", "draws"), [(4, 2.952), (16, 4.859263)])
def test_expected_draws_are_exact(n, draws):
    probability, found = law(lambda copies, rng: AdaptiveBestOf(good, n, 0.2)(coin_chain(copies), rng))
    assert float((probability * found.details["draws"]).sum()) == pytest.approx(draws, abs=1e-6)
    assert float((probability * found.meter.generated).sum()) == pytest.approx(draws, abs=1e-6)
    success = 1 - 0.8**n
    assert float((probability * found.reward.nan_to_num().amax(1)).sum()) == pytest.approx(success, abs=1e-9)


def test_five_levels_of_reward_are_exact_too():
    sampler = AdaptiveBestOf(OracleRestart.of(uniform_chain(1, 5)), 4, 0.2)
    probability, found = law(lambda copies, rng: sampler(uniform_chain(copies, 5), rng))
    assert float((probability * found.details["draws"]).sum()) == pytest.approx(2.952, abs=1e-6)


def test_expected_reward_with_uniform_rewards():
    levels, runs, tau, n = 50, 20_000, 0.2, 16
    world = uniform_chain(runs, levels)
    found = AdaptiveBestOf(OracleRestart.of(world), n, tau)(world, Sample(0))
    reward = found.reward[torch.arange(runs), found.pick]
    error = 4 * float(reward.std()) / math.sqrt(runs)
    assert float(reward.mean()) == pytest.approx(0.895861, abs=error) and error < 0.003
    assert float(found.details["draws"].mean()) == pytest.approx(4.859263, abs=0.12)
    all_of_them = BestOf(n)(uniform_chain(runs, levels), Sample(1)).reward.amax(1)
    assert float(all_of_them.mean()) == pytest.approx(0.941176, abs=4 * float(all_of_them.std()) / math.sqrt(runs))


def test_a_constant_prediction_draws_all_and_the_best_of_them_is_best_of_n():
    sampler = AdaptiveBestOf(constant, 3, 0.2, output="best")
    probability, found = law(lambda copies, rng: sampler(chain(copies), rng))
    assert bool((found.details["draws"] == 3).all()) and bool((found.meter.generated == 9).all())
    picked = torch.zeros(8, dtype=torch.float64).index_add(0, leaves(found)[found.picked], probability)
    order = REWARD[0].argsort()
    cumulated = PRIOR[order].cumsum(0)
    wanted = (cumulated**3).diff(prepend=torch.zeros(1).double())
    torch.testing.assert_close(picked[order], wanted, atol=1e-12, rtol=0)
    same = AdaptiveBestOf(constant, 3, 0.2)(chain(3000), Sample(0))
    assert torch.equal(same.meter.rewards, torch.ones(3000, dtype=torch.long))
    assert torch.bincount(same.pick).tolist() == pytest.approx([1000] * 3, abs=4 * (3000 * 2 / 9) ** 0.5)  # all equal


def test_with_an_oracle_the_smallest_prediction_is_the_best_reward():
    oracle = OracleRestart.of(chain())
    by_itself = AdaptiveBestOf(oracle, 5, 0.15)(chain(300), Sample(2))
    by_reward = AdaptiveBestOf(oracle, 5, 0.15, output="best")(chain(300), Sample(2))
    assert torch.equal(by_itself.pick, by_reward.pick)
    assert bool((by_itself.meter.rewards == 1).all())  # asked of the pick alone
    assert torch.equal(by_reward.meter.rewards.double(), by_reward.details["draws"])
    assert float(by_itself.kl[0]) == pytest.approx(math.log(5)) and by_itself.kl_is_bound


def test_the_oracle_knows_the_end_and_what_comes_before():
    oracle = OracleRestart.of(chain())
    better = torch.tensor([PRIOR[REWARD[0] > r].sum() + PRIOR[REWARD[0] == r].sum() / 2 for r in REWARD[0]])
    torch.testing.assert_close(oracle.leaf[0], better)
    assert float(oracle.prefix[0, 0]) == pytest.approx(0.5)  # a sample against a fresh one
    assert float(oracle.prefix[0, 4]) == pytest.approx(float(0.3 * better[2] + 0.7 * better[3]))  # of the prefix 01


def test_a_stopped_prompt_costs_nothing_and_no_prompt_depends_on_another():
    sampler = AdaptiveBestOf(OracleRestart.of(chain()), 8, 0.3, doubling=True)
    together = sampler(chain(40), Sample(5))
    draws = together.details["draws"].long()
    assert set(draws.tolist()) == {1, 2, 4, 8}
    assert torch.equal(together.meter.generated, 3 * draws)
    assert torch.equal(together.meter.scored, draws)
    for p in (0, 7, 23):
        alone = sampler(chain(1), Sample(5, torch.tensor([p])))
        assert int(alone.details["draws"][0]) == int(draws[p])
        assert alone.states.text(int(alone.pick[0])) == together.states.text(int(together.picked[p]))
        assert int(alone.meter.generated[0]) == int(together.meter.generated[p])


def test_lengths_of_others_do_not_move_the_numbers_of_a_prompt():
    space = SequenceSpace(3, 6, eos=0)
    torch.manual_seed(0)
    policy = TabularPolicy(space, torch.randn(1, space.prefixes, 3))
    reward = torch.randn(1, len(space.sequences()[0]))
    world = lambda copies: TabularChain(policy, reward, torch.zeros(copies, dtype=torch.long))  # noqa: E731
    sampler = AdaptiveBestOf(OracleRestart.of(world(1)), 6, 0.1)
    together = sampler(world(12), Sample(1))
    assert together.details["draws"].unique().numel() > 1
    for p in range(12):
        alone = sampler(world(1), Sample(1, torch.tensor([p])))
        assert alone.states.text(int(alone.pick[0])) == together.states.text(int(together.picked[p]))


def test_pruning_gives_up_the_draws_that_look_worst_after_a_share_of_the_length():
    oracle = OracleRestart.of(chain())
    sampler = AdaptiveBestOf(oracle, 4, 0.0, doubling=True, prune_at=1 / 3, prune_share=0.5, output="best")
    found = sampler(chain(200), Sample(3))
    assert bool((found.details["draws"] == 4).all())
    assert bool((found.details["pruned"] == 1).all())  # of the last batch of two; single draws are not compared
    assert bool((found.meter.generated == 3 * 3 + 1).all())
    first = found.states.tokens.view(200, 4, 3)[:, :, 0]
    batch, finished = first[:, 2:], found.states.done.view(200, 4)[:, 2:]
    looks = oracle.prefix[0, 1:3]  # of the prefixes 0 and 1
    apart = batch[:, 0] != batch[:, 1]
    kept = batch[finished].view(-1)
    assert bool((kept[apart] == int(looks.argmin())).all()) and bool(apart.any())
    assert bool(found.reward[~found.states.done.view(200, 4)].isnan().all())
    assert bool((found.log_w[torch.arange(200), found.pick] == 0).all())


def test_temperatures_warm_up_from_greedy():
    sampler = AdaptiveBestOf(constant, 3, 0.0, temperatures=(0.0, 0.5, 1.0), output="best")
    found = sampler(chain(20_000), Sample(4))
    share = torch.stack([torch.bincount(leaves(found).view(-1, 3)[:, i], minlength=8) / 20_000 for i in range(3)])
    assert float(share[0, 4]) == 1.0  # 1 has .6; then 0 or 1 with .5 each: the first; then 0 has .6
    cold = torch.tensor([0.6, 0.4]).square() / torch.tensor([0.6, 0.4]).square().sum()
    assert float(share[1, 4:].sum()) == pytest.approx(float(cold[0]), abs=0.015)
    torch.testing.assert_close(share[2], PRIOR.float(), atol=0.015, rtol=0)
    assert bool(found.kl.isnan().all())


def test_a_language_model_goes_on_with_the_draws_that_are_left():
    world = LocalChain(LocalGenerator(model("qwen3")), [[5, 6, 7], [9]], Sampling(max_completion_length=9))

    def first_token(chain, x):
        return x.tokens[:, 0].double() / chain.model.vocabulary_size

    sampler = AdaptiveBestOf(first_token, 8, 0.0, doubling=True, prune_at=0.3, prune_share=0.5)
    found = sampler(world, Sample(0))
    states = found.states
    assert found.details["pruned"].tolist() == [1 + 2] * 2  # of batches of 2 and 4
    assert torch.equal(world.meter.generated, states.length.view(2, 8).sum(1))
    assert states.length[~states.done].unique().tolist() == [3]
    for batch in (slice(2, 4), slice(4, 8)):
        grid, done = states.tokens.view(2, 8, -1)[:, batch, 0], states.done.view(2, 8)[:, batch]
        assert bool((grid.masked_fill(~done, 0).amax(1) <= grid.masked_fill(done, 99).amin(1)).all())
    torch.testing.assert_close(states.logp, world._read(states.tokens, states.length, states.prompt), atol=1e-4, rtol=0)


def test_labels_count_ties_half():
    labels = restart_labels(torch.tensor([[1.0, 1.0], [2.0, 1.0]]))
    assert labels.tolist() == [[0.5, 0.5], [0.0, 1.0]]
    torch.testing.assert_close(restart_labels(torch.zeros(1, 7)), torch.full((1, 7), 0.5))
    with pytest.raises(ValueError, match="score"):
        restart_labels(torch.zeros(3, 1))
    drawn = chain().complete(chain().init(1), 4000, Sample(0))
    estimate = restart_labels(chain().reward(drawn)[None])[0]
    exact = OracleRestart.of(chain())(chain(), drawn)
    torch.testing.assert_close(estimate, exact, atol=0.04, rtol=0)


def test_the_loss_is_least_at_the_label():
    label = torch.tensor([0.5, 0.25, 0.9]).double()
    logits = torch.zeros(3, 5).double()
    logits[:, 3], logits[:, 1] = label.log(), (1 - label).log()
    torch.testing.assert_close(yes_no_logit(logits, 3, 1).sigmoid(), label)
    z = yes_no_logit(logits, 3, 1).requires_grad_()
    loss = restart_loss(z, label)
    assert float(loss.detach()) == pytest.approx(float(-(label * label.log() + (1 - label) * (1 - label).log()).mean()))
    assert float(torch.autograd.grad(loss, z)[0].abs().max()) < 1e-12
    said = PromptedRestart(lambda chain, x: logits, 3, 1)
    torch.testing.assert_close(said(chain(), chain().init(3)), label)


def features(chain, x):
    """The three bits and their products."""
    a, b, c = x.tokens.double().unbind(1)
    return torch.stack([a, b, c, a * b, a * c, b * c], 1)


def test_a_head_learns_to_predict_from_comparisons():
    world = chain()
    drawn = world.complete(world.init(1), 3000, Sample(0))
    label = restart_labels(world.reward(drawn)[None])[0]
    x = features(world, drawn)
    weight, bias = fit_restart(x, label, ridge=1e-6)
    c = LinearRestart(features, weight, bias)(world, drawn)
    assert float((c - label).mean().abs()) < 1e-6  # first-order conditions of the optimum
    assert float((x.T @ (c - label) / len(label)).abs().max()) < 1e-5
    assert calibration_error(c, label) < 0.05 < 0.2 < calibration_error(torch.rand(3000), label)
    learned = AdaptiveBestOf(LinearRestart(features, weight, bias), 6, 0.35)(chain(4000), Sample(1))
    plain = float(world.reward(drawn).mean())
    assert float(learned.reward.nan_to_num().sum(1).mean()) > plain + 0.25
    with pytest.raises(ValueError, match="ridge"):
        fit_restart(x, label, 0.0)


def test_calibration_error():
    assert calibration_error(torch.tensor([0.05, 0.95, 0.95]), torch.tensor([0.05, 0.95, 0.95])) == 0
    assert calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])) == 1
    with pytest.raises(ValueError, match="calibration"):
        calibration_error(torch.tensor([]), torch.tensor([]))


@pytest.mark.parametrize(
    "setting",
    [
        {"num_particles": 0},
        {"stop_below": 1.5},
        {"prune_at": -0.1},
        {"prune_share": 1.0},
        {"temperatures": (-1.0,)},
        {"output": "first"},
    ],
)
def test_settings_out_of_range(setting):
    with pytest.raises((ValueError, TypeError), match=next(iter(setting))):  # TypeError where annotations are checked
        AdaptiveBestOf(constant, **setting)


def test_a_prediction_must_be_a_probability_and_a_chain_must_go_by_tokens():
    with pytest.raises(ValueError, match="restart"):
        AdaptiveBestOf(lambda chain, x: torch.full((len(x),), 2.0), 2)(chain(2), Sample(0))
    with pytest.raises(UserError, match="by steps"):
        AdaptiveBestOf(constant, 2)(Answers(1, 0.0, 1.0, 0.0), Sample(0))
