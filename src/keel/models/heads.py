"""Heads that a method owns."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keel.core.choice import generator
from keel.core.errors import ConfigError
from keel.core.policy import PolicyModel
from keel.core.registry import part
from keel.core.rows import Rows


class ValueHead(nn.Module):
    """v = w h + b, a number for each state; it starts at zero, so that the first advantages are those without a critic.

    Args:
        dim: size of a state.
        std: standard deviation of the initial weights.
        seed: of the initial weights.
    """

    def __init__(self, dim: int, std: float = 0.0, seed: int = 0):
        super().__init__()
        noise = torch.randn(dim, generator=generator(seed, "value_head")) if std else torch.zeros(dim)
        self.weight = nn.Parameter(std * noise)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
        return hidden.to(self.weight.dtype) @ self.weight + self.bias


class CriticModel(nn.Module):
    """A critic with a body of its own: a copy of the policy's, and a value head on its states."""

    def __init__(self, body: PolicyModel, head: ValueHead):
        super().__init__()
        self.body, self.head = body.module, head
        self._policy = body

    def hidden(self, rows: Rows) -> Float[Tensor, "B T D"]:
        """States of the critic's own body."""
        return self._policy.hidden(rows)

    def forward(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
        return self.head(hidden)


@part("critic")
@dataclass(frozen=True)
class Critic:
    """A learned value: a head on the policy's states, or a model of its own that starts as a copy of the policy.

    Args:
        kind: head or model.
        std: standard deviation of the head's initial weights; 0 starts at value 0.
    """

    kind: Literal["head", "model"] = "head"
    std: float = 0.0

    def build(self, policy: PolicyModel, seed: int) -> nn.Module:
        """The module, on the policy's device."""
        parameter = next(policy.module.parameters())
        head = ValueHead(_width(policy), self.std, seed).to(parameter.device)
        if self.kind == "head":
            return head
        body = copy.deepcopy(policy)
        for weight in body.module.parameters():
            weight.requires_grad_(True)
        return CriticModel(body, head)


class ScoreHead(nn.Module):
    """r = w h, a number for each state, without a bias: a common shift of all rewards is not determined by pairs.

    Args:
        dim: size of a state.
        std: standard deviation of the initial weights.
        seed: of the initial weights.
    """

    def __init__(self, dim: int, std: float = 0.02, seed: int = 0):
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(dim, generator=generator(seed, "score_head")))

    def forward(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n"]:
        return hidden.to(self.weight.dtype) @ self.weight


@part("reward_head")
@dataclass(frozen=True)
class RewardHead:
    """The head of a reward model: r = w h on the policy's states, w ~ N(0, std^2).

    Args:
        std: standard deviation of the initial weights; 0.02 is what transformers gives a new head.

    Raises:
        ValueError: std not above 0: from equal scores two heads would never come apart.
    """

    std: float = 0.02

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std must be above 0, not {self.std}")

    def build(self, policy: PolicyModel, seed: int) -> nn.Module:
        """The module, on the policy's device."""
        return ScoreHead(_width(policy), self.std, seed).to(next(policy.module.parameters()).device)


@part("slow_copy", paper=12)
@dataclass(frozen=True)
class SlowCopy:
    """A head that follows another: theta_slow <- theta_slow + rate (theta - theta_slow), once a batch.

    Args:
        of: name of the head that it follows.
        rate: Polyak's; 1 is a copy of the last batch.
        critic: what that head is.

    Raises:
        ValueError: rate outside (0, 1].
    """

    of: str
    rate: float = 0.05
    critic: Critic = Critic()

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be in (0, 1], not {self.rate}")

    def build(self, policy: PolicyModel, seed: int) -> nn.Module:
        """The module, without gradient; `follow` gives it its first weights."""
        return self.critic.build(policy, seed).requires_grad_(False)


@torch.no_grad()
def follow(specs: Mapping[str, Any], heads: Mapping[str, nn.Module], first: bool = False) -> None:
    """Move every slow copy towards its head; at the `first` time, onto it.

    Raises:
        ConfigError: there is no such head, or it is of another kind.
    """
    for name, spec in specs.items():
        if not isinstance(spec, SlowCopy):
            continue
        if spec.of not in heads:
            raise ConfigError(f"there is no head '{spec.of}'", f"heads.{name}.of", f"Heads: {', '.join(heads)}.")
        own, live = (dict(heads[n].named_parameters()) for n in (name, spec.of))
        if own.keys() != live.keys():
            raise ConfigError(f"it is no copy of '{spec.of}'", f"heads.{name}.critic", "Give it that head's settings.")
        for key, weight in own.items():
            weight.lerp_(live[key].to(weight), 1.0 if first else spec.rate)


def _width(policy: PolicyModel) -> int:
    """Size of a state, read off one token."""
    device = next(policy.module.parameters()).device
    one = torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        return policy.hidden(Rows.build(one, one == 0, one, one == 0)).shape[-1]
