"""What a comparison is asked for, its usual name, and the command that asks for it again."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keel.compare.arms import Swept
from keel.compare.outcomes import Budget
from keel.compare.plan import Conditions, digest
from keel.compare.record import folder_of
from keel.compare.tuning import Tuning
from keel.core.errors import ConfigError
from keel.train.setup import DEFAULT_TASK

BUDGET = "100steps"  # of a cell, where none is given: as many as each run of the demonstration
NAMED = 4  # recipes that the name of a comparison lists


@dataclass(frozen=True)
class Asked:
    """What a comparison is asked for; see `compare`."""

    recipes: tuple[str, ...]
    conditions: Conditions
    seeds: int = 3
    swept: Swept = field(default_factory=dict)
    tuning: Tuning | None = None
    name: str | None = None
    runs: Path = Path("runs")
    workers: int | None = None
    threads: int | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"must be at least 1 (got {self.seeds})", "--seeds")
        for name, value in (("--workers", self.workers), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1 (got {value})", name)

    @property
    def folder(self) -> Path:
        """Of the comparison."""
        return folder_of(self.runs, self.name or default_name(self))

    @property
    def command(self) -> str:
        """What asks for the same in a terminal."""
        c = self.conditions
        words = ["keel", "compare", *self.recipes, "--seeds", str(self.seeds), "--budget", c.budget.typed]
        for flag, value in (("--task", c.task), ("--model", c.model), ("--data", c.data), ("--name", self.name)):
            words += [] if value is None else [flag, str(value)]
        words += [word for reward in c.rewards for word in ("--reward", reward)]
        words += [word for key, value in c.settings for word in ("--set", f"{key}={_yaml(value)}")]
        words += [word for key, some in self.swept.items() for word in ("--param", f"{key}={_listed(some)}")]
        if self.tuning is not None:
            values = f"={_listed(self.tuning.values)}" if self.tuning.values else ""
            words += ["--tune", f"{self.tuning.name}{values}"]
        words += [] if self.runs == Path("runs") else ["--runs", str(self.runs)]
        return shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        """What another comparison of the same name must share."""
        tuning = None if self.tuning is None else {"name": self.tuning.name, "values": list(self.tuning.values)}
        return {**self.conditions.to_json(), "tune": tuning}


def default_name(asked: Asked) -> str:
    """Recipes, and what is not as usual."""
    conditions = asked.conditions
    short = [recipe.rpartition(":")[2] for recipe in asked.recipes]
    parts = [*short[:NAMED], *([f"and-{len(short) - NAMED}-more"] if len(short) > NAMED else [])]
    task = conditions.task or DEFAULT_TASK
    if task != DEFAULT_TASK:
        parts.insert(0, task.rpartition(":")[2])
    if conditions.budget != Budget.parse(BUDGET):
        parts.append(_compact(conditions.budget))
    own = [place for place in (*asked.recipes, task) if ":" in place]
    rest = [conditions.model, conditions.data, conditions.rewards, conditions.settings, dict(asked.swept), asked.tuning]
    if any(rest) or own or len(short) > NAMED:
        parts.append(digest([asked.recipes, task, rest], 3))
    return "-".join(parts)


def _compact(budget: Budget) -> str:
    """As it stands in the name of a folder.

    >>> _compact(Budget(200000, "tokens")), _compact(Budget(300, "seconds"))
    ('200000-tokens', '5min')
    """
    return str(budget).replace(",", "").replace(" ", "-")


def _yaml(value: Any) -> str:
    """As it stands behind `--set KEY=`."""
    return value if isinstance(value, str) else json.dumps(value)


def _listed(values: Sequence[Any]) -> str:
    return ",".join(_yaml(value) for value in values)
