"""What a method measures and when, what it refuses to combine, and how variants are made."""

import math
from dataclasses import dataclass

import pytest
import torch
from tests.worlds import outcome

from keel.core.aggregate import Aggregation
from keel.core.errors import MethodError
from keel.core.rows import Rows
from keel.method import Method
from keel.models.heads import Critic
from keel.models.sources import Initial
from keel.parts.advantages.group import GroupCentre, GroupStd, Returns
from keel.parts.advantages.stream import GAE, RunningBaseline
from keel.parts.controllers.coefficients import Constant, Schedule
from keel.parts.rewards.transforms import ClipReward, KLInReward, WeightedSum
from keel.parts.terms.penalties import NegativeEntropy, NegativeLogLikelihood, SampledKL, Summand, ValueLoss
from keel.parts.terms.surrogate import Clipped, Surrogate
from keel.recipes.registry import recipe_named
from keel.rollouts.rollout import Rollout
from keel.statistics.functionals import Divergence, Entropy, LogProb, Value
from keel.statistics.stats import Stats

OLD, LIVE, REF = LogProb(of=("old",)), LogProb(), LogProb(of=("ref",))
PLAIN = {"rollout": Rollout(), "advantage": {"centre": GroupCentre()}, "surrogate": Surrogate(Clipped())}
IDS = torch.zeros(2, 3, dtype=torch.long)
ROWS = Rows.build(IDS, IDS == 0, IDS, torch.tensor([[True, True, True], [True, False, False]]))


# -- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "live", "one_update", "several"),
    [
        ("grpo", {}, {LIVE}, set(), {OLD}),
        ("grpo", {"beta": 0.1, "kl": "k3"}, {LIVE}, {REF}, {OLD, REF}),
        ("grpo", {"beta": 0.1, "kl": "js"}, {LIVE, Divergence("js")}, set(), {OLD}),
        ("grpo", {"entropy_coef": 0.1}, {LIVE, Entropy()}, set(), {OLD}),
        ("reinforce", {"beta": 0.1}, {LIVE}, {OLD, REF}, {OLD, REF}),
        (
            "ppo",
            {"beta": 0.0},
            {LIVE, Value("value")},
            {Value("value", of=("old",))},
            {OLD, Value("value", of=("old",))},
        ),
        ("sft", {}, {LIVE}, set(), set()),
    ],
)
def test_needs(name, options, live, one_update, several):
    method = recipe_named(name)(**options)
    assert set(method.live_needs()) == live
    assert set(method.frozen_needs(several_updates=False)) == one_update
    assert set(method.frozen_needs(several_updates=True)) == several


def test_the_live_value_stands_in_for_the_old():
    method = Method(**PLAIN)
    stats = Stats({LIVE: torch.ones(2, 3, requires_grad=True)})
    filled = method.with_old(stats)
    assert torch.equal(filled[OLD], torch.ones(2, 3)) and not filled[OLD].requires_grad
    known = stats.merged({OLD: torch.zeros(2, 3)})
    assert torch.equal(method.with_old(known)[OLD], torch.zeros(2, 3))


def test_contributions_add_up_to_the_loss():
    method = recipe_named("grpo")(beta=0.1, entropy_coef=0.1, importance_cap=2.0)
    found = outcome(method)
    parts = method.contributions(found.rows, found.stats, {})
    assert list(parts) == ["policy", "kl", "entropy"]
    assert float(sum(parts.values())) == pytest.approx(float(found.loss), rel=1e-12)


def test_a_weighted_sum_comes_last_unless_it_is_placed():
    rows = ROWS.with_(reward=torch.tensor([[3.0, 3.0], [0.0, 1.0]]))
    clip = {"clip": ClipReward(0.0, 4.0)}
    method = Method(
        rollout=Rollout(), transforms=clip, advantage={"returns": Returns()}, surrogate=Surrogate(Clipped())
    )
    assert method.prepare(rows, Stats(), {}).reward[:, 0].tolist() == [6.0, 1.0]
    placed = method.replacing(transforms={"sum": WeightedSum((1.0, 0.5)), **clip})
    assert placed.prepare(rows, Stats(), {}).reward[:, 0].tolist() == [4.0, 0.5]


