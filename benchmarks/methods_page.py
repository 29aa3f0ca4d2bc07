"""docs/methods.md and docs/methods.svg, made of finished cells."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from textwrap import fill

from benchmarks import plan
from benchmarks.cells import BASE
from benchmarks.choice import WISHES, answer
from benchmarks.claims import APPEARED, NOT, NOTHING, UNDECIDED, Verdict, effects, judge
from benchmarks.evidence import Arm, Evidence
from benchmarks.halving import BEST, TUNING_SEED, alike, reached
from benchmarks.measuring import ROOT
from keel.evaluate.intervals import Interval
from keel.report.arms import Look
from keel.report.picture import Panel, frame, mark
from keel.report.style import FONT, THEMES
from keel.verify.entry import verify
from keel.verify.recipes import HOLDS, SHORT
from keel.verify.recipes import NOTHING as NO_OBJECTIVE

PAGE, PICTURE = ROOT / "docs" / "methods.md", ROOT / "docs" / "methods.svg"
VERIFIED = ROOT / "docs" / "verification.md"
GRPO = Arm("grpo")
MEASURES = ("pass@1", "pass@16", "entropy", "kl", "length")

INTRODUCTION = """# Methods side by side

Every recipe trains the same base on the same prompts for the same number of steps and completions, and is measured on
the same held-out prompts. One command runs what is missing or of older code, and writes this page:

```console
make methods
```

{loop}.

Each run is a small file in `benchmarks/results/`; `python -m benchmarks.methods --list` says what is missing.
After a change of code, `--vouch` runs as few as show that it changed no number. Another processor may round otherwise,
and then trains another base: what began with that is marked † and compared with its baselines from the same, and
`--vouch --before FOLDER` runs the code before the change, of a checkout in FOLDER, beside that after it.

Differences are to GRPO with the same seed on the same prompts, with 95% intervals over seeds and prompts (over prompts
alone where there is one seed, which leaves out how much runs differ). The runs are short and the model is small: this
page says what an update does to a policy, and not what a method is worth at scale. All methods share one learning rate,
which was chosen for GRPO.
"""


def page(
    evidence: Evidence,
    names: Sequence[str],
    tuned: Mapping[str, str],
    left: Mapping[str, str],
    again: Sequence[Arm] = (),
) -> str:
    """The whole page as Markdown.

    Args:
        evidence: all finished cells.
        names: of the recipes.
        tuned: what was found for coefficients, in words, by recipe.
        left: recipes that are not run, and why.
        again: who ran with more seeds.
    """
    verdicts = [judge(effect, evidence) for effect in effects(names)]
    parts = [
        INTRODUCTION.format(loop=loop()),
        f"Measured on {evidence.processor()}, one thread.\n",
        *_choices(evidence, names),
        "## Countdown\n",
        "![pass@16 against pass@1 of every method](methods.svg)\n",
        *table(evidence, names, status_of(VERIFIED, names)),
        *_alike(evidence, names),
        *_again(evidence, again),
        *_tuned(tuned),
        *_others(evidence, names),
        *_claims(verdicts),
        *_left(evidence, left),
    ]
    return "\n".join(parts).rstrip() + "\n"


def loop() -> str:
    """The settings of the cells in words."""
    s = plan.LOOP
    return fill(
        f"{s['train.max_steps']} steps of {s['rollout.num_prompts']} prompts with {s['rollout.num_generations']} "
        f"completions, {s['train.num_minibatches']} updates each, learning rate {s['train.learning_rate']:g}; "
        f"{s['evaluate.num_prompts']} held-out prompts with {s['evaluate.num_generations']} completions",
        120,
    )


def _choices(evidence: Evidence, names: Sequence[str]) -> list[str]:
    arms = [arm for arm in evidence.numbers if arm.recipe in names]
    lines = [f"- {answer(wish, evidence, arms).sentence()}" for wish in WISHES]
    said = (
        "Taken from the numbers below. The best of many is in part the luckiest: where others cannot be told from it, "
        "choose among them by what else you need. For pass@16, entropy, KL and length only those take part whose "
        "pass@1 is not more than 0.03 below GRPO's."
    )
    return ["## Which one should I use?\n", fill(said, 120) + "\n", *lines, ""]


# -- tables ----------------------------------------------------------------------------------------------------------


def table(evidence: Evidence, names: Sequence[str], status: Mapping[str, str]) -> list[str]:
    """One row a method on the main task, by pass@1 above grpo's."""
    head = ["method", "verification", "pass@1", "to grpo", "pass@16", "to grpo", "entropy", "to grpo", "KL", "length"]
    lines = _head([*head, "time", "seeds"])
    known = [Arm(name, plan.MAIN, given(name)) for name in names]
    known = [arm for arm in known if evidence.has(arm)]
    known = ranked(evidence, known, Arm("grpo"))
    base = Arm("base")
    for arm in ([base] if evidence.has(base) else []) + known:
        cells = [_named(evidence, arm) if arm != base else "before training"]
        cells.append(f"[{status[arm.recipe]}](verification.md)" if arm.recipe in status else "")
        for name in MEASURES:
            cells.append(_number(evidence.measure(arm, name).value))
            if name in ("pass@1", "pass@16", "entropy"):
                cells.append("" if arm == GRPO else _signed(evidence.difference(arm, GRPO, name)))
        cells.append(_number(evidence.time_ratio(arm, GRPO), 2) if arm != base else "")
        lines.append(_row([*cells, str(len(evidence.seeds(arm)))]))
    return [*lines, "", fill(TABLE_NOTE, 120), "", *_apart(evidence, known)]


