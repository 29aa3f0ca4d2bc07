"""The user's own state: what is stored comes back, and nothing is needed for reading."""

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from keel.core.errors import UserError
from keel.papers.catalogue import Paper, catalogue
from keel.papers.library import FIRST, Library, default_path

DAY = date(2026, 3, 1)
MINE = Paper(7, "Mine'; DROP TABLE papers; --", DAY, ("Ada Lovelace",), family="online", abstract="Text.")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "home" / "papers.sqlite")


def test_without_a_file_there_is_the_catalogue_and_reading_makes_none(library: Library) -> None:
    assert library.papers() == catalogue()
    assert library.subscriptions() == () and library.views() == {}
    assert not library.path.parent.exists()


def test_imported_papers_come_back_with_numbers_of_their_own(library: Library) -> None:
    stored = library.add([MINE, Paper(8, "Second")], DAY)
    assert [one.n for one in stored] == [FIRST, FIRST + 1]
    assert {one.status for one in stored} == {"imported"} and stored[0].added == DAY
    assert Library(library.path).papers() == (*catalogue(), *stored)
    assert stored[0].title == MINE.title and stored[0].authors == ("Ada Lovelace",)
    library.remove(FIRST)
    assert [one.title for one in library.imported()] == ["Second"]
    with pytest.raises(UserError, match="paper 47 was not imported"):
        library.remove(47)


def test_views_are_counted_by_day(library: Library) -> None:
    for day in (DAY, DAY, date(2026, 3, 2)):
        assert library.view(47, day)
    assert library.views() == {47: {DAY: 2, date(2026, 3, 2): 1}}


def test_subscriptions_remember_when_they_were_told(library: Library) -> None:
    assert library.subscribe("  entropy   bonus ")
    assert not library.subscribe("Entropy Bonus")
    library.subscribe("online")
    library.told(["online"], DAY)
    assert [(one.topic, one.told) for one in library.subscriptions()] == [("entropy bonus", None), ("online", DAY)]
    library.unsubscribe("ENTROPY bonus")
    assert [one.topic for one in library.subscriptions()] == ["online"]
    with pytest.raises(UserError, match=r"'onlin' is no subscription\. Did you mean 'online'\?"):
        library.unsubscribe("onlin")
    with pytest.raises(UserError, match="a topic needs a word"):
        library.subscribe(" - ")


def test_where_nothing_can_be_written_reading_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = Library(tmp_path / "file" / "papers.sqlite")  # a folder cannot be made below a file, not even by root
    assert blocked.papers() == catalogue()
    assert not blocked.view(47)
    with pytest.raises(UserError, match="the library cannot be written"):
        blocked.subscribe("entropy")


@pytest.fixture
def humble() -> Iterator[Path]:
    """A folder of somebody who may not write everywhere, and is who runs the test."""
    root, nobody = os.geteuid() == 0, 65534
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are root's alone
        if root:
            os.chown(name, nobody, nobody)
            os.seteuid(nobody)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)


def test_a_file_without_the_right_to_write_is_read(humble: Path) -> None:
    library = Library(humble / "home" / "papers.sqlite")
    library.add([MINE], DAY)
    library.path.chmod(0o400)
    library.path.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            (library.path.parent / "more").write_text("")
        assert len(library.imported()) == 1 and not library.view(47)
    finally:
        library.path.parent.chmod(0o700)


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "papers.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    before = other.read_bytes()
    for call in (Library(other).imported, lambda: Library(other).subscribe("entropy")):
        with pytest.raises(UserError, match="no library of papers"):
            call()
    assert other.read_bytes() == before and not Library(other).view(47)
    other.write_text("This is a text and no database, long enough for a header of SQLite." * 20)
    with pytest.raises(UserError, match="cannot be read"):
        Library(other).papers()


def test_a_failed_write_leaves_nothing_half_done(library: Library) -> None:
    library.add([MINE], DAY)
    broken = (Paper(1, "Good") if i == 0 else 1 / 0 for i in range(2))
    with pytest.raises(ZeroDivisionError):
        library.add(broken, DAY)  # type: ignore[arg-type]
    assert [one.title for one in library.imported()] == [MINE.title]


def test_the_place_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEEL_HOME", str(tmp_path))
    assert default_path() == tmp_path / "papers.sqlite" == Library().path
    monkeypatch.delenv("KEEL_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "keel" / "papers.sqlite"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_path() == Path.home() / ".local" / "share" / "keel" / "papers.sqlite"
