"""The chain by steps: its log-probabilities, its law, its bookkeeping, and samplers that run on it."""

import math
from dataclasses import replace

import pytest
import torch
from tests.rollouts.architectures import model

from keel.core.chain import Chain, TokenChain
from keel.core.chance import Sample
from keel.core.rows import Rows, Stop
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.rollouts.steps import StepChain, Steps
from keel.sampling.beam import BeamSearch
from keel.sampling.best_of import BestOf, SoftBestOf
from keel.sampling.gibbs import ParticleGibbs, sweep
from keel.sampling.smc import SMC
from keel.sampling.soft_value import SoftValueDecoding

PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12]]
TEN = Sampling(max_completion_length=10)
DELIMITER, STAR = "*", 15  # common in what the model writes


def chain(prompts=PROMPTS, sampling=TEN, name="qwen3", delimiter=DELIMITER, **options) -> StepChain:
    policy = model(name)
    policy.eos_ids = (1, 8)
    return StepChain(prompts, LocalGenerator(policy), sampling, delimiter=delimiter, pad=policy.pad_id, **options)


def recomputed(made: StepChain, x) -> torch.Tensor:
    """Log-probabilities of the tokens of states, from whole sequences without a cache."""
    policy, found = made.generator.model, torch.zeros(len(x), made.horizon)
    for i in range(len(x)):
        prompt, text = made.texts[int(x.prompt[i])], x.text(i)
        with torch.no_grad():
            logits = policy.module(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
        logits = logits / made.sampling.temperature
        if made.sampling.filter is not None:
            logits = made.sampling.filter(logits)
        found[i, : len(text)] = logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None])[:, 0]
    return found


def finished(made: StepChain, x, rng):
    while not bool(made.is_done(x).all()):
        x = made.extend(x, made.propose(x, 1, rng)[0])
    return x


@pytest.mark.parametrize("sampling", [TEN, Sampling(temperature=0.7, top_k=9, max_completion_length=10)])
def test_log_probabilities_are_the_models_own(sampling):
    made, rng = chain(sampling=sampling), Sample(0)
    x, total = made.init(4), torch.zeros(12, dtype=torch.float64)
    while not bool(x.done.all()):
        steps, logp = made.propose(x, 1, rng)
        total += logp[:, 0]
        x = made.extend(x, steps)
    assert x.length.min() < x.length.max() and bool((x.memory > 1).any())
    torch.testing.assert_close(x.logp, recomputed(made, x), rtol=0, atol=1e-5)
    torch.testing.assert_close(total, x.logp.double().sum(1))
    assert bool((x.tokens[torch.arange(10) >= x.length[:, None]] == made.pad).all())


def test_a_step_ends_at_the_delimiter_and_the_completion_does_not():
    made, rng = chain(), Sample(3)
    assert isinstance(made, Chain) and not isinstance(made, TokenChain)
    x, ends = made.init(40), 0
    while not bool(x.done.all()):
        steps, _ = made.propose(x, 1, rng)
        for i in range(len(x)):
            tokens = steps.tokens[i, : int(steps.length[i])].tolist()
            assert STAR not in tokens[:-1]
            if bool(x.done[i]):
                assert not tokens
            elif int(steps.stop[i]) < 0:
                ends += 1
                assert tokens[-1] == STAR or int(x.length[i]) + len(tokens) == 10
            elif int(steps.stop[i]) == Stop.EOS:
                assert tokens[-1] in (1, 8)
        x = made.extend(x, steps)
    assert ends > 10 and set(x.stop.tolist()) == {Stop.EOS, Stop.LENGTH}
    assert bool((x.length[x.stop == int(Stop.LENGTH)] == 10).all())


