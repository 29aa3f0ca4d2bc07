"""How the rows of a round are drawn: independently, or by a sampler.

    independent    G completions of each prompt, each of weight 1
    extra          beside them, a further group of candidates for some prompts, at another temperature
    beside         in their groups, further completions by other models
    particles      one run of the sampler for each prompt: its N = G particles with weight N W_i
    picks          G runs for each prompt: the output of each, of weight 1

Rows of a sampler follow its law and not the policy's (see `keel.rollouts.rollout`). What is known of that stands in
their columns: `tilt`, the log of how much likelier the sampler makes a completion than the policy does, up to a
constant of the prompt (r / beta; 0 for the policy; NaN where no such number is known), and for each prompt

    rollout/log_z                  estimate of log Z; NaN where the sampler has none
    rollout/effective_particles    1 / sum_i W_i^2 of a run, of its N
    rollout/kl                     nats spent against the policy, by a run
    rollout/tokens_per_row         tokens drawn, those of abandoned branches included, over the rows of the group
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import Prefix
from keel.core.chance import Sample
from keel.core.choice import counter_seed, row_ids
from keel.core.errors import ConfigError
from keel.core.rows import Rows, Stream, cat
from keel.method import Method
from keel.parts.advantages.tree import TreeAdvantage
from keel.parts.rewards.score import Scores, score
from keel.parts.rewards.transforms import WeightedSum
from keel.parts.weights.prefix import BranchCorrection, PrefixWeight
from keel.rollouts.chain import LocalChain
from keel.rollouts.decoding import Prompts
from keel.rollouts.episodes import Played
from keel.rollouts.local import LocalGenerator
from keel.rollouts.rollout import Rollout
from keel.rollouts.sampling import Generator, Sampling
from keel.sampling.catalogue import tilt_of
from keel.sampling.forest import rows_of
from keel.sampling.particles import Particles
from keel.tasks.environment import InteractiveTask
from keel.tasks.task import Example, RewardFunction, Text
from keel.train.draws import reply
from keel.train.encode import Encoder
from keel.train.episodes import draw_episodes
from keel.train.written import with_rows_beside, written_rows

if TYPE_CHECKING:
    from keel.train.session import Session

STATES = 1024  # of a sampler at once
TREE_PARTS = (TreeAdvantage, PrefixWeight, BranchCorrection)  # they read who shares a beginning with whom
COST = "rollout/tokens_per_row"


def draw_rows(
    session: "Session", examples: Sequence[Example], step: int, index: Sequence[int]
) -> tuple[Rows, "Judge | Played | None"]:
    """The rows of a round without rewards, and who has judged them already, if a sampler drew them, or the episodes.

    Args:
        session: whose method, policy and rewards; with the seed of the run, the randomness depends on `step` and
            `index` alone.
        examples: prompts.
        step: number of the round.
        index: what tells the prompts apart, also where one comes twice.
    """
    rollout = session.method.rollout
    assert rollout is not None
    if isinstance(session.task, InteractiveTask):
        played = draw_episodes(session, examples, step, index)
        return played.rows, played
    ids = [session.encoder.prompt(example.prompt) for example in examples]
    if rollout.sampler is not None:
        return _sampled(session, rollout, ids, examples, step, index)
    known: dict[str, Any] = {"seed": session.config.seed, "step": step, "data_index": index}
    if rollout.written is None:
        rows = session.generator.generate(ids, rollout.num_generations, rollout.sampling, **known)
    else:
        who = rollout.written
        rows = written_rows(session, who.model, who.alpha, ids, rollout.num_generations, **known)
    if rollout.beside:
        return with_rows_beside(session, rollout, rows, ids, step, index), None
    if rollout.greedy_baseline:
        sampling = Sampling(0.0, None, None, None, rollout.max_completion_length, rollout.stop_strings)
        greedy = session.generator.generate(ids, 1, sampling, **known)
        sample = torch.full_like(greedy.row, rollout.num_generations)
        row = row_ids(session.config.seed, step, greedy.data_index, sample)
        greedy = greedy.with_(stream=torch.full_like(greedy.stream, int(Stream.BASELINE)), row=row)
        rows = cat([rows, greedy])
    return (rows if rollout.extra is None else _with_extra(session, rollout, rows, ids, step, index)), None


def _with_extra(
    session: "Session", rollout: Rollout, rows: Rows, ids: list[list[int]], step: int, index: Sequence[int]
) -> Rows:
    """The rows and, as groups that follow theirs in number, candidates for the first prompts at another temperature."""
    assert rollout.extra is not None
    heat = torch.full_like(rows.weight, rollout.temperature)
    parts = [rows.with_(columns={**rows.columns, "temperature": heat})]
    if count := rollout.extra.count(len(ids)):
        sampling = replace(rollout.sampling, temperature=rollout.extra.temperature)
        known: dict[str, Any] = {"seed": counter_seed(session.config.seed, "extra"), "step": step}
        more = session.generator.generate(
            ids[:count], rollout.num_generations, sampling, data_index=index[:count], **known
        )
        stream = torch.full_like(more.stream, int(Stream.CANDIDATE))
        heat = torch.full_like(more.weight, rollout.extra.temperature)
        columns = {**more.columns, "temperature": heat}
        parts.append(more.with_(group=more.group + len(ids), stream=stream, columns=columns))
    return cat(parts)


def check_strategy(method: Method, generator: Generator) -> None:
    """Refuse a sampler, or temperatures of single tokens, on a generator that cannot serve it.

    Raises:
        ConfigError: the generator keeps no caches that fork, or draws elsewhere.
    """
    from keel.rollouts.transformers import TransformersGenerator

    adaptive = None if method.rollout is None else method.rollout.adaptive
    if adaptive is not None and not isinstance(generator, LocalGenerator | TransformersGenerator):
        raise ConfigError(
            f"{type(generator).__name__} does not draw here, and knows one temperature for all tokens",
            "rollout.adaptive",
            "Leave it out (tau=0), or set train.generator=local or transformers.",
        )
    sampler = None if method.rollout is None else method.rollout.sampler
    if sampler is not None and not isinstance(generator, LocalGenerator):
        raise ConfigError(
            f"{type(sampler).__name__} copies unfinished texts, which {type(generator).__name__} cannot do",
            "rollout.sampler",
            "Set train.generator=local (or auto), on a model with a key-value cache.",
        )


def tokens_drawn(rows: Rows) -> int:
    """What the rows have cost."""
    return round(float(rows.columns[COST].sum())) if COST in rows.columns else int(rows.mask.sum())


# -- rewards while texts are written ---------------------------------------------------------------------------------


@dataclass
class Judge:
    """The reward functions on the texts of a round, each text of a prompt once, and what they said of each.

    A group for which a function fails is given up: whatever it writes from then on gets 0 and is not scored, and
    `scores` marks its rows. So is a group with a completion to which no function applies, for a sampler needs a number.
    A function sees the completions that are finished at a time, not whole groups.

    Args:
        functions: by name.
        examples: the prompts of the round, one for each group.
        encoder: tokens to text.
        weights: of the functions in the sum that the sampler is told; None gives each 1.
    """

    functions: Mapping[str, RewardFunction]
    examples: Sequence[Example]
    encoder: Encoder
    weights: tuple[float, ...] | None = None
    known: dict[tuple[int, ...], Float[Tensor, "K"]] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    errors: dict[str, int] = field(default_factory=dict)
    messages: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.errors = dict.fromkeys(self.functions, 0)

    def reward(self, x: Prefix, group: Sequence[int]) -> Float[Tensor, "B"]:
        """The sum of the reward functions of finished states, whose prompts belong to these groups."""
        keys = [(group[p], *x.text(i)) for i, p in enumerate(x.prompt.tolist())]
        if new := [key for key in dict.fromkeys(keys) if key not in self.known and key[0] not in self.failed]:
            begun = time.monotonic()
            self._ask(new)
            self.seconds += time.monotonic() - begun
        return torch.tensor([self._total(key) for key in keys], dtype=torch.float64, device=x.length.device)

    def scores(self, group: Sequence[int], tokens: Sequence[Sequence[int]]) -> Scores:
        """What was said of these rows."""
        nothing = torch.full((len(self.functions),), torch.nan)
        values = [self.known.get((g, *text), nothing) for g, text in zip(group, tokens, strict=True)]
        failed = torch.tensor([g in self.failed for g in group], dtype=torch.bool)
        return Scores(torch.stack(values), tuple(self.functions), failed, self.errors, self.messages)

    def _ask(self, keys: list[tuple[int, ...]]) -> None:
        owners = [self.examples[key[0]] for key in keys]
        texts = [self.encoder.decode(key[1:]) for key in keys]
        replies: list[Text] = [reply(text, e) for text, e in zip(texts, owners, strict=True)]
        names = dict.fromkeys(name for e in self.examples for name in e.columns)
        columns = {name: [e.columns.get(name) for e in owners] for name in names}
        prompts, group = [e.prompt for e in owners], [key[0] for key in keys]
        found = score(self.functions, prompts, replies, [list(key[1:]) for key in keys], columns, group)
        for name, count in found.errors.items():
            self.errors[name] += count
        for name, said in found.messages.items():
            self.messages[name] = list(dict.fromkeys([*self.messages.get(name, []), *said]))
        self.known.update(zip(keys, found.values, strict=True))
        self.failed |= {g for g, failed in zip(group, found.failed.tolist(), strict=True) if failed}
        mute = dict.fromkeys(g for g, none in zip(group, found.values.isnan().all(1).tolist(), strict=True) if none)
        for g in [g for g in mute if g not in self.failed]:
            self.failed.add(g)
            first = next(iter(self.functions))
            self.errors[first] += 1
            self.messages.setdefault(first, []).append("a sampler needs a reward for every completion, and got none")

    def _total(self, key: tuple[int, ...]) -> float:
        if key[0] in self.failed:
            return 0.0
        values = self.known[key].double()
        return float((values if self.weights is None else values * values.new_tensor(self.weights)).nansum())


# -- rows by a sampler -----------------------------------------------------------------------------------------------


def _sampled(
    session: "Session",
    rollout: Rollout,
    ids: list[list[int]],
    examples: Sequence[Example],
    step: int,
    index: Sequence[int],
) -> tuple[Rows, Judge]:
    """The rows of as many runs of the sampler as it takes, some of them at a time."""
    check_strategy(session.method, session.generator)
    assert isinstance(session.generator, LocalGenerator) and rollout.sampler is not None
    judge = Judge(session.rewards, examples, session.encoder, _weights(session.method))
    made = _traced(rollout.sampler, session.method)
    runs = 1 if rollout.grouped else rollout.num_generations
    owner = [g for g in range(len(ids)) for _ in range(runs)]
    identity = list(index) if runs == 1 else distinct([examples[g].index for g in owner])
    seed = counter_seed(session.config.seed, "sampler", step)
    size = max(1, STATES // int(getattr(made, "num_particles", 1)))
    parts: list[Rows] = []
    for start in range(0, len(owner), size):
        group, who = owner[start : start + size], identity[start : start + size]
        texts, reward = [ids[g] for g in group], partial(judge.reward, group=group)
        known: dict[str, Any] = {"data_index": who, "reward": reward, "value": rollout.value_of}
        chain = LocalChain(session.generator, texts, rollout.sampling, **known)
        found = made(chain, Sample(seed, torch.tensor(who)))
        asked = Prompts.of(chain.model, texts, 1, chain.horizon, seed=0, step=0, data_index=None)
        prompts = asked.ids[asked.index], asked.mask[asked.index]
        parts.append(rows_of_run(found, made, *prompts, chain.pad, grouped=rollout.grouped))
    rows = cat(parts).trim()
    place = torch.arange(len(rows), device=rows.device)  # the rows of a group stand together
    number, sample = place // rollout.num_generations, place % rollout.num_generations
    own = torch.tensor(index, device=rows.device)[number]
    return rows.with_(group=number, row=row_ids(session.config.seed, step, own, sample), data_index=own), judge


def rows_of_run(
    found: Particles,
    sampler: Any,
    prompt_ids: Int[Tensor, "P W"],
    prompt_mask: Bool[Tensor, "P W"],
    pad_id: int,
    *,
    grouped: bool = True,
) -> Rows:
    """What a sampler has made of each prompt as rows, with the columns of the module.

    Args:
        found: its particles.
        sampler: what made them.
        prompt_ids, prompt_mask: of each prompt, left-padded.
        pad_id: token after the end.
        grouped: all of the particles; otherwise the pick alone, of weight 1.
    """
    rows = rows_of(found if grouped else picked(found), prompt_ids, prompt_mask, pad_id)
    assert rows.reward is not None
    tilt = tilt_of(sampler)
    reward = rows.reward[:, 0].double()
    per_prompt = {
        "rollout/log_z": found.log_z,
        "rollout/effective_particles": found.ess,
        "rollout/kl": found.kl,
        COST: found.meter.generated.to(found.log_z) / (found.count if grouped else 1),
    }
    columns = {name: value.double()[rows.group] for name, value in per_prompt.items()}
    columns["tilt"] = torch.full_like(reward, torch.nan) if tilt is None else reward * tilt
    return rows.with_(columns={**rows.columns, **columns})


def picked(found: Particles) -> Particles:
    """The output of each prompt alone, of weight 1."""
    names = [f.name for f in fields(Prefix) if f.name != "memory"]
    one = found.pick[:, None]
    return replace(
        found,
        states=Prefix(**{name: getattr(found.states, name)[found.picked] for name in names}),
        log_w=torch.zeros_like(one, dtype=found.log_w.dtype),
        reward=found.reward.gather(1, one),
        pick=torch.zeros_like(found.pick),
        trace=(),
    )


def distinct(index: Sequence[int]) -> list[int]:
    """Numbers for the randomness of prompts: those of a prompt's further occurrences differ, so that they do not repeat
    its completions.

    >>> distinct([4, 7, 4])
    [4, 7, 4294967300]
    """
    seen: dict[int, int] = {}
    out = []
    for number in index:
        out.append(number + (seen.get(number, 0) << 32))
        seen[number] = seen.get(number, 0) + 1
    return out


def _weights(method: Method) -> tuple[float, ...] | None:
    """Those with which the method adds up its rewards."""
    sums = [item for item in method.transforms.values() if isinstance(item, WeightedSum)]
    return sums[0].weights if sums else None


def _traced(sampler: Any, method: Method) -> Any:
    """A sampler that keeps its rounds where a part wants to know the branches; they take memory by their number."""
    wanted = hasattr(sampler, "keep_trace") and any(isinstance(item, TREE_PARTS) for _, item in method.parts())
    return replace(sampler, keep_trace=True) if wanted else sampler
