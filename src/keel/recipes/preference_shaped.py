"""DPO held by another divergence or reference, and with other weights, offsets and terms beside it."""

from dataclasses import replace
from typing import Literal

from keel.core.aggregate import Aggregation
from keel.divergences.family import FDivergence, f_divergence
from keel.method import Claim, Method
from keel.models.sources import EMA
from keel.parts.terms.displacement import WatchedPairLoss
from keel.parts.terms.features import LengthFeature, LostLikelihood
from keel.parts.terms.length_weights import SharedLength
from keel.parts.terms.links import Bregman, SquaredToTarget
from keel.parts.terms.pair_weights import WPO, ScoreGap
from keel.parts.terms.score_maps import FPrime
from keel.parts.terms.scores import LogRatio
from keel.recipes.preference import dpo, with_loss, with_score
from keel.recipes.preference_free import likelihood_of_chosen
from keel.recipes.registry import recipe


@recipe(paper=10, baseline="dpo", neutral={"divergence": "reverse_kl"})
def f_dpo(
    divergence: str = "js",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    scaling: Literal["paper", "keel"] = "paper",
) -> Method:
    """DPO held by another f-divergence: f'(pi / ref) of whole completions in place of the log-ratio.

    Args:
        divergence: a name that `f_divergence` reads, policy first: forward_kl, js, alpha:0.5, chi2 ...
        beta: its coefficient.
        label_smoothing: share of pairs that are taken to be in the wrong order.
        scaling: paper takes js and alpha as they are scaled there: twice Keel's js, and alpha:a for Keel's alpha:1-a,
            of which 0 is the reverse KL and 1 the forward one.

    Source: Wang et al., "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints", 2024.
    """
    kind = f_divergence(divergence)
    if scaling == "paper" and kind.name == "js":
        kind = kind.scaled(2.0)
    elif scaling == "paper" and kind.name == "alpha":
        kind = FDivergence("alpha", 1 - (kind.parameter or 0.0), kind.scale)
    objective = f"E_pi[r] - beta {kind}(pi, ref), r of the pairs"
    method = with_score(dpo(beta, label_smoothing), map=FPrime(str(kind)))
    return method.replacing(claim=Claim(objective, "sequence", str(kind), "beta"))


@recipe(
    paper=146,
    baseline="dpo",
    neutral={"eta": 0.0},
    preset={"train.learning_rate": 5e-7},
)
def rpo(
    eta: float = 0.005, form: Literal["summed", "averaged"] = "summed", beta: float = 0.1, label_smoothing: float = 0.0
) -> Method:
    """RPO: DPO and the likelihood of chosen completions, against rewards that are adversarial off the data.

        summed      + eta beta mean_i(-log pi(y_w))
        averaged    + eta mean_i(-log pi(y_w) / L_w)

    Args:
        eta: coefficient; the authors take 0.005 for summed and 0.2 for averaged.
        form: of the likelihood.
        beta: of the KL to the reference; the authors take 0.01 to 0.05 for summed and 0.5 for averaged.
        label_smoothing: share of pairs that are taken to be in the wrong order.

    Source: Liu et al., "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial
    Regularizer", 2024.
    """
    objective = "max_pi min_r of eta (E_pi[r] - E_chosen[r] - beta KL(pi || ref)) + what the pairs say against r"
    claim = Claim(objective, "sequence", "kl_policy_ref", "beta")
    mode: Literal["sequence_mean_token_sum", "sequence_mean_token_mean"] = (
        "sequence_mean_token_sum" if form == "summed" else "sequence_mean_token_mean"
    )
    method = dpo(beta, label_smoothing).replacing(aggregation=Aggregation(mode), claim=claim)
    return method.adding(terms=likelihood_of_chosen(eta * beta if form == "summed" else eta))


@recipe(paper=152, baseline="dpo", neutral={"beta_minus": 0.1})
def flex_dpo(beta: float = 0.1, beta_minus: float = 0.05, nll_coef: float = 0.0) -> Method:
    """Flex-DPO: DPO with a smaller coefficient on the rejected completion, so that its likelihood falls more slowly.

        -log sigmoid(beta (log pi / ref)(y_w) - beta_minus (log pi / ref)(y_l))

    The constant of the prompt does not cancel, so that the scores are no rewards. Logs how likelihoods are displaced.

    Args:
        beta: coefficient of the chosen completion.
        beta_minus: that of the rejected one.
        nll_coef: coefficient of -log pi of the chosen completion, summed over its tokens.

    Source: Yan et al., "3D-Properties: Identifying Challenges in DPO and Charting a Path Forward", 2025; the loss is
    reconstructed.
    """
    loss = dpo(beta).terms["pairs"]
    watched = WatchedPairLoss(loss.link, loss.score, beta, rejected=LogRatio(scale=beta_minus / beta))
    method = dpo(beta).replacing(
        terms={"pairs": watched}, claim=Claim("likelihood of the pairs, with scores of two strengths")
    )
    return method.adding(terms=likelihood_of_chosen(nll_coef))


@recipe(baseline="dpo")
def wpo(aligned: bool = True, **dpo_options) -> Method:
    """WPO: DPO on pairs weighted by how likely the policy itself would write both completions.

    Args:
        aligned: weigh by each token's probability relative to what the policy's own tokens have on average; False
            takes the probability itself.

    Source: Zhou et al., "WPO: Enhancing RLHF with Weighted Preference Optimization", 2024.
    """
    return with_loss(dpo(**dpo_options), weight=WPO(aligned))


