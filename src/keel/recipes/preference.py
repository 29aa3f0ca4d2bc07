"""Learning from pairs of completions: DPO, and other links of the same two scores."""

from dataclasses import replace
from typing import Any, Literal

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.models.sources import Initial
from keel.parts.controllers.score_shift import ScoreShift
from keel.parts.terms.links import (
    EXO,
    NCA,
    APODown,
    APOZero,
    BCOPair,
    DiscoPOP,
    Hinge,
    LogSigmoid,
    SPPOHard,
    SquaredToTarget,
)
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.scores import LogRatio
from keel.recipes.registry import recipe

REWARD_KL = "E_pi[r] - beta KL(pi || ref), r of the pairs"
WIN_RATE = "E_pi[P(y beats a completion of ref)] - beta KL(pi || ref)"


@recipe()
def dpo(beta: float = 0.1, label_smoothing: float = 0.0, reference_free: bool = False) -> Method:
    """Direct preference optimisation: -log sigmoid(beta (log-ratio of the chosen - log-ratio of the rejected)).

    Args:
        beta: of the KL to the reference.
        label_smoothing: share of pairs that are taken to be in the wrong order (cDPO).
        reference_free: log-probabilities in place of log-ratios, as if the reference were uniform.

    Source: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", 2023.
    """
    free = Claim("E_pi[r] + beta H(pi), r of the pairs")
    return Method(
        kind="pairs",
        terms={
            "pairs": PairLoss(
                LogSigmoid(), LogRatio(() if reference_free else ("ref",)), beta, label_smoothing=label_smoothing
            )
        },
        aggregation=Aggregation("sequence_mean_token_sum"),
        models={} if reference_free else {"ref": Initial()},
        claim=free if reference_free else Claim(REWARD_KL, "sequence", "kl_policy_ref", "beta"),
    )


def with_loss(method: Method, **changes: Any) -> Method:
    """The method with other settings of its loss of pairs."""
    return method.replacing(terms={**method.terms, "pairs": replace(method.terms["pairs"], **changes)})


def with_score(method: Method, **changes: Any) -> Method:
    """The method with other settings of the score of its pairs."""
    return with_loss(method, score=replace(method.terms["pairs"].score, **changes))


def reference_free_dpo() -> Method:
    """DPO on log-probabilities."""
    return dpo(reference_free=True)


@recipe(baseline="dpo", neutral={"label_smoothing": 0.0})
def cdpo(label_smoothing: float = 0.1, **dpo_options) -> Method:
    """DPO that takes a share of the pairs to be in the wrong order: cross-entropy to a probability below 1.

    Args:
        label_smoothing: that share, in [0, 0.5).

    Source: Mitchell, "A note on DPO with noisy preferences and relationship to IPO", 2023.
    """
    return dpo(label_smoothing=label_smoothing, **dpo_options)


@recipe(baseline="dpo", neutral={"label_smoothing": 0.0})
def robust_dpo(label_smoothing: float = 0.1, **dpo_options) -> Method:
    """DPO whose expected loss under flipped labels is that of clean ones.

        [-(1 - eps) log sigmoid(z) + eps log sigmoid(-z)] / (1 - 2 eps)

    Args:
        label_smoothing: eps, the share of labels that are flipped, in [0, 0.5).

    Source: Chowdhury et al., "Provably Robust DPO: Aligning Language Models with Noisy Feedback", 2024.
    """
    return with_loss(dpo(label_smoothing=label_smoothing, **dpo_options), noise="robust")