class Clock:
    """Writes token 3 until its row is over: ends every step after as many tokens as the prompt has, plus one."""

    def __init__(self, context: int | None = None):
        self.calls, self.context = [], context

    def generate(self, prompts, num_generations, sampling, *, seed, step=0, data_index=None) -> Rows:
        room = sampling.max_completion_length
        self.calls.append((len(prompts), room, sampling.stop_strings))
        assert self.context is None or max(map(len, prompts)) + room <= self.context
        texts = [text for text in prompts for _ in range(num_generations)]
        length = torch.tensor([min(room, len(text) + 1) for text in texts])
        mask = torch.arange(room) < length[:, None]
        stop = torch.where(length < room, int(Stop.STOP_STRING), int(Stop.LENGTH))
        start = torch.zeros(len(texts), 1, dtype=torch.long)
        tokens = torch.full(mask.shape, 3).masked_fill(~mask, 0)
        logp = torch.full(mask.shape, -0.5).masked_fill(~mask, 0.0)
        return Rows.build(start, start == 0, tokens, mask, stop=stop, logp={"behaviour": logp})


def test_states_of_different_lengths_are_cut_each_at_its_own_horizon():
    clock, rng = Clock(), Sample(0)
    made = StepChain([[4], [4, 4, 4]], clock, Sampling(max_completion_length=9), delimiter="d")
    x = made.extend(made.init(1), made.propose(made.init(1), 1, rng)[0])
    assert x.length.tolist() == [2, 4] and x.stop.tolist() == [-1, -1]
    x = made.extend(x, made.propose(x, 1, rng)[0])  # 3 + 1 tokens and 7 + 1, of which 5 fit
    assert x.length.tolist() == [6, 9] and x.stop.tolist() == [-1, int(Stop.LENGTH)]
    assert [call[1] for call in clock.calls] == [9, 7]
    torch.testing.assert_close(x.logp.sum(1), torch.tensor([-3.0, -4.5]))
    x = finished(made, x, rng)
    assert x.length.tolist() == [9, 9] and clock.calls[-1][:2] == (1, 3)
    assert made.meter.generated.tolist() == [9, 9]
    assert made.meter.read.tolist() == [1 + 3 + 7, 3 + 7]


def test_a_tight_context_is_kept_by_calling_twice():
    for context, calls in ((None, 1), (12, 2), (13, 2), (16, 1)):
        clock = Clock(context)
        made = StepChain([[4], [4, 4, 4]], clock, Sampling(max_completion_length=9), delimiter="d", context=context)
        x = made.init(1)
        x = made.extend(x, made.propose(x, 1, Sample(0))[0])
        clock.calls.clear()
        made.propose(x, 1, Sample(0))
        assert len(clock.calls) == calls, context


def test_max_steps_ends_a_completion_and_bounds_completions_of_the_prior_too():
    made, rng = StepChain([[4]], Clock(), Sampling(max_completion_length=30), max_steps=2), Sample(0)
    x = finished(made, made.init(2), rng)
    assert x.length.tolist() == [6, 6] and x.stop.tolist() == [int(Stop.LENGTH)] * 2  # 2 tokens, then 3 + 1
    assert made.complete(made.init(1), 3, rng).length.tolist() == [6, 6, 6]


def test_copies_of_a_state_go_on_differently_and_other_prompts_change_nothing():
    made = chain()
    x = made.init(1)
    steps, _ = made.propose(x, 6, Sample(1))
    assert len({tuple(row) for row in steps.tokens[:6].tolist()}) > 3
    many = made.select(x, torch.arange(3).repeat_interleave(6))
    assert len({tuple(row) for row in made.propose(many, 1, Sample(1))[0].tokens[:6].tolist()}) > 3
    whole = finished(made, made.init(4), Sample(2))
    alone = chain([PROMPTS[2]], data_index=[2])
    other = finished(alone, alone.init(4), Sample(2))
    assert torch.equal(whole.tokens[8:], other.tokens) and torch.equal(whole.stop[8:], other.stop)
    torch.testing.assert_close(whole.logp[8:], other.logp, rtol=0, atol=1e-5)


def test_actions_are_indexed_like_tensors_and_extended_states_leave_the_old_ones_alone():
    made = chain()
    x = made.init(2)
    steps, logp = made.propose(x, 3, Sample(0))
    assert len(steps) == 18 and logp.shape == (6, 3)
    index = torch.tensor([2, 4, 6, 9, 12, 17])
    after = made.extend(x, steps[index])
    for i, j in enumerate(index.tolist()):
        assert after.text(i) == steps.tokens[j, : int(steps.length[j])].tolist()
        assert math.isclose(float(after.logp[i].sum()), float(logp.flatten()[j]), rel_tol=1e-5)
    assert not bool(x.length.any()) and isinstance(steps[steps.length > 1], Steps)
    assert made.key(after)[3] == (1, *after.text(3))


