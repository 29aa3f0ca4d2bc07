"""Samplers on a served model: the law of the local one, values that read along, and what cannot be had over a wire."""

import math
import sys

import pytest
import torch
from tests.rollouts.test_vllm import engine as vllm_engine
from tests.serve.running import serving
from tests.train.test_sampling import short
from typer.testing import CliRunner

import keel
from keel.cli.main import app
from keel.core.chance import Sample
from keel.core.errors import ConfigError, UserError
from keel.models.load import load, outline
from keel.rollouts.openai import Endpoint, Vocabulary
from keel.rollouts.openai_chain import OpenAIChain
from keel.sampling.joint import JointChain
from keel.sampling.kernels import Twisted
from keel.train.engines import open_engine
from keel.train.sampling import Beside, opened
from keel.train.values import LearnedValue, fit_value

V = 22  # tokens of the small model, all of which are shown with top=V
__all__ = ["vllm_engine"]


@pytest.fixture(scope="module")
def begins(tmp_path_factory):
    """A value of beginnings: the more digits the better."""
    file = tmp_path_factory.mktemp("functions") / "values.py"
    file.write_text(
        "def begins(prompts, completions, **columns):\n"
        "    return [sum(c.isdigit() for c in completion) / 10 for completion in completions]\n"
    )
    return f"{file}:begins"


@pytest.fixture(scope="module")
def policy(base):
    return load(base, device="cpu")


@pytest.fixture(scope="module")
def url(policy):
    with serving(policy) as address:
        yield address.removesuffix("/v1")


@pytest.fixture(scope="module")
def learnt(base, tmp_path_factory):
    """Folders with a value that has a model of its own, and with one that reads the policy's states."""
    folder = tmp_path_factory.mktemp("values")
    with opened(base, "countdown", reward={"short": short}) as (bench, _):
        for own_body in (True, False):
            value, _ = fit_value(bench.seen(64, 4), bench.policy, "mean", own_body=own_body, epochs=1)
            value.save(folder / f"own_body_{own_body}")
    return folder


def test_a_served_model_is_known_without_its_weights(base, policy):
    known = Vocabulary.of(outline(base))
    for name in ("eos_ids", "pad_id", "start_id", "vocabulary_size", "context_length"):
        assert getattr(known, name) == getattr(policy, name)
    assert known.tokenizer("1 2").input_ids == policy.tokenizer("1 2").input_ids
    with pytest.raises(UserError, match="no such folder"):
        outline("/nowhere/at-all")


@pytest.mark.parametrize("kind", ["text", "own_body"])
def test_value_augmented_sampling_on_a_black_box_has_the_law_of_the_local_one(base, url, learnt, begins, kind):
    """log q of every next token along the same texts, and the same picks under one seed."""
    value = begins if kind == "text" else str(learnt / "own_body_True")
    runs, laws, actions = [], [], []
    for where in ({}, {"server": url, "top": V}):
        with opened(base, "countdown", reward={"short": short}, value=value, **where) as (bench, examples):
            made = bench.sampler("value_augmented", {"num_particles": 3, "beta": 0.05, "k": None})
            runs.append(bench.run("value_augmented", {"num_particles": 3, "beta": 0.05, "k": None}, examples[:3], 4))
            chain = bench.chain(examples[:3], made)
            chain.value_of = bench._value(examples[:3])
            x, found = chain.init(2), []
            for step in range(4):
                found.append(Twisted().log_q(chain, x, Sample(0), 0.05).log_softmax(-1)[~x.done])
                if not where:
                    actions.append(chain.propose(x, 1, Sample(step))[0])
                x = chain.extend(x, actions[step])
            laws.append(torch.cat(found))
            main = getattr(chain, "main", chain)
            assert isinstance(main, OpenAIChain) == bool(where)
            assert isinstance(chain, JointChain) == (kind == "own_body")
    torch.testing.assert_close(laws[1], laws[0], rtol=0, atol=1e-3)
    plain = [[c.text for c in account.completions] for account in runs[0]]
    assert [[c.text for c in account.completions] for account in runs[1]] == plain
    for here, there in zip(*runs, strict=True):
        assert there.kl == pytest.approx(here.kl, abs=1e-3)
        assert (there.generated, there.scored) == (here.generated, here.scored)
        assert here.read == 0 and there.read > there.generated


def test_a_learnt_value_reads_bare_texts_of_any_chain(base, url, learnt):
    """Without caches the same numbers, on the chain over tokens and on that by steps."""
    value, found = LearnedValue.load(learnt / "own_body_True", "cpu"), []
    for where in ({}, {"server": url}, {"server": url, "step": "+"}, {"step": "+"}):
        with opened(base, "countdown", reward={"short": short}, **where) as (bench, examples):
            chain = bench.chain(examples[:3], None)
            x = chain.complete(chain.init(1), 2, Sample(0))
            if not found:
                texts = x
            same = type(x)(texts.tokens, texts.logp, texts.length, texts.stop, texts.prompt)
            before = chain.meter.scored.clone()
            found.append(value.reader(chain, same))
            assert int((chain.meter.scored - before).sum()) == int(texts.length.sum())
            assert value(chain, same, Sample(0)).shape == (6,)  # nothing is read for finished ones
            assert int((chain.meter.scored - before).sum()) == int(texts.length.sum())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-4)
    assert float(found[0].std()) > 0


def test_a_value_without_a_model_of_its_own_is_refused(base, url, learnt):
    head = str(learnt / "own_body_False")
    for step in (None, "+"):
        with pytest.raises(UserError, match="own states"):
            keel.sample(
                base,
                1,
                task="countdown",
                method="smc",
                reward=short,
                value=head,
                server=url,
                step=step,
                num_particles=4,
            )
    assert keel.sample(base, 1, task="countdown", method="smc", reward=short, value=head, step="+", num_particles=2)


