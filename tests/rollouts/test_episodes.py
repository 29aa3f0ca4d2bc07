"""Episodes: rows as by hand in any company; limits with their reasons; what an environment says is in no loss."""

import math
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from keel.core.aggregate import returns
from keel.core.choice import row_ids
from keel.core.errors import ConfigError, RewardError, UserError
from keel.core.rows import Rows, Stop
from keel.models.tiny import SMALL, build_tiny
from keel.parts.rewards.turns import TurnReward, environment_reward
from keel.recipes.registry import recipe_named
from keel.rollouts.episodes import Limits, checked, play
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.statistics.engine import Engine
from keel.statistics.functionals import Entropy, LogProb
from keel.statistics.stats import Stats
from keel.tasks.environment import Answer, Ended, InteractiveTask
from keel.tasks.task import Example
from keel.train.encode import Encoder

ALPHABET = "abcdefgh.!<>?/user"[:12] + "\n xyz"
MODEL = build_tiny(ALPHABET, SMALL, seed=3)
TEXTS = Encoder(MODEL)
ROOMY = Limits(9, 6, 60, 256, ("\n",))


@dataclass
class Room:
    """Answers with `x` and `y` by the length of what it heard; over at `last`; pays 0.1 for each character."""

    last: int = 4
    heard: list[str] = field(default_factory=list)
    seed: int = 0

    def reset(self) -> str:
        return ""

    def step(self, text: str) -> Answer:
        self.heard.append(text)
        return Answer("xy"[len(text) % 2] + "\n", 0.1 * len(text), len(self.heard) == self.last)


@dataclass
class Rooms:
    """A task of such rooms."""

    last: int = 4
    made: Any = Room
    name: str = "rooms"
    rewards: dict = field(default_factory=dict)
    preset: dict = field(default_factory=dict)
    max_completion_length: int = 60
    characters: str | None = ALPHABET
    max_turns: int = 9
    max_turn_length: int = 6
    turn_ends: tuple[str, ...] = ("\n",)
    opened: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.train = self.held_out = [Example(p, {}, i) for i, p in enumerate(("ab", "abc", "d", "efg"))]

    def environment(self, example, seed):
        self.opened.append(self.made(self.last, seed=seed))
        return self.opened[-1]

    def demonstration(self, example, seed):
        return [("a\n", True), ("x\n", False), ("bc", True)]

    def solution(self, example, seed):
        return None

    def answer(self, completion, example):
        return None


class Script:
    """A generator that says what it was told to, to each episode in turn; log-probabilities are -1."""

    def __init__(self, *turns: str):
        self.turns, self.asked = turns, []

    def generate(self, prompts, num_generations, sampling, *, seed, step=0, data_index=None) -> Rows:
        self.asked.append([list(p) for p in prompts])
        said = self.turns[step]
        ids = TEXTS.model.tokenizer(said.replace("$", "")).input_ids + ([1] if said.endswith("$") else [])
        ids = ids[: sampling.max_completion_length]
        whole = len(ids) == len(said)
        stop = Stop.EOS if whole and said.endswith("$") else Stop.STOP_STRING if whole and "\n" in said else Stop.LENGTH
        tokens = torch.tensor([ids] * len(prompts))
        mask = torch.ones_like(tokens, dtype=torch.bool)
        logp = {"behaviour": torch.full(tokens.shape, -1.0)}
        stops = torch.full((len(prompts),), int(stop))
        return Rows.build(tokens[:, :1], mask[:, :1], tokens, mask, stop=stops, logp=logp)


def scripted(*turns, task=None, limits=ROOMY, **known):
    task = task or Rooms()
    return play(Script(*turns), task, task.train[:1], 1, Sampling(), limits, TEXTS, seed=0, **known)


def drawn(task=None, examples=slice(None), count=3, limits=ROOMY, seed=5, **known):
    task = task or Rooms()
    return play(LocalGenerator(MODEL), task, task.train[examples], count, Sampling(), limits, TEXTS, seed=seed, **known)


def read(rows, i=0):
    return MODEL.tokenizer.decode(rows.tokens[i][rows.present[i]])


# -- rows ------------------------------------------------------------------------------------------------------------


