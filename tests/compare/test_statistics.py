"""Intervals and tests of comparisons: known numbers, limiting cases, and how often they are right."""

import math

import numpy as np
import pytest
from scipy import stats

from keel.compare.statistics import (
    Needed,
    Spread,
    bootstrap,
    holm,
    improvement_draws,
    interquartile_draws,
    interquartile_mean,
    interval,
    p_value,
    probability_of_improvement,
    profile,
    resamples,
    seeds_needed,
    spread,
)
from tests.compare.synthetic import answers

S, P = np.meshgrid(np.arange(4), np.arange(6), indexing="ij")
X = ((S * 7 + P * 3 + S * P) % 11) / 10.0
Y = ((S * 5 + P * 4 + 2) % 9) / 8.0
# What rliable 1.2.0 says of X and Y (beside pandas 2: it does not import beside pandas 3).
THRESHOLDS = np.array([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
PROFILE_X = [0.875, 0.70833333, 0.66666667, 0.41666667, 0.16666667, 0.0]
PROFILE_Y = [0.91666667, 0.91666667, 0.58333333, 0.45833333, 0.16666667, 0.0]


def scalars(seeds, prompts, rest, count, size):
    return Spread(np.array(seeds), np.array(prompts), np.array(rest), count, size)


# -- what others compute ---------------------------------------------------------------------------------------------


def test_the_numbers_of_rliable():
    assert interquartile_mean(X) == pytest.approx(0.43333333333333335)
    assert interquartile_mean(Y) == pytest.approx(0.46875)
    odd = np.sin(1 + 3 * np.arange(5)[:, None] + np.arange(7)[None] ** 2)
    assert interquartile_mean(odd) == pytest.approx(-0.03195470808027199)
    assert probability_of_improvement(X, Y) == pytest.approx(0.4791666666666667)
    assert probability_of_improvement(X[:3], Y) == pytest.approx(0.46527777777777773)
    np.testing.assert_allclose(profile(X, THRESHOLDS)[0], PROFILE_X, atol=1e-8)
    np.testing.assert_allclose(profile(Y, THRESHOLDS)[0], PROFILE_Y, atol=1e-8)


def test_probability_of_improvement_is_mann_and_whitneys():
    each = stats.mannwhitneyu(X, Y, axis=0, method="asymptotic").statistic / 16
    assert probability_of_improvement(X, Y) == pytest.approx(each.mean())
    assert probability_of_improvement(Y, X) == pytest.approx(1 - each.mean())
    assert probability_of_improvement(X, X) == 0.5
    assert probability_of_improvement(X + 1.5, Y) == 1.0


# -- the spread ------------------------------------------------------------------------------------------------------


def test_spread_by_hand():
    # Means of rows 2 and 8, of columns 3 and 7, of all 5; residuals 1, -1, -1, 1.
    found = spread(np.array([[1.0, 3.0], [5.0, 11.0]]))
    assert (found.seeds, found.prompts, found.rest) == (9.0, 4.0, 1.0)
    assert found.half() == pytest.approx(12.706204736 * math.sqrt(9 + 4 - 1))


def test_tables_side_by_side_are_tables_one_by_one():
    tables = np.stack([X, Y, X - Y])
    each = [float(spread(table).half()) for table in tables]
    np.testing.assert_allclose(spread(tables).half(), each, rtol=1e-12)


def test_seeds_alone_are_students_t():
    runs = np.array([[0.41], [0.47], [0.44]])
    found, by_scipy = spread(runs - 0.4), stats.ttest_1samp(runs[:, 0] - 0.4, 0)
    ends = by_scipy.confidence_interval(0.95)
    assert interval(0.04, found).low == pytest.approx(ends.low)
    assert interval(0.04, found).high == pytest.approx(ends.high)
    assert p_value(0.04, found) == pytest.approx(by_scipy.pvalue, rel=1e-6)
    # Prompts that all change alike add nothing: the same interval from many columns.
    assert spread(np.repeat(runs - 0.4, 50, axis=1)).half() == pytest.approx(float(found.half()))


def test_prompts_alone_with_one_seed():
    row = np.array([[0.1, -0.2, 0.4, 0.3, 0.0]])
    by_scipy = stats.ttest_1samp(row[0], 0).confidence_interval(0.95)
    assert interval(row.mean(), spread(row)).low == pytest.approx(by_scipy.low)
    assert not interval(0.1, spread(np.array([[0.1]]))).known


def test_never_surer_than_the_prompts():
    # Seeds that agree by luck: what is left is the spread of prompts.
    table = np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    found = spread(table)
    assert found.seeds == 0
    assert found.half() == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(float(found.prompts)))
    assert found.half() > 0


@pytest.mark.parametrize("estimate", [0.001, 0.02, 0.2])
def test_p_is_where_the_interval_ends_at_zero(estimate):
    found = spread(X - Y)
    p = p_value(estimate, found)
    assert found.half(1 - p) == pytest.approx(estimate, rel=1e-6)
    assert p_value(-estimate, found) == p


def test_p_at_its_ends():
    assert p_value(0.0, spread(X)) == 1.0
    assert p_value(0.5, spread(np.zeros((3, 4)))) == 1e-12


def test_ends_stay_where_the_number_can_be():
    found = spread(np.array([[0.9, 1.0, 1.0], [1.0, 1.0, 0.8]]))
    assert interval(0.95, found, 0.0, 1.0).high == 1.0
    assert interval(0.95, found).high > 1.0


# -- the bootstrap ---------------------------------------------------------------------------------------------------


def test_the_bootstrap_of_a_mean_is_its_closed_form():
    table = X - Y

    def mean(seeds, prompts):
        return np.einsum("rs,sp,rp->r", seeds, table, prompts)

    drawn, exact = bootstrap(mean, 4, 6, draws=40_000).spread(), spread(table)
    for name in ("seeds", "prompts", "rest"):
        assert getattr(drawn, name) == pytest.approx(float(getattr(exact, name)), rel=0.04), name


def test_resamples_are_the_same_for_every_arm_and_of_the_seed():
    assert resamples(3, 5)[0] is resamples(3, 5)[0]
    assert not np.array_equal(resamples(3, 5, seed=1)[1], resamples(3, 5, seed=2)[1])
    np.testing.assert_allclose(resamples(3, 5)[1].sum(1), 1.0)


@pytest.mark.parametrize("seeds", [(1, 1, 1, 1), (2, 0, 1, 1), (0, 0, 4, 0)])
@pytest.mark.parametrize("prompts", [(1, 1, 1, 1, 1, 1), (0, 2, 1, 0, 3, 0)])
def test_weighted_interquartile_mean_is_that_of_repeated_units(seeds, prompts):
    repeated = np.repeat(np.repeat(Y, seeds, axis=0), prompts, axis=1)
    weights = np.array([seeds]) / 4, np.array([prompts]) / 6
    assert interquartile_draws(Y)(*weights)[0] == pytest.approx(stats.trim_mean(repeated, 0.25, axis=None))


def test_weighted_improvement_is_that_of_repeated_units():
    seeds, prompts = (2, 0, 1, 1), (0, 2, 1, 0, 3, 0)
    x, y = (np.repeat(np.repeat(table, seeds, axis=0), prompts, axis=1) for table in (X, Y))
    found = improvement_draws(X, Y)(np.array([seeds]) / 4, np.array([prompts]) / 6)
    assert found[0] == pytest.approx(probability_of_improvement(x, y))


def test_differences_of_draws_are_paired():
    x, y = bootstrap(interquartile_draws(X), 4, 6), bootstrap(interquartile_draws(X + 0.2), 4, 6)
    assert (y - x).spread().half() == pytest.approx(0.0, abs=1e-12)
    assert x.spread().half() > 0.05


def test_one_seed_has_no_part_of_the_seeds():
    found = bootstrap(interquartile_draws(X[:1]), 1, 6).spread()
    assert found.seeds == 0 and found.rest == 0 and found.prompts > 0


# -- how often they are right ----------------------------------------------------------------------------------------

ROUNDS = 1500
# Standard deviations between seeds in log-odds; as differences of pass@1 they are 0, 0.01, 0.035 and 0.09.
UNLIKE = {"none": 0.0, "some": 0.05, "much": 0.15, "most": 0.4}


def differences(count, seeds, rounds=ROUNDS, samples=16, size=100, better=0.0):
    rng = np.random.default_rng([count, round(100 * seeds), samples])
    base = rng.normal(-0.3, 1.5, (rounds, 1, size))
    one, other = (
        answers(rng, (rounds, count, size), samples, more, seeds, base=base) / samples for more in (better, 0.0)
    )
    return one - other


def naive(tables, draws=200):
    """Percentiles of the bootstrap as it comes: whether they leave out 0."""
    seeds, prompts = resamples(*tables.shape[-2:], draws=draws)
    means = (np.einsum("rs,nsp->nrp", seeds, tables, optimize=True) * prompts).sum(-1)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return (low > 0) | (high < 0)


@pytest.mark.parametrize("count", [3, 5, 10])
@pytest.mark.parametrize("unlike", UNLIKE)
def test_a_recipe_against_itself_is_found_different_in_one_of_twenty(count, unlike):
    tables = differences(count, UNLIKE[unlike], rounds=ROUNDS if count == 3 else 500)
    found = np.abs(tables.mean((1, 2))) > spread(tables).half()
    assert found.mean() < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / len(tables))