def _named(evidence: Evidence, arm: Arm) -> str:
    """Its label, with a dagger if it began with another base."""
    return f"`{arm.label}`{' †' if evidence.apart(arm) else ''}"


def _apart(evidence: Evidence, arms: Sequence[Arm]) -> list[str]:
    """What the dagger says."""
    some = [arm for arm in arms if evidence.apart(arm)]
    if not some:
        return []
    bases = dict.fromkeys(evidence.base(arm, seed) for arm in some for seed in evidence.seeds(arm))
    own = [evidence.elsewhere[base] for base in bases if base in evidence.elsewhere]
    grpo = " and ".join(_number(one.measure(GRPO, "pass@1").value) for one in own if one.has(GRPO))
    return [
        fill(
            f"† on {evidence.processor(*some)}, which rounds otherwise and so trained another base: the differences "
            f"and the time are to GRPO from that base there{f' (pass@1 {grpo})' if grpo else ''}.",
            120,
        )
        + "\n"
    ]


TABLE_NOTE = (
    "pass@16 is the unbiased estimate from all completions of a prompt. Entropy is in nats per token, the KL to the "
    "base in nats per completion, length in tokens, time that of the processor for a step over GRPO's. A difference "
    "is bold where its interval leaves out 0."
)


def _alike(evidence: Evidence, names: Sequence[str]) -> list[str]:
    """Recipes that cannot be told apart here, in a sentence."""
    groups = alike(evidence, names, plan.MAIN)
    if not groups:
        return []
    said = "; ".join(", ".join(f"`{name}`" for name in group) for group in groups)
    return [
        fill(
            f"The very same, prompt by prompt, as what they add never acts in these runs: {said}. `keel methods show` "
            "says what each needs.",
            120,
        )
        + "\n"
    ]


