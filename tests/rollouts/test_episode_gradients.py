"""The update over episodes is the policy gradient of their return: all episodes of a small world, counted by hand.

Two turns of one token each. The first answer ends the episode where it is `a`; otherwise the environment answers, and
what the second token earns depends on both. So episodes differ in length, in turns and in what was read between.
"""

import itertools
from dataclasses import dataclass, field

import pytest
import torch

from keel.core.rows import Rows, Stop
from keel.models.tiny import TinyConfig, build_tiny
from keel.parts.rewards.turns import TurnReward
from keel.recipes.registry import recipe_named
from keel.rollouts.episodes import Limits, play
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats
from keel.tasks.environment import Answer
from keel.tasks.task import Example
from keel.train.encode import Encoder

MODEL = build_tiny("ab<>", TinyConfig(dim=16, layers=2, heads=2, feed_forward=16, context=32), seed=5)
TEXTS = Encoder(MODEL)
SIZE = MODEL.vocabulary_size
LIMITS = Limits(max_turns=2, max_turn_length=1, max_completion_length=20, context=32)
ALL = tuple(itertools.product(range(SIZE), repeat=2))
LETTER = MODEL.tokenizer("a").input_ids[0]


@dataclass
class Pair:
    """`a` is worth 0.7 at once; else the turns are worth their length and whether they agree."""

    heard: list[str] = field(default_factory=list)

    def reset(self) -> str:
        return ""

    def step(self, text: str) -> Answer:
        self.heard.append(text)
        if len(self.heard) == 1:
            return Answer("<>"[text == "b"], 0.7 if text == "a" else 0.2 * len(text), text == "a")
        return Answer("", 1.0 * (self.heard[0] == text) - 0.3 * (text == "<"), True)


@dataclass
class Pairs:
    """The task of that one world."""

    name: str = "pairs"
    rewards: dict = field(default_factory=dict)
    preset: dict = field(default_factory=dict)
    max_completion_length: int = 20
    characters: str | None = "ab<>"
    max_turns: int = 2
    max_turn_length: int = 1
    turn_ends: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.train = self.held_out = [Example("ba", {}, 0)]

    def environment(self, example, seed):
        return Pair()

    def demonstration(self, example, seed):
        return None

    def solution(self, example, seed):
        return None

    def answer(self, completion, example):
        return None


class Each:
    """Says every pair of tokens, one to each episode."""

    def __init__(self) -> None:
        self.place: dict[int, int] = {}

    def generate(self, prompts, num_generations, sampling, *, seed, step=0, data_index=None) -> Rows:
        for row in data_index:
            self.place.setdefault(row, len(self.place))
        tokens = torch.tensor([[ALL[self.place[row]][step]] for row in data_index])
        mask = torch.ones_like(tokens, dtype=torch.bool)
        logp = {"behaviour": torch.zeros(tokens.shape)}
        return Rows.build(tokens, mask, tokens, mask, stop=torch.full((len(tokens),), int(Stop.LENGTH)), logp=logp)


