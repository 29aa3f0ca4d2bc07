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

BYTES = 4  # of the longest character in UTF-8
_TURN = "turn-of-the-model-7f3c"  # stands for what the model has said, where only what follows it is wanted
UNNAMED = "<unknown>"  # a token of the model for which its tokenizer has no name


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

    def answer(self, prompt: Text, text: str, role: str, said: Sequence[int]) -> list[int]:
        """Tokens of what follows a turn of the model, up to where the model goes on.

        Where the prompt went through the chat template, this is what the template writes between that turn and the
        next one, the turn's own end included if the model has not written it; earlier turns are not rendered again.

        Args:
            prompt: of the episode.
            text: what the model is told.
            role: of that message.
            said: tokens of the turn.

        Raises:
            DataError: the chat template refuses such a message, or shows no turn of the model as it is.
        """
        tokenizer: Any = self.model.tokenizer
        if not self._templated(prompt):
            return list(tokenizer(text, add_special_tokens=False).input_ids)
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _TURN}]
        shown = self._rendered([*before, {"role": role, "content": text}])
        _, found, after = shown.partition(_TURN)
        if not found:
            fix = "Give the tokenizer a template that does."
            raise DataError("the chat template does not show what the model has said", repr(shown)[:80], fix)
        ids = list(tokenizer(after, add_special_tokens=False).input_ids)
        written = bool(said) and said[-1] in self.model.eos_ids and ids[:1] == [said[-1]]
        return ids[1:] if written else ids

    def pieces(
        self, prompt: Text, pieces: Sequence[tuple[str, bool]], turn_ends: Sequence[str]
    ) -> tuple[list[int], list[bool], list[int]]:
        """Tokens of an episode in pieces (text, whether the model wrote it), which the model wrote, and their turns.

        A piece of the model without one of `turn_ends` at its end gets the end token.
        """
        tokens: list[int] = []
        chosen: list[bool] = []
        turn: list[int] = []
        said: list[int] = []
        number = -1
        for text, own in pieces:
            if own:
                ended = any(end and text.endswith(end) for end in turn_ends)
                plain = self.model.tokenizer(text, add_special_tokens=False).input_ids if ended else None
                ids = said = self.completion(text) if plain is None else list(plain)
            else:
                ids = self.answer(prompt, text, "user", said)
            number += own
            tokens += ids
            chosen += [own] * len(ids)
            turn += [max(number, 0)] * len(ids)
        return tokens, chosen, turn

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
        return list(tokenizer(self._rendered(messages), add_special_tokens=False).input_ids)

    def _templated(self, prompt: Text) -> bool:
        """Whether a prompt goes through the chat template."""
        plain = self.system_prompt is None or not self.model.tokenizer.chat_template
        return not (isinstance(prompt, str) and plain)

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        tokenizer: Any = self.model.tokenizer
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of its own, run in a sandbox
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            fix = "Look at the message, or give the tokenizer another template."
            raise DataError(f"the chat template refuses it ({said})", repr(messages)[:80], fix) from error


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text: together they are the text, special tokens included.

    A character whose bytes are several tokens stands at the last of them, and the others are empty; bytes that are no
    character are U+FFFD at the last of a run of them. A token without text that the tokenizer cannot name is
    `<unknown>`.
    """
    out: list[str] = []
    begin = read = 0  # the window that is decoded again, and how far its text has been given out
    for end in range(1, len(ids) + 1):
        said = text_of(tokenizer, ids[begin:read])
        whole = text_of(tokenizer, ids[begin:end])
        waiting = whole.endswith("\ufffd") and end < len(ids) and end - read < BYTES
        added = "" if waiting else whole[len(said) :]
        if not waiting:
            begin, read = read, end
        if not added and whole == said and tokenizer.convert_ids_to_tokens(ids[end - 1]) is None:
            added = UNNAMED
        out.append(added)
    return out


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


def demonstration_rows(
    examples: Sequence[Example],
    episodes: Sequence[Sequence[tuple[str, bool]]],
    encoder: Encoder,
    turn_ends: Sequence[str],
    max_length: int | None,
    seed: int,
    step: int,
) -> tuple[Rows, Truncated]:
    """Rows of given episodes, of which the model learns its own pieces only; `max_length` cuts their ends.

    The column `turn` counts the turns of the model from 0; a piece of the environment belongs to the turn before it.
    """
    from keel.core.choice import row_ids

    prompts: list[list[int]] = []
    tokens: list[list[int]] = []
    chosen: list[list[bool]] = []
    turns: list[list[int]] = []
    cut_prompts = cut_completions = 0
    for example, pieces in zip(examples, episodes, strict=True):
        prompt = encoder.prompt(example.prompt)
        ids, own, turn = encoder.pieces(example.prompt, pieces, turn_ends)
        room = len(ids) if max_length is None else max(0, max_length - len(prompt))
        cut_prompts += encoder.cut(example.prompt)
        cut_completions += len(ids) > room
        prompts.append(prompt)
        tokens.append(ids[:room])
        chosen.append(own[:room])
        turns.append(turn[:room])
    prompt_ids, prompt_mask = padded(prompts, encoder.model.pad_id, left=True)
    ids_of, present = padded(tokens, encoder.model.pad_id, left=False)
    mask, _ = padded(chosen, 0, left=False)
    turn_of, _ = padded(turns, 0, left=False)
    index = torch.tensor([example.index for example in examples])
    rows = Rows.build(
        prompt_ids,
        prompt_mask,
        ids_of,
        present & mask.bool(),
        data_index=index,
        row=row_ids(seed, step, index, torch.zeros_like(index)),
        stop=torch.full((len(examples),), int(Stop.DATA)),
        segment=turn_of,
        columns={"turn": turn_of},
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
