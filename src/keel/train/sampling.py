"""Behind `keel sample --method` and `keel eval --method`: what samplers need, opened once, and samplers run on it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import keel.rollouts.samplers  # noqa: F401 (they join the catalogue)
from keel.core.chain import Prefix, TokenChain, Value
from keel.core.chance import Choice
from keel.core.choice import counter_seed
from keel.core.errors import ConfigError
from keel.models.language import LanguageModel
from keel.parts.rewards.functions import RewardFunction as Scorer
from keel.rollouts.chain import LocalChain
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.sampling.catalogue import entry_named, sampler
from keel.sampling.joint import JointChain
from keel.sampling.values import MonteCarlo, log_odds
from keel.tasks.environment import InteractiveTask
from keel.tasks.task import Example, Task
from keel.train.draws import Account, TextReward, accounts, draw_particles
from keel.train.encode import Encoder
from keel.train.engines import Engine, open_engine
from keel.train.readers import BESIDE, Experience, experience
from keel.train.session import Reporter, reward_functions, silent
from keel.train.settings import TaskSettings
from keel.train.setup import named_rewards, open_model, open_task
from keel.train.values import LearnedValue, fit_joint, fit_restart_reader, fit_value

MAX_ROWS = 1024  # states at once
FITTED_PROMPTS, FITTED_SAMPLES = 4096, 8  # what predictions are learnt from, unless told otherwise
PROMPT = "{prompt}"


@dataclass(frozen=True)
class Beside:
    """A further model, or the same one under another prompt, for fusion, contrast and guidance.

    Args:
        model: as in `keel.evaluate`; None is the policy itself.
        prompt: what it is given; `{prompt}` stands for the prompt.
    """

    model: Any = None
    prompt: str = PROMPT


class TextValue:
    """A function of texts as a value of unfinished ones: a reward model, a process reward model, a heuristic.

    Args:
        function: `def value(prompts, completions, **columns) -> list[float]`, given beginnings of completions.
        examples, encoder: as in `TextReward`.
        beta: it gives the probability s of success, and the value is beta log(s / (1 - s)); None takes what it says.
    """

    def __init__(self, function: Scorer, examples: Sequence[Example], encoder: Encoder, beta: float | None = None):
        self.judge, self.beta = TextReward({"value": function}, examples, encoder), beta

    def __call__(self, chain: TokenChain, x: Prefix, rng: Choice) -> Float[Tensor, "B"]:
        index = (~x.done).nonzero(as_tuple=True)[0]
        chain.meter.add("scored", torch.where(x.done, 0, x.length), x.prompt)
        some = Prefix(*(getattr(x, name)[index] for name in ("tokens", "logp", "length", "stop", "prompt")))
        found = torch.zeros(len(x), dtype=torch.float64, device=x.length.device)
        said = self.judge(some)
        return found.index_copy(0, index, said if self.beta is None else self.beta * log_odds(said))


@dataclass
class Bench:
    """A policy with prompts, rewards and whatever samplers may need, opened once.

    Args:
        engine: the frozen policy, and what draws from it.
        task: what it is asked.
        functions: reward functions by name.
        sampling: of the prior.
        value: of unfinished texts: a callable, or a function of a chunk's examples that makes one.
        beside: further models by name.
        step: text that ends a step; None goes token by token.
        seed: of what is learnt.
        report: called with (event, facts).
    """

    engine: Engine
    task: Task
    functions: Mapping[str, Scorer]
    sampling: Sampling
    value: Value | Callable[[Sequence[Example]], Value] | None = None
    beside: Mapping[str, tuple[LanguageModel, str]] = field(default_factory=dict)
    step: str | None = None
    seed: int = 0
    report: Reporter = silent
    fitted: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.encoder = Encoder(self.engine.known)

    @property
    def policy(self) -> LanguageModel:
        """The policy, for what needs the model itself.

        Raises:
            ConfigError: it runs on a server.
        """
        if isinstance(self.engine.known, LanguageModel):
            return self.engine.known
        raise ConfigError(
            "predictions are learnt from the model itself, and a server shows its tokens only",
            "server",
            "Learn a value with `keel fit-value` from the same model, and give its folder.",
        )

    # -- what is learnt --------------------------------------------------------------------------------------------

    def seen(self, num_prompts: int = FITTED_PROMPTS, num_generations: int = FITTED_SAMPLES) -> Experience:
        """Samples of the policy on training prompts, drawn once."""
        if "seen" not in self.fitted:
            drawn_by = LocalGenerator(self.policy)
            some = [self.task.train[i] for i in range(min(num_prompts, len(self.task.train)))]
            self.report("phase", {"name": "samples", "steps": None, "text": f"sampling {len(some)} training prompts"})
            known: dict[str, Any] = {"encoder": self.encoder, "num_generations": num_generations, "seed": self.seed}
            self.fitted["seen"] = experience(drawn_by, some, self.functions, self.sampling, **known)
            self.report("done", {})
        return self.fitted["seen"]

    def learnt(self, what: str, beta: float) -> Any:
        """A value ("mean", "soft"), "restart" or "joint" prediction, learnt once from the policy's samples."""
        key = f"{what} {beta}" if what == "soft" else what
        if key not in self.fitted:
            known: dict[str, Any] = {"seed": self.seed, "report": self.report}
            found: Any
            if what == "restart":
                found, facts = fit_restart_reader(self.seen(), self.policy, **known)
            elif what == "joint":
                found, facts = fit_joint(self.seen(), self.policy, self._bins(), **known)
            else:
                kind: Any = what
                found, facts = fit_value(self.seen(), self.policy, kind, beta, **known)
            self.fitted[key] = found, {**facts, "tokens": float(self.seen().tokens)}
        return self.fitted[key][0]

    def _bins(self) -> Any:
        from keel.models.introspection import JointBins

        limit = self.sampling.max_completion_length
        edges = tuple(dict.fromkeys(round(limit * i / 8) for i in range(9)))
        levels = len(self.seen().reward.unique())
        return JointBins(min(max(levels, 2), 7), edges, 0)

    # -- samplers --------------------------------------------------------------------------------------------------

    def sampler(self, name: str, options: Mapping[str, Any]) -> Any:
        """A sampler with the predictions that it needs."""
        needs = entry_named(name).needs
        if needs in ("restart", "joint") and needs not in options:
            options = {**options, needs: self.learnt(needs, 0.0)}
        if needs == "models" and not self.beside:
            raise ConfigError("needs a further model or prompt", name, "Give --beside NAME=MODEL (see its settings).")
        made = sampler(name, options)
        if getattr(getattr(made, "kernel", None), "reads", ()) and not self.engine.is_local:
            raise ConfigError("compares all next tokens of several models, which must run here", name)
        return made

    def chain(self, examples: Sequence[Example], made: Any) -> Any:
        """The chain of some prompts, with what stands beside it."""
        ids = [self.encoder.prompt(example.prompt) for example in examples]
        index = [example.index for example in examples]
        main = self.engine.chain(ids, self.sampling, index, self.step)
        if not isinstance(main, TokenChain):
            return main
        others: dict[str, TokenChain] = {}
        for name in getattr(getattr(made, "kernel", None), "reads", ()):
            if name not in self.beside:
                raise ConfigError(f"reads '{name}', which is not there", "beside", f"Give --beside {name}=MODEL.")
            model, template = self.beside[name]
            encoder = Encoder(model)
            texts = [encoder.prompt(_filled(template, example)) for example in examples]
            others[name] = LocalChain(LocalGenerator(model), texts, self.sampling, data_index=index)
        for reader in _readers(self._value(examples), made):
            if (beside := reader.beside(main)) is not None:
                others[BESIDE] = beside
        return JointChain(main, others) if others else main

    def run(self, name: str, options: Mapping[str, Any], examples: Sequence[Example], seed: int) -> list[Account]:
        """Run a sampler on prompts, a chunk of them at a time, and account for each."""
        made = self.sampler(name, options)
        width = max(1, int(getattr(made, "num_particles", 1)) * _fan(made))
        out: list[Account] = []
        for some in _chunks(examples, max(1, MAX_ROWS // width)):
            chain, value = self.chain(some, made), self._value(some)
            found, seconds = draw_particles(
                chain, made, some, self.functions, encoder=self.encoder, seed=seed, value=value
            )
            out += accounts(found, some, self.encoder, seconds)
        return out

    def _value(self, examples: Sequence[Example]) -> Value | None:
        value = self.value
        return value.of(examples) if isinstance(value, _PerPrompt) else value  # type: ignore[return-value]


@dataclass(frozen=True)
class _PerPrompt:
    """A value that has to know the prompts of its chain."""

    of: Callable[[Sequence[Example]], Value]


def _readers(value: Any, made: Any) -> Iterator[Any]:
    """Models that have to read along: those of a value and of a sampler's predictions."""
    for item in (value, getattr(made, "joint", None)):
        reader = getattr(item, "reader", None)
        if reader is not None:
            yield reader


def _fan(made: Any) -> int:
    """Candidates for each state."""
    kernel = getattr(made, "kernel", None)
    fans = [getattr(made, "num_candidates", None), getattr(made, "k", None), getattr(kernel, "k", None)]
    return max([fan for fan in fans if isinstance(fan, int)], default=1)


def _chunks(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _filled(template: str, example: Example) -> Any:
    """The other prompt of an example."""
    if template == PROMPT:
        return example.prompt
    if not isinstance(example.prompt, str):
        raise ConfigError("another prompt can stand for texts only, not for messages", "beside")
    return template.replace(PROMPT, example.prompt)


# -- opening ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(
    model: Any,
    task: str | Task | None = None,
    data: Any = None,
    reward: Any = None,
    *,
    prompts: Sequence[Any] | None = None,
    tokenizer: Any = None,
    value: Any = None,
    beta: float = 0.1,
    beside: Mapping[str, Beside] | None = None,
    step: str | None = None,
    engine: str | None = None,
    server: Any = None,
    top: int | None = None,
    seed: int = 0,
    device: str | None = None,
    report: Reporter = silent,
    sampling: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Bench, list[Example]]]:
    """A bench and the prompts: those given, or the task's held-out ones; workers of rewards end with the block.

    Args:
        model, task, data, reward, tokenizer: as in `keel.evaluate`.
        prompts: in place of held-out ones; their reward functions get no columns.
        value: of unfinished texts: "fit" (or "fit:mean") learns one from the policy's samples, a folder written by
            `keel fit-value`, "monte_carlo:M", `module:function` of prompts and beginnings, or `odds:module:function`
            for a process reward model that gives probabilities; or a callable.
        beta: of the tilt, for values that depend on it.
        beside: further models by name.
        step: text that ends a step; None goes token by token.
        engine, server, top: what draws; see `keel.train.engines.open_engine`.
        sampling: of the prior.

    Raises:
        UserError: a mistake in what was asked for.
    """
    from keel.core.config import build

    if task is not None and data is not None:
        raise ConfigError("give either a task or data, not both", "data")
    given_task = task is not None and not isinstance(task, str)
    found: Any = task if given_task else open_task(TaskSettings(name=task), data, seed)
    if isinstance(found, InteractiveTask):
        what = f"samplers copy and weigh unfinished texts, and the environments of '{found.name}' cannot be copied"
        raise ConfigError(what, "task", "Sample or evaluate it without a method.")
    named, given = named_rewards(reward)
    functions = reward_functions(TaskSettings(name=found.name, rewards=named), found, given)
    if not functions:
        raise ConfigError("there is nothing to score completions with", "reward", "Give --reward MODULE:FUNCTION.")
    drawn_by = open_engine(model, found, tokenizer, device, name=engine, server=server, top=top, report=report)
    chosen = build(Sampling, {"max_completion_length": found.max_completion_length, **(sampling or {})}, "sampling")
    examples = _examples(found, prompts)
    bench = Bench(drawn_by, found, functions, chosen, step=step, seed=counter_seed(seed, "fit"), report=report)
    bench.beside = {
        name: (bench.policy if b.model is None else open_model(b.model, found, None, device, report), b.prompt)
        for name, b in (beside or {}).items()
    }
    try:
        bench.value = _open_value(value, bench, beta, device)
        yield bench, examples
    finally:
        for function in functions.values():
            if (close := getattr(function, "close", None)) is not None:
                close()


def _examples(task: Task, prompts: Sequence[Any] | None) -> list[Example]:
    if prompts is None:
        return [task.held_out[i] for i in range(len(task.held_out))]
    known = {example.prompt: example for example in _all_of(task) if isinstance(example.prompt, str)}
    return [
        Example(prompt, known[prompt].columns if isinstance(prompt, str) and prompt in known else {}, i)
        for i, prompt in enumerate(prompts)
    ]


def _all_of(task: Task) -> Iterator[Example]:
    """Held-out and training examples, by whose columns a prompt that was typed can be scored."""
    for part in (task.held_out, task.train):
        for i in range(len(part)):
            yield part[i]


def _open_value(value: Any, bench: Bench, beta: float, device: str | None) -> Any:
    if value is None or callable(value):
        return value
    kind, _, rest = str(value).partition(":")
    if kind == "fit":
        if rest not in ("", "mean", "soft"):
            raise ConfigError(f"must be fit, fit:mean or fit:soft (got {value!r})", "value")
        return bench.learnt(rest or "soft", beta)
    if kind == "monte_carlo":
        if not rest.isdigit() or int(rest) < 1:
            raise ConfigError(f"must be monte_carlo:M with M rollouts (got {value!r})", "value")
        return MonteCarlo(int(rest), beta)
    if Path(value).is_dir():
        return LearnedValue.load(value, device)
    if ":" not in str(value):
        raise ConfigError(
            f"there is no folder {value!r}", "value", "Give fit, monte_carlo:M, a folder, or MODULE:FUNCTION."
        )
    text = rest if kind == "odds" else str(value)
    function = reward_functions(TaskSettings(name=bench.task.name, rewards=(text,)), bench.task, {"value": text})

    def of(examples: Sequence[Example]) -> Value:
        return TextValue(next(iter(function.values())), examples, bench.encoder, beta if kind == "odds" else None)

    return _PerPrompt(of)
