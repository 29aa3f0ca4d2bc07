"""Plants faults into Keel's formulas, tries the tests on each of them, and says which ones nobody noticed."""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
from tests.mutation.mutants import Mutant, mutants
from tests.mutation.operators import OPERATORS
from tests.mutation.trials import Trials, Verdict, nearest_tests

SCOPE = (
    "src/keel/core/aggregate.py",
    "src/keel/parts/advantages/*.py",
    "src/keel/parts/terms/*.py",
    "src/keel/parts/weights/*.py",
    "src/keel/parts/masks/*.py",
    "src/keel/parts/controllers/*.py",
    "src/keel/parts/rewards/transforms.py",
    "src/keel/parts/rewards/anchored.py",
    "src/keel/parts/rewards/curation.py",
    "src/keel/parts/rewards/moments.py",
    "src/keel/divergences/*.py",
    "src/keel/targets/*.py",
)
TESTS = (
    "tests/core",
    "tests/divergences",
    "tests/targets",
    "tests/parts",
    "tests/statistics",
    "tests/exact",
    "tests/recipes",
    "tests/verify",
)
GRADIENTS = {  # what carries a gradient, by file; elsewhere a stop-gradient changes nothing
    "src/keel/core/aggregate.py": ("ratio", "Aggregation", "masked_mean"),
    "src/keel/parts/terms/": ("",),
    "src/keel/divergences/sampled.py": ("",),
    "src/keel/divergences/estimators.py": ("",),
    "src/keel/divergences/renyi.py": ("",),
    "src/keel/divergences/transport.py": ("",),
    "src/keel/divergences/cauchy_schwarz.py": ("",),
}
PAGE = Path("docs/mutation.md")
COUNTED = ("caught", "survived", "not run")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python tests/mutation", description=__doc__)
    parser.add_argument("--files", nargs="*", default=[], help="patterns of files, in place of all")
    parser.add_argument("--tests", nargs="*", default=[], help="tests to collect, in place of those of the parts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, default=0, help="as many faults, drawn from every operator and file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of tests beyond those nearest to a fault")
    parser.add_argument("--only", nargs="*", default=[], help="faults by their eight digits")
    parser.add_argument("--again", type=Path, help="verdicts of a run before; only what was not caught is tried")
    parser.add_argument("--json", type=Path, help="where to write the verdicts")
    parser.add_argument("--list", action="store_true", help="only list the faults")
    parser.add_argument("--planted", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    root = Path.cwd()
    if options.planted:
        return import_with_fault(root, options.planted, options.tests)
    sources = {str(p.relative_to(root)): p.read_text() for p in _files(root, options.files or SCOPE)}
    faults = [fault for path, source in sources.items() for fault in mutants(source, path, gradients(path))]
    every = len(faults)
    before = earlier(options.again, faults) if options.again else {}
    if before:
        faults = [fault for fault in faults if fault.short in before and before[fault.short].status != "caught"]
    elif options.only:
        faults = [fault for fault in faults if fault.short in options.only]
    elif options.limit:
        faults = sample(faults, options.limit, options.seed)
    if options.list:
        for fault in faults:
            print(fault.short, fault.id)
        return 0
    print(f"{len(faults)} of {every} faults in {len(sources)} files")
    verdicts, red = tried(faults, sources, root, options)
    verdicts = [v if v.status != "not planted" else imported(v, root, options.tests) for v in verdicts]
    found = {v.fault.short: v for v in verdicts if v.status != "not run" or v.fault.short not in before}
    verdicts = list({**before, **found}.values())
    if options.json:
        options.json.write_text(json.dumps([{**asdict(v), "short": v.fault.short} for v in verdicts], indent=1))
    print(summary(verdicts, equivalents(root / PAGE)))
    for name in red:
        print(f"not used, for it fails without a fault: {name}")
    return 0


def tried(
    faults: list[Mutant], sources: dict[str, str], root: Path, options: argparse.Namespace
) -> tuple[list[Verdict], list[str]]:
    """The verdicts on faults within functions, and the tests that fail without any."""
    began, done = time.monotonic(), Counter()

    def told(verdict: Verdict) -> None:
        done[verdict.status] += 1
        if verdict.status != "caught":
            print(f"{verdict.status}: {verdict.fault.short} {verdict.fault.id}", flush=True)
        if sum(done.values()) % 50 == 0:
            print(f"... {sum(done.values())} of {len(faults)}, {time.monotonic() - began:.0f} s", flush=True)

    inside = [fault for fault in faults if fault.inside]
    plugin = Trials(inside, sources, root, options.workers, options.budget, told=told)
    collected = options.tests or [*TESTS, *sources]
    quiet = ["-p", "no:cacheprovider", "-p", "no:terminal", "--continue-on-collection-errors"]
    pytest.main([*quiet, *collected], plugins=[plugin])
    print(f"{len(plugin.known)} tests without a fault in {plugin.took[0]:.0f} s, trials {plugin.took[1]:.0f} s")
    outside = [Verdict(fault, "not planted") for fault in faults if not fault.inside]
    return plugin.verdicts + outside, [name for name, known in plugin.known.items() if not known.passed]


def earlier(path: Path, faults: list[Mutant]) -> dict[str, Verdict]:
    """The verdicts of a run before on faults that there still are, by their eight digits."""
    known = {fault.short: fault for fault in faults}
    told = json.loads(path.read_text())
    columns = ("status", "test", "how", "seconds", "tests")
    return {v["short"]: Verdict(known[v["short"]], *(v[f] for f in columns)) for v in told if v["short"] in known}


def sample(faults: list[Mutant], limit: int, seed: int) -> list[Mutant]:
    """As many faults in turns: one of every pair of file and operator, then a second, and so on."""
    strata: dict[tuple[str, str], list[Mutant]] = defaultdict(list)
    for fault in faults:
        strata[fault.path, fault.operator].append(fault)
    drawn = random.Random(seed)
    turns = []
    for members in strata.values():
        drawn.shuffle(members)
        turns += [(turn, drawn.random(), fault) for turn, fault in enumerate(members)]
    turns.sort(key=lambda turn: turn[:2])
    chosen = {fault.short for *_, fault in turns[:limit]}
    return [fault for fault in faults if fault.short in chosen]


def gradients(path: str) -> tuple[str, ...]:
    """Scopes of a file through which gradients flow."""
    return next((scopes for start, scopes in GRADIENTS.items() if path.startswith(start)), ("\n",))


def _files(root: Path, patterns: Iterable[str]) -> list[Path]:
    return [p for pattern in patterns for p in sorted(root.glob(pattern)) if p.name != "__init__.py"]


# -- faults that are there when the module is imported ---------------------------------------------------------------


def imported(verdict: Verdict, root: Path, tests: Iterable[str]) -> Verdict:
    """The verdict on a fault outside of functions: a fresh process imports it, and runs the tests."""
    fault = verdict.fault
    near = [t for t in nearest_tests(fault.path) if (root / t).exists()]
    paths = list(tests) or list(dict.fromkeys([*near, *TESTS]))
    command = [
        sys.executable,
        str(Path(__file__).parent),
        "--planted",
        f"{fault.path}:{fault.short}",
        "--tests",
        *paths,
    ]
    began = time.monotonic()
    try:
        told = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400)
    except subprocess.TimeoutExpired:
        return Verdict(fault, "caught", how="timeout", seconds=400.0)
    seconds = round(time.monotonic() - began, 2)
    if told.returncode == 0:
        return Verdict(fault, "survived", seconds=seconds)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)(?: - (\w+))?", told.stdout, re.MULTILINE)
    return Verdict(fault, "caught", *(found.groups("") if found else ("", "import")), seconds=seconds)