@recipe(baseline="dpo")
def ipo(beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
    """IPO per token: the squared distance of the mean log-ratios' difference from 1 / (2 beta).

    Args:
        beta: the paper's tau.
        label_smoothing: share of pairs that are taken to be in the wrong order.

    Source: Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", 2023; the mean
    per token is what its authors run, and TRL's.
    """
    method = with_score(dpo(beta, label_smoothing), norm="mean")
    return with_loss(method, link=SquaredToTarget(unit=beta)).replacing(claim=Claim(WIN_RATE + ", per token"))


@recipe(baseline="dpo")
def ipo_sum(beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
    """IPO as it is printed: the squared distance of the log-ratios' difference from 1 / (2 beta).

    Args:
        beta: the paper's tau.
        label_smoothing: share of pairs that are taken to be in the wrong order.

    Source: Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", 2023, eq. 17.
    """
    claim = Claim(WIN_RATE, "sequence", "kl_policy_ref", "beta", "target", "win_rate_tilt")
    return with_loss(dpo(beta, label_smoothing), link=SquaredToTarget(unit=beta)).replacing(claim=claim)


@recipe(baseline="dpo")
def hinge(margin: float = 1.0, **dpo_options) -> Method:
    """DPO with a hinge, which learns nothing from pairs whose scores are a margin apart.

    Args:
        margin: that margin, in units of beta times the log-ratio.

    Source: Zhao et al., "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", 2023, on log-ratios as in
    Liu et al., "Statistical Rejection Sampling Improves Preference Optimization", 2023.
    """
    claim = Claim("fewest pairs with less than a margin between their rewards")
    return with_loss(dpo(**dpo_options), link=Hinge(margin)).replacing(claim=claim)


@recipe(baseline="dpo")
def exo(epsilon: float = 1e-3, **dpo_options) -> Method:
    """EXO: the reverse KL between the preferences of policy and data, where DPO has the forward one.

    Args:
        epsilon: probability that the order of a pair is wrong, above 0.

    Source: Ji et al., "Towards Efficient Exact Optimization of Language Model Alignment", 2024.
    """
    claim = Claim("E_pi[r] - beta KL(pi || ref), log((1 - epsilon) / epsilon) between the r of a pair")
    return with_loss(dpo(**dpo_options), link=EXO(epsilon)).replacing(claim=claim)


@recipe(baseline="dpo")
def nca(beta: float = 0.1) -> Method:
    """NCA of pairs: each completion is told from one of the reference, so that chosen ones stay likely.

    Args:
        beta: of the KL to the reference.

    Source: Chen et al., "Noise Contrastive Alignment of Language Models with Explicit Rewards", 2024.
    """
    return with_loss(dpo(beta), link=NCA())


@recipe(baseline="dpo")
def bco_pair(beta: float = 0.1, shift: Literal["none", "running"] = "none", decay: float = 0.9) -> Method:
    """BCO on pairs: a classifier of good and of bad completions whose logit is the reward.

    Args:
        beta: of the KL to the reference.
        shift: running subtracts the running mean of both rewards, up to the last batch; none is TRL's.
        decay: of the running mean, once a batch.

    Source: Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", 2024.
    """
    method = with_loss(dpo(beta), link=BCOPair())
    return method if shift == "none" else method.adding(controllers={"shift": ScoreShift(decay=decay)})


@recipe(baseline="dpo")
def apo_zero(beta: float = 0.1) -> Method:
    """APO-zero: chosen completions become likelier and rejected ones less likely, each for itself.

    Args:
        beta: factor of the log-ratios.

    Source: D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions", 2024.
    """
    claim = Claim("chosen completions above the reference, rejected ones below it")
    return with_loss(dpo(beta), link=APOZero()).replacing(claim=claim)


@recipe(baseline="dpo")
def apo_down(beta: float = 0.1) -> Method:
    """APO-down: both completions become less likely, the rejected one more so, where the policy is better than both.

    Args:
        beta: factor of the log-ratios.

    Source: D'Oosterlinck et al., "Anchored Preference Optimization and Contrastive Revisions", 2024.
    """
    claim = Claim("chosen completions below the reference, rejected ones further below it")
    return with_loss(dpo(beta), link=APODown()).replacing(claim=claim)


@recipe(baseline="dpo")
def discopop(tau: float = 0.05, **dpo_options) -> Method:
    """DiscoPOP: DPO's loss blended with an exponential one where a pair is in the right order.

    At the published temperature it rises around a lead of 0, so that pairs may stay in the wrong order.

    Args:
        tau: temperature of the blend; from 0.103 on the loss falls at a lead of 0.

    Source: Lu et al., "Discovering Preference Optimization Algorithms with and for Large Language Models", 2024.
    """
    claim = Claim("rewards of the pairs in the right order, found by search")
    return with_loss(dpo(**dpo_options), link=DiscoPOP(tau)).replacing(claim=claim)


@recipe(baseline="dpo")
def dpo_norm(**dpo_options) -> Method:
    """DPO on mean log-ratios per token, so that long completions have no larger say; beta is then 5 to 10 mostly.

    Source: Lambert et al., "Tulu 3: Pushing Frontiers in Open Language Model Post-Training", 2024.
    """
    return with_score(dpo(**dpo_options), norm="mean").replacing(claim=Claim(REWARD_KL + ", per token"))


@recipe(baseline="dpo")
def sppo_pairs(beta: float = 0.1) -> Method:
    """SPPO on pairs: the winner's log-ratio goes to 1 / (2 beta), the loser's to -1 / (2 beta).

    Args:
        beta: of the KL to the reference.

    Source: Wu et al., "Self-Play Preference Optimization for Language Model Alignment", 2024, with hard labels.
    """
    return with_loss(dpo(beta), link=SPPOHard(beta)).replacing(claim=Claim(WIN_RATE))