def test_an_episode_by_hand():
    """Prompt ab; the model says `abc\n`, `d` with its end token, `ef\n`; the room answers y, y, and is over."""
    played = scripted("abc\n", "d$", "ef\n", task=Rooms(last=3))
    rows = played.rows
    assert read(rows) == "abc\ny\nd<eos>y\nef\n" and MODEL.tokenizer.decode(rows.prompt_ids[0]) == "ab"
    assert rows.mask[0].tolist() == [True] * 4 + [False] * 2 + [True] * 2 + [False] * 2 + [True] * 3
    assert rows.columns["turn"].tolist() == [[0] * 6 + [1] * 4 + [2] * 3] == rows.segment.tolist()
    earned = torch.zeros(13)
    earned[3], earned[7], earned[12] = 0.3, 0.1, 0.2
    torch.testing.assert_close(rows.columns["turn_reward"][0], earned)
    assert rows.logp["behaviour"][0].tolist() == [-float(chosen) for chosen in rows.mask[0]]
    assert rows.stop.tolist() == [int(Stop.ENVIRONMENT)] and rows.columns["num_turns"].tolist() == [3]
    assert rows.columns["ended"].tolist() == [int(Ended.ENVIRONMENT)] and rows.lengths.tolist() == [9]
    assert played.replies == ["abc\ny\ndy\nef\n"]
    assert played.columns["episode_reward"] == [pytest.approx(0.6)]
    assert played.columns["episode_ended"] == ["environment"] and played.columns["episode_turns"] == [3]


def test_what_the_environment_hears():
    task = Rooms()
    scripted("abc\n", "d$", "abcdef", "a\n", task=task)
    assert task.opened[0].heard == ["abc", "d", "abcdef", "a"]  # the third is cut by the limit of a turn, and answered


@pytest.mark.parametrize(
    ("limits", "ended", "stop", "turns", "text"),
    [
        ({}, Ended.ENVIRONMENT, Stop.ENVIRONMENT, 4, "ab\nx\ncd\nx\na\ny\nb\n"),
        ({"max_turns": 2}, Ended.TURNS, Stop.STOP_STRING, 2, "ab\nx\ncd\n"),
        ({"max_completion_length": 5}, Ended.TOKENS, Stop.LENGTH, 1, "ab\n"),  # the answer would leave no room
        ({"max_completion_length": 7}, Ended.TOKENS, Stop.LENGTH, 2, "ab\nx\ncd"),  # cut, and not answered
        ({"max_completion_length": 8}, Ended.TOKENS, Stop.LENGTH, 2, "ab\nx\ncd\n"),  # whole, so its reward counts
        ({"context": 9}, Ended.CONTEXT, Stop.LENGTH, 2, "ab\nx\ncd"),
        ({"max_turn_length": 2}, Ended.ENVIRONMENT, Stop.ENVIRONMENT, 4, "abx\ncdx\na\ny\nb\n"),
    ],
)
def test_limits_end_an_episode_with_their_reason(limits, ended, stop, turns, text):
    played = scripted("ab\n", "cd\n", "a\n", "b\n", limits=replace(ROOMY, **limits))
    assert read(played.rows) == text
    assert played.rows.columns["ended"].tolist() == [int(ended)] and played.rows.stop.tolist() == [int(stop)]
    assert played.rows.columns["num_turns"].tolist() == [turns]
    heard = [line for line in text.replace("x\n", "|").replace("y\n", "|").replace("\n", "").split("|")]
    whole = heard[:-1] if stop == Stop.LENGTH and not text.endswith("\n") else heard
    assert played.columns["episode_reward"] == [pytest.approx(0.1 * sum(map(len, whole)))]


class Last(Room):
    """Pays 10 where a limit ends the episode, and remembers which."""

    def finish(self, ended: Ended) -> float:
        self.heard.append(ended)
        return 10.0


@pytest.mark.parametrize(
    ("limits", "ended", "token", "earned"),
    [
        ({}, Ended.ENVIRONMENT, 15, 0.1),  # over by itself: nobody asks
        ({"max_turns": 2}, Ended.TURNS, 7, 10.2),
        ({"max_completion_length": 5}, Ended.TOKENS, 2, 10.2),
        ({"max_completion_length": 7}, Ended.TOKENS, 6, 10.0),  # the cut turn is not answered, and has its place
        ({"context": 9}, Ended.CONTEXT, 6, 10.0),
    ],
)
def test_an_environment_may_have_the_last_word(limits, ended, token, earned):
    task = Rooms(made=Last)
    played = scripted("ab\n", "cd\n", "a\n", "b\n", task=task, limits=replace(ROOMY, **limits))
    assert played.rows.columns["ended"].tolist() == [int(ended)]
    assert played.rows.columns["turn_reward"][0, token].item() == pytest.approx(earned)
    assert [said for said in task.opened[0].heard if isinstance(said, Ended)] == [ended] * (ended != Ended.ENVIRONMENT)
    whole = played.rows.columns["turn_reward"].sum().item()
    assert played.columns["episode_reward"] == [pytest.approx(whole)]
    assert bool(played.rows.mask[0, token]) and not bool(played.rows.mask[0, token + 1 :].any())


