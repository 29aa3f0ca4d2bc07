"""A folder of runs whose every number is known."""

import numpy as np

from keel.evaluate.evaluation import Samples, assess
from keel.store.records import StoredRollout
from keel.store.store import Store

HOSTILE = "<script>alert(1)</script>"
STEPS = 40


def config(beta=0.02, **more):
    """A configuration as training stores it, cut to what pages read."""
    return {
        "recipe": {"name": "grpo", "arguments": {"beta": beta}},
        "method": {
            "part": "method",
            "kind": "online",
            "rollout": {"part": "rollout", "num_prompts": 2, "num_generations": 4, "top_p": None},
            "advantage": {"centre": {"part": "group_centre"}, "scale": {"part": "group_std", "epsilon": 1e-4}},
            "surrogate": {"part": "surrogate", "f": {"part": "clip", "epsilon": 0.2}, "level": "token"},
            "masks": {},
            "terms": {"kl": {"part": "summand", "penalty": {"part": "sampled_kl", "estimator": "k3"}, "coef": beta}},
            "claim": {"part": "claim", "objective": "E_pi[r] - beta KL(pi || ref)"},
        },
        "task": {"name": "countdown", "data": None},
        "train": {"max_steps": STEPS, "learning_rate": 1e-4},
        "seed": 0,
        **more,
    }


def solved(count, prompts=20, n=8):
    """An evaluation in which `count` of n samples of every prompt are correct."""
    correct = np.array([[float(j < count) for j in range(n)] for _ in range(prompts)])
    lengths, cut = np.full((prompts, n), 6), np.zeros((prompts, n), dtype=bool)
    return assess(Samples(correct, lengths, cut, index=tuple(range(prompts))))


def rollout(group, member, text=None, *, step=0, length=3, stop="eos"):
    """A completion of known numbers: token t has entropy (t + 1) / 2 and advantage member - 1."""
    told = text if text is not None else f"{group}+{member}=<b>&"
    return StoredRollout(
        prompt=f"prompt {group} <i>",
        completion=told,
        reward=float(member % 2),
        rewards={"correct": float(member % 2)},
        group=group,
        stop=stop,
        length=length,
        tokens=tuple(told[i : i + 1] if i < length - 1 else told[i:] for i in range(length)),
        numbers={
            "entropy": np.arange(1, length + 1) / 2,
            "advantage": np.full(length, member - 1.0),
            "kl": np.full(length, 0.25),
            "weight/clip": np.ones(length),
        },
    )


def build(folder):
    """Four runs: one finished, with all that can be stored; one that goes on; a hostile name; one in a sub-folder."""
    with Store(folder / "keel.sqlite") as store:
        first = store.create_run("base", config(), "grpo", "countdown", "tiny", 0)
        for step in range(1, STEPS + 1):
            store.log_metrics(first, step, {"reward": step / 100, "entropy": 1.0, "kl": 0.01 * step, "loss": -0.5})
        for step in (10, 20):
            store.log_rollouts(first, step, [rollout(g, m) for g in (0, 1) for m in range(4)])
        store.log_rollouts(first, 30, [rollout(0, 1, "so it is thirty-six\n6*6", length=5, stop="length")])
        before, after = solved(2), solved(6)
        store.log_evaluation(first, 0, "before", before.to_json())
        store.log_evaluation(first, STEPS, "after", after.to_json())
        said = {phase: {"pass@1": [value, value, value]} for phase, value in (("before", 0.25), ("after", 0.75))}
        store.finish(first, "finished", said)

        going = store.create_run("going", config(beta=0.5), "grpo", "countdown", "tiny", 1)
        for step in range(1, 4):
            store.log_metrics(going, step, {"reward": 0.1 * step, "entropy": float("nan"), "grad_norm": float("inf")})

        hostile = store.create_run(HOSTILE, config(), HOSTILE, HOSTILE, HOSTILE, 0)
        store.log_metrics(hostile, 1, {f"rewards/{HOSTILE}/mean": 0.5, "reward": 0.5})
        store.log_rollouts(hostile, 1, [rollout(0, 0, HOSTILE * 2, length=4)])
        store.finish(hostile, "failed", {})

        nested = store.create_run("sweep/a", config(), "dr_grpo", "sparse", "tiny", 0)
        store.finish(nested, "stopped", {})
    (folder / "base").mkdir()
    (folder / "base" / "report.html").write_text("<!doctype html><title>base</title><script>let x = 1;</script>")
    return folder
