"""Every loss of pairs, trained offline for a few dozen steps on pairs that one rule orders."""

import pytest
from tests.slow import test_trains_token_preference as tokens
from tests.slow.learners import reading
from tests.train import test_labels_and_lists as sorted_pairs

import keel
from keel.models.tiny import TinyConfig
from keel.tasks.load import load_task
from keel.train.base import BaseRecipe, ensure_base

SMALL = BaseRecipe(TinyConfig(dim=32, layers=2, heads=2, feed_forward=64), steps=150, batch_size=64)
PAIRS = [
    {
        "prompt": f"{a} {b} {c}>{a * b}=",
        "chosen": f"({a}+{b})*{c}",
        "rejected": f"({a}-{b})*{c}" if c % 2 else f"{a}-{b}-{c}",
        "score_chosen": 3.0,
        "score_rejected": 1.0,
    }
    for a in range(2, 9)
    for b in range(2, 9)
    for c in range(2, 6)
]
OPTIONS: dict[str, dict] = {  # of those whose defaults are for longer runs
    "simpo": {"beta": 2.0},
    "alpha_po": {"beta": 2.0},
    "bco_pair": {"shift": "running"},
    "discopop": {"tau": 1.0},  # at 0.05 the loss rises around a lead of 0, and 40 steps end at accuracy 0.5
    "dpo_norm": {"beta": 5.0},
    "f_dpo": {"divergence": "forward_kl"},
    "rpo": {"form": "averaged", "eta": 0.2},
    "tpo": {"data": [{**pair, "gold": pair["chosen"]} for pair in PAIRS]},
    "tr_dpo": {"every": 10},
}
ELSEWHERE = {*tokens.OPTIONS, *sorted_pairs.RISES}  # trained there, on data of their own


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Metrics of a recipe by name: the means over the first and the last five of 40 steps."""
    base = str(ensure_base(load_task("countdown"), SMALL))

    def train(name: str, **options) -> dict[str, tuple[float, float]]:
        run = keel.train(
            name,
            model=base,
            runs=tmp_path_factory.mktemp("runs"),
            max_steps=40,
            learning_rate=1e-3,
            **{"train.batch_size": 16, "evaluate.before": False, "evaluate.after": False, "train.log_completions": 0},
            **{"data": PAIRS, **options},
        )
        found = {metric: [value for _, value in points] for metric, points in run.metrics.items()}
        return {m: (sum(v[:5]) / 5, sum(v[-5:]) / 5) for m, v in found.items() if len(v) == 40}

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*reading("pairs")} - ELSEWHERE))
def test_the_rule_is_learned(trained, name):
    """rewards/margins rises and rewards/accuracies passes 0.9; terms of likelihood fall."""
    found = trained(name, **OPTIONS.get(name, {}))
    for term in {"terms/nll", "terms/gold"} & found.keys():
        assert found[term][1] < found[term][0]
    if name == "sft_pairs":
        return
    assert found["rewards/margins"][1] > found["rewards/margins"][0]
    assert found["rewards/accuracies"][1] > 0.9


@pytest.mark.slow
def test_a_small_coefficient_slows_the_fall_of_rejected_completions(trained):
    """displacement/drop of Flex-DPO after 40 steps lies above that with equal coefficients."""
    flex, equal = (trained("flex_dpo", beta_minus=value) for value in (0.02, 0.1))
    assert equal["displacement/drop"][1] < flex["displacement/drop"][1] < 0
    assert flex["displacement/degradation"][1] < flex["displacement/degradation"][0]
