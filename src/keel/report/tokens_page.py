"""Completions token by token as HTML: a choice of the number that colours them, all numbers under the pointer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from keel.core.errors import UserError
from keel.report.page import document, script_data, text, write
from keel.report.tokens import DEFAULT, Quantity, Scale, chosen, lines, pick, quantities
from keel.report.tokens_terminal import number_table
from keel.store.records import StoredRollout, StoredRun


def write_tokens(
    run: StoredRun, rollouts: Sequence[StoredRollout], path: str | Path, by: Sequence[str] | None = None
) -> Path:
    """Write completions of a run as one page that stands alone.

    Args:
        by: the numbers to choose from; by default all, the usual ones first.

    Raises:
        UserError: no tokens are stored, a name in `by` is not there, or the file cannot be written.
    """
    body = token_section(rollouts, by)
    if not body:
        raise UserError("no tokens are stored of these completions", run.name)
    steps = sorted({r.step for r in rollouts})
    when = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    facts = {"recipe": run.recipe, "task": run.task, "model": run.model, "seed": run.seed, "completions": len(rollouts)}
    items = "".join(f"<li>{name} <b>{text(value)}</b></li>" for name, value in facts.items() if value != "")
    head = f'<header>\n<h1>{text(run.name)}, {when}, token by token</h1>\n<ul class="facts">{items}</ul>\n</header>'
    return write(path, document(f"{run.name}, {when} – Keel", [head, body]))


def token_section(rollouts: Sequence[StoredRollout], by: Sequence[str] | None = None) -> str:
    """The chooser and the completions; empty where no tokens are stored."""
    shown = [r for r in rollouts if r.tokens]
    if not shown:
        return ""
    found = [_picked(r, by) for r in shown]
    names = list(dict.fromkeys(q.name for own in found for q in own))
    if not names:
        return ""
    by_name: dict[str, list[Quantity]] = {name: [] for name in names}
    for q in (q for own in found for q in own):
        by_name[q.name].append(q)
    about = []
    for name, same in by_name.items():
        scale = Scale.of([q.values for q in same], same[0].centre)
        about.append({"name": name, "says": same[0].says, "unit": same[0].unit, **vars(scale)})
    options = "".join(f"<option>{text(name)}</option>" for name in names)
    chooser = (
        '<div class="card chooser"><label>Coloured by <select autocomplete="off">' + options + "</select></label>"
        '<span class="ramp"><span></span><i></i><span></span></span><span class="says"></span></div>'
    )
    cards = "\n".join(_card(r, own, names) for r, own in zip(shown, found, strict=True))
    return f"{chooser}\n{cards}\n{script_data('quantities', about)}"


def _picked(rollout: StoredRollout, by: Sequence[str] | None) -> list[Quantity]:
    known = quantities(rollout)
    if by:
        return pick(known, by)
    usual = [q for q in known if q.name in DEFAULT or q.name.startswith("weight/")]
    return [*usual, *(q for q in known if q not in usual)]


def _card(rollout: StoredRollout, own: Sequence[Quantity], names: Sequence[str]) -> str:
    values = {q.name: q.values for q in own}
    mine = chosen(rollout)
    spans = []
    for t, token in enumerate(rollout.tokens):
        shown = "\n".join(lines(token))
        if not mine[t]:
            spans.append(f'<span class="tool" title="not chosen by the model">{text(shown)}</span>')
            continue
        numbers = ",".join(_number(float(values[name][t])) if name in values else "" for name in names)
        mark = "" if token.strip() else ' class="mark"'
        spans.append(f'<span{mark} data-v="{numbers}">{text(shown)}</span>')
    reward = "not scored" if math.isnan(rollout.reward) else f"reward <b>{rollout.reward:.4g}</b>"
    facts = [f"rollout <b>{rollout.id}</b>", f"step <b>{rollout.step}</b>", f"group <b>{rollout.group}</b>", reward]
    facts += [f"<b>{rollout.length}</b> tokens"] + ([f"ended by <b>{text(rollout.stop)}</b>"] if rollout.stop else [])
    return (
        f'<article class="card explained"><ul class="facts">{"".join(f"<li>{fact}</li>" for fact in facts)}</ul>'
        f'<pre class="prompt">{text(rollout.prompt)}</pre>'
        f'<div class="tokens" tabindex="0" role="group" aria-label="Completion, token by token">{"".join(spans)}</div>'
        f"<details><summary>The same as numbers</summary><pre>{text(number_table(rollout, own))}</pre></details>"
        "</article>"
    )


def _number(value: float) -> str:
    """Four digits as JavaScript reads them."""
    if math.isnan(value):
        return ""
    return f"{value:.4g}" if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
