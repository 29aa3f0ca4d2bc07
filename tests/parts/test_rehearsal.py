"""Rehearsal: which rows are kept, in what order they come, that only their own terms read them; and DPH-RL."""

import math

import pytest
import torch
from tests.parts.k8 import ALIKE, k8_rows
from tests.worlds import assert_same, outcome, rows_for

from keel.core.aggregate import Aggregation
from keel.core.config import from_config, to_config
from keel.core.errors import ConfigError, MethodError
from keel.core.rows import Rows, Stream
from keel.exact.space import SequenceSpace
from keel.parts.controllers.convergence import ObjectiveWeights
from keel.parts.replay.memory import joined
from keel.parts.replay.rehearsal import Rehearsal, spread_out
from keel.parts.terms.covering import RehearsalDivergence
from keel.parts.terms.penalties import NegativeLogLikelihood, Summand
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats
from keel.verify.objectives import Objective
from keel.verify.population import expected_update
from keel.verify.recipes import compare, objective_of, worlds
from keel.verify.world import World

POLICY, REF = [0.10, 0.30, 0.15, 0.25, 0.20], [0.40, 0.25, 0.20, 0.10, 0.05]
NLL = {"general": Summand(NegativeLogLikelihood(), 0.5, stream="regulariser")}
DATA = {"pool": Rehearsal(4, "solutions")}


def pool(count: int, domain: list[int] | None = None) -> Rows:
    rows = k8_rows(torch.float32).select(torch.arange(count) % 8)
    chosen = torch.zeros(count, dtype=torch.long) if domain is None else torch.tensor(domain)
    return rows.with_(row=torch.arange(count), data_index=torch.arange(count), domain=chosen)


# -- which rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solved", "wanted"), [(1.0, [3]), (2 / 3, [3, 7]), (1 / 3, [1, 3, 7]), (0.34, [3, 7]), (0.01, [1, 3, 7])]
)
def test_one_correct_row_of_each_solved_prompt(solved, wanted):
    correct = torch.tensor([0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0], dtype=torch.bool)
    prompt = torch.tensor([5, 5, 5, 2, 2, 2, 9, 9, 9, 7, 7, 7])
    assert sorted(Rehearsal(solved=solved).chosen(correct, prompt).tolist()) == wanted


def test_domains_come_in_proportion():
    """Of 8 rows of one domain and 4 of another, every three have two and one."""
    domain = torch.tensor([0] * 8 + [1] * 4)
    order = spread_out(domain, torch.rand(12, generator=torch.Generator().manual_seed(0)))
    assert sorted(order.tolist()) == list(range(12))
    assert domain[order].reshape(4, 3).sum(1).tolist() == [1] * 4


def test_each_pass_has_every_row_once():
    part = Rehearsal(4)
    memory = part.made(pool(10))
    batches = [part.rows_of(memory, step, 0) for step in range(10)]
    assert [len(rows) for rows in batches] == [4] * 10
    seen = torch.cat([rows.data_index for rows in batches]).tolist()
    passes = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes) and len({tuple(one) for one in passes}) == 4
    assert bool((batches[0].stream == int(Stream.REGULARISER)).all()) and batches[0].reward is None
    assert part.rows_of(memory, 3, 0).data_index.tolist() == batches[3].data_index.tolist()
    assert part.rows_of(memory, 3, 1).data_index.tolist() != batches[3].data_index.tolist()


def test_a_small_pool_gives_what_it_has():
    part = Rehearsal(8)
    assert len(part.rows_of(part.made(pool(3)), 5, 0)) == 3
    assert part.rows_of(part.made(None), 5, 0) is None and part.made(None, [4])["left"] == []
    assert Rehearsal(leave=True).made(pool(2), [4, 1])["left"] == [1, 4]


def test_prompts_that_are_looked_at():
    assert Rehearsal(num_prompts=None).looked_at(5, 0) == [0, 1, 2, 3, 4]
    some = Rehearsal(num_prompts=4).looked_at(100, 0)
    assert len(set(some)) == 4 and some == sorted(some) and some != Rehearsal(num_prompts=4).looked_at(100, 1)


# -- who reads them --------------------------------------------------------------------------------------------------


def with_pool(rows: Rows, stored: bool = True) -> Rows:
    """The rows, and the first group of them as a regulariser's, with numbers that would be noticed."""
    own = rows.select((rows.group == 0).nonzero().flatten()[:3])
    stream = torch.full_like(own.stream, int(Stream.REGULARISER))
    logp = {"stored": own.logp["behaviour"] - 0.1} if stored else {}
    return joined([rows, own.with_(stream=stream, group=own.group + 50, reward=None, columns={}, logp=logp)])


