"""`keel papers` in the terminal: 80 columns, JSON for programs, errors with what to do."""

import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.papers import pages
from typer.testing import CliRunner, Result

from keel.cli.main import app
from keel.core.errors import KeelError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEEL_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keel(*words: str) -> Result:
    return CliRunner().invoke(app, ["papers", *words])


def said(*words: str) -> str:
    result = keel(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    assert all(len(line) <= 80 for line in result.stdout.splitlines()), "80 columns"
    return result.stdout


def records(*words: str) -> list[dict]:
    result = keel(*words, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.mark.parametrize("words", [("list", "-n", "3"), ("search", "entropy bonus", "--mode", "lexical", "-n", "3")])
def test_titles_are_whole_at_forty_columns(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    titles = [paper["title"] for paper in records(*words)]
    monkeypatch.setenv("COLUMNS", "40")
    lines = said(*words).splitlines()
    assert max(map(len, lines)) <= 40 and "…" not in "".join(lines)
    text = " ".join(line.strip() for line in lines)
    assert len(titles) == 3 and all(title in text for title in titles)
    assert len(lines) < 20, "a title takes few lines"


def test_papers_are_listed_newest_first_and_filtered() -> None:
    lines = said().splitlines()
    assert lines[0].split() == ["no.", "date", "in", "Keel", "family", "title"]
    assert lines[1].split()[:2] == ["191", "2026-02-11"] and lines[-1] == "20 of 222; --limit shows more"
    found = records("list", "--family", "target", "--runs-in-keel", "-n", "50")
    assert found and {(one["family"], one["status"]) for one in found} == {("target", "implemented")}
    assert [one["date"] for one in found] == sorted((one["date"] for one in found), reverse=True)
    assert all(one["date"] >= "2025-12-01" for one in records("list", "--since", "2025-12-01"))
    assert records("--family", "target") == records("list", "--family", "target")


def test_searching_and_showing() -> None:
    assert records("search", "Clip-Cov", "covariance", "--mode", "lexical")[0]["n"] == 47
    assert "Entropy Mechanism" in said("search", "Clip-Cov", "covariance", "--mode", "lexical", "-n", "1")
    assert "No paper." in said("search", "zzzz", "--mode", "lexical")
    shown = said("show", "47")
    for part in ("summary", "there     + Clip-Cov weight", "run it    keel train kl_cov", "17 authors"):
        assert part in shown
    assert "missing" not in shown and "missing" in said("show", "195")
    assert said("list", "--by", "trending").count("\n") > 1, "what was shown has been viewed"
    assert [one["n"] for one in records("list", "--by", "trending")] == [195, 47]


def test_from_a_page_to_a_digest_and_a_feed(home: Path) -> None:
    (home / "page.html").write_text(pages.LISTING)
    dry = said("import", "page.html", "--dry-run")
    assert "1 new, 1 known, 1 that cannot be read" in dry and "Nothing was added" in dry
    done = keel("import", "page.html", "--json")
    found = json.loads(done.stdout)
    assert found["stored"] and found["new"][0]["n"] == 10001 and found["problems"][0]["line"] == 15
    assert "no. 10001" in " ".join(said("import", "page.html").split())
    assert said("subscribe", "the", "edge") == "the edge  (not told yet)\n"
    assert "already there: THE edge" in said("subscribe", "THE", "edge")
    (topic,) = records("digest", "--since", "2026-01-01")
    assert [one["title"] for one in topic["papers"]] == ["Entropy at the Edge: $\\beta$ < 1"]
    today = f"{date.today()}"
    assert "new papers: 1" in said("digest", "--since", "2026-01-01", "--email", "out.eml")
    assert (home / "out.eml").read_bytes().startswith(b"Subject: Keel: 1 new paper\r\n")
    assert records("subscribe")[0]["told"] in (today, f"{date.today()}")  # which may be another day by now
    said("feed", "feed.xml")
    first = ElementTree.parse(home / "feed.xml").getroot().findtext("{*}entry/{*}title")
    assert first == "Entropy at the Edge: $\\beta$ < 1"
    assert said("subscribe", "--remove", "the edge") == ""
    said("remove", "10001")
    assert all(one["n"] < 10001 for one in records("list", "-n", "300"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "999"), "there is no paper 999"),
        (("list", "--family", "onlin"), "--family: must be one of online"),
        (("list", "--since", "yesterday"), "--since: is no date: 'yesterday'"),
        (("list", "--runs-in-keel", "--status", "context"), "--runs-in-keel: contradicts --status context"),
        (("--json", "list"), "options come after the subcommand"),
        (("search", "..."), "a query needs a word"),
        (("search", "x", "--mode", "fuzzy"), "must be one of mixed, lexical"),
        (("import", "missing.html"), "missing.html: cannot be read as text"),
        (("digest", "--since", "2026-01-01"), "there are no subscriptions"),
        (("digest", "--smtp", "localhost"), "--smtp: needs --to and --from"),
        (("digest", "--to", "a@b.c"), "--to: is for --smtp or --email"),
        (("subscribe", "--remove"), "--remove: needs the topic"),
        (("feed", "missing/feed.xml"), "cannot be written"),
    ],
)
def test_mistakes_are_told(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(KeelError, match=re.escape(message)) as told:
        CliRunner().invoke(app, ["papers", *words], catch_exceptions=False)
    assert told.value.exit_code == 2


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['keel', 'papers', 'list', '--json']\n"
        "from keel.cli.main import app\n"
        "app(standalone_mode=False)\n"
        "print(sorted({'torch', 'sklearn', 'numpy', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
