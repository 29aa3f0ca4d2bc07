"""What the numbers of a run say, in words: one sentence a finding, with the number and the setting to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, variance
from typing import Any

from keel.evaluate.evaluation import Evaluation, change
from keel.evaluate.intervals import Interval

Curve = Sequence[tuple[int, float]]

TIED = (0.5, 0.8)  # share of groups with equal rewards: a warning, a problem
ENTROPY_LEFT = (0.4, 0.15)  # entropy at the end over entropy at the beginning
ENTROPY_GROWN = 2.5
CLIPPED_TOKENS = (0.2, 0.5)  # share of tokens outside the clip range
TRUNCATED = (0.1, 0.4)  # share of completions cut off by the length limit
LENGTH_GROWN = 2.0
LOGP_GAP = (0.02, 0.2)  # nats between sampler and trainer
SAMPLE_SIZE = (0.7, 0.3)  # effective sample size as a share of the rows
TARGET_WEIGHTS = (4.0, 1.5)  # effective completions of a group that carry the target
NOT_FINITE = 0.01  # share of steps above which lost updates are a problem
REWARD_STAYED = 0.02  # of the range of rewards
FEW = 5  # steps below which nothing is said about a course


class Level(StrEnum):
    """How much a finding matters."""

    PROBLEM = "problem"  # the run is unlikely to be worth anything as it is
    WARNING = "warning"  # something was lost
    NOTE = "note"  # worth knowing
    GOOD = "good"  # as it should be


@dataclass(frozen=True)
class Finding:
    """One thing that the numbers say.

    Args:
        level: how much it matters.
        sentence: what was seen, with the number, and what would change it.
        setting: path for `--set` of what would change it, or "".
    """

    level: Level
    sentence: str
    setting: str = ""


def diagnose(
    metrics: Mapping[str, Curve],
    config: Mapping[str, Any],
    before: Evaluation | None = None,
    after: Evaluation | None = None,
) -> list[Finding]:
    """Findings about a run, the gravest first; never empty.

    Args:
        metrics: curves of the training metrics, (step, value) by growing step.
        config: the resolved configuration, from which present values are told.
        before, after: evaluations of the policy before and after training.
    """
    run = _Run(metrics, config)
    found = [finding for check in _CHECKS for finding in check(run)]
    found += _evaluations(run, before, after)
    if not any(finding.level in (Level.PROBLEM, Level.WARNING) for finding in found):
        steps = max((len(curve) for curve in metrics.values()), default=0)
        what = f"Nothing unusual in the metrics of {steps} steps." if steps else "No metrics were logged."
        found.append(Finding(Level.GOOD if steps else Level.NOTE, what))
    return sorted(found, key=lambda finding: list(Level).index(finding.level))


class _Run:
    """Curves and configuration, with the few questions that the checks ask of them."""

    def __init__(self, metrics: Mapping[str, Curve], config: Mapping[str, Any]):
        self.metrics, self.config = metrics, config

    def finite(self, name: str) -> list[float]:
        return [value for _, value in self.metrics.get(name, ()) if math.isfinite(value)]

    def early(self, name: str) -> float | None:
        """Mean over the first tenth, of at least FEW steps; None where there are fewer than that."""
        values = self.finite(name)
        return fmean(values[: max(FEW, len(values) // 10)]) if len(values) >= FEW else None

    def late(self, name: str) -> float | None:
        """Mean over the last tenth, of at least FEW steps; None where there are fewer than that."""
        values = self.finite(name)
        return fmean(values[-max(FEW, len(values) // 10) :]) if len(values) >= FEW else None

    def course(self, name: str) -> tuple[float, float] | None:
        """Both, where they do not overlap."""
        early, late = self.early(name), self.late(name)
        return (early, late) if early is not None and late is not None and len(self.finite(name)) >= 2 * FEW else None

    def window(self, name: str) -> int:
        return max(FEW, len(self.finite(name)) // 10)

    def setting(self, *keys: str) -> tuple[str, str]:
        """Path for `--set` of the first of `keys` that the configuration has, and the text with its value."""
        for key in keys:
            for path, value in _entries(self.config):
                if value is not None and (path.split(".")[-1] == key or path == key):
                    return path, f"`{path}` (now {_short(value)})"
        return keys[0], f"`{keys[0]}`"


def _not_finite(run: _Run) -> Iterator[Finding]:
    for name in ("loss", "grad_norm"):
        curve = run.metrics.get(name, ())
        bad = [step for step, value in curve if not math.isfinite(value)]
        if bad:
            path, text = run.setting("learning_rate")
            yield Finding(
                Level.PROBLEM if len(bad) > NOT_FINITE * len(curve) else Level.WARNING,
                f"{name} was not a finite number on {_count(len(bad), 'step')}, first at step {bad[0]}; those updates "
                f"are lost: lower {text}.",
                path,
            )
            return


def _reward_errors(run: _Run) -> Iterator[Finding]:
    for name in sorted(run.metrics):
        if not (name.startswith("rewards/") and name.endswith("/errors")):
            continue
        counts = run.finite(name)
        if sum(counts) > 0:
            function = name.removeprefix("rewards/").removesuffix("/errors")
            hit = sum(count > 0 for count in counts)
            yield Finding(
                Level.PROBLEM if hit > len(counts) / 2 else Level.WARNING,
                f"The reward function {function} failed for {_count(int(sum(counts)), 'group')}, on {hit} of "
                f"{_count(len(counts), 'step')}; they were left out: mend it, or name another in `task.rewards`.",
                "task.rewards",
            )


def _tied_groups(run: _Run) -> Iterator[Finding]:
    share, reward = run.late("frac_reward_zero_std"), run.late("reward")
    level = _above(share, TIED)
    if share is None or level is None:
        return
    path, text = run.setting("num_generations")
    highest = max(run.finite("reward"), default=0.0)
    if reward is not None and reward > 0.8 * max(highest, 1.0):
        why = f"the prompts have become easy (reward {reward:.2f}): take harder ones, or raise {text}"
    elif reward is not None and reward < 0.2:
        why = f"the prompts are too hard (reward {reward:.2f}): take easier ones, or raise {text}"
    else:
        why = f"raise {text}, or take prompts of middling difficulty"
    steps = run.window("frac_reward_zero_std")
    yield Finding(
        level,
        f"In the last {steps} steps {share:.0%} of the groups had equal rewards and taught nothing; {why}.",
        path,
    )


def _entropy(run: _Run) -> Iterator[Finding]:
    course = run.course("entropy")
    if course is None:
        return
    early, late = course
    level = _below(late / early, ENTROPY_LEFT) if early > 0 else None
    if level is not None:
        path, text = run.setting("beta")
        yield Finding(
            level,
            f"Entropy fell from {early:.3g} to {late:.3g} nats a token, so that samples of a prompt hardly differ any "
            f"more: raise {text}, the penalty towards the reference, or lower {run.setting('learning_rate')[1]}.",
            path,
        )
    elif early > 0 and late > ENTROPY_GROWN * early:
        path, text = run.setting("learning_rate")
        yield Finding(
            Level.WARNING,
            f"Entropy rose from {early:.3g} to {late:.3g} nats a token, as it does when a policy falls apart: lower "
            f"{text}.",
            path,
        )


def _clipping(run: _Run) -> Iterator[Finding]:
    if run.finite("clip_ratio/region_mean"):
        share = run.late("clip_ratio/region_mean")
    else:
        low, high = run.late("clip_ratio/low_mean"), run.late("clip_ratio/high_mean")
        share = None if low is None and high is None else (low or 0.0) + (high or 0.0)
    level = _above(share, CLIPPED_TOKENS)
    if level is not None:
        path, text = run.setting("learning_rate")
        yield Finding(
            level,
            f"In the end {share:.0%} of the tokens lay outside the clip range and had no gradient: the policy moves "
            f"too far within one batch: lower {text}, or `num_iterations`.",
            path,
        )


def _length(run: _Run) -> Iterator[Finding]:
    path, text = run.setting("max_completion_length")
    truncated = run.late("completions/clipped_ratio")
    level = _above(truncated, TRUNCATED)
    course = run.course("completions/mean_length")
    if level is not None:
        yield Finding(
            level,
            f"In the end {truncated:.0%} of the completions were cut off by the length limit and judged unfinished: "
            f"raise {text}, or shape the reward of long ones.",
            path,
        )
    elif course is not None and course[1] > LENGTH_GROWN * course[0] > 0:
        yield Finding(
            Level.NOTE,
            f"Completions grew from {course[0]:.0f} to {course[1]:.0f} tokens; none of it is lost while they end "
            f"before {text}.",
            path,
        )


def _sampler_gap(run: _Run) -> Iterator[Finding]:
    gap = run.late("rollout/logp_gap")
    level = _above(gap, LOGP_GAP)
    if level is not None:
        path, text = run.setting("dtype")
        yield Finding(
            level,
            f"Sampler and trainer disagree by {gap:.2g} nats a token about the same weights, so that the policy "
            f"gradient is off: raise the precision in {text}, or weigh with truncated importance sampling.",
            path,
        )


def _sample_size(run: _Run) -> Iterator[Finding]:
    share = run.late("rollout/ess")
    level = _below(share, SAMPLE_SIZE)
    if level is not None:
        path, text = run.setting("dtype")
        yield Finding(
            level,
            f"The importance weights between sampler and trainer leave an effective sample size of {share:.0%}: raise "
            f"the precision in {text}, or truncate the weights.",
            path,
        )


def _target_weights(run: _Run) -> Iterator[Finding]:
    """How few completions of a group the target's weights rest on; a share of the rows for those of the reference."""
    level = _below(effective := run.late("target/ess"), TARGET_WEIGHTS)
    if level is not None:
        path, text = run.setting("num_generations")
        yield Finding(
            level,
            f"The target's weights rest on {effective:.1f} completions of a group: it lies too far from what is "
            f"sampled (a group of n reaches about log n nats). Raise {text}, or ask for less with a larger beta.",
            path,
        )
    level = _below(share := run.late("reference_share/ess"), SAMPLE_SIZE)
    if level is not None:
        yield Finding(
            level,
            f"The weights that stand for data of the reference leave an effective sample size of {share:.0%}: the "
            "policy has gone far from it. Lower train.learning_rate, or raise real_fraction.",
            "train.learning_rate",
        )


