"""A controller that keeps the middle between the scores of good and of bad completions."""

from dataclasses import dataclass

from keel.core.registry import part


@part("score_shift")
@dataclass(frozen=True)
class ScoreShift:
    """The value at `path` is the running mean of the scores of both sides of pairs, over the batches before this one.

        delta_t = sum_s decay^(t - s) mean_s / sum_s decay^(t - s),   mean_s of rewards/chosen and rewards/rejected

    Args:
        path: where the shift lives.
        decay: what is kept of the past, once a batch; 0 takes the last batch alone.

    Raises:
        ValueError: decay outside [0, 1).

    Source: Jung et al., "Binary Classifier Optimization for Large Language Model Alignment", 2024, whose shift includes
    the batch itself.
    """

    path: str = "terms.pairs.link.shift"
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {self.decay}")

    def init(self) -> dict[str, float]:
        """No batch yet."""
        return {"total": 0.0, "weight": 0.0}

    def update(self, metrics: dict[str, float], state: dict, step: int) -> tuple[dict[str, float], dict]:
        """The mean so far; nothing is set before the first batch."""
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            mean = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
            state = {"total": self.decay * state["total"] + mean, "weight": self.decay * state["weight"] + 1}
        return ({self.path: state["total"] / state["weight"]} if state["weight"] else {}), state
