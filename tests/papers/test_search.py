"""Search finds what it should, far better than chance, and no query can break it."""

import sys
import types
from datetime import date

import numpy as np
import pytest
from scipy.stats import hypergeom

from keel.core.errors import ConfigError, UserError
from keel.papers import search as module
from keel.papers.catalogue import Paper, catalogue
from keel.papers.precision import families_proposed_rightly, measure
from keel.papers.search import MODES, Filters, LatentSpace, content_words, search

SMALL = (
    Paper(1, "Regularization of behavior"),
    Paper(2, "Entropy bonuses for exploration"),
    Paper(3, "Weight decay", summary="Entropy is mentioned once here, in a summary that is rather long, about decay."),
)


def titles(query: str, mode: str = "lexical", **options) -> list[int]:
    return [hit.paper.n for hit in search(query, mode, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["mixed", "lexical", "semantic"])
def test_the_queries_of_the_themes_find_their_papers_far_better_than_chance(mode: str) -> None:
    for one in measure(mode):  # type: ignore[arg-type]
        right = round(25 * one.first25)
        by_chance = float(hypergeom.sf(right - 1, 222, one.papers, 25))
        assert by_chance < 1e-3, f"{one.theme}: {right} of 25 are had by chance with probability {by_chance:.1g}"
        assert one.first10 >= 1.7 * one.chance, one
        assert one.r_precision >= 1.9 * one.chance, one


def test_search_does_not_read_the_themes() -> None:
    bare = [Paper(**{**vars(one), "themes": ()}) for one in catalogue()]
    for query in ("behaviour regularisation", "target distribution of rewards"):
        assert titles(query, "mixed", papers=bare) == titles(query, "mixed")


def test_the_family_of_the_neighbours_is_mostly_the_papers_own() -> None:
    right, largest = families_proposed_rightly()
    assert right / 222 > 2.5 * largest


def test_words_are_found_in_every_spelling_and_form() -> None:
    for query in ("behaviour", "regularising", "REGULARISATION", "behavior!"):
        assert titles(query, papers=SMALL) == [1], query


def test_a_title_counts_more_than_a_summary() -> None:
    assert titles("entropy", papers=SMALL) == [2, 3]


@pytest.mark.parametrize(
    "query",
    ['"', "entropy OR", 'NEAR("a" b)', "title: entropy*", "(entropy", "a^b -c AND NOT {d}", "entropy';--", "КЛ"],
)
def test_no_query_is_syntax(query: str) -> None:
    if any(c.isalnum() for c in query):
        for mode in ("lexical", "mixed"):
            found = titles(query, mode, limit=3)
            assert len(found) <= 3
        assert ("entropy" in query.lower()) <= bool(titles(query))
    else:
        with pytest.raises(UserError, match="a query needs a word"):
            search(query)


def test_articles_count_only_where_there_is_nothing_else() -> None:
    assert content_words("a KL to the reference") == ["kl", "reference"]
    assert content_words("to the") == ["to", "the"]


def test_semantic_search_finds_what_shares_no_whole_word() -> None:
    assert titles("explorattion") == []
    assert all("explor" in module.text(hit.paper).lower() for hit in search("explorattion", "semantic", limit=5))
    assert not module.latent_space().vectors(["жжж"]).any(), "what shares nothing with any paper is near to none"


def test_mixed_adds_reciprocal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "lexical", lambda query, papers: {1: 9.0, 2: 1.0})
    monkeypatch.setattr(module, "semantic", lambda query, papers: {0: 0.9, 1: 0.5, 2: 0.7})
    found = search("x", papers=SMALL)
    assert [hit.paper.n for hit in found] == [2, 3, 1]
    assert [hit.score for hit in found] == pytest.approx([1 / 61 + 1 / 63, 1 / 62 + 1 / 62, 1 / 61])


def test_filters_leave_the_order_and_take_the_rest_out() -> None:
    everything = search("entropy", "lexical", limit=None)
    for filters in (
        Filters(family="preference"),
        Filters(theme="divergence"),
        Filters(status="implemented"),
        Filters(since=date(2025, 6, 1), until=date(2025, 12, 31)),
        Filters("online", "entropy", "implemented"),
    ):
        kept = search("entropy", "lexical", filters, limit=None)
        assert kept == [hit for hit in everything if filters(hit.paper)]
        assert 0 < len(kept) < len(everything)
    assert not Filters(since=date(1900, 1, 1))(Paper(1, "No date"))
    for bad in ({"family": "x"}, {"theme": "x"}, {"status": "x"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Filters(**bad)


def test_modes_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="must be one of mixed, lexical"):
        search("x", "fuzzy")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ConfigError, match=r"needs scikit-learn.*keel-rl\[papers\].*--mode lexical"):
        LatentSpace(["a", "b"])
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"needs sentence-transformers"):
        search("x", "sentences")
    assert set(MODES) == {"mixed", "lexical", "semantic", "sentences"}
    assert search("entropy", papers=[]) == []


class Model:
    """Stands in for a model of sentence-transformers: a text's vector counts three words."""

    def __init__(self, name: str, local_files_only: bool = False) -> None:
        assert local_files_only, "nothing may be fetched"
        if name == "missing":
            raise OSError("no such folder")

    def encode(self, texts: list[str], normalize_embeddings: bool = False) -> np.ndarray:
        found = np.array(
            [[1e-9 + text.lower().count(word) for word in ("entropy", "decay", "behavior")] for text in texts]
        )
        return found / np.linalg.norm(found, axis=1, keepdims=True) if normalize_embeddings else found


def test_sentence_transformers_order_papers_where_a_model_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("sentence_transformers")
    package.SentenceTransformer = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    monkeypatch.setenv("KEEL_SENTENCES", "here")
    module._sentence_model.cache_clear()
    assert titles("decay", "sentences", papers=SMALL)[0] == 3
    monkeypatch.setenv("KEEL_SENTENCES", "missing")
    with pytest.raises(ConfigError, match=r"the model missing is not on this machine \(OSError\)"):
        search("decay", "sentences", papers=SMALL)
    module._sentence_model.cache_clear()
