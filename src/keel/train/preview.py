"""Steps that are looked at before they are taken, and shortened where they lead too far."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keel.core.rows import Rows

if TYPE_CHECKING:
    from keel.train.session import Session


def step_within(session: "Session", rows: Rows, norm: Tensor) -> float:
    """One update of the optimiser; the policy goes that share of the way which the controllers allow.

        theta <- theta + scale (theta_tried - theta),   scale the least `scale_step(rows, stats)` of the controllers

    Args:
        session: whose policy, heads and controllers; the heads and the optimiser's moments take the whole step.
        rows: of the update.
        norm: of the gradient.

    Returns:
        The share, 1 where no controller looks ahead.
    """
    judges = [item for item in session.method.controllers.values() if hasattr(item, "scale_step")]
    if not judges:
        session.optimiser.step(norm)
        return 1.0
    moved = [p for p in session.policy.module.parameters() if p.requires_grad and p.grad is not None]
    before = [p.detach().clone() for p in moved]
    session.optimiser.step(norm)
    tried = session.engine.measure([f for item in judges for f in item.looks_at], rows)
    scale = min(item.scale_step(rows, tried) for item in judges)
    if scale < 1:
        with torch.no_grad():
            for p, old in zip(moved, before, strict=True):
                p.copy_(torch.lerp(old, p, scale) if scale > 0 else old)  # p may not be finite
    return scale
