"""A chunk of positions, at which functionals are evaluated.

Logits are held less their largest, and written over in few passes: on a CPU the passes over [n, V] are what costs.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keel.core.policy import Head
from keel.statistics.transforms import Transform
from keel.statistics.workspace import LARGE, Workspace


class Positions:
    """A chunk of n positions; whatever several functionals need there is computed once.

    Args:
        token: the token chosen at each position, shape [n].
        hidden: states of each model, [n, D].
        model_heads: from states to logits, for each model.
        extra_heads: the method's own heads, by name.
        temperature: of the softmax of every model; the one that the rollout uses.
        known: numbers [n] that an earlier pass over the same positions found; those of this one are added.
        workspace: where the tensors [n, V] come from.
        column: what the rows' columns per token hold at these positions, by name.
    """

    def __init__(
        self,
        token: Int[Tensor, "n"],
        hidden: dict[str, Tensor],
        model_heads: dict[str, Head],
        extra_heads: dict[str, nn.Module] | None = None,
        temperature: float = 1.0,
        known: dict[Hashable, Any] | None = None,
        workspace: Workspace | None = None,
        column: Callable[[str], Tensor] | None = None,
    ):
        self.token, self.hidden = token, hidden
        self.model_heads, self.extra_heads = model_heads, extra_heads or {}
        self.temperature = temperature
        self.column = _no_column if column is None else column
        self.known = {} if known is None else known
        self.workspace = Workspace() if workspace is None else workspace
        self.differentiable = False
        self._cache: dict[Hashable, Tensor] = {}
        self._along: dict[tuple[str, Transform | None], Tensor] = {}

    def with_leaf(self, leaf: Float[Tensor, "n V"]) -> "Positions":
        """The same positions as functions of the policy's logits, for autograd; other models stay constant."""
        again = Positions(
            self.token, self.hidden, self.model_heads, self.extra_heads, self.temperature, column=self.column
        )
        again.differentiable = True
        again.known = {key: value for key, value in self.known.items() if key[1] != "policy"}  # type: ignore[index]
        again._cache = {key: value for key, value in self._cache.items() if key[1] != "policy"}  # type: ignore[index]
        again._cache["logits", "policy", None] = leaf
        return again

    # -- of one model --------------------------------------------------------------------------------------------

    def logits(self, model: str, transform: Transform | None = None) -> Float[Tensor, "n V"]:
        """Logits at the method's temperature, then transformed."""
        if ("logits", model, None) in self._cache and transform is None:
            return self._cache["logits", model, None]
        z = self.centred(model) + self.shift(model)[:, None]
        return z if transform is None else transform(z)

    def shift(self, model: str, transform: Transform | None = None) -> Float[Tensor, "n"]:
        """The largest logit, held constant."""
        self.centred(model, transform)
        return self.known["shift", model, transform]

    def centred(self, model: str, transform: Transform | None = None) -> Float[Tensor, "n V"]:
        """Logits less the largest."""
        return self._once(("centred", model, transform), lambda: self._centred(model, transform))

    def _centred(self, model: str, transform: Transform | None) -> Float[Tensor, "n V"]:
        own = not self.differentiable
        if transform is not None:
            z = transform(self.logits(model))
        elif self.differentiable and ("logits", model, None) in self._cache:
            z = self._cache["logits", model, None]
        else:
            with torch.no_grad():
                z = self._tempered(model)
        shift = self.row(("shift", model, transform), lambda: z.detach().amax(-1))[:, None]
        return z.sub_(shift) if own else z - shift

    def _tempered(self, model: str) -> Float[Tensor, "n V"]:
        """Logits in memory of their own."""
        head, hidden = self.model_heads[model], self.hidden[model]
        if head.writes(hidden):
            z = self.take(len(hidden), head.vocabulary, hidden.dtype, hidden.device)
            head.write(hidden, z)
        else:
            z = head.logits(hidden)
            z = z.clone() if z.data_ptr() == hidden.data_ptr() else z
        return z if self.temperature == 1.0 else z.div_(self.temperature)

    def mass(self, model: str, transform: Transform | None = None) -> Float[Tensor, "n"]:
        """Sum of the exponentials of the centred logits, at least 1; in fp64, so that log-ratios near 0 are exact."""
        return self.row(("mass", model, transform), lambda: _precise_sum(self._exp(model, transform)))

    def log_mass(self, model: str, transform: Transform | None = None) -> Float[Tensor, "n"]:
        """Its logarithm, in the type of the logits."""
        return self.mass(model, transform).log().to(self.centred(model, transform).dtype)

    def _exp(self, model: str, transform: Transform | None) -> Float[Tensor, "n V"]:
        key = ("exp", model, transform)
        if self.differentiable:
            return self._once(key, lambda: self.centred(model, transform).exp())
        z = self.centred(model, transform)
        return self._once(key, lambda: torch.exp(z, out=self.take_like(z)))

    def log_z(self, model: str, transform: Transform | None = None) -> Float[Tensor, "n"]:
        """log sum exp of the logits."""
        return self.shift(model, transform) + self.log_mass(model, transform)

    def log_probs(self, model: str, transform: Transform | None = None) -> Float[Tensor, "n V"]:
        """Log-probabilities of the whole vocabulary."""
        return self._once(
            ("log_probs", model, transform),
            lambda: self.centred(model, transform) - self.log_mass(model, transform)[:, None],
        )

    def log_probs_of(self, ids: Int[Tensor, "n k"], model: str, transform: Transform | None = None) -> Tensor:
        """Log-probabilities of some tokens, [n, k]."""
        return self.centred(model, transform).gather(-1, ids) - self.log_mass(model, transform)[:, None]

    def probs(self, model: str, transform: Transform | None = None) -> Float[Tensor, "n V"]:
        """Probabilities of the whole vocabulary."""
        key = ("probs", model, transform)
        if key not in self._cache:
            mass, exp = self.mass(model, transform)[:, None], self._exp(model, transform)
            self._cache[key] = exp / mass.to(exp.dtype) if self.differentiable else exp.div_(mass.to(exp.dtype))
            del self._cache["exp", model, transform]
        return self._cache[key]

    # -- of two ----------------------------------------------------------------------------------------------------

    def log_ratio(
        self, first: str, second: str, own: Transform | None = None, other: Transform | None = None
    ) -> Float[Tensor, "n V"]:
        """log p - log q, each transformed, for its reader to write over and give back; nan where neither has mass."""
        z, against = self.centred(first, own), self.centred(second, other)
        mass, total = self.mass(first, own), self.mass(second, other)
        between = torch.log1p((mass - total) / total)  # log(mass / total): exactly 0 for equal models
        return torch.sub(z, against, out=self.take_like(z)).sub_(between[:, None].to(z.dtype))

    # -- gradients along the probabilities -----------------------------------------------------------------------

    def add_along(self, model: str, transform: Transform | None, factor: Float[Tensor, "n"]) -> None:
        """Add factor * p to the gradient of the logits: later, so that p is read but once."""
        known = self._along.get((model, transform))
        self._along[model, transform] = factor if known is None else known + factor

    def settle(self, dlogits: Float[Tensor, "n V"]) -> None:
        """Add what `add_along` collected."""
        for (model, transform), factor in self._along.items():
            dlogits.addcmul_(self.probs(model, transform), factor[:, None])
        self._along.clear()

    # -- memory ----------------------------------------------------------------------------------------------------

    def take(self, n: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "n V"]:
        """A tensor of arbitrary content, until it is given back or all are."""
        return self.workspace.take(n, vocabulary, dtype, device)

    def take_like(self, like: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """One of the same shape and type."""
        return self.take(like.shape[0], like.shape[1], like.dtype, like.device)

    def give(self, tensor: Float[Tensor, "n V"]) -> None:
        """Give a tensor back."""
        self.workspace.give(tensor)

    def close(self) -> None:
        """Give everything back; only `known` stays."""
        self._cache.clear()
        self.workspace.give_all()

    def row(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """A number of each position, or a fact about all, found once in both passes."""
        if key not in self.known:
            self.known[key] = compute()
        return self.known[key]

    def _once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


def _no_column(name: str) -> Tensor:
    raise KeyError(f"these positions belong to no rows, so they have no column '{name}'")


def _precise_sum(numbers: Float[Tensor, "n V"]) -> Float[Tensor, "n"]:
    """Sum over the vocabulary in fp64, part by part, so that no copy of all is made."""
    precise = torch.float32 if numbers.device.type == "mps" else torch.float64
    width = max(1, LARGE // max(1, len(numbers)))
    return torch.stack([part.sum(-1, dtype=precise) for part in numbers.split(width, -1)]).sum(0)
