"""Lists and searches: known answers, from an index and without one, in stores of every age."""

import sqlite3
from pathlib import Path

import pytest

from keel.store import listing, opening
from keel.store.listing import RolloutFilter, search_rollouts
from keel.store.records import StoredRollout
from keel.store.schema import SEARCH
from keel.store.store import Store

TEXTS = [
    "Twelve apples",
    "twelve PEARS, 50%",
    "a_b \\ !x",
    'she said "so"',
    "Größe größe",
    "twe lve",
    "日本語テキスト",
    "",
]


def fill(store: Store) -> int:
    """A run with one completion of each text, two to a step: rewards 0, 1, 2, ..., the last one not scored."""
    run = store.create_run("first", {}, "grpo", "countdown", "tiny", 0)
    for i, text in enumerate(TEXTS):
        reward = float(i) if text else float("nan")
        one = StoredRollout("p", text, reward, group=i % 2, length=len(text), stop="eos" if i < 6 else "length")
        store.log_rollouts(run, 1 + i // 2, [one])
    return run


@pytest.fixture(params=["new", "no search", "old"])
def store(request, tmp_path, monkeypatch):
    """A store of this Keel, one of an SQLite without FTS5, and one that an earlier Keel made."""
    if request.param != "new":
        monkeypatch.setattr(opening, "_has_trigrams", lambda db: False)
    made = Store(tmp_path / "keel.sqlite")
    if request.param == "old":
        made._db.executescript(
            "DROP INDEX rollouts_listed; DROP INDEX runs_listed; "
            "CREATE INDEX rollouts_by_step ON rollouts (run, step, id)"
        )
    fill(made)
    with Store(made.path, readonly=True) as viewer:
        yield viewer
    made.close()


def found(store, text, **wanted):
    return [one.rollout.id for one in search_rollouts(store, RolloutFilter(**wanted), text).rollouts]


@pytest.mark.parametrize(
    "text, ids",
    [
        ("twelve", [2, 1]),
        ("TWELVE P", [2]),
        ("twe", [6, 2, 1]),
        ("twelve  ", []),
        ("50%", [2]),
        ("%", [2]),
        ("a_b", [3]),
        ("aXb", []),
        ("_", [3]),
        ("\\ !x", [3]),
        ("!", [3]),
        ('"so"', [4]),
        ('d "', [4]),
        ("größe", [5]),
        ("日本語", [7]),
        ("本", [7]),
        ("AND", []),
        ("a* OR b", []),
        ("completion:twelve", []),
    ],
)
def test_a_search_finds_the_text_and_nothing_else(store, text, ids):
    assert found(store, text) == ids
    assert found(store, text, run=1) == ids
    assert found(store, text, run=2) == []


def test_a_search_is_filtered_and_goes_on(store):
    assert found(store, "twe", lowest=1.0) == [6, 2]
    assert found(store, "twe", step=1, highest=0.0) == [1]
    assert found(store, "twe", stop="length") == []
    first = search_rollouts(store, RolloutFilter(), "twe", limit=2)
    assert [one.rollout.id for one in first.rollouts] == [6, 2] and first.more
    rest = search_rollouts(store, RolloutFilter(), "twe", before=2, limit=2)
    assert [one.rollout.id for one in rest.rollouts] == [1] and not rest.more


def test_orders_counts_and_neighbours(store):
    everything = RolloutFilter(run=1)
    order = {
        name: [one.rollout.id for one in listing.list_rollouts(store, everything, name)]
        for name in listing.ROLLOUT_ORDERS
    }
    assert order["newest"] == [8, 7, 6, 5, 4, 3, 2, 1] and order["oldest"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert order["highest"] == [7, 6, 5, 4, 3, 2, 1, 8] and order["lowest"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert order["longest"][:2] == [2, 4]  # of 17 and 13 characters, like number 1: the newer one first
    assert [one.rollout.id for one in listing.list_rollouts(store, RolloutFilter(), limit=2, offset=3)] == [5, 4]
    assert listing.count_rollouts(store, RolloutFilter(lowest=2.0, highest=5.0)) == 4
    assert listing.rollout_stops(store, 1) == ["eos", "length"]
    assert listing.neighbours(store, 1, store.rollout(1, 1)) == (None, 2)
    assert listing.neighbours(store, 1, store.rollout(1, 8)) == (7, None)
    assert listing.group_ids(store, 1, 2, 1) == [4]
    assert listing.run_of_rollout(store, 3) == (1, "first") and listing.run_of_rollout(store, 9) is None


def test_runs_by_facet(store):
    assert listing.run_facets(store)["recipe"] == [("grpo", 1)]
    assert listing.run_names(store) == ["first"]
    assert listing.count_runs(store, {"task": "countdown", "model": None}, "FIR") == 1
    assert listing.count_runs(store, {"task": "sparse"}) == 0


def test_what_is_deleted_is_found_no_more(tmp_path):
    with Store(tmp_path / "keel.sqlite") as store:
        fill(store)
        store.rewind(1, 1)
        assert found(store, "twe") == [2, 1] and found(store, "twe lve") == []
        store.log_rollouts(1, 2, [StoredRollout("p", "pears again", 0.0)])  # its number is that of a deleted one
        assert found(store, "pears") == [3, 2] and found(store, "a_b") == []
        store._db.execute("INSERT INTO completions (completions, rank) VALUES ('integrity-check', 1)")


def test_only_a_part_of_a_large_store_is_searched_without_the_index(store, monkeypatch):
    indexed = listing.has(store, "completions")
    monkeypatch.setattr(listing, "SCANNED", 4)
    assert found(store, "b") == [] and search_rollouts(store, RolloutFilter(), "b").searched == 4
    assert found(store, "twelve") == ([2, 1] if indexed else [])
    assert search_rollouts(store, RolloutFilter(), "twelve").searched == (None if indexed else 4)
    assert search_rollouts(store, RolloutFilter(step=1), "50").searched is None  # these two are all


def test_curves_since_a_step(tmp_path):
    with Store(tmp_path / "keel.sqlite") as store:
        run, other = (store.create_run(name, {}, "grpo", "t", "m", 0) for name in "ab")
        for step in (1, 2, 3):
            store.log_metrics(run, step, {"loss": step, "kl": float("nan")})
            store.log_metrics(other, step, {"loss": -step, "only": 1.0})
        assert listing.metrics_since(store, run, 1) == {"loss": [(2, 2.0), (3, 3.0)], "kl": [(2, None), (3, None)]}
        assert listing.metrics_since(store, run, 3) == {}


def test_an_earlier_keel_can_go_on_with_the_store(tmp_path):
    """It knows the tables alone; the search is kept up to date by the file itself."""
    with Store(tmp_path / "keel.sqlite") as store:
        fill(store)
        db = sqlite3.connect(store.path)
        db.execute(
            "INSERT INTO rollouts (run, step, data_index, group_index, stop, length, rewards, prompt, completion) "
            "VALUES (1, 9, 0, 0, 'eos', 1, '{}', 'p', 'twelve figs')"
        )
        db.execute("DELETE FROM rollouts WHERE id = 1")
        db.commit()
        db.close()
        assert found(store, "twelve") == [9, 2]


def test_the_search_takes_less_room_than_the_texts_and_their_numbers(tmp_path):
    assert any("detail = 'none'" in statement for statement in SEARCH)
    sizes = []
    for statements in (SEARCH, ()):
        path = Path(tmp_path / f"{len(statements)}.sqlite")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opening, "SEARCH", statements)
            with Store(path) as store:
                run = store.create_run("a", {}, "grpo", "t", "m", 0)
                texts = [f"{i * 7919 % 1000} + {i * 104729 % 1000} = {i} because so it is" for i in range(2000)]
                store.log_rollouts(run, 1, [StoredRollout("prompt", text, 0.0) for text in texts])
        sizes.append(path.stat().st_size)
    assert sizes[0] < 2 * sizes[1]
