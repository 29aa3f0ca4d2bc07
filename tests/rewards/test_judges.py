"""Judges read at one token: digits, verdicts, labels, and the reward on a small model."""

import math
from types import SimpleNamespace

import pytest
import torch

from keel.core.config import from_config, to_config
from keel.core.errors import ConfigError, DataError
from keel.models.tiny import SMALL, build_tiny
from keel.parts.rewards.asking import LocalAsker, ServerAsker
from keel.parts.rewards.judges import (
    DigitJudge,
    both_orders,
    digit_scores,
    digit_tokens,
    expected_digit,
    judge_data,
    pairwise_text,
    parse_verdict,
    quality_label,
)

CHARACTERS = "".join(chr(i) for i in range(32, 127)) + "\n"


def test_the_example():
    """p(7) = .5, p(8) = .3, p(3) = .1: 6.888889, where the sum without renormalising is 6.2."""
    p = torch.zeros(1, 12, dtype=torch.float64)
    p[0, [7, 8, 3, 11]] = torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64)
    score, mass = expected_digit(p.log(), [(d,) for d in range(10)])
    assert float(score) == pytest.approx(6.888889, abs=5e-7)
    assert float(mass) == pytest.approx(0.9) and float(score * mass) == pytest.approx(6.2)


def test_digits_with_and_without_a_space_count_together():
    """7 has .2 and, with a space, .3."""
    p = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    score, _ = expected_digit(p.log(), [*((2,) for _ in range(7)), (0, 1), (2,), (2,)])
    together = expected_digit(torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(), [*((1,),) * 7, (0,), (1,), (1,)])[
        0
    ]
    assert float(score) == pytest.approx(float(together))


def test_no_mass_on_digits_is_no_nan():
    score, mass = expected_digit(torch.tensor([[float("-inf")] * 10 + [0.0]]), [(d,) for d in range(10)])
    assert (float(score), float(mass)) == (4.5, 0.0)