def _again(evidence: Evidence, arms: Sequence[Arm]) -> list[str]:
    """Those of the second round, on seeds that chose neither them nor their coefficients."""
    fresh = evidence.on(range(plan.SEEDS, plan.MORE_SEEDS))
    known = [arm for arm in arms if fresh.has(arm) and arm.recipe not in (BASE, GRPO.recipe)]
    if not known or not fresh.has(GRPO):
        return []
    text = (
        f"Who leads after {plan.SEEDS} seeds is in part the luckiest. So the {BEST} best in pass@1 and in pass@16 ran "
        "on, at the coefficient that their trials chose, where they have one. These numbers are of the further seeds "
        f"alone ({plan.SEEDS} to {plan.MORE_SEEDS - 1}), which chose nothing."
    )
    head = ["method", "pass@1", "to grpo", "pass@16", "to grpo", "entropy", "to grpo", "KL", "seeds"]
    lines = ["## The best again, on further seeds\n", fill(text, 120) + "\n", *_head(head)]
    first = [arm for arm in (Arm(BASE), GRPO) if fresh.has(arm)]
    tuned = [arm for arm in arms if arm.recipe == GRPO.recipe and arm != GRPO and fresh.has(arm)]
    for arm in [*first, *ranked(fresh, [*known, *tuned], GRPO)]:
        cells = [_named(fresh, arm) if arm.recipe != BASE else "before training"]
        for name in ("pass@1", "pass@16", "entropy"):
            cells.append(_number(fresh.measure(arm, name).value))
            cells.append("" if arm == GRPO else _signed(fresh.difference(arm, GRPO, name)))
        lines.append(_row([*cells, _number(fresh.measure(arm, "kl").value), str(len(fresh.seeds(arm)))]))
    left = [f"`{arm.label}`" for arm in arms if len(fresh.seeds(arm)) < plan.MORE_SEEDS - plan.SEEDS]
    return [*lines, "", *([f"Seeds are missing of {', '.join(left)}.\n"] if left else [])]


def given(name: str) -> tuple:
    """The arguments with which a recipe is run."""
    return tuple(sorted(plan.GIVEN.get(name, {}).items()))


