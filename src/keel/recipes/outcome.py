"""Policy gradients whose credit is neither a reward's distance from its group's mean nor the same for all tokens."""

from dataclasses import replace
from typing import Literal

from keel.core.aggregate import Mode
from keel.method import Claim, Method
from keel.models.heads import Critic
from keel.models.sources import Initial
from keel.parts.advantages.consistency import AnswerConsistency
from keel.parts.advantages.future import FutureKL, FutureKLToToken
from keel.parts.advantages.group import LeaveOneOut
from keel.parts.advantages.risk import BundleRisk
from keel.parts.advantages.shifted import TemperatureShift
from keel.parts.terms.penalties import Summand
from keel.parts.terms.positive import OutcomeLoss, TokenRewardLoss
from keel.parts.terms.second import SecondSurrogate
from keel.recipes.policy_gradient import REWARD_KL, SCALE, grpo
from keel.recipes.registry import recipe


@recipe(paper=90, baseline="grpo", without=SCALE)
def riskpo(
    bundle_size: int = 5,
    low: float = 0.2,
    high: float = 0.8,
    tail: float = 1.5,
    rate: float = 0.1,
    credit: Literal["share", "same", "std"] = "share",
    scale: bool = True,
    natural: bool = False,
    seeking: bool = False,
    num_generations: int = 10,
    **grpo_options,
) -> Method:
    """GRPO whose advantage is the policy gradient of a lower tail and a middle range of what a bundle of prompts earns.

    Args:
        bundle_size: prompts in a bundle; rollout.num_prompts should be a multiple.
        low, high: levels of the two quantiles; high of .9 on easy data.
        tail: weight of the lower tail.
        rate: step of the tracked quantiles.
        credit: how the gain of a bundle is split among its completions.
        scale: divide by the deviation of the bundle.
        natural: advantages of at most 0 in the range.
        seeking: reward the upper tail, too, as a control.
        num_generations: the group size.

    Source: "RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training", 2025.
    """
    method = grpo(num_generations=num_generations, **grpo_options)
    part = BundleRisk(bundle_size, low, high, tail, rate, credit, scale, natural=natural, seeking=seeking)
    assert method.claim is not None
    objective = method.claim.objective.replace("E_pi[r]", "RVaR + tail CVaR of bundles, for E_pi[r]")
    return method.replacing(advantage={"risk": part}, claim=replace(method.claim, objective=objective, invariant=()))


def clipped_twice(**grpo_options) -> Method:
    """GRPO with a dual clip and a mean over sequences; what COPO reduces to."""
    return grpo(**{"dual_clip": 3.0, "aggregation": "sequence_mean_token_mean", **grpo_options})


@recipe(paper=76, baseline="grpo", neutral={"blend": "local"}, reduces_to=clipped_twice)
def copo(
    sharpness: float = 20.0,
    midpoint: float = 0.5,
    blend: Literal["soft_forced", "soft", "forced", "local", "global"] = "soft_forced",
    coefficient: bool = True,
    answer_tail: int | None = None,
    dual_clip: float = 3.0,
    aggregation: Mode = "sequence_mean_token_mean",
    **grpo_options,
) -> Method:
    """GRPO that learns from groups that agree by comparing them with other prompts.

    Args:
        sharpness, midpoint: of the blend, as a function of the entropy of the answers in bits.
        blend: soft_forced is the paper's; the others leave out a part of it; local is GRPO.
        coefficient: discount what a group earned by the entropy of its answers.
        answer_tail: how many last tokens make an answer; None compares whole completions.
        dual_clip: c of the dual clip.
        aggregation: how token losses become one number.

    Source: "COPO: Consistency-Aware Policy Optimization", 2025.
    """
    method = clipped_twice(dual_clip=dual_clip, aggregation=aggregation, **grpo_options)
    assert method.surrogate is not None and method.claim is not None
    part = AnswerConsistency(sharpness, midpoint, blend, coefficient, answer_tail)
    across = Summand(SecondSurrogate(method.surrogate.f), 1.0)
    objective = f"{method.claim.objective}, prompts that agree against other prompts"
    return method.adding(advantage={"consistency": part}, terms={"global": across}).replacing(
        claim=replace(method.claim, objective=objective, invariant=())
    )


