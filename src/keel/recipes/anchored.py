"""Uniform over the good answers: the reward anchored at the reference's mode."""

from keel.method import Claim, Method
from keel.parts.rewards.anchored import ModeAnchor
from keel.parts.rewards.transforms import WeightedSum
from keel.recipes.policy_gradient import rloo
from keel.recipes.registry import recipe


@recipe(baseline="rloo", neutral={"threshold": float("inf")})
def mara(beta: float = 0.05, threshold: float = 1.0, num_generations: int = 8, **rloo_options) -> Method:
    """RLOO on a reward that takes back the reference's preferences among good completions.

        r'(y) = r(z) + beta (log ref(z) - log ref(y))   where r(y) >= threshold,   r(y) elsewhere

    With KL(policy || ref) at the same beta, as k1 in the reward, the optimum is uniform over the good completions,
    where plain RLOO's keeps their odds under the reference. How much all of them hold together is decided by the tilt
    ref e^(r' / beta) / Z, which gives each the odds of the anchor. That is exact where the anchor is the likeliest of
    all good completions; the likeliest of a group changes from draw to draw, which biases the step, less in larger
    groups (`keel verify mara` says by how much).

    It stands on RLOO because there KL and reward share one scale. In GRPO the KL stands in the loss and the reward is
    divided by the group's deviation, which makes its coefficient beta times that deviation: no longer the one that the
    reward was written for. A controller of the KL's coefficient would do the same.

    Args:
        beta: coefficient of the KL, in reward and penalty.
        threshold: completions of at least this reward are good.
        num_generations: completions a prompt; the anchor is the likeliest good one among them.

    Source: "KL-Regularized Reinforcement Learning is Designed to Mode Collapse", 2025, arXiv 2510.20817; beta is
    RLOO's, the paper's varies with the task.
    """
    method = rloo(beta=beta, num_generations=num_generations, **rloo_options)
    objective = "KL(pi || ref exp(r' / beta) / Z), which is uniform over r >= threshold"
    return method.replacing(
        transforms={"sum": WeightedSum(), "anchor": ModeAnchor(beta, threshold), **method.transforms},
        claim=Claim(objective, "sequence", "kl_policy_ref", "beta", "target", "mode_anchor"),
    )
