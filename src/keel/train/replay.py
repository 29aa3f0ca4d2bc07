"""Rows that stand beside those of a batch: replayed groups, and rows to rehearse; and how their pools are kept.

    before the first step    `begin` makes the pool to rehearse
    prepare                  `beside` adds this batch's share of both
    observe                  `remember` counts uses, and takes the fresh groups in

A memory changes in `remember` alone, after the update, so that a step that is given up has changed nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError, DataError
from keel.core.rows import Rows, cat
from keel.parts.replay.memory import joined
from keel.parts.replay.rehearsal import Rehearsal
from keel.parts.replay.stored import Replay, size
from keel.parts.rewards.score import score
from keel.statistics.functionals import LogProb
from keel.tasks.data import load_data
from keel.tasks.environment import InteractiveTask
from keel.tasks.task import Example
from keel.train.draws import reply
from keel.train.encode import supervised_rows
from keel.train.session import Session


def beside(session: Session, rows: Rows) -> tuple[Rows, dict[str, Tensor], dict[str, float]]:
    """A scored batch with the rows that stand beside it; which groups of which memory were drawn; and metrics."""
    step, seed = session.position.step, session.config.seed
    parts, drawn = [rows], {}
    metrics: dict[str, float] = {}
    for path, item, memory in _slot(session):
        more = None
        if isinstance(item, Replay) and item.share > 0:
            fresh = len(rows.group[rows.main].unique())
            drawn[path] = groups = item.draw(memory, item.count(fresh, step), step, seed)
            more = item.rows_of(memory, groups)
            metrics |= {"replay/size": float(size(memory)), "replay/share": 0.0}
            if more is not None:
                metrics["replay/share"] = float(more.main.sum() / (more.main.sum() + rows.main.sum()))
                metrics["replay/lag"] = float(step - memory["version"][groups].double().mean())
        elif isinstance(item, Rehearsal):
            more = item.rows_of(memory, step, seed)
            metrics["rehearsal/rows"] = 0.0 if more is None else float(len(more))
        if more is not None:
            after = max(int(part.group.max()) for part in parts) + 1
            parts.append(more.to(rows.device).with_(group=more.group.to(rows.device) + after))
    return joined(parts), drawn, metrics


def remember(session: Session, fresh: Rows, drawn: dict[str, Tensor], metrics: dict[str, float]) -> None:
    """The memories after a batch, when its step is counted already.

    Args:
        fresh: its rows as they were scored.
        drawn: the groups that it has replayed, by memory.
    """
    for path, item, memory in _slot(session):
        if isinstance(item, Replay) and item.share > 0:
            session.states[path], dropped = item.after(memory, drawn[path], fresh, session.position.step - 1)
            metrics["replay/dropped"] = float(dropped)


def left(session: Session) -> set[int]:
    """Indices of the examples that have left the prompts to train on."""
    return {index for _, _, memory in _slot(session) for index in memory.get("left", ())}


def begin(session: Session) -> None:
    """Make the pool to rehearse, unless there is one; nothing is kept of one that is broken off."""
    for path, item, memory in _slot(session):
        if not isinstance(item, Rehearsal) or memory["made"]:
            continue
        if item.source == "samples":
            made = _sampled_pool(session, item)
        else:
            made = item.made(_given_pool(session, item))
        if made is not None:
            session.states[path] = made


def _slot(session: Session) -> list[tuple[str, Any, dict[str, Any]]]:
    found = session.method.replay.items()
    return [(f"replay.{name}", item, session.states[f"replay.{name}"]) for name, item in found]


# -- the pool --------------------------------------------------------------------------------------------------------


def _sampled_pool(session: Session, item: Rehearsal) -> dict[str, Any] | None:
    """Correct completions of the policy as it is, with their log-probabilities; None when the run is told to stop."""
    rollout, train = session.method.rollout, session.task.train
    assert rollout is not None
    if isinstance(session.task, InteractiveTask):
        what = "samples to rehearse are single completions, and this task is played in turns"
        raise ConfigError(what, "replay", "Take source solutions or data.")
    places = item.looked_at(len(train), session.config.seed)
    session.report("phase", {"name": "rehearsal", "steps": len(places), "text": "samples to rehearse"})
    numbers = _numbers([train[i] for i in places])
    found: list[Rows] = []
    solved: list[int] = []
    for start in range(0, len(places), rollout.num_prompts):
        if session.stopping():
            return None
        examples = [train[i] for i in places[start : start + rollout.num_prompts]]
        rows = _sampled(session, item, examples)
        if len(rows):
            owners = [examples[g] for g in rows.group.tolist()]
            domain = torch.tensor([numbers[example.domain] for example in owners], device=rows.device)
            found.append(rows.with_(domain=domain))
            solved += [example.index for example in owners]
        session.report("progress", {"done": start + len(examples), "total": len(places)})
    if not found:
        what = f"no prompt of {len(places)} is solved in {item.solved:.0%} of {item.samples} samples"
        session.report("warning", {"text": f"{what}: there is nothing to rehearse"})
    start_of_training = {"steps": session.config.train.max_steps, "start": session.position.step}
    session.report("phase", {"name": "train", "text": session.config.name, **start_of_training})
    return item.made(cat(found) if found else None, solved)


def _sampled(session: Session, item: Rehearsal, examples: Sequence[Example]) -> Rows:
    """One correct row for each of these prompts that is solved; `group` says for which."""
    rollout, encoder = session.method.rollout, session.encoder
    assert rollout is not None
    rows = session.generator.generate(
        [encoder.prompt(example.prompt) for example in examples],
        item.samples,
        rollout.sampling,
        seed=counter_seed(session.config.seed, "rehearsal"),
        data_index=[example.index for example in examples],
    )
    session.position.tokens += int(rows.mask.sum())
    owners = [examples[g] for g in rows.group.tolist()]
    tokens = [row[mask].tolist() for row, mask in zip(rows.tokens.cpu(), rows.mask.cpu(), strict=True)]
    replies = [reply(encoder.decode(t), e) for t, e in zip(tokens, owners, strict=True)]
    names = dict.fromkeys(name for e in examples for name in e.columns)
    columns = {name: [e.columns.get(name) for e in owners] for name in names}
    scores = score(session.rewards, [e.prompt for e in owners], replies, tokens, columns, rows.group)
    total = torch.nansum(scores.values, 1)
    correct = ~scores.failed & ~scores.values.isnan().all(1) & (total >= item.threshold - 1e-6)
    rows = rows.select(item.chosen(correct.to(rows.device), rows.group)).to(session.policy.device)
    if not len(rows):
        return rows
    stored = session.engine.measure([LogProb()], rows)[LogProb()]  # the trainer's own numbers: u is 1 at first
    return rows.with_(logp={**rows.logp, "stored": stored})


def _given_pool(session: Session, item: Rehearsal) -> Rows:
    """Rows of given completions.

    Raises:
        DataError: there is none.
    """
    own = session.task
    task = load_data(item.path, held_out=0.0, name="rehearsal") if item.source == "data" else own
    places = item.looked_at(len(task.train), session.config.seed)
    examples = [task.train[i] for i in places]
    texts = [e.completion if e.completion is not None else task.solution(e, e.index) for e in examples]
    known = [(e, text) for e, text in zip(examples, texts, strict=True) if text is not None]
    if not known:
        raise DataError("has no completion to rehearse", task.name, "Give `prompt` and `completion`, or `messages`.")
    examples = [e for e, _ in known]
    limit = session.config.train.max_length or session.policy.context_length
    seed = counter_seed(session.config.seed, "rehearsal")
    rows, _ = supervised_rows(examples, [text for _, text in known], session.encoder, limit, seed, 0)
    numbers = _numbers(examples)
    return rows.with_(domain=torch.tensor([numbers[e.domain] for e in examples])).select(rows.mask.any(1))


def _numbers(examples: Sequence[Example]) -> dict[str, int]:
    """A number for each domain, in the order of their names."""
    return {name: i for i, name in enumerate(sorted({example.domain for example in examples}))}
