"""Recipes of distillation: their limits, and exact gradients where rows are a mixture's."""

import pytest
import torch
from tests.worlds import SPACE, assert_same, outcome, table

from keel.core.config import from_config, to_config
from keel.core.errors import ConfigError, MethodError
from keel.core.rows import Rows, cat
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.method import Method
from keel.models.sources import Initial, Pretrained, RandomInitial
from keel.parts.terms.distillation import TeacherDivergence
from keel.parts.terms.penalties import Summand
from keel.recipes.registry import recipe_named
from keel.rollouts.rollout import Rollout
from keel.rollouts.taught import GivenCompletions, WrittenBy, mixture_log_probs
from keel.sampling.smc import SMC
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence
from keel.verify.population import expected_update
from keel.verify.recipes import compare, worlds
from keel.verify.world import World

NAMES = (
    "distillation",
    "stored_distillation",
    "on_policy_distillation",
    "gkd",
    "sequence_kd",
    "minillm",
    "g_opd",
    "sampled_distillation",
    "sin_kd",
    "relational_distillation",
    "bd_kd",
    "pld",
    "ps_kd",
    "random_teacher",
)


@pytest.mark.parametrize("name", NAMES)
def test_written_down_and_read_back(name):
    method = recipe_named(name)()
    assert from_config(to_config(method)) == method


def test_equal_weights_of_the_two_kls_are_jeffreys():
    plain = recipe_named("bd_kd")(nu=1.0, nll=0.0)
    assert_same(outcome(plain), outcome(recipe_named("distillation")(divergence="jeffreys")))


def test_the_limits_of_gkd():
    none = recipe_named("gkd")(share=0.0)
    assert none == recipe_named("on_policy_distillation")(divergence="js")
    all_given = recipe_named("gkd")(share=1.0).rollout.given
    assert [all_given.count(6, 0, step) for step in range(20)] == [6] * 20
    assert [GivenCompletions(0.0).count(6, 0, step) for step in range(20)] == [0] * 20
    counts = [GivenCompletions(0.3).count(6, 0, step) for step in range(400)]
    assert set(counts) == {0, 6} and sum(counts) / 2400 == pytest.approx(0.3, abs=0.06)
    assert [GivenCompletions(share, "row").count(5, 0, 0) for share in (0.0, 0.3, 0.5, 1.0)] == [0, 2, 3, 5]


def test_at_lam_one_the_base_is_not_loaded():
    assert "ref" not in recipe_named("g_opd")(lam=1.0).models and "ref" in recipe_named("g_opd")().models
    assert recipe_named("g_opd")(lam=1.0) == recipe_named("sampled_distillation")()


@pytest.mark.parametrize("world", ["near", "far"])
def test_sampled_and_exact_distillation_have_one_expected_gradient(world):
    """Per state, the policy gradient of log teacher - log pi is that of the KL over the vocabulary."""
    here = worlds()[world]
    one, other = (
        expected_update(recipe_named(name)(), here).direction
        for name in ("sampled_distillation", "on_policy_distillation")
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_held_states_are_not_the_sequence():
    """The known vector: 0.177933 of 0.233250 for the first token's logit."""
    space = SequenceSpace(2, 2)
    pi = torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.4, 0.6]], dtype=torch.float64).log()[None]
    ref = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64).log()[None]
    reward = torch.zeros(1, 4, dtype=torch.float64)

    class There(World):
        def _further(self, name):
            return ref

    here = There(space, reward, pi, pi, ref, ref)
    make = recipe_named("on_policy_distillation")
    held = expected_update(make(), here).direction[0, 0, 0] * 2  # a mean over two tokens
    whole = expected_update(make(level="sequence"), here).direction[0, 0, 0]
    assert float(-held) == pytest.approx(0.177933, abs=5.1e-7)
    assert float(-whole) == pytest.approx(0.233250, abs=5.1e-7)
    # forward KL on the teacher's completions needs no such term
    written = expected_update(recipe_named("sequence_kd")(), here).loss
    assert 2 * written == pytest.approx(0.388348 + entropy_of(ref[0]), abs=5.1e-7)


def entropy_of(log_p: torch.Tensor) -> float:
    h = -(log_p.exp() * log_p).sum(-1)
    return float(h[0] + (log_p[0].exp() * h[1:]).sum())


# -- rows of a mixture -----------------------------------------------------------------------------------------------