@recipe(paper=1, baseline="grpo", neutral={"beta": 0.0}, without=("kl",))
def prl(beta: float = 0.005, step_length: int = 1, segment_ends: tuple[int, ...] = (), **grpo_options) -> Method:
    """GRPO whose tokens pay, in their advantage, for the KL to the reference that they lead to.

        A_t = (R - mean) / std - beta sum over u >= t of (log old - log ref)_u

    The KL stands behind the division by the deviation; within the reward it would be divided, too.

    Args:
        beta: coefficient of the KL, 1 / eta in the paper, which takes .005 and .01; 0 loads no reference.
        step_length: tokens that share one value; 1 is exact, 256 the paper's first version.
        segment_ends: ids of the tokens that end such a stretch instead, those with a line break, say.

    Source: "PRL: Process Reward Learning Improves LLMs' Reasoning Ability and Broadens the Reasoning Boundary", 2026.
    """
    method = grpo(**grpo_options)
    if not beta:
        return method
    if segment_ends and step_length != 1:
        raise ValueError("segment_ends and step_length both say where a segment ends: leave step_length at 1")
    part = FutureKLToToken(beta, segment_ends) if segment_ends else FutureKL(beta, step_length)
    return method.adding(advantage={"future_kl": part}, models={"ref": Initial()}).replacing(
        claim=Claim(REWARD_KL, "sequence", "kl_policy_ref", "beta")
    )


def dual_clipped(**grpo_options) -> Method:
    """GRPO with a dual clip; what DCPO reduces to."""
    return grpo(**{"dual_clip": 3.0, **grpo_options})


@recipe(paper=197, baseline="grpo", neutral={"cap": 0.0}, reduces_to=dual_clipped)
def dcpo(
    target_entropy: float = 0.5,
    cap: float = 0.1,
    high: float = 1.2,
    low: float = 0.8,
    good_above: float = 0.05,
    dual_clip: float = 3.0,
    **grpo_options,
) -> Method:
    """GRPO that holds its entropy at a target by learning from its good completions as if drawn at another temperature.

    Args:
        target_entropy: in nats per token.
        cap: of the distance to the target, which decides how strongly it pulls; 0 is GRPO.
        high, low: temperatures below and above the target.
        good_above: reward above which a completion is good.
        dual_clip: c of the dual clip.

    Source: "Distribution-Centric Policy Optimization Dominates Exploration-Exploitation Trade-off", 2026.
    """
    method = dual_clipped(dual_clip=dual_clip, **grpo_options)
    assert method.claim is not None
    shift = TemperatureShift(target_entropy, high, low, cap, good_above)
    return method.adding(advantage={"shift": shift}).replacing(claim=replace(method.claim, invariant=()))


@recipe(
    paper=177,
    baseline="rloo",
    preset={"train.learning_rate": 5e-7, "train.critic_learning_rate": 2e-6, "train.critic_warmup_steps": 10},
)
def oreal(
    beta: float = 0.01,
    positive: float = 1.0,
    negative: float = 0.5,
    token_rewards: Literal["model", "head", "none"] = "model",
    scale_rewards: Literal["none", "group"] = "none",
    share: float | None = None,
    expected: bool = False,
    threshold: float = 0.5,
    num_generations: int = 16,
) -> Method:
    """Likelihood on one right completion of a prompt, half a policy gradient on a wrong one, weighed token by token.

    The token reward model begins at 0, where no token counts; it learns from all completions of every batch, and for
    the first ten (`train.critic_warmup_steps`) it alone.

    Args:
        beta: coefficient of k3 against the reference, in the loss, over all completions, learnt or not.
        positive, negative: coefficients of the two losses.
        token_rewards: a model that begins as a copy of the policy, a head on the policy's states, or none.
        scale_rewards: divide the advantage by the group's deviation.
        share: of the tokens of a completion that count; None weighs them by how sure the model is.
        expected: learn all completions of a prompt in place of one right and one wrong.
        threshold: reward from which on a completion is right.
        num_generations: completions a prompt, at least 2.

    Source: "Exploring the Limit of Outcome Reward for Learning Mathematical Reasoning", 2025.
    """
    method = grpo(beta=beta, kl="k3", num_generations=num_generations, scale_rewards=scale_rewards)
    assert method.claim is not None
    head = "" if token_rewards == "none" else "token_reward"
    loss = OutcomeLoss(positive, negative, share=share, threshold=threshold, expected=expected, head=head)
    return method.replacing(
        advantage=method.advantage if scale_rewards == "group" else {"leave_one_out": LeaveOneOut()},
        heads={head: Critic("model" if token_rewards == "model" else "head")} if head else {},
        surrogate=None,
        terms={"outcome": loss} | ({"model": TokenRewardLoss(1.0, threshold)} if head else {}) | dict(method.terms),
        claim=replace(method.claim, invariant=()),
    )
