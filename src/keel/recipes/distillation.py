"""Distillation: a policy learns from a stronger model, on given completions, on its own, or on the teacher's.

The teacher is another model of the policy's vocabulary: `--teacher PATH`, or `teacher=`.
"""

from typing import Literal

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.models.sources import Initial, Pretrained, RandomInitial
from keel.parts.advantages.teacher import TeacherAdvantage
from keel.parts.rewards.predictions import EarlierPredictions
from keel.parts.rewards.stored_teacher import StoredTeacher
from keel.parts.terms.distillation import (
    BalancedKL,
    ListwiseDistillation,
    MixedTarget,
    StoredDivergence,
    TeacherDivergence,
)
from keel.parts.terms.distillation_batch import RelationalMatch, SinkhornDistillation
from keel.parts.terms.penalties import NegativeLogLikelihood, SampledDivergence, Summand
from keel.parts.terms.surrogate import Clipped, Surrogate
from keel.parts.weights.drawn import MixtureWeight
from keel.recipes.registry import recipe
from keel.recipes.supervised import sft
from keel.rollouts.rollout import Rollout
from keel.rollouts.taught import GivenCompletions, WrittenBy

Level = Literal["token", "sequence"]
SUM = Aggregation("sequence_mean_token_sum")


@recipe(preset={"train.learning_rate": 1e-5})
def distillation(
    divergence: str = "kl_ref_policy",
    temperature: float = 1.0,
    nll: float = 0.0,
    teacher: str | None = None,
) -> Method:
    """A divergence to the teacher over the whole vocabulary at each token of given completions.

    Args:
        divergence: by name, policy first: kl_ref_policy is KL(teacher || policy), kl_policy_ref the other direction,
            js:0.1, alpha:0.5, tv ...
        temperature: of both models; the loss is multiplied by its square.
        nll: coefficient of the completions' own likelihood beside it.
        teacher: folder, run's folder or hub name.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    objective = f"-{divergence}(pi, teacher) per state, on completions of the data"
    plain = not nll and temperature == 1
    claim = Claim(objective, "data", divergence, form="target", target="teacher") if plain else None
    terms = {"distil": Summand(TeacherDivergence(divergence, temperature=temperature), 1.0)}
    return _given(teacher, claim).adding(terms=terms | ({"nll": Summand(NegativeLogLikelihood(), nll)} if nll else {}))


@recipe(preset={"train.learning_rate": 1e-5})
def stored_distillation(
    stored: str = "",
    divergence: str = "kl_ref_policy",
    tail: Literal["bucket", "renormalise"] = "bucket",
) -> Method:
    """Distillation from the teacher's likeliest tokens, stored once: no teacher in memory.

    Args:
        stored: a file of `keel.train.teachers.store_top_k`, of the same data.
        divergence: by name, policy first.
        tail: what is not stored: one outcome of its own, a lower bound of the divergence, or left out of both.

    Source: top-k distillation, as common.
    """
    return Method(
        kind="distillation",
        transforms={"stored": StoredTeacher(stored)},
        terms={"distil": Summand(StoredDivergence(divergence, tail), 1.0)},
        claim=Claim(
            f"-{divergence}(pi, teacher) per state, on completions of the data, where all tokens are stored",
            "data",
            divergence,
            form="target",
            target="teacher",
        ),
    )


@recipe(preset={"train.learning_rate": 1e-5})
def on_policy_distillation(
    divergence: str = "kl_policy_ref",
    level: Level = "token",
    num_generations: int = 1,
    temperature: float = 1.0,
    teacher: str | None = None,
) -> Method:
    """A divergence to the teacher on the policy's own completions: it is corrected where it goes itself.

    At level token it is that over the vocabulary at each token, the visited states held fixed; at level sequence that
    of whole completions, estimated from their tokens, with the gradient of which states come next.

    Args:
        divergence: by name, policy first; kl_policy_ref is KL(policy || teacher).
        level: token or sequence.
        num_generations: completions of a prompt.
        temperature: of both models, and of the rollout.
        teacher: folder, run's folder or hub name.

    Source: "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", 2024.
    """
    states = level == "token"
    objective = f"-{divergence}(pi, teacher){' per state' if states else ''}, on the policy's completions"
    penalty = TeacherDivergence(divergence) if states else SampledDivergence(divergence, "old", "sequence", "teacher")
    return Method(
        kind="distillation",
        rollout=Rollout(num_generations=num_generations, temperature=temperature),
        aggregation=Aggregation("token_mean") if states else SUM,
        terms={"distil": Summand(penalty, 1.0)},
        models={"teacher": _teacher(teacher)},
        claim=Claim(objective, "state" if states else "sequence", divergence, form="target", target="teacher"),
    )


@recipe(baseline="on_policy_distillation", neutral={"share": 0.0}, preset={"train.learning_rate": 1e-5},
        reduces_to=lambda: on_policy_distillation("js"))  # fmt: skip
def gkd(
    divergence: str = "js",
    share: float = 0.5,
    per: Literal["batch", "row"] = "batch",
    **options,
) -> Method:
    """GKD: on-policy distillation by a generalised Jensen-Shannon divergence, some of it on completions of the data.

    Args:
        divergence: by name, policy first; js:0.1 has weight 0.1 on the teacher, near KL(teacher || policy).
        share: of given completions, 1 - lambda of the paper; 0 draws all.
        per: whole batches with this probability, as in the paper, or this share of each batch.

    Source: "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD), 2024.
    """
    method = on_policy_distillation(divergence, **options)
    if not share:
        return method
    assert method.rollout is not None
    claim = _stated("-D(pi, teacher) of the policy's completions, and of the data's for a share of them")
    return method.set("rollout.given", GivenCompletions(share, per)).replacing(claim=claim)


@recipe(preset={"train.learning_rate": 1e-5})
def sequence_kd(num_generations: int = 1, teacher: str | None = None) -> Method:
    """Supervised learning of completions that the teacher writes: KL(teacher || policy) of whole completions.

    Args:
        num_generations: completions of a prompt.
        teacher: folder, run's folder or hub name.

    Source: "Sequence-Level Knowledge Distillation", 2016, which takes the teacher's likeliest completion.
    """
    return Method(
        kind="distillation",
        rollout=Rollout(num_generations=num_generations, written=WrittenBy()),
        terms={"nll": Summand(NegativeLogLikelihood(), 1.0)},
        models={"teacher": _teacher(teacher)},
        claim=Claim("-KL(teacher || pi)", "sequence", "kl_ref_policy", form="target", target="teacher"),
    )


@recipe(preset={"train.learning_rate": 5e-6})
def minillm(
    alpha: float = 0.2,
    num_generations: int = 4,
    epsilon: float = 0.2,
    cap: float | None = None,
    teacher: str | None = None,
) -> Method:
    """MiniLLM: KL(policy || teacher) of completions that a mixture of both writes, with weights back to the policy.

    The token's own part is exact over the vocabulary; what it does to later tokens is a policy gradient whose
    advantage is the mean of the later tokens' log teacher - log pi.

    Args:
        alpha: share of the teacher in the mixture; 0 draws from the policy.
        num_generations: completions of a prompt.
        epsilon: clip of the ratio.
        cap: largest weight of a token.
        teacher: folder, run's folder or hub name.

    Source: "MiniLLM: Knowledge Distillation of Large Language Models", 2024, without its loss on pretraining text.
    """
    return Method(
        kind="distillation",
        rollout=Rollout(num_generations=num_generations, written=WrittenBy(alpha=alpha) if alpha else None),
        advantage={"later": TeacherAdvantage(gamma=1.0, own=False, mean=True)},
        weights={"mixture": MixtureWeight("token", cap)},
        surrogate=Surrogate(Clipped(epsilon)),
        terms={"distil": Summand(TeacherDivergence("kl_policy_ref", correction="token", cap=cap), 1.0)},
        models={"teacher": _teacher(teacher)},
        claim=_stated("-KL(pi || teacher), by samples of a mixture of both with capped weights"),
    )


@recipe(paper=41, baseline="sampled_distillation", neutral={"lam": 1.0}, preset={"train.learning_rate": 1e-5})
def g_opd(
    lam: float = 1.25,
    gamma: float = 0.0,
    epsilon: float = 0.2,
    base: str | None = None,
    num_generations: int = 1,
    teacher: str | None = None,
) -> Method:
    """G-OPD: on-policy distillation to base^(1 - lam) teacher^lam, past the teacher for lam above 1, from its tokens.

    Args:
        lam: 1 is distillation to the teacher, 0 would return to the base.
        gamma: 0 answers for each token alone, the states held; 1 has the gradient of whole completions.
        epsilon: clip of the ratio.
        base: folder or hub name, such as the model that the teacher began as; None is the initial policy.
        num_generations: completions of a prompt.
        teacher: folder, run's folder or hub name.

    Source: "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation", 2026.
    """
    method = sampled_distillation(gamma, epsilon, num_generations, teacher)
    if lam == 1:
        return method
    ref = Initial() if base is None else Pretrained(base)
    claim = Claim(f"-KL(pi || base^{1 - lam:g} teacher^{lam:g} / Z){_where(gamma)}", _level(gamma), "kl_policy_ref",
                  form="target", target="teacher_power")  # fmt: skip
    return method.replacing(
        advantage={"teacher": TeacherAdvantage(lam, gamma)},
        models={**method.models, "ref": ref},
        claim=claim if gamma in (0, 1) else None,
    )


@recipe(preset={"train.learning_rate": 1e-5})
def sampled_distillation(
    gamma: float = 0.0, epsilon: float = 0.2, num_generations: int = 1, teacher: str | None = None
) -> Method:
    """On-policy distillation from the sampled token alone: a policy gradient with advantage log teacher - log pi.

    It needs no distribution of the teacher, only its log-probability of the policy's tokens.

    Args:
        gamma: 0 answers for each token alone, the states held; 1 has the gradient of whole completions.
        epsilon: clip of the ratio.
        num_generations: completions of a prompt.
        teacher: folder, run's folder or hub name.

    Source: "On-Policy Distillation", Thinking Machines Lab, 2025; G-OPD at lam = 1.
    """
    claim = Claim(f"-KL(pi || teacher){_where(gamma)}", _level(gamma), "kl_policy_ref", form="target", target="teacher")
    return Method(
        kind="distillation",
        rollout=Rollout(num_generations=num_generations),
        advantage={"teacher": TeacherAdvantage(1.0, gamma)},
        surrogate=Surrogate(Clipped(epsilon)),
        aggregation=Aggregation("token_mean") if gamma == 0 else SUM,
        models={"teacher": _teacher(teacher)},
        claim=claim if gamma in (0, 1) else None,
    )


# -- on given completions --------------------------------------------------------------------------------------------


@recipe(paper=6, baseline="distillation", neutral={"coef": 0.0}, preset={"train.learning_rate": 1e-5})
def sin_kd(coef: float = 0.1, epsilon: float = 0.1, transport_temperature: float = 2.0, **options) -> Method:
    """SinKD: distillation, and the transport between the policy's and the teacher's distributions of a batch.

    Args:
        coef: of the transport, per unit of mass.
        epsilon: its entropy.
        transport_temperature: of the distributions that are transported.

    Source: "Sinkhorn Distance Minimization for Knowledge Distillation", 2024.
    """
    method = distillation(**options)
    if not coef:
        return method
    transport = SinkhornDistillation(coef, transport_temperature, epsilon)
    claim = _stated("-KL(teacher || pi) per state, and the transport between both within a batch")
    return method.replacing(claim=claim).adding(terms={"sinkhorn": transport})


@recipe(paper=128, baseline="distillation", neutral={"coef": 0.0}, preset={"train.learning_rate": 1e-5})
def relational_distillation(coef: float = 1.0, space: Literal["js", "gram"] = "js", **options) -> Method:
    """Distillation, and distances between the positions of a batch as they are between the teacher's.

    Args:
        coef: of the distances.
        space: how two positions are compared.

    Source: "Encoding Time-Series Explanations through Self-Supervised Model Behavior Consistency", 2023.
    """
    method = distillation(**options)
    if not coef:
        return method
    claim = _stated("-KL(teacher || pi) per state, and the distances within a batch as the teacher has them")
    return method.replacing(claim=claim).adding(terms={"relations": RelationalMatch(coef, space)})


@recipe(paper=7, preset={"train.learning_rate": 1e-5})
def bd_kd(
    nu: float = 2.0, temperature: float = 1.0, coef: float = 1.0, nll: float = 1.0, teacher: str | None = None
) -> Method:
    """BD-KD: both KLs to the teacher, the one stronger that closes the gap of the entropies; the teacher is frozen.

    Args:
        nu: weight of the stronger one; 1 is Jeffreys' divergence.
        temperature: of both models.
        coef: of the divergences.
        nll: of the completions' likelihood.
        teacher: folder, run's folder or hub name.

    Source: "BD-KD: Balancing the Divergences for Online Knowledge Distillation", 2024.
    """
    terms = {"distil": Summand(BalancedKL(nu, temperature), coef), "nll": Summand(NegativeLogLikelihood(), nll)}
    claim = _stated("both KLs to the teacher per state, the one stronger that closes the gap of the entropies")
    return _given(teacher, claim).adding(terms=terms)


@recipe(paper=15, preset={"train.learning_rate": 1e-5})
def pld(k: int | None = 32, temperature: float = 1.0, renormalise: bool = False, teacher: str | None = None) -> Method:
    """PLD: likelihood of the teacher's ranking of the tokens, that of the data first; no coefficient to tune.

    Args:
        k: tokens that are ranked beside that of the data; None ranks the vocabulary.
        temperature: of the teacher's weights.
        renormalise: weights that sum to 1 over what is ranked.
        teacher: folder, run's folder or hub name.

    Source: "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", 2025.
    """
    claim = _stated("likelihood of the teacher's ranking of the tokens, that of the data first")
    return _given(teacher, claim).adding(terms={"pld": Summand(ListwiseDistillation(k, temperature, renormalise), 1.0)})


@recipe(paper=168, baseline="sft", neutral={"alpha": 0.0})
def ps_kd(alpha: float = 0.8, epochs: int = 3, k: int = 16) -> Method:
    """PS-KD: supervised learning whose targets are mixed with what the policy itself predicted one pass earlier.

    Args:
        alpha: share of the prediction at the end; it grows from pass to pass.
        epochs: passes until then.
        k: tokens of a prediction that are remembered.

    Source: "Self-Knowledge Distillation with Progressive Refinement of Targets", 2021.
    """
    if not alpha:
        return sft()
    return Method(
        kind="supervised",
        transforms={"earlier": EarlierPredictions(alpha, epochs, k)},
        terms={"nll": Summand(MixedTarget(), 1.0)},
        claim=_stated("-KL(target || pi), the target mixed of the data and of what the policy predicted a pass before"),
    )


@recipe(paper=155, baseline="distillation", preset={"train.learning_rate": 1e-5})
def random_teacher(random_seed: int = 0, share: float = 1.0, divergence: str = "kl_ref_policy") -> Method:
    """Distillation from a model with random weights, which has nothing to teach: the null baseline of every other.

    Args:
        random_seed: of the weights.
        share: of random weights, the rest being the policy's own; near 0 the teacher is near the policy.
        divergence: by name, policy first.

    Source: "Random Teachers are Good Teachers", 2023.
    """
    return distillation(divergence).replacing(models={"teacher": RandomInitial(random_seed, share)})


def _stated(objective: str) -> Claim:
    return Claim(objective, form="words")


def _given(teacher: str | None, claim: Claim | None) -> Method:
    """A method without terms, on completions that are given."""
    return Method(kind="distillation", models={"teacher": _teacher(teacher)}, claim=claim)


def _teacher(path: str | None) -> Pretrained:
    """A teacher that is named later if it is not named now."""
    return Pretrained(path or "")


def _level(gamma: float) -> Literal["sequence", "state"]:
    return "sequence" if gamma else "state"


def _where(gamma: float) -> str:
    return "" if gamma else " per state"
