"""Methods that differ in the divergence that holds the policy, and in what it is held to."""

from dataclasses import replace
from typing import Any, Literal

from keel.method import Claim, Method
from keel.models.sources import Initial, Pretrained
from keel.parts.advantages.asymmetric import DifficultyKLWeight, LongMistakes
from keel.parts.controllers.coefficients import Schedule
from keel.parts.masks.outcome import Failed
from keel.parts.rewards.occupancy import OccupancyPenalty
from keel.parts.rewards.transforms import KLInReward, WeightedSum
from keel.parts.terms.covering import ReweightedReference
from keel.parts.terms.penalties import RootChi2, SampledKL, Summand, VocabularyDivergence
from keel.parts.terms.weighted import RowWeightedKL
from keel.recipes.policy_gradient import grpo, rloo
from keel.recipes.registry import recipe


def unregularised_rloo(**rloo_options) -> Method:
    """RLOO without its KL."""
    return rloo(beta=0.0, **rloo_options)


@recipe(paper=4, baseline="rloo", neutral={"beta": 0.0}, reduces_to=unregularised_rloo)
def occupancy_chi2(
    beta: float = 0.1,
    kind: Literal["sqrt_chi2", "chi2", "kl"] = "sqrt_chi2",
    level: Literal["sequence", "state"] = "sequence",
    clip: float | None = None,
    num_generations: int = 8,
    **rloo_options,
) -> Method:
    """RLOO held to the reference by the chi-square of completions, or its root, against the hacking of a proxy reward.

        maximise E_pi[r] - beta sqrt(chi2(pi || ref)),   chi2 = E_pi[pi / ref] - 1, a mean over prompts

    With R the correlation of proxy and true reward under the reference, beta = sd sqrt(1 - R^2) never loses true
    reward. The root has a threshold: above the standard deviation of the reward the optimum is the reference.

    Args:
        beta: coefficient, 0.01 to 1 times the standard deviation of the reward under the reference.
        kind: sqrt_chi2, chi2, or kl of completions.
        level: state takes the divergence of the next token at each position, in the loss, which promises nothing.
        clip: bound of the reward that is added; None is none.
        num_generations: completions a prompt.

    Source: "Correlated Proxies: A New Definition and Improved Mitigation for Reward Hacking", 2024, there called ORPO,
    as is an unrelated preference loss; with likelihood ratios in place of its discriminator, and RLOO for PPO.
    """
    method = unregularised_rloo(num_generations=num_generations, **rloo_options)
    if not beta:
        return method
    divergence = {"sqrt_chi2": "sqrt chi2_policy_ref", "chi2": "chi2_policy_ref", "kl": "kl_policy_ref"}[kind]
    if level == "state":
        penalty = RootChi2() if kind == "sqrt_chi2" else VocabularyDivergence(divergence)
        claim = Claim(f"E_pi[r] - beta {kind}(pi, ref) per state", "state", divergence, "beta")
        return method.replacing(claim=None if kind == "sqrt_chi2" else claim).adding(
            terms={"occupancy": Summand(penalty, beta)}, models={"ref": Initial()}
        )
    objective = f"E_pi[r] - beta {kind}(pi || ref), sequences"
    return method.replacing(
        transforms={"sum": WeightedSum(), "occupancy": OccupancyPenalty(beta, kind, clip=clip)},
        models={"ref": Initial()},
        claim=Claim(objective, "sequence", divergence, "beta"),
    )


@recipe(paper=17, baseline="grpo", neutral={"beta": 0.0}, without=("kl",))
def rapo(
    beta: float = 5e-3,
    phi: float = 1.0,
    cap: float | None = 5.0,
    level: Literal["token", "sequence"] = "token",
    **grpo_options,
) -> Method:
    """RAPO: GRPO whose KL is forward, from a reference that is reweighted by the reward.

        maximise E_pi[r] - beta KL(ref~ || pi),   ref~ = ref e^(phi r) / Z

    What the reference cannot write costs nothing, so that the policy may leave its support, while good answers of the
    reference are kept.

    Args:
        beta: coefficient of the divergence; 0 loads no reference.
        phi: how much the reward counts in ref~; 0 is the plain forward KL.
        cap: the largest importance ratio ref / old.
        level: of that ratio.

    Source: "Unlocking Reasoning Capabilities in LLMs via Reinforcement Learning Exploration", 2025; weights and
    constants are reconstructed.
    """
    method = grpo(beta=0.0, **grpo_options)
    if not beta:
        return method
    objective = "E_pi[r] - beta KL(ref~ || pi), ref~ = ref exp(phi r) / Z, sequences"
    claim = Claim(objective, "sequence", "kl_ref_policy", "beta", target="reweighted", invariant=("reward_shift",))
    return method.replacing(models={"ref": Initial()}, claim=claim).adding(
        terms={"kl": Summand(ReweightedReference(phi, cap, level), beta)}
    )


