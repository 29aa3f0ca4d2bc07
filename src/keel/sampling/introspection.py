"""Sampling by introspection: predictions of reward and remaining length decide which samples go on.

For samples with predictions p_i(r, l), independent given what is written (also where they share a beginning):

    U(S) = E[max_i R_i] - a ( b sum_i E[L_i] + (1 - b) E[max_i L_i] ),    P(max <= v) = prod_i P_i(. <= v)

Every so many tokens the meta-action with the largest U is taken, again and again until none is better than going on:
branch (a copy of a running sample goes its own way), prune (one, or all that look longer, or worse, than another),
stop. A finished sample costs nothing more and keeps its reward; something is always kept.

With exact predictions U is what the present set is worth if it runs to its end, so no decision loses in the mean:
sampling is worth at least what the best fixed number of samples is, in E[max R] - a b E[tokens].
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Chain, Prefix, TokenChain
from keel.core.chance import Choice
from keel.core.registry import part
from keel.exact.chain import TabularChain
from keel.models.introspection import JointBins
from keel.sampling.adaptive import Slots
from keel.sampling.kernels import by_token
from keel.sampling.particles import Particles, best
from keel.sampling.settings import positive, share

BETTER = 1e-12  # gains below this are rounding


@runtime_checkable
class Joint(Protocol):
    """Predicts final reward and remaining length together.

    Attributes:
        values: reward of each bin, increasing, shape [R].
        lengths: tokens of each bin, increasing, shape [L].
    """

    values: Float[Tensor, "R"]
    lengths: Float[Tensor, "L"]

    def __call__(self, chain: TokenChain, x: Prefix) -> Float[Tensor, "B R L"]:
        """p(r, l) for each state; NaN for finished states that it cannot read, whose last prediction then stays."""
        ...


@dataclass(frozen=True, eq=False)
class ReservedJoint:
    """The prediction in the reserved logits of a language model, which are never drawn.

    Args:
        bins: where they are and what they mean.
    """

    bins: JointBins

    @property
    def values(self) -> Float[Tensor, "R"]:
        """See `Joint`."""
        return self.bins.values

    @property
    def lengths(self) -> Float[Tensor, "L"]:
        """See `Joint`."""
        return self.bins.lengths

    def __call__(self, chain: TokenChain, x: Prefix) -> Float[Tensor, "B R L"]:
        """See `Joint`; a softmax does not mind that log-probabilities are not logits."""
        found = self.bins.joint(chain.log_probs(x))
        return found.masked_fill(x.done[:, None, None], math.nan)

    def masked(self, log_p: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """What tokens are drawn from."""
        return self.bins.masked(log_p)


@dataclass(frozen=True, eq=False)
class OracleJoint:
    """The exact prediction on a tabular chain, by enumeration.

    Args:
        values: all rewards, increasing.
        lengths: 0 .. T.
        table: at every prefix, shape [Q, X, R, L].
        leaf: reward bin of every sequence, shape [Q, S].
    """

    values: Float[Tensor, "R"]
    lengths: Float[Tensor, "L"]
    table: Float[Tensor, "Q X R L"]
    leaf: Int[Tensor, "Q S"]

    @staticmethod
    def of(chain: TabularChain) -> "OracleJoint":
        """Of the chain's own prior and reward."""
        space, policy = chain.space, chain.logits
        values, leaf = chain.rewards.unique(return_inverse=True)
        lengths = torch.arange(space.horizon + 1, dtype=torch.float64)
        shape = space.prompts, space.prefixes, len(values), len(lengths)
        table = torch.zeros(shape, dtype=torch.float64)
        tokens, length = space.sequences()
        before = space.prefix_index(tokens)
        sequence, t = (torch.arange(space.horizon) < length[:, None]).nonzero(as_tuple=True)
        for q in range(space.prompts):
            prior = policy.log_prob(space.rows(q)).detach().double().exp()
            place = before[sequence, t], leaf[q, sequence], length[sequence] - t
            table[q].index_put_(place, prior[sequence], accumulate=True)
        mass = table.sum((2, 3), keepdim=True)
        return OracleJoint(values, lengths, table / mass.clamp(min=1e-300), leaf)

    def __call__(self, chain: TokenChain, x: Prefix) -> Float[Tensor, "B R L"]:
        """See `Joint`."""
        assert isinstance(chain, TabularChain)
        row = chain.index[x.prompt]
        running = self.table[row, chain.prefix(x).clamp(max=self.table.shape[1] - 1)]
        certain = torch.zeros_like(running)
        certain[torch.arange(len(x)), self.leaf[row, chain.leaf(x)], 0] = 1.0
        return torch.where(x.done[:, None, None], certain, running)