@pytest.mark.parametrize("name", ["grpo", "dapo", "ppo", "clip_cov", "lp_reg", "recap", "remax"])
def test_nobody_else_sees_them(name):
    """Loss and gradients are those without them, plus 0.5 times -log pi of theirs, in the method's mean."""
    plain = recipe_named(name)()
    made = plain.adding(terms=NLL, replay=DATA)
    rows = rows_for(plain)
    without, both = outcome(plain, rows, additive=False), outcome(made, with_pool(rows, stored=False))
    sft = recipe_named("sft")().replacing(aggregation=plain.aggregation)
    alone = outcome(sft, rows.select((rows.group == 0).nonzero().flatten()[:3]), additive=False)
    torch.testing.assert_close(both.loss, without.loss + 0.5 * alone.loss, rtol=1e-9, atol=1e-9)
    for key, grad in without.grads.items():
        more = 0.5 * alone.grads[key] if key in alone.grads else 0
        torch.testing.assert_close(both.grads[key], grad + more, rtol=1e-9, atol=1e-9)
    assert torch.equal(both.rows.select(both.rows.fresh).stream, rows.stream)


def test_the_step_does_not_depend_on_slices():
    made = recipe_named("dph_rl")(eta=0.5)
    rows = with_pool(rows_for(made))
    assert made.additive and not made.splits(rows)
    assert_same(outcome(made, rows, max_tokens=16, additive=False), outcome(made, rows))


# -- DPH-RL ----------------------------------------------------------------------------------------------------------


def five(policy: list[float]) -> World:
    """One prompt, one token of five; the reference is that of the example, and no completion earns anything."""
    space = SequenceSpace(5, 1)
    log = [torch.tensor(x, dtype=torch.float64).log()[None, None] for x in (policy, policy, REF, REF)]
    return World(space, torch.zeros(1, 5, dtype=torch.float64), *log)


