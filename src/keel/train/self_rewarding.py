"""Rounds of a policy that judges itself: draw, score, pair, train, and again with what came of it.

    round i:   completions of M_i, and of M_0 as an anchor  -> scores by M_i -> pairs -> M_f = trained from M_i
               completions of M_f                           -> scores by M_i -> pairs -> M_{i+1} = trained from M_i

The second line is the look-ahead, after which M_f is given up. Without it the first line gives M_{i+1}; without the
anchor, either, it is plain self-rewarding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError, RunError, TrainingError
from keel.core.rows import Rows
from keel.models.load import load
from keel.parts.rewards.score import score
from keel.parts.rewards.self_rewarding import consistency, own_score, temporal_pair
from keel.rollouts.choose import choose_generator
from keel.rollouts.sampling import Sampling
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.tasks.environment import InteractiveTask
from keel.tasks.load import load_task
from keel.tasks.task import Example, Task
from keel.train.draws import reply
from keel.train.encode import Encoder
from keel.train.session import Reporter, reward_functions, silent
from keel.train.settings import TaskSettings
from keel.train.setup import model_source, named_rewards, run_checkpoint

Agreement = Literal["prompt", "mean"]


@dataclass(frozen=True)
class Round:
    """What a round came to.

    Args:
        path: of the run that made its model.
        model: folder of the model.
        pairs: that it was trained on, as `prompt`, `chosen`, `rejected`, and `probability` where labels are softened.
        gap: mean score of the chosen completions less that of the rejected ones.
        anchored, ahead: shares of pairs with a rejected completion of M_0, and with a chosen one of M_f.
        agreement: mean C of the prompts between this judge and the last one.
    """

    path: Path
    model: Path
    pairs: tuple[dict[str, Any], ...]
    gap: float
    anchored: float
    ahead: float
    agreement: float


def self_reward(
    model: Any = None,
    task: str | Task = "countdown",
    *,
    recipe: str = "dpo",
    rounds: int = 2,
    completions: int = 7,
    num_prompts: int = 256,
    anchor: bool = True,
    look_ahead: bool = True,
    agreement: Agreement | None = None,
    reward: Callable[..., Any] | str | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    runs: str | Path = "runs",
    name: str = "self_rewarding",
    report: Reporter = silent,
    **settings: Any,
) -> list[Round]:
    """Train a model on pairs that it has drawn and scored itself, round after round.

    Args:
        model: `tiny`, a folder or a hub name: M_0.
        task: prompts, of one turn.
        recipe: of pairs, by which each round is trained; its reference is the model of the round.
        rounds: i = 0 .. rounds - 1.
        completions: K, of each model and prompt.
        num_prompts: of a round; each round takes the next ones.
        anchor: rejected completions may come from M_0.
        look_ahead: chosen completions may come from M_f, which costs a second training a round.
        agreement: soften the labels by how far M_i and M_{i-1} agree on the order of a prompt's completions, each
            prompt by itself or all by their mean (CREAM); None leaves them.
        reward: a judge in the model's place, called as reward functions are; None takes the model's own log-ratio to
            M_0, in the first round its mean log-probability of a token.
        temperature: of the draws.
        seed: decides all randomness.
        runs, name: folder of the runs, named NAME-1, NAME-1-ahead and so on.
        report: see `keel.train`.
        **settings: of each run, as in `keel.train`.

    Returns:
        One entry for each round.

    Raises:
        ConfigError: a setting out of its range, a task of several turns, or a recipe that is not of pairs.
        TrainingError: no prompt of a round has a pair.

    Source: "Temporal Self-Rewarding Language Models: Decoupling Chosen-Rejected via Past-Future", 2025; CREAM, 2025.
    """
    for what, value, least in (("rounds", rounds, 1), ("completions", completions, 2), ("num_prompts", num_prompts, 1)):
        if value < least:
            raise ConfigError(f"must be at least {least}, not {value}", what)
    known = load_task(task) if isinstance(task, str) else task
    if isinstance(known, InteractiveTask):
        raise ConfigError("completions are compared as a whole, and this task has several turns", "task")
    start = str(model_source(model, known, report))
    makes = _Rounds(known, start, completions, temperature, seed, agreement, _judge(known, reward))
    told: dict[str, Any] = dict(seed=seed, runs=runs, report=report, **settings)
    current, previous, out = start, start, []
    for i in range(rounds):
        examples = [known.train[(i * num_prompts + k) % len(known.train)] for k in range(num_prompts)]
        pools: dict[str, str] = {"current": current, **({"anchor": start} if anchor else {})}
        found = makes.pairs(examples, pools, current, previous, i)
        if look_ahead:
            ahead, _ = _trained(recipe, current, found, f"{name}-{i + 1}-ahead", told)
            found = makes.pairs(examples, {**pools, "future": str(ahead)}, current, previous, i)
        place, path = _trained(recipe, current, found, f"{name}-{i + 1}", told)
        out.append(Round(path, place, *found.summary))
        current, previous = str(place), current
    return out


@dataclass(frozen=True)
class _Found:
    """Pairs of a round, and what is reported of them."""

    pairs: tuple[dict[str, Any], ...]
    gap: float
    anchored: float
    ahead: float
    agreement: float

    @property
    def summary(self) -> tuple[Any, ...]:
        return self.pairs, self.gap, self.anchored, self.ahead, self.agreement


@dataclass(frozen=True)
class _Rounds:
    """How the pairs of a round are made."""

    task: Task
    start: str
    completions: int
    temperature: float
    seed: int
    agreement: Agreement | None
    judge: Mapping[str, Any] | None

    def pairs(
        self, examples: Sequence[Example], pools: Mapping[str, str], current: str, previous: str, number: int
    ) -> _Found:
        """The pairs of prompts that have one."""
        drawn = {pool: self._drawn(examples, place, pool, number) for pool, place in pools.items()}
        scores = {pool: self._scored(examples, rows, texts, current) for pool, (rows, texts) in drawn.items()}
        rows, _ = drawn["current"]
        agreed = torch.ones(len(rows), dtype=torch.float64)
        if self.agreement is not None:
            before = self._scored(examples, *drawn["current"], previous)
            agreed = consistency(rows, scores["current"], before)
        pairs: list[dict[str, Any]] = []
        gaps, origins = [], []
        for g, example in enumerate(examples):
            own = {pool: scores[pool][found.group == g] for pool, (found, _) in drawn.items()}
            listed: dict[str, list[float]] = {pool: values.tolist() for pool, values in own.items()}
            two = temporal_pair(listed["current"], listed.get("anchor", ()), listed.get("future", ()))
            if two is None:
                continue
            text = [drawn[pool][1][g * self.completions + k] for pool, k in two]
            pairs.append({"prompt": example.prompt, "chosen": text[0], "rejected": text[1]})
            pairs[-1] |= {"probability": float(agreed[rows.group == g][0])} if self.agreement else {}
            (chosen, i), (rejected, j) = two
            gaps.append(listed[chosen][i] - listed[rejected][j])
            origins.append((rejected == "anchor", chosen == "future"))
        if not pairs:
            what = f"of {len(examples)} prompts none has two completions of different scores"
            raise TrainingError(what, f"round {number + 1}", "Raise completions or num_prompts.")
        count = len(pairs)
        if self.agreement == "mean":
            mean = sum(pair["probability"] for pair in pairs) / count
            pairs = [{**pair, "probability": mean} for pair in pairs]
        shares = [sum(bool(origin[k]) for origin in origins) / count for k in (0, 1)]
        return _Found(tuple(pairs), sum(gaps) / count, shares[0], shares[1], float(agreed.mean()))

    def _drawn(self, examples: Sequence[Example], place: str, pool: str, number: int) -> tuple[Rows, list[str]]:
        """K completions of each prompt by one model; the groups are in the order of the prompts."""
        policy = load(place)
        encoder, sampling = Encoder(policy), self._sampling
        rows = choose_generator(policy, "auto").generate(
            [encoder.prompt(example.prompt) for example in examples],
            self.completions,
            sampling,
            seed=counter_seed(self.seed, "self-rewarding", pool, number),
            data_index=[example.index for example in examples],
        )
        rows = rows.select(rows.group.argsort(stable=True)).to("cpu")
        return rows, [encoder.decode(ids) for ids in _ids(rows)]

    @property
    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, max_completion_length=self.task.max_completion_length)

    def _scored(self, examples: Sequence[Example], rows: Rows, texts: Sequence[str], judge: str) -> torch.Tensor:
        """What one model says of completions, or the judge in its place."""
        if self.judge is not None:
            owners = [examples[g] for g in rows.group.tolist()]
            replies = [reply(text, e) for text, e in zip(texts, owners, strict=True)]
            names = dict.fromkeys(name for e in owners for name in e.columns)
            columns = {name: [e.columns.get(name) for e in owners] for name in names}
            found = score(self.judge, [e.prompt for e in owners], replies, _ids(rows), columns, rows.group)
            if bool(found.failed.any()) or bool(found.values.isnan().any()):
                said = "; ".join(m for messages in found.messages.values() for m in messages[:1])
                raise TrainingError(f"the judge has no score for some completion: {said}", "reward")
            return found.values.double().sum(1)
        policy, initial = load(judge), load(self.start)
        wanted = [LogProb(of=(name,)) for name in ("old", "ref")]
        models: dict[str, Any] = {"policy": policy, "old": policy, "ref": initial}
        stats = Engine(models).measure(wanted, rows.to(policy.device))
        return own_score(rows.to(policy.device), stats, "old", "ref").double().cpu()


def _ids(rows: Rows) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(rows.tokens, rows.mask, strict=True)]


def _trained(recipe: str, start: str, found: _Found, name: str, told: Mapping[str, Any]) -> tuple[Path, Path]:
    """Folder of the model, and of the run, of one training from a model on the pairs."""
    from keel.train.entry import train

    run = train(recipe, model=start, data=list(found.pairs), name=name, **told)
    place = run_checkpoint(run.path)
    if place is None:
        raise RunError("the run has left no model", str(run.path))
    return place, run.path


def _judge(task: Task, reward: Callable[..., Any] | str | None) -> Mapping[str, Any] | None:
    """The functions that score in the model's place, under their time limits."""
    if reward is None:
        return None
    texts, given = named_rewards(reward)
    return reward_functions(TaskSettings(rewards=texts), task, given)
