"""Learning from pairs of completions without a reference model."""

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.parts.terms.gold import GoldLikelihood
from keel.parts.terms.links import Hinge
from keel.parts.terms.penalties import NegativeLogLikelihood, Summand
from keel.parts.terms.score_maps import AlphaReward, LogOdds
from keel.recipes.preference import dpo, reference_free_dpo, with_loss, with_score
from keel.recipes.registry import recipe

NLL = "nll"  # mask: the tokens of the better completion


def likelihood_of_chosen(coef: float) -> dict[str, Summand]:
    """coef * Agg[-log pi] over the chosen completions."""
    return {"nll": Summand(NegativeLogLikelihood(), coef, where=NLL, per="where")} if coef else {}


@recipe(baseline="dpo")
def simpo(beta: float = 0.1, gamma: float = 0.5, label_smoothing: float = 0.0) -> Method:
    """SimPO: mean log-probabilities per token in place of log-ratios, which have to lead by a margin.

    Args:
        beta: factor of the mean log-probabilities; the authors take 2 to 2.5.
        gamma: by which the chosen score has to lead; the authors take 0.3 to 0.6 times beta, and more.
        label_smoothing: share of pairs that are taken to be in the wrong order.

    Source: Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward", 2024; defaults are TRL's.
    """
    method = with_score(dpo(beta, label_smoothing, reference_free=True), norm="mean")
    claim = Claim("likelihood of the pairs, their rewards beta times the mean log-probability per token")
    return with_loss(method, offset=gamma).replacing(claim=claim)


@recipe(baseline="simpo", neutral={"alpha": 0.0})
def alpha_po(alpha: float = 0.25, **simpo_options) -> Method:
    """AlphaPO: SimPO whose reward bends with the log-probability z per token, (1 - exp(-alpha z)) / alpha.

    Args:
        alpha: how much it bends; 0 is SimPO.

    Source: Gupta et al., "AlphaPO: Reward Shape Matters for LLM Alignment", 2025.
    """
    method = simpo(**simpo_options)
    return with_score(method, map=AlphaReward(alpha)) if alpha else method


@recipe(baseline="dpo", neutral={"cpo_alpha": 0.0}, reduces_to=reference_free_dpo)
def cpo(beta: float = 0.1, cpo_alpha: float = 1.0, label_smoothing: float = 0.0) -> Method:
    """CPO: DPO without a reference, and the likelihood of chosen completions beside it.

    Args:
        beta: factor of the log-probabilities.
        cpo_alpha: coefficient of the mean negative log-likelihood of the chosen tokens; 0 leaves it out.
        label_smoothing: share of pairs that are taken to be in the wrong order.

    Source: Xu et al., "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
    Translation", 2024.
    """
    method = dpo(beta, label_smoothing, reference_free=True).replacing(aggregation=Aggregation("token_mean"))
    method = method.replacing(claim=Claim("E_pi[r] + beta H(pi) + cpo_alpha E_chosen[log pi], r of the pairs"))
    return method.adding(terms=likelihood_of_chosen(cpo_alpha))


@recipe(baseline="cpo")
def orpo(beta: float = 0.1) -> Method:
    """ORPO: likelihood of chosen completions, and the log-odds of their mean token over that of rejected ones.

    Args:
        beta: coefficient of the odds ratio, the paper's lambda.

    Source: Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", 2024; the likelihood is of
    the completion alone, where TRL counts the prompt, too.
    """
    method = with_score(dpo(1.0, reference_free=True), norm="mean", map=LogOdds())
    claim = Claim("E_chosen[log pi] + beta E[log sigmoid(log-odds of chosen over rejected)]")
    method = with_loss(method, coef=beta).replacing(claim=claim, aggregation=Aggregation("token_mean"))
    return method.adding(terms=likelihood_of_chosen(1.0))


@recipe(baseline="cpo")
def slic(delta: float = 1.0, nll_coef: float = 0.1) -> Method:
    """SLiC-HF: a hinge on the difference of log-probabilities, held by the likelihood of the chosen completion.

    Args:
        delta: lead from which on nothing is learnt, in nats.
        nll_coef: coefficient of -log pi of the chosen completion, summed over its tokens.

    Source: Zhao et al., "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", 2023.
    """
    method = with_loss(dpo(1.0, reference_free=True), link=Hinge(delta))
    claim = Claim("fewest pairs with less than delta nats between them, held by E_chosen[log pi]")
    return method.replacing(claim=claim).adding(terms=likelihood_of_chosen(nll_coef))


@recipe(baseline="dpo")
def tpo(beta: float = 0.01, tpo_alpha: float = 1.0) -> Method:
    """TPO: DPO without a reference on two completions, and the likelihood of a third one, the gold answer.

        -log sigmoid(beta (log pi(y_w) - log pi(y_l))) - tpo_alpha mean_t log pi(y_gold)

    The data have the column `gold` beside `chosen` and `rejected`.

    Args:
        beta: of the scores.
        tpo_alpha: coefficient of the gold answer's likelihood, a mean over all its tokens of the batch.

    Source: Saeidi et al., "Triple Preference Optimization", 2024; the defaults are TRL's.
    """
    gold = {"gold": Summand(GoldLikelihood(), tpo_alpha, where="nll", per="where")}
    method = dpo(beta, reference_free=True).replacing(aggregation=Aggregation("token_mean"))
    return method.adding(terms=gold).replacing(claim=Claim("likelihood of the pairs and of a gold answer"))


@recipe(baseline="cpo")
def sft_pairs() -> Method:
    """Likelihood of the chosen tokens of pairs alone, what preference losses are held against.

    Source: maximum likelihood; TRL's `sft`, a mean over all chosen tokens of a batch.
    """
    return Method(
        kind="pairs",
        aggregation=Aggregation("token_mean"),
        terms=likelihood_of_chosen(1.0),
        claim=Claim("E_chosen[log pi]"),
    )
