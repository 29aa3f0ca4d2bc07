"""Taking confounders away: the two examples of the specification, the estimators, and what cannot be estimated."""

import itertools

import numpy as np
import pytest

from keel.core.config import from_config, to_config
from keel.core.errors import ConfigError, DataError
from keel.parts.rewards.deconfounded import ASSUMES, Deconfound, deconfounded_pairs


def slope(x, y) -> float:
    return float(np.cov(x, y)[0, 1] / np.var(x, ddof=1))


@pytest.fixture(scope="module")
def entangled():
    """c, e ~ N(0, 1), x = c + e, Y = x + 2 c + noise."""
    chance = np.random.default_rng(0)
    c, e, noise = chance.standard_normal((3, 200_000))
    x = c + e
    return x, c, x + 2 * c + noise


def test_the_joint_fit_gives_the_effect_of_the_text(entangled):
    """The naive slope of Y on x is 2; residualising on c alone leaves .5; the joint fit 1. Standard errors ~ .003."""
    x, c, y = entangled
    assert slope(x, y) == pytest.approx(2.0, abs=0.01)
    alone = y - slope(c, y) * c
    assert slope(x, alone) == pytest.approx(0.5, abs=0.01)
    found = Deconfound(("c",), ridge=0.0)(y, {"c": c}, x[:, None])
    assert found.effects["c"] == pytest.approx(2.0, abs=0.015)
    assert slope(x, found.outcomes) == pytest.approx(1.0, abs=0.01)


def test_the_other_example():
    """q ~ N, c = .6 q + .8 e, r = q + 2 c + .1 noise: marginal slope 2.6, joint 2; corr(r, q) .806 becomes .995."""
    chance = np.random.default_rng(1)
    q, e, noise = chance.standard_normal((3, 20_000))
    c = 0.6 * q + 0.8 * e
    r = q + 2 * c + 0.1 * noise
    marginal = slope(c, r)
    assert marginal == pytest.approx(2.6, abs=0.02)
    assert np.corrcoef(r, q)[0, 1] == pytest.approx(0.807, abs=0.01)
    wrong = r - marginal * c
    assert np.corrcoef(wrong, q)[0, 1] == pytest.approx(0.797, abs=0.01)
    assert slope(q, wrong) == pytest.approx(0.64, abs=0.02)
    found = Deconfound(("c",), ridge=0.0)(r, {"c": c}, q[:, None])
    assert found.effects["c"] == pytest.approx(2.0, abs=0.005)
    assert np.corrcoef(found.outcomes, q)[0, 1] == pytest.approx(0.995, abs=0.001)
    assert slope(q, found.outcomes) == pytest.approx(1.0, abs=0.005)


def test_least_squares_in_small_by_hand():
    """Y = 3 x + 2 c exactly: gamma is 2, Y_adj = 3 x + 2 mean(c)."""
    x, c = np.array([0.0, 1.0, 2.0, 5.0]), np.array([1.0, -1.0, 3.0, 1.0])
    found = Deconfound(("c",), ridge=0.0)(3 * x + 2 * c, {"c": c}, x[:, None])
    assert found.effects == {"c": pytest.approx(2.0)}
    assert found.outcomes == pytest.approx(3 * x + 2.0)


def test_a_linear_function_of_the_confounders_added_to_all_changes_nothing(entangled):
    x, c, y = (column[:500] for column in entangled)
    part = Deconfound(("c",))
    before, after = part(y, {"c": c}, x[:, None]), part(y + 7 * c, {"c": c}, x[:, None])
    assert after.outcomes - before.outcomes == pytest.approx(np.full(500, 7 * c.mean()), abs=1e-9)


def test_no_effect_is_the_identity():
    chance = np.random.default_rng(2)
    x, c = chance.standard_normal((2, 50))
    c -= c.mean()
    x -= x.mean()
    x -= (x @ c) / (c @ c) * c
    found = Deconfound(("c",), ridge=0.0)(4 * x, {"c": c}, x[:, None])
    assert found.effects["c"] == pytest.approx(0.0, abs=1e-12) and found.outcomes == pytest.approx(4 * x)


def test_within_the_same_text():
    """Two texts of worth 1 and 5, shown on days with effects 0, 1, 3; the worse one on the better days."""
    texts = ["a"] * 3 + ["b"] * 3
    day = [0.0, 1.0, 3.0, 1.0, 0.0, 0.0]
    y = [1.0 + 2 * d for d in day[:3]] + [5.0 + 2 * d for d in day[3:]]
    found = Deconfound(("day",), "within")(y, {"day": day}, texts=texts)
    assert found.effects == {"day": pytest.approx(2.0)}
    mean = np.mean(day) * 2
    assert found.outcomes == pytest.approx([1 + mean] * 3 + [5 + mean] * 3)


def test_two_stage_least_squares():
    """Something not observed moves C and Y: least squares is off by about .5, the instrument is not."""
    chance = np.random.default_rng(3)
    hidden, z, x, noise = chance.standard_normal((4, 100_000))
    c = hidden + z + 0.5 * x
    y = x + 2 * c + hidden + 0.1 * noise
    known = {"c": c, "z": z}
    plain = Deconfound(("c",), ridge=0.0)(y, known, x[:, None])
    assert plain.effects["c"] == pytest.approx(2.5, abs=0.02)
    found = Deconfound(("c",), "two_stage", 0.0, ("z",))(y, known, x[:, None])
    assert found.effects["c"] == pytest.approx(2.0, abs=0.02) and not found.notes
    assert found.assumes == ASSUMES["two_stage"] and "alone" in found.assumes
    weak = Deconfound(("c",), "two_stage", 0.0, ("w",))(
        y[:200], {"c": c[:200], "w": chance.standard_normal(200)}, x[:200, None]
    )
    assert "hardly move c" in weak.notes[0]


