"""The evidence that comes with Keel: `src/keel/compare/evidence.json`, read by `keel recommend`."""

import json
import math
from collections.abc import Sequence
from typing import Any

from benchmarks import plan
from benchmarks.cells import BASE
from benchmarks.evidence import Arm, Evidence
from benchmarks.halving import arm_of
from benchmarks.measuring import ROOT
from keel.evaluate.intervals import Interval
from keel.recipes.registry import recipe_named

FILE = ROOT / "src" / "keel" / "compare" / "evidence.json"
MEASURES = ("pass@1", "pass@16", "kl")


def packaged(evidence: Evidence, names: Sequence[str]) -> dict[str, Any]:
    """By task: the base, and of each recipe at its defaults means with 95% intervals, its gain over the base paired by
    seed and prompt, its differences from the recipe that it varies, and the seconds of a step."""
    tasks: dict[str, Any] = {}
    for task in plan.tasks():
        base = arm_of(plan.cell(BASE, task))
        if not evidence.has(base):
            continue
        settings = dict(plan.settings(task))
        tasks[task] = {
            "steps": settings["train.max_steps"],
            "completions": settings["rollout.num_prompts"] * settings["rollout.num_generations"],
            "base": {name: _numbers(evidence.measure(base, name)) for name in MEASURES[:2]},
            "recipes": {
                name: _recipe(evidence, arm_of(plan.cell(name, task)), base) | _against(evidence, name, task)
                for name in names
                if evidence.has(arm_of(plan.cell(name, task)))
            },
        }
    return {"machine": f"{evidence.processor()}, one thread", "tasks": tasks}


def _recipe(evidence: Evidence, arm: Arm, base: Arm) -> dict[str, Any]:
    seconds = [t["step"] for t in evidence.times.get(arm, {}).values() if t.get("step")]
    if evidence.apart(arm):  # of another processor: grpo's on the usual one, as many times as it takes there
        grpo = Arm("grpo", arm.task)
        known = [t["step"] * evidence.time_ratio(arm, grpo) for t in evidence.times.get(grpo, {}).values()]
        seconds = [step for step in known if math.isfinite(step)]
    return {
        "seeds": len(evidence.seeds(arm)),
        "settings": dict(arm.arguments),
        **{name: _numbers(evidence.measure(arm, name)) for name in MEASURES},
        "gain": _numbers(evidence.difference(arm, base, "pass@1")),
        "step": round(sorted(seconds)[len(seconds) // 2], 3) if seconds else None,
    }


def _against(evidence: Evidence, name: str, task: str) -> dict[str, Any]:
    """Differences from the nearest measured recipe of those that it varies, else from grpo, paired like the gain."""
    baseline = recipe_named(name).baseline
    while baseline is not None and not evidence.has(arm_of(plan.cell(baseline, task))):
        baseline = recipe_named(baseline).baseline
    other = baseline or "grpo"
    arm, against = arm_of(plan.cell(name, task)), arm_of(plan.cell(other, task))
    if name == other or not evidence.has(against):
        return {}
    return {"against": other, "more": {m: _numbers(evidence.difference(arm, against, m)) for m in MEASURES}}


def _numbers(interval: Interval) -> list[float | None]:
    return [round(x, 4) if math.isfinite(x) else None for x in (interval.value, interval.low, interval.high)]


def write(evidence: Evidence, names: Sequence[str]) -> None:
    """The file in the package."""
    data = packaged(evidence, names)
    lines = [f' "machine": {json.dumps(data["machine"])},', ' "tasks": {']
    for place, (task, found) in enumerate(data["tasks"].items()):
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(found[key])}" for key in found if key != "recipes")
        rows = [f"   {json.dumps(name)}: {json.dumps(one)}" for name, one in found["recipes"].items()]
        end = "" if place == len(data["tasks"]) - 1 else ","
        lines += [f'  {json.dumps(task)}: {{{head}, "recipes": {{', ",\n".join(rows), f"  }}}}{end}"]
    FILE.write_text("\n".join(["{", *lines, " }", "}"]) + "\n", encoding="utf-8")
