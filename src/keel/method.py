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

from keel.composition import check
from keel.core.aggregate import Aggregation
from keel.core.config import is_part, set_path
from keel.core.errors import MethodError, nearest
from keel.core.registry import part
from keel.core.rows import REPLAYED, Rows, Stream
from keel.parts.replay.stored import Replay
from keel.parts.replay.streams import Selection, prepared_apart, split
from keel.parts.rewards.transforms import WeightedSum
from keel.parts.terms.penalties import Summand
from keel.parts.terms.second import SecondSurrogate
from keel.parts.terms.surrogate import LIMIT, Surrogate
from keel.rollouts.rollout import Rollout
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats
from keel.tasks.preferences import Kind

States = dict[str, Any]
CHAINS = ("rewards", "transforms", "advantage", "heads", "masks", "weights", "terms", "models", "controllers", "replay")
part("aggregation")(Aggregation)


@part("claim")
@dataclass(frozen=True)
class Claim:
    """What a recipe means to optimise, as its paper says it.

        reward    E_pi[r] - beta D(pi, ref)
        target    -D(pi, target)
        data      -KL(data || pi)
        words     said in words alone: there is no policy to which verification could hold it

    Args:
        objective: in one line, as the paper has it.
        level: "sequence", "state" or "reference": over what the divergence is taken; per state, the visited states are
            held fixed, those that the sampler, the reference (a target, where there is one) or the data visit.
        divergence: a name that `f_divergence` reads, or None.
        beta: name of the recipe's argument that holds the coefficient, or the coefficient itself.
        form: which of the four.
        target: name of the target distribution, where the form is one.
        invariant: changes that leave every update as it is: reward_shift, reward_scale.
    """

    objective: str
    level: Literal["sequence", "state", "reference", "data"] = "sequence"
    divergence: str | None = None
    beta: str | float | None = None
    form: Literal["reward", "target", "data", "words"] = "reward"
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
        replay: groups of earlier batches, and rows of an earlier policy or of general data, beside each batch.
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
    replay: Mapping[str, Any] = field(default_factory=dict)
    claim: Claim | None = None

    def __post_init__(self) -> None:
        for slot in CHAINS:
            entries = getattr(self, slot)
            if not isinstance(entries, Mapping):
                raise MethodError("expected a dictionary of named parts", slot, "For example {'kl': Summand(...)}.")
            object.__setattr__(self, slot, dict(entries))
        check(self)

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
        """A copy with one value changed: `slot.field` or `slot.name.field`; a part at a new `slot.name` is added.

        Raises:
            ConfigError: the path leads nowhere, or the value does not fit.
        """
        slot, _, name = path.partition(".")
        if slot in CHAINS and name and "." not in name and name not in getattr(self, slot) and is_part(value):
            return self.adding(**{slot: {name: value}})
        return set_path(self, path, value)

    # -- what it needs -------------------------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[str, Any]]:
        """All parts with their paths."""
        for slot in ("transforms", "advantage", "masks", "weights", "terms", "controllers", "replay"):
            for name, item in getattr(self, slot).items():
                yield f"{slot}.{name}", item

    def owned(self) -> Iterator[tuple[str, str]]:
        """Name and path of every value that a controller sets: its `path`, or all that its `owns` lists."""
        for name, item in self.controllers.items():
            own = (item.path,) if getattr(item, "path", None) is not None else ()
            yield from ((name, path) for path in getattr(item, "owns", own))

    def prepare_needs(self) -> tuple[Functional, ...]:
        """Functionals that the transforms and advantages read, the controllers that look at a batch, and terms that
        remember one.
        """
        read = _union([*self.transforms.values(), *self.advantage.values(), *self.controllers.values()])
        observed = [f for item in self._active_terms().values() for f in getattr(item, "observes", ())]
        return tuple(dict.fromkeys([*read, *observed]))

    def update_needs(self) -> tuple[Functional, ...]:
        """Functionals that the masks, weights, surrogate and terms read."""
        surrogate = [] if self.surrogate is None else [self.surrogate]
        loss = [*self.masks.values(), *self.weights.values(), *surrogate, *self._active_terms().values()]
        return _union([*loss, *self.replay.values()])

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
        terms = [term for term in self._active_terms().values() if getattr(term, "stream", "main") == "main"]
        used = [*self.masks.values(), *self.weights.values(), *surrogate, *terms]
        return all(getattr(item, "additive", False) for item in used)

    def splits(self, rows: Rows) -> bool:
        """Whether slices of these rows add up: `additive`, and all rows share their denominators."""
        return self.additive and bool(rows.fresh.all())

    @property
    def reads(self) -> Kind | None:
        """What the terms compare in data from a file: pairs, labels or lists; None for rows that are not compared.

        Raises:
            MethodError: two terms read data of different kinds.
        """
        if self.kind not in ("pairs", "reward"):
            return None
        found = {n: t.reads for n, t in self._active_terms().items() if hasattr(t, "reads")}
        if len(set(found.values())) > 1:
            said = " and ".join(f"'{name}' reads {kind}" for name, kind in found.items())
            raise MethodError(said, "terms", "One method learns from data of one kind.")
        return next(iter(found.values()), "pairs")

    @property
    def replayed(self) -> Replay | None:
        """The part that brings rows of earlier batches back, if there is one."""
        return next((item for item in self.replay.values() if isinstance(item, Replay) and item.share > 0), None)

    @property
    def regularisers(self) -> dict[str, float]:
        """The coefficients of the terms that read the rows of a regulariser; those of 0 are left out."""
        found = {n: t.coef for n, t in self.terms.items() if getattr(t, "stream", "main") == "regulariser"}
        return {name: coef for name, coef in found.items() if coef}

    @property
    def reads_mismatched(self) -> bool:
        """Whether a term reads prompts with other prompts' completions, which then stand beside a batch of data."""
        return any(getattr(term, "reads_mismatched", False) for term in self._active_terms().values())

    @property
    def reads_gold(self) -> bool:
        """Whether a term learns a gold answer, which then stands beside each pair of the data."""
        penalties = (getattr(term, "penalty", term) for term in self._active_terms().values())
        return any(getattr(penalty, "reads_gold", False) for penalty in penalties)

    # -- the two phases ------------------------------------------------------------------------------------------

    def prepare(self, rows: Rows, stats: Stats, states: States) -> Rows:
        """Transforms, then advantages, on frozen statistics; rows of earlier batches apart from the fresh ones."""
        if bool(rows.fresh.all()):
            return self._prepared(rows, stats, states)
        return prepared_apart(rows, stats, lambda some, known: self._prepared(some, known, states))

    def _prepared(self, rows: Rows, stats: Stats, states: States) -> Rows:
        transforms = dict(self.transforms)
        if rows.reward is not None and not any(isinstance(item, WeightedSum) for item in transforms.values()):
            transforms["weighted_sum"] = WeightedSum()
        for slot, chain in (("transforms", transforms), ("advantage", self.advantage)):
            for name, item in chain.items():
                rows = _call(item, f"{slot}.{name}", rows, stats, states)
        return rows

    def contributions(
        self, rows: Rows, stats: Stats, states: States, seen: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What each part adds to the loss: "policy" for the surrogate, and the terms by name.

        The surrogate reads fresh and replayed rows, terms the fresh ones, terms of a regulariser the rows of its own.

        Args:
            seen: a dictionary that takes down what the parts said of each token, [B, T]: mask/NAME, weight/NAME, and
                term/NAME, of which the aggregation makes the contribution (-w A f(rho) for the policy, coef * P for a
                summand, 0 outside the mask to which it is confined).
        """
        learned, fresh, regular = split(rows, stats)
        out: dict[str, Tensor] = {}
        noted: dict[str, Tensor] = {}
        rows, stats = self._masked(learned.rows, learned.stats, states), learned.stats
        if self.surrogate is not None:
            out["policy"] = self._policy(rows, stats, states, noted)
        learned.note(noted, seen)
        if fresh is not learned:
            rows, stats = self._masked(fresh.rows, fresh.stats, states), fresh.stats
        noted = {f"mask/{name}": rows.masks[name] for name in self.masks}
        for name, item in self._active_terms().items():
            if getattr(item, "stream", "main") == "regulariser":
                out[name] = self._rehearsed(name, item, regular, states)
            elif isinstance(item, Summand):
                penalty = _call(item.penalty, f"terms.{name}", rows, stats, states)
                if isinstance(item.penalty, SecondSurrogate):
                    for weight in self._weighing(item.penalty.credited(rows), stats, states).values():
                        penalty = penalty * weight
                where = None if item.where is None else rows.masks[item.where]
                out[name] = item.coef * self.aggregation(penalty, rows, where, item.per or "batch")
                if seen is not None:
                    noted[f"term/{name}"] = item.coef * (penalty if where is None else penalty.where(where, 0.0))
            elif getattr(item, "reads_mismatched", False) and len(regular.rows):
                out[name] = item(rows, stats, states[f"terms.{name}"], (regular.rows, regular.stats))
            else:
                out[name] = _call(item, f"terms.{name}", rows, stats, states)
        fresh.note(noted, seen)
        return out

    def _policy(self, rows: Rows, stats: Stats, states: States, noted: dict[str, Tensor]) -> Tensor:
        """-Agg[w A f(rho)]; where rows are replayed, w and rho say who drew them."""
        assert self.surrogate is not None
        again = self.replayed if REPLAYED in rows.columns else None
        read, known = (rows, stats) if again is None else again.seen(rows, stats)
        gain = self.surrogate(read, known)
        for name, weight in self._weighing(read, known, states).items():
            noted[f"weight/{name}"] = weight
            gain = gain * weight
        if again is not None:
            noted["weight/replay"] = weight = again.weights(rows, stats)
            gain = gain * weight
        noted["term/policy"] = -gain
        return -self.aggregation(gain, rows)

    def _weighing(self, rows: Rows, stats: Stats, states: States) -> dict[str, Tensor]:
        """What each weight of the chain says of each token."""
        return {n: _call(item, f"weights.{n}", rows, stats, states).detach() for n, item in self.weights.items()}

    def _rehearsed(self, name: str, item: Any, regular: Selection, states: States) -> Tensor:
        """A term on the rows of a regulariser, which are then the main ones; 0 without any."""
        rows, stats = regular.rows, regular.stats
        if not len(rows):
            return next(iter(stats.values())).new_zeros(())
        if not isinstance(item, Summand):
            return _call(item, f"terms.{name}", rows, stats, states)
        rows = rows.with_(stream=torch.full_like(rows.stream, int(Stream.MAIN)), totals=None)
        penalty = _call(item.penalty, f"terms.{name}", rows, stats, states)
        where = None if item.where is None else rows.masks[item.where]
        return item.coef * self.aggregation(penalty, rows, where, item.per or "batch")

    def by_token(self, rows: Rows, stats: Stats, states: States) -> dict[str, Tensor]:
        """What one update does to each token, [B, T], without gradient; `contributions` names masks, weights and terms.

        Besides: `ratio`, rho at the surrogate's level; `gradient/NAME`, d contribution / d log pi(y_t), all other
        statistics held fixed, and `gradient`, their sum; `gradient/by/FUNCTIONAL`, that of the whole loss by another
        number per token, where it is not 0. With these a term that knows no tokens can be seen, too.

        Args:
            rows, stats, states: those of the update, `old` included.
        """
        shape = rows.tokens.shape
        live = [f for f in stats if "policy" in f.of and "policy" not in f.stop and stats[f].shape == shape]
        leaves = {f: stats[f].detach().requires_grad_() for f in live if stats[f].is_floating_point()}
        seen: dict[str, Tensor] = {}
        with torch.enable_grad():
            parts = self.contributions(rows, stats.merged(leaves), states, seen)
        if self.surrogate is not None:
            seen["ratio"] = self.surrogate.log_ratio(rows, stats).clamp(-LIMIT, LIMIT).exp()
        for name, value in parts.items():
            if not value.requires_grad:
                continue
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
            for f, grad in zip(leaves, found, strict=True):
                own = isinstance(f, LogProb)
                if grad is None or not (own or bool(grad.any())):
                    continue
                for key in (f"gradient/{name}", "gradient") if own else (f"gradient/by/{f.name}",):
                    seen[key] = seen[key] + grad if key in seen else grad
        return {name: value.detach().expand(shape) for name, value in seen.items()}

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
        return {n: t for n, t in self.terms.items() if getattr(t, "coef", 1.0) != 0}

    def _masked(self, rows: Rows, stats: Stats, states: States) -> Rows:
        if not self.masks:
            return rows
        masks = dict(rows.masks)
        for name, item in self.masks.items():
            masks[name] = _call(item, f"masks.{name}", rows.with_(masks=masks), stats, states)
        return rows.with_(masks=masks)


def _call(item: Any, path: str, rows: Rows, stats: Stats, states: States) -> Any:
    """A part, with its memory if it has one."""
    return item(rows, stats, states[path]) if hasattr(item, "init") else item(rows, stats)


def _union(items: list[Any]) -> tuple[Functional, ...]:
    found: dict[Functional, None] = {}
    for item in items:
        found.update(dict.fromkeys(getattr(item, "needs", ()) or ()))
    return tuple(found)
