"""Support against a base: published counts, exact probabilities, samples by hand, and what chance does."""

import json
import math

import numpy as np
import pytest

from keel.evaluate.evaluation import Evaluation, Samples, assess
from keel.evaluate.pass_at_k import pass_at_k
from keel.evaluate.support import (
    Counts,
    Support,
    answer_entropy,
    compare_support,
    detectable,
    exact_support,
    sampled_support,
)

NAN = math.nan
BASE = np.array([[0.30, 0.10, 0.02, 0.005, 0.0004, 0.5746]])
TRAINED = np.array([[0.80, 0.15, 0.0001, 0.02, 0.0008, 0.0291]])
RIGHT = np.array([[True] * 5 + [False]])


def counts(p, e, s) -> Counts:
    return Counts(*(np.atleast_1d(np.array(x)) for x in (p, e, s)))


@pytest.mark.parametrize(
    ("pes", "wanted"),
    [
        ((2400, 36, 163), (0.936403, 0.014778, 0.029097, -0.048865)),
        ((4, 0, 1), (0.8, 0.0, 0.0, -0.2)),
        ((3, 1, 1), (0.75, 0.25, 0.375, 0.0)),
        ((0, 2, 0), (NAN, 1.0, NAN, 1.0)),  # nothing to keep
        ((0, 0, 3), (0.0, NAN, NAN, -1.0)),  # nothing of its own
        ((0, 2, 3), (0.0, 1.0, 0.0, -0.2)),
        ((0, 0, 0), (NAN, NAN, NAN, NAN)),
    ],
)
def test_ratios(pes, wanted):
    found = counts(*pes).ratios()
    assert tuple(found.values()) == pytest.approx(wanted, abs=6e-7, nan_ok=True)
    assert list(found) == ["srr", "ndr", "sds", "nscr"]
    if pes[0] and pes[1]:
        assert found["sds"] == pytest.approx(2 / (1 / found["srr"] + 1 / found["ndr"]))


def test_ratios_are_of_sums_over_prompts():
    found = counts([2, 0, 1], [0, 1, 0], [0, 1, 3])
    assert found.totals() == {"preserved": 3, "gained": 1, "lost": 4}
    assert found.ratios()["srr"] == pytest.approx(3 / 7)


def test_exact_support():
    """The base holds all five right answers above 3 / 8192, the trained policy four of them."""
    found = exact_support(TRAINED, BASE, RIGHT, 3 / 8192)
    assert found.totals() == {"preserved": 4, "gained": 0, "lost": 1}
    assert found.ratios() == {"srr": 0.8, "ndr": 0.0, "sds": 0.0, "nscr": -0.2}
    assert exact_support(BASE, TRAINED, RIGHT, 3 / 8192).totals() == {"preserved": 4, "gained": 1, "lost": 0}
    assert exact_support(BASE, BASE, RIGHT, 0.005).totals() == {"preserved": 3, "gained": 0, "lost": 0}  # above, not at


def test_the_limit_of_a_small_penalty_keeps_the_odds():
    """base(. | right): the odds of the base, at a KL of -log of its accuracy."""
    accuracy = BASE[0, :5].sum()
    limit = np.where(RIGHT, BASE, 0) / accuracy
    assert limit[0, :5] == pytest.approx([0.705219, 0.235073, 0.047015, 0.011754, 0.000940], abs=6e-7)
    kl = float((limit[0, :5] * np.log(limit[0, :5] / BASE[0, :5])).sum())
    assert kl == pytest.approx(0.854725, abs=6e-7) and kl == pytest.approx(-math.log(0.4254))
    assert exact_support(limit, BASE, RIGHT, 3 / 8192).ratios()["srr"] == 1.0


def test_what_k_samples_find():
    assert detectable(8192) == pytest.approx(1 - 0.05 ** (1 / 8192), rel=1e-9)
    assert detectable(100) * 100 == pytest.approx(3, abs=0.06)
    assert 1 - (1 - detectable(64)) ** 64 == pytest.approx(0.95)
    assert -math.expm1(1024 * math.log1p(-4e-4)) == pytest.approx(0.336139, abs=6e-7)
    assert float(pass_at_k(10**8, 4 * 10**4, 1024)) == pytest.approx(0.336139, abs=1e-5)
    with pytest.raises(ValueError, match="k must be at least 1"):
        detectable(0)


def test_answer_entropy():
    assert answer_entropy(["a", "a", "b", "b"]) == pytest.approx(math.log(2))
    assert answer_entropy(["a", "a", "b", None]) == pytest.approx(0.636514, abs=6e-7)
    assert answer_entropy(["a", "a"]) == 0 and math.isnan(answer_entropy([None, None]))