def test_completions_follow_the_law_of_the_steps():
    """Frequencies of the first tokens and of the reasons to stop, each within 4 standard errors."""
    made, n = chain([PROMPTS[0]], Sampling(max_completion_length=5)), 3000
    direct = made.complete(made.init(1), n, Sample(0))
    stepped = finished(made, made.init(n), Sample(1))
    for statistic in (
        lambda x: x.length.double(),
        lambda x: (x.stop == int(Stop.EOS)).double(),
        lambda x: (x.tokens[:, 3] == STAR).double(),
        lambda x: (x.tokens == STAR).sum(1).double(),
    ):
        one, other = statistic(direct), statistic(stepped)
        error = math.sqrt((one.var() + other.var()) / n)
        assert error > 0 and abs(float(one.mean() - other.mean())) < 4 * error


def reward(x) -> torch.Tensor:
    return (x.tokens == STAR).sum(1).double()


def test_smc_with_a_constant_value_returns_the_prior():
    constant = lambda made, x, rng: torch.full((len(x),), 0.3)  # noqa: E731
    prompts, prior = [PROMPTS[0]] * 150, Sampling(max_completion_length=5)
    flat = chain(prompts, prior, value=constant, reward=lambda x: torch.full((len(x),), 0.3))
    found = SMC(num_particles=4, beta=0.1, ess_threshold=1.0)(flat, Sample(0))
    # psi_0 = 1, so that a constant value is a constant factor of Z and nothing else
    torch.testing.assert_close(found.log_z, torch.full((150,), 3.0, dtype=torch.float64))
    drawn = found.states.length[found.picked].double()
    plain = flat.complete(flat.init(1), 20, Sample(1)).length.double()
    error = math.sqrt(drawn.var() / len(drawn) + plain.var() / len(plain))
    assert abs(float(drawn.mean() - plain.mean())) < 4 * error


def test_the_estimate_of_z_is_unbiased():
    """E[Z_hat] is the mean of exp(r / beta) over the prior, whatever the value; 4 standard errors."""
    prompts, beta = [PROMPTS[0]] * 300, 2.0
    value = lambda made, x, rng: 1.5 * (x.tokens == STAR).sum(1)  # noqa: E731
    made = chain(prompts, Sampling(max_completion_length=6), value=value, reward=reward)
    found = SMC(num_particles=4, beta=beta, ess_threshold=1.0)(made, Sample(0))
    assert float(found.details["resampled"].mean()) > 0.5
    z = found.log_z.exp()
    truth = (reward(made.complete(made.init(1), 20, Sample(1))) / beta).exp()
    error = math.sqrt(float(z.var()) / len(z) + float(truth.var()) / len(truth))
    assert error < 0.03 * float(truth.mean())
    assert abs(float(z.mean() - truth.mean())) < 4 * error


def test_samplers_of_whole_completions_run_on_it():
    made = chain(reward=reward)
    best = BestOf(8)(made, Sample(0))
    assert torch.equal(best.reward.amax(1), best.reward.gather(1, best.pick[:, None])[:, 0])
    soft = SoftBestOf(8, beta=0.5)(chain(reward=reward), Sample(0))
    assert soft.reward.shape == (3, 8) and bool(torch.isfinite(soft.log_z).all())
    assert made.meter.rewards.tolist() == [8, 8, 8]
    assert made.meter.read.tolist() == [4, 1, 3]


