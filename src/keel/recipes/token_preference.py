"""Pairs of completions, token by token: DPO with sequential KL, phrases, token rewards and token masks."""

from typing import Literal

from keel.method import Claim, Method
from keel.models.classifier import Classifier
from keel.models.prompted import Prompted
from keel.models.token_masks import Activations, Layers, TokenMask
from keel.parts.terms.degrees import DeletionDegree
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.scores import LogRatio
from keel.parts.terms.token_scores import (
    DifferingTokens,
    MisorderWeight,
    PairPenalty,
    SequentialKL,
    TokenRewardLikelihood,
)
from keel.parts.terms.token_weights import ActivationMask, LearnedMask, WeightNorm
from keel.recipes.preference import dpo
from keel.recipes.registry import recipe

BETTER = "Give an answer that is helpful, correct, coherent and concise.\n"
WORSE = "Give an answer that is unhelpful, incorrect, incoherent and verbose.\n"


@recipe(paper=36, baseline="dpo", neutral={"alpha": 0.0})
def tdpo(beta: float = 0.1, alpha: float | None = None, version: Literal[1, 2] = 2) -> Method:
    """DPO whose margin m becomes m - alpha (K_l - K_w), K the sum of KL(ref || pi) over the tokens of each side.

    Args:
        beta: of the KL to the reference.
        alpha: of the sequential KL; None takes 1 for version 1 and 0.5 for version 2.
        version: 2 holds K_w constant, so that the loss cannot fall by moving away from the reference on chosen ones.

    Source: "Token-level Direct Preference Optimization", 2024.
    """
    alpha = {1: 1.0, 2: 0.5}[version] if alpha is None else alpha
    rejected = LogRatio(features=(SequentialKL(alpha),))
    chosen = LogRatio(features=(SequentialKL(alpha, detached=version == 2),))
    loss = PairLoss(LogSigmoid(), chosen, beta, rejected=rejected)
    return dpo(beta).replacing(terms={"pairs": loss})


@recipe(paper=147, baseline="dpo")
def rrpo(beta: float = 0.1, alpha: float = 0.01) -> Method:
    """DPO on the tokens in which both completions differ, with alpha * KL(ref || pi) summed over the chosen one.

    Args:
        beta: of the log-ratios; 0.1 to 0.9.
        alpha: of the KL; 0.01 to 0.1.

    Source: "Self-alignment of Large Video Language Models with Refined Regularized Preference Optimization", 2025.
    """
    loss = PairLoss(LogSigmoid(), LogRatio(weight=DifferingTokens()), beta)
    kept = PairPenalty(SequentialKL(), alpha, sides="chosen")
    return dpo(beta).replacing(terms={"pairs": loss, "kl": kept})


@recipe(paper=170, baseline="dpo", neutral={"alpha": 0.0})
def t_reg(
    beta: float | None = None,
    alpha: float = 0.25,
    base: Literal["dpo", "simpo"] = "dpo",
    gamma: float = 1.0,
    better: str = BETTER,
    worse: str = WORSE,
) -> Method:
    """DPO or SimPO, with every token's log-probability weighted by what the reference says behind opposite prompts.

    Args:
        beta: of the scores and of the token rewards; None takes 0.1 for dpo and 2 for simpo.
        alpha: of the weighted log-likelihood; 0.1 to 0.5.
        base: the loss of the pairs.
        gamma: margin of simpo.
        better, worse: what the reference reads before the prompt.

    Source: "T-REG: Preference Optimization with Token-Level Reward Regularization", 2025.
    """
    plain = base == "dpo"
    beta = (0.1 if plain else 2.0) if beta is None else beta
    score = LogRatio() if plain else LogRatio(against=(), norm="mean")
    loss = PairLoss(LogSigmoid(), score, beta, offset=0.0 if plain else gamma)
    method = dpo(beta).replacing(terms={"pairs": loss}, **({} if plain else {"models": {}}))
    if alpha == 0:
        return method
    weight = MisorderWeight(score, beta, loss.offset)
    rewards = PairPenalty(TokenRewardLikelihood(beta), alpha, weight=weight)
    texts = {"better": Prompted(better), "worse": Prompted(worse)}
    return method.adding(terms={"token_rewards": rewards}, models=texts)


@recipe(paper=37, baseline="tdpo")
def sparse_po(
    beta: float = 0.1,
    masks: Literal["independent", "common"] = "independent",
    l1_reward: float = 0.0,
    l1_kl: float = 0.0,
    dropout: float = 0.01,
) -> Method:
    """TDPO1 with masks of tokens, on log-ratios and on the KL, that are learned from the reference's layers.

    Args:
        beta: of the margin; 0.1 to 0.8.
        masks: two of them, or one for both.
        l1_reward: coefficient of the mask on log-ratios, |m|_1; of a common mask half of both coefficients counts.
        l1_kl: coefficient of the mask on the KL.
        dropout: share of tokens whose mask is dropped.

    Source: "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks", 2025.
    """
    if masks == "common":
        kl = reward = LearnedMask("mask", dropout=dropout)
        sizes = {"l1": PairPenalty(WeightNorm(reward, "mask"), (l1_reward + l1_kl) / 2)}
    else:
        reward, kl = (LearnedMask(f"mask_{name}", dropout=dropout) for name in ("reward", "kl"))
        sizes = {
            "l1_reward": PairPenalty(WeightNorm(reward, "mask_reward"), l1_reward),
            "l1_kl": PairPenalty(WeightNorm(kl, "mask_kl"), l1_kl),
        }
    score = LogRatio(weight=reward, features=(SequentialKL(weight=kl),))
    heads = {name: TokenMask() for name in dict.fromkeys((reward.head, kl.head))}
    method = dpo(beta).adding(heads=heads, models={"layers": Layers()})
    method = method.replacing(claim=Claim("likelihood of the pairs, over tokens that learned masks let through"))
    return method.replacing(terms={"pairs": PairLoss(LogSigmoid(), score, beta), **sizes})


@recipe(paper=37, baseline="tdpo")
def ma_po(beta: float = 0.1) -> Method:
    """TDPO1 with a mask of tokens that is read off the reference's activations.

    Args:
        beta: of the margin; 0.1 to 0.8.

    Source: "SparsePO: Controlling Preference Alignment of LLMs via Sparse Token Masks", 2025 (MaPO).
    """
    mask = ActivationMask()
    score = LogRatio(weight=mask, features=(SequentialKL(weight=mask),))
    method = dpo(beta).adding(models={"activations": Activations()})
    return method.replacing(terms={"pairs": PairLoss(LogSigmoid(), score, beta)})


@recipe(paper=68, baseline="dpo", neutral={"gamma": 0.0})
def spo_degree(
    beta: float = 0.1,
    gamma: float = 0.1,
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75),
    deletion: Literal["key", "random"] = "key",
) -> Method:
    """DPO, and beside it a head that says how many of a chosen completion's key phrases were deleted.

    Args:
        beta: of the KL to the reference.
        gamma: coefficient of the head's cross-entropy; 0.1 to 1.
        shares: of the key phrases that are deleted, from 0 upwards; a class and a copy each.
        deletion: key phrases, or as many words by chance.

    Source: "Self-supervised Preference Optimization: Enhance Your Language Model with Preference Degree Awareness",
    2024; after its text, as there is no public code.
    """
    if gamma == 0:
        return dpo(beta)
    term = DeletionDegree(gamma, shares, deletion=deletion)
    return dpo(beta).adding(terms={"degree": term}, heads={"degree": Classifier(len(shares))})
