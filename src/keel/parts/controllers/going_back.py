"""Rounds whose first half is a look-ahead: in the middle the policy goes back to where the round began."""

from dataclasses import dataclass
from typing import Any

from keel.core.registry import part


@part("go_back", paper=194)
@dataclass(frozen=True)
class GoBack:
    """After the first half of each round the policy has the weights of a model again, and AdamW begins anew.

    What it had become by then is lost, but for a snapshot that was taken of it. The schedule of the learning rate
    goes on.

    Args:
        source: name of the model, a snapshot taken at the end of each round.
        half: batches of half a round.

    Raises:
        ValueError: half below 1.

    Source: "Temporal Self-Rewarding Language Models: Decoupling Chosen-Rejected via Past-Future", 2025, where the
    model that looks ahead is trained from the round's own and given up.
    """

    source: str = "past"
    half: int = 16
    owns: tuple[str, ...] = ()
    needs = ()

    def __post_init__(self) -> None:
        if self.half < 1:
            raise ValueError(f"half must be at least 1, not {self.half}")

    def due(self, step: int) -> bool:
        """Whether it goes back after a step, counted from 1.

        >>> [step for step in range(1, 13) if GoBack(half=2).due(step)]
        [2, 6, 10]
        """
        return step % (2 * self.half) == self.half

    def init(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def update(self, metrics: Any, state: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """No value of the method is its own."""
        return {}, state
