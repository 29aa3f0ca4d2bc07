"""Forests: completions that share beginnings, as flat arrays.

A node is a stretch of tokens between two branchings; a leaf is the end of one completion. The roots of a prompt are the
children of the prompt itself, so G independent samples are G roots that are leaves at once.

Letters: N nodes, M tokens (each stored once), L leaves, T tokens of the longest completion, Q prompts, K rewards,
D levels.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.rows import Rows, Stop

Average = Literal["children", "leaves"]
PRUNED = -1  # the status of a leaf that was given up; the other statuses are those of `Stop`


class Kind(IntEnum):
    """How a node came to be."""

    SAMPLED = 0  # drawn from the policy, or from a proposal that the weights make up for
    FORCED = 1  # its first token was opened by a search, whatever its probability
    REGENERATED = 2  # drawn anew from a place inside a finished completion
    RETRIED = 3  # a further attempt from an earlier state, after feedback on the one before


@dataclass(frozen=True, eq=False)
class Forest:
    """Trees of completions, any number of them for each prompt; parents come before their children.

    Args:
        parent: of each node, -1 for a root, shape [N].
        start, end: its stretch of `tokens`, half open, shape [N]; only a leaf may be empty.
        depth: 0 for a root, shape [N].
        prompt: number of the prompt, shape [N].
        kind: `Kind`, shape [N].
        branch_log_q: log-probability with which the first token of a node was proposed, shape [N]: its `logp` where it
            was sampled, -log k where k children were forced open.
        tokens: of all nodes, each stretch once, shape [M].
        logp: log-probability of each token under the policy that wrote it, shape [M].
        trainable: False on tool output and injected text, shape [M].
        leaf_node: the node that each leaf ends; every node without children is one leaf, shape [L].
        status: `Stop` of each leaf, or PRUNED, shape [L].
        log_w: log-weight of each leaf, 0 for a plain sample, -inf for one that does not count, shape [L].
        reward: of each leaf, shape [L] or [L, K]; NaN where there is none.
        entropy: of the distribution of each token, shape [M].

    Raises:
        ValueError: the arrays are no forest; it names the first node or leaf that is wrong.
    """

    parent: Int[Tensor, "N"]
    start: Int[Tensor, "N"]
    end: Int[Tensor, "N"]
    depth: Int[Tensor, "N"]
    prompt: Int[Tensor, "N"]
    kind: Int[Tensor, "N"]
    branch_log_q: Float[Tensor, "N"]
    tokens: Int[Tensor, "M"]
    logp: Float[Tensor, "M"]
    trainable: Bool[Tensor, "M"]
    leaf_node: Int[Tensor, "L"]
    status: Int[Tensor, "L"]
    log_w: Float[Tensor, "L"]
    reward: Float[Tensor, "L"] | Float[Tensor, "L K"] | None = None
    entropy: Float[Tensor, "M"] | None = None

    def __post_init__(self) -> None:
        _check_nodes(self)
        _check_spans(self)
        _check_leaves(self)

    def __len__(self) -> int:
        return len(self.leaf_node)

    @staticmethod
    def of_rows(rows: Rows) -> "Forest":
        """Independent completions: each row is a root and a leaf, each group a prompt, numbered in the order of ids.

        Raises:
            ValueError: the rows carry no behaviour log-probabilities.
        """
        if "behaviour" not in rows.logp:
            raise ValueError("a forest needs rows.logp['behaviour'], which rollouts record")
        inside = rows.present
        end = inside.sum(1).cumsum(0)
        logp = rows.logp["behaviour"][inside]
        zeros = torch.zeros_like(end)
        start = end - inside.sum(1)
        first = torch.cat([logp, logp.new_zeros(1)])[start]
        return Forest(
            parent=zeros - 1,
            start=start,
            end=end,
            depth=zeros,
            prompt=rows.group.unique(return_inverse=True)[1],
            kind=zeros + int(Kind.SAMPLED),
            branch_log_q=torch.where(end > start, first, torch.zeros_like(first)),
            tokens=rows.tokens[inside],
            logp=logp,
            trainable=rows.mask[inside],
            leaf_node=torch.arange(len(rows), device=rows.device),
            status=rows.stop,
            log_w=rows.weight.log(),
            reward=rows.reward[:, 0] if rows.reward is not None and rows.reward.shape[1] == 1 else rows.reward,
        )

    # -- relations ---------------------------------------------------------------------------------------------------

    @property
    def paths(self) -> Int[Tensor, "L D"]:
        """The nodes from the root to each leaf, level by level, -1 after the end."""
        levels = int(self.depth.max()) + 1
        path = torch.full((len(self), levels), -1, device=self.depth.device)
        at = self.leaf_node
        for d in range(levels - 1, -1, -1):
            here = self.depth[at] == d
            path[:, d] = torch.where(here, at, -1)
            at = torch.where(here & (d > 0), self.parent[at], at)
        return path

    @property
    def mult(self) -> Int[Tensor, "N"]:
        """Leaves below each node."""
        path = self.paths
        return torch.bincount(path[path >= 0], minlength=len(self.parent))

    def children(self, node: int) -> Int[Tensor, "n"]:
        """The nodes that continue a node."""
        return (self.parent == node).nonzero(as_tuple=True)[0]

    def siblings(self, node: int) -> Int[Tensor, "n"]:
        """The other nodes that begin where a node begins; for a root, the other roots of its prompt."""
        beside = (self.parent == self.parent[node]) & (self.prompt == self.prompt[node])
        beside[node] = False
        return beside.nonzero(as_tuple=True)[0]

    def leaves_below(self, node: int) -> Int[Tensor, "n"]:
        """The leaves that contain a node."""
        return (self.paths[:, int(self.depth[node])] == node).nonzero(as_tuple=True)[0]

    def values(self, reward: Float[Tensor, "L"], average: Average = "children") -> Float[Tensor, "N"]:
        """Vbar: R at a leaf; elsewhere the mean over the children, or over the leaves below (see `backed_up`).

        Args:
            reward: R of each leaf; NaN leaves it out.
            average: the two differ where subtrees differ in size: leaves [1, 1, 0] and [0] give 1/3 and 1/2.
        """
        value = torch.full_like(self.branch_log_q, torch.nan, dtype=reward.dtype).index_copy(0, self.leaf_node, reward)
        weight = torch.zeros_like(value).index_copy(0, self.leaf_node, self.log_w.exp().to(value))
        return backed_up(self.parent, self.depth, value, weight, average)[0]

    # -- changes -----------------------------------------------------------------------------------------------------

    def keep(self, leaves: Bool[Tensor, "L"]) -> "Forest":
        """The forest of some of its leaves, in their order; nodes of no such leaf are dropped.

        Raises:
            ValueError: no leaf is kept.
        """
        if not bool(leaves.any()):
            raise ValueError("a forest must keep at least one leaf")
        path = self.paths[leaves]
        used = torch.zeros_like(self.parent)
        used[path[path >= 0]] = 1
        return _renumbered(self, torch.where(used > 0, used.cumsum(0) - 1, -1), leaves)

    def merged(self) -> "Forest":
        """The same completions, each sampled only child made one node with its parent."""
        down = self.parent.clamp(min=0)
        families = torch.bincount(self.parent[self.parent >= 0], minlength=len(self.parent))
        joined = (self.parent >= 0) & (families[down] == 1) & (self.kind == int(Kind.SAMPLED))
        head = torch.where(joined, down, torch.arange(len(down), device=down.device))
        while not torch.equal(head, head[head]):  # doubles the stretch at each pass
            head = head[head]
        number = (~joined).long().cumsum(0) - 1
        return _renumbered(self, number[head], torch.ones_like(self.leaf_node, dtype=torch.bool))

    # -- rows --------------------------------------------------------------------------------------------------------

    def rows(self, prompt_ids: Int[Tensor, "Q W"], prompt_mask: Bool[Tensor, "Q W"], pad_id: int) -> Rows:
        """A row for each leaf, in their order; shared tokens are repeated, and count in each row.

        `weight` is exp(log_w), `group` and `data_index` the prompt; `row` is left to the caller. The columns, for
        `TreeAdvantage`, `PrefixWeight` and `BranchCorrection`, [L, T] unless said otherwise and 0 on padding:

            node        number of the token's node, from 1
            mult        leaves below it
            owner       True in the first row with weight that holds it, and in no other
            correction  logp - branch_log_q on the first token of a forced node, else 0
            branch      tokens before the first with mult 1, shape [L]
            log_w       shape [L]

        `Rows.mult` and `Rows.owner` stay 1 and True. To set them to these columns counts each shared token once, for
        all its rows: the same loss where advantages are constant on nodes and weights equal, and wrong elsewhere.

        Args:
            prompt_ids, prompt_mask: of each prompt, left-padded.
            pad_id: token after the end.
        """
        node, place, inside = _cells(self)
        mask = inside & self.trainable[place]
        mult = torch.where(inside, self.mult[node], 0)
        opened = inside & (place == self.start[node]) & (self.kind[node] == int(Kind.FORCED))
        columns = {
            "node": torch.where(inside, node + 1, 0),
            "mult": mult,
            "owner": inside & (_owners(self)[node] == torch.arange(len(self), device=node.device)[:, None]),
            "correction": torch.where(opened, self.logp[place] - self.branch_log_q[node], 0.0),
            "branch": (mult > 1).sum(1),
            "log_w": self.log_w,
        }
        if self.entropy is not None:
            columns["entropy"] = torch.where(mask, self.entropy[place], 0.0)
        prompt = self.prompt[self.leaf_node]
        return Rows.build(
            prompt_ids[prompt],
            prompt_mask[prompt],
            torch.where(inside, self.tokens[place], pad_id),
            mask,
            stop=self.status,
            group=prompt,
            data_index=prompt,
            weight=self.log_w.exp().to(self.logp),
            logp={"behaviour": torch.where(mask, self.logp[place], 0.0)},
            reward=self.reward if self.reward is None else self.reward.view(len(self), -1),
            columns=columns,
        )


def backed_up(
    parent: Int[Tensor, "N"],
    depth: Int[Tensor, "N"],
    value: Float[Tensor, "N"],
    weight: Float[Tensor, "N"],
    average: Average,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Values and weights of all nodes from those of the leaves, level by level.

        w(n) = mean over children of w(c)  or  sum over leaves of w,    V(n) = sum_c w(c) V(c) / sum_c w(c)

    With equal weights V is the mean over the children or over the leaves; with the weights of a sampler, its estimate.

    Args:
        parent: -1 for a root; parents stand one level above.
        depth: the level.
        value: of the leaves (nodes without children); NaN for one that is not there.
        weight: of the leaves.
        average: children or leaves.

    Returns:
        V, NaN where nothing below has weight, and w.

    Raises:
        ValueError: another average.
    """
    if average not in ("children", "leaves"):
        raise ValueError(f"average must be children or leaves, not '{average}'")
    leaf = torch.bincount(parent[parent >= 0], minlength=len(parent)) == 0
    there = leaf & ~value.isnan()
    weight = torch.where(there, weight.to(value), 0.0)
    mass = torch.where(there, weight * value, 0.0)
    count = there.to(value)
    order = depth.argsort(stable=True)
    for at in reversed(order.split(torch.bincount(depth).tolist())):
        if average == "children":
            number = count[at].clamp(min=1)
            weight[at], mass[at], count[at] = weight[at] / number, mass[at] / number, (count[at] > 0).to(count)
        below = at[parent[at] >= 0]
        for total in (weight, mass, count):
            total.index_add_(0, parent[below], total[below])
    inner = torch.where(weight > 0, mass / torch.where(weight > 0, weight, 1.0), torch.nan)
    return torch.where(leaf, value, inner), weight


