"""What a judge is asked about, and the lines of what it said: the files of `keel judge`."""

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
FAILED = "failed"  # reason of those that a judge raised an error for
KEY = "judged"  # column of every line that is written: which item it is
SHOWN = 160  # characters of a judge's words on the screen
_OWN = ("prompt", "completion", "completions", "chosen", "rejected", "scores", "score_chosen", "score_rejected", KEY)


@dataclass(frozen=True)
class Item:
    """One prompt with its completions.

    Args:
        key: of prompt and completions, and of which of several equal ones it is.
        prompt, completions: as the data have them.
        ordered: whether the data say that the first completion is better.
        columns: all other columns.
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


@dataclass
class Counts:
    """How many items ended up where, by name; and why undecided ones are, in the judge's own words.

    Args:
        known: numbers by name.
        said: of each reason why there is no score, how often the judge said what of it.
    """

    known: dict[str, int] = field(default_factory=dict)
    said: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, name: str, count: int = 1) -> None:
        """One more, or several."""
        self.known[name] = self.known.get(name, 0) + count

    def note(self, judged: Judged) -> None:
        """Why an item has no score."""
        words = " ".join(judged.said[0].split()) if judged.said else ""
        known = self.said.setdefault(judged.reason, {})
        shown = words if len(words) <= SHOWN else f"{words[:SHOWN]}..."
        known[shown] = known.get(shown, 0) + 1

    def undecided(self) -> str:
        """In one sentence how many items are undecided, and why; nothing where none is."""
        parts = [f"{self.known['ties']} tied"] if self.known.get("ties") else []
        for reason, known in self.said.items():
            words, times = max(known.items(), key=lambda item: item[1])
            told = f", {times} of them with" if words and len(known) > 1 else ": the judge said" if words else ""
            parts.append(f"{sum(known.values())} {reason}{told}{f' {words!r}' if words else ''}")
        count = self.known.get("ties", 0) + sum(n for known in self.said.values() for n in known.values())
        return f"{count} of {self.known['items']} items are undecided: {'; '.join(parts)}" if parts else ""


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
        columns = {name: value for name, value in row.items() if name not in _OWN}
        ordered = row.get("completions") is None and row.get("chosen") is not None
        items.append(Item(f"{mark}-{number}", row["prompt"], tuple(completions), ordered, columns))
    return items


def _completions(row: Row) -> list[Text]:
    if row.get("completions") is not None:
        return list(row["completions"])
    if row.get("chosen") is not None:
        return [row["chosen"], row["rejected"]]
    return [row["completion"]]


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
    for completion in _completions(row):
        yield from text_problems(given[0], completion, empty=True)
        yield from answer_problems(given[0], completion)
    for name, value in row.items():
        if has_nan(value):
            yield f"`{name}` is NaN or infinite; use null"


# -- writing -----------------------------------------------------------------------------------------------------------


def line_of(item: Item, judged: Judged, ties: Ties, threshold: float | None, least_gap: float) -> tuple[bool, Row]:
    """Whether an item is decided, and its line."""
    kept = {"prompt": item.prompt, **item.columns, KEY: item.key}
    scores = judged.scores
    if scores is None:
        return False, kept | {"completions": list(item.completions), "reason": judged.reason, "said": list(judged.said)}
    if len(scores) == 1:
        told = {"score": scores[0]} if threshold is None else {"label": scores[0] >= threshold}
        return True, kept | {"completion": item.completions[0], **told}
    if max(scores) - min(scores) <= least_gap:
        if ties == "half" and len(scores) == 2:
            first, second = item.completions
            return False, kept | {"chosen": first, "rejected": second, "probability": 0.5, "margin": 0.0}
        undecided = {"completions": list(item.completions), "scores": list(scores), "reason": "tie"}
        return False, kept | undecided | {"said": list(judged.said)}
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if len(scores) > 2:
        ranked = {"completions": [item.completions[i] for i in order], "scores": [scores[i] for i in order]}
        return True, kept | ranked
    best, worst = order
    both: Row = {"chosen": item.completions[best], "rejected": item.completions[worst]}
    if judged.graded and ties == "half":  # ties have no scores that differ, and all lines must have the same columns
        both |= {"margin": scores[best] - scores[worst]}
    elif judged.graded:
        both |= {"score_chosen": scores[best], "score_rejected": scores[worst]}
    return True, kept | both


def write(
    target: Path, items: Sequence[Item], found: Sequence[Judged], counts: Counts,
    ties: Ties, threshold: float | None, least_gap: float,
) -> None:  # fmt: skip
    """Append what was said of some items to the two files, and count it."""
    decided: list[Row] = []
    apart: list[Row] = []
    for item, judged in zip(items, found, strict=True):
        sure, line = line_of(item, judged, ties, threshold, least_gap)
        tied = not sure and judged.scores is not None
        (decided if sure or ("probability" in line and tied) else apart).append(line)
        counts.add("decided" if sure else "ties" if tied else judged.reason)
        if judged.scores is None:
            counts.note(judged)
        if item.ordered and sure:
            counts.add("ordered")
            counts.add("agrees", int(completion_text(line["chosen"]) == completion_text(item.completions[0])))
    _append(target, decided)
    _append(_undecided(target), apart)


def _append(path: Path, rows: Sequence[Row]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def _undecided(target: Path) -> Path:
    return target.with_name(f"{target.name}.undecided.jsonl")


def begin(target: Path, settings: Mapping[str, Any], resume: bool) -> set[str]:
    """The items that are done; new files where there are none. Those whose judge failed are to be asked again.

    Raises:
        ConfigError: there are some and `resume` is off, or another judge wrote them.
    """
    stated = target.with_name(f"{target.name}.judge.json")
    plain = json.loads(json.dumps(settings))
    apart = _undecided(target)
    if (target.exists() or apart.exists()) and not resume:
        raise ConfigError("exists already", str(target), "Choose another file, or give --resume to go on with it.")
    if stated.exists() and resume:
        known = json.loads(stated.read_text(encoding="utf-8"))
        changed = [name for name in plain if known.get(name) != plain[name]]
        if changed:
            what = f"was begun with {changed[0]}={known.get(changed[0])!r}, not {plain[changed[0]]!r}"
            raise ConfigError(what, str(target), "Give the same settings, or another file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    stated.write_text(json.dumps(plain, indent=1, ensure_ascii=False), encoding="utf-8")
    return {*_keys(target), *_keys(apart, but=FAILED)}


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
