"""Uncertainty as the spread of questions given an answer, under random walks of similarity.

n paraphrases x_i of a question with an answer y_i each, and the absolute cosines S_x, S_y of their embeddings:

    P_x, P_y = S with rows that sum to one,   pi = 1 / n
    P(x | y) = P_y P_x,   P(y) = pi P_y,   P(x) = pi P_y P_y P_x,   P(y | x) by Bayes
    Inv-Entropy = - sum_i P(x_i | y_i) log P(x_i | y_i),   in nats

of the diagonal alone: it is no conditional entropy, and not comparable between different n.

Source: "Inv-Entropy: A Fully Probabilistic Framework for Uncertainty Quantification in Language Models", 2025.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from keel.core.choice import counter_seed

Embed = Callable[[Sequence[str]], Float[np.ndarray, "n D"]]


@dataclass(frozen=True)
class Inverse:
    """The measure and its companions; all but `confidence` grow with uncertainty.

    Args:
        inverse: Inv-Entropy.
        forward: the same of P(y_i | x_i).
        distance: Wasserstein distance between the n numbers of P(x) and the n numbers of P(y), taken as two samples.
        confidence: max_i P(y_i).
    """

    inverse: float
    forward: float
    distance: float
    confidence: float


def similarity(embeddings: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n n"]:
    """Absolute cosine of every two rows.

    Raises:
        ValueError: a row is zero.
    """
    norm = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not (norm > 0).all():
        raise ValueError("embeddings must not be zero: such a text is similar to nothing, itself included")
    unit = embeddings / norm
    return np.abs(unit @ unit.T)


def walk(similarity: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Rows that sum to one.

    Raises:
        ValueError: a negative similarity, or a row of zeros.
    """
    total = similarity.sum(1, keepdims=True)
    if (similarity < 0).any() or not (total > 0).all():
        raise ValueError("similarity must be absolute, and no row may be zero")
    return similarity / total


def inverse_entropy(inputs: Float[np.ndarray, "n n"], answers: Float[np.ndarray, "n n"]) -> Inverse:
    """The measure of n inputs with one answer each; see the module.

    >>> found = inverse_entropy(np.array([[1, 0.5], [0.5, 1]]), np.array([[1, 0.25], [0.25, 1]]))
    >>> round(found.inverse, 6)
    0.612991

    Args:
        inputs: similarity of the inputs.
        answers: similarity of the answers.

    Raises:
        ValueError: a negative similarity, or a row of zeros.
    """
    p_x, p_y = walk(inputs), walk(answers)
    x_given_y = p_y @ p_x
    y = p_y.mean(0)
    x = y @ x_given_y
    y_given_x = np.diag(x_given_y) * y / x
    distance = float(np.abs(np.sort(x) - np.sort(y)).mean())
    return Inverse(_spread(np.diag(x_given_y)), _spread(y_given_x), distance, float(y.max()))


def averaged(
    inputs: Float[np.ndarray, "n D"] | Sequence[str],
    answers: Float[np.ndarray, "n r E"] | Sequence[Sequence[str]],
    *,
    embed: Embed | None = None,
    draws: int = 20,
    seed: int = 0,
) -> Inverse:
    """Mean over draws of one of r answers to each input.

    Args:
        inputs: embeddings of the n inputs, or the texts.
        answers: embeddings of r answers to each, or the texts.
        embed: texts to embeddings, a sentence encoder for example; needed for texts.
        draws: how often one answer of each input is drawn.
        seed: of the draws; equal seeds give equal numbers.

    Raises:
        ValueError: texts without `embed`, no draws, or lengths that differ.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    if len(inputs) != len(answers):
        raise ValueError(f"inputs and answers must be of the same number, not {len(inputs)} and {len(answers)}")
    counts = [len(each) for each in answers]
    start = np.cumsum([0, *counts[:-1]])
    of_inputs = similarity(_embedded(inputs, embed))
    of_answers = similarity(np.concatenate([_embedded(each, embed) for each in answers]))
    rng = np.random.default_rng(counter_seed(seed, "inverse_entropy"))
    found = []
    for _ in range(draws):
        place = start + rng.integers(0, counts)
        found.append(inverse_entropy(of_inputs, of_answers[np.ix_(place, place)]))
    means = {field.name: float(np.mean([getattr(one, field.name) for one in found])) for field in fields(Inverse)}
    return Inverse(**means)


def ordered_share(values: Float[np.ndarray, "Q m"]) -> float:
    """TSU: share of questions whose uncertainty rises strictly from each temperature to the next.

    Chance is 1 / m!.

    >>> ordered_share(np.array([[0.1, 0.2, 0.3], [0.1, 0.1, 0.3]]))
    0.5

    Args:
        values: uncertainty of each question at temperatures in increasing order.

    Raises:
        ValueError: no questions, or fewer than two temperatures.
    """
    if not values.size or values.shape[1] < 2:
        raise ValueError(f"values must hold questions at two temperatures at least, not shape {values.shape}")
    return float((np.diff(values, axis=1) > 0).all(1).mean())


def auroc(uncertainty: Float[np.ndarray, "N"], correct: Sequence[bool] | np.ndarray) -> float:
    """Probability that a wrong answer is more uncertain than a right one, ties half; NaN where all are alike.

        (sum of the ranks of the wrong ones - n_w (n_w + 1) / 2) / (n_w n_r)

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.9]), [True, True, False, False])
    0.875

    Raises:
        ValueError: lengths that differ.
    """
    wrong = ~np.asarray(correct, dtype=bool)
    if len(wrong) != len(uncertainty):
        raise ValueError(f"uncertainty and correct must be of the same number, not {len(uncertainty)} and {len(wrong)}")
    bad, good = int(wrong.sum()), int((~wrong).sum())
    if not bad or not good:
        return float("nan")
    return float((rankdata(uncertainty)[wrong].sum() - bad * (bad + 1) / 2) / (bad * good))


def _spread(p: Float[np.ndarray, "n"]) -> float:
    return float(-(p * np.log(np.where(p > 0, p, 1.0))).sum())


def _embedded(given, embed: Embed | None) -> Float[np.ndarray, "n D"]:
    if isinstance(given, np.ndarray) and given.dtype.kind in "fiu":
        return given.astype(float)
    if embed is None:
        raise ValueError("texts need embed, a callable from texts to embeddings")
    return np.asarray(embed(list(given)), dtype=float)
