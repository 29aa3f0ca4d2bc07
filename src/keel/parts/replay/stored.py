"""Replay: groups of earlier batches take part in the policy term again, weighted for who drew them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.aggregate import Groups, ratio, token_weight, weighted_mean
from keel.core.choice import counter_seed, uniforms
from keel.core.registry import part
from keel.core.rows import REPLAYED, Rows, Stream
from keel.parts.replay.memory import from_tensors, joined, to_tensors
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

LIMIT = 20.0  # log-ratios beyond +-20 are cut before exp
OLD = LogProb(of=("old",))
Weighting = Literal["token", "truncated", "sequence", "sequence_mean", "none"]
Kept = Literal["all", "mixed", "best"]
Memory = dict[str, Any]


@part("replay")
@dataclass(frozen=True)
class Replay:
    """Whole groups of earlier batches, with their rewards and the log-probabilities under which they were drawn.

        loss = Agg[ -sg(w) A f(rho) ]   over the fresh and the replayed rows together

        weighting        w of a replayed row, l_t = log old - log behaviour     rho of a replayed row
        token            1                                                      pi / behaviour
        truncated        min(exp l_t, cap)                                      pi / old
        sequence         exp sum_t l_t                                          pi / old
        sequence_mean    exp mean_t l_t                                         pi / old
        none             1                                                      pi / old

    `behaviour` is who drew the row, `old` the policy when this batch was prepared. With token a clip counts from the
    policy that drew the row, and silences what has moved too far since. Otherwise it counts from `old`, as for fresh
    rows, and w carries what lies between; where the two are one policy w and rho are exactly 1. `sequence` alone is
    unbiased for rewards of whole sequences. Other weights of the method for what the sampler did differently see no
    gap on replayed rows, so that nothing is corrected twice.

    Transforms and advantages treat replayed groups apart, each with its own rewards; terms read the fresh rows alone.
    Stored rows never change; a use is counted beside them. Those with the highest

        version - decay * uses + noise * (normal number)

    are drawn, `version` being the batch in which a group was drawn first.

    Args:
        share: of the groups of a batch, in [0, 1); they come on top of the fresh ones. 0 is no replay.
        capacity: groups kept; those of the lowest priority go first.
        weighting: one of the five.
        cap: of `truncated`.
        normalise: divide the weights by their mean over the replayed tokens (rows, for the weights of sequences).
        max_lag: batches after which a group is dropped; None is never.
        max_uses: uses after which a group is dropped; None is never.
        decay: what a use costs, in batches.
        noise: standard deviation of the priority, in batches.
        keep: all groups, those whose rewards differ (mixed), or the half of these that differs most (best).

    Raises:
        ValueError: share outside [0, 1), an unknown weighting or choice of groups, a cap, capacity, lag or number of
            uses that is not positive, a negative decay or noise, or `normalise` without weights.

    Source: decoupled proximal and behaviour policies as in "Batch size-invariance for policy optimization", 2021;
    truncation as in "Sample Efficient Actor-Critic with Experience Replay", 2017.
    """

    share: float = 0.25
    capacity: int = 256
    weighting: Weighting = "truncated"
    cap: float = 2.0
    normalise: bool = False
    max_lag: int | None = 16
    max_uses: int | None = 2
    decay: float = 1.0
    noise: float = 0.0
    keep: Kept = "mixed"

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share must be in [0, 1), not {self.share}")
        for name, known in (("weighting", get_args(Weighting)), ("keep", get_args(Kept))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} '{getattr(self, name)}' is not one of {', '.join(known)}")
        if not self.cap > 0:
            raise ValueError(f"cap must be positive, not {self.cap}")
        for name in ("capacity", "max_lag", "max_uses"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.decay < 0 or self.noise < 0:
            raise ValueError("decay and noise must not be negative")
        if self.normalise and self.weighting in ("token", "none"):
            raise ValueError(f"weighting '{self.weighting}' has no weights to normalise")

    @property
    def needs(self) -> tuple[LogProb, ...]:
        """The policy when the batch was prepared, by which replayed rows are weighed."""
        return (OLD,) if self.share > 0 else ()

    # -- what the loss reads -------------------------------------------------------------------------------------

    def seen(self, rows: Rows, stats: Stats) -> tuple[Rows, Stats]:
        """Rows and statistics for the surrogate and the weights: `old` and `behaviour` agree on replayed rows."""
        old = stats[OLD]
        behaviour = torch.where(rows.mask, rows.logp["behaviour"], old.detach()).to(old)
        behaviour = torch.where(behaviour.isnan(), old.detach(), behaviour)
        again = replayed(rows)[:, None]
        if self.weighting == "token":
            return rows, stats.merged({OLD: torch.where(again, behaviour, old)})
        drawn = torch.where(again, old.detach(), rows.logp["behaviour"].to(old))
        return rows.with_(logp={**rows.logp, "behaviour": drawn}), stats

    def weights(self, rows: Rows, stats: Stats) -> Float[Tensor, "B T"]:
        """w, without gradient; 1 on fresh rows and off the mask."""
        again = replayed(rows)
        found = torch.ones_like(stats[OLD])
        if self.weighting not in ("token", "none"):
            found = importance(log_ratio(rows, stats[OLD]), rows, self.weighting, self.cap)
            if self.normalise:
                found = found / self._mean(found, rows, again)
        return torch.where(again[:, None] & rows.mask, found, torch.ones_like(found)).detach()

    def metrics(self, rows: Rows, stats: Stats) -> dict[str, Tensor]:
        """`replay/ess`: (sum w)^2 / (n sum w^2) over what is replayed, w of the live policy; nothing without such rows.

        Where there are no weights, those of tokens are looked at.
        """
        again = replayed(rows)
        live = stats.get(LogProb(), stats.get(OLD))
        if live is None or not bool(again.any()):
            return {}
        kind = "token" if self.weighting == "none" else self.weighting
        found = importance(log_ratio(rows, live.detach()), rows, kind, self.cap)
        return {"replay/ess": self._ess(found, rows, again)}

    def _mean(self, found: Float[Tensor, "B T"], rows: Rows, again: Bool[Tensor, "B"]) -> Float[Tensor, ""]:
        counted, values = self._counted(found, rows, again)
        return weighted_mean(values, counted)

    def _ess(self, found: Float[Tensor, "B T"], rows: Rows, again: Bool[Tensor, "B"]) -> Float[Tensor, ""]:
        counted, values = self._counted(found, rows, again)
        return ratio(weighted_mean(values, counted).square(), weighted_mean(values.square(), counted))

    def _counted(self, found: Float[Tensor, "B T"], rows: Rows, again: Bool[Tensor, "B"]) -> tuple[Tensor, Tensor]:
        """How often each weight counts, and the weights: of rows for sequences, else of tokens."""
        main = again & rows.main
        if self.weighting in ("sequence", "sequence_mean"):
            return rows.weight * main, found[:, 0] if found.shape[1] else found.sum(1)
        return (token_weight(rows) * main[:, None]).flatten(), found.flatten()

    # -- the memory ----------------------------------------------------------------------------------------------

    def init(self) -> Memory:
        """Empty: no rows, and for each group `version`, `uses` and `first`, the id of its first row."""
        nothing = torch.zeros(0, dtype=torch.long)
        return {"version": nothing, "uses": nothing, "first": nothing}

    def count(self, fresh: int, step: int) -> int:
        """Groups to replay beside `fresh` ones in a batch, so that over the batches they are `share` of all."""
        each = fresh * self.share / (1 - self.share)
        return int((step + 1) * each + 1e-9) - int(step * each + 1e-9)

    def draw(self, memory: Memory, count: int, step: int, seed: int) -> Int[Tensor, "n"]:
        """The groups of the memory that this batch replays, the best first."""
        usable = self.usable(memory, step)
        score = self.priority(memory)
        if self.noise > 0:
            chance = uniforms(memory["first"], counter_seed(seed, "replay", step) >> 1)
            score = score + self.noise * torch.erfinv((2 * chance - 1).clamp(-1 + 1e-15, 1 - 1e-15)) * 2**0.5
        order = _by_score(score, memory["first"])
        return order[usable[order]][:count]

    def rows_of(self, memory: Memory, groups: Int[Tensor, "n"]) -> Rows | None:
        """Those rows, marked as replayed; group i of them is the i-th that was drawn. None without any."""
        stored = from_tensors(memory)
        if stored is None or not len(groups):
            return None
        place = torch.full((size(memory),), -1)
        place[groups] = torch.arange(len(groups))
        chosen = stored.select(place[stored.group] >= 0)
        chosen = chosen.select(place[chosen.group].argsort(stable=True))
        mark = torch.ones(len(chosen), dtype=torch.bool)
        return chosen.with_(group=place[chosen.group], columns={**chosen.columns, REPLAYED: mark}).trim()

    def after(self, memory: Memory, used: Int[Tensor, "n"], rows: Rows, step: int) -> tuple[Memory, int]:
        """The memory after batch `step`, and how many groups have left it: uses counted, old ones out, new ones in.

        Args:
            used: groups that the batch has replayed.
            rows: its fresh rows as they were scored, before transforms and advantages.
        """
        uses = memory["uses"].clone()
        uses[used] += 1
        memory = {**memory, "uses": uses}
        young = self._chosen(memory, self.usable(memory, step + 1).nonzero().flatten())
        more = self._with(young, rows, step)
        kept = self._chosen(more, _by_score(self.priority(more), more["first"])[: self.capacity].sort().values)
        return kept, size(memory) - size(young) + size(more) - size(kept)

    def usable(self, memory: Memory, step: int) -> Bool[Tensor, "M"]:
        """Neither too old at batch `step` nor used up."""
        fits = torch.ones(size(memory), dtype=torch.bool)
        if self.max_lag is not None:
            fits &= memory["version"] >= step - self.max_lag
        return fits if self.max_uses is None else fits & (memory["uses"] < self.max_uses)

    def priority(self, memory: Memory) -> Float[Tensor, "M"]:
        """version - decay * uses."""
        return memory["version"].double() - self.decay * memory["uses"].double()

    def _chosen(self, memory: Memory, groups: Int[Tensor, "n"]) -> Memory:
        rows = from_tensors(memory)
        out = {name: memory[name][groups] for name in ("version", "uses", "first")}
        if rows is None or not len(groups):
            return out
        place = torch.full((size(memory),), -1)
        place[groups] = torch.arange(len(groups))
        rows = rows.with_(group=place[rows.group])
        return out | to_tensors(rows.select(rows.group >= 0).trim())

    def _with(self, memory: Memory, rows: Rows, step: int) -> Memory:
        rows = rows.to("cpu")
        worth = self.worth_keeping(rows)
        rows = rows.select(worth[rows.group.unique(return_inverse=True)[1]])
        rows = rows.select((rows.stream == int(Stream.MAIN)) | (rows.stream == int(Stream.BASELINE)))
        if not len(rows):
            return memory
        ids, index = rows.group.unique(return_inverse=True)
        known, before = from_tensors(memory), size(memory)
        first = torch.full_like(ids, torch.iinfo(torch.long).max).scatter_reduce(0, index, rows.row, "amin")
        rows = rows.with_(group=index + before)
        facts = {"version": torch.full_like(ids, step), "uses": torch.zeros_like(ids), "first": first}
        out = {name: torch.cat([memory[name], value]) for name, value in facts.items()}
        return out | to_tensors(rows if known is None else joined([known, rows]))

    def worth_keeping(self, rows: Rows) -> Bool[Tensor, "N"]:
        """Which groups of a batch are kept, in the order of their ids."""
        assert rows.reward is not None
        total = torch.nansum(rows.reward, 1)
        groups = Groups.of(rows, ~rows.reward.isnan().all(1))
        some = groups.sum(groups.weight) > 0
        if self.keep == "all":
            return some
        mixed = some & ~groups.tied(total)
        if self.keep == "mixed" or not bool(mixed.any()):
            return mixed
        spread = groups.std(total)
        return mixed & (spread >= spread[mixed].median())


def replayed(rows: Rows) -> Bool[Tensor, "B"]:
    """Rows of earlier batches."""
    return rows.columns[REPLAYED] if REPLAYED in rows.columns else torch.zeros_like(rows.main)


def log_ratio(rows: Rows, log_prob: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """log_prob - behaviour on the mask, 0 off it and where nobody recorded a number."""
    gap = torch.nan_to_num(log_prob - rows.logp["behaviour"].to(log_prob), nan=0.0)
    return torch.where(rows.mask, gap, torch.zeros_like(gap))


def importance(log_ratios: Float[Tensor, "B T"], rows: Rows, weighting: str, cap: float = 1.0) -> Float[Tensor, "B T"]:
    """w of each token; see `Replay`.

    Args:
        log_ratios: log of policy over behaviour, 0 off the mask.
        weighting: token, truncated, sequence, sequence_mean or none.
        cap: of truncated.
    """
    if weighting == "none":
        return torch.ones_like(log_ratios)
    if weighting in ("sequence", "sequence_mean"):
        total = log_ratios.sum(1, keepdim=True)
        mean = total if weighting == "sequence" else ratio(total, rows.lengths[:, None])
        return mean.clamp(-LIMIT, LIMIT).exp().expand_as(log_ratios)
    found = log_ratios.clamp(-LIMIT, LIMIT).exp()
    return found.clamp(max=cap) if weighting == "truncated" else found


def _by_score(score: Float[Tensor, "M"], first: Int[Tensor, "M"]) -> Int[Tensor, "M"]:
    """Highest first; ties in the order of row ids, which do not depend on where a group stands."""
    order = first.argsort()
    return order[score[order].argsort(descending=True, stable=True)]


def size(memory: Mapping[str, Any]) -> int:
    """Groups in a memory."""
    return len(memory["version"])
