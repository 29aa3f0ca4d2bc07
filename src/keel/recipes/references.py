"""What the policy is held to, and how closely: averaged references, and a budget of KL."""

from dataclasses import replace

from keel.method import Claim, Method
from keel.models.sources import INITIAL, Soup
from keel.parts.controllers.budget import KLBudget
from keel.parts.rewards.transforms import WeightedSum
from keel.recipes.policy_gradient import ppo, rloo
from keel.recipes.registry import recipe


@recipe(paper=2, baseline="ppo")
def salsa(paths: tuple[str, ...] = (), ratio: float = 0.5, beta: float = 0.05, **ppo_options) -> Method:
    """PPO whose reference is the average of the initial policy's weights and those of its sisters.

        theta_ref = (1 - ratio) theta_initial + ratio mean(theta of paths)
        r_t = [t last] R - beta (log pi(y_t) - log ref(y_t))

    The sisters are fine-tuned from the same pretrained model with another seed or order of the data. The KL is positive
    from the first step. Where logits are linear in the weights the soup is the normalised geometric mean of the models.

    Args:
        paths: folders or hub names of the sisters; without any, or with ratio 0, this is PPO.
        ratio: share of the sisters.
        beta: coefficient of k1 against the soup; to be tuned anew, for the KL is larger than in PPO.

    Source: "SALSA: Soup-based Alignment Learning for Stronger Adaptation in RLHF", 2024.
    """
    if beta <= 0:
        raise ValueError(f"without a KL the reference plays no part: beta must be positive, not {beta}")
    share = ratio if paths else 0.0
    weights = (1 - share, *(share / len(paths) for _ in paths))
    method = ppo(beta=beta, **ppo_options)
    claim = Claim("E_pi[r] - beta KL(pi || soup), sequences", "sequence", "kl_policy_ref", "beta")
    return method.replacing(models={"ref": Soup((INITIAL, *paths), weights)}, claim=claim)


@recipe(paper=16, baseline="rloo")
def kl_budget(budget: float = 0.5, beta: float = 1.0, num_generations: int = 8, **rloo_options) -> Method:
    """RLOO whose beta is the one at which the optimum is `budget` nats from the reference.

        maximise E_pi[r]  subject to  KL(pi || ref) <= budget,   solved by  ref e^(r / beta) / Z

    beta is found from each batch by bisection, on its completions weighted to the reference. The budget is that of the
    optimum: the policy has spent it when it gets there, and the metric `kl` (per token) shows how far it is.

    Args:
        budget: KL of whole completions, in nats, averaged over prompts; well below the log of num_generations.
        beta: until the first batch was seen.
        num_generations: completions a prompt.

    Source: "Asymptotics of Language Model Alignment", 2024; the paper states no budget.
    """
    method = rloo(beta=beta, num_generations=num_generations, **rloo_options)
    controller = KLBudget("transforms.kl.coef", budget, beta)
    assert method.claim is not None
    claim = replace(method.claim, objective="E_pi[r] - beta KL(pi || ref), sequences, at the beta that spends budget")
    return method.replacing(transforms={"sum": WeightedSum(), **method.transforms}, claim=claim).adding(
        controllers={"beta": controller}
    )
