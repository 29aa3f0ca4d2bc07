"""A model that shows another one, with states of its own."""

from torch import nn

from keel.core.policy import Head, PolicyModel


class ModelView:
    """What has the parameters and the head of a model; `hidden`, which says what it shows, is for each to define.

    Args:
        model: what it shows.
    """

    def __init__(self, model: PolicyModel):
        self.model = model

    @property
    def module(self) -> nn.Module:
        """The parameters."""
        return self.model.module

    @property
    def head(self) -> Head:
        """From states of the model itself to logits."""
        return self.model.head
