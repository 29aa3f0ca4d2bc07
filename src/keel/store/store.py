"""The store of runs: metrics, rollouts and evaluations in one SQLite file.

One process trains and writes while others write their own runs and pages read: the journal is a write-ahead log, so
that readers never hold up a writer, and writers take turns for the few milliseconds of a batched insert.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from keel.core.errors import KeelError, RunError, nearest
from keel.store.listing import RUN_ORDERS, run_conditions
from keel.store.numbers import pack, unpack
from keel.store.opening import fault, open_to_read, open_to_write
from keel.store.records import StoredEvaluation, StoredRollout, StoredRun

_LISTED = tuple(f.name for f in fields(StoredRun) if f.name != "config")
_UNNAMED = "<unknown>"  # a token of the model for which its tokenizer has no name
_ROLLOUT = "id, step, data_index, group_index, reward, stop, length, rewards, answer, prompt, completion, tokens"


class Store:
    """A file of runs.

    Every method that writes does so in one transaction: all of it is there afterwards, or nothing.

    Args:
        path: the file; made with its folders where it does not exist.
        readonly: for pages: never writes, never waits for a writer, and refuses a file that does not exist.
        timeout: seconds that a write waits for other processes before it raises `StoreBusy`.

    Raises:
        UserError: the file is no store of Keel, or one of a newer Keel, or cannot be opened.
    """

    def __init__(self, path: str | Path, readonly: bool = False, timeout: float = 5.0):
        self.path, self.readonly = Path(path), readonly
        self._timeout = timeout
        self._lock = threading.RLock()
        self._names: dict[str, int] = {}
        self._db = open_to_read(self.path, timeout) if readonly else open_to_write(self.path, timeout)

    def close(self) -> None:
        """Close the file; the store cannot be used afterwards."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Writing

    def create_run(self, name: str, config: Mapping[str, Any], recipe: str, task: str, model: str, seed: int) -> int:
        """Begin a run; its number is what the other methods want.

        Raises:
            RunError: there is a run of that name.
        """
        now = time.time()
        values = (name, recipe, task, model, seed, "running", now, now, _dump(config))
        try:
            with self._transaction() as db:
                return int(
                    db.execute(
                        "INSERT INTO runs (name, recipe, task, model, seed, status, created, updated, config) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        values,
                    ).lastrowid
                    or 0
                )
        except sqlite3.IntegrityError as error:
            raise RunError(
                f"There is a run named '{name}'.", str(self.path), "Resume it, or choose another name."
            ) from error

    def log_metrics(self, run_id: int, step: int, metrics: Mapping[str, float]) -> None:
        """Write numbers of one step, NaN and infinities included; a second value for a step replaces the first."""
        values = {name: float(value) for name, value in metrics.items()}
        with self._transaction() as db:
            self._touch(db, run_id, step)
            ids = self._name_ids(db, values)
            db.executemany(
                "INSERT OR REPLACE INTO metrics (run, name, step, value) VALUES (?, ?, ?, ?)",
                [(run_id, ids[name], step, _null(value)) for name, value in values.items()],
            )
        self._names.update(ids)

    def log_rollouts(self, run_id: int, step: int, rollouts: Sequence[StoredRollout]) -> None:
        """Write completions of one step."""
        rows = [
            (
                run_id,
                step,
                r.data_index,
                r.group,
                _null(r.reward),
                r.stop,
                r.length,
                _dump(r.rewards),
                None if r.answer is None else _text(r.answer),
                _text(r.prompt),
                _text(r.completion),
                _dump([_UNNAMED if token is None else token for token in r.tokens]) if r.tokens else None,
                pack(r.numbers) if r.numbers else None,
            )
            for r in rollouts
        ]
        with self._transaction() as db:
            self._touch(db, run_id, step)
            db.executemany(
                "INSERT INTO rollouts (run, step, data_index, group_index, reward, stop, length, rewards, answer, "
                "prompt, completion, tokens, numbers) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )

    def log_evaluation(self, run_id: int, step: int, phase: str, evaluation: Mapping[str, Any]) -> None:
        """Write what `Evaluation.to_json` gave; a second evaluation of the same step and phase replaces the first."""
        with self._transaction() as db:
            self._touch(db, run_id, step)
            db.execute(
                "INSERT OR REPLACE INTO evaluations (run, step, phase, created, evaluation) VALUES (?, ?, ?, ?, ?)",
                (run_id, step, phase, time.time(), _dump(evaluation)),
            )

    def finish(self, run_id: int, status: str = "finished", summary: Mapping[str, Any] | None = None) -> None:
        """Write how a run ended."""
        now = time.time()
        with self._transaction() as db:
            done = db.execute(
                "UPDATE runs SET status = ?, summary = ?, updated = ?, finished = ? WHERE id = ?",
                (status, _dump(summary or {}), now, now, run_id),
            )
            self._refuse_unknown(done.rowcount, run_id)

    def rewind(self, run_id: int, step: int) -> None:
        """Delete all that is after `step` (-1: everything), so that a run can go on from there."""
        with self._transaction() as db:
            done = db.execute(
                "UPDATE runs SET step = ?, status = 'running', finished = NULL, summary = '{}', updated = ? "
                "WHERE id = ?",
                (max(step, 0), time.time(), run_id),
            )
            self._refuse_unknown(done.rowcount, run_id)
            for table in ("metrics", "rollouts", "evaluations"):
                db.execute(f"DELETE FROM {table} WHERE run = ? AND step > ?", (run_id, step))

    # Reading

    def runs(
        self,
        *,
        name: str | None = None,
        recipe: str | None = None,
        task: str | None = None,
        model: str | None = None,
        seed: int | None = None,
        status: str | None = None,
        limit: int | None = None,
        offset: int = 0,
        order: str = "created",
        descending: bool = True,
    ) -> list[StoredRun]:
        """Runs, the newest first, without their configurations.

        Args:
            name: part of the name.
            recipe, task, model, seed, status: exact values.
            limit, offset: a page of them.
            order: what they are ordered by, one of `RUN_ORDERS`; runs without it come last.
            descending: from the largest or newest.
        """
        exact = {"recipe": recipe, "task": task, "model": model, "seed": seed, "status": status}
        where, values = run_conditions(exact, name)
        by, way = RUN_ORDERS[order], "DESC" if descending else "ASC"
        missing = f"{by} IS NULL, " if order == "score" else ""
        rows = self.select(
            f"SELECT {', '.join(_LISTED)} FROM runs WHERE {where} ORDER BY {missing}{by} {way}, id {way} "
            "LIMIT ? OFFSET ?",
            [*values, -1 if limit is None else limit, offset],
        )
        return [self._stored_run(row) for row in rows]

    def run(self, name: str) -> StoredRun:
        """The run of that name, with its configuration.

        Raises:
            RunError: there is none.
        """
        rows = self.select(f"SELECT {', '.join(_LISTED)}, config FROM runs WHERE name = ?", [name])
        if not rows:
            known = [row[0] for row in self.select("SELECT name FROM runs ORDER BY created DESC, id DESC", [])]
            there = f"Runs: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}." if known else "It has none."
            raise RunError(f"There is no run named '{name}'.{nearest(name, known)}", str(self.path), there)
        return self._stored_run(rows[0])

    def metrics(self, run_id: int, names: Iterable[str] | None = None) -> dict[str, list[tuple[int, float]]]:
        """Curves by name: (step, value) by growing step.

        Args:
            names: which; by default all. Names without values are left out.
        """
        query = "SELECT n.name, m.step, m.value FROM names n JOIN metrics m ON m.name = n.id WHERE m.run = ?"
        values: list[Any] = [run_id]
        if names is not None:
            values += list(names)
            query += f" AND n.name IN ({', '.join('?' * (len(values) - 1))})"
        curves: dict[str, list[tuple[int, float]]] = {}
        for name, step, value in self.select(query + " ORDER BY n.name, m.step", values):
            curves.setdefault(name, []).append((step, _nan(value)))
        return curves

    def rollouts(
        self, run_id: int, step: int | None = None, limit: int = 100, offset: int = 0, numbers: bool = True
    ) -> list[StoredRollout]:
        """Completions in the order in which they were written.

        Args:
            step: of that step only.
            limit, offset: a page of them.
            numbers: whether to read the numbers per token.

        Raises:
            KeelError: stored numbers are damaged.
        """
        columns = f"{_ROLLOUT}, {'numbers' if numbers else 'NULL'}"
        where, values = ("run = ?", [run_id]) if step is None else ("run = ? AND step = ?", [run_id, step])
        rows = self.select(
            f"SELECT {columns} FROM rollouts WHERE {where} ORDER BY step, id LIMIT ? OFFSET ?", [*values, limit, offset]
        )
        return [self._rollout(row) for row in rows]

    def rollout(self, run_id: int, id: int) -> StoredRollout:
        """One completion of a run, with its numbers per token.

        Raises:
            RunError: the run has none of that number; the numbers that it has are named.
            KeelError: stored numbers are damaged.
        """
        rows = self.select(f"SELECT {_ROLLOUT}, numbers FROM rollouts WHERE run = ? AND id = ?", [run_id, id])
        if not rows:
            query = "SELECT COUNT(*), MIN(id), MAX(id) FROM rollouts WHERE run = ?"
            ((count, first, last),) = self.select(query, [run_id])
            known = f"It has {count}, numbered {first} to {last}." if count else "It has none."
            raise RunError(f"The run has no rollout {id}.", str(self.path), known)
        return self._rollout(rows[0])

    def rollout_counts(self, run_id: int) -> dict[int, int]:
        """How many completions each step has, by growing step."""
        query = "SELECT step, COUNT(*) FROM rollouts WHERE run = ? GROUP BY step ORDER BY step"
        return dict(self.select(query, [run_id]))

    def evaluations(self, run_id: int) -> list[StoredEvaluation]:
        """Evaluations by growing step."""
        query = "SELECT step, phase, created, evaluation FROM evaluations WHERE run = ? ORDER BY step, created"
        rows = self.select(query, [run_id])
        return [
            StoredEvaluation(step, phase, created, self._load(evaluation)) for step, phase, created, evaluation in rows
        ]

    # Common to the above

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if self.readonly:
            raise KeelError("The store was opened for reading only.", str(self.path))
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                raise self._fault(error) from error
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError):
                    raise self._fault(error) from error
                raise

    def select(self, query: str, values: Sequence[Any] = ()) -> list[tuple]:
        """The rows of a query in SQL; `keel.store.schema` has the tables.

        Raises:
            KeelError: the store cannot be read.
        """
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise self._fault(error) from error

    def _touch(self, db: sqlite3.Connection, run_id: int, step: int) -> None:
        if step < 0:
            raise ValueError(f"a step is 0 or more, not {step}")
        done = db.execute("UPDATE runs SET step = MAX(step, ?), updated = ? WHERE id = ?", (step, time.time(), run_id))
        self._refuse_unknown(done.rowcount, run_id)

    def _name_ids(self, db: sqlite3.Connection, names: Iterable[str]) -> dict[str, int]:
        ids = {}
        for name in names:
            if name not in self._names:
                db.execute("INSERT OR IGNORE INTO names (name) VALUES (?)", (name,))
                ids[name] = db.execute("SELECT id FROM names WHERE name = ?", (name,)).fetchone()[0]
            else:
                ids[name] = self._names[name]
        return ids

    def _stored_run(self, row: tuple) -> StoredRun:
        known: dict[str, Any] = dict(zip((*_LISTED, "config"), row, strict=False))
        return StoredRun(
            **{key: self._load(value) if key in ("summary", "config") else value for key, value in known.items()}
        )

    def _rollout(self, row: tuple) -> StoredRollout:
        (id, step, data_index, group, reward, stop, length, rewards, answer, prompt, completion, tokens, numbers) = row
        return StoredRollout(
            prompt=prompt,
            completion=completion,
            reward=_nan(reward),
            rewards={name: _nan(value) for name, value in self._load(rewards).items()},
            data_index=data_index,
            group=group,
            stop=stop,
            length=length,
            answer=answer,
            tokens=tuple(self._load(tokens)) if tokens else (),
            numbers=unpack(numbers, f"{self.path}: rollout {id}") if numbers else {},
            step=step,
            id=id,
        )

    def _load(self, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise KeelError(f"A stored entry is damaged ({error}).", str(self.path)) from error

    def _refuse_unknown(self, found: int, run_id: int) -> None:
        if not found:
            raise KeelError(f"There is no run number {run_id}.", str(self.path))

    def _fault(self, error: sqlite3.Error) -> KeelError:
        return fault(error, self.path, self._timeout)


def _dump(value: Any) -> str:
    return json.dumps(value, default=_plain, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch, and paths, as JSON knows them."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be stored: {value!r}")


def _text(value: str) -> str:
    """Without the halves of characters that a model may write and UTF-8 cannot hold."""
    return value.encode("utf-8", "replace").decode("utf-8")


def _null(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)
