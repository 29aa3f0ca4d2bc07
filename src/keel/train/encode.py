"""Texts and messages to tokens, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keel.core.errors import DataError, UserError
from keel.core.rows import Rows, Stop
from keel.models.language import LanguageModel
from keel.rollouts.decoding import text_of
from keel.rollouts.openai import Vocabulary
from keel.tasks.task import Example, Text


@dataclass(frozen=True)
class Encoder:
    """Prompts and completions as tokens; they are tokenised apart and joined.

    Args:
        model: its tokenizer, chat template and end token are used; what is known of a served one is enough.
        max_prompt_length: longer prompts lose their beginning; None keeps all.
        system_prompt: put before every prompt, as a message where there is a chat template.
    """

    model: LanguageModel | Vocabulary
    max_prompt_length: int | None = None
    system_prompt: str | None = None

    def prompt(self, prompt: Text) -> list[int]:
        """Tokens of a prompt; messages go through the tokenizer's chat template.

        Raises:
            UserError: messages, and the tokenizer has no chat template.
            DataError: the prompt is empty, or the chat template refuses it.
        """
        ids = self._prompt_ids(prompt)
        if not ids:
            raise DataError(
                "this prompt has no tokens", repr(prompt)[:80], "Remove it, or give the model something to answer."
            )
        return ids if self.max_prompt_length is None else ids[-self.max_prompt_length :]

    def cut(self, prompt: Text) -> bool:
        """Whether a prompt is longer than the limit."""
        return self.max_prompt_length is not None and len(self._prompt_ids(prompt)) > self.max_prompt_length

    def completion(self, completion: Text) -> list[int]:
        """Tokens of a given completion, with one end token.

        Raises:
            DataError: a message without text, such as a call of a tool.
        """
        tokenizer = self.model.tokenizer
        text = completion if isinstance(completion, str) else completion[-1].get("content")
        if not isinstance(text, str):
            raise DataError("this completion is no text to learn from", repr(completion)[:80], "Give it as text.")
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        ends = self.model.eos_ids
        return ids if not ends or (ids and ids[-1] in ends) else [*ids, _end(self.model)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        return text_of(self.model.tokenizer, tokens, skip_special_tokens=True)

    def show(self, prompt: Text) -> str:
        """The prompt as the model sees it."""
        return self.model.tokenizer.decode(self.prompt(prompt))

    def _prompt_ids(self, prompt: Text) -> list[int]:
        tokenizer: Any = self.model.tokenizer
        if isinstance(prompt, str) and self.system_prompt is None:
            return list(tokenizer(prompt).input_ids)
        if isinstance(prompt, str) and not tokenizer.chat_template:
            return list(tokenizer(f"{self.system_prompt}{prompt}").input_ids)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system_prompt is not None:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if not tokenizer.chat_template:
            raise UserError(
                "the prompts are messages, but the tokenizer has no chat template",
                "data",
                "Give plain text prompts, or a model with a chat template.",
            )
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of its own, run in a sandbox
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            fix = "Look at the message, or give the tokenizer another template."
            raise DataError(f"the chat template refuses it ({said})", repr(prompt)[:80], fix) from error
        return list(tokenizer(text, add_special_tokens=False).input_ids)


@dataclass(frozen=True)
class Truncated:
    """How many rows lost tokens."""

    prompts: int
    completions: int


def supervised_rows(
    examples: Sequence[Example],
    completions: Sequence[Text],
    encoder: Encoder,
    max_length: int | None,
    seed: int,
    step: int,
) -> tuple[Rows, Truncated]:
    """Rows of given completions; `max_length` cuts the completion first, and the cuts are counted."""
    from keel.core.choice import row_ids

    prompts, tokens = [], []
    cut_prompts = cut_completions = 0
    for example, completion in zip(examples, completions, strict=True):
        prompt, answer = encoder.prompt(example.prompt), encoder.completion(completion)
        cut_prompts += encoder.cut(example.prompt)
        if max_length is not None and len(prompt) + len(answer) > max_length:
            room = max(0, max_length - len(prompt))
            cut_completions += 1
            answer = answer[:room]
            if not room:
                prompt, answer = prompt[-(max_length - 1) :], encoder.completion(completion)[:1]
                cut_prompts += 1
        prompts.append(prompt)
        tokens.append(answer)
    prompt_ids, prompt_mask = padded(prompts, encoder.model.pad_id, left=True)
    ids, mask = padded(tokens, encoder.model.pad_id, left=False)
    index = torch.tensor([example.index for example in examples])
    rows = Rows.build(
        prompt_ids,
        prompt_mask,
        ids,
        mask,
        data_index=index,
        row=row_ids(seed, step, index, torch.zeros_like(index)),
        stop=torch.full((len(examples),), int(Stop.DATA)),
    )
    return rows, Truncated(cut_prompts, cut_completions)


def padded(sequences: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token matrix and mask of sequences of different lengths."""
    width = max((len(s) for s in sequences), default=0)
    ids = torch.full((len(sequences), width), pad)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[i, place] = torch.tensor(list(sequence), dtype=torch.long)
        mask[i, place] = True
    return ids, mask


def _end(model: LanguageModel | Vocabulary) -> int:
    own = model.tokenizer.eos_token_id
    return own if own is not None else model.eos_ids[0]
