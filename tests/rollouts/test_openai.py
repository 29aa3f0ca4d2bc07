"""The client of servers: it keeps the contract of generators on Keel's own, and says what is wrong with others."""

import math
import socket

import fastapi
import pytest
import torch
from starlette.responses import HTMLResponse, JSONResponse
from tests.rollouts.architectures import model
from tests.rollouts.test_generators import PROMPTS, TRANSFORMS, completions, equal, recomputed
from tests.serve.running import running, serving

from keel.core.chance import Sample
from keel.core.errors import ConfigError, KeelError, UserError
from keel.core.rows import Stop
from keel.models.tiny import SMALL, build_tiny
from keel.rollouts.choose import choose_generator
from keel.rollouts.local import LocalGenerator
from keel.rollouts.openai import Endpoint, OpenAIGenerator, Vocabulary
from keel.rollouts.openai_chain import OpenAIChain
from keel.rollouts.sampling import Sampling
from keel.rollouts.steps import StepChain
from keel.sampling.kernels import Twisted
from keel.sampling.smc import SMC

STOPS = Sampling(max_completion_length=9, stop_strings=("7", "9+"))


@pytest.fixture(scope="module")
def policy():
    made = model("qwen3")
    made.eos_ids = (1, 8)
    return made


@pytest.fixture(scope="module")
def url(policy):
    with serving(policy) as address:
        yield address


@pytest.fixture(scope="module")
def tiny():
    """A model whose tokens are all in the tokenizer, far from uniform."""
    made = build_tiny("0123456789+=", SMALL)
    with torch.no_grad():
        made.transformer.get_input_embeddings().weight.mul_(3)
    with serving(made, "tiny") as address:
        yield made, address


@pytest.mark.parametrize("transform", list(TRANSFORMS))
def test_keels_server_draws_what_the_local_generator_draws(policy, url, transform):
    sampling = Sampling(**TRANSFORMS[transform], max_completion_length=12)
    asked = {"seed": 5, "step": 2, "data_index": [30, 31, 32, 33, 34]}
    rows = OpenAIGenerator(policy, url).generate(PROMPTS, 3, sampling, **asked)
    equal(LocalGenerator(policy).generate(PROMPTS, 3, sampling, **asked), rows)
    told = rows.logp["behaviour"]
    torch.testing.assert_close(told[rows.mask], recomputed(policy, rows, sampling), rtol=0, atol=1e-4)
    assert bool((told[~rows.mask] == 0).all()) and rows.group.tolist() == [i for i in range(5) for _ in range(3)]


def test_reasons_to_stop_are_those_of_the_local_generator(policy, url):
    rows = OpenAIGenerator(policy, url).generate([*PROMPTS, []], 20, STOPS, seed=0)
    equal(LocalGenerator(policy).generate([*PROMPTS, []], 20, STOPS, seed=0), rows)
    assert {int(reason) for reason in rows.stop} == {Stop.EOS, Stop.STOP_STRING, Stop.LENGTH}


@pytest.mark.parametrize("dialect", ["keel", "vllm", "plain"])
def test_every_dialect_reports_what_was_sampled_and_a_row_depends_on_its_identity_alone(tiny, dialect):
    made, address = tiny
    draw = OpenAIGenerator(made, Endpoint(address, dialect=dialect))
    asked = {"seed": 2, "step": 7}
    whole = draw.generate(PROMPTS[:3], 4, STOPS, data_index=[30, 31, 32], **asked)
    torch.testing.assert_close(whole.logp["behaviour"][whole.mask], recomputed(made, whole, STOPS), rtol=0, atol=1e-4)
    assert len({int(reason) for reason in whole.stop}) == 3
    for tokens, reason in zip(completions(whole), whole.stop.tolist(), strict=True):
        text = made.tokenizer.decode(tokens)
        assert not any(stop in made.tokenizer.decode(tokens[:-1]) for stop in STOPS.stop_strings)
        assert (tokens[-1] == 1) == (reason == Stop.EOS) and text.endswith(("7", "9+")) == (reason == Stop.STOP_STRING)
    other = draw.generate([PROMPTS[2], PROMPTS[0]], 4, STOPS, data_index=[32, 30], **asked)
    equal(other, whole.select(torch.tensor([*range(8, 12), *range(4)])))
    assert len({tuple(tokens) for tokens in completions(whole)[:4]}) > 1
    assert completions(draw.generate(PROMPTS[:3], 4, STOPS, seed=3)) != completions(whole)


