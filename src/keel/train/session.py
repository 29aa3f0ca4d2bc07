"""Everything that a run holds while it runs."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError, UserError
from keel.core.policy import PolicyModel
from keel.method import Method, States
from keel.models.heads import follow
from keel.models.language import LanguageModel
from keel.models.sources import SourceModel, build_all
from keel.parts.rewards.functions import check_columns
from keel.parts.rewards.named import guarded, of_models, reward_name
from keel.parts.rewards.turns import ENVIRONMENT, environment_reward
from keel.rollouts.choose import choose_generator
from keel.rollouts.episodes import COLUMNS
from keel.rollouts.sampling import Generator
from keel.statistics.engine import Engine
from keel.store.store import Store
from keel.tasks.environment import InteractiveTask
from keel.tasks.preferences import Preferences
from keel.tasks.task import RewardFunction, Task, hidden_rewards
from keel.train.configuration import Configuration
from keel.train.encode import Encoder
from keel.train.episodes import check_episodes
from keel.train.optimiser import Optimiser
from keel.train.pairwise import judge_of
from keel.train.precomputed import Precomputed, check_precomputed
from keel.train.settings import TaskSettings, TrainSettings, micro_batch_tokens
from keel.train.strategies import check_strategy
from keel.train.watch import Watch

Reporter = Callable[[str, Mapping[str, Any]], None]
# Verifiers of Keel's own that cannot hang run in the process itself.
TRUSTED = ("countdown", "sparse", "saturated", "proxy")
GOLD = "gold"  # the task's own reward, where a model's score takes its place


def silent(event: str, facts: Mapping[str, Any]) -> None:
    """A reporter that says nothing."""


@dataclass
class Position:
    """Where a run stands; it is in the checkpoint.

    Args:
        step: batches done.
        drawn: prompts drawn, those of dropped groups included.
        tokens: completion tokens generated or read.
        skipped: updates in a row that were skipped as non-finite.
        seconds: time spent in earlier processes.
    """

    step: int = 0
    drawn: int = 0
    tokens: int = 0
    skipped: int = 0
    seconds: float = 0.0


@dataclass
class Session:
    """A run's parts, built once; `method` changes when controllers set values."""

    config: Configuration
    method: Method
    task: Task
    policy: LanguageModel
    encoder: Encoder
    generator: Generator
    rewards: dict[str, RewardFunction]
    hidden: dict[str, RewardFunction]  # measured and recorded, never part of a loss
    sources: dict[str, SourceModel]
    heads: dict[str, nn.Module]
    engine: Engine
    optimiser: Optimiser
    states: States
    controller_states: dict[str, Any]
    judge: RewardFunction | None = None  # of pairs of completions, where a part of the method asks one
    preferences: Preferences | None = None  # what is compared, for methods that learn from comparisons
    precomputed: Precomputed | None = None  # what models that do not move say of the data
    store: Store | None = None
    run_id: int | None = None
    path: Path | None = None
    report: Reporter = silent
    position: Position = field(default_factory=Position)
    metrics: list[dict[str, float]] = field(default_factory=list)
    stopping: Callable[[], bool] = lambda: False
    measure: Callable[[str], Any] | None = None  # evaluates on held-out prompts, in a phase of that name
    trackers: list[Callable[[Mapping[str, float], int], None]] = field(default_factory=list)
    watch: Watch | None = None  # the diagnosis while the run goes on
    order: tuple[int, list[int]] | None = None  # the order of the examples in the current pass
    told: set[str] = field(default_factory=set)  # warnings that are given once
    begun: tuple[Position, dict[str, Any]] | None = None  # what the step in progress may have changed before its update

    @property
    def several_updates(self) -> bool:
        """Whether a batch is used for more than one optimiser step."""
        train = self.config.train
        return train.num_minibatches * train.num_iterations > 1

    def begin_step(self) -> None:
        """Note where the run stands, so that a step can be given up before its update."""
        self.begun = replace(self.position), copy.deepcopy(self.controller_states)

    def give_up_step(self) -> None:
        """Go back to where the step in progress began, so that it is done again from its first prompt."""
        if self.begun is not None:
            self.position, self.controller_states = self.begun

    def close(self) -> None:
        """End the reward workers."""
        for function in (*self.rewards.values(), *self.hidden.values(), self.judge):
            close = getattr(function, "close", None)
            if close is not None:
                close()


