"""The server, asked over HTTP, by OpenAI's own client and by hand."""

import asyncio
import json
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest
import torch
from tests.rollouts.architectures import model
from tests.serve.running import serving
from typer.testing import CliRunner

from keel.cli.main import app as commands
from keel.core.errors import UserError
from keel.models.tiny import SMALL, build_tiny
from keel.rollouts.decoding import Prompts
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.serve import app as serve_app
from keel.serve.app import check_host
from keel.serve.engine import Engine, Job
from keel.serve.requests import Options
from keel.serve.writing import Writing

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def policy():
    made = model("qwen3")
    made.eos_ids = (1, 8)  # 8 stands for "5"
    return made


@pytest.fixture(scope="module")
def url(policy):
    with serving(policy) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def post(url):
    with httpx.Client(base_url=url, timeout=30) as http:
        yield lambda path, body: http.post(path, json=body)


def log_probs(policy, prompt, tokens, sampling=None) -> torch.Tensor:
    """Log-probabilities of every next token after the prompt and each further token, from one forward pass."""
    with torch.no_grad():
        logits = policy.module(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    if sampling is not None:
        logits = sampling.filter(logits / sampling.temperature)
    return logits.log_softmax(-1)


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_it_says_what_it_is(client, url):
    assert httpx.get(url.removesuffix("/v1") + "/health").json() == {"status": "ok"}
    (listed,) = client.models.list().data
    assert (listed.id, listed.owned_by) == ("small", "keel")


def test_openais_client_gets_what_it_expects(client, policy):
    found = client.completions.create(model="small", prompt="1+2", max_tokens=6, n=3, seed=4, logprobs=2)
    assert found.object == "text_completion" and [choice.index for choice in found.choices] == [0, 1, 2]
    assert len({choice.text for choice in found.choices}) > 1
    assert found.usage.prompt_tokens == 3
    assert found.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in found.choices)
    for choice in found.choices:
        assert choice.finish_reason in ("stop", "length") and len(choice.text) <= 6
        told = zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
        marks = [pair for pair in told if len(pair[0]) == 1]  # special tokens are no text
        text = choice.text + "5" * (len(marks) - len(choice.text))  # "5" ends a completion and is none of its text
        assert [text[at] for _, at in marks] == [name for name, _ in marks] and len(marks) - len(choice.text) in (0, 1)


def test_a_seed_decides_and_n_samples_differ(post):
    body = {"prompt": PROMPT, "max_tokens": 8, "n": 6, "seed": 3}
    texts = [choice["text"] for choice in post("/completions", body).json()["choices"]]
    assert texts == [choice["text"] for choice in post("/completions", body).json()["choices"]]
    assert len(set(texts)) > 3
    other = post("/completions", body | {"seed": 4}).json()["choices"]
    assert texts != [choice["text"] for choice in other]
    assert texts[:2] == [choice["text"] for choice in post("/completions", body | {"n": 2}).json()["choices"]]
    free = [post("/completions", body | {"seed": None}).json()["choices"][0]["text"] for _ in range(4)]
    assert len(set(free)) > 1


