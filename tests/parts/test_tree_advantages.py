"""Advantages and prefix weights of trees: every number of the worked examples, most of them exact expectations."""

import itertools
import math
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.test_forest import PROMPT, REAL, REFUSED, forests, grow, lineage, small, uneven
from torch import Tensor

from keel.core.aggregate import Aggregation, totals
from keel.core.forest import Forest, Kind
from keel.core.rows import Rows, Stream, cat
from keel.method import Method
from keel.parts.advantages.group import GroupCentre, GroupStd, LeaveOneOut, Returns
from keel.parts.advantages.tree import TreeAdvantage
from keel.parts.terms.surrogate import Clipped, Surrogate
from keel.parts.weights.prefix import BranchCorrection, PrefixWeight
from keel.rollouts.rollout import Rollout
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

NONE = Stats()
ASSIGNERS = ("flat", "parent", "sibling", "loo")


def advantage(part, rows: Rows) -> Tensor:
    return cast(Tensor, part(rows, NONE).advantage)


# -- exact expectations on sequences of two bits ---------------------------------------------------------------------

LOGITS = torch.tensor([0.4, -0.3, 0.9], dtype=torch.float64)  # of 1 at the start, after 0, after 1
GOAL = torch.tensor([-0.052609, -0.098104, 0.061515], dtype=torch.float64)
EARNED = {(0, 0): 1.0, (1, 1): 0.5, (0, 1): 0.0, (1, 0): 0.0}


def log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """log pi of both tokens of each row, [B, 2]."""
    state = torch.stack([torch.zeros_like(tokens[:, 0]), 1 + tokens[:, 0]], 1)
    sign = 2.0 * tokens - 1
    return torch.nn.functional.logsigmoid(sign * logits[state])


def trees(outcomes: list[tuple[int, ...]], roots: int, branches: int, forced: bool = False) -> Rows:
    """One group for each outcome, with its probability: first tokens, and second tokens below each of them."""
    shape = roots + roots * branches
    parent, tokens, prompt, weight = [], [], [], []
    for i, outcome in enumerate(outcomes):
        parent += [-1] * roots + [i * shape + r for r in range(roots) for _ in range(branches)]
        tokens += list(outcome)
        prompt += [i] * shape
        pairs = [(outcome[r], outcome[roots + r * branches + b]) for r in range(roots) for b in range(branches)]
        second = log_prob(LOGITS, torch.tensor(pairs))[:, 1].sum()
        first = 0.0 if forced else log_prob(LOGITS, torch.tensor([(f, 0) for f in outcome[:roots]]))[:, 0].sum()
        weight += [float(first + second)] * (roots * branches)
    forest = grow(parent, [1] * len(parent), prompt, log_w=torch.tensor(weight, dtype=torch.float64))
    root = forest.parent < 0
    first = torch.where(root, torch.arange(len(parent)), forest.parent)
    said = torch.tensor(tokens)
    own = torch.stack([said[first], said], 1)
    logp = torch.where(root, log_prob(LOGITS, own)[:, 0], log_prob(LOGITS, own)[:, 1])
    known = {"tokens": said, "logp": logp}
    if forced:
        known["kind"] = torch.where(root, int(Kind.FORCED), int(Kind.SAMPLED))
        known["branch_log_q"] = torch.where(root, -math.log(roots), logp)
    ids = torch.zeros(len(outcomes), 1, dtype=torch.long)
    rows = Forest(**{**vars(forest), **known}).rows(ids, ids == 0, 0)
    reward = torch.tensor([[EARNED[a, b]] for a, b in rows.tokens.tolist()], dtype=torch.float64)
    return rows.with_(reward=reward)


def expected(rows: Rows, assigner, *weights) -> Tensor:
    """The gradient of the mean over leaves of sum_t w A log pi: its expectation over all outcomes."""
    logits = LOGITS.clone().requires_grad_()
    gain = advantage(assigner, rows) * log_prob(logits, rows.tokens)
    for weight in weights:
        gain = gain * weight(rows, NONE)
    return torch.autograd.grad(Aggregation("sequence_mean_token_sum")(gain, rows), logits)[0]


@pytest.fixture(scope="module")
def two_by_two() -> Rows:
    """All 64 outcomes of two first tokens with two second tokens each."""
    rows = trees(list(itertools.product((0, 1), repeat=6)), 2, 2)
    assert float(rows.weight.sum()) == pytest.approx(4)
    return rows


