"""A method of the fewest parts, to which the tests of verification add others."""

from keel.core.aggregate import Aggregation
from keel.method import Method
from keel.parts.advantages.group import GroupCentre
from keel.parts.terms.surrogate import LogLikelihood, Surrogate
from keel.rollouts.rollout import Rollout


def reinforce(**slots) -> Method:
    return Method(
        rollout=Rollout(num_generations=2),
        surrogate=Surrogate(LogLikelihood()),
        aggregation=Aggregation("sequence_mean_token_sum"),
        **{"advantage": {"centre": GroupCentre()}, **slots},
    )
