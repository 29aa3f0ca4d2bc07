"""The strength of each training pair, by reward models that were trained on other pairs."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.choice import counter_seed, generator
from keel.core.errors import DataError
from keel.parts.rewards.strength import PreferenceStrength
from keel.recipes.registry import recipe_named
from keel.tasks.preferences import Preference
from keel.train.online import run
from keel.train.reward_model import score_preferences
from keel.train.session import Session, build_session


def measure_strengths(session: Session) -> None:
    """Fill the memory of every `PreferenceStrength` of a session that begins.

    Raises:
        DataError: the data are no pairs, or have fewer prompts than there are parts.
    """
    for path, item in session.method.parts():
        if isinstance(item, PreferenceStrength):
            session.states[path] = item.measured(*strengths(session, item))


def strengths(session: Session, part: PreferenceStrength) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Mean and deviation over the members of r(chosen) - r(rejected), by number of the training pair; NaN in between.

    Data that state margins keep theirs, with deviation 0.
    """
    assert session.preferences is not None
    pairs = list(session.preferences.train)
    if any(len(p.completions) != 2 or p.scores[0] == p.scores[1] for p in pairs):
        fix = "Give `prompt`, `chosen`, `rejected`."
        raise DataError("strengths are those of pairs", session.preferences.name, fix)
    size = 1 + max((p.index for p in pairs), default=-1)
    mean, spread = torch.full((size,), torch.nan), torch.full((size,), torch.nan)
    if any(p.margin for p in pairs):
        for p in pairs:
            mean[p.index], spread[p.index] = p.margin, 0.0
        return mean, spread
    fold = _folds(session, pairs, part.folds)
    for number in range(part.folds):
        inside = [p for p in pairs if fold[p.index] == number]
        outside = [p for p in pairs if fold[p.index] != number]
        members = [_member(session, part, outside, inside, number, m) for m in range(part.members)]
        place, found = torch.tensor([p.index for p in inside]), torch.stack(members)
        mean[place], spread[place] = found.mean(0), found.std(0, correction=0)
    return mean, spread


def _folds(session: Session, pairs: list[Preference], folds: int) -> dict[int, int]:
    """The part of each pair by its number: prompts are dealt out, so that no prompt is on both sides.

    Raises:
        DataError: fewer prompts than parts.
    """
    prompts = sorted({str(p.prompt) for p in pairs}, key=lambda text: (counter_seed(session.config.seed, text), text))
    if len(prompts) < folds:
        assert session.preferences is not None
        what = f"{len(prompts)} prompts do not fill {folds} parts, of which each is scored by models of the others"
        raise DataError(what, session.preferences.name, "Give more prompts, or fewer parts.")
    place = {text: i % folds for i, text in enumerate(prompts)}
    return {p.index: place[str(p.prompt)] for p in pairs}


def _member(
    session: Session, part: PreferenceStrength, outside: list[Preference], inside: list[Preference], fold: int, m: int
) -> Float[Tensor, "n"]:
    """r(chosen) - r(rejected) of the inner pairs, by a model trained on a resampling of the outer ones."""
    assert session.preferences is not None
    seed = counter_seed(session.config.seed, "strength", fold, m)
    drawn = torch.randint(len(outside), (len(outside),), generator=generator(seed, "resample")).tolist()
    train = session.config.train
    changed = {"max_steps": part.steps or train.max_steps, "trackers": (), "log_completions": 0}
    settings = train.model_copy(update=changed)
    config = replace(session.config, method=recipe_named("bradley_terry")(), train=settings, seed=seed)
    data = replace(session.preferences, train=[outside[i] for i in drawn], held_out=[])
    policy: Any = session.policy.copy()
    member = build_session(config, session.task, policy, preferences=data)
    text = f"strength of pairs: part {fold + 1} of {part.folds}, model {m + 1} of {part.members}"
    session.report("phase", {"name": "strength", "steps": settings.max_steps, "text": text})
    member.report = lambda event, facts: session.report(event, facts) if event == "step" else None
    member.stopping = session.stopping
    run(member)
    chosen, rejected, _ = score_preferences(member, inside)
    return (chosen - rejected).float()
