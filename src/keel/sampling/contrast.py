"""Decoding with and against a second policy: contrast with a worse one, guidance by an unconditional one.

    contrast    log p + eta (log p - log q) on tokens that p finds plausible, where p is uncertain
    guidance    log u + gamma (log p - log u)

The second policy is another chain of a `JointChain`: the same model under a worse or an empty prompt, or another model.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keel.core.chain import Prefix, TokenChain
from keel.core.chance import Choice
from keel.core.registry import part
from keel.sampling.joint import joined
from keel.sampling.settings import share

By = Literal["std", "entropy", "max", "always"]
GATES = ("std", "entropy", "max", "always")
COMBINATIONS = ("log", "ratio", "difference")
LEAST = -1e4  # log-probability that stands for 0 where it is divided by


@part("uscd", paper=40)
@dataclass(frozen=True)
class UncertaintyContrast:
    """Kernel that contrasts p, the main chain's, with a worse policy q at tokens where p is uncertain.

    On the plausible set, p_v >= alpha max p (or alpha / V), and -inf off it:

        log           log p + eta (log p - log q)
        ratio         eta (log p - log q), with eta = 1 and gate "always" the contrastive decoding of two models
        difference    log(p - eta q) where that is positive; what the authors' programs do, with eta = 0.7 and
                      alpha = 2 / 3 of the mean

    Where p is certain enough, and where nothing would be left, p goes on alone. A token off the plausible set is never
    proposed: with alpha > 0, SMC finds only that part of the tilt which the proposal can reach.

    Args:
        other: name of the chain of q (the prompt without its examples, or an amateur).
        eta: strength.
        gate: measure of uncertainty, see `gate`.
        threshold: of that measure; the authors' 0.0035 is for a standard deviation over 32000 tokens, at most 0.0056.
        top: measure it on so many of the likeliest tokens, renormalised; None takes all.
        alpha: a plausible token has at least this share of `floor`.
        floor: the "max" of p, or its "mean", 1 / V.
        combine: log, ratio or difference.

    Raises:
        ValueError: eta or threshold negative, alpha outside [0, 1], top below 2, or an unknown choice.

    Source: "USCD: Improving Code Generation of LLMs by Uncertainty-Aware Selective Contrastive Decoding", 2024;
    "Contrastive Decoding: Open-ended Text Generation as Optimization", 2023.
    """

    other: str = "lame"
    eta: float = 0.5
    gate: By = "std"
    threshold: float = 0.0035
    top: int | None = None
    alpha: float = 0.1
    floor: Literal["max", "mean"] = "max"
    combine: Literal["log", "ratio", "difference"] = "log"

    def __post_init__(self) -> None:
        for name in ("eta", "threshold"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        share(self, "alpha")
        if self.top is not None and self.top < 2:
            raise ValueError(f"top must be at least 2, not {self.top}")
        for name, known in (("gate", GATES), ("floor", ("max", "mean")), ("combine", COMBINATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not '{getattr(self, name)}'")

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the other chains."""
        return (self.other,)

    def log_q(self, chain: TokenChain, x: Prefix, rng: Choice, beta: float) -> Float[Tensor, "B V"]:
        """See `Kernel`."""
        both = joined(chain, self)
        log_p = both.log_probs(x)
        found = contrast(log_p, both.other(self.other, x), self.eta, self.alpha, self.floor, self.combine)
        return torch.where(self.gated(log_p, x)[:, None], found, log_p.to(found))

    def gated(self, log_p: Float[Tensor, "B V"], x: Prefix) -> Bool[Tensor, "B"]:
        """Unfinished states at which the contrast is applied; a threshold is tuned by their share."""
        return gate(log_p, self.gate, self.threshold, self.top) & ~x.done


