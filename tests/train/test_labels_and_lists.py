"""Methods that learn from labels, sorted pairs, lists and segments, on the loop: their metrics move as they should."""

import math

import pytest
from tests.slow.learners import reading

PAIRS = [(f"{n} {n} {n}>{3 * n}=", f"{n}+{n}+{n}", f"{n}*{n}-{n}") for n in range(2, 20)]
DATA = {
    "labels": [{"prompt": p, "completion": c, "label": c == good} for p, good, bad in PAIRS for c in (good, bad)],
    "pairs": [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in PAIRS],
    "lists": [{"prompt": p, "completions": [bad, good, good[:3]], "scores": [0.0, 2.0, 1.0]} for p, good, bad in PAIRS],
    "supervised": [{"prompt": p, "completion": good} for p, good, _ in PAIRS],
}
# of each method: its data, the metric, and by how much its last values have to be above the first ones
RISES = {
    "kto": ("labels", "rewards/margins", 0.02),
    "bco": ("labels", "rewards/margins", 0.02),
    "aot": ("pairs", "rewards/margins", 0.05),
    "aot_unpaired": ("pairs", "rewards/margins", 0.05),
    "list_dpo": ("lists", "ranking/ndcg@5", 0.05),
    "in_context_ranking": ("lists", "ranking/ndcg@5", 0.05),
    "cpl": ("pairs", "rewards/accuracies", 0.05),
    "implicit_reward_sft": ("supervised", "rewards/implicit", 0.05),
}


def curve(run, name: str) -> list[float]:
    return [value for _, value in run.metrics[name]]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*RISES, *reading("labels"), *reading("lists")} - {"implicit_prm"}))
def test_its_metric_rises(name, train):
    kind, metric, by = RISES.get(name) or RISES["kto" if name in reading("labels") else "list_dpo"]
    settings = {"train.batch_size": 12, "learning_rate": 3e-3, "max_steps": 40}
    run = train(name, data=DATA[kind], name=name, **settings)
    values = curve(run, metric)
    assert sum(values[-5:]) / 5 > sum(values[:2]) / 2 + by, values
    assert all(math.isfinite(value) for one in run.metrics.values() for _, value in one)


def test_kto_estimates_its_kl_on_other_prompts(train):
    """At the start the policy is the reference: z0 is 0, and every loss 1/2; after an update it is not."""
    run = train("kto", data=DATA["labels"], name="kl", max_steps=2, learning_rate=1e-2, **{"train.batch_size": 8})
    assert curve(run, "kl")[0] == pytest.approx(0, abs=1e-5) and abs(curve(run, "kl")[1]) > 1e-3
    assert curve(run, "loss")[0] == pytest.approx(0.5, abs=1e-5)
