import pytest

from keel.core.errors import ConfigError, DataError
from keel.tasks import Task, load_task

# three disks from one peg of three to another
SIX_QUESTIONS = {"min_disks": 3, "max_disks": 3, "min_pegs": 3, "max_pegs": 3}


@pytest.fixture(scope="module")
def sums():
    return load_task("chain_sum", size=50, held_out=20, seed=3)


def scores(task, example, *completions):
    columns = {key: [value] * len(completions) for key, value in example.columns.items()}
    return task.rewards["score"]([example.prompt] * len(completions), list(completions), **columns)


def test_examples(sums):
    assert isinstance(sums, Task)
    assert (len(sums.train), len(sums.held_out)) == (50, 20)
    assert [example.index for example in sums.train] == list(range(50))
    assert [example.index for example in sums.held_out] == list(range(20))
    assert len({example.prompt for example in sums.held_out}) == 20
    assert {example.prompt for example in sums.train}.isdisjoint(example.prompt for example in sums.held_out)


def test_is_deterministic_and_depends_on_the_seed(sums):
    again = load_task("chain_sum", size=50, held_out=20, seed=3)
    assert again.train[:] == sums.train[:] and again.held_out[:] == sums.held_out[:]
    other = load_task("chain_sum", size=50, held_out=20, seed=4)
    assert other.train[0] != sums.train[0]


def test_own_verifier(sums):
    example = sums.train[0]
    right = sums.solution(example, 0)
    wrong = str(int(right) + 1)
    tagged = f"<answer>0</answer> no, <answer> {right} </answer>."
    assert scores(sums, example, right, f" {right}\n", tagged, wrong, f"<answer>{wrong}</answer>") == [1, 1, 1, 0, 0]
    assert scores(sums, example, [{"role": "assistant", "content": right}]) == [1]


def test_answer(sums):
    example = sums.train[0]
    assert sums.answer("so <answer>12</answer>", example) == "12"
    assert sums.answer("  ", example) is None


def test_options_of_the_data_set():
    task = load_task("chain_sum", size=5, held_out=5, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    assert all(len(example.columns["metadata"]["difficulty"]) for example in task.train)
    assert all(
        example.columns["question"].count("+") + example.columns["question"].count("-") == 1 for example in task.train
    )


def test_wrong_options():
    with pytest.raises(ConfigError, match=r"max_term: unknown option\. Did you mean 'max_terms'"):
        load_task("chain_sum", max_term=3)
    with pytest.raises(ConfigError, match="refused by the data set"):
        load_task("chain_sum", min_terms=5, max_terms=2)
    with pytest.raises(ConfigError, match="held_out"):
        load_task("chain_sum", held_out=0)
    with pytest.raises(ConfigError, match="size"):
        load_task("chain_sum", size="many")


def test_held_out_questions_are_replaced_in_training():
    task = load_task("tower_of_hanoi", size=40, held_out=4, **SIX_QUESTIONS)
    held_out = {example.prompt for example in task.held_out}
    train = {example.prompt for example in task.train}
    assert len(held_out) == 4
    assert len(train) == 2
    assert train.isdisjoint(held_out)


def test_too_few_questions():
    with pytest.raises(DataError, match="only 6 different questions") as error:
        load_task("tower_of_hanoi", held_out=100, **SIX_QUESTIONS)
    assert "Lower held_out" in str(error.value)
    with pytest.raises(DataError, match="none is left to train on"):
        load_task("tower_of_hanoi", held_out=6, **SIX_QUESTIONS)


def test_system_prompt():
    task = load_task("gcd", size=2, held_out=1, system_prompt="Be brief.")
    system, user = task.train[0].prompt
    assert system == {"role": "system", "content": "Be brief."}
    assert user == {"role": "user", "content": task.train[0].columns["question"]}


def test_answers_are_not_evaluated(tmp_path):
    task = load_task("string_insertion", size=1, held_out=1)
    witness = tmp_path / "witness"
    example = task.train[0]
    assert scores(task, example, f"[open({str(witness)!r}, 'w').write('x')]") == [0]
    assert not witness.exists()
    assert scores(task, example, str(list(example.columns["answer"]))) == pytest.approx([0.1])  # a list of characters
