"""Comparisons on disk, as `keel compare` leaves them, made of known outcomes."""

import math

from keel.compare.outcomes import Comparison
from keel.compare.record import Record, folder_of, place
from keel.store.store import Store


def store_comparison(runs, comparison: Comparison, status="finished", name=None, **more):
    """Write the record of a comparison and the runs of its cells; the record.

    Finished outcomes become finished runs, failed ones an error in the record, missing ones nothing.
    """
    folder = folder_of(runs, name or comparison.name)
    conditions = {"budget": str(comparison.budget), "settings": dict(comparison.settings), "task": comparison.task}
    record = Record(
        folder, conditions, comparison.task, comparison.model, comparison.arms, comparison.seeds, status=status, **more
    )
    record.created = comparison.created
    with Store(runs / "keel.sqlite") as store:
        for outcome in comparison.outcomes:
            entry = record.cells[place(outcome.arm, outcome.seed)] = {"run": outcome.run, "key": outcome.run[-12:]}
            if outcome.status == "failed":
                entry |= {"error": outcome.error, "log": str(folder / "cells" / f"{outcome.run}.log")}
            if outcome.status == "finished":
                finish(store, comparison, outcome)
    record.write()
    return record


def finish(store, comparison, outcome, run=None):
    """The run of a finished cell; one that was begun goes on."""
    run = begin(store, comparison, outcome) if run is None else run
    steps = max(step for curve in outcome.curves.values() for step, _ in curve)
    for step in range(1, steps + 1):
        store.log_metrics(
            run, step, {name: curve[step - 1][1] for name, curve in outcome.curves.items() if name != "seconds"}
        )
    for phase, values in (("before", outcome.before), ("after", outcome.values)):
        store.log_evaluation(run, 0 if phase == "before" else steps, phase, evaluation(values))
    spent = {"num_tokens": outcome.tokens, "seconds": outcome.seconds, "steps": outcome.steps}
    store.finish(run, "finished", spent | {"after": {"pass@1": [float(outcome.values["pass@1"].mean()), None, None]}})


def begin(store, comparison, outcome, step=0):
    """The run of a cell that goes on, with a few steps."""
    recipe = next(arm.recipe for arm in comparison.arms if arm.name == outcome.arm)
    run = store.create_run(outcome.run, {}, recipe, comparison.task, comparison.model, outcome.seed)
    for at in range(1, step + 1):
        store.log_metrics(run, at, {"reward": 0.1})
    return run


def evaluation(values):
    """As `Evaluation.to_json` writes one."""
    prompts = len(next(iter(values.values())))
    means = {name: float(column.mean()) for name, column in values.items()}
    return {
        "prompts": prompts,
        "samples": 16,
        "errors": 0,
        "threshold": 0.5,
        "seed": 0,
        "metrics": {name: [mean, mean - 0.05, mean + 0.05] for name, mean in means.items()},
        "values": {name: [None if math.isnan(v) else float(v) for v in column] for name, column in values.items()},
        "index": list(range(prompts)),
        "completions": [],
    }