def unrolled(start: Int[Tensor, "n"], end: Int[Tensor, "n"]) -> tuple[Int[Tensor, "m"], Int[Tensor, "m"]]:
    """All places of some stretches, one stretch after another, and the stretch of each.

    >>> unrolled(torch.tensor([4, 0]), torch.tensor([6, 3]))
    (tensor([0, 0, 1, 1, 1]), tensor([4, 5, 0, 1, 2]))
    """
    size = end - start
    owner = torch.arange(len(size), device=size.device).repeat_interleave(size)
    before = size.cumsum(0) - size
    return owner, torch.arange(len(owner), device=size.device) - before[owner] + start[owner]


def depths(parent: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    """Steps from each node to its root, by doubling them at each pass.

    >>> depths(torch.tensor([-1, 0, 0, 2]))
    tensor([0, 1, 1, 2])
    """
    depth, up = (parent >= 0).long(), parent
    while bool((up >= 0).any()):
        inner = up.clamp(min=0)
        depth = depth + torch.where(up >= 0, depth[inner], 0)
        up = torch.where(up >= 0, up[inner], -1)
    return depth


def _cells(forest: Forest) -> tuple[Int[Tensor, "L T"], Int[Tensor, "L T"], Bool[Tensor, "L T"]]:
    """The node and the place in the token array of every cell of the rows, and which cells hold a token."""
    path = forest.paths
    size = torch.where(path >= 0, (forest.end - forest.start)[path], 0)
    edge = size.cumsum(1)
    width = int(edge[:, -1].max())
    t = torch.arange(width, device=path.device).expand(len(path), width).contiguous()
    level = torch.searchsorted(edge, t, right=True)
    inside = level < path.shape[1]
    level = level.clamp(max=path.shape[1] - 1)
    node = torch.where(inside, path.gather(1, level), 0)
    place = forest.start[node] + t - (edge - size).gather(1, level)
    return node, torch.where(inside, place, 0), inside


def _owners(forest: Forest) -> Int[Tensor, "N"]:
    """The first leaf with weight below each node; the first of all where none has."""
    path = forest.paths
    count = len(path)
    rank = torch.arange(count, device=path.device) + count * (forest.log_w == -torch.inf)
    first = torch.full((len(forest.parent),), 2 * count, device=path.device)
    held = path >= 0
    return first.scatter_reduce(0, path[held], rank[:, None].expand_as(path)[held], "amin") % count


def _renumbered(forest: Forest, number: Int[Tensor, "N"], leaves: Bool[Tensor, "L"]) -> Forest:
    """Nodes under new numbers, -1 for those that go; nodes of one number become one, in their order."""
    kept = (number >= 0).nonzero(as_tuple=True)[0]
    order = kept[number[kept].argsort(stable=True)]
    new = number[order]
    first = torch.ones_like(new, dtype=torch.bool)
    first[1:] = new[1:] != new[:-1]
    head = order[first]
    owner, place = unrolled(forest.start[order], forest.end[order])
    size = torch.bincount(new[owner], minlength=len(head))
    end = size.cumsum(0)
    up = forest.parent[head]
    parent = torch.where(up >= 0, number[up.clamp(min=0)], -1)
    return Forest(
        parent=parent,
        start=end - size,
        end=end,
        depth=depths(parent),
        prompt=forest.prompt[head],
        kind=forest.kind[head],
        branch_log_q=forest.branch_log_q[head],
        tokens=forest.tokens[place],
        logp=forest.logp[place],
        trainable=forest.trainable[place],
        leaf_node=number[forest.leaf_node[leaves]],
        status=forest.status[leaves],
        log_w=forest.log_w[leaves],
        reward=None if forest.reward is None else forest.reward[leaves],
        entropy=None if forest.entropy is None else forest.entropy[place],
    )


def _check_nodes(forest: Forest) -> None:
    parent, count = forest.parent, len(forest.parent)
    names = ("start", "end", "depth", "prompt", "kind", "branch_log_q")
    _equal_lengths({"parent": parent, **{name: getattr(forest, name) for name in names}})
    if not count:
        raise ValueError("a forest needs at least one node")
    index = torch.arange(count, device=parent.device)
    _refuse((parent >= index) | (parent < -1), "node", "must come after its parent")
    up = parent.clamp(min=0)
    root = parent < 0
    _refuse(forest.depth != torch.where(root, 0, forest.depth[up] + 1), "node", "must stand one level below its parent")
    _refuse(~root & (forest.prompt != forest.prompt[up]), "node", "must belong to the prompt of its parent")
    _refuse(forest.prompt < 0, "node", "has no prompt")
    _refuse((forest.kind < 0) | (forest.kind >= len(Kind)), "node", "has a kind that is none of `Kind`")


def _check_spans(forest: Forest) -> None:
    known = {name: getattr(forest, name) for name in ("tokens", "logp", "trainable")}
    _equal_lengths(known if forest.entropy is None else {**known, "entropy": forest.entropy})
    size = forest.end - forest.start
    _refuse((size < 0) | (forest.start < 0), "node", "has a stretch that ends before it starts")
    _refuse(forest.end > len(forest.tokens), "node", "has a stretch beyond the last token")
    covered = torch.bincount(unrolled(forest.start, forest.end)[1], minlength=len(forest.tokens))
    _refuse(covered != 1, "token", "must belong to exactly one node")
    inner = torch.zeros_like(size, dtype=torch.bool)
    inner[forest.parent[forest.parent >= 0]] = True
    _refuse(inner & (size == 0), "node", "has children but no tokens; only a leaf may be empty")


def _check_leaves(forest: Forest) -> None:
    known = {name: getattr(forest, name) for name in ("leaf_node", "status", "log_w")}
    _equal_lengths(known if forest.reward is None else {**known, "reward": forest.reward})
    count = len(forest.parent)
    _refuse((forest.leaf_node < 0) | (forest.leaf_node >= count), "leaf", "ends in a node that does not exist")
    inner = torch.bincount(forest.parent[forest.parent >= 0], minlength=count) > 0
    ends = torch.bincount(forest.leaf_node, minlength=count)
    _refuse(inner & (ends > 0), "node", "is a leaf but has children; give the leaf an empty node of its own")
    _refuse(~inner & (ends != 1), "node", "has no children, so it must be the end of exactly one leaf")
    _refuse((forest.status < PRUNED) | (forest.status >= len(Stop)), "leaf", "has a status that is none of `Stop`")
    _refuse(forest.log_w.isnan() | (forest.log_w == torch.inf), "leaf", "has a log-weight that is no number")


def _equal_lengths(arrays: dict[str, Tensor]) -> None:
    (first, wanted), *others = arrays.items()
    for name, array in others:
        if len(array) != len(wanted):
            raise ValueError(f"a forest has {len(wanted)} entries in '{first}' but {len(array)} in '{name}'")


def _refuse(wrong: Bool[Tensor, "n"], noun: str, what: str) -> None:
    if bool(wrong.any()):
        raise ValueError(f"{noun} {int(wrong.nonzero()[0])} of the forest {what}")
