"""The report of one run: what it was, what it did, and what to change."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from keel.core.errors import RunError
from keel.core.plain import counted
from keel.evaluate.evaluation import Completion, Evaluation, change
from keel.report.arms import before_and_after
from keel.report.diagnosis import Finding, diagnose
from keel.report.entropy_tokens import Fall, read_falls
from keel.report.figures import Figure, curves, evaluations_over_steps, frontier, pass_curves
from keel.report.page import cell, document, figures, prose, table, text, write
from keel.report.reward_models import (
    compares,
    comparison_figures,
    gold_figures,
    pair_blocks,
    reliability,
    reliability_table,
)
from keel.report.tokens_page import token_section
from keel.store.records import StoredRollout, StoredRun
from keel.store.store import Store

SHOWN = 6  # prompts whose completions are shown
EXPLAINED = 4  # completions of training that are shown token by token


@dataclass(frozen=True, eq=False)
class RunData:
    """All that a report is made of.

    Args:
        run: the run with its configuration.
        metrics: curves by name.
        evaluations: (step, phase, evaluation) by growing step; the phases "before" and "after" are set side by side.
        composition: the resolved composition as YAML.
        rollouts: completions of training, with their numbers per token.
        fallen: the tokens whose entropy fell most between the first and the last logged steps.
    """

    run: StoredRun
    metrics: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    evaluations: Sequence[tuple[int, str, Evaluation]] = ()
    composition: str = ""
    rollouts: Sequence[StoredRollout] = ()
    fallen: Sequence[Fall] = ()

    @property
    def before(self) -> Evaluation | None:
        """The evaluation before training."""
        return self._phase("before")

    @property
    def after(self) -> Evaluation | None:
        """The evaluation after training."""
        return self._phase("after")

    def findings(self) -> list[Finding]:
        """The diagnosis."""
        return diagnose(self.metrics, self.run.config or {}, self.before, self.after, self.fallen)

    def _phase(self, wanted: str) -> Evaluation | None:
        found = [evaluation for _, phase, evaluation in self.evaluations if phase == wanted]
        return found[-1] if found else None


def read_run(directory: str | Path, store: str | Path | None = None) -> RunData:
    """What is stored about the run of a directory.

    Args:
        directory: runs/NAME.
        store: the store; by default `keel.sqlite` beside the directory.

    Raises:
        RunError: the store has no run of that name.
        UserError: there is no store.
    """
    directory = Path(directory)
    with Store(store or directory.parent / "keel.sqlite", readonly=True) as opened:
        return run_data(opened, opened.run(directory.name), directory)


def run_data(store: Store, run: StoredRun, directory: Path) -> RunData:
    """What an open store holds of a run with its configuration.

    Raises:
        RunError: a stored evaluation cannot be read.
    """
    metrics = store.metrics(run.id)
    stored = store.evaluations(run.id)
    last = max(store.rollout_counts(run.id), default=0)
    rollouts = store.rollouts(run.id, last, limit=EXPLAINED)
    fallen = read_falls(store, run.id)
    try:
        evaluations = [(e.step, e.phase, Evaluation.from_json(e.evaluation)) for e in stored]
    except ValueError as error:
        raise RunError(f"A stored evaluation cannot be read ({error}).", str(directory)) from error
    config = directory / "config.yaml"
    composition = config.read_text(encoding="utf-8") if config.exists() else ""
    return RunData(run, metrics, evaluations, composition, rollouts, fallen)


def write_report(run: RunData | str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a run as one HTML file.

    Args:
        run: its data, or its directory.
        path: the file; by default `report.html` in the directory.

    Raises:
        RunError: nothing is stored about the run.
        UserError: the file cannot be written.
    """
    if not isinstance(run, RunData):
        path = path or Path(run) / "report.html"
        run = read_run(run)
    if path is None:
        raise ValueError("write_report needs a path when it is given data")
    return write(path, report(run))


def report(data: RunData) -> str:
    """The report as HTML."""
    parts = [_head(data), tiles(data), "<h2>Diagnosis</h2>", findings_list(data.findings()), *abilities(data)]
    training = training_figures(data.metrics)
    if any(training):
        parts += ["<h2>Training</h2>", figures(training, "training")]
    last = data.after or data.before
    parts += [pair_blocks(last) if compares(last) else _completions(data), _tokens(data), _composition(data)]
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    parts.append(
        f"<footer>Written by Keel, {written}. Brackets and bands are 95% bootstrap intervals over prompts.</footer>"
    )
    return document(f"{data.run.name} – Keel", [part for part in parts if part])


