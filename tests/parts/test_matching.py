"""Losses that match a target: gradients known in closed form, from samples of any policy, and fixed points."""

import math
from dataclasses import dataclass

import pytest
import torch
from tests.parts.test_targets import OLD, POLICY, REF, REWARD, drawn, enumerated
from tests.worlds import from_probs, noise

from keel.core.choice import generator
from keel.core.rows import Rows, cat
from keel.exact.space import SequenceSpace
from keel.parts.terms.matching import MatchTarget, PosteriorMatching
from keel.parts.terms.moments import MomentTarget
from keel.parts.terms.targets import PosteriorTarget, TeacherTarget, TiltTarget
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

TILT = (REF.log() + REWARD / 0.5).softmax(0)

# D(p || tilt) and its gradient with respect to the five logits of p
GRADIENTS = {
    "kl_policy_ref": (0.254412, [0.058446, 0.045923, 0.102461, -0.278239, 0.071410]),
    "kl_ref_policy": (0.267473, [0.056780, 0.100404, 0.091258, -0.339931, 0.091488]),
    "js": (0.063469, [0.013447, 0.017720, 0.022326, -0.072964, 0.019471]),
    "tv": (0.339931, [0.025000, 0.075000, 0.037500, -0.187500, 0.050000]),
    "chi2_policy_ref": (0.539887, [0.154773, -0.022111, 0.304098, -0.558054, 0.121293]),
    "chi2_ref_policy": (0.625425, [0.143863, 0.354832, 0.220810, -0.985716, 0.266211]),
    "hellinger": (0.064337, [0.013912, 0.017999, 0.023241, -0.075059, 0.019908]),
    "jeffreys": (0.521884, [0.115226, 0.146327, 0.193719, -0.618169, 0.162898]),
    "alpha:0.2": (0.262526, [0.055856, 0.088569, 0.091054, -0.321694, 0.086215]),
}
SAMPLERS = {"policy": POLICY, "old": OLD, "reference": REF, "behaviour": OLD}


def policy_logits(p=POLICY) -> torch.Tensor:
    return p.log().clone().requires_grad_()


def statistics(rows: Rows, logits: torch.Tensor, **models: torch.Tensor) -> Stats:
    """Those of five outcomes, the policy's with a graph."""
    live = {LogProb(): logits.log_softmax(0)[rows.tokens]}
    known = {"old": OLD, "ref": REF, **models}
    return Stats(live | {LogProb(of=(name,)): p.log()[rows.tokens] for name, p in known.items()})


def evaluated(loss, rows: Rows, state=None, p=POLICY, **models) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient in the policy's logits."""
    logits = policy_logits(p)
    value = loss(rows, statistics(rows, logits, **models), loss.init() if state is None else state)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def assert_six(found, wanted, scale=1):
    """Equal to numbers that are rounded to six digits, times `scale`."""
    wanted = scale * torch.as_tensor(wanted, dtype=found.dtype)
    torch.testing.assert_close(found, wanted, rtol=0, atol=6e-7 * scale)


# -- the gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["none", "recent", "leave_one_out"])
@pytest.mark.parametrize("samples", SAMPLERS)
@pytest.mark.parametrize("divergence", GRADIENTS)
def test_value_and_gradient(divergence, samples, baseline):
    """Whatever drew the rows, and with any baseline."""
    rows = enumerated(SAMPLERS[samples]).with_(logp={"behaviour": OLD.log()[:, None]})
    loss = MatchTarget(TiltTarget(0.5), divergence, samples, baseline)
    state = loss.init() | {"recent": torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)}
    value, gradient = evaluated(loss, rows, state)
    assert_six(value, GRADIENTS[divergence][0])
    assert_six(gradient, GRADIENTS[divergence][1])


