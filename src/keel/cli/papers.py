"""`keel papers`: the catalogue in the terminal, what a page brings that is new, subscriptions, digest and feed."""

import json
from collections.abc import Sequence
from datetime import date, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keel.cli.options import Json, Runs

if TYPE_CHECKING:
    from rich.table import Table

    from keel.papers.catalogue import Paper
    from keel.papers.importing import Findings
    from keel.papers.search import Filters

papers_app = typer.Typer(invoke_without_command=True, help="The papers of the field, and what of each runs in Keel.")
IN_KEEL = {"implemented": "runs", "experiment": "experiment", "context": "context", "imported": "imported"}
NARROW = 60  # columns, below which a title beside the rest is cut to pieces
STYLE = {"implemented": "green", "experiment": "cyan", "context": "dim", "imported": "yellow"}


class By(StrEnum):
    """In which order papers are listed."""

    newest = "newest"
    trending = "trending"
    number = "number"


Family = Annotated[str | None, typer.Option("--family", help="Only papers of a family; `keel papers families`.")]
Theme = Annotated[str | None, typer.Option("--theme", help="Only papers of a theme.")]
Running = Annotated[bool, typer.Option("--runs-in-keel", help="Only papers that Keel implements.")]
Status = Annotated[str | None, typer.Option("--status", help="implemented, experiment, context or imported.")]
Since = Annotated[str | None, typer.Option("--since", metavar="DATE", help="Published on that day or later.")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="The most papers that are shown.")]


@papers_app.callback()
def papers(context: typer.Context, family: Family = None, running: Running = False, as_json: Json = False) -> None:
    """List the newest papers, or do what a subcommand says."""
    if context.invoked_subcommand is None:
        list_papers(family=family, running=running, as_json=as_json)
    elif family or running or as_json:
        from keel.core.errors import ConfigError

        raise ConfigError("options come after the subcommand", f"keel papers ... {context.invoked_subcommand}")


