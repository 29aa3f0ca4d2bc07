"""Methods under constraints: rewards with thresholds, a KL with a limit that moves, objectives whose weights move."""

from typing import Any, Literal

from keel.method import Claim, Method
from keel.models.heads import Critic, SlowCopy
from keel.models.sources import Initial
from keel.parts.advantages.constrained import ConstrainedGAE, critic_names
from keel.parts.advantages.pessimistic import SoftMinCritics
from keel.parts.advantages.stream import Whiten
from keel.parts.controllers.convergence import ObjectiveWeights
from keel.parts.controllers.lagrange import Lagrange, ThresholdSearch, squashed
from keel.parts.controllers.pid import KLPreview, KLThreshold
from keel.parts.replay.rehearsal import Rehearsal
from keel.parts.rewards.components import KeepComponents, StandardiseComponents
from keel.parts.rewards.transforms import KLInReward, WeightedSum
from keel.parts.terms.critics import SoftMinValueLoss, SquaredValueLoss
from keel.parts.terms.penalties import NegativeEntropy, NegativeLogLikelihood, SampledKL, Summand
from keel.parts.terms.surrogate import Clipped, Surrogate
from keel.recipes.policy_gradient import grpo
from keel.recipes.registry import recipe
from keel.rollouts.rollout import Rollout


@recipe(paper=96, baseline="ppo")
def mu_ppo(
    thresholds: tuple[float, ...] = (0.5,),
    squash: Literal["sigmoid", "tanh", "identity"] = "sigmoid",
    beta: float = 0.2,
    dual_learning_rate: float = 0.1,
    epsilon: float = 0.2,
    value_coef: float = 0.1,
    gamma: float = 0.99,
    lam: float = 0.95,
    whiten: bool = True,
    search_metric: str | None = None,
    num_generations: int = 1,
    temperature: float = 1.0,
) -> Method:
    """mu-PPO: the KL is the objective, and each reward a constraint that is pursued up to its threshold and no further.

        minimise KL(pi || ref)  subject to  E_pi[r_m] >= threshold_m,   A = (M - sum lam) A^KL + sum_m lam_m A^m

    A proxy is good up to some value and is hacked beyond it; that value is its threshold, known from runs on one reward
    or found with `search_thresholds`.

    Args:
        thresholds: of the mean rewards, one for each reward function, in their order; one alone is that of their sum.
        squash: of the multipliers: sigmoid for at least, tanh for exactly (xi), identity kept above 0.
        beta: factor on the KL in the token rewards; with `whiten` it cancels.
        dual_learning_rate: of the multipliers.
        epsilon: clip range.
        value_coef: coefficient of each critic's squared error.
        gamma, lam: discount and trace decay.
        whiten: each advantage on its own.
        search_metric: metric for whose sake the thresholds move during the run, from the given ones; None holds them.
        num_generations: completions a prompt.
        temperature: of the sampler.

    Source: "Confronting Reward Model Overoptimization with Constrained RLHF", 2023.
    """
    heads = critic_names(len(thresholds))
    kept = {"sum": WeightedSum()} if len(thresholds) == 1 else {"components": KeepComponents()}
    multipliers = tuple(squashed(squash, 0.0)[0] for _ in thresholds)
    search = {} if search_metric is None else {"search": ThresholdSearch(thresholds, metric=search_metric)}
    objective = "min KL(pi || ref) s.t. E_pi[r] >= threshold: E_pi[r] - beta KL at the multipliers of the start"
    return Method(
        rollout=Rollout(num_generations=num_generations, temperature=temperature),
        transforms={**kept, "kl": KLInReward(beta)},
        advantage={"constrained": ConstrainedGAE(multipliers, gamma, lam, whiten)},
        heads={name: Critic() for name in heads},
        surrogate=Surrogate(Clipped(epsilon)),
        terms={name: Summand(SquaredValueLoss(name), value_coef) for name in heads},
        models={"ref": Initial()},
        controllers={**search, "multipliers": Lagrange(thresholds, squash, dual_learning_rate)},
        claim=Claim(objective, "sequence", "kl_policy_ref", "beta"),
    )


@recipe(paper=96, baseline="mu_ppo", passes={"squash": "tanh"})
def xi_ppo(thresholds: tuple[float, ...] = (0.5,), **mu_ppo_options) -> Method:
    """xi-PPO: mu-PPO whose rewards are held at their thresholds from both sides, by multipliers that may be negative.

        minimise KL(pi || ref)  subject to  E_pi[r_m] = threshold_m,   lam = tanh(u)

    Args:
        thresholds: of the mean rewards, one for each reward function, in their order; one alone is that of their sum.

    Source: "Confronting Reward Model Overoptimization with Constrained RLHF", 2023.
    """
    method = mu_ppo(thresholds, **mu_ppo_options)
    objective = "min KL(pi || ref) s.t. E_pi[r] = threshold: -KL at the multipliers of the start, which are 0"
    return method.replacing(claim=Claim(objective, "sequence", "kl_policy_ref", None, "target", "reference"))


