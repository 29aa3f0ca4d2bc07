"""The standard online methods: REINFORCE, PPO, RLOO, ReMax, and GRPO with its variants."""

from typing import Literal

from keel.core.aggregate import Aggregation, Mode
from keel.method import Claim, Method
from keel.models.heads import Critic
from keel.models.sources import Initial
from keel.parts.advantages.group import BatchCentre, GreedyBaseline, GroupCentre, GroupStd, LeaveOneOut, Returns
from keel.parts.advantages.stream import GAE, RewardToGo, RunningBaseline, Whiten
from keel.parts.controllers.coefficients import AdaptiveKL
from keel.parts.rewards.transforms import KLInReward, Overlong, WeightedSum
from keel.parts.terms.penalties import NegativeEntropy, SampledKL, Summand, ValueLoss, VocabularyDivergence
from keel.parts.terms.surrogate import CISPO, Clipped, LogLikelihood, Surrogate, Unclipped
from keel.parts.weights.importance import TruncatedImportance
from keel.recipes.registry import recipe
from keel.rollouts.rollout import Rollout

KLPlacement = Literal[
    "k1",
    "k2",
    "k3",
    "k3_ratio",
    "kl_policy_ref",
    "kl_ref_policy",
    "js",
    "jeffreys",
    "chi2_policy_ref",
    "chi2_ref_policy",
    "hellinger",
    "tv",
]
CLIP = ("epsilon", "epsilon_high", "dual_clip")  # arguments of GRPO that another surrogate does not read
SCALE = ("advantage_epsilon", "scale_rewards")  # that another advantage does not read
ESTIMATED = ("k1", "k2", "k3", "k3_ratio")  # from the sampled token; the others sum over the vocabulary
REWARD = "E_pi[r]"
REWARD_KL = "E_pi[r] - beta KL(pi || ref), sequences"


@recipe()
def reinforce(
    baseline: Literal["none", "batch", "running"] = "batch",
    beta: float = 0.0,
    num_generations: int = 1,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
) -> Method:
    """Policy gradient with the log-likelihood: -A log pi, A the return less a baseline.

    Args:
        baseline: none, the mean of the batch, or a running average of earlier batches.
        beta: coefficient of k1 against the reference, in the reward.
        num_generations: completions a prompt.
        temperature: of the sampler.
        entropy_coef: coefficient of an entropy bonus.

    Source: Williams, "Simple Statistical Gradient-Following Algorithms", 1992.
    """
    advantage = {"none": Returns(), "batch": BatchCentre(), "running": RunningBaseline()}[baseline]
    return _with_reward_kl(
        Method(
            rollout=Rollout(num_generations=num_generations, temperature=temperature),
            advantage={"baseline": advantage},
            surrogate=Surrogate(LogLikelihood()),
            aggregation=Aggregation("sequence_mean_token_sum"),
            terms=_entropy(entropy_coef),
            claim=Claim(REWARD_KL if beta else REWARD, "sequence", "kl_policy_ref" if beta else None, "beta"),
        ),
        beta,
    )


@recipe(baseline="reinforce")
def reinforce_pp(
    epsilon: float = 0.2,
    beta: float = 0.01,
    gamma: float = 1.0,
    group_baseline: bool = False,
    num_generations: int = 1,
    temperature: float = 1.0,
) -> Method:
    """REINFORCE++: returns-to-go whitened over all tokens of the batch, with PPO's clip.

    Args:
        epsilon: clip range.
        beta: coefficient of k1 against the reference, in the token rewards.
        gamma: discount.
        group_baseline: subtract the group's mean before whitening (REINFORCE++-baseline); then num_generations above 1.
        num_generations: completions a prompt.
        temperature: of the sampler.

    Source: "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization", 2025.
    """
    if group_baseline:
        _at_least_two("reinforce_pp with group_baseline", num_generations)
    credit = GroupCentre() if group_baseline else RewardToGo(gamma)
    return _with_reward_kl(
        Method(
            rollout=Rollout(num_generations=num_generations, temperature=temperature),
            advantage={"credit": credit, "whiten": Whiten()},
            surrogate=Surrogate(Clipped(epsilon)),
            claim=Claim(REWARD_KL if beta else REWARD, "sequence", "kl_policy_ref" if beta else None, "beta"),
        ),
        beta,
    )


