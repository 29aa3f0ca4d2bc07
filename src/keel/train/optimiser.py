"""AdamW with a schedule; its state is plain tensors."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from keel.train.settings import TrainSettings


class Optimiser:
    """AdamW over named parameters.

    Args:
        policy: trained parameters of the policy by name.
        heads: those of the method's heads by name.
        settings: learning rates, betas, schedule, clipping.
        updates: optimiser steps of the whole run, for the schedule. Where something else ends the run, `spent` says how
            much of that is used up, and the schedule is as far as the further of the two.
    """

    def __init__(
        self,
        policy: Mapping[str, nn.Parameter],
        heads: Mapping[str, nn.Parameter],
        settings: TrainSettings,
        updates: int,
    ):
        self.names = {**policy, **{f"heads.{name}": p for name, p in heads.items()}}
        self.settings, self.updates, self.count = settings, updates, 0
        self.spent = 0.0
        critic = settings.learning_rate if settings.critic_learning_rate is None else settings.critic_learning_rate
        groups = [{"params": list(policy.values()), "base": settings.learning_rate}]
        if heads:
            groups.append({"params": list(heads.values()), "base": critic})
        self.inner = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            foreach=True,
        )

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """All of them."""
        return self.names.values()

    @property
    def learning_rate(self) -> float:
        """That of the next update, for the policy."""
        return self.settings.learning_rate * self.factor(self.count)

    def factor(self, update: int) -> float:
        """Share of the full learning rate at an update, counted from 0."""
        s = self.settings
        if update < s.warmup_steps:
            return (update + 1) / s.warmup_steps
        if s.lr_scheduler == "constant":
            return 1.0
        way = min(1.0, max(self.spent, (update - s.warmup_steps) / max(1, self.updates - s.warmup_steps)))
        shape = 1 - way if s.lr_scheduler == "linear" else (1 + math.cos(math.pi * way)) / 2
        return s.lr_final + (1 - s.lr_final) * shape

    def gradient_norm(self) -> Tensor:
        """Norm over all gradients; those that are missing count as 0."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())

    def step(self, norm: Tensor) -> None:
        """One update; gradients are scaled down to the largest norm allowed."""
        if self.settings.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters), self.settings.max_grad_norm, norm)
        for group in self.inner.param_groups:
            group["lr"] = group["base"] * self.factor(self.count)
        self.inner.step()
        self.count += 1

    def hold_policy(self) -> None:
        """Forget the policy's gradients: the next update is of the heads alone, and leaves no trace in its moments."""
        for parameter in self.inner.param_groups[0]["params"]:
            parameter.grad = None

    def forget(self) -> None:
        """Begin anew with its moments; the schedule goes on."""
        self.inner.state.clear()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.inner.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Moments by parameter name, for a checkpoint."""
        out = {}
        for name, parameter in self.names.items():
            for key, value in self.inner.state.get(parameter, {}).items():
                out[f"{name}/{key}"] = torch.as_tensor(value)
        return out

    def restore(self, tensors: Mapping[str, Tensor], count: int) -> None:
        """The inverse of `tensors`."""
        self.count = count
        for name, parameter in self.names.items():
            prefix = f"{name}/"
            state = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                self.inner.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter.device).clone()
                    for key, value in state.items()
                }
