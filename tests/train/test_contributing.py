"""The worked example of CONTRIBUTING.md adds a term in one file, and trains with it."""

import re
from pathlib import Path

import pytest
import torch

from keel.core.rows import Rows
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import Entropy
from keel.statistics.stats import Stats

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def place(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    file = tmp_path / "entropy_floor.py"
    file.write_text(code)
    return f"{file}:grpo_entropy_floor"


def test_it_trains(place, train):
    run = train(place, name="floor", coef=5.0, floor=3.0, max_steps=2, **{"train.log_completions": 0})
    assert run.metrics["terms/floor"][0][1] > 0
    assert run.metrics["grad_norm"][0][1] > 0


def test_it_raises_the_entropy(place, train):
    def flat(completions, **_):
        return [0.0] * len(completions)

    run = train(place, name="floor", coef=1.0, floor=3.0, max_steps=12, learning_rate=3e-3, reward=flat)
    curve = [value for _, value in run.metrics["entropy"]]
    assert curve[-1] > curve[0] + 0.05


def test_the_number_that_the_page_states(place):
    method = recipe_named(place)(floor=0.5)
    penalty = method.terms["floor"].penalty
    ones = torch.ones(1, 2, dtype=torch.bool)
    rows = Rows.build(torch.zeros(1, 1, dtype=torch.long), ones[:, :1], torch.zeros(1, 2, dtype=torch.long), ones)
    assert penalty(rows, Stats({Entropy(): torch.tensor([[0.2, 0.7]])}))[0].tolist() == pytest.approx([0.09, 0.0])


def test_its_neutral_setting_is_the_baseline(place):
    neutral, baseline = recipe_named(place)(coef=0.0), recipe_named("grpo")()
    assert neutral.update_needs() == baseline.update_needs() and neutral.replacing(terms={}) == baseline
