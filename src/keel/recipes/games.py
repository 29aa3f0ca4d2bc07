"""Policy gradients for preference games: the policy against itself, its reference, or where it was."""

from typing import Any

from keel.method import Claim, Method
from keel.models.sources import EMA, Initial, Snapshot, Source
from keel.parts.rewards.pairing import WinRates
from keel.parts.rewards.transforms import KLInReward, WeightedSum
from keel.recipes.policy_gradient import rloo
from keel.recipes.registry import recipe
from keel.rollouts.beside import CompletionsOf


@recipe(baseline="rloo")
def nash_md(
    beta: float = 0.05,
    mixture: float = 0.125,
    label_temperature: float = 1.0,
    judge: str | None = None,
    opponents: int = 4,
    num_generations: int = 8,
    **rloo_options: Any,
) -> Method:
    """RLOO whose reward is the probability of beating a completion of old^(1 - mixture) ref^mixture.

    At rest where the policy is the answer to that mixture; with mixture 0 (self-play), the Nash policy. The opponents
    are drawn from the mixture of each token's distributions; without any, the completions of a group play against each
    other, weighted to the mixture of whole sequences.

    Args:
        beta: of the KL to the reference.
        mixture: share of the reference in the opponent; with 0 the completions of a group play against each other.
        label_temperature: of P(i beats j) = sigmoid((r_i - r_j) / label_temperature); 0 compares.
        judge: module:function of a pairwise judge in place of the reward.
        opponents: completions a prompt that the opponent draws; each plays against all of the policy's. 0 for none.
        num_generations: completions a prompt of the policy.

    Source: "Nash Learning from Human Feedback", 2023 (Nash-MD-PG), with one opponent for each completion.
    """
    _players(num_generations, opponents)
    method = rloo(beta=beta, num_generations=num_generations, **rloo_options)
    drawn = bool(opponents and mixture)
    opponent = WinRates(label_temperature, "ref", mixture, judge, own=not drawn, drawn=drawn)
    claim = Claim("KL(pi || ref exp(P(y beats mixture) / beta) / Z)", **_target("nash_md"))
    method = method.replacing(
        transforms={"sum": WeightedSum(), "win": opponent, **method.transforms}, models={"ref": Initial()}, claim=claim
    )
    return method.set("rollout.beside", (CompletionsOf("ref", opponents, mixture),)) if drawn else method


@recipe(paper=26, baseline="rloo")
def nash_mp(
    beta: float = 0.05,
    eta: float = 0.1,
    kappa: float = 0.9,
    half_step: int = 0,
    label_temperature: float = 1.0,
    judge: str | None = None,
    opponents: int = 4,
    num_generations: int = 8,
    **rloo_options: Any,
) -> Method:
    """Nash Mirror-Prox: proximal steps from a slower policy, against it or against the policy half a step ahead of it.

        A = P(y beats opponent) - 1/2 - beta log(pi / ref) - (beta / eta) log(pi / base)

    With half_step 0 base and opponent are one target network, theta_bar <- kappa theta_bar + (1 - kappa) theta. With
    half_step h both steps are made: base is pi_k, taken every 2 h batches; the opponent is pi_k for h batches and
    pi_{k + 1/2}, the policy then, for as many. The solution of a proximal step does not depend on where it is begun,
    so that the second goes on from the first although its base is pi_k.

    Args:
        beta: of the KL to the reference.
        eta: size of a proximal step; 2 beta in the theory.
        kappa: how slowly the target network follows.
        half_step: batches of each of the two steps; 0 for a target network.
        label_temperature, judge, opponents, num_generations: see `nash_md`; the opponent draws alone.

    Source: "Accelerating Nash Learning from Human Feedback via Mirror Prox", 2025; the policy gradient with a target
    network is reconstructed.
    """
    if beta <= 0 or eta <= 0 or half_step < 0:
        raise ValueError(f"beta and eta must be positive, half_step not negative: {beta}, {eta}, {half_step}")
    shared: dict[str, Any] = dict(label_temperature=label_temperature, judge=judge, num_generations=num_generations)
    method = nash_md(beta=beta, mixture=1.0, opponents=opponents, **shared, **rloo_options)
    base: Source = Snapshot(2 * half_step) if half_step else EMA(kappa)
    ahead: dict[str, Source] = {"half": Snapshot(half_step)} if half_step else {}
    opponent = "half" if half_step else "target"
    method = method.replacing(models={**method.models, "target": base, **ahead})
    if opponents:
        method = method.set("rollout.beside", (CompletionsOf(opponent, opponents),))
    claim = Claim("KL(pi || the proximal step from base against the opponent)", **_target("nash_mp"))
    method = method.set("transforms.win.opponent", opponent).replacing(claim=claim)
    return method.adding(transforms={"proximal": KLInReward(beta / eta, against="target")})


def _target(name: str) -> dict[str, Any]:
    return {"level": "sequence", "divergence": "kl_policy_ref", "beta": "beta", "form": "target", "target": name}


def _players(num_generations: int, opponents: int) -> None:
    if num_generations < 2 or opponents < 0:
        what = "num_generations must be at least 2 and opponents not negative"
        raise ValueError(f"completions of one prompt are held against each other: {what}")