@papers_app.command("list")
def list_papers(
    family: Family = None,
    theme: Theme = None,
    running: Running = False,
    status: Status = None,
    since: Since = None,
    by: Annotated[By, typer.Option("--by", help="The order.")] = By.newest,
    limit: Limit = 20,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """List papers, newest first, or by what is compared and viewed on this machine."""
    from keel.papers.catalogue import newest_first
    from keel.papers.library import Library
    from keel.papers.trending import trending

    kept = _filters(family, theme, running, status, since)
    library = Library()
    scores: dict[int, float] = {}
    if by is By.trending:
        ranked = trending(runs, library=library)
        scores = {paper.n: score for paper, score in ranked}
        found = [paper for paper, _ in ranked if kept(paper)]
    else:
        found = [paper for paper in library.papers() if kept(paper)]
        found = newest_first(found) if by is By.newest else found
    if as_json:
        records = [paper.to_json() | ({"score": scores[paper.n]} if scores else {}) for paper in found[:limit]]
        print(json.dumps(records, indent=1, ensure_ascii=False))
        return
    _show_papers(found[:limit], len(found))
    if by is By.trending and not found:
        print("Nothing was compared or viewed here lately.")


@papers_app.command("families")
def families(as_json: Json = False) -> None:
    """List the families and the themes."""
    from keel.papers.catalogue import FAMILIES, THEMES, catalogue

    counts = {name: sum(paper.family == name for paper in catalogue()) for name in FAMILIES}
    if as_json:
        print(json.dumps({"families": FAMILIES, "themes": THEMES, "papers": counts}, indent=1))
        return
    for name, said in FAMILIES.items():
        print(f"{name:<13} {counts[name]:>3}  {said}")
    print("\nthemes")
    for name, said in THEMES.items():
        print(f"{name:<13} {sum(name in paper.themes for paper in catalogue()):>3}  {said}")


@papers_app.command("search")
def search_papers(
    query: Annotated[list[str], typer.Argument(help="Words.")],
    mode: Annotated[
        str | None, typer.Option("--mode", help="mixed (lexical and semantic), lexical, semantic, or sentences.")
    ] = None,
    family: Family = None,
    theme: Theme = None,
    running: Running = False,
    status: Status = None,
    since: Since = None,
    limit: Limit = 10,
    as_json: Json = False,
) -> None:
    """Search papers by words and by meaning."""
    import sys

    from keel.papers.library import Library
    from keel.papers.search import default_mode, search

    if mode is None:
        mode = default_mode()
        if mode == "lexical":
            print("keel: by words alone; pip install 'keel-rl[papers]' adds search by meaning", file=sys.stderr)
    kept = _filters(family, theme, running, status, since)
    hits = search(" ".join(query), mode, kept, limit, Library().papers())  # type: ignore[arg-type]
    if as_json:
        records = [hit.paper.to_json() | {"score": hit.score} for hit in hits]
        print(json.dumps(records, indent=1, ensure_ascii=False))
    else:
        _show_papers([hit.paper for hit in hits], len(hits))


@papers_app.command("show")
def show_paper(n: Annotated[int, typer.Argument(help="Its number.")], as_json: Json = False) -> None:
    """Show one paper: what it proposes, what of it is here, and how to run it."""
    from keel.papers.catalogue import paper
    from keel.papers.library import Library

    library = Library()
    found = paper(n, library.papers())
    library.view(n)
    if as_json:
        print(json.dumps(found.to_json() | {"command": found.command}, indent=1, ensure_ascii=False))
    else:
        _show_one(found)


@papers_app.command("import")
def import_papers(
    file: Annotated[Path, typer.Argument(help="A saved listing: HTML, text, Atom, or JSON.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what is new; add nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Read a saved listing page, and add the papers on it that are new."""
    from keel.papers.importing import import_page

    findings = import_page(file, dry_run=dry_run)
    _print_findings_json(findings) if as_json else _print_findings(findings, file)


@papers_app.command("remove")
def remove_paper(n: Annotated[int, typer.Argument(help="Number of an imported paper.")]) -> None:
    """Take out a paper that was imported."""
    from keel.papers.library import Library

    Library().remove(n)


@papers_app.command("subscribe")
def subscribe(
    topic: Annotated[list[str] | None, typer.Argument(help="Words, a family or a theme; without it, list.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="End the subscription.")] = False,
    as_json: Json = False,
) -> None:
    """Subscribe to a topic for `keel papers digest`, or list the subscriptions."""
    from keel.core.errors import ConfigError
    from keel.papers.library import Library

    library, words = Library(), " ".join(topic or [])
    if remove and not words:
        raise ConfigError("needs the topic", "--remove", "`keel papers subscribe` lists them.")
    if remove:
        library.unsubscribe(words)
    elif words and not library.subscribe(words) and not as_json:
        print(f"already there: {words}")
    if as_json:
        records = [{"topic": one.topic, "told": one.told and one.told.isoformat()} for one in library.subscriptions()]
        print(json.dumps(records, indent=1, ensure_ascii=False))
        return
    for one in library.subscriptions():
        print(f"{one.topic}  ({f'told {one.told}' if one.told else 'not told yet'})")


@papers_app.command("digest")
def send_digest(
    since: Annotated[
        str | None, typer.Option("--since", metavar="DATE", help="From that day on; else since the last one sent.")
    ] = None,
    email: Annotated[Path | None, typer.Option("--email", metavar="FILE.eml", help="Write it as a mail.")] = None,
    smtp: Annotated[str | None, typer.Option("--smtp", metavar="HOST[:PORT]", help="Send it by this server.")] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="ADDRESS", help="To whom; commas between several.")] = None,
    sender: Annotated[str | None, typer.Option("--from", metavar="ADDRESS", help="From whom.")] = None,
    as_json: Json = False,
) -> None:
    """Tell what is new on the subscribed topics: here, as a mail in a file, or sent."""
    from datetime import UTC

    from keel.core.errors import ConfigError
    from keel.papers.digest import digest, digest_mail, digest_text, send_mail, write_mail
    from keel.papers.library import Library

    if smtp and not (to and sender):
        raise ConfigError("needs --to and --from", "--smtp")
    if (to or sender) and not (smtp or email):
        raise ConfigError("is for --smtp or --email", "--to" if to else "--from")
    library = Library()
    sections = digest(_day(since, "--since"), library)
    total = sum(len(section.papers) for section in sections)
    if as_json:
        records = [
            {"topic": s.topic, "since": s.since.isoformat(), "papers": [paper.to_json() for paper in s.papers]}
            for s in sections
        ]
        print(json.dumps(records, indent=1, ensure_ascii=False))
    elif not (smtp or email):
        print(digest_text(sections))
    if not (smtp or email):
        return
    if total:
        mail = digest_mail(sections, sender or "keel@localhost", to or "keel@localhost")
        if email:
            write_mail(mail, email)
        if smtp:
            send_mail(mail, smtp)
    library.told([section.topic for section in sections], datetime.now(UTC).date())
    if not as_json:
        print(f"new papers: {total}" if total else "nothing new; no mail")


@papers_app.command("feed")
def write_feed(
    path: Annotated[Path | None, typer.Argument(help="Where to write it; without it, it is printed.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="The most entries.")] = 50,
) -> None:
    """Write an Atom feed of the papers that are new here."""
    from keel.core.errors import UserError
    from keel.papers.feed import feed

    text = feed(limit=limit)
    if path is None:
        print(text, end="")
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written: {error}", str(path)) from error


def _filters(family: str | None, theme: str | None, running: bool, status: str | None, since: str | None) -> "Filters":
    from keel.core.errors import ConfigError
    from keel.papers.search import Filters

    if running and status not in (None, "implemented"):
        raise ConfigError(f"contradicts --status {status}", "--runs-in-keel")
    try:
        return Filters(family, theme, "implemented" if running else status, _day(since, "--since"))
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ConfigError(rest, f"--{name}") from error


def _day(text: str | None, flag: str) -> date | None:
    from keel.core.errors import ConfigError

    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"is no date: '{text}'", flag, "For example 2026-01-31.") from None


def _show_papers(found: Sequence["Paper"], total: int) -> None:
    from rich.console import Console

    console = Console()
    console.print(papers_table(found, narrow=console.width < NARROW))
    if total > len(found):
        print(f"{len(found)} of {total}; --limit shows more")
    elif not found:
        print("No paper.")


def papers_table(found: Sequence["Paper"], narrow: bool = False) -> "Table":
    """One paper a row: number, date, what it is in Keel, family, title; where it is narrow the title below the rest."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    if narrow:
        table.add_column("no.", no_wrap=True, justify="right")
        table.add_column("date, in Keel, family; title", overflow="fold")
        for paper in found:
            about = "  ".join(word for word in (str(paper.date or ""), IN_KEEL[paper.status], paper.family) if word)
            table.add_row(str(paper.n), Text.assemble((about, STYLE[paper.status]), "\n", paper.title))
        return table
    for name in ("no.", "date", "in Keel", "family"):
        table.add_column(name, no_wrap=True, justify="right" if name == "no." else "left")
    table.add_column("title", overflow="fold")
    for paper in found:
        status = Text(IN_KEEL[paper.status], style=STYLE[paper.status])
        table.add_row(str(paper.n), str(paper.date or ""), status, paper.family, Text(paper.title))
    return table


def _show_one(paper: "Paper") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from keel.papers.catalogue import FAMILIES, FIDELITIES, STATUSES

    authors = paper.authors
    named = ", ".join(authors) if isinstance(authors, tuple) else "" if authors is None else f"{authors} authors"
    about = "; ".join(part for part in (str(paper.date or ""), named, paper.organisation) if part)
    fidelity = "" if paper.fidelity == "none" else FIDELITIES[paper.fidelity]
    rows: list[tuple[str, Any]] = [
        ("", about),
        ("summary", paper.summary or paper.abstract),
        ("family", FAMILIES[paper.family] + (f"; {', '.join(paper.themes)}" if paper.themes else "")),
        ("in Keel", STATUSES[paper.status]),
        ("fidelity", fidelity),
        ("recipes", ", ".join(paper.recipes)),
        ("parts", ", ".join(paper.parts)),
        ("modules", ", ".join(paper.modules)),
        ("there", "\n".join(f"+ {c.name}" for c in paper.components if c.there)),
        ("missing", "\n".join(f"- {name}" for name in paper.missing)),
        ("where", paper.where),
        ("run it", paper.command),
        ("links", "\n".join(paper.links)),
        ("comments", "" if paper.comments is None else str(paper.comments)),
    ]
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, value in rows:
        if value:
            grid.add_row(name, Text(value))
    console = Console()
    console.print(Text(f"{paper.n}  {paper.title}", style="bold"))
    console.print(grid)


def _print_findings(findings: "Findings", file: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    counts = f"{len(findings.new)} new, {len(findings.known)} known, {len(findings.problems)} that cannot be read"
    console.print(Text(f"{findings.kind}: {counts}"))
    if findings.new:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("no." if findings.stored else "", no_wrap=True)
        table.add_column("date", no_wrap=True)
        table.add_column("family, and its neighbours", overflow="fold", max_width=24)
        table.add_column("title", overflow="fold")
        for one in findings.new:
            near = ", ".join(str(paper.n) for paper in one.neighbours)
            proposal = f"{one.paper.family} ({near})" if near else "none proposed"
            number = str(one.paper.n) if findings.stored else "+"
            table.add_row(number, str(one.paper.date or ""), proposal, Text(one.paper.title))
        console.print(table)
    for known in findings.known:
        said = f"known: {known.entry.title} (line {known.entry.place}): {known.why}; no. {_number(known.paper)}"
        console.print(Text(said))
    for problem in findings.problems:
        console.print(Text(f"{file}:{problem.place}: {problem.what}"))
    if findings.note:
        console.print(Text(findings.note))
    if findings.new and not findings.stored:
        print("Nothing was added (--dry-run).")


def _number(paper: "Paper") -> str:
    return "of this page" if paper.status == "imported" and paper.added is None else str(paper.n)


def _print_findings_json(findings: "Findings") -> None:
    print(
        json.dumps(
            {
                "kind": findings.kind,
                "stored": findings.stored,
                "new": [one.paper.to_json() | {"neighbours": [p.n for p in one.neighbours]} for one in findings.new],
                "known": [{"title": k.entry.title, "line": k.entry.place, "why": k.why} for k in findings.known],
                "problems": [{"line": problem.place, "what": problem.what} for problem in findings.problems],
                "note": findings.note,
            },
            indent=1,
            ensure_ascii=False,
        )
    )
