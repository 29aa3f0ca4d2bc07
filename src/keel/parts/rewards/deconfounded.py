"""Logged outcomes without the part that known confounders explain, before they are used as rewards or preferences.

    Y = f(text) + C gamma + noise,      Y_adj = Y - (C - mean C) gamma

gamma must come from a fit in which the text stands beside the confounders: where authors write according to C, the
regression of Y on C alone takes the text's own effect away, too.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from keel.core.errors import ConfigError, DataError
from keel.core.registry import part
from keel.parts.rewards.relevance import HASHED, Embedder, embedder
from keel.tasks.task import Text, completion_text

Estimator = Literal["joint", "within", "two_stage"]
ASSUMES = {
    "joint": "the outcome is the sum of an effect of the content and a linear one of the confounders; all that moves "
    "both text and outcome is among the confounders, and none of them is an effect of the text",
    "within": "a text has one effect wherever it appears, the confounders' is linear; what else changes between its "
    "appearances moves the outcome by chance only, and no confounder is an effect of the text",
    "two_stage": "the instruments move the outcome through the confounders alone (which no data can show), and they "
    "move the confounders",
}
_SINGULAR = 1e-8  # of the largest singular value, below which columns say the same
_WEAK = 10.0  # F statistic of the first stage, below which instruments are weak


@dataclass(frozen=True)
class Adjusted:
    """What is left of the outcomes, and what was taken away.

    Args:
        outcomes: Y_adj, [N].
        effects: gamma, by the name of the confounder.
        assumes: what has to hold for that to be right.
        notes: what was noticed, a sentence each.
    """

    outcomes: Float[np.ndarray, "N"]
    effects: Mapping[str, float]
    assumes: str
    notes: tuple[str, ...] = ()


@part("deconfound", paper=133)
@dataclass(frozen=True)
class Deconfound:
    """Outcomes less the effect of known confounders.

        joint       least squares of Y on [1, h(text), C], with a ridge on the weights of h
        within      least squares of Y on C, both less their means over the same text
        two_stage   C on [1, h, Z], then Y on [1, h, C_hat]: where what is not observed moves C, too

    Numbers are confounders as they are; texts and booleans are one column for each value but the first, and their
    effects are relative to it.

    Args:
        confounders: names of the columns.
        estimator: one of the three. None of them can be told from the data to be right: `Adjusted.assumes` says what it
            takes for granted.
        ridge: on the weights of h, as a share of N; raise it with the size of h.
        instruments: names of the columns Z, at least as many as there are confounders.

    Raises:
        ValueError: no confounder, a name twice, another estimator, a negative ridge, or instruments where none are
            read, and none where they are.

    Source: "Aligning Language Models with Observational Data: Opportunities and Risks from a Causal Perspective", 2025;
    the paper's idea, for which no code is released: the estimators are chosen here.
    """

    confounders: tuple[str, ...]
    estimator: Estimator = "joint"
    ridge: float = 1e-3
    instruments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.confounders:
            raise ValueError("confounders must name a column: without any there is nothing to take away")
        if len({*self.confounders, *self.instruments}) < len(self.confounders) + len(self.instruments):
            raise ValueError("confounders and instruments: a column is named twice")
        if self.estimator not in get_args(Estimator):
            raise ValueError(f"estimator '{self.estimator}' is not one of {', '.join(get_args(Estimator))}")
        if self.ridge < 0:
            raise ValueError(f"ridge must not be negative, got {self.ridge}")
        if self.instruments and self.estimator != "two_stage":
            raise ValueError(f"instruments are read by two_stage, not by {self.estimator}")
        if self.estimator == "two_stage" and len(self.instruments) < len(self.confounders):
            raise ValueError("instruments: two_stage needs at least one for each confounder")

    @property
    def assumes(self) -> str:
        """What has to hold for the adjusted outcomes to be right."""
        return ASSUMES[self.estimator]

    def __call__(
        self,
        outcomes: Sequence[float] | Float[np.ndarray, "N"],
        columns: Mapping[str, Sequence[Any]],
        content: Float[np.ndarray, "N D"] | None = None,
        texts: Sequence[Hashable] | None = None,
    ) -> Adjusted:
        """Adjust outcomes.

        Args:
            outcomes: Y, [N].
            columns: each of N entries; those named are read.
            content: h(text), for joint and two_stage.
            texts: what tells the contents apart, for within.

        Raises:
            DataError: a column is missing or has gaps, columns say the same, or there are fewer rows than unknowns.
            ConfigError: the estimator needs content or texts, which are not given.
        """
        y = _numbers(outcomes, "outcome")
        c, names = self._design(self.confounders, columns, len(y))
        notes: tuple[str, ...] = ()
        if self.estimator == "within":
            gamma = self._within(y, c, names, texts)
        else:
            if content is None:
                what = "the effect of the confounders cannot be told from that of the texts without their features"
                raise ConfigError(what, "content", "Give features of the texts, or estimator='within' and texts.")
            h = np.asarray(content, dtype=float)
            if h.ndim != 2 or len(h) != len(y) or not np.isfinite(h).all():
                raise DataError(f"must be finite numbers for each of {len(y)} outcomes, not {h.shape}", "content")
            used = c
            if self.estimator == "two_stage":
                z, known = self._design(self.instruments, columns, len(y))
                used, notes = self._first_stage(c, z, h, names, known)
            gamma = self._joint(y, used, h, names)
        adjusted = y - (c - c.mean(0)) @ gamma
        return Adjusted(adjusted, dict(zip(names, gamma.tolist(), strict=True)), self.assumes, notes)

    # -- estimators ------------------------------------------------------------------------------------------------

    def _joint(self, y: Any, c: Any, h: Any, names: list[str]) -> Float[np.ndarray, "K"]:
        """gamma of least squares on [1, h, C], the ridge on h alone."""
        y, c, h = y - y.mean(), c - c.mean(0), h - h.mean(0)
        if self.ridge == 0 and np.linalg.matrix_rank(h, tol=_tolerance(h)) < h.shape[1]:
            what = f"{h.shape[1]} features of the text are collinear on {len(y)} rows"
            raise DataError(what, "content", "Give a ridge above 0, or fewer features.")
        left = _residual(c, h, self.ridge * len(y))  # what the text does not explain of the confounders
        _check_rank(left, c, names, "the text")
        return np.linalg.solve(c.T @ left, left.T @ y)

    def _within(self, y: Any, c: Any, names: list[str], texts: Sequence[Hashable] | None) -> Float[np.ndarray, "K"]:
        if texts is None:
            raise ConfigError("the estimator 'within' compares appearances of the same text", "texts", "Give them.")
        if len(texts) != len(y):
            raise DataError(f"{len(texts)} texts for {len(y)} outcomes", "texts")
        _, index = np.unique([str(t) for t in texts], return_inverse=True)
        if index.max() + 1 == len(y):
            raise DataError("no text appears twice", "texts", "Take estimator='joint', with features of the texts.")
        count = np.bincount(index).astype(float)
        left = c - (np.stack([np.bincount(index, column) for column in c.T], 1) / count[:, None])[index]
        _check_rank(left, c, names, "the text")
        own = y - (np.bincount(index, y) / count)[index]
        return np.linalg.lstsq(left, own, rcond=None)[0]

    def _first_stage(self, c: Any, z: Any, h: Any, names: list[str], known: list[str]) -> tuple[Any, tuple[str, ...]]:
        """C as h and Z predict it, and what is to be said of the instruments."""
        h, z, mean = h - h.mean(0), z - z.mean(0), c.mean(0)
        ridge = self.ridge * len(c)
        own, plain = _residual(z, h, ridge), _residual(c - mean, h, ridge)
        _check_rank(own, z, known, "the text")
        fitted = own @ np.linalg.lstsq(own, plain, rcond=None)[0]
        unexplained = ((plain - fitted) ** 2).sum(0) / max(1, len(c) - h.shape[1] - z.shape[1] - 1)
        strength = (fitted**2).sum(0) / z.shape[1] / np.maximum(unexplained, 1e-300)
        weak = [f"{n} (F {f:.1f})" for n, f in zip(names, strength, strict=True) if f < _WEAK]
        notes = (f"the instruments hardly move {', '.join(weak)}: the effect is uncertain and biased",) if weak else ()
        return fitted + (c - mean - plain) + mean, notes

    # -- columns ---------------------------------------------------------------------------------------------------

    def _design(self, wanted: Sequence[str], columns: Mapping[str, Sequence[Any]], count: int) -> tuple[Any, list[str]]:
        out, names = [], []
        for name in wanted:
            if name not in columns:
                have = ", ".join(columns) or "none"
                raise DataError(f"there is no column '{name}'; there are {have}", "confounders")
            values = list(columns[name])
            if len(values) != count:
                raise DataError(f"{len(values)} entries for {count} outcomes", f"column {name}")
            if any(value is None for value in values):
                row = next(i for i, value in enumerate(values) if value is None)
                fix = "Remove such rows: a confounder that is not known cannot be taken away."
                raise DataError(f"row {row} has none", f"column {name}", fix)
            if all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in values):
                out.append(_numbers(values, f"column {name}"))
                names.append(name)
                continue
            kinds = sorted({str(value) for value in values})
            for kind in kinds[1:]:
                out.append(np.array([float(str(value) == kind) for value in values]))
                names.append(f"{name}={kind}")
        for name, column in zip(names, out, strict=True):
            if not np.ptp(column):
                raise DataError("is the same in all rows, so that it explains nothing", f"column {name}", "Remove it.")
        if not out:
            raise DataError("has one value only, so that it explains nothing", f"column {wanted[0]}", "Remove it.")
        return np.stack(out, 1), names


@dataclass(frozen=True)
class DeconfoundedPairs:
    """Preferences by adjusted outcomes, and what became of the rows.

    Args:
        pairs: rows with `prompt`, `chosen`, `rejected` and `margin`, the gap of the adjusted outcomes, for
            `keel.train("dpo", data=...)`.
        adjusted: what was done to the outcomes.
        ties: pairs of a prompt that are no further apart than was asked for; they are left out.
        alone: prompts with one completion only.
    """

    pairs: list[dict[str, Any]]
    adjusted: Adjusted
    ties: int
    alone: int


def deconfounded_pairs(
    rows: Sequence[Mapping[str, Any]],
    deconfound: Deconfound,
    outcome: str = "outcome",
    *,
    content: str | Embedder = HASHED,
    features: int = 64,
    least_gap: float = 0.0,
) -> DeconfoundedPairs:
    """Pairs of completions of one prompt by the sign of the difference of their adjusted outcomes.

    Args:
        rows: with `prompt`, `completion`, the outcome and the confounders.
        deconfound: how outcomes are adjusted.
        outcome: name of its column.
        content: features of the completions: an embedder as in `RelevanceReward`.
        features: directions of the embedding that are kept, those of the largest spread.
        least_gap: by which adjusted outcomes have to differ.

    Raises:
        DataError: see `Deconfound`; or a row lacks a column.
        ValueError: features below 1, or a negative gap.
    """
    if features < 1:
        raise ValueError(f"features must be at least 1, not {features}")
    if least_gap < 0:
        raise ValueError(f"least_gap must not be negative, got {least_gap}")
    for i, row in enumerate(rows):
        for name in ("prompt", "completion", outcome, *deconfound.confounders, *deconfound.instruments):
            if row.get(name) is None:
                raise DataError(f"row {i} has no '{name}'", "data", "Each row needs it.")
    texts = [completion_text(row["completion"]) for row in rows]
    names = (*deconfound.confounders, *deconfound.instruments)
    columns = {name: [row[name] for row in rows] for name in names}
    h = None if deconfound.estimator == "within" else _principal(embedder(content)(texts), features)
    adjusted = deconfound([row[outcome] for row in rows], columns, h, texts)
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(_identity(row["prompt"]), []).append(i)
    pairs: list[dict[str, Any]] = []
    ties = 0
    for own in members.values():
        for a, i in enumerate(own):
            for j in own[a + 1 :]:
                gap = float(adjusted.outcomes[i] - adjusted.outcomes[j])
                if abs(gap) <= least_gap:
                    ties += 1
                    continue
                w, lost = (i, j) if gap > 0 else (j, i)
                chosen, rejected = rows[w]["completion"], rows[lost]["completion"]
                pairs.append({"prompt": rows[i]["prompt"], "chosen": chosen, "rejected": rejected, "margin": abs(gap)})
    return DeconfoundedPairs(pairs, adjusted, ties, sum(len(own) == 1 for own in members.values()))


def _identity(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else repr(prompt)


def _principal(vectors: Float[np.ndarray, "N D"], count: int) -> Float[np.ndarray, "N d"]:
    """The directions of the largest spread, each with the sign that makes its largest entry positive."""
    centred = vectors - vectors.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    kept = min(count, int((size > _SINGULAR * max(size[0], 1e-300)).sum()))
    found = left[:, :kept] * size[:kept]
    largest = np.abs(found).argmax(0) if kept else np.zeros(0, dtype=int)
    return found * np.sign(found[largest, np.arange(kept)])


def _residual(target: Any, h: Any, ridge: float) -> Any:
    """`target` less its ridge regression on h."""
    if not h.shape[1]:
        return target
    gram = h.T @ h + ridge * np.eye(h.shape[1])
    return target - h @ np.linalg.solve(gram, h.T @ target)


def _numbers(values: Any, where: str) -> Float[np.ndarray, "N"]:
    try:
        found = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise DataError("is no list of numbers", where) from error
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise DataError("must be a list of finite numbers, one for each row", where)
    return found


def _tolerance(matrix: Any) -> float:
    return _SINGULAR * max(1e-300, float(np.abs(matrix).max(initial=0.0)) * np.sqrt(len(matrix)))


def _check_rank(left: Any, whole: Any, names: Sequence[str], beside: str) -> None:
    """Refuse confounders of which nothing is left beside the text, or which say the same.

    Raises:
        DataError: naming them.
    """
    if len(left) <= left.shape[1]:
        raise DataError(f"{len(left)} rows for {left.shape[1]} confounders: more rows are needed", "confounders")
    spread, size = left.std(0), whole.std(0)
    gone = [name for name, s, w in zip(names, spread, size, strict=True) if s <= 1e-6 * w]
    if gone:
        fix = "Their effect cannot be told from the text's; take fewer features, or another confounder."
        raise DataError(f"{', '.join(gone)} is determined by {beside}", "confounders", fix)
    scaled = left / spread
    if np.linalg.svd(scaled, compute_uv=False)[-1] <= 1e-6 * np.sqrt(len(left)):
        raise DataError(f"{', '.join(names)} are collinear: their effects cannot be told apart", "confounders",
                        "Keep one of those that say the same.")  # fmt: skip
