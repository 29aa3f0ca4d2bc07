"""Functionals: what a loss may ask of a model at a position, a map from logits to a few numbers.

A functional is frozen and hashable and has a canonical name. `__call__` computes it at n positions; `backward` adds the
gradient of sum(grad * f) to the logits' gradients in closed form. One without `backward` is differentiated by autograd,
chunk by chunk.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keel.core.policy import Head
from keel.divergences.family import f_divergence
from keel.statistics.transforms import KeepTopP, Transform


class Positions:
    """A chunk of n positions; whatever several functionals need there is computed once.

    Args:
        token: the token chosen at each position, shape [n].
        hidden: states of each model, [n, D].
        model_heads: from states to logits, for each model.
        extra_heads: the method's own heads, by name.
        temperature: of the softmax of every model; the one that the rollout uses.
        leaf: logits of the policy to use in place of the head's, when a functional is differentiated by autograd.
    """

    def __init__(
        self,
        token: Int[Tensor, "n"],
        hidden: dict[str, Tensor],
        model_heads: dict[str, Head],
        extra_heads: dict[str, nn.Module] | None = None,
        temperature: float = 1.0,
        leaf: Tensor | None = None,
    ):
        self.token, self.hidden = token, hidden
        self.model_heads, self.extra_heads = model_heads, extra_heads or {}
        self.temperature = temperature
        self._cache: dict[Hashable, Tensor] = {} if leaf is None else {("logits", "policy", None): leaf}

    def logits(self, model: str, transform: Transform | None = None) -> Float[Tensor, "n V"]:
        """Logits at the method's temperature, then transformed."""
        if transform is not None:
            return self._once(("logits", model, transform), lambda: transform(self.logits(model)))
        return self._once(("logits", model, None), lambda: self._tempered(model))

    def _tempered(self, model: str) -> Float[Tensor, "n V"]:
        z = self.model_heads[model].logits(self.hidden[model])
        return z if self.temperature == 1.0 else z / self.temperature

    def log_z(self, model: str, transform: Transform | None = None) -> Float[Tensor, "n"]:
        """log sum exp of the logits."""
        return self._once(("log_z", model, transform), lambda: self.logits(model, transform).logsumexp(-1))

    def log_probs(self, model: str, transform: Transform | None = None) -> Float[Tensor, "n V"]:
        """Log-probabilities of the whole vocabulary."""
        return self._once(
            ("log_probs", model, transform),
            lambda: self.logits(model, transform) - self.log_z(model, transform)[:, None],
        )

    def probs(self, model: str, transform: Transform | None = None) -> Float[Tensor, "n V"]:
        """Probabilities of the whole vocabulary."""
        return self._once(("probs", model, transform), lambda: self.log_probs(model, transform).exp())

    def _once(self, key: Hashable, compute) -> Tensor:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


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
        logits = at.logits(self.of[0], self.transform)
        return logits.gather(-1, at.token[:, None])[:, 0] - at.log_z(self.of[0], self.transform)

    def backward(self, at: Positions, grad: Float[Tensor, "n"], dlogits: Float[Tensor, "n V"]) -> None:
        """Add grad ([v = y] - pi_v) to `dlogits`."""
        kept = at.logits(self.of[0], self.transform).gather(-1, at.token[:, None])[:, 0] > float("-inf")
        grad = torch.where(kept, grad, torch.zeros_like(grad)) * _scale(self.transform)
        dlogits.addcmul_(at.probs(self.of[0], self.transform), grad[:, None], value=-1)
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
        return -_plogp(at, self.of[0], self.transform).sum(-1)

    def backward(self, at: Positions, grad: Float[Tensor, "n"], dlogits: Float[Tensor, "n V"]) -> None:
        """Add -grad pi (log pi + H) to `dlogits`."""
        plogp = _plogp(at, self.of[0], self.transform)
        grad = grad[:, None] * _scale(self.transform)
        dlogits.addcmul_(plogp, grad, value=-1)
        dlogits.addcmul_(at.probs(self.of[0], self.transform), grad * plogp.sum(-1, keepdim=True))


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

    Raises:
        ValueError: an unknown kind, or the live policy in the second place.
    """

    kind: str = "kl_policy_ref"
    against: str = "ref"
    first: str = "policy"
    where: str = "mask"
    stop: tuple[str, ...] = ()
    of: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", str(f_divergence(self.kind)))
        if self.against == "policy":
            raise ValueError("the second model of a divergence is constant: put the policy first, with the kind turned")
        object.__setattr__(self, "of", (self.first, self.against))

    @property
    def name(self) -> str:
        first = "" if self.first == "policy" else f"{self.first}, "
        return f"divergence({self.kind}, {first}{self.against})"

    def __call__(self, at: Positions) -> Float[Tensor, "n"]:
        return f_divergence(self.kind).value(at.log_probs(self.first), at.log_probs(self.against))

    def backward(self, at: Positions, grad: Float[Tensor, "n"], dlogits: Float[Tensor, "n V"]) -> None:
        """Add grad dD/dz to `dlogits`; the second model is constant."""
        slope = f_divergence(self.kind).gradient(at.log_probs(self.first), at.log_probs(self.against))
        dlogits.add_((slope * grad[:, None]).to(dlogits.dtype))


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
        chosen = at.logits(self.under or self.of[0]).detach().topk(self.k, -1).indices
        return chosen.float() if self.ids else at.log_probs(self.of[0]).gather(-1, chosen)


@dataclass(frozen=True)
class Value:
    """The number that the method's head `head` reads from the states of `of[0]`, or of a body of its own.

    With the model in `stop` only the head learns.
    """

    head: str = "value"
    of: tuple[str, ...] = ("policy",)
    where: str = "mask"
    stop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"value({self.of[0]}, {self.head})"

    def __call__(self, at: Positions) -> Float[Tensor, "n"]:
        own = at.hidden.get(backbone(self.head))  # a critic with a body of its own
        value = at.extra_heads[self.head](at.hidden[self.of[0]] if own is None else own)
        return value.to(torch.promote_types(value.dtype, torch.float32))


def backbone(head: str) -> str:
    """Name under which the states of a head with a body of its own are kept."""
    return f"head:{head}"


def _name(what: str, of: tuple[str, ...], transform: Transform | None) -> str:
    parts = [name for name in of if name != "policy" or len(of) > 1]
    parts += [transform.name] if transform is not None else []
    return f"{what}({', '.join(parts)})" if parts else what


def _scale(transform: Transform | None) -> float:
    return 1.0 if transform is None else transform.scale


def _plogp(at: Positions, model: str, transform: Transform | None) -> Float[Tensor, "n V"]:
    p, log_p = at.probs(model, transform), at.log_probs(model, transform)
    return at._once(("plogp", model, transform), lambda: torch.where(p > 0, p * log_p, torch.zeros_like(p)))