@pytest.mark.parametrize(
    "method", ["best_of_n", "smc", "twisted_smc", "particle_gibbs", "tree_sampling", "beam_search"]
)
def test_samplers_run_on_a_server(base, url, method):
    from keel.sampling.catalogue import SAMPLERS

    def digits(chain, x, rng):
        return ((x.tokens > 3) & (x.tokens < 14)).double().sum(1) / 10

    settings = {SAMPLERS[method].knob: 3, "task": "countdown", "reward": short, "value": digits}
    found = keel.sample(base, 2, method=method, server=url, top=4, **settings)
    again = keel.sample(base, 2, method=method, server=url, top=4, **settings)
    assert [a.pick.text for a in found] == [a.pick.text for a in again]
    assert all(a.read > 0 and a.rewards > 0 for a in found)


def test_steps_on_a_server_are_the_local_ones(base, url):
    settings = {"task": "countdown", "method": "smc", "num_particles": 4, "step": "+", "reward": short, "seed": 3}
    here, there = (keel.sample(base, 3, **settings, **where) for where in ({}, {"server": url}))
    assert [[c.text for c in a.completions] for a in here] == [[c.text for c in a.completions] for a in there]
    assert [a.read for a in here] == [a.read for a in there] and here[0].read > 0
    filtered = keel.sample(base, 1, **settings, server=url, temperature=0.7, top_p=0.9)
    assert math.isfinite(filtered[0].log_z)


def test_chunks_of_prompts_change_nothing_on_a_server(base, url, monkeypatch):
    from keel.train import sampling

    settings = {"task": "countdown", "method": "best_of_n", "num_particles": 4, "reward": short, "server": url}
    whole = keel.sample(base, 4, **settings)
    monkeypatch.setattr(sampling, "MAX_ROWS", 8)
    assert [a.pick.text for a in keel.sample(base, 4, **settings)] == [a.pick.text for a in whole]


def test_accuracy_against_tokens_on_a_server(base, url):
    (curve,) = keel.frontier(
        base,
        ["best_of_n"],
        (1, 2),
        task="countdown",
        reward=short,
        num_prompts=4,
        server=Endpoint(url + "/v1", "small"),
    )
    assert [p.size for p in curve.points] == [1, 2] and all(p.numbers["read"] > 0 for p in curve.points)


def test_which_model_is_meant(base, task, policy, url, monkeypatch):
    engine = open_engine(base, task, server=url)
    assert engine.generator.endpoint.served == "small" and engine.top == 20 and not engine.is_local
    monkeypatch.setenv("OPENAI_BASE_URL", url + "/v1")
    assert open_engine(policy, task, name="server", top=3).top == 3
    two = Endpoint(url + "/v1")
    two.__dict__["_listed"] = [{"id": "one"}, {"id": base}]
    two.prefer(base)
    assert two.served == base
    with pytest.raises(UserError, match="It has: one"):
        two.prefer("three")


def test_what_is_wrong_is_named(base, url):
    common = {"task": "countdown", "reward": short}

    def refused(what, method="smc", error=ConfigError, **settings):
        with pytest.raises(error, match=what):
            keel.sample(base, 1, method=method, **common, **settings)

    refused("is no address", server="127.0.0.1:8000")
    refused("is for servers", top=3)
    refused("is for servers", engine="vllm", server=url)
    refused("unknown engine 'vlm'. Did you mean", engine="vlm")
    refused("OPENAI_BASE_URL", engine="server")
    refused("at least 1", server=url, top=0)
    refused("neither filters", server=url, top_p=0.9)
    refused("temperature must be positive", server=url, temperature=0.0)
    refused("temperature must be positive", temperature=0.0)
    refused("learnt from the model itself", server=url, value="fit")
    refused("learnt from the model itself", method="adaptive_best_of_n", server=url)
    refused("must run here", method="cfg", server=url, beside={"unconditional": Beside(base)}, num_particles=1)


def test_vllm_goes_by_steps(base, monkeypatch, vllm_engine):
    """With a stand-in for vLLM, which writes the same texts to everybody."""
    with pytest.raises(ConfigError, match="--step"):
        keel.sample(base, 1, task="countdown", method="smc", reward=short, engine="vllm")
    vllm_engine.writes = [([6, 7, 1], "stop"), ([6, 1], "stop")]
    settings = {"task": "countdown", "method": "soft_best_of_n", "num_particles": 2, "reward": short, "step": "+"}
    (found,) = keel.sample(base, 1, engine="vllm", **settings)
    assert [c.tokens for c in found.completions] == [(6, 7, 1), (6, 1)]
    assert found.generated == 5 and found.read > 0 and len(vllm_engine.made.loaded) == 1
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="vLLM is not installed"):
        keel.sample(base, 1, engine="vllm", **settings)


def test_the_commands(base, url):
    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    options = ("--task", "countdown", "--server", url, "--num-particles", "2")
    done = run("sample", "--model", base, "--method", "value_augmented", "--num-prompts", 1, "--top", 3, *options)
    assert done.exit_code == 0 and "read again" in done.stdout, done.output
    done = run("eval", base, "--method", "smc", *options, "--set", "num_prompts=2", "--step", "+")
    assert done.exit_code == 0 and done.stdout.split()[5] == "read", done.output
    done = run("sample", "--model", base, "--server", url, "1 2 3>6=")
    assert isinstance(done.exception, ConfigError) and "--server" in str(done.exception)
