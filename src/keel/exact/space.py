"""All sequences of a small vocabulary, and a policy that is a table."""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keel.core.policy import Head
from keel.core.rows import Rows, Stop


@dataclass(frozen=True)
class SequenceSpace:
    """Sequences of up to `horizon` tokens from `vocab` symbols, for each of `prompts` prompts.

    Args:
        vocab: number of symbols V.
        horizon: longest sequence.
        eos: symbol that ends a sequence, or None: then all have length `horizon`.
        prompts: number of prompts, written as single tokens 0 .. prompts - 1.

    Raises:
        ValueError: a size below 1, or eos outside the vocabulary.
    """

    vocab: int
    horizon: int
    eos: int | None = None
    prompts: int = 1

    def __post_init__(self) -> None:
        if min(self.vocab, self.horizon, self.prompts) < 1:
            raise ValueError("vocab, horizon and prompts must be at least 1")
        if self.eos is not None and not 0 <= self.eos < self.vocab:
            raise ValueError(f"eos {self.eos} is outside the vocabulary of {self.vocab}")

    @property
    def prefixes(self) -> int:
        """Number of prefixes shorter than the horizon: 1 + V + V^2 + ..."""
        return sum(self.vocab**t for t in range(self.horizon))

    def sequences(self) -> tuple[Int[Tensor, "S T"], Int[Tensor, "S"]]:
        """All complete sequences (0 after the end) with their lengths; made once, not to be changed in place."""
        return _sequences(self)

    def _enumerate(self) -> tuple[Int[Tensor, "S T"], Int[Tensor, "S"]]:
        grid = torch.cartesian_prod(*[torch.arange(self.vocab)] * self.horizon).reshape(-1, self.horizon)
        if self.eos is not None:
            after_end = ((grid == self.eos).cumsum(1) - (grid == self.eos).long()) > 0
            grid = grid.masked_fill(after_end, 0).unique(dim=0)
        return grid, self._lengths(grid)

    def _lengths(self, grid: Int[Tensor, "S T"]) -> Int[Tensor, "S"]:
        full = torch.full((len(grid),), self.horizon)
        if self.eos is None:
            return full
        ended = grid == self.eos
        return torch.where(ended.any(1), ended.int().argmax(1) + 1, full)

    def rows(self, prompt: int = 0) -> Rows:
        """Every sequence of a prompt as a row of one group, made once; the weights are left at 1 (see `weighted`)."""
        return _rows(self, prompt)

    def _build(self, prompt: int) -> Rows:
        tokens, lengths = self.sequences()
        mask = torch.arange(self.horizon) < lengths[:, None]
        ended = mask.new_zeros(len(tokens)) if self.eos is None else (tokens == self.eos).any(1)
        zeros = torch.zeros(len(tokens), dtype=torch.long)
        return Rows.build(
            torch.full((len(tokens), 1), prompt),
            torch.ones(len(tokens), 1, dtype=torch.bool),
            tokens,
            mask,
            group=zeros + prompt,
            data_index=zeros + prompt,
            stop=torch.where(ended, int(Stop.EOS), int(Stop.LENGTH)),
        )

    def prefix_index(self, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """The number of the prefix before each token: prefixes are counted level by level."""
        before = torch.zeros_like(tokens)
        code, start = torch.zeros_like(tokens[:, 0]), 0
        for t in range(tokens.shape[1]):
            before[:, t] = start + code
            start += self.vocab**t
            code = code * self.vocab + tokens[:, t]
        return before


@cache
def _sequences(space: SequenceSpace) -> tuple[Int[Tensor, "S T"], Int[Tensor, "S"]]:
    return space._enumerate()


@cache
def _rows(space: SequenceSpace, prompt: int) -> Rows:
    return space._build(prompt)


class TabularPolicy(nn.Module):
    """One row of logits for each prompt and prefix, behind a language model's interface.

    The state of a position is its row of logits, and the head is the identity, so that every recipe runs on it as it
    runs on a language model.

    Args:
        space: the world.
        logits: shape [prompts, prefixes, V]; None is the uniform policy.

    Raises:
        ValueError: logits of another shape.
    """

    def __init__(self, space: SequenceSpace, logits: Float[Tensor, "Q X V"] | None = None):
        super().__init__()
        shape = (space.prompts, space.prefixes, space.vocab)
        logits = torch.zeros(shape) if logits is None else logits
        if tuple(logits.shape) != shape:
            raise ValueError(f"logits must have shape {shape}, not {tuple(logits.shape)}")
        self.space = space
        self.table = nn.Parameter(logits.clone())
        self.head = Head()

    @property
    def module(self) -> nn.Module:
        """The parameters."""
        return self

    def hidden(self, rows: Rows) -> Float[Tensor, "B T V"]:
        """The row of logits before each token."""
        if not rows.tokens.shape[1]:
            return self.table.new_zeros(len(rows), 0, self.space.vocab)
        prefix = self.space.prefix_index(rows.tokens).clamp(max=self.space.prefixes - 1)  # padding beyond the horizon
        return self.table[rows.prompt_ids[:, -1:], prefix]

    def log_prob(self, rows: Rows) -> Float[Tensor, "B"]:
        """log pi(y | x) of whole sequences."""
        chosen = self.hidden(rows).log_softmax(-1).gather(-1, rows.tokens[..., None])[..., 0]
        return torch.where(rows.mask, chosen, torch.zeros_like(chosen)).sum(1)

    def weighted(self, rows: Rows) -> Rows:
        """The rows with weight pi(y | x), enumerated: population statistics instead of a sample's."""
        return rows.with_(weight=self.log_prob(rows).exp().detach(), exact=True)
