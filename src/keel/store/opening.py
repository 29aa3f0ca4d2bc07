"""Opening the file of a store, and saying in words what can go wrong with it."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from urllib.parse import quote

from keel.core.errors import KeelError, UserError
from keel.store.schema import APPLICATION, SEARCH, TABLES, VERSION


class StoreBusy(KeelError):
    """Another process held the store for longer than the timeout; nothing was written, and a later try may succeed."""


def open_to_write(path: Path, timeout: float) -> sqlite3.Connection:
    """Open a store, or make one with its folders; several processes may do so at once.

    Raises:
        UserError: the file is no store of Keel, or one of a newer Keel, or cannot be opened.
        StoreBusy: other processes held it for longer than `timeout` seconds.
    """
    _refuse_other_files(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = _connect(path, "", timeout)
    except (sqlite3.Error, OSError) as error:
        raise _cannot_open(path, error) from error
    try:
        made = _recognise(db, path)
        _keep_journal(db, path, timeout)
        db.execute("PRAGMA synchronous = NORMAL")  # safe in this journal; spares a step the wait for the disk
        db.execute("PRAGMA foreign_keys = ON")
        if not made:
            _make_tables(db, path)
    except BaseException as error:
        db.close()
        if isinstance(error, sqlite3.Error):
            raise fault(error, path, timeout) from error
        raise
    return db


def open_to_read(path: Path, timeout: float) -> sqlite3.Connection:
    """Open a store without any right to change it.

    Raises:
        UserError: the file does not exist, is no store of Keel, or one of a newer Keel, or cannot be opened.
    """
    if not path.exists():
        raise UserError("There is no store here.", str(path), "It appears with the first run.")
    _refuse_other_files(path)
    try:
        db = _connect(path, "?mode=ro", timeout)
        try:
            db.execute("SELECT 1 FROM sqlite_master")
        except sqlite3.OperationalError as error:
            db.close()
            barred = error.sqlite_errorname.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY"))
            if not barred or Path(f"{path}-wal").exists():
                raise
            # In a folder where nothing may be written, nobody writes the store, and its journal cannot be opened.
            db = _connect(path, "?mode=ro&immutable=1", timeout)
    except sqlite3.OperationalError as error:
        raise _cannot_open(path, error) from error
    except sqlite3.DatabaseError as error:
        raise _no_store(path) from error
    try:
        if not _recognise(db, path):
            raise _no_store(path)
    except BaseException:
        db.close()
        raise
    return db


def fault(error: sqlite3.Error, path: Path, timeout: float) -> KeelError:
    """The error of Keel that says what SQLite reported."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_CANTOPEN")):
        return UserError("The store cannot be written: permission is missing.", str(path))
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreBusy(
            f"Another process has kept the store locked for more than {timeout:g} s; nothing was written.",
            str(path),
            "Look for a program that holds the file open in a transaction.",
        )
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return KeelError(
            f"The store cannot be written ({error}); what was in it before is untouched.",
            str(path),
            "Make room on the disk (or raise its quota), then continue with --resume.",
        )
    return KeelError(f"The store cannot be used ({error}).", str(path))


def _connect(path: Path, mode: str, timeout: float) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}{mode}"
    return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)


def _recognise(db: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is a store; False where it is empty."""
    try:
        application, version, tables = (
            db.execute(query).fetchone()[0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT COUNT(*) FROM sqlite_master")
        )
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        raise _no_store(path) from error
    if not tables and not application:
        return False
    if application != APPLICATION:
        raise _no_store(path)
    if version > VERSION:
        raise UserError(
            f"The store has schema {version}; this Keel knows schemas up to {VERSION}.",
            str(path),
            "Upgrade Keel, or name another store.",
        )
    return True


def _make_tables(db: sqlite3.Connection, path: Path) -> None:
    db.execute("BEGIN IMMEDIATE")
    if not _recognise(db, path):  # another process may have made them meanwhile
        for statement in TABLES.split(";"):
            db.execute(statement)
        if _has_trigrams(db):
            for statement in SEARCH:
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute(f"PRAGMA user_version = {VERSION}")
    db.execute("COMMIT")


def _has_trigrams(db: sqlite3.Connection) -> bool:
    """Whether this SQLite can search by neighbouring characters; it is built with FTS5 almost everywhere."""
    try:
        db.execute("CREATE VIRTUAL TABLE temp.tried USING fts5 (word, tokenize = 'trigram')")
    except sqlite3.OperationalError:
        return False
    db.execute("DROP TABLE temp.tried")
    return True


def _keep_journal(db: sqlite3.Connection, path: Path, timeout: float) -> None:
    """Set the write-ahead log; processes that do so at once get no waiting time from SQLite."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname not in ("SQLITE_BUSY", "SQLITE_LOCKED") or time.monotonic() > deadline:
                raise fault(error, path, timeout) from error
            time.sleep(0.02)


def _refuse_other_files(path: Path) -> None:
    """Look at the first bytes, so that SQLite never touches a file that is something else."""
    if path.is_dir():
        inside = path / "keel.sqlite"
        raise UserError("This is a folder, not a store.", str(path), f"The store inside would be {inside}.")
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise _cannot_open(path, error) from error
    if start not in (b"", b"SQLite format 3\0"):
        raise _no_store(path)


def _cannot_open(path: Path, error: Exception) -> UserError:
    return UserError(f"The store cannot be opened ({error}).", str(path))


def _no_store(path: Path) -> UserError:
    return UserError("This file is no store of Keel.", str(path), "Name another file, or move this one away.")