def test_a_wrong_z_only_scales_some_losses():
    """P twice as large: no change for KL(pi || p), twice the gradient for KL(p || pi), another one for JS."""
    found = {}
    for divergence in ("kl_policy_ref", "kl_ref_policy", "js"):
        loss = MatchTarget(TeacherTarget(), divergence, "policy", "none", log_z=-math.log(2))
        found[divergence] = evaluated(loss, enumerated(POLICY), teacher=TILT)[1]
    assert_six(found["kl_policy_ref"], GRADIENTS["kl_policy_ref"][1])
    assert_six(found["kl_ref_policy"], GRADIENTS["kl_ref_policy"][1], scale=2)
    assert_six(found["js"], [0.018145, 0.020953, 0.030556, -0.094755, 0.025101])
    right = evaluated(MatchTarget(TeacherTarget(), "js", "policy", "none"), enumerated(POLICY), teacher=TILT)[1]
    assert_six(found["js"].norm() / right.norm(), 1.299660)


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
@pytest.mark.parametrize("divergence", ["kl_policy_ref", "kl_ref_policy", "js"])
def test_groups_of_two_are_unbiased_where_z_is_known(divergence, baseline):
    """Every ordered pair of outcomes, at its probability: the baseline of one row is the other's pseudo-reward."""
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    rows = enumerated().select(pairs.flatten()).with_(exact=False, group=torch.arange(25).repeat_interleave(2))
    rows = rows.with_(weight=OLD[pairs].prod(1).repeat_interleave(2))
    loss = MatchTarget(TeacherTarget(), divergence, "old", baseline)
    value, gradient = evaluated(loss, rows, teacher=TILT)
    assert_six(value, GRADIENTS[divergence][0])
    assert_six(gradient, GRADIENTS[divergence][1])


def test_z_from_a_group():
    """Two rows, outcomes 0 and 3: P / q is 0.4 / 0.25 = 1.6 and 0.1 e^4 / 0.15 = 36.398767, their mean Z = 18.999383.

    For KL(p || pi) the row's weight is w R = P / (q Z) - pi / q: 1.6 / Z - 0.4 and 36.398767 / Z - 5 / 3.
    """
    loss = MatchTarget(TiltTarget(0.5), "kl_ref_policy", "old", "none")
    gain = [1.6 / 18.999383 - 0.4, 36.398767 / 18.999383 - 5 / 3]
    at = torch.eye(5, dtype=torch.float64) - POLICY
    wanted = -(gain[0] * at[0] + gain[1] * at[3]) / 2
    assert_six(evaluated(loss, drawn([1, 0, 0, 1, 0]))[1], wanted)


def test_sequences():
    """Two tokens of two symbols: KL, the reversed KL and JS of whole sequences, and how the first token leads on."""
    space = SequenceSpace(2, 2)
    policy = from_probs([0.7, 0.3], [0.9, 0.1], [0.4, 0.6], space=space)
    ref = from_probs([0.5, 0.5], [0.5, 0.5], [0.2, 0.8], space=space)
    rows = policy.weighted(space.rows())
    chosen = {name: t.hidden(rows).log_softmax(-1).gather(-1, rows.tokens[..., None])[..., 0]
              for name, t in (("policy", policy), ("teacher", ref))}  # fmt: skip
    stats = Stats({LogProb(of=(name,)): value for name, value in chosen.items()})
    for divergence, wanted in (("kl_policy_ref", 0.371323), ("kl_ref_policy", 0.388348), ("js", 0.091104)):
        loss = MatchTarget(TeacherTarget(), divergence, "policy", "leave_one_out")
        value = loss(rows, stats, loss.init())
        assert_six(value.detach(), wanted)
        if divergence == "kl_policy_ref":
            (gradient,) = torch.autograd.grad(value, policy.table, retain_graph=True)
            assert_six(gradient[0, 0], [0.233250, -0.233250])


# -- rows that do not count ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
@pytest.mark.parametrize("divergence", ["js", "kl_ref_policy"])
def test_rows_without_a_reward_are_left_out(divergence, baseline):
    loss = MatchTarget(TiltTarget(0.5), divergence, "old", baseline)
    rows = drawn([2, 1, 1, 2, 1])
    hidden = rows.with_(reward=rows.reward.masked_fill(rows.tokens == 1, torch.nan))
    wanted = evaluated(loss, rows.select((rows.tokens != 1).all(1)))
    found = evaluated(loss, hidden)
    assert_six(found[0], wanted[0])
    assert_six(found[1], wanted[1])
    nothing = evaluated(loss, rows.with_(reward=rows.reward * torch.nan))
    assert float(nothing[0]) == 0 and not bool(nothing[1].any())


