"""Corners of curation, anchors and budgets: uneven groups, padding, rows beside the main stream."""

import math

import pytest
import torch

from keel.core.aggregate import Groups
from keel.core.rows import Rows, Stream
from keel.parts.controllers.budget import KLBudget, rate_at_budget
from keel.parts.rewards.anchored import ModeAnchor
from keel.parts.rewards.curation import CuratedChoice, ReferenceShare, choices
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

BASELINE = int(Stream.BASELINE)


def rows_of(mask: list[list[bool]], reward: list[float], group: list[int], **known) -> Rows:
    shown = torch.tensor(mask)
    first = torch.zeros(len(mask), 1, dtype=torch.long)
    known = {"weight": torch.ones(len(mask), dtype=torch.float64), "group": torch.tensor(group), **known}
    column = torch.tensor(reward, dtype=torch.float64)[:, None]
    return Rows.build(first, first == 0, torch.zeros(shown.shape, dtype=torch.long), shown, reward=column, **known)


def logs(**values: list[list[float]]) -> Stats:
    """Log-probabilities of models by name."""
    found = {LogProb(of=(name,)): torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    return Stats(found)


def test_the_anchor_is_the_likeliest_good_completion_not_the_best_one():
    """Rewards 1 (likeliest), 2 and 0: z is the first, and the second gets 1 + 0.5 (log 0.6 - log 0.1)."""
    rows = rows_of([[True]] * 3, [1.0, 2.0, 0.0], [0, 0, 0])
    reference = [[math.log(p)] for p in (0.6, 0.1, 0.3)]
    found = ModeAnchor(0.5)(rows, logs(ref=reference)).reward[:, 0].tolist()
    assert found == pytest.approx([1.0, 1 + 0.5 * math.log(6), 0.0], rel=1e-12)


def test_choices_in_groups_of_different_sizes():
    """Eight rows make two choices, four make one, and no choice mixes groups."""
    rows = rows_of([[True]] * 12, [0.0] * 12, [0] * 8 + [1] * 4)
    found = choices(rows, torch.ones(12, dtype=torch.bool), 4)
    parts = [set(found.index[rows.group == group].tolist()) for group in (0, 1)]
    assert [len(part) for part in parts] == [2, 1] and not parts[0] & parts[1]
    assert sorted(torch.bincount(found.index, minlength=found.count).tolist()) == [0, 4, 4, 4]
    weights = CuratedChoice(4)(rows, Stats()).reward[:, 0]
    assert weights[:8].sum() == 8 and weights[8:].sum() == 4  # one of each four has weight four


def test_shares_of_the_reference_where_a_model_chose_whatever_the_stream():
    """ref / old of the tokens on the mask: exp(0.5) and exp(-0.25 + 1)."""
    mask = [[True, False, False], [True, False, True]]
    rows = rows_of(mask, [2.0, 4.0], [0, 0], stream=torch.tensor([0, BASELINE]))
    stats = logs(ref=[[-1.0, 9.0, 9.0], [-1.0, 9.0, -1.0]], old=[[-1.5, 0.0, 0.0], [-0.75, 0.0, -2.0]])
    part = ReferenceShare(0.25)
    found = part(rows, stats, part.init()).reward[:, 0].tolist()
    assert found == pytest.approx([1.5 + 0.25 * math.exp(0.5), 3.0 + 0.25 * math.exp(0.75)], rel=1e-12)


def test_odds_of_a_budget_are_over_what_a_model_chose():
    """log weight + sum of log ref - log old on the mask; -inf for a row that does not count."""
    mask = [[True, False, True], [True, True, False], [True, True, True], [True, True, True]]
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    stream = torch.tensor([0, 0, 0, BASELINE])
    rows = rows_of(mask, [1.0, 0.0, math.nan, 1.0], [0, 0, 0, 0], weight=weight, stream=stream)
    stats = logs(ref=[[-1.0, 9.0, -1.0], [-1.0, -1.0, 9.0], [0.0] * 3, [0.0] * 3],
                 old=[[-1.5, 0.0, -0.75], [-1.0, -1.25, 0.0], [0.0] * 3, [0.0] * 3])  # fmt: skip
    odds, groups, reward = KLBudget("path", 0.1).samples(rows, stats)
    assert odds.tolist() == pytest.approx([0.25, 0.25 + math.log(2), -math.inf, -math.inf], rel=1e-12)
    assert groups.weight.tolist() == [1.0, 2.0, 0.0, 0.0] and reward[:2].tolist() == [1.0, 0.0]


def test_odds_of_a_budget_are_those_of_whole_completions():
    """Also of tokens that another row counts in the loss."""
    rows = rows_of([[True, True]], [1.0], [0], owner=torch.tensor([[False, True]]))
    odds, *_ = KLBudget("path", 0.1).samples(rows, logs(ref=[[-1.0, -1.0]], old=[[-1.5, -1.25]]))
    assert odds.tolist() == [0.75]


def test_a_tied_prompt_beside_another_takes_half_of_the_budget():
    """One prompt spends, the other cannot: the first must spend twice the mean. Even odds of 1 and 0 tilted to 3/4."""
    rows = rows_of([[True]] * 4, [1.0, 0.0, 0.5, 0.5], [0, 0, 1, 1])
    groups = Groups.of(rows)
    spent = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    even = torch.zeros(4, dtype=torch.float64)
    found = rate_at_budget(rows.reward[:, 0], even, groups, spent / 2)
    assert found == pytest.approx(math.log(3), rel=1e-9)
