"""What methods claim to optimise, as functions of a tabular policy whose gradient and optimum are exact.

    reward, sequence    E_pi[r] - beta D(pi(.|x), ref(.|x))
    reward, state       E_pi[r] - beta E_old[ sum_t D(pi(.|s_t), ref(.|s_t)) ], old = pi where the method is on-policy
    reward, reference   E_pi[r] - beta E_ref[ sum_t D(pi(.|s_t), ref(.|s_t)) ]
    target              -D(pi(.|x), P(.|x)),   P the target
    data                E_data[log pi] = -KL(data || pi) + constant

each a mean over prompts. "Held" means that the gradient does not see how the policy changes which states are visited;
such an objective has a gradient field, but is in general not the maximum of anything.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keel.divergences.family import FDivergence, f_divergence
from keel.exact.optima import optimum
from keel.exact.space import TabularPolicy
from keel.exact.states import sequence_log_probs, state_optimum
from keel.parts.rewards.pairing import bradley_terry
from keel.targets import target as targets
from keel.targets.curated import curated
from keel.targets.moments import fit_multipliers
from keel.targets.target import Target
from keel.verify.world import World

Form = Literal["reward", "target", "data"]
Level = Literal["sequence", "state", "reference", "data"]
ROOT = "sqrt "  # before the name of a divergence


@dataclass(frozen=True)
class Objective:
    """An objective to be increased.

    Args:
        form: what stands against the divergence: a reward, nothing but a target, or data.
        divergence: name of the divergence, or None; "sqrt NAME" is the root of its mean over prompts.
        level: over whole sequences, or per state with the visited states held fixed, those of the sampler or of the
            reference.
        beta: its coefficient; with a target, that of the tilt.
        target: name of the target distribution, one of `TARGETS`; with a reward, what the divergence is taken against
            in place of the reference.
        settings: arguments of the recipe, which a target may read.
    """

    form: Form = "reward"
    divergence: str | None = None
    level: Level = "sequence"
    beta: float = 0.0
    target: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        """In one line."""
        if self.form == "data":
            return "-KL(data || pi)"
        if self.form == "target":
            return f"-{self.divergence}(pi, target)"
        if not self.divergence:
            return "E[r]"
        where = {"sequence": "sequences", "state": "states held", "reference": "states of ref"}[self.level]
        return f"E[r] - {self.beta:g} {self.divergence}, {where}"

    def value(self, policy: TabularPolicy, world: World) -> Float[Tensor, ""]:
        """The objective, differentiable in the policy's table."""
        if self.form == "data":
            return (world.log_probs("data").exp() * sequence_log_probs(policy)).sum(1).mean()
        if self.form == "target":
            assert self.divergence is not None
            return -self.distance(policy, world)
        gain = (sequence_log_probs(policy).exp() * world.reward).sum(1).mean()
        return gain - self.beta * self.distance(policy, world) if self.divergence else gain

    def distance(self, policy: TabularPolicy, world: World) -> Float[Tensor, ""]:
        """The divergence to the reference, or to the target, at this level."""
        assert self.divergence is not None
        kind = f_divergence(self.divergence.removeprefix(ROOT))
        if self.level == "sequence":
            mean = kind.value(sequence_log_probs(policy), self.reference(world)).mean()
            # the root has a corner at 0, where 0 is one of its slopes
            return mean.clamp(min=1e-16).sqrt() if self.divergence.startswith(ROOT) else mean
        visited = {"reference": "ref" if self.form == "reward" else str(self.target), "data": "data"}
        return held_divergence(kind, policy, world, self._table(world), visited.get(self.level, "old"))

    def _table(self, world: World) -> TabularPolicy:
        """That to which the states' divergence is taken."""
        if self.target != "teacher_power":
            return world.table(self.target or "ref")
        lam = float(self.settings["lam"])
        logits = (1 - lam) * world.table("ref").table + lam * world.table("teacher").table
        return TabularPolicy(world.space, logits.detach())

    def reference(self, world: World) -> Float[Tensor, "Q S"]:
        """log-probabilities of what a reward is weighed against: the reference, or a target that it names."""
        return world.log_probs("ref") if self.target is None else self.target_log_probs(world)

    def target_log_probs(self, world: World) -> Float[Tensor, "Q S"]:
        """log P, by the target's definition.

        Raises:
            KeyError: there is no target of that name.
        """
        return TARGETS[str(self.target)](world, self).log_prob()

    def optimum(self, world: World) -> Float[Tensor, "Q S"]:
        """log-probabilities of the best policy; with states held, of the policy at which every state is at its best."""
        if self.form == "data":
            return world.log_probs("data")
        if self.form == "target":
            held = self.level != "sequence"
            return sequence_log_probs(self._table(world)).detach() if held else self.target_log_probs(world)
        if not self.divergence:
            best = world.reward >= world.reward.amax(1, keepdim=True)
            return world.log_probs("ref").masked_fill(~best, -math.inf).log_softmax(-1)
        if self.divergence.startswith(ROOT):
            return _root_optimum(self, world)
        if self.level == "reference":
            return _ascended(self, world)
        if self.level == "sequence":
            return optimum(world.reward, self.reference(world), self.beta, f_divergence(self.divergence)).log_prob
        found = state_optimum(
            world.table(self.target or "ref"), world.reward, self.beta, f_divergence(self.divergence), held_fixed=True
        )
        return sequence_log_probs(found.policy(world.space)).detach()

    def gradient(self, world: World) -> Float[Tensor, "Q X V"]:
        """The direction of steepest increase at the world's policy, in its logits."""
        policy = world.table("policy")
        (found,) = torch.autograd.grad(self.value(policy, world), policy.table)
        return found


