"""Which papers are talked about on this machine: recent comparisons of their recipes, and views."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from keel.papers.catalogue import Paper
from keel.papers.library import Library

COMPARISON = 5.0  # a comparison takes minutes to hours, a view a second
HALF_LIFE = 14.0  # days


def trending(
    runs: Path = Path("runs"),
    now: datetime | None = None,
    library: Library | None = None,
    half_life: float = HALF_LIFE,
) -> list[tuple[Paper, float]]:
    """Papers with their score, the highest first; those with none are left out.

        score = sum_i w_i 2^(-age_i / half_life)

    over comparisons that have one of the paper's recipes as an arm (w = 5, once for each comparison) and views (w = 1).

    Args:
        runs: the folder of runs, whose `comparisons/*/comparison.json` are read; it need not exist.
        now: the time from which ages are counted; the present without it. What lies later counts as of now.
        library: where views are counted; the user's own without it.
        half_life: in days, above 0.

    Raises:
        ValueError: half_life is not above 0.
    """
    if not half_life > 0:
        raise ValueError(f"half_life must be above 0, got {half_life}")
    now, library = now or datetime.now(UTC), library or Library()
    papers = library.papers()
    by_recipe: dict[str, list[int]] = {}
    for paper in papers:
        for recipe in paper.recipes:
            by_recipe.setdefault(recipe, []).append(paper.n)
    scores: Counter[int] = Counter()
    for recipes, created in comparisons(runs):
        decayed = COMPARISON * _decay((now.timestamp() - created) / 86_400, half_life)
        for n in {n for recipe in recipes for n in by_recipe.get(recipe, ())}:
            scores[n] += decayed  # type: ignore[assignment]
    for n, days in library.views().items():
        for day, count in days.items():
            scores[n] += count * _decay((now.date() - day).days, half_life)  # type: ignore[assignment]
    found = [(paper, float(scores[paper.n])) for paper in papers if scores[paper.n] > 0]
    return sorted(found, key=lambda item: (-item[1], -item[0].n))


def comparisons(runs: Path) -> Iterable[tuple[set[str], float]]:
    """The recipes and the time (seconds since 1970) of every comparison in a folder of runs.

    A file that cannot be read is warned of and passed over.
    """
    for path in sorted((runs / "comparisons").glob("*/comparison.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = {str(arm["recipe"]) for arm in data["arms"]}, float(data.get("created") or path.stat().st_mtime)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"{path}: no comparison of Keel ({error}); it does not count", stacklevel=2)
            continue
        yield found


def _decay(days: float, half_life: float) -> float:
    return 2.0 ** (-max(days, 0.0) / half_life)