@part("cfg")
@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: log q = log u + gamma (log p - log u), renormalised, with p the main chain's.

    gamma = 1 is p, 0 is u, and beyond 1 the prompt counts more than it does by itself.

    Args:
        other: name of the chain of u, the same model without the prompt, or with a negative one.
        gamma: strength.

    Raises:
        ValueError: gamma negative.

    Source: "Stay on topic with Classifier-Free Guidance", 2023.
    """

    other: str = "unconditional"
    gamma: float = 1.5

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must not be negative, but is {self.gamma}")

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the other chains."""
        return (self.other,)

    def log_q(self, chain: TokenChain, x: Prefix, rng: Choice, beta: float) -> Float[Tensor, "B V"]:
        """See `Kernel`."""
        both = joined(chain, self)
        log_p = both.log_probs(x)
        found = guided(log_p, both.other(self.other, x), self.gamma)
        return torch.where(x.done[:, None], log_p.to(found), found)


def gate(log_p: Float[Tensor, "B V"], by: By, threshold: float, top: int | None = None) -> Bool[Tensor, "B"]:
    """Where a distribution is uncertain.

        std        standard deviation of p over the vocabulary below the threshold (it is flat); 0 is never
        entropy    -sum p log p above it
        max        1 - max p above it
        always

    >>> p = torch.tensor([[.40, .35, .25], [.98, .01, .01]])
    >>> gate(p.log(), "std", 0.1).tolist()
    [True, False]

    Args:
        log_p: log-probabilities.
        by: the measure.
        threshold: of it.
        top: so many of the likeliest tokens, renormalised; None takes all.
    """
    if by == "always":
        return torch.ones_like(log_p[:, 0], dtype=torch.bool)
    if top is not None and top < log_p.shape[-1]:
        log_p = log_p.topk(top, -1).values
    log_p = log_p.double().log_softmax(-1)
    p = log_p.exp()
    if by == "std":
        return p.std(-1, correction=0) < threshold
    if by == "entropy":
        return -torch.special.xlogy(p, p).sum(-1) > threshold
    return 1 - p.amax(-1) > threshold


def contrast(
    log_p: Float[Tensor, "B V"],
    log_q: Float[Tensor, "B V"],
    eta: float,
    alpha: float = 0.1,
    floor: Literal["max", "mean"] = "max",
    combine: Literal["log", "ratio", "difference"] = "log",
) -> Float[Tensor, "B V"]:
    """Scores of p against q, in fp64; see `UncertaintyContrast`.

    >>> p, q = torch.tensor([[.40, .35, .25]]), torch.tensor([[.70, .20, .10]])
    >>> contrast(p.log(), q.log(), 0.5).softmax(-1)
    tensor([[0.2605, 0.3989, 0.3406]], dtype=torch.float64)
    """
    log_p = log_p.double().log_softmax(-1)
    log_q = log_q.double().log_softmax(-1)
    least = log_p.amax(-1, keepdim=True) if floor == "max" else -math.log(log_p.shape[-1])
    plausible = (log_p > -math.inf) & (log_p.exp() >= alpha * torch.as_tensor(least).exp())
    if combine == "difference":
        score = (log_p.exp() - eta * log_q.exp()).clamp(min=0).log()
    else:
        score = eta * (log_p - log_q.clamp(min=LEAST))
        score = score + log_p if combine == "log" else score
    score = score.masked_fill(~plausible, -math.inf)
    lost = (score == -math.inf).all(-1, keepdim=True)
    return torch.where(lost, log_p, score)


def guided(log_p: Float[Tensor, "B V"], log_u: Float[Tensor, "B V"], gamma: float) -> Float[Tensor, "B V"]:
    """gamma log p + (1 - gamma) log u, in fp64, unnormalised.

    >>> p, u = torch.tensor([[.6, .4]]), torch.tensor([[.5, .5]])
    >>> guided(p.log(), u.log(), 2.0).softmax(-1)
    tensor([[0.6923, 0.3077]], dtype=torch.float64)
    """
    log_p, log_u = log_p.double(), log_u.double()
    if gamma in (0, 1):
        return log_p if gamma == 1 else log_u
    if gamma > 1:
        log_u = log_u.clamp(min=LEAST)  # what u rules out and p does not is as good as certain
    found = gamma * log_p + (1 - gamma) * log_u
    lost = (found == -math.inf).all(-1, keepdim=True)
    return torch.where(lost, log_p, found)
