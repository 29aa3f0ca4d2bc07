"""The demonstration: GRPO on countdown without and with a KL to the reference, measured in the same way."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel.cli.show import print_json, quiet_or_bars
from keel.core.plain import finite
from keel.evaluate.evaluation import Evaluation
from keel.report.arms import Arm
from keel.train.entry import train
from keel.train.lifecycle import Run
from keel.train.session import Reporter

BETAS = (0.03, 0.1, 0.3)
STEPS = 100  # of each run: with the built-in base some six minutes in all on two cores
PROBE = 20  # steps that tell how long a supervised step takes
REGULARISED = 0.1  # the one that `after_regularised` of the summary holds


@dataclass(frozen=True)
class Plan:
    """One training run of the demonstration.

    Args:
        name: of its folder.
        label: in the table.
        recipe: what trains it.
        beta: coefficient of the KL; 0 for none.
        settings: further ones.
    """

    name: str
    label: str
    recipe: str
    beta: float
    settings: dict[str, Any]


def run_demo(runs: Path, seed: int, max_steps: int | None, control: bool, as_json: bool) -> dict[str, Any]:
    """Train every arm, write `runs/demo`, and print the table.

    The runs are `demo/grpo`, `demo/grpo_kl_0.03` and so on, in `runs`; those of an earlier demonstration are replaced.
    """
    report = quiet_or_bars(as_json)
    folder = runs / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    steps = {"train.max_steps": STEPS if max_steps is None else max_steps}
    # KL(ref || policy), the direction that holds on to what the reference could do
    plans = [Plan("grpo", "GRPO", "grpo", 0.0, steps)]
    plans += [Plan(f"grpo_kl_{b:g}", f"GRPO, KL {b:g}", "grpo_forward_kl", b, steps | {"beta": b}) for b in BETAS]
    arms: list[Arm] = []
    before: Evaluation | None = None
    for plan in plans:
        first = before is None
        run = _train(plan, folder, seed, first, report)
        if first:
            before = run.evaluations["before"]
            arms.append(Arm("base", "base", before))
        arms.append(Arm(plan.name, plan.label, run.evaluations["after"], plan.beta, run.summary["seconds"]))
        if first and control:
            arms.append(_control(run, folder, seed, report))
    report("done", {})
    summary = _write(folder, arms, seed)
    if as_json:
        print_json(summary)
    else:
        _print(folder, arms)
    return summary


def _train(plan: Plan, folder: Path, seed: int, first: bool, report: Reporter) -> Run:
    settings: dict[str, Any] = {
        "evaluate.before": first,
        "train.save_steps": 0,
        "train.log_completions": 0,
        **plan.settings,
    }
    return train(
        plan.recipe,
        task="countdown",
        seed=seed,
        name=plan.name,
        runs=folder,
        report=_silenced(report),
        **settings,
    )


def _control(run: Run, folder: Path, seed: int, report: Reporter) -> Arm:
    """Supervised training for as long as the plain run took: what solutions to imitate would have given.

    A short run tells how long a step takes, so that the schedule can be laid out beforehand.
    """
    settings: dict[str, Any] = {
        "train.batch_size": 128,
        "train.learning_rate": 5e-4,
        "train.lr_scheduler": "cosine",
        "train.lr_final": 0.1,
        "train.save_steps": 0,
        "train.log_completions": 0,
        "evaluate.before": False,
    }
    probe = Plan("sft_probe", "", "sft", 0.0, settings | {"train.max_steps": PROBE, "evaluate.after": False})
    each = float(_train(probe, folder, seed, False, report).summary["seconds"]) / PROBE
    steps = max(1, int(float(run.summary["seconds"]) / each))
    done = _train(Plan("sft", "", "sft", 0.0, settings | {"train.max_steps": steps}), folder, seed, False, report)
    return Arm("sft", "supervised", done.evaluations["after"], None, done.summary["seconds"])


def _silenced(report: Reporter) -> Reporter:
    """The reporter without the end of a run, since more runs follow."""
    return lambda event, facts: None if event == "done" else report(event, facts)


def _write(folder: Path, arms: list[Arm], seed: int) -> dict[str, Any]:
    from keel.report.demo import write_demo, write_picture

    by_beta = {arm.beta: arm for arm in arms if arm.name != "sft"}
    wanted = {"before": by_beta[None], "after": by_beta[0.0], "after_regularised": by_beta[REGULARISED]}
    summary: dict[str, Any] = {"seed": seed, **{key: _values(arm) for key, arm in wanted.items()}}
    summary["arms"] = [{"label": arm.label, "beta": arm.beta, "seconds": arm.seconds, **_values(arm)} for arm in arms]
    (folder / "summary.json").write_text(json.dumps(finite(summary), indent=1), encoding="utf-8")
    write_demo(folder / "report.html", arms)
    write_picture(folder / "demo.svg", arms)
    return summary


def _values(arm: Arm) -> dict[str, Any]:
    """Values by name, and their intervals."""
    metrics = arm.evaluation.metrics
    return {name: interval.value for name, interval in metrics.items()} | {
        "intervals": {name: [interval.low, interval.high] for name, interval in metrics.items()}
    }


def _print(folder: Path, arms: list[Arm]) -> None:
    from rich.console import Console

    from keel.report.demo import findings
    from keel.report.terminal import demo_table

    console = Console()
    console.print(demo_table(arms))
    for sentence in findings(arms):
        console.print(f"- {sentence}", highlight=False)
    console.print(f"report   {folder / 'report.html'}", highlight=False)
    console.print(f"picture  {folder / 'demo.svg'}", highlight=False)
