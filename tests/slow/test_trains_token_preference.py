"""Methods that look at single tokens, trained offline on pairs that differ in one planted token."""

import pytest

import keel
from keel.models.tiny import TinyConfig
from keel.tasks.load import load_task
from keel.train.base import BaseRecipe, ensure_base

SMALL = BaseRecipe(TinyConfig(dim=32, layers=2, heads=2, feed_forward=64), steps=150, batch_size=64)
PAIRS = [
    {"prompt": f"{a} {b} {c}>{a * b}=", "chosen": f"({a}+{b})*{c}", "rejected": f"({a}-{b})*{c}"}
    for a in range(2, 9)
    for b in range(2, 9)
    for c in range(2, 6)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Metrics of a recipe by name: the means over the first and the last ten of 60 steps; each run is made once."""
    base, known = str(ensure_base(load_task("countdown"), SMALL)), {}

    def train(name: str, **options) -> dict[str, tuple[float, float]]:
        key = (name, *options.items())
        if key not in known:
            quiet = {"evaluate.before": False, "evaluate.after": False, "train.log_completions": 0}
            run = keel.train(
                name,
                model=base,
                data=PAIRS,
                runs=tmp_path_factory.mktemp("runs"),
                max_steps=60,
                **{"learning_rate": 1e-3, "train.batch_size": 16, **quiet, **options},
            )
            found = {metric: [value for _, value in points] for metric, points in run.metrics.items()}
            known[key] = {m: (sum(v[:10]) / 10, sum(v[-10:]) / 10) for m, v in found.items() if len(v) == 60}
        return known[key]

    return train


OPTIONS = {
    "tdpo": {},
    "rrpo": {},
    "t_reg": {"better": "1+1=2>", "worse": "1+1=3>"},
    "sparse_po": {"l1_reward": 0.01, "l1_kl": 1e-6},  # at 0 there would be no term that says how large the mask is
    "ma_po": {},
    "spo_degree": {"gamma": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_the_planted_preference_is_learned(trained, name):
    """rewards/margins rises, and rewards/accuracies comes near 1."""
    found = trained(name, **OPTIONS[name])
    assert found["rewards/margins"][1] > found["rewards/margins"][0]
    assert found["rewards/accuracies"][1] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tdpo", "rrpo"])
def test_the_divergence_stays_lower(trained, name):
    """divergence/kl_ref_policy on the data, where all pairs are in order with the divergence and without."""
    slow = {"learning_rate": 3e-4}
    plain, held = trained(name, alpha=1e-6, **slow), trained(name, **slow)
    assert plain["rewards/accuracies"][1] > 0.95 and held["rewards/accuracies"][1] > 0.95
    assert held["divergence/kl_ref_policy"][1] < 0.95 * plain["divergence/kl_ref_policy"][1]


@pytest.mark.slow
def test_token_rewards_of_the_policy_follow_those_of_the_prompts(trained):
    """token_reward/correlation of log-ratios and r rises."""
    before, after = trained("t_reg", **OPTIONS["t_reg"])["token_reward/correlation/chosen"]
    assert after > before


@pytest.mark.slow
def test_masks_shrink_where_they_cost(trained):
    """mask_reward/mean falls under its norm's price; that of the divergence, which costs next to nothing, does not."""
    found = trained("sparse_po", **OPTIONS["sparse_po"])
    assert found["mask_reward/mean/chosen"][1] < 0.95 * found["mask_reward/mean/chosen"][0]
    assert found["mask_reward/mean/chosen"][1] < found["mask_kl/mean/chosen"][1]


@pytest.mark.slow
def test_degrees_are_told_apart(trained):
    """rehearsal/degree falls below the entropy of the classes, and degree/accuracy rises."""
    found = trained("spo_degree", **OPTIONS["spo_degree"])
    assert found["rehearsal/degree"][1] < found["rehearsal/degree"][0]
    assert found["degree/accuracy"][1] > found["degree/accuracy"][0]
