"""Learning from pairs of completions: DPO and its relatives."""

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.models.sources import Initial
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.scores import LogRatio
from keel.recipes.registry import recipe


@recipe()
def dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
    """Direct preference optimisation: -log sigmoid(beta (log-ratio of the chosen - log-ratio of the rejected)).

    Args:
        beta: of the KL to the reference.
        label_smoothing: share of pairs that are taken to be in the wrong order (cDPO).

    Source: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", 2023.
    """
    return Method(
        kind="pairs",
        terms={"pairs": PairLoss(LogSigmoid(), LogRatio(), beta, label_smoothing=label_smoothing)},
        aggregation=Aggregation("sequence_mean_token_sum"),
        models={"ref": Initial()},
        claim=Claim("E_pi[r] - beta KL(pi || ref), r of the pairs", "sequence", "kl_policy_ref", "beta"),
    )