def build_session(
    config: Configuration,
    task: Task,
    policy: LanguageModel,
    rewards: Mapping[str, Any] | None = None,
    initial: LanguageModel | None = None,
    preferences: Preferences | None = None,
) -> Session:
    """A session at step 0.

    Args:
        config: resolved.
        task: prompts and verifiers.
        policy: the model to train.
        rewards: functions by name, which replace the task's own.
        initial: the model before training, where `policy` is past that.
        preferences: for methods that learn from comparisons in a file.

    Raises:
        ConfigError: no reward function for an online method, or a setting that does not fit the model.
    """
    method, train = config.method, config.train
    rollout = method.rollout
    functions = _rewards(config, task, rewards) if method.kind == "online" else {}
    sources = build_all(method.models, policy, initial)
    heads = {name: spec.build(policy, counter_seed(config.seed, name)) for name, spec in method.heads.items()}
    follow(method.heads, heads, first=True)
    models: dict[str, PolicyModel] = {"policy": policy, **sources}
    engine = Engine(
        models,
        heads,
        temperature=1.0 if rollout is None else rollout.temperature,
        max_tokens=micro_batch_tokens(train, method.additive, policy.device.type == "cpu"),
        chunk_bytes=None if train.chunk_megabytes is None else int(train.chunk_megabytes * 2**20),
        dropout=train.dropout,
    )
    policy_parameters = {n: p for n, p in policy.module.named_parameters() if p.requires_grad}
    head_parameters = {
        f"{name}.{inner}": p for name, head in heads.items() for inner, p in head.named_parameters() if p.requires_grad
    }
    updates = train.max_steps * train.num_minibatches * train.num_iterations
    if train.precompute_reference:
        check_precomputed(method, sources)
    _check_context(config, policy)
    _check_warmup(train, heads)
    drawing = choose_generator(policy, train.generator)
    check_strategy(method, drawing)
    check_episodes(method, task)
    return Session(
        config=config,
        method=method,
        task=task,
        policy=policy,
        encoder=Encoder(policy, None if rollout is None else rollout.max_prompt_length, config.task.system_prompt),
        generator=drawing,
        rewards=functions,
        judge=None if (judge := judge_of(method)) is None else guarded(judge, config.task.reward_timeout),
        hidden=hidden_functions(config.task, task, functions),
        sources=sources,
        heads=heads,
        engine=engine,
        optimiser=Optimiser(policy_parameters, head_parameters, train, updates),
        states=method.initial_states(),
        controller_states={name: item.init() for name, item in method.controllers.items()},
        preferences=preferences,
    )


def reward_functions(
    settings: TaskSettings, task: Task, given: Mapping[str, Any] | None, method_rewards: Mapping[str, Any] | None = None
) -> dict[str, RewardFunction]:
    """The reward functions of a run, under their time limits: those given, those of the configuration, the method's own
    (its slot `rewards`), or the task's; none is not an error here. On a task of several turns the environment's reward
    comes before them.

    Raises:
        ConfigError: a function has the name of the environment's reward.
    """
    timeout = settings.reward_timeout
    stated = {reward_name(reward): reward for reward in settings.rewards}
    named = dict(given or {}) or stated or dict(method_rewards or {})
    if isinstance(task, InteractiveTask):
        beside = named or task.rewards
        if ENVIRONMENT in beside:
            raise ConfigError(f"'{ENVIRONMENT}' is the environment's own reward", "reward", "Give another name.")
        return {ENVIRONMENT: environment_reward} | {name: guarded(f, timeout) for name, f in beside.items()}
    if named:
        return {name: guarded(reward, timeout) for name, reward in named.items()}
    if task.rewards:
        trusted = task.name in TRUSTED
        return {n: f if trusted else guarded(f, timeout) for n, f in task.rewards.items()}
    if len(task.train) and "answer" in task.train[0].columns:
        return {"math_verify": guarded("keel.parts.rewards.functions:MathVerify", timeout)}
    return {}


def hidden_functions(settings: TaskSettings, task: Task, rewards: Mapping[str, Any]) -> dict[str, RewardFunction]:
    """The functions that are measured only, under their time limits: those of the configuration, or the task's.

    Where the reward is a model's score and nothing is named, the task's own rewards are: `gold`, or `gold_NAME` where
    there are several. So it is seen when the policy gains by the model and loses by what the model stands for.

    Raises:
        ConfigError: one has the name of a reward.
    """
    timeout = settings.reward_timeout
    named: Mapping[str, Any] = {reward_name(function): function for function in settings.hidden} or hidden_rewards(task)
    if not named and of_models(rewards):
        named = {GOLD if len(task.rewards) == 1 else f"{GOLD}_{name}": f for name, f in task.rewards.items()}
    for name in named:
        if name in rewards:
            raise ConfigError(f"'{name}' is a reward and hidden, too", "task.hidden", "Give one of them another name.")
    trusted = not settings.hidden and task.name in TRUSTED
    return {name: function if trusted else guarded(function, timeout) for name, function in named.items()}


def _rewards(config: Configuration, task: Task, given: Mapping[str, Any] | None) -> dict[str, RewardFunction]:
    functions = reward_functions(config.task, task, given, config.method.rewards)
    if not functions:
        raise ConfigError(
            "this method needs a reward, and the data have no column `answer` to verify",
            "reward",
            "Give --reward module:function, reward=callable in Python, or an `answer` column.",
        )
    columns = set(task.train[0].columns) if len(task.train) else set()
    columns |= set(COLUMNS) if isinstance(task, InteractiveTask) else set()
    for name, target in (given or {}).items():
        if callable(target):
            check_columns(name, target, columns)
    return functions


def _check_warmup(train: TrainSettings, heads: Mapping[str, nn.Module]) -> None:
    if heads and train.critic_warmup_steps >= train.max_steps:
        raise ConfigError(
            f"{train.critic_warmup_steps} batches for the heads alone leave none of {train.max_steps} for the policy",
            "train.critic_warmup_steps",
            "Lower it, or raise train.max_steps.",
        )


def _check_context(config: Configuration, policy: LanguageModel) -> None:
    rollout, limit = config.method.rollout, policy.context_length
    if rollout is None or limit is None:
        return
    if rollout.max_completion_length >= limit:
        raise UserError(
            f"{rollout.max_completion_length} leaves no room in the model's context of {limit} tokens",
            "rollout.max_completion_length",
            "Lower it.",
        )
