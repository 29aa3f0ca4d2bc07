"""The page of the documentation that lists the papers: `python -m keel.papers.page docs`."""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from keel.papers.catalogue import FAMILIES, FIDELITIES, STATUSES, THEMES, Paper, catalogue, newest_first
from keel.papers.precision import Measured, families_proposed_rightly, measure
from keel.papers.search import MODES, Mode

COMMAND = "python -m keel.papers.page docs"
MEASURED: tuple[Mode, ...] = ("mixed", "lexical", "semantic")
IN_KEEL = {"implemented": "**runs**", "experiment": "experiment", "context": "context", "imported": "imported"}

INTRODUCTION = """# Papers

{count} papers that vary the one objective of Keel, or stand beside it, each with a summary in our own words and what of
it there is in Keel. The same table is on the command line:

```bash
keel papers search KL divergence to a reference   # by words and meaning
keel papers show 47                               # one paper: what it proposes, what is here, how to run it
keel papers list --family online --runs-in-keel   # newest first; --by trending for what is used on this machine
keel papers import page.html --dry-run            # a saved listing of arXiv or Hugging Face: what on it is new
keel papers subscribe entropy bonus               # then: keel papers digest --since 2026-01-01, keel papers feed
```

What is imported, viewed and subscribed to stays on this machine, in `$KEEL_HOME/papers.sqlite` (`~/.local/share/keel`
without `KEEL_HOME`).
"""

SEARCH = """## How good the search is

The papers were collected under four themes, each under one or more. Search does not read that column: it has title,
summary, family and components. So the queries of the themes can be held to it: the share of the theme's papers among
the first 10 and 25 results, and among as many results as the theme has papers (R). Chance is the theme's share of the
catalogue, which any order without knowledge would reach. The summaries use the field's standard terms, and so do these
queries; *titles alone* is the mixed search in titles and families: the words are the authors' own.
"""


def page(papers: Sequence[Paper]) -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION.format(count=len(papers)), *_reading(papers), *_precision(), *_counts(papers)]
    for family, name in FAMILIES.items():
        inside = newest_first(p for p in papers if p.family == family)
        if inside:
            parts += [f"## {name[0].upper()}{name[1:]}", "", *_table(inside), ""]
    return "\n".join(parts)


def write(folder: Path) -> None:
    """The page into a folder of documentation."""
    (folder / "papers.md").write_text(page(catalogue()), encoding="utf-8")


def _reading(papers: Sequence[Paper]) -> list[str]:
    statuses = Counter(p.status for p in papers)
    fidelities = Counter(p.fidelity for p in papers)
    lines = ["## How to read it", ""]
    lines += [f"- {IN_KEEL[name]} ({statuses[name]}): {said}" for name, said in STATUSES.items() if statuses[name]]
    lines += ["", "What is here is held to:", ""]
    for name, said in FIDELITIES.items():
        if name != "none":
            lines.append(f"- *{_words(name)}* ({fidelities[name]}): {said}.")
    lines += ["", "Dates are those of the first version; *missing* are components that the paper names and Keel lacks."]
    return [*lines, ""]


def _precision() -> list[str]:
    lines = [SEARCH, *_head("query", "papers", "chance", "mode", "first 10", "first 25", "first R")]
    found: dict[str, list[Measured]] = {mode: measure(mode) for mode in MEASURED}
    found["titles alone"] = measure("mixed", [replace(p, summary="", components=()) for p in catalogue()])
    for i, query in enumerate(THEMES.values()):
        for mode, measured in found.items():
            one = measured[i]
            cells = [query, str(one.papers), _share(one.chance), mode]
            cells += [_share(value) for value in (one.first10, one.first25, one.r_precision)]
            lines.append("| " + " | ".join(cells) + " |")
    right, largest = families_proposed_rightly()
    total = len(catalogue())
    lines += ["", *(f"- *{mode}*: {MODES[mode]}." for mode in MEASURED), ""]
    lines += [
        "The family that `keel papers import` proposes, from title and summary by the nearest five papers, is right",
        f"for {right} of {total} ({_share(right / total)}), each paper without a vote of its own; the largest family",
        f"would be right for {_share(largest)}.",
        "",
        f"```bash\n{COMMAND}\n```",
        "",
    ]
    return lines


def _counts(papers: Sequence[Paper]) -> list[str]:
    shown = [name for name in STATUSES if any(p.status == name for p in papers)]
    lines = ["## Families", "", *_head("family", "papers", *(_words(IN_KEEL[name].strip("*")) for name in shown))]
    for family, name in FAMILIES.items():
        inside = Counter(p.status for p in papers if p.family == family)
        anchor = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        cells = [f"[{name}](#{anchor})", str(inside.total()), *(str(inside[status]) for status in shown)]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _table(papers: Sequence[Paper]) -> list[str]:
    lines = _head("no.", "date", "paper", "in Keel")
    for one in papers:
        title = f"**{_plain(one.title)}**"
        links = " ".join(f"[{'code' if 'github.com' in link else 'page'}]({link})" for link in one.links)
        said = f"{title} {links}".strip() + f"<br>{_plain(one.summary)}"
        lines.append(f"| {one.n} | {one.date or ''} | {said} | {_in_keel(one)} |")
    return lines


def _in_keel(one: Paper) -> str:
    held = "" if one.fidelity == "none" else f", {_words(one.fidelity)}"
    parts = [f"{IN_KEEL[one.status]}{held}"]
    if one.where:
        parts.append(_plain(one.where).rstrip(".") + ".")
    if one.status != "context" and one.missing:
        parts.append(f"*Missing*: {_plain('; '.join(one.missing))}.")
    return "<br>".join(parts)


def _plain(text: str) -> str:
    """Text in which nothing but back-ticks is markup."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:
        return re.sub(r"([\\`*_{}\[\]<>|$])", r"\\\1", text)
    quiet = [re.sub(r"([\\*_{}\[\]<>|$])", r"\\\1", piece) for piece in pieces[::2]]
    codes = [f"`{piece}`".replace("|", "\\|") for piece in pieces[1::2]]
    return "".join(part for pair in zip(quiet, [*codes, ""], strict=True) for part in pair)


def _head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _words(name: str) -> str:
    return {"authors_code": "authors' code"}.get(name, name)


def _share(value: float) -> str:
    return f"{value:.2f}"


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
