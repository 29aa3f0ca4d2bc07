"""Links of two scores: losses that fall as the chosen score leads the rejected one."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from keel.core.registry import part


@part("log_sigmoid")
@dataclass(frozen=True)
class LogSigmoid:
    """-log sigmoid(S_w - S_l - offset): the Bradley-Terry likelihood of DPO.

    Source: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", 2023.
    """

    both = False

    def __call__(
        self, chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], offset: Float[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        return softplus(offset - (chosen - rejected))
