"""Entropy steered by the value cache: the sign rule, the gradient against the whole model, and what must not change."""

import pytest
import torch
from jaxtyping import Float
from tests.rollouts.architectures import model
from tests.rollouts.test_generators import PROMPTS, equal
from torch import Tensor
from transformers import DynamicCache

from keel.core.errors import UserError
from keel.models.language import LanguageModel
from keel.rollouts.chain import LocalChain
from keel.rollouts.local import LocalGenerator, evaluating
from keel.rollouts.sampling import Sampling
from keel.rollouts.value_cache import (
    EntropyTuned,
    Switch,
    ValueStepper,
    ValueTuning,
    chosen_positions,
    entropy,
    entropy_gradient,
)

Z = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)


def signs(entropies: list[float], decay: float, patience: int) -> list[int]:
    switch, found = Switch.start(1, decay, patience), []
    for value in entropies:
        switch, sign = switch.check(torch.tensor([value]))
        found.append(int(sign))
    return found


def test_entropy_and_its_gradient():
    assert float(entropy(Z)) == pytest.approx(0.8323956, abs=1e-7)
    slope = entropy_gradient(Z)
    assert slope.tolist() == pytest.approx([-0.282587, 0.140770, 0.141817], abs=1e-6)
    assert float(slope.sum()) == pytest.approx(0, abs=1e-15)
    assert float(entropy(Z + 0.5 * slope)) == pytest.approx(0.8890160, abs=1e-7)
    assert float(entropy(Z - 0.5 * slope)) == pytest.approx(0.7699948, abs=1e-7)
    cut = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert float(entropy(cut)) == pytest.approx(0.6931472) and entropy_gradient(cut).abs().max() < 1e-7


def test_the_sign_follows_the_running_mean():
    assert signs([1, 2, 1, 3, 2], decay=0.0, patience=9) == [1, 1, -1, 1, -1]
    # m = 1, 1.5, 1.25, 2.125, 2.0625 ...
    assert signs([1, 2, 1, 3, 2], decay=0.5, patience=9) == [1, 1, -1, 1, -1]
    assert signs([1, 2, 1.6, 1.54], decay=0.5, patience=9) == [1, 1, 1, -1]  # m = 1, 1.5, 1.55, 1.545
    assert signs([1, 1, 1], decay=0.0, patience=1) == [1, 1, 1]


def test_after_the_peak_it_is_down_for_good():
    rising = [2, 1, 1.2, 1.4, 5, 6]
    assert signs(rising, decay=0.0, patience=9) == [1, -1, 1, 1, 1, 1]
    assert signs(rising, decay=0.0, patience=3) == [1, -1, 1, -1, -1, -1]
    assert signs([2, 1, 3, 1, 3.1, 9], decay=0.0, patience=2) == [1, -1, 1, -1, 1, 1]  # a new maximum starts anew


def test_rows_switch_by_themselves():
    a, b = [1.0, 2.0, 1.0, 1.5], [3.0, 1.0, 2.0, 4.0]
    switch, found = Switch.start(2, 0.3, 2), []
    for pair in zip(a, b, strict=True):
        switch, sign = switch.check(torch.tensor(pair))
        switch, found = switch.keep(torch.tensor([1, 0])).keep(torch.tensor([1, 0])), [*found, sign.tolist()]
    assert [pair[0] for pair in found] == signs(a, 0.3, 2)
    assert [pair[1] for pair in found] == signs(b, 0.3, 2)


def test_positions():
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    values = torch.tensor([[9.0, 1, 4, 3, 2], [5, 1, 2, 4, 3]])[:, None, :, None]
    assert torch.equal(chosen_positions(mask, values, ValueTuning()), mask)
    span = chosen_positions(mask, values, ValueTuning(positions=(1, 3)))
    assert span.long().tolist() == [[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]]
    half = chosen_positions(mask, values, ValueTuning(keep_share=0.5))
    assert half.long().tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 1, 1]]  # 2 of 4 and 3 of 5, the largest


def whole_entropy(policy: LanguageModel, ids: list[int], last: int, offset: Float[Tensor, "K P d"]) -> float:
    """H after ids and one more token, by transformers, with the cached values of the last layer moved."""
    cache = DynamicCache()
    with torch.no_grad():
        policy.module(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        cache.layers[-1].values = cache.layers[-1].values + offset
        logits = policy.module(input_ids=torch.tensor([[last]]), past_key_values=cache, use_cache=True).logits[0, -1]
    return float(entropy(logits.double()))


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "granite"])
def test_the_gradient_is_that_of_the_whole_model(name):
    policy = model(name)
    stepper = ValueStepper(policy, ValueTuning(lr=1.0, every=1))
    prompts, last = [[5, 6, 7, 8], [9, 14]], [10, 11]
    ids = torch.tensor([prompts[0], [0, 0, *prompts[1]]])
    with evaluating(policy):
        stepper.prefill(ids, torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool(), 4)
        stepper.expand(torch.tensor([0, 1]))
        stepper.step(torch.tensor(last))
    assert stepper.offset[1, :, :2].abs().max() == 0  # padding
    for row, prompt in enumerate(prompts):
        slope = stepper.offset[row, :, -len(prompt) :]
        assert slope.abs().max() > 1e-4
        for seed in range(3):
            direction = torch.randn(slope.shape, generator=torch.Generator().manual_seed(seed))
            direction = direction / direction.norm()
            up, down = (whole_entropy(policy, prompt, last[row], s * 0.1 * direction) for s in (1, -1))
            assert (up - down) / 0.2 == pytest.approx(float((slope * direction).sum()), rel=2e-3, abs=1e-5)


