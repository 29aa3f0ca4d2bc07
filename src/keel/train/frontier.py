"""`keel eval --method`: several samplers at several budgets on the same prompts, accuracy against tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keel.core.choice import counter_seed
from keel.evaluate.cost import NUMBERS, Curve, point
from keel.sampling.catalogue import accepts, entry_named
from keel.tasks.task import Example
from keel.train.draws import Account
from keel.train.sampling import Bench
from keel.train.session import Reporter, silent


@dataclass(frozen=True)
class Request:
    """A sampler and the budgets that it is given.

    Args:
        method: its name.
        sizes: values of the setting that makes the budget, its `knob`.
        options: its other settings.
        label: for people; the method's name without it.
        family: under which it is drawn.
    """

    method: str
    sizes: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    family: str = ""


def frontier(
    bench: Bench,
    examples: Sequence[Example],
    requests: Sequence[Request],
    *,
    seeds: int = 1,
    seed: int = 0,
    threshold: float = 0.5,
    report: Reporter = silent,
) -> list[Curve]:
    """Run every request on every prompt with every seed.

    Args:
        bench: policy, rewards and what samplers need.
        examples: prompts, the same for all.
        requests: samplers and budgets.
        seeds: runs of each.
        seed: of the first; the others are derived from it.
        threshold: an output is correct if its reward is above this.
        report: called with (event, facts).
    """
    cells = [(request, size) for request in requests for size in request.sizes]
    for request in requests:  # predictions are learnt and settings refused before anything is measured
        bench.sampler(request.method, _options(request, request.sizes[0]))
    report("phase", {"name": "samplers", "steps": len(cells), "text": f"{len(requests)} samplers"})
    found: dict[int, list[Any]] = {}
    for done, (request, size) in enumerate(cells, start=1):
        runs = [
            bench.run(request.method, _options(request, size), examples, counter_seed(seed, "frontier", i))
            for i in range(seeds)
        ]
        found.setdefault(id(request), []).append(_point(size, runs, threshold, seed))
        report("progress", {"done": done, "total": len(cells)})
    report("done", {})
    return [Curve(request.label or request.method, request.family, tuple(found[id(request)])) for request in requests]


def _options(request: Request, size: int) -> dict[str, Any]:
    return {**request.options, entry_named(request.method).knob: size}


def _point(size: int, runs: list[list[Account]], threshold: float, seed: int) -> Any:
    correct = np.array([[float(a.pick.reward > threshold) for a in accounts] for accounts in runs])
    numbers: dict[str, list[list[float]]] = {
        name: [[float(getattr(a, name)) for a in accounts] for accounts in runs] for name in NUMBERS[:-1]
    }
    numbers["seconds"] = [[a.seconds for a in accounts] for accounts in runs]
    return point(size, correct, numbers, runs[0][0].kl_is_bound, seed)


def shared_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of several methods' options that this one has."""
    return {key: value for key, value in options.items() if accepts(method, key)}
