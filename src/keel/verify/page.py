"""The page of the documentation that shows what verification finds: `python -m keel.verify.page docs`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from keel.verify import measured
from keel.verify.entry import verify
from keel.verify.placements import DISTANCES, PLACEMENTS, SPACE, STALENESS, Point, sweep
from keel.verify.recipes import BETA, FIXED_POINT, HOLDS, NOTHING, SHORT, Verification

COMMAND = "keel verify --all --full"
COLOURS = ("#0b7a75", "#c0392b", "#d98e04", "#7d3c98", "#2471a3", "#5d6d7e", "#1e8449")
DASHES = ("-", "--", "-", "--", ":", "-.", ":")

INTRODUCTION = f"""# Verification

Every recipe runs here, unchanged, on worlds small enough to enumerate: two prompts, sequences of one and two tokens
from three symbols, random rewards. There the gradient of the objective and its optimum are known exactly, so that the
expected update of a recipe can be held to what its paper says it optimises.

```bash
{COMMAND}
```

- **error**: relative error of the expected on-policy update, |c g - g\\*| / |g\\*|, at the best step size c; the worse
  of a policy near the reference and one far from it. 0 means below 1e-6.
- **off-policy**: the same for a policy that has moved since it sampled. Clipping and one-step corrections are
  approximations, so that few methods are exact there.
- **groups**: the same over every group of the size used (at most 8), with the multinomial probability of each: what a
  mean or a deviation of few samples does to the direction.
- **fixed point**: total variation between the place where the update vanishes and the optimum of the objective.
- **spread**: standard deviation of the update of one group over the norm of its mean.
- **bf16**: relative difference between the update in bf16 and in fp32.

A recipe with a coefficient is verified at beta = {BETA:g}. *{HOLDS}*: no error in the gradient, in groups, in the
declared invariances and in the reduction to its baseline, and a fixed point within {FIXED_POINT:g} of the optimum.
*{SHORT}*: one of these is off; the reasons are below. *{NOTHING}*: the paper claims none.
"""

PLACEMENT_TEXT = f"""## Where the KL term stands

The same policy gradient with the same KL(pi || ref) at beta = {BETA:g}, placed where libraries place it, held to
E[r] - beta KL(pi || ref) of whole sequences ({SPACE.horizon} tokens from {SPACE.vocab} symbols; medians over seven
worlds).

![Gradient error against distance from the reference](verification.svg)

On-policy, k1 in the reward is exact at every distance. k1 in the loss has no gradient on average: what is missing is
the whole KL. k2, k3 times the ratio, and the full sum over the vocabulary are the same update on average: the KL of
each visited state, without what an earlier token does to later states. k3 without the ratio is KL(ref || pi) instead.
Near the reference the per-token forms differ little, because all divergences agree there to second order.

Off-policy (the sampler's logits are {STALENESS:g} away), k1 in the reward speaks of the policy that sampled, and is off
by about as much near the reference as far from it.
"""


def page(found: Sequence[Verification]) -> str:
    """The whole page as Markdown."""
    counts = {status: sum(one.status == status for one in found) for status in (HOLDS, SHORT, NOTHING)}
    said = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    parts = [
        INTRODUCTION,
        f"## Recipes\n\n{said}.\n",
        *_table(found),
        "",
        *_short(found),
        *_declared(found),
        PLACEMENT_TEXT,
    ]
    return "\n".join(parts)


def figure(points: Sequence[Point], path: Path) -> None:
    """Gradient error against the distance from the reference, one line a placement, on- and off-policy, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "keel"  # the same picture gives the same file
    canvas, axes = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    for axis, on_policy in zip(axes, (True, False), strict=True):
        for name, colour, dash in zip(PLACEMENTS, COLOURS, DASHES, strict=True):
            line = [p for p in points if p.placement == name and p.on_policy is on_policy]
            x = [p.distance for p in line]
            axis.plot(x, [100 * p.error for p in line], dash, color=colour, label=name, linewidth=2)
        axis.set_xscale("log")
        axis.set_xticks([0.01, 0.1, 1.0], ["0.01", "0.1", "1"])
        axis.set_xlim(DISTANCES[0], DISTANCES[-1])
        axis.set_ylim(-2, 62)
        axis.set_title("on-policy" if on_policy else "off-policy", loc="left", fontsize=11)
        axis.set_xlabel("distance from the reference (standard deviation of the logits)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    axes[0].set_ylabel("error of the expected gradient, %")
    handles, labels = axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    canvas.tight_layout(rect=(0, 0.1, 1, 1))
    canvas.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot.close(canvas)


def write(folder: Path) -> None:
    """The page and its figure into a folder of documentation, and the same numbers into the package."""
    found, points = verify(full=True), sweep()
    (folder / "verification.md").write_text(page(found))
    figure(points, folder / "verification.svg")
    measured.write(found, points)


def _table(found: Sequence[Verification]) -> list[str]:
    lines = _head("recipe", "status", "objective", "error", "off-policy", "groups", "fixed point")
    for one in found:
        last = one.groups[-1] if one.groups else None
        cells = [
            f"`{one.label}`",
            f"**{one.status}**" if one.status == HOLDS else one.status,
            one.objective.replace("||", "\\|\\|"),
            _number(one.gradient_relative_error),
            _number(one.off_policy_relative_error),
            "" if last is None else f"{_number(last.relative_error)} (G={last.size})",
            _number(one.fixed_point_tv),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _head(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _short(found: Sequence[Verification]) -> list[str]:
    lines = []
    for one in found:
        if one.reasons:
            follows = f" What it follows: {one.follows}." if one.follows else ""
            repair = ", ".join(f"`{name}={value}`" for name, value in (one.exact_with or {}).items())
            exact = f" Exact with {repair}." if repair else ""
            lines.append(f"- `{one.label}`: {'; '.join(one.reasons)}.{follows}{exact}")
    return ["## What falls short, and why", "", *lines, ""] if lines else []


def _declared(found: Sequence[Verification]) -> list[str]:
    lines = ["## Spread, precision, invariances and reductions", ""]
    lines += _head("recipe", "spread", "bf16", "declared invariances", "at its neutral setting")
    for one in found:
        spreads = [g for g in one.groups if g.deviation == g.deviation and g.deviation != float("inf")]
        marks = {True: "holds", False: "does not hold"}
        cells = [
            f"`{one.label}`",
            f"{spreads[-1].deviation:.2f} (G={spreads[-1].size})" if spreads else "",
            _number(one.bf16_relative_error),
            ", ".join(f"{name.replace('_', ' ')} {marks[ok]}" for name, ok in one.invariances.items()),
            {None: "", True: "the bits of its baseline", False: "not its baseline"}[one.reduces_to_baseline],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value < 1e-6 else f"{value:.2g}"


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