def test_seeds_of_rows_draw_what_the_local_generator_draws(post, policy):
    sampling = Sampling(temperature=0.8, top_k=9, top_p=0.9, max_completion_length=9)
    rows = LocalGenerator(policy).generate([PROMPT, [9]], 2, sampling, seed=5)
    body = {"prompt": [PROMPT, [9]], "n": 2, "max_tokens": 9, "temperature": 0.8, "top_k": 9, "top_p": 0.9}
    body |= {"seed": rows.row.tolist(), "return_token_ids": True, "logprobs": 0, "logprobs_mode": "processed"}
    for i, choice in enumerate(post("/completions", body).json()["choices"]):
        assert choice["token_ids"] == rows.tokens[i][rows.mask[i]].tolist()
        assert choice["prompt_token_ids"] == [PROMPT, [9]][i // 2]
        told = torch.tensor(choice["logprobs"]["token_logprobs"])
        torch.testing.assert_close(told, rows.logp["behaviour"][i][rows.mask[i]], rtol=0, atol=1e-4)
    assert post("/completions", body | {"seed": [1]}).status_code == 400


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_log_probabilities_are_recomputed(post, policy, mode):
    sampling = Sampling(temperature=0.6, top_k=4, max_completion_length=8)
    body = {"prompt": PROMPT, "max_tokens": 8, "n": 4, "seed": 0, "temperature": 0.6, "top_k": 4, "logprobs": 6}
    body |= {"logprobs_mode": mode, "return_token_ids": True, "return_tokens_as_token_ids": True}
    for choice in post("/completions", body).json()["choices"]:
        ids, marks = choice["token_ids"], choice["logprobs"]
        wanted = log_probs(policy, PROMPT, ids, sampling if mode == "processed" else None)
        assert marks["tokens"] == [f"token_id:{token}" for token in ids]
        told = torch.tensor(marks["token_logprobs"])
        torch.testing.assert_close(told, wanted.gather(1, torch.tensor(ids)[:, None])[:, 0], rtol=0, atol=1e-4)
        for row, shown in zip(wanted, marks["top_logprobs"], strict=True):
            assert len(shown) == (6 if mode == "raw" else 4)  # four are left by the filter
            for name, value in shown.items():
                assert abs(value - float(row[int(name.removeprefix("token_id:"))])) < 1e-4
            assert abs(max(shown.values()) - float(row.max())) < 1e-4


def test_echo_scores_the_prompt(post, policy):
    body = {"prompt": "1+2=3", "max_tokens": 0, "echo": True, "logprobs": 1}
    found = post("/completions", body).json()
    choice, ids = found["choices"][0], policy.tokenizer("1+2=3").input_ids
    assert choice["text"] == "1+2=3" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == list("1+2=3") and choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}
    told = choice["logprobs"]["token_logprobs"]
    assert told[0] is None and choice["logprobs"]["top_logprobs"][0] is None
    wanted = log_probs(policy, ids[:1], ids[1:]).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(told[1:]), wanted, rtol=0, atol=1e-4)
    more = post("/completions", body | {"max_tokens": 3, "seed": 1}).json()["choices"][0]
    plain = post("/completions", {"prompt": "1+2=3", "max_tokens": 3, "seed": 1}).json()["choices"][0]
    assert more["text"] == "1+2=3" + plain["text"]


