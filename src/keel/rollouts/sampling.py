"""Settings of a generator, and what a generator is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from keel.core.rows import Rows
from keel.statistics.transforms import Transform, chain, filters


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        temperature: of the softmax; 0 is greedy decoding.
        top_k, top_p, min_p: filters, applied in this order after the temperature; None keeps everything.
        max_completion_length: tokens at most, EOS included.
        stop_strings: texts after which a completion ends (kept in it).
        adaptive: a transform between temperature and filters, which gives tokens temperatures of their own.

    Raises:
        ValueError: a setting out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_completion_length: int = 256
    stop_strings: tuple[str, ...] = ()
    adaptive: Transform | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, not {self.temperature}")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1, not {self.max_completion_length}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        filters(self.top_k, self.top_p, self.min_p)

    @property
    def filter(self) -> Transform | None:
        """The filters, and what stands before them, as one transform of the tempered logits."""
        steps = (self.adaptive, filters(self.top_k, self.top_p, self.min_p))
        return chain([step for step in steps if step is not None])


@runtime_checkable
class Generator(Protocol):
    """Draws completions.

    `generate` returns Rows in the order prompt 0 sample 0, prompt 0 sample 1, ...: prompts left-padded, completions
    right-padded, `mask`, `stop`, `group` (index of the prompt in the call), `data_index`, `row` (a hash of seed, step,
    data_index and sample) and `logp["behaviour"]`, the log-probability of each token under the distribution really
    sampled (temperature and filters applied, renormalised; 0 off the mask). Row i depends on its own row id alone: the
    same prompts in another order, or in another batch, give the same completions up to rounding.
    """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int = 0,
        data_index: Sequence[int] | None = None,
    ) -> Rows:
        """Completions for tokenised prompts; see the class."""
        ...
