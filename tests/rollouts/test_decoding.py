"""The choice of a token, and the bookkeeping around it."""

import pytest
import torch
from scipy.stats import chisquare
from tests.rollouts.architectures import model

from keel.core.choice import generator
from keel.core.drawing import BLOCK, draw
from keel.core.policy import Head
from keel.rollouts.decoding import Chooser, Prompts, StopStrings, survivors
from keel.rollouts.sampling import Sampling


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 1), (0.249999, 1), (0.25, 2), (0.4999, 2), (0.5, 4), (1 - 2**-53, 4)]
)
def test_the_token_is_the_first_whose_sum_exceeds_the_uniform(uniform, token):
    probs = torch.tensor([[0.0, 0.25, 0.25, 0.0, 0.5, 0.0]])
    assert draw(probs, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize("vocabulary", [7, 4 * BLOCK + 1, 9 * BLOCK + 17])
def test_no_uniform_leads_to_a_token_of_probability_zero(vocabulary):
    draws = generator(0, vocabulary)
    weight = torch.rand(400, vocabulary, generator=draws).pow(20) * (torch.rand(400, vocabulary, generator=draws) < 0.3)
    weight[:, 2] += 1e-9
    probs = weight / weight.sum(1, keepdim=True)
    for uniform in (0.0, 2**-53, 0.5, 1 - 2**-53, 1.0):  # 1 is what rounding may make of a share within a block
        token = draw(probs, torch.full((400,), uniform, dtype=torch.float64))
        assert bool((probs.gather(1, token[:, None]) > 0).all())


def test_two_levels_find_the_same_token_as_one():
    draws = generator(1)
    probs = torch.randn(500, 5 * BLOCK - 100, generator=draws).mul(3).softmax(1)
    uniform = torch.rand(500, generator=draws, dtype=torch.float64)
    plain = torch.searchsorted(
        probs.double().cumsum(1), uniform[:, None] * probs.double().sum(1, keepdim=True), right=True
    )
    assert torch.equal(draw(probs, uniform), plain[:, 0])


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0, 0.5])
    rows = 20_000
    chooser = Chooser(Head(), Sampling(), torch.arange(rows), 4)
    tokens, logp = chooser(logits.expand(rows, -1), torch.arange(rows), 3)
    expected = logits.softmax(0).double()
    assert chisquare(tokens.bincount(minlength=6).numpy(), (expected / expected.sum() * rows).numpy()).pvalue > 0.001
    torch.testing.assert_close(logp, logits.log_softmax(0)[tokens])


def test_positions_and_rows_are_independent():
    logits = torch.zeros(2000, 2)
    chooser = Chooser(Head(), Sampling(), torch.arange(2000), 100)
    flips = torch.stack([chooser(logits, torch.arange(2000), t)[0] for t in range(100)]).double()
    assert torch.corrcoef(flips).fill_diagonal_(0).abs().max() < 0.12  # 5 standard errors of 1 / sqrt(2000)
    assert torch.corrcoef(flips[:, :100].T).fill_diagonal_(0).abs().max() < 0.5


def test_greedy_records_the_unfiltered_log_probability_at_temperature_one():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    chooser = Chooser(Head(), Sampling(temperature=0, top_k=1), torch.arange(1), 1)
    token, logp = chooser(logits, torch.arange(1), 0)
    assert token.tolist() == [1]
    torch.testing.assert_close(logp, logits.log_softmax(1)[:, 1])


def test_survivors_move_as_little_as_possible():
    done = torch.tensor([0, 1, 0, 1, 0, 0, 1, 0]).bool()
    index = survivors(done)
    assert sorted(index.tolist()) == [0, 2, 4, 5, 7]
    assert index.tolist() == [0, 5, 2, 7, 4]


def test_each_distinct_prompt_is_read_once():
    policy = model("llama")
    asked = Prompts.of(policy, [[5, 6], [7], [5, 6], []], 2, 4, seed=0, step=0, data_index=[3, 9, 4, 5])
    assert asked.ids.tolist() == [[5, 6], [0, 7], [0, policy.start_id]]
    assert asked.mask.tolist() == [[True, True], [False, True], [False, True]]
    assert asked.index.tolist() == [0, 0, 1, 1, 0, 0, 2, 2]
    assert asked.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert asked.data_index.tolist() == [3, 3, 9, 9, 4, 4, 5, 5]
    assert len(asked.row.unique()) == 8
    second = asked.parts(3)[1]  # rows 3, 4, 5
    assert second.ids[second.index].tolist() == [[0, 7], [5, 6], [5, 6]]
    last = asked.parts(6)[1]  # two rows of the one-token prompt: no column of padding
    assert last.ids.tolist() == [[policy.start_id]] and last.index.tolist() == [0, 0]


def test_stop_strings_may_span_tokens_and_end_within_one():
    policy = model("llama")
    policy.tokenizer.add_tokens([")>="])
    encode = policy.tokenizer.encode
    texts = StopStrings.of(policy, ("1>", "99"))
    rows = ["3+1>", "3+1=", "0099", "9)9>", "1" + ")>="]
    ids = [encode(text) for text in rows]
    tokens = torch.zeros(5, 4, dtype=torch.long)
    for i, row in enumerate(ids):
        tokens[i, 4 - len(row) :] = torch.tensor(row)
    alive = torch.tensor([4, 0, 1, 2, 3])
    found = texts.found(tokens, alive, tokens[alive, 3], 3)
    assert found.tolist() == [False, True, False, True, False]
    assert StopStrings.of(policy, (")>",)).found(tokens, alive, tokens[alive, 3], 3).tolist() == [True] + [False] * 4
