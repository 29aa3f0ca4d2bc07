"""One cell of the evidence: a recipe trains the base of a task for a fixed number of steps, and is measured."""

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from benchmarks.page import processor
from keel.core.choice import counter_seed
from keel.models.language import LanguageModel
from keel.models.load import checksum, frozen_copy, load
from keel.recipes.registry import recipe_named
from keel.tasks.load import load_task
from keel.tasks.task import Task
from keel.train.configuration import Configuration, Request, resolve
from keel.train.measure import assessed, draw
from keel.train.online import prepare, run
from keel.train.session import Session, build_session, reward_functions
from keel.train.setup import model_source

BASE = "base"  # in place of a recipe: the model before training
VALUES = {"pass@1": 4, "pass@16": 4, "maj@32": 4, "entropy": 4, "kl": 5, "length": 3, "reward": 4, "gold": 4}
CURVES = (
    "reward",
    "entropy",
    "kl",
    "completions/mean_length",
    "approx_kl",
    "frac_reward_zero_std",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "grad_norm",
    "rollout/ess",
)
POINTS = 12  # of a curve; each is the mean of the steps around it


@dataclass(frozen=True)
class Cell:
    """What is trained and measured; two equal cells give the same numbers on one machine.

    Args:
        recipe: its name, or `base`.
        task: its name.
        seed: of the order of the prompts and of all completions.
        arguments: of the recipe, where they are not its defaults.
        settings: dotted, of the loop and of the evaluation.
    """

    recipe: str
    task: str
    seed: int
    arguments: tuple[tuple[str, Any], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """For people.

        >>> Cell("grpo", "countdown", 1, (("beta", 0.1),)).label
        'grpo(beta=0.1) on countdown, seed 1'
        """
        given = ", ".join(f"{name}={value}" for name, value in self.arguments)
        return f"{self.recipe}{f'({given})' if given else ''} on {self.task}, seed {self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "recipe": self.recipe,
            "task": self.task,
            "seed": self.seed,
            "arguments": dict(self.arguments),
            "settings": dict(self.settings),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Cell":
        """The inverse of `to_json`."""
        pairs = (tuple(sorted((k, _frozen(v)) for k, v in data[name].items())) for name in ("arguments", "settings"))
        return Cell(data["recipe"], data["task"], data["seed"], *pairs)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


# -- what a cell is made of ------------------------------------------------------------------------------------------


@cache
def task_named(name: str) -> Task:
    """The task, loaded once a process."""
    return load_task(name)


@cache
def base_of(name: str) -> LanguageModel:
    """The base of a task, frozen: the reference of all measurements."""
    return frozen_copy(load(model_source(None, task_named(name)), device="cpu"))


@cache
def checksum_of(name: str) -> str:
    """Of the weights of a task's base."""
    return checksum(base_of(name).module)


def configured(cell: Cell) -> Configuration:
    """The complete configuration of a cell.

    Recipes that take one completion a prompt draw as many completions a batch as the others, of as many prompts.
    """
    known = recipe_named(cell.recipe)
    settings = dict(cell.settings)
    group = known.arguments.get("num_generations")
    if group is not None:
        size = settings.pop("rollout.num_generations")
        if group.default == 1:
            settings["rollout.num_prompts"] *= size
        else:
            settings.setdefault("num_generations", size)
    if known().rollout is None:
        count = settings.pop("rollout.num_prompts") * settings.pop("rollout.num_generations", 1)
        settings["train.batch_size"] = count
    request = Request(cell.recipe, {**settings, **dict(cell.arguments)}, task=cell.task, seed=cell.seed)
    return resolve(request, task_named(cell.task))


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train and measure.

    Returns:
        `numbers`, which are the same again on the same machine; `times`, which are not.
    """
    task = task_named(cell.task)
    base = base_of(cell.task)
    begun = time.process_time(), time.monotonic()
    if cell.recipe == BASE:
        config = configured(replace(cell, recipe="grpo"))
        session = build_session(config, task, base)
        numbers: dict[str, Any] = {}
        steps = 0
    else:
        config = configured(cell)
        policy = load(model_source(None, task), device="cpu")
        session = build_session(config, task, policy)
        numbers = {"probe_before": probe(session)}
        run(session)
        steps = config.train.max_steps
        numbers |= {"curves": curves(session.metrics), "probe_after": probe(session), **totals(session)}
    trained = time.process_time(), time.monotonic()
    try:
        numbers |= measured(session, base)
    finally:
        session.close()
    done = time.process_time(), time.monotonic()
    per_step = [m["step_time"] for m in session.metrics]
    times = {
        "train_cpu": round(trained[0] - begun[0], 3),
        "cpu": round(done[0] - begun[0], 3),
        "seconds": round(done[1] - begun[1], 3),
        "step": round(float(np.median(per_step)), 5) if per_step else None,
        "step_cpu": round((trained[0] - begun[0]) / steps, 5) if steps else None,
    }
    return {"numbers": numbers, "times": times, "machine": machine()}


def machine() -> dict[str, str]:
    """On what the numbers are the same again."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.machine()}
    return {**versions, "processor": processor()}


# -- what is measured ------------------------------------------------------------------------------------------------


def measured(session: Session, base: LanguageModel) -> dict[str, Any]:
    """On held-out prompts: one number for each prompt and measure, and a few over all samples."""
    config, task = session.config, session.task
    rewards = session.rewards or reward_functions(config.task, task, None)
    rollout = config.method.rollout
    length = task.max_completion_length if rollout is None else rollout.max_completion_length
    seed = counter_seed(config.seed, "evaluate")
    samples = draw(
        session.policy,
        task,
        rewards,
        config.evaluate,
        encoder=session.encoder,
        max_completion_length=length,
        seed=seed,
        reference=base,
        max_tokens=session.engine.max_tokens,
        hidden=session.hidden,
    )
    found = assessed(samples, config.evaluate, seed).values
    known = {name: np.asarray(found[name]) for name in VALUES if name in found}
    known["length"] = np.asarray(found["completions/mean_length"])
    assert samples.kl is not None
    known["kl"] = np.nanmean(samples.kl * samples.lengths, 1)  # of a completion, in nats
    for name in list(session.hidden)[:1]:
        known["gold"] = np.nanmean(samples.rewards[name], 1)
    right = (samples.reward if samples.verdict is None else samples.verdict) > config.evaluate.threshold
    lengths = {
        "length_right": _mean(samples.lengths[right]),
        "length_wrong": _mean(samples.lengths[~right]),
        "clipped": _mean(samples.clipped),
        "length_against_pass": _correlation(known["length"], known["pass@1"]),
    }
    values = {name: [round(float(x), VALUES[name]) for x in known[name]] for name in VALUES if name in known}
    return {"values": values, "means": {k: round(float(np.mean(v)), 5) for k, v in values.items()}, **lengths}


def probe(session: Session) -> dict[str, float]:
    """A batch as training would draw it now, looked at and given up: what the method makes of it."""
    if session.method.kind != "online":
        return {}
    session.begin_step()
    rows = prepare(session).rows
    session.give_up_step()
    rows = rows.select(rows.main)
    assert rows.reward is not None
    reward = rows.reward.nansum(1)
    out = {"reward": float(reward.mean())}
    logp = rows.logp.get("behaviour")
    if rows.advantage is not None:
        advantage = rows.advantage if rows.advantage.ndim == 2 else rows.advantage.sum(-1)
        size = torch.where(rows.mask, advantage, 0.0).abs().sum(1)
        groups = rows.group.unique()
        out["zero_groups"] = float(np.mean([not bool(size[rows.group == g].any()) for g in groups]))
        mean = torch.where(rows.mask, advantage, 0.0).sum(1) / rows.mask.sum(1).clamp_min(1)
        right = reward > session.config.evaluate.threshold
        out["right_punished"] = float((mean[right] < 0).double().mean()) if bool(right.any()) else 0.0
        if logp is not None:
            a, b = advantage[rows.mask].double(), logp[rows.mask].double()
            out["covariance"] = float(((a - a.mean()) * (b - b.mean())).mean())
    if logp is not None:
        p = logp[rows.mask].exp()
        out["rare_share"] = float(((p >= 0.01) & (p <= 0.1)).double().mean())
    return {name: float(f"{value:.6g}") for name, value in out.items()}


def curves(metrics: list[dict[str, float]]) -> dict[str, list[float]]:
    """Curves of the run in few points, each the mean of its stretch of steps."""
    out = {}
    for name in CURVES:
        known = [m[name] for m in metrics if name in m]
        if known:
            out[name] = [float(f"{np.mean(part):.5g}") for part in np.array_split(known, min(POINTS, len(known)))]
    return out


def totals(session: Session) -> dict[str, float]:
    """Sums and extremes over the run."""
    metrics = session.metrics
    entropy = [m["entropy"] for m in metrics if "entropy" in m]
    out = {
        "steps": len(metrics),
        "tokens": session.position.tokens,
        "prompts": session.position.drawn,
        "skipped": sum(m.get("updates/skipped", 0.0) for m in metrics),
    }
    if entropy:
        changes = np.abs(np.diff(entropy)) if len(entropy) > 1 else np.zeros(1)
        out |= {
            "entropy_start": entropy[0],
            "entropy_end": float(np.mean(entropy[-5:])),
            "entropy_min": min(entropy),
            "entropy_max": max(entropy),
            "entropy_spread": float(np.std(entropy)),
            "entropy_change": float(np.std(np.diff(entropy))) if len(entropy) > 1 else 0.0,
            "entropy_jump": float(changes.max()),
        }
    return {name: float(f"{value:.6g}") for name, value in out.items()}


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean()), 4) if values.size else None


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return round(float(np.corrcoef(one, other)[0, 1]), 4)
