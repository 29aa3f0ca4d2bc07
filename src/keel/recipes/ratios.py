"""GRPO with another surrogate, another scale of the advantage, or another answer to a sampler that drifts."""

from dataclasses import replace
from typing import Literal

from keel.method import Claim, Method
from keel.parts.advantages.estimators import LengthBaseline, MaximumLikelihood, NonzeroScale, OptimalTokenBaseline
from keel.parts.advantages.rejection import RejectMismatch
from keel.parts.terms.penalties import SampledKL, Summand
from keel.parts.terms.surrogate import LogLikelihood, Objective, Surrogate, Unclipped
from keel.parts.terms.surrogates import GammaKernel, GeometricMean, SoftGate, TwoSidedClip
from keel.parts.weights.mismatch import MaskedImportance, StaleNegatives, TrustRegion
from keel.recipes.policy_gradient import CLIP, SCALE, grpo, gspo
from keel.recipes.registry import recipe


@recipe(baseline="grpo", without=CLIP[1:], passes={"aggregation": "sequence_mean_token_mean"})
def gmpo(epsilon: float = 0.4, **grpo_options) -> Method:
    """GRPO with the geometric mean of a row's ratios, each token clipped on its own before the mean is taken.

    Args:
        epsilon: clip range of the log-ratio of a token.

    Source: "Geometric-Mean Policy Optimization", 2025.
    """
    return _with(GeometricMean(epsilon), grpo_options)


@recipe(baseline="grpo", without=CLIP, passes={"aggregation": "sequence_mean_token_mean"})
def sapo(tau: float = 1.0, tau_negative: float = 1.05, **grpo_options) -> Method:
    """GRPO with a smooth gate around ratio 1 in place of the clip.

    Args:
        tau, tau_negative: how sharp the gate is where A > 0 and elsewhere.

    Source: "Soft Adaptive Policy Optimization", 2025.
    """
    return _with(SoftGate(tau, tau_negative), grpo_options)


@recipe(baseline="grpo", without=CLIP)
def vespo(
    k: float = 2.0, lam: float = 3.0, k_negative: float = 3.0, lam_negative: float = 2.0, **grpo_options
) -> Method:
    """GRPO whose log-likelihood is weighted by a kernel of the whole row's ratio, 1 at ratio 1 and vanishing far off.

    Args:
        k, lam: exponents of the kernel where A >= 0.
        k_negative, lam_negative: where A < 0.

    Source: "VESPO: Variational Sequence-level Soft Policy Optimization for Off-Policy LLM Training", 2026.
    """
    return _with(GammaKernel(k, lam, k_negative, lam_negative), grpo_options, "trajectory")


@recipe(baseline="gspo", passes={"aggregation": "sequence_mean_token_sum"})
def luspo(**gspo_options) -> Method:
    """GSPO with each sequence's loss times its length, which takes the preference for short ones out.

    Source: "Length-Unbiased Sequence Policy Optimization", 2026.
    """
    return gspo(**gspo_options)


@recipe(baseline="grpo", without=("dual_clip",))
def grpo_two_sided(
    delta: float = 4.0, epsilon: float = 0.2, epsilon_high: float | None = None, **grpo_options
) -> Method:
    """GRPO that bounds the ratio of punished tokens, too, which PPO's clip leaves open.

    Args:
        delta: largest ratio of tokens with A < 0.
        epsilon, epsilon_high: clip range below and above 1.

    Source: "INTELLECT-2: A Reasoning Model Trained Through Globally Decentralized Reinforcement Learning", 2025;
    `delta` of TRL.
    """
    return _with(TwoSidedClip(delta, epsilon, epsilon_high), grpo_options)


@recipe(baseline="grpo", without=CLIP)
def dppo(low: float = 0.2, high: float = 0.2, coef: float = 1e-3, **grpo_options) -> Method:
    """GRPO without a clip that drops tokens whose probability has moved too far, in probability and not in ratio.

    The step is divided by all tokens, and a small square of the log-ratio holds on to the kept and the dropped.

    Args:
        low, high: how far a punished token may fall and a rewarded one may rise, from what the sampler recorded.
        coef: of (log pi - log old)^2.

    Source: "Rethinking the Trust Region in LLM Reinforcement Learning", 2026; defaults of prime-rl.
    """
    method = _with(Unclipped(), grpo_options)
    return method.adding(
        weights={"trust_region": TrustRegion(low, high)},
        terms={"old": Summand(SampledKL("k2", against="old"), 2 * coef)},
    )


