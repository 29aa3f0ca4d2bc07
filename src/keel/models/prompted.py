"""A frozen model that reads a text of its own before every prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.errors import UserError
from keel.core.policy import PolicyModel
from keel.core.registry import part
from keel.core.rows import Rows
from keel.models.sources import FROZEN, Frozen, Initial
from keel.models.view import ModelView


@part("prompted", paper=170)
@dataclass(frozen=True)
class Prompted:
    """A frozen model behind a text that is put before every prompt, so that LogProb(of=(NAME,)) is log p(y | text, x).

    The text is tokenised as it is, special tokens by name included, and stands after a prompt's own start token.

    Args:
        text: what the model reads first.
        of: the frozen model: initial, pretrained or soup.

    Raises:
        ValueError: no text, or a model that moves.
    """

    text: str
    of: Frozen = Initial()

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("text must not be empty: without one this is the model itself")
        if not isinstance(self.of, FROZEN):
            raise ValueError(f"the model behind a text must be frozen, not {type(self.of).__name__}")

    def view(self, model: PolicyModel) -> PolicyModel:
        """The model behind the text.

        Raises:
            UserError: it is no language model, or its tokenizer makes nothing of the text.
        """
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise UserError(f"a {type(model).__name__} reads no text", "models", "Give a language model.")
        ids = tokenizer(self.text, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"the tokenizer makes no token of {self.text!r}", "models", "Give another text.")
        return PromptedModel(model, ids, tokenizer.bos_token_id)


class PromptedModel(ModelView):
    """A model that sees tokens of its own before every prompt.

    Args:
        model: what it shows.
        ids: the tokens.
        start: a token that stays in front of them where a prompt begins with it; None for none.
    """

    def __init__(self, model: PolicyModel, ids: Sequence[int], start: int | None = None):
        super().__init__(model)
        self.ids, self.start = tuple(ids), start

    @torch.no_grad()
    def hidden(self, rows: Rows) -> Float[Tensor, "B T D"]:
        """States of the completions behind the text, without gradient."""
        return self.model.hidden(self.before(rows))

    def before(self, rows: Rows) -> Rows:
        """The rows with the text before each prompt."""
        ids, mask = rows.prompt_ids, rows.prompt_mask
        text = torch.tensor(self.ids, device=ids.device).expand(len(ids), -1)
        seen = torch.ones_like(text, dtype=torch.bool)
        if self.start is not None:
            first = mask & (mask.cumsum(1) == 1) & (ids == self.start)
            lead = first.any(1, keepdim=True)
            text = torch.cat([torch.full_like(text[:, :1], self.start), text], 1)
            seen, mask = torch.cat([lead, seen], 1), mask & ~first
        ids, mask = torch.cat([text, ids], 1), torch.cat([seen, mask], 1)
        order = mask.long().argsort(dim=1, stable=True)  # padding to the left
        return rows.with_(prompt_ids=ids.gather(1, order), prompt_mask=mask.gather(1, order))