def _dead_penalties(run: _Run) -> Iterator[Finding]:
    for name in sorted(run.metrics):
        values = run.finite(name)
        if not name.startswith("terms/") or name == "terms/policy" or len(values) < FEW or any(values):
            continue
        term = name.removeprefix("terms/")
        path = f"terms.{term}.coef"
        coefficient = dict(_entries(run.config)).get(path)
        if coefficient == 0:
            continue
        now = "" if coefficient is None else f" (now {_short(coefficient)})"
        # Terms are logged for the first update of a batch, where the distance from the old policy is 0 by definition.
        more = any(key.split(".")[-1] in _UPDATES and value not in (1, None) for key, value in _entries(run.config))
        yield Finding(
            Level.NOTE if more else Level.WARNING,
            f"The term {term} was exactly 0 {'at the first update of' if more else 'in'} all {len(values)} batches"
            f"{'' if more else ', so that it did nothing'}: look at what it compares, or set `{path}`{now} to 0.",
            path,
        )


def _reward(run: _Run) -> Iterator[Finding]:
    course = run.course("reward")
    if course is None:
        return
    early, late = course
    values = run.finite("reward")
    # Two standard errors of the difference of both means: less is the noise of the prompts drawn.
    count = run.window("reward")
    noise = 2 * math.sqrt((variance(values[:count]) + variance(values[-count:])) / count)
    margin = max(REWARD_STAYED * max(1.0, max(values) - min(values)), noise)
    path, text = run.setting("learning_rate")
    if late < early - margin:
        yield Finding(
            Level.PROBLEM, f"The reward fell from {early:.3g} to {late:.3g}: lower {text}, or look at the reward.", path
        )
    elif late < early + margin:
        yield Finding(
            Level.NOTE,
            f"The reward hardly moved, from {early:.3g} to {late:.3g}: train longer, or change {text}.",
            path,
        )