# -- utility ----------------------------------------------------------------------------------------------------------


def max_law(law: Float[Tensor, "... n R"], count: Int[Tensor, "... n"]) -> Float[Tensor, "... R"]:
    """Law of the largest of independent numbers on R increasing places, sample i taken `count[i]` times.

    >>> max_law(torch.tensor([[0.4, 0.6], [0.4, 0.6]]), torch.tensor([1, 1]))
    tensor([0.1600, 0.8400])
    """
    below = law.cumsum(-1).clamp(max=1).pow(count[..., None]).prod(-2)
    return torch.cat([below[..., :1], below.diff(dim=-1)], -1)


@dataclass(frozen=True, eq=False)
class Outlook:
    """What is predicted of N samples.

    Args:
        reward: law of each one's reward, shape [..., N, R].
        length: law of each one's remaining length, shape [..., N, L].
        values, lengths: what the places of the laws mean, increasing.
        floor: the best reward that is certain already; -inf without one, shape [...].
    """

    reward: Float[Tensor, "... N R"]
    length: Float[Tensor, "... N L"]
    values: Float[Tensor, "R"]
    lengths: Float[Tensor, "L"]
    floor: Float[Tensor, "..."]

    @property
    def mean_reward(self) -> Float[Tensor, "... N"]:
        """E[R_i]."""
        return self.reward @ self.values

    @property
    def mean_length(self) -> Float[Tensor, "... N"]:
        """E[L_i]."""
        return self.length @ self.lengths

    def best_reward(self, count: Int[Tensor, "... N"]) -> Float[Tensor, "..."]:
        """E[max R] of the samples that count; the floor without any."""
        worth = torch.maximum(self.values, self.floor[..., None])
        mean = (max_law(self.reward, count) * worth).sum(-1)
        return torch.where((count > 0).any(-1), mean, self.floor)

    def longest(self, count: Int[Tensor, "... N"]) -> Float[Tensor, "..."]:
        """E[max L] of the samples that count; 0 without any."""
        mean = max_law(self.length, count) @ self.lengths
        return torch.where((count > 0).any(-1), mean, torch.zeros_like(mean))

    def utility(
        self, count: Int[Tensor, "... N"], finished: Bool[Tensor, "... N"], cost: float, compute: float
    ) -> Float[Tensor, "..."]:
        """U of the samples taken `count` times and of the finished ones, which cost nothing more.

        Args:
            count: of running samples.
            finished: samples whose reward law counts too.
            cost: a, reward that a token is worth.
            compute: b, share of the price on all tokens; the rest is on those of the longest sample.
        """
        reward = self.best_reward(count + finished.to(count))
        total = (count * self.mean_length).sum(-1)
        if cost == 0:
            return reward
        return reward - cost * (compute * total + (1 - compute) * self.longest(count))


# -- sampling ---------------------------------------------------------------------------------------------------------


