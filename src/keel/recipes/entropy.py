"""Methods that hold the entropy of the policy: at an anchor, or inside the band of its history."""

from dataclasses import replace
from typing import Literal

from keel.method import Method
from keel.parts.controllers.entropy import EntropyAnchor, PhaseWeight, TurnEntropy
from keel.parts.masks.entropy import PeakEntropy
from keel.parts.terms.entropy import AnchoredEntropy, EntropyBand
from keel.parts.terms.penalties import NegativeEntropy, Summand
from keel.recipes.policy_gradient import dr_grpo, grpo
from keel.recipes.registry import recipe


@recipe(paper=52, baseline="dr_grpo", neutral={"coef": 0.0, "epsilon": 0.2, "epsilon_high": None})
def siren(
    coef: float = 0.005,
    top_p: float = 0.8,
    quantile: float = 0.8,
    anchor: float | None = None,
    epsilon: float = 0.28,
    epsilon_high: float | None = 0.28,
    **dr_grpo_options,
) -> Method:
    """SIREN: Dr. GRPO that pulls the nucleus entropy at each completion's peaks back to where it was at the start.

        loss = Dr. GRPO + coef (Hbar - anchor)^2,   Hbar the mean over completions of that over their peak tokens

    Args:
        coef: of the pull.
        top_p: the entropy is that of the nucleus that holds this probability, of the 10000 likeliest tokens.
        quantile: share of a completion's tokens that are no peaks.
        anchor: in nats; None is Hbar of the first batch, which costs a pass over every batch.
        epsilon, epsilon_high: clip range below and above 1.

    Source: "Rethinking Entropy Regularization in Large Reasoning Models", 2025.
    """
    method = dr_grpo(epsilon=epsilon, epsilon_high=epsilon_high, **dr_grpo_options)
    if not coef:
        return method
    assert method.claim is not None
    objective = "E_pi[r] - coef (mean peak entropy - anchor)^2, verified at the anchor, where the pull is 0"
    controllers = {} if anchor is not None else {"anchor": EntropyAnchor("peak_entropy", quantile, top_p)}
    return method.replacing(claim=replace(method.claim, objective=objective)).adding(
        masks={"peaks": PeakEntropy(quantile, top_p)},
        terms={"peak_entropy": AnchoredEntropy(coef, anchor, "peaks", top_p)},
        controllers=controllers,
    )


@recipe(paper=100, baseline="grpo", neutral={"entropy_coef": 0.0})
def epo(
    entropy_coef: float = 0.001,
    smoothing: float = 0.05,
    low: float = 0.0,
    high: float = 2.0,
    differentiable: bool = True,
    level: Literal["token", "sequence"] = "token",
    steps: int = 150,
    **grpo_options,
) -> Method:
    """EPO: GRPO with an entropy bonus, and a penalty on tokens whose entropy leaves the band of its own history.

        loss = GRPO - entropy_coef (mean H - w(step) smoothing mean P),   P = distance of H from [low, high] Hbar

    Args:
        entropy_coef: of both.
        smoothing: of the penalty beside the bonus.
        low, high: the band, in units of the mean entropy of the same turn in past batches.
        differentiable: False is the release, whose penalty is a constant outside the band and has no gradient.
        level: sequence judges completions by their mean entropy.
        steps: batches of the training, which the weight w of the penalty depends on.

    Source: "EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning", 2025; the penalty with
    a gradient is not the authors'.
    """
    method = grpo(entropy_coef=0.0, **grpo_options)
    if not entropy_coef:
        return method
    method = method.adding(terms={"entropy": Summand(NegativeEntropy(), entropy_coef)})
    if not smoothing:
        return method
    scale = entropy_coef * smoothing
    band = EntropyBand(low, high, (), differentiable, level)
    return method.adding(
        terms={"band": Summand(band, scale)},
        controllers={"history": TurnEntropy("band"), "phase": PhaseWeight("terms.band.coef", scale, steps)},
    )
