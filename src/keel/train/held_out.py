"""Held-out preferences: the loss's own numbers on comparisons that training never sees, and what moved."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keel.core.policy import PolicyModel
from keel.core.rows import Rows
from keel.evaluate.evaluation import Evaluation
from keel.evaluate.intervals import mean_interval
from keel.evaluate.reward_models import by_domain
from keel.parts.replay.streams import split
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.penalties import Summand
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence, Functional, LogProb
from keel.statistics.stats import Stats
from keel.train.gold import with_gold
from keel.train.mismatched import with_mismatched
from keel.train.observe import reads_beside
from keel.train.preferences import NLL, preference_rows
from keel.train.session import Session

INITIAL = "initial"  # the name here of what the policy's movement is measured against
COUPLED = 8  # preferences that losses which couple a batch see together
BY_DOMAIN = ("rewards/accuracies", "rewards/margins")
TOGETHER = 64  # preferences whose statistics are measured in one go


def measure_preferences(
    session: Session,
    reference: PolicyModel | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation | None:
    """The metrics of the loss on held-out preferences, the first `evaluate.num_prompts` of them.

    Pair losses are measured pair by pair; others, whose loss couples the rows of a batch, in groups of eight. Beside
    what the terms report:

        loss                    of all terms
        displacement/chosen     log pi(y) - log pi_0(y) of the best completion of each prompt, in nats
        displacement/rejected   the same of all others
        kl/held_out             KL(pi || pi_0) over the vocabulary, mean over the tokens of these completions, in nats

    Pair losses on data of several domains also report `rewards/accuracies/NAME` and `rewards/margins/NAME` of each.

    Args:
        session: whose policy, method and preferences.
        reference: pi_0; None leaves out what is measured against it.
        progress: called with (preferences done, all).

    Returns:
        None where nothing is held out.
    """
    held = session.preferences.held_out[session.config.evaluate.skip :] if session.preferences is not None else ()
    count = min(session.config.evaluate.num_prompts, len(held))
    if not count:
        return None
    found: dict[str, list[float]] = {}
    places: list[int] = []
    domains: list[str] = []
    assert session.preferences is not None
    limit = session.config.train.max_length or session.policy.context_length
    known = (session.preferences.kind, session.encoder, limit, session.config.seed, 0)
    coupled = not all(isinstance(term, PairLoss | Summand) for term in _terms(session))
    groups = np.array_split(np.arange(count), max(1, count // (COUPLED if coupled else TOGETHER)))
    for places_ in groups:
        some = [held[i] for i in places_.tolist()]
        rows, cut = preference_rows(some, *known)
        if session.method.reads_mismatched and len(rows) > 1:
            rows = with_mismatched(rows, limit)
        if session.method.reads_gold:
            rows, _ = with_gold(rows, [some[i] for i in cut.kept], *known[1:])
        places += [some[i].index for i in cut.kept]
        domains += [some[i].domain for i in cut.kept]
        for name, numbers in _measured(session, rows.to(session.policy.device), reference, coupled).items():
            found.setdefault(name, []).extend(numbers)
        if progress is not None:
            progress(int(places_[-1]) + 1, count)
    seed = session.config.seed
    for name in BY_DOMAIN:
        if len(found.get(name, ())) == len(domains):
            found |= {n: v.tolist() for n, v in by_domain(name, np.asarray(found[name]), domains).items()}
    return Evaluation(
        metrics={name: mean_interval(np.asarray(numbers), seed=seed) for name, numbers in found.items()},
        values={name: tuple(numbers) for name, numbers in found.items()},
        samples=0,
        seed=seed,
        index=tuple(places),
    )


def beside(evaluation: Evaluation | None, preferences: Evaluation | None) -> Evaluation | None:
    """One evaluation of what was sampled and of what was compared."""
    if evaluation is None or preferences is None:
        return evaluation or preferences
    metrics = {**preferences.metrics, **evaluation.metrics}
    return replace(evaluation, metrics=metrics, values={**preferences.values, **evaluation.values})


@torch.no_grad()
def _measured(session: Session, rows: Rows, reference: PolicyModel | None, coupled: bool) -> dict[str, list[float]]:
    """Numbers by name: one for each group of preferences, or for each preference."""
    method = session.method
    models = {**session.engine.models, **({} if reference is None else {INITIAL: reference})}
    engine = Engine(models, session.heads, max_tokens=session.engine.max_tokens, chunk_bytes=session.engine.chunk_bytes)
    alias = {"old": "policy"}
    moved: list[Functional] = [LogProb(), LogProb(of=(INITIAL,)), Divergence(against=INITIAL)]
    moved = moved if reference is not None else []
    frozen = method.frozen_needs(True)
    stats = engine.measure(list(dict.fromkeys([*frozen, *method.live_needs(), *moved])), rows, alias=alias)
    own = Stats({f: stats[f] for f in frozen}, stats.masks)
    rows = method.prepare(rows, own, session.states)
    found: dict[str, list[float]] = {}
    everything = torch.arange(len(rows), device=rows.device)
    groups = [everything] if coupled else [(rows.group == number).nonzero().flatten() for number in rows.group.unique()]
    for index in groups:
        for name, value in _said(session, rows.select(index), method.with_old(stats.select(index))).items():
            found.setdefault(name, []).append(value)
    if reference is not None:
        fresh = rows.fresh.nonzero().flatten()
        found |= _movement(rows.select(fresh), stats.select(fresh))
    return found


def _terms(session: Session) -> list[Any]:
    return [term for term in session.method.terms.values() if getattr(term, "coef", 1.0) != 0]


def _said(session: Session, rows: Rows, stats: Stats) -> Mapping[str, float]:
    """The loss, and what its terms report."""
    method = session.method
    out: dict[str, Tensor] = {"loss": method.loss(rows, stats, session.states)}
    beside = split(rows, stats)[2]
    for term in _terms(session):
        reads = (rows, stats, (beside.rows, beside.stats)) if reads_beside(term, beside) else (rows, stats)
        out |= term.metrics(*reads) if hasattr(term, "metrics") else {}
    return {name: float(value) for name, value in out.items()}


def _movement(rows: Rows, stats: Stats) -> dict[str, list[float]]:
    """How far the policy has moved on the completions of each prompt."""
    ratio = torch.where(rows.mask, (stats[LogProb()] - stats[LogProb(of=(INITIAL,))]).float(), 0.0).sum(1)
    chosen = rows.masks[NLL].any(1) if rows.label is None else rows.label > 0
    divergence = torch.where(rows.mask, stats[Divergence(against=INITIAL)].float(), 0.0).sum(1)
    ids, owner = rows.group.unique(return_inverse=True)

    def mean(values: Tensor, weight: Tensor) -> list[float]:
        """Of each prompt; NaN where it has none."""
        total = values.new_zeros(len(ids)).index_add(0, owner, values * weight)
        return (total / values.new_zeros(len(ids)).index_add(0, owner, weight)).tolist()

    tokens = rows.lengths.to(ratio)
    return {
        "displacement/chosen": mean(ratio, chosen.to(ratio)),
        "displacement/rejected": mean(ratio, (~chosen).to(ratio)),
        "kl/held_out": mean(divergence / tokens, tokens),
    }