@recipe()
def rloo(
    beta: float = 0.05,
    epsilon: float = 0.2,
    num_generations: int = 2,
    temperature: float = 1.0,
    level: Literal["token", "sequence", "trajectory"] = "trajectory",
) -> Method:
    """REINFORCE leave-one-out: the baseline of a completion is the mean return of the others of its group.

    The ratio is that of the whole sequence, clipped, as in TRL; on the first update it is 1, and the gradient is
    REINFORCE's.

    Args:
        beta: coefficient of k1 against the reference, in the reward.
        epsilon: clip range.
        num_generations: completions a prompt, at least 2.
        temperature: of the sampler.
        level: of the ratio.

    Source: "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs", 2024.
    """
    _at_least_two("rloo", num_generations)
    return _with_reward_kl(
        Method(
            rollout=Rollout(num_generations=num_generations, temperature=temperature),
            advantage={"leave_one_out": LeaveOneOut()},
            surrogate=Surrogate(Clipped(epsilon), level=level),
            aggregation=Aggregation("sequence_mean_token_mean" if level == "trajectory" else "sequence_mean_token_sum"),
            claim=Claim(REWARD_KL if beta else REWARD, "sequence", "kl_policy_ref" if beta else None, "beta"),
        ),
        beta,
    )


@recipe(baseline="reinforce")
def remax(beta: float = 0.0, num_generations: int = 1, temperature: float = 1.0) -> Method:
    """REINFORCE whose baseline is the return of the greedy completion of the same prompt.

    Args:
        beta: coefficient of k1 against the reference, in the reward.
        num_generations: sampled completions a prompt; the greedy one comes on top.
        temperature: of the sampler.

    Source: "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning LLMs", 2024.
    """
    return _with_reward_kl(
        Method(
            rollout=Rollout(num_generations=num_generations, temperature=temperature, greedy_baseline=True),
            advantage={"greedy": GreedyBaseline()},
            surrogate=Surrogate(LogLikelihood()),
            aggregation=Aggregation("sequence_mean_token_sum"),
            claim=Claim(REWARD_KL if beta else REWARD, "sequence", "kl_policy_ref" if beta else None, "beta"),
        ),
        beta,
    )


@recipe()
def grpo(
    beta: float = 0.0,
    kl: KLPlacement = "k3_ratio",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    dual_clip: float | None = None,
    num_generations: int = 8,
    temperature: float = 1.0,
    advantage_epsilon: float = 1e-4,
    scale_rewards: Literal["group", "batch", "none"] = "group",
    aggregation: Mode = "token_mean",
    max_completion_length: int = 256,
    importance_cap: float | None = None,
    entropy_coef: float = 0.0,
) -> Method:
    """Group relative policy optimisation: the advantage is the reward less the group's mean, over its deviation.

    Args:
        beta: coefficient of the KL to the reference, in the loss; 0 loads no reference.
        kl: form of that KL. Sampled: k1 (no gradient), k2, k3, k3_ratio (k3 times the ratio, as in TRL). Over the whole
            vocabulary: any divergence, kl_policy_ref, kl_ref_policy, js, chi2_policy_ref ...
        epsilon, epsilon_high: clip range below and above 1.
        dual_clip: c of the dual clip.
        num_generations: the group size.
        temperature: of the sampler.
        advantage_epsilon: added to the deviation.
        scale_rewards: deviation of the group, of the batch, or none.
        aggregation: how token losses become one number; sequence_mean_token_mean is the first paper's.
        max_completion_length: tokens at most.
        importance_cap: truncated importance sampling between sampler and trainer; None is off.
        entropy_coef: coefficient of an entropy bonus.

    Source: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", 2024; defaults of TRL.
    """
    _at_least_two("grpo", num_generations)
    scale = {} if scale_rewards == "none" else {"scale": GroupStd(advantage_epsilon, scale_rewards)}
    length = max_completion_length if aggregation == "constant" else None
    return Method(
        rollout=Rollout(
            num_generations=num_generations, temperature=temperature, max_completion_length=max_completion_length
        ),
        advantage={"centre": GroupCentre(), **scale},
        surrogate=Surrogate(Clipped(epsilon, epsilon_high, dual_clip)),
        aggregation=Aggregation(aggregation, length),
        weights={} if importance_cap is None else {"importance": TruncatedImportance(importance_cap)},
        terms={**_loss_kl(beta, kl), **_entropy(entropy_coef)},
        models={"ref": Initial()} if beta else {},
        claim=_loss_kl_claim(beta, kl, scale_rewards),
    )