def abilities(data: RunData) -> list[str]:
    """Figures and tables of what was measured on held-out prompts or comparisons, as HTML; empty without any."""
    parts = []
    drawn = [pass_curves(arms := before_and_after(data.before, data.after)), frontier(arms), *_held_out(data)]
    if compares(data.after or data.before):
        shown = figures([reliability(data.before, data.after), *_held_out(data)], "ability")
        tables = [_evaluation_table(data), reliability_table(data.after or data.before)]
        parts += ["<h2>Held-out comparisons</h2>", shown, *tables]
    elif any(drawn):
        parts += ["<h2>Held-out prompts</h2>", figures(drawn, "ability"), _evaluation_table(data)]
    elif data.after or data.before:
        parts += ["<h2>Held-out comparisons</h2>", _evaluation_table(data)]
    gold = gold_figures(data.metrics, _hidden(data))
    if any(gold):
        parts += ["<h2>Over-optimisation</h2>", figures(gold, "gold")]
    return parts


def training_figures(metrics: Mapping[str, Sequence[tuple[int, float]]]) -> list[Figure | None]:
    """The curves of a training run, those that were logged."""
    functions = {
        name: name.removeprefix("rewards/").removesuffix("/mean")
        for name in sorted(metrics)
        if name.startswith("rewards/") and name.endswith("/mean")
    }
    terms = {name: name.removeprefix("terms/") for name in sorted(metrics) if name.startswith("terms/")}
    clip = {
        "ratio/clipped": "in the last update",
        "clip_ratio/region_mean": "in the first",
        "clip_ratio/low_mean": "below, in the first",
        "clip_ratio/high_mean": "above, in the first",
    }
    cut = {"completions/clipped_ratio": "cut off"}
    return [
        *(comparison_figures(metrics) if "rewards/margins" in metrics else []),
        curves("Reward", metrics, {"reward": "reward"}),
        curves("Reward functions", metrics, functions) if len(functions) > 1 else None,
        curves("Entropy", metrics, {"entropy": "entropy"}, unit="nats a token", floor=0.0),
        curves("KL to the reference", metrics, {"kl": "KL"}, unit="nats a token"),
        curves("Completion length", metrics, {"completions/mean_length": "mean length"}, unit="tokens", floor=0.0),
        curves("Cut off by the length limit", metrics, cut, percent=True, floor=0.0),
        curves("Tokens outside the clip range", metrics, clip, percent=True, floor=0.0),
        curves("Groups with equal rewards", metrics, {"frac_reward_zero_std": "tied groups"}, percent=True, floor=0.0),
        curves("Gradient norm", metrics, {"grad_norm": "gradient norm"}, floor=0.0),
        curves("Terms of the loss", metrics, terms),
        curves("Sampler against trainer", metrics, {"rollout/logp_gap": "gap"}, unit="nats a token", floor=0.0),
        curves("Effective sample size", metrics, {"rollout/ess": "share of rows"}, percent=True, floor=0.0),
    ]


def findings_list(findings: Sequence[Finding]) -> str:
    """A diagnosis as HTML."""
    items = "\n".join(
        f'<li class="{finding.level}"><span class="level">{finding.level.capitalize()}</span>'
        f"<span>{prose(finding.sentence)}</span></li>"
        for finding in findings
    )
    return f'<ul class="findings">\n{items}\n</ul>'


def _head(data: RunData) -> str:
    run = data.run
    seconds = (run.finished or run.updated) - run.created
    facts = {
        "status": run.status,
        "recipe": run.recipe,
        "task": run.task,
        "model": run.model,
        "seed": run.seed,
        "steps": run.step,
        "took": _duration(seconds),
        "began": time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created)),
    }
    items = "".join(f"<li>{name} <b>{text(value)}</b></li>" for name, value in facts.items() if value != "")
    return f'<header>\n<h1>{text(run.name)}</h1>\n<ul class="facts">{items}</ul>\n</header>'


def tiles(data: RunData) -> str:
    """The first numbers that anybody asks for, before and after training, as HTML."""
    before, after = data.before, data.after
    if before is None and after is None:
        return ""
    shown = after or before
    assert shown is not None
    names = ["pass@1", shown.largest("pass"), "entropy", "kl", "accuracy", "log_loss", "calibration_error"]
    shown_tiles = []
    for name in dict.fromkeys(name for name in names if name):
        first = before.metrics.get(name) if before else None
        last = after.metrics.get(name) if after else None
        if first is None and last is None:
            continue
        values = " → ".join(f"{value.value:.3f}" for value in (first, last) if value is not None)
        gained = change(before, after, name) if before and after else None
        below = f"{cell(gained, signed=True)}" if gained is not None else ""
        shown_tiles.append(
            f'<div class="tile"><dt>{name}</dt><dd class="value">{values}</dd><dd class="muted">{below}</dd></div>'
        )
    return f'<dl class="tiles">\n{"".join(shown_tiles)}\n</dl>'


