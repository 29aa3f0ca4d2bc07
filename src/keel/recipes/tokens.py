"""GRPO that treats tokens apart: by covariance, probability, entropy, or by the rows that share them."""

import math
from dataclasses import replace
from typing import Literal

from keel.method import Method
from keel.parts.advantages.entropy import EntropyPenalty, TokenGroupScale
from keel.parts.controllers.temperature import EntropyScale
from keel.parts.masks.covariance import HighCovariance
from keel.parts.masks.rarity import RareTokens
from keel.parts.terms.heterogeneous import HeterogeneousClip
from keel.parts.terms.penalties import Summand
from keel.parts.terms.pulls import AbsoluteLogRatio, FilteredPull
from keel.parts.terms.surrogate import Surrogate
from keel.parts.weights.covariance import ClipCov
from keel.parts.weights.entropy_change import EntropyChange
from keel.parts.weights.trajectory import ConflictShare, ConflictWeight
from keel.recipes.policy_gradient import CLIP, dapo, grpo, unclipped_grpo
from keel.recipes.registry import recipe
from keel.rollouts.adaptive import AdaptiveTemperature


@recipe(paper=47, baseline="grpo")
def clip_cov(
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    **grpo_options,
) -> Method:
    """GRPO without the gradient of a random few of the tokens that would take the entropy down fastest.

    Args:
        fraction: share of all tokens that is silenced; 0 is GRPO.
        low, high: covariance of log-probability and advantage from which they are drawn.
        epsilon, epsilon_high: clip range; tokens that it silences are not drawn.

    Source: "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", 2025.
    """
    upper = epsilon if epsilon_high is None else epsilon_high
    method = grpo(epsilon=epsilon, epsilon_high=epsilon_high, **grpo_options)
    return method.adding(weights={"clip_cov": ClipCov(fraction, low, high, epsilon, upper)})


@recipe(paper=47, baseline="grpo", neutral={"coef": 0.0}, reduces_to=unclipped_grpo, without=CLIP)
def kl_cov(fraction: float = 2e-3, coef: float = 1.0, **grpo_options) -> Method:
    """GRPO without a clip, in which the tokens that take the entropy down fastest are held to the policy that sampled.

    On the first update after a batch was drawn it is unclipped GRPO: take several (`train.num_minibatches`).

    Args:
        fraction: share of all tokens that is held, those with the largest covariance of log-probability and advantage.
        coef: of |log pi - log old| on them.

    Source: "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", 2025.
    """
    method = unclipped_grpo(**grpo_options)
    held = Summand(AbsoluteLogRatio(), coef, where="cov", per="batch")
    return method.adding(masks={"cov": HighCovariance(fraction)}, terms={"kl_cov": held})


@recipe(paper=86, baseline="grpo")
def lp_reg(
    fraction: float = 0.01,
    positive_fraction: float = 0.0,
    min_p: float = 0.02,
    coef: float = 1.0,
    epsilon: float = 1.0,
    epsilon_high: float = 9.0,
    dual_clip: float | None = 10.0,
    **grpo_options,
) -> Method:
    """GRPO, hardly clipped, that raises the rarest punished tokens towards a copy of the policy without its noise.

    A token that the filter of the copy removes is noise, and is left to its punishment.

    Args:
        fraction: share of the tokens with A < 0 that may be raised, the least likely; 0.005 for 32B.
        positive_fraction: the same of those with A > 0.
        min_p: of the filter: tokens below this times the likeliest are noise.
        coef: of the pull.
        epsilon, epsilon_high, dual_clip: clip range; the paper's lets the ratio go from 0 to 10.

    Source: "Low-probability Tokens Sustain Exploration in Reinforcement Learning with Verifiable Reward", 2025. In its
    code the pull takes the place of the clip on these tokens; here it comes on top, the same within the clip range.
    """
    method = wide_grpo(epsilon, epsilon_high, dual_clip, **grpo_options)
    return method.adding(
        masks={"rare": RareTokens(fraction, positive_fraction)},
        terms={"pull": Summand(FilteredPull(min_p), coef, where="rare", per="batch")},
    )


