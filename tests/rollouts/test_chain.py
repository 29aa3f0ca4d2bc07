"""A local model as a chain: its probabilities, its forks, and samplers on it against exact sums."""

import itertools

import pytest
import torch
from tests.rollouts.architectures import CACHED, OWN, model

from keel.core.chance import Sample
from keel.core.rows import Stop
from keel.rollouts import caches, steppers
from keel.rollouts.chain import LocalChain
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.sampling.best_of import BestOf, SoftBestOf
from keel.sampling.kernels import Twisted
from keel.sampling.rejection import Rejection
from keel.sampling.smc import SMC

PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12]]
BETA = 0.8


def chain(name="qwen3", length=8, reward=None, value=None, **sampling) -> LocalChain:
    generator = LocalGenerator(model(name))
    return LocalChain(
        generator, PROMPTS, Sampling(max_completion_length=length, **sampling), reward=reward, value=value
    )


def expected(c: LocalChain, x) -> torch.Tensor:
    """log p_0 of the next token after each state, by a whole forward pass each."""
    out = []
    for i in range(len(x)):
        ids = torch.tensor([[*PROMPTS[int(x.prompt[i])], *x.text(i)]])
        with torch.no_grad():
            logits = c.model.module(input_ids=ids).logits[0, -1]
        out.append((logits / c.sampling.temperature).log_softmax(-1))
    return torch.stack(out)


def check(c: LocalChain, x) -> None:
    alive = ~x.done
    torch.testing.assert_close(c.log_probs(x)[alive], expected(c, x)[alive], rtol=0, atol=2e-4)
    assert (c.log_probs(x)[x.done].argmax(1) == c.pad).all() and (c.log_probs(x)[x.done].amax(1) == 0).all()


@pytest.mark.parametrize("short", [0, caches.SHORT])
@pytest.mark.parametrize("name", OWN + CACHED)
def test_states_that_fork_and_go_on_keep_the_models_probabilities(name, short, monkeypatch):
    monkeypatch.setattr(steppers, "SHORT", short)
    c = chain(name, temperature=0.7)
    rng = Sample(0)
    x = c.init(2)
    check(c, x)
    for _ in range(3):
        x = c.extend(x, c.propose(x, 1, rng)[0])
    check(c, x)
    kept = c.select(x, torch.tensor([5, 0, 0, 3, 3, 2, 4, 4, 1]))
    x = c.extend(x, c.propose(x, 1, rng)[0])  # the original goes on beside its copy
    check(c, kept)
    kept = c.extend(kept, c.propose(kept, 1, rng)[0]) if len(kept) % 3 == 0 else kept
    check(c, kept)
    check(c, x)


def test_log_probabilities_of_what_was_written_are_recorded():
    c = chain(length=6)
    x = c.init(4)
    while not bool(x.done.all()):
        x = c.extend(x, c.propose(x, 1, Sample(1, torch.arange(3) + int(x.length.max())))[0])
    rows = c.rows(x)
    with torch.no_grad():
        log_probs = c.model.head.logits(c.model.hidden(rows)[rows.mask]).log_softmax(-1)
    again = log_probs.gather(-1, rows.tokens[rows.mask][:, None])[:, 0]
    torch.testing.assert_close(rows.logp["behaviour"][rows.mask], again, rtol=0, atol=1e-4)


def test_finished_states_stay_as_they_are_and_leave_the_batch():
    c = chain(length=12)
    c.ends[torch.arange(3, 14)] = True  # half of the tokens end a text
    x = c.init(8)
    for step in range(12):
        check(c, x)
        before = x
        x = c.extend(x, c.propose(x, 1, Sample(step))[0])
        assert torch.equal(x.tokens[before.done], before.tokens[before.done])
        assert torch.equal(x.length[before.done], before.length[before.done])
        if bool(x.done.all()):
            break
    assert bool(x.done.all()) and x.memory.stepper is None
    ended = x.stop == int(Stop.EOS)
    last = x.tokens.gather(1, x.length[:, None] - 1)[:, 0]
    assert bool(c.ends[last][ended].all()) and bool((x.length[~ended] == 12).all())