def held_divergence(
    kind: FDivergence, policy: TabularPolicy, world: World, against: str | TabularPolicy = "ref", visited: str = "old"
) -> Float[Tensor, ""]:
    """sum over visited states of D(pi(.|s), ref(.|s)), the visits held; `against` and `visited` name the models."""
    ref, sampler = world.table(against) if isinstance(against, str) else against, world.table(visited)
    total = torch.zeros((), dtype=torch.float64)
    for prompt in range(world.space.prompts):
        rows = world.space.rows(prompt)
        visits = sampler.log_prob(rows).exp().detach()[:, None] * rows.mask
        here = kind.value(policy.hidden(rows).log_softmax(-1), ref.hidden(rows).log_softmax(-1).detach())
        total = total + (visits * here).sum()
    return total / world.space.prompts


def _ascended(claim: Objective, world: World) -> Float[Tensor, "Q S"]:
    """That of an objective with no closed form, climbed from the reference."""
    policy = world.table("ref")
    climber = torch.optim.LBFGS(
        [policy.table], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        climber.zero_grad()
        value = -claim.value(policy, world)
        value.backward()
        return value

    climber.step(loss)
    return sequence_log_probs(policy).detach()


def _root_optimum(claim: Objective, world: World) -> Float[Tensor, "Q S"]:
    """That of E[r] - beta sqrt(D): the one of E[r] - eta D at which eta = beta / (2 sqrt(D)), by bisection in log eta.

    2 eta sqrt(D) falls with eta; where it is below beta even for a large eta, the optimum is the reference.
    """
    assert claim.divergence is not None
    kind, ref = f_divergence(claim.divergence.removeprefix(ROOT)), claim.reference(world)

    def at(log_eta: float) -> tuple[Float[Tensor, "Q S"], float]:
        best = optimum(world.reward, ref, math.exp(log_eta), kind)
        return best.log_prob, 2 * math.exp(log_eta) * float(best.divergence.mean().sqrt())

    low, high = math.log(1e-6), math.log(1e6)
    if at(high)[1] <= claim.beta:
        return ref
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] < claim.beta else (low, middle)
    return at(high)[0]


def candidates(beta: float) -> tuple[Objective, ...]:
    """The objectives that a loss may follow without saying so."""
    kinds = ("kl_policy_ref", "kl_ref_policy", "js", "jeffreys", "chi2_policy_ref", "chi2_ref_policy", "hellinger")
    regularised = [Objective("reward", kind, level, beta) for kind in kinds for level in ("sequence", "state")]
    return (Objective("reward"), *regularised)


# -- targets, by the definitions of their papers ---------------------------------------------------------------------


def _tilt(world: World, claim: Objective) -> Target:
    return targets.tilt(world.log_probs("ref"), world.reward, claim.beta)


def _tilt_of_sampler(world: World, claim: Objective) -> Target:
    return targets.tilt(world.log_probs("old"), world.reward, claim.beta)


def _reweighted(world: World, claim: Objective) -> Target:
    """The reference with the odds of e^(phi r): a tilt whose strength is not the coefficient of the divergence."""
    return targets.posterior(world.log_probs("ref"), float(claim.settings["phi"]) * world.reward)


def _posterior(world: World, claim: Objective) -> Target:
    likelihood = targets.sigmoid_likelihood(world.reward, claim.beta, float(claim.settings["centre"]))
    return targets.posterior(world.log_probs("ref"), likelihood)


def _moments(world: World, claim: Objective) -> Target:
    """Every named reward of a world is its one reward."""
    wanted = claim.settings["moments"] or {"reward": 0.5}
    features = world.reward[..., None]
    fit = fit_multipliers(features, torch.tensor(list(wanted.values()), dtype=features.dtype), world.log_probs("ref"))
    return targets.moments(world.log_probs("ref"), features, fit.multipliers)


def _best_of_reference(world: World, claim: Objective) -> Target:
    return targets.best_of_n(world.log_probs("ref"), world.reward, claim.settings["n"])


def _best_of_sampler(world: World, claim: Objective) -> Target:
    return targets.best_of_n(world.log_probs("old"), world.reward, claim.settings["n"])


def _mode_anchor(world: World, claim: Objective) -> Target:
    """Each good sequence has the odds of the likeliest good one, the others those of the tilt."""
    ref, beta = world.log_probs("ref"), claim.beta
    good = world.reward >= float(claim.settings["threshold"])
    anchor = ref.masked_fill(~good, -math.inf).argmax(1, keepdim=True)
    score = ref + world.reward / beta
    return Target(torch.where(good, score.gather(1, anchor), score))


