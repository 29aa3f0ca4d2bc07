"""What the numbers of a run say, in words: one sentence a finding, with the number and the setting to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from keel.core.plain import counted
from keel.evaluate.evaluation import Evaluation, change
from keel.evaluate.intervals import Interval
from keel.report.checks import CHECKS
from keel.report.entropy_tokens import Fall
from keel.report.findings import Curve, Finding, Level, Run

__all__ = ["Curve", "Finding", "Level", "diagnose"]


def diagnose(
    metrics: Mapping[str, Curve],
    config: Mapping[str, Any],
    before: Evaluation | None = None,
    after: Evaluation | None = None,
    fallen: Sequence[Fall] = (),
) -> list[Finding]:
    """Findings about a run, the gravest first; never empty.

    Args:
        metrics: curves of the training metrics, (step, value) by growing step.
        config: the resolved configuration, from which present values are told.
        before, after: evaluations of the policy before and after training.
        fallen: the tokens whose entropy fell most, from completions that were stored.
    """
    run = Run(metrics, config, fallen)
    found = [replace(f, kind=check.__name__.removeprefix("_")) for check in CHECKS for f in check(run)]
    found += _evaluations(run, before, after)
    if not any(finding.level in (Level.PROBLEM, Level.WARNING) for finding in found):
        steps = max((len(curve) for curve in metrics.values()), default=0)
        what = f"Nothing unusual in the metrics of {counted(steps, 'step')}." if steps else "No metrics were logged."
        found.append(Finding(Level.GOOD if steps else Level.NOTE, what))
    return sorted(found, key=lambda finding: list(Level).index(finding.level))


def _evaluations(run: Run, before: Evaluation | None, after: Evaluation | None) -> list[Finding]:
    """What happened to pass@1 and to pass@k of the largest k that both evaluations have."""
    if before is None or after is None:
        return []
    common = [k for k, _ in before.pass_curve() if f"pass@{k}" in after.metrics]
    if len(common) < 2 or common[0] != 1:
        return []
    many = f"pass@{common[-1]}"
    one, best = change(before, after, "pass@1"), change(before, after, many)
    if one is None or best is None:
        return []
    path, text = run.setting("beta")
    if one.high < 0:
        path, text = run.setting("learning_rate")
        return [Finding(Level.PROBLEM, f"pass@1 fell by {_loss(one)} on held-out prompts: lower {text}.", path)]
    if best.high < 0:
        gained = f"rose by {one}" if one.low > 0 else f"changed by {one}, no more than chance allows,"
        return [
            Finding(
                Level.WARNING,
                f"pass@1 {gained} while {many} fell by {_loss(best)}: the policy gave up solutions that it had; a "
                f"penalty towards the reference, {text}, keeps more of them.",
                path,
            )
        ]
    if one.low > 0:
        return [Finding(Level.GOOD, f"pass@1 rose by {one} on held-out prompts, and {many} changed by {best}.")]
    return [Finding(Level.NOTE, f"pass@1 changed by {one} on held-out prompts: no more than chance allows.")]


def _loss(difference: Interval) -> str:
    return str(Interval(-difference.value, -difference.high, -difference.low))