@recipe(
    baseline="grpo",
    neutral={"tau": 0.0},
    reduces_to=lambda: _likelihood_grpo(),
    without=CLIP,
    passes={"scale_rewards": "none"},
)
def dro(tau: float = 0.05, level: Literal["token", "sequence"] = "token", **grpo_options) -> Method:
    """Log-likelihood weighted by the advantage, and a square of the log-ratio to the policy that sampled.

        A log pi - tau / 2 (log pi - log old)^2

    On the first update it is the policy gradient; the square holds the later ones, off-policy, in place of a clip.

    Args:
        tau: coefficient of the square.
        level: whether the square is that of a token's log-ratio or of the whole sequence's.

    Source: "Offline Regularised Reinforcement Learning for Large Language Models Alignment", 2024, and "Kimi k1.5:
    Scaling Reinforcement Learning with LLMs", 2025, whose square is of the sequence; per token as `dro` of Tinker. The
    group's mean stands in for the value that they learn or estimate.
    """
    mode = "sequence_mean_token_sum" if level == "sequence" else "token_mean"
    method = _with(LogLikelihood(), {"aggregation": mode, **grpo_options})
    return method.adding(terms={"old": Summand(SampledKL("k2", against="old", level=level), tau)})


@recipe(baseline="grpo", without=CLIP, passes={"scale_rewards": "none"})
def gpg(**grpo_options) -> Method:
    """Plain policy gradient with the group's mean as baseline, scaled up by the share of completions without reward.

    Source: "GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning", 2025.
    """
    method = _with(LogLikelihood(), grpo_options)
    assert method.claim is not None
    return method.adding(advantage={"nonzero": NonzeroScale()}).replacing(claim=replace(method.claim, invariant=()))


@recipe(baseline="grpo", without=(*CLIP, *SCALE), passes={"aggregation": "sequence_mean_token_sum"})
def opo(**grpo_options) -> Method:
    """Plain policy gradient whose baseline is the mean of the group's rewards weighted by length.

    Source: "On-Policy RL with Optimal Reward Baseline", 2025.
    """
    method = _with(LogLikelihood(), {"scale_rewards": "none", **grpo_options})
    return method.replacing(advantage={"length_baseline": LengthBaseline()})


@recipe(baseline="grpo", without=(*CLIP, *SCALE), passes={"aggregation": "sequence_mean_token_sum"})
def otb(**grpo_options) -> Method:
    """Optimal token baseline: plain policy gradient, with a baseline of least variance for each position of the group.

    Source: optimal token baseline, 2026, arXiv 2602.07078; as in verl.
    """
    method = _with(LogLikelihood(), {"scale_rewards": "none", **grpo_options})
    return method.replacing(advantage={"token_baseline": OptimalTokenBaseline()})


@recipe(baseline="grpo", without=(*CLIP, *SCALE), passes={"aggregation": "sequence_mean_token_sum"})
def maxrl(threshold: float | None = 0.5, **grpo_options) -> Method:
    """Maximises log P(success) in place of P(success): each prompt's step is divided by its share of successes.

    Args:
        threshold: a completion of at least this return is a success; None takes the return itself, not negative.

    Source: "Maximum Likelihood Reinforcement Learning", 2026.
    """
    method = _with(LogLikelihood(), {"scale_rewards": "none", **grpo_options})
    claim = Claim("log P_pi(r >= threshold)", "sequence", "kl_ref_policy", None, "target", "successes")
    kept = None if method.models else claim  # with a KL there is no closed form to hold it to
    return method.replacing(advantage={"maximum_likelihood": MaximumLikelihood(threshold)}, claim=kept)


@recipe(baseline="grpo")
def icepop(
    low: float = 0.5,
    high: float = 5.0,
    level: Literal["token", "sequence", "geometric"] = "token",
    reject: bool = False,
    **grpo_options,
) -> Method:
    """GRPO with masked importance sampling: what sampler and trainer rate too differently is left out, on both sides.

    Args:
        low, high: ratios of trainer to sampler that are kept.
        level: whose ratio is judged: the token's (IcePop), the row's product, or the row's geometric mean.
        reject: leave them out of the denominators, too, and weigh nothing else.

    Source: "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model", 2025.
    """
    method = grpo(**grpo_options)
    if reject:
        return method.adding(advantage={"reject": RejectMismatch(low, high, level)})
    return method.adding(weights={"mismatch": MaskedImportance(low, high, level)})


@recipe(baseline="grpo")
def stale_negative_masking(delta: float = 0.05, **grpo_options) -> Method:
    """GRPO without the punished completions from which the policy has moved away already.

    Args:
        delta: in nats a token.

    Source: "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", 2025; the threshold is not published.
    """
    return grpo(**grpo_options).adding(weights={"stale": StaleNegatives(delta)})


def _with(f: Objective, grpo_options: dict, level: Literal["token", "sequence", "trajectory"] = "token") -> Method:
    return grpo(**grpo_options).replacing(surrogate=Surrogate(f, level))


def _likelihood_grpo() -> Method:
    return _with(LogLikelihood(), {"scale_rewards": "none"})
