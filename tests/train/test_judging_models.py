"""`keel judge` with language models: behind a server, or loaded here."""

import json
import re

import pytest
from fastapi import FastAPI, Request
from tests.serve.running import running
from tests.train.judged import ROWS, apart, lines, without_key
from typer.testing import CliRunner

from keel.cli.main import app
from keel.core.errors import ConfigError
from keel.models.tiny import SMALL, build_tiny
from keel.train.judging import judge


def server_app(answer) -> FastAPI:
    application = FastAPI()

    @application.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": "judge", "object": "model", "created": 0, "owned_by": "somebody"}]}

    @application.post("/v1/chat/completions")
    async def chat(request: Request):
        body = await request.json()
        message = {"role": "assistant", "content": answer(body["messages"][0]["content"])}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}

    return application


def longer(question: str) -> str:
    """Likes the longer answer, the first of equals; of q3 it says nothing."""
    first, second = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n", question).groups()
    if "ccc" in (first, second):
        return "hard to say"
    return f"So it is [[{'A' if len(first) >= len(second) else 'B'}]]"


def test_by_a_server_in_both_orders(tmp_path):
    """Of equal answers it says the first in both orders: a tie, and an inconsistency; what it does not say is kept."""
    out = tmp_path / "out.jsonl"
    with running(server_app(longer)) as url:
        facts = judge(ROWS, out, server=url)
    assert facts == {
        "items": 5, "decided": 3, "ties": 1, "unparsable": 1, "failed": 0, "resumed": 0,
        "asked": 14, "first_wins": pytest.approx(7 / 14), "inconsistent": 1, "agrees": 0.0,
    }  # fmt: skip
    assert [without_key(row) for row in lines(out)] == [
        {"prompt": "q1", "topic": "x", "completions": ["bbbb", "aa"], "scores": [1.0, 0.0]},
        {"prompt": "q4", "completions": ["ddd", "d"], "scores": [1.0, 0.0]},
        {"prompt": "q5", "completions": ["eee", "ee", "e"], "scores": [1.0, 0.5, 0.0]},
    ]
    kept = {row["prompt"]: row for row in apart(out)}
    assert kept["q2"]["reason"] == "tie" and kept["q2"]["said"] == ["So it is [[A]]"] * 2
    assert kept["q3"]["reason"] == "unparsable" and kept["q3"]["said"] == ["hard to say"] * 2


def test_scores_of_a_server(tmp_path):
    def scored(question: str) -> str:
        lengths = [str(len(text)) for text in re.findall(r"Response \d+:\n(.*)", question)]
        return f"Scores: [[{', '.join(lengths)}]]"

    out = tmp_path / "out.jsonl"
    with running(server_app(scored)) as url:
        facts = judge(ROWS, out, server=url, how="scores", num_samples=3)
    assert (facts["decided"], facts["ties"]) == (4.0, 1.0)
    assert lines(out)[0]["scores"] == [4.0, 2.0] and len(apart(out)[0]["said"]) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge")
    model = build_tiny("".join(chr(i) for i in range(32, 127)) + "\n", SMALL, seed=1)
    model.module.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return str(path)


def test_a_local_model_whose_digits_are_read(tmp_path, folder):
    out, again, short = tmp_path / "out.jsonl", tmp_path / "again.jsonl", tmp_path / "t.txt"
    short.write_text("{prompt} {completion}:")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    given = [str(tmp_path / "data.jsonl"), "--model", folder, "--how", "digit", "--template", str(short), "--json"]
    for path in (out, again):
        found = CliRunner().invoke(app, ["judge", given[0], str(path), *given[1:]])
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["items"] == 4
    assert lines(out) == lines(again)
    assert all(0 <= row["score_rejected"] <= row["score_chosen"] <= 9 for row in lines(out) if "score_chosen" in row)


def test_a_local_model_that_says_nonsense_decides_nothing(tmp_path, folder):
    short = {"template": "{prompt}{first}{second}", "max_completion_length": 4}
    facts = judge(ROWS[:2], tmp_path / "out.jsonl", model=folder, **short)
    assert facts["unparsable"] == 2 and facts["decided"] == 0
    with pytest.raises(ConfigError, match="pairwise compares two"):
        judge([{"prompt": "q", "completion": "a"}], tmp_path / "one.jsonl", model=folder)
