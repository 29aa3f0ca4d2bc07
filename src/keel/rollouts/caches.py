"""Keys and values of one layer while rows grow by one token at a time.

    RowCache      the prompt and what follows in one buffer for each row: two products and a softmax a token
    SharedCache   long prompts once for all rows that continue them, and a buffer for what follows

On CPUs batched products and a softmax are faster for one query than the fused attention kernel.
"""

import copy
import math
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

KEPT_BYTES = 256 << 20  # buffers up to this size are kept from call to call
CHUNK = 64  # columns by which a buffer grows, or half of what it has
SHORT = 64  # a prompt of at most so many tokens is copied to its rows; sharing it would cost more than it saves


class Cache(Protocol):
    """What a layer remembers."""

    def append(self, key: Float[Tensor, "n K d"], value: Float[Tensor, "n K d"], length: int) -> None:
        """Column `length` of the completion of each row."""
        ...

    def attend(self, query: Float[Tensor, "n H d"], length: int) -> Float[Tensor, "n A"]:
        """What a scaled query reads from its prompt and from `length` tokens of its row."""
        ...

    def keep(self, source: Int[Tensor, "m"], target: Int[Tensor, "m"], rows: int, length: int) -> None:
        """Copy some rows to other places, and go on with the first ones."""
        ...

    def fork(self, index: Int[Tensor, "m"], shared: "Shared", length: int) -> Self:
        """A copy of these rows, any of them several times, that lives beside this one."""
        ...


class Workspace:
    """Buffers that small models on CPUs keep between calls: fresh memory costs more than what is written to it."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised memory in the dtype and on the device of `like`; what was taken under this name is lost."""
        size = math.prod(shape)
        old = self.kept.get(name)
        if old is None or old.numel() < size or old.dtype != like.dtype or old.device != like.device:
            self.kept.pop(name, None)
            old = like.new_empty(size)
            others = sum(tensor.numel() * tensor.element_size() for tensor in self.kept.values())
            if like.device.type == "cpu" and others + size * like.element_size() <= KEPT_BYTES:
                self.kept[name] = old
        return old[:size].view(shape)


class Shared:
    """Which rows continue which prompt: each prompt has the same number of slots, each row one of them.

    Args:
        index: prompt of each row, shape [n].
        slot: place of each row among the slots of all prompts, shape [n].
        prompts: number of prompts.
        size: slots of a prompt.
        hidden: where a prompt is padded, shape [N, P], or None.
    """

    def __init__(
        self,
        index: Int[Tensor, "n"],
        slot: Int[Tensor, "n"],
        prompts: int,
        size: int,
        hidden: Bool[Tensor, "N P"] | None,
    ):
        self.index, self.slot, self.prompts, self.size, self.hidden = index, slot, prompts, size, hidden
        self.full = len(slot) == prompts * size and bool((slot == torch.arange(len(slot), device=slot.device)).all())

    @staticmethod
    def of(index: Int[Tensor, "n"], prompts: int, hidden: Bool[Tensor, "N P"] | None) -> "Shared":
        """From the prompt of each row."""
        order = index.argsort(stable=True)
        ordered = index[order]
        first = torch.searchsorted(ordered, ordered)
        place = torch.empty_like(index)
        place[order] = torch.arange(len(index), device=index.device) - first
        size = int(place.max()) + 1
        return Shared(index, index * size + place, prompts, size, hidden)

    def keep(self, index: Int[Tensor, "m"]) -> None:
        """Go on with these rows."""
        self.index, self.slot, self.full = self.index[index], self.slot[index], False

    def fork(self, index: Int[Tensor, "m"]) -> "Shared":
        """These rows, any of them several times."""
        return Shared.of(self.index[index], self.prompts, self.hidden)

    def bias(self) -> Float[Tensor, "N P"] | None:
        """-inf where a prompt is padded."""
        if self.hidden is None:
            return None
        return torch.zeros(self.hidden.shape, device=self.hidden.device).masked_fill_(self.hidden, float("-inf"))

    def spread(self, x: Float[Tensor, "n K g d"]) -> Float[Tensor, "NK Gg d"]:
        """Rows to slots, a matrix for each prompt and key head; empty slots are zero."""
        if not self.full:
            x = x.new_zeros(self.prompts * self.size, *x.shape[1:]).index_copy_(0, self.slot, x)
        heads, group, dim = x.shape[1:]
        return (
            x.view(self.prompts, self.size, heads, group, dim)
            .transpose(1, 2)
            .reshape(self.prompts * heads, self.size * group, dim)
        )

    def gather(self, x: Float[Tensor, "NK Gg d"], heads: int) -> Float[Tensor, "n K g d"]:
        """The inverse of `spread`."""
        x = x.view(self.prompts, heads, self.size, -1, x.shape[-1]).transpose(1, 2).flatten(0, 1)
        return x if self.full else x[self.slot]


