"""The engine: measures functionals over whole optimiser steps, and takes gradients back through them.

    stats = measure(functionals, rows)        numbers [B, T], no graph
    loss  = any function of them
    g     = d loss / d stats                  small
    backward(g)                               micro-batch by micro-batch, the head's backward in closed form

The logits exist only for a chunk of positions, sized in bytes. A step that fits one micro-batch keeps the graph of its
states and needs one pass; so does a step whose parts are all additive. Both give what the two passes give.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from keel.core.aggregate import totals
from keel.core.choice import counter_seed
from keel.core.policy import PolicyModel
from keel.core.products import fast_products
from keel.core.rows import Rows
from keel.statistics.functionals import Functional, State, Value, backbone
from keel.statistics.passes import Collector, Pass, Slopes, column_at, is_last
from keel.statistics.positions import Positions
from keel.statistics.stats import Stats
from keel.statistics.workspace import Workspace

LIVE = "policy"
CHUNK_BYTES, CHUNK_BYTES_CPU = 64 << 20, 8 << 20
WIDE = 1 << 20  # weights of a head from which on the faster products pay
AGAIN = 0.6  # share of rows up to which it is cheaper to go forward again with these than backward with all
Loss = Callable[[Rows, Stats], Tensor]


class Engine:
    """Measures and differentiates; holds the models by name, and the method's heads.

    Args:
        models: "policy" (trained), and frozen ones by name.
        heads: the method's own modules, by name; one with a method `hidden(rows)` has a body of its own.
        temperature: of the softmax of every model.
        max_tokens: tokens of a micro-batch, padding included.
        chunk_bytes: memory for one copy of a chunk's logits; None is 8 MiB on a CPU, where it should stay near the
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

    @torch.no_grad()
    def measure(self, functionals: Sequence[Functional], rows: Rows, alias: dict[str, str] | None = None) -> Stats:
        """Numbers without gradient, [B, T, *F]; `alias` reads one model under another's name ("old" for "policy").

        Raises:
            KeyError: a functional reads a model that the engine does not have.
        """
        if not functionals:
            return Stats()
        out, workspace = Collector(rows), Workspace()
        for index in self.split(rows):
            batch = self._forward(rows, index, functionals, grad=False, alias=alias or {})
            with fast_products(self._wide()):
                for start, stop in self._chunks(batch, functionals):
                    at = self._positions(batch, start, stop, alias or {}, workspace)
                    for functional in functionals:
                        out.put(functional, batch, start, stop, functional(at))
                    at.close()
        return out.stats(functionals)

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
        if additive and (len(plan) > 1 or int(rows.mask.sum()) > self._chunk_size(rows.device)):
            return self._step_additive(functionals, rows, frozen, loss, plan, counter)
        single = len(plan) == 1
        passes = []
        for i, index in enumerate(plan):
            passes.append(self._forward(rows, index, functionals, grad=single, counter=(*counter, i)))
        live = self._measure_passes(functionals, rows, passes)
        value, grads = self._differentiate(loss, rows, frozen, live)
        workspace = Workspace()
        for i, batch in enumerate(passes):
            upstream = self._upstream(batch, functionals)
            self._through_heads(batch, grads, upstream, workspace)
            self._through_bodies(rows, batch, functionals, upstream, (*counter, i))
        return value, frozen.merged(live.detached())

    # -- the two passes ------------------------------------------------------------------------------------------

    def _measure_passes(
        self, functionals: Sequence[Functional], rows: Rows, passes: list[Pass], workspace: Workspace | None = None
    ) -> Stats:
        out, workspace = Collector(rows), workspace or Workspace()
        with torch.no_grad(), fast_products(self._wide()):
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
        out, workspace = Collector(rows), Workspace()
        value = torch.zeros((), device=rows.device)
        for i, index in enumerate(plan):
            part = rows.with_(totals=whole).select(index)
            every = torch.arange(len(index), device=index.device)
            batch = self._forward(part, every, functionals, grad=True, counter=(*counter, i))
            upstream = self._upstream(batch, functionals)
            for mine, place in self._pieces(batch, part):
                piece = self._piece(batch, part, mine, place)
                live = self._measure_passes(functionals, piece.rows, [piece], workspace)
                share, grads = self._differentiate(loss, piece.rows, frozen.select(index[mine]), live)
                value = value + share
                for functional, numbers in live.items():
                    out.put_rows(functional, index[mine], numbers.detach(), piece.rows)
                self._through_heads(piece, grads, {n: h[place] for n, h in upstream.items()}, workspace)
            self._through_bodies(part, batch, functionals, upstream, (*counter, i))
        return value, frozen.merged(out.stats(functionals))

    def _pieces(self, batch: Pass, part: Rows) -> list[tuple[slice, slice]]:
        """Rows whose logits fit one chunk, so that they are computed once, and their positions; else all rows.

        Rows that are compared in pairs stay together.
        """
        size, lengths = self._chunk_size(batch.token.device), batch.rows.mask.sum(1).tolist()
        if max(lengths, default=0) > size or sum(lengths) <= size or part.pairs is not None:
            return [(slice(0, len(lengths)), slice(0, sum(lengths)))]
        pieces, row, start, stop = [], 0, 0, 0
        for i, length in enumerate(lengths):
            if stop + length - start > size:
                pieces.append((slice(row, i), slice(start, stop)))
                row, start = i, stop
            stop += length
        return [*pieces, (slice(row, len(lengths)), slice(start, stop))]

    def _piece(self, batch: Pass, part: Rows, mine: slice, place: slice) -> Pass:
        """Some rows of a micro-batch, without their graph."""
        index = torch.arange(mine.start, mine.stop, device=batch.token.device)
        row = batch.row[place] - mine.start
        hidden = {name: h[place].detach() for name, h in batch.hidden.items()}
        return Pass(
            index - mine.start, part.select(index), (row, batch.place[1][place]), row, batch.token[place], hidden
        )

    def _differentiate(
        self, loss: Loss, rows: Rows, frozen: Stats, live: Stats
    ) -> tuple[Tensor, dict[Functional, "Slopes"]]:
        leaves = {f: value.detach().requires_grad_() for f, value in live.items()}
        with torch.enable_grad():
            value = loss(rows, frozen.merged(Stats(leaves, live.masks)))
        if not value.requires_grad:
            return value.detach(), {}
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        found = {f: g for f, g in zip(leaves, grads, strict=True) if g is not None and _learns(f)}
        return value.detach(), {f: Slopes.of(f, g, rows) for f, g in found.items()}

    # -- back ----------------------------------------------------------------------------------------------------

    def _upstream(self, batch: Pass, functionals: Sequence[Functional]) -> dict[str, Tensor]:
        """Room for the gradients of the states of what is trained."""
        trained = self._trained(functionals)
        return {name: torch.zeros_like(h, requires_grad=False) for name, h in batch.hidden.items() if name in trained}

    def _through_heads(
        self, batch: Pass, grads: dict[Functional, "Slopes"], upstream: dict[str, Tensor], workspace: Workspace
    ) -> None:
        """Gradients of the states, chunk by chunk."""
        with fast_products(self._wide()):
            for start, stop in self._chunks(batch, list(grads)):
                at = batch.kept[0] if batch.kept else self._positions(batch, start, stop, {}, workspace)
                self._backward_chunk(batch, at, grads, start, stop, upstream)
                at.close()
        batch.kept.clear()

    def _through_bodies(self, rows: Rows, batch: Pass, functionals, upstream: dict[str, Tensor], counter) -> None:
        """Once through each body; rows without gradient (tied groups, say) are left out where that is cheaper."""
        learning = torch.zeros(len(batch.index), dtype=torch.bool, device=batch.token.device)
        for gradient in upstream.values():
            learning[batch.row[gradient.any(-1)]] = True
        count, graph = int(learning.sum()), any(h.requires_grad for h in batch.hidden.values())
        if not count:
            return
        if self.dropout or (graph and count > AGAIN * len(learning)):  # masks of dropout are those of all rows
            learning = torch.ones_like(learning)
        states = batch.hidden
        if not graph or not bool(learning.all()):
            batch.hidden = {}  # with its graph, if there is one
            index, same = batch.index[learning], learning[batch.row]
            del states
            states = self._forward(rows, index, functionals, grad=True, counter=counter, only=list(upstream)).hidden
            upstream = {name: gradient[same] for name, gradient in upstream.items()}
        for name, gradient in upstream.items():
            if states[name].requires_grad and bool(gradient.any()):
                states[name].backward(gradient)

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
            if isinstance(functional, State):
                if LIVE in upstream:
                    upstream[LIVE][start:stop] += g
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

    def _gradient_at(self, functional: Functional, slopes: "Slopes", batch: Pass, start: int, stop: int) -> Tensor:
        b, t = batch.place[0][start:stop], batch.place[1][start:stop]
        if slopes.slots is not None:
            slot = slopes.slots[b, t]
            return slopes.grad.new_zeros(len(slot), *slopes.grad.shape[1:]).index_put(
                (slot >= 0,), slopes.grad[slot[slot >= 0]]
            )
        if functional.where != "last":
            return slopes.grad[b, t]
        g = slopes.grad[b]  # only the last position of a row carries it
        return g * is_last(batch)[start:stop].view(-1, *(1,) * (g.dim() - 1))

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
        """Micro-batches of at most `max_tokens`, one row at least: groups side by side, similar lengths together.

        Where rows are compared in pairs a group is never split, whatever its size.
        """
        prompt = rows.prompt_mask.sum(1)
        completion = rows.present.sum(1)
        total = prompt + completion
        groups, member = rows.group.unique(return_inverse=True)
        longest = total.new_zeros(len(groups)).scatter_reduce(0, member, total, "amax")[member]
        order = torch.argsort(member, stable=True)
        order = order[torch.argsort(longest[order], descending=True, stable=True)]
        sizes = torch.stack([prompt, completion], 1)[order].tolist()
        owners = member[order].tolist() if rows.pairs is not None else range(len(order))
        batches: list[Tensor] = []
        start, widest = 0, [0, 0]
        for _, block in itertools.groupby(range(len(order)), key=owners.__getitem__):
            own = list(block)
            largest = [max(sizes[i][side] for i in own) for side in (0, 1)]
            widest_now = [max(both) for both in zip(widest, largest, strict=True)]
            if own[0] > start and (own[-1] - start + 1) * sum(widest_now) > self.max_tokens:
                batches.append(order[start : own[0]])
                start, widest_now = own[0], largest
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
            lambda name: column_at(batch, name, start, stop),
        )

    def _chunks(self, batch: Pass, functionals: Sequence[Functional]) -> Iterator[tuple[int, int]]:
        """Ranges of positions whose logits fit `chunk_bytes`; one empty range where there are no positions."""
        if not functionals:
            return
        positions, size = len(batch.token), self._chunk_size(batch.token.device)
        for start in range(0, max(1, positions), size):
            yield start, min(positions, start + size)

    def _chunk_size(self, device: torch.device) -> int:
        """Positions whose logits fit `chunk_bytes`; no end to them where the states are the logits."""
        module = self.models[LIVE].head.module if LIVE in self.models else None
        if module is None:
            return 1 << 40
        weight = getattr(module, "weight", None)
        vocabulary = 1 << 15 if weight is None else weight.shape[0]
        return max(1, self.chunk_bytes_on(device) // (4 * vocabulary))

    def chunk_bytes_on(self, device: torch.device) -> int:
        """Memory for one copy of a chunk's logits."""
        automatic = CHUNK_BYTES_CPU if device.type == "cpu" else CHUNK_BYTES
        return automatic if self.chunk_bytes is None else self.chunk_bytes

    def _wide(self) -> bool:
        """Whether the head is large."""
        weight = getattr(self.models[LIVE].head.module, "weight", None) if LIVE in self.models else None
        return weight is not None and weight.numel() >= WIDE

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


def _learns(functional: Functional) -> bool:
    """Whether a gradient goes back through a functional: a value's head learns though its model be held constant."""
    return isinstance(functional, Value) or LIVE not in functional.stop
