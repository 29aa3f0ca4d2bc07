"""States of a chain over a language model as rows, for whoever reads them again from their beginning."""

from collections.abc import Sequence

import torch

from keel.core.chain import Prefix
from keel.core.rows import Rows, Stop


def rows_of(x: Prefix, texts: Sequence[Sequence[int]], pad: int, data_index: Sequence[int]) -> Rows:
    """Prompts and completions of states as rows, a group for each prompt.

    Args:
        x: the states; unfinished ones count as cut off.
        texts: tokens of each prompt.
        pad: token that stands before prompts and after completions.
        data_index: identity of each prompt.
    """
    device, width = x.tokens.device, max(1, *(len(text) for text in texts))
    ids = torch.tensor([[pad] * (width - len(text)) + list(text) for text in texts], device=device)
    length = torch.tensor([len(text) for text in texts], device=device)
    asked = torch.arange(width, device=device) >= width - length[:, None]
    made = Rows.build(
        ids[x.prompt],
        asked[x.prompt],
        x.tokens,
        torch.arange(x.tokens.shape[1], device=device) < x.length[:, None],
        stop=torch.where(x.stop < 0, int(Stop.LENGTH), x.stop),
        group=x.prompt,
        data_index=torch.as_tensor(data_index, device=device)[x.prompt],
        logp={"behaviour": x.logp},
    )
    return made.trim()
