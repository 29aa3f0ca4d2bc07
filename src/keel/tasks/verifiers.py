"""Environments of the package `verifiers` as tasks."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from keel.core.errors import ConfigError
from keel.tasks.data import load_data
from keel.tasks.environment import Answer, Ended
from keel.tasks.task import Example, RewardFunction, Text, completion_text, final_answer
from keel.tasks.verifiers_stage import Asked, Finished, Message, Stage, message_of

_WHERE = "verifiers"
_VERSIONS = "0.4"
_INFINITE = 1000  # tasks taken of an environment that has no end
_AT_ONCE = 16  # completions that are judged side by side
_PLAYED_HERE = ("harness", "runtime", "max_turns")  # what Keel sets of the seat that the policy plays
_CUT = "[cut off]"  # what the model says after a limit of tokens; not empty, which a client may refuse
_TOOLS = """You may call tools. To call one, write
<tool_call>{{"name": "NAME", "arguments": {{...}}}}</tool_call>
What it gives comes back in <tool_response></tool_response>. Without a call, your message is your answer. The tools:
{tools}"""


def verifiers_task(
    env: Any,
    *,
    size: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    max_turns: int = 8,
    max_turn_length: int = 512,
    max_completion_length: int | None = None,
    chat: bool = True,
    timeout: float = 60.0,
    env_id: str = "",
    agents: Mapping[str, Any] | None = None,
    **taskset: Any,
) -> VerifiersTask:
    """An environment of `verifiers` as a task: of one turn where that is all it has, else of several.

    One turn are the plain tasksets (`SingleAgentEnv`) without tools: prompts and a reward. Everything else is an
    `InteractiveTask`. The programs of other makers that an environment may name for its agents (its harness) are
    replaced by a plain conversation with tools, which runs in this process, beside a box on this machine (`runtime`
    subprocess) for what the task itself prepares. The randomness within an environment is its own: Keel's seed decides
    only which tasks are held out.

    Args:
        env: the id of an installed taskset (`owner/name` and `name@version` are read as `verifiers` reads them), or an
            environment in memory.
        size: how many of its tasks are used, the first ones; None for all, or 1000 of an endless taskset.
        held_out: share of them that is set aside, in [0, 1).
        seed: which ones.
        max_turns: messages of the model in one episode; `verifiers` stops there, and scores.
        max_turn_length: in tokens.
        max_completion_length: in tokens, of an episode with all that it shows; by default one turn, or room for all
            turns and as much again for what the environment says.
        chat: whether prompts are messages; if not, they are the text of the messages.
        timeout: seconds for one answer of the environment, scoring included.
        env_id: which environment runs the taskset, where it is not the taskset's own.
        agents: settings of its agents by name; one with a `model` and a `client` of its own is not played by Keel.
        taskset: further keys of the taskset's configuration.

    Raises:
        ConfigError: `verifiers` is not installed, there is no such environment, or an option is wrong.
        DataError: too few tasks, or prompts that cannot be read.
    """
    _check(size, max_turns, max_turn_length)
    vf = _package()
    options = {"max_turns": max_turns}
    if isinstance(env, str):
        built = _by_id(vf, env, env_id, dict(agents or {}), taskset, options)
    else:
        if env_id or agents or taskset:
            given = ", ".join([*(["env_id"] if env_id else []), *(["agents"] if agents else []), *taskset])
            fix = "Set them on the environment itself."
            raise ConfigError(f"an environment in memory takes no {given}.", _WHERE, fix)
        built = _in_memory(vf, env, options)
    several = type(built) is not vf.SingleAgentEnv or _has_tools(built)
    kind = VerifiersTurns if several else VerifiersTask
    lengths = (max_turns, max_turn_length, max_completion_length)
    return kind(built, _policy_seat(vf, built), size, held_out, seed, lengths, chat, timeout)


class VerifiersTask:
    """An environment of `verifiers` in which the model speaks once; `verifiers_task` makes it.

    The reward of a completion is that of an episode in which the model says just that: the weighted sum of the task's
    rewards and judges, after its own preparation.

    Raises:
        ConfigError: a task without a prompt, or with one that is no text.
        DataError: too few tasks.
    """

    def __init__(
        self,
        env: Any,
        seat: str,
        size: int | None,
        held_out: float,
        seed: int,
        lengths: tuple[int, int, int | None],
        chat: bool,
        timeout: float,
    ):
        self.name = f"verifiers:{env.config.env_id}"
        self.env = env
        self._stage = Stage(env, seat, timeout)
        bounded = env.taskset if size is None and env.taskset.bounded else env.taskset.take(size or _INFINITE)
        self._tasks = list(bounded)
        if not self._tasks:
            raise ConfigError("the environment has no tasks.", self.name)
        self.prompts = [_prompt(task, self.name) for task in self._tasks]
        shown = self._shown()
        rows = [
            {"prompt": shown(prompt) if chat else _plain(shown(prompt)), "task": i}
            for i, prompt in enumerate(self.prompts)
        ]
        data = load_data(rows, held_out, seed, self.name)
        self.train: Sequence[Example] = data.train
        self.held_out: Sequence[Example] = data.held_out
        self.rewards: dict[str, RewardFunction] = {"reward": self.reward}
        self.preset: dict[str, Any] = {}
        self.max_completion_length = lengths[2] or lengths[1]
        self.characters: str | None = None

    def reward(
        self, prompts: Sequence[Text], completions: Sequence[Text], *, task: Sequence[int], **columns: Any
    ) -> list[float | None]:
        """Reward: what the environment gives for each completion.

        Raises:
            RuntimeError: an episode failed; the group of that completion is then left out.
        """
        texts = [completion_text(completion) for completion in completions]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._judged, task, texts))

    def solution(self, example: Example, seed: int) -> str | None:
        """None: `verifiers` knows no solutions."""
        return None

    def answer(self, completion: Text, example: Example) -> str | None:
        """What stands in the last `<answer>...</answer>`, or all of the completion; None if that is empty."""
        return final_answer(completion) or None

    def _judged(self, number: int, text: str) -> float | None:
        episode = self._stage.open(self._tasks[number])
        came = episode.begin()
        if isinstance(came, Asked):
            came = episode.reply(message_of(text, bool(came.tools), 0))
        if isinstance(came, Asked):
            episode.close()
            what = "the environment wants a second message, though it has neither tools nor turns"
            raise RuntimeError(f"{self.name}: {what}")
        return came.reward

    def _shown(self) -> Any:
        """How a prompt of the environment is shown to the model: as it is."""
        return lambda prompt: prompt


class VerifiersTurns(VerifiersTask):
    """An environment of `verifiers` with tools or turns; `verifiers_task` makes it.

    The tools of the first task are described in the system message of every prompt. A turn calls them as
    `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and reads `<tool_response>` in return, which is how the
    chat templates of Qwen write it. The reward comes with the last turn; an episode that is cut by a limit of tokens
    goes on with messages that say `[cut off]` until `verifiers` ends and scores it.
    """

    def __init__(
        self, env: Any, seat: str, size: Any, held_out: float, seed: int, lengths: Any, chat: bool, timeout: float
    ):
        super().__init__(env, seat, size, held_out, seed, lengths, chat, timeout)
        self.max_turns, self.max_turn_length = lengths[0], lengths[1]
        self.max_completion_length = lengths[2] or 2 * self.max_turns * self.max_turn_length
        self.turn_ends: tuple[str, ...] = ()
        self.rewards: dict[str, RewardFunction] = {}  # the environment's own comes with the last turn

    def environment(self, example: Example, seed: int) -> VerifiersEpisode:
        """An episode of its own; `seed` does not reach it, for `verifiers` has no place for one."""
        number = example.columns["task"]
        return VerifiersEpisode(self._stage.open(self._tasks[number]), self.prompts[number], self.max_turns)

    def demonstration(self, example: Example, seed: int) -> Sequence[tuple[str, bool]] | None:
        """None: `verifiers` knows no solutions."""
        return None

    def _shown(self) -> Any:
        """With the tools in the system message."""
        if not _has_tools(self.env):
            return super()._shown()
        episode = self._stage.open(self._tasks[0])
        came = episode.begin()
        episode.close()
        if not isinstance(came, Asked) or not came.tools:
            return super()._shown()
        told = _TOOLS.format(tools="\n".join(json.dumps(tool["function"]) for tool in came.tools))

        def shown(prompt: list[Message]) -> list[Message]:
            if prompt[0]["role"] != "system":
                return [{"role": "system", "content": told}, *prompt]
            return [{"role": "system", "content": f"{prompt[0]['content']}\n\n{told}"}, *prompt[1:]]

        return shown


class VerifiersEpisode:
    """An episode of `verifiers`, in the form of `Environment`.

    Args:
        episode: on its stage.
        prompt: what the conversation begins with.
        max_turns: after which `verifiers` ends it.
    """

    def __init__(self, episode: Any, prompt: list[Message], max_turns: int):
        self.episode, self.prompt, self.max_turns = episode, prompt, max_turns
        self.turns = 0
        self.asked: Asked | None = None
        self.finished: Finished | None = None

    def reset(self) -> str:
        """Begin; mostly nothing is said beyond the prompt.

        Raises:
            RuntimeError: the episode failed, or the environment begins with another prompt.
        """
        came = self.episode.begin()
        if not isinstance(came, Asked):
            raise RuntimeError("the episode was over before the model had spoken")
        self.asked = came
        return self._new(came, self.prompt)

    def step(self, text: str) -> Answer:
        """One message of the model, and what the environment says to it; the reward comes at the end.

        Raises:
            RuntimeError: the episode failed, or the conversation does not go on from where it was.
            TimeoutError: the environment takes too long.
        """
        assert self.asked is not None, "reset() comes first"
        message = message_of(text, bool(self.asked.tools), self.turns)
        before = [*self.asked.messages, message]
        self.turns += 1
        came = self.episode.reply(message)
        if isinstance(came, Finished):
            self.asked, self.finished = None, came
            return Answer(reward=came.reward, done=True, reason=came.reason)
        self.asked = came
        return Answer(self._new(came, before))

    def finish(self, ended: Ended) -> float:
        """The reward of an episode that a limit of tokens cuts: the model says `[cut off]` to all that is still asked.

        It is 0 where the environment cannot read that, or asks for more than its turns.

        Raises:
            TimeoutError: the environment takes too long.
        """
        while self.asked is not None and self.turns < self.max_turns:
            self.turns += 1
            try:
                came = self.episode.reply({"role": "assistant", "content": _CUT})
            except RuntimeError:  # of what Keel says here, not of anything that the model has said
                break
            self.asked, self.finished = (None, came) if isinstance(came, Finished) else (came, None)
        self.episode.close()
        return 0.0 if self.finished is None else self.finished.reward

    def _new(self, asked: Asked, before: list[Message]) -> str:
        """The text of the messages that came after those that the model knows."""
        known = [(message["role"], message.get("content") or "") for message in before]
        now = [(message["role"], message.get("content") or "") for message in asked.messages]
        if now[: len(known)] != known:
            what = "the environment has changed messages that the model has read already"
            raise RuntimeError(f"{what}; Keel plays conversations that only grow")
        return "\n\n".join(_said(message) for message in asked.messages[len(known) :])


# Finding


def _package() -> Any:
    """`verifiers.v1`, where it is installed."""
    if importlib.util.find_spec("verifiers") is None:
        raise ConfigError("the package `verifiers` is not installed.", _WHERE, 'Run: pip install "keel-rl[verifiers]"')
    try:
        import verifiers.v1 as vf
        from verifiers.v1 import ModelContext, env_config_type, load_environment  # noqa: F401
    except ImportError as error:
        import verifiers

        version = getattr(verifiers, "__version__", "of unknown version")
        fix = 'Run: pip install "keel-rl[verifiers]"'
        raise ConfigError(f"verifiers {version} lacks what {_VERSIONS} has: {error}.", _WHERE, fix) from error
    return vf


def _by_id(
    vf: Any, name: str, env_id: str, agents: dict[str, Any], taskset: dict[str, Any], options: dict[str, Any]
) -> Any:
    """The environment of an installed taskset, its policy's seat played by Keel."""
    from pydantic import ValidationError

    where = f"verifiers:{name}"
    try:
        kind = vf.env_config_type(name, env_id)
        vf.taskset_config_type(name)  # an environment without a taskset of that name would pass the line above
    except ModuleNotFoundError as error:
        fix = "Install its package first; it must be one for verifiers 0.4, not for the former `load_environment`."
        raise ConfigError(f"there is no environment of that name: {error}", where, fix) from error
    except (AttributeError, TypeError, ValueError) as error:
        fix = "An environment with only the former `load_environment` has to be ported to a Taskset."
        raise ConfigError(f"it is no taskset of verifiers {_VERSIONS}: {error}", where, fix) from error
    seats = [key for key, field in kind.model_fields.items() if isinstance(field.default, vf.AgentConfig)]
    for key in agents:
        if key not in seats:
            raise ConfigError(f"it has no agent {key!r}.", where, f"Its agents: {', '.join(seats)}.")
    data = {seat: {**_played(options), **agents.get(seat, {})} for seat in seats}
    try:
        config = kind.model_validate({"id": env_id, "taskset": {"id": name, **taskset}, **data})
        return vf.load_environment(config)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"its options do not fit: {wrong}.", where) from error
    except ImportError as error:
        raise ConfigError(f"cannot be imported: {error}", where) from error


def _in_memory(vf: Any, env: Any, options: dict[str, Any]) -> Any:
    """An environment like the one given, its policy's seat played by Keel."""
    if not isinstance(env, vf.Env):
        what = f"{type(env).__name__} is neither the id of an environment nor a verifiers.v1.Env."
        fix = "Environments of the former `load_environment` have to be ported." if hasattr(env, "rubric") else None
        raise ConfigError(what, _WHERE, fix)
    changes = {}
    for name, spec in env.config:
        if isinstance(spec, vf.AgentConfig) and not (spec.model and spec.client):
            mine = type(spec).model_validate(_played(options))
            changes[name] = spec.model_copy(update={key: getattr(mine, key) for key in _PLAYED_HERE})
    return type(env)(env.config.model_copy(update=changes))


def _played(options: dict[str, Any]) -> dict[str, Any]:
    """What is set of a seat: Keel's conversation as its program, and a box on this machine."""
    from keel.tasks.verifiers_harness import register

    return {"harness": {"id": register()}, "runtime": {"type": "subprocess"}, **options}


def _policy_seat(vf: Any, env: Any) -> str:
    """The one agent that has no model of its own."""
    seats = [n for n, spec in env.config if isinstance(spec, vf.AgentConfig) and not (spec.model and spec.client)]
    if len(seats) != 1:
        found = ", ".join(seats) or "none"
        fix = "Give the others a model and a client: task.options.agents={NAME: {model: ..., client: {base_url: ...}}}."
        raise ConfigError(f"Keel plays one agent, but without a model of their own are: {found}.", _WHERE, fix)
    return seats[0]


def _has_tools(env: Any) -> bool:
    taskset = env.taskset
    return bool(taskset.toolsets(taskset.config) or type(taskset).task_type().toolsets(taskset.config.task))


# Messages


def _prompt(task: Any, where: str) -> list[Message]:
    """What the conversation of a task begins with."""
    data = task.data
    messages = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    if isinstance(data.prompt, str):
        messages.append({"role": "user", "content": data.prompt})
    else:
        messages += [{"role": message.role, "content": message.content} for message in data.prompt or ()]
    if data.prompt is None or not all(isinstance(message["content"], str) for message in messages):
        what = "the user opens it" if data.prompt is None else "its prompt holds more than text"
        raise ConfigError(f"task {data.idx} cannot be played: {what}.", where)
    return messages


def _plain(messages: list[Message]) -> str:
    return "\n\n".join(message["content"] for message in messages)


def _said(message: Message) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):
        if any(part.get("type") != "text" for part in content):
            raise RuntimeError("the environment says something that is no text")
        content = "\n".join(part["text"] for part in content)
    return f"<tool_response>\n{content}\n</tool_response>" if message["role"] == "tool" else content


def _check(size: Any, max_turns: Any, max_turn_length: Any) -> None:
    for key, value in (("size", size), ("max_turns", max_turns), ("max_turn_length", max_turn_length)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and not (key == "size" and value is None):
            raise ConfigError(f"got {value!r}.", f"{_WHERE}, {key}", "It must be a whole number, 1 or more.")
