"""The page of the documentation is what its generator writes now."""

from pathlib import Path

from keel.papers.catalogue import Component, Paper, catalogue
from keel.papers.page import _in_keel, _plain, page

COMMITTED = Path(__file__).parents[2] / "docs" / "papers.md"


def test_the_committed_page_is_up_to_date() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == page(catalogue()), "run: python -m keel.papers.page docs"


def test_every_paper_stands_on_the_page_once() -> None:
    rows = [line for line in COMMITTED.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    numbers = [cell for line in rows if (cell := line.split("|")[1].strip()).isdigit()]
    assert sorted(map(int, numbers)) == list(range(1, 223))
    assert all(line.replace("\\|", "").count("|") in (5, 6, 8) for line in rows), "no cell breaks its row"


def test_titles_are_no_markup() -> None:
    assert _plain("R^3L: $x_1$ | `a|b_c` *and* <b>") == "R^3L: \\$x\\_1\\$ \\| `a\\|b_c` \\*and\\* \\<b\\>"
    assert _plain("an odd ` one") == "an odd \\` one"


def test_what_is_missing_is_said() -> None:
    one = Paper(
        1,
        "T",
        status="implemented",
        recipes=("grpo",),
        fidelity="partial",
        components=(Component("weight", True), Component("search", False)),
        where="`keel train grpo`",
    )
    assert _in_keel(one) == "**runs**, partial<br>`keel train grpo`.<br>*Missing*: search."
