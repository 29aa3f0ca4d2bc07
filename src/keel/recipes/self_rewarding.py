"""Policies that judge themselves; what they move towards moves with them."""

from typing import Any, Literal

from keel.method import Claim, Method
from keel.models.sources import Initial, Snapshot
from keel.parts.controllers.going_back import GoBack
from keel.parts.rewards.pairing import How, PairUp
from keel.parts.rewards.self_rewarding import RankAgreement, SelfScore
from keel.parts.rewards.temporal import TemporalPairs
from keel.parts.terms.links import LogSigmoid
from keel.parts.terms.pairs import PairLoss
from keel.parts.terms.scores import LogRatio
from keel.recipes.online_preference import online_dpo
from keel.recipes.registry import recipe
from keel.rollouts.beside import CompletionsOf
from keel.rollouts.taught import WrittenBy


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


@recipe(paper=194, baseline="self_rewarding", neutral={"anchor": 0, "future": 0})
def temporal_self_rewarding(
    beta: float = 0.1,
    anchor: int = 5,
    future: int = 5,
    every: int = 16,
    num_generations: int = 5,
    temperature: float = 1.0,
) -> Method:
    """Self-rewarding whose rejected completions may be the initial model's, and whose chosen ones a later model's.

    A round has twice `every` batches, all of completions that its model M_i draws and scores. In the first half M_f
    comes of pairs against the initial model's completions. In the second the policy begins from M_i again, M_f draws,
    too, and M_{i+1} comes of it. A run of whole rounds ends with the last of these.

    Args:
        beta: of the log-ratio to the model of the round.
        anchor: completions a prompt of the initial model; 0 for none.
        future: completions a prompt of M_f; 0 for none, and rounds without a first half.
        every: batches of half a round.
        num_generations: completions a prompt of M_i.
        temperature: of the sampler.

    Source: "Temporal Self-Rewarding Language Models: Decoupling Chosen-Rejected via Past-Future", 2025, with 7
    completions of each model, two rounds, and a prompted judge where here the log-ratio to the initial model is read.
    """
    method = self_rewarding(beta, "best_worst", every, num_generations, temperature)
    if not anchor and not future:
        return method
    beside = [CompletionsOf("ref", anchor)] if anchor else []
    beside += [CompletionsOf("future", future, every=every)] if future else []
    ahead = {"future": Snapshot(2 * every, every)} if future else {}
    pairs = TemporalPairs(anchor=1 if anchor else 0, future=len(beside) if future else 0)
    method = method.replacing(
        transforms={"score": SelfScore("ref", "past"), "pairs": pairs},
        models={"ref": Initial(), "past": Snapshot(2 * every if future else every), **ahead},
        controllers={"ahead": GoBack("past", every)} if future else {},
        claim=Claim("P(y scores above completions of the past), by a judge that is the policy itself", form="words"),
    )
    return method.set("rollout.written", WrittenBy("past")).set("rollout.beside", tuple(beside))
