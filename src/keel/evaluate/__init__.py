"""What a policy can do, measured on prompts that it was not trained on, with intervals."""

from keel.core.callable import make_callable

make_callable(__name__, "keel.train.entry:evaluate")
