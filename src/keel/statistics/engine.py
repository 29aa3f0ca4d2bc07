"""The engine: measures functionals over whole optimiser steps, and takes gradients back through them.

    stats = measure(functionals, rows)        numbers [B, T], no graph
    loss  = any function of them
    g     = d loss / d stats                  small
    backward(g)                               micro-batch by micro-batch, the head's backward in closed form

The logits exist only for a chunk of positions, sized in bytes. A step that fits one micro-batch keeps the graph of its
states and needs one pass; so does a step whose parts are all additive. Both give what the two passes give.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from keel.core.aggregate import totals
from keel.core.choice import counter_seed
from keel.core.policy import PolicyModel
from keel.core.products import fast_products
from keel.core.rows import Rows
from keel.statistics.functionals import Functional, Value, backbone
from keel.statistics.positions import Positions
from keel.statistics.stats import Stats, packed, unpacked
from keel.statistics.workspace import Workspace

LIVE = "policy"
CHUNK_BYTES, CHUNK_BYTES_CPU = 64 << 20, 12 << 20
AGAIN = 0.6  # share of rows up to which it is cheaper to go forward again with these than backward with all
Loss = Callable[[Rows, Stats], Tensor]


@dataclass
class Pass:
    """One micro-batch: its rows, where its positions lie in the step's [B, T], its tokens and states."""

    index: Tensor
    rows: Rows
    place: tuple[Tensor, Tensor]
    row: Tensor  # of each position, in `index`
    token: Tensor
    hidden: dict[str, Tensor]
    kept: list[Positions] = field(default_factory=list)
    known: dict[int, dict[Hashable, Any]] = field(default_factory=dict)


