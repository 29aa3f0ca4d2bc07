"""Every distillation, trained for a few dozen steps: the policy comes nearer to its teacher, a better trained model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.slow.learners import drawn_by_policy, of_kind

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
from keel.train.teachers import store_top_k

TEACHER = BaseRecipe(TinyConfig(dim=32, layers=2, heads=2, feed_forward=64), steps=150, batch_size=64)
STUDENT = replace(TEACHER, steps=50, warmup_steps=10, seed=1)
OPTIONS: dict[str, dict] = {"sampled_distillation": {"num_generations": 4}, "kdrl": {"num_generations": 4}}
OF_OTHERS = {"random_teacher", "stored_distillation"}  # which have no teacher that is better than the policy, or none
QUIET = {"evaluate.before": False, "evaluate.after": False, "train.log_completions": 0}


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
@pytest.mark.parametrize("recipe", [*sorted({*of_kind("distillation")} - OF_OTHERS), "kdrl"])
def test_the_policy_comes_nearer_to_its_teacher(recipe, tmp_path):
    task = load_task("countdown")
    own, teacher = drawn_by_policy(recipe), str(ensure_base(task, TEACHER))
    student = shaken(teacher, tmp_path / "student") if own else str(ensure_base(task, STUDENT))
    drawn = {"rollout.num_prompts": 16} if own or recipe == "sequence_kd" else {}
    run = keel.train(
        recipe,
        model=student,
        task="countdown",
        teacher=teacher,
        runs=tmp_path,
        max_steps=40,
        learning_rate=3e-4 if own else 1e-3,
        **QUIET,
        **drawn,
        **OPTIONS.get(recipe, {}),
    )
    before = distance(student, teacher, task, own)
    after = distance(str(run.path / run.summary["checkpoint"]), teacher, task, own)
    assert after < 0.95 * before, (before, after)


@pytest.mark.slow
def test_stored_numbers_bring_it_nearer_to_who_wrote_them(tmp_path):
    task = load_task("countdown")
    teacher, student = str(ensure_base(task, TEACHER)), str(ensure_base(task, STUDENT))
    examples = [task.train[i] for i in range(640)]
    data = [{"prompt": example.prompt, "completion": task.solution(example, 0)} for example in examples]
    path = store_top_k(teacher, data, tmp_path / "top.safetensors", 8, device="cpu")
    known = {"data": data, "stored": str(path), "runs": tmp_path, "max_steps": 40, "learning_rate": 1e-3, **QUIET}
    run = keel.train("stored_distillation", model=student, **known)
    before = distance(student, teacher, task, own=False)
    after = distance(str(run.path / run.summary["checkpoint"]), teacher, task, own=False)
    assert after < 0.95 * before, (before, after)


@pytest.mark.slow
def test_a_random_teacher_is_approached(tmp_path):
    task = load_task("countdown")
    known = {"task": "countdown", "runs": tmp_path, "max_steps": 40, "learning_rate": 1e-3, **QUIET}
    run = keel.train("random_teacher", model=str(ensure_base(task, STUDENT)), **known)
    values = [value for _, value in run.metrics["terms/distil"]]
    assert sum(values[-5:]) < 0.95 * sum(values[:5]), values


@pytest.mark.slow
def test_who_teaches_itself_learns_the_data(tmp_path):
    """It comes nearer to a model that has seen more of them."""
    task = load_task("countdown")
    student, better = str(ensure_base(task, STUDENT)), str(ensure_base(task, TEACHER))
    examples = [task.train[i] for i in range(640)]
    data = [{"prompt": example.prompt, "completion": task.solution(example, 0)} for example in examples]
    known = {"data": data, "epochs": 4, "train.batch_size": 64, "runs": tmp_path, **QUIET}
    run = keel.train("ps_kd", model=student, max_steps=40, learning_rate=1e-3, **known)
    before = distance(student, better, task, own=False)
    after = distance(str(run.path / run.summary["checkpoint"]), better, task, own=False)
    assert after < 0.95 * before, (before, after)