class Buffers:
    """A growing buffer of keys and one of values.

    Args:
        rows, heads, columns, limit: n, K, columns to begin with, and at most.
        like: a tensor of the dtype, with d as its last dimension.
        workspace, layer: where the memory comes from.
    """

    def __init__(self, rows: int, heads: int, columns: int, limit: int, like: Tensor, workspace: Workspace, layer: int):
        self.limit = limit
        shape = (rows, heads, columns, like.shape[-1])
        self.see(workspace.take(f"keys {layer}", shape, like), workspace.take(f"values {layer}", shape, like))

    def see(self, keys: Float[Tensor, "n K c d"], values: Float[Tensor, "n K c d"]) -> None:
        """These are the buffers from now on."""
        self.keys, self.values = keys, values
        self.columns = keys.shape[2]
        self.flat = keys.flatten(0, 1), values.flatten(0, 1)

    def put(self, key: Float[Tensor, "n K d"], value: Float[Tensor, "n K d"], column: int) -> None:
        """Write one column."""
        if column == self.columns:
            self.see(self._grown(self.keys), self._grown(self.values))
        self.keys.select(2, column).copy_(key)
        self.values.select(2, column).copy_(value)

    def read(self, columns: int) -> tuple[Float[Tensor, "nK c d"], Float[Tensor, "nK c d"]]:
        """The first columns, a matrix for each row and head."""
        keys, values = self.flat
        return keys.narrow(1, 0, columns), values.narrow(1, 0, columns)

    def keep(self, source: Int[Tensor, "m"], target: Int[Tensor, "m"], rows: int, columns: int) -> None:
        """Copy some rows to other places, and go on with the first ones."""
        for buffer in (self.keys, self.values):
            buffer[target, :, :columns] = buffer[source, :, :columns]
        self.see(self.keys[:rows], self.values[:rows])

    def fork(self, index: Int[Tensor, "m"], columns: int) -> "Buffers":
        """A copy of these rows with what stands in the first columns."""
        other = copy.copy(self)
        pair = []
        for buffer in (self.keys, self.values):
            new = buffer.new_empty(len(index), *buffer.shape[1:])
            new[:, :, :columns] = buffer[:, :, :columns].index_select(0, index)
            pair.append(new)
        other.see(*pair)
        return other

    def _grown(self, old: Tensor) -> Tensor:
        columns = min(self.limit, old.shape[2] + max(CHUNK, old.shape[2] // 2))
        new = old.new_empty(*old.shape[:2], columns, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new


class RowCache:
    """The prompt and what follows in one buffer for each row.

    Args:
        keys, values: of the prompts, shape [N, K, P, d].
        shared: which rows continue which prompt.
        room: tokens at most that will follow.
        least: columns at least in a product on CPUs; those not yet written are zero, and weigh nothing.
        workspace, layer: where the buffers come from.
    """

    def __init__(
        self,
        keys: Float[Tensor, "N K P d"],
        values: Float[Tensor, "N K P d"],
        shared: Shared,
        room: int,
        least: int,
        workspace: Workspace,
        layer: int,
    ):
        self.width, self.heads, self.shared = keys.shape[2], keys.shape[1], shared
        self.least = least if keys.device.type == "cpu" else 1
        limit = max(self.least, self.width + room)
        columns = max(self.least, self.width + min(CHUNK, room))
        self.buffers = Buffers(len(shared.index), self.heads, columns, limit, keys, workspace, layer)
        for buffer, prompt in ((self.buffers.keys, keys), (self.buffers.values, values)):
            buffer[:, :, : self.width] = prompt[shared.index]
            buffer[:, :, self.width : self.least] = 0
        bias = shared.bias()
        self.bias = None if bias is None else F.pad(bias.to(keys.dtype), (0, limit - self.width))

    def append(self, key: Float[Tensor, "n K d"], value: Float[Tensor, "n K d"], length: int) -> None:
        """See `Cache`."""
        self.buffers.put(key, value, self.width + length)

    def attend(self, query: Float[Tensor, "n H d"], length: int) -> Float[Tensor, "n A"]:
        """See `Cache`."""
        rows, dim = len(query), query.shape[-1]
        reach = max(self.width + length, self.least)
        keys, values = self.buffers.read(reach)
        query, keys = query.reshape(rows * self.heads, -1, dim), keys.transpose(1, 2)
        if self.bias is None:
            scores = torch.bmm(query, keys)
        else:
            bias = self.bias[self.shared.index, None, :reach].repeat_interleave(self.heads, 0)
            scores = torch.baddbmm(bias, query, keys)
        if reach > self.width + length:
            scores[..., self.width + length :] = float("-inf")
        return torch.bmm(softmax(scores).to(query.dtype), values).view(rows, -1)

    def keep(self, source: Int[Tensor, "m"], target: Int[Tensor, "m"], rows: int, length: int) -> None:
        """See `Cache`."""
        self.buffers.keep(source, target, rows, self.width + length)

    def fork(self, index: Int[Tensor, "m"], shared: Shared, length: int) -> Self:
        """See `Cache`."""
        other = copy.copy(self)
        other.shared, other.buffers = shared, self.buffers.fork(index, max(self.width + length, self.least))
        return other


class SharedCache:
    """Keys and values of each prompt once, and a buffer for what follows: two products on either part, one softmax.

    Args:
        keys, values, shared, room, least, workspace, layer: as in `RowCache`.
    """

    def __init__(
        self,
        keys: Float[Tensor, "N K P d"],
        values: Float[Tensor, "N K P d"],
        shared: Shared,
        room: int,
        least: int,
        workspace: Workspace,
        layer: int,
    ):
        self.shared, self.heads = shared, keys.shape[1]
        self.prompt_keys = keys.flatten(0, 1).transpose(1, 2)
        self.prompt_values = values.flatten(0, 1)
        self.least = least if keys.device.type == "cpu" else 1
        columns, limit = max(self.least, min(CHUNK, room)), max(self.least, room)
        self.buffers = Buffers(len(shared.slot), self.heads, columns, limit, keys, workspace, layer)
        self.buffers.keys[:, :, : self.least] = 0
        self.buffers.values[:, :, : self.least] = 0
        bias = shared.bias()
        self.bias = None if bias is None else bias[:, None, None]

    def append(self, key: Float[Tensor, "n K d"], value: Float[Tensor, "n K d"], length: int) -> None:
        """See `Cache`."""
        self.buffers.put(key, value, length)

    def attend(self, query: Float[Tensor, "n H d"], length: int) -> Float[Tensor, "n A"]:
        """See `Cache`."""
        rows, dim = len(query), query.shape[-1]
        query = query.contiguous().view(rows, self.heads, -1, dim)
        own, width = rows * self.heads, self.prompt_keys.shape[-1]
        reach = max(length, self.least)
        keys, values = self.buffers.read(reach)
        scores = self.shared.gather(self._on_prompt(query), self.heads)
        new = torch.bmm(query.view(own, -1, dim), keys.transpose(1, 2)).view(rows, self.heads, -1, reach)[..., :length]
        weights = softmax(torch.cat([scores, new], -1)).to(query.dtype)
        read = torch.bmm(self.shared.spread(weights[..., :width]), self.prompt_values)
        tail = F.pad(weights[..., width:], (0, reach - length)).view(own, -1, reach)
        tail = torch.bmm(tail, values)
        return self.shared.gather(read, self.heads).reshape(rows, -1) + tail.view(rows, -1)

    def _on_prompt(self, query: Float[Tensor, "n K g d"]) -> Float[Tensor, "NK Gg P"]:
        scores = torch.bmm(self.shared.spread(query), self.prompt_keys)
        if self.bias is None:
            return scores
        return (scores.view(self.shared.prompts, self.heads, -1, scores.shape[-1]) + self.bias).view(scores.shape)

    def keep(self, source: Int[Tensor, "m"], target: Int[Tensor, "m"], rows: int, length: int) -> None:
        """See `Cache`."""
        self.buffers.keep(source, target, rows, length)

    def fork(self, index: Int[Tensor, "m"], shared: Shared, length: int) -> Self:
        """See `Cache`."""
        other = copy.copy(self)
        other.shared, other.buffers = shared, self.buffers.fork(index, max(length, self.least))
        return other


def softmax(scores: Float[Tensor, "*n S"]) -> Float[Tensor, "*n S"]:
    """In fp32; on CPUs the library's own is scalar, ten times slower, below 16 entries."""
    if scores.shape[-1] >= 16 or scores.device.type != "cpu":
        return scores.softmax(-1, dtype=torch.float32)
    weights = (scores.float() - scores.amax(-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(-1, keepdim=True))
