"""Traces as long as their prompts are hard."""

import pytest

from keel.core.errors import DataError
from keel.tasks.task import Example
from keel.tasks.traces import choose_traces


def traces(prompt, lengths, start=0, **columns) -> list[Example]:
    """Completions of these lengths; a column that is a list has one entry for each."""
    out = []
    for i, size in enumerate(lengths):
        own = {name: value[i] if isinstance(value, list) else value for name, value in columns.items()}
        out.append(Example(prompt, own, start + i, "", "x" * size))
    return out


def lengths(found) -> list[int]:
    return [len(example.completion) for example in found.examples]


@pytest.mark.parametrize(("p", "wanted"), [(0.0, 100), (0.25, 77), (0.5, 60), (0.75, 35), (1.0, 10)])
def test_the_length_follows_the_pass_rate(p, wanted):
    """Targets (1 - p) 100 + p 10: 100, 77.5, 55, 32.5, 10."""
    found = choose_traces(traces("a", [10, 35, 60, 77, 100], pass_rate=p), easy_length=10, hard_length=100)
    assert lengths(found) == [wanted] and found.examples[0].columns["pass_rate"] == p


def test_ties_take_the_shorter_and_several_the_nearest():
    data = traces("a", [70, 30, 50, 90], pass_rate=0.5)
    known = {"easy_length": 0, "hard_length": 100}
    assert lengths(choose_traces(data, per_prompt=3, **known)) == [50, 30, 70]
    assert lengths(choose_traces(data[:2], **known)) == [30]
    assert lengths(choose_traces(list(reversed(data)), per_prompt=3, **known)) == [50, 30, 70]


def test_lengths_of_easy_and_hard_prompts():
    """Means over the right traces of prompts from 2/3 on (10, 20) and below 1/3 (80, 100): 15 and 90."""
    easy = traces("e", [10, 20], pass_rate=2 / 3)
    middle = traces("m", [40, 52, 60], 2, pass_rate=0.5)
    hard = traces("h", [80, 100, 999], 5, pass_rate=0.0, correct=[True, True, False])
    found = choose_traces([*hard, *middle, *easy])
    assert (found.easy_length, found.hard_length) == (15.0, 90.0)
    assert lengths(found) == [80, 52, 20]  # targets 90 (a tie), 52.5 and 40
    assert [e.prompt for e in found.examples] == ["h", "m", "e"]


def test_only_right_traces_and_their_share_as_pass_rate():
    data = traces("a", [10, 50, 60, 100], correct=[0, 1, 1.0, False])
    data += traces("b", [10, 20], 4, correct=[False, None], pass_rate=0.0)
    data += traces("c", [30, 40], 6, correct=[False, False])
    found = choose_traces(data, easy_length=0, hard_length=110)
    assert [(e.prompt, len(e.completion), e.columns["pass_rate"]) for e in found.examples] == [
        ("a", 50, 0.5),
        ("b", 20, 0.0),
    ]
    assert (found.prompts, found.left_out) == (3, 1)


def test_measured_rates_come_first_and_the_unit_is_the_callers():
    data = [Example(" a ", {"pass_rate": 1.0}, 0, "", "one two"), Example("a", {"pass_rate": 1.0}, 1, "", "1 2 3 4 5")]
    words = {"length": lambda text: len(text.split()), "easy_length": 2, "hard_length": 5}
    assert choose_traces(data, **words).examples[0].completion == "one two"
    assert choose_traces(data, {"a": 0.0}, **words).examples[0].completion == "1 2 3 4 5"


@pytest.mark.parametrize(
    ("data", "settings", "said"),
    [
        (traces("a", [1]), {}, "pass rate"),
        (traces("a", [1], pass_rate=1.5), {}, r"in \[0, 1\]"),
        (traces("a", [1], pass_rate="high"), {}, r"in \[0, 1\]"),
        (traces("a", [1, 2], pass_rate=[0.1, 0.2]), {}, "2 pass rates"),
        (traces("a", [1], pass_rate=1.0), {}, "hard"),
        (traces("a", [1], pass_rate=0.0), {}, "easy"),
        (traces("a", [1], pass_rate=0.0), {"easy_length": 5, "hard_length": 4}, "less than"),
        ([Example("a", {"pass_rate": 1.0}, 0)], {}, "no completion"),
    ],
)
def test_mistakes_are_named(data, settings, said):
    with pytest.raises(DataError, match=said):
        choose_traces(data, **settings)


def test_none_of_a_prompt_is_no_number():
    with pytest.raises(ValueError, match="per_prompt"):
        choose_traces(traces("a", [1], pass_rate=1.0), per_prompt=0)
