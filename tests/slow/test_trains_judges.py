"""Judges, trained for a few dozen steps: each gets better at what it says it learns."""

import itertools
import math

import pytest

import keel
from keel.models.load import load
from keel.models.tiny import SMALL, TinyConfig, build_tiny
from keel.parts.rewards.judges import DigitJudge
from keel.recipes.registry import recipes
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.tasks.judging import Judging
from keel.tasks.load import load_task
from keel.train.base import BaseRecipe, ensure_base
from keel.train.encode import Encoder

pytestmark = pytest.mark.slow
ASCII = "".join(chr(i) for i in range(32, 127)) + "\n"
QUIET = {"evaluate.before": False, "evaluate.after": False, "train.log_completions": 0}
LABELS = [
    {"prompt": f"{a} {b} {c}>{a * b}=", "completion": text, "label": label}
    for a, b, c in itertools.product(range(2, 8), range(2, 8), range(2, 6))
    for text, label in ((f"({a}+{b})*{c}", True), (f"{a}-{b}-{c}", False))
]


def means(run, name: str, count: int = 5) -> tuple[float, float]:
    """Over the first and over the last steps."""
    values = [value for _, value in run.metrics[name]]
    return sum(values[:count]) / count, sum(values[-count:]) / count


@pytest.fixture(scope="module")
def base() -> str:
    small = BaseRecipe(TinyConfig(dim=32, layers=2, heads=2, feed_forward=64), steps=150, batch_size=64)
    return str(ensure_base(load_task("countdown"), small))


@pytest.fixture(scope="module")
def prm(base, tmp_path_factory):
    return keel.train(
        "implicit_prm", base, data=LABELS, runs=tmp_path_factory.mktemp("runs"), max_steps=40, learning_rate=1e-3,
        **{**QUIET, "beta": 0.5, "train.batch_size": 32},
    )  # fmt: skip


def test_implicit_prm_tells_good_from_bad(prm):
    """The loss falls from log 2, and good completions lead bad ones."""
    losses = [value for _, value in prm.metrics["loss"]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and means(prm, "loss")[1] < 0.3
    assert means(prm, "rewards/margins")[1] > 1.0


@pytest.mark.parametrize("loss", ["kto", "dpo", "nca"])
def test_implicit_prm_by_other_losses(base, tmp_path, loss):
    pairs = [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
        for one, other in zip(LABELS[::2], LABELS[1::2], strict=True)
    ]
    run = keel.train(
        "implicit_prm", base, data=LABELS if loss == "kto" else pairs, runs=tmp_path, max_steps=30, learning_rate=1e-3,
        **{**QUIET, "beta": 0.5, "loss": loss, "train.batch_size": 16},
    )  # fmt: skip
    first, last = means(run, "rewards/margins")
    assert last > first + 0.5


def earned(policy, prm, base) -> float:
    """log prm - log base of completions that the policy draws, in the mean."""
    models = {"policy": load(policy, device="cpu"), "prm": load(prm, device="cpu"), "base": load(base, device="cpu")}
    encoder = Encoder(models["policy"])
    prompts = [encoder.prompt(one["prompt"]) for one in LABELS[::9]]
    rows = LocalGenerator(models["policy"]).generate(prompts, 8, Sampling(max_completion_length=14), seed=0)
    asked = [LogProb(of=("prm",)), LogProb(of=("base",))]
    found = Engine(models).measure(asked, rows)
    return float(((found[asked[0]] - found[asked[1]]) * rows.mask).sum(1).mean())


def test_grpo_follows_process_rewards(base, prm, tmp_path):
    """The run's folder names the reward model, and its rewards alone move the policy: all outcomes are tied."""
    run = keel.train(
        "grpo_implicit_prm", base, task="countdown", runs=tmp_path, max_steps=25, learning_rate=1e-3,
        reward=lambda completions, **columns: [0.0] * len(completions),
        **{**QUIET, "prm": str(prm.path), "prm_beta": 0.2, "num_generations": 4, "rollout.num_prompts": 8,
           "rollout.max_completion_length": 14},
    )  # fmt: skip
    teacher = prm.path / prm.summary["checkpoint"]
    assert earned(run.path / run.summary["checkpoint"], teacher, base) > earned(base, teacher, base) + 0.5


def test_self_judge_does_without_a_reference(tmp_path):
    """The reference is the digit itself; without it the judge has to look at the answer, and learns to."""
    digits = [(str(d), str(a)) for d in range(10) for a in range(20)]
    rows = [
        {"prompt": f"answer {a}:{d} reference {d}:", "prompt_without_reference": f"answer {a}:{d}:", "completion": d}
        for d, a in digits
    ]
    policy = build_tiny(ASCII, SMALL, seed=1)
    run = keel.train(
        "self_judge", policy.module, policy.tokenizer, data=rows, runs=tmp_path, max_steps=80, learning_rate=3e-3,
        **{**QUIET, "train.batch_size": 32},
    )  # fmt: skip
    for name in ("judge/with_reference", "judge/without_reference"):
        first, last = means(run, name)
        assert last < 0.5 * first, name
    judge = DigitJudge("x", template="answer {prompt}:{completion}:")
    from keel.parts.rewards.judges import digit_scores, judging_text

    texts = [judging_text(judge.template, "3", str(d)) for d in (1, 8)]
    low, high = digit_scores(load(run.model, run.tokenizer), texts)[0].tolist()
    assert high > low + 3


def test_spct_learns_to_judge(tmp_path):
    """A model that has seen right judgements three times as often as wrong ones ends with right ones."""
    pairs = [{"prompt": f"{i}", "chosen": "+", "rejected": "-"} for i in range(64)]
    task = Judging(pairs, held_out=0.1, template="{query}{responses}")
    rows = [
        {"prompt": example.prompt, "completion": said}
        for example in task.train
        for place, said in enumerate(("[[9, 1]]", "[[1, 9]]"))
        for _ in range(3 if example.columns["label"] == place else 1)
    ]
    policy = build_tiny(ASCII, SMALL, seed=2)
    known = {"tokenizer": policy.tokenizer, "runs": tmp_path}
    shown = keel.train(
        "sft", policy.module, data=rows, max_steps=150, learning_rate=3e-3, **known, **{**QUIET, "train.batch_size": 32}
    )
    run = keel.train(
        "spct", shown.model, task=task, max_steps=30, learning_rate=1e-3, **known,
        **{**QUIET, "beta": 0.0, "num_generations": 8, "rollout.num_prompts": 8, "rollout.max_completion_length": 10},
    )  # fmt: skip
    assert run.metrics["reward"][0][1] < 0.6 and means(run, "reward")[1] > 0.8


def test_all_recipes_of_this_file_are_there():
    assert {"implicit_prm", "grpo_implicit_prm", "self_judge", "spct"} <= set(recipes())
