"""A small base model, trained once for all tests of the loop."""

from functools import partial

import pytest
from tests.train.judging import plus

from keel.models.tiny import TinyConfig
from keel.parts.rewards.score import score
from keel.recipes.registry import recipes
from keel.tasks.load import load_task
from keel.train.base import BaseRecipe, ensure_base

SMALL_BASE = BaseRecipe(TinyConfig(dim=32, layers=2, heads=2, feed_forward=64), steps=150, batch_size=64)


@pytest.fixture(scope="session")
def task():
    """The built-in task."""
    return load_task("countdown")


@pytest.fixture(scope="session")
def base(task) -> str:
    """Folder of a model of some 20,000 parameters that writes well-formed expressions, now and then a correct one."""
    return str(ensure_base(task, SMALL_BASE))


@pytest.fixture(scope="session")
def teacher(base, tmp_path_factory) -> str:
    """Folder of a model that is near the base, and not the same."""
    import torch

    from keel.models.load import load, save

    model, folder = load(base), tmp_path_factory.mktemp("teacher") / "model"
    with torch.no_grad():
        for i, weight in enumerate(model.module.parameters()):
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    save(model, folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _few_comparisons(monkeypatch, request):
    """The built-in comparisons of tests are few, and outside slow ones the small base draws them.

    Training the built-in model would take longer than all tests of the loop together.
    """
    monkeypatch.setattr("keel.train.comparisons.PROMPTS", 64)
    monkeypatch.setattr("keel.train.comparisons.HELD_OUT", 16)
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr("keel.train.comparisons.ensure_base", partial(ensure_base, how=SMALL_BASE))
        compared = lambda rewards, *rest: score(dict.fromkeys(rewards, plus), *rest)  # noqa: E731
        monkeypatch.setattr("keel.train.comparisons.score", compared)


@pytest.fixture
def train(base, tmp_path):
    """`keel.train` on the small base: few prompts, no evaluation, runs in a temporary folder."""
    import keel

    def start(recipe, **settings):
        given = {
            "model": base,
            "task": "countdown",
            "runs": tmp_path / "runs",
            "max_steps": 3,
            "learning_rate": 1e-3,
            "evaluate.before": False,
            "evaluate.after": False,
            "train.log_completions": 0,
            **settings,
        }
        known = recipes().get(recipe) if isinstance(recipe, str) else None
        if known is None or known().rollout is not None:
            given.setdefault("rollout.num_prompts", 4)
        if "data" in settings:
            given.pop("task")
        return keel.train(recipe, **given)

    return start
