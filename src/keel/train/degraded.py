"""Copies of completions with some of their key content deleted, beside the rows of a batch of preferences."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from keel.core.choice import counter_seed, generator, row_ids
from keel.core.rows import Rows, Stream
from keel.parts.replay.memory import joined
from keel.parts.terms.degrees import DEGREE, DeletionDegree
from keel.tasks.key_phrases import WORD, deleted, key_phrases, without
from keel.tasks.task import Example, Text
from keel.train.encode import supervised_rows

if TYPE_CHECKING:
    from keel.train.session import Session


def with_degraded(session: "Session", rows: Rows, texts: Sequence[tuple[Text, str]]) -> Rows:
    """The rows, and after them the copies that a `DeletionDegree` asks for; as they are where none does.

    Args:
        session: of the run.
        rows: with pairs.
        texts: prompt and completion of each row.
    """
    terms = [term for term in session.method.terms.values() if isinstance(term, DeletionDegree) and term.coef]
    if not terms or rows.pairs is None:
        return rows
    term, seed, step = terms[0], session.config.seed, session.position.step
    index = rows.pairs.chosen if term.copied == "chosen" else torch.cat([rows.pairs.chosen, rows.pairs.rejected])
    made = [
        (b, degree, copy)
        for b in index.unique().tolist()
        for degree, copy in enumerate(degraded(texts[b][1], term, counter_seed(seed, DEGREE, int(rows.row[b]))))
        if copy is not None
    ]
    if not made:
        return rows
    examples = [Example(texts[b][0], {}, int(rows.data_index[b])) for b, _, _ in made]
    limit = session.config.train.max_length or session.policy.context_length
    copies, _ = supervised_rows(examples, [copy for _, _, copy in made], session.encoder, limit, seed, step)
    owner, degree = torch.tensor([b for b, _, _ in made]), torch.tensor([d for _, d, _ in made])
    copies = copies.with_(
        row=row_ids(counter_seed(seed, DEGREE), step, rows.row.cpu()[owner], degree),
        group=rows.group.cpu()[owner] + int(rows.group.max()) + 1,
        weight=rows.weight.cpu()[owner],
        stream=torch.full_like(copies.stream, int(Stream.REGULARISER)),
        columns={DEGREE: degree},
    )
    return joined([rows, copies.select(copies.mask.any(1)).to(rows.device)])


def degraded(text: str, term: DeletionDegree, seed: int) -> list[str | None]:
    """A copy for each share; None for one that equals a copy of a smaller share, and for all of a text without keys."""
    phrases = key_phrases(text)
    order = torch.randperm(len(phrases), generator=generator(seed, "phrases")).tolist()
    words = [match.span() for match in WORD.finditer(text)]
    chance = torch.randperm(len(words), generator=generator(seed, "words")).tolist()
    known: set[str] = set()
    copies: list[str | None] = []
    for share in term.shares:
        spans = [span for i in order[: deleted(len(phrases), share)] for span in phrases[i].spans]
        if term.deletion == "random":
            count = sum(len(WORD.findall(text[start:end])) for start, end in spans)
            spans = [words[i] for i in chance[:count]]
        copy = without(text, spans)
        copies.append(copy if phrases and copy not in known else None)
        known.add(copy)
    return copies
