"""Rows for distillation that the policy, a teacher or a mixture of both has drawn, without any reward."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from keel.core.choice import row_ids
from keel.core.rows import Rows, Stop
from keel.tasks.task import Example
from keel.train.strategies import distinct, draw_rows

if TYPE_CHECKING:
    from keel.train.session import Session


def taught_rows(session: "Session", examples: Sequence[Example]) -> Rows:
    """Completions of these prompts, by whom the method's rollout says.

    Args:
        session: whose models; the randomness depends on its seed, its step and the examples alone.
        examples: prompts.

    Raises:
        ConfigError: another model is to write, and it cannot here.
    """
    assert session.method.rollout is not None
    step, index = session.position.step, distinct([example.index for example in examples])
    rows, _ = draw_rows(session, examples, step, index)
    own = torch.tensor([examples[i].index for i in rows.group.tolist()], device=rows.device)
    sample = torch.arange(len(rows), device=rows.device) % session.method.rollout.num_generations
    place = torch.tensor(index, device=rows.device)[rows.group]
    return rows.with_(data_index=own, row=row_ids(session.config.seed, step, place, sample))


def taught_metrics(rows: Rows) -> dict[str, float]:
    """What can be said of the drawn rows before any model looks at them."""
    return {
        "completions/mean_length": float(rows.lengths.float().mean()),
        "completions/clipped_ratio": float((rows.stop == int(Stop.LENGTH)).float().mean()),
        "completions/given_ratio": float((rows.stop == int(Stop.DATA)).float().mean()),
        "num_rows": float(len(rows)),
    }
