"""A completion in the terminal: coloured text where there are colours, a table of numbers where there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from keel.report.style import LESS, MORE
from keel.report.tokens import Quantity, Scale, chosen, lines, visible
from keel.store.records import StoredRollout

if TYPE_CHECKING:
    from rich.text import Text

TOOL = "dim italic"  # tokens that the model did not choose
BEGINNING = 60  # characters of a completion in a list


def coloured(rollout: StoredRollout, quantity: Quantity, width: int) -> Text:
    """The completion with a background for each token, under a line that says what the colours are.

    Args:
        width: columns at which lines are broken, between tokens where possible.
    """
    scale = Scale.of([quantity.values], quantity.centre)
    out = _legend(quantity, scale)
    mine, used = chosen(rollout), 0
    for token, value, own in zip(rollout.tokens, quantity.values, mine, strict=True):
        style = _style(scale.share(float(value))) if own else TOOL
        for number, line in enumerate(lines(token)):
            if number:
                out.append("\n")
                used = 0
            for piece in _pieces(line, width):
                if used + piece.cell_len > width:
                    out.append("\n")
                    used = 0
                piece.stylize(style)
                out.append_text(piece)
                used += piece.cell_len
    return out.append("\n") if used else out


def number_table(rollout: StoredRollout, shown: Sequence[Quantity], width: int | None = None) -> str:
    """One line a token; more than one table where the columns do not fit `width`."""
    from rich.cells import cell_len

    mine = chosen(rollout)
    told = [visible(t, spaces=True) + ("" if own else "  (tool)") for t, own in zip(rollout.tokens, mine, strict=True)]
    first = _column(["token", *told], cell_len, left=True)
    place = _column(["", *map(str, range(1, len(told) + 1))], cell_len)
    columns = []
    for q in shown:
        cells = [_number(float(v)) if own else "" for v, own in zip(q.values, mine, strict=True)]
        columns.append(_column([q.name, *cells], cell_len))
    blocks: list[list[list[str]]] = [[]]
    for column in columns:
        used = sum(cell_len(c[0]) + 2 for c in [place, first, *blocks[-1], column]) - 2
        if width is not None and blocks[-1] and used > width:
            blocks.append([])
        blocks[-1].append(column)
    tables = ["\n".join("  ".join(line).rstrip() for line in zip(place, first, *b, strict=True)) for b in blocks]
    return "\n\n".join(tables)


def ranges(shown: Sequence[Quantity]) -> str:
    """What each quantity is, one line each."""
    width = max((len(q.name) for q in shown), default=0)
    return "\n".join(f"{q.name:<{width}}  {describe(q)}" for q in shown)


def describe(quantity: Quantity) -> str:
    """Meaning, range and unit, and what says nothing.

    >>> import numpy as np
    >>> describe(Quantity("weight/cap", "weight cap", "factor", 1.0, np.array([0.5, 2.0])))
    'weight cap: 0.5 to 2 (factor), neutral at 1'
    """
    found = quantity.range
    unit = f" ({quantity.unit})" if quantity.unit else ""
    if found is None:
        return f"{quantity.says}: no numbers"
    neutral = "" if quantity.centre is None else f", neutral at {quantity.centre:g}"
    return f"{quantity.says}: {_number(found[0])} to {_number(found[1])}{unit}{neutral}"


def listing(rollouts: Sequence[StoredRollout]) -> str:
    """Completions of a run, one line each."""
    rows = [("id", "step", "reward", "length", "completion")]
    for r in rollouts:
        reward = "-" if math.isnan(r.reward) else f"{r.reward:.4g}"
        text = visible(r.completion)
        beginning = text if len(text) <= BEGINNING else f"{text[: BEGINNING - 1]}…"
        rows.append((str(r.id), str(r.step), reward, str(r.length), beginning))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(cell.rjust(w) for cell, w in zip(row[:4], widths, strict=True)), row[4]]) for row in rows
    )


def heading(rollout: StoredRollout) -> str:
    """What the completion is."""
    reward = "not scored" if math.isnan(rollout.reward) else f"reward {rollout.reward:.4g}"
    facts = [f"step {rollout.step}", f"group {rollout.group}", reward, f"{rollout.length} tokens"]
    facts += [f"ended by {rollout.stop}"] if rollout.stop else []
    prompt = visible(rollout.prompt)
    cut = prompt if len(prompt) <= 400 else f"{prompt[:200]} … {prompt[-199:]}"
    return f"rollout {rollout.id}: {', '.join(facts)}\nprompt: {cut}"


def _legend(quantity: Quantity, scale: Scale) -> Text:
    from rich.text import Text

    out = Text()
    out.append(quantity.name, style="bold")
    out.append(f"  {describe(quantity)}\n")
    if scale.low == scale.high:
        return out
    shares = [i / 3 for i in range(0 if scale.centre is None else -3, 4)]
    out.append(f"{_number(scale.low)} ")
    for share in shares:
        out.append("   " if round(3 * share) else " · ", style=_style(share))
    return out.append(f" {_number(scale.high)}\n")


def _style(share: float) -> str:
    """Background and text of a share in [-1, 1]; none below a sixth."""
    level = round(3 * abs(share))
    if not level:
        return ""
    background, text = (MORE if share > 0 else LESS)[level - 1]
    return f"{text} on {background}"


def _pieces(text: str, width: int) -> list[Text]:
    """A token, cut only where it is longer than a line."""
    from rich.text import Text

    whole = Text(text)
    if whole.cell_len <= width:
        return [whole]
    return [Text(text[i : i + max(1, width // 2)]) for i in range(0, len(text), max(1, width // 2))]


def _column(cells: list[str], length, left: bool = False) -> list[str]:
    width = max(map(length, cells))
    return [c + " " * (width - length(c)) if left else " " * (width - length(c)) + c for c in cells]


def _number(value: float) -> str:
    """Four digits; nothing where there is no number."""
    return "" if math.isnan(value) else f"{value + 0.0:.4g}"
