"""Docstrings as pages show them: sentences, formulas, and what each argument means."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_SECTION = re.compile(r"(Args|Returns|Yields|Raises|Source|Sources):\s*(.*)")
_ARGUMENT = re.compile(r"([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): (.*)")


@dataclass(frozen=True)
class Block:
    """A paragraph, or a formula as it is laid out.

    Args:
        text: without the indentation that all its lines share.
        formula: whether it is one.
    """

    text: str
    formula: bool = False


@dataclass(frozen=True)
class Docstring:
    """What a docstring says.

    Args:
        summary: its first sentence.
        body: what follows, up to the sections.
        arguments: what each means, by name.
        source: whence the method is.
    """

    summary: str = ""
    body: tuple[Block, ...] = ()
    arguments: dict[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def formulas(self) -> tuple[str, ...]:
        """The formulas alone."""
        return tuple(block.text for block in self.body if block.formula)


def read_docstring(thing: Any) -> Docstring:
    """The docstring of a function or class, in its parts.

    >>> def square(x):
    ...     '''Square a number.
    ...
    ...         y = x^2
    ...
    ...     Args:
    ...         x: the number, of
    ...             any sign.
    ...
    ...     Source: Euclid.
    ...     '''
    >>> found = read_docstring(square)
    >>> found.formulas, found.arguments, found.source
    (('y = x^2',), {'x': 'the number, of any sign.'}, 'Euclid.')
    """
    text = inspect.getdoc(thing) or ""
    if inspect.isclass(thing) and text.startswith(f"{thing.__name__}("):
        text = ""  # what a dataclass without a docstring is given
    head, sections = _split(text)
    blocks = list(_blocks(head))
    summary = blocks[0].text if blocks and not blocks[0].formula else ""
    return Docstring(
        summary=summary,
        body=tuple(blocks[1:] if summary else blocks),
        arguments=_arguments(sections.get("Args", [])),
        source=" ".join(" ".join(sections.get("Source", sections.get("Sources", []))).split()),
    )


def _split(text: str) -> tuple[list[str], dict[str, list[str]]]:
    head: list[str] = []
    sections: dict[str, list[str]] = {}
    current = head
    for line in text.splitlines():
        if found := _SECTION.fullmatch(line):
            current = sections.setdefault(found[1], [])
            line = found[2]
        current.append(line)
    return head, sections


def _blocks(lines: list[str]) -> Iterator[Block]:
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        own = paragraph.splitlines()
        if not paragraph.strip() or own[0].lstrip().startswith(">>>"):
            continue
        if all(line.startswith("    ") for line in own):
            yield Block(inspect.cleandoc("\n" + paragraph), formula=True)
        else:
            yield Block(" ".join(paragraph.split()))


def _arguments(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    names: list[str] = []
    begin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    for line in lines:
        at_start = line.strip() and len(line) - len(line.lstrip()) == begin
        if at_start and (match := _ARGUMENT.fullmatch(line.strip())):
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
