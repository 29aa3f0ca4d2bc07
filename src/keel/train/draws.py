"""Samplers on language models: prompts and reward functions in, weighted completions and what they cost out."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.chain import Prefix, Value
from keel.core.chance import Sample as Chance
from keel.core.errors import UserError
from keel.parts.rewards.score import score
from keel.sampling.particles import Particles
from keel.tasks.task import Example, RewardFunction, Text
from keel.train.encode import Encoder


class TextReward:
    """The sum of reward functions as a chain's reward; each text of a prompt is scored once.

    Args:
        functions: reward functions by name.
        examples: prompts with their columns, in the order of the chain's prompts.
        encoder: tokens to text.

    Raises:
        UserError: a function failed, or none applies to a completion; a sampler cannot go on without a number.
    """

    def __init__(self, functions: Mapping[str, RewardFunction], examples: Sequence[Example], encoder: Encoder):
        self.functions, self.examples, self.encoder = functions, examples, encoder
        self.known: dict[tuple[int, ...], float] = {}

    def __call__(self, x: Prefix) -> Float[Tensor, "B"]:
        keys = [(p, *x.text(i)) for i, p in enumerate(x.prompt.tolist())]
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        if new:
            self.known.update(zip(new, self._scored(new), strict=True))
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64, device=x.length.device)

    def _scored(self, keys: list[tuple[int, ...]]) -> list[float]:
        owners = [self.examples[key[0]] for key in keys]
        texts = [self.encoder.decode(list(key[1:])) for key in keys]
        replies: list[Text] = [reply(text, e) for text, e in zip(texts, owners, strict=True)]
        names = dict.fromkeys(name for e in owners for name in e.columns)
        columns = {name: [e.columns.get(name) for e in owners] for name in names}
        prompts, group = [e.prompt for e in owners], [key[0] for key in keys]
        found = score(self.functions, prompts, replies, [list(key[1:]) for key in keys], columns, group)
        total = found.values.double().nansum(1)
        unknown = found.failed | found.values.isnan().all(1)
        if bool(unknown.any()):
            place = int(unknown.int().argmax())
            said = "; ".join(message for messages in found.messages.values() for message in messages[:1])
            raise UserError(
                f"no number for the completion {texts[place]!r}" + (f": {said}" if said else ""),
                "reward",
                "A sampler needs a reward for every completion.",
            )
        return total.tolist()


def reply(text: str, example: Example) -> Text:
    """A completion in the form of its prompt: text, or messages."""
    return text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]


@dataclass(frozen=True)
class Weighted:
    """One completion of a sampler.

    Args:
        text, tokens: the completion.
        weight: its share in the sampler's estimate of the tilt.
        reward: what the reward functions say.
        log_prob: under the policy, in nats.
        picked: whether it is the sampler's output.
    """

    text: str
    tokens: tuple[int, ...]
    weight: float
    reward: float
    log_prob: float
    picked: bool


@dataclass(frozen=True)
class Account:
    """What a sampler did for one prompt, and what it cost.

    Args:
        prompt: as it is read.
        completions: with their weights.
        generated: tokens drawn.
        scored: tokens read by values and by other models to judge candidates.
        read: tokens of prompts and beginnings that were sent to be continued, where the chain keeps no cache.
        rewards: completions whose reward was asked for.
        ess: effective sample size of the weights.
        log_z, log_z_error: estimate of log Z with its standard error; NaN where the method has none.
        kl: nats that the output spends against the policy; `kl_is_bound`: at most.
        seconds: wall time, that of the whole call divided by its prompts.
        details: whatever else the method reports.
    """

    prompt: Text
    completions: tuple[Weighted, ...]
    generated: int
    scored: int
    rewards: int
    ess: float
    log_z: float
    log_z_error: float
    kl: float
    kl_is_bound: bool
    seconds: float
    details: dict[str, float] = field(default_factory=dict)
    read: int = 0

    @property
    def pick(self) -> Weighted:
        """The output."""
        return next(c for c in self.completions if c.picked)


def draw_particles(
    chain: Any,
    sampler: Any,
    examples: Sequence[Example],
    functions: Mapping[str, RewardFunction],
    *,
    encoder: Encoder,
    seed: int,
    value: Value | None = None,
) -> tuple[Particles, float]:
    """Run a sampler on prompts; its particles and the seconds it took.

    Args:
        chain: of the prompts, by tokens or by steps; it gets reward and value here.
        sampler: a part of `keel.sampling`.
        examples: prompts with their columns; `index` decides their randomness.
        functions: reward functions.
        encoder: tokens to text.
        seed: decides everything.
        value: of unfinished texts.

    Raises:
        UserError: a reward function failed.
    """
    index = [example.index for example in examples]
    getattr(chain, "main", chain).reward_of, chain.value_of = TextReward(functions, examples, encoder), value
    begun = time.perf_counter()
    found = sampler(chain, Chance(seed, torch.as_tensor(index)))
    return found, time.perf_counter() - begun


def accounts(found: Particles, examples: Sequence[Example], encoder: Encoder, seconds: float) -> list[Account]:
    """One account for each prompt."""
    out = []
    weights, rewards = found.log_w.exp().tolist(), found.reward.tolist()
    log_prob = found.states.logp.double().sum(1).tolist()
    for p, example in enumerate(examples):
        places = range(p * found.count, (p + 1) * found.count)
        tokens = [found.states.text(place) for place in places]
        completions = tuple(
            Weighted(
                text=encoder.decode(tokens[n]),
                tokens=tuple(tokens[n]),
                weight=weights[p][n],
                reward=rewards[p][n],
                log_prob=log_prob[place],
                picked=n == int(found.pick[p]),
            )
            for n, place in enumerate(places)
        )
        numbers = ("generated", "scored", "read", "rewards")
        out.append(
            Account(
                prompt=example.prompt,
                completions=completions,
                **{name: int(getattr(found.meter, name)[p]) for name in numbers},
                ess=float(found.ess[p]),
                log_z=float(found.log_z[p]),
                log_z_error=float(found.log_z_error[p]),
                kl=float(found.kl[p]),
                kl_is_bound=found.kl_is_bound,
                seconds=seconds / len(examples),
                details={name: float(values[p]) for name, values in found.details.items()},
            )
        )
    return out
