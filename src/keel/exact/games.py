"""Preference games on finite sets, regularised to a reference: their Nash policy, and two ways to it.

    V(pi, pi') = P(pi beats pi') - beta KL(pi || ref) + beta KL(pi' || ref),   P(y beats y') + P(y' beats y) = 1

Both players have the same Nash policy, pi* = ref exp(P(y beats pi*) / beta) / Z. One proximal step from a base b
against an opponent o is

    log prox(y) = [ eta (log ref(y) + P(y beats o) / beta) + log b(y) ] / (1 + eta) + const

Mirror descent plays each step against where it stands. Mirror-Prox looks ahead first: half = prox(b = pi_k, o = pi_k),
then pi_{k+1} = prox(b = pi_k, o = half), still from pi_k; its iterates close in on pi* at steps at which those of
mirror descent circle around it.

Source: "Accelerating Nash Learning from Human Feedback via Mirror Prox", 2025; the step of INPO is that of "Iterative
Nash Policy Optimization", 2025.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.errors import UserError


@dataclass(frozen=True, eq=False)
class PreferenceGame:
    """A symmetric game of two players who each name one of S completions, for each of Q prompts.

    Args:
        preference: P(y beats y'), rows beat columns, shape [*Q, S, S].
        ref_log_prob: log-probabilities of the reference, shape [*Q, S]; normalised here.
        beta: strength of the regulariser, positive.

    Raises:
        ValueError: a beta that is not positive, or a preference whose two orders do not add up to 1.
    """

    preference: Float[Tensor, "*Q S S"]
    ref_log_prob: Float[Tensor, "*Q S"]
    beta: float

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, not {self.beta}")
        both = self.preference + self.preference.mT
        if not torch.allclose(both, torch.ones_like(both), atol=1e-6) or bool((self.preference < 0).any()):
            raise ValueError("preference must lie in [0, 1] and add up to 1 with its transpose: average both orders")
        object.__setattr__(self, "ref_log_prob", self.ref_log_prob.log_softmax(-1))

    def win_rate(self, opponent: Float[Tensor, "*Q S"]) -> Float[Tensor, "*Q S"]:
        """P(y beats a completion of the opponent), whose log-probabilities these are."""
        return (self.preference @ opponent.exp()[..., None])[..., 0]

    def kl(self, policy: Float[Tensor, "*Q S"]) -> Float[Tensor, "*Q"]:
        """KL(policy || ref)."""
        return kl(policy, self.ref_log_prob)

    def value(self, policy: Float[Tensor, "*Q S"], opponent: Float[Tensor, "*Q S"]) -> Float[Tensor, "*Q"]:
        """V(policy, opponent)."""
        wins = (policy.exp() * self.win_rate(opponent)).sum(-1)
        return wins - self.beta * self.kl(policy) + self.beta * self.kl(opponent)

    def best_response(self, opponent: Float[Tensor, "*Q S"]) -> Float[Tensor, "*Q S"]:
        """ref exp(P(y beats opponent) / beta) / Z, which maximises V against it."""
        return (self.ref_log_prob + self.win_rate(opponent) / self.beta).log_softmax(-1)

    def exploitability(self, policy: Float[Tensor, "*Q S"]) -> Float[Tensor, "*Q"]:
        """max_pi V(pi, policy) - min_pi V(policy, pi); 0 at the Nash policy, positive elsewhere."""
        return 2 * self.value(self.best_response(policy), policy) - 1

    def proximal(
        self, base: Float[Tensor, "*Q S"], opponent: Float[Tensor, "*Q S"], eta: float
    ) -> Float[Tensor, "*Q S"]:
        """What maximises P(pi beats opponent) / beta - KL(pi || ref) - KL(pi || base) / eta; see the module.

        Raises:
            ValueError: eta not positive.
        """
        if not eta > 0:
            raise ValueError(f"eta must be positive, not {eta}")
        pull = self.ref_log_prob + self.win_rate(opponent) / self.beta
        return ((eta * pull + base) / (1 + eta)).log_softmax(-1)

    def mirror_descent(self, start: Float[Tensor, "*Q S"], eta: float, steps: int) -> list[Float[Tensor, "*Q S"]]:
        """The iterates of single steps, the start first; one query of the preference a step."""
        found = [start.log_softmax(-1)]
        for _ in range(steps):
            found.append(self.proximal(found[-1], found[-1], eta))
        return found

    def mirror_prox(self, start: Float[Tensor, "*Q S"], eta: float, steps: int) -> list[Float[Tensor, "*Q S"]]:
        """The iterates of double steps, the start first; two queries of the preference a step."""
        found = [start.log_softmax(-1)]
        for _ in range(steps):
            half = self.proximal(found[-1], found[-1], eta)
            found.append(self.proximal(found[-1], half, eta))
        return found

    def nash(self, tolerance: float = 1e-12, limit: int = 100_000) -> Float[Tensor, "*Q S"]:
        """log pi*, by Mirror-Prox from the reference at eta = 2 beta.

        >>> paper = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)
        >>> game = PreferenceGame(paper, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log(), 0.1)
        >>> [round(p, 6) for p in game.nash().exp().tolist()]
        [0.492747, 0.154147, 0.353106]

        Args:
            tolerance: largest change of a log-probability by the best response at which it is found.
            limit: steps at most.

        Raises:
            UserError: not found within the limit.
        """
        policy = self.ref_log_prob
        for _ in range(limit):
            if float((self.best_response(policy) - policy).abs().max()) <= tolerance / self.beta:
                return policy
            half = self.proximal(policy, policy, 2 * self.beta)
            policy = self.proximal(policy, half, 2 * self.beta)
        raise UserError(f"no Nash policy within {limit} steps", "nash", "Raise beta, limit or tolerance.")

    def inpo(self, base: Float[Tensor, "*Q S"], eta: float) -> Float[Tensor, "*Q S"]:
        """The next policy of INPO from base: ref^(tau / eta) base^(1 - tau / eta) exp(P(y beats base) / eta) / Z.

        tau, the strength of the regulariser, is the game's beta. The Nash policy is where it comes to rest.

        Raises:
            ValueError: eta below tau.
        """
        if eta < self.beta:
            raise ValueError(f"eta {eta} must be at least tau {self.beta}")
        share = self.beta / eta
        return (share * self.ref_log_prob + (1 - share) * base + self.win_rate(base) / eta).log_softmax(-1)


def kl(p: Float[Tensor, "*Q S"], q: Float[Tensor, "*Q S"]) -> Float[Tensor, "*Q"]:
    """KL(p || q) of log-probabilities; completions that p cannot name count nothing."""
    return (p.exp() * torch.where(p > -torch.inf, p - q, torch.zeros_like(p))).sum(-1)
