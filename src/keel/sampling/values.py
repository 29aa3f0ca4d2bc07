"""Values: estimates of V for unfinished states, to be given to a chain.

    U(x) = E_{p_0}[r | x]                        what a regression on samples of the prior learns
    V(x) = beta log E_{p_0}[exp(r / beta) | x]   what the tilt is made of; U <= V <= max r, equal as beta grows

A value that is random may be asked for once for each particle and step, as samplers do that keep what they were told:
the weights of sequential Monte Carlo are right then, because a potential cancels when the next one is put in its
place. Asked again for the same state, it says something else, and nothing cancels. Finished states need no value: the
chain says their reward.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.chain import Chain, Prefix, TokenChain, estimate
from keel.core.chance import Choice
from keel.core.registry import part
from keel.sampling.settings import positive

Value = Callable[[Any, Any, Choice], Float[Tensor, "B"]]  # by tokens, by steps or in latents
Score = Callable[[Any], Float[Tensor, "B"]]  # of states
Features = Callable[[Prefix], Float[Tensor, "B F"]]  # of states
CLIP = 1e-7  # of a probability whose odds are taken


@part("monte_carlo_value")
@dataclass(frozen=True)
class MonteCarlo:
    """The mean reward of m completions by the prior, an estimate of U; with beta, an estimate of V.

        beta log mean_i exp(r_i / beta)

    exp(V_hat / beta) is unbiased then, V_hat itself is low. Tokens and rewards are counted by the chain's meter.

    Args:
        rollouts: m.
        beta: of the tilt; None takes the mean.

    Raises:
        ValueError: m below 1, or beta not above 0.
    """

    rollouts: int = 4
    beta: float | None = None

    def __post_init__(self) -> None:
        positive(self, "rollouts")
        if self.beta is not None:
            positive(self, "beta")

    def __call__(self, chain: Chain, x: Any, rng: Choice) -> Float[Tensor, "B"]:
        """Of the unfinished states; 0 for the others."""
        return self.masked(chain, x, rng, ~chain.is_done(x))

    def masked(self, chain: Chain, x: Any, rng: Choice, where: Bool[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Of the unfinished states that are asked for; 0 for the others, from which nothing is drawn."""
        asked = where & ~chain.is_done(x)
        ends = chain.complete(x, self.rollouts, rng.scope("monte carlo"), asked)
        reward = chain.reward(ends, asked.repeat_interleave(self.rollouts)).view(-1, self.rollouts)
        if self.beta is None:
            return reward.mean(1)
        soft = self.beta * ((reward / self.beta).logsumexp(1) - math.log(self.rollouts))
        return torch.where(asked, soft, 0.0)


@dataclass(frozen=True)
class Learned:
    """What a module, or any function of states, says; without gradients.

    Args:
        score: from states to one number each, in units of the reward; shape [B] or [B, 1].
    """

    score: Callable[[Any], Tensor]

    def __call__(self, chain: Chain, x: Any, rng: Choice) -> Float[Tensor, "B"]:
        """Of all states."""
        with torch.no_grad():
            return self.score(x).double().flatten()


