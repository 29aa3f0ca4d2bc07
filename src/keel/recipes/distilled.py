"""Samplers distilled into the policy: maximum likelihood on weighted particles, towards a tilt.

That of the best of n, which needs no particles, is `best_of_n_distillation` in `keel.recipes.selection`.
"""

from typing import Literal

from keel.core.aggregate import Aggregation
from keel.method import Claim, Method
from keel.models.sources import Initial
from keel.parts.advantages.group import Returns
from keel.parts.rewards.tilted import TiltWeight
from keel.parts.rewards.transforms import WeightedSum
from keel.parts.terms.surrogate import LogLikelihood, Surrogate
from keel.recipes.registry import recipe
from keel.rollouts.rollout import Rollout
from keel.sampling.smc import SMC


@recipe()
def smc_distillation(
    beta: float = 0.1,
    anchor: Literal["reference", "policy"] = "reference",
    num_generations: int = 16,
    ess_threshold: float = 0.5,
    temperature: float = 1.0,
) -> Method:
    """Maximum likelihood on the particles of sequential Monte Carlo, which are drawn from the policy as it is.

        -sum_i W_i u_i log pi(y_i) / sum_i W_i u_i,    u = ref / old (anchor reference) or 1 (anchor policy)

    The particles stand for old e^(r / beta) / Z. With the reference as anchor the weights u take them back to the fixed
    target ref e^(r / beta) / Z, of which this is the forward KL, however far the policy has come: the same target as
    that of `dpg`, from other samples. Once the policy is there the sampler tilts it once more for nothing; a larger
    `rollout.sampler.beta` leaves the target as it is and makes the weights more even.

    With the policy as anchor every batch is a step towards the tilt of the policy that drew it. Such rounds compound:
    t of them, taken in full, are the tilt of the first policy by t / beta, and in the end the best completions alone.

    Without a value of unfinished texts particles differ only once they end; `rollout.value=monte_carlo:4` gives one.

    Args:
        beta: of the target, and of the sampler.
        anchor: what is tilted: the initial policy, a fixed target, or the current one, a moving target.
        num_generations: particles of a prompt.
        ess_threshold: share of them below which a prompt is resampled.
        temperature: of the policy.

    Source: Zhao et al., "Probabilistic Inference in Language Models via Twisted Sequential Monte Carlo", 2024, learns a
    policy from such particles; the weights u are Keel's.
    """
    name, target = ("ref", "tilt") if anchor == "reference" else ("old", "tilt_of_sampler")
    objective = f"KL({name} exp(r / beta) / Z || pi)"
    sampler = SMC(num_generations, beta, ess_threshold=ess_threshold)
    return Method(
        rollout=Rollout(num_generations=num_generations, temperature=temperature, sampler=sampler),
        transforms={"sum": WeightedSum(), "tilt": TiltWeight(beta, name)},
        advantage={"weight": Returns()},
        surrogate=Surrogate(LogLikelihood()),
        aggregation=Aggregation("sequence_mean_token_sum"),
        models={"ref": Initial()} if anchor == "reference" else {},
        claim=Claim(objective, "sequence", "kl_ref_policy", "beta", "target", target),
    )