def test_texts_and_booleans_are_categories():
    day = ["mon", "tue", "wed"] * 4
    x = np.arange(12.0) ** 1.5
    y = x + np.array([0.0, 1.0, 5.0] * 4)
    found = Deconfound(("day",), ridge=0.0)(y, {"day": day}, x[:, None])
    assert found.effects == {"day=tue": pytest.approx(1.0), "day=wed": pytest.approx(5.0)}
    flag = Deconfound(("f",), ridge=0.0)(
        x + 3.0 * (np.arange(12) % 2), {"f": [i % 2 == 1 for i in range(12)]}, x[:, None]
    )
    assert flag.effects == {"f=True": pytest.approx(3.0)}


def rows(seed=0, count=60):
    """Posts on two topics; one is shown more, and length is what readers like."""
    chance = np.random.default_rng(seed)
    out = []
    for i in range(count):
        for _ in range(3):
            words = int(chance.integers(1, 9))
            shown = float(chance.integers(0, 5))
            text = " ".join(["good"] * words)
            out.append({"prompt": f"p{i}", "completion": text, "shown": shown, "clicks": words + 3 * shown})
    return out


def test_pairs_follow_the_worth_and_not_the_exposure():
    data = rows()
    found = deconfounded_pairs(data, Deconfound(("shown",), ridge=1e-6), "clicks", features=8)
    right = [len(p["chosen"]) >= len(p["rejected"]) for p in found.pairs]
    naive = [
        (a["clicks"] > b["clicks"]) == (len(a["completion"]) > len(b["completion"]))
        for a, b in itertools.pairwise(data)
        if a["prompt"] == b["prompt"] and a["clicks"] != b["clicks"] and a["completion"] != b["completion"]
    ]
    assert np.mean(right) > 0.95 > 0.85 > np.mean(naive)
    assert len(found.pairs) + found.ties == 60 * 3 and found.alone == 0
    assert {"prompt", "chosen", "rejected", "margin"} == set(found.pairs[0])
    wide = deconfounded_pairs(data, Deconfound(("shown",)), "clicks", least_gap=1e9)
    assert not wide.pairs and wide.ties == 180
    again = deconfounded_pairs(data, Deconfound(("shown",), ridge=1e-6), "clicks", features=8)
    assert again.pairs == found.pairs


GOOD = {"c": [0.0, 1.0, 2.0, 0.0, 1.0]}
X = np.array([[1.0], [0.0], [3.0], [2.0], [5.0]])
Y = [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("part", "given", "content", "said"),
    [
        (Deconfound(("d",)), GOOD, X, "no column 'd'; there are c"),
        (Deconfound(("c",)), {"c": [0.0, None, 1.0, 1.0, 2.0]}, X, "row 1 has none"),
        (Deconfound(("c",)), {"c": [1.0] * 5}, X, "same in all rows"),
        (Deconfound(("c",)), {"c": ["a"] * 5}, X, "one value only"),
        (Deconfound(("c",)), {"c": [1.0]}, X, "1 entries for 5"),
        (Deconfound(("c",)), {"c": [0.0, float("nan"), 1.0, 1.0, 2.0]}, X, "finite"),
        (Deconfound(("c", "d")), {**GOOD, "d": [2 * v for v in GOOD["c"]]}, X, "collinear"),
        (Deconfound(("c",), ridge=0.0), {"c": X[:, 0].tolist()}, X, "c is determined by the text"),
        (Deconfound(("c",), ridge=0.0), GOOD, np.hstack([X, X]), "features of the text are collinear"),
        (Deconfound(("c",)), GOOD, X[:3], "for each of 5"),
    ],
)
def test_what_cannot_be_estimated_is_said(part, given, content, said):
    with pytest.raises(DataError, match=said):
        part(Y, given, content)


def test_what_an_estimator_needs():
    with pytest.raises(ConfigError, match="features"):
        Deconfound(("c",))(Y, GOOD)
    with pytest.raises(ConfigError, match="same text"):
        Deconfound(("c",), "within")(Y, GOOD)
    with pytest.raises(DataError, match="no text appears twice"):
        Deconfound(("c",), "within")(Y, GOOD, texts=list("abcde"))
    with pytest.raises(DataError, match="row 0 has no 'shown'"):
        deconfounded_pairs([{"prompt": "p", "completion": "c", "outcome": 1.0}], Deconfound(("shown",)))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"confounders": ()}, "confounders"),
        ({"confounders": ("c", "c")}, "twice"),
        ({"confounders": ("c",), "estimator": "magic"}, "estimator"),
        ({"confounders": ("c",), "ridge": -1.0}, "ridge"),
        ({"confounders": ("c",), "instruments": ("z",)}, "two_stage"),
        ({"confounders": ("c",), "estimator": "two_stage"}, "instruments"),
    ],
)
def test_bad_settings(settings, named):
    with pytest.raises((ValueError, TypeError), match=None if named == "estimator" else named):
        Deconfound(**settings)


def test_it_can_be_written_down():
    part = Deconfound(("c",), "two_stage", 0.1, ("z",))
    assert from_config(to_config(part)) == part