def test_a_hard_constraint():
    """Outcomes 1 and 3 only. JS is finite, and its gradient that of the value; a group without them is left out."""
    target = MomentTarget(("a",), (1.0,))
    rows = enumerated(POLICY)
    rows = rows.with_(features={"moments": rows.features["moments"][:, :1]})
    loss = MatchTarget(target, "js", "policy", "none")
    value, gradient = evaluated(loss, rows)
    p, q = POLICY, torch.tensor([0, 5 / 7, 0, 2 / 7, 0], dtype=torch.float64)
    middle = (p + q) / 2
    wanted = (torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)).sum() / 2
    assert_six(value, wanted)
    half_log = (p / middle).log() / 2
    assert_six(gradient, p * (half_log - (p * half_log).sum()))
    outside = cat([rows, rows.select(torch.tensor([0, 2, 4])).with_(group=torch.full((3,), 9))])
    assert_six(evaluated(loss, outside)[1], gradient)


def test_a_cap_is_counted():
    """log pi / P of the tilt: ln(.1/.043220) = 0.84, 0.41, 0.94, -0.86, 0.61; log pi / q of OLD below 0.7."""
    loss = MatchTarget(TiltTarget(0.5), "kl_ref_policy", "old", "none", cap=0.8)
    rows, metrics = drawn([1, 1, 1, 1, 1]), {}
    rows = rows.with_(logp={"behaviour": OLD.log()[rows.tokens]})
    known = MatchTarget(TeacherTarget(), "kl_ref_policy", "old", "none", cap=0.8)
    stats = statistics(rows, policy_logits().detach(), old=POLICY, teacher=TILT)
    known.observe(rows, stats, metrics, known.init())
    assert metrics["target/capped"] == 3
    assert loss.observe(rows, stats, {}, loss.init())["prompts"].tolist() == [0]
    _, gradient = evaluated(known, enumerated(POLICY), teacher=TILT, old=POLICY)
    reward = torch.tensor([-0.8, -math.log(0.3 / 0.199596), -0.8, 0.8, -math.log(0.2 / 0.108512)]).double().exp() - 1
    torch.testing.assert_close(gradient, -POLICY * (reward - POLICY @ reward), rtol=1e-5, atol=1e-7)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_z_is_remembered_by_prompt():
    """First outcome 0 (P / q = 1.6), then 3 (36.398767): Z = 18.999383, as if both were in one group."""
    loss = MatchTarget(TiltTarget(0.5), "kl_ref_policy", "old", "none", memory=2)
    first, second = drawn([1, 0, 0, 0, 0]), drawn([0, 0, 0, 1, 0])
    logits = policy_logits().detach()
    state = loss.observe(first, statistics(first, logits), {}, loss.init())
    at = (torch.eye(5, dtype=torch.float64) - POLICY)[3]
    assert_six(evaluated(loss, second, state)[1], -(36.398767 / 18.999383 - 5 / 3) * at)
    elsewhere = second.with_(data_index=torch.tensor([5]))
    assert_six(evaluated(loss, elsewhere, state)[1], -(1 - 5 / 3) * at)
    state = loss.observe(second, statistics(second, logits), {}, state)
    assert state["prompts"].tolist() == [0] and state["count"].tolist() == [2]
    assert_six((state["log_sum"].exp() / state["count"])[0], 18.999383)
    for prompt in (7, 8):  # two more than are kept: the first leaves
        batch = first.with_(data_index=torch.tensor([prompt]))
        state = loss.observe(batch, statistics(batch, logits), {}, state)
    assert state["prompts"].tolist() == [7, 8]


def test_the_recent_baseline_is_read_before_the_batch_is_added():
    """KL(pi || p) with Z known: R = log p / pi, of OLD as it was when the batch was prepared."""
    loss = MatchTarget(TeacherTarget(), "kl_policy_ref", "old", "recent")
    rows = drawn([1, 0, 0, 1, 0])
    at = torch.eye(5, dtype=torch.float64) - POLICY
    rewards, weights = (TILT / POLICY).log(), POLICY / OLD
    wanted = -(weights[0] * rewards[0] * at[0] + weights[3] * rewards[3] * at[3]) / 2
    assert_six(evaluated(loss, rows, teacher=TILT)[1], wanted)
    state = loss.observe(rows, statistics(rows, policy_logits().detach(), teacher=TILT), {}, loss.init())
    seen = (TILT / OLD).log()[[0, 3]]
    assert_six(state["recent"], seen)
    rewards = rewards - seen.mean()
    wanted = -(weights[0] * rewards[0] * at[0] + weights[3] * rewards[3] * at[3]) / 2
    assert_six(evaluated(loss, rows, state, teacher=TILT)[1], wanted)
    many = drawn([600, 0, 0, 600, 0])
    state = loss.observe(many, statistics(many, policy_logits().detach(), teacher=TILT), {}, state)
    assert len(state["recent"]) == 1024 and float((state["recent"] == state["recent"][0]).sum()) == 424