@pytest.mark.parametrize(("said", "why"), [(math.nan, "not a reward"), ("1", "not a reward"), (None, "TypeError")])
def test_a_last_word_that_is_no_reward_fails_the_group(said, why):
    class Odd(Room):
        def finish(self, ended):
            return said

    played = scripted("ab\n", task=Rooms(made=Odd), limits=replace(ROOMY, max_turns=1))
    assert played.rows.columns["ended"].tolist() == [int(Ended.FAILED)]
    assert why in played.columns["episode_reward"][0]


def test_limits_that_leave_nothing():
    with pytest.raises(UserError, match="a prompt of 2 tokens leaves no room in the context of 2"):
        scripted("a\n", limits=replace(ROOMY, context=2))
    with pytest.raises(ConfigError, match="max_turns"):
        replace(ROOMY, max_turns=0)


def test_what_is_said_first_stands_in_the_prompt():
    class Greeting(Room):
        def reset(self):
            return "xy"

    played = scripted("a\n", task=Rooms(last=1, made=Greeting))
    assert MODEL.tokenizer.decode(played.rows.prompt_ids[0]) == "abxy"


# -- randomness ------------------------------------------------------------------------------------------------------


def episodes(played):
    return {
        int(row): (read(played.rows, i), int(played.rows.stop[i]), played.rows.logp["behaviour"][i].sum().item())
        for i, row in enumerate(played.rows.row)
    }


def same(one, other):
    for row, (text, stop, logp) in one.items():
        assert other[row][:2] == (text, stop) and other[row][2] == pytest.approx(logp, abs=1e-4)


def test_the_same_in_any_order_and_company():
    whole = episodes(drawn(data_index=[0, 1, 2, 3]))
    assert len(whole) == 12 and len({text for text, *_ in whole.values()}) > 9
    same(whole, episodes(drawn(data_index=[0, 1, 2, 3])))
    task = Rooms()
    task.train = task.train[::-1]
    same(whole, episodes(drawn(task, data_index=[3, 2, 1, 0])))
    alone = episodes(drawn(examples=slice(2, 3), data_index=[2]))
    assert len(alone) == 3
    same(alone, whole)
    more = episodes(drawn(count=5, data_index=[0, 1, 2, 3]))
    same(whole, more)
    assert not set(whole) & set(episodes(drawn(seed=6))) and not set(whole) & set(episodes(drawn(step=1)))


def test_identities_and_seeds():
    task = Rooms()
    rows = drawn(task, data_index=[7, 8, 9, 4]).rows
    assert torch.equal(
        rows.row, row_ids(5, 0, torch.tensor([7, 8, 9, 4]).repeat_interleave(3), torch.arange(3).repeat(4))
    )
    assert rows.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    seeds = [room.seed for room in task.opened]
    assert seeds[0] == seeds[1] == seeds[2] and len(set(seeds)) == 4  # a group shares its environment's seed
    later = drawn(count=1, first_sample=2, data_index=[0, 1, 2, 3])
    same(episodes(later), episodes(drawn(data_index=[0, 1, 2, 3])))


# -- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [100000, 64])
def test_log_probabilities_of_whole_rows_are_those_of_the_turns(max_tokens):
    rows = drawn(count=4).rows
    assert bool((~rows.mask & rows.present).any())
    stats = Engine({"policy": MODEL}, max_tokens=max_tokens).measure([LogProb()], rows)
    torch.testing.assert_close(stats[LogProb()][rows.mask], rows.logp["behaviour"][rows.mask], atol=1e-4, rtol=0)
    assert rows.logp["behaviour"][~rows.mask].abs().max() == 0
    other = rows.with_(tokens=torch.where(rows.mask, rows.tokens, 4))  # another answer is another context
    moved = Engine({"policy": MODEL}).measure([LogProb()], other)[LogProb()]
    assert (moved - stats[LogProb()]).abs().max() > 1e-3