def test_the_chain_runs_in_order():
    rows = ROWS.with_(reward=torch.tensor([[1.0], [3.0]]), group=torch.zeros(2, dtype=torch.long))
    method = Method(
        rollout=Rollout(), advantage={"centre": GroupCentre(), "std": GroupStd(0.0)}, surrogate=Surrogate(Clipped())
    )
    found = method.prepare(rows, Stats(), {}).advantage[:, 0]
    assert found.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    turned = method.replacing(advantage={"std": GroupStd(0.0), "centre": GroupCentre()})
    with pytest.raises(ValueError, match="put it after one that sets it"):
        turned.prepare(rows, Stats(), {})


@dataclass(frozen=True)
class Likely:
    """A weight that the live policy decides."""

    needs = (LIVE,)
    additive = True

    def __call__(self, rows, stats):
        return stats[LIVE].exp()


def test_no_gradient_flows_through_a_weight():
    """-pi sg'd times the ratio: the gradient of log pi = -2 is -e^-2 over the four tokens, not twice that."""
    method = Method(
        rollout=Rollout(),
        advantage={"returns": Returns()},
        surrogate=Surrogate(Clipped()),
        weights={"likely": Likely()},
    )
    live = torch.full((2, 3), -2.0, dtype=torch.float64, requires_grad=True)
    rows = method.prepare(ROWS.with_(reward=torch.ones(2, 1, dtype=torch.float64)), Stats(), {})
    method.loss(rows, method.with_old(Stats({LIVE: live})), {}).backward()
    wanted = -math.exp(-2) / 4 * ROWS.mask.double()
    torch.testing.assert_close(live.grad, wanted, rtol=1e-12, atol=0)


# -- memory and masks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """A penalty with memory: as large as what it remembers."""

    additive = True
    needs = ()

    def init(self):
        return {"seen": 3.0}

    def __call__(self, rows, stats, state):
        return torch.full(rows.tokens.shape, state["seen"])


def test_memory_lives_outside_the_parts():
    method = Method(
        rollout=Rollout(),
        advantage={"baseline": RunningBaseline()},
        surrogate=Surrogate(Clipped()),
        terms={"counted": Summand(Counted(), 2.0)},
    )
    states = method.initial_states()
    assert set(states) == {"advantage.baseline", "terms.counted"}
    only = method.replacing(surrogate=None, advantage={})
    assert float(only.loss(ROWS, Stats(), states)) == 6.0
    assert float(only.loss(ROWS, Stats(), {"terms.counted": {"seen": 5.0}})) == 10.0


@dataclass(frozen=True)
class First:
    """The first token of each row, or what another mask leaves of it."""

    beside: str | None = None
    needs = ()
    additive = True

    def __call__(self, rows, stats):
        mask = torch.arange(rows.tokens.shape[1]).expand_as(rows.mask) == 0
        return mask if self.beside is None else rows.masks[self.beside] & ~mask


def test_masks_are_computed_once_and_may_build_on_each_other():
    method = Method(
        kind="supervised",
        masks={"rest": First("nll"), "first": First()},
        terms={
            "a": Summand(NegativeLogLikelihood(), 1.0, where="first", per="where"),
            "b": Summand(NegativeLogLikelihood(), 1.0, where="rest", per="where"),
        },
    )
    stats = Stats({LIVE: -torch.tensor([[1.0, 2.0, 4.0], [8.0, 7.0, 7.0]])})
    found = method.contributions(ROWS.with_(masks={"nll": ROWS.mask}), stats, {})
    assert float(found["a"]) == 4.5 and float(found["b"]) == 3.0


def test_a_method_is_additive_if_all_its_parts_are():
    assert Method(**PLAIN).additive
    where = Summand(NegativeEntropy(), 1.0, where="nll", per="where")
    assert not Method(**PLAIN, terms={"e": where}).additive  # its denominator is not known beforehand
    assert Method(**PLAIN, terms={"e": where}).set("terms.e.coef", 0.0).additive

    @dataclass(frozen=True)
    class Ranked:
        needs = ()

        def __call__(self, rows, stats):
            return rows.mask

    assert not Method(**PLAIN, masks={"ranked": Ranked()}).additive


# -- variants --------------------------------------------------------------------------------------------------------