@pytest.fixture(scope="module")
def goal() -> Tensor:
    """The gradient of E r, from all four sequences."""
    every = trees(list(itertools.product((0, 1), repeat=2)), 1, 1)
    assert every.reward is not None
    assert float((every.weight * every.reward[:, 0]).sum()) == pytest.approx(0.443349, abs=1e-6)
    found = expected(every, Returns())
    torch.testing.assert_close(found, GOAL, atol=1e-6, rtol=0)
    return found


RATIOS = [
    ("flat", "all", (0.50, 0.75, 0.75)),
    ("parent", "all", (0.5, 0.5, 0.5)),
    ("sibling", "all", (0.5, 0.5, 0.5)),
    ("loo", "all", (1, 1, 1)),
    ("flat", "owner", (0.25, 0.75, 0.75)),
    ("flat", "exclude", (0, 0.75, 0.75)),
    ("loo", "once", (0.5, 1, 1)),
]


@pytest.mark.parametrize(("assigner", "policy", "ratio"), RATIOS)
def test_which_trees_are_unbiased(two_by_two, goal, assigner, policy, ratio):
    found = expected(two_by_two, TreeAdvantage(assigner), PrefixWeight(policy))
    torch.testing.assert_close(found / goal, torch.tensor(ratio, dtype=torch.float64), atol=1e-12, rtol=0)


def test_counting_each_token_once_for_all_its_rows_is_the_same_for_advantages_of_nodes(two_by_two):
    columns = two_by_two.columns
    packed = two_by_two.with_(mult=columns["mult"], owner=columns["owner"].bool())
    for assigner in ("parent", "sibling", "loo"):
        part = TreeAdvantage(assigner)
        torch.testing.assert_close(expected(packed, part), expected(two_by_two, part), atol=1e-12, rtol=0)
        found = expected(packed, part, PrefixWeight("owner"))
        torch.testing.assert_close(found, expected(two_by_two, part, PrefixWeight("owner")), atol=1e-12, rtol=0)


def test_forced_branches_and_what_makes_up_for_them(goal):
    rows = trees([(0, 1, *second) for second in itertools.product((0, 1), repeat=2)], 2, 1, forced=True)
    wrong = torch.tensor([-0.100628, -0.122229, 0.051375], dtype=torch.float64)
    torch.testing.assert_close(expected(rows, Returns()), wrong, atol=1e-6, rtol=0)
    torch.testing.assert_close(expected(rows, Returns(), BranchCorrection()), goal, atol=1e-12, rtol=0)
    sure = 1 / (1 + math.exp(-0.4))
    weight = BranchCorrection()(rows, NONE)
    assert weight[0].tolist() == pytest.approx([2 * (1 - sure)] * 2) and weight[1].tolist() == pytest.approx(
        [2 * sure] * 2
    )
    assert float(BranchCorrection(cap=1.1)(rows, NONE).max()) == pytest.approx(1.1)


# -- small trees -----------------------------------------------------------------------------------------------------


def rows_of(forest: Forest, reward: list[float]) -> Rows:
    return forest.rows(PROMPT, REAL, 0).with_(reward=torch.tensor(reward, dtype=torch.float64)[:, None])


def test_the_small_tree_by_its_parents():
    found = advantage(TreeAdvantage("parent"), rows_of(small(), [1, 0, 1, 1]))
    assert found.tolist() == [[0, -0.25, 0.5], [0, -0.25, -0.5], [0, 0.25, 0], [0, 0.25, 0]]
    assert found.sum(1).tolist() == [0.25, -0.75, 0.25, 0.25]


def test_the_small_tree_by_its_siblings():
    """Values 1/2 and 1 below the root, which has no sibling itself."""
    rows = rows_of(small(), [1, 0, 1, 1])
    assert advantage(TreeAdvantage("sibling"), rows)[0].tolist() == [0, -0.25, 0.5]
    assert advantage(TreeAdvantage("loo"), rows).tolist() == [[0, -0.5, 1], [0, -0.5, -1], [0, 0.5, 0], [0, 0.5, 0]]
    assert advantage(TreeAdvantage("flat"), rows)[:, 0].tolist() == [0.25, -0.75, 0.25, 0.25]


def test_children_and_leaves_in_the_uneven_tree():
    """Leaves [1, 1, 0] and [0]: 2/3 and 0 below a root of 1/3, or of 1/2."""
    rows = rows_of(uneven(), [1, 1, 0, 0])
    by_children = advantage(TreeAdvantage("parent"), rows)
    by_leaves = advantage(TreeAdvantage("parent", "leaves"), rows)
    assert by_children[:, 2].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, -1 / 3])
    assert by_leaves[:, 2].tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, -1 / 2])
    for average in ("children", "leaves"):  # siblings count alike, however many leaves they have
        assert advantage(TreeAdvantage("loo", average), rows)[[0, 3], 2].tolist() == pytest.approx([2 / 3, -2 / 3])
        assert advantage(TreeAdvantage("sibling", average), rows)[0, 2] == pytest.approx(1 / 3)


