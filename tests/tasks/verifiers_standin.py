"""What Keel uses of `verifiers` 0.4, in small, so that the adapter is tested where the package is not installed.

It keeps the way that a message takes: an episode opens a rollout; the program posts to an interception server, which
counts turns, forwards to the client's endpoint, and records the reply; the rewards are computed when the rollout
closes. What is left out: boxes, judges, retries, tools in processes of their own. `calls` records what was asked for.
"""

import contextlib
import importlib
import importlib.machinery
import inspect
import sys
import types
from collections import Counter
from types import SimpleNamespace
from typing import Any

import httpx
from aiohttp import web
from pydantic import BaseModel, ConfigDict, model_validator

calls: Counter = Counter()
_TOOLSETS: dict[str, Any] = {}


class _Bound:
    bound: tuple = ()

    def __class_getitem__(cls, arguments):
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        return type(cls.__name__, (cls,), {"bound": arguments})


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaskData(BaseModel):
    idx: int | None = None
    prompt: Any = None
    system_prompt: str | None = None


class TaskConfig(_Config):
    pass


class TasksetConfig(_Config):
    id: str = ""
    task: TaskConfig = TaskConfig()


class HarnessConfig(_Config):
    id: str = "bash"
    tool_timeout: float = 600.0


class AgentConfig(_Config):
    harness: HarnessConfig | None = None
    runtime: dict = {"type": "prime"}
    model: str | None = None
    client: dict | None = None
    max_turns: int | None = None


class EnvConfig(_Config):
    id: str = ""
    taskset: Any = None

    @model_validator(mode="before")
    @classmethod
    def _narrow(cls, data):
        if isinstance(data, dict) and isinstance(data.get("taskset"), dict):
            given = data["taskset"]
            data = {**data, "taskset": taskset_config_type(given["id"]).model_validate(given)}
        return data

    @property
    def env_id(self):
        return self.taskset.id


class EvalClientConfig(_Config):
    base_url: str
    api_key_var: str


class ModelContext:
    def __init__(self, model, client):
        self.model, self.client = model, client


class State(BaseModel):
    pass


class ToolsetConfig(_Config):
    pass


class ProgramResult(SimpleNamespace):
    pass


def reward(fn=None, *, weight=1.0):
    def mark(function):
        function._vf_weight = weight
        return function

    return mark if fn is None else mark(fn)


def tool(function):
    function.is_tool = True
    return function


class Toolset(_Bound):
    TOOL_PREFIX = ""

    def __init__(self, config):
        self.config = config


class Task(_Bound):
    def __init__(self, data, config=None):
        self.data, self.config = data, config

    @classmethod
    def toolsets(cls, config):
        return []

    async def score(self, trace):
        for name, method in inspect.getmembers(self, inspect.ismethod):
            if hasattr(method, "_vf_weight"):
                known = {"task": self.data, "trace": trace}
                value = await method(**{k: known[k] for k in inspect.signature(method).parameters})
                trace.record_reward(name, value, method._vf_weight)


class Taskset(_Bound):
    INFINITE = False

    def __init__(self, config, limit=None):
        self.config, self.limit = config, limit

    @property
    def bounded(self):
        return not self.INFINITE or self.limit is not None

    def take(self, count):
        return type(self)(self.config, count)

    def __iter__(self):
        for idx, task in enumerate(self.load()):
            if idx == self.limit:
                return
            task.data = task.data.model_copy(update={"idx": idx})
            yield task

    @classmethod
    def task_type(cls):
        return cls.bound[0]

    @classmethod
    def toolsets(cls, config):
        return []


class Harness(_Bound):
    def __init__(self, config):
        self.config = config

    def resolve_prompt(self, data):
        return data.system_prompt, data.prompt


class Trace:
    def __init__(self, name):
        self.messages: list[dict] = []
        self.rewards: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.errors: list[Any] = []
        self.stop_condition = None
        self.num_turns = 0
        self.agent = SimpleNamespace(name=name)

    @property
    def last_reply(self):
        said = [m.get("content") or "" for m in self.messages if m["role"] == "assistant"]
        return said[-1].strip() if said else ""

    @property
    def reward(self):
        return sum(item.value * item.weight for item in self.rewards.values())

    def record_reward(self, name, value, weight=1.0):
        self.rewards[name] = SimpleNamespace(value=float(value), weight=weight)


class _Agent:
    """One seat: a program, its endpoint, and the rollouts that it plays."""

    def __init__(self, env, name, spec, context, traces):
        self.env, self.name, self.spec, self.context, self.traces = env, name, spec, context, traces
        self.harness = _exported(importlib.import_module(spec.harness.id), Harness)(spec.harness)

    @contextlib.asynccontextmanager
    async def _rollout(self, task):
        trace = Trace(self.name)
        secret = f"secret-{len(self.env.sessions)}"
        self.env.sessions[secret] = SimpleNamespace(trace=trace, context=self.context, limit=self.spec.max_turns)
        toolsets = [*task.toolsets(task.config), *self.env.taskset.toolsets(self.env.taskset.config)]
        urls = {item.TOOL_PREFIX: f"memory://{id(item)}" for item in toolsets}
        _TOOLSETS.update({f"memory://{id(item)}": item for item in toolsets})

        async def turn(message=None):
            data, before = task.data, trace.num_turns
            if message is not None:
                grown = [SimpleNamespace(**m) for m in trace.messages if m["role"] != "system"]
                update = {"prompt": [*grown, SimpleNamespace(role="user", content=message)]}
                data = data.model_copy(update=update)
            url = self.env.url
            await self.harness.launch(self.context, trace, None, f"{url}/v1", secret, urls, data, f"{url}/tool")
            return SimpleNamespace(terminated=trace.num_turns == before, last_reply=trace.last_reply)

        yield SimpleNamespace(trace=trace, turn=turn)
        trace.stop_condition = trace.stop_condition or "agent_completed"
        try:
            await task.score(trace)
        except Exception as error:
            trace.errors.append(SimpleNamespace(type=type(error).__name__, message=str(error)))
        self.traces.append(trace)

    async def run(self, task):
        async with self._rollout(task) as rollout:
            await rollout.turn()

    def interaction(self, task):
        return self._rollout(task)


