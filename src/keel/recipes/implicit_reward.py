"""Supervised learning that knows how far it has moved from the reference."""

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.models.sources import Initial
from keel.parts.terms.implicit_reward import Baseline, ImplicitRewardMatching, Matching
from keel.recipes.registry import recipe
from keel.recipes.supervised import sft


def _summed_sft() -> Method:
    return sft("sequence_mean_token_sum")


@recipe(paper=20, baseline="sft", neutral={"divergence": "total_variation"}, reduces_to=_summed_sft)
def implicit_reward_sft(
    divergence: Matching = "chi2", beta: float = 0.1, value: Baseline = "zero", read_values: bool = False
) -> Method:
    """Supervised fine-tuning in which a completion counts for less, the likelier the policy has made it already.

    A smaller learning rate than usual is the other half of the paper's remedy.

    Args:
        divergence: total_variation is supervised learning; chi2, hellinger and js weigh a completion by phi'(z),
            z = beta log(pi / ref), which is 1 at the reference.
        beta: factor of the log-ratios, which are sums over tokens: smaller for longer completions.
        value: the value function of chi2, held at zero or optimised over each prompt's group or the batch.
        read_values: log V, Q and Q - V of the tokens, V the log-sum-exp of the logits.

    Source: follows "Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections", 2025.
    """
    if divergence == "total_variation":
        return _summed_sft()
    matching = ImplicitRewardMatching(divergence, beta, value, read_values=read_values, coef=1 / beta)
    return Method(
        kind="supervised",
        aggregation=Aggregation("sequence_mean_token_sum"),
        terms={"matching": matching},
        models={"ref": Initial()},
        claim=Claim("-KL(data || pi), held back by how far pi is from ref", form="data"),
    )
