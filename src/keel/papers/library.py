"""What a user of this machine added: imported papers, what was viewed, and topics subscribed to."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from urllib.parse import quote

from keel.core.errors import UserError, nearest
from keel.papers.catalogue import Paper, catalogue

FIRST = 10_001  # number of the first imported paper; the packaged catalogue stays below
APPLICATION, VERSION = 0x4B50_4150, 1
TABLES = (
    "CREATE TABLE papers (n INTEGER PRIMARY KEY, record TEXT NOT NULL)",
    "CREATE TABLE views (n INTEGER, day TEXT, count INTEGER NOT NULL, PRIMARY KEY (n, day)) WITHOUT ROWID",
    "CREATE TABLE subscriptions (topic TEXT PRIMARY KEY, told TEXT)",
)


@dataclass(frozen=True)
class Subscription:
    """A topic that the user wants to hear of.

    Args:
        topic: words, a family, or a theme.
        told: the day of the last digest that was sent; None before the first.
    """

    topic: str
    told: date | None = None


def default_path() -> Path:
    """`$KEEL_HOME/papers.sqlite`, or `papers.sqlite` in keel's folder of `$XDG_DATA_HOME` (`~/.local/share`)."""
    home = os.environ.get("KEEL_HOME")
    if home:
        return Path(home).expanduser() / "papers.sqlite"
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "keel" / "papers.sqlite"


class Library:
    """The user's own papers beside the packaged catalogue.

    Reading works where there is no file, or none that may be written: there is then only the catalogue. Every call
    opens the file and closes it, so that one library serves several threads.

    Args:
        path: an SQLite file, made when something is first added; `default_path()` without it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()

    def papers(self) -> tuple[Paper, ...]:
        """The catalogue, and after it what was imported here, by number.

        Raises:
            UserError: the file is no library of Keel, or is damaged.
        """
        return (*catalogue(), *self.imported())

    def imported(self) -> tuple[Paper, ...]:
        """What was imported here, by number.

        Raises:
            UserError: the file is no library of Keel, or is damaged.
        """
        found = []
        for n, record in self._rows("SELECT n, record FROM papers ORDER BY n"):
            try:
                found.append(Paper.from_json(json.loads(record)))
            except ValueError as error:
                raise UserError(f"paper {n} is damaged: {error}", str(self.path), "Import its page again.") from error
        return tuple(found)

    def add(self, papers: Iterable[Paper], day: date | None = None) -> tuple[Paper, ...]:
        """Store papers, under numbers of their own.

        Args:
            papers: whatever numbers they carry.
            day: on which they are added; today without it.

        Returns:
            The papers as stored: numbered, with status `imported` and the day.

        Raises:
            UserError: the file cannot be written.
        """
        day = day or datetime.now(UTC).date()
        stored = []
        with self._writing() as db:
            n = db.execute("SELECT COALESCE(MAX(n) + 1, ?) FROM papers", (FIRST,)).fetchone()[0]
            for number, paper in enumerate(papers, n):
                paper = replace(paper, n=number, status="imported", added=day)
                record = json.dumps(paper.to_json(), ensure_ascii=False)
                db.execute("INSERT INTO papers (n, record) VALUES (?, ?)", (number, record))
                stored.append(paper)
        return tuple(stored)

    def remove(self, n: int) -> None:
        """Take out an imported paper.

        Raises:
            UserError: it was not imported here, or the file cannot be written.
        """
        if not any(paper.n == n for paper in self.imported()):
            raise UserError(f"paper {n} was not imported here", str(self.path))
        with self._writing() as db:
            db.execute("DELETE FROM papers WHERE n = ?", (n,))
            db.execute("DELETE FROM views WHERE n = ?", (n,))

    def view(self, n: int, day: date | None = None) -> bool:
        """Count one view of a paper; whether it could be counted (a library that is read-only counts nothing)."""
        day = day or datetime.now(UTC).date()
        try:
            with self._writing() as db:
                db.execute(
                    "INSERT INTO views (n, day, count) VALUES (?, ?, 1) "
                    "ON CONFLICT (n, day) DO UPDATE SET count = count + 1",
                    (n, day.isoformat()),
                )
        except UserError:
            return False
        return True

    def views(self) -> dict[int, dict[date, int]]:
        """How often each paper was viewed on each day.

        Raises:
            UserError: the file is no library of Keel, or is damaged.
        """
        out: dict[int, dict[date, int]] = {}
        for n, day, count in self._rows("SELECT n, day, count FROM views ORDER BY n, day"):
            out.setdefault(n, {})[date.fromisoformat(day)] = count
        return out

    def subscriptions(self) -> tuple[Subscription, ...]:
        """The topics, by name.

        Raises:
            UserError: the file is no library of Keel, or is damaged.
        """
        rows = self._rows("SELECT topic, told FROM subscriptions ORDER BY topic")
        return tuple(Subscription(topic, date.fromisoformat(told) if told else None) for topic, told in rows)

    def subscribe(self, topic: str) -> bool:
        """Add a topic; False where it is there already, in any case of letters.

        Raises:
            UserError: the topic has no letter or digit, or the file cannot be written.
        """
        topic = " ".join(topic.split())
        if not any(c.isalnum() for c in topic):
            raise UserError("a topic needs a word", f"'{topic}'", "For example: entropy bonus.")
        if any(known.topic.casefold() == topic.casefold() for known in self.subscriptions()):
            return False
        with self._writing() as db:
            db.execute("INSERT INTO subscriptions (topic) VALUES (?)", (topic,))
        return True

    def unsubscribe(self, topic: str) -> None:
        """Take out a topic.

        Raises:
            UserError: nobody subscribed to it, or the file cannot be written.
        """
        topic = " ".join(topic.split())
        known = [one.topic for one in self.subscriptions()]
        match = [name for name in known if name.casefold() == topic.casefold()]
        if not match:
            raise UserError(f"'{topic}' is no subscription.{nearest(topic, known)}", None, "`keel papers subscribe`")
        with self._writing() as db:
            db.execute("DELETE FROM subscriptions WHERE topic = ?", (match[0],))

    def told(self, topics: Sequence[str], day: date) -> None:
        """Note that a digest of these topics went out.

        Raises:
            UserError: the file cannot be written.
        """
        with self._writing() as db:
            db.executemany("UPDATE subscriptions SET told = ? WHERE topic = ?", [(day.isoformat(), t) for t in topics])

    def _rows(self, query: str) -> list[tuple]:
        if not self.path.exists():
            return []
        uri = f"file:{quote(str(self.path.absolute()))}?mode=ro"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=5)) as db:
                return db.execute(query).fetchall() if _recognised(db, self.path) else []
        except sqlite3.Error as error:
            raise UserError(f"the library cannot be read ({error})", str(self.path), "Move it away.") from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction; the file and its tables are made where there are none."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=5, isolation_level=None)) as db:
                db.execute("BEGIN IMMEDIATE")
                if not _recognised(db, self.path):
                    for statement in TABLES:
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {APPLICATION}")
                    db.execute(f"PRAGMA user_version = {VERSION}")
                yield db
                db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            fix = "KEEL_HOME names another folder."
            raise UserError(f"the library cannot be written ({error})", str(self.path), fix) from error


def _recognised(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the file has the tables of a library; False where it is empty."""
    application, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    tables = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
    if not tables and not application:
        return False
    if application != APPLICATION:
        raise UserError("this file is no library of papers", str(path), "KEEL_HOME names another folder.")
    if version > VERSION:
        raise UserError(f"the library has version {version}, this Keel knows {VERSION}", str(path), "Upgrade Keel.")
    return True
