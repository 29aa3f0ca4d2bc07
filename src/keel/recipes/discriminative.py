"""Good completions against bad ones, with a trust region in place of a clip."""

from typing import Literal

from keel.method import Claim, Method
from keel.parts.terms.discriminative import Discrimination, KLHinge
from keel.recipes.registry import recipe
from keel.rollouts.rollout import Rollout


@recipe(paper=79)
def disco(
    score: Literal["log_likelihood", "ratio"] = "log_likelihood",
    tau: float | None = None,
    kl_coef: float = 1e3,
    delta: float = 1e-4,
    threshold: float = 0.5,
    num_generations: int = 8,
    temperature: float = 1.0,
    max_completion_length: int = 256,
) -> Method:
    """The score of good completions above the soft maximum of the bad ones', within a KL of the policy that sampled.

    There is no deviation to divide by, so that hard and easy prompts count alike, and no clip. On the first update of a
    batch the trust region does nothing: it is meant for several (`train.num_minibatches`; 4 in the paper).

    Args:
        score: of a completion, the mean log-likelihood of its tokens or their mean ratio to the old policy.
        tau: temperature of the soft maximum; None is 10 for log_likelihood and 1 for ratio, inf the mean (DisCO-b).
        kl_coef: coefficient of the squared hinge.
        delta: KL per token that is free, in nats.
        threshold: reward from which on a completion is good.
        num_generations: the group size, at least 2.
        temperature: of the sampler, 0.6 in the paper.
        max_completion_length: tokens at most.

    Source: "DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization", 2025.
    """
    if num_generations < 2:
        raise ValueError("disco tells completions of one prompt apart: num_generations must be at least 2")
    soft = (10.0 if score == "log_likelihood" else 1.0) if tau is None else tau
    gap = Discrimination(score, soft, max_length=max_completion_length, threshold=threshold)
    return Method(
        rollout=Rollout(
            num_generations=num_generations, temperature=temperature, max_completion_length=max_completion_length
        ),
        terms={"gap": gap, "trust": KLHinge(kl_coef, delta)},
        claim=Claim("E_good[s] - softmax_bad[s] of each prompt, for E_pi[r]"),
    )


@recipe(paper=77, baseline="disco", neutral={"length_temperature": float("inf")})
def drpo(length_temperature: float = 0.1, **disco_options) -> Method:
    """DisCO that learns short good completions more than long ones, and never holds its length against a good one.

        weight of a good completion   exp((1 - L / max_completion_length) / lambda), normalised within its prompt

    Prompts without a bad completion teach nothing about length.

    Args:
        length_temperature: lambda; smaller is shorter.

    Source: "DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization", 2025.
    """
    return disco(**disco_options).set("terms.gap.length_temperature", length_temperature)
