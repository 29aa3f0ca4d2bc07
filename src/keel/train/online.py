"""The loop, from prompts to weights, to be read from top to bottom.

    prepare, once a batch:   prompts -> rollout -> rows -> rewards, until enough groups -> frozen statistics
                             -> transforms -> advantages
    update, one or more:     live statistics -> masks -> weights -> loss -> gradient of the statistics -> backward
                             -> step
    observe, once a batch:   parts with memory, controllers and moving models read what happened

Data from files enters after the rollout: its rows come from `given_batch` (given.py), all else is the same code.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from keel.core.aggregate import Groups
from keel.core.choice import generator
from keel.core.errors import TrainingError
from keel.core.rows import Rows, Stream, cat
from keel.models.heads import follow
from keel.models.load import frozen_copy, is_out_of_memory, out_of_memory
from keel.parts.rewards.score import Scores, score
from keel.parts.rewards.transforms import summed
from keel.parts.terms.surrogate import CISPO
from keel.rollouts.episodes import Played
from keel.statistics.functionals import Entropy, Functional, LogProb
from keel.statistics.stats import Stats
from keel.tasks.task import Example, Text
from keel.train.ahead import ahead
from keel.train.batch import Batch, next_examples
from keel.train.checkpoint import keep_batch, save_checkpoint
from keel.train.given import given_batch
from keel.train.going_back import check_rounds, go_back
from keel.train.limits import budget_spent, is_over, overshoot
from keel.train.observe import (
    HIDDEN,
    batch_metrics,
    rollout_metrics,
    sampled_log_probs,
    stored_rollouts,
    update_metrics,
)
from keel.train.pairwise import with_judgements
from keel.train.precomputed import frozen_statistics, precompute
from keel.train.preview import step_within
from keel.train.references import with_references
from keel.train.replay import begin, beside, remember
from keel.train.session import Session
from keel.train.strategies import Judge, distinct, draw_rows, tokens_drawn
from keel.train.symptoms import ratio_metrics
from keel.train.watch import Watch

PATIENCE = 3  # skipped updates in a row that end a run
UNREWARDED, FEWER = "unrewarded", "fewer updates"  # what is told once


def run(session: Session) -> None:
    """Train until a limit is reached, from wherever the session stands; checkpoints and metrics are written on the way.

    Raises:
        TrainingError: three updates in a row were non-finite, or no rollout gave a usable group.
    """
    train = session.config.train
    started = time.monotonic() - session.position.seconds
    begin(session)
    check_rounds(session)
    precompute(session)
    while not is_over(session) and not session.stopping():
        begun = time.monotonic()
        session.begin_step()
        session.optimiser.spent = budget_spent(session)
        control(session)
        batch = prepare(session)
        metrics = batch.metrics | update(session, batch)
        session.position.step += 1
        observe(session, batch, metrics)
        metrics["step_time"] = time.monotonic() - begun
        session.position.seconds = time.monotonic() - started
        record(session, batch, metrics)
        unfinished, done = not is_over(session), time.monotonic()
        if unfinished and session.measure is not None and due(session.position.step, train.eval_steps):
            session.measure("during")
        if unfinished and session.path is not None and due(session.position.step, train.save_steps):
            save_checkpoint(session)
        started += time.monotonic() - done  # measuring and saving are no training
    if (text := overshoot(session)) is not None:
        session.report("note", {"text": text})


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens now."""
    return bool(every) and step % every == 0


# -- prepare ---------------------------------------------------------------------------------------------------------


def prepare(session: Session) -> Batch:
    """Rows with advantages, and the frozen statistics."""
    online = session.method.kind == "online"
    batch = rollout_batch(session) if online else given_batch(session)
    fresh = batch.rows.to(session.policy.device)
    rows, replayed, more = beside(session, fresh)
    frozen = frozen_statistics(session, rows)
    rows = session.method.prepare(rows, frozen, session.states)
    _keep_old_weights(session)
    return Batch(rows, frozen, batch.metrics | more, batch.texts, fresh=fresh, replayed=replayed)