# -- samples ---------------------------------------------------------------------------------------------------------


def samples(answers, right, **known) -> Samples:
    """Samples whose reward says whether the answer is among the right ones; a "!" could not be scored."""
    reward = np.array([[NAN if a == "!" else float(a in list(right)) for a in row] for row in answers])
    known.setdefault("lengths", np.ones(reward.shape, dtype=int))
    return Samples(reward, clipped=np.zeros(reward.shape, dtype=bool), answers=answers, texts=answers, **known)


def test_sampled_support_by_hand():
    policy = samples([["a", "a", "x", "b"], ["c", "!", "y", "y"]], "abcde")
    base = samples([["a", "x", "d", "e"], ["x", "y", "x", None]], "abcde")
    found = sampled_support(policy, base)
    assert (found.preserved.tolist(), found.gained.tolist(), found.lost.tolist()) == ([1, 0], [1, 1], [2, 0])
    assert sampled_support(base, policy).totals() == {"preserved": 1, "gained": 2, "lost": 2}


def test_a_threshold_and_a_verdict_decide_what_is_right():
    one = samples([["a", "b"]], "ab")
    half = Samples(one.reward / 2, one.lengths, one.clipped, answers=one.answers)
    assert sampled_support(half, one).totals() == {"preserved": 0, "gained": 0, "lost": 2}
    assert sampled_support(half, one, threshold=0.4).totals() == {"preserved": 2, "gained": 0, "lost": 0}
    judged = Samples(one.reward, one.lengths, one.clipped, verdict=np.array([[1.0, 0.0]]), answers=one.answers)
    assert sampled_support(judged, one).totals() == {"preserved": 1, "gained": 0, "lost": 1}


def test_completions_as_classes():
    """Two ways of writing one answer are one answer and two completions."""
    policy = samples([["1+2", "1+2"]], ["1+2", "2+1"])
    base = samples([["1+2", "2+1"]], ["1+2", "2+1"])
    same = [["3", "3"]]
    first, second = (Samples(s.reward, s.lengths, s.clipped, answers=same, texts=s.texts) for s in (policy, base))
    assert sampled_support(first, second).ratios()["srr"] == 1.0
    assert sampled_support(first, second, classes="completion").ratios()["srr"] == 0.5
    with pytest.raises(ValueError, match="by completion"):
        bare = Samples(policy.reward, policy.lengths, policy.clipped, answers=same)
        sampled_support(bare, bare, classes="completion")


def test_other_samples_are_refused():
    two, four = samples([["a", "b"]], "ab"), samples([["a", "b", "a", "b"]], "ab")
    with pytest.raises(ValueError, match="the same k"):
        sampled_support(two, four)
    with pytest.raises(ValueError, match="same prompts"):
        sampled_support(samples([["a", "b"]], "ab", index=(3,)), samples([["a", "b"]], "ab", index=(4,)))
    plain = Samples(two.reward, two.lengths, two.clipped)
    with pytest.raises(ValueError, match="needs the answer"):
        sampled_support(plain, two)


def drawn(probs, prompts: int, k: int, seed: int, **known) -> Samples:
    """k answers to each prompt, the last of them wrong."""
    rng = np.random.default_rng(seed)
    letters = "abcdefgh"[: len(probs)]
    picks = rng.choice(list(letters), size=(prompts, k), p=np.array(probs) / np.sum(probs))
    return samples(picks.tolist(), letters[:-1], **known)


def test_a_comparison_beside_chance():
    """500 prompts, 16 samples: chance alone misses answers of probability .05 in (1 - .05)^16 = 44% of the cases."""
    prompts, k, base = 500, 16, [0.4, 0.05, 0.55]
    first, again = drawn(base, prompts, k, 1), drawn(base, prompts, k, 2)
    narrow = drawn([0.7, 0.005, 0.295], prompts, k, 3)
    found = compare_support(narrow, first, again)
    seen = 1 - 0.95**16  # of the rare answer
    assert found.null["srr"].value == pytest.approx((1 + seen**2) / (1 + seen), abs=0.03)
    rare = 1 - 0.995**16
    assert found.ratios["srr"].value == pytest.approx((1 + seen * rare) / (1 + seen), abs=0.03)
    assert found.beyond_chance["srr"].high < 0 and found.beyond_chance["nscr"].high < 0
    for name in ("srr", "ndr", "sds", "nscr"):
        assert found.ratios[name].low < found.ratios[name].value < found.ratios[name].high
        difference = found.ratios[name].value - found.null[name].value
        assert found.beyond_chance[name].value == pytest.approx(difference)
    assert found.null["nscr"].low < 0 < found.null["nscr"].high
    assert found.k == 16 and found.eps == detectable(16)
    assert found.policy.correct_answers.value == pytest.approx(1 + rare, abs=0.03)
    assert found.base.correct_answers.value == pytest.approx(1 + seen, abs=0.05)
    assert found.policy.answer_entropy.value < found.base.answer_entropy.value
    assert math.isnan(found.policy.token_entropy.value)
    unchanged = compare_support(drawn(base, prompts, k, 4), first, again)
    assert unchanged.beyond_chance["srr"].low < 0 < unchanged.beyond_chance["srr"].high


