"""Mode-anchored rewards and selection weights, row by row."""

import itertools

import pytest
import torch
from tests.recipes.exact import FIVE, REF, REWARD, groups, outcomes

from keel.core.rows import Rows, Stream
from keel.parts.rewards.anchored import ModeAnchor
from keel.parts.rewards.curation import BestOfGroup, CuratedChoice, ReferenceShare, subsets
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats

NAN = float("nan")


def table_rows(reward, log_ref, group, **known) -> tuple[Rows, Stats]:
    """Rows of two tokens, of which the second is padding in every other row, with given log-probabilities."""
    n = len(reward)
    mask = torch.ones(n, 2, dtype=torch.bool)
    mask[::2, 1] = False
    ref = torch.tensor(log_ref, dtype=torch.float64)
    tokens = torch.where(mask[:, 1:], torch.stack([0.25 * ref, 0.75 * ref], 1), torch.stack([ref, ref + 9], 1))
    rows = Rows.build(
        torch.zeros(n, 1, dtype=torch.long),
        torch.ones(n, 1, dtype=torch.bool),
        torch.zeros(n, 2, dtype=torch.long),
        mask,
        group=torch.tensor(group),
        reward=torch.tensor(reward, dtype=torch.float64)[:, None],
        weight=torch.ones(n, dtype=torch.float64),
    )
    rows = rows.with_(**known)
    return rows, Stats({LogProb(of=("ref",)): tokens})


def test_anchored_rewards_by_hand():
    """Two groups; in the first rows 0, 1 and 3 are good, row 1 the likeliest; in the second nothing is good."""
    reward = [1.0, 1.2, 0.4, 1.0, NAN, 0.9, 0.0]
    log_ref = [-3.0, -1.0, -0.5, -5.0, -0.1, -1.0, -2.0]
    rows, stats = table_rows(reward, log_ref, [0, 0, 0, 0, 0, 1, 1])
    found = ModeAnchor(0.5, threshold=1.0)(rows, stats).reward[:, 0]
    wanted = torch.tensor([1.2 + 1.0, 1.2, 0.4, 1.2 + 2.0, NAN, 0.9, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)},
        {"stream": torch.tensor([int(Stream.MAIN), int(Stream.BASELINE), int(Stream.MAIN)])},
    ],
    ids=["weight 0", "greedy row"],
)
def test_rows_that_do_not_count_are_no_anchor(change):
    rows, stats = table_rows([1.0, 1.0, 1.0], [-3.0, -1.0, -2.0], [0, 0, 0], **change)
    found = ModeAnchor(1.0)(rows, stats).reward[:, 0]
    torch.testing.assert_close(found, torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64))  # row 2 is the anchor


def test_ties_under_the_reference_take_the_better_reward():
    rows, stats = table_rows([1.0, 1.5, 1.0], [-1.0, -1.0, -2.0], [0, 0, 0])
    for order in ([0, 1, 2], [2, 0, 1]):
        index = torch.tensor(order)
        found = ModeAnchor(1.0)(rows.select(index), stats.select(index)).reward[:, 0]
        torch.testing.assert_close(found, torch.tensor([1.5, 1.5, 2.5], dtype=torch.float64)[index])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ModeAnchor(0.0),
        lambda: CuratedChoice(1),
        lambda: BestOfGroup(0),
        lambda: ReferenceShare(1.5),
        lambda: ReferenceShare(0.5, cap=0.0),
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        wrong()


@pytest.mark.parametrize("part", [ModeAnchor(0.1), CuratedChoice(2), BestOfGroup(2)])
def test_several_columns_are_refused(part):
    rows, stats = table_rows([1.0, 0.0], [-1.0, -1.0], [0, 0])
    with pytest.raises(ValueError, match="one reward column"):
        part(rows.with_(reward=torch.zeros(2, 2, dtype=torch.float64)), stats)


# -- selection weights -----------------------------------------------------------------------------------------------


def enumerated(reward=REWARD) -> Rows:
    return outcomes(REF).weighted(FIVE.rows()).with_(reward=reward[:, None])


def curated_by_enumeration(reward, k) -> torch.Tensor:
    """H of each outcome, over all others that could be drawn with it."""
    odds, found = reward.exp(), torch.zeros(5, dtype=torch.float64)
    for others in itertools.product(range(5), repeat=k - 1):
        p, rest = REF[list(others)].prod(), odds[list(others)].sum()
        found += p * k * odds / (odds + rest)
    return found


@pytest.mark.parametrize("scale", [0.0, 1.0, 12.0])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_curated_choice_of_enumerated_rows(k, scale):
    found = CuratedChoice(k)(enumerated(scale * REWARD), Stats()).reward[:, 0]
    torch.testing.assert_close(found, curated_by_enumeration(scale * REWARD, k), rtol=1e-10, atol=1e-13)
    assert float((REF * found).sum()) == pytest.approx(1, abs=1e-10)


def test_many_candidates_tilt():
    found = CuratedChoice(20000)(enumerated(), Stats()).reward[:, 0]
    torch.testing.assert_close(found, REWARD.exp() / (REF * REWARD.exp()).sum(), rtol=2e-3, atol=0)