def _win_rate_tilt(world: World, claim: Objective) -> Target:
    """The tilt by E_ref[sigmoid(k (r - r_ref))], k = 1 where the recipe has none."""
    gap = float(claim.settings.get("k", 1.0)) * (world.reward[:, :, None] - world.reward[:, None])
    won = (gap.sigmoid() * world.log_probs("ref").exp()[:, None]).sum(2)
    return targets.tilt(world.log_probs("ref"), won, claim.beta)


def _curated(world: World, claim: Objective) -> Target:
    """A round of curation by the sampler's own samples, with a share of the reference's."""
    share = float(claim.settings["real_fraction"])
    chosen = curated(world.log_probs("old"), world.reward, claim.settings["num_candidates"])
    return (
        chosen if not share else targets.mixture([targets.teacher(world.log_probs("ref")), chosen], [share, 1 - share])
    )


def _successes(world: World, claim: Objective) -> Target:
    """The sampler, given that it succeeds."""
    good = world.reward >= float(claim.settings["threshold"])
    return Target(world.log_probs("old").masked_fill(~good, -math.inf))


def _wins(world: World, claim: Objective, opponent: Float[Tensor, "Q S"]) -> Float[Tensor, "Q S"]:
    """P(y beats a completion of the opponent), by the labels of the recipe; with "best" the better one always wins."""
    gap = world.reward[:, :, None] - world.reward[:, None]
    heat = 0.0 if claim.settings.get("labels") == "best" else float(claim.settings["label_temperature"])
    return (bradley_terry(gap, heat) * opponent.exp()[:, None]).sum(2)


def _mirror(share: float | None = None) -> Callable[[World, Objective], Target]:
    """ref^share old^(1 - share) exp(P(y beats old) / beta); the share is the recipe's `ratio` where none is given."""

    def target(world: World, claim: Objective) -> Target:
        own = float(claim.settings["ratio"]) if share is None else share
        kept = share is None and claim.settings["every"] > 1  # the policy of the last iteration, which draws, too
        ref, old = world.log_probs("ref"), world.log_probs("past" if kept else "old")
        return Target(own * ref + (1 - own) * old + _wins(world, claim, old) / claim.beta)

    return target


def _self_step(world: World, claim: Objective) -> Target:
    """The policy of the last iteration, tilted to what the sampler scores above its own samples."""
    old, ref = world.log_probs("old"), world.log_probs("ref")
    own = replace(world, reward=old - ref)
    return Target(world.log_probs("past") + _wins(own, replace(claim, settings={"labels": "best"}), old) / claim.beta)


def _nash_md(world: World, claim: Objective) -> Target:
    """The answer to the mixture of the sampler and the reference: that of each token where it is drawn."""
    share, ref = float(claim.settings["mixture"]), world.log_probs("ref")
    mixture = ((1 - share) * world.log_probs("old") + share * ref).log_softmax(1)
    if claim.settings["opponents"]:
        own, other = (world.table(name).table.log_softmax(-1) for name in ("old", "ref"))
        mixture = sequence_log_probs(TabularPolicy(world.space, (1 - share) * own + share * other)).detach()
    return Target(ref + _wins(world, claim, mixture) / claim.beta)


def _nash_mp(world: World, claim: Objective) -> Target:
    """A proximal step from the target network, against it or against the policy half a step ahead."""
    eta, ref, base = float(claim.settings["eta"]), world.log_probs("ref"), world.log_probs("target")
    opponent = world.log_probs("half" if claim.settings["half_step"] else "target")
    return Target((eta * (ref + _wins(world, claim, opponent) / claim.beta) + base) / (1 + eta))


def _teacher_power(world: World, claim: Objective) -> Target:
    """base^(1 - lam) teacher^lam of whole sequences."""
    lam = float(claim.settings["lam"])
    return targets.log_linear([world.log_probs("ref"), world.log_probs("teacher")], [1 - lam, lam])


TARGETS: Mapping[str, Callable[[World, Objective], Target]] = {
    "tilt": _tilt,
    "tilt_of_sampler": _tilt_of_sampler,
    "posterior": _posterior,
    "reweighted": _reweighted,
    "reference": lambda world, claim: Target(world.log_probs("ref")),
    "moments": _moments,
    "best_of_n": _best_of_reference,
    "best_of_sampler": _best_of_sampler,
    "teacher": lambda world, claim: targets.teacher(world.log_probs("teacher")),
    "teacher_power": _teacher_power,
    "mode_anchor": _mode_anchor,
    "curated": _curated,
    "successes": _successes,
    "win_rate_tilt": _win_rate_tilt,
    "preference_step": _mirror(1.0),
    "win_rate_step": _mirror(0.0),
    "mirror_step": _mirror(),
    "self_step": _self_step,
    "nash_md": _nash_md,
    "nash_mp": _nash_mp,
}
