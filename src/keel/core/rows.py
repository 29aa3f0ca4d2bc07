"""Rows: what every method reads, sampled, enumerated or read from a file.

Dimension letters: B rows, G group, T completion tokens (right-padded), P prompt tokens (left-padded), V vocabulary,
K reward components, N pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

REPLAYED = "replayed"  # column: whether a row is one of an earlier batch


class Stop(IntEnum):
    """Why a completion ended."""

    EOS = 0  # the model chose its end token
    STOP_STRING = 1  # a stop string appeared
    LENGTH = 2  # the length limit cut it off
    ENVIRONMENT = 3  # the environment ended the episode
    DATA = 4  # it was read from a file


class Stream(IntEnum):
    """What a row is for."""

    MAIN = 0  # counted in group statistics and in the loss
    BASELINE = 1  # belongs to the group (a greedy completion, say), never to the loss
    REGULARISER = 2  # rows of one regulariser only
    CANDIDATE = 3  # beside the batch: in no statistic and no loss, until a part takes it in


@dataclass(frozen=True, eq=False)
class Pairs:
    """Preferences over rows.

    Args:
        chosen, rejected: row indices, shape [N].
        measure: weight of a pair, counted in the denominator, shape [N].
        coef: factor of a pair, not counted in the denominator, shape [N].
        label: probability that `chosen` is really preferred, shape [N].
        offset: margin of a pair, shape [N].
    """

    chosen: Int[Tensor, "N"]
    rejected: Int[Tensor, "N"]
    measure: Float[Tensor, "N"]
    coef: Float[Tensor, "N"]
    label: Float[Tensor, "N"]
    offset: Float[Tensor, "N"]


@dataclass(frozen=True)
class Totals:
    """Denominators of a whole optimiser step, for losses computed on a slice of it.

    Args:
        tokens: weighted count of counted tokens.
        sequences: weighted count of counted rows with at least one counted token.
        rows: weighted count of counted rows, empty ones included.
        pairs: measure of all pairs.
    """

    tokens: float
    sequences: float
    rows: float
    pairs: float = 0.0


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch of prompts and completions with all that is known about them; see the module for the letters.

    `mask` is True on tokens that a model chose, EOS included, and False on tool output and padding. `weight` is 1 for
    samples and pi(y) for enumerated rows (then `exact` is True). `row` is unique in a run and seeds the randomness of a
    row. `logp` holds recorded numbers only; computed ones live in the statistics. `columns` is whatever else a part
    leaves for another, [B] or per token; `features` is the same for vectors of whole rows, which have no tokens to cut.
    """

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    tokens: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    stop: Int[Tensor, "B"]
    row: Int[Tensor, "B"]
    group: Int[Tensor, "B"]
    domain: Int[Tensor, "B"]
    data_index: Int[Tensor, "B"]
    stream: Int[Tensor, "B"]
    weight: Float[Tensor, "B"]
    mult: Int[Tensor, "B T"]
    owner: Bool[Tensor, "B T"]
    exact: bool = False
    inputs: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Bool[Tensor, "B T"]] = field(default_factory=dict)
    reward: Float[Tensor, "B K"] | None = None
    token_reward: Float[Tensor, "B T"] | None = None
    label: Float[Tensor, "B"] | None = None
    advantage: Float[Tensor, "B T"] | Float[Tensor, "B T K"] | None = None
    logp: dict[str, Float[Tensor, "B T"]] = field(default_factory=dict)
    segment: Int[Tensor, "B T"] | None = None
    pairs: Pairs | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, Float[Tensor, "B _"]] = field(default_factory=dict)
    totals: Totals | None = None

    @staticmethod
    def build(
        prompt_ids: Int[Tensor, "B P"],
        prompt_mask: Bool[Tensor, "B P"],
        tokens: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        **known,
    ) -> "Rows":
        """Rows from tokens and masks; what is not given takes its neutral value (weight 1, one group a row, ...)."""
        rows, device = tokens.shape[0], tokens.device
        count = torch.arange(rows, device=device)
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        neutral = {
            "stop": torch.full_like(zeros, int(Stop.DATA)),
            "row": count,
            "group": count,
            "domain": zeros,
            "data_index": count,
            "stream": torch.full_like(zeros, int(Stream.MAIN)),
            "weight": torch.ones(rows, device=device),
            "mult": torch.ones_like(tokens),
            "owner": torch.ones_like(mask),
        }
        return Rows(prompt_ids, prompt_mask, tokens, mask, **{**neutral, **known})

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tokens live."""
        return self.tokens.device

    @property
    def main(self) -> Bool[Tensor, "B"]:
        """Rows that count in group statistics and in the loss."""
        return self.stream == int(Stream.MAIN)

    @property
    def fresh(self) -> Bool[Tensor, "B"]:
        """Rows that were drawn for this batch: neither those of a regulariser nor those of an earlier batch."""
        drawn = self.stream != int(Stream.REGULARISER)
        return drawn & ~self.columns[REPLAYED] if REPLAYED in self.columns else drawn

    @property
    def loss_mask(self) -> Bool[Tensor, "B T"]:
        """Tokens that the loss counts: chosen by a model, counted here, in the main stream."""
        return self.mask & self.owner & self.main[:, None]

    @property
    def present(self) -> Bool[Tensor, "B T"]:
        """Tokens that a model attends to: all up to the last one that a model chose, tool output between included."""
        return self.mask.flip(1).cummax(1).values.flip(1) if self.mask.shape[1] else self.mask

    @property
    def lengths(self) -> Int[Tensor, "B"]:
        """Tokens that a model chose, per row."""
        return self.mask.sum(1)

    def with_(self, **changes) -> "Rows":
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def select(self, index: Int[Tensor, "n"] | Bool[Tensor, "B"]) -> "Rows":
        """The rows of an index or a mask, in that order; pairs must be kept whole.

        Raises:
            ValueError: a pair would lose one of its rows.
        """
        if index.dtype == torch.bool:
            index = index.nonzero(as_tuple=True)[0]
        changes: dict = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changes[f.name] = value[index]
            elif isinstance(value, dict):
                changes[f.name] = {name: column[index] for name, column in value.items()}
        if self.pairs is not None:
            changes["pairs"] = _select_pairs(self.pairs, index, len(self))
        return replace(self, **changes)

    def trim(self) -> "Rows":
        """Without the columns that are padding in every row."""
        if not len(self):
            return self
        left = _first_used(self.prompt_mask)
        right = self.tokens.shape[1] - _first_used(self.mask.flip(1))
        changes: dict = {"prompt_ids": self.prompt_ids[:, left:], "prompt_mask": self.prompt_mask[:, left:]}
        for name, cut in _token_fields(self, lambda tensor: tensor[:, :right]).items():
            changes[name] = cut
        return replace(self, **changes)

    def padded(self, prompt: int, completion: int) -> "Rows":
        """With at least `prompt` columns before and `completion` columns after, the new ones masked out."""
        left = max(0, prompt - self.prompt_ids.shape[1])
        right = max(0, completion - self.tokens.shape[1])
        changes: dict = {
            "prompt_ids": torch.nn.functional.pad(self.prompt_ids, (left, 0)),
            "prompt_mask": torch.nn.functional.pad(self.prompt_mask, (left, 0)),
        }

        def pad(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, right))

        return replace(self, **changes, **_token_fields(self, pad))

    def to(self, device: torch.device | str) -> "Rows":
        """On another device."""

        def move(value):
            if isinstance(value, Tensor):
                return value.to(device)
            if isinstance(value, dict):
                return {name: column.to(device) for name, column in value.items()}
            if isinstance(value, Pairs):
                return Pairs(**{f.name: getattr(value, f.name).to(device) for f in fields(Pairs)})
            return value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


def cat(parts: Sequence[Rows]) -> Rows:
    """One batch of several, padded to the widest; optional fields must be present in all or in none.

    Group ids are kept: two parts that use the same id share the group.

    Raises:
        ValueError: no parts, an optional field is present in some parts only, or enumerated rows meet sampled ones.
    """
    if not parts:
        raise ValueError("cat needs at least one batch of rows")
    prompt = max(p.prompt_ids.shape[1] for p in parts)
    completion = max(p.tokens.shape[1] for p in parts)
    parts = [p.padded(prompt, completion) for p in parts]
    first = parts[0]
    if any(p.exact != first.exact for p in parts):
        raise ValueError("cat: enumerated rows and sampled rows cannot share a batch")
    changes: dict = {"totals": None}
    starts = torch.tensor([0] + [len(p) for p in parts[:-1]]).cumsum(0).tolist()
    for f in fields(Rows):
        values = [getattr(p, f.name) for p in parts]
        if isinstance(values[0], dict):
            names = [sorted(v) for v in values]
            if any(n != names[0] for n in names):
                raise ValueError(f"cat: '{f.name}' holds {names[0]} in one batch and others elsewhere")
            changes[f.name] = {name: torch.cat([v[name] for v in values]) for name in names[0]}
        elif any(isinstance(v, Tensor) for v in values):
            if not all(isinstance(v, Tensor) for v in values):
                raise ValueError(f"cat: '{f.name}' is missing in some batches")
            changes[f.name] = torch.cat(values)
        elif f.name == "pairs" and any(v is not None for v in values):
            changes["pairs"] = _cat_pairs(values, starts, first.device)
    return replace(first, **changes)


def _cat_pairs(parts: Sequence[Pairs | None], starts: Sequence[int], device: torch.device) -> Pairs:
    columns: dict[str, list[Tensor]] = {f.name: [] for f in fields(Pairs)}
    for pairs, start in zip(parts, starts, strict=True):
        if pairs is None:
            continue
        for name, column in columns.items():
            value = getattr(pairs, name)
            column.append(value + start if name in ("chosen", "rejected") else value)
    return Pairs(**{name: torch.cat(column).to(device) for name, column in columns.items()})


def _select_pairs(pairs: Pairs, index: Tensor, rows: int) -> Pairs:
    place = torch.full((rows,), -1, dtype=torch.long, device=index.device)
    place[index] = torch.arange(len(index), device=index.device)
    chosen, rejected = place[pairs.chosen], place[pairs.rejected]
    if bool(((chosen < 0) != (rejected < 0)).any()):
        raise ValueError("a selection of rows must keep both rows of a pair, or neither")
    keep = chosen >= 0
    rest = {name: getattr(pairs, name)[keep] for name in ("measure", "coef", "label", "offset")}
    return Pairs(chosen=chosen[keep], rejected=rejected[keep], **rest)


def _token_fields(rows: Rows, change) -> dict:
    """The fields of shape [B, T, ...] after `change`."""
    width = rows.tokens.shape[1]
    out: dict = {}
    for name in ("tokens", "mask", "mult", "owner", "token_reward", "advantage", "segment"):
        value = getattr(rows, name)
        if value is not None:
            out[name] = change(value)
    for name in ("masks", "logp"):
        out[name] = {key: change(value) for key, value in getattr(rows, name).items()}
    out["columns"] = {
        key: change(value) if value.dim() >= 2 and value.shape[1] == width else value
        for key, value in rows.columns.items()
    }
    return out


def _first_used(mask: Bool[Tensor, "B W"]) -> int:
    """Index of the first column with an entry; the width if there is none."""
    used = mask.any(0).nonzero()
    return int(used[0]) if len(used) else mask.shape[1]
