"""Several rewards that travel apart from their sum, as features of the rows."""

from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import weighted_mean
from keel.core.rows import Rows

COMPONENTS = "components"


def components(rows: Rows) -> Float[Tensor, "B K"]:
    """The rewards that were kept apart; the reward columns as they are, if none were.

    Raises:
        ValueError: the rows have no reward.
    """
    found = rows.features.get(COMPONENTS, rows.reward)
    if found is None:
        raise ValueError("these rows have no reward")
    return found


def component_means(rows: Rows) -> list[float]:
    """Mean of each component over the main rows of a batch that have it; nan where none has."""
    means = []
    for column in components(rows).unbind(1):
        weight = rows.weight * (rows.main & ~column.isnan())
        means.append(float(weighted_mean(column, weight)) if float(weight.sum()) > 0 else float("nan"))
    return means
