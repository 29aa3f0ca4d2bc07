"""Advantages from trees: what a branch is worth beside its parent or its siblings.

Rows of a tree say in `columns["node"]` [B, T] to which node each token belongs (see `Forest.rows`): numbers from 1,
unique within a group, 0 on padding. The parent of a node is the node before it in any row that holds it, so rows may be
reordered, padded, or joined with those of other groups. Without the column each row is a branch of its own.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.aggregate import Groups, ratio, returns
from keel.core.forest import Average, backed_up
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.advantages.group import GroupCentre
from keel.statistics.stats import Stats

ASSIGNERS = ("flat", "parent", "sibling", "loo")
NEGLIGIBLE = 1e-9  # siblings that hold less of the weight cannot be told from rounding


@part("tree_advantage", paper=191)
@dataclass(frozen=True)
class TreeAdvantage:
    """One advantage for each node of a tree, from the returns of the leaves below.

    With Vbar(leaf) = R and Vbar(n) the mean over the children of n, or over the leaves below it,

        flat      R_i - mean of R over the group: group_centre
        parent    Vbar(n) - Vbar(parent(n)); the sum along a path is R - Vbar(root)
        sibling   Vbar(n) - mean of Vbar over n and its siblings, over their deviation + epsilon with `std`
        loo       Vbar(n) - mean of Vbar over the siblings of n without n

    The roots of a group are siblings, children of its prompt. Of these only loo is unbiased: a baseline that contains
    the node itself shrinks a level of k branches by (k - 1) / k. A node without siblings, or whose siblings all lead to
    the same return, gets 0. Row weights enter all means; rows without a reward are left out and get 0. Enumerated rows
    have no sample to leave out: loo is sibling there.

    Args:
        assigner: one of the four.
        average: over children, each alike, or over leaves; they differ where subtrees differ in size. Not for flat.
        std: divide by the deviation over the siblings (population), for sibling.
        epsilon: added to it.

    Raises:
        ValueError: an unknown assigner or average, std with another assigner, epsilon below 0, or (when called) rows
            that disagree about the parent of a node.

    Source: sibling with std, V-STAR (2026); flat over the leaves of a tree, LATR (2025).
    """

    assigner: Literal["flat", "parent", "sibling", "loo"] = "loo"
    average: Average = "children"
    std: bool = False
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.assigner not in ASSIGNERS:
            raise ValueError(f"assigner must be one of {', '.join(ASSIGNERS)}, not '{self.assigner}'")
        if self.average not in ("children", "leaves"):
            raise ValueError(f"average must be children or leaves, not '{self.average}'")
        if self.std and self.assigner != "sibling":
            raise ValueError("std divides by the deviation of siblings: use the assigner sibling, or add group_std")
        if self.epsilon < 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon}")

    def __call__(self, rows: Rows, stats: Stats) -> Rows:
        if self.assigner == "flat":
            return GroupCentre()(rows, stats)
        reward = returns(rows)
        valid = rows.main & ~reward.isnan()
        tree = branches(rows)
        value, weight = self._values(tree, rows, torch.where(valid, reward.double(), torch.nan))
        gain = self._gain(tree, value, weight, rows.exact)
        low, high = tree.range(torch.where(valid & (rows.weight > 0), reward, torch.nan))
        apart = (low < high)[tree.parent.clamp(min=0)]
        gain = torch.where(apart & ~gain.isnan(), gain, 0.0)
        kept = rows.mask & ~reward.isnan()[:, None]
        return rows.with_(advantage=torch.where(kept, gain[tree.token], 0.0).to(reward))

    def _values(
        self, tree: "Branches", rows: Rows, reward: Float[Tensor, "B"]
    ) -> tuple[Float[Tensor, "I"], Float[Tensor, "I"]]:
        """Vbar and the weight of each branch among its siblings: the mean weight of its rows, their sum if exact."""
        average = "leaves" if rows.exact else self.average
        leaves = torch.full_like(tree.parent, 0, dtype=torch.float64)
        value, weight = backed_up(
            tree.parent,
            tree.depth,
            (leaves + torch.nan).index_copy(0, tree.leaf, reward),
            leaves.index_copy(0, tree.leaf, rows.weight.double()),
            average,
        )
        if average == "children" or rows.exact:
            return value, weight
        below = leaves.index_add(0, tree.branch, (~reward.isnan()).double()[tree.row])
        return value, ratio(weight, below)

    def _gain(
        self, tree: "Branches", value: Float[Tensor, "I"], weight: Float[Tensor, "I"], exact: bool
    ) -> Float[Tensor, "I"]:
        up = tree.parent.clamp(min=0)
        counted = (tree.parent >= 0) & (weight > 0)
        own = torch.where(counted, weight, 0.0)
        mass = torch.where(counted, weight * value, 0.0)
        total, earned = _over_children(up, own), _over_children(up, mass)
        single = _over_children(up, counted.double())[up] - counted.double() == 0
        if self.assigner == "parent":
            gain = value - value[up]
        elif self.assigner == "loo" and not exact:
            others = total[up] - own
            single |= others <= NEGLIGIBLE * total[up]
            gain = value - ratio(earned[up] - mass, torch.where(single, 0.0, others))
        else:
            gain = value - ratio(earned, total)[up]
        if self.std:
            spread = ratio(_over_children(up, own * gain.nan_to_num().square()), total).sqrt()
            gain = ratio(gain, spread[up] + self.epsilon)
        return torch.where(single, 0.0, gain)


@dataclass(frozen=True, eq=False)
class Branches:
    """The trees of a batch: prompts, then the leaf of each row, then the nodes that hold tokens; I of them.

    Args:
        parent: -1 for prompts, shape [I].
        depth: 0 for prompts, shape [I].
        leaf: of each row, shape [B].
        token: the branch of each token, shape [B, T]; the row's leaf where the rows name no nodes.
        row, branch: the pairs of a row and a branch on its path, shape [C].
    """

    parent: Int[Tensor, "I"]
    depth: Int[Tensor, "I"]
    leaf: Int[Tensor, "B"]
    token: Int[Tensor, "B T"]
    row: Int[Tensor, "C"]
    branch: Int[Tensor, "C"]

    def range(self, reward: Float[Tensor, "B"]) -> tuple[Float[Tensor, "I"], Float[Tensor, "I"]]:
        """Smallest and largest reward below each branch, NaN left out; (inf, -inf) where there is none."""
        edges = []
        for infinity, how in ((torch.inf, "amin"), (-torch.inf, "amax")):
            known = torch.where(reward.isnan(), infinity, reward)[self.row]
            edges.append(reward.new_full(self.parent.shape, infinity).scatter_reduce(0, self.branch, known, how))
        return edges[0], edges[1]


def branches(rows: Rows) -> Branches:
    """The trees that the rows of a batch form.

    Raises:
        ValueError: rows disagree about the parent of a node.
    """
    groups = Groups.of(rows)
    count = len(rows)
    leaf = groups.count + torch.arange(count, device=rows.device)
    node = rows.columns.get("node", torch.zeros_like(rows.tokens))
    named, steps = node > 0, torch.zeros_like(node, dtype=torch.bool)
    if named.shape[1]:
        steps = named & (node != torch.nn.functional.pad(node[:, :-1], (1, 0)))
    span = int(node.max()) + 1 if node.numel() else 1
    ids, place = (groups.index[:, None] * span + node)[named].unique(return_inverse=True)
    token = leaf[:, None].expand(node.shape).clone()
    token[named] = groups.count + count + place
    before = torch.cat([groups.index[:, None], token[:, :-1]], 1)[:, : node.shape[1]]
    parent = torch.full((groups.count + count + len(ids),), -1, device=rows.device)
    depth = torch.zeros_like(parent)
    parent[token[steps]], depth[token[steps]] = before[steps], steps.cumsum(1)[steps]
    _check(parent, depth, token, before, steps, named)
    levels = steps.sum(1)
    last = torch.cat([groups.index[:, None], token], 1).gather(1, named.sum(1, keepdim=True))[:, 0]
    parent[leaf], depth[leaf] = last, levels + 1
    row = torch.arange(count, device=rows.device)
    inner = steps.nonzero(as_tuple=True)[0]
    return Branches(
        parent, depth, leaf, token, torch.cat([row, row, inner]), torch.cat([groups.index, leaf, token[steps]])
    )


def _check(
    parent: Int[Tensor, "I"],
    depth: Int[Tensor, "I"],
    token: Int[Tensor, "B T"],
    before: Int[Tensor, "B T"],
    steps: Bool[Tensor, "B T"],
    named: Bool[Tensor, "B T"],
) -> None:
    """Every row that holds a node must come to it the same way, and name the nodes of all tokens before it."""
    wrong = steps & ((parent[token] != before) | (depth[token] != steps.cumsum(1)))
    wrong = wrong | (named & torch.nn.functional.pad(~named[:, :-1], (1, 0))[:, : named.shape[1]])
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(f"columns['node'] is no tree: row {row} comes to a node from another one than other rows do")


def _over_children(up: Int[Tensor, "I"], values: Float[Tensor, "I"]) -> Float[Tensor, "I"]:
    return torch.zeros_like(values).index_add(0, up, values)
