"""Settings at which one method is another, and gradients that are known exactly on enumerable worlds."""

import itertools
import math
from collections import Counter

import pytest
import torch
from tests.cases import Case, recipe_cases
from tests.worlds import SPACE, Outcome, assert_same, noise, online_rows, outcome, rows_for, table

from keel.core.aggregate import Aggregation
from keel.core.rows import Rows, cat
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.method import Method
from keel.models.sources import Initial
from keel.parts.advantages.group import GroupCentre, GroupStd, LeaveOneOut, Returns
from keel.parts.rewards.transforms import KLInReward
from keel.parts.terms.penalties import SampledKL, Summand
from keel.parts.terms.surrogate import Clipped, LogLikelihood, Surrogate, Unclipped
from keel.recipes.policy_gradient import unclipped_grpo
from keel.recipes.registry import recipe_named, recipes
from keel.rollouts.rollout import Rollout
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

OTHER_ROWS = {"self_judge"}  # its rows come in twins, which `keel verify` holds to the same limit
IN_THE_LOOP = {"gkd", "meta_rm", "ps_kd"}  # that their defaults are another method shows only in the loop
NEUTRAL = [name for name, recipe in recipes().items() if recipe.neutral and name not in OTHER_ROWS]


def assert_equal(found: Outcome, wanted: Outcome) -> None:
    """The same bits."""
    assert torch.equal(found.loss, wanted.loss)
    for name, grad in wanted.grads.items():
        assert torch.equal(found.grads[name], grad), name


# -- neutral settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings(name):
    recipe = recipes()[name]
    baseline = recipe.reduces_to() if recipe.reduces_to is not None else recipe_named(recipe.baseline)()
    assert_equal(outcome(recipe(**recipe.neutral)), outcome(baseline))
    if name not in IN_THE_LOOP:
        assert not torch.equal(outcome(recipe()).loss, outcome(baseline).loss)  # the defaults are another method


def test_some_recipe_has_a_neutral_setting():
    assert "grpo_forward_kl" in NEUTRAL


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "k3_ratio", "kl_policy_ref", "kl_ref_policy", "js"])
def test_no_kl(kl):
    grpo = recipe_named("grpo")
    plain = outcome(grpo())
    assert grpo(beta=0.0, kl=kl) == grpo() and not grpo(beta=0.0, kl=kl).models
    with_kl = grpo(beta=0.1, kl=kl)
    assert_equal(outcome(with_kl.set("terms.kl.coef", 0.0)), plain)
    assert not torch.equal(outcome(with_kl).grads["policy.table"], plain.grads["policy.table"])


def test_switches_that_are_off():
    grpo = recipe_named("grpo")
    plain = outcome(grpo())
    assert_equal(outcome(grpo(entropy_coef=0.0, importance_cap=None, dual_clip=None)), plain)
    assert_equal(outcome(grpo(epsilon_high=0.2)), plain)
    assert_equal(outcome(recipe_named("dapo")(epsilon_high=0.2)), plain)  # no completion comes near the limit
    assert_same(outcome(grpo(dual_clip=1e6)), plain)
    agree = rows_for(grpo()).with_(logp={"behaviour": outcome(grpo()).stats[LogProb(of=("old",))]})
    assert_same(outcome(grpo(importance_cap=2.0), agree), plain)


def test_wide_clips_are_no_clips():
    wide = recipe_named("grpo")(epsilon=1.0, epsilon_high=1e9)
    assert_same(outcome(wide), outcome(unclipped_grpo()))


def test_sequence_ratio_of_a_single_token_is_the_tokens():
    rows = online_rows()
    first = torch.arange(SPACE.horizon) < 1
    rows = rows.with_(mask=rows.mask & first)
    gspo = recipe_named("gspo")(epsilon=0.2, epsilon_high=0.2)
    grpo = recipe_named("grpo")(aggregation="sequence_mean_token_mean")
    assert_same(outcome(gspo, rows), outcome(grpo, rows))


def test_without_a_critic_ppo_is_reinforce():
    """V = 0 and lam = 1: the advantage of every token is the return."""
    ppo = recipe_named("ppo")(beta=0.0, lam=1.0, whiten=False, value_coef=0.0)
    rows = rows_for(ppo)
    zero = Stats({need: torch.zeros(rows.tokens.shape) for need in ppo.prepare_needs()})
    prepared = ppo.prepare(rows, zero, {})
    plain = Method(rollout=Rollout(), advantage={"returns": Returns()}, surrogate=Surrogate(Clipped()))
    torch.testing.assert_close(prepared.advantage, plain.prepare(rows, Stats(), {}).advantage)