@recipe(
    paper=12,
    baseline="ppo",
    preset={"train.learning_rate": 1e-5, "train.critic_learning_rate": 1e-5, "train.num_iterations": 2},
)
def safe(
    base: float = 0.3,
    strength: float = 0.1,
    sharpness: float = 0.3,
    epsilon: float = 0.2,
    value_epsilon: float = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.01,
    max_preview_kl: float | None = 0.5,
    slow: float | None = None,
    num_generations: int = 1,
    temperature: float = 1.0,
) -> Method:
    """SAFE: PPO with the soft minimum of two critics, and a KL penalty that acts above a threshold that moves.

        A = R - soft_min(V_a, V_b), whitened;   KL: 2 strength [ks - threshold]_+ max(0.5, 2 / (H + 0.1)) as coefficient

    The threshold goes up while the reward climbs, and down on a plateau; low entropy makes the penalty stronger.

    Args:
        base: of the threshold, in nats per token.
        strength: of the quadratic penalty.
        sharpness: of the soft minimum.
        epsilon, value_epsilon: clip ranges of the ratio and of the value.
        value_coef: coefficient of the value loss.
        entropy_coef: coefficient of an entropy bonus.
        max_preview_kl: KL per token beyond which an update is shortened in proportion; None takes every one whole.
        slow: rate of slow copies of the critics that make the advantage, .05 in the release, where nothing reads them;
            None takes the critics themselves.
        num_generations: completions a prompt.
        temperature: of the sampler.

    Source: "SAFE: Stable Alignment Finetuning with Entropy-Aware Predictive Control for RLHF", 2026; with a gradient,
    which its penalty lacks as released.
    """
    critics = SoftMinCritics(sharpness, slow=() if slow is None else ("slow_a", "slow_b"))
    copies = {name: SlowCopy(of, slow or 1.0) for name, of in zip(critics.slow, critics.heads, strict=False)}
    bonus = {"entropy": Summand(NegativeEntropy(), entropy_coef)} if entropy_coef else {}
    return Method(
        rollout=Rollout(num_generations=num_generations, temperature=temperature),
        advantage={"critics": critics, "whiten": Whiten()},
        heads={**{name: Critic() for name in critics.heads}, **copies},
        surrogate=Surrogate(Clipped(epsilon)),
        terms={
            "value": Summand(SoftMinValueLoss(sharpness, critics.heads, value_epsilon), value_coef),
            "kl": Summand(SampledKL("k3", ratio="differentiable"), 0.0),
            **bonus,
        },
        models={"ref": Initial()},
        controllers={
            "kl": KLThreshold("terms.kl.coef", base, strength=strength),
            **({} if max_preview_kl is None else {"preview": KLPreview(max_preview_kl)}),
        },
        claim=Claim("E_pi[r] s.t. KL(pi || ref) per token <= threshold: E_pi[r] while it is below"),
    )


@recipe(paper=13, baseline="grpo", neutral={"window": None, "normalise": False})
def recap(
    window: int | None = 8,
    tau: float = 1.0,
    combine: Literal["product", "sum"] = "product",
    cap: float | None = None,
    normalise: bool = True,
    general: str | None = None,
    general_rows: int = 8,
    general_coef: float = 0.1,
    scale_rewards: Literal["group", "batch", "none"] | None = None,
    **grpo_options,
) -> Method:
    """RECAP: GRPO on several rewards, weighted by how little, and how unsteadily, each has moved of late.

        A = sum_k weight_k (r_k - mean_k) / std_k,   weight = K softmax(convergence * instability / tau)

    A reward that has saturated gets the least; rewards are taken to lie in [0, 1]. General data that come with
    completions are replayed beside each batch, and their loss is one more objective; general prompts with rewards of
    their own (None elsewhere) belong to the task.

    Args:
        window: batches that are looked back on; None keeps all weights at 1.
        tau: temperature of the weights; large is static.
        combine: product or sum of the two signals.
        cap: largest weight; None is none.
        normalise: each reward within its group before they are summed, rather than their sum.
        general: a file of prompts and completions, by `domain` in proportion; None replays none.
        general_rows: of it, beside each batch.
        general_coef: of its mean -log pi(y_t), at weight 1.
        scale_rewards: of what is summed; None is none with `normalise`, else group.

    Source: "Beyond Reasoning Gains: Mitigating General Capabilities Forgetting in Large Reasoning Models", 2025;
    formulas and constants are reconstructed from its summary.
    """
    method = grpo(scale_rewards=scale_rewards or ("none" if normalise else "group"), **grpo_options)
    if general is not None:
        method = method.replacing(claim=None).adding(
            terms={"general": Summand(NegativeLogLikelihood(), general_coef, stream="regulariser")},
            replay={"general": Rehearsal(general_rows, "data", path=general, num_prompts=None)},
        )
    transforms: dict[str, Any] = {}
    controllers: dict[str, Any] = {}
    if window is not None:
        term = None if general is None else "general"
        controllers = {"weights": ObjectiveWeights(window, tau, combine, cap, term=term, coef=general_coef)}
        transforms = {"components": KeepComponents()}
    if normalise:
        transforms["standardise"] = StandardiseComponents()
    transforms = {**transforms, "sum": WeightedSum()} if transforms else {}
    return method.adding(transforms=transforms, controllers=controllers)
