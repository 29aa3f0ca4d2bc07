"""Which correct answers a policy keeps, gains and loses against its base under a large number of samples.

An answer is a class of completions with the same canonical form, or a single completion where that is asked for. Over
all pairs of a prompt and a correct answer

    preserved P: both have it        gained E: the policy alone        lost S: the base alone

    SRR = P / (P + S)    support retention        NDR = E / (P + E)    net discovery
    SDS = 2 SRR NDR / (SRR + NDR) = 2 P E / (P^2 + 2 P E + E S)
    NSCR = (E - S) / (P + E + S)                  net change of the support

Source: "The Invisible Leash: Why RLVR May Not Escape Its Origin", 2025.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from keel.evaluate.evaluation import THRESHOLD, Samples
from keel.evaluate.intervals import LEVEL, RESAMPLES, Interval

METRICS = ("srr", "ndr", "sds", "nscr")
Classes = Literal["answer", "completion"]


@dataclass(frozen=True, eq=False)
class Counts:
    """Correct answers of each prompt, by who has them.

    Args:
        preserved: P, those of both.
        gained: E, those of the policy alone.
        lost: S, those of the base alone.
    """

    preserved: Int[np.ndarray, "N"]
    gained: Int[np.ndarray, "N"]
    lost: Int[np.ndarray, "N"]

    def ratios(self) -> dict[str, float]:
        """SRR, NDR, SDS and NSCR over all prompts; NaN where there is nothing to divide by.

        >>> found = Counts(np.array([2400]), np.array([36]), np.array([163])).ratios()
        >>> {name: round(value, 6) for name, value in found.items()}
        {'srr': 0.936403, 'ndr': 0.014778, 'sds': 0.029097, 'nscr': -0.048865}
        """
        found = _ratios(self.preserved.sum(), self.gained.sum(), self.lost.sum())
        return {name: float(value) for name, value in found.items()}

    def totals(self) -> dict[str, int]:
        """P, E and S over all prompts."""
        return {name: int(getattr(self, name).sum()) for name in ("preserved", "gained", "lost")}


def detectable(k: int, confidence: float = 0.95) -> float:
    """The probability that k samples find with the given confidence: eps = 1 - (1 - confidence)^(1 / k), about 3 / k.

    >>> round(detectable(8192) * 8192, 3)
    2.995
    """
    if k < 1 or not 0 < confidence < 1:
        raise ValueError(f"k must be at least 1 and confidence in (0, 1), not {k} and {confidence}")
    return -math.expm1(math.log1p(-confidence) / k)


def exact_support(
    policy: Float[np.ndarray, "N A"], base: Float[np.ndarray, "N A"], correct: Bool[np.ndarray, "N A"], eps: float
) -> Counts:
    """Counts from probabilities: an answer is had where its probability is above eps.

    Args:
        policy, base: probability of each answer to each prompt.
        correct: which answers are.
        eps: threshold; `detectable(k)` is that of k samples.
    """
    has, had = correct & (policy > eps), correct & (base > eps)
    return Counts((has & had).sum(1), (has & ~had).sum(1), (~has & had).sum(1))


def sampled_support(
    policy: Samples, base: Samples, threshold: float = THRESHOLD, classes: Classes = "answer"
) -> Counts:
    """Counts from samples: an answer is had where it appears among the k samples of its prompt.

    Correct samples without a canonical answer form one class.

    Args:
        policy, base: samples of the same prompts.
        threshold: a sample is correct if its verdict is above it.
        classes: "answer" takes all completions with one canonical answer as one, "completion" each text by itself.

    Raises:
        ValueError: no answers, other prompts, or another number of samples: more samples find more answers.
    """
    if policy.reward.shape != base.reward.shape or policy.index != base.index:
        shapes = f"{policy.reward.shape} and {base.reward.shape}"
        raise ValueError(f"support needs the same prompts and the same k on both sides, not {shapes}")
    has, had = (_correct_answers(samples, threshold, classes) for samples in (policy, base))
    pairs = list(zip(has, had, strict=True))
    return Counts(
        np.array([len(a & b) for a, b in pairs]),
        np.array([len(a - b) for a, b in pairs]),
        np.array([len(b - a) for a, b in pairs]),
    )


def answer_entropy(answers: Sequence[Hashable | None]) -> float:
    """-sum_a p(a) log p(a) over the answers of a prompt's samples, right or wrong, in nats; NaN if none gave any.

    It is the plug-in estimate, which is too low by about (answers - 1) / (2 samples): compare it at equal k.

    >>> round(answer_entropy(["x", "x", "y", None]), 6)
    0.636514
    """
    count = Counter(answer for answer in answers if answer is not None)
    total = count.total()
    return -sum(c / total * math.log(c / total) for c in count.values()) if total else math.nan


@dataclass(frozen=True)
class Side:
    """What one sampled model shows.

    Args:
        correct_answers: different correct answers among the samples of a prompt, the mean over prompts.
        answer_entropy: of the answers of a prompt's samples, the mean over prompts, in nats.
        token_entropy: mean over the tokens of its own samples, in nats.
    """

    correct_answers: Interval
    answer_entropy: Interval
    token_entropy: Interval


@dataclass(frozen=True)
class Support:
    """The support of a policy against that of its base, beside what chance alone does to the base.

    k samples miss answers at random, so the base loses and gains some against itself: `null` is the base, sampled a
    second time, against its first samples. `beyond_chance` is the difference of the two, prompt by prompt.

    Args:
        k: samples of each prompt, on every side.
        eps: probability of an answer that k samples find with 95%.
        classes: what counts as one answer, "answer" or "completion".
        ratios, null, beyond_chance: SRR, NDR, SDS and NSCR with intervals over prompts.
        counts, null_counts: P, E and S.
        policy, base: answers and entropies of each.
        warnings: why the numbers are not what they seem.
    """

    k: int
    eps: float
    classes: Classes
    ratios: dict[str, Interval]
    null: dict[str, Interval]
    beyond_chance: dict[str, Interval]
    counts: dict[str, int]
    null_counts: dict[str, int]
    policy: Side
    base: Side
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries; null for NaN."""
        plain: dict[str, Any] = {"k": self.k, "eps": self.eps, "classes": self.classes}
        for name in ("ratios", "null", "beyond_chance"):
            plain[name] = {key: value.to_json() for key, value in getattr(self, name).items()}
        for name in ("policy", "base"):
            plain[name] = {key: Interval(**value).to_json() for key, value in asdict(getattr(self, name)).items()}
        return plain | {"counts": self.counts, "null_counts": self.null_counts, "warnings": list(self.warnings)}

    @staticmethod
    def from_json(data: Any) -> Support:
        """The inverse of `to_json`."""

        def intervals(numbers: Any) -> dict[str, Interval]:
            return {key: Interval.from_json(value) for key, value in numbers.items()}

        return Support(
            k=int(data["k"]),
            eps=float(data["eps"]),
            classes=data["classes"],
            ratios=intervals(data["ratios"]),
            null=intervals(data["null"]),
            beyond_chance=intervals(data["beyond_chance"]),
            counts={name: int(value) for name, value in data["counts"].items()},
            null_counts={name: int(value) for name, value in data["null_counts"].items()},
            policy=Side(**intervals(data["policy"])),
            base=Side(**intervals(data["base"])),
            warnings=tuple(data["warnings"]),
        )