@part("introspection", paper=186)
@dataclass(frozen=True)
class Introspective:
    """Samples that are branched, pruned and stopped by utility; see the module.

    Without a cost all N places are filled and nothing is pruned; with a cost beyond all rewards one sample is left. A
    branch starts from what a running sample has written, so from the prompt only before the first token.

    Args:
        joint: predicts; with a method `masked`, what it returns is drawn from.
        num_particles: N, places for samples, finished ones included.
        cost: a, reward that one token is worth.
        compute: b, share of the price on all tokens; the rest is on those of the longest sample (latency).
        every: tokens between decisions.
        output: by prediction alone ("predicted": the reward of the pick is asked for, that of the others is NaN), or
            with the reward of finished samples known ("best").

    Raises:
        ValueError: a setting out of its range.

    Source: "Zero-Overhead Introspection for Adaptive Test-Time Compute", 2025.
    """

    joint: Joint
    num_particles: int = 8
    cost: float = 1e-4
    compute: float = 1.0
    every: int = 64
    output: Literal["predicted", "best"] = "predicted"

    def __post_init__(self) -> None:
        positive(self, "num_particles", "every")
        share(self, "compute")
        if not self.cost >= 0:
            raise ValueError(f"cost must be 0 or positive, not {self.cost}")
        if self.output not in ("predicted", "best"):
            raise ValueError(f"output must be 'predicted' or 'best', not '{self.output}'")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Sample for all prompts of a chain."""
        run = _Run(self, by_token(chain, "introspection"))
        for t in range(run.chain.horizon + 1):
            run.read()
            if t % self.every == 0:
                run.decide()
            if not run.slots.busy:
                break
            run.slots.step(rng, "token", mask=getattr(self.joint, "masked", None))
        return run.result(rng)


class _Run:
    """One run of the sampler over all prompts."""

    def __init__(self, settings: Introspective, chain: TokenChain):
        self.settings, self.chain, self.joint = settings, chain, settings.joint
        shape = chain.prompts, settings.num_particles
        place = torch.arange(shape[1], device=chain.device).expand(shape)
        self.slots = Slots(chain, place == 0)
        self.values, self.lengths = (v.to(chain.device).double() for v in (self.joint.values, self.joint.lengths))
        self.reward_law = self.values.new_zeros(*shape, len(self.values))
        self.length_law = self.lengths.new_zeros(*shape, len(self.lengths))
        self.finished = torch.zeros(shape, dtype=torch.bool, device=chain.device)
        self.reward = torch.full(shape, math.nan, dtype=torch.float64, device=chain.device)
        self.counts = {name: self.reward.new_zeros(shape[0]) for name in ("pruned", "branched", "steps")}

    def read(self) -> None:
        """Take the predictions, and the rewards of what has just finished."""
        slots = self.slots
        joint = self.joint(self.chain, slots.x).to(self.reward_law)
        read = joint.isfinite().flatten(1).all(1)
        place = slots.slot[read]
        self.reward_law.view(-1, len(self.values))[place] = joint[read].sum(2)
        self.length_law.view(-1, len(self.lengths))[place] = joint[read].sum(1)
        new = slots.finished & ~self.finished
        if self.settings.output == "best" and bool(new.any()):
            found = self.chain.reward(slots.states(), new.flatten()).view(new.shape)
            self.reward = torch.where(new, found, self.reward)
        self.finished = self.finished | new
        self.counts["steps"] += slots.running.any(1)

    def decide(self) -> None:
        """Meta-actions until going on is best for every prompt."""
        running, changed = self.slots.running, False
        source = torch.arange(running.shape[1], device=running.device).expand(running.shape)
        for _ in range(2 * running.shape[1]):
            chosen, moved = self._best(running)
            if not bool(moved.any()):
                break
            changed = True
            source, running = self._apply(chosen, source, running)
        if changed:
            self.slots.rearrange(source, running)

    def _best(self, running: Bool[Tensor, "P N"]) -> tuple[Int[Tensor, "P N"], Bool[Tensor, "P"]]:
        """How often each running sample goes on after the best meta-action, and whether that is a change."""
        outlook = Outlook(self.reward_law, self.length_law, self.values, self.lengths, self._floor())
        options, allowed = meta_actions(outlook, running, self.finished)
        wide = Outlook(
            self.reward_law[:, None], self.length_law[:, None], self.values, self.lengths, outlook.floor[:, None]
        )
        judged = self.finished if self.settings.output == "predicted" else torch.zeros_like(self.finished)
        found = wide.utility(options, judged[:, None].expand(options.shape), self.settings.cost, self.settings.compute)
        found = found.masked_fill(~allowed, -math.inf)
        best = found.argmax(1)
        moved = found.gather(1, best[:, None])[:, 0] > found[:, 0] + BETTER
        best = torch.where(moved, best, torch.zeros_like(best))
        return options[torch.arange(len(best), device=best.device), best], moved

    def _floor(self) -> Float[Tensor, "P"]:
        if self.settings.output == "predicted":
            return torch.full_like(self.reward[:, 0], -math.inf)
        return self.reward.masked_fill(~self.finished, -math.inf).amax(1)

    def _apply(
        self, chosen: Int[Tensor, "P N"], source: Int[Tensor, "P N"], running: Bool[Tensor, "P N"]
    ) -> tuple[Int[Tensor, "P N"], Bool[Tensor, "P N"]]:
        """Where each place's sample comes from, and the places that go on."""
        self.counts["pruned"] += (running & (chosen == 0)).sum(1)
        branches = (chosen == 2).any(1)
        self.counts["branched"] += branches
        free = (~running & ~self.finished).int().argmax(1)
        target = branches[:, None] & (torch.arange(running.shape[1], device=running.device) == free[:, None])
        parent = torch.where(target, (chosen == 2).int().argmax(1)[:, None], torch.arange(running.shape[1]).to(source))
        prompt = torch.arange(len(running), device=running.device)[:, None]
        self.reward_law, self.length_law = self.reward_law[prompt, parent], self.length_law[prompt, parent]
        return source.gather(1, parent), (running & (chosen > 0)) | target

    def result(self, rng: Choice) -> Particles:
        states, finished = self.slots.states(), self.finished
        guess = (self.reward_law @ self.values).masked_fill(~finished, -math.inf)
        none = torch.full_like(guess[:, 0], math.nan)
        if self.settings.output == "predicted":
            pick = best(guess, rng)
            asked = torch.arange(guess.shape[1], device=pick.device) == pick[:, None]
            found = self.chain.reward(states, asked.flatten()).view(guess.shape)
            self.reward = torch.where(asked, found, self.reward)
        else:
            pick = best(self.reward, rng, finished)
        chosen = torch.arange(guess.shape[1], device=pick.device) == pick[:, None]
        return Particles(
            states=states,
            log_w=chosen.double().log(),
            reward=self.reward,
            pick=pick,
            log_z=none,
            log_z_error=none,
            kl=none,
            meter=self.chain.meter,
            details={
                "finished": finished.double().sum(1),
                "predicted": guess.gather(1, pick[:, None])[:, 0],
                **self.counts,
            },
        )


