"""`keel explain` on a run: the stored numbers are those of the update, and the command says them."""

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from keel.cli.main import app
from keel.core.errors import UserError
from keel.core.rows import Rows
from keel.method import Method
from keel.models.tiny import character_tokenizer
from keel.store.store import Store
from keel.train.encode import token_texts
from keel.train.observe import stored_rollouts

SETTINGS = {"train.log_completions": 2, "rollout.num_prompts": 2, "num_generations": 4, "max_steps": 4}


def odd_reward(completions, **_):
    return [float(len(text) % 3) for text in completions]


@pytest.fixture
def run(train):
    return train("grpo", name="told", beta=0.5, learning_rate=1e-2, reward=odd_reward, **SETTINGS)


def stored(run):
    with Store(run.path.parent / "keel.sqlite", readonly=True) as store:
        return store.rollouts(store.run(run.path.name).id)


def mean(rollouts, name):
    values = torch.cat([torch.from_numpy(r.numbers[name]) for r in rollouts])
    return float(values.double().mean())


def test_the_numbers_are_those_of_the_update(run):
    """Both groups of the batch are stored: means over all their tokens are what the step logged."""
    for step in (2, 4):
        rollouts = [r for r in stored(run) if r.step == step]
        assert len(rollouts) == 8
        logged = {name: dict(curve)[step] for name, curve in run.metrics.items()}
        assert logged["terms/kl"] > 1e-5 and logged["kl"] > 1e-5
        for name, metric in (("entropy", "entropy"), ("kl", "kl"), ("term/kl", "terms/kl")):
            assert mean(rollouts, name) == pytest.approx(logged[metric], rel=1e-4), name
        assert mean(rollouts, "term/policy") == pytest.approx(logged["terms/policy"], abs=1e-6)
        assert mean(rollouts, "term/policy") + mean(rollouts, "term/kl") == pytest.approx(logged["loss"], abs=1e-6)
        count = sum(r.length for r in rollouts)
        for r in rollouts:  # rho = 1: each token is pulled by -A / N
            assert r.numbers["ratio"] == pytest.approx(1.0, abs=1e-4)
            assert r.numbers["gradient/policy"] == pytest.approx(-r.numbers["advantage"] / count, rel=1e-3, abs=1e-7)
            assert "".join(r.tokens) == r.completion + "<eos>" * (r.stop == "eos")


def test_other_steps_compute_nothing(train, monkeypatch):
    calls = []
    inner = Method.by_token
    monkeypatch.setattr(Method, "by_token", lambda self, *given: calls.append(1) or inner(self, *given))
    train("grpo", name="few", **SETTINGS)
    assert len(calls) == 2
    train("grpo", name="none", **{**SETTINGS, "train.log_completions": 0})
    assert len(calls) == 2


def test_minibatches_store_the_groups_of_the_first_update(train):
    run = train("clip_cov", name="parts", **{**SETTINGS, "train.num_minibatches": 2, "rollout.num_prompts": 4})
    assert all(set(r.numbers) >= {"weight/clip_cov", "ratio", "gradient", "entropy"} for r in stored(run))
    assert all((r.numbers["entropy"] >= 0).all() for r in stored(run))


def test_tokens_of_a_tool_are_kept_without_numbers():
    session = SimpleNamespace(rewards={"r": None}, policy=SimpleNamespace(tokenizer=character_tokenizer("abc")))
    mask = torch.tensor([[True, False, True, False]])
    tokens = torch.tensor([[3, 4, 5, 0]])
    rows = Rows.build(tokens[:, :1], mask[:, :1], tokens, mask, logp={"behaviour": torch.full((1, 4), -1.0)})
    (found,) = stored_rollouts(session, rows, [("p", "ac")], None)
    assert found.tokens == ("a", "b", "c") and found.length == 2
    assert found.numbers["chosen"].tolist() == [1.0, 0.0, 1.0]
    assert [v == v for v in found.numbers["log_prob"].tolist()] == [True, False, True]


def byte_tokenizer():
    """One token a byte, as GPT-2 writes them, and one of a word with its space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "Ġa"])}, merges=[("Ġ", "a")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("b a\n", ["b", " a", "\n"]),
        ("é漢b", ["", "é", "", "", "漢", "b"]),
        ("🙂", ["", "", "", "🙂"]),
    ],
)
def test_tokens_of_bytes_are_text(text, tokens):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) != tokens
    assert token_texts(tokenizer, ids) == tokens


def test_broken_bytes_are_told_and_hold_nothing_up():
    tokenizer = byte_tokenizer()
    half = tokenizer("漢").input_ids[:2]
    (a,) = tokenizer("a").input_ids
    for ids in ([*half, a, a], [a, *half], half * 4 + [a]):
        said = token_texts(tokenizer, ids)
        assert len(said) == len(ids) and "\ufffd" in "".join(said) and "".join(said).count("a") == ids.count(a)
        assert not any(said[i] for i in range(len(ids) - 1) if ids[i] == half[0] and said[i] == "\ufffd\ufffd")


def invoke(*words):
    result = CliRunner().invoke(app, ["explain", *map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_the_command(run, tmp_path):
    runs = ("--runs", run.path.parent)
    listed = invoke("told", *runs).splitlines()
    assert len(listed) == 17 and listed[0].split() == ["id", "step", "reward", "length", "completion"]
    assert invoke(run.path, "--step", 4).splitlines()[1:] == listed[9:]
    said = invoke("told", *runs, "--rollout", 3, "--by", "kl", "--by", "policy")
    assert "KL to the reference" in said and "policy in the loss" in said and "\x1b" not in said
    told = json.loads(invoke("told", *runs, "--rollout", 3, "--json"))
    one = stored(run)[2]
    assert told["tokens"] == list(one.tokens) and told["completion"] == one.completion
    assert told["numbers"]["gradient"] == pytest.approx(one.numbers["gradient"].tolist())
    table = [line.split() for line in said.splitlines() if line.strip()[:1].isdigit()]
    assert [float(line[-2]) for line in table] == pytest.approx(one.numbers["kl"].tolist(), rel=1e-3)
    page = tmp_path / "tokens.html"
    assert invoke("told", *runs, "--html", page, "--by", "entropy").strip() == str(page)
    assert page.read_text().count('class="card explained"') == 8
    assert [one["id"] for one in json.loads(invoke("told", *runs, "--json"))] == list(range(1, 17))


def test_what_is_not_there(run):
    for words, what in [
        (("tolb",), "There is no run named 'tolb'. Did you mean 'told'? Runs: told."),
        (("told", "--rollout", 99), "The run has no rollout 99. It has 16, numbered 1 to 16."),
        (("told", "--step", 3), "told: no completions are stored of step 3. Steps: 2, 4."),
        (("told", "--rollout", 2, "--step", 4), "rollout 2 is of step 2, not 4"),
        (("told", "--rollout", 2, "--by", "entropi"), "Did you mean 'entropy'?"),
        (("told", "--by", "entropy"), "--by: colours one completion"),
    ]:
        with pytest.raises(UserError) as error:
            invoke(*words, "--runs", run.path.parent)
        assert what in str(error.value)
    with pytest.raises(UserError, match="there is no run named 'told', and no store of runs"):
        invoke("told", "--runs", run.path)
