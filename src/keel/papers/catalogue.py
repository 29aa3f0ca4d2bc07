"""The catalogue: every paper with its family, our summary, and what of it runs in Keel."""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import date as Date
from typing import Any

from keel.core.errors import DataError, UserError, nearest

FAMILIES = {
    "online": "online reinforcement learning",
    "preference": "preference optimisation",
    "target": "target distributions",
    "distillation": "distillation",
    "inference": "sampling at inference",
    "rollout": "rollouts and curricula",
    "diffusion": "diffusion and flow models",
    "offline": "offline reinforcement learning",
    "search": "search and evolution",
    "optimisation": "optimisation and step sizes",
    "continual": "continual learning and forgetting",
    "supervised": "supervised learning, representations, theory",
}
THEMES = {
    "divergence": "KL divergence to a reference",
    "entropy": "entropy and exploration objective",
    "behaviour": "behaviour regularisation",
    "target": "target distribution of rewards",
}
STATUSES = {
    "implemented": "Keel implements it: the recipes, parts or modules named run.",
    "experiment": "Keel reproduces an effect or a claim of it as an experiment; it is no method of its own here.",
    "context": "Listed as context; its method does not run in Keel, though a part that others share may.",
    "imported": "Imported on this machine; nobody has said yet what of it runs in Keel.",
}
FIDELITIES = {
    "authors_code": "follows the authors' code",
    "paper": "follows the paper",
    "reconstructed": "reconstructed where the paper leaves it open",
    "partial": "a component that the paper names is missing",
    "none": "nothing of it is here",
}
_ARXIV = re.compile(
    r"(?:arxiv\.org/(?:abs|pdf|html)/|huggingface\.co/papers/|arxiv:)(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", re.I
)


@dataclass(frozen=True)
class Component:
    """Something that a paper proposes.

    Args:
        name: in the paper's words.
        there: whether Keel has it.
    """

    name: str
    there: bool


