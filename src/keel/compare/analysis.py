"""What a comparison found: each arm's numbers, each arm against the baseline, and how far either can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from keel.compare.outcomes import Comparison, Outcome
from keel.compare.results import (
    BETTER,
    HIGHER,
    LOWER,
    NO_DIFFERENCE,
    UNKNOWN,
    UNTOLD,
    WORSE,
    Analysis,
    Cell,
    Difference,
    Estimate,
    Spent,
)
from keel.compare.statistics import (
    Drawn,
    bootstrap,
    holm,
    improvement_draws,
    interquartile_draws,
    interquartile_mean,
    interval,
    p_value,
    probability_of_improvement,
    seeds_needed,
    spread,
)
from keel.core.errors import ConfigError, nearest
from keel.evaluate.intervals import Interval, difference_interval, mean_interval

SIGNIFICANT = 0.05
_LEADING = ("pass@1", "accuracy")  # what a comparison is decided by, if nothing else is asked for
_SHARES = ("pass@", "maj@", "avg@", "accuracy")  # between 0 and 1, the more the better
_LESS_IS_BETTER = ("log_loss", "calibration_error")


def analyse(comparison: Comparison, metrics: Sequence[str] | None = None, seed: int = 0) -> Analysis:
    """The statistics of a comparison, from its finished cells.

    Args:
        comparison: its arms and outcomes.
        metrics: names, the one that decides first; by default pass@1, the largest pass@k, reward, KL, entropy and
            length, those that were measured.
        seed: of the resampling; equal seeds give equal numbers.

    Raises:
        ConfigError: a metric that no cell measured.
        ValueError: cells with different numbers of prompts, or two outcomes of one cell.
    """
    _check(comparison)
    chosen, notes = _metrics(comparison, metrics)
    tables = {(arm.name, metric): _scores(comparison, arm.name, metric) for arm in comparison.arms for metric in chosen}
    samples = _Samples(seed)
    estimates = [_estimate(arm, metric, scores, samples) for (arm, metric), scores in tables.items()]
    baseline = comparison.arms[0].name
    found = [
        _difference(arm.name, metric, tables[arm.name, metric], tables[baseline, metric], samples)
        for metric in chosen
        for arm in comparison.arms[1:]
    ]
    states = {(o.arm, o.seed): o for o in comparison.outcomes}
    unfinished = [(arm.name, seed) for arm in comparison.arms for seed in comparison.seeds]
    return Analysis(
        baseline=baseline,
        arms=tuple(arm.name for arm in comparison.arms),
        metrics=tuple(chosen),
        estimates=tuple(estimates),
        differences=tuple(_judged(found, chosen)),
        before=_before(comparison, chosen),
        spent={arm.name: _spent(comparison.of(arm.name)) for arm in comparison.arms},
        failed=tuple(Cell(o.arm, o.seed, o.run, o.error) for o in comparison.failed),
        missing=tuple(Cell(*place) for place in unfinished if place not in states or states[place].status == "missing"),
        notes=(*notes, *_notes(comparison, estimates, tables, chosen)),
        seed=seed,
    )


def direction(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither is."""
    if metric.startswith((*_SHARES, "reward")):
        return 1
    return -1 if metric in _LESS_IS_BETTER else 0


def largest_pass(comparison: Comparison) -> str | None:
    """Name of the pass@k with the largest k that every arm with a finished cell has, or None."""
    names = [{n for n in o.values if n.startswith("pass@")} for o in comparison.outcomes if o.status == "finished"]
    common = set.intersection(*names) if names else set()
    return max(common, key=lambda name: int(name.split("@")[1]), default=None)


def table_of(scores: Mapping[int, Float[np.ndarray, "N"]]) -> Float[np.ndarray, "S P"]:
    """The cells of an arm as rows, by seed, without the prompts that have no finite number in one of them."""
    if not scores:
        return np.empty((0, 0))
    rows = np.stack([scores[seed] for seed in sorted(scores)])
    return rows[:, np.isfinite(rows).all(0)]


def mean_of(table: Float[np.ndarray, "S P"], metric: str, seed: int = 0) -> Interval:
    """Mean of seeds x prompts with its interval; with one seed over prompts alone."""
    if not table.size:
        return UNKNOWN
    if len(table) == 1:
        return mean_interval(table[0], seed=seed)
    return interval(float(table.mean()), spread(table), *_range(metric))