def mixture(alpha: float) -> tuple[TabularPolicy, Rows]:
    """The mixture of policy and teacher as a policy, and all completions at their probability under it."""
    own, teacher = table("policy"), table("teacher")
    logits = [mixture_log_probs(*both, alpha) for both in zip(own.table.detach(), teacher.table.detach(), strict=True)]
    mixed = TabularPolicy(SPACE, torch.stack(logits))
    return mixed, rows_of(mixed)


def rows_of(policy: TabularPolicy) -> Rows:
    rows = cat([policy.weighted(SPACE.rows(prompt)) for prompt in range(SPACE.prompts)])
    log_probs = policy.table.detach().log_softmax(-1)
    state = SPACE.prefix_index(rows.tokens).clamp(max=SPACE.prefixes - 1)
    logp = log_probs[rows.prompt_ids, state].gather(-1, rows.tokens[..., None])[..., 0]
    return rows.with_(logp={"mixture": torch.where(rows.mask, logp, 0.0)})


def gradient(correction: str, rows: Rows) -> torch.Tensor:
    method = Method(
        kind="distillation",
        rollout=Rollout(),
        models={"teacher": Initial()},
        terms={"kl": Summand(TeacherDivergence("kl_policy_ref", correction=correction), 1.0)},
    )
    models = {"policy": table("policy"), "old": table("policy"), "teacher": table("teacher")}
    frozen = Engine(models).measure(method.frozen_needs(several_updates=True), rows)
    Engine(models).step(method.live_needs(), rows, frozen, lambda r, s: total(method, r, s))
    return models["policy"].table.grad


def total(method: Method, rows: Rows, stats) -> torch.Tensor:
    """A sum over visited states, not a mean, whose denominator would differ."""
    penalty = next(iter(method.terms.values())).penalty(rows, stats)
    return (rows.weight[:, None] * rows.mask * penalty).sum()


@pytest.mark.parametrize("alpha", [0.2, 0.7])
def test_prefix_weights_take_the_mixture_back_to_the_policy(alpha):
    wanted = gradient("none", rows_of(table("policy")))
    found = gradient("prefix", mixture(alpha)[1])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    uncorrected = compare("", gradient("none", mixture(alpha)[1]), wanted).relative_error
    per_token = compare("", gradient("token", mixture(alpha)[1]), wanted).relative_error
    assert uncorrected > 0.01 and per_token > 0.01


def test_a_mixture_at_both_ends():
    own, teacher = table("policy").table[0].detach(), table("teacher").table[0].detach()
    torch.testing.assert_close(mixture_log_probs(own, teacher, 1.0), teacher.log_softmax(-1))
    torch.testing.assert_close(mixture_log_probs(own, teacher, 0.0), own.log_softmax(-1))
    half = mixture_log_probs(own, teacher, 0.5, temperature=2.0).exp()
    torch.testing.assert_close(half, ((own / 2).softmax(-1) + (teacher / 2).softmax(-1)) / 2)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused():
    method = recipe_named("on_policy_distillation")()
    with pytest.raises(MethodError, match="sampler follows a reward"):
        method.replacing(rollout=Rollout(num_generations=4, sampler=SMC(4, 0.1)))
    with pytest.raises(MethodError, match="kind distillation"):
        recipe_named("grpo")().replacing(rollout=Rollout(given=GivenCompletions()))
    with pytest.raises(MethodError, match="no model 'teacher' to write"):
        Method(kind="distillation", rollout=Rollout(written=WrittenBy()))
    with pytest.raises(ValueError, match="mixture"):
        Rollout(given=GivenCompletions(), written=WrittenBy(alpha=0.5))
    with pytest.raises(MethodError, match="surrogate needs an advantage"):
        recipe_named("sampled_distillation")().replacing(advantage={})
    for make in (lambda: GivenCompletions(1.5), lambda: WrittenBy(alpha=0.0), lambda: RandomInitial(share=2.0)):
        with pytest.raises((ValueError, TypeError)):
            make()
    with pytest.raises(ConfigError, match="no divergence"):
        recipe_named("distillation")(divergence="nothing")


def test_the_teacher_is_a_path_that_can_be_set():
    method = recipe_named("on_policy_distillation")()
    assert method.models["teacher"] == Pretrained("")
    assert method.set("models.teacher.path", "runs/expert").models["teacher"] == Pretrained("runs/expert")
    assert recipe_named("pld")(teacher="some/model").models["teacher"] == Pretrained("some/model")
    assert Divergence("kl_policy_ref", "teacher") in method.live_needs()
