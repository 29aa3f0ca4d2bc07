"""Rows that are not drawn for a reward: from files, from a task's own solutions, or as a teacher wants them."""

import time
from dataclasses import replace

from keel.core.errors import DataError
from keel.core.rows import Rows
from keel.parts.replay.memory import joined
from keel.statistics.stats import Stats
from keel.tasks.environment import InteractiveTask
from keel.tasks.preferences import GOLD
from keel.tasks.task import Text, completion_text
from keel.train.batch import Batch, next_examples
from keel.train.degraded import with_degraded
from keel.train.distillation import taught_metrics, taught_rows
from keel.train.encode import Truncated, demonstration_rows, supervised_rows
from keel.train.episodes import demonstrations
from keel.train.gold import with_gold
from keel.train.mismatched import with_mismatched
from keel.train.phrases import with_phrases
from keel.train.preferences import preference_rows, report_cuts
from keel.train.session import Session
from keel.train.twins import twin_column, twin_rows


def given_batch(session: Session) -> Batch:
    """The next rows without rewards: preferences for methods that compare completions, drawn ones for a distillation
    with a rollout, given completions for all others.
    """
    if session.preferences is not None:
        return prepare_preferences(session)
    drawn = session.method.kind == "distillation" and session.method.rollout is not None
    return prepare_taught(session) if drawn else prepare_supervised(session)


def prepare_taught(session: Session) -> Batch:
    """The next completions of the policy, or of who writes for it, and in place of some those that are given."""
    rollout, position = session.method.rollout, session.position
    assert rollout is not None
    count = 0 if rollout.given is None else rollout.given.count(rollout.num_prompts, session.config.seed, position.step)
    parts = [prepare_supervised(session, count)] if count else []
    if count < rollout.num_prompts:
        begun = time.monotonic()
        examples = next_examples(session, rollout.num_prompts - count)
        rows = taught_rows(session, examples)
        shown = zip(rows.tokens.cpu(), rows.present.cpu(), strict=True)
        texts = [session.encoder.decode(row[present].tolist()) for row, present in shown]
        said = [(examples[i].prompt, text) for i, text in zip(rows.group.tolist(), texts, strict=True)]
        position.tokens += int(rows.mask.sum())
        if count:  # what the given rows lack cannot be compared
            rows = rows.with_(logp={}, group=rows.group + count)
        parts.append(Batch(rows, Stats(), {"time/rollout": time.monotonic() - begun}, said))
    rows = joined([part.rows.to(session.policy.device) for part in parts])
    metrics = {name: value for part in parts for name, value in part.metrics.items()}
    return Batch(rows, Stats(), metrics | taught_metrics(rows), [text for part in parts for text in part.texts])


def prepare_preferences(session: Session) -> Batch:
    """The next prompts with all completions that were compared."""
    assert session.preferences is not None
    train, position = session.config.train, session.position
    drawn = next_examples(session, train.batch_size, session.preferences.train)
    limit = train.max_length or session.policy.context_length
    known = (session.preferences.kind, session.encoder, limit, session.config.seed, position.step)
    rows, cut = preference_rows(drawn, *known)
    rows = with_phrases(rows, [drawn[i] for i in cut.kept], session.encoder)
    texts = [(drawn[i].prompt, completion_text(completion)) for i in cut.kept for completion in drawn[i].completions]
    if session.method.reads_gold:
        rows, cut_gold = with_gold(rows, [drawn[i] for i in cut.kept], *known[1:])
        texts += [(drawn[i].prompt, completion_text(drawn[i].columns[GOLD])) for i in cut.kept]
        cut = replace(cut, completions=cut.completions + cut_gold)
    batch = _given(session, rows, cut, texts)
    batch.metrics.update(report_cuts(session, cut, len(texts), limit))
    batch.rows = with_degraded(session, batch.rows, texts)
    return replace(batch, rows=with_mismatched(batch.rows, limit)) if session.method.reads_mismatched else batch


def prepare_supervised(session: Session, count: int | None = None) -> Batch:
    """The next rows of given completions; those of the task's own solutions where it can make them.

    Args:
        count: how many; None takes `train.batch_size`.
    """
    train, position = session.config.train, session.position
    examples = next_examples(session, count or train.batch_size)
    limit = train.max_length or session.policy.context_length
    if isinstance(session.task, InteractiveTask):
        shown = demonstrations(session.task, examples, position.drawn - len(examples))
        known = (session.task.turn_ends, limit, session.config.seed, position.step)
        rows, cut = demonstration_rows(examples, shown, session.encoder, *known)
        texts = [(e.prompt, "".join(text for text, _ in pieces)) for e, pieces in zip(examples, shown, strict=True)]
        return _given(session, rows, cut, texts)
    completions: list[Text] = []
    for i, example in enumerate(examples):
        text = example.completion if example.completion is not None else None
        if text is None:
            text = session.task.solution(example, position.drawn - len(examples) + i)
        if text is None:
            raise DataError(
                "has no completion to learn from",
                f"{session.task.name}, example {example.index}",
                "Give `prompt` and `completion`, or `messages` that end with the assistant's.",
            )
        completions.append(text)
    encoded = (session.encoder, limit, session.config.seed, position.step)
    if (column := twin_column(session.method)) is not None:
        rows, cut = twin_rows(examples, completions, column, *encoded)
    else:
        rows, cut = supervised_rows(examples, completions, *encoded)
    texts = [
        (e.prompt, c if isinstance(c, str) else str(c[-1]["content"]))
        for e, c in zip(examples, completions, strict=True)
    ]
    return _given(session, rows, cut, texts)


def _given(session: Session, rows: Rows, cut: Truncated, texts: list[tuple[Text, str]]) -> Batch:
    """A batch of rows that were not drawn."""
    if not bool(rows.mask.any()):
        raise DataError("no completion has a token to learn from", session.task.name, "Raise train.max_length.")
    session.position.tokens += int(rows.mask.sum())
    metrics = {
        "truncated/prompts": float(cut.prompts),
        "truncated/completions": float(cut.completions),
        "completions/mean_length": float(rows.lengths.float().mean()),
    }
    return Batch(rows, Stats(), metrics, texts)
