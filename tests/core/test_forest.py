"""Forests: worked trees, random trees against plain loops, and the errors of arrays that are no forest."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keel.core.forest import PRUNED, Forest, Kind
from keel.core.rows import Rows, Stop

PROMPT = torch.tensor([[7], [8]])
REFUSED = (ValueError, TypeError)  # the tests check annotations, and then those speak first
REAL = torch.ones(2, 1, dtype=torch.bool)


def grow(parents: list[int], sizes: list[int], prompts: list[int], **known) -> Forest:
    """A forest of these nodes, its tokens 0, 1, 2 ..., its leaves in the order of their nodes."""
    parent, size = torch.tensor(parents), torch.tensor(sizes)
    depth = [0] * len(parents)
    for n, p in enumerate(parents):
        depth[n] = 0 if p < 0 else depth[p] + 1
    leaf = torch.tensor([n for n in range(len(parents)) if n not in parents])
    count = int(size.sum())
    logp = -torch.arange(1, count + 1, dtype=torch.float64) / 10
    zeros = torch.zeros_like(parent)
    start = size.cumsum(0) - size
    neutral = {
        "kind": zeros,
        "branch_log_q": torch.cat([logp, logp.new_zeros(1)])[start],
        "trainable": torch.ones(count, dtype=torch.bool),
        "status": torch.full_like(leaf, int(Stop.EOS)),
        "log_w": torch.zeros(len(leaf), dtype=torch.float64),
    }
    return Forest(
        parent=parent,
        start=start,
        end=size.cumsum(0),
        depth=torch.tensor(depth),
        prompt=torch.tensor(prompts),
        tokens=torch.arange(count),
        logp=logp,
        leaf_node=leaf,
        **{**neutral, **known},
    )


def small(**known) -> Forest:
    """One root with two children, and two leaves below each: nodes 0, (1, 2), (3, 4, 5, 6)."""
    return grow([-1, 0, 0, 1, 1, 2, 2], [1] * 7, [0] * 7, **known)


def uneven() -> Forest:
    """A root with children 1 and 2; leaves 3, 4, 5 below 1, and 6 below 2."""
    return grow([-1, 0, 0, 1, 1, 1, 2], [2, 1, 1, 1, 2, 1, 1], [0] * 7)


# -- worked trees ----------------------------------------------------------------------------------------------------


def test_the_small_tree():
    values = small().values(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert values.tolist() == [0.75, 0.5, 1.0, 1.0, 0.0, 1.0, 1.0]


def test_children_and_leaves_differ_where_subtrees_differ_in_size():
    reward = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert float(uneven().values(reward)[0]) == pytest.approx(1 / 3, abs=1e-12)
    assert float(uneven().values(reward, "leaves")[0]) == pytest.approx(1 / 2, abs=1e-12)


def test_values_leave_out_what_has_no_reward_and_weigh_the_rest():
    weighted = small(log_w=torch.tensor([3.0, 1.0, 1.0, 0.0]).log())
    values = weighted.values(torch.tensor([1.0, 0.0, 0.5, torch.nan]))
    assert values[[1, 2, 5]].tolist() == pytest.approx([0.75, 0.5, 0.5])
    assert float(values[0]) == pytest.approx((2 * 0.75 + 1 * 0.5) / 3)  # mean weights 2 and 1
    assert float(weighted.values(torch.tensor([1.0, 0.0, 0.5, torch.nan]), "leaves")[0]) == pytest.approx(3.5 / 5)
    nothing = small().values(torch.tensor([1.0, 0.0, torch.nan, torch.nan]))
    assert bool(nothing[2].isnan()) and float(nothing[0]) == 0.5


def test_relations():
    forest = grow([-1, -1, 0, 0, -1], [1] * 5, [0, 0, 0, 0, 1])
    assert forest.children(0).tolist() == [2, 3] and forest.children(4).tolist() == []
    assert forest.siblings(0).tolist() == [1] and forest.siblings(2).tolist() == [3]
    assert forest.siblings(4).tolist() == []
    assert forest.leaves_below(0).tolist() == [1, 2] and forest.leaves_below(1).tolist() == [0]
    assert forest.mult.tolist() == [2, 1, 1, 1, 1]
    assert forest.paths.tolist() == [[1, -1], [0, 2], [0, 3], [4, -1]]


def test_rows_of_the_uneven_tree():
    known = {"log_w": torch.tensor([-torch.inf, 0.0, 0.0, 0.0]), "reward": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    rows = dataclasses.replace(uneven(), **known).rows(PROMPT, REAL, 99)
    assert rows.tokens.tolist() == [[0, 1, 2, 4, 99], [0, 1, 2, 5, 6], [0, 1, 2, 7, 99], [0, 1, 3, 8, 99]]
    assert rows.mask.sum(1).tolist() == [4, 5, 4, 4]
    assert rows.columns["node"].tolist()[1] == [1, 1, 2, 5, 5] and rows.columns["node"].tolist()[3] == [1, 1, 3, 7, 0]
    assert rows.columns["mult"].tolist() == [[4, 4, 3, 1, 0], [4, 4, 3, 1, 1], [4, 4, 3, 1, 0], [4, 4, 1, 1, 0]]
    owner = [[0, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]]  # the first row has no weight
    assert rows.columns["owner"].int().tolist() == owner
    assert rows.columns["branch"].tolist() == [3, 3, 3, 2]
    assert rows.logp["behaviour"][1].tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.6, -0.7])
    assert rows.logp["behaviour"][0].tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.5, 0.0])
    assert rows.weight.tolist() == [0, 1, 1, 1] and rows.reward.tolist() == [[1.0], [2.0], [3.0], [4.0]]
    assert rows.prompt_ids.tolist() == [[7]] * 4 and rows.group.tolist() == [0] * 4
    assert bool((rows.mult == 1).all()) and bool(rows.owner.all())


def test_what_no_model_chose_is_in_the_row_but_not_in_the_mask():
    trainable = torch.tensor([True, False, True, True, True, True, True])
    rows = small(trainable=trainable, entropy=torch.full((7,), 0.5)).rows(PROMPT, REAL, 99)
    assert rows.tokens[0].tolist() == [0, 1, 3] and rows.mask[0].tolist() == [True, False, True]
    assert rows.logp["behaviour"][0].tolist() == pytest.approx([-0.1, 0.0, -0.4])
    assert rows.columns["entropy"][0].tolist() == [0.5, 0.0, 0.5]
    assert rows.columns["node"][0].tolist() == [1, 2, 4]


def test_only_forced_branches_are_corrected():
    kind = torch.tensor([0, 1, 1, 0, 0, 3, 2])
    log_q = torch.full((7,), -0.7, dtype=torch.float64)
    rows = small(kind=kind, branch_log_q=log_q).rows(PROMPT, REAL, 99)
    assert rows.columns["correction"].tolist() == [
        pytest.approx([0, x, 0]) for x in (-0.2 + 0.7, -0.2 + 0.7, -0.3 + 0.7, -0.3 + 0.7)
    ]


def plain_rows() -> Rows:
    """Three rows in two groups, one with a hole, one empty."""
    tokens = torch.tensor([[1, 2, 3, 9], [4, 9, 9, 9], [9, 9, 9, 9]])
    mask = torch.tensor([[True, False, True, False], [True, False, False, False], [False] * 4])
    return Rows.build(
        torch.tensor([[8], [7], [8]]),
        torch.ones(3, 1, dtype=torch.bool),
        tokens,
        mask,
        group=torch.tensor([5, 3, 5]),
        stop=torch.tensor([0, 2, 2]),
        reward=torch.tensor([[1.0], [2.0], [3.0]]),
        logp={"behaviour": torch.where(mask, -tokens.double(), 0.0)},
    )


def test_independent_samples_are_roots_and_come_back_as_they_were():
    before = plain_rows()
    forest = Forest.of_rows(before)
    after = forest.rows(PROMPT, REAL, 9)
    assert forest.parent.tolist() == [-1] * 3 and forest.prompt.tolist() == [1, 0, 1]
    assert torch.equal(after.tokens, before.tokens[:, :3]) and torch.equal(after.mask, before.mask[:, :3])
    assert torch.equal(after.logp["behaviour"], before.logp["behaviour"][:, :3])
    assert after.reward is not None and torch.equal(after.reward, before.reward)
    assert torch.equal(after.stop, before.stop) and torch.equal(after.prompt_ids, before.prompt_ids)
    assert torch.equal(after.weight, before.weight.double()) and after.columns["branch"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="behaviour"):
        Forest.of_rows(before.with_(logp={}))


def test_several_rewards_stay_columns():
    reward = torch.arange(6.0).view(3, 2)
    rows = Forest.of_rows(plain_rows().with_(reward=reward)).rows(PROMPT, REAL, 9)
    assert rows.reward is not None and torch.equal(rows.reward, reward)


def test_a_forest_of_some_leaves():
    kept = uneven().keep(torch.tensor([True, False, True, False]))
    assert kept.tokens.tolist() == [0, 1, 2, 4, 7] and kept.parent.tolist() == [-1, 0, 1, 1]
    assert kept.mult.tolist() == [2, 2, 1, 1]
    merged = kept.merged()
    assert merged.parent.tolist() == [-1, 0, 0] and merged.end.tolist() == [3, 4, 5]
    assert merged.rows(PROMPT, REAL, 9).tokens.tolist() == [[0, 1, 2, 4], [0, 1, 2, 7]]
    with pytest.raises(ValueError, match="at least one leaf"):
        kept.keep(torch.tensor([False, False]))


def test_forced_children_are_not_merged():
    forced = grow([-1, 0, 1], [1, 1, 1], [0, 0, 0], kind=torch.tensor([0, int(Kind.FORCED), 0])).merged()
    assert forced.parent.tolist() == [-1, 0] and forced.kind.tolist() == [0, 1] and forced.end.tolist() == [1, 3]


# -- random trees ----------------------------------------------------------------------------------------------------


@st.composite
def forests(draw) -> Forest:
    """Up to 14 nodes of 0 to 3 tokens under two prompts; only leaves are empty; weights and rewards at random."""
    count = draw(st.integers(1, 14))
    parents = [draw(st.integers(-1, n - 1)) for n in range(count)]
    prompts = [draw(st.integers(0, 1)) for _ in range(count)]
    for n, p in enumerate(parents):
        prompts[n] = prompts[p] if p >= 0 else prompts[n]
    sizes = [draw(st.integers(int(n in parents), 3)) for n in range(count)]
    leaves = count - len(set(parents) - {-1})
    weight = torch.tensor([draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])) for _ in range(leaves)]).double()
    reward = torch.tensor([draw(st.sampled_from([-1.0, 0.0, 0.3, 2.0])) for _ in range(leaves)]).double()
    return grow(parents, sizes, prompts, log_w=weight.log(), reward=reward)


def lineage(forest: Forest, leaf: int) -> list[int]:
    node, path = int(forest.leaf_node[leaf]), []
    while node >= 0:
        path.append(node)
        node = int(forest.parent[node])
    return path[::-1]


def spelled(forest: Forest, leaf: int) -> list[int]:
    return [int(t) for n in lineage(forest, leaf) for t in forest.tokens[forest.start[n] : forest.end[n]]]


@given(forests())
def test_rows_of_random_trees(forest: Forest):
    rows = forest.rows(PROMPT, REAL, -1)
    columns = rows.columns
    written = [spelled(forest, leaf) for leaf in range(len(forest))]
    assert [row[mask].tolist() for row, mask in zip(rows.tokens, rows.mask, strict=True)] == written
    assert int(columns["owner"].sum()) == len(forest.tokens)  # tokens are distinct numbers here
    for i, words in enumerate(written):
        assert columns["mult"][i][rows.mask[i]].tolist() == [sum(word in other for other in written) for word in words]
        assert int(columns["branch"][i]) == sum(sum(word in other for other in written) > 1 for word in words)
    once = torch.where(rows.mask, 1 / columns["mult"].clamp(min=1), 0.0)
    assert float(once.sum()) == pytest.approx(len(forest.tokens))
    owned = torch.where(columns["owner"], columns["mult"], 0)
    assert int(owned.sum()) == int(rows.mask.sum())


@given(forests(), st.sampled_from(["children", "leaves"]))
def test_values_of_random_trees(forest: Forest, average):
    found = forest.values(forest.reward, average)
    weight, value = {}, {}
    for n in reversed(range(len(forest.parent))):
        below = [m for m in range(len(forest.parent)) if int(forest.parent[m]) == n]
        if not below:
            leaf = int((forest.leaf_node == n).nonzero())
            weight[n], value[n] = float(forest.log_w[leaf].exp()), float(forest.reward[leaf])
        else:
            total = sum(weight[m] for m in below)
            value[n] = sum(weight[m] * value[m] for m in below if weight[m]) / total if total else torch.nan
            weight[n] = total / len(below) if average == "children" else total
    wanted = torch.tensor([value[n] for n in range(len(forest.parent))], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=0, atol=1e-12)


@given(forests(), st.data())
def test_some_leaves_of_random_trees(forest: Forest, data):
    leaves = torch.tensor([data.draw(st.booleans()) for _ in range(len(forest))])
    leaves[data.draw(st.integers(0, len(forest) - 1))] = True
    kept = forest.keep(leaves)
    wanted = [spelled(forest, i) for i in leaves.nonzero().flatten().tolist()]
    assert [spelled(kept, i) for i in range(len(kept))] == wanted
    assert sorted(kept.tokens.tolist()) == sorted({word for words in wanted for word in words})
    merged = kept.merged()
    assert [spelled(merged, i) for i in range(len(kept))] == wanted
    assert sorted(merged.tokens.tolist()) == sorted(kept.tokens.tolist())
    assert all(len(merged.children(n)) != 1 for n in range(len(merged.parent)))
    values = kept.values(kept.reward)[_lasts(kept, merged)]
    torch.testing.assert_close(merged.values(merged.reward), values, equal_nan=True)


def _lasts(kept: Forest, merged: Forest) -> list[int]:
    """The last of the nodes of which each merged node was made."""
    last: dict[int, int] = {}
    for leaf in range(len(kept)):
        branching = [n for n in lineage(kept, leaf) if len(kept.children(n)) != 1]
        last.update(zip(lineage(merged, leaf), branching, strict=True))
    return [last[n] for n in range(len(merged.parent))]


# -- arrays that are no forest ---------------------------------------------------------------------------------------

FAULTS = {
    "node 1 .* after its parent": {"parent": torch.tensor([-1, 1, 0, 1, 1, 2, 2])},
    "node 2 .* below its parent": {"depth": torch.tensor([0, 1, 2, 2, 2, 2, 2])},
    "node 6 .* prompt of its parent": {"prompt": torch.tensor([0, 0, 0, 0, 0, 0, 1])},
    "node 0 .* no prompt": {"prompt": torch.full((7,), -1)},
    "node 3 .* kind": {"kind": torch.tensor([0, 0, 0, 4, 0, 0, 0])},
    "node 6 .* last token": {"end": torch.tensor([1, 2, 3, 4, 5, 6, 8])},
    "node 2 .* ends before": {"end": torch.tensor([1, 2, 1, 4, 5, 6, 7])},
    "token 2 .* exactly one": {"start": torch.tensor([0, 1, 2, 2, 4, 5, 6])},
    "node 0 .* no tokens": {"start": torch.tensor([0, 0, 2, 3, 4, 5, 6]), "end": torch.tensor([0, 2, 3, 4, 5, 6, 7])},
    "leaf 1 .* does not exist": {"leaf_node": torch.tensor([3, 7, 5, 6])},
    "node 2 .* leaf but has children": {"leaf_node": torch.tensor([3, 4, 5, 2])},
    "node 4 .* exactly one leaf": {"leaf_node": torch.tensor([3, 4, 4, 6])},
    "leaf 0 .* status": {"status": torch.tensor([5, PRUNED, 0, 0])},
    "leaf 2 .* log-weight": {"log_w": torch.tensor([0.0, 0.0, torch.nan, 0.0])},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_arrays_that_are_no_forest(fault):
    with pytest.raises(ValueError, match=fault):
        dataclasses.replace(small(), **FAULTS[fault])


def test_arrays_of_different_lengths():
    tests = {"depth": torch.zeros(6, dtype=torch.long), "trainable": torch.ones(8, dtype=torch.bool)}
    for name, wrong in {**tests, "status": torch.zeros(3, dtype=torch.long)}.items():
        with pytest.raises(REFUSED, match=name):
            dataclasses.replace(small(), **{name: wrong})


def test_a_wrong_average():
    with pytest.raises(REFUSED, match="average"):
        small().values(torch.zeros(4), "median")
