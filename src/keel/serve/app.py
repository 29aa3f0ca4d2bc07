"""The server: routes, errors in OpenAI's form, and where it may listen.

    GET  /health                 whether it is there
    GET  /v1/models              the one model
    POST /v1/completions         texts or tokens in; see `keel.serve.requests`
    POST /v1/chat/completions    messages in, through the chat template

It is meant for the machine it runs on: there are no keys, and no host but a loopback one is taken unless it is allowed.
"""

import asyncio
import json
import secrets
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import torch

from keel.core.errors import KeelError, UserError
from keel.models.language import LanguageModel
from keel.models.load import is_out_of_memory
from keel.rollouts.decoding import Prompts
from keel.rollouts.sampling import Sampling
from keel.serve.answers import Answer, Chat, Completion
from keel.serve.engine import Engine, Job
from keel.serve.listening import address, is_loopback, listen, serve_on
from keel.serve.requests import ChatRequest, CompletionRequest, Options
from keel.serve.writing import pieces
from keel.train.encode import Encoder

ROOM = 1024  # tokens of an answer to a chat where neither request nor model sets a limit
PATIENCE = 2  # seconds that requests get to end when the server does


class UnknownModel(UserError):
    """Another model is asked for than the one there is."""


def build_app(model: LanguageModel, served: str, hosts: Sequence[str] | None = None) -> Any:
    """The FastAPI application for a model.

    Args:
        model: what is served.
        served: its name.
        hosts: names under which the server may be addressed; None takes every name. A page in a browser that has its
            own name point to this machine is kept out by them.
    """
    from fastapi import FastAPI, Request
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    engine = Engine(model)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title="Keel", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    _errors(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": served, "object": "model", "created": 0, "owned_by": "keel"}
        return {"object": "list", "data": [entry | {"max_model_len": model.context_length}]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        _check(body, served)
        job = completion_job(engine.front, body)
        return await _answer(engine, Completion(served, engine.front.tokenizer, body, job), request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        _check(body, served)
        job = chat_job(engine.front, body)
        return await _answer(engine, Chat(served, engine.front.tokenizer, body, job), request)

    return app


def run_server(
    model: LanguageModel,
    served: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    allow_remote: bool = False,
    ready: Callable[[str], Any] = lambda url: None,
) -> None:
    """Serve a model until Ctrl-C.

    Args:
        model: what is served.
        served: its name.
        host: where to listen; a loopback address unless `allow_remote`.
        port: 0 takes a free one.
        allow_remote: listen where other machines can reach it.
        ready: called with the address before the first request is taken.

    Raises:
        UserError: fastapi or uvicorn are not installed, or the host is not a loopback one.
        RunError: the address cannot be listened at.
    """
    check_host(host, allow_remote)
    _check_installed()
    listening = listen(host, port)
    app = build_app(model, served, None if allow_remote else (host, "localhost", "127.0.0.1", "::1", "[::1]"))
    serve_on(listening, app, lambda: ready(f"{address(listening, host)}/v1"), PATIENCE)


def check_host(host: str, allow_remote: bool) -> None:
    """Refuse an address that other machines can reach.

    Raises:
        UserError: it is not a loopback address, and that is not allowed.
    """
    if not is_loopback(host) and not allow_remote:
        raise UserError(
            f"'{host}' can be reached from other machines, and the server asks nobody for a key",
            "--host",
            "Take 127.0.0.1; or give --allow-remote if whoever reaches this machine may use the model.",
        )


def completion_job(model: LanguageModel, body: CompletionRequest) -> Job:
    """What a request for completions asks of the model.

    Raises:
        UserError: prompts that do not fit, seeds that are not one for each completion, or settings out of range.
    """
    given: Any = body.prompt
    listed = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    texts = [list(model.tokenizer(text).input_ids) if isinstance(text, str) else text for text in listed]
    room = 16 if body.max_tokens is None else body.max_tokens
    if not room and not body.echo:
        raise UserError("must be at least 1 without echo", "max_tokens")
    prompts = _prompts(model, texts, body, room)
    return Job(
        prompts=prompts,
        sampling=_sampling(body, room) if room else None,
        top=body.logprobs,
        processed=body.logprobs_mode == "processed",
        echo=bool(body.echo),
    )


def chat_job(model: LanguageModel, body: ChatRequest) -> Job:
    """What a request for an answer to messages asks of the model.

    Raises:
        UserError: the model has no chat template, it refuses the messages, or they do not fit.
    """
    text = Encoder(model).prompt([_plain(message) for message in body.messages])
    room = body.max_completion_tokens or body.max_tokens
    if room is None:
        room = ROOM if model.context_length is None else max(1, model.context_length - len(text))
    top = (body.top_logprobs or 0) if body.logprobs else None
    return Job(_prompts(model, [text], body, room), _sampling(body, room), top, body.logprobs_mode == "processed")


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one text, of the parts of text it may come in."""
    content = message.get("content")
    if not isinstance(message.get("role"), str):
        raise UserError("every message needs a role", "messages")
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise UserError("only text is served", "messages")
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise UserError("every message needs a text", "messages")
    return message | {"content": content}


def _prompts(model: LanguageModel, texts: Sequence[Sequence[int]], body: Options, room: int) -> Prompts:
    n, seed = body.n or 1, body.seed
    start = seed if isinstance(seed, int) else secrets.randbits(62)
    prompts = Prompts.of(model, texts, n, room, seed=start, step=0, data_index=None)
    if not isinstance(seed, list):
        return prompts
    if len(seed) != len(prompts.row):
        raise UserError(f"{len(seed)} numbers for {len(prompts.row)} completions", "seed", "Give one, or one for each.")
    return replace(prompts, row=torch.tensor(seed, device=prompts.row.device))


def _sampling(body: Options, room: int) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    top_k = body.top_k if body.top_k and body.top_k > 0 else None
    return Sampling(temperature, top_k, body.top_p, body.min_p, room, body.stops)


def _check(body: Options, served: str) -> None:
    if body.model not in (None, served):
        raise UnknownModel(f"the model '{body.model}' is not served here; it is '{served}'", "model")
    body.check()


async def _answer(engine: Engine, answer: Answer, request: Any) -> Any:
    from starlette.responses import JSONResponse, StreamingResponse

    if answer.request.stream:
        return StreamingResponse(_stream(engine, answer), media_type="text/event-stream")
    whole = asyncio.create_task(_whole(engine, answer))
    try:
        while not (await asyncio.wait({whole}, timeout=PATIENCE))[0]:
            if await request.is_disconnected():  # nobody waits, and others do
                return JSONResponse(_body("the client has gone", 499), 499)
        return JSONResponse(whole.result())
    finally:
        whole.cancel()


async def _whole(engine: Engine, answer: Answer) -> dict[str, Any]:
    async with aclosing(pieces(engine, answer.job, answer.request)) as written:
        return answer.whole([piece async for piece in written])


async def _stream(engine: Engine, answer: Answer) -> AsyncGenerator[str, None]:
    try:
        async with aclosing(pieces(engine, answer.job, answer.request)) as written:
            async for piece in written:
                if piece.text or piece.finish or answer.shows_tokens:
                    yield _event(answer.chunk(piece))
                else:
                    answer.count(piece)
        if answer.request.usage_at_the_end:
            yield _event(answer.last())
    except Exception as error:
        yield _event(_problem(error)[1])
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _errors(app: Any) -> None:
    """Every error as OpenAI writes them."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    async def any_error(request: Any, error: Exception) -> Any:
        if isinstance(error, HTTPException):
            return JSONResponse(_body(str(error.detail), error.status_code), error.status_code)
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
            status = 400 if first["type"] == "json_invalid" else 422
            return JSONResponse(_body(f"{where}: {first['msg']}", status, where), status)
        status, body = _problem(error)
        return JSONResponse(body, status)

    for kind in (HTTPException, RequestValidationError, KeelError, Exception):
        app.add_exception_handler(kind, any_error)


def _problem(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and content of what went wrong while a request was served."""
    if isinstance(error, UnknownModel):
        return 404, _body(str(error), 404, "model", "model_not_found")
    if isinstance(error, UserError):
        return 400, _body(str(error), 400, getattr(error, "where", None))
    if is_out_of_memory(error):
        return 503, _body("memory ran out; ask for fewer or shorter completions", 503)
    print(f"keel: {type(error).__name__}: {error}", file=sys.stderr)
    return 500, _body("the server failed; its terminal says why", 500)


def _body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", "serve", "pip install 'keel-rl[serve]'") from error
