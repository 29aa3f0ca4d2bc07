"""From tokens as they come to pieces of text that can be sent."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from keel.core.rows import Stop
from keel.rollouts.decoding import text_of
from keel.serve.engine import End, Engine, Job, Mark
from keel.serve.requests import Options


@dataclass
class Piece:
    """More of one completion.

    Args:
        row: which one.
        text: that is new.
        marks: tokens that are new, and where in the text each begins.
        offsets: where in the text each of them begins.
        finish: "stop" or "length", in the last piece.
        stop: the stop string that ended it.
        drawn: whether the tokens were drawn, and not echoed.
    """

    row: int
    text: str = ""
    marks: list[Mark] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: str | None = None
    stop: str | None = None
    drawn: bool = True


class Writing:
    """The text of one completion while it is written.

    Text is held back while it may be the beginning of a stop string, or half a character.

    Args:
        tokenizer: decodes.
        options: stop strings, and what belongs to the text.
        eos_ids: tokens that end a completion; they are no text.
        limit: tokens at most.
    """

    def __init__(self, tokenizer: Any, options: Options, eos_ids: Sequence[int], limit: int):
        self.tokenizer, self.options, self.eos_ids, self.limit = tokenizer, options, eos_ids, limit
        self.tokens: list[int] = []
        self.clean, self.read = 0, 0  # tokens whose text is settled; those that have been read
        self.text, self.sent = "", 0
        self.finish: str | None = None
        self.stop: str | None = None

    def add(self, token: int) -> str:
        """One more token: the text that may be sent now."""
        self.tokens.append(token)
        if token in self.eos_ids:
            return self.end("stop")
        before = len(self.text)
        self.text += self._decoded(final=False)
        if found := self._stopped(before):
            at, self.stop = found
            self.text = self.text[: at + (len(self.stop) if self.options.include_stop_str_in_output else 0)]
            self.finish = "stop"
            return self._send(0)
        if len(self.tokens) == self.limit:
            return self.end("length")
        return self._send(self._held())

    def end(self, reason: str) -> str:
        """It is over, for a reason that the text does not show: the rest of the text."""
        self.text += self._decoded(final=True)
        self.finish = reason
        return self._send(0)

    def _decoded(self, final: bool) -> str:
        """Text of tokens not read yet; decoded behind settled ones, because some tokenizers join what they decode."""
        skip = self.options.skip_special_tokens is not False
        tokens = self.tokens[:-1] if final and self.tokens and self.tokens[-1] in self.eos_ids else self.tokens
        known = text_of(self.tokenizer, tokens[self.clean : self.read], skip_special_tokens=skip)
        whole = text_of(self.tokenizer, tokens[self.clean :], skip_special_tokens=skip)
        if not final and whole.endswith("\ufffd"):
            return ""
        self.clean, self.read = self.read, len(tokens)
        return whole[len(known) :]

    def _stopped(self, before: int) -> tuple[int, str] | None:
        """The first stop string in the text, and its place."""
        longest = max(map(len, self.options.stops), default=0)
        start = max(0, before - longest + 1)
        found = [(self.text.find(string, start), string) for string in self.options.stops]
        return min((hit for hit in found if hit[0] >= 0), default=None)

    def _held(self) -> int:
        """Characters at the end with which a stop string may begin."""
        longest = max((len(string) - 1 for string in self.options.stops), default=0)
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(string.startswith(self.text[-size:]) for string in self.options.stops):
                return size
        return 0

    def _send(self, held: int) -> str:
        until = max(self.sent, len(self.text) - held)
        piece, self.sent = self.text[self.sent : until], until
        return piece


async def pieces(engine: Engine, job: Job, options: Options) -> AsyncGenerator[Piece, None]:
    """What a job writes, piece by piece; every row ends with a piece that says why."""
    limit = 0 if job.sampling is None else job.sampling.max_completion_length
    front = engine.front
    rows = [Writing(front.tokenizer, options, front.eos_ids, limit) for _ in job.prompts.row]
    echoed = [0] * len(rows)
    async with aclosing(engine.run(job)) as news:
        async for item in news:
            if isinstance(item, End):
                for piece in _ends(rows, item):
                    yield piece
            elif item.prompt:
                piece = _echo(item.rows[0], item.marks, front.tokenizer, options)
                echoed[piece.row] = len(piece.text)
                yield piece
            else:
                for i, mark in zip(item.rows, item.marks, strict=True):
                    if rows[i].finish is None:
                        at = echoed[i] + len(rows[i].text)
                        text = rows[i].add(mark.token)
                        yield Piece(i, text, [mark], [at], rows[i].finish, rows[i].stop)


def _echo(row: int, marks: Sequence[Mark], tokenizer: Any, options: Options) -> Piece:
    """A prompt as text."""
    skip = options.skip_special_tokens is not False
    tokens = [mark.token for mark in marks]
    offsets = [len(text_of(tokenizer, tokens[:i], skip_special_tokens=skip)) for i in range(len(tokens))]
    return Piece(row, text_of(tokenizer, tokens, skip_special_tokens=skip), list(marks), offsets, drawn=False)


def _ends(rows: Sequence[Writing], end: End) -> list[Piece]:
    """Rows that the decoding ended and the text did not: nothing was to be drawn, or special tokens hide a stop."""
    reasons = end.stops or [int(Stop.LENGTH)] * len(rows)
    left = [i for i, row in enumerate(rows) if row.finish is None]
    found = []
    for i in left:
        reason = "length" if reasons[i] == int(Stop.LENGTH) else "stop"
        found.append(Piece(i, rows[i].end(reason), finish=reason))
    return found