class Engine:
    """Measures and differentiates; holds the models by name, and the method's heads.

    Args:
        models: "policy" (trained), and frozen ones by name.
        heads: the method's own modules, by name; one with a method `hidden(rows)` has a body of its own.
        temperature: of the softmax of every model.
        max_tokens: tokens of a micro-batch, padding included.
        chunk_bytes: memory for one copy of a chunk's logits; None is 12 MiB on a CPU, where it should stay near the
            cache, and 64 MiB on an accelerator.
        dropout: train with the policy's dropout; its randomness is replayed in the second pass.
    """

    def __init__(
        self,
        models: dict[str, PolicyModel],
        heads: dict[str, nn.Module] | None = None,
        *,
        temperature: float = 1.0,
        max_tokens: int = 16384,
        chunk_bytes: int | None = None,
        dropout: bool = False,
    ):
        self.models, self.heads = dict(models), dict(heads or {})
        self.temperature, self.max_tokens, self.chunk_bytes = temperature, max_tokens, chunk_bytes
        self.dropout = dropout

    # -- measuring -----------------------------------------------------------------------------------------------

    @fast_products()
    @torch.no_grad()
    def measure(self, functionals: Sequence[Functional], rows: Rows, alias: dict[str, str] | None = None) -> Stats:
        """Numbers without gradient, [B, T, *F]; `alias` reads one model under another's name ("old" for "policy").

        Raises:
            KeyError: a functional reads a model that the engine does not have.
        """
        if not functionals:
            return Stats()
        out, workspace = _Collector(rows), Workspace()
        for index in self.split(rows):
            batch = self._forward(rows, index, functionals, grad=False, alias=alias or {})
            for start, stop in self._chunks(batch, functionals):
                at = self._positions(batch, start, stop, alias or {}, workspace)
                for functional in functionals:
                    out.put(functional, batch, start, stop, functional(at))
                at.close()
        return out.stats(functionals)

    @fast_products()
    def step(
        self,
        functionals: Sequence[Functional],
        rows: Rows,
        frozen: Stats,
        loss: Loss,
        *,
        additive: bool = False,
        counter: tuple[int, ...] = (0,),
    ) -> tuple[Tensor, Stats]:
        """Value of `loss(rows, stats)`, with its gradient added to `.grad` of the policy and the heads.

        Args:
            functionals: the live ones, which name the policy.
            rows: all rows of the optimiser step.
            frozen: statistics already known for these rows.
            loss: a function of rows and statistics; with `additive`, one that a slice with `totals` adds up to.
            counter: identifies the step, for dropout.

        Returns:
            The loss, and all statistics, detached.
        """
        plan = self.split(rows)
        if additive and len(plan) > 1:
            return self._step_additive(functionals, rows, frozen, loss, plan, counter)
        single = len(plan) == 1
        passes = []
        for i, index in enumerate(plan):
            passes.append(self._forward(rows, index, functionals, grad=single, counter=(*counter, i)))
        live = self._measure_passes(functionals, rows, passes)
        value, grads = self._differentiate(loss, rows, frozen, live)
        for i, batch in enumerate(passes):
            self._backward_rows(rows, batch, functionals, grads, (*counter, i))
        return value, frozen.merged(live.detached())

    # -- the two passes ------------------------------------------------------------------------------------------

    def _measure_passes(self, functionals: Sequence[Functional], rows: Rows, passes: list[Pass]) -> Stats:
        out, workspace = _Collector(rows), Workspace()
        with torch.no_grad():
            for batch in passes:
                chunks = list(self._chunks(batch, functionals))
                for start, stop in chunks:
                    at = self._positions(batch, start, stop, {}, workspace)
                    for functional in functionals:
                        out.put(functional, batch, start, stop, functional(at))
                    if len(passes) == 1 and len(chunks) == 1:
                        batch.kept.append(at)
                    else:
                        batch.known[start] = at.known
                        at.close()
        return out.stats(functionals)

    def _step_additive(self, functionals, rows, frozen, loss, plan, counter) -> tuple[Tensor, Stats]:
        whole = totals(rows)
        out = _Collector(rows)
        value = torch.zeros((), device=rows.device)
        for i, index in enumerate(plan):
            part = rows.with_(totals=whole, pairs=None).select(index)
            every = torch.arange(len(index), device=index.device)
            batch = self._forward(part, every, functionals, grad=True, counter=(*counter, i))
            live = self._measure_passes(functionals, part, [batch])
            share, grads = self._differentiate(loss, part, frozen.select(index), live)
            value = value + share
            for functional, numbers in live.items():
                out.put_rows(functional, index, numbers.detach(), part)
            self._backward_rows(part, batch, functionals, grads, (*counter, i))
        return value, frozen.merged(out.stats(functionals))

    def _differentiate(
        self, loss: Loss, rows: Rows, frozen: Stats, live: Stats
    ) -> tuple[Tensor, dict[Functional, Tensor]]:
        leaves = {f: value.detach().requires_grad_() for f, value in live.items()}
        with torch.enable_grad():
            value = loss(rows, frozen.merged(leaves))
        if not value.requires_grad:
            return value.detach(), {}
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        found = {f: g for f, g in zip(leaves, grads, strict=True) if g is not None and _learns(f)}
        return value.detach(), {f: unpacked(g, rows.masks[f.where]) if packed(f) else g for f, g in found.items()}

    def _backward_rows(self, rows: Rows, batch: Pass, functionals, grads: dict[Functional, Tensor], counter) -> None:
        """Back through a micro-batch; rows without gradient (tied groups, say) are left out where that is cheaper."""
        learning = self._learning(batch, grads)
        count, graph = int(learning.sum()), any(h.requires_grad for h in batch.hidden.values())
        if not count:
            return
        if self.dropout or (graph and count > AGAIN * len(learning)):  # masks of dropout are those of all rows
            learning = torch.ones_like(learning)
        if not graph or not bool(learning.all()):
            batch = self._again(rows, batch, functionals, counter, learning)
        self._backward(batch, grads)

    def _learning(self, batch: Pass, grads: dict[Functional, Tensor]) -> Tensor:
        """Which rows of a micro-batch have a gradient."""
        found = torch.zeros(len(batch.index), dtype=torch.bool, device=batch.token.device)
        for functional, grad in grads.items():
            g = self._gradient_at(functional, grad, batch, 0, len(batch.token))
            found[batch.row[g.flatten(1).any(1) if g.dim() > 1 else g != 0]] = True
        return found

    def _again(self, rows: Rows, batch: Pass, functionals, counter, learning: Tensor) -> Pass:
        """Rows of a micro-batch once more with a graph for the policy; states of frozen models are reused."""
        trained, whole = self._trained(functionals), bool(learning.all())
        same = slice(None) if whole else learning[batch.row]
        frozen = {name: hidden[same] for name, hidden in batch.hidden.items() if name not in trained}
        batch.hidden, batch.kept = {}, []  # with its graph, if there is one
        again = self._forward(rows, batch.index[learning], functionals, grad=True, counter=counter, only=trained)
        again.hidden, again.known = {**frozen, **again.hidden}, batch.known if whole else {}
        return again

    def _backward(self, batch: Pass, grads: dict[Functional, Tensor]) -> None:
        """Through the heads chunk by chunk, then once through each body."""
        states = {name: h for name, h in batch.hidden.items() if h.requires_grad}
        upstream = {name: torch.zeros_like(h) for name, h in states.items()}
        workspace = Workspace()
        for start, stop in self._chunks(batch, list(grads)):
            at = batch.kept[0] if batch.kept else self._positions(batch, start, stop, {}, workspace)
            self._backward_chunk(batch, at, grads, start, stop, upstream)
            at.close()
        batch.kept.clear()
        for name, hidden in states.items():
            if bool(upstream[name].any()):
                hidden.backward(upstream[name])

    def _backward_chunk(self, batch, at, grads, start, stop, upstream) -> None:
        head = self.models[LIVE].head
        dlogits: Tensor | None = None
        for functional, grad in grads.items():
            g = self._gradient_at(functional, grad, batch, start, stop)
            if not bool(g.any()):
                continue
            if isinstance(functional, Value):
                self._backward_value(functional, batch, start, stop, g, upstream)
                continue
            if dlogits is None:
                with torch.no_grad():
                    dlogits = at.take_like(at.centred(LIVE)).zero_()
            if hasattr(functional, "backward"):
                with torch.no_grad():
                    functional.backward(at, g, dlogits)
            else:
                dlogits += self._autograd(functional, at, g)
        if dlogits is not None and LIVE in upstream:
            with torch.no_grad():
                at.settle(dlogits)
                if self.temperature != 1.0:
                    dlogits /= self.temperature
                upstream[LIVE][start:stop] += head.backward(batch.hidden[LIVE][start:stop].detach(), dlogits)

    def _gradient_at(self, functional: Functional, grad: Tensor, batch: Pass, start: int, stop: int) -> Tensor:
        b, t = batch.place[0][start:stop], batch.place[1][start:stop]
        if functional.where != "last":
            return grad[b, t]
        g = grad[b]  # only the last position of a row carries it
        return g * _is_last(batch)[start:stop].view(-1, *(1,) * (g.dim() - 1))

    def _backward_value(self, functional: Value, batch, start, stop, g, upstream) -> None:
        source = backbone(functional.head) if backbone(functional.head) in batch.hidden else functional.of[0]
        with torch.enable_grad():
            leaf = batch.hidden[source][start:stop].detach().requires_grad_()
            out = self.heads[functional.head](leaf)
            out.backward(g.to(out.dtype))
        if source in upstream and source not in functional.stop and leaf.grad is not None:
            upstream[source][start:stop] += leaf.grad

    def _autograd(self, functional, at: Positions, g) -> Tensor:
        with torch.no_grad():
            logits = at.logits(LIVE)
        with torch.enable_grad():
            leaf = logits.requires_grad_()
            (dlogits,) = torch.autograd.grad(functional(at.with_leaf(leaf)), leaf, g)
        return dlogits

    # -- forward -------------------------------------------------------------------------------------------------

    def split(self, rows: Rows) -> list[Tensor]:
        """Micro-batches of at most `max_tokens`, one row at least: groups side by side, similar lengths together."""
        prompt = rows.prompt_mask.sum(1)
        completion = rows.present.sum(1)
        total = prompt + completion
        groups, member = rows.group.unique(return_inverse=True)
        longest = total.new_zeros(len(groups)).scatter_reduce(0, member, total, "amax")[member]
        order = torch.argsort(member, stable=True)
        order = order[torch.argsort(longest[order], descending=True, stable=True)]
        sizes = torch.stack([prompt, completion], 1)[order].tolist()
        batches: list[Tensor] = []
        start, widest = 0, [0, 0]
        for i, (p, t) in enumerate(sizes):
            widest_now = [max(widest[0], p), max(widest[1], t)]
            if i > start and (i - start + 1) * sum(widest_now) > self.max_tokens:
                batches.append(order[start:i])
                start, widest_now = i, [p, t]
            widest = widest_now
        batches.append(order[start:])
        return batches

    def _forward(self, rows, index, functionals, *, grad: bool, alias=None, counter=None, only=None) -> Pass:
        part = rows.with_(pairs=None).select(index).trim()
        place = part.mask.nonzero(as_tuple=True)
        batch = Pass(index, part, (index[place[0]], place[1]), place[0], part.tokens[place], {})
        for name in self._models_read(functionals) if only is None else only:
            source = (alias or {}).get(name, name)
            trained = source == LIVE or source.startswith("head:")
            with torch.set_grad_enabled(grad and trained), self._dropout(source, counter):
                body = self.heads[source[5:]] if source.startswith("head:") else self.models[source]
                batch.hidden[name] = body.hidden(part)[place]  # type: ignore[operator]
        return batch

    def _models_read(self, functionals: Sequence[Functional]) -> list[str]:
        names: dict[str, None] = {}
        for functional in functionals:
            if isinstance(functional, Value) and hasattr(self.heads[functional.head], "hidden"):
                names[backbone(functional.head)] = None
            else:
                names.update(dict.fromkeys(functional.of))
        return list(names)

    def _trained(self, functionals: Sequence[Functional]) -> list[str]:
        return [name for name in self._models_read(functionals) if name == LIVE or name.startswith("head:")]

    def _positions(self, batch: Pass, start: int, stop: int, alias: dict[str, str], workspace: Workspace) -> Positions:
        names = {name: alias.get(name, name) for name in batch.hidden if not name.startswith("head:")}
        return Positions(
            batch.token[start:stop],
            {name: hidden[start:stop].detach() for name, hidden in batch.hidden.items()},
            {name: self.models[source].head for name, source in names.items()},
            self.heads,
            self.temperature,
            batch.known.get(start),
            workspace,
        )

    def _chunks(self, batch: Pass, functionals: Sequence[Functional]) -> Iterator[tuple[int, int]]:
        """Ranges of positions whose logits fit `chunk_bytes`; one empty range where there are no positions."""
        if not functionals:
            return
        positions = len(batch.token)
        automatic = CHUNK_BYTES_CPU if batch.token.device.type == "cpu" else CHUNK_BYTES
        chunk_bytes = automatic if self.chunk_bytes is None else self.chunk_bytes
        size = max(1, chunk_bytes // (4 * self._vocabulary(batch)))
        for start in range(0, max(1, positions), size):
            yield start, min(positions, start + size)

    def _vocabulary(self, batch: Pass) -> int:
        module = self.models[LIVE].head.module
        if module is None:
            return next(iter(batch.hidden.values())).shape[-1]
        weight = getattr(module, "weight", None)
        return weight.shape[0] if weight is not None else 1 << 15

    @contextlib.contextmanager
    def _dropout(self, source: str, counter: tuple[int, ...] | None):
        """Dropout on only for the policy in a step, seeded by the step so that a second pass repeats it."""
        if source != LIVE or counter is None or not self.dropout:
            yield
            return
        module = self.models[LIVE].module
        with torch.random.fork_rng():
            torch.manual_seed(counter_seed("dropout", *counter))
            module.train()
            try:
                yield
            finally:
                module.eval()


class _Collector:
    """Puts numbers of chunks at their places in the step's [B, T]."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.values: dict[Functional, Tensor] = {}

    def _room(self, functional: Functional, numbers: Tensor, tail: int) -> Tensor:
        if functional not in self.values:
            shape = self.rows.tokens.shape[:1] if functional.where == "last" else self.rows.tokens.shape
            self.values[functional] = numbers.new_zeros(*shape, *numbers.shape[tail:])
        return self.values[functional]

    def put(self, functional: Functional, batch: Pass, start: int, stop: int, numbers: Tensor) -> None:
        room = self._room(functional, numbers, 1)
        b, t = batch.place[0][start:stop], batch.place[1][start:stop]
        if functional.where == "last":
            last = _is_last(batch)[start:stop]
            room[b[last]] = numbers[last]
        else:
            room[b, t] = numbers

    def put_rows(self, functional: Functional, index: Tensor, numbers: Tensor, part: Rows) -> None:
        if packed(functional):
            numbers = unpacked(numbers, part.masks[functional.where])
        tail = 1 if functional.where == "last" else 2
        room = self._room(functional, numbers, tail)
        if functional.where == "last":
            room[index] = numbers
        else:
            room[index, : numbers.shape[1]] = numbers

    def stats(self, functionals: Sequence[Functional]) -> Stats:
        masks = {f.where: self.rows.masks[f.where] for f in functionals if packed(f)}
        return Stats({f: self.values[f][masks[f.where]] if packed(f) else self.values[f] for f in functionals}, masks)


def _is_last(batch: Pass) -> Tensor:
    """Whether a position is the last chosen token of its row."""
    b = batch.place[0]
    last = torch.ones_like(b, dtype=torch.bool)
    last[:-1] = b[1:] != b[:-1]
    return last


def _learns(functional: Functional) -> bool:
    """Whether a gradient goes back through a functional: a value's head learns though its model be held constant."""
    return isinstance(functional, Value) or LIVE not in functional.stop
