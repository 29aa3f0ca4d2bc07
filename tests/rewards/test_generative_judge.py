"""A generative judge: votes, the filter, and judgements of shuffled responses."""

import re

import pytest
import torch

from keel.core.errors import DataError
from keel.parts.rewards.generative_judge import GenerativeJudge, MetaFilter, rejective, vote

SAMPLES = torch.tensor([[7, 6], [8, 8], [5, 9], [9, 4]])
META = torch.tensor([0.9, 0.6, 0.2, 0.8])


def test_the_example():
    """(29, 27) without a filter; samples 1 and 4 alone give (16, 10)."""
    assert vote(SAMPLES).tolist() == [29, 27]
    assert vote(SAMPLES, META, MetaFilter(2)).tolist() == [16, 10]
    assert vote(SAMPLES, META).tolist() == [16, 10]  # half of four
    assert vote(SAMPLES[:1], META[:1], MetaFilter(1)).tolist() == SAMPLES[0].tolist()
    assert vote(SAMPLES, META, MetaFilter(9)).tolist() == [29, 27]
    with pytest.raises(ValueError, match="3 scores"):
        vote(SAMPLES, META[:3])
    with pytest.raises(ValueError, match="keep"):
        MetaFilter(0)


def test_of_equal_judgements_the_first_are_kept():
    assert MetaFilter(2)(torch.tensor([0.5, 0.7, 0.5, 0.5])).tolist() == [True, True, False, False]


def test_what_is_learnt_by_rejection():
    right = torch.tensor([True, True, False, True, True, False, False])
    group = torch.tensor([4, 4, 4, 9, 9, 1, 1])
    assert rejective(right, group).tolist() == [True, True, False, False, False, False, False]
    order = torch.tensor([5, 3, 0, 6, 2, 1, 4])
    assert torch.equal(rejective(right[order], group[order]), rejective(right, group)[order])


def responses_of(prompt: str) -> list[str]:
    return re.findall(r"Response \d+:\n(.*)", prompt)


def honest(prompts, seeds):
    """Scores a response by its length."""
    return [f"So: Scores: [[{', '.join(str(len(r)) for r in responses_of(p))}]]" for p in prompts]


def first(prompts, seeds):
    """Likes what stands first."""
    return [f"Scores: [[{', '.join(str(10 - i) for i in range(len(responses_of(p))))}]]" for p in prompts]


def test_shuffling_does_not_lose_whose_score_it_is():
    judge = GenerativeJudge(honest, num_samples=5)
    assert judge(prompts=["q", "p", "q"], completions=["aaa", "bb", "a"]) == [3.0, None, 1.0]


def test_a_bias_for_places_evens_out():
    """Each of two responses stands first in about half of 64 judgements: 9.5 on average."""
    judge = GenerativeJudge(first, num_samples=64)
    found = judge(prompts=["q", "q"], completions=["x", "y"])
    assert sum(found) == 19.0 and abs(found[0] - found[1]) < 0.4


def test_company_and_order_do_not_matter():
    judge = GenerativeJudge(first, num_samples=3)
    together = judge(prompts=["q", "q", "p", "p"], completions=["x", "y", "u", "v"])
    assert together == [
        *judge(prompts=["q"] * 2, completions=["x", "y"]),
        *judge(prompts=["p"] * 2, completions=["u", "v"]),
    ]
    seeds = []
    GenerativeJudge(lambda prompts, s: seeds.extend(s) or honest(prompts, s), 3)(
        prompts=["q"] * 2, completions=["x", "y"]
    )
    assert len(set(seeds)) == 3


def test_what_cannot_be_read_is_counted():
    judge = GenerativeJudge(lambda prompts, seeds: ["Scores: [[4, 2]]", "hm", "Scores: [[4]]"], 3)
    (said,) = judge.judge([("q", ["x", "y"])])
    assert said.unparsable == 2 and said.samples.shape == (1, 2) and len(said.texts) == 3
    mute = GenerativeJudge(lambda prompts, seeds: ["hm"] * len(prompts), 2)
    assert mute(prompts=["q"] * 2, completions=["x", "y"]) == [None, None]
    with pytest.raises(DataError, match="no response"):
        mute.judge([("q", [])])
    with pytest.raises(ValueError, match="num_samples"):
        GenerativeJudge(honest, 0)


def test_the_meta_filter_sees_the_judgements():
    """Of three judgements it keeps the two longest texts."""
    texts = ["Scores: [[1, 1]]", "long one. Scores: [[5, 5]]", "the longest one. Scores: [[7, 7]]"]
    judge = GenerativeJudge(
        lambda prompts, seeds: texts, 3, meta=lambda prompts, said: [len(s) for s in said], keep=MetaFilter(2)
    )
    assert judge(prompts=["q"] * 2, completions=["x", "y"]) == [6.0, 6.0]


def test_a_single_response_is_right_or_wrong():
    judge = GenerativeJudge(lambda prompts, seeds: ["Scores: [[1]]", "Scores: [[0]]", "Scores: [[7]]"], 3)
    (said,) = judge.judge([("q", ["x"])])
    assert said.samples[:, 0].tolist() == [1, 0] and said.unparsable == 1
