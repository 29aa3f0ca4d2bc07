"""One run as its page shows it; what takes long is kept until something new is stored about the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from markupsafe import Markup

from keel.report.figures import Figure
from keel.report.run import abilities, findings_list, run_data, tiles, training_figures
from keel.store.records import StoredRun
from keel.store.store import Store

KEPT = 64  # runs whose bootstrap intervals are kept
HEARD = 120  # seconds without news after which a run that should be going on is doubted


@dataclass(frozen=True, eq=False)
class RunView:
    """What a page says of a run beside its configuration.

    Args:
        tiles, findings, abilities: HTML.
        figures: curves of training.
        last: the last step with a metric.
        rollouts: whether completions are stored.
    """

    tiles: Markup
    findings: Markup
    abilities: Markup
    figures: Sequence[Figure | None]
    last: int
    rollouts: bool


@lru_cache(maxsize=KEPT)
def view(file: Path, folder: Path, name: str, updated: float) -> RunView:
    """A run from its store.

    Args:
        file: the store.
        folder: of all runs.
        name: of the run.
        updated: when it was last heard of; another value is another view.
    """
    with Store(file, readonly=True) as store:
        run = store.run(name)
        data = run_data(store, run, folder / name)
    return RunView(
        tiles=Markup(tiles(data)),
        findings=Markup(findings_list(data.findings())),
        abilities=Markup("\n".join(abilities(data))),
        figures=[figure for figure in training_figures(data.metrics) if figure is not None],
        last=last_step(data.metrics),
        rollouts=bool(data.rollouts),
    )


def last_step(metrics: Mapping[str, Sequence[tuple[int, float]]]) -> int:
    """The last step of any curve; -1 without any."""
    return max((curve[-1][0] for curve in metrics.values() if curve), default=-1)


def planned_steps(run: StoredRun) -> int | None:
    """How many steps its configuration has; None where it does not say."""
    train = (run.config or {}).get("train")
    steps = train.get("max_steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) and steps > 0 else None