def _hidden(data: RunData) -> list[str]:
    """Names of the functions that the configuration has measured only."""
    task = (data.run.config or {}).get("task") or {}
    return [str(name).rsplit(":", 1)[-1] for name in task.get("hidden") or ()]


def _held_out(data: RunData) -> list[Figure | None]:
    if len(data.evaluations) < 3:
        return []
    points = [(step, evaluation.metrics) for step, _, evaluation in data.evaluations]
    many = data.evaluations[-1][2].largest("pass")
    names = dict.fromkeys(["pass@1", *([many] if many else [])])
    if compares(data.evaluations[-1][2]):
        names = dict.fromkeys(["accuracy"])
    return [evaluations_over_steps(points, list(names))]


def _evaluation_table(data: RunData) -> str:
    before, after = data.before, data.after
    arms = before_and_after(before, after)
    if not arms:
        return ""
    names = dict.fromkeys(name for arm in arms for name in arm.evaluation.metrics)
    both = before is not None and after is not None
    rows = []
    for name in names:
        row = [text(name), *(cell(arm.evaluation.metrics.get(name)) for arm in arms)]
        rows.append([*row, cell(change(before, after, name), signed=True)] if before and after else row)
    head = ["", *(arm.label.removesuffix(" training") for arm in arms), *(["change"] if both else [])]
    sizes = arms[-1].evaluation
    measured = f"{counted(sizes.prompts, 'prompt')}, {counted(sizes.samples, 'sample')} of each"
    caption = (
        f"{measured if sizes.samples else counted(sizes.prompts, 'comparison')}; below each number its 95% interval."
    )
    if compares(sizes):
        caption = f"{counted(sizes.prompts, 'pair')}; below each number its 95% interval."
    if sizes.errors:
        caption += f" {counted(sizes.errors, 'sample')} could not be scored and count nowhere."
    return table(head, rows, caption)


def _completions(data: RunData) -> str:
    first = _by_prompt(data.before)
    last = _by_prompt(data.after)
    prompts = [key for key in (first if first else last) if not first or not last or key in last][:SHOWN]
    if not prompts:
        return ""
    threshold = (data.after or data.before).threshold  # type: ignore[union-attr]
    blocks = []
    for key in prompts:
        sides = [("before training", first.get(key)), ("after training", last.get(key))]
        columns = "".join(
            f'<div><span class="muted">{label}</span>{"".join(_completion(c, threshold) for c in shown)}</div>'
            for label, shown in sides
            if shown
        )
        blocks.append(
            f'<article class="card pair"><div class="prompt"><pre>{text(key[1])}</pre></div>{columns}</article>'
        )
    return "<h2>Completions</h2>\n" + "\n".join(blocks)


def _tokens(data: RunData) -> str:
    shown = token_section(data.rollouts)
    if not shown:
        return ""
    more = prose(f"`keel explain {data.run.name}` lists all that are stored.")
    return f"<h2>Training, token by token</h2>\n<p>Completions of step {data.rollouts[0].step}; {more}</p>\n{shown}"


def _by_prompt(evaluation: Evaluation | None) -> dict[tuple[int, str], list[Completion]]:
    found: dict[tuple[int, str], list[Completion]] = {}
    for kept in evaluation.completions if evaluation else ():
        found.setdefault((kept.index, kept.prompt), []).append(kept)
    return found


def _completion(kept: Completion, threshold: float) -> str:
    if kept.reward != kept.reward:
        level, word = "warning", "not scored"
    elif kept.reward > threshold:
        level, word = "good", f"reward {kept.reward:.3g}"
    else:
        level, word = "problem", f"reward {kept.reward:.3g}"
    cut = ", cut off" if kept.clipped else ""
    return (
        f'<div class="completion"><pre>{text(kept.text)}</pre><small><span class="verdict {level}">{word}</span>, '
        f"{kept.length} tokens{cut}</small></div>"
    )


def _composition(data: RunData) -> str:
    shown = data.composition
    if not shown and data.run.config:
        shown = yaml.safe_dump(data.run.config, sort_keys=False, allow_unicode=True)
    if not shown:
        return ""
    return (
        '<h2>Composition</h2>\n<details class="card"><summary>The resolved configuration, complete: it runs as it '
        f"stands</summary>\n<pre>{text(shown)}</pre></details>"
    )


def _duration(seconds: float) -> str:
    """
    >>> _duration(3725)
    '1 h 2 min'
    """
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