_UPDATES = ("num_iterations", "num_minibatches")

_CHECKS = (
    _not_finite,
    _reward_errors,
    _reward,
    _tied_groups,
    _entropy,
    _clipping,
    _length,
    _sampler_gap,
    _sample_size,
    _target_weights,
    _dead_penalties,
)


def _evaluations(run: _Run, before: Evaluation | None, after: Evaluation | None) -> list[Finding]:
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


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(path for `--set`, value) of all that a configuration holds, the recipe's arguments and the slots first."""
    recipe, method = config.get("recipe"), config.get("method")
    if isinstance(recipe, Mapping):
        yield from _leaves(recipe.get("arguments") or {})
    if isinstance(method, Mapping):
        yield from _leaves({slot: part for slot, part in method.items() if slot != "claim"})
    yield from _leaves({name: part for name, part in config.items() if name not in ("recipe", "method")})


def _leaves(part: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(part, Mapping):
        for name, inner in part.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    elif path:
        yield path, part


def _above(value: float | None, limits: tuple[float, float]) -> Level | None:
    if value is None or value <= limits[0]:
        return None
    return Level.PROBLEM if value > limits[1] else Level.WARNING


def _below(value: float | None, limits: tuple[float, float]) -> Level | None:
    if value is None or value >= limits[0]:
        return None
    return Level.PROBLEM if value < limits[1] else Level.WARNING


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
