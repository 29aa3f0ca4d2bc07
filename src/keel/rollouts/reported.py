"""Completions that another engine reports, cut where Keel's own decoding would have stopped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keel.core.rows import Stop
from keel.rollouts.decoding import Drawn, text_of
from keel.rollouts.sampling import Sampling


@dataclass(frozen=True)
class Reported:
    """One completion.

    Args:
        tokens: drawn, end token included where the engine shows it.
        logp: of each.
        cut: the engine says that the length limit cut it off.
    """

    tokens: list[int]
    logp: list[float]
    cut: bool

    def end(self, model: Any, sampling: Sampling) -> tuple[int, Stop]:
        """Tokens that count, and why it ends: at the first end token or stop string, or where the engine ended it."""
        tokens = self.tokens[: sampling.max_completion_length]
        eos = next((i + 1 for i, token in enumerate(tokens) if token in model.eos_ids), None)
        stop = first_stop(model.tokenizer, tokens, sampling.stop_strings)
        if eos is not None and (stop is None or eos <= stop):
            return eos, Stop.EOS
        if stop is not None:
            return stop, Stop.STOP_STRING
        return len(tokens), Stop.LENGTH if self.cut else Stop.EOS


def drawn(reported: Sequence[Reported], model: Any, sampling: Sampling) -> Drawn:
    """All of them together.

    Args:
        reported: in the order of the rows.
        model: what is known of the model: tokenizer, eos_ids, pad_id, device.
        sampling: how they were drawn.
    """
    shape = len(reported), sampling.max_completion_length
    tokens, logp = torch.full(shape, int(model.pad_id)), torch.zeros(shape)
    length, stop = torch.zeros(len(reported), dtype=torch.long), torch.zeros(len(reported), dtype=torch.long)
    for i, found in enumerate(reported):
        size, why = found.end(model, sampling)
        tokens[i, :size] = torch.tensor(found.tokens[:size], dtype=torch.long)
        logp[i, :size] = torch.tensor(found.logp[:size])
        length[i], stop[i] = size, int(why)
    return Drawn(*(tensor.to(model.device) for tensor in (tokens, logp, length, stop)))


def first_stop(tokenizer: Any, tokens: Sequence[int], strings: Sequence[str]) -> int | None:
    """How many tokens there are when the first stop string is complete; None where there is none."""

    def holds(count: int) -> bool:
        text = text_of(tokenizer, tokens[:count])
        return any(string in text for string in strings if string)

    if not strings or not holds(len(tokens)):
        return None
    low, high = 0, len(tokens)  # a text that holds one still holds it when it is longer
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
