"""What lists and searches ask of a store: filters, orders, counts and pages, each answered from an index.

A store that was made before its indices existed is answered too, only slower; where it cannot be searched by its index,
the newest completions are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from keel.store.records import StoredRollout

SCANNED = 5000  # completions that a search without an index looks through
SHORTEST = 3  # characters from which the index finds a text

RUN_ORDERS = {
    "created": "created",
    "name": "name COLLATE NOCASE",
    "recipe": "recipe",
    "task": "task",
    "model": "model",
    "seed": "seed",
    "step": "step",
    "status": "status",
    "score": "CASE WHEN json_valid(summary) THEN COALESCE(json_extract(summary, '$.after.\"pass@1\"[0]'), "
    "json_extract(summary, '$.after.\"accuracy\"[0]')) END",
}
FACETS = ("recipe", "task", "model", "status")
ROLLOUT_ORDERS = {
    "newest": "step DESC, id DESC",
    "oldest": "step, id",
    "highest": "reward IS NULL, reward DESC, id DESC",
    "lowest": "reward IS NULL, reward, id DESC",
    "longest": "length DESC, id DESC",
}


class Reader(Protocol):
    """A store, as far as a list needs it."""

    def select(self, query: str, values: Sequence[Any] = ()) -> list[tuple]: ...


@dataclass(frozen=True)
class RolloutFilter:
    """Which completions are wanted; None takes all.

    Args:
        run: number of the run.
        step: step of training.
        group: group of its batch.
        lowest, highest: rewards, both ends included.
        stop: why it ended, the name of a `Stop`.
    """

    run: int | None = None
    step: int | None = None
    group: int | None = None
    lowest: float | None = None
    highest: float | None = None
    stop: str | None = None

    def conditions(self) -> tuple[str, list[Any]]:
        """As a condition of SQL with its values."""
        given = {
            "run = ?": self.run,
            "step = ?": self.step,
            "group_index = ?": self.group,
            "reward >= ?": self.lowest,
            "reward <= ?": self.highest,
            "stop = ?": self.stop,
        }
        wanted = {condition: value for condition, value in given.items() if value is not None}
        return " AND ".join(wanted) or "1", list(wanted.values())


@dataclass(frozen=True, eq=False)
class ListedRollout:
    """A completion in a list: without its tokens, and with the name of its run."""

    run: str
    rollout: StoredRollout


@dataclass(frozen=True, eq=False)
class Found:
    """A page of a search.

    Args:
        rollouts: the newest first.
        more: whether there are older ones.
        searched: how many completions, the newest, were looked through where not all of them were; None: all.
    """

    rollouts: list[ListedRollout]
    more: bool
    searched: int | None = None


def run_conditions(exact: Mapping[str, Any], name: str | None) -> tuple[str, list[Any]]:
    """A condition of SQL on runs with its values: exact values by column, and a part of the name."""
    wanted = {column: value for column, value in exact.items() if value is not None}
    conditions = [f"{column} = ?" for column in wanted]
    values: list[Any] = list(wanted.values())
    if name is not None:
        conditions.append("instr(lower(name), lower(?)) > 0")
        values.append(name)
    return " AND ".join(conditions) or "1", values


def count_runs(store: Reader, exact: Mapping[str, Any], name: str | None = None) -> int:
    """How many runs there are of some values."""
    where, values = run_conditions(exact, name)
    return store.select(f"SELECT COUNT(*) FROM runs {_index(store, 'runs_listed')} WHERE {where}", values)[0][0]


def run_facets(store: Reader) -> dict[str, list[tuple[str, int]]]:
    """The values of `FACETS` that occur, with the number of their runs, the most frequent first."""
    index = _index(store, "runs_listed")
    query = "SELECT {0}, COUNT(*) FROM runs {1} GROUP BY {0} ORDER BY COUNT(*) DESC, {0}"
    return {facet: store.select(query.format(facet, index)) for facet in FACETS}


def run_names(store: Reader, limit: int = 200) -> list[str]:
    """Names of the newest runs."""
    index = _index(store, "runs_listed")
    return [
        row[0] for row in store.select(f"SELECT name FROM runs {index} ORDER BY created DESC, id DESC LIMIT {limit}")
    ]


def metrics_since(store: Reader, run: int, step: int) -> dict[str, list[tuple[int, float | None]]]:
    """The points of every curve after a step; None where a value was no number."""
    # The order of the join is fixed: each name is one range of the clustered table.
    query = (
        "SELECT n.name, m.step, m.value FROM names n CROSS JOIN metrics m ON m.run = ? AND m.name = n.id "
        "AND m.step > ? ORDER BY n.id, m.step"
    )
    points: dict[str, list[tuple[int, float | None]]] = {}
    for name, at, value in store.select(query, [run, step]):
        points.setdefault(name, []).append((at, value))
    return points


def count_rollouts(store: Reader, wanted: RolloutFilter) -> int:
    """How many completions a filter leaves."""
    where, values = wanted.conditions()
    return store.select(f"SELECT COUNT(*) FROM rollouts {_index(store, 'rollouts_listed')} WHERE {where}", values)[0][0]


def list_rollouts(
    store: Reader, wanted: RolloutFilter, order: str = "newest", limit: int = 50, offset: int = 0
) -> list[ListedRollout]:
    """A page of completions, in one of `ROLLOUT_ORDERS`; without a run, the newest are those that were written last."""
    by = "id DESC" if order == "newest" and wanted.run is None else ROLLOUT_ORDERS[order]
    where, values = wanted.conditions()
    query = f"SELECT id FROM rollouts {_index(store, 'rollouts_listed')} WHERE {where} ORDER BY {by} LIMIT ? OFFSET ?"
    if wanted == RolloutFilter() and order == "newest":
        query = "SELECT id FROM rollouts ORDER BY id DESC LIMIT ? OFFSET ?"
    return _listed(store, [row[0] for row in store.select(query, [*values, limit, offset])])


def search_rollouts(
    store: Reader, wanted: RolloutFilter, text: str, before: int | None = None, limit: int = 50
) -> Found:
    """Completions that contain a text (ASCII letters in either case), the newest first.

    Args:
        before: only completions with a smaller number; the last one of a page leads to the next page.
    """
    where, values = wanted.conditions()
    pattern = "%" + "".join(f"!{c}" if c in "!%_" else c for c in text) + "%"
    indexed = len(text) >= SHORTEST and has(store, "completions")
    if indexed:
        first, last = _ends(store, wanted.run)
        last = last if before is None else min(last, before - 1)
        query = (
            "SELECT c.rowid FROM completions c CROSS JOIN rollouts r ON r.id = c.rowid WHERE c.completions MATCH ? "
            f"AND c.rowid BETWEEN ? AND ? AND {where} AND r.completion LIKE ? ESCAPE '!' "
            "ORDER BY c.rowid DESC LIMIT ?"
        )
        rows = store.select(query, [_trigrams(text), first, last, *values, pattern, limit + 1])
    else:
        index = _index(store, "rollouts_listed") if where != "1" else ""
        query = (
            f"SELECT id FROM rollouts WHERE id IN (SELECT id FROM rollouts {index} WHERE {where} ORDER BY id DESC "
            f"LIMIT {SCANNED}) AND id < ? AND completion LIKE ? ESCAPE '!' ORDER BY id DESC LIMIT ?"
        )
        rows = store.select(query, [*values, 2**62 if before is None else before, pattern, limit + 1])
    found = _listed(store, [row[0] for row in rows[:limit]])
    partly = not indexed and count_rollouts(store, wanted) > SCANNED
    return Found(found, len(rows) > limit, SCANNED if partly else None)


def rollout_stops(store: Reader, run: int) -> list[str]:
    """The reasons for which completions of a run ended."""
    index = _index(store, "rollouts_listed")
    query = f"SELECT stop FROM rollouts {index} WHERE run = ? GROUP BY stop ORDER BY COUNT(*) DESC"
    return [row[0] for row in store.select(query, [run])]


def run_of_rollout(store: Reader, rollout: int) -> tuple[int, str] | None:
    """Number and name of the run that a completion belongs to; None where there is no such completion."""
    query = "SELECT u.id, u.name FROM rollouts r JOIN runs u ON u.id = r.run WHERE r.id = ?"
    return next(iter(store.select(query, [rollout])), None)


def neighbours(store: Reader, run: int, rollout: StoredRollout) -> tuple[int | None, int | None]:
    """The completions of a run before and after one."""
    query = "SELECT id FROM rollouts WHERE run = ? AND (step, id) {0} (?, ?) ORDER BY step {1}, id {1} LIMIT 1"
    ends = [query.format("<", "DESC"), query.format(">", "ASC")]
    found = [store.select(end, [run, rollout.step, rollout.id]) for end in ends]
    before, after = (rows[0][0] if rows else None for rows in found)
    return before, after


def group_ids(store: Reader, run: int, step: int, group: int) -> list[int]:
    """The stored completions of one prompt in one step."""
    query = "SELECT id FROM rollouts WHERE run = ? AND step = ? AND group_index = ? ORDER BY id"
    return [row[0] for row in store.select(query, [run, step, group])]


def has(store: Reader, name: str) -> bool:
    """Whether a store has a table or an index."""
    return bool(store.select("SELECT 1 FROM sqlite_master WHERE name = ?", [name]))


def _index(store: Reader, name: str) -> str:
    """SQLite must be told: it knows no sizes, and would rather read the long rows in their order."""
    return f"INDEXED BY {name}" if has(store, name) else ""


def _ends(store: Reader, run: int | None) -> tuple[int, int]:
    """The smallest and the largest number of the completions of a run, or of all."""
    if run is None:
        return 0, 2**62
    query = f"SELECT MIN(id), MAX(id) FROM rollouts {_index(store, 'rollouts_listed')} WHERE run = ?"
    ((first, last),) = store.select(query, [run])
    return (0, -1) if first is None else (first, last)


def _trigrams(text: str) -> str:
    """The query that every three neighbouring characters occur.

    >>> _trigrams("abcd")
    '"abc" AND "bcd"'
    """
    parts = dict.fromkeys(text[i : i + SHORTEST] for i in range(len(text) - SHORTEST + 1))
    return " AND ".join('"' + part.replace('"', '""') + '"' for part in parts)


def _listed(store: Reader, ids: Sequence[int]) -> list[ListedRollout]:
    query = (
        "SELECT r.id, u.name, r.step, r.data_index, r.group_index, r.reward, r.stop, r.length, r.answer, r.prompt, "
        f"r.completion FROM rollouts r JOIN runs u ON u.id = r.run WHERE r.id IN ({', '.join('?' * len(ids))})"
    )
    by_id = {one.rollout.id: one for one in _rows(store.select(query, ids))}
    return [by_id[id] for id in ids if id in by_id]


def _rows(rows: Sequence[tuple]) -> Iterator[ListedRollout]:
    for id, run, step, data_index, group, reward, stop, length, answer, prompt, completion in rows:
        known = float("nan") if reward is None else reward
        yield ListedRollout(
            run,
            StoredRollout(
                prompt=prompt,
                completion=completion,
                reward=known,
                data_index=data_index,
                group=group,
                stop=stop,
                length=length,
                answer=answer,
                step=step,
                id=id,
            ),
        )