@pytest.mark.parametrize("dialect", ["vllm", "plain"])
def test_log_probabilities_of_another_distribution_are_refused(tiny, dialect):
    made, address = tiny
    draw = OpenAIGenerator(made, Endpoint(address, dialect=dialect))
    for settings in ({"temperature": 0.7}, {"top_p": 0.9}):
        with pytest.raises(UserError, match="temperature 1 without filters"):
            draw.generate([[5]], 1, Sampling(**settings), seed=0)
    greedy = Sampling(temperature=0, max_completion_length=6)
    equal(draw.generate([[5]], 1, greedy, seed=0), LocalGenerator(made).generate([[5]], 1, greedy, seed=0))
    with pytest.raises(UserError, match="top_k"):
        OpenAIGenerator(made, Endpoint(address, dialect="plain")).generate([[5]], 1, Sampling(top_k=3), seed=0)


def test_the_dialect_and_the_model_are_asked_of_the_server(policy, url, monkeypatch):
    assert (Endpoint(url).dialect, Endpoint(url).served) == ("keel", "small")
    with pytest.raises(UserError, match="It has: small"):
        OpenAIGenerator(policy, Endpoint(url, "large")).generate([[5]], 1, Sampling(), seed=0)
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL"):
        choose_generator(policy, "openai")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    sampling = Sampling(max_completion_length=3)
    rows = choose_generator(policy, "openai").generate(PROMPTS, 1, sampling, seed=1)
    equal(LocalGenerator(policy).generate(PROMPTS, 1, sampling, seed=1), rows)
    with pytest.raises(ConfigError, match="dialect"):
        Endpoint(url, dialect="klingon")


def test_the_tokenizer_alone_is_enough(policy, url):
    known = Vocabulary.of(policy.tokenizer)
    assert (known.eos_ids, known.pad_id, known.start_id, known.vocabulary_size) == ((1,), 0, 1, 23)
    rows = OpenAIGenerator(policy.tokenizer, url).generate([[5, 6]], 4, Sampling(max_completion_length=5), seed=0)
    assert rows.tokens.shape[0] == 4
    assert known.token("token_id:7") == 7 and known.token("4") == 7
    with pytest.raises(UserError, match="no local token"):
        known.token("seven")


def test_what_a_server_refuses_is_told_with_its_address(policy, url):
    draw = OpenAIGenerator(Vocabulary.of(policy.tokenizer), url)  # knows no context, so the server must say it
    with pytest.raises(UserError, match="context of 160") as found:
        draw.generate([[4] * 150], 1, Sampling(max_completion_length=20), seed=0)
    assert found.value.where == url


def test_a_server_that_is_not_there(policy):
    with socket.create_server(("127.0.0.1", 0)) as free:
        gone = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(KeelError, match="cannot be reached") as found:
        OpenAIGenerator(policy, Endpoint(gone, retries=0)).generate([[5]], 1, Sampling(), seed=0)
    assert found.value.where == gone and found.value.exit_code == 1


class Fake:
    """A server that answers as it is told to, one answer a request, the last one again and again."""

    def __init__(self, *answers):
        self.answers, self.asked, self.app = list(answers), [], fastapi.FastAPI()

        @self.app.post("/v1/completions")
        async def complete(body: dict, request: fastapi.Request):
            self.asked.append((body, request.headers.get("authorization")))
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def generate(self, known, sampling=None, **options):
        with running(self.app) as address:
            return self.asks(known, address, sampling, **options)

    @staticmethod
    def asks(known, address, sampling=None, **options):
        endpoint = Endpoint(address, "any", **{"dialect": "plain", "retries": 0, **options})
        sampling = sampling or Sampling(max_completion_length=4)
        return OpenAIGenerator(known, endpoint).generate([[5, 6]], 1, sampling, seed=0)


def answer(tokens, reason="length", **marks) -> JSONResponse:
    logprobs = {"tokens": tokens, "token_logprobs": [-0.5] * len(tokens), **marks}
    choice = {"index": 0, "text": "".join(tokens), "finish_reason": reason, "logprobs": logprobs}
    return JSONResponse({"id": "x", "object": "text_completion", "created": 0, "model": "any", "choices": [choice]})


