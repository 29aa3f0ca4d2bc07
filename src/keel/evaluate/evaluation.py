"""From samples of held-out prompts to an evaluation: what was measured, with intervals, ready for the store."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from keel.evaluate.intervals import Interval, difference_interval, mean_interval
from keel.evaluate.pass_at_k import avg_at_k, distinct_answers, majority_at_k, pass_at_k

if TYPE_CHECKING:
    from keel.evaluate.support import Support

KS = (1, 2, 4, 8, 16)
THRESHOLD = 0.5


@dataclass(frozen=True)
class Completion:
    """One completion kept to be looked at.

    Args:
        index: data index of its prompt, by which evaluations before and after training are laid side by side.
        prompt, text: as a person reads them.
        reward: NaN where it could not be scored.
        answer: canonical answer as text, or None.
        length: tokens that the model chose.
        clipped: whether the length limit cut it off.
    """

    index: int
    prompt: str
    text: str
    reward: float
    answer: str | None
    length: int
    clipped: bool


@dataclass(frozen=True, eq=False)
class Samples:
    """n samples of each of N prompts, scored.

    Args:
        reward: total reward; NaN where the reward function failed: such samples count nowhere, and are reported.
        lengths: tokens that the model chose.
        clipped: cut off by the length limit.
        verdict: the number that tells correct from wrong, where that is not the total reward.
        answers: canonical answers; None for "no answer".
        entropy: mean entropy per token of each sample, in nats.
        kl: mean KL per token of each sample against the reference, in nats.
        index: data index of each prompt.
        completions: a few to look at.
        texts: what was completed, without surrounding white space.
        rewards: what each reward function said, by name, where there are several.

    Raises:
        ValueError: the shapes differ, or there are no samples.
    """

    reward: Float[np.ndarray, "N n"]
    lengths: Int[np.ndarray, "N n"]
    clipped: Bool[np.ndarray, "N n"]
    verdict: Float[np.ndarray, "N n"] | None = None
    answers: Sequence[Sequence[Hashable | None]] | None = None
    entropy: Float[np.ndarray, "N n"] | None = None
    kl: Float[np.ndarray, "N n"] | None = None
    index: tuple[int, ...] = ()
    completions: tuple[Completion, ...] = ()
    texts: Sequence[Sequence[str]] | None = None
    rewards: Mapping[str, Float[np.ndarray, "N n"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.reward.shape
        if len(shape) != 2 or not self.reward.size:
            raise ValueError(f"samples need a reward for each prompt and sample, not an array of shape {shape}")
        for name in ("lengths", "clipped", "verdict", "entropy", "kl"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"samples: '{name}' has shape {value.shape}, the rewards have {shape}")
        for name in ("answers", "texts"):
            value = getattr(self, name)
            if value is not None and [len(row) for row in value] != [shape[1]] * shape[0]:
                raise ValueError(f"samples: '{name}' must hold {shape[0]} lists of {shape[1]}")
        if self.index and len(self.index) != shape[0]:
            raise ValueError(f"samples: 'index' has {len(self.index)} entries for {shape[0]} prompts")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a policy can do.

    Args:
        metrics: estimates with 95% intervals over prompts. `pass@k`, `avg@k` and `maj@k` (of the largest k), `reward`,
            `completions/mean_length`, `completions/clipped_ratio`, and where they were measured `entropy`, `kl` (nats
            per token), `distinct_answers` (among the samples of a prompt), and `rewards/NAME/mean` where there are
            several reward functions.
        values: the same for each prompt, NaN where a prompt has none.
        samples: of each prompt.
        errors: samples that could not be scored.
        threshold: a sample is correct if its verdict is above it.
        seed: of the resampling.
        index: data index of each prompt.
        completions: a few to look at.
        support: which correct answers of a base it keeps, gains and loses, where that was measured.
    """

    metrics: dict[str, Interval]
    values: dict[str, tuple[float, ...]]
    samples: int
    errors: int = 0
    threshold: float = THRESHOLD
    seed: int = 0
    index: tuple[int, ...] = ()
    completions: tuple[Completion, ...] = ()
    support: Support | None = None

    @property
    def prompts(self) -> int:
        """How many prompts were measured; comparisons, where nothing was sampled."""
        return len(self.values["reward"]) if "reward" in self.values else len(self.index)

    def pass_curve(self) -> list[tuple[int, Interval]]:
        """(k, pass@k) by growing k."""
        found = ((name.removeprefix("pass@"), value) for name, value in self.metrics.items() if name[:5] == "pass@")
        return sorted(((int(k), value) for k, value in found), key=lambda point: point[0])

    def largest(self, kind: str) -> str | None:
        """Name of the metric of a kind ("pass", "avg", "maj") with the largest k, or None."""
        names = [name for name in self.metrics if name.startswith(f"{kind}@")]
        return max(names, key=lambda name: int(name.split("@")[1]), default=None)

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries; null for NaN."""
        return {
            "prompts": self.prompts,
            "samples": self.samples,
            "errors": self.errors,
            "threshold": self.threshold,
            "seed": self.seed,
            "metrics": {name: interval.to_json() for name, interval in self.metrics.items()},
            "values": {name: [_null(number) for number in column] for name, column in self.values.items()},
            "index": list(self.index),
            "completions": [{**asdict(kept), "reward": _null(kept.reward)} for kept in self.completions],
        } | ({} if self.support is None else {"support": self.support.to_json()})

    @staticmethod
    def from_json(data: Any) -> Evaluation:
        """The inverse of `to_json`.

        Raises:
            ValueError: something that `to_json` writes is missing, or of another kind.
        """
        try:
            known = {f.name for f in fields(Completion)}
            support = data.get("support")
            if support is not None:
                from keel.evaluate.support import Support

                support = Support.from_json(support)
            return Evaluation(
                metrics={name: Interval.from_json(numbers) for name, numbers in data["metrics"].items()},
                values={name: tuple(_nan(number) for number in column) for name, column in data["values"].items()},
                samples=int(data["samples"]),
                errors=int(data["errors"]),
                threshold=float(data["threshold"]),
                seed=int(data["seed"]),
                index=tuple(data["index"]),
                completions=tuple(
                    Completion(**{key: kept[key] for key in known - {"reward"}}, reward=_nan(kept["reward"]))
                    for kept in data["completions"]
                ),
                support=support,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no evaluation of Keel: {type(error).__name__}: {error}") from error


def assess(samples: Samples, ks: Sequence[int] = KS, seed: int = 0, threshold: float = THRESHOLD) -> Evaluation:
    """Measure samples.

    A sample is correct if its verdict (the reward, unless `samples.verdict` says otherwise) is above `threshold`. Every
    metric is a mean over prompts of one number for each prompt; entropy, KL and length are means over a prompt's
    samples, each sample counting the same. Samples that could not be scored are left out; a prompt with fewer than k
    scored samples has no pass@k.

    Args:
        samples: what to measure.
        ks: the numbers of tries; those above the number of samples are left out.
        seed: of the bootstrap.
        threshold: what counts as correct is above it.

    Raises:
        ValueError: no k between 1 and the number of samples.
    """
    verdict = samples.reward if samples.verdict is None else samples.verdict
    scored = ~np.isnan(samples.reward) & ~np.isnan(verdict)
    correct = np.where(scored, verdict, -np.inf) > threshold
    usable = sorted({k for k in ks if 1 <= k <= samples.reward.shape[1]})
    if not usable:
        raise ValueError(f"no k of {tuple(ks)} lies between 1 and {samples.reward.shape[1]}, the samples of a prompt")
    values = _success(correct, scored, usable)
    if samples.answers is not None:
        values |= _answers(samples.answers, correct, scored, usable[-1])
    values["reward"] = _row_mean(samples.reward, scored)
    for name, column in samples.rewards.items():
        values[f"rewards/{name}/mean"] = _row_mean(column, ~np.isnan(column))
    everything = np.ones_like(scored)
    for name, measured in (("entropy", samples.entropy), ("kl", samples.kl)):
        if measured is not None:
            values[name] = _row_mean(measured, ~np.isnan(measured))
    values["completions/mean_length"] = _row_mean(samples.lengths, everything)
    values["completions/clipped_ratio"] = _row_mean(samples.clipped, everything)
    return Evaluation(
        metrics={name: mean_interval(column, seed=seed) for name, column in values.items()},
        values={name: tuple(column.tolist()) for name, column in values.items()},
        samples=samples.reward.shape[1],
        errors=int((~scored).sum()),
        threshold=threshold,
        seed=seed,
        index=samples.index,
        completions=samples.completions,
    )


def change(before: Evaluation, after: Evaluation, metric: str) -> Interval | None:
    """after - before, prompt by prompt, with its interval; None unless both measured `metric` on the same prompts."""
    first, last = before.values.get(metric), after.values.get(metric)
    if first is None or last is None or len(first) != len(last) or before.index != after.index:
        return None
    return difference_interval(np.asarray(first), np.asarray(last), seed=after.seed)


def _success(correct: np.ndarray, scored: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    n, c = scored.sum(1), correct.sum(1)
    values = {f"pass@{k}": _where(n >= k, lambda kept, k=k: pass_at_k(n[kept], c[kept], k)) for k in ks}
    values[f"avg@{ks[-1]}"] = _where(n >= 1, lambda kept: avg_at_k(n[kept], c[kept]))
    return values


def _answers(answers, correct: np.ndarray, scored: np.ndarray, k: int) -> dict[str, np.ndarray]:
    majority = np.full(len(correct), math.nan)
    for place, row in enumerate(answers):
        kept = np.flatnonzero(scored[place])
        if len(kept) >= k:
            majority[place] = majority_at_k([row[i] for i in kept], correct[place, kept], k)
    return {
        f"maj@{k}": majority,
        "distinct_answers": np.array([distinct_answers(row) for row in answers], dtype=float),
    }


def _where(kept: np.ndarray, compute) -> np.ndarray:
    column = np.full(len(kept), math.nan)
    if kept.any():
        column[kept] = compute(kept)
    return column


def _row_mean(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean over the counted samples of each prompt, NaN without any."""
    total = np.where(counted, values, 0.0).sum(1, dtype=float)
    return np.divide(total, counted.sum(1), out=np.full(len(total), math.nan), where=counted.any(1))


def _null(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _nan(number: float | None) -> float:
    return math.nan if number is None else float(number)
