"""What a judge is asked about, and the lines of what it said: the files of `keel judge`."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from keel.core.errors import ConfigError, DataError
from keel.tasks.reading import Row, answer_problems, checked_rows, data_label, has_nan, opened, text_problems
from keel.tasks.task import Text, completion_text
from keel.train.checkpoint import write_text

Ties = Literal["apart", "half"]
Outcome = Literal["decided", "half", "apart"]  # half: a tie that is written beside what is decided
FAILED = "failed"  # reason of those that a judge raised an error for
KEY = "judged"  # column of every line that is written: which item it is
SHOWN = 160  # characters of a judge's words on the screen
_ELSEWHERE = "Choose a file in a folder that you may write to."
_JUDGED = ("prompt", "completion", "completions", "chosen", "rejected", KEY)
JUDGEMENTS = (  # columns of an earlier judgement, which training would read beside the new one
    *("label", "score", "scores", "score_chosen", "score_rejected", "margin", "probability"),
    *("rating", "ratings", "rank", "ranks", "reason", "said"),
    "messages",  # beside `prompt` no form of preferences has them, and where they end with an answer it is the old one
)


@dataclass(frozen=True)
class Item:
    """One prompt with its completions.

    Args:
        key: of prompt and completions, and of which of several equal ones it is.
        prompt, completions: as the data have them.
        ordered: whether the data say that the first completion is better.
        columns: all other columns, which a reward function is given; of these the `JUDGEMENTS` are not written.
    """

    key: str
    prompt: Text
    completions: tuple[Text, ...]
    ordered: bool
    columns: dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """What a judge said of one item.

    Args:
        scores: of each completion; None where there is no saying.
        reason: why not: unparsable, failed, or no score.
        said: the judge's own words.
        graded: whether the scores are more than an order.
    """

    scores: tuple[float, ...] | None
    reason: str = ""
    said: tuple[str, ...] = ()
    graded: bool = True


@dataclass(frozen=True)
class Rules:
    """How judgements become lines.

    Args:
        ties, threshold, least_gap: as of `keel.train.judging.judge`.
        lists: write also items of two completions as lists, for one data set has one form.
    """

    ties: Ties = "apart"
    threshold: float | None = None
    least_gap: float = 0.0
    lists: bool = False


@dataclass
class Counts:
    """How many items ended up where, by name; and why undecided ones are, in the judge's own words.

    Args:
        known: numbers by name.
        said: of each reason why there is no score, how often the judge said what of it.
        halves: how many of the ties are written as such.
    """

    known: dict[str, int] = field(default_factory=dict)
    said: dict[str, dict[str, int]] = field(default_factory=dict)
    halves: int = 0

    def add(self, name: str, count: int = 1) -> None:
        """One more, or several."""
        self.known[name] = self.known.get(name, 0) + count

    def note(self, judged: Judged) -> None:
        """Why an item has no score."""
        words = " ".join(judged.said[0].split()) if judged.said else ""
        known = self.said.setdefault(judged.reason, {})
        shown = words if len(words) <= SHOWN else f"{words[:SHOWN]}..."
        known[shown] = known.get(shown, 0) + 1

    def undecided(self, place: str, lists: bool = False) -> str:
        """In one sentence how many items are undecided, and why; nothing where none is.

        Args:
            place: the file of those that are kept apart.
            lists: whether ties are written as lists.
        """
        ties = self.known.get("ties", 0)
        how = "with equal scores" if lists else "with probability 0.5"
        written = [f"{self.halves} tied, written {how}"] if self.halves else []
        apart = [f"{ties - self.halves} tied"] if ties > self.halves else []
        for reason, known in self.said.items():
            words, times = max(known.items(), key=lambda item: item[1])
            told = f", {times} of them with" if words and len(known) > 1 else ": the judge said" if words else ""
            apart.append(f"{sum(known.values())} {reason}{told}{f' {words!r}' if words else ''}")
        if not written and not apart:
            return ""
        count = ties + sum(n for known in self.said.values() for n in known.values())
        said = f"{count} of {self.known['items']} items are undecided: {'; '.join([*written, *apart])}"
        return f"{said} ({place})" if apart else said


# -- reading -----------------------------------------------------------------------------------------------------------


def read_items(data: Any) -> list[Item]:
    """The items of data: JSON lines, Parquet, a data set, or a list of dictionaries.

    Raises:
        DataError: malformed rows, each with its place and reason.
    """
    given = opened(data)
    seen: dict[str, int] = {}
    items = []
    for _, row in checked_rows(given, data_label(given), _problems):
        completions = _completions(row)
        text = json.dumps([row["prompt"], completions], sort_keys=True, ensure_ascii=False)
        mark = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        number = seen[mark] = seen.get(mark, -1) + 1
        columns = {name: value for name, value in row.items() if name not in _JUDGED}
        ordered = row.get("completions") is None and row.get("chosen") is not None
        items.append(Item(f"{mark}-{number}", row["prompt"], tuple(completions), ordered, columns))
    return items


def _completions(row: Row) -> list[Text]:
    return [completion for _, completion in _named(row)]


def _named(row: Row) -> list[tuple[str, Any]]:
    """Its completions, each with the name that its column gives it."""
    if row.get("completions") is not None:
        return [(f"completions[{number}]", text) for number, text in enumerate(row["completions"], start=1)]
    if row.get("chosen") is not None:
        return [("chosen", row["chosen"]), ("rejected", row["rejected"])]
    return [("completion", row["completion"])]


def _problems(row: Row) -> Iterator[str]:
    if row.get("prompt") is None:
        yield "no `prompt`"
    else:
        yield from text_problems("prompt", row["prompt"])
    given = [name for name in ("completions", "chosen", "completion") if row.get(name) is not None]
    if not given:
        yield "nothing to judge: give `completions`, `chosen` and `rejected`, or `completion`"
        return
    if given[0] == "completions" and (not isinstance(row["completions"], list) or not row["completions"]):
        yield "`completions` must be a list of texts"
        return
    if given[0] == "chosen" and row.get("rejected") is None:
        yield "`chosen` without `rejected`"
        return
    for name, completion in _named(row):
        yield from text_problems(name, completion, empty=True)
        yield from answer_problems(name, completion)
    for name, value in row.items():
        if has_nan(value):
            yield f"`{name}` is NaN or infinite; use null"


# -- writing -----------------------------------------------------------------------------------------------------------


def line_of(item: Item, judged: Judged, rules: Rules) -> tuple[Outcome, Row]:
    """What becomes of an item, and its line."""
    columns = {name: value for name, value in item.columns.items() if name not in JUDGEMENTS}
    kept = {"prompt": item.prompt, **columns, KEY: item.key}
    told: Row
    if judged.scores is None:
        told = {"completions": list(item.completions), "reason": judged.reason, "said": list(judged.said)}
        return "apart", kept | told
    scores = _one_for_each_text(item, judged.scores)
    if len(scores) == 1:
        told = {"score": scores[0]} if rules.threshold is None else {"label": scores[0] >= rules.threshold}
        return "decided", kept | {"completion": item.completions[0], **told}
    if max(scores) - min(scores) <= rules.least_gap:
        if rules.ties == "half" and (told := _tied(item, scores, rules.lists)):
            return "half", kept | told
        undecided = {"completions": list(item.completions), "scores": list(scores), "reason": "tie"}
        return "apart", kept | undecided | {"said": list(judged.said)}
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if rules.lists:
        ranked = {"completions": [item.completions[i] for i in order], "scores": [scores[i] for i in order]}
        return "decided", kept | ranked
    best, worst = order
    both: Row = {"chosen": item.completions[best], "rejected": item.completions[worst]}
    if judged.graded and rules.ties == "half":  # ties have no scores that differ, and all lines need the same columns
        both |= {"margin": scores[best] - scores[worst]}
    elif judged.graded:
        both |= {"score_chosen": scores[best], "score_rejected": scores[worst]}
    return "decided", kept | both


def _one_for_each_text(item: Item, scores: Sequence[float]) -> tuple[float, ...]:
    """The scores, of equal texts their mean: a text that is better than itself is no data."""
    known: dict[str, list[float]] = {}
    texts = [completion_text(completion) for completion in item.completions]
    for text, value in zip(texts, scores, strict=True):
        known.setdefault(text, []).append(value)
    return tuple(sum(known[text]) / len(known[text]) for text in texts)


def _tied(item: Item, scores: Sequence[float], lists: bool) -> Row:
    """The columns of a tie; none of two equal texts, of which no pair can be made."""
    if lists:  # scores up to `least_gap` apart are an order to those who learn of them
        return {"completions": list(item.completions), "scores": [sum(scores) / len(scores)] * len(scores)}
    first, second = item.completions
    if completion_text(first) == completion_text(second):
        return {}
    return {"chosen": first, "rejected": second, "probability": 0.5, "margin": 0.0}


def write(target: Path, items: Sequence[Item], found: Sequence[Judged], counts: Counts, rules: Rules) -> None:
    """Append what was said of some items to the two files, and count it."""
    decided: list[Row] = []
    apart: list[Row] = []
    for item, judged in zip(items, found, strict=True):
        outcome, line = line_of(item, judged, rules)
        (apart if outcome == "apart" else decided).append(line)
        counts.halves += outcome == "half"
        if judged.scores is None:
            counts.add(judged.reason)
            counts.note(judged)
            continue
        counts.add("decided" if outcome == "decided" else "ties")
        if item.ordered and outcome == "decided":
            counts.add("ordered")
            counts.add("agrees", int(judged.scores[0] > judged.scores[1]))
    with _writing(target):
        _append(target, decided)
        _append(_undecided(target), apart)


def _append(path: Path, rows: Sequence[Row]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def _undecided(target: Path) -> Path:
    return target.with_name(f"{target.name}.undecided.jsonl")


def undecided_name(target: Path) -> str:
    """Of the file of those that are kept apart."""
    return _undecided(target).name


def check_target(target: Path, settings: Mapping[str, Any], resume: bool) -> None:
    """Refuse what `begin` could not go on with; nothing is written. Files without a line are nobody's.

    Raises:
        ConfigError: there are lines and `resume` is off, another judge wrote them, or no file can be written there.
    """
    with _writing(target):
        folder = next(place for place in target.parents if place.exists())
        if not folder.is_dir():
            what = f"cannot be written: {folder} is a file, not a folder"
            raise ConfigError(what, str(target), "Choose a file in a folder.")
        if target.is_dir():
            raise ConfigError("is a folder", str(target), "Name a file to write.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot be written: {folder} allows no new files", str(target), _ELSEWHERE)
        if not any(path.exists() and path.stat().st_size for path in (target, _undecided(target))):
            return
        if not resume:
            raise ConfigError("exists already", str(target), "Choose another file, or give --resume to go on with it.")
        stated = _stated(target)
        said = stated.read_text(encoding="utf-8") if stated.exists() else ""
    if said:
        known, plain = json.loads(said), json.loads(json.dumps(settings))
        changed = [name for name in plain if known.get(name, plain[name]) != plain[name]]
        if changed:
            what = f"was begun with {changed[0]}={known.get(changed[0])!r}, not {plain[changed[0]]!r}"
            raise ConfigError(what, str(target), "Give the same settings, or another file.")


def begin(target: Path, settings: Mapping[str, Any], resume: bool) -> set[str]:
    """The items that are done; new files where there are none. Those whose judge failed are to be asked again.

    Raises:
        ConfigError: as of `check_target`.
        DataError: the files hold something else.
    """
    check_target(target, settings, resume)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        done = {*_keys(target), *_keys(_undecided(target), but=FAILED)}
        write_text(_stated(target), json.dumps(settings, indent=1, ensure_ascii=False))
    return done


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Faults of the file system are mistakes in the name of the file."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", str(target), _ELSEWHERE) from error


def _stated(target: Path) -> Path:
    return target.with_name(f"{target.name}.judge.json")


def _keys(path: Path, but: str | None = None) -> list[str]:
    """Of the lines of a file. One that a kill cut off at the end is removed, and those for the reason `but`.

    Raises:
        DataError: the file holds something else.
    """
    if not path.exists():
        path.touch()
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        rows = [(line, json.loads(line)) for line in whole.splitlines(keepends=True)]
        kept = [(line, str(row[KEY])) for line, row in rows if but is None or row.get("reason") != but]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"is no file of `keel judge`: it has lines without '{KEY}'", str(path), "Move it.") from error
    left = b"".join(line for line, _ in kept)
    if len(left) < len(text):
        write_text(path, left.decode())
    return [key for _, key in kept]