@pytest.mark.parametrize("options", [{}, {"max_steps": 2}], ids=["whole", "by step"])
@pytest.mark.parametrize("begun", [False, True])
def test_completions_of_some_states_are_what_they_would_have_been(options, begun):
    made, rng = chain(**options), Sample(0)
    x = made.init(2)
    if begun:
        x = made.extend(x, made.propose(x, 1, rng)[0])
    asked, before = torch.tensor([True, False, False, True, False, False]) & ~x.done, made.meter.generated.clone()
    assert bool(asked.any())
    some = made.complete(x, 3, Sample(4), asked)
    spent = made.meter.generated - before
    everything = made.complete(x, 3, Sample(4))
    rows = asked.repeat_interleave(3)
    for name in ("tokens", "length", "stop", "prompt"):
        assert torch.equal(getattr(some, name)[rows], getattr(everything, name)[rows])
    torch.testing.assert_close(some.logp[rows], everything.logp[rows], rtol=0, atol=1e-5)
    assert bool((some.stop[~rows] == int(Stop.LENGTH)).all()) and not some.length[~rows].any()
    written = (some.length - x.length.repeat_interleave(3)).masked_fill(~rows, 0)
    assert torch.equal(spent, written.view(3, 6).sum(1)) and not int(spent[2])


def test_particle_gibbs_goes_by_steps():
    made = chain(reward=reward, value=lambda made, x, rng: reward(x))
    done = sweep(made, Sample(0), 4, 1.0)
    pick = torch.tensor([1, 3, 0])
    path, x = done.path(pick), made.init(1)
    for action in path.actions:
        x = made.extend(x, action)
    ends = made.select(done.swarm.x, torch.arange(3) * 4 + pick)
    assert torch.equal(x.tokens, ends.tokens) and torch.equal(x.stop, ends.stop)
    again = sweep(made, Sample(1), 4, 1.0, path)
    first = made.select(again.swarm.x, torch.arange(3) * 4)
    assert torch.equal(first.tokens, ends.tokens)  # the reference has survived
    found = ParticleGibbs(4, 4, 1.0)(made, Sample(0))
    prior = made.reward(made.complete(made.init(1), 200, Sample(1)))
    assert float(found.reward.mean()) > float(prior.mean())


@pytest.mark.parametrize("sampler", [BeamSearch(4, 4), SoftValueDecoding(num_particles=4, num_candidates=6)])
def test_samplers_that_go_by_values_run_on_it_and_gain(sampler):
    made = chain(reward=reward, value=lambda made, x, rng: reward(x))
    prior = made.reward(made.complete(made.init(1), 200, Sample(1)))
    found = sampler(made, Sample(0))
    assert float(found.reward.mean()) > float(prior.mean()) + 0.5 * float(prior.std())


def test_stop_strings_end_the_completion_not_the_step():
    policy = model("qwen3")
    sampling = Sampling(max_completion_length=12, stop_strings=("5",))
    made = StepChain(PROMPTS, LocalGenerator(policy), sampling, delimiter=DELIMITER, tokenizer=policy.tokenizer)
    x = finished(made, made.init(20), Sample(0))
    stopped = x.stop == int(Stop.STOP_STRING)
    assert bool(stopped.any())
    for i in range(len(x)):
        text = policy.tokenizer.decode(x.text(i))
        assert text.endswith("5") == bool(stopped[i]) and "5" not in text[:-1]


def test_a_finished_state_is_proposed_itself():
    made = chain()
    x = made.complete(made.init(1), 2, Sample(0))
    steps, logp = made.propose(x, 2, Sample(1))
    assert not bool(steps.length.any()) and not bool(logp.any())
    again = made.extend(x, steps[::2])
    assert torch.equal(again.tokens, x.tokens) and torch.equal(again.stop, x.stop)
    bare = made.select(replace(x, memory=None), torch.tensor([3, 0]))
    assert bare.prompt.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prompts", {"prompts": []}),
        ("delimiter", {"delimiter": ""}),
        ("max_steps", {"max_steps": 0}),
        ("tokenizer", {"sampling": Sampling(stop_strings=("5",))}),
        ("data_index", {"data_index": [1]}),
        ("stop_strings", {"sampling": Sampling(stop_strings=("\nEnd",)), "delimiter": "\n\n", "tokenizer": object()}),
    ],
)
def test_bad_settings_are_named(name, options):
    with pytest.raises(ValueError, match=name):
        chain(**options)
