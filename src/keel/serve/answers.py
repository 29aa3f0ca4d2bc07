"""Answers in the form of OpenAI's API."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from keel.rollouts.decoding import text_of
from keel.serve.engine import Job, Mark
from keel.serve.requests import ChatRequest, CompletionRequest
from keel.serve.writing import Piece


@dataclass
class Answer(ABC):
    """What is common to both kinds of answer; `choice` is made of a piece of a completion, or of all of it.

    Args:
        served: name of the model.
        tokenizer: names tokens.
        request: what was asked.
        job: what was made of it.
    """

    served: str
    tokenizer: Any
    request: CompletionRequest | ChatRequest
    job: Job
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    drawn: int = 0
    begun: set[int] = field(default_factory=set)

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer, from all pieces."""
        rows = [Piece(i) for i in range(len(self.job.prompts.row))]
        ids: list[list[int]] = [[] for _ in rows]
        for piece in pieces:
            row = rows[piece.row]
            row.text += piece.text
            row.marks += piece.marks
            row.offsets += piece.offsets
            row.finish, row.stop = piece.finish or row.finish, piece.stop or row.stop
            ids[piece.row] += self.count(piece)
        choices = [self._choice(row, ids[row.row], stream=False) for row in rows]
        return self._head(stream=False) | {"choices": choices, "usage": self.usage()} | self._prompt(stream=False)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One event of a stream."""
        ids = self.count(piece)
        first = not self.begun
        found = self._head(stream=True) | {"choices": [self._choice(piece, ids, stream=True)]}
        self.begun.add(piece.row)
        return found | (self._prompt(stream=True) if first else {})

    def last(self) -> dict[str, Any]:
        """The event that counts, after all others."""
        return self._head(stream=True) | {"choices": [], "usage": self.usage()}

    @property
    def shows_tokens(self) -> bool:
        """Whether the answer says something of every token."""
        return self.job.top is not None or bool(self.request.return_token_ids)

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each once however many completions it has, and tokens drawn."""
        prompts = self.job.prompts
        first = prompts.group.diff(prepend=prompts.group[:1] - 1) != 0
        read = int(prompts.mask.sum(1)[prompts.index[first]].sum())
        return {"prompt_tokens": read, "completion_tokens": self.drawn, "total_tokens": read + self.drawn}

    def count(self, piece: Piece) -> list[int]:
        """The tokens of a piece that were drawn; they are counted, sent or not."""
        ids = [mark.token for mark in piece.marks] if piece.drawn else []
        self.drawn += len(ids)
        return ids

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.request.return_tokens_as_token_ids else text_of(self.tokenizer, [token])

    def _prompt_ids(self, row: int) -> list[int]:
        prompts, index = self.job.prompts, int(self.job.prompts.index[row])
        return prompts.ids[index][prompts.mask[index]].tolist()

    @abstractmethod
    def _head(self, stream: bool) -> dict[str, Any]:
        """What stands before the choices."""

    def _prompt(self, stream: bool) -> dict[str, Any]:
        return {}

    @abstractmethod
    def _choice(self, piece: Piece, ids: list[int], stream: bool) -> dict[str, Any]:
        """One piece of a completion as a choice."""


class Completion(Answer):
    """Of /v1/completions."""

    def _head(self, stream: bool) -> dict[str, Any]:
        return {"id": f"cmpl-{self.number}", "object": "text_completion", "created": self.created, "model": self.served}

    def _choice(self, piece: Piece, ids: list[int], stream: bool) -> dict[str, Any]:
        choice = {
            "index": piece.row,
            "text": piece.text,
            "logprobs": self._logprobs(piece) if self.job.top is not None else None,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop,
        }
        if self.request.return_token_ids:
            choice["token_ids"] = ids
            if piece.row not in self.begun:
                choice["prompt_token_ids"] = self._prompt_ids(piece.row)
        return choice

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        shown = [self._top(mark) for mark in piece.marks] if self.job.top else None
        return {
            "tokens": [self._name(mark.token) for mark in piece.marks],
            "token_logprobs": [mark.logp for mark in piece.marks],
            "top_logprobs": shown,
            "text_offset": piece.offsets,
        }

    def _top(self, mark: Mark) -> dict[str, float] | None:
        """The likeliest tokens and the token itself; of several with one name the likeliest."""
        if mark.logp is None:
            return None
        found: dict[str, float] = {}
        for token, logp in (*mark.likeliest, (mark.token, mark.logp)):
            found.setdefault(self._name(token), logp)
        return found


class Chat(Answer):
    """Of /v1/chat/completions."""

    def _head(self, stream: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if stream else "chat.completion"
        return {"id": f"chatcmpl-{self.number}", "object": kind, "created": self.created, "model": self.served}

    def _prompt(self, stream: bool) -> dict[str, Any]:
        return {"prompt_token_ids": self._prompt_ids(0)} if self.request.return_token_ids else {}

    def _choice(self, piece: Piece, ids: list[int], stream: bool) -> dict[str, Any]:
        message: dict[str, Any] = {"content": piece.text}
        if piece.row not in self.begun:
            message = {"role": "assistant", **message}
        content = [self._mark(mark) for mark in piece.marks]
        choice = {
            "index": piece.row,
            "delta" if stream else "message": message,
            "logprobs": {"content": content} if self.job.top is not None else None,
            "finish_reason": piece.finish,
            "stop_reason": piece.stop,
        }
        return choice | ({"token_ids": ids} if self.request.return_token_ids else {})

    def _mark(self, mark: Mark) -> dict[str, Any]:
        shown = [self._entry(token, logp) for token, logp in mark.likeliest]
        return self._entry(mark.token, mark.logp) | {"top_logprobs": shown}

    def _entry(self, token: int, logp: float | None) -> dict[str, Any]:
        return {"token": self._name(token), "logprob": logp, "bytes": list(text_of(self.tokenizer, [token]).encode())}
