"""Where environments of `verifiers` play: an event loop in a thread, and an endpoint whose model is whoever replies.

`verifiers` drives the model, not the other way round: an episode asks an OpenAI-compatible endpoint for each message.
The endpoint here is Keel's own, and holds each request until the message has been generated. So an episode can be
taken step by step: it begins, and goes on with every reply, up to its next request or its end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import threading
import weakref
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from keel.core.errors import ConfigError

Message = dict[str, Any]
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_KEY = "KEEL_VERIFIERS_KEY"  # names an environment variable that need not exist: the endpoint wants no key


@dataclass(frozen=True)
class Asked:
    """An episode asks for a message.

    Args:
        messages: the conversation so far.
        tools: that the message may call, as an OpenAI request describes them.
    """

    messages: list[Message]
    tools: list[dict[str, Any]]


@dataclass(frozen=True)
class Finished:
    """An episode is over.

    Args:
        reward: the weighted sum of the rewards of the seat that the policy plays.
        rewards, metrics: by name; rewards without their weights.
        reason: what stopped it.
    """

    reward: float
    rewards: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass
class _Seat:
    """Where an episode's requests wait."""

    requests: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[Message]]] = field(default_factory=asyncio.Queue)
    waiting: asyncio.Future[Message] | None = None


class Stage:
    """An environment of `verifiers`, ready to play.

    Args:
        env: the environment; `serving()` and `run_episode(task, context)` of it are used.
        seat: the name of the agent that the policy plays.
        timeout: seconds for one answer of the environment, scoring included.

    Raises:
        ConfigError: the environment cannot be started.
    """

    def __init__(self, env: Any, seat: str, timeout: float):
        self.env, self.seat, self.timeout = env, seat, timeout
        self.seats: dict[str, _Seat] = {}
        self.url = ""
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        ready: threading.Event = threading.Event()
        failed: list[BaseException] = []
        # the thread must not keep the stage alive, or it would never be closed
        serve = _serve(weakref.proxy(self), env, self._closing, ready, failed)
        thread = threading.Thread(target=_run, args=(self._loop, serve, ready), name="verifiers", daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _close, self._loop, self._closing, thread)
        ready.wait()
        if failed:
            error = failed[0]
            raise ConfigError(f"cannot be started: {type(error).__name__}: {error}", "verifiers") from error

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of a coroutine that runs on the stage.

        Raises:
            TimeoutError: it takes longer than `timeout`.
        """
        try:
            return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, self.timeout), self._loop).result()
        except TimeoutError:
            raise TimeoutError(f"the environment took longer than {self.timeout:g} seconds") from None

    def open(self, task: Any) -> Episode:
        """A new episode of one of the environment's tasks; it plays once `begin` is called."""
        return Episode(self, task, f"keel-{next(self._numbers)}")

    async def answer(self, request: Any) -> Any:
        """`POST /v1/chat/completions`: wait until somebody has replied."""
        from aiohttp import web

        body = await request.json()
        seat = self.seats.get(body.get("model", ""))
        message: Message = {}
        if seat is not None:
            reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
            await seat.requests.put((body, reply))
            message = await reply
        if not message:
            return web.json_response({"error": {"message": "this episode is over"}}, status=410)
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        return web.json_response(
            {
                "id": f"{body['model']}-{len(body['messages'])}",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": reason}],
                "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
            }
        )


class Episode:
    """One episode, taken step by step.

    Args:
        stage: where it plays.
        task: of the environment.
        name: tells it from the others at the endpoint.
    """

    def __init__(self, stage: Stage, task: Any, name: str):
        self.stage, self.task, self.name = stage, task, name
        self._played: list[asyncio.Task[Any]] = []
        self.close = weakref.finalize(self, _leave, stage._loop, stage.seats, name, self._played)

    def begin(self) -> Asked | Finished:
        """Start, up to the first request."""
        return self.stage.call(self._begin())

    def reply(self, message: Message) -> Asked | Finished:
        """Answer the request, and go on to the next one or the end."""
        return self.stage.call(self._reply(message))

    async def _begin(self) -> Asked | Finished:
        from verifiers.v1 import EvalClientConfig, ModelContext

        self.stage.seats[self.name] = _Seat()
        client = EvalClientConfig(base_url=self.stage.url, api_key_var=_KEY)
        context = ModelContext(model=self.name, client=client)
        self._played.append(asyncio.create_task(self.stage.env.run_episode(self.task, context)))
        return await self._next()

    async def _reply(self, message: Message) -> Asked | Finished:
        waiting = self.stage.seats[self.name].waiting
        assert waiting is not None
        waiting.set_result(message)
        return await self._next()

    async def _next(self) -> Asked | Finished:
        seat, played = self.stage.seats[self.name], self._played[0]
        request = asyncio.create_task(seat.requests.get())
        await asyncio.wait({request, played}, return_when=asyncio.FIRST_COMPLETED)
        if request.done():
            body, seat.waiting = request.result()
            return Asked(body["messages"], body.get("tools") or [])
        request.cancel()
        del self.stage.seats[self.name]
        return outcome(played.result(), self.stage.seat)


