"""Functionals of distillation: a policy at the tokens that a teacher named, and beside a whole teacher.

All of them are evaluated chunk by chunk; none leaves more than a few numbers of a position behind.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.statistics.positions import Positions
from keel.statistics.transforms import Temperature, Transform


@dataclass(frozen=True)
class LogProbsAt:
    """log pi of the tokens that a column of the rows names at each position, [n, k]; with `rest` the log-mass of all
    other tokens behind them, [n, k + 1], which is -inf where there are none.

        d log pi_i / dz = [v = i] - pi_v,      d log rest / dz = [v not named] pi_v / rest - pi_v

    Args:
        column: name of the column, token ids [B, T, k].
        rest: add the mass of what is not named; the ids of a position must then differ.
    """

    column: str = "teacher_ids"
    rest: bool = False
    of: tuple[str, ...] = ("policy",)
    where: str = "mask"
    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"log_probs_at({self.of[0]}, {self.column}{', rest' if self.rest else ''})"

    def __call__(self, at: Positions) -> Float[Tensor, "n K"]:
        ids = at.column(self.column)
        named = at.log_probs_of(ids, self.of[0])
        if not self.rest:
            return named
        others = self._others(at, ids)
        out = torch.cat([named, others.sum(-1, keepdim=True).log()], -1)
        at.give(others)
        return out

    def backward(self, at: Positions, grad: Float[Tensor, "n K"], dlogits: Float[Tensor, "n V"]) -> None:
        """Add the gradient of sum(grad * f); a rest without mass has none."""
        ids = at.column(self.column)
        k = ids.shape[-1]
        if self.rest:
            others = self._others(at, ids)
            mass = others.sum(-1)
            there = mass > 0
            own = torch.where(there, grad[:, k], torch.zeros_like(mass))
            dlogits.addcmul_(others, (own / mass.where(there, 1.0))[:, None])
            at.give(others)
            grad = torch.cat([grad[:, :k], own[:, None]], -1)
        dlogits.scatter_add_(-1, ids, grad[:, :k].contiguous())
        at.add_along(self.of[0], None, -grad.sum(-1))

    def _others(self, at: Positions, ids: Int[Tensor, "n k"]) -> Float[Tensor, "n V"]:
        """Probabilities, 0 at the named tokens; to be given back."""
        p = at.probs(self.of[0])
        return at.take_like(p).copy_(p).scatter_(-1, ids, 0.0)


@dataclass(frozen=True)
class TopTokens:
    """The k likeliest tokens of a model, their log-probabilities, and the log-mass of the rest: [n, 2 k + 1].

    The ids stand first, as numbers; k beyond the vocabulary takes all of it.
    """

    k: int
    of: tuple[str, ...] = ("teacher",)
    where: str = "mask"
    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"top_tokens({self.of[0]}, {self.k})"

    def __call__(self, at: Positions) -> Float[Tensor, "n K"]:
        p = at.probs(self.of[0])
        ids = at.centred(self.of[0]).detach().topk(min(self.k, p.shape[-1]), -1).indices
        others = at.take_like(p).copy_(p).scatter_(-1, ids, 0.0)
        out = [ids.to(p), at.log_probs_of(ids, self.of[0]), others.sum(-1, keepdim=True).log()]
        at.give(others)
        return torch.cat(out, -1)


@dataclass(frozen=True)
class TopOfMixture:
    """As `TopTokens`, of the distribution whose logits are sum_i w_i z_i, those of several models.

    Negative weights are allowed; where the weights add up to 1 it is a log-linear mixture, or goes beyond one.

    Args:
        k: tokens.
        of: the models.
        weights: one for each of them.

    Raises:
        ValueError: another number of weights.
    """

    k: int
    of: tuple[str, ...]
    weights: tuple[float, ...]
    where: str = "mask"
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.of):
            raise ValueError(f"{len(self.weights)} weights for {len(self.of)} models")

    @property
    def name(self) -> str:
        return f"top_of_mixture({', '.join(self.of)}, {self.k})"

    def __call__(self, at: Positions) -> Float[Tensor, "n K"]:
        total = torch.zeros_like(at.centred(self.of[0]), dtype=torch.float64)
        for model, weight in zip(self.of, self.weights, strict=True):
            total.add_(at.centred(model), alpha=weight)
        logp = total.log_softmax(-1)
        named, ids = logp.topk(min(self.k, logp.shape[-1]), -1)
        rest = logp.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([ids.to(logp), named, rest], -1)


@dataclass(frozen=True)
class PlackettLuce:
    """-sum_j w_j log(exp s_{o_j} / sum_{i >= j} exp s_{o_i}) for the ranking o: the chosen token, then the teacher's.

    s are the policy's logits, w = softmax(t / temperature) the teacher's probabilities of the ranked tokens. The first
    choice is the token of the data whatever the teacher thinks of it; equal logits keep the order of the vocabulary.

    Args:
        against: name of the teacher.
        k: tokens of the teacher beside the chosen one, the likeliest; None ranks the whole vocabulary.
        temperature: of the teacher.
        renormalise: w sums to 1 over the ranked tokens; otherwise they are probabilities of the whole vocabulary.
    """

    against: str = "teacher"
    k: int | None = None
    temperature: float = 1.0
    renormalise: bool = False
    where: str = "mask"
    stop: tuple[str, ...] = ()

    @property
    def of(self) -> tuple[str, ...]:
        """Both models."""
        return ("policy", self.against)

    @property
    def name(self) -> str:
        top = "" if self.k is None else f", k={self.k}"
        return f"plackett_luce({self.against}, temperature={self.temperature:g}{top}{', 1' * self.renormalise})"

    def __call__(self, at: Positions) -> Float[Tensor, "n"]:
        s, t = at.logits("policy"), at.logits(self.against).detach()
        return plackett_luce(s, t, at.token, self.k, self.temperature, self.renormalise)


def plackett_luce(
    student: Float[Tensor, "n V"],
    teacher: Float[Tensor, "n V"],
    label: Int[Tensor, "n"],
    k: int | None = None,
    temperature: float = 1.0,
    renormalise: bool = False,
) -> Float[Tensor, "n"]:
    """The list loss of `PlackettLuce`, in fp32 at least.

    >>> s, t = torch.tensor([[1., 2., .5, -1., 0.]]), torch.tensor([[1.5, 2.5, 0., -.5, 1.]])
    >>> print(f"{float(plackett_luce(s, t, torch.tensor([0]))):.5f}")
    0.68748
    """
    precise = torch.promote_types(student.dtype, torch.float32)
    s, t = student.to(precise), teacher.to(precise)
    first = t.scatter(-1, label[:, None], torch.inf)
    if k is None or k + 1 >= t.shape[-1]:
        order = first.sort(dim=-1, descending=True, stable=True).indices
    else:
        order = first.topk(k + 1, -1).indices
    weight = (t / temperature).softmax(-1).gather(-1, order)
    if renormalise:
        weight = weight / weight.sum(-1, keepdim=True)
    ranked = s.gather(-1, order)
    left = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    return (weight * (left - ranked)).sum(-1)


@dataclass(frozen=True)
class Binned:
    """Probabilities of a model summed over bins of the vocabulary, token v in bin v mod `bins`: [n, bins].

    With as many bins as tokens these are the probabilities themselves. Distances between binned rows are at most those
    between the rows.

    Args:
        bins: how many, at most.
        temperature: beside the one of all models.
    """

    bins: int = 1024
    of: tuple[str, ...] = ("policy",)
    temperature: float = 1.0
    where: str = "mask"
    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"binned({self.of[0]}, {self.bins}, temperature={self.temperature:g})"

    @property
    def transform(self) -> Transform | None:
        """The temperature, None for 1."""
        return None if self.temperature == 1.0 else Temperature(self.temperature)

    def __call__(self, at: Positions) -> Float[Tensor, "n K"]:
        p = at.probs(self.of[0], self.transform)
        if self.bins >= p.shape[-1]:
            return p.clone()
        return p.new_zeros(len(p), self.bins).index_add_(-1, self._bin(p), p)

    def backward(self, at: Positions, grad: Float[Tensor, "n K"], dlogits: Float[Tensor, "n V"]) -> None:
        """Add pi_v (g_bin(v) - sum pi g), over the temperature."""
        p = at.probs(self.of[0], self.transform)
        own = (grad if self.bins >= p.shape[-1] else grad.index_select(-1, self._bin(p))) / self.temperature
        slopes = p * own
        dlogits += slopes
        at.add_along(self.of[0], self.transform, -slopes.sum(-1))

    def _bin(self, p: Float[Tensor, "n V"]) -> Int[Tensor, "V"]:
        return torch.arange(p.shape[-1], device=p.device) % self.bins
