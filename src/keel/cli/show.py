"""What the commands print."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from keel.core.config import to_config
from keel.core.plain import finite
from keel.train.configuration import Configuration
from keel.train.session import Reporter

SLOTS = (
    "rollout",
    "rewards",
    "transforms",
    "advantage",
    "heads",
    "surrogate",
    "aggregation",
    "masks",
    "weights",
    "terms",
    "models",
    "controllers",
    "replay",
)


def quiet_or_bars(as_json: bool) -> Reporter:
    """Bars for people, on standard error; for programs only warnings."""
    from keel.train.progress import default_reporter, plain_reporter

    return plain_reporter if as_json else default_reporter()


def print_json(data: Any) -> None:
    """JSON on standard output; null for numbers that JSON does not have."""
    print(json.dumps(finite(data), indent=1, allow_nan=False, default=str))


def print_composition(config: Configuration) -> None:
    """What is about to run, so that nobody runs one loss and believes it another."""
    print(composition(config), flush=True)


def composition(config: Configuration) -> str:
    """The slots in use, one line each."""
    method = config.method
    lines = [f"{config.recipe or 'method'}  seed {config.seed}  model {config.model.path}  run {config.name}"]
    for slot in SLOTS:
        value = getattr(method, slot)
        if value is None or value == {}:
            continue
        entries = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, item in entries:
            label = f"{slot}.{name}" if name else slot
            lines.append(f"  {label:<26} {one_line(to_config(item))}")
    return "\n".join(lines)


def one_line(data: Any) -> str:
    """A part as `name(key=value, ...)`, without what is None."""
    if isinstance(data, dict) and "part" in data:
        inner = ", ".join(f"{k}={one_line(v)}" for k, v in data.items() if k != "part" and v is not None and v != [])
        return f"{data['part']}({inner})"
    if isinstance(data, float):
        return f"{data:g}"
    return str(data)


def print_methods(as_json: bool) -> None:
    """All recipes."""
    from keel.recipes.registry import recipes

    listed = [recipe_facts(recipe) for recipe in recipes().values()]
    if as_json:
        print_json(listed)
        return
    width = max(len(facts["name"]) for facts in listed)
    for facts in listed:
        base = f" (varies {facts['baseline']})" if facts["baseline"] else ""
        print(f"{facts['name']:<{width}}  {facts['summary']}{base}")


def recipe_facts(recipe: Any) -> dict[str, Any]:
    """What `keel methods --json` says of a recipe."""
    method = recipe()
    slots = {}
    for slot in SLOTS:
        value = getattr(method, slot)
        if value is None or value == {}:
            continue
        slots[slot] = (
            {name: to_config(item)["part"] for name, item in value.items()}
            if isinstance(value, Mapping)
            else to_config(value)["part"]
        )
    return {
        "name": recipe.name,
        "paper": recipe.paper,
        "baseline": recipe.baseline,
        "kind": method.kind,
        "slots": slots,
        "arguments": {n: p.default for n, p in recipe.arguments.items()},
        "objective": method.claim.objective if method.claim else None,
        "summary": recipe.summary,
    }


def print_method(name: str, values: Mapping[str, Any], as_json: bool) -> None:
    """The complete configuration of a recipe."""
    from keel.train.configuration import Request, resolve

    config = resolve(Request(recipe=name, values=values))
    print_json(config.to_dict()) if as_json else print(config.to_yaml(), end="")


def print_run(run: Any, as_json: bool) -> None:
    """How a run ended."""
    if as_json:
        print_json({"path": str(run.path), **run.summary})
        return
    from rich.console import Console

    from keel.report.run import read_run
    from keel.report.terminal import evaluation_table, findings_text

    console = Console()
    if run.evaluations:
        console.print(evaluation_table(run.evaluations.get("before"), run.evaluations.get("after")))
    console.print(findings_text(read_run(run.path).findings()))
    print(f"model   {run.path / run.summary['checkpoint']}")
    print(f"report  {run.path / 'report.html'}")


def print_evaluation(evaluation: Any, as_json: bool) -> None:
    """Metrics with intervals, and the support against a base where it was measured."""
    if as_json:
        found = evaluation.to_json()
        print_json(found["metrics"] | ({"support": found["support"]} if "support" in found else {}))
        return
    from rich.console import Console

    from keel.report.terminal import evaluation_table

    Console().print(evaluation_table(evaluation))
    if evaluation.support is not None:
        print("\n" + support_text(evaluation.support))


def support_text(support: Any) -> str:
    """Correct answers kept, gained and lost, beside what chance does to the base alone."""
    names = {"srr": "kept of the base's", "ndr": "new of its own", "sds": "harmonic mean", "nscr": "net change"}
    lines = [f"{f'support by {support.classes}':<26} {'model':<24} {'base again':<24} beyond chance"]
    for name, meaning in names.items():
        columns = [str(side[name]) for side in (support.ratios, support.null, support.beyond_chance)]
        lines.append(f"{name.upper():<5}{meaning:<21} {columns[0]:<24} {columns[1]:<24} {columns[2]}".rstrip())
    for name in ("preserved", "gained", "lost"):
        lines.append(f"{name:<26} {support.counts[name]:<24} {support.null_counts[name]}")
    lines.append(f"{'':<26} {'model':<24} base")
    for name in ("correct_answers", "answer_entropy", "token_entropy"):
        policy, base = str(getattr(support.policy, name)), str(getattr(support.base, name))
        lines.append(f"{name.replace('_', ' '):<26} {policy:<24} {base}")
    lines.append(f"k = {support.k} samples find answers of probability {support.eps:.2g} with 95%")
    return "\n".join([*lines, *(f"warning: {text}" for text in support.warnings)])


def print_samples(samples: list[Any], as_json: bool) -> None:
    """Completions with their log-probabilities."""
    if as_json:
        print_json(
            [
                {"prompt": s.prompt, "completion": s.text, "log_prob": s.log_prob, "stop": s.stop}
                | ({} if s.reward is None else {"reward": s.reward})
                for s in samples
            ]
        )
        return
    for s in samples:
        earned = "" if s.reward is None else f"reward {s.reward:<7.4g}  "
        text = f"{s.prompt}{s.text}" if s.reward is None else repr(f"{s.prompt}{s.text}")
        print(f"{s.log_prob:9.3f}  {s.stop:<11}  {earned}{text}")


def print_accounts(accounts: list[Any], as_json: bool) -> None:
    """What a sampler drew for each prompt, heaviest first, and what it cost."""
    if as_json:
        print_json([asdict(account) for account in accounts])
        return
    for account in accounts:
        prompt = account.prompt if isinstance(account.prompt, str) else account.prompt[-1].get("content")
        print(f"{prompt!r}")
        same: dict[str, list[Any]] = {}
        for c in account.completions:
            same.setdefault(c.text, []).append(c)
        for text, group in sorted(same.items(), key=lambda item: -sum(c.weight for c in item[1])):
            weight, picked = sum(c.weight for c in group), any(c.picked for c in group)
            times = f"x{len(group)}" if len(group) > 1 else ""
            line = f"  {'>' if picked else ' '} {weight:6.3f} {times:<4} reward {group[0].reward:<7.4g}"
            print(f"{line} log p {group[0].log_prob:8.3f}  {text!r}")
        print(f"    {_cost(account)}")


def _cost(account: Any) -> str:
    parts = [f"{account.generated} tokens generated"]
    parts += [f"{account.scored} scored"] if account.scored else []
    parts += [f"{account.read} read again"] if account.read else []
    parts += [f"{account.rewards} rewards", f"ESS {account.ess:.1f}"]
    parts += [] if math.isnan(account.log_z) else [f"log Z {account.log_z:.3f} +- {account.log_z_error:.3f}"]
    parts += [] if math.isnan(account.kl) else [f"KL {'<= ' if account.kl_is_bound else ''}{account.kl:.3f}"]
    parts += [f"{name} {value:.4g}" for name, value in account.details.items() if math.isfinite(value)]
    return ", ".join([*parts, f"{1000 * account.seconds:.0f} ms"])


def print_samplers(as_json: bool) -> None:
    """The catalogue of samplers."""
    import keel.rollouts.samplers  # noqa: F401 (they join the catalogue)
    from keel.sampling.catalogue import SAMPLERS

    if as_json:
        print_json(
            {
                name: {"says": e.says, "law": e.law, "needs": e.needs or None, "paper": e.paper, "budget": e.knob}
                for name, e in SAMPLERS.items()
            }
        )
        return
    for name, entry in SAMPLERS.items():
        needs = f"  (needs: {entry.needs})" if entry.needs else ""
        print(f"{name:<26} {entry.says}{needs}\n{'':<26}   law: {entry.law}")


def print_curves(curves: list[Any], as_json: bool) -> None:
    """Accuracy of samplers against tokens, as a table."""
    if as_json:
        print_json([curve.to_json() for curve in curves])
        return
    from keel.report.cost import cost_table

    head, rows = cost_table(curves)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def print_facts(facts: Mapping[str, float], as_json: bool) -> None:
    """Names and numbers."""
    if as_json:
        print_json(dict(facts))
        return
    for name, value in facts.items():
        print(f"{name:<12} {value:.6g}")


def print_runs(folder: Path, as_json: bool) -> None:
    """The runs of a folder, the newest first."""
    from keel.store.store import Store

    file = folder / "keel.sqlite"
    found = []
    if file.is_file():
        with Store(file, readonly=True) as store:
            found = store.runs()
    if as_json:
        print_json(
            [
                {
                    "name": r.name,
                    "recipe": r.recipe,
                    "task": r.task,
                    "model": r.model,
                    "seed": r.seed,
                    "status": r.status,
                    "step": r.step,
                    "summary": r.summary,
                }
                for r in found
            ]
        )
        return
    if not found:
        print(f"no runs in {folder}")
    for r in found:
        after = (r.summary or {}).get("after") or {}
        score = after.get("pass@1")
        said = f"pass@1 {score[0]:.3f}" if score else ""
        print(f"{r.name:<28} {r.recipe:<18} {r.task:<14} seed {r.seed:<4} step {r.step:<6} {r.status:<9} {said}")


def print_dry_run(setup: Any, as_json: bool) -> None:
    """Composition, estimates and the first rendered prompts, without training."""
    from keel.cli.estimate import estimate

    facts = estimate(setup)
    if as_json:
        print_json({"config": setup.config.to_dict(), **facts})
        return
    print_composition(setup.config)
    sections = {name: section for name, section in setup.config.to_dict().items() if name in ("train", "task", "model")}
    print(yaml.safe_dump(sections, sort_keys=False).rstrip())
    for key in ("parameters", "trained_parameters"):
        print(f"{key.replace('_', ' '):<20} {facts[key]:,}")
    print(f"{'memory, estimated':<20} {facts['memory_gib']:.2f} GiB")
    print(f"{'time, estimated':<20} {facts['seconds_per_step']:.2f} s a step, {facts['minutes']:.1f} min in all")
    for note in setup.preferences.notes if setup.preferences is not None else ():
        print(f"warning: {note}")
    print("first batch:")
    for one in facts.get("comparisons", ()):
        print(f"  {one['prompt']!r}")
        for score, completion in zip(one["scores"], one["completions"], strict=True):
            print(f"    {score:>6g}  {completion!r}")
    for prompt, completion in () if "comparisons" in facts else facts["first_batch"]:
        print(f"  {prompt!r} -> {completion!r}")
