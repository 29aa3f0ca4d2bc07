"""One's own preferences: JSON lines, Parquet, data sets of `datasets`, and lists of dictionaries.

Pairs, labelled completions, ranked lists and ratings are read, checked and turned into what a method learns from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from keel.core.errors import ConfigError, DataError, nearest
from keel.tasks.data import DataTask
from keel.tasks.mixture import domain_of, mixed, sources_of
from keel.tasks.preference_forms import SAID, Form, form_of, further_columns, preference_of, problems
from keel.tasks.preferences import COLUMNS, Kind, Preference, Preferences
from keel.tasks.reading import (
    HELD_OUT_SPLITS,
    Complaints,
    Row,
    checked_rows,
    data_label,
    is_splits,
    opened,
    prompt_identity,
    set_aside,
    shown_identity,
    train_split,
)
from keel.tasks.task import Example, check_disjoint, completion_text

Choice = Literal["extremes", "all"]
OPTIONS = ("pairs",)
_NAMED = 3  # places that a note names


@dataclass(frozen=True)
class _Read:
    """Preferences of one data set, each with where it stands, and what was noticed."""

    found: list[tuple[str, Preference]]
    notes: list[str]


def load_preferences(
    data: Any,
    kind: Kind,
    held_out: Any = 0.05,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Preferences:
    """Preferences of one's own data, as a method of this kind reads them.

    A row is a pair (`prompt`, `chosen`, `rejected`; without `prompt` the common beginning of whole conversations), a
    labelled completion (`prompt`, `completion`, `label`), a list (`prompt`, `completions` from the best to the worst,
    or with `scores`, `ratings` or `ranks`), or a rated completion (`prompt`, `completion`, `score`; the rows of one
    prompt are a list). All texts may be messages. Further: `weight`, `margin`, `probability`, `domain`, of pairs
    `score_chosen` and `score_rejected`; all other columns are kept. Lists become pairs, pairs become labels or lists.

    Args:
        data: a path, a `datasets.Dataset` or `DatasetDict`, a list of dictionaries; or several paths, as a list or with
            their weights, {path: weight}.
        kind: pairs, labels or lists.
        held_out: the share of the distinct prompts to set aside, in [0, 1), or data of its own; as of `load_data`.
        seed: which prompts are set aside, and how several data sets are mixed.
        options: `pairs`, which pairs of a list are compared: `extremes` (the best and the worst) or `all`.
        name: for messages.

    Raises:
        DataError: malformed rows (file, line and reason of each, the first 20 in full), data that cannot become what is
            wanted, no row to train on that has a weight above 0, or a prompt on both sides.
        ConfigError: an unknown option, a share or weight that is none.

    >>> found = load_preferences([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}], "labels", held_out=0)
    >>> [(p.completions, p.scores) for p in found.train]
    [(('2',), (1.0,)), (('3',), (0.0,))]
    """
    choice = _choice(options or {})
    if isinstance(held_out, bool) or held_out is None:
        raise ConfigError(f"must be a share in [0, 1) or data, got {held_out!r}.", where="held_out")
    weights = sources_of(data)
    given = {"": data} if weights is None else {path: path for path in weights}
    names = _domains(list(given))
    train: dict[str, _Read] = {}
    aside: list[_Read] = []
    own = False  # some data set brings a held-out split of its own
    for path, source in given.items():
        source = opened(source)
        parts = _splits(source, isinstance(held_out, float | int))
        train[path] = _read(parts[0], data_label(source), kind, choice, names[path])
        if parts[1] is not None:
            aside.append(_read(parts[1], f"held-out {data_label(source)}", kind, choice, names[path]))
            own = True
    if not isinstance(held_out, float | int):
        test = opened(held_out)
        if is_splits(test):
            test = test[train_split(test) if len(test) > 1 else next(iter(test))]
        aside.append(_read(test, f"held-out {data_label(test)}", kind, choice, ""))
    elif not own:
        keys = [prompt_identity(p.prompt) for read in train.values() for _, p in read.found]
        train, held = _apart(train, set_aside(keys, float(held_out), seed))
        aside.append(held)
    title = name or (" and ".join(given) if weights else data_label(opened(data)))
    notes = [note for read in (*train.values(), *aside) for note in read.notes]
    sides = {path: [p for _, p in read.found] for path, read in train.items()}
    learnt = mixed(sides, weights or {"": 1.0}, seed)
    kept = [replace(p, index=i) for i, p in enumerate(p for read in aside for _, p in read.found)]
    if not learnt:
        raise DataError("nothing is left to train on.", where=title, fix="Lower task.held_out, or give more data.")
    for path, side in sides.items():
        if side and not any(p.weight > 0 for p in side):
            fix = "A row of weight 0 teaches nothing: raise `weight` of some, or leave the column out."
            raise DataError("no row has a weight above 0.", where=path or title, fix=fix)
    first, second = ([prompt_identity(p.prompt) for p in side] for side in (learnt, kept))
    check_disjoint(title, first, second, shown_identity)
    return Preferences(title, kind, learnt, kept, (*notes, *_shares(sides, learnt, weights, names)))


def prompts_of(preferences: Preferences) -> DataTask:
    """The prompts of preferences as a task without verifiers; each prompt once."""
    sides = []
    for split in (preferences.train, preferences.held_out):
        seen = {prompt_identity(p.prompt): p for p in reversed(split)}
        first = [*reversed(seen.values())]
        sides.append([Example(p.prompt, dict(p.columns), i, p.domain) for i, p in enumerate(first)])
    return DataTask(preferences.name, *sides)


# Reading


def _splits(source: Any, own: bool) -> tuple[Any, Any]:
    """What to train on, and what a data set itself holds out, where that is wanted."""
    if not is_splits(source):
        return source, None
    held = next((source[split] for split in HELD_OUT_SPLITS if split in source), None)
    return source[train_split(source)], held if own else None


def _read(data: Any, label: str, kind: Kind, choice: Choice, domain: str) -> _Read:
    """The rows of one data set as preferences of a kind."""
    forms: list[Form] = []

    def wrong(row: Row) -> Iterable[str]:
        found = list(problems(row, kind))
        form = form_of(row, kind)
        if form is not None:
            forms.append(form)
            if form != forms[0]:
                found.append(f"is one of {form}, and the rows before it are {forms[0]}; one data set has one form")
        return found

    rows = checked_rows(data, label, wrong)
    form, complaints = forms[0], Complaints(label)
    if form == "pairs" and len({_rated(row) for _, row in rows}) > 1:
        for where, row in rows:
            if not _rated(row):
                complaints.add(where, "has no `score_chosen` and `score_rejected`, and other rows have them")
    columns = further_columns([row for _, row in rows], form)
    found = [(where, preference_of(row, form, columns, i)) for i, (where, row) in enumerate(rows)]
    if domain:
        found = [(where, replace(p, domain=p.domain or domain)) for where, p in found]
    notes: list[str] = []
    if form == "ratings":
        found = _grouped(found, complaints, notes)
    complaints.check()
    found = _CONVERSIONS[kind](found, form, choice, label, notes)
    if not found:
        raise DataError("compares nothing: " + " ".join(notes), where=label)
    notes += _doubts(found, kind)
    return _Read(found, [f"{label}: {note}" for note in notes])


def _rated(row: Row) -> bool:
    return row.get("score_chosen") is not None


def _grouped(
    found: list[tuple[str, Preference]], complaints: Complaints, notes: list[str]
) -> list[tuple[str, Preference]]:
    """One list of each prompt whose completions are rated in rows of their own."""
    groups: dict[Any, list[tuple[str, Preference]]] = {}
    for where, p in found:
        groups.setdefault((p.domain, prompt_identity(p.prompt)), []).append((where, p))
    out, alone = [], []
    for group in groups.values():
        where, first = group[0]
        for other, p in group[1:]:
            for key in ("weight", "margin", "probability"):
                if getattr(p, key) != getattr(first, key):
                    complaints.add(other, f"`{key}` is not that of the same prompt in {where}")
        completions = tuple(p.completions[0] for _, p in group)
        scores = tuple(p.scores[0] for _, p in group)
        if len(group) == 1:
            alone.append(where)
            continue
        known: dict[str, float] = {}
        for (other, _), text, score in zip(group, map(completion_text, completions), scores, strict=True):
            if known.setdefault(text, score) != score:
                complaints.add(other, "rates a completion that is rated otherwise in another row of its prompt")
        out.append((where, replace(first, completions=completions, scores=scores)))
    if alone:
        notes.append(f"{_count(alone, 'prompt')} with a single rated completion {_are(alone)} left out ({_at(alone)}).")
    return out


# Conversions


def _as_pairs(
    found: list[tuple[str, Preference]], form: Form, choice: Choice, label: str, notes: list[str]
) -> list[tuple[str, Preference]]:
    if form == "pairs":
        return found
    if form == "labels":
        raise _refusal(form, "pairs", label, "labels do not say which completion of a prompt is better than which.")
    out, tied = [], []
    for where, p in found:
        ranked = sorted(range(len(p.scores)), key=lambda i: -p.scores[i])  # of equals the first
        compared = (
            [(ranked[0], min(ranked, key=lambda i: p.scores[i]))]
            if choice == "extremes"
            else [(i, j) for place, i in enumerate(ranked) for j in ranked[place + 1 :]]
        )
        better = [(i, j) for i, j in compared if p.scores[i] > p.scores[j]]
        tied += [] if better else [where]
        for i, j in better:
            sides, ratings = (p.completions[i], p.completions[j]), (p.scores[i], p.scores[j])
            out.append((where, replace(p, completions=sides, scores=(1.0, 0.0), ratings=ratings)))
    if tied:
        notes.append(
            f"{_count(tied, 'list')} whose completions are all rated the same {_are(tied)} left out ({_at(tied)})."
        )
    return out


def _as_labels(
    found: list[tuple[str, Preference]], form: Form, choice: Choice, label: str, notes: list[str]
) -> list[tuple[str, Preference]]:
    if form == "labels":
        return found
    if form != "pairs":
        raise _refusal(form, "labels", label, "scores do not say from where on a completion is good.")
    doubtful = [where for where, p in found if p.probability != 1.0]
    if doubtful:
        notes.append(f"`probability` of {_count(doubtful, 'pair')} does not enter the labels ({_at(doubtful)}).")
    return [
        (where, replace(p, completions=(side,), scores=(score,), margin=0.0, probability=1.0, ratings=None))
        for where, p in found
        for side, score in zip(p.completions, p.scores, strict=True)
    ]


def _as_lists(
    found: list[tuple[str, Preference]], form: Form, choice: Choice, label: str, notes: list[str]
) -> list[tuple[str, Preference]]:
    if form == "labels":
        raise _refusal(form, "lists", label, "labels do not rank the completions of a prompt.")
    rated = form == "pairs" and all(p.ratings is not None and p.ratings[0] > p.ratings[1] for _, p in found)
    return [(where, replace(p, scores=p.ratings or p.scores)) for where, p in found] if rated else found


_CONVERSIONS: dict[Kind, Callable[..., list[tuple[str, Preference]]]] = {
    "pairs": _as_pairs,
    "labels": _as_labels,
    "lists": _as_lists,
}


def _refusal(form: Form, kind: Kind, label: str, why: str) -> DataError:
    what = f"these are {form} ({SAID[form]}), and this method learns from {kind}: {why}"
    return DataError(what, label, f"Give {COLUMNS[kind]}.")


# What is noticed


def _doubts(found: list[tuple[str, Preference]], kind: Kind) -> list[str]:
    """Duplicates, contradictions, and pairs that are rated in another order."""
    seen: dict[str, str] = {}
    twice: list[str] = []
    against: list[str] = []
    for where, p in found:
        said, opposite = _identities(p, kind)
        twice += [where] if said in seen else []
        against += [f"{where} and {seen[opposite]}"] if opposite is not None and opposite in seen else []
        seen.setdefault(said, where)
    notes = []
    what = {"pairs": "pair", "labels": "labelled completion", "lists": "list"}[kind]
    if twice:
        notes.append(
            f"{_count(twice, what)} {'is a duplicate' if len(twice) == 1 else 'are duplicates'} ({_at(twice)})."
        )
    if against:
        notes.append(
            f"{_count(against, what)} {'contradicts' if len(against) == 1 else 'contradict'} another ({_at(against)})."
        )
    turned = [where for where, p in found if kind == "pairs" and p.ratings is not None and p.ratings[0] <= p.ratings[1]]
    if turned:
        notes.append(
            f"in {_count(turned, 'pair')} the chosen completion is not rated above the rejected one ({_at(turned)}); "
            "it is learnt as the better one all the same."
        )
    return notes


def _identities(p: Preference, kind: Kind) -> tuple[str, str | None]:
    """What a preference says, as text, and what would contradict it."""
    prompt, texts = prompt_identity(p.prompt), [completion_text(c) for c in p.completions]
    if kind == "pairs":
        return json.dumps([prompt, texts]), json.dumps([prompt, texts[::-1]])
    if kind == "labels":
        return json.dumps([prompt, texts, p.scores]), json.dumps([prompt, texts, [1 - p.scores[0]]])
    return json.dumps([prompt, sorted(zip(texts, p.scores, strict=True))]), None


def _at(places: Sequence[str]) -> str:
    """
    >>> _at(["line 1", "line 4", "line 5", "line 9"])
    'line 1, line 4, line 5 and 1 more'
    """
    more = len(places) - _NAMED
    return ", ".join(places[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _count(places: Sequence[str], noun: str) -> str:
    return f"{len(places)} {noun}{'s' * (len(places) != 1)}"


def _are(places: Sequence[str]) -> str:
    return "is" if len(places) == 1 else "are"


# Several data sets, and what is held out


def _choice(options: Mapping[str, Any]) -> Choice:
    for key in options:
        if key not in OPTIONS:
            what = f"unknown option of preferences; allowed: {', '.join(OPTIONS)}.{nearest(key, OPTIONS)}"
            raise ConfigError(what, f"task.options.{key}")
    choice = options.get("pairs", "extremes")
    if choice not in get_args(Choice):
        raise ConfigError(f"must be one of {', '.join(get_args(Choice))} (got {choice!r})", "task.options.pairs")
    return choice


def _domains(paths: Sequence[str]) -> dict[str, str]:
    """A name for each of several data sets: that of its file, or its path where two files have the same."""
    if len(paths) == 1:
        return {paths[0]: ""}
    names = {path: domain_of(path) for path in paths}
    return {path: name if list(names.values()).count(name) == 1 else path for path, name in names.items()}


def _apart(train: dict[str, _Read], aside: set[Any]) -> tuple[dict[str, _Read], _Read]:
    """The preferences without those whose prompts are held out, and these."""
    held = [item for read in train.values() for item in read.found if prompt_identity(item[1].prompt) in aside]
    rest = {
        path: _Read([item for item in read.found if prompt_identity(item[1].prompt) not in aside], read.notes)
        for path, read in train.items()
    }
    return rest, _Read(held, [])


def _shares(
    sides: Mapping[str, list[Preference]], learnt: list[Preference], weights: Mapping[str, float] | None, names: Any
) -> list[str]:
    """How often each of several data sets is drawn."""
    if weights is None or len(weights) == 1:
        return []
    total = sum(weight for path, weight in weights.items() if sides[path])
    said = [
        f"{names[path]}: {len(side)} {'preference' if len(side) == 1 else 'preferences'}, "
        f"{(weights[path] / total if side else 0):.1%} of what is drawn"
        for path, side in sides.items()
    ]
    return [f"{len(sides)} data sets are mixed. {'; '.join(said)}; a pass is {len(learnt)}."]
