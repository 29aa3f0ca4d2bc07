"""From samples to an evaluation: hand-computed numbers, samples without a score, round trips."""

import json
import math

import numpy as np
import pytest

from keel.evaluate.evaluation import Completion, Evaluation, Samples, assess, change

NAN = math.nan


def samples(reward, **known) -> Samples:
    reward = np.array(reward, dtype=float)
    known.setdefault("lengths", np.full(reward.shape, 5))
    known.setdefault("clipped", np.zeros(reward.shape, dtype=bool))
    return Samples(reward, **known)


def test_numbers_by_hand():
    found = assess(
        samples(
            [[1, 0, 0, 0], [1, 1, 1, 0]],
            lengths=np.array([[2, 4, 6, 8], [1, 1, 1, 1]]),
            clipped=np.array([[True, False, False, False], [False] * 4]),
            answers=[["x", "y", "y", None], ["p", "q", "p", "r"]],
            entropy=np.array([[0.2, 0.4, 0.6, 0.8], [1.0, 1.0, 1.0, 1.0]]),
            kl=np.array([[0.0, 0.0, 0.0, 0.4], [0.1, 0.1, 0.1, 0.1]]),
        ),
        ks=(1, 2, 4, 8),
    )
    values = {name: interval.value for name, interval in found.metrics.items()}
    assert values == pytest.approx(
        {
            "pass@1": 0.5,
            "pass@2": 0.75,  # 1/2 and 1
            "pass@4": 1.0,
            "avg@4": 0.5,
            "maj@4": 0.5,  # y beats x; p (correct) beats q and r
            "distinct_answers": 2.5,
            "reward": 0.5,
            "entropy": 0.75,
            "kl": 0.1,
            "completions/mean_length": 3.0,
            "completions/clipped_ratio": 0.125,
        }
    )
    assert found.prompts == 2 and found.samples == 4 and found.errors == 0
    assert [k for k, _ in found.pass_curve()] == [1, 2, 4]
    assert found.largest("pass") == "pass@4" and found.largest("maj") == "maj@4" and found.largest("best") is None


def test_what_was_not_measured_is_left_out():
    found = assess(samples([[1, 0]]))
    assert not {"entropy", "kl", "maj@2", "distinct_answers"} & set(found.metrics)
    assert not found.metrics["pass@1"].known  # one prompt has no interval


def test_threshold_and_verdict():
    assert assess(samples([[0.5, 0.6]]), ks=(1,)).metrics["pass@1"].value == 0.5
    assert assess(samples([[0.5, 0.6]]), ks=(1,), threshold=0.4).metrics["pass@1"].value == 1.0
    judged = samples([[1.5, 1.5]], verdict=np.array([[0.0, 1.0]]))
    assert assess(judged, ks=(1,)).metrics["pass@1"].value == 0.5
    assert assess(judged, ks=(1,)).metrics["reward"].value == 1.5


def test_samples_without_a_score_count_nowhere():
    found = assess(
        samples([[1, NAN, 0, 1], [1, 1, 1, 1], [NAN] * 4], answers=[list("abca"), list("aaaa"), list("abcd")]),
        ks=(1, 2, 4),
    )
    assert found.errors == 5
    assert found.values["pass@1"][:2] == pytest.approx((2 / 3, 1.0))
    assert math.isnan(found.values["pass@1"][2])
    assert math.isnan(found.values["pass@4"][0])  # three scored samples have no pass@4
    assert found.metrics["pass@1"].value == pytest.approx(5 / 6)
    assert found.metrics["reward"].value == pytest.approx(5 / 6)


def test_change_is_paired_by_prompt():
    before = assess(samples([[1, 0], [0, 0], [1, 1]], index=(3, 5, 8)))
    after = assess(samples([[1, 1], [0, 1], [1, 1]], index=(3, 5, 8)))
    found = change(before, after, "pass@1")
    assert found.value == pytest.approx(1 / 3)
    assert found.low >= 0
    assert change(before, after, "kl") is None
    assert change(before, assess(samples([[1, 1], [0, 1], [1, 1]], index=(3, 5, 9))), "pass@1") is None


def test_round_trip_through_json():
    kept = Completion(index=4, prompt="1 2 3>6=", text="1+2+3", reward=NAN, answer=None, length=6, clipped=False)
    found = assess(samples([[1, NAN], [0, 1]], index=(4, 9), completions=(kept,)))
    text = json.dumps(found.to_json(), allow_nan=False)
    again = Evaluation.from_json(json.loads(text))
    assert again.to_json() == found.to_json()
    assert again.metrics["pass@1"] == found.metrics["pass@1"]
    assert math.isnan(again.completions[0].reward)


@pytest.mark.parametrize("data", [{}, [], {"metrics": 3}, {"metrics": {}, "values": None}])
def test_what_is_no_evaluation_is_refused(data):
    with pytest.raises(ValueError, match="no evaluation"):
        Evaluation.from_json(data)


def test_wrong_shapes_are_refused():
    with pytest.raises((ValueError, TypeError), match="lengths"):
        samples([[1, 0]], lengths=np.zeros((2, 1), dtype=int))
    with pytest.raises(ValueError, match="'answers'"):
        samples([[1, 0]], answers=[["a"]])
    with pytest.raises(ValueError, match="'index'"):
        samples([[1, 0]], index=(1, 2))
    with pytest.raises(ValueError, match="no k"):
        assess(samples([[1, 0]]), ks=(4,))