def rollout_batch(session: Session) -> Batch:
    """Groups of scored completions: prompts are drawn until there are enough, or `max_rounds` are over."""
    rollout, train = session.method.rollout, session.config.train
    assert rollout is not None
    found: list[Rows] = []
    texts: list[tuple[Text, str]] = []
    metrics: dict[str, float] = {}
    groups = rounds = used = 0  # `used` counts the groups of candidates, too
    while groups < rollout.num_prompts and rounds < train.max_rounds:
        rounds += 1
        examples = next_examples(session, rollout.num_prompts - groups)
        rows, said, failed, round_metrics = score_round(session, examples, rounds)
        metrics = {name: metrics.get(name, 0.0) + value for name, value in round_metrics.items()}
        keep = ~failed
        if train.dynamic_sampling:
            keep &= ~tied_rows(rows, session.method.transforms)
        if bool((keep & rows.main).any()):
            kept = rows.select(keep)
            ids, place = kept.group.unique(return_inverse=True)
            found.append(kept.with_(group=place + used))
            texts += [said[i] for i in keep.nonzero().flatten().tolist()]
            groups, used = groups + len(kept.group[kept.main].unique()), used + len(ids)
        if not train.dynamic_sampling and not bool(failed.any()):
            break
    if not found:
        raise TrainingError(
            f"no usable group in {rounds} rounds",
            "rollout",
            f"In every group {'all rewards were tied, or ' if train.dynamic_sampling else ''}"
            "a reward function, judge or environment failed; see rewards/NAME/errors and the warnings.",
        )
    rows = cat(found).trim()
    if groups < rollout.num_prompts:
        session.report(
            "warning", {"text": f"step {session.position.step}: {groups} of {rollout.num_prompts} groups are usable"}
        )
    session.position.tokens += tokens_drawn(rows)
    metrics["rounds"] = float(rounds)
    return Batch(rows, Stats(), metrics | rollout_metrics(rows, session.rewards, session.method.transforms), texts)


def score_round(
    session: Session, examples: list[Example], rounds: int
) -> tuple[Rows, list[tuple[Text, str]], Tensor, dict]:
    """One rollout with its rewards; rows of groups whose reward function failed are marked."""
    encoder = session.encoder
    step = session.position.step * session.config.train.max_rounds + rounds - 1
    begun = time.monotonic()
    rows, judge = draw_rows(session, examples, step, distinct([example.index for example in examples]))
    judged = 0.0 if judge is None else judge.seconds
    spent = time.monotonic() - begun - judged
    owners = [examples[i % len(examples)] for i in rows.group.tolist()]  # groups of candidates follow all others
    tokens = [row[mask].tolist() for row, mask in zip(rows.tokens.cpu(), rows.mask.cpu(), strict=True)]
    shown = zip(rows.tokens.cpu(), rows.present.cpu(), strict=True)  # with what an environment said
    texts = [encoder.decode(row[present].tolist()) for row, present in shown]
    replies: list[Text] = [
        text if isinstance(e.prompt, str) else [{"role": "assistant", "content": text}]
        for text, e in zip(texts, owners, strict=True)
    ]
    columns = {
        key: [e.columns.get(key) for e in owners] for key in dict.fromkeys(k for e in examples for k in e.columns)
    }
    if isinstance(judge, Played):
        replies, columns = judge.replies, columns | judge.columns
    begun = time.monotonic()
    if not isinstance(judge, Judge):
        scores = score(session.rewards, [e.prompt for e in owners], replies, tokens, columns, rows.group)
    else:
        scores = judge.scores(rows.group.tolist(), tokens)
    metrics = {"time/rollout": spent, "time/reward": judged + time.monotonic() - begun}
    for name, errors in scores.errors.items():
        metrics[f"rewards/{name}/errors"] = float(errors)
        if errors:
            reason, count = "; ".join(scores.messages.get(name, [])[:1]), f"{errors} group{'s' * (errors != 1)}"
            which = "are" if errors != 1 else "is"
            text = f"reward '{name}' failed for {count}, which {which} left out: {reason}"
            session.report("warning", {"text": text})
    _check_scored(session, scores)
    own = torch.tensor([example.index for example in owners], device=rows.device)
    values = scores.values.to(rows.device)
    named = {f"rewards/{name}": values[:, k] for k, name in enumerate(scores.names)}
    rows = rows.with_(reward=values, data_index=own, columns={**rows.columns, **named})
    rows, unjudged, said_of = with_judgements(session, rows, [e.prompt for e in owners], replies, tokens, columns)
    metrics |= said_of
    rows = with_references(session, rows, examples)
    if session.hidden:  # scored after the rewards, and kept where no part looks
        found = score(session.hidden, [e.prompt for e in owners], replies, tokens, columns, rows.group)
        measured = {f"{HIDDEN}{name}": found.values[:, k].to(rows.device) for k, name in enumerate(found.names)}
        rows = rows.with_(columns={**rows.columns, **measured})
        metrics |= {f"{HIDDEN}{name}/errors": float(errors) for name, errors in found.errors.items()}
    said: list[tuple[Text, str]] = [(e.prompt, text) for e, text in zip(owners, texts, strict=True)]
    return rows, said, scores.failed.to(rows.device) | unjudged, metrics


