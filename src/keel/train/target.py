"""`keel.target`: which distribution do these settings ask for, from given numbers or from a model's own samples?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.core.errors import ConfigError
from keel.divergences.family import FDivergence, f_divergence
from keel.report.target import TargetReport
from keel.targets.outcomes import listed_outcomes, outcome_rows
from keel.targets.survey import Survey, Wish

BETA = 0.1


def target(
    outcomes: str | Path | Sequence[Mapping[str, Any]] | None = None,
    *,
    ref: Sequence[float] | None = None,
    reward: Any = None,
    names: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    beta: float | Sequence[float] | None = None,
    divergence: str | FDivergence | Sequence[str | FDivergence] = "kl_policy_ref",
    per_curvature: bool = False,
    kl_budget: float | Sequence[float] | None = None,
    best_of: float | Sequence[float] | None = None,
    moments: Mapping[str, float] | None = None,
    good_from: float | None = None,
    keep: float = 0.01,
    model: Any = None,
    task: Any = None,
    data: Any = None,
    tokenizer: Any = None,
    num_prompts: int = 8,
    num_generations: int = 64,
    count_completions: bool = False,
    seed: int = 0,
    device: str | None = None,
    report: Callable[[str, Mapping[str, Any]], None] | None = None,
    **settings: Any,
) -> TargetReport:
    """The distribution that settings ask for: what training would reach if nothing stood in its way.

    Args:
        outcomes: a JSON, JSONL or CSV file, or a list of dictionaries, with the columns `ref` (probability under the
            reference) or `log_ref`, `reward`, and optionally `name`, `mode` (outcomes that count as one answer) and
            `prompt` (several prompts in one file).
        ref, reward, names, modes: the columns of one prompt, in place of `outcomes`.
        beta: strengths of the penalty; 0.1 if nothing else is asked for.
        divergence: of the penalty; several give one target for each with each beta.
        per_curvature: divide beta by f''(1), so that all divergences are equally strong near the reference.
        kl_budget: the most reward for this KL(policy || ref) in nats, the mean over prompts.
        best_of: the best of so many draws.
        moments: means to reach, by name: `reward`, `good`, or a mode.
        good_from: the lowest reward of a good outcome; by default the highest reward there is.
        keep: share of the target from which an answer counts as surviving.
        model: in place of numbers: the reference, whose completions are sampled, merged where they are equal, and
            scored; `reward` is then what `keel.evaluate` takes.
        task, data, tokenizer, device: as in `keel.evaluate`.
        num_prompts, num_generations: held-out prompts, and completions of each.
        count_completions: count different completions, not different answers of the task.
        seed: of the completions.
        report: called with (event, facts).
        **settings: of `Sampling`, such as `temperature`; the reference is what is sampled.

    Raises:
        UserError: a mistake in what was asked for, or something that cannot be reached.
    """
    wishes = _wishes(beta, divergence, per_curvature, kl_budget, best_of, moments)
    left_out = 0
    if model is not None or task is not None or data is not None:
        if outcomes is not None or ref is not None:
            raise ConfigError("give either a model or the numbers, not both", "ref")
        from keel.train.session import silent  # late: numbers need no model
        from keel.train.target_samples import sampled_outcomes

        prompts, left_out = sampled_outcomes(
            model,
            task,
            data,
            reward,
            tokenizer,
            num_prompts=num_prompts,
            num_generations=num_generations,
            count_completions=count_completions,
            seed=seed,
            device=device,
            report=report or silent,
            settings=settings,
        )
    else:
        if settings:
            raise ConfigError("belongs to a model's samples", next(iter(settings)), "Give --model.")
        prompts = listed_outcomes(outcomes if outcomes is not None else outcome_rows(ref, reward, names, modes))
    survey = Survey(tuple(prompts), good_from, keep)
    try:
        found = tuple(survey.find(wish) for wish in wishes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return TargetReport(survey, found, 0 if prompts[0].samples is None else num_generations, left_out)


# -- what is asked for -----------------------------------------------------------------------------------------------


def _wishes(beta, divergence, per_curvature: bool, kl_budget, best_of, moments) -> list[Wish]:
    try:
        named = [divergence] if isinstance(divergence, (str, FDivergence)) else list(divergence)
        divergences = [f_divergence(name) for name in named]
        if per_curvature:
            divergences = [d.per_curvature() for d in divergences]
    except ValueError as error:
        raise ConfigError(str(error), "divergence") from None
    betas = _several(beta, "beta", lambda b: 0 < b < math.inf, "positive")
    budgets = _several(kl_budget, "kl_budget", lambda k: 0 <= k < math.inf, "0 or more")
    best = _several(best_of, "best_of", lambda n: n >= 1, "at least 1")
    if not (betas or budgets or best or moments):
        betas = [BETA]
    wishes = [Wish(d, beta=b) for d in divergences for b in betas]
    wishes += [Wish(kl_budget=k) for k in budgets] + [Wish(best_of=n) for n in best]
    return wishes + ([Wish(moments=dict(moments))] if moments else [])


def _several(values, where: str, fits, allowed: str) -> list[float]:
    listed = [] if values is None else list(values) if isinstance(values, (list, tuple)) else [values]
    for value in listed:
        if not fits(value):
            raise ConfigError(f"must be {allowed}, not {value:g}", where)
    return listed
