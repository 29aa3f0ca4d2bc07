"""Learning from completions that are good or bad, one by one or by rank, without comparing them pair by pair."""

from typing import Literal

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.models.sources import Initial
from keel.parts.terms.scores import LogRatio
from keel.parts.terms.sorted_pairs import SortedPairs
from keel.parts.terms.unpaired import UnpairedLoss
from keel.recipes.preference import dpo
from keel.recipes.registry import recipe


@recipe()
def kto(
    beta: float = 0.1,
    chosen_weight: float = 1.0,
    rejected_weight: float = 1.0,
    shift: Literal["mismatched", "none"] = "mismatched",
) -> Method:
    """Learning from labels with a value that saturates for gains and for losses, both seen from the policy's KL.

    Args:
        beta: of the KL to the reference.
        chosen_weight, rejected_weight: of good and of bad examples; their mean counts examples, so where bad ones are
            four times as many, a chosen_weight of 4 makes the classes equal.
        shift: mismatched estimates the KL on prompts with completions of other prompts; none takes 0 (APO-zero of
            labels).

    Source: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", 2024.
    """
    loss = UnpairedLoss("sigmoid", LogRatio(), beta, shift, 0.9, chosen_weight, rejected_weight)
    return _labelled(loss)


@recipe()
def bco(beta: float = 0.1, shift: Literal["running", "none"] = "running", decay: float = 0.9) -> Method:
    """Learning from labels by a classifier of good and bad whose logit is the reward less its running mean.

    Args:
        beta: of the KL to the reference.
        shift: running subtracts the running mean of the rewards; none is TRL's.
        decay: of the running mean, once a batch.

    Source: Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", 2024.
    """
    return _labelled(UnpairedLoss("log_sigmoid", LogRatio(), beta, shift, decay))


def _labelled(loss: UnpairedLoss) -> Method:
    return Method(
        kind="pairs",
        terms={"labels": loss},
        aggregation=Aggregation("sequence_mean_token_sum"),
        models={"ref": Initial()},
        claim=Claim("E_pi[r] - beta KL(pi || ref), r of the labels", "sequence", "kl_policy_ref", "beta"),
    )


@recipe(baseline="dpo")
def aot(beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
    """DPO on sorted margins: the policy's smallest margin of the batch is held against the reference's smallest one.

    Args:
        beta: factor of the differences.
        label_smoothing: share of comparisons that are taken to be in the wrong order.

    Source: Melnyk et al., "Distributional Preference Alignment of LLMs via Optimal Transport", 2024.
    """
    return dpo().replacing(terms={"pairs": SortedPairs("margins", beta, label_smoothing)}, claim=_sorted_claim())


@recipe(baseline="dpo")
def aot_unpaired(beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
    """DPO on sorted log-ratios: chosen completions of the batch against rejected ones of the same rank, of any prompt.

    Args:
        beta: factor of the differences.
        label_smoothing: share of comparisons that are taken to be in the wrong order.

    Source: Melnyk et al., "Distributional Preference Alignment of LLMs via Optimal Transport", 2024.
    """
    return dpo().replacing(terms={"pairs": SortedPairs("completions", beta, label_smoothing)}, claim=_sorted_claim())


def _sorted_claim() -> Claim:
    return Claim("E_pi[r] - beta KL(pi || ref), r of the pairs' ranks", "sequence", "kl_policy_ref", "beta")