@pytest.mark.parametrize(("count", "unlike", "least"), [(3, "much", 0.07), (3, "most", 0.15), (5, "most", 0.09)])
def test_the_bootstrap_as_it_comes_is_not_right(count, unlike, least):
    assert naive(differences(count, UNLIKE[unlike], rounds=400)).mean() > least


@pytest.mark.parametrize("samples", [8, 32])
def test_other_numbers_of_samples(samples):
    tables = differences(3, 0.15, samples=samples)
    assert (np.abs(tables.mean((1, 2))) > spread(tables).half()).mean() < 0.06


@pytest.mark.parametrize("statistic", ["iqm", "improvement"])
def test_other_statistics_of_a_recipe_against_itself(statistic):
    rng = np.random.default_rng(5)
    rounds, wrong = 80, 0
    base = rng.normal(-0.3, 1.5, (rounds, 1, 60))
    ones, others = (answers(rng, (rounds, 3, 60), 16, 0.0, 0.3, base=base) / 16 for _ in range(2))
    for x, y in zip(ones, others, strict=True):
        if statistic == "iqm":
            drawn = bootstrap(interquartile_draws(x), 3, 60) - bootstrap(interquartile_draws(y), 3, 60)
            value = interquartile_mean(x) - interquartile_mean(y)
        else:
            drawn, value = bootstrap(improvement_draws(x, y), 3, 60), probability_of_improvement(x, y) - 0.5
        wrong += abs(value) > float(drawn.spread().half())
    assert wrong <= rounds / 20 + 3


