"""Markov decision processes small enough to solve: occupancies, soft Bellman equations, policy gradients.

    J(pi) = E[ sum_t gamma^t ( r(s_t, a_t) - beta D_f(pi(.|s_t) || ref(.|s_t)) ) ]

Policies are tables of probabilities [S, A]. Rows of the transition that sum to less than 1 end the episode with what is
missing, so a finite horizon is an MDP without a special case (`unrolled`), and gamma may be 1 where every policy ends.

Letters: S states, A actions.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from keel.divergences.family import FDivergence, f_divergence
from keel.exact.space import SequenceSpace
from keel.exact.states import endings, levels
from keel.targets.tilt import f_tilt

ROUNDS = 1000  # policy iteration needs a handful
STALLED = 5  # rounds without a smaller error after which it is as small as it gets


@dataclass(frozen=True, eq=False)
class Solution:
    """A policy that is optimal, and what it is worth.

    Args:
        policy: probabilities.
        values: V(s), penalties included.
        action_values: Q(s, a) = r + gamma P V.
        objective: initial . V.
    """

    policy: Float[Tensor, "S A"]
    values: Float[Tensor, "S"]
    action_values: Float[Tensor, "S A"]
    objective: float


@dataclass(frozen=True, eq=False)
class TabularMDP:
    """States, actions, rewards and a start.

    Args:
        transition: P(s' | s, a); what a row lacks to 1 is the probability that the episode ends.
        reward: r(s, a).
        initial: distribution of the first state.
        gamma: discount, in (0, 1].

    Raises:
        ValueError: no distributions, a discount out of range, or gamma 1 where some policy never ends.
    """

    transition: Float[Tensor, "S A S"]
    reward: Float[Tensor, "S A"]
    initial: Float[Tensor, "S"]
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], not {self.gamma}")
        if bool((self.transition < 0).any()) or bool((self.transition.sum(-1) > 1 + 1e-9).any()):
            raise ValueError("each row of the transition must be non-negative and sum to at most 1")
        if bool((self.initial < 0).any()) or abs(float(self.initial.sum()) - 1) > 1e-9:
            raise ValueError("the initial distribution must be non-negative and sum to 1")
        if self.gamma == 1 and not self._always_ends():
            raise ValueError("gamma is 1, but some policy never ends: its values are infinite")

    @property
    def states(self) -> int:
        """Number of states."""
        return self.reward.shape[0]

    @property
    def actions(self) -> int:
        """Number of actions."""
        return self.reward.shape[1]

    def with_reward(self, reward: Float[Tensor, "S A"]) -> "TabularMDP":
        """The same world with another reward."""
        return replace(self, reward=reward)

    def unrolled(self, horizon: int) -> "TabularMDP":
        """The MDP that ends after `horizon` steps: state t S + s is s at step t.

        Its policies may depend on the step, as those of a finite horizon do.

        Raises:
            ValueError: a horizon below 1.
        """
        if horizon < 1:
            raise ValueError(f"the horizon must be at least 1, not {horizon}")
        n, steps = self.states, horizon
        transition = self.transition.new_zeros(steps, n, self.actions, steps, n)
        for t in range(steps - 1):
            transition[t, :, :, t + 1] = self.transition
        initial = torch.cat([self.initial, self.initial.new_zeros((steps - 1) * n)])
        flat = transition.reshape(steps * n, self.actions, steps * n)
        return TabularMDP(flat, self.reward.repeat(steps, 1), initial, self.gamma)

    # -- a given policy ------------------------------------------------------------------------------------------

    def values(self, policy: Float[Tensor, "S A"], penalty: Float[Tensor, "S"] | None = None) -> Float[Tensor, "S"]:
        """V = (I - gamma P_pi)^-1 (r_pi - penalty)."""
        gain = (policy * self.reward).sum(1)
        gain = gain if penalty is None else gain - penalty
        return torch.linalg.solve(self._resolvent(policy), gain)

    def action_values(self, values: Float[Tensor, "S"]) -> Float[Tensor, "S A"]:
        """Q = r + gamma P V."""
        return self.reward + self.gamma * self.transition @ values

    def visits(self, policy: Float[Tensor, "S A"]) -> Float[Tensor, "S"]:
        """Expected discounted number of visits, sum_t gamma^t P(s_t = s): d solves d = initial + gamma P_pi^T d."""
        return torch.linalg.solve(self._resolvent(policy).T, self.initial)

    def state_occupancy(self, policy: Float[Tensor, "S A"]) -> Float[Tensor, "S"]:
        """The visits, normalised to sum to 1; for an MDP that never ends that is a factor of 1 - gamma."""
        visits = self.visits(policy)
        return visits / visits.sum()

    def occupancy(self, policy: Float[Tensor, "S A"]) -> Float[Tensor, "S A"]:
        """d(s, a) = d(s) pi(a | s), which sums to 1."""
        return self.state_occupancy(policy)[:, None] * policy

    def objective(
        self,
        policy: Float[Tensor, "S A"],
        ref: Float[Tensor, "S A"] | None = None,
        beta: float = 0.0,
        divergence: FDivergence | str = "kl_policy_ref",
    ) -> Float[Tensor, ""]:
        """J(pi), with gradients; without a reference the return alone."""
        penalty = None if ref is None else beta * f_divergence(divergence).value(policy.log(), ref.log())
        return self.initial @ self.values(policy, penalty)

    def policy_gradient(
        self,
        logits: Float[Tensor, "S A"],
        ref: Float[Tensor, "S A"] | None = None,
        beta: float = 0.0,
        divergence: FDivergence | str = "kl_policy_ref",
    ) -> Float[Tensor, "S A"]:
        """dJ / dlogits by the policy gradient theorem.

        With d the discounted visits, and Q, V with the penalties of later states included:

            d(s) [ pi(a|s) (Q(s, a) - sum_b pi(b|s) Q(s, b)) - beta (dD_f / dlogits)(s, a) ]
        """
        policy = logits.softmax(-1)
        f, penalty, slope = f_divergence(divergence), None, torch.zeros_like(logits)
        if ref is not None:
            penalty = beta * f.value(policy.log(), ref.log())
            slope = beta * f.gradient(policy.log(), ref.log())
        q = self.action_values(self.values(policy, penalty))
        advantage = q - (policy * q).sum(1, keepdim=True)
        return self.visits(policy)[:, None] * (policy * advantage - slope)

    # -- optima --------------------------------------------------------------------------------------------------

    def optimum(self) -> Solution:
        """The policy of the highest return, by policy iteration; deterministic."""
        policy = torch.full_like(self.reward, 1 / self.actions)
        for _ in range(ROUNDS):
            values = self.values(policy)
            q = self.action_values(values)
            if float((q.amax(1) - values).max()) <= _tolerance(values):
                break
            policy = torch.nn.functional.one_hot(q.argmax(1), self.actions).to(q)
        return Solution(policy, values, q, float(self.initial @ values))

    def backup(
        self,
        values: Float[Tensor, "S"],
        ref: Float[Tensor, "S A"],
        beta: float,
        divergence: FDivergence | str = "kl_policy_ref",
    ) -> tuple[Float[Tensor, "S"], Float[Tensor, "S A"]]:
        """One regularised Bellman backup, T V, and the policy that attains it.

            (T V)(s) = max over pi(.|s) of  sum_a pi(a|s) Q(s, a) - beta D_f(pi(.|s) || ref(.|s))

        For kl_policy_ref it is beta log sum_a ref(a|s) exp(Q(s, a) / beta). T is monotone and contracts by gamma.
        """
        best = f_tilt(ref.log(), self.action_values(values), beta, divergence)
        return best.value, best.log_prob.exp()

    def regularised_optimum(
        self, ref: Float[Tensor, "S A"], beta: float, divergence: FDivergence | str = "kl_policy_ref"
    ) -> Solution:
        """The fixed point of `backup`, the best policy under a divergence per visited state.

        By policy iteration: the policy that attains T V is evaluated with its penalty, which is Newton's method on
        V = T V and rises monotonically.

        Args:
            ref: the reference policy.
            beta: coefficient of the divergence, per step.
            divergence: an f-divergence or its name.
        """
        f, values = f_divergence(divergence), self.values(ref)
        least, stalled = float("inf"), 0
        while stalled < STALLED:
            backed_up, policy = self.backup(values, ref, beta, f)
            error = float((backed_up - values).abs().max())
            if error <= _tolerance(values):
                break
            stalled = stalled + 1 if error >= least else 0  # rounding: beta times a tiny divergence
            least = min(least, error)
            values = self.values(policy, beta * f.value(policy.log(), ref.log()))
        return Solution(policy, backed_up, self.action_values(backed_up), float(self.initial @ backed_up))

    def _resolvent(self, policy: Tensor) -> Float[Tensor, "S S"]:
        step = torch.einsum("sa,sat->st", policy, self.transition)
        return torch.eye(self.states, dtype=step.dtype) - self.gamma * step

    def _always_ends(self) -> bool:
        alive = self.initial.new_ones(self.states)
        for _ in range(self.states):
            alive = (self.transition @ alive).amax(1)
        return bool((alive < 1 - 1e-9).all())


def sequence_mdp(space: SequenceSpace, reward: Float[Tensor, "S"]) -> TabularMDP:
    """Writing a sequence as an MDP: prefixes are the states, tokens the actions, and the reward comes with the last."""
    ends = endings(space)
    transition = torch.zeros(space.prefixes, space.vocab, space.prefixes, dtype=reward.dtype)
    for level in levels(space)[:-1]:
        prefix = torch.arange(level.start, level.stop)[:, None]
        token = torch.arange(space.vocab)
        transition[prefix, token, prefix * space.vocab + 1 + token] = (ends[level] < 0).to(reward.dtype)
    gain = torch.where(ends >= 0, reward[ends.clamp(min=0)], torch.zeros((), dtype=reward.dtype))
    return TabularMDP(transition, gain, torch.nn.functional.one_hot(torch.tensor(0), space.prefixes).to(reward.dtype))


def _tolerance(values: Tensor) -> float:
    """Twelve digits."""
    return 1e-12 * (1 + float(values.abs().max()))