def composed():
    method = recipe_named("epo")(entropy_coef=0.1, beta=0.1, high=0.5, num_generations=3)
    return method.set("terms.band.penalty.history", (0.5, 0.5, 0.5)).set("terms.band.coef", 0.1)


def loss_of(rows, garbage=0.0):
    """The loss, and its gradient by token, with garbage in the statistics off the mask."""
    method = composed()
    needs = dict.fromkeys([*method.live_needs(), *method.update_needs()])
    live = {f: torch.linspace(-2, -0.2, rows.tokens.numel()).view(rows.tokens.shape).abs() * -1 for f in needs}
    live = {f: v if isinstance(f, LogProb) else -v for f, v in live.items()}
    leaves = {f: torch.where(rows.mask, v, garbage).requires_grad_() for f, v in live.items()}
    value = method.loss(rows, Stats(leaves), method.initial_states())
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return float(value.detach()), [g for g in grads if g is not None]


def test_the_environments_tokens_are_in_no_loss():
    rows = drawn().rows
    gain = torch.linspace(-1, 1, rows.tokens.numel()).view(rows.tokens.shape)
    rows = rows.with_(advantage=gain, reward=torch.zeros(len(rows), 1))
    value, grads = loss_of(rows)
    again, same_grads = loss_of(rows, garbage=100.0)
    assert again == pytest.approx(value, rel=1e-6) and len(grads) >= 2
    for one, other in zip(grads, same_grads, strict=True):
        assert one[~rows.mask].abs().max() == 0 and other[~rows.mask].abs().max() == 0
        torch.testing.assert_close(one, other)
    place = (~rows.mask & rows.present).nonzero()[0]
    wrong = rows.mask.clone()
    wrong[place[0], place[1]] = True
    assert loss_of(rows.with_(mask=wrong))[0] != pytest.approx(value, rel=1e-4)


def test_gradients_of_a_real_model_come_from_its_own_tokens():
    """The gradient of sum log pi over the mask is that of the same sum by autograd, the answers attended to."""
    rows = drawn(count=1).rows
    engine = Engine({"policy": MODEL})
    engine.step([LogProb()], rows, Stats(), lambda r, s: (s[LogProb()] * r.mask).sum())
    found = {n: p.grad.clone() for n, p in MODEL.module.named_parameters()}
    MODEL.module.zero_grad()
    total = torch.zeros(())
    for i in range(len(rows)):
        one = [*rows.prompt_ids[i][rows.prompt_mask[i]].tolist(), *rows.tokens[i][rows.present[i]].tolist()]
        logits = MODEL.module(input_ids=torch.tensor([one])).logits[0].log_softmax(-1)
        start = int(rows.prompt_mask[i].sum())
        for t in rows.mask[i].nonzero().flatten().tolist():
            total = total + logits[start + t - 1, rows.tokens[i, t]]
    total.backward()
    for name, parameter in MODEL.module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=2e-4, rtol=1e-3)
    MODEL.module.zero_grad()


def test_entropy_is_measured_on_the_models_tokens_only():
    rows = drawn().rows
    stats = Engine({"policy": MODEL}).measure([Entropy()], rows)
    assert stats[Entropy()][~rows.mask].abs().max() == 0 and stats[Entropy()][rows.mask].min() > 0


# -- rewards ---------------------------------------------------------------------------------------------------------


def test_turn_rewards_leave_the_return_as_it_is():
    rows = scripted("abc\n", "d$", "ef\n", task=Rooms(last=3)).rows
    scored = rows.with_(reward=torch.tensor([[0.6, 2.0]]))
    moved = TurnReward()(scored, Stats())
    torch.testing.assert_close(moved.reward, torch.tensor([[0.0, 2.0]]))
    torch.testing.assert_close(moved.token_reward, rows.columns["turn_reward"])
    one = rows.with_(reward=torch.tensor([[2 * 0.6 + 2.0]]), token_reward=torch.full(rows.tokens.shape, 0.5))
    for weight in (0.0, 1.0, 2.0):
        found = TurnReward(weight)(one, Stats())
        torch.testing.assert_close(returns(found), returns(one))
    torch.testing.assert_close(found.reward, torch.tensor([[2.0]]))
    unscored = TurnReward()(rows.with_(reward=torch.tensor([[math.nan]])), Stats())
    assert bool(returns(unscored).isnan().all())
    with pytest.raises(ValueError, match="several turns"):
        TurnReward()(rows.with_(columns={}, reward=torch.zeros(1, 1)), Stats())


