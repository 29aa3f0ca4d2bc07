"""The local generator: Keel's own decoding, on the weights of the model that is trained."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch

from keel.core.errors import UserError
from keel.core.rows import Rows, cat
from keel.models.language import LanguageModel
from keel.rollouts.decoding import Drawn, Prompts, Stepper, decode
from keel.rollouts.sampling import Sampling
from keel.rollouts.steppers import CacheStepper, DecoderStepper, Workspace


class LocalGenerator:
    """Draws completions with a key-value cache; see `Generator` for what it promises.

    Each distinct prompt is read once, finished rows leave the batch, and a token depends on its row's identity alone.
    At temperature 0 the behaviour log-probability is that of the unfiltered distribution at temperature 1.

    Args:
        model: the policy; its weights are read at each call.
        batch_rows: completions that are decoded together at most; None takes all.
        compact: share of finished rows at which they leave the batch.

    Raises:
        UserError: the architecture keeps its memory in another form than a key-value cache.
    """

    def __init__(self, model: LanguageModel, *, batch_rows: int | None = None, compact: float = 0.125):
        if not CacheStepper.serves(model):
            raise UserError(
                f"{model.architecture} does not decode with a key-value cache",
                "rollout.generator",
                "Use the generator 'transformers'.",
            )
        self.model, self.batch_rows, self.compact = model, batch_rows, compact
        self.workspace = Workspace()
        self.agrees: bool | None = None  # whether Keel's own decoding gives the module's logits; tried once

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
        """Completions for tokenised prompts; see `Generator`.

        Raises:
            UserError: prompts that do not fit the model's context or vocabulary.
        """
        room = sampling.max_completion_length
        asked = Prompts.of(self.model, prompts, num_generations, room, seed=seed, step=step, data_index=data_index)
        with evaluating(self.model):
            stepper = self.stepper(asked.ids.shape[1] + room)
            parts = asked.parts(self.batch_rows)
            return cat([part.rows(self._draw(stepper, part, sampling), self.model.pad_id) for part in parts])

    def stepper(self, length: int, workspace: Workspace | None = None) -> Stepper:
        """What runs the model over sequences of at most `length` tokens.

        Args:
            workspace: its memory; the generator's own, which the next call overwrites, without it.
        """
        if not DecoderStepper.serves(self.model, length):
            return CacheStepper(self.model)
        stepper = DecoderStepper(self.model, workspace or self.workspace)
        if self.agrees is None:
            self.agrees = _agrees(stepper, self.model)
            if not self.agrees:
                warnings.warn(
                    f"Keel's decoding does not reproduce this {self.model.architecture}; the slower path is taken",
                    stacklevel=3,
                )
        return stepper if self.agrees else CacheStepper(self.model)

    def _draw(self, stepper: Stepper, prompts: Prompts, sampling: Sampling) -> Drawn:
        if not isinstance(stepper, DecoderStepper):
            return decode(stepper, self.model, prompts, sampling, compact=self.compact)
        with torch.inference_mode():  # cheaper than no_grad, for operations that take microseconds
            drawn = decode(stepper, self.model, prompts, sampling, compact=self.compact)
        return Drawn(*(tensor.clone() for tensor in vars(drawn).values()))  # ordinary tensors, fit for training


def _agrees(stepper: Stepper, model: LanguageModel) -> bool:
    """Whether a prompt of two tokens and a step give what one forward pass gives; with a patched model they may not."""
    ids = (torch.arange(3, device=model.device) % model.vocabulary_size)[None]
    with model.mixed():
        stepper.prefill(ids[:, :2], torch.ones_like(ids[:, :2], dtype=torch.bool), 1)
        stepper.expand(torch.zeros(1, dtype=torch.long, device=model.device))
        found = model.for_head(stepper.step(ids[:, 2]))
    found, wanted = model.head.logits(found), model.head.logits(model.states(ids)[:, -1])
    exact = model.autocast is None and model.transformer.dtype == torch.float32
    return bool((found - wanted).abs().max() <= (1e-3 if exact else 0.1) * wanted.abs().max().clamp(min=1e-6))


@contextlib.contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """No gradient and no dropout."""
    training = model.module.training
    model.module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.module.train(training)