@pytest.mark.parametrize("stop", [None, ["7", "+1"], "?"])
def test_streamed_chunks_are_the_whole_text(post, stop):
    body = {"prompt": ["1+2", "9"], "max_tokens": 12, "n": 3, "seed": 2, "stop": stop, "logprobs": 1}
    body |= {"return_token_ids": True}
    whole = post("/completions", body).json()
    chunks = events(post("/completions", body | {"stream": True, "stream_options": {"include_usage": True}}).text)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in mine) == choice["text"]
        assert [token for chunk in mine for token in chunk["token_ids"]] == choice["token_ids"]
        assert [chunk["finish_reason"] for chunk in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert len(mine) == len(choice["token_ids"])  # one for each token
    reasons = {choice["finish_reason"] for choice in whole["choices"]}
    assert "length" in reasons or stop is not None


def test_tokens_are_told_when_they_are_drawn_and_no_more_are_drawn_than_somebody_reads(policy, monkeypatch):
    steps, real = [0], policy.head.logits

    def counted(states):
        steps[0] += 1
        time.sleep(0.01)
        return real(states)

    async def first() -> int:
        news = engine.run(Job(prompts, Sampling(max_completion_length=120)))
        await anext(news)
        seen = steps[0]
        await news.aclose()
        return seen

    monkeypatch.setattr(policy.head, "logits", counted)
    monkeypatch.setattr(policy, "eos_ids", ())
    engine = Engine(policy)
    prompts = Prompts.of(policy, [PROMPT], 1, 120, seed=0, step=0, data_index=None)
    assert asyncio.run(first()) < 10
    engine.close()
    assert steps[0] < 20


def test_stop_strings_are_cut_off_unless_they_are_asked_for(post, policy):
    body = {"prompt": PROMPT, "max_tokens": 30, "n": 20, "seed": 0, "stop": ["9", "*8"]}
    plain = post("/completions", body).json()["choices"]
    kept = post("/completions", body | {"include_stop_str_in_output": True, "return_token_ids": True}).json()["choices"]
    stopped = [i for i, choice in enumerate(plain) if choice["stop_reason"]]
    assert {plain[i]["stop_reason"] for i in stopped} == {"9", "*8"}
    for i in range(20):
        assert "9" not in plain[i]["text"] and "*8" not in plain[i]["text"]
        assert kept[i]["text"] == plain[i]["text"] + (plain[i]["stop_reason"] or "")
        if i in stopped:
            assert plain[i]["finish_reason"] == "stop"
            assert policy.tokenizer.decode(kept[i]["token_ids"]).endswith(("9", "8"))


def test_chat_goes_through_the_template(client, post, policy):
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": [{"type": "text", "text": "+2"}]}]
    with serving(policy, "chatty") as address:
        chat = openai.OpenAI(base_url=address, api_key="none", max_retries=0).chat.completions
        asked = {"model": "chatty", "messages": messages, "max_tokens": 7, "n": 2, "seed": 9}
        found = chat.create(**asked, logprobs=True, top_logprobs=3)
        parts = {0: "", 1: ""}
        for chunk in chat.create(**asked, stream=True):
            parts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        with httpx.Client(base_url=address) as http:
            body = {"prompt": "1+2=", "max_tokens": 7, "n": 2, "seed": 9}
            plain = http.post("/completions", json=body).json()["choices"]
            long = http.post("/chat/completions", json={"messages": messages, "seed": 0}).json()
    policy.tokenizer.chat_template = None
    assert found.usage.prompt_tokens == 4 and found.object == "chat.completion"
    for choice, same in zip(found.choices, plain, strict=True):
        assert choice.message.role == "assistant"
        assert choice.message.content == same["text"] == parts[choice.index]
        content = choice.logprobs.content
        drawn = "".join(mark.token for mark in content if len(mark.token) == 1)
        assert drawn.startswith(choice.message.content)
        assert all(len(mark.top_logprobs) == 3 and bytes(mark.bytes).decode() == mark.token for mark in content)
    assert long["choices"][0]["finish_reason"] == "stop"  # 156 tokens of room


BAD = {
    "no prompt": ({}, 422, "prompt"),
    "unknown field": ({"prompt": "1", "tempreature": 1}, 422, "tempreature"),
    "wrong type": ({"prompt": "1", "max_tokens": "many"}, 422, "max_tokens"),
    "temperature": ({"prompt": "1", "temperature": -1}, 422, "temperature"),
    "another model": ({"prompt": "1", "model": "gpt-9"}, 404, "gpt-9"),
    "not served": ({"prompt": "1", "presence_penalty": 0.5}, 400, "presence_penalty"),
    "too long": ({"prompt": [4] * 150, "max_tokens": 20}, 400, "context of 160"),
    "no such token": ({"prompt": [99]}, 400, "outside the vocabulary"),
    "nothing to do": ({"prompt": "1", "max_tokens": 0}, 400, "max_tokens"),
    "no prompts": ({"prompt": []}, 400, "nothing to generate"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_requests_are_errors_in_openais_form(post, name):
    body, status, said = BAD[name]
    found = post("/completions", body)
    error = found.json()["error"]
    assert found.status_code == status and said in error["message"], found.text
    assert error["type"] == "invalid_request_error" and "Traceback" not in found.text


def test_other_mistakes_are_errors_too(url, post, policy):
    assert httpx.get(f"{url}/nothing").status_code == 404 and "error" in httpx.get(f"{url}/nothing").json()
    assert httpx.get(f"{url}/completions").status_code == 405
    broken = httpx.post(f"{url}/completions", content="{", headers={"content-type": "application/json"})
    assert broken.status_code == 400 and broken.json()["error"]["type"] == "invalid_request_error"
    form = httpx.post(f"{url}/completions", content='{"prompt": "1"}', headers={"content-type": "text/plain"})
    assert form.status_code == 422  # what a page in a browser could send without being asked for leave
    assert httpx.get(f"{url}/models", headers={"host": "evil.example"}).status_code == 400
    ask = [{"role": "user", "content": "1"}]
    policy.tokenizer.chat_template, before = None, policy.tokenizer.chat_template
    for messages, said in (([], "messages"), ([{"content": "1"}], "role"), ([{"role": "user"}], "text")):
        assert said in post("/chat/completions", {"messages": messages}).json()["error"]["message"]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    assert "only text" in post("/chat/completions", {"messages": image}).json()["error"]["message"]
    assert post("/chat/completions", {"messages": ask, "tools": [{}]}).status_code == 400
    policy.tokenizer.chat_template = before


def test_a_fault_is_no_traceback_and_the_next_request_is_served(post, policy, monkeypatch):
    monkeypatch.setattr(LocalGenerator, "stepper", lambda self, length: 1 / 0)
    found = post("/completions", {"prompt": "1"})
    assert found.status_code == 500 and found.json()["error"]["type"] == "server_error"
    assert "ZeroDivision" not in found.text
    streamed = events(post("/completions", {"prompt": "1", "stream": True}).text)
    assert streamed[-1]["error"]["type"] == "server_error"
    monkeypatch.undo()
    assert post("/completions", {"prompt": "1"}).status_code == 200


def test_text_is_held_back_while_it_may_begin_a_stop_string():
    """Bytes as tokens: the text is complete at the end, never shows part of a character or of a stop string."""

    class Bytes:
        def decode(self, tokens, skip_special_tokens=False):
            return bytes(tokens).decode(errors="replace")

    options = Options(stop=["END", "Ente"])
    writing = Writing(Bytes(), options, (0,), 99)
    sent = [writing.add(byte) for byte in "aßE".encode()]
    assert sent == ["a", "", "ß", ""]
    assert writing.add(ord("x")) == "Ex" and writing.add(ord("E")) == "" and writing.add(ord("N")) == ""
    assert writing.add(ord("E")) == "EN" and writing.add(ord("n")) == ""
    assert writing.add(ord("d")) == "End" and writing.finish is None
    assert [writing.add(byte) for byte in b"END"] == ["", "", ""]
    assert (writing.finish, writing.stop, writing.text) == ("stop", "END", "aßExENEnd")
    cut = Writing(Bytes(), Options(stop="END"), (0,), 3)
    assert [cut.add(byte) for byte in b"aEN"] == ["a", "", "EN"] and cut.finish == "length"
    half = Writing(Bytes(), Options(), (0,), 9)
    assert [half.add(byte) for byte in ("ß".encode()[0], 0)] == ["", "\ufffd"] and half.finish == "stop"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "example.org", ""])
def test_a_host_that_others_can_reach_is_refused(host):
    with pytest.raises(UserError, match="--allow-remote"):
        check_host(host, False)
    check_host(host, True)
    for own in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        check_host(own, False)


def test_the_command_refuses_it_before_a_model_is_loaded():
    found = CliRunner().invoke(commands, ["serve", "no/such/model", "--host", "0.0.0.0"])
    assert isinstance(found.exception, UserError) and "--allow-remote" in str(found.exception)


def test_the_server_ends_while_it_writes(policy, monkeypatch):
    real = policy.head.logits
    monkeypatch.setattr(policy.head, "logits", lambda states: (time.sleep(0.05), real(states))[1])
    monkeypatch.setattr(policy, "eos_ids", ())
    body = {"prompt": "1", "max_tokens": 150, "stream": True}
    start = time.perf_counter()
    with serving(policy) as address, httpx.stream("POST", f"{address}/completions", json=body) as answer:
        next(answer.iter_lines())
    assert time.perf_counter() - start < 5  # the whole would take 7.5 seconds


def test_an_answer_that_nobody_waits_for_is_given_up(policy, monkeypatch):
    real, steps = policy.head.logits, [0]

    def slow(states):
        steps[0] += 1
        time.sleep(0.02)
        return real(states)

    monkeypatch.setattr(policy.head, "logits", slow)
    monkeypatch.setattr(policy, "eos_ids", ())
    monkeypatch.setattr(serve_app, "PATIENCE", 0.05)
    with serving(policy) as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/completions", json={"prompt": "1", "max_tokens": 150}, timeout=0.1)
        assert httpx.post(f"{address}/completions", json={"prompt": "1", "max_tokens": 1}).status_code == 200
    assert steps[0] < 60


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(tmp_path):
    from keel.models.load import save

    save(build_tiny("0123456789+=", SMALL), tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "keel.cli.main", "serve", str(tmp_path), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith(f"serving {tmp_path} at http://127.0.0.1:"), line + process.stderr.read()
        address = line.split(" at ")[1].split(";")[0]
        body = {"prompt": "1", "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{address}/completions", json=body) as answer:
            next(answer.iter_lines())
            process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0 and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
