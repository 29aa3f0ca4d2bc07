"""Supervised learning on one's own chosen completions: curated, and the best of several."""

from typing import Any

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.models.sources import Initial
from keel.parts.advantages.group import Returns
from keel.parts.rewards.curation import BestOfGroup, CuratedChoice, ReferenceShare
from keel.parts.rewards.transforms import WeightedSum
from keel.parts.terms.surrogate import LogLikelihood, Surrogate
from keel.recipes.registry import recipe
from keel.rollouts.rollout import Rollout


@recipe(paper=207)
def curated(
    num_candidates: int = 4,
    real_fraction: float = 0.0,
    expected: bool = False,
    num_generations: int | None = None,
    temperature: float = 1.0,
) -> Method:
    """Maximum likelihood on the completions that a chooser takes, one of K with probability softmax(r).

        p_next = real_fraction ref + (1 - real_fraction) p H,   H(y) = E[K e^r(y) / (e^r(y) + sum of K - 1 others)]

    With K large a round tilts the policy by e^r, so that t rounds reach the optimum of E[r] - KL(p || p_0) / t. Without
    data of the reference the rounds end on the best completions alone. With them they come to rest, at a KL to the
    reference of at most -log(1 - lam (K - 1)) for lam = (1 - real_fraction) / real_fraction, where lam (K - 1) < 1. The
    reference's data are the policy's own completions with weight ref / old, for a rollout draws from the policy alone.

    Args:
        num_candidates: K; the paper's interfaces show 2 to 4.
        real_fraction: share of the data that is the reference's; 0 loads no reference.
        expected: weigh all candidates with their probability in place of drawing one.
        num_generations: completions a prompt, of which each K make one choice; None is K.
        temperature: of the sampler.

    Source: "Self-Consuming Generative Models with Curated Data Provably Optimize Human Preferences", 2024.
    """
    parts: dict[str, Any] = {"sum": WeightedSum(), "choice": CuratedChoice(num_candidates, expected)}
    if real_fraction:
        parts["real"] = ReferenceShare(real_fraction)
    size = num_candidates if num_generations is None else num_generations
    objective = "KL(real_fraction ref + (1 - real_fraction) old H || pi)"
    claim = Claim(objective, "sequence", "kl_ref_policy", None, "target", "curated")
    return _chosen(parts, {"ref": Initial()} if real_fraction else {}, size, temperature, claim)


@recipe()
def best_of_n_distillation(n: int = 4, num_generations: int | None = None, temperature: float = 1.0) -> Method:
    """Maximum likelihood on the best of n completions.

        p_next = p (F(r)^n - F(r-)^n) / (F(r) - F(r-)),   F the distribution function of the reward under p

    One round is the law of best-of-n of the policy that sampled, ties in proportion to it. Rounds compound: after t of
    them it is the best of n^t. A batch is a round, so every step takes up where the last one ended; the law of the
    first sampler alone would need all steps on one batch.

    Args:
        n: completions of which the best is learnt.
        num_generations: completions a prompt, at least n; more of them weigh all choices of n. None is n.
        temperature: of the sampler.

    Source: the forward half of "BOND: Aligning LLMs with Best-of-N Distillation", 2024.
    """
    size = n if num_generations is None else num_generations
    if size < n:
        raise ValueError(f"num_generations must be at least n={n}, not {size}")
    parts = {"sum": WeightedSum(), "best": BestOfGroup(n)}
    claim = Claim("KL(best of n of old || pi)", "sequence", "kl_ref_policy", None, "target", "best_of_sampler")
    return _chosen(parts, {}, size, temperature, claim)


def _chosen(transforms: dict[str, Any], models: dict[str, Any], size: int, temperature: float, claim: Claim) -> Method:
    """Maximum likelihood on completions weighted by the transforms."""
    return Method(
        rollout=Rollout(num_generations=size, temperature=temperature),
        transforms=transforms,
        advantage={"weight": Returns()},
        surrogate=Surrogate(LogLikelihood()),
        aggregation=Aggregation("sequence_mean_token_sum"),
        models=models,
        claim=claim,
    )