def test_variants_leave_the_original_alone():
    method = Method(**PLAIN)
    more = method.adding(terms={"entropy": Summand(NegativeEntropy(), 0.1)}, advantage={"std": GroupStd()})
    assert list(more.advantage) == ["centre", "std"] and list(more.terms) == ["entropy"]
    assert method.terms == {} and list(method.advantage) == ["centre"]
    other = method.replacing(aggregation=Aggregation("sequence_mean_token_sum"))
    assert other.aggregation.mode == "sequence_mean_token_sum" and method.aggregation.mode == "token_mean"
    assert method == Method(**PLAIN) and method != other


@pytest.mark.parametrize(
    ("make", "where", "what"),
    [
        (
            lambda: Method(**PLAIN, terms={"kl": Summand(SampledKL(), 0.1)}),
            "terms.kl",
            "log_prob(ref) reads the model 'ref', which is not declared. Add it: models={'ref': Initial()}.",
        ),
        (
            lambda: Method(**PLAIN, terms={"kl": Summand(SampledKL(against="reff"), 0.1)}, models={"ref": Initial()}),
            "terms.kl",
            "Did you mean 'ref'?",
        ),
        (
            lambda: Method(**PLAIN, transforms={"kl": KLInReward()}),
            "transforms.kl",
            "log_prob(ref) reads the model 'ref'",
        ),
        (lambda: Method(**PLAIN, models={"old": Initial()}), "models.old", "Keel's own"),
        (
            lambda: Method(**PLAIN, transforms={"kl": KLInReward(against="policy")}),
            "transforms.kl",
            "log_prob reads the live policy, but this part runs before the update. Read of=('old',)",
        ),
        (
            lambda: Method(**PLAIN, terms={"e": Summand(NegativeEntropy(), 0.1, where="rare", per="batch")}),
            "terms.e.where",
            "there is no mask 'rare'",
        ),
        (
            lambda: Method(
                **PLAIN,
                masks={"rare": First()},
                terms={"e": Summand(NegativeEntropy(), 0.1, where="rar", per="batch")},
            ),
            "terms.e.where",
            "Did you mean 'rare'?",
        ),
        (lambda: Method(**{**PLAIN, "advantage": {"gae": GAE()}}), "advantage.gae", "no head 'value'"),
        (
            lambda: Method(**PLAIN, heads={"values": Critic()}, terms={"v": Summand(ValueLoss(), 0.1)}),
            "terms.v",
            "Did you mean 'values'?",
        ),
        (lambda: Method(**{**PLAIN, "advantage": {}}), "advantage", "the chain is empty"),
        (lambda: Method(**{**PLAIN, "rollout": None}), "rollout", "needs a rollout"),
        (lambda: Method(**PLAIN, terms=[NegativeEntropy()]), "terms", "dictionary of named parts"),
        (
            lambda: Method(
                **PLAIN,
                controllers={
                    "a": Constant("surrogate.f.epsilon", 0.2),
                    "b": Schedule("surrogate.f.epsilon", 0.2, 0.1, 5),
                },
            ),
            "controllers.b",
            "'surrogate.f.epsilon' is owned by the controllers 'a' and 'b'",
        ),
        (
            lambda: Method(**PLAIN, controllers={"a": Constant("terms.kl.coef", 0.2)}),
            "controllers.a.path",
            "it owns 'terms.kl.coef', which the method does not have",
        ),
        (
            lambda: Method(**PLAIN).adding(advantage={"centre": GroupCentre()}),
            None,
            "slot 'advantage' has a part named 'centre' already. Give it another name",
        ),
        (lambda: Method(**PLAIN).adding(term={}), None, "cannot be added to 'term'. Did you mean 'terms'?"),
        (lambda: Method(**PLAIN).replacing(surogate=None), None, "no slot 'surogate'. Did you mean 'surrogate'?"),
    ],
)
def test_combinations_without_meaning(make, where, what):
    with pytest.raises(MethodError) as error:
        make()
    assert what in str(error.value)
    assert error.value.where == where and error.value.exit_code == 2


def test_a_setting_that_makes_no_sense_together_is_refused_by_set_too():
    method = recipe_named("grpo")(beta=0.1, kl="k2")
    with pytest.raises(MethodError, match="'teacher', which is not declared"):
        method.set("terms.kl.penalty.against", "teacher")
