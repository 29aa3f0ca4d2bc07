"""What a comparison is made of: arms, a budget, and the outcome of every cell (an arm with a seed)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from keel.core.errors import ConfigError

Unit = Literal["tokens", "seconds", "steps"]
Status = Literal["finished", "failed", "missing"]
_UNITS: dict[str, tuple[Unit, float]] = {
    "tokens": ("tokens", 1.0),
    "steps": ("steps", 1.0),
    "s": ("seconds", 1.0),
    "sec": ("seconds", 1.0),
    "min": ("seconds", 60.0),
    "h": ("seconds", 3600.0),
}
_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Budget:
    """What every arm may spend on training: tokens through the policy, seconds of training, or steps.

    Args:
        amount: how much, above 0.
        unit: of what.
    """

    amount: float
    unit: Unit

    @staticmethod
    def parse(text: str) -> Budget:
        """From "200k-tokens", "5min", "90s" or "100steps"; a hyphen or a space before the unit may stand or not.

        Raises:
            ConfigError: it is none of these.

        >>> Budget.parse("200k-tokens")
        Budget(amount=200000.0, unit='tokens')
        """
        plain = re.sub(r"(?<=\w)[-_ ](?=\w)", "", text.strip().lower())
        number = plain.rstrip("abcdefghijklmnopqrstuvwxyz")
        letters = plain[len(number) :]
        for name, (unit, scale) in sorted(_UNITS.items(), key=lambda item: -len(item[0])):
            forms = {name, name.removesuffix("s")} if name in ("tokens", "steps") else {name}
            for form in forms:
                factor = letters.removesuffix(form)
                allowed = _FACTORS if unit == "tokens" else {"": 1.0}
                if letters.endswith(form) and factor in allowed:
                    try:
                        amount = float(number) * allowed[factor] * scale
                    except ValueError:
                        break
                    if math.isfinite(amount) and amount > 0:
                        return Budget(amount, unit)
        raise ConfigError(f"cannot be read: '{text}'", "--budget", "For example 200k-tokens, 5min or 100steps.")

    @property
    def typed(self) -> str:
        """As one word behind `--budget`.

        >>> Budget(200000, "tokens").typed, Budget(300, "seconds").typed, Budget(2, "steps").typed
        ('200000-tokens', '5min', '2steps')
        """
        return str(self).replace(",", "").replace(" ", "" if self.unit == "steps" else "-")

    def __str__(self) -> str:
        if self.unit == "seconds":
            return f"{self.amount / 60:g}min" if self.amount % 60 == 0 else f"{self.amount:g}s"
        return f"{self.amount:,.0f} {self.unit}"


@dataclass(frozen=True)
class Arm:
    """A recipe with the settings that it is given in this comparison.

    Args:
        name: unique within the comparison: the recipe, with the settings that set it apart ("grpo beta=0.04").
        recipe: its name in the registry.
        settings: `--set` paths and values that this arm alone has, sorted.
    """

    name: str
    recipe: str
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a cell.

    Args:
        arm: name of its arm.
        seed: its seed.
        status: finished, failed (see `error`), or missing (not run yet).
        run: name of its run in the store.
        error: why it failed, one line.
        values: held-out numbers after training, one for each prompt, by metric ("pass@1", "kl", ...); NaN where a
            prompt has none. The same prompts in the same order in every cell.
        before: the same before training.
        curves: training metrics, {name: [(step, value)]}; "num_tokens" and "seconds" are cumulative.
        tokens, seconds, steps: what training spent.
    """

    arm: str
    seed: int
    status: Status = "missing"
    run: str = ""
    error: str = ""
    values: Mapping[str, Float[np.ndarray, "N"]] = field(default_factory=dict)
    before: Mapping[str, Float[np.ndarray, "N"]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0


@dataclass(frozen=True, eq=False)
class Comparison:
    """Arms under equal conditions, with all that is known of their cells.

    Args:
        name: of the comparison, and of its folder.
        arms: the first is the baseline against which the others are held.
        seeds: those of every arm.
        task, model: what all arms share.
        budget: what each cell may spend.
        settings: `--set` paths that all arms share.
        outcomes: one for each arm and seed, in any order.
        tuned: for arms whose strength was tuned, the chosen values and what the trials gave, in words.
        created: seconds since 1970.
    """

    name: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    task: str
    model: str
    budget: Budget
    settings: tuple[tuple[str, Any], ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    tuned: Mapping[str, str] = field(default_factory=dict)
    created: float = 0.0

    def of(self, arm: str) -> list[Outcome]:
        """The finished cells of an arm, by seed."""
        found = [o for o in self.outcomes if o.arm == arm and o.status == "finished"]
        return sorted(found, key=lambda o: o.seed)

    @property
    def failed(self) -> list[Outcome]:
        """Cells that failed, in the order of arms and seeds."""
        places = {arm.name: place for place, arm in enumerate(self.arms)}
        return sorted((o for o in self.outcomes if o.status == "failed"), key=lambda o: (places[o.arm], o.seed))

    def scores(self, arm: str, metric: str) -> dict[int, Float[np.ndarray, "N"]]:
        """A metric of the finished cells of an arm, for each prompt, by seed; cells that did not measure it are out."""
        return {o.seed: np.asarray(o.values[metric], dtype=float) for o in self.of(arm) if metric in o.values}
