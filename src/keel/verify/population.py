"""The expected update of a method: every sequence, or group, at its probability, through the method's own code."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.rows import REPLAYED, Pairs, Rows, Stream, cat
from keel.exact.space import TabularPolicy
from keel.method import Method
from keel.parts.advantages.stream import discounted_sum, reward_stream
from keel.parts.replay.memory import joined
from keel.parts.replay.rehearsal import Rehearsal
from keel.parts.rewards.stored_teacher import StoredTeacher
from keel.rollouts.beside import AUTHOR
from keel.statistics.engine import Engine
from keel.statistics.functionals import Functional, LogProb, Value
from keel.statistics.stats import Stats
from keel.statistics.teachers import TopTokens
from keel.verify.pairs import preference_rows
from keel.verify.world import World

KINDS = ("online", "supervised", "pairs", "distillation")
EVERYTHING = 1 << 30  # tokens: one micro-batch


@dataclass(frozen=True, eq=False)
class Update:
    """What one step of a method does in a world.

    Args:
        direction: minus the gradient of the loss in the policy's logits, [Q, X, V].
        loss: its value.
    """

    direction: Float[Tensor, "Q X V"]
    loss: float


def expected_update(
    method: Method, world: World, rows: Rows | None = None, dtype: torch.dtype = torch.float64
) -> Update:
    """The step that a method takes on a batch; by default on every sequence at its probability under the sampler.

    Critics know the exact value of every state, so that an advantage is held to its formula and not to a fit.

    Args:
        rows: another batch of this world, with rewards.
        dtype: of the policies' logits.

    Raises:
        ValueError: the rows of this kind of method do not come from a world.
    """
    if method.kind not in KINDS:
        raise ValueError(f"methods of kind '{method.kind}' have no rows in this world")
    everything = with_rows_beside(method, world, batch_for(method, world))
    models = {name: world.table(name, dtype) for name in ("policy", "old", *method.models)}
    states = _remembered(method, world, everything, models)
    drawn = everything if rows is None else with_rows_beside(method, world, rows)
    batch, frozen = _prepared(method, world, with_stored(method, world, drawn), models, states)
    main = (batch.main | (batch.stream == int(Stream.REGULARISER))).nonzero().flatten()
    batch, frozen = batch.select(main), frozen.select(main)
    live = [f for f in _live(method, frozen) if not isinstance(f, Value)]
    engine = _engine(models, method)
    loss, _ = engine.step(live, batch, frozen, partial(_loss, method, states), additive=False)
    table = models["policy"].table
    grad = table.grad
    return Update(torch.zeros_like(table).detach() if grad is None else -grad.double(), float(loss))


def batch_for(method: Method, world: World) -> Rows:
    """The rows that a method of this kind learns from, enumerated."""
    if method.kind in ("supervised", "distillation"):
        return _taught(method, world)
    if method.reads is not None:
        return preference_rows(world, method.reads, _scale(method))
    who = author_of(method)
    rows = world.rows(who)
    rows = rows.with_(logp={"behaviour": _token_log_probs(world.table(who), rows)})
    return with_greedy(method, world, rows)


def author_of(method: Method) -> str:
    """Who draws the completions of an online method."""
    return "old" if method.rollout is None or method.rollout.written is None else method.rollout.written.model


def with_rows_beside(method: Method, world: World, rows: Rows) -> Rows:
    """The rows and, in each group, every completion of the models that draw beside it, at its probability."""
    beside = () if method.rollout is None else method.rollout.beside
    if not beside:
        return rows
    parts = [rows.with_(columns={**rows.columns, AUTHOR: torch.zeros_like(rows.row)})]
    ids, place = rows.group.unique(return_inverse=True)
    first = torch.full_like(ids, len(rows)).scatter_reduce(0, place, torch.arange(len(rows)), "amin")
    for i, item in enumerate(beside):
        own, other = (world.table(name).table.log_softmax(-1) for name in ("old", item.model))
        mixed = TabularPolicy(world.space, ((1 - item.share) * own + item.share * other).detach())
        known = {"exact": rows.exact, "columns": {}}
        for group, prompt in zip(ids.tolist(), rows.prompt_ids[first, -1].tolist(), strict=True):
            more = mixed.weighted(world.space.rows(prompt)).with_(reward=world.reward[prompt][:, None], **known)
            more = more.with_(logp={name: _token_log_probs(mixed, more) for name in rows.logp})
            stream = torch.full_like(more.stream, int(Stream.CANDIDATE))
            columns = {AUTHOR: torch.full_like(more.row, i + 1)}
            parts.append(more.with_(stream=stream, columns=columns, group=torch.full_like(more.group, group)))
    return joined(parts)


def _taught(method: Method, world: World) -> Rows:
    """Completions of the data, or of who writes them: the policy, or a teacher; with the teacher's own numbers, where
    a part reads them from columns.
    """
    written = None if method.rollout is None else method.rollout.written
    alone = written is not None and written.alpha == 1
    who = written.model if written is not None and alone else "data" if method.rollout is None else "old"
    rows = world.rows(who).with_(reward=None)
    if any(hasattr(term, "twin") for term in method.terms.values()):  # both prompts are the same here
        index, none = torch.arange(len(rows)), torch.zeros_like(rows.weight)
        rows = rows.with_(pairs=Pairs(index, index, rows.weight, none + 1, none + 1, none), masks={"distil": rows.mask})
    if not any(isinstance(item, StoredTeacher) for item in method.transforms.values()):
        return rows
    asked = TopTokens(world.space.vocab)
    found = Engine({"teacher": world.table("teacher")}, {}, max_tokens=EVERYTHING).measure([asked], rows)[asked]
    ids, logp, rest = found.split([world.space.vocab, world.space.vocab, 1], -1)
    columns = {"teacher_ids": ids.long(), "teacher_logp": logp, "teacher_rest": rest[..., 0]}
    return rows.with_(columns={**rows.columns, **columns})


def _scale(method: Method) -> float:
    """beta of the loss, which decides where its scores are nought."""
    return next((term.beta for term in method.terms.values() if hasattr(term, "beta")), 1.0)


def with_stored(method: Method, world: World, rows: Rows) -> Rows:
    """The rows with those that the method's slot `replay` brings along, enumerated.

    What is replayed was drawn by another policy, `world.table("replayed")`, and has its share of the whole weight. What
    is rehearsed are all completions of the reference, as where it solves every prompt.
    """
    parts = [rows]
    if (again := method.replayed) is not None:
        parts.append(_enumerated(world, "replayed", rows, REPLAYED, again.share / (1 - again.share)))
    if any(isinstance(item, Rehearsal) for item in method.replay.values()):
        parts.append(_enumerated(world, "ref", rows, "stored", 1.0))
    return joined(parts)


def _enumerated(world: World, who: str, beside: Rows, kind: str, weight: float) -> Rows:
    """Every sequence at its probability under a policy, of as much weight for each unit of that of the rows."""
    rows = world.rows(who)
    log_prob = _token_log_probs(world.table(who), rows)
    scale = weight * float((beside.weight * beside.main).sum() / rows.weight.sum())
    numbers = {"weight": rows.weight * scale, "group": rows.group + int(beside.group.max()) + 1}
    rows = rows.with_(**numbers, exact=beside.exact, logp={"behaviour": log_prob})
    if kind == REPLAYED:
        return rows.with_(columns={REPLAYED: torch.ones_like(rows.main)})
    stream = torch.full_like(rows.stream, int(Stream.REGULARISER))
    return rows.with_(stream=stream, reward=None, logp={**rows.logp, kind: log_prob})


def _prepared(
    method: Method, world: World, rows: Rows, models: dict[str, TabularPolicy], states: dict[str, Any]
) -> tuple[Rows, Stats]:
    """What `prepare` of the loop does: frozen statistics, transforms, advantages."""
    needs = method.frozen_needs(several_updates=True)
    before = _engine({**models, "policy": models["old"]}, method)
    frozen = before.measure([f for f in needs if not isinstance(f, Value)], rows, alias={"old": "policy"})
    critics = [f for f in dict.fromkeys((*needs, *method.update_needs())) if isinstance(f, Value)]
    frozen = frozen.merged({f: _exact_values(method, world, rows, frozen, f.head) for f in critics})
    return method.prepare(rows, frozen, states), frozen


def _remembered(method: Method, world: World, rows: Rows, models: dict[str, TabularPolicy]) -> dict[str, Any]:
    """The memory of parts that have seen the whole population once."""
    states = method.initial_states()
    if not any(hasattr(item, "observe") for _, item in method.parts()):
        return states
    batch, frozen = _prepared(method, world, rows, models, states)
    seen = {
        path: item.observe(batch, frozen, {}, states[path]) for path, item in method.parts() if hasattr(item, "observe")
    }
    return {**states, **seen}


def _engine(models: dict[str, TabularPolicy], method: Method) -> Engine:
    temperature = method.rollout.temperature if method.rollout is not None else 1.0
    return Engine(dict(models), {}, temperature=temperature, max_tokens=EVERYTHING)


def _loss(method: Method, states: dict, rows: Rows, stats: Stats) -> Tensor:
    return method.loss(rows, method.with_old(stats), states)


def _live(method: Method, frozen: Stats) -> list[Functional]:
    standing_in = [f for f in method.update_needs() if f.of == ("old",) and f not in frozen]
    swapped = [dataclasses.replace(f, of=("policy",)) for f in standing_in]  # type: ignore[type-var]
    return list(dict.fromkeys([*method.live_needs(), *swapped]))


def _exact_values(method: Method, world: World, rows: Rows, frozen: Stats, head: str) -> Float[Tensor, "B T"]:
    """The expected reward-to-go of the state before each token, under the sampler; zeros where nothing is earned.

    Where a part of the advantage has a stream of rewards for each critic, `stream(rows, head)`, that of this head.
    """
    if method.kind != "online":
        return torch.zeros(rows.tokens.shape, dtype=torch.float64)
    before = Method(rollout=method.rollout, transforms=method.transforms, models=method.models)
    seen = before.prepare(rows, frozen, before.initial_states())
    for item in method.advantage.values():
        if head in getattr(item, "heads_read", ()) and hasattr(item, "stream"):
            seen = item.stream(seen, head)
    to_go = discounted_sum(reward_stream(seen), seen.mask, 1.0)
    space = world.space
    state = rows.prompt_ids[:, -1:] * space.prefixes + space.prefix_index(rows.tokens)
    weight = torch.where(rows.mask & rows.main[:, None], rows.weight[:, None].expand_as(to_go), 0.0)
    visits = weight.new_zeros(space.prompts * space.prefixes).index_add(0, state.flatten(), weight.flatten())
    total = torch.zeros_like(visits).index_add(0, state.flatten(), (weight * to_go).flatten())
    mean = torch.where(visits > 0, total / visits.clamp(min=torch.finfo(visits.dtype).tiny), 0.0)
    return mean[state] * rows.mask


def _token_log_probs(policy: TabularPolicy, rows: Rows) -> Float[Tensor, "B T"]:
    needed = LogProb()
    return Engine({"policy": policy}, {}, max_tokens=EVERYTHING).measure([needed], rows)[needed]


def with_greedy(method: Method, world: World, rows: Rows) -> Rows:
    """The rows with the greedy completion of each group beside them, where the method's rollout adds one."""
    if method.rollout is None or not method.rollout.greedy_baseline:
        return rows
    ids, place = rows.group.unique(return_inverse=True)
    first = torch.full_like(ids, len(rows)).scatter_reduce(0, place, torch.arange(len(rows)), "amin")
    prompts = rows.prompt_ids[first, -1]
    everything = world.rows("old").with_(logp={"behaviour": _token_log_probs(world.table("old"), world.rows("old"))})
    best = torch.tensor([_greedy(world, everything, int(prompt)) for prompt in prompts])
    chosen = everything.select(best)
    zero = torch.zeros_like(chosen.weight)
    return cat(
        [
            rows,
            chosen.with_(
                group=ids, stream=torch.full_like(chosen.stream, int(Stream.BASELINE)), weight=zero, exact=rows.exact
            ),
        ]
    )


def _greedy(world: World, rows: Rows, prompt: int) -> int:
    """Place of the sequence that takes the likeliest token at every step."""
    space, table = world.space, world.old
    tokens = torch.zeros(1, space.horizon, dtype=torch.long)
    for t in range(space.horizon):
        tokens[0, t] = table[prompt, space.prefix_index(tokens)[0, t]].argmax()
        if space.eos is not None and int(tokens[0, t]) == space.eos:
            break
    same = (rows.tokens == tokens).all(1) & (rows.prompt_ids[:, -1] == prompt)
    return int(same.nonzero()[0, 0])