def import_with_fault(root: Path, named: str, tests: list[str]) -> int:
    """Runs tests in this process, in which a module is imported with its fault."""
    path, _, short = named.rpartition(":")
    source = (root / path).read_text()
    [fault] = [m for m in mutants(source, path, gradients(path)) if m.short == short]
    plain: Any = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, name: str) -> Any:
        if self.path != str(root / path):
            return plain(self, name)
        return self.source_to_code(fault.planted(source).encode(), self.path)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=line", "-rfE", *tests]))


# -- the outcome -----------------------------------------------------------------------------------------------------


def key(fault: Mutant) -> tuple[str, str, str]:
    """What names a fault in the page: where, what, and how, without the number of its line."""
    return f"{fault.path}:{fault.scope}", fault.operator, f"{fault.before} -> {fault.after}"


def equivalents(page: Path) -> set[tuple[str, str, str]]:
    """The faults that the page's table of survivors calls equivalent, for a reason that it gives."""
    if not page.exists():
        return set()
    found = set()
    for line in page.read_text().splitlines():
        cells = [cell.strip().strip("`").replace("\\|", "|") for cell in line.strip().strip("|").split(" | ")]
        if len(cells) == 4 and cells[3].startswith("equivalent"):
            found.add((cells[0], cells[1], cells[2]))
    return found


def summary(verdicts: list[Verdict], equal: set[tuple[str, str, str]]) -> str:
    """Tables for each operator and file: faults, caught, by an assertion, equivalent, score."""
    lines = []
    for title, of in (("operator", lambda f: f.operator), ("file", lambda f: f.path.removeprefix("src/keel/"))):
        lines += ["", f"| {title} | faults | caught | by an assertion | survived | equivalent | score |"]
        lines += ["|---|--:|--:|--:|--:|--:|--:|"]
        rows: dict[str, list[Verdict]] = defaultdict(list)
        for verdict in verdicts:
            rows[of(verdict.fault)].append(verdict)
        ordered = [name for name in OPERATORS if name in rows] if title == "operator" else sorted(rows)
        lines += [_row(name, rows[name], equal) for name in ordered]
        lines += [_row("all", verdicts, equal)]
    return "\n".join(lines)


def _row(name: str, verdicts: list[Verdict], equal: set[tuple[str, str, str]]) -> str:
    caught = [v for v in verdicts if v.status == "caught"]
    asserted = sum(v.how in ("AssertionError", "Failed", "DocTestFailure", "MultipleFailures") for v in caught)
    same = sum(v.status != "caught" and key(v.fault) in equal for v in verdicts)
    rest = len(verdicts) - same
    score = f"{100 * len(caught) / rest:.1f} %" if rest else ""
    survived = len(verdicts) - len(caught)
    return f"| {name} | {len(verdicts)} | {len(caught)} | {asserted} | {survived} | {same} | {score} |"