@recipe(baseline="grpo", neutral={"beta": 0.0}, passes={"kl": "kl_ref_policy"})
def grpo_forward_kl(beta: float = 0.1, **grpo_options) -> Method:
    """GRPO with KL(ref || policy) over the whole vocabulary in the loss, which holds on to what the reference could do.

    Args:
        beta: coefficient of the divergence.

    Source: the mass-covering direction, as in "The Choice of Divergence", 2025 (paper 21), on the policy's own samples.
    """
    return grpo(beta=beta, **grpo_options)


@recipe(baseline="grpo", passes={"scale_rewards": "none", "aggregation": "constant"})
def dr_grpo(max_completion_length: int = 256, **grpo_options) -> Method:
    """GRPO without its two biases: no division by the group's deviation, none by the length of a completion.

    Args:
        max_completion_length: tokens at most, and the constant that the sum of token losses is divided by.

    Source: "Understanding R1-Zero-Like Training: A Critical Perspective", 2025.
    """
    return grpo(max_completion_length=max_completion_length, **grpo_options)


@recipe(baseline="grpo", preset={"train.dynamic_sampling": True})
def dapo(
    epsilon: float = 0.2,
    epsilon_high: float = 0.28,
    num_generations: int = 16,
    overlong_cache: int | None = None,
    max_completion_length: int = 256,
    **grpo_options,
) -> Method:
    """GRPO with a higher upper clip, a mean over tokens, groups that are not tied, and a soft punishment of length.

    Args:
        epsilon, epsilon_high: clip range below and above 1.
        num_generations: the group size.
        overlong_cache: tokens before the limit over which the punishment grows; None is a fifth of the limit, 0 is no
            punishment.
        max_completion_length: the limit.

    Source: "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", 2025.
    """
    cache = max(1, max_completion_length // 5) if overlong_cache is None else overlong_cache
    method = grpo(
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        num_generations=num_generations,
        max_completion_length=max_completion_length,
        **grpo_options,
    )
    if not cache:
        return method
    return method.adding(transforms={"sum": WeightedSum(), "overlong": Overlong(max_completion_length, cache)})


@recipe(baseline="grpo", passes={"aggregation": "sequence_mean_token_mean"})
def gspo(epsilon: float = 3e-4, epsilon_high: float | None = 4e-4, **grpo_options) -> Method:
    """GRPO with the ratio of the sequence, the geometric mean of its tokens', clipped as one.

    Args:
        epsilon, epsilon_high: clip range of the sequence's ratio.

    Source: "Group Sequence Policy Optimization", 2025.
    """
    method = grpo(epsilon=epsilon, epsilon_high=epsilon_high, **grpo_options)
    assert method.surrogate is not None
    return method.replacing(surrogate=Surrogate(method.surrogate.f, level="sequence"))


@recipe(baseline="grpo", without=CLIP)
def cispo(low: float = 0.0, high: float = 5.0, **grpo_options) -> Method:
    """GRPO whose clip bounds the weight of a token but never silences its gradient.

    Args:
        low, high: absolute bounds of the ratio.

    Source: "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", 2025.
    """
    return grpo(**grpo_options).replacing(surrogate=Surrogate(CISPO(low, high)))


@recipe()
def ppo(
    epsilon: float = 0.2,
    value_epsilon: float | None = 0.2,
    value_coef: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.95,
    beta: float = 0.05,
    target_kl: float | None = None,
    whiten: bool = True,
    critic: Literal["head", "model"] = "head",
    num_generations: int = 1,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
) -> Method:
    """Proximal policy optimisation with a learned value, generalised advantages, and k1 in the reward.

    Args:
        epsilon, value_epsilon: clip ranges of the ratio and of the value.
        value_coef: coefficient of the value loss.
        gamma, lam: discount and trace decay.
        beta: coefficient of k1 against the reference, in the reward.
        target_kl: if given, beta adapts towards this KL, in nats a token.
        whiten: whiten the advantages over the tokens of the batch.
        critic: a head on the policy's states, or a model of its own.
        num_generations: completions a prompt.
        temperature: of the sampler.
        entropy_coef: coefficient of an entropy bonus.

    Source: "Proximal Policy Optimization Algorithms", 2017; RLHF settings of TRL.
    """
    method = Method(
        rollout=Rollout(num_generations=num_generations, temperature=temperature),
        advantage={"gae": GAE(gamma, lam), **({"whiten": Whiten()} if whiten else {})},
        heads={"value": Critic(critic)},
        surrogate=Surrogate(Clipped(epsilon)),
        terms={"value": Summand(ValueLoss(value_epsilon), value_coef), **_entropy(entropy_coef)},
        claim=Claim(REWARD_KL if beta else REWARD, "sequence", "kl_policy_ref" if beta else None, "beta"),
    )
    method = _with_reward_kl(method, beta)
    if target_kl is None or not beta:
        return method
    return method.adding(controllers={"beta": AdaptiveKL("transforms.kl.coef", beta, target_kl)})


def unclipped_grpo(**grpo_options) -> Method:
    """GRPO with the bare ratio; what several variants reduce to."""
    return grpo(**grpo_options).replacing(surrogate=Surrogate(Unclipped()))


def _with_reward_kl(method: Method, beta: float) -> Method:
    """KL(policy || ref) as k1 in the token rewards; nothing at beta 0."""
    if not beta:
        return method
    return method.adding(transforms={"kl": KLInReward(beta)}, models={"ref": Initial()})


def _loss_kl(beta: float, kl: str) -> dict[str, Summand]:
    if not beta:
        return {}
    if kl not in ESTIMATED:
        return {"kl": Summand(VocabularyDivergence(kl), beta)}
    ratio: Literal["none", "differentiable"] = "differentiable" if kl.endswith("_ratio") else "none"
    return {"kl": Summand(SampledKL(kl.removesuffix("_ratio"), ratio=ratio), beta)}


def _loss_kl_claim(beta: float, kl: str, scale_rewards: str) -> Claim:
    invariant = ("reward_shift",) if scale_rewards == "none" else ("reward_shift", "reward_scale")
    if not beta:
        return Claim(REWARD, invariant=invariant)
    kind = "kl_policy_ref" if kl in ESTIMATED else kl
    name = {"kl_policy_ref": "KL(pi || ref)", "kl_ref_policy": "KL(ref || pi)"}.get(kind, f"{kind}(pi, ref)")
    return Claim(f"E_pi[r] - beta {name} per state", "state", kind, "beta", invariant=invariant)


def _entropy(coef: float) -> dict[str, Summand]:
    return {"entropy": Summand(NegativeEntropy(), coef)} if coef else {}


def _at_least_two(name: str, num_generations: int) -> None:
    if num_generations < 2:
        raise ValueError(f"{name} compares completions of one prompt: num_generations must be at least 2")