def test_a_step_moves_the_entropy_its_way_and_lasts():
    policy = model("qwen3")
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4).bool()

    def states(tuning):
        stepper = ValueStepper(policy, tuning)
        with evaluating(policy):
            stepper.prefill(ids, mask, 4)
            stepper.expand(torch.tensor([0]))
            found = [stepper.step(torch.tensor([token])) for token in (10, 11, 12)]
        return stepper, torch.stack([policy.head.logits(state)[0] for state in found]).detach()

    plain = states(ValueTuning(lr=0.0))[1]
    once = ValueTuning(lr=1.0, every=2)
    stepper, up = states(once)
    torch.testing.assert_close(up[0], plain[0], atol=1e-5, rtol=0)
    assert float(entropy(up[1])) > float(entropy(plain[1])) + 1e-3  # the first check pushes up
    moved = DynamicCache()
    with torch.no_grad():  # and the next token is read from the cache that was moved
        policy.module(input_ids=ids, past_key_values=moved, use_cache=True)
        moved.layers[-1].values = moved.layers[-1].values + stepper.offset
        for token in (10, 11, 12):
            logits = policy.module(input_ids=torch.tensor([[token]]), past_key_values=moved, use_cache=True).logits
    torch.testing.assert_close(up[2], logits[0, -1], atol=1e-5, rtol=0)
    assert (up[2] - plain[2]).abs().max() > 1e-3
    twice = states(ValueTuning(lr=1.0, every=2, steps=2))[1]
    assert float(entropy(twice[1])) > float(entropy(up[1])) + 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_a_step_decoding_is_what_it_was(name, temperature):
    policy, sampling = model(name), Sampling(temperature=temperature, max_completion_length=12)
    tuned = EntropyTuned(policy, ValueTuning(lr=0.0, every=2, keep_share=0.5))
    equal(tuned.generate(PROMPTS, 3, sampling, seed=7), LocalGenerator(policy).generate(PROMPTS, 3, sampling, seed=7))


def test_a_row_depends_on_itself_alone():
    policy, sampling = model("llama"), Sampling(max_completion_length=16, stop_strings=("7",))
    strong = ValueTuning(lr=20.0, every=2)
    together = EntropyTuned(policy, strong).generate(PROMPTS, 3, sampling, seed=2)
    equal(EntropyTuned(policy, strong, batch_rows=4).generate(PROMPTS, 3, sampling, seed=2), together)
    equal(EntropyTuned(policy, strong, compact=2.0).generate(PROMPTS, 3, sampling, seed=2), together)
    plain = LocalGenerator(policy).generate(PROMPTS, 3, sampling, seed=2)
    assert not torch.equal(plain.tokens, together.tokens)  # it does something
    assert bool((together.stop[:, None] != together.stop).any())  # and rows leave the batch at different times


def test_a_fork_goes_its_own_way():
    policy = model("qwen3")
    stepper = ValueStepper(policy, ValueTuning(lr=5.0, every=1))
    with evaluating(policy):
        stepper.prefill(torch.tensor([[5, 6, 7], [9, 8, 4]]), torch.ones(2, 3).bool(), 4)
        stepper.expand(torch.tensor([0, 1]))
        stepper.step(torch.tensor([10, 11]))
        before = stepper.offset.clone()
        fork = stepper.fork(torch.tensor([1, 1, 0]))
        other = fork.step(torch.tensor([12, 13, 14]))
        torch.testing.assert_close(stepper.offset, before, atol=0, rtol=0)
        mine = stepper.step(torch.tensor([14, 12]))
    torch.testing.assert_close(other[[2, 0]], mine, atol=1e-5, rtol=0)


def test_it_is_a_chain_as_any_generator():
    policy = model("qwen3")
    chain = LocalChain(EntropyTuned(policy, ValueTuning(lr=0.0, every=1)), PROMPTS, Sampling(max_completion_length=4))
    x = chain.extend(chain.init(2), torch.arange(10) + 3)
    plain = LocalChain(LocalGenerator(policy), PROMPTS, Sampling(max_completion_length=4))
    y = plain.extend(plain.init(2), torch.arange(10) + 3)
    torch.testing.assert_close(chain.log_probs(x), plain.log_probs(y), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "mistral_window", "mamba"])
def test_models_whose_last_layer_is_out_of_reach_are_refused(name):
    with pytest.raises(UserError, match=r"last layer|key-value cache"):
        EntropyTuned(model(name))


def test_bad_settings():
    for bad in (
        {"lr": -1.0},
        {"every": 0},
        {"steps": 0},
        {"patience": 0},
        {"decay": 1.0},
        {"keep_share": 0.0},
        {"positions": (3, 3)},
        {"positions": (1, 2, 3)},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ValueTuning(**bad)
