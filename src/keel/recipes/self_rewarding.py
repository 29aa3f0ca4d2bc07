"""Policies that judge themselves; what they move towards moves with them."""

from typing import Any, Literal

from keel.method import Claim, Method
from keel.models.sources import Initial, Snapshot
from keel.parts.rewards.pairing import How, PairUp
from keel.parts.rewards.self_rewarding import RankAgreement, SelfScore
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.scores import LogRatio
from keel.recipes.online_preference import online_dpo
from keel.recipes.registry import recipe


@recipe(baseline="online_dpo")
def self_rewarding(
    beta: float = 0.1, pairs: How = "best_worst", every: int = 16, num_generations: int = 5, temperature: float = 1.0
) -> Method:
    """Online DPO on pairs that the policy itself has scored, by its log-ratio to the initial model; no reward is read.

    Args:
        beta: of the log-ratio to the policy of the last iteration.
        pairs: which completions of a prompt are compared.
        every: batches of an iteration.
        num_generations: completions a prompt.
        temperature: of the sampler.

    Source: "Self-Rewarding Language Models", 2024, with the implicit reward of CREAM for its prompted judge.
    """
    method = online_dpo(beta=beta, num_generations=num_generations, temperature=temperature)
    return method.replacing(
        transforms={"score": SelfScore("ref"), "pairs": PairUp(pairs)},
        terms={"pairs": PairLoss(LogSigmoid(), LogRatio(("past",)), beta)},
        models={"ref": Initial(), "past": Snapshot(every)},
        claim=Claim(
            "KL(pi || past exp(P(y scores above one of old's) / beta) / Z)",
            "sequence",
            "kl_policy_ref",
            "beta",
            "target",
            "self_step",
        ),
    )


@recipe(paper=127, baseline="self_rewarding", neutral={"agreement": "none"})
def cream(agreement: Literal["mean", "prompt", "none"] = "mean", **options: Any) -> Method:
    """Self-rewarding whose labels are as certain as the policy and its last iteration agree on the order of a group.

    Args:
        agreement: of the batch, of each prompt, or not looked at.

    Source: "CREAM: Consistency Regularized Self-Rewarding Language Models", 2025. There an iteration is a pass over the
    data; here the policy moves on between snapshots, and right after one the two agree on everything.
    """
    method = self_rewarding(**options)
    return method.adding(transforms={"agreement": RankAgreement("past", "ref", agreement)})