def test_a_band_of_a_profile():
    tables = differences(3, 0.05, rounds=1)[0]
    shares, half = profile(tables, np.array([-2.0, 0.0, 2.0]))
    assert list(shares[[0, 2]]) == [1.0, 0.0] and list(half[[0, 2]]) == [0.0, 0.0]
    above = (tables > 0).astype(float)
    assert half[1] == pytest.approx(float(spread(above).half()))


# -- corrections -----------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
    # p / w: 0.005, 0.02, 0.04; sums of weights that are left: 4, 2, 1.
    assert holm([0.01, 0.02, 0.04], [2.0, 1.0, 1.0]) == pytest.approx([0.02, 0.04, 0.04])


def test_holm_passes_on_what_is_not_known():
    found = holm([0.02, math.nan, 0.03], [1.0, 9.0, 1.0])
    assert math.isnan(found[1])
    assert [found[0], found[2]] == pytest.approx([0.04, 0.04])


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, math.nan]])
def test_holm_refuses_weights(weights):
    with pytest.raises(ValueError, match="weight"):
        holm([0.1, 0.2], weights)


def test_holm_keeps_false_finds_rare():
    p = np.random.default_rng(0).uniform(size=(4000, 5))
    weights = [4.0, 1.0, 1.0, 1.0, 1.0]
    assert np.mean([min(holm(list(row), weights)) <= 0.05 for row in p]) < 0.06


# -- how many seeds --------------------------------------------------------------------------------------------------


def test_seeds_for_a_paired_t_test():
    # A difference as large as the standard deviation between seeds takes 10 of them at 80% and 5% (Cohen's tables).
    assert seeds_needed(0.1, scalars(0.1**2 / 3, 0.0, 0.0, 3, 100)) == Needed(10)
    # Half as large: 34.
    assert seeds_needed(0.05, scalars(0.1**2 / 3, 0.0, 0.0, 3, 100)) == Needed(34)


def test_where_no_number_of_seeds_is_known():
    assert seeds_needed(0.1, scalars(0.0, 0.01, 0.0, 1, 100)).reason == "one seed"
    assert seeds_needed(0.0, scalars(0.01, 0.0, 0.0, 3, 100)).reason == "no difference"
    assert seeds_needed(0.1, scalars(0.001, 0.06**2, 0.0, 3, 100)).reason == "prompts"
    assert seeds_needed(0.001, scalars(0.01, 0.0, 0.0, 3, 100)).reason == "many"
    assert str(Needed(None, "one seed")) == "cannot be known from one seed"


def test_seeds_that_are_said_to_suffice_suffice():
    better, unlike = 0.35, 0.3
    pilots = differences(40, unlike, rounds=60, better=better)
    found = spread(pilots)
    true = scalars(found.seeds.mean(), found.prompts.mean(), found.rest.mean(), 40, 100)
    count = seeds_needed(float(pilots.mean()), true).seeds
    assert 5 <= count <= 30
    tables = differences(count, unlike, rounds=800, better=better)
    power = (np.abs(tables.mean((1, 2))) > spread(tables).half()).mean()
    assert 0.75 < power < 0.9