def _others(evidence: Evidence, names: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for task in plan.OTHERS:
        arms = [Arm(name, task, given(name)) for name in names]
        known = [arm for arm in arms if evidence.has(arm)]
        if not known:
            continue
        told = [n["values"] for arm in known for n in evidence.numbers[arm].values()]
        hidden = any("gold" in v and v["gold"] != v["pass@1"] for v in told)  # else pass@1 says it
        grpo, base = Arm("grpo", task), Arm("base", task)
        known = ranked(evidence, known, grpo)
        measures = ["pass@1", "pass@16", "entropy", *(["gold"] if hidden else [])]
        lines += [f"## {task}\n"]
        if any("gold" in v for v in told) and not hidden:
            lines += ["What is trained on is another reward; pass@k is by the hidden one.\n"]
        lines += [*_head(["method", *(h for m in measures for h in (_title(m), "to grpo")), "KL"])]
        for arm in ([base] if evidence.has(base) else []) + known:
            cells = [_named(evidence, arm) if arm != base else "before training"]
            for name in measures:
                apart = "" if arm == grpo else _signed(evidence.difference(arm, grpo, name))
                cells += [_number(evidence.measure(arm, name).value), apart]
            lines.append(_row([*cells, _number(evidence.measure(arm, "kl").value)]))
        lines.append("")
    return lines


def _title(measure: str) -> str:
    return "hidden reward" if measure == "gold" else measure


def _claims(verdicts: Sequence[Verdict]) -> list[str]:
    if not verdicts:
        return []
    counts = {v: sum(one.verdict == v for one in verdicts) for v in (APPEARED, NOT, UNDECIDED, NOTHING)}
    said = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    lines = [
        "## Did the claimed effect appear?\n",
        fill(
            f"What the papers say their methods do, in our words, and what these runs show: {said}. *Undecided*: an "
            "interval reaches over the border. Where there is one seed, a verdict is of that run.",
            120,
        )
        + "\n",
        *_head(["method", "claimed", "verdict", "measured"]),
    ]
    for one in verdicts:
        name = one.effect.recipe
        verdict = f"**{one.verdict}**" if one.verdict == APPEARED else one.verdict
        lines.append(_row([f"`{name}`", one.effect.says, verdict, "<br>".join(one.numbers)]))
    return [*lines, ""]


def _tuned(tuned: Mapping[str, str]) -> list[str]:
    if not tuned:
        return []
    lines = ["## Coefficients that were tuned\n", *_head(["method", f"by pass@1 on countdown, seed {TUNING_SEED}"])]
    return [*lines, *(_row([f"`{name}`", text]) for name, text in tuned.items()), ""]


def _left(evidence: Evidence, left: Mapping[str, str]) -> list[str]:
    lines = [f"- `{name}`: {why}" for name, why in left.items()]
    lines += [f"- `{arm.label}` on `{arm.task}` failed: {why}" for arm, why in evidence.failed.items()]
    return ["## Not run, and why\n", *lines, ""] if lines else []


def status_of(verified: Path, names: Sequence[str]) -> dict[str, str]:
    """holds, falls short, no objective: as docs/verification.md has it, else verified now."""
    found: dict[str, str] = {}
    text = verified.read_text() if verified.is_file() else ""
    for name, rest, status in re.findall(r"^\| `(\w+)([^`]*)` \| \**([a-z ]+?)\** \|", text, re.MULTILINE):
        if status in (HOLDS, SHORT, NO_OBJECTIVE) and (name not in found or "beta" not in rest):
            found.setdefault(name, status)
    for name in names:
        if name not in found:
            found[name] = verify(name)[0].status
    return found


def ranked(evidence: Evidence, arms: Sequence[Arm], grpo: Arm) -> list[Arm]:
    """By pass@1 above grpo's, on the seeds that both have: some seeds are luckier than others."""

    def ahead(arm: Arm) -> float:
        found = evidence.difference(arm, grpo, "pass@1").value if evidence.has(grpo) else math.nan
        return found if math.isfinite(found) else evidence.measure(arm, "pass@1").value - 1

    return sorted(arms, key=lambda arm: -ahead(arm))


def _head(names: Sequence[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else ""


def _signed(found: Interval) -> str:
    if not math.isfinite(found.value):
        return ""
    text = f"{found.value:+.3f}"
    if not found.known:
        return text
    sure = found.low > 0 or found.high < 0
    return f"{f'**{text}**' if sure else text} [{found.low:+.3f}, {found.high:+.3f}]"


# -- the picture -----------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, NAMED = 920, 520, 18


def picture(evidence: Evidence, names: Sequence[str]) -> str:
    """pass@16 against pass@1 on the main task, as SVG; names for those at the edge of the cloud."""
    arms = [
        arm
        for name in ("base", *names)
        if evidence.has(arm := Arm(name, plan.MAIN, given(name) if name != "base" else ()))
    ]
    if not arms:
        raise ValueError("there is no finished cell to draw")
    points = [(arm, *(reached(evidence, arm, name) for name in ("pass@1", "pass@16"))) for arm in arms]
    points = [point for point in points if math.isfinite(point[1]) and math.isfinite(point[2])]
    points, lost = collapsed(points)
    across, up = [x for _, x, _ in points], [y for _, _, y in points]
    colours = THEMES["light"]
    panel = Panel(76.0, 896.0, _range(across), _range(up), top=66.0, bottom=HEIGHT - 70.0)
    first, last = (math.ceil(20 * panel.x_range[0]), math.floor(20 * panel.x_range[1]))
    ticks = [(n / 20, f"{n / 20:.0%}") for n in range(first, last + 1)]
    said = "; ".join(f"{arm.recipe}: {x:.3f}, {y:.3f}" for arm, x, y in [*points, *lost])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-labelledby="title description" font-family="{escape(FONT)}" font-size="12">',
        '<title id="title">pass@16 against pass@1 of every method on countdown</title>',
        f'<desc id="description">{escape(said)}</desc>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="{colours["surface"]}"/>',
        *frame(panel, "One try against sixteen", "pass@1", "pass@16", ticks, colours),
    ]
    if lost:
        names_lost = ", ".join(f"{arm.recipe} ({x:.0%}, {y:.0%})" for arm, x, y in lost)
        note = f"Off the picture, below half of what is usual: {names_lost}"
        parts.append(f'<text x="76" y="52" fill="{colours["muted"]}">{escape(note)}</text>')
    labelled, dots = edge(points), [(panel.x(x), panel.y(y)) for _, x, y in points]
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    for arm, x, y in points:
        colour = "base" if arm.recipe == "base" else "plain" if arm.recipe == "grpo" else "medium"
        shape = "square" if arm.recipe in ("base", "grpo") else "circle"
        parts.append(mark(panel.x(x), panel.y(y), Look(colour, "solid", shape), colours, 4.5))
        if arm in labelled:
            name = ", ".join(other.recipe for other, *where in points if where == [x, y])
            at, anchor, end = place(name, panel.x(x), panel.y(y), taken)
            if end is not None:
                ends = f'x1="{panel.x(x):.1f}" y1="{panel.y(y):.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
                parts.append(f'<line {ends} stroke="{colours["muted"]}" stroke-width="0.7"/>')
            where = f'x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}"'
            parts.append(f'<text {where} fill="{colours["ink"]}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


Point = tuple[Arm, float, float]


def collapsed(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """The points, and apart those below half of the median on an axis, beside which the others would be one dot."""
    middle = [statistics.median(p[axis] for p in points) for axis in (1, 2)]
    lost = [p for p in points if p[1] < middle[0] / 2 or p[2] < middle[1] / 2]
    return [p for p in points if p not in lost], lost


Box = tuple[float, float, float, float]  # left, top, right, bottom
Place = tuple[float, float]


def place(text: str, x: float, y: float, taken: list[Box]) -> tuple[Place, str, Place | None]:
    """Where the name of a point goes, how it is anchored, and where a line to it ends if it is not beside the point.

    Of the nearest places, that which covers nothing, or as little as may be.
    """
    width, best = 7.0 * len(text), None
    for far in (0, 14, 28, 44, 62, 84):
        for across, down in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
            anchor = {1: "start", 0: "middle", -1: "end"}[across]
            end = (x + across * (5 + far), y + down * (5 + far))
            at = (end[0] + 3 * across, end[1] + 4 + 7 * down)
            left = at[0] - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            box = (left, at[1] - 11, left + width, at[1] + 3)
            covered = sum(
                max(0.0, min(box[2], b[2]) - max(box[0], b[0])) * max(0.0, min(box[3], b[3]) - max(box[1], b[1]))
                for b in taken
            )
            outside = max(0.0, 80 - box[0]) + max(0.0, box[2] - WIDTH + 4) + max(0.0, 68 - box[1])
            cost = covered + 100 * outside + 0.3 * far
            if best is None or cost < best[0]:
                best = (cost, at, anchor, end if far else None, box)
    assert best is not None
    taken.append(best[4])
    return best[1], best[2], best[3]


def edge(points: Sequence[Point]) -> list[Arm]:
    """Base, grpo, those that no other beats on both axes, and the last on each; of several in one place the first."""
    points = list({p[1:]: p for p in reversed(points)}.values())[::-1]
    best = [p for p in points if not any(q[1] >= p[1] and q[2] >= p[2] and q != p for q in points)]
    ends = [min(points, key=lambda p: p[1]), min(points, key=lambda p: p[2])]
    fixed = [p for p in points if p[0].recipe in ("base", "grpo")]
    return list(dict.fromkeys(p[0] for p in [*fixed, *best, *ends]))[:NAMED]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.08 * max(high - low, 0.05)
    return low - room, high + room


def write(
    evidence: Evidence,
    names: Sequence[str],
    tuned: Mapping[str, str],
    left: Mapping[str, str],
    again: Sequence[Arm] = (),
) -> None:
    """The page and its picture."""
    PAGE.write_text(page(evidence, names, tuned, left, again), encoding="utf-8")
    PICTURE.write_text(picture(evidence, names), encoding="utf-8")
