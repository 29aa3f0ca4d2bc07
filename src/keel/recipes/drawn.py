"""Policy gradients that change how completions are drawn."""

from dataclasses import replace

from keel.method import Method
from keel.parts.advantages.candidates import ReplaceWithCandidates
from keel.parts.controllers.temperature import TemperatureSwitch
from keel.recipes.policy_gradient import grpo
from keel.recipes.registry import recipe
from keel.rollouts.extra import ExtraCompletions


@recipe(paper=50, baseline="grpo", neutral={"replaced": 0})
def aepo(
    target_entropy: float = 0.5,
    replaced: int = 60,
    share: float = 0.25,
    high: float = 1.2,
    low: float = 0.8,
    good_above: float = 0.05,
    **grpo_options,
) -> Method:
    """GRPO that holds its entropy at a target by learning from right completions drawn at another temperature.

    Args:
        target_entropy: in nats per token; candidates are drawn at `low` above it, else at `high`.
        replaced: rows of a batch that right candidates replace at most; 0 is GRPO, and draws none.
        share: of the prompts that get candidates.
        high, low: temperatures below and above the target.
        good_above: advantage above which a candidate is right.

    Source: "Arbitrary Entropy Policy Optimization: Entropy Is Controllable in Reinforcement Fine-tuning", 2025; there,
    60 rows of 2560 are replaced, and the clip range is 0.2 to 0.3.
    """
    method = grpo(**grpo_options)
    if not replaced:
        return method
    assert method.claim is not None and method.rollout is not None
    rollout = replace(method.rollout, extra=ExtraCompletions(share, high))
    return method.replacing(rollout=rollout, claim=replace(method.claim, invariant=())).adding(
        advantage={"candidates": ReplaceWithCandidates(replaced, good_above)},
        controllers={"temperature": TemperatureSwitch(target=target_entropy, high=high, low=low)},
    )