def test_observed_weights():
    """Samples 0 and 3: shares 1.6 and 36.398767 of 37.998767; the largest 0.957894, 1 / sum of squares 1.087776."""
    loss, metrics = MatchTarget(TiltTarget(0.5), "js"), {}
    rows = drawn([1, 0, 0, 1, 0])
    loss.observe(rows, statistics(rows, policy_logits().detach()), metrics, loss.init())
    assert metrics["target/max_weight"] == pytest.approx(36.398767 / 37.998767, abs=1e-6)
    assert metrics["target/ess"] == pytest.approx(37.998767**2 / (1.6**2 + 36.398767**2), abs=1e-6)
    assert metrics["target/log_z"] == pytest.approx(math.log(18.999383), abs=1e-6)
    recorded = rows.with_(logp={"behaviour": OLD.log()[rows.tokens]})
    without_old = Stats({LogProb(of=("ref",)): REF.log()[rows.tokens]})
    state = loss.observe(recorded, without_old, {}, loss.init())
    assert state["count"].tolist() == [2]
    unknown = loss.observe(rows, without_old, {}, loss.init())
    assert not any(len(value) for value in unknown.values())


def test_multipliers_reach_the_loss():
    """The fit of one batch is the target of the next: D(p || P) of P = (.259333, .211, .129667, .289, .111)."""
    loss = MatchTarget(MomentTarget(("a", "b"), (0.5, 0.4), fit_batches=1), "kl_policy_ref", "old", "none")
    rows = drawn([8, 5, 4, 2, 1])
    before, _ = evaluated(loss, enumerated(OLD), loss.init())
    assert_six(before, (POLICY * (POLICY / REF).log()).sum())
    state = loss.observe(rows, statistics(rows, policy_logits().detach(), old=REF), {}, loss.init())
    assert_six(state["target.multipliers"], [0.263748, 1.230859])
    assert not len(state["prompts"])  # Z of a target that was still moving is not kept
    after, _ = evaluated(loss, enumerated(OLD), state)
    target = torch.tensor([0.259333, 0.211000, 0.129667, 0.289000, 0.111000]).double()
    torch.testing.assert_close(after, (POLICY * (POLICY / target).log()).sum(), rtol=0, atol=5e-6)


# -- fixed points ----------------------------------------------------------------------------------------------------

WORLDS = {"2 tokens of 2": SequenceSpace(2, 2), "2 tokens of 3": SequenceSpace(3, 2)}
DIVERGENCES = [*GRADIENTS, "alpha:0.5", "alpha:2", "kl_chi2"]


@dataclass
class Bed:
    """A target on a world, and the statistics of its rows under any table of the policy."""

    space: SequenceSpace

    def __post_init__(self) -> None:
        shape = (self.space.prefixes, self.space.vocab)
        self.ref, self.reward = (noise("bed", what, shape=shape) for what in ("ref", "reward"))
        self.rows = self.space.rows()
        self.prefix = self.space.prefix_index(self.rows.tokens)
        reward = noise("bed", "rewards", shape=(len(self.rows),))
        self.rows = self.rows.with_(reward=reward[:, None], exact=True)
        self.target = (self.tokens(self.ref).sum(1) + reward / 0.7).softmax(0)

    def tokens(self, table: torch.Tensor) -> torch.Tensor:
        return table.log_softmax(-1)[self.prefix, self.rows.tokens]

    def reached(self, table: torch.Tensor) -> torch.Tensor:
        """Probability of each token after each prefix, that of the prefix included."""
        p = self.tokens(table).sum(1).exp()[:, None].expand_as(self.prefix)
        return torch.zeros_like(table).index_put((self.prefix, self.rows.tokens), p, accumulate=True)


