"""Every distillation, trained for a few dozen steps: the policy comes nearer to its teacher, a better trained model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import keel
from keel.models.load import load, save
from keel.models.tiny import TinyConfig
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence
from keel.tasks.load import load_task
from keel.train.base import BaseRecipe, ensure_base
from keel.train.encode import Encoder, supervised_rows

TEACHER = BaseRecipe(TinyConfig(dim=32, layers=2, heads=2, feed_forward=64), steps=150, batch_size=64)
STUDENT = replace(TEACHER, steps=50, warmup_steps=10, seed=1)
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


ON_POLICY = ("on_policy_distillation", "gkd", "minillm", "g_opd", "sampled_distillation")


def distance(policy: str, teacher: str, task, own: bool) -> float:
    """In nats a token: KL(policy || teacher) on the policy's completions, or KL(teacher || policy) on solutions."""
    models = {"policy": load(policy, device="cpu"), "teacher": load(teacher, device="cpu")}
    examples = [task.held_out[i] for i in range(64)]
    encoder = Encoder(models["policy"])
    if own:
        prompts, sampling = [encoder.prompt(e.prompt) for e in examples], Sampling(max_completion_length=32)
        rows = LocalGenerator(models["policy"]).generate(prompts, 4, sampling, seed=0)
    else:
        solutions = [task.solution(example, 0) for example in examples]
        rows, _ = supervised_rows(examples, solutions, encoder, None, 0, 0)
    asked = Divergence("kl_policy_ref" if own else "kl_ref_policy", "teacher")
    return float(Engine(models).measure([asked], rows)[asked][rows.mask].mean())


def shaken(teacher: str, folder: Path) -> str:
    """The teacher with a third of noise on its weights: near enough to be corrected by its own completions."""
    model = load(teacher, device="cpu")
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.module.parameters():
            if weight.dim() > 1:
                weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=chance))
    save(model, folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OPTIONS)
def test_the_policy_comes_nearer_to_its_teacher(recipe, tmp_path):
    task = load_task("countdown")
    own, teacher = recipe in ON_POLICY, str(ensure_base(task, TEACHER))
    student = shaken(teacher, tmp_path / "student") if own else str(ensure_base(task, STUDENT))
    drawn = {"rollout.num_prompts": 16} if recipe in (*ON_POLICY, "sequence_kd") else {}
    run = keel.train(
        recipe,
        model=student,
        task="countdown",
        teacher=teacher,
        runs=tmp_path,
        max_steps=40,
        learning_rate=3e-4 if own else 1e-3,
        **{"evaluate.before": False, "evaluate.after": False, "train.log_completions": 0},
        **drawn,
        **OPTIONS[recipe],
    )
    before = distance(student, teacher, task, own)
    after = distance(str(run.path / run.summary["checkpoint"]), teacher, task, own)
    assert after < 0.95 * before, (before, after)
