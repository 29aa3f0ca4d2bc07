"""Learning from ranked lists of completions, and from pairs and rankings of segments."""

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.models.sources import Initial
from keel.parts.terms.lists import ListRanking, PlackettLuce, Weighting
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.penalties import NegativeLogLikelihood, Summand
from keel.parts.terms.scores import LogRatio
from keel.parts.terms.segments import ConservativeBias, RankedPairs, SegmentDiscount
from keel.recipes.registry import recipe


@recipe()
def list_dpo(beta: float = 0.1) -> Method:
    """DPO on ranked lists: the likelihood of the whole order, each completion picked among those that are left.

    Args:
        beta: of the KL to the reference.

    Source: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", 2023, its
    appendix on rankings (Plackett-Luce).
    """
    return Method(
        kind="pairs",
        terms={"lists": PlackettLuce(LogRatio(), beta)},
        aggregation=Aggregation("sequence_mean_token_sum"),
        models={"ref": Initial()},
        claim=Claim("E_pi[r] - beta KL(pi || ref), r of the rankings", "sequence", "kl_policy_ref", "beta"),
    )


@recipe(paper=81, baseline="list_dpo")
def in_context_ranking(beta: float = 1.0, weighting: Weighting = "ndcg") -> Method:
    """DPO on ranked lists in which each item is compared with the mean of all others, and weighted as in NDCG.

    Args:
        beta: factor of the mean log-ratios of an item's tokens.
        weighting: ndcg weighs an item by gain and discount, discount by its position alone, reciprocal by gain over
            position.

    Source: "In-context Ranking Preference Optimization", 2025; here items are completions, there parts of one.
    """
    return list_dpo().replacing(
        terms={"lists": ListRanking(LogRatio(norm="mean"), beta, weighting)},
        claim=Claim("NDCG of the order by beta log(pi / ref) per token", "sequence"),
    )


@recipe(paper=85, baseline="dpo", neutral={"lam": 1.0, "reference": True})
def cpl(
    beta: float = 0.1,
    lam: float = 0.5,
    reference: bool = False,
    bc_coef: float = 0.0,
    gamma: float = 1.0,
    ranked: bool = False,
) -> Method:
    """DPO without a reference: the log-likelihood that is not preferred counts less, which keeps to the data.

    The paper's variants: CPL (the defaults), CPL-KL (beta 0.2, lam 0.75, reference), CPL-BC (lam 1, bc_coef 1). It
    begins with behaviour cloning (`sft`), where the reference is frozen.

    Args:
        beta: the paper's alpha, factor of the log-likelihoods.
        lam: factor of the one that is not preferred; 1 with a reference is DPO.
        reference: log-ratios to the initial model take the place of log-likelihoods.
        bc_coef: of the mean -log pi of all tokens, preferred or not.
        gamma: discount per token.
        ranked: learn from all pairs of ranked lists.

    Source: Hejna et al., "Contrastive Preference Learning: Learning from Human Feedback without Reinforcement
    Learning", 2024.
    """
    score = LogRatio(("ref",) if reference else (), weight=SegmentDiscount(gamma) if gamma < 1 else None)
    loss = PairLoss(ConservativeBias(lam), score, beta)
    cloning = {"bc": Summand(NegativeLogLikelihood(), bc_coef)} if bc_coef else {}
    return Method(
        kind="pairs",
        terms={"pairs": RankedPairs(loss) if ranked else loss, **cloning},
        aggregation=Aggregation("token_mean"),
        models={"ref": Initial()} if reference else {},
        claim=Claim("E_pi[r] - beta KL(pi || ref), r the advantages of the pairs", "sequence", "kl_policy_ref", "beta"),
    )
