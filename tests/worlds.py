"""Worlds that the tests share: tables that can be enumerated, and a small network.

All numbers are fp64 and drawn from counters, so that equal means equal.
"""

import dataclasses
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from keel.composition import ALWAYS
from keel.core.choice import generator, row_ids, uniforms
from keel.core.policy import Head
from keel.core.rows import REPLAYED, Pairs, Rows, Stop, Stream, cat
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.method import Method
from keel.parts.replay.memory import joined
from keel.parts.replay.rehearsal import Rehearsal
from keel.parts.terms.degrees import DEGREE, DeletionDegree
from keel.parts.terms.unpaired import mismatched
from keel.rollouts.beside import AUTHOR
from keel.statistics.engine import Engine
from keel.statistics.stats import Stats

SPACE = SequenceSpace(vocab=3, horizon=3, eos=2, prompts=2)
EVERYTHING = 1 << 30  # tokens: one micro-batch


def noise(*seed: int | str, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers that depend on what they are for."""
    return torch.randn(shape, generator=generator(*seed), dtype=torch.float64)


def table(*seed: int | str, space: SequenceSpace = SPACE, scale: float = 0.7) -> TabularPolicy:
    """A random tabular policy."""
    return TabularPolicy(space, scale * noise("table", *seed, shape=(space.prompts, space.prefixes, space.vocab)))


def from_probs(*levels: list, space: SequenceSpace) -> TabularPolicy:
    """A tabular policy with the given distributions, prefix by prefix."""
    return TabularPolicy(space, torch.tensor(list(levels), dtype=torch.float64).log()[None])


# -- sampled rows ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(policy: TabularPolicy, group_size: int, seed: int = 0, greedy: bool = False) -> Rows:
    """A group for each prompt, drawn with the counters of its rows; the behaviour's log-probabilities are recorded."""
    space = policy.space
    prompt = torch.arange(space.prompts).repeat_interleave(group_size)
    copy = torch.arange(group_size).repeat(space.prompts)
    row = row_ids(seed, 0, prompt, copy)
    tokens = torch.zeros(len(row), space.horizon, dtype=torch.long)
    mask = torch.zeros(len(row), space.horizon, dtype=torch.bool)
    logp = torch.zeros(len(row), space.horizon, dtype=torch.float64)
    alive = torch.ones(len(row), dtype=torch.bool)
    for t in range(space.horizon):
        log_probs = policy.table[prompt, space.prefix_index(tokens)[:, t]].log_softmax(-1)
        if greedy:
            chosen = log_probs.argmax(-1)
        else:
            chosen = (log_probs.exp().cumsum(-1) < uniforms(row, t)[:, None]).sum(-1).clamp(max=space.vocab - 1)
        tokens[alive, t], mask[:, t] = chosen[alive], alive
        logp[alive, t] = log_probs.gather(-1, chosen[:, None])[alive, 0]
        alive = alive & (chosen != space.eos)
    return Rows.build(
        prompt[:, None],
        torch.ones(len(row), 1, dtype=torch.bool),
        tokens,
        mask,
        row=row,
        group=prompt,
        data_index=prompt,
        stop=torch.where(alive, int(Stop.LENGTH), int(Stop.EOS)),
        stream=torch.full_like(prompt, int(Stream.BASELINE if greedy else Stream.MAIN)),
        logp={"behaviour": logp},
    )


@cache
def online_rows(group_size: int = 4, baseline: bool = False) -> Rows:
    """Two groups with two reward columns, of which some do not apply, and a row with a gap of tool output."""
    sampler = table("sampler")
    rows = sample(sampler, group_size)
    if baseline:
        rows = cat([rows, sample(sampler, 1, seed=1, greedy=True)])
    right = (uniforms(rows.row, 100) * 3).floor() / 2
    form = uniforms(rows.row, 101)
    scored = rows.stream == int(Stream.BASELINE)
    form = torch.where((form < 0.3) & ~scored, torch.nan, form)
    right[2] = form[2] = torch.nan  # nobody could score this one
    mask = rows.mask.clone()
    mask[int((rows.lengths > 2).nonzero()[0]), 1] = False
    label = (uniforms(rows.row, 102) > 0.5).double()
    spans = {"nll": mask & (rows.tokens != 1), "distil": mask}
    known = {"win_rate": uniforms(rows.row, 103)}
    return rows.with_(reward=torch.stack([right, form], 1), mask=mask, label=label, masks=spans, columns=known)


def rows_for(method: Method) -> Rows:
    """Rows as the loop would hand them to a method of this kind."""
    greedy = method.rollout is not None and method.rollout.greedy_baseline
    rows = online_rows(baseline=greedy)
    if any(hasattr(functional, "column") for functional in method.update_needs()):
        rows = with_teacher(rows)
    if method.kind == "online":
        rows = rows if method.rollout is None or method.rollout.extra is None else with_candidates(rows, method)
        rows = with_rows_beside(rows, method)
        return with_stored(rows, method)
    rows = rows.with_(reward=None, logp={}, stop=torch.full_like(rows.stop, int(Stop.DATA)))
    if method.kind not in ("pairs", "reward") and not any(hasattr(term, "twin") for term in method.terms.values()):
        return rows
    half = len(rows) // SPACE.prompts // 2
    place = torch.arange(len(rows)).reshape(SPACE.prompts, 2, half).transpose(0, 1).reshape(2, -1)
    ones = torch.ones(place.shape[1], dtype=torch.float64)
    position = torch.arange(len(rows)) % (2 * half)  # the first half of a group is better than the second
    known = {"score": (2 * half - position).double(), "position": position}
    best = rows.mask & (position == 0)[:, None]
    rows = rows.with_(columns={**rows.columns, **known}, masks={**rows.masks, "nll": best})
    rows = rows.with_(pairs=Pairs(place[0], place[1], ones, ones, ones, 0 * ones))
    if any(isinstance(term, DeletionDegree) for term in method.terms.values()):
        copies = sample(table("copied"), 2, seed=5)
        stream, degree = torch.full_like(copies.stream, int(Stream.REGULARISER)), torch.arange(len(copies)) % 4
        return joined([rows, copies.with_(logp={}, stream=stream, group=copies.group + 30, columns={DEGREE: degree})])
    if not method.reads_mismatched:
        return rows
    beside = mismatched(rows)
    return joined([rows, beside.with_(group=beside.group - SPACE.prompts + 10)])


def with_teacher(rows: Rows) -> Rows:
    """The rows with two tokens that a teacher names at each position, and what else is read of stored teachers."""
    first = torch.where(rows.tokens == 0, 1, 0)
    shape = (*rows.tokens.shape, 3)
    logp = (uniforms(rows.row.repeat_interleave(shape[1]), 103)[:, None] * torch.tensor([3.0, 1.0, 2.0])).reshape(shape)
    logp = logp.double().log_softmax(-1)
    known = {"teacher_ids": torch.stack([first, first + 1], -1), "teacher_logp": logp[..., :2]}
    known |= {"teacher_rest": logp[..., 2], "target_share": uniforms(rows.row, 104).double()}
    return rows.with_(columns={**rows.columns, **known})


def with_candidates(rows: Rows, method: Method) -> Rows:
    """The rows, and beside each group another one that was drawn at another temperature."""
    more = sample(table("sampler", scale=0.5), 4, seed=2)
    right = (uniforms(more.row, 100) > 0.5).double()[:, None].expand(-1, rows.reward.shape[1])
    spans = {"nll": more.mask, "distil": more.mask}
    stream = torch.full_like(more.stream, int(Stream.CANDIDATE))
    more = more.with_(reward=right, label=right[:, 0], masks=spans, stream=stream, group=more.group + 10)
    heats = (method.rollout.temperature, method.rollout.extra.temperature)
    parts = [
        r.with_(columns={"temperature": torch.full_like(r.weight, h)}) for r, h in zip((rows, more), heats, strict=True)
    ]
    return cat(parts)


def with_rows_beside(rows: Rows, method: Method) -> Rows:
    """The rows, and in each group two completions of every other model that draws beside the policy."""
    beside = () if method.rollout is None else method.rollout.beside
    parts = [rows.with_(columns={**rows.columns, AUTHOR: torch.zeros_like(rows.row)})] if beside else [rows]
    for i, item in enumerate(beside):
        more = sample(table(item.model), 2, seed=6 + i)
        right = (uniforms(more.row, 100) * 3).floor()[:, None] / 2
        stream, author = torch.full_like(more.stream, int(Stream.CANDIDATE)), torch.full_like(more.row, i + 1)
        parts.append(more.with_(reward=right.expand(-1, 2), stream=stream, columns={AUTHOR: author}))
    return joined(parts)


def with_stored(rows: Rows, method: Method) -> Rows:
    """The rows, and what the method's slot `replay` brings along: groups of another policy, rows of a regulariser."""
    parts = [rows]
    if method.replayed is not None:
        again = sample(table("replayed", scale=0.5), 4, seed=3)
        right = (uniforms(again.row, 100) > 0.5).double()[:, None].expand(-1, 2)
        known = {**again.columns, REPLAYED: torch.ones(len(again), dtype=torch.bool)}
        parts.append(again.with_(reward=right, columns=known, group=again.group + 20))
    if any(isinstance(item, Rehearsal) for item in method.replay.values()):
        before = sample(table("ref"), 1, seed=4)
        stream = torch.full_like(before.stream, int(Stream.REGULARISER))
        logp = {**before.logp, "stored": before.logp["behaviour"]}
        parts.append(before.with_(stream=stream, logp=logp, group=before.group + 30))
    return joined(parts)


def polluted(rows: Rows, prompt: int, completion: int) -> Rows:
    """The rows with `prompt` and `completion` more columns of padding, full of garbage."""
    wide = rows.padded(rows.prompt_ids.shape[1] + prompt, rows.tokens.shape[1] + completion)
    return wide.with_(
        prompt_ids=torch.where(wide.prompt_mask, wide.prompt_ids, 1),
        tokens=torch.where(wide.present, wide.tokens, 1),
        logp={name: torch.where(wide.present, value, 7.0) for name, value in wide.logp.items()},
    )


def repeated(rows: Rows, times: dict[int, int]) -> Rows:
    """Each group as often as `times` says, every copy a group of its own."""
    copies = []
    for group, count in times.items():
        members = rows.select(rows.group == group)
        copies += [members.with_(group=members.group + 100 * i) for i in range(count)]
    return cat(copies)


# -- a method on such rows -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """Loss, gradient of every parameter, and statistics of one optimiser step."""

    loss: Tensor
    grads: dict[str, Tensor]
    stats: Stats
    rows: Rows


def models_of(method: Method) -> dict[str, TabularPolicy]:
    """The live policy, the one that prepared the batch, and the method's further models, all different."""
    return {name: table(name) for name in (*ALWAYS, *method.models)}


def heads_of(method: Method, policy: TabularPolicy) -> dict[str, nn.Module]:
    """The method's heads, away from their initial values."""
    heads = {}
    for name, spec in method.heads.items():
        heads[name] = spec.build(policy, 0).double()
        with torch.no_grad():
            for i, parameter in enumerate(heads[name].parameters()):
                parameter += 0.3 * noise("head", name, i, shape=tuple(parameter.shape))
    return heads


def outcome(
    method: Method,
    rows: Rows | None = None,
    *,
    max_tokens: int = EVERYTHING,
    chunk_bytes: int = 1 << 20,
    additive: bool | None = None,
    moved: bool = True,
    measured: bool = True,
    nudge: Tensor | None = None,
) -> Outcome:
    """Prepare and one update, as in the loop.

    Args:
        moved: the policy has changed since the batch was prepared.
        measured: what `old` says was measured then; else the live numbers stand in for it.
        nudge: added to the live policy's table.
    """
    rows = rows_for(method) if rows is None else rows
    models = models_of(method)
    if not moved:
        models["old"].load_state_dict(models["policy"].state_dict())
    if nudge is not None:
        with torch.no_grad():
            models["policy"].table.view(-1).add_(nudge)
    heads = heads_of(method, models["policy"])
    sizes: dict[str, Any] = dict(max_tokens=max_tokens, chunk_bytes=chunk_bytes)
    if method.rollout is not None:
        sizes["temperature"] = method.rollout.temperature
    before = Engine({**models, "policy": models["old"]}, heads, **sizes)
    frozen = before.measure(method.frozen_needs(several_updates=measured), rows, alias={"old": "policy"})
    states = method.initial_states()
    rows = method.prepare(rows, frozen, states)
    engine = Engine(models, heads, **sizes)
    standing_in = [f for f in method.update_needs() if f.of == ("old",) and f not in frozen]
    live = dict.fromkeys([*method.live_needs(), *(dataclasses.replace(f, of=("policy",)) for f in standing_in)])
    loss, stats = engine.step(
        list(live),
        rows,
        frozen,
        partial(_loss, method, states),
        additive=method.splits(rows) if additive is None else additive,
    )
    modules: dict[str, nn.Module] = {"policy": models["policy"], **heads}
    named = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    return Outcome(loss, grads, stats, rows)


def _loss(method: Method, states: dict, rows: Rows, stats: Stats) -> Tensor:
    return method.loss(rows, method.with_old(stats), states)


def assert_same(found: Outcome, wanted: Outcome, tolerance: float = 1e-9) -> None:
    """Equal loss and gradients, relative to the largest gradient."""
    torch.testing.assert_close(found.loss, wanted.loss, rtol=tolerance, atol=tolerance)
    assert found.grads.keys() == wanted.grads.keys()
    for name, grad in wanted.grads.items():
        difference = (found.grads[name] - grad).abs().max()
        assert difference <= tolerance * max(1.0, float(grad.abs().max())), f"{name}: {difference}"


# -- a network -------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A small recurrent-free language model: each state sees the sum of what came before it.

    Args:
        vocab, dim: sizes.
        dropout: probability of dropping a unit of a state.
        head: from states to logits; a linear layer by default.
        scale, softcap: of the head.
    """

    def __init__(
        self,
        vocab: int = 11,
        dim: int = 6,
        dropout: float = 0.0,
        head: nn.Module | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        seed: int | str = 0,
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__()
        self.embedding, self.mix = nn.Embedding(vocab, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(dim, vocab) if head is None else head
        self.to(dtype)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(0.8 * noise("network", seed, name, shape=tuple(parameter.shape)))
        self.head = Head(self.output, scale, softcap)
        self.calls: list[int] = []
        self.eval()

    @property
    def module(self) -> nn.Module:
        """The parameters."""
        return self

    def hidden(self, rows: Rows) -> Tensor:
        """States before each token, from the tokens that the mask of prompt and completion shows."""
        self.calls.append(len(rows))
        ids = torch.cat([rows.prompt_ids, rows.tokens], 1)
        seen = torch.cat([rows.prompt_mask, rows.present], 1)
        embedded = self.embedding(ids) * seen[..., None]
        before = embedded.cumsum(1)[:, rows.prompt_ids.shape[1] - 1 : -1]
        return self.dropout(torch.tanh(self.mix(before)))


def text_rows(rows: int = 5, width: int = 6, vocab: int = 11, prompt: int = 3) -> Rows:
    """Rows of random tokens of different lengths, with padding on both sides and a gap."""
    ids = torch.randint(vocab, (rows, prompt + width), generator=generator("text", rows, width))
    lengths = torch.tensor([width, 2, width - 1, 1, 3])[torch.arange(rows) % 5]
    prompts = torch.tensor([prompt, 1, prompt, 2, prompt])[torch.arange(rows) % 5]
    mask = torch.arange(width) < lengths[:, None]
    mask[0, 1] = False
    return Rows.build(
        ids[:, :prompt],
        torch.arange(prompt) >= prompt - prompts[:, None],
        ids[:, prompt:],
        mask,
        group=torch.arange(rows) // 2,
        masks={"nll": mask & (ids[:, prompt:] % 2 == 0)},
    )
