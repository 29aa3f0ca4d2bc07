"""Loss functions of other libraries, as they are installed, on the worlds of verification.

Nothing of theirs is copied: their functions are called with the numbers of a world in which the answer is known.
`python -m keel.verify.peers` writes the page about them; `pip install keel-rl[peers]` installs them.
"""

import contextlib
import logging
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from keel.verify.batches import GroupLoss


@dataclass(frozen=True)
class Option:
    """One setting of a library.

    Args:
        library: its name.
        setting: as its configuration spells it.
        loss: the loss that the library computes under it.
        family: settings of one family that give the same numbers share a line of a table; None stands alone.
    """

    library: str
    setting: str
    loss: GroupLoss
    family: str | None = None


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Silence what a library says when it is loaded, and give back the random states that it seeds."""
    level = logging.root.manager.disable
    states = random.getstate(), np.random.get_state()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