def test_tokens_of_digits():
    known = {"7": 0, "\u25817": 1, "\u01207": 2, "77": 3, "<0x37>": 4, "seven": 5} | {
        str(d): 10 + d for d in range(10) if d != 7
    }
    assert digit_tokens(SimpleNamespace(get_vocab=lambda: known))[7] == (0, 1, 2)
    with pytest.raises(ConfigError, match="no token for the digit 0"):
        digit_tokens(SimpleNamespace(get_vocab=lambda: {"7": 0}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge")
    model = build_tiny(CHARACTERS, SMALL, seed=3)
    model.tokenizer.chat_template = None
    model.module.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return str(path)


SHORT = {"template": "{prompt} {completion}", "with_reference": "{prompt} {reference} {completion}"}


def test_the_reward_is_the_expectation_at_the_last_token_of_the_prompt(folder):
    """Against a forward pass of each text by itself; a batch does not matter."""
    from keel.parts.rewards.asking import opened

    judge = DigitJudge(folder, **SHORT)
    prompts, answers = ["1+1?", "a longer question?", "x"], ["2", "no", "a"]
    found = judge(prompts=prompts, completions=answers, reference=[None, "yes", None])
    model = opened(folder)
    for text, value in zip(["1+1? 2", "a longer question? yes no", "x a"], found, strict=True):
        ids = torch.tensor([model.tokenizer(text).input_ids])
        with torch.no_grad():
            logits = model.transformer(input_ids=ids).logits[0, -1].double()
        places = [model.tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
        p = logits[places].softmax(0)
        assert value == pytest.approx(float((p * torch.arange(10)).sum()), abs=1e-5)
    assert judge(prompts=prompts[:1], completions=answers[:1]) == pytest.approx(found[:1], abs=1e-5)
    assert DigitJudge(folder, **SHORT, least_mass=1.0)(prompts=["x"], completions=["a"]) == [None]
    assert judge(prompts=[], completions=[]) == []


def test_a_prompt_that_does_not_fit(folder):
    with pytest.raises(ConfigError, match="context of 256"):
        DigitJudge(folder, **SHORT)(prompts=["x" * 300], completions=["a"])


def test_messages_go_through_the_template():
    model = build_tiny(CHARACTERS, SMALL, seed=3)
    plain, _ = digit_scores(model, ["1+1?"])
    messages, _ = digit_scores(model, [[{"role": "user", "content": "1+1?"}]])
    assert plain.tolist() == messages.tolist()  # the built-in template adds nothing
    model.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        digit_scores(model, [[{"role": "user", "content": "1+1?"}]])


def test_answers_of_a_local_model_depend_on_their_own_seed_alone(folder):
    ask = LocalAsker(folder, 1.0, 6)
    both = ask(["abc", "xyz"], [5, 9])
    assert ask(["xyz"], [9]) == both[1:] and ask(["xyz", "abc"], [9, 5]) == both[::-1]
    assert ask(["abc"], [6]) != both[:1] and ask([], []) == []
    assert LocalAsker(folder, 0.0, 4)(["abc"] * 2, [1, 2])[0] == LocalAsker(folder, 0.0, 4)(["abc"], [7])[0]


def test_labels():
    """Equal weights, halves up; a negative cosine is 0."""
    assert [quality_label(*given) for given in ((6.0, 0.9), (9.0, 1.0), (0.0, -1.0), (5.0, 0.0), (8.49,), (8.5,))] == [
        7, 9, 0, 3, 8, 9
    ]  # fmt: skip
    with pytest.raises(ValueError, match="self_score"):
        quality_label(9.5)
    with pytest.raises(ValueError, match="similarity"):
        quality_label(5.0, 2.0)


def test_data_for_a_judge():
    rows = [{"prompt": "1+1?", "completion": "{reference}", "reference": "2", "label": 0}]
    found = judge_data(rows, template="{prompt}|{completion}", with_reference="{prompt}|{reference}|{completion}")
    assert found == [
        {"prompt": "1+1?|2|{reference}", "prompt_without_reference": "1+1?|{reference}", "completion": "0"}
    ]
    for bad, said in (
        ({"label": 10}, "no digit"),
        ({"label": True}, "no digit"),
        ({"reference": None}, "no 'reference'"),
    ):
        with pytest.raises(DataError, match=said):
            judge_data([rows[0] | bad])


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]] ... no: [[B]]", "second"), ("so [[ a ]].", "first"), ("[[C]]", "tie"), ("[[tie]]", "tie"),
        (" B ", "second"), ("B.", "second"), ("A is better", None), ("", None), ("[[D]]", None),
    ],
)  # fmt: skip
def test_verdicts(text, verdict):
    assert parse_verdict(text) == verdict


def test_both_orders():
    cases = {
        ("first", "second"): 1.0, ("second", "first"): 0.0, ("first", "first"): 0.5, ("second", "second"): 0.5,
        ("tie", "tie"): 0.5, ("first", "tie"): 0.5, ("first", None): None, (None, "first"): None,
    }  # fmt: skip
    assert {orders: both_orders(*orders) for orders in cases} == cases
    assert pairwise_text("q", "{second}", "b", "{prompt}/{first}/{second}") == "q/{second}/b"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DigitJudge("x", template="{prompt}"), "completion"),
        (lambda: DigitJudge("x", with_reference="{prompt} {completion}"), "reference"),
        (lambda: DigitJudge("x", least_mass=2.0), "least_mass"),
        (lambda: LocalAsker("x", -1.0), "temperature"),
        (lambda: ServerAsker(concurrency=0), "concurrency"),
        (lambda: ServerAsker(max_completion_length=0), "max_completion_length"),
    ],
)
def test_bad_settings(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_it_can_be_written_down():
    part = DigitJudge("some/judge", least_mass=0.25)
    assert from_config(to_config(part)) == part
    assert math.isclose(part.least_mass, 0.25)