def test_a_state_read_from_its_tokens_is_the_state_that_wrote_them():
    c = chain(length=9)
    x = c.init(2)
    for _ in range(4):
        x = c.extend(x, c.propose(x, 1, Sample(3))[0])
    length = torch.tensor([4, 2, 3, 1, 4, 0])
    y = c.at(x.tokens[:, :4], length, x.prompt)
    torch.testing.assert_close(c.log_probs(y), expected(c, y), rtol=0, atol=2e-4)
    full = y.logp[0, :4]
    torch.testing.assert_close(full, x.logp[0, :4], rtol=0, atol=1e-4)
    y = c.extend(y, c.propose(y, 1, Sample(4))[0])  # ragged lengths go on together
    torch.testing.assert_close(c.log_probs(y), expected(c, y), rtol=0, atol=2e-4)


def test_stop_strings_end_a_state():
    c = chain(length=8, stop_strings=("1",))
    x = c.complete(c.init(1), 40, Sample(0))
    y = c.init(40)
    for step in range(8):
        y = c.extend(y, c.propose(y, 1, Sample(step))[0])
    for states in (x, y):
        for i in range(len(states)):
            text = c.model.tokenizer.decode(states.text(i))
            assert ("1" in text) == (int(states.stop[i]) == int(Stop.STOP_STRING))
            assert "1" not in text[:-1]


# -- samplers ---------------------------------------------------------------------------------------------------------


def sequences(c: LocalChain):
    """All texts of at most two tokens of the first prompt with their log p_0."""
    vocabulary = c.model.vocabulary_size
    pairs = torch.tensor(list(itertools.product(range(vocabulary), repeat=2)))
    x = c.at(pairs[:, :0], torch.zeros(len(pairs), dtype=torch.long), torch.zeros(len(pairs), dtype=torch.long))
    x = c.extend(x, pairs[:, 0])
    once = ~x.done | (pairs[:, 1] == 0)
    x = c.extend(x, pairs[:, 1])
    x = c.select(x, once.nonzero(as_tuple=True)[0])
    assert float(x.logp.sum(1).logsumexp(0)) == pytest.approx(0, abs=1e-4)
    return x, x.logp.sum(1).double()


def sum_of_tokens(x) -> torch.Tensor:
    return (x.tokens.double() * (torch.arange(x.tokens.shape[1]) + 1)).sin().sum(1)


def half_way(c, x, rng) -> torch.Tensor:
    return 0.3 * sum_of_tokens(x)


@pytest.mark.parametrize(
    "sampler",
    [
        SMC(16, BETA),
        SMC(16, BETA, "multinomial", ess_threshold=2.0),
        SMC(16, BETA, kernel=Twisted(5)),
        SMC(16, BETA, "residual", kernel=Twisted()),
        SoftBestOf(16, BETA),
    ],
)
def test_log_z_weights_and_kl_agree_with_exact_sums(sampler):
    """Z by going through all texts; the average of many runs of 16 particles, five standard errors at most away."""
    c = chain(length=2)
    x, log_p = sequences(c)
    tilt = log_p + sum_of_tokens(x) / BETA
    log_z = tilt.logsumexp(0)
    target = (tilt - log_z).exp()
    wanted = float((target * x.tokens[:, 0].double().cos()).sum())
    generator = LocalGenerator(c.model)
    runs = 400
    many = LocalChain(
        generator, [PROMPTS[0]] * runs, Sampling(max_completion_length=2), reward=sum_of_tokens, value=half_way
    )
    found = sampler(many, Sample(0))
    z = (found.log_z - log_z).exp()
    assert float((z.mean() - 1).abs()) < 5 * float(z.std()) / runs**0.5
    tested = found.states.tokens[found.picked, 0].double().cos() * z
    assert float((tested.mean() - wanted).abs()) < 5 * float(tested.std()) / runs**0.5
    weights = (found.log_w.exp() * found.states.tokens[:, 0].double().cos().view(runs, -1)).sum(1) * z
    assert float((weights.mean() - wanted).abs()) < 5 * float(weights.std()) / runs**0.5
    kl = float((target * (target.log() - log_p)).sum())
    spends = z * (found.kl + found.log_z - log_z)  # in the long run, weighted by Z_hat, the KL of the tilt
    assert abs(float(spends.mean()) - kl) < 5 * float(spends.std()) / runs**0.5
    assert int(many.meter.generated.sum()) == int(found.states.length.sum())
    assert bool((found.ess <= 16.0001).all())


