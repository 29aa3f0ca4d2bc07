"""A reward without preferences: how much an answer is about its question, how long it is, and how little it repeats.

    R3 = M(x) . M(y) * LI * RP      open questions
         F(M(y*) . M(y)) * RP       closed questions, which have a reference answer y*

M is an embedding of length 1.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from keel.core.errors import ConfigError, UserError
from keel.core.registry import part
from keel.tasks.task import Text, completion_text

HASHED = "hashed"
_WORD = re.compile(r"\w+")


@runtime_checkable
class Embedder(Protocol):
    """Texts to vectors; their lengths do not matter."""

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """A vector for each text."""
        ...


@part("hashed_words")
@dataclass(frozen=True)
class HashedWords:
    """An embedder without a model: 1 + log of the count of each word and of each of its parts of `letters` letters.

    Each of them has a place and a sign that its hash decides, so that nothing has to be fitted or loaded. It sees words
    and their forms, no meaning: for that, name a model of sentence-transformers.

    Args:
        size: of the vectors.
        letters: of the parts of words; 0 takes whole words only.

    Raises:
        ValueError: a size below 1, or letters below 0.

    Source: feature hashing, "Feature Hashing for Large Scale Multitask Learning", 2009.
    """

    size: int = 4096
    letters: int = 4

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, not {self.size}")
        if self.letters < 0:
            raise ValueError(f"letters must not be negative, got {self.letters}")

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        out = np.zeros((len(texts), self.size))
        for i, text in enumerate(texts):
            for feature, count in Counter(self._features(text)).items():
                place, sign = _place(feature)
                out[i, place % self.size] += sign * (1 + math.log(count))
        return out

    def _features(self, text: str) -> list[str]:
        words = _WORD.findall(text.casefold())
        marked = [f"<{word}>" for word in words] if self.letters else []
        inner = [w[i : i + self.letters] for w in marked for i in range(len(w) - self.letters + 1)]
        return words + [f"part {feature}" for feature in inner]


@lru_cache(maxsize=1 << 16)
def _place(feature: str) -> tuple[int, float]:
    number = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "big")
    return number >> 1, 1.0 if number & 1 else -1.0


def embedder(name: str | Embedder) -> Embedder:
    """`hashed`, a model of sentence-transformers by name or folder, or an embedder of one's own.

    Raises:
        UserError: sentence-transformers is not installed.
    """
    if not isinstance(name, str):
        return name
    return HashedWords() if name == HASHED else _sentences(name)


@lru_cache(maxsize=2)
def _sentences(name: str) -> Embedder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        fix = "pip install sentence-transformers, or take embedder='hashed', which needs no model."
        raise UserError("the package sentence-transformers is not installed", f"embedder {name!r}", fix) from error
    model = SentenceTransformer(name)

    def embed(texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        return np.asarray(model.encode(list(texts), show_progress_bar=False), dtype=np.float64)

    return embed


def relevance(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n"]:
    """Cosine of the angle between vectors, row by row; 0 where one has no length.

    >>> relevance(np.array([[3.0, 0.0]]), np.array([[4.0, 3.0]])).tolist()
    [0.8]
    """
    length = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    product = (first * second).sum(1)
    return np.divide(product, length, out=np.zeros_like(product, dtype=float), where=length > 0)


def length_incentive(words: int, per: float = 100.0, cap: float = 1.0) -> float:
    """LI = min(words / per, cap).

    >>> length_incentive(9)
    0.09
    """
    return min(words / per, cap)


def repetition(words: Sequence[str]) -> float:
    """RP = different trigrams / trigrams; 1 for fewer than three words, which cannot repeat one.

    >>> round(repetition("a b c a b c a b c".split()), 6)
    0.428571
    """
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


@part("quantile_map", paper=70)
@dataclass(frozen=True)
class QuantileMap:
    """A monotone map through quantiles of one sample to those of another, constant beyond the outermost.

    Args:
        source, target: the quantiles, not decreasing.

    Raises:
        ValueError: fewer than two, not as many of one as of the other, or decreasing ones.
    """

    source: tuple[float, ...]
    target: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.source) != len(self.target) or len(self.source) < 2:
            raise ValueError(f"{len(self.source)} quantiles for {len(self.target)}: give as many of each, at least two")
        for name in ("source", "target"):
            if any(b < a for a, b in zip(getattr(self, name), getattr(self, name)[1:], strict=False)):
                raise ValueError(f"{name} must not decrease")

    @staticmethod
    def fit(source: Sequence[float], target: Sequence[float], count: int = 11) -> "QuantileMap":
        """From samples: relevances of closed answers to their references, and relevance * LI of open answers.

        >>> QuantileMap.fit([0.0, 0.5, 1.0], [0.0, 0.1, 0.2], 3)(0.75)
        0.15000000000000002

        Raises:
            ValueError: an empty sample, or fewer than two quantiles.
        """
        if not len(source) or not len(target):
            raise ValueError("a map of quantiles needs a sample of both")
        if count < 2:
            raise ValueError(f"count must be at least 2, not {count}")
        levels = np.linspace(0, 1, count)
        first, second = np.quantile(source, levels).tolist(), np.quantile(target, levels).tolist()
        return QuantileMap(tuple(first), tuple(second))

    def __call__(self, value: float) -> float:
        """The mapped value."""
        return float(np.interp(value, self.source, self.target))


@part("relevance_reward", paper=70)
@dataclass(frozen=True)
class RelevanceReward:
    """Reward: relevance times length incentive times repetition factor; for closed questions that to the reference.

    A question is closed where the column `open_ended` is false, or, without that column, where the column `reference`
    has an answer. The reward is at most max(cap, 1), and at least 0: a product of a negative relevance would reward
    short and repetitive answers, so it counts as 0.

    Args:
        embedder: `hashed`, a model of sentence-transformers (the paper's is facebook/contriever), or one's own.
        per: words at which the length incentive is 1.
        cap: of the length incentive.
        closed: F, which brings relevances to a reference to the range of the open branch; None leaves them.

    Raises:
        ValueError: per or cap not positive.

    Source: "Preference-free Alignment Learning with Regularized Relevance Reward", 2024; cap, the cosine in place of a
    product without a bound, and F by quantiles are added here.
    """

    embedder: str | Embedder = HASHED
    per: float = 100.0
    cap: float = 1.0
    closed: QuantileMap | None = None

    def __post_init__(self) -> None:
        for name in ("per", "cap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        reference: Sequence[Any] | None = None,
        open_ended: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        count = len(completions)
        answers = [completion_text(c) for c in completions]
        known = [None] * count if reference is None else list(reference)
        is_open = [_is_open(k, None if open_ended is None else open_ended[i], i) for i, k in enumerate(known)]
        other = [completion_text(p) if o else str(k) for p, o, k in zip(prompts, is_open, known, strict=True)]
        embed: Callable[..., Any] = embedder(self.embedder)
        found = relevance(embed(other), embed(answers)).clip(0, 1) if count else np.zeros(0)
        return [self.score(float(r), answers[i], is_open[i]) for i, r in enumerate(found)]

    def score(self, relevance: float, answer: str, open_ended: bool = True) -> float:
        """R3 of an answer whose relevance is known."""
        words = answer.split()
        if open_ended:
            return relevance * length_incentive(len(words), self.per, self.cap) * repetition(words)
        return (relevance if self.closed is None else self.closed(relevance)) * repetition(words)


def _is_open(reference: Any, said: Any, row: int) -> bool:
    if said is None:
        return reference is None
    if not said and reference is None:
        fix = "Give the column `reference`, or call the question open."
        raise ConfigError(f"row {row} is a closed question without a reference answer", "RelevanceReward", fix)
    return bool(said)