@recipe(baseline="dpo", neutral={"tail": 1.0})
def ld_dpo(tail: float = 0.5, **dpo_options) -> Method:
    """LD-DPO: DPO in which tokens beyond the shorter completion's length count less.

    Args:
        tail: their weight, in [0, 1].

    Source: Liu et al., "Length Desensitization in Direct Preference Optimization", 2024; TRL's `ld_alpha`.
    """
    return with_score(dpo(**dpo_options), weight=SharedLength(tail))


@recipe(baseline="dpo", neutral={"alpha": 0.0})
def r_dpo(alpha: float = 0.01, beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
    """R-DPO: DPO whose reward pays alpha for each token, so that the length of chosen completions is not learnt.

        -log sigmoid(beta (log-ratio difference) + alpha (L_w - L_l))

    Args:
        alpha: what a token costs; below 0 length is rewarded.
        beta: of the KL to the reference.
        label_smoothing: share of pairs that are taken to be in the wrong order.

    Source: Park et al., "Disentangling Length from Quality in Direct Preference Optimization", 2024.
    """
    method = dpo(beta, label_smoothing)
    if not alpha:
        return method
    claim = Claim("E_pi[r - alpha L] - beta KL(pi || ref), r of the pairs")
    return with_score(method, features=(LengthFeature(alpha / beta),)).replacing(claim=claim)


@recipe(baseline="dpo", neutral={"alpha": 0.0})
def odpo(
    alpha: float = 1.0,
    gap: Literal["log_score", "score", "data"] = "log_score",
    offset: float = 0.0,
    **dpo_options,
) -> Method:
    """ODPO: DPO in which the rewards of a pair have to lie apart by what the data say of their scores.

        -log sigmoid(beta (log-ratio difference) - alpha gap - offset)

    Args:
        alpha: factor of the gap.
        gap: log_score, the logarithm of the difference of the scores; score, the difference; or data, the column
            `margin`.
        offset: a gap that all pairs share.

    Source: Amini et al., "Direct Preference Optimization with an Offset", 2024.
    """
    part = None if gap == "data" else ScoreGap(log=gap == "log_score")
    method = dpo(**dpo_options)
    claim = Claim("likelihood of the pairs, their rewards apart by more than the gap of their scores")
    if alpha or offset:
        method = method.replacing(claim=claim)
    return with_loss(method, offset=offset, margin=alpha, gap=part if alpha else None)


@recipe(baseline="dpo")
def rebel_pairs(beta: float = 0.1, gap: Literal["score", "data"] = "score") -> Method:
    """REBEL on pairs: the difference of log-ratios regresses on the difference of the scores of the data.

        (beta (log-ratio difference) - (score_w - score_l))^2

    Args:
        beta: of the KL to the reference, the paper's 1 / eta.
        gap: score, the difference of the scores; or data, the column `margin`.

    Source: Gao et al., "REBEL: Reinforcement Learning via Regressing Relative Rewards", 2024.
    """
    part = ScoreGap() if gap == "score" else None
    method = with_loss(dpo(beta), link=SquaredToTarget(0.0), margin=1.0, gap=part)
    claim = Claim("E_pi[score] - beta KL(pi || ref)", "sequence", "kl_policy_ref", "beta")
    return method.replacing(claim=claim if gap == "score" else None)


@recipe(baseline="dpo", neutral={"h": "logistic"})
def bregman_po(h: str = "0.25*alpha:1.5", **dpo_options) -> Method:
    """Bregman preference optimisation: DPO's optimum by another way of matching ratios.

    Args:
        h: the convex function: logistic, which is DPO, or a generator that `f_divergence` reads; the default is
            Basu's power divergence of order 1/2, with DPO's gradient at the start.

    Source: Kim et al., "Preference Optimization by Estimating the Ratio of the Data Distribution", 2025, there BPO, as
    are several unrelated methods.
    """
    return with_loss(dpo(**dpo_options), link=Bregman(h))


@recipe(baseline="dpo", neutral={"lam": 0.0})
def dpop(lam: float = 50.0, **dpo_options) -> Method:
    """DPO-Positive: DPO that pays for what the chosen completion has lost since the reference.

        -log sigmoid(beta (log-ratio difference - lam max(0, log (ref / pi)(y_w))))

    Args:
        lam: lambda; 0 is DPO.

    Source: Pal et al., "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive", 2024.
    """
    method = dpo(**dpo_options)
    if not lam:
        return method
    plain = method.terms["pairs"].score
    method = with_loss(method, score=replace(plain, features=(LostLikelihood(lam),)), rejected=plain)
    return method.replacing(claim=Claim("DPO with the chosen completions at least as likely as under ref"))


@recipe(baseline="dpo")
def tr_dpo(alpha: float = 0.6, every: int = 512, **dpo_options) -> Method:
    """TR-DPO: DPO whose reference follows the policy, ref <- alpha policy + (1 - alpha) ref now and then.

    Args:
        alpha: share of the policy, in [0, 1]; 0 is DPO, 1 replaces the reference.
        every: steps between.

    Source: Gorbatovski et al., "Learn Your Reference Model for Real Good Alignment", 2024; defaults are TRL's.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], not {alpha}")
    method = dpo(**dpo_options)
    claim = Claim("E_pi[r] - beta KL(pi || the last ref), r of the pairs", "sequence", "kl_policy_ref", "beta")
    return method.replacing(models={"ref": EMA(1 - alpha, every)}, claim=claim) if alpha else method