def probability(text: list[int], chosen: list[int]) -> torch.Tensor:
    """Of the tokens at these places, from one plain forward pass."""
    logp = MODEL.module(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
    return sum((logp[i - 1, text[i]] for i in chosen), torch.zeros(())).exp()


def by_hand() -> list[tuple[torch.Tensor, float, int]]:
    """Probability, return and number of tokens of each episode, said without any of Keel's episodes."""
    prompt, encode = MODEL.tokenizer("ba").input_ids, lambda text: MODEL.tokenizer(text).input_ids
    shown = {i: MODEL.tokenizer.decode([i], skip_special_tokens=True) for i in range(SIZE)}
    found = [(probability([*prompt, LETTER], [2]), 0.7, 1)]
    for one, two in ALL:
        if one != LETTER:
            text = [*prompt, one, *encode(">" if shown[one] == "b" else "<"), two]
            earned = 0.2 * len(shown[one]) + (shown[one] == shown[two]) - 0.3 * (shown[two] == "<")
            found.append((probability(text, [2, 4]), earned, 2))
    return found


def gradient() -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in MODEL.module.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def exact() -> tuple[torch.Tensor, float, float]:
    """The gradient of the expected return, its standard deviation, and the expected number of tokens."""
    known = by_hand()
    assert sum(float(p.detach()) for p, *_ in known) == pytest.approx(1, abs=1e-5)
    MODEL.module.zero_grad()
    expected = sum(p * earned for p, earned, _ in known)
    expected.backward()
    mean = float(expected.detach())
    deviation = float(sum(float(p.detach()) * (earned - mean) ** 2 for p, earned, _ in known)) ** 0.5
    return gradient().clone(), deviation, sum(float(p.detach()) * count for p, _, count in known)


@pytest.fixture(scope="module")
def rows() -> Rows:
    """All episodes, each once, as rows whose weight is their probability."""
    task = Pairs()
    found = play(Each(), task, task.train, len(ALL), Sampling(), LIMITS, TEXTS, seed=0)
    logp = Engine({"policy": MODEL}).measure([LogProb()], found.rows)[LogProb()]
    weight = torch.where(found.rows.mask, logp, 0.0).sum(1).exp()
    once = [i for i, (one, two) in enumerate(ALL) if one != LETTER or two == 0]
    earned = torch.tensor(found.columns["episode_reward"])[:, None]
    return found.rows.with_(weight=weight, reward=earned, exact=True).select(torch.tensor(once))


def update(method, rows: Rows) -> torch.Tensor:
    """The gradient of a method's loss."""
    MODEL.module.zero_grad()
    ready = method.prepare(rows, Stats(), method.initial_states())
    needs = [LogProb(), *method.live_needs()]
    engine = Engine({"policy": MODEL}, max_tokens=100)
    engine.step(list(dict.fromkeys(needs)), ready, Stats(), lambda r, s: method.loss(r, method.with_old(s), {}))
    return gradient()


PLAIN = {"beta": 0.0, "num_generations": 49}


@pytest.mark.parametrize(
    ("recipe", "options", "divided"),
    [
        ("reinforce", {}, lambda deviation, tokens: 1),
        ("grpo", {"scale_rewards": "none", "aggregation": "sequence_mean_token_sum"}, lambda deviation, tokens: 1),
        ("dr_grpo", {"max_completion_length": 20}, lambda deviation, tokens: 20),
        ("grpo", {"advantage_epsilon": 0.0}, lambda deviation, tokens: deviation * tokens),
    ],
)
def test_the_update_is_the_gradient_of_the_expected_return(exact, rows, recipe, options, divided):
    wanted, deviation, tokens = exact
    given = {"beta": 0.0} if recipe == "reinforce" else PLAIN
    found = update(recipe_named(recipe)(**given, **options), rows)
    torch.testing.assert_close(-found * divided(deviation, tokens), wanted, atol=2e-6, rtol=1e-4)
    assert float(wanted.norm()) > 0.05


def test_credit_by_turn_has_the_same_gradient(exact, rows):
    """What a turn earned is not owed to later turns: leaving it out of their credit changes nothing in the mean."""
    method = recipe_named("reinforce_pp")(beta=0.0, num_generations=49).adding(transforms={"turns": TurnReward()})
    method = method.replacing(
        advantage={"credit": method.advantage["credit"]}, aggregation=recipe_named("reinforce")().aggregation
    )
    torch.testing.assert_close(-update(method, rows), exact[0], atol=2e-6, rtol=1e-4)


def test_episodes_are_drawn_with_their_probability():
    """Pearson's statistic over all episodes; its turns must be independent draws."""
    task = Pairs()
    count = 4000
    drawn = play(LocalGenerator(MODEL), task, task.train, count, Sampling(), LIMITS, TEXTS, seed=3).rows
    with torch.no_grad():
        known = [float(p) for p, *_ in by_hand()]
    order = [(LETTER, None), *((one, two) for one, two in ALL if one != LETTER)]
    wanted = dict(zip(order, known, strict=True))
    seen = dict.fromkeys(order, 0)
    for tokens, mask in zip(drawn.tokens, drawn.mask, strict=True):
        own = tokens[mask].tolist()
        seen[(own[0], own[1] if len(own) > 1 else None)] += 1
    statistic = sum((seen[text] - count * p) ** 2 / (count * p) for text, p in wanted.items())
    assert statistic < 77  # 42 degrees of freedom: exceeded once in a thousand