def meta_actions(
    outlook: Outlook, running: Bool[Tensor, "P N"], finished: Bool[Tensor, "P N"]
) -> tuple[Int[Tensor, "P C N"], Bool[Tensor, "P C"]]:
    """The sets that one meta-action leads to, as how often each running sample goes on; the first is to go on as is.

    Then: stop; for each sample prune it; prune all that look longer than it; prune all that look worse; branch it.

    Returns:
        Counts, and which of them are allowed: something must be kept, and a branch needs a free place.
    """
    own = torch.eye(running.shape[1], dtype=torch.bool, device=running.device).expand(*running.shape, -1)
    length, reward = outlook.mean_length, outlook.mean_reward
    longer = length[:, None, :] > length[:, :, None]
    worse = reward[:, None, :] < reward[:, :, None]
    here = running[:, None, :]
    pruned = [(here & ~gone).long() for gone in (own, longer, worse)]
    branched = here.long() + own.long()
    options = torch.cat([here.long(), torch.zeros_like(here.long()), *pruned, branched], 1)
    room = (~running & ~finished).any(1, keepdim=True)
    kept = (options > 0).any(2) | finished.any(1, keepdim=True)
    possible = torch.cat([torch.ones_like(room), room | ~room, running, running, running, running & room], 1)
    return options, possible & kept