def test_a_chooser_of_samples_follows_softmax():
    """30,000 groups of three equal candidates with rewards 0, 1, 2: shares .0900, .2447, .6652."""
    count = 30000
    rows = groups(torch.tensor([[0, 1, 3]]).expand(count, 3), REWARD)
    weight = CuratedChoice(3)(rows, Stats()).reward.reshape(count, 3)
    assert weight.unique().tolist() == [0.0, 3.0]
    assert bool((weight.sum(1) == 3).all())
    share = (weight / 3).mean(0)
    wanted = torch.tensor([0.090031, 0.244728, 0.665241], dtype=torch.float64)
    assert bool(((share - wanted).abs() < 4 * (wanted * (1 - wanted) / count).sqrt()).all())
    expected = CuratedChoice(3, expected=True)(rows, Stats()).reward.reshape(count, 3)
    torch.testing.assert_close(expected[0], 3 * wanted, rtol=0, atol=3e-6)


def test_a_choice_does_not_depend_on_the_order_or_the_batch():
    rows = groups(torch.arange(40).reshape(5, 8) % 5, REWARD)
    rows = rows.with_(reward=torch.where(torch.arange(40)[:, None] % 7 == 0, NAN, rows.reward))
    found = CuratedChoice(4)(rows, Stats()).reward[:, 0]
    order = torch.tensor([(7 * i) % 40 for i in range(40)])
    again = CuratedChoice(4)(rows.select(order), Stats()).reward[:, 0]
    torch.testing.assert_close(again, found[order], equal_nan=True)
    alone = CuratedChoice(4)(rows.select(rows.group == 3), Stats()).reward[:, 0]
    torch.testing.assert_close(alone, found[24:32], equal_nan=True)


def test_a_large_group_makes_several_choices():
    rows = groups(torch.arange(16).reshape(2, 8) % 5, REWARD)
    weight = CuratedChoice(4)(rows, Stats()).reward.reshape(2, 8)
    assert [sorted(row) for row in weight.tolist()] == [[0.0] * 6 + [4.0] * 2] * 2
    first, second = CuratedChoice(4, expected=True)(rows, Stats()).reward.reshape(2, 2, 4)[0]
    assert float(first.sum()) == pytest.approx(4) and float(second.sum()) == pytest.approx(4)


TIES = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
BEST = {
    ("plain", 2): [0.160000, 0.362500, 0.200000, 0.190000, 0.087500],
    ("plain", 4): [0.025600, 0.392406, 0.104000, 0.343900, 0.134094],
    ("plain", 8): [0.000655, 0.255694, 0.016141, 0.569533, 0.157977],
    ("ties", 4): [0.025600, 0.275781, 0.220625, 0.318662, 0.159331],
}


@pytest.mark.parametrize(("kind", "n"), BEST)
def test_best_of_n_of_enumerated_rows(kind, n):
    rows = enumerated(REWARD if kind == "plain" else TIES)
    found = REF * BestOfGroup(n)(rows, Stats()).reward[:, 0]
    torch.testing.assert_close(found, torch.tensor(BEST[kind, n], dtype=torch.float64), rtol=0, atol=6e-7)


@pytest.mark.parametrize(("reward", "size", "n"), [(REWARD, 2, 2), (TIES, 2, 2), (REWARD, 4, 2), (TIES, 4, 3)])
def test_best_of_n_of_samples_is_unbiased(reward, size, n):
    """Over every group of the size, weighted with its probability."""
    draws = torch.tensor(list(itertools.product(range(5), repeat=size)))
    weight = BestOfGroup(n)(groups(draws, reward), Stats()).reward.reshape(draws.shape)
    chance = REF[draws].prod(1)[:, None] / size
    found = torch.zeros(5, dtype=torch.float64).index_add(0, draws.flatten(), (chance * weight).flatten())
    wanted = REF * BestOfGroup(n)(enumerated(reward), Stats()).reward[:, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_best_of_a_group_by_hand():
    rows, stats = table_rows([0.0, 2.0, 2.0, 1.0, NAN, 3.0], [-1.0] * 6, [0, 0, 0, 0, 0, 1])
    found = BestOfGroup(4)(rows, stats).reward[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0, 2.0, 0.0, NAN, 1.0], dtype=torch.float64), equal_nan=True)
    pairs = BestOfGroup(2)(rows, stats).reward[:4, 0]  # of the 6 pairs: 2 beats 0 and 1 twice, ties once; 1 beats 0
    torch.testing.assert_close(pairs, torch.tensor([0.0, 5 / 3, 5 / 3, 2 / 3], dtype=torch.float64))
    whole = torch.tensor([5.0], dtype=torch.float64)
    assert float(subsets(whole - 2, whole, 2)) == pytest.approx(3 / 10)


def test_shares_of_the_reference():
    """(1 - f) w + f ref / old, the padding not counted; the effective share of ratios 2 and 1/2 is 25/34."""
    rows, stats = table_rows([4.0, 0.0], [0.0, 0.0], [0, 0])
    log_two = torch.tensor(2.0, dtype=torch.float64).log()
    old = torch.zeros(2, 2, dtype=torch.float64)
    old[0, 0], old[0, 1], old[1] = -log_two, 5.0, 0.5 * log_two
    stats = Stats({LogProb(of=("ref",)): torch.zeros(2, 2, dtype=torch.float64), LogProb(of=("old",)): old})
    part = ReferenceShare(0.25)
    found = part(rows, stats, part.init()).reward[:, 0]
    torch.testing.assert_close(found, torch.tensor([3.0 + 0.5, 0.125], dtype=torch.float64))
    capped = ReferenceShare(0.25, cap=1.0)
    torch.testing.assert_close(capped.ratios(rows, stats), torch.tensor([1.0, 0.5], dtype=torch.float64))
    metrics: dict = {}
    part.observe(rows, stats, metrics, part.init())
    assert metrics["reference_share/ess"] == pytest.approx(2.5**2 / (2 * 4.25))
