"""Importing tells new from known, proposes a family, and stores only when asked to."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.papers import pages

from keel.papers.catalogue import Paper, catalogue
from keel.papers.importing import import_page, normalised, propose_families, propose_family, same_paper
from keel.papers.library import FIRST, Library

PART_TWO = "Secrets of RLHF in Large Language Models Part II: Reward Modeling"


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "papers.sqlite")


@pytest.fixture
def listing(tmp_path: Path) -> Path:
    file = tmp_path / "listing.html"
    file.write_text(pages.LISTING)
    return file


def test_a_page_is_sorted_into_new_known_and_unreadable(library: Library, listing: Path) -> None:
    dry = import_page(listing, library, dry_run=True)
    assert not dry.stored and not library.path.exists()
    done = import_page(listing, library)
    for findings in (dry, done):
        assert [one.paper.title for one in findings.new] == ["Entropy at the Edge: $\\beta$ < 1"]
        assert [(one.paper.n, one.why) for one in findings.known] == [(47, "the same title")]
        assert [problem.place for problem in findings.problems] == [15]
    assert done.stored and library.imported() == (done.new[0].paper,)
    assert done.new[0].paper.n == FIRST and done.new[0].paper.status == "imported"
    again = import_page(listing, library)
    assert not again.new and not again.stored
    assert [(one.paper.n, one.why) for one in again.known] == [
        (FIRST, "the same identifier at arXiv, 2601.03001"),
        (47, "the same title"),
    ]
    assert len(library.imported()) == 1


def test_an_entry_that_comes_twice_on_a_page_is_stored_once(library: Library, tmp_path: Path) -> None:
    file = tmp_path / "list.md"
    file.write_text(
        "- [Twice Told Tales of Reward](https://arxiv.org/abs/2512.01001)\n"
        "- [Twice told tales of rewards](https://openreview.net/forum?id=x)\n"
    )
    findings = import_page(file, library)
    assert [one.paper.title for one in findings.new] == ["Twice Told Tales of Reward"]
    assert findings.known[0].why.startswith("a title alike to 9")


@pytest.mark.parametrize(
    ("title", "links", "n"),
    [
        ("COPO - consistency aware policy optimisation", (), 76),
        ("COPO: Consistency–Aware Policy OPTIMIZATION", (), 76),
        ("C-MORL: Multi-Objective Reinforcement Learning through Efficient Discovery of a Pareto Front", (), 92),
        (PART_TWO.replace("II", "I"), (), None),
        (PART_TWO.upper(), (), 199),
        ("Entropy", (), None),
    ],
)
def test_what_counts_as_the_same_paper(title: str, links: tuple[str, ...], n: int | None) -> None:
    found = same_paper(Paper(1, title, links=links), catalogue())
    assert (found and found[0].n) == n


def test_identifiers_at_arxiv_decide_over_likeness() -> None:
    one = Paper(1, "Rewards and Regularisers of Reasoning", links=("https://arxiv.org/abs/2501.00001v3",))
    known = replace(one, n=2, title="Another Name", links=("https://huggingface.co/papers/2501.00001",))
    assert same_paper(one, [known]) == (known, "the same identifier at arXiv, 2501.00001")
    other = replace(
        one, n=3, title="Rewards and Regularisers of Reasonings", links=("https://arxiv.org/abs/2501.9999",)
    )
    assert same_paper(one, [replace(other, links=("https://arxiv.org/abs/2501.99999",))]) is None
    nameless = replace(other, links=())
    assert same_paper(one, [nameless]) == (nameless, "a title alike to 99 %")


def test_titles_lose_what_does_not_distinguish_them() -> None:
    assert normalised("R^3L: Réflect -- then_Retry") == "r 3l reflect then_retry"


def test_the_proposed_family_is_that_of_the_neighbours_it_names() -> None:
    family, near = propose_family("Direct preference optimisation of language models with pairwise preference data")
    assert family == "preference" and near and {one.family for one in near} == {"preference"}
    assert propose_family("Offline reinforcement learning with behaviour policy regularisation")[0] == "offline"
    assert propose_family("Denoising diffusion models for image generation")[0] == "diffusion"
    itself = catalogue()[46]
    assert itself in propose_family(itself.title)[1]
    assert itself not in propose_families([itself.title], [47])[0][1]


def test_without_scikit_learn_papers_are_imported_without_a_proposal(
    library: Library, listing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from keel.papers.search import latent_space

    latent_space.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    findings = import_page(listing, library)
    assert findings.stored and findings.new[0].neighbours == ()
    assert "keel-rl[papers]" in findings.note
