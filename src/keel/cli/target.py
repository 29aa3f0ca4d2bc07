"""`keel target`: which distribution do these settings ask for?"""

import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from keel.core.errors import ConfigError
from keel.report.target import TargetReport
from keel.train.target import target

SHOWN = 8  # answers printed of a prompt
COLUMNS = 6  # targets of which the masses are printed
PROMPTS = 4  # prompts printed


def run_target(options: Mapping[str, Any], as_json: bool, html: Path | None) -> None:
    """Compute the targets from the options of the command, and print or write them."""
    given = dict(options)
    sampled = any(given.get(key) is not None for key in ("model", "task", "data"))
    for key in ("ref", "beta", "kl_budget", "best_of", *(() if sampled else ("reward",))):
        given[key] = numbers(given[key], f"--{key.replace('_', '-')}")
    for key in ("names", "modes"):
        given[key] = None if given[key] is None else [part for text in given[key] for part in text.split(",")]
    given["moments"] = moments(given["moments"])
    given["reward"] = tuple(given["reward"]) if sampled and given["reward"] else given["reward"]
    found = _sampling(given, as_json) if sampled else target(**given)
    if html is not None:
        found.write_html(html, shlex.join(["keel", *sys.argv[1:]]))
    print(json.dumps(found.to_json(), indent=1, allow_nan=False)) if as_json else print_target(found)
    if html is not None and not as_json:
        print(f"page    {html}")


def _sampling(given: Mapping[str, Any], as_json: bool) -> TargetReport:
    from keel.cli.show import quiet_or_bars  # late: numbers need no model

    report = quiet_or_bars(as_json)
    report("phase", {"name": "target", "steps": None, "text": "sampling the reference"})
    found = target(**given, report=report)
    report("done", {})
    return found


def numbers(values: list[str] | None, where: str) -> list[float] | None:
    """`1,2,3`, fractions such as `1/8`, and sweeps `from:to:count`, evenly spaced in the logarithm.

    Raises:
        ConfigError: something that is no number.
    """
    if values is None:
        return None
    return [number for text in values for part in text.split(",") for number in _expanded(part.strip(), where)]


def _expanded(part: str, where: str) -> list[float]:
    try:
        if part.count(":") == 2:
            first, last, count = part.split(":")
            start, end, steps = math.log(float(first)), math.log(float(last)), int(count)
            return [math.exp(start + (end - start) * k / max(steps - 1, 1)) for k in range(steps)]
        over, slash, under = part.partition("/")
        return [float(over) / float(under) if slash else float(part)]
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"'{part}' is not a number", where, "Give numbers with commas, or a sweep such as 0.01:1:5."
        ) from None


def moments(values: list[str] | None) -> dict[str, float] | None:
    """`NAME=VALUE` options as a dictionary.

    Raises:
        ConfigError: no `=`, or no number after it.
    """
    out: dict[str, float] = {}
    for item in values or []:
        name, sign, text = item.rpartition("=")  # names may hold the sign themselves
        if not sign or not name:
            raise ConfigError("must be NAME=VALUE", f"--moment {item}", "For example --moment reward=0.9.")
        found: Callable[[list[str], str], list[float] | None] = numbers
        out[name] = (found([text], f"--moment {name}") or [math.nan])[0]
    return out or None


def print_target(found: TargetReport) -> None:
    """The table, the masses of the answers, and what they mean."""
    print(found.terminal(), end="\n\n")
    heads = ["reward", "ref", *(f"target {k}" for k in range(1, len(found.found) + 1))][: 2 + COLUMNS]
    for place, listed in enumerate(found.survey.prompts[:PROMPTS]):
        groups = found.groups(place)
        named = [(g, f"{g.name} ({g.outcomes})" if g.outcomes > 1 else g.name) for g in groups[:SHOWN]]
        title = listed.prompt or "answers"
        width = max(len(title), *(len(name) for _, name in named)) + 2
        print(f"{title:<{width}}" + "".join(f"{head:>10}" for head in heads))
        for group, name in named:
            cells = [f"{group.reward:10.4g}", *(f"{mass:10.4f}" for mass in group.masses[: 1 + COLUMNS])]
            print(f"{'*' if group.good else ' '} {name:<{width - 2}}" + "".join(cells))
        rest = len(groups) - len(named)
        print(f"  ({rest} more)\n" if rest else "")
    for sentence in found.findings():
        print(f"- {sentence}")
