import pytest

from keel.core.errors import ConfigError, DataError
from keel.tasks import check_disjoint, completion_text, final_answer, load_task, task_names


def test_names():
    names = task_names()
    assert names[0] == "countdown"
    assert {"chain_sum", "gcd", "sudoku"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("countdwn", "countdown"),
        ("chain_summ", "chain_sum"),
        ("reasoning_gym:gdc", "gcd"),
        ("reasoning_gym:lmc", "lcm"),
    ],
)
def test_unknown_task(name, meant):
    with pytest.raises(ConfigError, match=f"Did you mean '{meant}'"):
        load_task(name)


def test_unknown_option_of_countdown():
    with pytest.raises(ConfigError, match="Did you mean 'held_out'"):
        load_task("countdown", heldout=3)


def test_plain_and_prefixed_names_are_the_same():
    one = load_task("gcd", size=3, held_out=2)
    other = load_task("reasoning_gym:gcd", size=3, held_out=2)
    assert one.name == other.name == "reasoning_gym:gcd"
    assert one.train[:] == other.train[:]


def test_countdown_of_reasoning_gym_has_the_prefix():
    assert load_task("countdown").name == "countdown"
    assert load_task("reasoning_gym:countdown", size=2, held_out=1).name == "reasoning_gym:countdown"


def test_overlap_names_examples():
    with pytest.raises(DataError, match=r"7 of 8 held-out examples.*: 1, 2, 3, 4, 5, \.\.\."):
        check_disjoint("numbers", range(1, 8), [1, 2, 3, 4, 5, 6, 7, 99])


def test_final_answer():
    assert final_answer("<answer>1</answer> or <answer>\n2 </answer>") == "2"
    assert final_answer("<answer>1") == "<answer>1"
    assert final_answer([{"role": "assistant", "content": "<answer>3</answer>"}]) == "3"
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    assert completion_text([]) == ""
