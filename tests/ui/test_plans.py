"""Pages stay quick however many runs there are: what they ask of the large tables goes through an index.

Times would say more about the machine than about the pages; `benchmarks/ui.py` measures them.
"""

import sqlite3

import pytest

from keel.store.store import Store

LARGE = ("rollouts", "metrics", "evaluations", "r", "m")  # names and short names of tables in the queries
PAGES = [
    "/runs?recipe=grpo&page=1",
    "/runs/base?against=going",
    "/points/going?since=1",
    "/tokens",
    "/tokens?lowest=1&stop=eos",
    "/tokens?run=base&step=10&lowest=0.5",
    "/tokens?run=base&order=lowest",
    "/tokens?q=thirty",
    "/tokens?q=thirty&run=base&highest=1",
    "/tokens/3",
    "/tokens/3/group",
]


@pytest.mark.parametrize("path", PAGES)
def test_large_tables_are_read_through_an_index(client, runs, monkeypatch, path):
    asked = []
    select = Store.select

    def recorded(store, query, values=()):
        asked.append((query, list(values)))
        return select(store, query, values)

    monkeypatch.setattr(Store, "select", recorded)
    monkeypatch.setattr("keel.ui.pages.runs.view", _fresh)
    assert client.get(path).status_code == 200
    assert asked
    db = sqlite3.connect(f"file:{runs / 'keel.sqlite'}?mode=ro", uri=True)
    for query, values in asked:
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}", values)]
        for line in plan:
            scanned = line.removeprefix("SCAN ").split(" ")[0] if line.startswith("SCAN ") else ""
            whole = scanned in LARGE and "INDEX" not in line
            # The newest completions of all are the last ones of the table.
            assert not whole or query == "SELECT id FROM rollouts ORDER BY id DESC LIMIT ? OFFSET ?", (query, plan)
    db.close()


def _fresh(*given):
    from keel.ui.run_view import view

    return view.__wrapped__(*given)


def test_the_newest_runs_come_from_an_index(runs):
    with Store(runs / "keel.sqlite", readonly=True) as store:
        query = (
            "EXPLAIN QUERY PLAN SELECT name FROM runs INDEXED BY runs_listed ORDER BY created DESC, id DESC LIMIT 200"
        )
        assert [row[3] for row in store.select(query)] == ["SCAN runs USING COVERING INDEX runs_listed"]
