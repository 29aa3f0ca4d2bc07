"""The built-in tasks of several turns: transcripts with rewards by hand, every demonstration good, no leak."""

import pytest

from keel.core.errors import ConfigError
from keel.tasks import load_task, task_names
from keel.tasks.countdown import templates
from keel.tasks.countdown_calculator import LONGEST_TURN, LONGEST_VALUE, calculated
from keel.tasks.environment import Answer, InteractiveTask
from keel.tasks.number_guessing import Guessing, bisection

NAMES = ("number_guessing", "countdown_calculator")


@pytest.fixture(scope="module", params=NAMES)
def task(request):
    return load_task(request.param)


def transcript(task, example, lines):
    """What is said to these lines, and the sum of the rewards."""
    room = task.environment(example, 0)
    assert room.reset() == ""
    said = []
    for line in lines:
        said.append(room.step(line))
        if said[-1].done:
            break
    return said, sum(answer.reward for answer in said)


# -- both ------------------------------------------------------------------------------------------------------------


def test_they_are_known_by_name(task):
    assert set(NAMES) <= set(task_names()) and isinstance(task, InteractiveTask)
    assert not isinstance(load_task("countdown"), InteractiveTask)


def test_demonstrations_are_good_episodes(task):
    """Each succeeds, says what the environment says, stays within the limits, and needs no other character."""
    spread = [task.train[i] for i in range(0, len(task.train), 1 + len(task.train) // 100)] + list(task.held_out)[:60]
    varied = set()
    for number, example in enumerate(spread):
        pieces = task.demonstration(example, number)
        assert pieces == task.demonstration(example, number)
        varied.add(task.demonstration(example, 1)[0] != task.demonstration(example, 2)[0])
        own = [text for text, chosen in pieces if chosen]
        assert [chosen for _, chosen in pieces] == [i % 2 == 0 for i in range(len(pieces))]
        assert all(text.endswith("\n") and len(text) <= task.max_turn_length for text in own)
        said, earned = transcript(task, example, [text[:-1] for text in own])
        assert earned == 1 and said[-1].done and len(said) == len(own) <= task.max_turns
        assert [answer.text for answer in said[:-1]] == [text for text, chosen in pieces if not chosen]
        assert sum(len(text) for text, _ in pieces) <= task.max_completion_length
        assert set(example.prompt + "".join(text for text, _ in pieces)) <= set(task.characters)
    assert True in varied


def test_solutions_succeed_at_once(task):
    for example in list(task.held_out)[:100]:
        said, earned = transcript(task, example, [task.solution(example, 3).removesuffix("\n")])
        assert earned == 1 and len(said) == 1


def test_nothing_held_out_is_trained_on(task):
    def key(example):
        columns = example.columns
        if "secret" in columns:
            return columns["max_number"], columns["secret"]
        return tuple(sorted(columns["numbers"])), columns["target"]

    aside = {key(example) for example in task.held_out}
    assert len(aside) == len(task.held_out)
    assert not aside & {key(task.train[i]) for i in range(0, len(task.train), 1 + len(task.train) // 5000)}
    assert all(task.train[i].index == i for i in (0, 1, len(task.train) - 1))


# -- number guessing -------------------------------------------------------------------------------------------------


def test_a_game_by_hand():
    game = Guessing(secret=31, max_number=100, turns=30)
    assert [game.step(text) for text in ("50", "20", "101", "x", "")] == [
        Answer("<"),
        Answer(">"),
        Answer("?"),
        Answer("?"),
        Answer("?"),
    ]
    assert game.step(" 31 ") == Answer(reward=1.0, done=True, reason="found")


def test_the_last_guess_counts_and_ends_the_game():
    game = Guessing(secret=2, max_number=4, turns=2)
    assert game.step("1") == Answer(">") and game.step("2").reward == 1
    lost = Guessing(secret=2, max_number=4, turns=2)
    assert lost.step("1") == Answer(">") and lost.step("3") == Answer(done=True, reason="out of guesses")


def test_speed_is_paid_by_the_turns_left():
    """Found in turn 3 of 10 at speed 0.5: 1 + 0.5 * 7 / 10."""
    game = Guessing(secret=3, max_number=9, turns=10, speed=0.5)
    assert [game.step(str(guess)).reward for guess in (1, 2, 3)] == [0, 0, pytest.approx(1.35)]


@pytest.mark.parametrize("text", ["-3", "3.0", "0", "00000003", "3 3", "٣", "1_0", "+3"])
def test_what_is_no_number_in_range(text):
    assert Guessing(3, 100, 30).step(text) == Answer("?")


def test_bisection_finds_every_secret_in_seven_turns():
    task = load_task("number_guessing", max_number=100, turns=30)
    for n in (50, 77, 100):
        for secret in range(1, n + 1):
            guesses = bisection(secret, n)
            assert len(guesses) <= 7
            game = Guessing(secret, n, task.max_turns)
            assert [game.step(str(guess)).reward for guess in guesses] == [0.0] * (len(guesses) - 1) + [1.0]


def test_options_of_number_guessing():
    task = load_task("number_guessing", max_number=20, turns=5, speed=0.1, held_out=7)
    assert {example.columns["max_number"] for example in task.train} == set(range(10, 21))
    assert len(task.held_out) == 7 and task.max_turns == 5 and task.max_turn_length == 3
    assert task.max_completion_length == 5 * 4
    assert len(task.train) == sum(range(10, 21)) - 33  # a fifth is set aside
    for wrong in ({"max_number": 3}, {"turns": 0}, {"speed": -1}, {"held_out": 10**6}, {"turns": True}):
        with pytest.raises(ConfigError, match=f"task number_guessing, {next(iter(wrong))}"):
            load_task("number_guessing", **wrong)
    with pytest.raises(ConfigError, match="Did you mean 'turns'"):
        load_task("number_guessing", turn=3)


def test_answers_of_number_guessing():
    task = load_task("number_guessing", max_number=100)
    example = task.train[0]
    assert task.answer("50\n<20\n>31\n", example) == "31"
    assert task.answer([{"role": "assistant", "content": "7"}], example) == "7"
    assert task.answer("50\n<x\n", example) is None and task.answer("", example) is None


# -- countdown with a calculator -------------------------------------------------------------------------------------


def known(task, numbers=(8, 7, 3), target=31):
    from keel.tasks.task import Example

    return Example("8 7 3>31=", {"numbers": list(numbers), "target": target}, 0)


def test_a_calculation_by_hand():
    task = load_task("countdown_calculator", turns=5)
    lines = ["?8*7-3", "?8*3", "?8/(3-3)", "8*3+7"]
    said, earned = transcript(task, known(task), lines)
    assert said[:3] == [Answer("53\n"), Answer("24\n"), Answer("error\n")]
    assert said[3] == Answer(reward=1.0, done=True, reason="right") and earned == 1


@pytest.mark.parametrize("line", ["8*3+8", "31", "8*3", "", "8*3+7=31", "7*3+8"])
def test_a_wrong_answer_ends_the_episode(line):
    task = load_task("countdown_calculator")
    said, earned = transcript(task, known(task), [line, "8*3+7"])
    assert said == [Answer(done=True, reason="wrong")] and earned == 0


def test_questions_use_up_the_turns():
    task = load_task("countdown_calculator", turns=2)
    said, earned = transcript(task, known(task), ["?1", "?2", "8*3+7"])
    assert said == [Answer("1\n"), Answer(done=True, reason="out of turns")] and earned == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6/4", "3/2"),
        ("4/6-1", "-1/3"),
        ("3-3", "0"),
        ("1/(2-3)", "-1"),
        ("20*20*20", "8000"),
        ("9999999", "9999999"),
        ("99999999", "error"),
        ("9999999*9999999*9999999", "error"),
        ("1/0", "error"),
        ("(1", "error"),
        ("", "error"),
        ("2**3", "error"),
        ("1" * 70, "error"),
    ],
)
def test_exact_values(text, value):
    assert calculated(text) == value and len(value) < LONGEST_VALUE


def test_every_question_fits_a_turn():
    longest = max(len(template.format(20, 20, 20)) for template in templates())
    assert len("?") + longest + len("\n") <= LONGEST_TURN


def test_hard_instances_are_taken_by_default():
    assert len(load_task("countdown_calculator").train) > len(load_task("countdown_calculator", hard=False).train)
    for turns in (0, True, "3"):
        with pytest.raises(ConfigError, match="task countdown_calculator, turns"):
            load_task("countdown_calculator", turns=turns)
    task = load_task("countdown_calculator", turns=1)
    assert len(task.demonstration(task.train[0], 0)) == 1


def test_answers_of_the_calculator():
    task = load_task("countdown_calculator")
    assert task.answer("?8*3\n24\n7+8*3\n", known(task)) == task.answer("8*3+7", known(task)) == "7+3*8"
    assert task.answer("?8*3\n24\n?8\n", known(task)) is None and task.answer("", known(task)) is None
