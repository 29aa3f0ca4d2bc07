import pytest

from keel.core.errors import ConfigError
from keel.tasks import Task, load_task
from keel.tasks.environment import Answer, Environment, InteractiveTask

SMALL = {"size": 4, "held_out": 3, "seed": 3}


@pytest.fixture(scope="module")
def sums():
    return load_task("reasoning_gym:chain_sum", attempts=3, **SMALL)


def episode(task, *texts, example=None):
    environment = task.environment(example or task.train[0], seed=0)
    assert environment.reset() == ""
    return [environment.step(text) for text in texts]


def test_is_an_interactive_task_and_plain_ones_are_not(sums):
    assert isinstance(sums, InteractiveTask) and isinstance(sums.environment(sums.train[0], 0), Environment)
    plain = load_task("chain_sum", **SMALL)
    assert isinstance(plain, Task) and not isinstance(plain, InteractiveTask)
    assert sums.train[:] == plain.train[:] and sums.held_out[:] == plain.held_out[:]
    assert (sums.max_turns, sums.max_turn_length, sums.max_completion_length) == (3, 512, 3 * (512 + 64))
    assert sums.rewards == {}


def test_solved_at_once(sums):
    right = sums.train[0].columns["answer"]
    assert episode(sums, f"<answer>{right}</answer>") == [Answer("", 1.0, True, "solved")]
    assert episode(sums, f"I say <answer>{right}")[0].reason == "solved"  # the stop string is not in the text
    assert [text for text, mine in sums.demonstration(sums.train[0], 0) if mine] == [right]


def test_feedback_then_solved(sums):
    right = sums.train[0].columns["answer"]
    first, second = episode(sums, str(int(right) + 1), right)
    assert first == Answer("\nThat is not right. Attempts left: 2.\n", 0.0, False)
    assert second == Answer("", 1.0, True, "solved")


def test_attempts_are_limited(sums):
    wrong = str(int(sums.train[0].columns["answer"]) + 1)
    answers = episode(sums, wrong, wrong, wrong)
    assert [answer.done for answer in answers] == [False, False, True]
    assert answers[-1].reason == "out of attempts" and sum(answer.reward for answer in answers) == 0


class Scores:
    """A data set that scores what it reads as a number."""

    def __init__(self, questions):
        self.questions = questions

    def __getitem__(self, position):
        return self.questions[position]

    def score_answer(self, answer, entry):
        return float(answer)


@pytest.mark.parametrize(
    ("keep", "discount", "rewards"),
    [  # scores 0.5, 0.2, 0.6: the best is 0.6, the last is 0.6; at discount 0.5 they are worth 0.5, 0.1, 0.15
        ("best", 1.0, [0.5, 0.0, 0.1]),
        ("last", 1.0, [0.5, -0.3, 0.4]),
        ("best", 0.5, [0.5, 0.0, 0.0]),
        ("last", 0.5, [0.5, -0.4, 0.05]),
    ],
)
def test_best_and_last(keep, discount, rewards):
    task = load_task("chain_sum", attempts=3, keep=keep, discount=discount, feedback="{score:g}, {left} left", **SMALL)
    task._dataset = Scores(task._dataset)
    answers = episode(task, "0.5", "0.2", "0.6")
    assert [answer.reward for answer in answers] == pytest.approx(rewards)
    assert [answer.text for answer in answers] == ["0.5, 2 left", "0.2, 1 left", ""]


def test_episodes_are_apart(sums):
    one, other = (sums.environment(sums.train[0], seed) for seed in (0, 1))
    wrong = str(int(sums.train[0].columns["answer"]) + 1)
    one.step(wrong), one.step(wrong)
    assert "left: 2" in other.step(wrong).text
    one.reset()
    assert "left: 2" in one.step(wrong).text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attempts": 0}, "attempts: got 0"),
        ({"attempts": "3"}, "attempts: got '3'"),
        ({"attempts": 2, "keep": "bset"}, "Did you mean 'best'"),
        ({"attempts": 2, "discount": 0.0}, r"discount: got 0\.0"),
        ({"attempts": 2, "feedback": "{tries}"}, "is no template"),
        ({"attempts": 2, "feedback": 3}, "is no template"),
        ({"attempts": 2, "max_turn_length": 0}, "max_turn_length: got 0"),
        ({"attempts": 2, "max_term": 3}, "Did you mean 'max_terms'"),
        ({"keep": "last"}, "keep: unknown option"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ConfigError, match=words):
        load_task("chain_sum", **SMALL, **options)


def test_levels_of_the_curriculum():
    easiest = load_task("chain_sum", level=0, **SMALL)
    assert {example.columns["metadata"]["num_terms"] for example in easiest.train} == {2}
    assert {example.columns["metadata"]["num_digits"] for example in easiest.train} == {1}
    wider = load_task("chain_sum", level=2, min_digits=3, **SMALL)  # up to 4 terms and 3 digits; what is given wins
    assert {example.columns["metadata"]["num_digits"] for example in wider.train} == {3}
    with pytest.raises(ConfigError, match="level: got 99"):
        load_task("chain_sum", level=99)
    with pytest.raises(ConfigError, match="has no curriculum"):
        load_task("acre", level=1)
    with pytest.raises(ConfigError, match="Did you mean 'chain_sum'"):
        load_task("chain_summ", level=1)