def _check_scored(session: Session, scores: Scores) -> None:
    """A completion that no function has a reward for teaches nothing, and would look like one with reward 0.

    Raises:
        TrainingError: there is no other in the batch.
    """
    without = scores.values.isnan().all(1) & ~scores.failed if scores.names else scores.failed & False
    if not bool(without.any()):
        return
    what = f"{', '.join(scores.names)} returned None or NaN"
    if bool((without | scores.failed).all()):
        fix = "Return a number for each completion that it is for, or add a reward that applies to these prompts."
        raise TrainingError(f"no completion of this batch has a reward: {what} for all of them", "rewards", fix)
    if UNREWARDED not in session.told:
        session.told.add(UNREWARDED)
        text = f"{int(without.sum())} of {len(without)} completions have no reward, and are not learnt from: {what}"
        session.report("warning", {"text": f"{text} (said once)"})


def tied_rows(rows: Rows, transforms: Mapping[str, Any]) -> Tensor:
    """Rows of groups whose main rows have the same reward, so far as they have any; not those without a main row."""
    assert rows.reward is not None
    total = summed(rows, transforms)
    groups = Groups.of(rows, ~rows.reward.isnan().all(1))
    return groups.broadcast(groups.tied(total) & (groups.sum(rows.weight * rows.main) > 0))


# -- update ----------------------------------------------------------------------------------------------------------


