"""The model that is served: one request after another, every token told as soon as it is drawn."""

import asyncio
import copy
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.models.language import LanguageModel
from keel.rollouts.decoding import Chooser, Prompts, decode
from keel.rollouts.local import LocalGenerator, evaluating
from keel.rollouts.sampling import Sampling

Likeliest = tuple[tuple[int, float], ...]  # tokens and their log-probabilities


@dataclass(frozen=True)
class Job:
    """What the model has to do for one request.

    Args:
        prompts: what is continued, a row for each completion.
        sampling: how; None draws nothing.
        top: likeliest tokens to report at every place; None reports no log-probabilities.
        processed: report those of the distribution that is drawn from, not the model's own.
        echo: report the prompts' own tokens first.
    """

    prompts: Prompts
    sampling: Sampling | None
    top: int | None = None
    processed: bool = False
    echo: bool = False


@dataclass(frozen=True)
class Mark:
    """A token at its place.

    Args:
        token: its id.
        logp: its log-probability; None for the first of a prompt, and where none is reported.
        likeliest: the likeliest tokens there.
    """

    token: int
    logp: float | None = None
    likeliest: Likeliest = ()


@dataclass(frozen=True)
class Event:
    """News of some rows, one mark for each; `prompt` says that they are the tokens of the prompt itself, in a row."""

    rows: Sequence[int]
    marks: Sequence[Mark]
    prompt: bool = False


@dataclass(frozen=True)
class End:
    """Everything is drawn; why each row ended (`Stop`)."""

    stops: Sequence[int] = field(default_factory=tuple)


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class Engine:
    """Runs jobs on one model in a thread of its own.

    Args:
        model: what is served.

    Attributes:
        front: the same model with a tokenizer of its own, for whoever prepares jobs and reads tokens meanwhile; a
            tokenizer must not be used by two threads at once.

    Raises:
        UserError: the architecture does not decode with a key-value cache.
    """

    def __init__(self, model: LanguageModel):
        self.model, self.local = model, LocalGenerator(model)
        self.front = copy.copy(model)
        self.front.tokenizer = copy.deepcopy(model.tokenizer)
        self.worker = ThreadPoolExecutor(1, "keel-serve")
        self.closed = threading.Event()

    async def run(self, job: Job) -> AsyncGenerator[Event | End, None]:
        """News of a job as they come; leaving the loop early ends the work."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Any]()
        cancelled = threading.Event()

        def tell(item: Any) -> None:
            if cancelled.is_set() or self.closed.is_set():
                raise Cancelled
            loop.call_soon_threadsafe(news.put_nowait, item)

        def finished(task: Future) -> None:
            if not cancelled.is_set() and not loop.is_closed():
                loop.call_soon_threadsafe(news.put_nowait, task)

        task = self.worker.submit(self._work, job, tell)
        task.add_done_callback(finished)
        try:
            while not isinstance(item := await news.get(), Future):
                yield item
            item.result()  # raises what the work has raised
        finally:
            cancelled.set()
            task.cancel()

    def close(self) -> None:
        """End the work at the next token, and the thread."""
        self.closed.set()
        self.worker.shutdown(cancel_futures=True)

    def _work(self, job: Job, tell: Callable[[Any], None]) -> None:
        with evaluating(self.model):
            if job.echo:
                for row, index in enumerate(job.prompts.index.tolist()):
                    tell(self._read(job, row, index))
            if job.sampling is None:
                tell(End())
                return
            limit = job.sampling.max_completion_length
            stepper = self.local.stepper(job.prompts.ids.shape[1] + limit)
            chooser = Telling(self.model, job, limit, tell)
            drawn = decode(stepper, self.model, job.prompts, job.sampling, compact=0.0, chooser=chooser)
            tell(End(drawn.stop.tolist()))

    def _read(self, job: Job, row: int, index: int) -> Event:
        """A prompt's tokens; the log-probability of each given those before it, at temperature 1."""
        ids = job.prompts.ids[index][job.prompts.mask[index]]
        if job.top is None:
            return Event([row], [Mark(token) for token in ids.tolist()], prompt=True)
        log_probs = self.model.head.logits(self.model.states(ids[None])[0, :-1]).float().log_softmax(-1)
        return Event([row], [Mark(int(ids[0])), *marks(log_probs, ids[1:], job.top)], prompt=True)


class Telling(Chooser):
    """Chooses as every other generator does, and tells what it has chosen, and from what."""

    def __init__(self, model: LanguageModel, job: Job, limit: int, tell: Callable[[Any], None]):
        assert job.sampling is not None
        super().__init__(model.head, job.sampling, job.prompts.row, limit)
        self.job, self.tell = job, tell

    def choose(
        self, logits: Float[Tensor, "n V"], alive: Int[Tensor, "n"], position: int
    ) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
        """See `Chooser`."""
        token, logp = super().choose(logits, alive, position)
        if self.job.top is None:
            told = [Mark(one) for one in token.tolist()]
        else:
            shown = self.shaped(logits) if self.job.processed else logits
            told = marks(shown.float().log_softmax(-1), token, self.job.top)
        self.tell(Event(alive.tolist(), told))
        return token, logp


def marks(log_probs: Float[Tensor, "n V"], token: Int[Tensor, "n"], top: int) -> list[Mark]:
    """Tokens with their log-probabilities and the likeliest others; tokens that cannot be drawn are not shown."""
    own = log_probs.gather(1, token[:, None])[:, 0].tolist()
    best = log_probs.topk(min(top, log_probs.shape[1]), -1)
    found = []
    for one, logp, ids, values in zip(token.tolist(), own, best.indices.tolist(), best.values.tolist(), strict=True):
        likeliest = tuple((other, value) for other, value in zip(ids, values, strict=True) if value > -torch.inf)
        found.append(Mark(one, logp, likeliest))
    return found
