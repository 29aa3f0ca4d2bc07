"""Tables in the terminal: the numbers, and that they fit."""

import io

import pytest
from rich.console import Console

from keel.evaluate.evaluation import Evaluation
from keel.report.diagnosis import Finding, Level
from keel.report.terminal import demo_table, evaluation_table, findings_text


def shown(renderable, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def row(text, name):
    return next(line for line in text.splitlines() if line.startswith(name + " "))


def test_before_after_and_change(wide, narrow):
    text = shown(evaluation_table(wide, narrow, "first"))
    assert "before" in text and "after" in text and "40 prompts x 16 samples" in text
    assert "0.498 ±" in row(text, "pass@1") and "0.750 ±" in row(text, "pass@1") and "+0.252 [+" in row(text, "pass@1")
    assert "-0.250 [-0." in row(text, "pass@16")
    assert "4.00" in row(text, "distinct_answers")
    assert max(len(line) for line in text.splitlines()) <= 80 and "…" not in text


def test_one_side(wide):
    text = shown(evaluation_table(wide))
    assert shown(evaluation_table(None, wide)) == text
    with pytest.raises(ValueError, match="at least one"):
        evaluation_table(None)
    assert "value" in text and "change" not in text and "0.498" in row(text, "pass@1")


def test_one_of_each():
    one = Evaluation({}, {"reward": (1.0,)}, 1)
    assert "1 prompt x 1 sample;" in " ".join(shown(evaluation_table(one, one)).split())


def test_metrics_that_one_side_lacks(wide):
    less = Evaluation({"pass@1": wide.metrics["pass@1"]}, {"pass@1": wide.values["pass@1"], "reward": (0.0,)}, 16)
    assert row(shown(evaluation_table(wide, less)), "kl").split()[-2:] == ["-", "-"]


def test_the_demonstration_fits_eighty_columns(arms):
    text = shown(demo_table(arms, "Demo"))
    assert row(text, "GRPO").split()[1] == "0.750" and row(text, "GRPO").endswith("90 s")
    assert all(name in text for name in ("pass@1", "pass@16", "maj@16", "entropy", "kl", "answers"))
    assert max(len(line) for line in text.splitlines()) <= 80 and "…" not in text


def test_markup_in_labels_is_text(arms):
    odd = [type(arms[0])("x", "[bold]base[/bold] [/]", arms[0].evaluation)]
    assert "[bold]base[/bold] [/]" in shown(demo_table(odd), width=120)


def test_findings():
    text = shown(findings_text([Finding(Level.WARNING, "Entropy fell: raise `beta` [now 0].", "beta")]))
    assert text.startswith("warning  Entropy fell: raise `beta` [now 0].")