@recipe(paper=14, baseline="grpo", neutral={"beta": 0.0, "length_base": None}, without=("kl",))
def apo(
    beta: float = 1e-3,
    difficulty: bool = True,
    length_base: float | None = 1.00001,
    threshold: float = 1.0,
    **grpo_options,
) -> Method:
    """APO: GRPO whose KL is weaker on the good completions of hard prompts, and which punishes long mistakes more.

        KL: beta mean_i kappa_i mean_t k3,   kappa = 1 - exp(-e (1 - d)) where A > 0, d the share of wrong completions
        A of a wrong completion longer than the mean correct one: times 2 - length_base^-(excess tokens)

    Args:
        beta: coefficient of the KL; 0 loads no reference.
        difficulty: the weight kappa (DADS); False weighs all completions alike.
        length_base: of the factor on long mistakes (STCR); None leaves advantages alone.
        threshold: reward from which on a completion is correct.

    Source: "APO: Enhancing Reasoning Ability of MLLMs via Asymmetric Policy Optimization", 2025.
    """
    method = grpo(beta=0.0, **grpo_options)
    assert method.claim is not None
    method = method.replacing(claim=replace(method.claim, invariant=()))
    if length_base is not None:
        method = method.adding(advantage={"long_mistakes": LongMistakes(length_base, threshold)})
    if beta and difficulty:
        method = method.adding(advantage={"difficulty": DifficultyKLWeight(threshold)})
    if not beta:
        return method
    claim = Claim("E_pi[r] - beta E[kappa KL(pi || ref)] per state", "state", "kl_policy_ref", "beta")
    return method.replacing(models={"ref": Initial()}, claim=claim).adding(terms={"kl": RowWeightedKL(beta)})


@recipe(paper=11, baseline="grpo", neutral={"beta": 0.0}, without=("kl",))
def kdrl(
    beta: float = 5e-3,
    beta_min: float = 1e-3,
    decay: float = 5e-5,
    teacher: str | None = None,
    guided: Literal["none", "response", "group"] = "none",
    threshold: float = 1.0,
    form: Literal["k2", "k3", "vocabulary", "reward"] = "k2",
    **grpo_options,
) -> Method:
    """KDRL: GRPO whose KL is to a stronger teacher, with the right gradient, fading, and only on failures if asked.

        loss = GRPO + max(beta - decay * step, beta_min) mean (log pi - log teacher)^2 / 2,   times sg(pi / old)

    The optimum without fading is teacher e^(r / beta) / Z. On-policy distillation is the limit of no reward.

    Args:
        beta: first coefficient; 0 loads no teacher.
        beta_min: last one.
        decay: what a step takes off it, so that it takes a whole number of steps; 0 keeps beta.
        teacher: folder or hub name, of the policy's tokenizer; None is the initial policy.
        guided: none, the tokens of failed completions alone (response), or of prompts at which all failed (group); the
            mean is over these tokens.
        threshold: reward from which on a completion has not failed.
        form: of the KL: k2 of the sampled token; k3, whose gradient is that of KL(teacher || pi); over the whole
            vocabulary; or k1 in the reward, which cannot be guided.

    Source: "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning", 2025,
    arXiv 2506.02208; the authors' code was not seen.
    """
    method = grpo(beta=0.0, **grpo_options)
    if not beta:
        return method
    masks = {} if guided == "none" else {"failed": Failed(threshold, guided)}
    slot = "transforms" if form == "reward" else "terms"
    steps = max(1, round((beta - beta_min) / decay)) if decay > 0 and beta > beta_min else 0
    fading = {"distil": Schedule(f"{slot}.distil.coef", beta, beta_min, steps)} if steps else {}
    level: Literal["state", "sequence"] = "sequence" if form == "reward" else "state"
    objective = f"E_pi[r] - beta KL(pi || teacher){'' if form == 'reward' else ' per state'}"
    claim = Claim(objective, level, "kl_policy_ref", "beta", target="teacher", invariant=("reward_shift",))
    return method.replacing(
        models={"teacher": Initial() if teacher is None else Pretrained(teacher)},
        claim=claim if guided == "none" else replace(claim, invariant=()),
    ).adding(
        masks=masks, controllers=fading, **{slot: {"distil": _teacher_kl(form, beta, "failed" if masks else None)}}
    )


def _teacher_kl(form: str, beta: float, where: str | None) -> Summand | KLInReward:
    """KL to the teacher, in the loss or in the reward."""
    if form == "reward":
        if where is not None:
            raise ValueError("a KL in the reward is on all tokens: leave guided at none, or take another form")
        return KLInReward(beta, "k1", "teacher")
    penalty: Any = {
        "k2": SampledKL("k2", "teacher", ratio="detached"),
        "k3": SampledKL("k3", "teacher", ratio="detached"),
        "vocabulary": VocabularyDivergence("kl_policy_ref", "teacher"),
    }[form]
    return Summand(penalty, beta, where, None if where is None else "where")
