"""The loop, and what it stands on: settings, optimiser, checkpoints, entries.

Called, the package is `keel.train.entry.train`.
"""

from keel.core.callable import make_callable

make_callable(__name__, "keel.train.entry:train")
