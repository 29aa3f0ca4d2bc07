"""Functionals: what a loss may ask of a model at a position, a map from logits to a few numbers.

A functional is frozen and hashable and has a canonical name. `__call__` computes it at n positions; `backward` adds the
gradient of sum(grad * f) to the logits' gradients in closed form. One without `backward` is differentiated by autograd,
chunk by chunk.
"""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from keel.divergences.family import f_divergence
from keel.statistics.positions import Positions
from keel.statistics.transforms import KeepTopP, Temperature, Transform

LARGEST = 1e6  # a divergence beyond this has a logit of -inf, or one as good as that


@runtime_checkable
class Functional(Protocol):
    """Frozen and hashable, with a canonical name."""

    @property
    def of(self) -> tuple[str, ...]:
        """Names of the models that it reads."""
        ...

    @property
    def where(self) -> str:
        """Positions: "mask" gives [B, T, *F], "last" [B, *F], a named mask of the rows packed [n, *F]."""
        ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Models held constant."""
        ...

    @property
    def name(self) -> str:
        """Canonical name, `log_prob(old, min_p=0.02)`."""
        ...

    def __call__(self, at: Positions) -> Float[Tensor, "n *F"]:
        """The numbers at each position."""
        ...


@dataclass(frozen=True)
class LogProb:
    """log pi(y_t | x, y_<t) of the token that was chosen.

    Gradient of the logits: [v = y_t] - pi_v. With a filter that removed the token it is -inf and carries no gradient.
    """

    of: tuple[str, ...] = ("policy",)
    transform: Transform | None = None
    where: str = "mask"
    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return _name("log_prob", self.of, self.transform)

    def __call__(self, at: Positions) -> Float[Tensor, "n"]:
        return at.log_probs_of(at.token[:, None], self.of[0], self.transform)[:, 0]

    def backward(self, at: Positions, grad: Float[Tensor, "n"], dlogits: Float[Tensor, "n V"]) -> None:
        """Add grad ([v = y] - pi_v) to `dlogits`."""
        kept = at.centred(self.of[0], self.transform).gather(-1, at.token[:, None])[:, 0] > float("-inf")
        grad = torch.where(kept, grad, torch.zeros_like(grad)) * _scale(self.transform)
        at.add_along(self.of[0], self.transform, -grad)
        dlogits.scatter_add_(-1, at.token[:, None], grad[:, None])


@dataclass(frozen=True)
class Entropy:
    """H = -sum_v pi_v log pi_v in nats, of the transformed distribution; the kept set of a filter is held constant.

    Gradient of the logits: -pi_v (log pi_v + H).
    """

    of: tuple[str, ...] = ("policy",)
    transform: Transform | None = None
    where: str = "mask"
    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return _name("entropy", self.of, self.transform)

    def __call__(self, at: Positions) -> Float[Tensor, "n"]:
        if at.differentiable:
            p = at.probs(self.of[0], self.transform)
            log_p = at.log_probs(self.of[0], self.transform)
            return -torch.where(p > 0, p * log_p, torch.zeros_like(p)).sum(-1)
        return at.row(("entropy", self.of[0], self.transform), lambda: self._measure(at))

    def _measure(self, at: Positions) -> Float[Tensor, "n"]:
        p_z = self._weighted(at)
        key = ("filtered", self.of[0], self.transform)
        total = p_z.sum(-1)
        if at.row(key, lambda: not bool(total.isfinite().all())):
            total = _without(p_z, at.probs(self.of[0], self.transform)).sum(-1)
        at.give(p_z)
        return at.log_mass(self.of[0], self.transform) - total

    def _weighted(self, at: Positions) -> Float[Tensor, "n V"]:
        """p z for centred z, 0 where p is 0 once that was found to matter; to be given back."""
        z, p = at.centred(self.of[0], self.transform), at.probs(self.of[0], self.transform)
        p_z = torch.mul(p, z, out=at.take_like(z))
        return _without(p_z, p) if at.known.get(("filtered", self.of[0], self.transform)) else p_z

    def backward(self, at: Positions, grad: Float[Tensor, "n"], dlogits: Float[Tensor, "n V"]) -> None:
        """Add -grad pi (log pi + H) to `dlogits`."""
        grad, entropy = grad * _scale(self.transform), self(at)
        p_z = self._weighted(at)
        dlogits.addcmul_(p_z, grad[:, None], value=-1)
        at.give(p_z)
        at.add_along(self.of[0], self.transform, grad * (at.log_mass(self.of[0], self.transform) - entropy))


def TopPEntropy(p: float, of: tuple[str, ...] = ("policy",), where: str = "mask") -> Entropy:
    """Entropy of the renormalised nucleus that holds probability p, the token that crosses p included."""
    return Entropy(of=of, transform=KeepTopP(p), where=where)


@dataclass(frozen=True)
class Divergence:
    """D(policy, against) over the whole vocabulary at each position, in nats; see `keel.divergences.family`.

    Gradient of the logits: p_v (f'(p_v / q_v) - sum p f'), finite also where logits are -inf.

    Args:
        kind: an f-divergence by name, policy first: `kl_policy_ref` (alias `reverse_kl`), `js:0.1`, `alpha:0.5` ...;
            kept as its canonical name.
        against: the model in the second place, constant.
        first: the model in the first place.
        temperature: of the first model, beside the one of all models.
        against_temperature: of the second one; None takes the first one's.

    Raises:
        ValueError: an unknown kind, the live policy in the second place, or a temperature that is not positive.
    """

    kind: str = "kl_policy_ref"
    against: str = "ref"
    first: str = "policy"
    where: str = "mask"
    stop: tuple[str, ...] = ()
    temperature: float = 1.0
    against_temperature: float | None = None
    of: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", str(f_divergence(self.kind)))
        if self.against == "policy":
            raise ValueError("the second model of a divergence is constant: put the policy first, with the kind turned")
        if self.against_temperature == self.temperature:
            object.__setattr__(self, "against_temperature", None)
        _ = self._heats
        object.__setattr__(self, "of", (self.first, self.against))

    @property
    def name(self) -> str:
        first = "" if self.first == "policy" else f"{self.first}, "
        heats = "".join(f", {heat.name}" for heat in dict.fromkeys(self._heats) if heat is not None)
        return f"divergence({self.kind}, {first}{self.against}{heats})"

    @property
    def _heats(self) -> tuple[Temperature | None, Temperature | None]:
        """The further temperatures of both models; None for 1."""
        other = self.temperature if self.against_temperature is None else self.against_temperature
        own, other_heat = (None if t == 1.0 else Temperature(t) for t in (self.temperature, other))
        return own, other_heat

    def __call__(self, at: Positions) -> Float[Tensor, "n"]:
        kind, (own, other) = f_divergence(self.kind), self._heats
        if not at.differentiable:
            log_u, p = at.log_ratio(self.first, self.against, own, other), at.probs(self.first, own)
            value = kind.value_(log_u, p, at.probs(self.against, other) if kind.reads_q else p)
            at.give(log_u)
            if at.row(self._moderate, lambda: bool((value.abs() < LARGEST).all())):
                return value
        return kind.value(at.log_probs(self.first, own), at.log_probs(self.against, other))

    @property
    def _moderate(self) -> tuple:
        """Under which it is known whether all values of a chunk are finite and no larger than sense."""
        return ("moderate", *self.of, self.kind, *self._heats)

    def backward(self, at: Positions, grad: Float[Tensor, "n"], dlogits: Float[Tensor, "n V"]) -> None:
        """Add grad dD/dz to `dlogits`; the second model is constant."""
        kind, (own, other) = f_divergence(self.kind), self._heats
        if self._moderate not in at.known:
            self(at)
        grad = grad * _scale(own)
        if not at.known[self._moderate]:
            slope = kind.gradient(at.log_probs(self.first, own), at.log_probs(self.against, other))
            dlogits.addcmul_(slope.to(dlogits.dtype), grad[:, None])
            return
        log_u, p = at.log_ratio(self.first, self.against, own, other), at.probs(self.first, own)
        slopes = kind.slopes_(log_u, p, at.probs(self.against, other) if kind.reads_q else p)
        dlogits.addcmul_(slopes, grad[:, None])
        at.add_along(self.first, own, -grad * slopes.sum(-1))
        at.give(log_u)


@dataclass(frozen=True)
class TopK:
    """Log-probabilities of `of[0]` on the k likeliest tokens of the model `under` (itself by default), likeliest first.

    With `ids=True` the tokens themselves, as numbers, in the same order.
    """

    k: int
    of: tuple[str, ...] = ("policy",)
    under: str | None = None
    ids: bool = False
    where: str = "mask"
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"TopK needs k of at least 1, not {self.k}")
        if self.under == self.of[0]:
            object.__setattr__(self, "under", None)
        if self.under is not None and self.under not in self.of:
            object.__setattr__(self, "of", (*self.of, self.under))

    @property
    def name(self) -> str:
        under = "" if self.under is None else f", under={self.under}"
        return f"top_k{'_ids' if self.ids else ''}({self.of[0]}, {self.k}{under})"

    def __call__(self, at: Positions) -> Float[Tensor, "n k"]:
        chosen = at.centred(self.under or self.of[0]).detach().topk(self.k, -1).indices
        return chosen.float() if self.ids else at.log_probs_of(chosen, self.of[0])


@dataclass(frozen=True)
class Value:
    """The number, or the numbers, that the method's head `head` reads from the states of `of[0]`, or of its own body.

    With the model in `stop` only the head learns.
    """

    head: str = "value"
    of: tuple[str, ...] = ("policy",)
    where: str = "mask"
    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"value({self.of[0]}, {self.head})"

    def __call__(self, at: Positions) -> Float[Tensor, "n *K"]:
        own = at.hidden.get(backbone(self.head))  # a critic with a body of its own
        value = at.extra_heads[self.head](at.hidden[self.of[0]] if own is None else own)
        return value.to(torch.promote_types(value.dtype, torch.float32))


@dataclass(frozen=True)
class State:
    """The state of a model from which the token was chosen, in fp32 at least: what a head would read there."""

    of: tuple[str, ...] = ("policy",)
    where: str = "last"
    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"state({self.of[0]})"

    def __call__(self, at: Positions) -> Float[Tensor, "n D"]:
        state = at.hidden[self.of[0]]
        return state.to(torch.promote_types(state.dtype, torch.float32))


def backbone(head: str) -> str:
    """Name under which the states of a head with a body of its own are kept."""
    return f"head:{head}"


def _name(what: str, of: tuple[str, ...], transform: Transform | None) -> str:
    parts = [name for name in of if name != "policy" or len(of) > 1]
    parts += [transform.name] if transform is not None else []
    return f"{what}({', '.join(parts)})" if parts else what


def _scale(transform: Transform | None) -> float:
    return 1.0 if transform is None else transform.scale


def _without(weighted: Float[Tensor, "n V"], p: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    """0 where there is no mass, in place: 0 * -inf."""
    return weighted.masked_fill_(p == 0, 0.0)