FIRST_UPDATE = {
    "rloo is REINFORCE with leave-one-out": (
        recipe_named("rloo")(beta=0.0),
        Method(
            rollout=Rollout(),
            advantage={"baseline": LeaveOneOut()},
            surrogate=Surrogate(LogLikelihood()),
            aggregation=Aggregation("sequence_mean_token_sum"),
        ),
    ),
    "cispo is GRPO": (recipe_named("cispo")(), recipe_named("grpo")()),
    "no clip is GRPO": (unclipped_grpo(), recipe_named("grpo")()),
}


@pytest.mark.parametrize("name", FIRST_UPDATE)
def test_on_the_first_update(name):
    """Gradients agree while the policy is still the one that sampled."""
    found, wanted = (outcome(method, online_rows(), moved=False) for method in FIRST_UPDATE[name])
    torch.testing.assert_close(found.grads, wanted.grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", recipe_cases(), ids=str)
def test_the_live_policy_stands_in_for_an_old_one_that_is_still_the_same(case: Case):
    measured = outcome(case.method, moved=False, measured=True)
    assert_same(outcome(case.method, moved=False, measured=False), measured, 1e-12)


# -- exact gradients -------------------------------------------------------------------------------------------------

FOUR = SequenceSpace(2, 2)
REWARD = torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=torch.float64)


def policy_gradient(estimator) -> Method:
    return Method(
        rollout=Rollout(),
        advantage={"part": estimator},
        surrogate=Surrogate(LogLikelihood()),
        aggregation=Aggregation("sequence_mean_token_sum"),
    )


def gradient(method: Method, rows: Rows, policy: TabularPolicy, ref: TabularPolicy | None = None) -> torch.Tensor:
    """Of the loss, at the policy that sampled."""
    models = {"policy": policy, "old": policy, "ref": policy if ref is None else ref}
    engine = Engine(models)
    frozen = engine.measure(method.frozen_needs(several_updates=True), rows)
    rows = method.prepare(rows, frozen, {}) if method.kind == "online" else rows
    policy.zero_grad()
    engine.step(method.live_needs(), rows, frozen, lambda r, s: method.loss(r, s, {}))
    return policy.table.grad.clone()


def exact_gradient(policy: TabularPolicy, space: SequenceSpace, reward, beta=0.0, ref=None) -> torch.Tensor:
    """Of E[r] - beta KL(policy || ref) over whole sequences, by autograd through all probabilities."""
    rows = space.rows()
    log_p = policy.log_prob(rows)
    value = reward
    if ref is not None:
        value = value - beta * (log_p - ref.log_prob(rows).detach())
    (grad,) = torch.autograd.grad((log_p.exp() * value).sum(), policy.table)
    return grad


def every_group(policy: TabularPolicy, size: int, multisets: bool) -> Rows:
    """All groups of `size` completions, weighted with their probability under independent sampling."""
    world = FOUR.rows().with_(reward=REWARD[:, None])
    p = policy.log_prob(world).exp().detach()
    draws = (
        itertools.combinations_with_replacement(range(4), size)
        if multisets
        else itertools.product(range(4), repeat=size)
    )
    groups = []
    for i, draw in enumerate(draws):
        ways = math.factorial(size) // math.prod(map(math.factorial, Counter(draw).values())) if multisets else 1
        weight = (ways * p[list(draw)].prod()).expand(size).clone()
        rows = world.select(torch.tensor(draw))
        groups.append(rows.with_(group=torch.full((size,), i), weight=weight))
    return cat(groups)


@pytest.mark.parametrize("multisets", [False, True], ids=["tuples", "multisets"])
@pytest.mark.parametrize("size", [2, 3])
def test_bias_of_group_estimators(size, multisets):
    """Leave-one-out is unbiased; centring on a mean that contains the sample shrinks the gradient by (G - 1) / G."""
    policy = table("bias", space=FOUR)
    rows = every_group(policy, size, multisets)
    assert float(rows.weight.sum()) == pytest.approx(size)
    wanted = exact_gradient(policy, FOUR, REWARD)
    unbiased = -gradient(policy_gradient(LeaveOneOut()), rows, policy)
    torch.testing.assert_close(unbiased, wanted, rtol=1e-12, atol=1e-14)
    centred = -gradient(policy_gradient(GroupCentre()), rows, policy)
    torch.testing.assert_close(centred, wanted * (size - 1) / size, rtol=1e-12, atol=1e-14)


def test_division_by_the_deviation_changes_the_direction():
    """GRPO's expected gradient is no multiple of the reward's: the cosine is below one."""
    policy = table("bias", space=FOUR)
    rows = every_group(policy, 3, multisets=True)
    grpo = policy_gradient(GroupCentre()).adding(advantage={"scale": GroupStd(1e-6)})
    found, wanted = -gradient(grpo, rows, policy).flatten(), exact_gradient(policy, FOUR, REWARD).flatten()
    cosine = float(found @ wanted / found.norm() / wanted.norm())
    assert 0.5 < cosine < 0.999