def test_best_of_n_takes_the_best_and_a_prompt_does_not_depend_on_its_neighbours():
    whole = chain(reward=sum_of_tokens)
    found = BestOf(6)(whole, Sample(2))
    assert torch.equal(found.reward.amax(1), found.reward.gather(1, found.pick[:, None])[:, 0])
    one = LocalChain(whole.generator, PROMPTS[1:2], whole.sampling, data_index=[1], reward=sum_of_tokens)
    for sampler in (BestOf(6), SMC(6, 0.5), SMC(6, 0.5, kernel=Twisted(3))):
        all_three = sampler(chain(reward=sum_of_tokens, value=half_way), Sample(2))
        one.value_of = half_way
        alone = sampler(one, Sample(2, torch.tensor([1])))
        torch.testing.assert_close(alone.reward[0], all_three.reward[1], rtol=0, atol=1e-9)
        assert int(alone.pick[0]) == int(all_three.pick[1])


class Wasteful(LocalChain):
    """Draws for all prompts, whoever is asked for."""

    def complete(self, x, m, rng, where=None):
        """See `Chain`."""
        return super().complete(x, m, rng)


def test_completions_of_some_prompts_are_what_they_would_have_been():
    c, wanted = chain(length=6), torch.tensor([True, False, True])
    everything = chain(length=6).complete(c.init(1), 5, Sample(3))
    found = c.complete(c.init(1), 5, Sample(3), wanted)
    rows = wanted.repeat_interleave(5)
    for name in ("tokens", "length", "stop", "prompt"):
        assert torch.equal(getattr(found, name)[rows], getattr(everything, name)[rows])
    torch.testing.assert_close(found.logp[rows], everything.logp[rows], rtol=0, atol=1e-5)
    assert bool((found.stop[~rows] == int(Stop.LENGTH)).all()) and not found.length[~rows].any()
    assert torch.equal(found.prompt, everything.prompt) and bool((found.tokens[~rows] == c.pad).all())
    assert torch.equal(c.meter.generated, torch.where(wanted, everything.length.view(3, 5).sum(1), 0))
    nobody = c.complete(c.init(1), 5, Sample(3), torch.zeros(3, dtype=torch.bool))
    assert bool(nobody.done.all()) and torch.equal(nobody.prompt, everything.prompt)


def test_states_half_way_are_completed_where_asked_and_not_used_up():
    c = chain(length=6)
    x = c.init(2)
    for _ in range(2):
        x = c.extend(x, c.propose(x, 1, Sample(1))[0])
    asked = torch.tensor([True, False, True, True, False, False])
    before = c.meter.generated.clone()
    some, everything = c.complete(x, 2, Sample(4), asked), c.complete(x, 2, Sample(4))
    rows = asked.repeat_interleave(2)
    assert torch.equal(some.tokens[rows], everything.tokens[rows]) and not some.length[~rows].any()
    torch.testing.assert_close(everything.logp, c._read(everything.tokens, everything.length, everything.prompt))
    written = everything.length.view(6, 2).sum(1) - 2 * x.length
    spent = c.meter.generated - before
    assert torch.equal(spent, (written * (1 + asked.long())).view(3, 2).sum(1))


def test_a_prompt_that_has_accepted_writes_nothing_more():
    made = [kind(chain().generator, PROMPTS * 4, Sampling(max_completion_length=4)) for kind in (LocalChain, Wasteful)]
    results = []
    for c in made:
        c.reward_of = lambda x: (x.tokens[:, 0] > 15).double() - 1
        results.append(Rejection(0.0, 2, 40, 0.5)(c, Sample(0)))
    thrifty, wasteful = results
    samples = thrifty.details["samples"]
    assert len(samples.unique()) > 1 and torch.equal(samples, wasteful.details["samples"])
    assert torch.equal(thrifty.states.tokens, wasteful.states.tokens) and torch.equal(thrifty.pick, wasteful.pick)
    less = made[0].meter.generated < made[1].meter.generated
    assert torch.equal(less, samples < samples.max())


def test_temperature_zero_is_refused():
    with pytest.raises(ValueError, match="temperature"):
        chain(temperature=0.0)