def test_siblings_in_units_of_their_deviation():
    """a.x 1, a.y 0.9, b.x 0.1, b.y 0: all four of +-1.1 or +-0.9 in one group, and +-1 at each branching."""
    rows = rows_of(grow([-1, -1, 0, 0, 1, 1], [1] * 6, [0] * 6), [1, 0.9, 0.1, 0])
    found = advantage(TreeAdvantage("sibling", std=True, epsilon=0.0), rows)
    torch.testing.assert_close(found, torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]).double())
    half = advantage(TreeAdvantage("sibling", std=True, epsilon=0.05), rows)  # deviations 0.45 and 0.05
    assert half[0].tolist() == pytest.approx([0.9, 0.5])
    centred = advantage(TreeAdvantage("flat"), rows)[:, 0] / rows.reward[:, 0].std(correction=0)
    assert centred.tolist() == pytest.approx([1.104, 0.883, -0.883, -1.104], abs=5e-4)


def test_copies_of_a_completion_are_leaves():
    """A root that ends three times and goes on once: its children are three empty leaves and a node."""
    forest = grow([-1, 0, 0, 0, 0], [2, 0, 0, 1, 0], [0] * 5)
    rows = rows_of(forest, [1, 1, 0, 1])
    assert rows.columns["mult"].tolist() == [[4, 4, 0], [4, 4, 0], [4, 4, 1], [4, 4, 0]]
    assert advantage(TreeAdvantage("loo"), rows)[2].tolist() == [0, 0, -1]
    assert advantage(TreeAdvantage("parent"), rows)[2].tolist() == [0, 0, -0.75]


# -- plain rows ------------------------------------------------------------------------------------------------------


def plain(reward: list[float], group: list[int], **known) -> Rows:
    ids = torch.arange(len(reward))[:, None].expand(-1, 3).clone()
    mask = torch.arange(3) <= (torch.arange(len(reward)) % 3)[:, None]
    return Rows.build(
        ids[:, :1],
        mask[:, :1],
        ids,
        mask,
        group=torch.tensor(group),
        reward=torch.tensor(reward, dtype=known.pop("dtype", torch.float64))[:, None],
        **known,
    )


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.1, 0.3, 2.0, math.nan]), st.integers(0, 2)), min_size=1, max_size=9))
def test_plain_rows_are_grpo_and_rloo(drawn):
    weight = torch.ones(len(drawn), dtype=torch.float64)
    rows = plain([r for r, _ in drawn], [g for _, g in drawn], weight=weight)
    assert torch.equal(advantage(TreeAdvantage("flat"), rows), advantage(GroupCentre(), rows))
    for ours, known in (("parent", GroupCentre()), ("sibling", GroupCentre()), ("loo", LeaveOneOut())):
        for average in ("children", "leaves"):
            found = advantage(TreeAdvantage(ours, average), rows)
            torch.testing.assert_close(found, advantage(known, rows), atol=1e-12, rtol=0)


def test_plain_rows_with_weights():
    """Means are weighted; loo leaves one row out and weighs the others: (3 * 0 + 0 * 5) / 3 and so on."""
    rows = plain([1.0, 0.0, 5.0], [0, 0, 0], weight=torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(advantage(TreeAdvantage("parent"), rows), advantage(GroupCentre(), rows))
    assert advantage(TreeAdvantage("loo"), rows)[:, 0].tolist() == pytest.approx([1, -1, 5 - 0.25])


def test_enumerated_rows_have_no_sample_to_leave_out():
    weight = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rows = plain([1.0, 0.0, 5.0], [0, 0, 0], weight=weight, exact=True)
    for assigner in ASSIGNERS:
        torch.testing.assert_close(advantage(TreeAdvantage(assigner), rows), advantage(LeaveOneOut(), rows))


def test_a_forest_of_independent_samples_trains_as_its_rows_do():
    """Bit for bit: the neutral setting."""
    before = plain([1.0, 0.0, 0.3, 0.0], [0, 0, 1, 1], logp={"behaviour": torch.zeros(4, 3)}, dtype=torch.float32)
    ids = torch.zeros(2, 1, dtype=torch.long)
    after = Forest.of_rows(before).rows(ids, ids == 0, 0).with_(row=before.row)
    live = torch.linspace(-1, 0, 12).view(4, 3).requires_grad_()
    stats = Stats({LogProb(): live, LogProb(of=("old",)): live.detach() - 0.05})
    plainly = Method(rollout=Rollout(), advantage={"a": GroupCentre(), "b": GroupStd()}, surrogate=Surrogate(Clipped()))
    treelike = plainly.replacing(advantage={"a": TreeAdvantage("flat"), "b": GroupStd()}).adding(
        weights={"prefix": PrefixWeight("all"), "branch": BranchCorrection()}
    )
    losses = [
        method.loss(method.prepare(rows, stats, {}), stats, {})
        for method, rows in ((plainly, before), (treelike, after))
    ]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, live, retain_graph=True)[0] for loss in losses))