def test_intervals_have_the_width_of_a_share():
    """SRR where every prompt has one answer that the base always has: a mean of 400 coins, 1.96 sqrt(p q / n) wide."""
    first, again = (samples([["a", "a"]] * 400, "a") for _ in range(2))
    policy = samples([["a", "x"] if i % 4 else ["x", "x"] for i in range(400)], "a")
    found = compare_support(policy, first, again).ratios["srr"]
    assert found.value == 0.75
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * math.sqrt(0.75 * 0.25 / 400), rel=0.08)


def test_token_entropy_counts_tokens():
    """(3 tokens at .2, 1 token at 1.0): .4, not .6."""
    one = samples([["a", "x"]] * 3, "a", lengths=np.array([[3, 1]] * 3), entropy=np.array([[0.2, 1.0]] * 3))
    assert compare_support(one, one, one).policy.token_entropy.value == pytest.approx(0.4)


def test_one_prompt_has_no_intervals_and_nothing_right_no_ratios():
    one = samples([["a", "x"]], "a")
    assert not compare_support(one, one, one).ratios["srr"].known
    wrong = samples([["x", "y"]] * 3, "a")
    found = compare_support(wrong, wrong, wrong)
    assert math.isnan(found.ratios["srr"].value) and found.counts == {"preserved": 0, "gained": 0, "lost": 0}


def test_round_trip_through_json():
    policy, base, again = (drawn([0.5, 0.2, 0.3], 20, 8, seed) for seed in range(3))
    support = compare_support(policy, base, again, classes="completion", warnings=["sampled at temperature 0.7"])
    again_ = Support.from_json(json.loads(json.dumps(support.to_json(), allow_nan=False)))
    assert again_.to_json() == support.to_json() and again_.ratios == support.ratios
    plain = assess(policy)
    assert "support" not in plain.to_json() and Evaluation.from_json(plain.to_json()).support is None
    from dataclasses import replace

    whole = replace(plain, support=support)
    found = Evaluation.from_json(json.loads(json.dumps(whole.to_json(), allow_nan=False)))
    assert found.support is not None and found.support.to_json() == support.to_json()
    with pytest.raises(ValueError, match="no evaluation"):
        Evaluation.from_json({**whole.to_json(), "support": {"k": 3}})


def test_a_filter_of_the_sampler_is_told():
    from keel.train.measure import _truncated
    from keel.train.settings import EvaluateSettings

    assert _truncated(EvaluateSettings()) == _truncated(EvaluateSettings(top_p=1.0)) == []
    found = _truncated(EvaluateSettings(temperature=0.7, top_p=0.95))
    assert len(found) == 2 and "0.7" in found[0] and "top_p=0.95" in found[1]


@pytest.mark.slow
def test_a_model_against_itself(tmp_path):
    """The whole way, with all answers counted as right: the base against itself differs from the null by chance."""
    import keel
    from keel.cli.show import support_text
    from keel.models.tiny import TinyConfig
    from keel.tasks.load import load_task
    from keel.train.base import BaseRecipe, ensure_base

    how = BaseRecipe(TinyConfig(dim=32, layers=2, heads=2, feed_forward=64), steps=150, batch_size=64)
    base = str(ensure_base(load_task("countdown"), how))
    settings = {"task": "countdown", "num_prompts": 24, "num_generations": 16, "reference": base, "threshold": -1.0}
    found = keel.evaluate(base, support="completion", **settings).support
    assert found.classes == "completion" and sum(found.counts.values()) > 0
    assert found.beyond_chance["nscr"].low <= 0 <= found.beyond_chance["nscr"].high
    assert found.counts != found.null_counts  # other randomness
    assert found.policy.token_entropy.value == pytest.approx(found.base.token_entropy.value, abs=0.05)
    text = support_text(found)
    assert "SRR" in text and "beyond chance" in text and "warning" not in text
    assert keel.evaluate(base, support=None, **settings).support is None
