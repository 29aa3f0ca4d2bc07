"""Every distillation, trained for a few dozen steps: the policy comes nearer to its teacher, a better trained model."""

import pytest
import torch

import keel
from keel.models.load import load
from keel.models.tiny import TinyConfig
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence
from keel.tasks.load import load_task
from keel.train.base import BaseRecipe, ensure_base
from keel.train.encode import Encoder, supervised_rows

SMALL = BaseRecipe(TinyConfig(dim=32, layers=2, heads=2, feed_forward=64), steps=150, batch_size=64)
OPTIONS: dict[str, dict] = {
    "distillation": {},
    "on_policy_distillation": {},
    "gkd": {},
    "sequence_kd": {},
    "minillm": {},
    "g_opd": {},
    "sampled_distillation": {"num_generations": 4},
    "sin_kd": {},
    "relational_distillation": {},
    "bd_kd": {},
    "pld": {},
}
DRAWN = ("on_policy_distillation", "gkd", "sequence_kd", "minillm", "g_opd", "sampled_distillation")


def distance(policy: str, teacher: str, task) -> float:
    """Mean KL(policy || teacher) and back over the tokens of held-out solutions, in nats."""
    models = {"policy": load(policy, device="cpu"), "teacher": load(teacher, device="cpu")}
    examples = [task.held_out[i] for i in range(64)]
    solutions = [task.solution(example, 0) for example in examples]
    rows, _ = supervised_rows(examples, solutions, Encoder(models["policy"]), None, 0, 0)
    asked = Divergence("jeffreys", "teacher")
    with torch.no_grad():
        return float(Engine(models).measure([asked], rows)[asked][rows.mask].mean())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OPTIONS)
def test_the_policy_comes_nearer_to_its_teacher(recipe, tmp_path):
    task = load_task("countdown")
    student, teacher = str(ensure_base(task, SMALL)), str(ensure_base(task))
    drawn = {"rollout.num_prompts": 16} if recipe in DRAWN else {}
    run = keel.train(
        recipe,
        model=student,
        task="countdown",
        teacher=teacher,
        runs=tmp_path,
        max_steps=40,
        learning_rate=1e-3,
        **{"evaluate.before": False, "evaluate.after": False, "train.log_completions": 0},
        **drawn,
        **OPTIONS[recipe],
    )
    before = distance(student, teacher, task)
    after = distance(str(run.path / run.summary["checkpoint"]), teacher, task)
    assert after < 0.95 * before, (before, after)