# -- what may not matter ---------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(forests(), st.sampled_from(ASSIGNERS), st.sampled_from(["children", "leaves"]), st.data())
def test_order_padding_and_company_change_nothing(forest, assigner, average, data):
    part = TreeAdvantage(assigner, average)
    rows = forest.rows(PROMPT, REAL, 0)
    alone = advantage(part, rows)
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    other = rows.with_(group=rows.group + 7, reward=rows.reward * 3)  # the same numbers of nodes in another group
    together = cat([rows.select(order).padded(3, rows.tokens.shape[1] + 2), other])
    found = advantage(part, together)[: len(rows), : rows.tokens.shape[1]]
    torch.testing.assert_close(found, alone[order], atol=1e-12, rtol=0)
    heavier = rows.with_(weight=torch.where(rows.group == 0, 0.125 * rows.weight, rows.weight))
    torch.testing.assert_close(advantage(part, heavier), alone, atol=1e-12, rtol=0)
    for policy in ("all", "once", "owner", "exclude"):
        weight = PrefixWeight(policy)(rows, NONE)
        moved = PrefixWeight(policy)(together, NONE)[: len(rows), : rows.tokens.shape[1]]
        assert torch.equal(moved, weight[order]) and bool((weight[~rows.mask] == 1).all())


@given(forests(), st.sampled_from(["children", "leaves"]))
def test_parents_telescope_and_agree_with_the_forest(forest, average):
    """Along a row the advantages of the nodes sum to the value of the last less that of the prompt."""
    rows = forest.rows(PROMPT, REAL, 0)
    found = advantage(TreeAdvantage("parent", average), rows)
    values = forest.values(forest.reward, average)
    for i in (rows.weight > 0).nonzero().flatten().tolist():
        nodes = [n for n in lineage(forest, i) if int(forest.end[n]) > int(forest.start[n])]
        steps = [float(found[i, rows.columns["node"][i] == n + 1][0]) for n in nodes]
        for above, below, step in zip(nodes, nodes[1:], steps[1:], strict=False):
            assert step == pytest.approx(float(values[below] - values[above]), abs=1e-12)
        alike = rows.group == rows.group[i]
        root = grouped(values, forest, alike) if average == "children" else leaf_mean(rows, alike)
        if nodes:
            assert sum(steps) == pytest.approx(float(values[nodes[-1]]) - root, abs=1e-12)


def leaf_mean(rows: Rows, alike: Tensor) -> float:
    assert rows.reward is not None
    return float((rows.weight * rows.reward[:, 0])[alike].sum() / rows.weight[alike].sum())


def grouped(values: Tensor, forest: Forest, alike: Tensor) -> float:
    """The value of a prompt: the mean over its roots, each with the mean weight of its children, and theirs."""
    weight = torch.zeros_like(values).index_copy(0, forest.leaf_node, forest.log_w.exp())
    for n in reversed(range(len(values))):
        if len(forest.children(n)):
            weight[n] = weight[forest.children(n)].mean()
    roots = (forest.parent < 0) & (forest.prompt == forest.prompt[forest.leaf_node[alike][0]]) & (weight > 0)
    return float((weight[roots] * values[roots]).sum() / weight[roots].sum())


def test_rows_without_reward_or_of_other_streams_are_left_out():
    rows = rows_of(small(), [1, 0, math.nan, 5])
    rows = rows.with_(stream=torch.tensor([0, 0, 0, int(Stream.BASELINE)]))
    found = advantage(TreeAdvantage("loo"), rows)
    assert found.tolist() == [[0, 0, 1], [0, 0, -1], [0, 0, 0], [0, 0, 0]]