@pytest.mark.parametrize("estimator", [Returns(), GroupCentre(), LeaveOneOut()], ids=["returns", "centre", "rloo"])
@pytest.mark.parametrize("space", [FOUR, SequenceSpace(3, 3, eos=2)], ids=["fixed length", "with eos"])
def test_population_gradient(space, estimator):
    """Enumerated, all three are the exact gradient: no correction for the size of a sample."""
    policy = table("population", space=space)
    rows = policy.weighted(space.rows())
    reward = noise("reward", shape=(len(rows),))
    found = -gradient(policy_gradient(estimator), rows.with_(reward=reward[:, None]), policy)
    torch.testing.assert_close(found, exact_gradient(policy, space, reward), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("space", [FOUR, SequenceSpace(3, 3), SequenceSpace(3, 3, eos=2)], ids=str)
def test_k1_in_the_reward_is_the_kl_of_sequences(space):
    policy, ref = table("kl", space=space), table("ref", space=space)
    rows = policy.weighted(space.rows())
    reward = noise("reward", shape=(len(rows),))
    rows = rows.with_(reward=reward[:, None])
    wanted = exact_gradient(policy, space, reward, 0.5, ref)
    for estimator in (Returns(), LeaveOneOut()):
        method = policy_gradient(estimator).replacing(transforms={"kl": KLInReward(0.5)}, models={"ref": Initial()})
        torch.testing.assert_close(-gradient(method, rows, policy, ref), wanted, rtol=1e-10, atol=1e-12)
    reinforce = recipe_named("reinforce")(baseline="batch", beta=0.5)
    torch.testing.assert_close(-gradient(reinforce, rows, policy, ref), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("space", [FOUR, SequenceSpace(3, 3, eos=2)], ids=str)
def test_k1_in_the_loss_is_nothing(space):
    policy, ref = table("kl", space=space), table("ref", space=space)
    rows = policy.weighted(space.rows())
    method = Method(
        kind="supervised",
        aggregation=Aggregation("sequence_mean_token_sum"),
        terms={"kl": Summand(SampledKL("k1"), 1.0)},
        models={"ref": Initial()},
    )
    assert float(gradient(method, rows, policy, ref).abs().max()) < 1e-12
    one = rows.select(torch.tensor([0]))
    assert float(gradient(method, one, policy, ref).abs().max()) > 1e-2  # though each sample is pulled


def test_importance_weighted_policy_gradient_is_unbiased_off_policy():
    """Rows of another policy, the product of ratios unclipped: the exact gradient again."""
    space = SequenceSpace(3, 2, eos=2)
    policy, old = table("live", space=space), table("older", space=space)
    rows = old.weighted(space.rows())
    reward = noise("reward", shape=(len(rows),))
    method = policy_gradient(Returns()).replacing(surrogate=Surrogate(Unclipped(), "trajectory"))
    method = method.replacing(aggregation=Aggregation("sequence_mean_token_mean"))
    engine = Engine({"policy": policy, "old": old})
    rows = rows.with_(reward=reward[:, None])
    frozen = engine.measure(method.frozen_needs(several_updates=True), rows)
    engine.step(method.live_needs(), method.prepare(rows, frozen, {}), frozen, lambda r, s: method.loss(r, s, {}))
    torch.testing.assert_close(-policy.table.grad, exact_gradient(policy, space, reward), rtol=1e-10, atol=1e-12)


def test_supervised_learning_on_the_data_is_maximum_likelihood():
    """Rows weighted with the data's probabilities: the gradient of KL(data || policy)."""
    space = SequenceSpace(3, 2, eos=2)
    policy, data = table("live", space=space), table("data", space=space)
    rows = data.weighted(space.rows())
    found = gradient(recipe_named("sft")(aggregation="sequence_mean_token_sum"), rows, policy)
    (wanted,) = torch.autograd.grad(-(rows.weight * policy.log_prob(space.rows())).sum(), policy.table)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_finite_differences_of_recipes():
    """Where nothing is held constant, the gradient is that of the value."""
    for name, options in (
        ("grpo", {"beta": 0.1, "kl": "js", "entropy_coef": 0.1}),
        ("grpo_forward_kl", {}),
        ("sft", {}),
    ):
        method = recipe_named(name)(**options)
        grad = outcome(method).grads["policy.table"]
        for index in (0, 7, 40):
            assert _slope(method, index) == pytest.approx(float(grad.flatten()[index]), abs=1e-7)


def _slope(method: Method, index: int) -> float:
    found = []
    for sign in (1, -1):
        move = torch.zeros(SPACE.prompts * SPACE.prefixes * SPACE.vocab, dtype=torch.float64)
        move[index] = sign * 1e-6
        found.append(float(outcome(method, nudge=move).loss))
    return (found[0] - found[1]) / 2e-6