class Env(_Bound):
    def __init__(self, config):
        self.config = config
        self.taskset = _exported(_module(config.taskset.id), Taskset)(config.taskset)
        self.sessions: dict[str, Any] = {}
        self.url = ""

    @contextlib.asynccontextmanager
    async def serving(self):
        calls["serving"] += 1
        application = web.Application()
        application.router.add_post("/v1/chat/completions", self._message)
        application.router.add_post("/tool", self._gate)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield
        await runner.cleanup()
        calls["closed"] += 1

    async def run_episode(self, task, context):
        calls["episodes"] += 1
        episode = SimpleNamespace(errors=[], traces=[], ok=False)
        specs = [(name, spec) for name, spec in self.config if isinstance(spec, AgentConfig)]
        agents = SimpleNamespace(**{n: _Agent(self, n, spec, context, episode.traces) for n, spec in specs})
        try:
            await self.run(task, agents)
        except Exception as error:
            episode.errors.append(SimpleNamespace(type=type(error).__name__, message=str(error)))
            return episode
        episode.ok = not any(trace.errors for trace in episode.traces)
        return episode

    async def _message(self, request):
        session = self.sessions[request.headers["Authorization"].removeprefix("Bearer ")]
        if session.limit is not None and session.trace.num_turns >= session.limit:
            session.trace.stop_condition = "max_turns"
            return web.json_response({"error": {"message": "rollout stopped: max_turns"}}, status=400)
        body = {**await request.json(), "model": session.context.model}
        async with httpx.AsyncClient(timeout=None) as client:
            reply = await client.post(f"{session.context.client.base_url}/chat/completions", json=body)
        if reply.status_code == 200:
            session.trace.messages = [*body["messages"], reply.json()["choices"][0]["message"]]
            session.trace.num_turns += 1
        return web.json_response(reply.json(), status=reply.status_code)

    async def _gate(self, request):
        calls["gate"] += 1
        body = await request.json()
        if body["arguments"].get("number") != 13:
            return web.json_response({"action": "allow"})
        denied = {"role": "tool", "tool_call_id": body["tool_call_id"], "name": body["name"], "content": "denied"}
        return web.json_response({"action": "deny", "message": denied})


class SingleAgentEnvConfig(EnvConfig):
    agent: AgentConfig = AgentConfig()


class SingleAgentEnv(Env):
    bound = (SingleAgentEnvConfig,)

    async def run(self, task, agents):
        await agents.agent.run(task)


def _module(name):
    return importlib.import_module(name.replace("-", "_"))


def _exported(module, base):
    if not hasattr(module, "__all__"):
        raise AttributeError(f"module {module.__name__!r} defines no `__all__`")
    found = [vars(module)[n] for n in module.__all__ if isinstance(vars(module)[n], type)]
    found = [cls for cls in found if issubclass(cls, base)]
    if not found:
        raise TypeError(f"module {module.__name__!r} exports no {base.__name__}")
    return found[0]


def _environment(name):
    try:
        return _exported(_module(name), Env)
    except (TypeError, AttributeError, ModuleNotFoundError):
        return SingleAgentEnv


def env_config_type(taskset_id, env_id=""):
    return _environment(env_id or taskset_id).bound[0]


def taskset_config_type(taskset_id):
    return _exported(_module(taskset_id), Taskset).bound[1]


def load_environment(config):
    return _environment(config.id or config.taskset.id)(config)


def message_to_wire(message):
    return dict(vars(message))


async def connect_mcp(config, stack):
    tools, dispatch = [], {}
    for name, spec in config["mcpServers"].items():
        toolset = _TOOLSETS[spec["url"]]
        for method_name, method in inspect.getmembers(toolset, inspect.ismethod):
            if hasattr(method, "is_tool"):
                full = f"{name}_{method_name}"
                described = {"name": full, "description": inspect.getdoc(method), "parameters": {"type": "object"}}
                tools.append({"type": "function", "function": described})
                dispatch[full] = method
    return tools, dispatch, {}


async def call_mcp(servers, dispatch, name, arguments):
    return dispatch[name](**arguments)


def modules() -> dict[str, types.ModuleType]:
    """The stand-in under the names that the package has."""
    here = sys.modules[__name__]
    calls.clear()
    built: dict[str, types.ModuleType] = {}
    for name in ("verifiers", "v1", "v1.dialects", "v1.dialects.chat", "v1.harness", "v1.harnesses",
                 "v1.harnesses.utils", "v1.harnesses.utils.mcp", "v1.runtimes"):  # fmt: skip
        full = name if name == "verifiers" else f"verifiers.{name}"
        module = types.ModuleType(full)
        module.__spec__ = importlib.machinery.ModuleSpec(full, None)
        module.__path__ = []  # a package, so that the names below it are looked up
        if full != "verifiers":
            vars(module).update({key: value for key, value in vars(here).items() if not key.startswith("_")})
        built[full] = module
    built["verifiers"].v1 = built["verifiers.v1"]
    built["verifiers"].__version__ = "stand-in"
    return built