@recipe(paper=51, baseline="grpo", neutral={"low": 1.0, "high": 1.0}, reduces_to=lambda: wide_grpo(0.2, 0.28))
def steer(
    low: float = 0.8,
    high: float = 1.2,
    form: Literal["linear", "exponential"] = "linear",
    quantile: float = 1.0,
    epsilon: float = 0.2,
    epsilon_high: float = 0.28,
    dual_clip: float | None = 10.0,
    **grpo_options,
) -> Method:
    """GRPO whose tokens weigh the less, the more their step would change the entropy.

    Args:
        low, high: weights of the largest and the smallest change; `high` is 1 in the exponential form.
        form: how the weight falls between the two.
        quantile: of the changes, taken for the largest.
        epsilon, epsilon_high, dual_clip: clip range.

    Source: "Rethinking Entropy Interventions in RLVR: An Entropy Change Perspective", 2025.
    """
    method = wide_grpo(epsilon, epsilon_high, dual_clip, **grpo_options)
    return method.adding(weights={"entropy_change": EntropyChange(low, high, form, quantile)})


@recipe(
    paper=30,
    baseline="grpo",
    neutral={"coef": 0.0, "max_entropy": math.inf, "amplify": 1.0, "suppress": 1.0},
    reduces_to=lambda: unclipped_grpo(aggregation="sequence_mean_token_mean"),
    without=CLIP,
    passes={"aggregation": "sequence_mean_token_mean"},
)
def gtpo(
    coef: float = 0.1,
    max_entropy: float = 0.7,
    amplify: float = 2.0,
    suppress: float = 0.0,
    per_conflict: bool = False,
    **grpo_options,
) -> Method:
    """GRPO that does not punish what bad completions share with good ones, and drops completions of high entropy.

    Args:
        coef: of the mean entropy of a completion, taken from its advantage.
        max_entropy: completions above it are dropped, in nats, unless the first batch is above ln 2 in the mean;
            math.inf keeps all.
        amplify, suppress: weight of a shared beginning or end in good and in bad completions.
        per_conflict: divide a completion's loss by the number of its shared tokens, as the authors' code does.

    Source: "GTPO: Trajectory-Based Policy Optimization in Large Language Models", 2025; one update a batch, no clip.
    """
    method = unclipped_grpo(**grpo_options)
    return method.adding(
        advantage={"entropy": EntropyPenalty(coef, max_entropy)},
        weights={
            "conflict": ConflictWeight(amplify, suppress),
            **({"share": ConflictShare()} if per_conflict else {}),
        },
    )


@recipe(
    paper=112,
    baseline="dapo",
    neutral={"clip": 0.0, "scale": 0.0, "token_average": False, "tau": 0.0},
    reduces_to=lambda: dapo(epsilon_high=0.2, dual_clip=10.0),
    preset={"train.dynamic_sampling": True},
)
def hapo(
    quantile: float = 0.8,
    clip: float = 1.0,
    scale: float = 1.0,
    token_average: bool = True,
    tau: float = 0.05,
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = 10.0,
    overlong_cache: int | None = None,
    max_completion_length: int = 256,
    **dapo_options,
) -> Method:
    """DAPO whose temperature, clip range, advantage and group statistics follow the entropy of each token.

    Args:
        quantile: of the log-entropies of the batch; tokens above it are of high entropy.
        clip: how much the clip range follows the score of the entropy, from 0 to 1.
        scale: how much the advantage does.
        token_average: mean and deviation of a group over its tokens in place of its completions.
        tau: how much the temperature of a token does, by the score among the tokens of the batch before.
        epsilon, epsilon_high, dual_clip: clip range at score 0.
        overlong_cache: tokens before the limit over which a punishment of length grows; None is two fifths of the
            limit, 0 is no punishment: turn it off if completions become shorter and shorter.
        max_completion_length: the limit.

    Source: "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature", 2025.
    """
    method = dapo(
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        dual_clip=dual_clip,
        overlong_cache=max(1, 2 * max_completion_length // 5) if overlong_cache is None else overlong_cache,
        max_completion_length=max_completion_length,
        **dapo_options,
    )
    surrogate = Surrogate(HeterogeneousClip(epsilon, epsilon_high, dual_clip, quantile, clip, scale))
    average = {"token_average": TokenGroupScale()} if token_average else method.advantage
    method = method.replacing(surrogate=surrogate, advantage=average)
    if not tau:
        return method
    assert method.rollout is not None
    rollout = replace(method.rollout, adaptive=AdaptiveTemperature(tau))
    return method.replacing(rollout=rollout).adding(controllers={"entropy_scale": EntropyScale(quantile)})


def wide_grpo(epsilon: float, epsilon_high: float, dual_clip: float | None = 10.0, **grpo_options) -> Method:
    """GRPO with the clip ranges of some of these papers, and a dual clip."""
    return grpo(epsilon=epsilon, epsilon_high=epsilon_high, dual_clip=dual_clip, **grpo_options)