EVERYWHERE = [
    pytest.param("2 tokens of 3", "policy", id="policy"),
    pytest.param("2 tokens of 2", "old", id="old", marks=pytest.mark.slow),
    pytest.param("2 tokens of 2", "reference", id="reference", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "samples"), EVERYWHERE)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_ends_at_the_target(divergence, world, samples):
    """Natural gradient steps on tables, with rows enumerated under the policy, one that stays behind, or the reference.

    The step divides the gradient by the probability of prefix and token, which is Newton's step at the end; that of
    total variation, which has no curvature, gets shorter.
    """
    bed = Bed(WORLDS[world])
    loss = MatchTarget(TiltTarget(0.7), divergence, samples, "leave_one_out")
    table = noise("bed", "start", shape=bed.ref.shape)
    behind = table.clone()
    curvature = loss.generator.curvature
    steps = 25 if curvature else 150
    for step in range(steps):
        live = table.clone().requires_grad_()
        q = {"policy": table, "old": behind, "reference": bed.ref}[samples]
        stats = Stats({LogProb(): bed.tokens(live), LogProb(of=("ref",)): bed.tokens(bed.ref),
                       LogProb(of=("old",)): bed.tokens(behind)})  # fmt: skip
        value = loss(bed.rows.with_(weight=bed.tokens(q).sum(1).exp()), stats, loss.init())
        (gradient,) = torch.autograd.grad(value, live)
        natural = gradient / bed.reached(table)
        size = 0.8 / curvature if curvature else 2 * 0.95**step
        table = table - (size * natural).clamp(-1, 1)
    distance = (bed.tokens(table).sum(1).exp() - bed.target).abs().sum() / 2
    assert distance < 1e-3
    assert float(value.detach()) < 2e-3


# -- both normalised over the group ----------------------------------------------------------------------------------


def test_brain():
    """Samples 0, 1, 3, 1 of OLD: a = (.028333, .163557, .644552, .163557), b = (.078947, .296053, .328947, .296053)."""
    rows = enumerated().select(torch.tensor([0, 1, 3, 1])).with_(exact=False, weight=torch.ones(4))
    value, gradient = evaluated(PosteriorMatching(PosteriorTarget(0.5)), rows)
    assert_six(value, 0.210428)
    assert_six(gradient, [0.050614, 0.264990, 0.0, -0.315605, 0.0])
    shifted = evaluated(PosteriorMatching(PosteriorTarget(0.5, centre=3.0)), rows)
    assert_six(shifted[0], 0.210428)
    assert_six(shifted[1], gradient)
    assert_six(evaluated(PosteriorMatching(TeacherTarget()), rows, teacher=TILT)[0], 0.210428)
    recorded = rows.with_(logp={"behaviour": OLD.log()[rows.tokens]})
    assert_six(evaluated(PosteriorMatching(PosteriorTarget(0.5), "behaviour"), recorded)[0], 0.210428)


def test_brain_is_zero_only_at_the_target():
    rows = enumerated(OLD)
    loss = PosteriorMatching(PosteriorTarget(0.5))
    at_target = evaluated(loss, rows, p=TILT)
    assert_six(at_target[0], 0.0)
    assert float(at_target[1].abs().max()) < 1e-9
    value, gradient = evaluated(loss, rows)  # enumerated: the exact forward KL and its gradient
    assert_six(value, GRADIENTS["kl_ref_policy"][0])
    assert_six(gradient, GRADIENTS["kl_ref_policy"][1])
    triples = torch.cartesian_prod(*[torch.arange(5)] * 3)  # every group of three, on the target
    groups = enumerated().select(triples.flatten()).with_(exact=False, group=torch.arange(125).repeat_interleave(3))
    groups = groups.with_(weight=OLD[triples].prod(1).repeat_interleave(3))
    assert_six(evaluated(loss, groups, p=TILT)[0], 0.0)
    assert float(evaluated(loss, groups)[0]) > 0.05


def test_brain_of_two_is_a_preference_loss():
    """All of a on outcome 3, the reference as proposal: -log sigmoid(log(.25 / .1) - log(.1 / .4)) = log 1.1."""
    rows = enumerated().select(torch.tensor([3, 0])).with_(exact=False, weight=torch.ones(2))
    value, _ = evaluated(PosteriorMatching(PosteriorTarget(1e-3), "reference"), rows)
    assert_six(value, 0.095310)


