"""Samplers over a whole generator: their plain limits, what they cost, and a world where copying is enough."""

import math
from types import SimpleNamespace

import pytest
import torch
from tests.rollouts.architectures import model
from tests.rollouts.test_generators import PROMPTS, recomputed
from tests.rollouts.test_refine import EOS, MARK, RIGHT, Writer
from tests.serve.running import serving

from keel.core.chance import Sample
from keel.core.config import from_config, to_config
from keel.core.errors import ConfigError, UserError
from keel.core.rows import Stop
from keel.rollouts.chain import LocalChain
from keel.rollouts.local import LocalGenerator
from keel.rollouts.openai import OpenAIGenerator
from keel.rollouts.openai_chain import OpenAIChain
from keel.rollouts.samplers import DistilRefine, VReason
from keel.rollouts.sampling import Sampling
from keel.rollouts.steps import StepChain
from keel.rollouts.value_cache import EntropyTuned, ValueTuning
from keel.sampling.catalogue import SAMPLERS, entry_of, sampler, tilt_of

WARM = Sampling(temperature=1.3, top_k=9, max_completion_length=6)
STRONG = ValueTuning(lr=20.0, every=2)


@pytest.fixture(scope="module")
def policy():
    return model("llama")


def local(policy, sampling=WARM, **options):
    return LocalChain(LocalGenerator(policy), PROMPTS, sampling, data_index=[7, 3, 5, 1, 9], **options)


def test_without_a_step_v_reason_is_plain_sampling(policy):
    chain = local(policy)
    found = VReason(4, ValueTuning(lr=0.0, every=2))(chain, Sample(3))
    plain = local(policy)
    wanted = plain.complete(plain.init(1), 4, Sample(3))
    assert torch.equal(found.states.tokens, wanted.tokens) and torch.equal(found.states.stop, wanted.stop)
    torch.testing.assert_close(found.states.logp, wanted.logp, rtol=0, atol=1e-4)
    assert float(found.kl.abs().max()) < 1e-4 and found.ess.tolist() == pytest.approx([4.0] * 5)
    assert torch.equal(chain.meter.generated, plain.meter.generated)


def test_what_v_reason_spends(policy):
    """log q as the steered generator reports it, log p_0 by a pass of the policy; KL is not negative."""
    chain = local(policy, Sampling(max_completion_length=6))
    found = VReason(64, STRONG)(chain, Sample(0))
    rows = EntropyTuned(policy, STRONG).generate(
        PROMPTS, 64, chain.sampling, seed=Sample(0).seed("complete"), data_index=chain.data_index
    )
    assert torch.equal(found.states.tokens[:, : rows.tokens.shape[1]], rows.tokens)
    logp = torch.zeros(rows.mask.shape).masked_scatter(rows.mask, recomputed(policy, rows, chain.sampling))
    spent = (rows.logp["behaviour"] - logp).sum(1).double().view(5, 64).mean(1)
    torch.testing.assert_close(found.kl, spent, rtol=0, atol=1e-3)
    assert float(found.kl.mean()) > 0.01 and not found.kl_is_bound and bool(found.log_z.isnan().all())


class Layout:
    """A tokenizer of marks."""

    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=[MARK] * len(text.strip()))


def world(p, prompts, length=3) -> StepChain:
    """Answers are right by a coin, or because a right draft is in the prompt; the reward says which."""
    writer = Writer(p, end=True)
    writer.vocabulary = SimpleNamespace(tokenizer=Layout())
    generate = writer.generate

    def with_logp(*given, **known):
        rows = generate(*given, **known)
        return rows.with_(logp={"behaviour": torch.full(rows.tokens.shape, -0.5)})

    writer.generate = with_logp
    right = lambda x: (x.tokens[:, 0] == RIGHT).double()  # noqa: E731
    sampling = Sampling(max_completion_length=length)
    return StepChain([[7, 8]] * prompts, writer, sampling, pad=EOS, reward=right, data_index=range(prompts))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"num_particles": 4}, 1 - 0.8**4),
        ({"num_particles": 4, "choose": "random"}, 0.2),
        ({"num_particles": 4, "choose": "random", "keep": 2}, 1 - 0.8**2),
        ({"num_particles": 2, "rounds": 3}, 1 - 0.8**4),  # drafts of the second round toss their coins anew
        ({"rounds": 1}, 0.2),
    ],
)
def test_a_reader_that_copies_what_is_right(settings, wanted):
    """Success is that of the drafts which the last answer has seen, and of its own coin."""
    own = settings.get("rounds", 2) > 1
    found = DistilRefine(template="{prompt}|{drafts}|", **settings)(world(0.2, 2000), Sample(0))
    success = 1 - (1 - wanted) * 0.8**own
    assert float(found.reward.mean()) == pytest.approx(success, abs=4 * math.sqrt(success * (1 - success) / 2000))
    assert found.count == 1 and bool(found.kl.isnan().all()) and found.states.stop.eq(int(Stop.EOS)).all()