def compare_support(
    policy: Samples,
    base: Samples,
    again: Samples,
    seed: int = 0,
    threshold: float = THRESHOLD,
    classes: Classes = "answer",
    warnings: Sequence[str] = (),
) -> Support:
    """The support of a policy against its base.

    Args:
        policy, base, again: samples of the policy, and two independent ones of the base, for the same prompts.
        seed: of the bootstrap.
        threshold, classes: as in `sampled_support`.
        warnings: what the user should know of the sampling.

    Raises:
        ValueError: no answers, other prompts, or another number of samples.
    """
    counts = sampled_support(policy, base, threshold, classes)
    null = sampled_support(again, base, threshold, classes)
    drawn = _resampled(len(policy.reward), seed)
    real, chance = (_bootstrap(found, drawn) for found in (counts, null))
    return Support(
        k=policy.reward.shape[1],
        eps=detectable(policy.reward.shape[1]),
        classes=classes,
        ratios={name: _interval(value, many) for name, (value, many) in real.items()},
        null={name: _interval(value, many) for name, (value, many) in chance.items()},
        beyond_chance={n: _interval(real[n][0] - chance[n][0], real[n][1] - chance[n][1]) for n in METRICS},
        counts=counts.totals(),
        null_counts=null.totals(),
        policy=_side(policy, counts.preserved + counts.gained, classes, drawn),
        base=_side(base, counts.preserved + counts.lost, classes, drawn),
        warnings=tuple(warnings),
    )