def update(session: Session, batch: Batch) -> dict[str, float]:
    """All optimiser steps on a batch; the metrics are those of the first, and gradient norms averaged over all."""
    train, method = session.config.train, session.method
    first: dict[str, float] = {}
    norms: list[float] = []
    losses: list[float] = []
    scales: list[float] = []
    number = 0
    for iteration in range(train.num_iterations):
        parts = minibatches(session, batch.rows, iteration)
        if len(parts) < train.num_minibatches and FEWER not in session.told:
            session.told.add(FEWER)
            made = f"{len(parts)} of {train.num_minibatches} updates are made (train.num_minibatches)"
            text = f"step {session.position.step}: {made}, for no more groups are usable (said once)"
            session.report("warning", {"text": text})
        for index in parts:
            rows, frozen = batch.rows.select(index), batch.frozen.select(index)
            counter = (session.config.seed, session.position.step, number)
            with explained_memory(), ahead(session, rows, number) as moved:
                loss, stats = session.engine.step(
                    live_functionals(session, frozen),
                    rows,
                    frozen,
                    lambda r, s: method.loss(r, method.with_old(s), session.states),
                    additive=method.splits(rows),
                    counter=counter,
                )
            if session.heads and session.position.step < train.critic_warmup_steps:
                session.optimiser.hold_policy()
            norm = session.optimiser.gradient_norm()
            learning_rate = session.optimiser.learning_rate
            if _finite(session, loss, norm, rows, stats):
                scale = step_within(session, rows, norm)
                norms.append(float(norm))
                losses.append(float(loss))
                scales.append(scale)
            session.optimiser.zero_grad()
            if not first:
                batch.seen = (index, stats)
                first = update_metrics(session, rows, method.with_old(stats)) | {"learning_rate": learning_rate}
                first |= moved
                if logs_completions(session, batch, session.position.step + 1):
                    batch.by_token = method.by_token(rows, method.with_old(stats), session.states)
            number += 1
    if method.surrogate is not None:
        first |= last_ratios(session, rows, method.with_old(stats))
    if min(scales, default=1.0) < 1:
        first["updates/scale"] = sum(scales) / len(scales)
    if norms:
        first |= {"grad_norm": sum(norms) / len(norms), "loss": sum(losses) / len(losses)}
    return first | {"updates/skipped": float(number - len(norms))}


@torch.no_grad()
def last_ratios(session: Session, rows: Rows, stats: Stats) -> dict[str, float]:
    """How far the last update of a batch is from the policy that drew it, and what share of its tokens a clip silences.

    The first update sees a policy that has not moved yet, and nothing of either.
    """
    surrogate = session.method.surrogate
    assert surrogate is not None
    found = ratio_metrics(rows, surrogate.log_ratio(rows, stats))
    if hasattr(surrogate.f, "bounds") and not isinstance(surrogate.f, CISPO):  # under which every token has a gradient
        found["ratio/clipped"] = surrogate.metrics(rows, stats)["clip_ratio/region_mean"]
    return {name: float(value) for name, value in found.items()}


def minibatches(session: Session, rows: Rows, iteration: int) -> list[Tensor]:
    """Rows of each optimiser step: whole groups, in an order that the seed decides; baseline rows are left out.

    Groups, replayed ones too, and the rows of a regulariser are spread evenly over the steps.
    """
    train = session.config.train
    regular = (rows.stream == int(Stream.REGULARISER)).nonzero().flatten()
    if train.num_minibatches == 1:
        return [torch.cat([rows.main.nonzero().flatten(), regular])]
    main, again = (rows.main & rows.fresh).nonzero().flatten(), (rows.main & ~rows.fresh).nonzero().flatten()
    ids = rows.group[main].unique()
    chance = generator(session.config.seed, "minibatches", session.position.step, iteration)
    order = ids[torch.randperm(len(ids), generator=chance).to(ids.device)]
    parts = order.tensor_split(min(train.num_minibatches, len(order)))
    mains = [main[torch.isin(rows.group[main], part)] for part in parts]
    old = [again[torch.isin(rows.group[again], part)] for part in rows.group[again].unique().tensor_split(len(mains))]
    return [torch.cat(all_) for all_ in zip(mains, old, regular.tensor_split(len(mains)), strict=True)]


def live_functionals(session: Session, frozen: Stats) -> list[Functional]:
    """What the loss reads of the live policy, what stands in for `old`, and the entropy to look at."""
    method = session.method
    needs: dict[Functional, None] = dict.fromkeys(method.live_needs())
    for functional in method.update_needs():
        if functional.of == ("old",) and functional not in frozen:
            needs[replace(functional, of=("policy",))] = None  # type: ignore[type-var]
    if method.rollout is not None:
        needs |= dict.fromkeys([Entropy(), LogProb(), *sampled_log_probs(method)])
    return list(needs)


