"""`make samplers`: accuracy against tokens of every sampler on countdown, for docs/sampling.md."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import keel
from benchmarks.measuring import ROOT
from benchmarks.page import BEGIN, END, processor
from keel.evaluate.cost import Curve
from keel.models.tiny import TinyConfig
from keel.report.cost import cost_table, write_cost, write_cost_picture
from keel.sampling.catalogue import SAMPLERS
from keel.tasks.load import load_task
from keel.train.base import BaseRecipe, ensure_base
from keel.train.entry import export
from keel.train.frontier import Request, frontier
from keel.train.progress import default_reporter
from keel.train.sampling import Bench, Beside, opened

PAGE, PICTURE, DATA = (ROOT / "docs" / f"sampling.{kind}" for kind in ("md", "svg", "json"))
SIZES, FEW = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8)
SMALL = BaseRecipe(TinyConfig(dim=64, layers=2, heads=2, feed_forward=192), steps=400)
WHOLE, PARTICLES, GUIDED, SEARCH, SEVERAL = (
    "Whole completions",
    "Particles",
    "Guided by a value",
    "Trees and searches",
    "Several policies or rounds",
)


def requests() -> list[tuple[Request, bool]]:
    """Every sampler with its budgets, and whether it is given the learnt value."""

    def ask(method, family, sizes=SIZES, value=False, label="", **options):
        return Request(method, sizes, options, label or method, family), value

    return [
        ask("best_of_n", ""),
        ask("soft_best_of_n", WHOLE),
        ask("rejection", WHOLE, (1, 2, 4, 8), bound=1.0, max_samples=64, label="rejection, at most 64"),
        ask("quasi_rejection", WHOLE, (1, 2, 4, 8), max_samples=64, label="quasi_rejection, at most 64"),
        ask("adaptive_best_of_n", WHOLE, output="best", stop_below=0.45),
        ask("smc", PARTICLES),
        ask("smc", PARTICLES, value=True, label="smc + value"),
        ask("twisted_smc", PARTICLES, FEW, value=True, k=4, label="twisted_smc + value"),
        ask("particle_filter", PARTICLES, value=True, label="particle_filter + value"),
        ask("entropic_particle_filter", PARTICLES, value=True, label="entropic_particle_filter + value"),
        ask("particle_gibbs", PARTICLES, (2, 4, 8, 16), value=True, num_sweeps=2, label="particle_gibbs + value"),
        ask("soft_value_decoding", GUIDED, (1, 2, 4, 8, 16), value=True, label="soft_value_decoding + value"),
        ask(
            "value_augmented",
            GUIDED,
            (1, 2, 4),
            value=True,
            k=8,
            beta=0.3,
            reweight=True,
            label="value_augmented + value",
        ),
        ask("beam_search", GUIDED, (1, 2, 4, 8), value=True, label="beam_search + value"),
        ask("beam_search", SEARCH, SIZES, label="beam_search"),
        ask("tree_sampling", SEARCH, SIZES, expansion="draw"),
        ask("tree_search", SEARCH, SIZES, expansion="draw", c_uct=2.0),
        ask("introspection", SEARCH, FEW, cost=0.003, every=3, output="best"),
        ask("dynamic_logit_fusion", SEVERAL, (1,), base="small", experts=("expert",)),
        ask("uscd", SEVERAL, (1,), other="small"),
        ask("cfg", SEVERAL, (1,), other="unconditional", gamma=1.2),
        ask("v_reason", SEVERAL, (1,)),
        ask("parallel_distil_refine", SEVERAL, (2, 4, 8)),
    ]


def models(report) -> dict[str, Beside]:
    """A small base, the same after further training, and the policy without its prompt."""
    small = ensure_base(load_task("countdown"), SMALL, report)
    expert = small.parent / f"expert-{small.name}"
    if not expert.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            settings = {"max_steps": 400, "batch_size": 128, "learning_rate": 1e-3, "lr_scheduler": "cosine"}
            settings |= {"evaluate.before": False, "evaluate.after": False}
            run = keel.train("sft", model=str(small), task="countdown", runs=folder, report=report, **settings)
            export(run.path, expert)
    return {"small": Beside(str(small)), "expert": Beside(str(expert)), "unconditional": Beside(None, "=")}


def measure(
    wanted: Sequence[str], prompts: int, seeds: int, known: dict[str, Curve], report
) -> tuple[dict[str, Curve], dict[str, dict]]:
    """Curves by label, and what the predictions were like."""
    with opened("tiny", "countdown", beside=models(report), report=report) as (bench, examples):
        some = examples[:prompts]
        value = bench.learnt("soft", 0.1)
        for request, with_value in requests():
            if wanted and request.method not in wanted and request.label not in wanted:
                continue
            bench.value = value if with_value else None
            begun = time.monotonic()
            known[request.label] = frontier(bench, some, [request], seeds=seeds)[0]
            print(f"{request.label:<36} {time.monotonic() - begun:6.1f} s", flush=True)
        return known, facts_of(bench)


def facts_of(bench: Bench) -> dict[str, dict]:
    """What was learnt from how much."""
    return {name: entry[1] for name, entry in bench.fitted.items() if isinstance(entry, tuple)}


def write(curves: Sequence[Curve], facts: dict) -> None:
    """The picture, the data, and the table between the markers of the page."""
    write_cost_picture(PICTURE, curves)
    DATA.write_text(json.dumps({"curves": [c.to_json() for c in curves], "facts": facts}, indent=1) + "\n")
    head, rows = cost_table(curves)
    first = curves[0].points[0]
    learnt = "; ".join(f"{name}: " + ", ".join(_said(k, v) for k, v in f.items()) for name, f in facts.items())
    lines = [
        f"Measured on {processor()}, one thread: {first.prompts} held-out prompts,",
        f"{first.seeds} runs of each, 95% bootstrap intervals over prompts. Tokens, ESS, log Z, KL and milliseconds",
        f"are means for one prompt. Learnt from samples of the policy: {learnt}.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|--:|---|{'--:|' * (len(head) - 3)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    text = PAGE.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{PAGE} has no line {BEGIN!r} or no line {END!r}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{after}")


def _said(name: str, value: float) -> str:
    return f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.3g}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__)
    parser.add_argument("what", nargs="*", help="samplers; all without any")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--html", type=Path, help="write the interactive plot, too")
    parser.add_argument(
        "--write", action="store_true", help="put all into docs/sampling.md; what is not measured stays"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    unknown = set(arguments.what) - {r.label for r, _ in requests()} - set(SAMPLERS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    stored = json.loads(DATA.read_text()) if DATA.is_file() and arguments.what else {"curves": [], "facts": {}}
    known = {row["name"]: Curve.from_json(row) for row in stored["curves"]}
    begun = time.monotonic()
    known, facts = measure(arguments.what, arguments.prompts, arguments.seeds, known, default_reporter())
    curves = [known[request.label] for request, _ in requests() if request.label in known]
    head, rows = cost_table(curves)
    for row in [head, *rows]:
        print("  ".join(cell.rjust(9) if i else cell.ljust(36) for i, cell in enumerate(row)))
    minutes = (time.monotonic() - begun) / 60
    if arguments.write:
        write(curves, {**stored["facts"], **facts})
        print(f"{PAGE} and {PICTURE} are written", file=sys.stderr)
    if arguments.html:
        write_cost(arguments.html, curves, "python -m benchmarks.samplers")
    print(f"{minutes:.1f} minutes", file=sys.stderr)


if __name__ == "__main__":
    main()