def outcome(episode: Any, seat: str) -> Finished:
    """What an episode of `verifiers` came to.

    Raises:
        RuntimeError: it failed, or the seat did not play exactly once.
    """
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if not episode.ok and errors:
        raise RuntimeError(f"the episode failed: {errors[-1].type}: {errors[-1].message}")
    traces = [trace for trace in episode.traces if trace.agent.name == seat]
    if len(traces) != 1:
        what = f"the agent '{seat}' played {len(traces)} times in one episode"
        raise RuntimeError(f"{what}; Keel plays environments in which it plays once")
    trace = traces[0]
    rewards = {name: float(reward.value) for name, reward in trace.rewards.items()}
    metrics = {name: float(value) for name, value in trace.metrics.items()}
    return Finished(float(trace.reward), rewards, metrics, trace.stop_condition or "")


def message_of(text: str, tools: bool, number: int) -> Message:
    """A text of the model as a message; what stands in `<tool_call>` becomes calls, where there are tools.

    Args:
        text: of one turn; a last `<tool_call>` may lack its end.
        tools: whether calls are read at all.
        number: of the turn, for the names of the calls.

    >>> message_of('Adding. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', True, 0)["tool_calls"]
    [{'id': 'call_0_0', 'type': 'function', 'function': {'name': 'add', 'arguments': '{"a": 1}'}}]
    """
    calls: list[Message] = []

    def take(found: re.Match[str]) -> str:
        call = _call(found[1], f"call_{number}_{len(calls)}")
        if call is None:
            return found[0]
        calls.append(call)
        return ""

    said = _CALL.sub(take, text).strip() if tools else text
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": said or None, "tool_calls": calls}


def _call(text: str, name: str) -> Message | None:
    """A call of a tool; None where the text is none, which is then read as it stands."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    function = {"name": found["name"], "arguments": json.dumps(arguments)}
    return {"id": name, "type": "function", "function": function}


async def _serve(stage: Any, env: Any, closing: asyncio.Event, ready: threading.Event, failed: list[Any]) -> None:
    """Endpoint and environment, up until the stage closes."""
    from aiohttp import web

    async def answer(request: Any) -> Any:
        return await stage.answer(request)

    application = web.Application(client_max_size=2**28)
    application.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(application)
    try:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        stage.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        async with env.serving():
            ready.set()
            await closing.wait()
    except Exception as error:
        failed.append(error)
    finally:
        ready.set()
        await runner.cleanup()


def _run(loop: asyncio.AbstractEventLoop, serve: Coroutine[Any, Any, None], ready: threading.Event) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(serve)
        rest = asyncio.all_tasks(loop)
        for task in rest:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
    finally:
        ready.set()
        loop.close()


def _close(loop: asyncio.AbstractEventLoop, closing: asyncio.Event, thread: threading.Thread) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(closing.set)
        thread.join(5)


def _leave(loop: asyncio.AbstractEventLoop, seats: dict[str, _Seat], name: str, played: list[Any]) -> None:
    """An episode that nobody goes on with ends without a score."""

    def leave() -> None:
        seat = seats.pop(name, None)
        for task in played:
            task.cancel()
        if seat is not None:
            replies = [seat.waiting, *(seat.requests.get_nowait()[1] for _ in range(seat.requests.qsize()))]
            for reply in replies:
                if reply is not None and not reply.done():
                    reply.set_result({})  # nobody replies any more

    if not loop.is_closed():
        loop.call_soon_threadsafe(leave)
