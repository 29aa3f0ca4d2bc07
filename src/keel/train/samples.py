"""`keel.sample`, `keel.frontier`, `keel.fit_value`: what the commands that draw call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, overload

from keel.core.config import build
from keel.core.errors import ConfigError, RewardError, nearest
from keel.core.rows import Stop
from keel.evaluate.cost import Curve
from keel.models.language import LanguageModel
from keel.rollouts.choose import choose_generator
from keel.rollouts.episodes import ENDED, REWARD, Limits, play
from keel.rollouts.sampling import Sampling
from keel.sampling.catalogue import accepts, settings_of
from keel.tasks.environment import InteractiveTask
from keel.tasks.task import Task, Text
from keel.train.configuration import TINY
from keel.train.draws import Account
from keel.train.encode import Encoder
from keel.train.frontier import Request, shared_options
from keel.train.frontier import frontier as run_frontier
from keel.train.sampling import Beside, opened
from keel.train.session import Reporter, silent
from keel.train.settings import TaskSettings
from keel.train.setup import open_model, open_task
from keel.train.values import Kind
from keel.train.values import fit_value as learn


@dataclass(frozen=True)
class Sample:
    """One completion.

    Args:
        prompt, text: as they are read.
        tokens: the completion's tokens, end token included.
        log_prob: of the completion under the distribution that was sampled, in nats.
        stop: why it ended: eos, stop_string or length; of an episode also turns or environment.
        reward: what the environment gave, where there is one; the text is then the whole transcript.
    """

    prompt: Text
    text: str
    tokens: tuple[int, ...]
    log_prob: float
    stop: str
    reward: float | None = None


@overload
def sample(
    model: Any, prompts: Sequence[Text] | Text | int, num_generations: int = 1, *, method: None = None, **settings: Any
) -> list[Sample]: ...


@overload
def sample(model: Any, prompts: Sequence[Text] | Text | int, *, method: str, **settings: Any) -> list[Account]: ...


def sample(
    model: Any,
    prompts: Sequence[Text] | Text | int,
    num_generations: int = 1,
    tokenizer: Any = None,
    seed: int = 0,
    task: str | Task | None = None,
    device: str | None = None,
    report: Reporter = silent,
    method: str | None = None,
    reward: Any = None,
    data: Any = None,
    value: Any = None,
    beside: Mapping[str, Beside] | None = None,
    step: str | None = None,
    engine: str | None = None,
    server: Any = None,
    top: int | None = None,
    **settings: Any,
) -> list[Sample] | list[Account]:
    """Completions of prompts: plain ones, or those of a sampler, with weights and what they cost.

    Args:
        model: as in `keel.evaluate`.
        prompts: texts, or lists of messages; with `method`, or on a task of several turns, a number takes so many
            held-out ones. A text that the task knows brings its columns along for the reward functions.
        num_generations: completions of each prompt, without `method`.
        tokenizer: of a model in memory.
        seed: of the completions.
        task: the task of the built-in model.
        device: None takes the best there is.
        report: called with (event, facts).
        method: a sampler (`keel samplers`).
        reward, data: as in `keel.evaluate`, for samplers.
        value, beside, step, engine, server, top: see `keel.train.sampling.opened`.
        **settings: of `Sampling`: temperature, top_k, top_p, min_p, max_completion_length, stop_strings; and of the
            sampler: num_particles, beta, resampling ...

    Returns:
        Samples; with `method` an `Account` for each prompt.

    Raises:
        UserError: a mistake in what was asked for.
    """
    if method is not None:
        plain, own = _split(settings, [method])
        listed = None if isinstance(prompts, int) else [prompts] if isinstance(prompts, str) else list(prompts)
        known = {"value": value, "beta": own.get("beta", 0.1), "beside": beside, "step": step, "sampling": plain}
        known |= {"engine": engine, "server": server, "top": top}
        with opened(
            model,
            task,
            data,
            reward,
            prompts=listed,
            tokenizer=tokenizer,
            seed=seed,
            device=device,
            report=report,
            **known,
        ) as (bench, examples):
            some = examples[:prompts] if isinstance(prompts, int) else examples
            return bench.run(method, own, some, seed)
    found = task if task is not None and not isinstance(task, str) else open_task(TaskSettings(name=task), None, seed)
    interactive = isinstance(found, InteractiveTask)
    if isinstance(prompts, int) and not interactive:
        what = "a number takes held-out prompts, which needs a method or a task of several turns"
        raise ConfigError(what, "prompts", "Give a prompt, or --method for held-out ones.")
    if task is not None or model == TINY:
        settings = {"max_completion_length": found.max_completion_length, **settings}
    sampling = build(Sampling, settings, "sampling")
    if interactive:
        _check_examples(found, prompts)
    policy = open_model(model, found, tokenizer, device, report)
    encoder = Encoder(policy)
    if isinstance(prompts, int):
        return _transcripts(policy, found, prompts, num_generations, sampling, encoder, seed)
    many: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = choose_generator(policy, "auto").generate(
        [encoder.prompt(prompt) for prompt in many], num_generations, sampling, seed=seed
    )
    out = []
    for i in range(len(rows)):
        tokens = rows.tokens[i][rows.mask[i]].tolist()
        log_prob = float(rows.logp["behaviour"][i][rows.mask[i]].sum())
        stop = Stop(int(rows.stop[i])).name.lower()
        out.append(Sample(many[int(rows.group[i])], encoder.decode(tokens), tuple(tokens), log_prob, stop))
    return out


def _check_examples(task: Task, prompts: Any) -> None:
    """Episodes need an example, for no environment can be opened for a prompt that was typed."""
    if not isinstance(prompts, int):
        raise ConfigError(
            f"the environments of '{task.name}' belong to its examples, and a prompt has none",
            "prompts",
            "Give the number of held-out examples to play (--num-prompts).",
        )


def _transcripts(
    policy: LanguageModel, task: Any, count: int, number: int, sampling: Sampling, encoder: Encoder, seed: int
) -> list[Sample]:
    """Episodes of held-out examples."""
    examples = [task.held_out[i] for i in range(min(count, len(task.held_out)))]
    limits = Limits.of(task, policy.context_length, max_completion_length=sampling.max_completion_length)
    index = [example.index for example in examples]
    drawn_by = choose_generator(policy, "auto")
    played = play(drawn_by, task, examples, number, sampling, limits, encoder, seed=seed, data_index=index)
    rows, out = played.rows.to("cpu"), []
    for i, earned in enumerate(played.columns[REWARD]):
        if isinstance(earned, str):
            raise RewardError(f"the environment failed: {earned}", task.name)
        text = encoder.decode(rows.tokens[i][rows.present[i]].tolist())
        tokens, log_prob = tuple(rows.tokens[i][rows.mask[i]].tolist()), float(rows.logp["behaviour"][i].sum())
        ended = played.columns[ENDED][i]
        out.append(Sample(examples[int(rows.group[i])].prompt, text, tokens, log_prob, ended, earned))
    return out


def frontier(
    model: Any,
    methods: Sequence[str | Request],
    sizes: Sequence[int] = (1, 4, 16),
    *,
    task: str | Task | None = None,
    data: Any = None,
    reward: Any = None,
    tokenizer: Any = None,
    seeds: int = 1,
    seed: int = 0,
    num_prompts: int = 128,
    threshold: float = 0.5,
    device: str | None = None,
    value: Any = None,
    beside: Mapping[str, Beside] | None = None,
    step: str | None = None,
    engine: str | None = None,
    server: Any = None,
    top: int | None = None,
    report: Reporter = silent,
    **settings: Any,
) -> list[Curve]:
    """Accuracy of samplers against tokens, on held-out prompts.

    Args:
        model, task, data, reward, tokenizer, device: as in `keel.evaluate`.
        methods: samplers by name, or requests with settings of their own.
        sizes: budgets of those given by name.
        seeds: runs of each.
        seed: decides all randomness.
        num_prompts: held-out prompts at most.
        threshold: an output is correct if its reward is above this.
        value, beside, step, engine, server, top: see `keel.train.sampling.opened`.
        report: called with (event, facts).
        **settings: of `Sampling`, and of the samplers; one that several have goes to all of them.

    Raises:
        UserError: a mistake in what was asked for.
    """
    names = [item if isinstance(item, str) else item.method for item in methods]
    plain, own = _split(settings, names)
    requests = [
        item if isinstance(item, Request) else Request(item, tuple(sizes), shared_options(item, own))
        for item in methods
    ]
    known = {"value": value, "beta": own.get("beta", 0.1), "beside": beside, "step": step, "sampling": plain}
    known |= {"engine": engine, "server": server, "top": top}
    with opened(model, task, data, reward, tokenizer=tokenizer, seed=seed, device=device, report=report, **known) as (
        bench,
        examples,
    ):
        some = examples[:num_prompts]
        return run_frontier(bench, some, requests, seeds=seeds, seed=seed, threshold=threshold, report=report)


def _split(settings: Mapping[str, Any], methods: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the prior, and those of samplers.

    Raises:
        ConfigError: one that neither has.
    """
    own = {key: value for key, value in settings.items() if any(accepts(name, key) for name in methods)}
    plain = {key: value for key, value in settings.items() if key not in own}
    known = [f.name for f in fields(Sampling)]
    of_samplers = dict.fromkeys(option for name in methods for option in settings_of(name))
    for key in plain:
        if key not in known:
            raise ConfigError(
                f"neither the sampler nor the sampling has this setting.{nearest(key, [*of_samplers, *known])}",
                key,
                f"Of the sampler: {', '.join(of_samplers)}; of the sampling: {', '.join(known)}.",
            )
    return plain, own