@part("combined_value")
@dataclass(frozen=True)
class Combined:
    """A weighted sum of values, sum_j lambda_j V_j; the chain's reward should be that of the rewards.

    The mean value of a sum is the sum of the mean values. The soft value of a sum is not: the parts need not be
    independent.

    Args:
        values: by name.
        weights: lambda_j, by the same names; 0 leaves a value out.

    Raises:
        ValueError: names that differ, or none.
    """

    values: Mapping[str, Value]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.values or set(self.values) != set(self.weights):
            raise ValueError(f"weights must name the values {sorted(self.values)}, not {sorted(self.weights)}")

    def __call__(self, chain: Chain, x: Any, rng: Choice) -> Float[Tensor, "B"]:
        """Of the unfinished states."""
        return self.masked(chain, x, rng, ~chain.is_done(x))

    def masked(self, chain: Chain, x: Any, rng: Choice, where: Bool[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Of the states that are asked for; anything for the others."""
        total = torch.zeros(where.shape, dtype=torch.float64, device=where.device)
        for name, weight in self.weights.items():
            if weight != 0:
                total = total + weight * estimate(self.values[name], chain, x, rng.scope(name), where).to(total)
        return total


@dataclass(frozen=True)
class Odds:
    """A process reward model's probability of success as a value: beta log(s / (1 - s)), so that psi is the odds.

    Args:
        score: s of each state, in [0, 1]; clipped to stay 1e-7 away from either end.
        beta: of the sampler that reads the value.

    Raises:
        ValueError: beta not above 0.

    Source: "A Probabilistic Inference Approach to Inference-Time Scaling of LLMs using Particle-Based Monte Carlo
    Methods", 2025.
    """

    score: Score
    beta: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "beta")

    def __call__(self, chain: Chain, x: Any, rng: Choice) -> Float[Tensor, "B"]:
        """Of all states."""
        with torch.no_grad():
            return self.beta * log_odds(self.score(x).double())


def log_odds(score: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log(s / (1 - s)), with s at least 1e-7 away from 0 and 1.

    >>> [round(float(value), 6) for value in log_odds(torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64))]
    [-16.118096, 0.0, 2.197225]
    """
    clipped = score.clamp(CLIP, 1 - CLIP)
    return clipped.log() - (-clipped).log1p()


# -- regression ------------------------------------------------------------------------------------------------------


def value_targets(
    rewards: Float[Tensor, "B T"], values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], lam: float = 0.95
) -> Float[Tensor, "B T"]:
    """What each value should have been: the returns of generalised advantage estimation without discount.

        delta_t = r_t + v_{t+1} - v_t,   A_t = delta_t + lam A_{t+1},   R_t = sg(A_t + v_t)

    v_t belongs to the state before token t, and nothing follows the last token. At lam = 1, R_t is the reward still to
    come, whatever the values are; at lam = 0 it is r_t + v_{t+1}.

    >>> value_targets(torch.tensor([[0., 0., 1.]]), torch.tensor([[.2, .4, .6]]), torch.ones(1, 3).bool(), 0.5)
    tensor([[0.6000, 0.8000, 1.0000]])

    Args:
        rewards: for each token.
        values: of the state before each token.
        mask: the tokens, in one run; the rest counts for nothing.
        lam: 1 trusts the rewards, 0 the values.

    Returns:
        Targets; 0 where the mask is.

    Raises:
        ValueError: lam outside [0, 1].
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], not {lam}")
    rewards, values = (torch.where(mask, x, 0.0).detach() for x in (rewards, values))
    found = torch.zeros_like(values)
    later = advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        advantage = torch.where(mask[:, t], rewards[:, t] + later - values[:, t] + lam * advantage, 0.0)
        later = values[:, t]
        found[:, t] = advantage + later
    return found


def value_loss(
    values: Float[Tensor, "B T"], targets: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Half the mean square over tokens: 1/2 sum mask (v - R)^2 / sum mask, with R not differentiated.

    >>> float(value_loss(torch.tensor([[1., 2.]]), torch.tensor([[0., 9.]]), torch.tensor([[True, False]])))
    0.5
    """
    square = torch.where(mask, values - targets.detach(), 0.0).square()
    return 0.5 * ratio(square.sum(), mask.sum())


def regress(
    chain: TokenChain, features: Features, rng: Choice, rollouts: int = 64, lam: float = 1.0, sweeps: int = 1
) -> Learned:
    """A value that is linear in features of the states, fitted to completions of the prior by least squares.

        w = argmin sum_t (phi(x_t) w - R_t)^2,   R by `value_targets` of the values before

    At lam = 1 that is one regression of the final reward, and with a feature for each state the mean of the rewards
    seen below it: U as samples grow. Below 1 it starts from 0 and is repeated.

    Args:
        chain: what is learnt holds for all its prompts.
        features: of states that carry no memory.
        rng: for the completions.
        rollouts: completions of each prompt.
        lam: of the targets, in [0, 1].
        sweeps: how often targets and weights are renewed; one is enough at lam = 1.

    Raises:
        ValueError: lam out of its range.
    """
    ends = chain.complete(chain.init(1), rollouts, rng.scope("regression"))
    place = torch.arange(chain.horizon, device=ends.length.device)
    mask = place < ends.length[:, None]
    rewards = torch.where(place == ends.length[:, None] - 1, chain.reward(ends)[:, None], 0.0)
    seen = torch.stack([features(cut(ends, t, chain.pad)).double() for t in range(chain.horizon)], 1)  # [B, T, F]
    weight = torch.zeros(seen.shape[-1], 1, dtype=torch.float64, device=seen.device)
    for _ in range(sweeps):
        targets = value_targets(rewards, (seen @ weight)[..., 0], mask, lam)
        weight = _least_squares(seen[mask], targets[mask])
    return Learned(lambda x: features(x).double() @ weight)


def cut(x: Prefix, length: int, pad: int) -> Prefix:
    """States as they were after so many tokens, unfinished and without memory; shorter ones lose their end only."""
    kept = torch.arange(x.tokens.shape[1], device=x.length.device) < length
    return Prefix(
        tokens=torch.where(kept, x.tokens, pad),
        logp=torch.where(kept, x.logp, 0.0),
        length=x.length.clamp(max=length),
        stop=torch.full_like(x.stop, -1),
        prompt=x.prompt,
    )


def _least_squares(features: Float[Tensor, "n F"], target: Float[Tensor, "n"]) -> Float[Tensor, "F 1"]:
    """The shortest of the best weights, so that features never seen weigh nothing."""
    return torch.linalg.pinv(features.T @ features, hermitian=True) @ (features.T @ target[:, None])