def test_what_refinement_costs():
    chain = world(0.2, 3)
    found = DistilRefine(4, rounds=3, keep=2, template="{prompt}|{drafts}||")(chain, Sample(1))
    assert chain.meter.generated.tolist() == [(4 + 4 + 1) * 3] * 3
    read = 2 + 1 + (2 + 2) + 2  # prompt, mark, two drafts without their ends, marks; nothing stands between them here
    assert chain.meter.read.tolist() == [2 * read] * 3
    assert chain.meter.rewards.tolist() == [4 + 4 + 1] * 3
    assert found.details["total"].tolist() == [4 * (2 + 3) + 5 * (read + 3)] * 3
    assert found.details["sequential"].tolist() == [(2 + 3) + 2 * (read + 3)] * 3
    assert found.details["context"].tolist() == [read] * 3


def test_one_round_is_a_plain_completion(policy):
    chain = local(policy)
    found = DistilRefine(8, rounds=1)(chain, Sample(2))
    rows = LocalGenerator(policy).generate(PROMPTS, 1, WARM, seed=Sample(2).seed("refine"), data_index=chain.data_index)
    assert torch.equal(found.states.tokens[:, : rows.tokens.shape[1]], rows.tokens)
    assert float(found.kl.abs().max()) < 1e-4 and found.kl_is_bound and not chain.meter.read.any()


def test_refinement_on_a_server_is_the_local_one(policy):
    reward = lambda x: (x.tokens == 15).sum(1).double()  # noqa: E731
    settings, sampling = DistilRefine(3, keep=2, template="{prompt}1{drafts}2"), Sampling(max_completion_length=5)
    here = settings(chain := local(policy, sampling, reward=reward), Sample(0))
    with serving(policy) as url:
        top = policy.vocabulary_size
        there = OpenAIChain(
            PROMPTS, OpenAIGenerator(policy, url), 5, top=top, data_index=chain.data_index, reward=reward
        )
        found = settings(there, Sample(0))
    assert torch.equal(found.states.tokens, here.states.tokens) and torch.equal(found.reward, here.reward)
    for name in ("generated", "read", "rewards"):
        assert torch.equal(getattr(there.meter, name), getattr(chain.meter, name))
    assert bool(here.kl.isfinite().all()) and bool(found.kl.isnan().all())


def test_the_catalogue_knows_them(policy):
    for name, made in (("v_reason", VReason(2, STRONG)), ("parallel_distil_refine", DistilRefine(3, keep=2))):
        assert entry_of(made) == SAMPLERS[name] and tilt_of(made) is None
        assert from_config(to_config(made)) == made
    assert sampler("v_reason", {"num_particles": 2, "tuning.lr": 20.0, "tuning.every": 2}) == VReason(2, STRONG)
    with pytest.raises(ConfigError, match="decay"):
        sampler("v_reason", {"tuning.decay": 2.0})


def test_what_is_wrong_is_named(policy):
    steps = StepChain(PROMPTS, LocalGenerator(policy), Sampling(max_completion_length=4))
    with pytest.raises(UserError, match="caches of a model that runs here"):
        VReason()(steps, Sample(0))
    for bad in (
        {"num_particles": 0},
        {"rounds": 0},
        {"keep": 0},
        {"room": 0},
        {"choose": "worst"},
        {"template": "{drafts}{prompt}"},
        {"template": "{prompt}"},
        {"template": "{prompt}{drafts}{drafts}"},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DistilRefine(**bad)
    with pytest.raises(ValueError, match="num_particles"):
        VReason(0)
