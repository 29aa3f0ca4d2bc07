"""The built-in preferences: completions of the built-in model on a task, compared by a stated rule, and cached.

a correct completion is better than a wrong one, and of correct ones the shorter is better
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError, DataError
from keel.models.load import load
from keel.parts.rewards.score import score
from keel.rollouts.choose import choose_generator
from keel.rollouts.sampling import Sampling
from keel.tasks.environment import InteractiveTask
from keel.tasks.preferences import GOLD, Kind, Preference, Preferences
from keel.tasks.task import Example, Task
from keel.train.base import cache_directory, ensure_base, locked
from keel.train.draws import reply
from keel.train.encode import Encoder
from keel.train.session import Reporter, silent

VERSION = 1  # raise it when the rule or the draws change
PROMPTS, HELD_OUT, DRAWS = 3072, 256, 8  # prompts at most, and completions of each
TOGETHER = 152  # prompts that are completed in one go
THRESHOLD = 0.5  # a completion is correct if its reward is above it


@dataclass(frozen=True)
class Drawn:
    """What the built-in model said to one prompt.

    Args:
        index: place of the example in its split.
        completions: different texts, in the order in which they were drawn.
        rewards: of each of them.
    """

    index: int
    completions: tuple[str, ...]
    rewards: tuple[float, ...]

    def ranks(self) -> tuple[float, ...]:
        """0 for wrong; of correct ones 1 for the longest, one more for each length that is shorter."""
        lengths = {len(c) for c, r in zip(self.completions, self.rewards, strict=True) if r > THRESHOLD}
        order = {length: place + 1.0 for place, length in enumerate(sorted(lengths, reverse=True))}
        return tuple(
            order[len(c)] if r > THRESHOLD else 0.0 for c, r in zip(self.completions, self.rewards, strict=True)
        )


def built_in_preferences(task: Task, kind: Kind, seed: int = 0, report: Reporter = silent) -> Preferences:
    """Comparisons of completions of the built-in model, drawn once and cached.

    Pairs are the best against the worst completion of a prompt, with their ranks as ratings; labels a correct and a
    wrong one, where there are such; lists all different completions. Prompts whose completions are all equally good are
    left out.

    Args:
        task: with one turn and verifiers.
        kind: pairs, labels or lists.
        seed: of the draws, which the cache keeps apart.
        report: called with (event, facts) while they are drawn.

    Raises:
        ConfigError: a task of several turns, one without verifiers, or one that the built-in model cannot read.
        DataError: no prompt has completions of which one is better.
    """
    _check(task)
    drawn = _cached(task, seed, report)
    sides = []
    for examples, side in ((task.train, drawn["train"]), (task.held_out, drawn["held_out"])):
        made = [p for one in side for p in _made(examples[one.index], one, kind, task)]
        sides.append([replace(p, index=index) for index, p in enumerate(made)])
    if not sides[0]:
        what = "the built-in model answers every prompt always right or always wrong: there is nothing to compare"
        raise DataError(what, task.name, "Give --data with preferences of your own.")
    return Preferences(task.name, kind, sides[0], sides[1])


def _check(task: Task) -> None:
    fix = "Give --data with preferences of your own, or another --task."
    if isinstance(task, InteractiveTask):
        what = "has several turns, and built-in preferences compare completions of one turn"
        raise ConfigError(what, f"task '{task.name}'", fix)
    if not task.rewards:
        raise ConfigError("has no verifier to tell better completions by", f"task '{task.name}'", fix)
    if not _base(task).characters:
        raise ConfigError(
            "states no alphabet, so the built-in model cannot draw preferences", f"task '{task.name}'", fix
        )


def _base(task: Task) -> Task:
    return task.base_task() if hasattr(task, "base_task") else task


def _cached(task: Task, seed: int, report: Reporter) -> dict[str, list[Drawn]]:
    """The draws for both splits: those in the cache, or new ones that go there."""
    base = ensure_base(_base(task), report=report)
    splits = {"train": _some(task.train, PROMPTS), "held_out": _some(task.held_out, HELD_OUT)}
    facts: dict[str, Any] = {
        "version": VERSION,
        "base": base.name,
        "seed": seed,
        "draws": [DRAWS, task.max_completion_length],
        "rewards": sorted(task.rewards),
        "prompts": {name: [[e.prompt, e.columns] for e in some] for name, some in splits.items()},
    }
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    final = cache_directory() / f"preferences-{task.name}-{digest}.json"
    if not final.is_file():
        with locked(final.parent / f".{final.name}.lock"):
            if not final.is_file():
                _write(final, {name: _draw(base, task, some, seed, name, report) for name, some in splits.items()})
    said = json.loads(final.read_text(encoding="utf-8"))
    return {name: [Drawn(i, tuple(texts), tuple(rewards)) for i, texts, rewards in said[name]] for name in splits}


def _some(examples: Sequence[Example], count: int) -> list[Example]:
    return [examples[i] for i in range(min(count, len(examples)))]


def _write(final: Path, splits: dict[str, list[Drawn]]) -> None:
    """Whole or not at all."""
    said = {name: [[d.index, d.completions, d.rewards] for d in side] for name, side in splits.items()}
    handle, temporary = tempfile.mkstemp(prefix=f".{final.name}.", dir=final.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(said, file)
        os.replace(temporary, final)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _draw(base: Path, task: Task, examples: Sequence[Example], seed: int, split: str, report: Reporter) -> list[Drawn]:
    policy = load(str(base))
    encoder, drawing = Encoder(policy), choose_generator(policy, "auto")
    sampling = Sampling(max_completion_length=task.max_completion_length)
    text = f"drawing completions to compare ({split.replace('_', '-')} prompts)"
    report("phase", {"name": "preferences", "steps": len(examples), "text": text})
    found: list[Drawn] = []
    for start in range(0, len(examples), TOGETHER):
        some = examples[start : start + TOGETHER]
        places = list(range(start, start + len(some)))
        prompts, own = [encoder.prompt(e.prompt) for e in some], counter_seed(seed, "preferences", split)
        rows = drawing.generate(prompts, DRAWS, sampling, seed=own, data_index=places)
        tokens = [row[mask].tolist() for row, mask in zip(rows.tokens.cpu(), rows.mask.cpu(), strict=True)]
        owners = [some[g] for g in rows.group.tolist()]
        texts = [encoder.decode(ids) for ids in tokens]
        replies = [reply(said, e) for said, e in zip(texts, owners, strict=True)]
        columns = {
            key: [e.columns.get(key) for e in owners] for key in dict.fromkeys(k for e in some for k in e.columns)
        }
        scores = score(task.rewards, [e.prompt for e in owners], replies, tokens, columns, rows.group)
        total = scores.values.nansum(1).tolist()
        for g, place in enumerate(places):
            mine = (rows.group == g).nonzero().flatten().tolist()
            said = {texts[i]: float(total[i]) for i in mine if not bool(scores.failed[i])}
            found.append(Drawn(place, tuple(said), tuple(said.values())))
        report("progress", {"done": start + len(some), "total": len(examples)})
    return found


def _made(example: Example, drawn: Drawn, kind: Kind, task: Task) -> list[Preference]:
    """What is compared of one prompt; nothing where all is equally good."""
    ranks = drawn.ranks()
    if len(set(ranks)) < 2:
        return []
    sides = [reply(text, example) for text in drawn.completions]
    best, worst = ranks.index(max(ranks)), ranks.index(min(ranks))
    known: dict[str, Any] = {"index": 0, "domain": example.domain, "columns": dict(example.columns)}
    if kind == "pairs":
        if (gold := task.solution(example, 0)) is not None:
            known["columns"][GOLD] = reply(gold, example)
        rated = ranks[best], ranks[worst]
        return [Preference(example.prompt, (sides[best], sides[worst]), (1.0, 0.0), ratings=rated, **known)]
    if kind == "lists":
        return [Preference(example.prompt, tuple(sides), ranks, **known)]
    both = ((best, 1.0), (worst, 0.0)) if ranks[worst] == 0 else ()
    return [Preference(example.prompt, (sides[i],), (label,), **known) for i, label in both]