def _ratios(p, e, s) -> dict[str, np.ndarray]:
    p, e, s = (np.asarray(x, dtype=float) for x in (p, e, s))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "srr": p / (p + s),
            "ndr": e / (p + e),
            "sds": 2 * p * e / (p * p + 2 * p * e + e * s),
            "nscr": (e - s) / (p + e + s),
        }


def _classes(samples: Samples, classes: Classes) -> Sequence[Sequence[Hashable | None]]:
    found = samples.answers if classes == "answer" else samples.texts
    if found is None:
        raise ValueError(f"support by {classes} needs the {classes} of each sample, and these have none")
    return found


def _correct_answers(samples: Samples, threshold: float, classes: Classes) -> list[set[Hashable | None]]:
    verdict = samples.reward if samples.verdict is None else samples.verdict
    correct = np.where(np.isnan(samples.reward) | np.isnan(verdict), -np.inf, verdict) > threshold
    return [
        {answer for answer, right in zip(row, marks, strict=True) if right}
        for row, marks in zip(_classes(samples, classes), correct, strict=True)
    ]


def _side(samples: Samples, correct: np.ndarray, classes: Classes, drawn: Int[np.ndarray, "R N"]) -> Side:
    entropy = np.array([answer_entropy(row) for row in _classes(samples, classes)])
    tokens = samples.lengths.sum(1).astype(float)
    spent = np.full(len(tokens), math.nan)
    if samples.entropy is not None:
        spent = (np.nan_to_num(samples.entropy) * samples.lengths).sum(1)
    return Side(
        _mean(correct.astype(float), np.ones(len(correct)), drawn),
        _mean(np.nan_to_num(entropy), (~np.isnan(entropy)).astype(float), drawn),
        _mean(spent, tokens, drawn),
    )


def _resampled(prompts: int, seed: int) -> Int[np.ndarray, "R N"]:
    """Prompts drawn with replacement: how often each is in each resample; of one prompt nothing is known."""
    if prompts == 1:
        return np.zeros((RESAMPLES, 1), dtype=int)
    from keel.core.choice import counter_seed  # late: it imports torch

    rng = np.random.default_rng(counter_seed(seed, "support"))
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)


def _bootstrap(counts: Counts, drawn: Int[np.ndarray, "R N"]) -> dict[str, tuple[float, np.ndarray]]:
    many = _ratios(drawn @ counts.preserved, drawn @ counts.gained, drawn @ counts.lost)
    return {name: (value, many[name]) for name, value in counts.ratios().items()}


def _mean(total: np.ndarray, size: np.ndarray, drawn: Int[np.ndarray, "R N"]) -> Interval:
    with np.errstate(divide="ignore", invalid="ignore"):
        return _interval(float(total.sum() / size.sum()), (drawn @ total) / (drawn @ size))


def _interval(value: float, many: np.ndarray) -> Interval:
    """Percentiles of the resamples; unknown where half of them leave the number undefined, and for one prompt."""
    kept = many[~np.isnan(many)]
    if math.isnan(value) or 2 * len(kept) < RESAMPLES:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