def fit_value(
    path: str | Path,
    model: Any = TINY,
    task: str | Task | None = None,
    data: Any = None,
    reward: Any = None,
    *,
    kind: Kind = "soft",
    beta: float = 0.1,
    num_prompts: int = 4096,
    num_generations: int = 8,
    own_body: bool = True,
    tokenizer: Any = None,
    seed: int = 0,
    device: str | None = None,
    report: Reporter = silent,
    **training: Any,
) -> dict[str, float]:
    """Learn the value of unfinished texts from a model's own samples and write it into a folder.

    Args:
        path: the folder, which must not exist.
        model, task, data, reward, tokenizer, device: as in `keel.evaluate`.
        kind: "soft" for beta log E[exp(r / beta)], "mean" for E[r].
        beta: of the soft value.
        num_prompts, num_generations: samples to learn from.
        own_body: train a copy of the model for it; otherwise a head on the model's own states.
        seed: decides all randomness.
        report: called with (event, facts).
        **training: see `keel.train.readers.train_body`.

    Returns:
        `explained`, the share of variance that it explains on prompts held out, and the `tokens` sampled.

    Raises:
        UserError: a mistake in what was asked for.
    """
    if Path(path).exists():
        raise ConfigError("exists already", str(path), "Choose another folder.")
    if kind not in ("soft", "mean"):
        raise ConfigError(f"must be soft or mean, not {kind!r}", "kind")
    with opened(model, task, data, reward, tokenizer=tokenizer, seed=seed, device=device, report=report) as (bench, _):
        seen = bench.seen(num_prompts, num_generations)
        value, facts = learn(
            seen,
            bench.policy,
            kind,
            beta,
            own_body=own_body,
            seed=bench.seed,
            report=report,
            **training,
        )
        facts = {**facts, "tokens": float(seen.tokens)}
        value.save(path, **facts)
    return facts