@pytest.mark.parametrize(("kind", "value"), [("forward_kl", 0.405530), ("js", 0.183625), ("alpha", 0.376237)])
def test_value_and_slope_on_samples_of_the_reference(kind, value):
    """(a) The recipe on enumerated samples: the divergence's value, and its exact gradient."""
    method = recipe_named("dph_rl")(kind=kind, eta=1.0)
    world = five(POLICY)
    found = expected_update(method, world)
    assert found.loss == pytest.approx(value, abs=ALIKE)
    claim = Objective("reward", method.claim.divergence, "sequence", 1.0)
    torch.testing.assert_close(found.direction, claim.gradient(world), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward_kl", "js", "alpha"])
def test_nothing_moves_while_the_policy_is_the_stored_one(kind):
    """(b) Value 0 and gradient 0, where the raw -log u has a gradient."""
    found = expected_update(recipe_named("dph_rl")(kind=kind, eta=1.0), five(REF))
    assert found.loss == pytest.approx(0, abs=1e-12) and float(found.direction.abs().max()) < 1e-12


@pytest.mark.parametrize(("kind", "pull"), [("forward_kl", 0.3999), ("alpha", 0.0022), ("js", 0.0008)])
def test_what_brings_back_a_lost_outcome(kind, pull):
    """(c) One of probability 0.4 that has fallen to 1e-4; JS is 0.0004, and twice that as the paper has it."""
    found = expected_update(recipe_named("dph_rl")(kind=kind, eta=1.0), five([1e-4, 0.3, 0.15, 0.25, 0.2999]))
    assert float(found.direction[0, 0, 0]) == pytest.approx(pull, abs=6e-5)


def test_the_control():
    """Reverse KL: k3 on the policy's own samples, and no stored ones; 0.0009 at the lost outcome, with its k2."""
    method = recipe_named("dph_rl")(kind="reverse_kl", eta=1.0)
    assert not method.replay and method.terms["kl"].coef == 1.0 and method.surrogate.f.epsilon_high == 0.28
    world = five([1e-4, 0.3, 0.15, 0.25, 0.2999])
    found = -expected_update(method.set("terms.kl.penalty.estimator", "k2"), world).direction[0, 0, 0]
    assert float(found) == pytest.approx(-0.0009, abs=6e-5)


def test_without_stored_rows_it_is_grpo_to_the_bit():
    """(d) An empty pool, or no coefficient."""
    grpo = recipe_named("grpo")(epsilon_high=0.28)
    assert recipe_named("dph_rl")(eta=0.0) == grpo
    made = recipe_named("dph_rl")()
    rows = rows_for(grpo)
    assert made.splits(rows)
    for slices in ({}, {"max_tokens": 16, "additive": True}):
        found, plain = outcome(made, rows, **slices), outcome(grpo, rows, **slices)
        assert torch.equal(found.loss, plain.loss)
        assert torch.equal(found.grads["policy.table"], plain.grads["policy.table"])


@pytest.mark.parametrize("kind", ["forward_kl", "js", "alpha"])
def test_the_objective_is_held_where_sequences_have_several_tokens(kind):
    """GRPO without its own biases, and sums over sequences: E_pi[r] - eta E_ref[sum_t D] to rounding."""
    arguments = {"kind": kind, "eta": 0.5, "scale_rewards": "none", "aggregation": "sequence_mean_token_sum"}
    recipe = recipe_named("dph_rl")
    method = recipe(**arguments)
    objective = objective_of(method.claim, recipe, arguments)
    for name in ("near", "far"):
        update = expected_update(method, worlds()[name]).direction
        assert compare(name, update, objective.gradient(worlds()[name])).relative_error < 1e-12
    if kind == "forward_kl":  # sums over tokens of the forward KL are that of sequences
        whole = Objective("reward", "kl_ref_policy", "sequence", 0.5)
        torch.testing.assert_close(objective.gradient(worlds()["far"]), whole.gradient(worlds()["far"]))


def test_the_best_policy_under_a_divergence_on_states_of_the_reference():
    """For the forward KL the climb ends where the closed form says."""
    world = worlds()["far"]
    climbed = Objective("reward", "kl_ref_policy", "reference", 0.5).optimum(world).exp()
    torch.testing.assert_close(
        climbed, Objective("reward", "kl_ref_policy", "sequence", 0.5).optimum(world).exp(), rtol=1e-4, atol=1e-6
    )


def test_the_mean_is_that_of_the_method():
    """Two tokens of f 1 and 3 in one row, 2 in another: 2 per token, 3 per sequence."""
    ids = torch.zeros(2, 2, dtype=torch.long)
    mask = torch.tensor([[True, True], [True, False]])
    rows = Rows.build(ids[:, :1], mask[:, :1], ids, mask, stream=torch.full((2,), int(Stream.REGULARISER)))
    log_u = torch.tensor([[0.5, -0.5], [0.3, 0.0]], dtype=torch.float64)
    f = log_u.exp() - 1 - log_u
    rows = rows.with_(logp={"stored": torch.zeros(2, 2, dtype=torch.float64)})
    for mode, count in (("token_mean", 3), ("sequence_mean_token_sum", 2)):
        found = RehearsalDivergence(2.0, "kl_ref_policy", Aggregation(mode))(rows, Stats({LogProb(): log_u}))
        assert float(found) == pytest.approx(2 * float(f[mask].sum()) / count, rel=1e-12)


# -- RECAP -----------------------------------------------------------------------------------------------------------


def test_the_supervised_loss_is_one_more_objective():
    """The histories of the specification, the third a loss: 0.1 times its weight becomes the coefficient."""
    history = [[0.50, 0.48, 0.45, 0.40], [0.10] * 4, [0.70, 0.40, 0.80, 0.50]]
    part = ObjectiveWeights(4, 0.5, term="general", coef=0.1)
    rows, state = k8_rows(), part.init()
    for step in range(4):
        metrics = {"rehearsal/general": history[2][step]}
        part.observe(rows.with_(reward=torch.zeros(8, 2).double()), Stats(), metrics, {})
        assert metrics["objectives/2"] == history[2][step] and metrics["objectives/1"] == 1
        values, state = part.update({f"objectives/{k}": past[step] for k, past in enumerate(history)}, state, step)
    assert values["transforms.sum.weights"] == pytest.approx((0.861308, 0.746678), abs=ALIKE)
    assert values["terms.general.coef"] == pytest.approx(0.1392014, abs=ALIKE)
    method = recipe_named("recap")(general="general.jsonl", general_rows=5)
    assert method.replay["general"].rows == 5 and method.controllers["weights"].term == "general"
    for path, value in values.items():
        method = method.set(path, value)
    assert method.terms["general"].coef == pytest.approx(0.1392014, abs=ALIKE)
    without: dict = {}
    part.observe(rows, Stats(), without, {})
    assert math.isnan(without["objectives/1"])


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"rows": 0}, "rows"),
        ({"samples": 0}, "samples"),
        ({"num_prompts": 0}, "num_prompts"),
        ({"solved": 0.0}, "solved"),
        ({"solved": 1.1}, "solved"),
        ({"source": "web"}, "source"),
        ({"source": "data"}, "path"),
        ({"path": "a.jsonl"}, "path"),
        ({"source": "solutions", "leave": True}, "leave"),
    ],
)
def test_bad_settings(settings, what):
    with pytest.raises((ValueError, TypeError), match=what):
        Rehearsal(**settings)


@pytest.mark.parametrize(
    ("slots", "what"),
    [
        ({"replay": DATA}, "no term reads"),
        ({"replay": DATA, "terms": {"r": RehearsalDivergence()}}, "solutions does not record"),
        ({"replay": {**DATA, "two": Rehearsal()}, "terms": NLL}, "room for one"),
        (
            {"replay": DATA, "terms": {"r": Summand(NegativeLogLikelihood(), 1.0, "rare", "where", "regulariser")}},
            "rare",
        ),
    ],
)
def test_compositions_without_meaning(slots, what):
    with pytest.raises(MethodError, match=what):
        recipe_named("grpo")().adding(**slots)


def test_settings_of_the_recipe():
    with pytest.raises(ConfigError, match="alpha must be in"):
        recipe_named("dph_rl")(alpha=1.0)
    with pytest.raises(ConfigError, match="leave beta out"):
        recipe_named("dph_rl")(kind="reverse_kl", beta=0.1)
    assert [recipe_named("dph_rl")(kind=k).terms["rehearsal"].coef for k in ("forward_kl", "js", "alpha")] == [
        0.02,
        0.1,
        0.02,
    ]
    method = recipe_named("dph_rl")(kind="alpha")
    assert method.terms["rehearsal"].divergence == "alpha:0.8" and from_config(to_config(method)) == method
