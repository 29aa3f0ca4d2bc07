"""The page of the demonstration: what reinforcement learning gains, what it loses, and what a regulariser keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keel.core.plain import counted
from keel.evaluate.evaluation import change
from keel.evaluate.intervals import Interval
from keel.report.arms import Arm, largest_common, looks
from keel.report.figures import frontier, pass_curves
from keel.report.page import cell, document, figures, prose, table, text, write
from keel.report.picture import picture

TITLE = "What a reward gains, and what it costs"
INTRODUCTION = (
    "One small language model, trained further by reinforcement learning with a reward for correct answers, with and "
    "without a penalty on its distance from where it began. All numbers are from prompts that it never saw in training."
)


def write_demo(
    path: str | Path, arms: Sequence[Arm], introduction: str = INTRODUCTION, command: str | None = "keel demo"
) -> Path:
    """Write the page of a comparison as one HTML file.

    Args:
        path: the file.
        arms: the base (`beta=None`), training without a regulariser (`beta=0`), and with it.
        introduction: what was done, in words.
        command: what makes these numbers again.

    Raises:
        ValueError: no arms.
        UserError: the file cannot be written.
    """
    return write(path, demo(arms, introduction, command))


def write_picture(path: str | Path, arms: Sequence[Arm], dark: bool = False) -> Path:
    """Write both figures of a comparison as one static SVG file.

    Raises:
        ValueError: no arms, or arms without pass@k for several k.
        UserError: the file cannot be written.
    """
    return write(path, picture(arms, "dark" if dark else "light"))


def demo(arms: Sequence[Arm], introduction: str = INTRODUCTION, command: str | None = None) -> str:
    """The page as HTML."""
    if not arms:
        raise ValueError("a comparison needs at least one arm")
    items = "".join(f"<li>{prose(sentence)}</li>" for sentence in findings(arms))
    sentences = f"<ul>{items}</ul>" if items else ""
    sizes = arms[0].evaluation
    measured = f"{counted(sizes.prompts, 'held-out prompt')}, {counted(sizes.samples, 'sample')} of each"
    caption = (
        f"{measured}; below each number its 95% bootstrap interval over prompts. Entropy and KL to the policy before "
        "training in nats a token."
    )
    rows = [
        [_key(look.colour) + text(arm.label), *(cell(value) for value in values)]
        for arm, look, values in zip(arms, looks(arms), table_values(arms), strict=True)
    ]
    again = f"<footer>Made again by <code>{text(command)}</code>.</footer>" if command else ""
    return document(
        f"{TITLE} – Keel",
        [
            f'<header>\n<h1>{TITLE}</h1>\n<p class="muted">{text(introduction)}</p>\n</header>',
            sentences,
            figures([pass_curves(arms), frontier(arms)], "comparison"),
            "<h2>All numbers</h2>",
            table(["", *(name.replace("_", " ") for name in table_names(arms))], rows, caption),
            again,
        ],
    )


def table_names(arms: Sequence[Arm]) -> list[str]:
    """The metrics of the comparison's table: those that at least one arm has."""
    many = (largest_common(arms, "pass"), largest_common(arms, "maj"))
    wanted = ["pass@1", *many, "entropy", "kl", "distinct_answers"]
    return [name for name in dict.fromkeys(wanted) if name and any(name in arm.evaluation.metrics for arm in arms)]


def table_values(arms: Sequence[Arm]) -> list[list[Interval | None]]:
    """The table's numbers, a row for each arm."""
    return [[arm.evaluation.metrics.get(name) for name in table_names(arms)] for arm in arms]


def findings(arms: Sequence[Arm]) -> list[str]:
    """What the comparison shows, in sentences with the numbers; differences are taken prompt by prompt."""
    base = next((arm for arm in arms if arm.beta is None), None)
    plain = next((arm for arm in arms if arm.beta == 0), None)
    many = largest_common(arms, "pass")
    if base is None or plain is None or many is None or many == "pass@1":
        return []
    tries = many.split("@")[1]
    one, best = change(base.evaluation, plain.evaluation, "pass@1"), change(base.evaluation, plain.evaluation, many)
    if one is None or best is None:
        return []
    sentences = [
        f"With one try, {plain.label} solves {_share(plain, 'pass@1')} of the prompts, {_moved(one)} "
        f"{_share(base, 'pass@1')} before training. With {tries} tries it solves {_share(plain, many)}, {_moved(best)} "
        f"{_share(base, many)}."
    ]
    for arm in arms:
        if not arm.beta:
            continue
        kept, cost = change(plain.evaluation, arm.evaluation, many), change(plain.evaluation, arm.evaluation, "pass@1")
        if kept is not None and cost is not None:
            sentences.append(
                f"{_capital(arm.label)}: {_share(arm, many)} with {tries} tries ({_points(kept, plain)}) "
                f"and {_share(arm, 'pass@1')} with one ({_points(cost, plain)})."
            )
    return sentences


def _share(arm: Arm, name: str) -> str:
    return f"{arm.evaluation.metrics[name].value:.1%}"


def _moved(difference: Interval) -> str:
    if difference.known and difference.low <= 0 <= difference.high:
        return "no clear change from"
    return "up from" if difference.value > 0 else "down from"


def _points(difference: Interval, plain: Arm) -> str:
    sure = not difference.known or difference.low > 0 or difference.high < 0
    points = f"{100 * difference.value:+.1f} points".replace("-", "−")
    return f"{points} against {plain.label}{'' if sure else ', within chance'}"


def _capital(label: str) -> str:
    return label[:1].upper() + label[1:]


def _key(colour: str) -> str:
    return f'<span class="key" style="background: var(--{colour})"></span>'