def test_a_plain_server_is_asked_for_nothing_that_openai_does_not_know(policy, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    fake = Fake(answer(["3", "7", "4", "4"]))
    rows = fake.generate(policy, STOPS)
    (body, key), *more = fake.asked
    assert not more and key == "Bearer secret"
    assert {**body, "seed": 0} == {
        "model": "any",
        "prompt": "23",
        "max_tokens": 9,
        "temperature": 1.0,
        "top_p": 1.0,
        "logprobs": 1,
        "seed": 0,
    }
    assert 0 <= body["seed"] < 2**53
    assert completions(rows) == [[6, 10]] and rows.stop.tolist() == [int(Stop.STOP_STRING)]  # cut here, after the 7


def test_an_end_token_that_is_hidden_is_left_out(policy):
    rows = Fake(answer(["3", "4"], "stop")).generate(policy)
    assert completions(rows) == [[6, 7]] and rows.stop.tolist() == [int(Stop.EOS)]
    assert rows.logp["behaviour"].tolist() == [[-0.5, -0.5]]


def test_answers_that_cannot_be_used(policy):
    page, fake = HTMLResponse("<html>"), Fake()
    wrongs = (
        (answer(["3"], token_logprobs=None), UserError, "no log-probabilities"),
        (answer(["3"], token_logprobs=[None]), UserError, "no log-probabilities"),
        (answer(["seven"]), UserError, "no local token has"),
        (answer(["3", "4"], token_logprobs=[-1.0]), KeelError, "1 log-probabilities for 2 tokens"),
        (page, KeelError, "Is this"),
        (JSONResponse({"choices": []}), KeelError, "0 completions for 1"),
        (JSONResponse({"error": {"message": "key?"}}, 401), UserError, "another key"),
        (JSONResponse({"error": {"message": "too hot"}}, 400), UserError, "too hot"),
    )
    with running(fake.app) as address:
        for wrong, error, said in wrongs:
            fake.answers = [wrong]
            with pytest.raises(error, match=said):
                fake.asks(policy, address)


def test_failures_that_pass_are_tried_again(policy):
    busy = JSONResponse({"error": {"message": "busy"}}, 503, headers={"retry-after-ms": "1"})
    fake = Fake(busy, busy, answer(["3"]))
    assert completions(fake.generate(policy, retries=2)) == [[6]] and len(fake.asked) == 3
    with pytest.raises(KeelError, match=r"503: .*busy"):
        Fake(busy).generate(policy, retries=1)


def test_a_server_that_does_not_answer(policy):
    silent = fastapi.FastAPI()

    @silent.post("/v1/completions")
    async def complete(body: dict):
        import asyncio

        await asyncio.sleep(0.5)

    with running(silent) as address, pytest.raises(KeelError, match=r"no answer within 0.2 seconds"):
        endpoint = Endpoint(address, "any", dialect="plain", retries=0, timeout=0.2)
        OpenAIGenerator(policy, endpoint).generate([[5]], 1, Sampling(max_completion_length=4), seed=0)


def test_the_chain_by_steps_runs_on_a_server(policy, url):
    sampling = Sampling(max_completion_length=8)
    count = lambda x: (x.tokens == 15).sum(1).double()  # noqa: E731
    sampler, found = SMC(num_particles=4, beta=1.0, ess_threshold=1.0), []
    for generator in (LocalGenerator(policy), OpenAIGenerator(policy, url)):
        chain = StepChain(PROMPTS, generator, sampling, delimiter="*", reward=count)
        found.append(sampler(chain, Sample(0)))
    assert torch.equal(found[0].states.tokens, found[1].states.tokens)
    torch.testing.assert_close(found[0].log_z, found[1].log_z)


# -- the chain over tokens -------------------------------------------------------------------------------------------


def black_box(policy, url, top, prompts=PROMPTS[:3], **options) -> OpenAIChain:
    return OpenAIChain(prompts, OpenAIGenerator(policy, url), 5, top=top, **options)


def truth(policy, chain, x, temperature=1.0) -> torch.Tensor:
    rows = []
    for i in range(len(x)):
        ids = torch.tensor([chain.texts[int(x.prompt[i])] + x.text(i)])
        with torch.no_grad():
            rows.append((policy.module(ids).logits[0, -1] / temperature).log_softmax(0))
    return torch.stack(rows)


def test_with_all_tokens_shown_the_chain_is_the_model(policy, url):
    chain, rng = black_box(policy, url, 26), Sample(0)
    x = chain.init(2)
    for _ in range(2):
        torch.testing.assert_close(chain.log_probs(x)[~x.done], truth(policy, chain, x)[~x.done], rtol=0, atol=1e-4)
        assert float(chain.outside(x).max()) < 1e-5
        x = chain.extend(x, chain.propose(x, 1, rng)[0])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_kernel_is_the_model_among_the_likeliest_and_the_rest_is_reported(policy, url, temperature):
    chain = black_box(policy, url, 4, temperature=temperature)
    x = chain.extend(chain.init(2), chain.propose(chain.init(2), 1, Sample(3))[0])
    alive = ~x.done
    wanted, plain = truth(policy, chain, x, temperature), truth(policy, chain, x)
    best = wanted.topk(4).indices
    kept = torch.full_like(wanted, -math.inf).scatter(1, best, wanted.gather(1, best)).log_softmax(-1)
    torch.testing.assert_close(chain.log_probs(x)[alive], kept[alive], rtol=0, atol=1e-4)
    left = 1 - plain.gather(1, best).exp().sum(1).double()
    torch.testing.assert_close(chain.outside(x)[alive], left[alive], rtol=0, atol=1e-4)
    assert bool((chain.most_outside.repeat_interleave(2)[alive] >= left[alive] - 1e-4).all())
    ids, values = chain.successors(x, 3)
    torch.testing.assert_close(values[alive], kept.gather(1, ids)[alive], rtol=0, atol=1e-4)
    torch.testing.assert_close(chain.logp(x, ids[:, 2])[alive], values[alive, 2])
    unlikely = wanted.argmin(1)
    assert bool((chain.logp(x, unlikely)[alive] == -math.inf).all())


def test_one_request_for_each_distinct_state(policy, url):
    chain = black_box(policy, url, 4)
    asked, complete = [], chain.generator.endpoint.complete
    chain.generator.endpoint.complete = lambda bodies: asked.extend(bodies) or complete(bodies)
    x = chain.init(8)
    x = chain.extend(x, chain.propose(x, 1, Sample(0))[0])
    assert len(asked) == 3 and all(body["max_tokens"] == 1 for body in asked)
    assert chain.meter.read.tolist() == [4, 1, 3]
    chain.propose(x, 1, Sample(1))
    assert len(asked) == 3 + len({key for key, done in zip(chain.key(x), x.done, strict=True) if not done})
    asked.clear()
    done = chain.complete(chain.init(1), 6, Sample(2))
    assert len(asked) == 1 and len(asked[0]["prompt"]) == 18 and bool(done.done.all())


def test_completions_of_some_prompts_ask_for_those_alone(policy, url):
    chain, wanted = black_box(policy, url, 4), torch.tensor([True, False, True])
    everything = chain.complete(chain.init(1), 4, Sample(0))
    spent = chain.meter.generated.clone()
    asked, complete = [], chain.generator.endpoint.complete
    chain.generator.endpoint.complete = lambda bodies: asked.extend(bodies) or complete(bodies)
    some, rows = chain.complete(chain.init(1), 4, Sample(0), wanted), wanted.repeat_interleave(4)
    assert sum(len(body["prompt"]) for body in asked) == 8
    assert torch.equal(some.tokens[rows], everything.tokens[rows]) and not some.length[~rows].any()
    assert torch.equal(chain.meter.generated - spent, spent * wanted) and bool(some.done.all())


def test_completions_have_the_log_probabilities_of_the_chain(policy, url):
    chain = black_box(policy, url, 4, temperature=0.8)
    done = chain.complete(chain.init(1), 4, Sample(0))
    x, total = chain.init(4), torch.zeros(12)
    for t in range(5):
        total += chain.logp(x, done.tokens[:, t])
        x = chain.extend(x, done.tokens[:, t])
    torch.testing.assert_close(total, done.logp.sum(1), rtol=0, atol=1e-3)
    assert torch.equal(x.stop, done.stop) and torch.equal(x.length, done.length)


def test_value_augmented_sampling_runs_on_a_black_box(policy, url):
    """With a value that counts a token, the kernel leans to that token by exp(1 / beta), among those shown."""
    count = lambda chain, x, rng: (x.tokens == 15).sum(1).double()  # noqa: E731
    chain = black_box(policy, url, 6, value=count, reward=lambda x: (x.tokens == 15).sum(1).double())
    x = chain.init(1)
    log_q = Twisted().log_q(chain, x, Sample(0), beta=0.5).log_softmax(-1)
    log_p = chain.log_probs(x).double()
    gain = torch.zeros(26, dtype=torch.float64)
    gain[15] = 2.0
    torch.testing.assert_close(log_q, (log_p + gain).log_softmax(-1), rtol=0, atol=1e-6)
    found = SMC(num_particles=4, beta=0.5, kernel=Twisted())(chain, Sample(0))
    plain = chain.complete(chain.init(1), 30, Sample(1))
    assert float(found.reward.mean()) > float(chain.reward(plain).mean())


def test_bad_settings_are_named(policy, url):
    with pytest.raises(ValueError, match="top must"):
        black_box(policy, url, 0)
    with pytest.raises(ValueError, match="temperature"):
        black_box(policy, url, 4, temperature=0.0)