# -- one arm, two arms -----------------------------------------------------------------------------------------------


class _Samples:
    """Resampled interquartile means, kept: the difference of two arms is that of their draws."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.kept: dict[Any, Drawn] = {}

    def iqm(self, table: np.ndarray) -> Drawn:
        key = table.shape, table.tobytes()
        if key not in self.kept:
            self.kept[key] = bootstrap(interquartile_draws(table), len(table), table.shape[1], self.seed)
        return self.kept[key]


def _estimate(arm: str, metric: str, scores: Mapping[int, np.ndarray], samples: _Samples) -> Estimate:
    table = table_of(scores)
    if not table.size:
        return Estimate(arm, metric)
    return Estimate(
        arm,
        metric,
        tuple(sorted(scores)),
        table.shape[1],
        tuple(float(mean) for mean in table.mean(1)),
        mean_of(table, metric, samples.seed),
        interval(interquartile_mean(table), samples.iqm(table).spread(), *_range(metric)),
    )


def _difference(
    arm: str, metric: str, mine: Mapping[int, np.ndarray], others: Mapping[int, np.ndarray], samples: _Samples
) -> Difference:
    common = sorted(set(mine) & set(others))
    if not common:
        lacking = "no finished cell" if not mine else "no finished cell of the baseline"
        return Difference(arm, metric, verdict=f"{UNTOLD}: {'no common seed' if mine and others else lacking}")
    x, y = (np.stack([scores[seed] for seed in common]) for scores in (mine, others))
    kept = np.isfinite(x).all(0) & np.isfinite(y).all(0)
    if not kept.any():
        return Difference(arm, metric, tuple(common), verdict=f"{UNTOLD}: no common prompt")
    x, y = np.ascontiguousarray(x[:, kept]), np.ascontiguousarray(y[:, kept])
    apart = np.where(np.isclose(x, y, rtol=1e-9, atol=1e-12), 0.0, x - y)  # rounding is no difference
    one, value, found = len(common) == 1, float(apart.mean()), spread(apart)
    wins = bootstrap(improvement_draws(x, y), len(x), x.shape[1], samples.seed).spread()
    return Difference(
        arm,
        metric,
        tuple(common),
        x.shape[1],
        difference_interval(y[0], x[0], seed=samples.seed) if one else interval(value, found),
        interval(interquartile_mean(x) - interquartile_mean(y), (samples.iqm(x) - samples.iqm(y)).spread()),
        interval(probability_of_improvement(x, y), wins, 0.0, 1.0),
        p=math.nan if one else p_value(value, found),
        verdict=f"{UNTOLD}: 1 seed" if one else UNTOLD,
        needed=seeds_needed(value, found),
    )


def _judged(found: Sequence[Difference], metrics: Sequence[str]) -> list[Difference]:
    """With adjusted p-values and verdicts. Half of the 5% goes to the metric that decides, half to all others."""
    counts = [sum(not math.isnan(d.p) for d in found if (d.metric == metrics[0]) == first) for first in (True, False)]
    weights = [1 / max(1, counts[0 if d.metric == metrics[0] else 1]) for d in found]
    adjusted = holm([d.p for d in found], weights)
    return [replace(d, adjusted=p, verdict=_verdict(d, p)) for d, p in zip(found, adjusted, strict=True)]


def _verdict(difference: Difference, adjusted: float) -> str:
    if math.isnan(adjusted):
        return difference.verdict
    if adjusted > SIGNIFICANT:
        return NO_DIFFERENCE
    good, more = direction(difference.metric), difference.mean.value > 0
    if good == 0:
        return HIGHER if more else LOWER
    return BETTER if (good > 0) == more else WORSE


# -- the whole -------------------------------------------------------------------------------------------------------


def _check(comparison: Comparison) -> None:
    names = [arm.name for arm in comparison.arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a comparison needs arms with names of their own, not {names}")
    places = [(o.arm, o.seed) for o in comparison.outcomes]
    for arm, seed in places:
        if arm not in names:
            raise ValueError(f"there is an outcome of '{arm}', which is no arm of the comparison")
        if places.count((arm, seed)) > 1:
            raise ValueError(f"there are several outcomes of '{arm}' with seed {seed}")
    sizes: dict[str, tuple[int, str]] = {}
    for o in comparison.outcomes:
        for metric, values in o.values.items():
            size, where = sizes.setdefault(metric, (len(values), f"'{o.arm}' with seed {o.seed}"))
            if o.status == "finished" and size != len(values):
                told = f"{where} measured {metric} on {size} prompts, '{o.arm}' with seed {o.seed} on {len(values)}"
                raise ValueError(f"cells are compared prompt by prompt, but {told}")


def _metrics(comparison: Comparison, wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    finished = [o for o in comparison.outcomes if o.status == "finished"]
    known = list(dict.fromkeys(name for o in finished for name in o.values))
    if wanted is not None:
        for name in wanted:
            if name not in known:
                raise ConfigError(f"no cell measured '{name}'.{nearest(name, known)}", "metrics", f"Known: {known}.")
        return list(dict.fromkeys(wanted)), []
    names = [*_LEADING, largest_pass(comparison), "log_loss", "reward", "kl", "entropy", "completions/mean_length"]
    chosen = [name for name in dict.fromkeys(names) if name in known]
    if {"reward", "pass@1"} <= set(chosen) and all(_same(o, "reward", "pass@1") for o in finished):
        chosen.remove("reward")
        return chosen, ["The reward is that of correct answers: its mean is pass@1, and stands there once."]
    return chosen, []


def _same(outcome: Outcome, one: str, other: str) -> bool:
    return np.array_equal(outcome.values.get(one, ()), outcome.values.get(other, ()), equal_nan=True)


def _scores(comparison: Comparison, arm: str, metric: str) -> dict[int, Float[np.ndarray, "N"]]:
    """Cells with a finite number for some prompt."""
    return {s: v for s, v in comparison.scores(arm, metric).items() if np.isfinite(v).any()}


def _before(comparison: Comparison, metrics: Sequence[str]) -> dict[str, Interval]:
    """All cells begin with the same weights: the first that was measured speaks for them."""
    found = {}
    for metric in metrics:
        values = next((o.before[metric] for o in comparison.outcomes if metric in o.before), None)
        if values is not None:
            found[metric] = mean_interval(np.asarray(values, dtype=float))
    return found


def _spent(cells: Sequence[Outcome]) -> Spent:
    if not cells:
        return Spent()
    return Spent(*(float(np.mean([getattr(cell, name) for cell in cells])) for name in ("tokens", "seconds", "steps")))


def _range(metric: str) -> tuple[float, float]:
    return (0.0, 1.0) if metric.startswith(_SHARES) or metric.endswith("_ratio") else (-math.inf, math.inf)


def _notes(comparison: Comparison, estimates: Sequence[Estimate], tables: Any, metrics: Sequence[str]) -> list[str]:
    notes, baseline = [], comparison.arms[0].name
    for arm in comparison.arms[1:]:
        if not metrics:
            break
        mine, others = (set(tables[name, metrics[0]]) for name in (arm.name, baseline))
        common = sorted(mine & others)
        if common and (mine | others) != set(common):
            seeds = ", ".join(map(str, common))
            notes.append(f"{arm.name} is held against {baseline} on the seeds that both finished: {seeds}.")
    for metric in metrics:
        sizes = {len(values) for arm in comparison.arms for values in tables[arm.name, metric].values()}
        fewest = min((e.prompts for e in estimates if e.metric == metric and e.prompts), default=0)
        if sizes and fewest < max(sizes):
            notes.append(
                f"{metric}: up to {max(sizes) - fewest} of {max(sizes)} prompts have no number in some cell; left out."
            )
        cells = [(arm.name, o.seed) for arm in comparison.arms for o in comparison.of(arm.name)]
        if lacking := [f"{arm} seed {s}" for arm, s in cells if s not in tables[arm, metric]]:
            notes.append(f"{metric} was not measured in {', '.join(lacking)}.")
    if any(len(e.seeds) == 1 for e in estimates):
        notes.append(
            "With one seed, intervals are over prompts alone. They leave out how much two runs of one method differ, "
            "and say something about these runs, not about the methods."
        )
    return notes