def test_ties_are_exactly_zero():
    """0.1 + 0.1 + 0.1 is not 0.3, and a mean of three is not quite a mean of one."""
    rows = rows_of(uneven(), [0.1, 0.1, 0.1, 0.1])
    for assigner in ASSIGNERS:
        assert not bool(advantage(TreeAdvantage(assigner), rows).any())
    assert not bool(advantage(TreeAdvantage("sibling", std=True, epsilon=0.0), rows).any())


def test_a_sibling_of_almost_all_the_weight():
    """What is left out is 1e-20 of the group: it weighs nothing, and the rest has no sibling then."""
    weight = torch.tensor([1.0, 1e-20], dtype=torch.float64)
    found = advantage(TreeAdvantage("loo"), plain([1.0, 0.0], [0, 0], weight=weight))
    assert found[:, 0].tolist() == [0.0, -1.0]


# -- prefixes in losses ----------------------------------------------------------------------------------------------


def shared_root() -> Rows:
    """A root of 4 tokens and two leaves, rows of 10 and 20 tokens, A = +1 and -1."""
    rows = rows_of(grow([-1, 0, 0], [4, 6, 16], [0, 0, 0]), [2, 0])
    return TreeAdvantage("flat")(rows, NONE)


@pytest.mark.parametrize(
    ("mode", "left"),
    [("sequence_mean_token_mean", 0.05), ("sequence_mean_token_sum", 0), ("token_mean", 0), ("constant", 0)],
)
def test_a_shared_root_cancels_unless_each_row_is_divided_by_its_length(mode, left):
    """1 / 10 - 1 / 20 on each of its tokens, before the mean over two rows."""
    rows = shared_root()
    assert rows.advantage is not None and rows.advantage[:, 0].tolist() == [1, -1]
    log_prob = torch.zeros(26, dtype=torch.float64, requires_grad=True)
    shared = log_prob[torch.where(rows.mask, rows.tokens, 0)]
    Aggregation(mode, 30 if mode == "constant" else None)(rows.advantage * shared, rows).backward()
    assert log_prob.grad is not None
    assert (2 * log_prob.grad[:4]).tolist() == pytest.approx([left] * 4, abs=1e-12)
    assert float(log_prob.grad[4:].abs().min()) > 0


def test_a_clip_breaks_the_cancellation():
    """At rho = 1.5 the copy with A = +1 is cut and the one with A = -1 is not."""
    rows = shared_root()
    log_ratio = torch.full(rows.tokens.shape, math.log(1.5), dtype=torch.float64, requires_grad=True)
    gain = Clipped(0.2)(log_ratio, log_ratio, rows.advantage)
    Aggregation("sequence_mean_token_sum")(gain * 2, rows).backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad[:, 0].tolist() == pytest.approx([0, -1.5])


def test_denominators_count_a_shared_token_in_each_row():
    assert totals(shared_root()).tokens == 30


def test_prefix_weights_of_the_uneven_tree():
    rows = rows_of(uneven(), [1, 1, 0, 0])
    weight = {policy: PrefixWeight(policy)(rows, NONE)[1].tolist() for policy in ("all", "once", "owner", "exclude")}
    assert weight["all"] == [1] * 5 and weight["once"] == pytest.approx([1 / 4, 1 / 4, 1 / 3, 1, 1])
    assert weight["owner"] == [0, 0, 0, 1, 1] and weight["exclude"] == [0, 0, 0, 1, 1]
    assert PrefixWeight("owner")(rows, NONE)[0].tolist() == [1] * 5


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "setting", "named"),
    [
        (TreeAdvantage, {"assigner": "uncle"}, "assigner"),
        (TreeAdvantage, {"average": "median"}, "average"),
        (TreeAdvantage, {"assigner": "loo", "std": True}, "std"),
        (TreeAdvantage, {"epsilon": -1.0}, "epsilon"),
        (PrefixWeight, {"policy": "twice"}, "policy"),
        (BranchCorrection, {"cap": 0.0}, "cap"),
    ],
)
def test_bad_settings(part, setting, named):
    with pytest.raises(REFUSED, match=named):
        part(**setting)


@pytest.mark.parametrize("node", [[[1, 2], [2, 1]], [[1, 2], [3, 2]], [[1, 2], [0, 2]]])
def test_rows_that_are_no_tree(node):
    rows = plain([1.0, 0.0], [0, 0]).with_(columns={"node": torch.tensor([[*n, 0] for n in node])})
    with pytest.raises(ValueError, match="no tree"):
        TreeAdvantage("parent")(rows, NONE)
