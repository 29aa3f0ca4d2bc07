"""GRPO and PPO on rewards bent before the advantages: rarity, preference, entropy."""

from dataclasses import replace
from typing import Any, Literal, cast, get_args

from keel.method import Claim, Method
from keel.models.sources import Initial
from keel.parts.rewards.entropy_shaping import PhaseEntropy
from keel.parts.rewards.running import LengthPenalty, RunningReward, RunningShape
from keel.parts.rewards.shaping import PreferenceAsReward, Shape, Unlikeliness
from keel.parts.rewards.transforms import ClipReward, WeightedSum
from keel.parts.rewards.window_entropy import ExplorationReward
from keel.parts.terms.by_difficulty import KLByDifficulty
from keel.recipes.policy_gradient import grpo, ppo
from keel.recipes.registry import recipe


@recipe(
    paper=209,
    baseline="grpo",
    neutral={"penalty": 0.0},
    reduces_to=lambda: grpo(beta=0.1),
    preset={"train.num_iterations": 2},
    passes={"beta": 0.1},
)
def unlikeliness(penalty: float = 0.25, num_generations: int = 32, **grpo_options) -> Method:
    """GRPO in which a success earns less, the likelier it is within its group.

    The second ingredient are several updates a batch (`train.num_iterations`, 2 here): rare successes go on rising
    once the frequent ones are clipped. The third is a KL penalty (`beta`, 0.1 here).

    Args:
        penalty: what the likeliest completion of a group loses, as a share of its reward.
        num_generations: the group size.

    Source: "Rewarding the Unlikely: Lifting GRPO Beyond Distribution Sharpening", 2025.
    """
    method = grpo(num_generations=num_generations, **grpo_options)
    assert method.claim is not None
    scale = tuple(name for name in method.claim.invariant if name != "reward_shift")
    return method.replacing(
        transforms={"sum": WeightedSum(), "unlikeliness": Unlikeliness(penalty), **method.transforms},
        claim=replace(method.claim, invariant=scale),
    )


Bent = Literal[Shape, RunningShape, "ceiling"]


def bent_by(shape: Bent, k: float, references: int, ceiling: float) -> Any:
    """The part that bends a reward into one of the shapes of `par`."""
    if shape == "ceiling":
        return ClipReward(float("-inf"), ceiling)
    if shape in get_args(RunningShape):
        return RunningReward(cast(RunningShape, shape))
    return PreferenceAsReward(k, cast(Shape, shape), references)


@recipe(paper=213, baseline="ppo", preset={"train.learning_rate": 3e-7, "train.critic_learning_rate": 5e-6})
def par(
    k: float = 1.0,
    beta: float = 0.05,
    shape: Bent = "sigmoid",
    references: int = 10,
    ceiling: float = 5.0,
    valid_length: int | None = None,
    length_penalty: float = 0.01,
    num_generations: int = 8,
    **ppo_options,
) -> Method:
    """PPO on the probability that a completion beats the reference's, which is bounded and steepest at par.

        r' = E_ref[sigmoid(k (r - r_ref))],   then k1 per token, which is not squashed

    Args:
        k: steepness, per unit of reward.
        beta: coefficient of k1 against the reference, in the reward.
        shape: sigmoid is the paper's; the others are those that it was held against.
        references: completions of the reference, drawn once for each prompt, unless the data have a column
            `reference_rewards`; 0 takes the group's own, weighted with ref / old.
        ceiling: largest reward of the shape of that name.
        valid_length: tokens from which on each costs `length_penalty`, before the reward is bent; None is none.
        num_generations: completions a prompt, at least 2 without references.

    Source: "Reward Shaping to Mitigate Reward Hacking in RLHF", 2025.
    """
    if num_generations < 2 and not references:
        raise ValueError("par holds completions of one prompt against each other: num_generations must be at least 2")
    method = ppo(beta=beta, num_generations=num_generations, **ppo_options)
    length = {} if valid_length is None else {"length": LengthPenalty(valid_length, length_penalty)}
    objective = "E_pi[r'] - beta KL(pi || ref), r' = E_ref[sigmoid(k (r - r_ref))]"
    tilt = (
        Claim(objective, "sequence", "kl_policy_ref", "beta", "target", "win_rate_tilt") if beta else Claim(objective)
    )
    bent = {"par": bent_by(shape, k, references, ceiling)}
    return method.replacing(
        transforms={"sum": WeightedSum(), **length, **bent, **method.transforms},
        models={"ref": Initial()},
        claim={"sigmoid": tilt, "centred": method.claim}.get(shape) if valid_length is None else None,
    )


@recipe(paper=83, baseline="grpo", neutral={"penalty": 0.0})
def pear(
    penalty: float = 1.0,
    alpha: float = 1.0,
    end_of_thinking: tuple[int, ...] = (),
    threshold: float = 0.5,
    **grpo_options,
) -> Method:
    """GRPO in which a success loses what its thinking was less certain of than its answer; shorter thinking follows.

    Args:
        penalty: reward that a nat of entropy in excess costs.
        alpha: how many times the entropy of the answer the thinking may have.
        end_of_thinking: ids of the tokens that end the thinking phase, those of `</think>` in the model's vocabulary.
        threshold: rewards from which on a completion is a success.

    Source: "PEAR: Phase Entropy Aware Reward for Efficient Reasoning", 2025.
    """
    method = grpo(**grpo_options)
    assert method.claim is not None
    shaping = PhaseEntropy(end_of_thinking, alpha, penalty, threshold)
    return method.replacing(
        transforms={"sum": WeightedSum(), "phase_entropy": shaping, **method.transforms},
        claim=replace(method.claim, invariant=()),
    )


@recipe(
    paper=53,
    baseline="grpo",
    neutral={"alpha": 0.0, "kl_coef": 0.0},
    preset={"train.dynamic_sampling": True},
)
def ares(
    alpha: float = 0.5,
    window: int = 4,
    triggers: tuple[int, ...] = (),
    edge: float | None = None,
    kl_coef: float = 1e-2,
    kl_target: float | None = 0.01,
    threshold: float = 0.5,
    **grpo_options,
) -> Method:
    """GRPO that asks for little exploration on easy prompts and rewards it on hard ones, each held by a KL of its own.

    Prompts that all or none of their group solve are replaced (`train.dynamic_sampling`, on here).

    Args:
        alpha: size of the bonus on the number of high-entropy windows.
        window: tokens of a window.
        triggers: ids of the tokens after which a window counts; () takes every token.
        edge: entropy of a high window, in nats; None takes it from the first batch.
        kl_coef: coefficient of the KL to the reference; 0 loads none.
        kl_target: KL per token that the coefficient of each difficulty follows; None holds it.
        threshold: reward from which on a completion is right.

    Source: "ARES: Multimodal Adaptive Reasoning via Difficulty-Aware Token-Level Entropy Shaping", 2025.
    """
    method = grpo(**grpo_options)
    assert method.claim is not None
    bonus = ExplorationReward(triggers, window, edge, alpha, threshold=threshold)
    found = method.replacing(
        transforms={"sum": WeightedSum(), "exploration": bonus, **method.transforms},
        claim=replace(method.claim, invariant=()),
    )
    if not kl_coef:
        return found
    held = {"kl_by_difficulty": KLByDifficulty(kl_coef, kl_target, aggregation=method.aggregation)}
    return found.replacing(terms={**method.terms, **held}, models={"ref": Initial()})
