"""The second generator: `generate` of transformers, for architectures that the local one does not serve."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from keel.core.rows import Rows, Stop, cat
from keel.models.language import LanguageModel
from keel.rollouts.decoding import Chooser, Drawn, Prompts, StopStrings
from keel.rollouts.local import evaluating
from keel.rollouts.sampling import Sampling


class TransformersGenerator:
    """Draws completions through the model's own `generate`; see `Generator` for what it promises.

    The choice of a token is Keel's: a logits processor draws it with the uniform of its row and position, and leaves
    `generate` no other. So completions are those of the local generator. The model's own generation settings
    (temperature, repetition penalty ...) are not applied.

    Args:
        model: the policy; its weights are read at each call.
        batch_rows: completions that are decoded together at most; None takes all.
    """

    def __init__(self, model: LanguageModel, *, batch_rows: int | None = None):
        self.model, self.batch_rows = model, batch_rows

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
            parts = asked.parts(self.batch_rows)
            return cat([part.rows(self._draw(part, sampling), self.model.pad_id) for part in parts])

    def _draw(self, prompts: Prompts, sampling: Sampling) -> Drawn:
        choice = _Choice(self.model, prompts, sampling)
        settings = GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            do_sample=False,
            eos_token_id=list(self.model.eos_ids) or None,
            pad_token_id=self.model.pad_id,
        )
        with _own_settings(self.model.transformer, settings), self.model.mixed():
            self.model.transformer.generate(
                input_ids=prompts.ids[prompts.index],
                attention_mask=prompts.mask[prompts.index].long(),
                generation_config=settings,
                logits_processor=LogitsProcessorList([choice]),
                stopping_criteria=StoppingCriteriaList([_Ends(choice)]),
            )
        return choice.drawn


class _Choice(LogitsProcessor):
    """Draws the next token of every row and leaves it as the only one."""

    def __init__(self, model: LanguageModel, prompts: Prompts, sampling: Sampling):
        rows, limit, device = len(prompts.row), sampling.max_completion_length, prompts.row.device
        self.chooser = Chooser(model.head, sampling, prompts.row, limit)
        self.texts = StopStrings.of(model, sampling.stop_strings)
        self.every = torch.arange(rows, device=device)
        self.eos = torch.tensor(model.eos_ids, dtype=torch.long, device=device)
        self.position = 0
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.drawn = Drawn(
            tokens=torch.full((rows, limit), model.pad_id, device=device),
            logp=torch.zeros(rows, limit, device=device),
            length=torch.full((rows,), limit, device=device),
            stop=torch.full((rows,), int(Stop.LENGTH), device=device),
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen, logp = self.chooser.choose(scores.float(), self.every, self.position)
        drawn, t = self.drawn, self.position
        drawn.tokens[:, t], drawn.logp[:, t] = chosen, logp
        finished = [(torch.isin(chosen, self.eos), Stop.EOS)]
        if self.texts is not None:
            finished.append((self.texts.found(drawn.tokens, self.every, chosen, t), Stop.STOP_STRING))
        for now, reason in finished:
            now = now & ~self.done
            drawn.length[now], drawn.stop[now] = t + 1, int(reason)
            self.done |= now
        self.position += 1
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)


class _Ends(StoppingCriteria):
    """Rows that have ended at EOS or at a stop string."""

    def __init__(self, choice: _Choice):
        self.choice = choice

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        return self.choice.done.clone()


@contextlib.contextmanager
def _own_settings(transformer: Any, settings: GenerationConfig) -> Iterator[None]:
    """The model without generation settings of its own, which would change the distribution."""
    before = transformer.generation_config
    transformer.generation_config = settings
    try:
        yield
    finally:
        transformer.generation_config = before