def test_brain_counts_prompts_alike():
    """A row without a reward leaves its group as it is without that row; groups weigh the same whatever is left."""
    loss = PosteriorMatching(PosteriorTarget(0.5))
    one, other = drawn([1, 1, 0, 1, 1]), drawn([1, 2, 0, 1, 0], group=1)
    alone = [evaluated(loss, rows)[0] for rows in (one.select(torch.arange(3)), other)]
    hidden = one.with_(reward=one.reward.masked_fill(one.tokens == 4, torch.nan))
    both = cat([hidden, other])
    assert_six(evaluated(loss, both)[0], (alone[0] + alone[1]) / 2)
    weight = torch.tensor([3.0, 1.0], dtype=torch.float64)[both.group]
    assert_six(evaluated(loss, both.with_(weight=weight))[0], (3 * alone[0] + alone[1]) / 4)
    assert float(evaluated(loss, one.with_(reward=one.reward * torch.nan))[0]) == 0


def on_a_line(loss, x: torch.Tensor, group: torch.Tensor, proposal: float) -> torch.Tensor:
    """Minus the gradient in the policy's mean, 1, for each group; the target is N(0, 1), all deviations are 1."""
    ids = torch.zeros(len(x), 1, dtype=torch.long)
    rows = Rows.build(ids, ids == 0, ids, ids == 0, group=group)
    groups = int(group[-1]) + 1
    at = torch.ones(groups, dtype=torch.float64, requires_grad=True)
    means = {"policy": at[group], "teacher": torch.zeros(()), "old": torch.tensor(proposal)}
    stats = Stats({LogProb(of=(name,)): -(x - mean).square()[:, None] / 2 for name, mean in means.items()})
    return -torch.autograd.grad(loss(rows, stats, loss.init()) * groups, at)[0]


@pytest.mark.parametrize(("proposal", "variance"), [(0.0, 0.554570), (0.5, 0.353889), (1.0, 1.198926)])
def test_variance_of_the_plain_loss_on_a_line(proposal, variance):
    """(P - pi) / q (x - 1) of one sample: mean -1; the variance of a mean of 8, from Gaussian integrals.

    With q = pi, for instance: (integral of P^2 / pi (x - 1)^2 = 5 e) - 2 * 2 + 1 - (-1)^2, over 8.
    """
    x = torch.linspace(-12, 14, 20001, dtype=torch.float64)
    density = torch.exp(-(x - proposal).square() / 2) * (x[1] - x[0]) / math.sqrt(2 * math.pi)
    loss = MatchTarget(TeacherTarget(), "kl_ref_policy", "old", "none")
    estimate = on_a_line(loss, x, torch.arange(len(x)), proposal)
    mean = (density * estimate).sum()
    assert_six(mean, -1.0)
    assert_six((density * (estimate - mean).square()).sum() / 8, variance)


@pytest.mark.parametrize(
    ("proposal", "variance", "mean"), [(0.0, 0.174, -0.768), (0.5, 0.193, -0.847), (1.0, 0.173, -0.767)]
)
def test_variance_of_brain_on_a_line(proposal, variance, mean):
    """Groups of 8: biased towards 0, and with a variance that does not depend on the proposal."""
    groups = 30_000
    x = torch.randn(8 * groups, generator=generator("line", int(10 * proposal)), dtype=torch.float64) + proposal
    estimate = on_a_line(PosteriorMatching(TeacherTarget()), x, torch.arange(groups).repeat_interleave(8), proposal)
    assert float(estimate.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / groups) + 5e-4)
    assert float(estimate.var()) == pytest.approx(variance, rel=0.04)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: MatchTarget(divergence="kll"), "there is no divergence 'kll'"),
        (lambda: MatchTarget(memory=-1), "memory must not be negative"),
        (lambda: MatchTarget(cap=0.0), "cap must be positive"),
    ],
)
def test_wrong_settings(make, what):
    with pytest.raises(ValueError, match=what):
        make()


def test_names_are_canonical():
    assert MatchTarget(divergence="forward_kl") == MatchTarget(divergence="kl_ref_policy")
    assert MatchTarget(divergence="alpha:0.50").divergence == "alpha:0.5"
