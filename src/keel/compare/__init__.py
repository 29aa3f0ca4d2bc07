"""Methods under equal conditions: planned as cells, run once each, judged with intervals.

Called, the package is `keel.compare.entry.compare`.
"""

from keel.core.callable import make_callable

make_callable(__name__, "keel.compare.entry:compare")