class Raising(Room):
    def step(self, text):
        if len(self.heard) == 1:
            raise KeyError("no such door")
        return super().step(text)


class Odd(Room):
    def step(self, text):
        return ("x", 0.0, False)


class Endless(Room):
    def step(self, text):
        return Answer(reward=math.inf)


class Shut(Room):
    def __init__(self, *known, **more):
        raise RuntimeError("shut")


class Leaving(Room):
    def step(self, text):
        sys.exit(5)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Raising, f"KeyError: 'no such door' ({__file__}, line {Raising.step.__code__.co_firstlineno + 2})"),
        (Odd, "not an Answer"),
        (Endless, "inf"),
        (Shut, "RuntimeError: shut"),
        (Leaving, "SystemExit: 5"),
    ],
)
def test_an_environment_that_fails_takes_its_group_along(made, said):
    class Mixed(Rooms):
        def environment(self, example, seed):
            kind = made if example.index == 1 else Room
            return kind(self.last, seed=seed)

    played = drawn(Mixed(), data_index=[0, 1, 2, 3])
    told = played.columns["episode_reward"]
    assert all(isinstance(entry, str) and said in entry for entry in told[3:6])
    assert all(isinstance(entry, float) for entry in told[:3] + told[6:])
    assert played.rows.columns["ended"][3:6].tolist() == [int(Ended.FAILED)] * 3
    sound = {row: e for row, e in episodes(drawn(data_index=[0, 1, 2, 3])).items()}
    mixed = episodes(played)
    same({int(row): sound[int(row)] for i, row in enumerate(played.rows.row) if i not in (3, 4, 5)}, mixed)
    with pytest.raises(RewardError, match=said.split(":")[0]):
        environment_reward(episode_reward=told)
    assert environment_reward(episode_reward=told[:3]) == told[:3]


def test_answers_are_checked():
    assert checked(Answer(reward=1)).reward == 1
    for wrong, said in (
        (None, "NoneType, not an Answer"),
        ("x", "str, not an Answer"),
        (Answer(text=3), "the text of an answer is int"),
        (Answer(reward="1"), "the reward of a turn is '1'"),
        (Answer(reward=math.nan), "the reward of a turn is nan"),
        (Answer(reward=None), "the reward of a turn is None"),
        (Answer(reward=[1.0]), r"the reward of a turn is \[1.0\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            checked(wrong)
    assert isinstance(Rooms(), InteractiveTask)


# -- messages --------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
LATE = (  # like Qwen3's: the last turn is shown in another form than earlier ones
    "{% for m in messages %}<{{ m.role[0] }}>{% if loop.last and m.role == 'assistant' %}?{% endif %}{{ m.content }}"
    "<eos>\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, LATE])
@pytest.mark.parametrize("role", ["user", "tool"])
def test_answers_are_rendered_by_the_chat_template(template, role):
    model = build_tiny("abcdxy<>?ut\n", SMALL)
    model.tokenizer.chat_template = template
    encoder = Encoder(model)

    class Speaking(Room):
        def step(self, text):
            return replace(super().step(text), text="x", role=role)

    task = Rooms(last=3, made=Speaking, turn_ends=())
    task.train = [Example([{"role": "user", "content": "ab"}], {}, 0)]
    limits = Limits(9, 6, 60, 256, ())
    played = play(Script("ab$", "cd$", "d$"), task, task.train, 1, Sampling(), limits, encoder, seed=0)
    said = [{"role": "assistant", "content": t} for t in ("ab", "cd", "d")]
    heard = {"role": role, "content": "x"}
    assert played.replies == [[said[0], heard, said[1], heard, said[2]]]
    ids = [*played.rows.prompt_ids[0].tolist(), *played.rows.tokens[0].tolist()]
    conversation = [*task.train[0].prompt, said[0], heard, said[1], heard]
    whole = model.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True) + "d<eos>"
    assert model.tokenizer.decode(ids) == whole
    assert model.tokenizer.decode(played.rows.tokens[0][played.rows.mask[0]]) == "ab<eos>cd<eos>d<eos>"
    cut = play(Script("abcdab", "d$"), replace(task, last=2), task.train, 1, Sampling(), limits, encoder, seed=0)
    assert model.tokenizer.decode(cut.rows.tokens[0]) == f"abcdab<eos>\n<{role[0]}>x<eos>\n<a>d<eos>"
    assert cut.rows.mask[0, 6:8].tolist() == [False, False]  # the end of a turn that was cut is not the model's