def _finite(session: Session, loss: Tensor, norm: Tensor, rows: Rows, stats: Stats) -> bool:
    """Whether an update may be made; a non-finite one is skipped and kept for inspection.

    Raises:
        TrainingError: it is the third in a row.
    """
    if bool(torch.isfinite(loss)) and bool(torch.isfinite(norm)):
        session.position.skipped = 0
        return True
    session.position.skipped += 1
    place = keep_batch(session, rows, stats)
    what = f"step {session.position.step}: the loss is {float(loss):g} and the gradient's norm {float(norm):g}"
    session.report("warning", {"text": f"{what}; the update is skipped, its batch kept in {place}"})
    if session.position.skipped >= PATIENCE:
        raise TrainingError(
            f"{PATIENCE} updates in a row were not finite ({what})",
            str(place or "update"),
            "Lower train.learning_rate, or look at the kept batches.",
        )
    return False


# -- observe ---------------------------------------------------------------------------------------------------------


def control(session: Session) -> None:
    """Controllers set their values, before the batch is drawn."""
    last = session.metrics[-1] if session.metrics else {}
    for name in session.method.controllers:
        item = session.method.controllers[name]  # as an earlier one has left it
        values, state = item.update(last, session.controller_states[name], session.position.step)
        session.controller_states[name] = state
        for path, value in values.items():
            session.method = session.method.set(path, value)


def observe(session: Session, batch: Batch, metrics: dict[str, float]) -> None:
    """Parts with memory and moving models read what happened to the rows of this batch; the replay takes them in."""
    index = batch.rows.fresh.nonzero().flatten()
    whole = len(index) == len(batch.rows)
    rows, frozen = (batch.rows, batch.frozen) if whole else (batch.rows.select(index), batch.frozen.select(index))
    for path, item in session.method.parts():
        if hasattr(item, "observe"):
            session.states[path] = item.observe(rows, frozen, metrics, session.states[path])
    if batch.fresh is not None:
        remember(session, batch.fresh, batch.replayed, metrics)
    for source in session.sources.values():
        source.update(session.position.step)
    go_back(session)
    follow(session.method.heads, session.heads)


def record(session: Session, batch: Batch, metrics: dict[str, float]) -> None:
    """Metrics to the store, the trackers and the screen; now and then completions, with their numbers per token."""
    step = session.position.step
    metrics |= batch_metrics(session)
    session.metrics.append(metrics)
    for track in session.trackers:
        track(metrics, step)
    shown: list[tuple[Text, str]] = []
    logged = due(step, session.config.train.log_completions) and bool(batch.texts)
    if logged:
        shown = [batch.texts[0], batch.texts[-1]]
    if session.store is not None and session.run_id is not None:
        session.store.log_metrics(session.run_id, step, metrics)
        if logs_completions(session, batch, step):
            session.store.log_rollouts(
                session.run_id, step, stored_rollouts(session, batch.rows, batch.texts, batch.seen, batch.by_token)
            )
    session.report("step", {"step": step, "metrics": metrics, "completions": shown})
    if session.watch is None:
        session.watch = Watch(session.config.to_dict())
    for finding in session.watch.step(step, metrics):
        session.report("finding", {"step": step, "finding": finding, "text": f"step {step}: {finding.sentence}"})


def logs_completions(session: Session, batch: Batch, step: int) -> bool:
    """Whether completions of this step go to the store with their numbers per token."""
    shown = session.method.kind == "online" or session.preferences is not None
    stored = shown and session.store is not None and session.run_id is not None
    every, last = session.config.train.log_completions, session.config.train.max_steps
    return stored and bool(batch.texts) and (due(step, every) or step == last < every)  # of a short run its last ones


def _keep_old_weights(session: Session) -> None:
    """A copy of the policy, only where a functional compares it with the live one."""
    if any("old" in f.of and "policy" in f.of for f in session.method.update_needs()):
        session.engine.models["old"] = frozen_copy(session.policy)


@contextmanager
def explained_memory() -> Iterator[None]:
    """An out-of-memory error becomes one that says which setting to lower."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise
