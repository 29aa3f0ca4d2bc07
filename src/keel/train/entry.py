"""`keel.train`, `keel.evaluate`, `keel.export`: what the commands call."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError, RunError
from keel.evaluate.evaluation import Evaluation
from keel.evaluate.support import Classes
from keel.method import Method
from keel.models.language import LanguageModel
from keel.models.load import load, merged, save
from keel.tasks.task import Task
from keel.train.encode import Encoder
from keel.train.episodes import evaluation_limits
from keel.train.lifecycle import Run, execute
from keel.train.measure import measure_against, measure_policy
from keel.train.progress import default_reporter
from keel.train.session import Reporter, hidden_functions, reward_functions, silent
from keel.train.settings import EvaluateSettings, TaskSettings, parse
from keel.train.setup import named_rewards, open_model, open_task, prepare_setup, run_checkpoint


def train(
    recipe: str | Method,
    model: Any = None,
    tokenizer: Any = None,
    task: str | Task | None = None,
    data: Any = None,
    reward: Callable | str | Mapping[str, Any] | Sequence[Any] | None = None,
    seed: int | None = None,
    name: str | None = None,
    resume: bool = False,
    runs: str | Path = "runs",
    config: str | Path | Mapping[str, Any] | None = None,
    report: Reporter | None = None,
    teacher: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train a model by a recipe or a method, and measure it before and after.

    Args:
        recipe: a name (`keel methods` lists them), or a `Method`.
        model: `tiny` (the default), a folder, a run's folder (its newest checkpoint), a hub name, or a transformers
            model, which is trained in place.
        tokenizer: of a model in memory.
        task: a built-in task, a reasoning-gym data set, or an object with the attributes of `keel.tasks.task.Task`.
        data: in place of a task: a path, a list of dictionaries, or a `datasets.Dataset`, with a column `prompt` (text
            or messages) or `messages`; other columns reach the reward function. For methods that compare completions
            pairs, labels, lists or ratings (`load_preferences`), or several paths with their weights, {path: weight}.
        reward: `def reward(prompts, completions, completion_ids, **columns) -> list[float | None]`, as a callable, as
            `module:function` (then in a process of its own), several in a list or by name.
        seed: decides all randomness; 0 if neither it nor the configuration says otherwise.
        name: of the run, and of its folder in `runs`; the recipe's by default.
        resume: continue the run of that name from its last checkpoint.
        runs: folder of all runs.
        config: a configuration file, or its contents.
        report: called with (event, facts) while the run goes on; by default a progress bar where there is a terminal.
        teacher: what a distillation learns from, in place of the method's own `models.teacher`: `tiny`, a folder, a
            run's folder, or a hub name.
        **settings: arguments of the recipe (`beta=0.04`), training settings (`max_steps=200`), and dotted paths
            (`**{"rollout.num_prompts": 8}`).

    Returns:
        The run: `run.model`, `run.tokenizer`, `run.metrics`, `run.summary`, `run.path`.

    Raises:
        UserError: a mistake in what was asked for, named with what would be right.
        TrainingError: training could not go on.
    """
    report = default_reporter() if report is None else report
    setup = prepare_setup(
        recipe,
        model,
        tokenizer,
        task,
        data,
        reward,
        seed=seed,
        name=name,
        config=config,
        settings=settings,
        teacher=teacher,
        report=report,
    )
    return execute(setup, Path(runs), resume=resume, report=report)


def evaluate(
    model: Any,
    task: str | Task | None = None,
    data: Any = None,
    reward: Any = None,
    tokenizer: Any = None,
    seed: int = 0,
    reference: Any = None,
    support: Classes | None = "answer",
    device: str | None = None,
    report: Reporter = silent,
    **settings: Any,
) -> Evaluation:
    """Measure a model on held-out prompts: avg@k, pass@k, maj@k, entropy and lengths.

    Against a reference also the KL, and which of its correct answers the model keeps, gains and loses
    (`evaluation.support`), which takes two samplings of the reference.

    Args:
        model: `tiny`, a folder (a run's too), a hub name, or a model in memory.
        task, data, reward: as in `keel.train`.
        tokenizer: of a model in memory.
        seed: of the completions.
        reference: another model, for the KL and the support.
        support: what counts as one answer, its canonical form ("answer") or each text ("completion"); None leaves the
            support out.
        device: None takes the best there is.
        report: called with (event, facts).
        **settings: of the section `evaluate`, such as `num_prompts=64`.

    Raises:
        UserError: a mistake in what was asked for.
    """
    chosen = parse(EvaluateSettings, settings, "evaluate")
    if task is not None and data is not None:
        raise ConfigError("give either a task or data, not both", "data")
    if support not in (None, *get_args(Classes)):
        raise ConfigError(f"must be one of {', '.join(get_args(Classes))}, or None (got {support!r})", "support")
    task_settings = TaskSettings(name=task if isinstance(task, str) else None)
    opened = task if task is not None and not isinstance(task, str) else open_task(task_settings, data, seed)
    named, given = named_rewards(reward)
    functions = reward_functions(TaskSettings(name=opened.name, rewards=named), opened, given)
    if not functions:
        raise ConfigError(
            "there is nothing to score completions with", "reward", "Give reward=, or an `answer` column."
        )
    policy = open_model(model, opened, tokenizer, device, report)
    other = None if reference is None else open_model(reference, opened, None, device, report)
    hidden = hidden_functions(TaskSettings(name=opened.name), opened, functions)
    length = chosen.max_completion_length or opened.max_completion_length
    known: dict[str, Any] = {
        "hidden": hidden,
        "limits": evaluation_limits(opened, None, policy.context_length, length),
        "encoder": Encoder(policy),
        "max_completion_length": length,
        "seed": counter_seed(seed if chosen.draw_seed is None else chosen.draw_seed, "evaluate"),
        "progress": lambda done, total: report("progress", {"done": done, "total": total}),
    }
    try:
        if other is not None and support is not None:
            return measure_against(policy, other, opened, functions, chosen, classes=support, **known)
        return measure_policy(policy, opened, functions, chosen, reference=other, **known)
    finally:
        for function in (*functions.values(), *hidden.values()):
            if (close := getattr(function, "close", None)) is not None:
                close()


def export(run_path: str | Path, target: str | Path) -> Path:
    """Write the final model of a run, adapters merged, so that transformers loads it.

    Raises:
        RunError: no such run, no checkpoint, or the target exists.
    """
    path, target = Path(run_path), Path(target)
    if not path.is_dir():
        raise RunError("there is no such run", str(path), "`keel runs` lists them.")
    if target.exists():
        raise RunError("exists already", str(target), "Choose another folder.")
    model = load(run_checkpoint(path) or path, device="cpu")
    plain = LanguageModel(merged(model), model.tokenizer)
    save(plain, target)
    return target
