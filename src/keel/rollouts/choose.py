"""Which generator serves a model."""

from typing import Literal

from keel.models.language import LanguageModel
from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Generator
from keel.rollouts.steppers import CacheStepper


def choose_generator(model: LanguageModel, kind: Literal["auto", "local", "transformers"] | str = "auto") -> Generator:
    """The local generator where it serves the architecture, else the one on `generate`.

    Raises:
        UserError: `local` is asked for, and the architecture keeps its memory in another form than a key-value cache.
    """
    if kind == "local" or (kind == "auto" and CacheStepper.serves(model)):
        return LocalGenerator(model)
    from keel.rollouts.transformers import TransformersGenerator

    return TransformersGenerator(model)
