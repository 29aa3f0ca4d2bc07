"""Trending: comparisons and views with half-lives, computed by hand."""

import json
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from keel.papers.library import Library
from keel.papers.trending import comparisons, trending

NOW = datetime(2026, 3, 15, 12, tzinfo=UTC)


def compared(runs: Path, name: str, recipes: list[str], days_ago: float) -> None:
    folder = runs / "comparisons" / name
    folder.mkdir(parents=True)
    arms = [{"name": f"{recipe} {i}", "recipe": recipe} for i, recipe in enumerate(recipes)]
    record = {"arms": arms, "created": NOW.timestamp() - 86_400 * days_ago}
    (folder / "comparison.json").write_text(json.dumps(record))


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "papers.sqlite")


def test_scores_halve_with_every_half_life(library: Library, tmp_path: Path) -> None:
    compared(tmp_path, "first", ["grpo", "kl_cov", "clip_cov"], 14)  # both are of paper 47, which counts once
    compared(tmp_path, "second", ["kl_cov", "dr_grpo"], 0)
    library.view(1, date(2026, 3, 15))
    for _ in range(3):
        library.view(1, date(2026, 3, 1))
    library.view(2, date(2026, 3, 14))
    found = [(paper.n, score) for paper, score in trending(tmp_path, NOW, library)]
    assert [n for n, _ in found] == [47, 1, 2]
    assert [score for _, score in found] == pytest.approx([5 + 2.5, 1 + 1.5, 2 ** (-1 / 14)])
    assert trending(tmp_path, NOW, library, half_life=1)[-1][1] == pytest.approx(0.5)


def test_nothing_is_trending_where_nothing_happened(library: Library, tmp_path: Path) -> None:
    assert trending(tmp_path / "missing", NOW, library) == []
    with pytest.raises(ValueError, match="half_life"):
        trending(tmp_path, NOW, library, half_life=0)


def test_what_lies_in_the_future_counts_as_of_now(library: Library, tmp_path: Path) -> None:
    compared(tmp_path, "later", ["kl_cov"], -3)
    library.view(47, date(2026, 4, 1))
    assert trending(tmp_path, NOW, library)[0][1] == pytest.approx(6)


def test_views_of_papers_that_are_gone_are_passed_over(library: Library, tmp_path: Path) -> None:
    library.view(20_000, date(2026, 3, 15))
    assert trending(tmp_path, NOW, library) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"arms": [1]}', '{"arms": [{"name": "x"}]}', '{"created": 3}'])
def test_files_that_are_no_comparison_are_warned_of(text: str, tmp_path: Path) -> None:
    compared(tmp_path, "good", ["kl_cov"], 0)
    (tmp_path / "comparisons" / "bad").mkdir()
    (tmp_path / "comparisons" / "bad" / "comparison.json").write_text(text)
    with pytest.warns(UserWarning, match=r"bad/comparison\.json: no comparison of Keel"):
        found = list(comparisons(tmp_path))
    assert found == [({"kl_cov"}, NOW.timestamp())]