@dataclass(frozen=True)
class Paper:
    """One paper, and what it is in Keel.

    Args:
        n: its number in the catalogue; papers imported on this machine begin at 10001.
        title: as published.
        date: of its first version, None where unknown.
        authors: their names, or how many there are where only that is known.
        organisation: where they work, "" where unknown.
        comments: how many readers commented, or the authors' own remark; None where unknown.
        themes: under which of `THEMES` it was collected. No search reads this; search is measured with it.
        family: one of `FAMILIES`.
        links: addresses (http or https) of code and pages.
        summary: one sentence of our own; "" for an imported paper.
        status: one of `STATUSES`.
        recipes, parts, modules: what of it is in Keel, by the names registered.
        fidelity: one of `FIDELITIES`.
        components: what it proposes, each with whether Keel has it.
        where: one clause: how to run it, or why it is context.
        abstract: of an imported paper, as its page had it.
        added: the day on which it was imported; None for the packaged catalogue.

    Raises:
        ValueError: a value that is none of these, naming the argument.
    """

    n: int
    title: str
    date: Date | None = None
    authors: tuple[str, ...] | int | None = None
    organisation: str = ""
    comments: int | str | None = None
    themes: tuple[str, ...] = ()
    family: str = "supervised"
    links: tuple[str, ...] = ()
    summary: str = ""
    status: str = "context"
    recipes: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    fidelity: str = "none"
    components: tuple[Component, ...] = ()
    where: str = ""
    abstract: str = ""
    added: Date | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, not {self.n}")
        if not self.title.strip():
            raise ValueError("title must not be empty")
        for name, allowed in (("family", FAMILIES), ("status", STATUSES), ("fidelity", FIDELITIES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not '{value}'")
        for theme in self.themes:
            if theme not in THEMES:
                raise ValueError(f"themes must be of {', '.join(THEMES)}, not '{theme}'")
        for link in self.links:
            if not link.startswith(("https://", "http://")):
                raise ValueError(f"links must begin with https:// or http://, not '{link}'")
        if self.status == "implemented" and not (self.recipes or self.parts or self.modules):
            raise ValueError("status implemented must name recipes, parts or modules")
        if (self.fidelity == "none") != (self.status in ("context", "imported")):
            raise ValueError(
                f"fidelity is '{self.fidelity}' and status '{self.status}': context, and only it, has none"
            )

    @property
    def runs(self) -> bool:
        """Whether Keel implements it."""
        return self.status == "implemented"

    @property
    def missing(self) -> tuple[str, ...]:
        """The components that the paper names and Keel lacks."""
        return tuple(c.name for c in self.components if not c.there)

    @property
    def known_since(self) -> Date | None:
        """The day on which it was imported, or else published."""
        return self.added or self.date

    @property
    def command(self) -> str:
        """What runs it in a terminal: the first command in `where`, or its first recipe; "" where there is none."""
        said = re.search(r"`(keel [^`]+)`", self.where) if self.status != "context" else None
        return said[1] if said else f"keel train {self.recipes[0]}" if self.recipes else ""

    @property
    def arxiv(self) -> str | None:
        """Its identifier at arXiv, where a link has one.

        >>> Paper(1, "A", links=("https://arxiv.org/abs/2501.01234v2",)).arxiv
        '2501.01234'
        """
        return next((found[1] for link in self.links if (found := _ARXIV.search(link))), None)

    def to_json(self) -> dict[str, Any]:
        """Everything that is not empty, for `json.dumps`; `from_json` reads it back."""
        out: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value in (None, "", ()):
                continue
            if isinstance(value, Date):
                value = value.isoformat()
            if field.name == "components":
                value = [{"name": c.name, "there": c.there} for c in value]
            out[field.name] = list(value) if isinstance(value, tuple) else value
        return out

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Paper:
        """A paper from a record as `to_json` writes it.

        Raises:
            ValueError: an unknown key, a missing one, or a value of another type, naming the key.
        """
        known = {field.name for field in fields(Paper)}
        for key in record:
            if key not in known:
                raise ValueError(f"there is no key '{key}'.{nearest(key, known)}")
        for key in ("n", "title"):
            if key not in record:
                raise ValueError(f"{key} is missing")
        return Paper(**{key: _value(key, value) for key, value in record.items()})


def read_catalogue(text: str, name: str) -> tuple[Paper, ...]:
    """The papers of a file in JSON lines, in its order.

    Args:
        text: one record a line; empty lines count for nothing.
        name: of the file, for errors.

    Raises:
        DataError: a line that is no paper, or a number or title that comes twice, with file and line.
    """
    papers: list[Paper] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("a line must be an object")
            papers.append(Paper.from_json(record))
        except ValueError as error:
            raise DataError(str(error), f"{name}:{number}") from error
    for what in ("n", "title"):
        value, count = Counter(getattr(p, what) for p in papers).most_common(1)[0] if papers else (None, 0)
        if count > 1:
            raise DataError(f"{what} '{value}' comes {count} times", name)
    return tuple(papers)


@functools.cache
def catalogue() -> tuple[Paper, ...]:
    """The papers that come with Keel, by number.

    >>> len(catalogue()), catalogue()[46].title[:21]
    (222, 'The Entropy Mechanism')
    """
    file = importlib.resources.files("keel.papers") / "catalogue.jsonl"
    return read_catalogue(file.read_text(encoding="utf-8"), "keel/papers/catalogue.jsonl")


def paper(n: int, papers: Iterable[Paper] | None = None) -> Paper:
    """The paper of a number.

    Args:
        n: its number.
        papers: where to look; the catalogue without it.

    Raises:
        UserError: there is none.
    """
    for one in catalogue() if papers is None else papers:
        if one.n == n:
            return one
    raise UserError(f"there is no paper {n}", None, "`keel papers list` shows the numbers.")


def newest_first(papers: Iterable[Paper]) -> list[Paper]:
    """By date, the latest first; those without one come last, by number."""
    return sorted(papers, key=lambda p: (p.date or Date.min, p.n), reverse=True)


def _value(key: str, value: Any) -> Any:
    if key in ("date", "added"):
        return value if value is None else Date.fromisoformat(_typed(key, value, str))
    if key == "n":
        return _typed(key, value, int)
    if key == "components":
        return tuple(_component(item) for item in _typed(key, value, list))
    if key in ("themes", "links", "recipes", "parts", "modules") or (key == "authors" and isinstance(value, list)):
        return tuple(_typed(key, item, str) for item in _typed(key, value, list))
    if key == "authors":
        return value if value is None else _typed(key, value, int)
    if key == "comments":
        return value if value is None or isinstance(value, str) else _typed(key, value, int)
    return _typed(key, value, str)


def _component(item: Any) -> Component:
    record = _typed("components", item, dict)
    if set(record) != {"name", "there"}:
        raise ValueError(f"components must have name and there, not {', '.join(record) or 'nothing'}")
    return Component(_typed("name", record["name"], str), _typed("there", record["there"], bool))


def _typed(key: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{key} must be of type {kind.__name__}, not {type(value).__name__}")
    return value
