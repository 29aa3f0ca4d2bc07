"""Where the KL term stands decides what is optimised: each placement held to E_pi[r] - beta KL(pi || ref)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from keel.core.aggregate import Aggregation
from keel.exact.space import SequenceSpace
from keel.method import Method
from keel.models.sources import Initial
from keel.parts.advantages.group import Returns
from keel.parts.rewards.transforms import KLInReward
from keel.parts.terms.penalties import SampledKL, Summand, VocabularyDivergence
from keel.parts.terms.surrogate import Surrogate, Unclipped
from keel.rollouts.rollout import Rollout
from keel.verify.objectives import Objective
from keel.verify.population import expected_update
from keel.verify.recipes import compare
from keel.verify.world import random_world

DISTANCES = (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0)
SPACE = SequenceSpace(vocab=3, horizon=3)
STALENESS = 0.2


def _in_loss(penalty: Callable[[], object]) -> Callable[[float], Method]:
    def method(beta: float) -> Method:
        return _bare(terms={"kl": Summand(penalty(), beta * SPACE.horizon)})  # type: ignore[arg-type]

    return method


def _bare(**slots) -> Method:
    """Policy gradient with the whole return and the ratio of the sequence, so that only the KL's placement differs.

    Each token carries the term of its sequence, of which the aggregation takes the mean; a KL in the loss is to be
    summed over the tokens, so that its coefficient is multiplied by their number.
    """
    return Method(
        rollout=Rollout(),
        advantage={"returns": Returns()},
        surrogate=Surrogate(Unclipped(), level="trajectory"),
        aggregation=Aggregation("sequence_mean_token_mean"),
        models={"ref": Initial()},
        **slots,
    )


PLACEMENTS: Mapping[str, Callable[[float], Method]] = {
    "k1 in the reward": lambda beta: _bare(transforms={"kl": KLInReward(beta)}),
    "k1 in the loss": _in_loss(lambda: SampledKL("k1")),
    "k2 in the loss": _in_loss(lambda: SampledKL("k2")),
    "k3 in the loss": _in_loss(lambda: SampledKL("k3")),
    "k3 times the ratio": _in_loss(lambda: SampledKL("k3", ratio="differentiable")),
    "full KL(pi || ref) per token": _in_loss(lambda: VocabularyDivergence("kl_policy_ref")),
    "full KL(ref || pi) per token": _in_loss(lambda: VocabularyDivergence("kl_ref_policy")),
}


@dataclass(frozen=True)
class Point:
    """Error of one placement at one distance.

    Args:
        placement: where the KL stands.
        distance: standard deviation of the policy's logits around the reference's.
        on_policy: whether the policy itself has sampled.
        error: median over worlds of |g - g*| / |g*|, at the best step size.
        low, high: the smallest and the largest of them.
    """

    placement: str
    distance: float
    on_policy: bool
    error: float
    low: float
    high: float


def sweep(beta: float = 0.5, seeds: int = 7, distances: Sequence[float] = DISTANCES) -> list[Point]:
    """Gradient error of every placement against the distance from the reference, on- and off-policy."""
    wanted = Objective("reward", "kl_policy_ref", "sequence", beta)
    points = []
    for on_policy in (True, False):
        for distance in distances:
            worlds = [
                random_world(SPACE, f"placement {seed}", distance=distance, staleness=0.0 if on_policy else STALENESS)
                for seed in range(seeds)
            ]
            gradients = [wanted.gradient(world) for world in worlds]
            for name, make in PLACEMENTS.items():
                method = make(beta)
                errors = sorted(
                    compare("", expected_update(method, world).direction, gradient).relative_error
                    for world, gradient in zip(worlds, gradients, strict=True)
                )
                points.append(Point(name, distance, on_policy, errors[seeds // 2], errors[0], errors[-1]))
    return points
