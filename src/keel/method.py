"""A method: a few small parts in named slots.

    loss = Agg[ - sg(w) * A * f(rho)  +  sum_j c_j * m_j * P_j ]

`prepare` (once a batch) runs the transforms and the advantages on frozen statistics; `loss` (each update) runs the
masks, weights, surrogate and terms on live ones.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from keel.core.aggregate import Aggregation
from keel.core.config import get_path, set_path
from keel.core.errors import MethodError, nearest
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.rewards.transforms import WeightedSum
from keel.parts.terms.penalties import Summand
from keel.parts.terms.surrogate import Surrogate
from keel.rollouts.rollout import Rollout
from keel.statistics.functionals import Functional
from keel.statistics.stats import Stats

States = dict[str, Any]
CHAINS = ("rewards", "transforms", "advantage", "heads", "masks", "weights", "terms", "models", "controllers")
ALWAYS = ("policy", "old")
DATA_MASKS = ("nll", "distil")  # spans that rows from a file may bring along
part("aggregation")(Aggregation)


@part("claim")
@dataclass(frozen=True)
class Claim:
    """What a recipe means to optimise, as its paper says it.

        reward    E_pi[r] - beta D(pi, ref)
        target    -D(pi, target)
        data      -KL(data || pi)

    Args:
        objective: in one line, as the paper has it.
        level: "sequence" or "state": over what the divergence is taken; per state, the visited states are held fixed.
        divergence: a name that `f_divergence` reads, or None.
        beta: name of the recipe's argument that holds the coefficient.
        form: which of the three.
        target: name of the target distribution, where the form is one.
        invariant: changes that leave every update as it is: reward_shift, reward_scale.
    """

    objective: str
    level: Literal["sequence", "state"] = "sequence"
    divergence: str | None = None
    beta: str | None = None
    form: Literal["reward", "target", "data"] = "reward"
    target: str | None = None
    invariant: tuple[str, ...] = ()


@part("method")
@dataclass(frozen=True)
class Method:
    """A composition; `replacing`, `adding` and `set` make variants.

    Args:
        kind: online, supervised, pairs, reward, distillation or sampling: where the rows come from.
        rollout: how completions are drawn; None for rows from a file.
        rewards, transforms, advantage, masks, weights, terms: the slots, ordered dictionaries of named parts.
        heads: extra parameters by name.
        surrogate: the policy term; None for none.
        aggregation: how a loss per token becomes a number.
        models: further models by name; "policy" and "old" always exist.
        controllers: parts that own values of the method.
        claim: the objective that the recipe means.

    Raises:
        MethodError: a part names a model, mask or head that is not declared, or parts exclude each other.
    """

    kind: str = "online"
    rollout: Rollout | None = None
    rewards: Mapping[str, Any] = field(default_factory=dict)
    transforms: Mapping[str, Any] = field(default_factory=dict)
    advantage: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, Any] = field(default_factory=dict)
    surrogate: Surrogate | None = None
    aggregation: Aggregation = Aggregation()
    masks: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)
    terms: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Any] = field(default_factory=dict)
    controllers: Mapping[str, Any] = field(default_factory=dict)
    claim: Claim | None = None

    def __post_init__(self) -> None:
        for slot in CHAINS:
            entries = getattr(self, slot)
            if not isinstance(entries, Mapping):
                raise MethodError("expected a dictionary of named parts", slot, "For example {'kl': Summand(...)}.")
            object.__setattr__(self, slot, dict(entries))
        self._check_models()
        self._check_masks_and_heads()
        self._check_phases()
        self._check_controllers()

    # -- variants ------------------------------------------------------------------------------------------------

    def replacing(self, **slots: Any) -> "Method":
        """A copy with whole slots replaced."""
        known = [f.name for f in fields(self)]
        for name in slots:
            if name not in known:
                raise MethodError(f"there is no slot '{name}'.{nearest(name, known)}")
        return replace(self, **slots)

    def adding(self, **slots: Mapping[str, Any]) -> "Method":
        """A copy with parts added to slots.

        Raises:
            MethodError: a name is taken within its slot.
        """
        changes: dict[str, Any] = {}
        for slot, entries in slots.items():
            if slot not in CHAINS:
                raise MethodError(f"parts cannot be added to '{slot}'.{nearest(slot, CHAINS)}")
            twice = set(entries) & set(getattr(self, slot))
            if twice:
                raise MethodError(
                    f"slot '{slot}' has a part named '{sorted(twice)[0]}' already",
                    None,
                    "Give it another name, or use replacing().",
                )
            changes[slot] = {**getattr(self, slot), **entries}
        return replace(self, **changes)

    def set(self, path: str, value: Any) -> "Method":
        """A copy with one value changed: `slot.field` or `slot.name.field`.

        Raises:
            ConfigError: the path leads nowhere, or the value does not fit.
        """
        return set_path(self, path, value)

    # -- what it needs -------------------------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[str, Any]]:
        """All parts with their paths."""
        for slot in ("transforms", "advantage", "masks", "weights", "terms", "controllers"):
            for name, item in getattr(self, slot).items():
                yield f"{slot}.{name}", item

    def prepare_needs(self) -> tuple[Functional, ...]:
        """Functionals that the transforms and advantages read, and the controllers that look at a batch."""
        return _union([*self.transforms.values(), *self.advantage.values(), *self.controllers.values()])

    def update_needs(self) -> tuple[Functional, ...]:
        """Functionals that the masks, weights, surrogate and terms read."""
        surrogate = [] if self.surrogate is None else [self.surrogate]
        return _union([*self.masks.values(), *self.weights.values(), *surrogate, *self._active_terms().values()])

    def live_needs(self) -> tuple[Functional, ...]:
        """Those of the update that name the live policy."""
        return tuple(f for f in self.update_needs() if "policy" in f.of)

    def frozen_needs(self, several_updates: bool) -> tuple[Functional, ...]:
        """What `prepare` measures once a batch.

        The policy that sampled is measured only if `prepare` reads it, or if several updates follow; otherwise it is
        the detached live value.
        """
        prepare = self.prepare_needs()
        frozen = [f for f in self.update_needs() if "policy" not in f.of]
        late = [f for f in frozen if several_updates or f in prepare or f.of != ("old",)]
        return tuple(dict.fromkeys([*prepare, *late]))

    @property
    def additive(self) -> bool:
        """Whether the losses of slices add up to that of the batch, given its denominators."""
        surrogate = [] if self.surrogate is None else [self.surrogate]
        used = [*self.masks.values(), *self.weights.values(), *surrogate, *self._active_terms().values()]
        return all(getattr(item, "additive", False) for item in used)

    # -- the two phases ------------------------------------------------------------------------------------------

    def prepare(self, rows: Rows, stats: Stats, states: States) -> Rows:
        """Transforms, then advantages, on frozen statistics."""
        transforms = dict(self.transforms)
        if not any(isinstance(item, WeightedSum) for item in transforms.values()):
            transforms["weighted_sum"] = WeightedSum()
        for slot, chain in (("transforms", transforms), ("advantage", self.advantage)):
            for name, item in chain.items():
                rows = _call(item, f"{slot}.{name}", rows, stats, states)
        return rows

    def contributions(self, rows: Rows, stats: Stats, states: States) -> dict[str, Tensor]:
        """What each part adds to the loss: "policy" for the surrogate, and the terms by name."""
        rows = self._masked(rows, stats, states)
        out: dict[str, Tensor] = {}
        if self.surrogate is not None:
            gain = self.surrogate(rows, stats)
            for name, item in self.weights.items():
                gain = gain * _call(item, f"weights.{name}", rows, stats, states).detach()
            out["policy"] = -self.aggregation(gain, rows)
        for name, item in self._active_terms().items():
            if isinstance(item, Summand):
                penalty = _call(item.penalty, f"terms.{name}", rows, stats, states)
                where = None if item.where is None else rows.masks[item.where]
                out[name] = item.coef * self.aggregation(penalty, rows, where, item.per or "batch")
            else:
                out[name] = _call(item, f"terms.{name}", rows, stats, states)
        return out

    def loss(self, rows: Rows, stats: Stats, states: States) -> Tensor:
        """The scalar to minimise."""
        found = list(self.contributions(rows, stats, states).values())
        return torch.stack(found).sum() if found else torch.zeros((), device=rows.device)

    def with_old(self, stats: Stats) -> Stats:
        """Statistics in which what `old` lacks is the detached live value: the policy has not moved yet."""
        missing = {
            f: stats[replace(f, of=("policy",))].detach()  # type: ignore[type-var]
            for f in self.update_needs()
            if f.of == ("old",) and f not in stats
        }
        return stats.merged(missing)

    def initial_states(self) -> States:
        """The memory of every part that has some, by path."""
        states = {path: item.init() for path, item in self.parts() if hasattr(item, "init")}
        for name, item in self.terms.items():
            if isinstance(item, Summand) and hasattr(item.penalty, "init"):
                states[f"terms.{name}"] = item.penalty.init()
        return states

    # -- checks --------------------------------------------------------------------------------------------------

    def _active_terms(self) -> dict[str, Any]:
        return {n: t for n, t in self.terms.items() if not (isinstance(t, Summand) and t.coef == 0)}

    def _masked(self, rows: Rows, stats: Stats, states: States) -> Rows:
        if not self.masks:
            return rows
        masks = dict(rows.masks)
        for name, item in self.masks.items():
            masks[name] = _call(item, f"masks.{name}", rows.with_(masks=masks), stats, states)
        return rows.with_(masks=masks)

    def _check_models(self) -> None:
        known = (*ALWAYS, *self.models)
        for path, item in [*self.parts(), ("surrogate", self.surrogate)]:
            for functional in getattr(item, "needs", ()) or ():
                for name in functional.of:
                    if name not in known:
                        raise MethodError(
                            f"{functional.name} reads the model '{name}', which is not declared.{nearest(name, known)}",
                            path,
                            f"Add it: models={{'{name}': Initial()}}.",
                        )
        for name in self.models:
            if name in ALWAYS:
                raise MethodError(f"the name '{name}' is Keel's own and cannot be declared", f"models.{name}")

    def _check_masks_and_heads(self) -> None:
        for name, item in self.terms.items():
            where = item.where if isinstance(item, Summand) else None
            if where is not None and where not in (*self.masks, *DATA_MASKS):
                raise MethodError(f"there is no mask '{where}'.{nearest(where, self.masks)}", f"terms.{name}.where")
        for path, item in self.parts():
            for head in getattr(item, "heads_read", ()):
                if head not in self.heads:
                    raise MethodError(
                        f"there is no head '{head}'.{nearest(head, self.heads)}",
                        path,
                        f"Add it: heads={{'{head}': Critic()}}.",
                    )

    def _check_phases(self) -> None:
        for path, item in self.parts():
            slot = path.split(".")[0]
            if slot not in ("transforms", "advantage"):
                continue
            for functional in getattr(item, "needs", ()):
                if "policy" in functional.of:
                    what = f"{functional.name} reads the live policy, but this part runs before the update"
                    fix = "Read of=('old',) there, or make it a weight, a mask or a term."
                    raise MethodError(what, path, fix)
        if self.surrogate is not None and not self.advantage and self.kind == "online":
            raise MethodError(
                "a surrogate needs an advantage, but the chain is empty",
                "advantage",
                "Add one, such as {'centre': GroupCentre()}.",
            )
        if self.kind == "online" and self.rollout is None:
            raise MethodError("an online method needs a rollout", "rollout", "Give rollout=Rollout().")

    def _check_controllers(self) -> None:
        owned: dict[str, str] = {}
        for name, item in self.controllers.items():
            path = getattr(item, "path", None)
            if path is None:
                continue
            if path in owned:
                both = f"'{owned[path]}' and '{name}'"
                raise MethodError(f"'{path}' is owned by the controllers {both}", f"controllers.{name}")
            owned[path] = name
            try:
                get_path(self, path)
            except (KeyError, AttributeError):
                what = f"it owns '{path}', which the method does not have"
                raise MethodError(what, f"controllers.{name}.path") from None


def _call(item: Any, path: str, rows: Rows, stats: Stats, states: States) -> Any:
    """A part, with its memory if it has one."""
    return item(rows, stats, states[path]) if hasattr(item, "init") else item(rows, stats)


def _union(items: list[Any]) -> tuple[Functional, ...]:
    found: dict[Functional, None] = {}
    for item in items:
        found.update(dict.fromkeys(getattr(item, "needs", ()) or ()))
    return tuple(found)
