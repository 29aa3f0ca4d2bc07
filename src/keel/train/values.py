"""What readers say: values, the chance of a better restart, reward and remaining length together.

mean value     U(x) = E_{p_0}[r | x], by least squares on the reward of each sample
soft value     V(x) = beta log E_{p_0}[exp(r / beta) | x], by cross-entropy on exp((r - r_max) / beta), whose
               minimiser is the conditional mean
restart        c(x) = P(another sample is better | x), by cross-entropy on how often the others of its prompt were
joint          p(final reward, remaining length | x), by cross-entropy on its bin
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from keel.core.chain import Prefix, TokenChain
from keel.core.chance import Choice
from keel.core.errors import DataError
from keel.models.introspection import JointBins, joint_labels
from keel.models.language import LanguageModel
from keel.sampling.adaptive import calibration_error, restart_labels
from keel.train.readers import Experience, Reader, fit_reader, held_out_outputs

Kind = Literal["mean", "soft"]


@dataclass(frozen=True, eq=False)
class LearnedValue:
    """A value that was learnt.

    Args:
        reader: one number for each state.
        kind: "mean" or "soft".
        beta: of the soft value.
        low, high: the range of rewards seen; values stay inside.
    """

    reader: Reader
    kind: Kind
    beta: float
    low: float
    high: float

    def __call__(self, chain: TokenChain, x: Prefix, rng: Choice) -> Float[Tensor, "B"]:
        out = self.reader(chain, x, finished=False)[:, 0].double()
        if self.kind == "mean":
            return out.clamp(self.low, self.high)
        return (self.high + self.beta * F.logsigmoid(out)).clamp(min=self.low)

    def save(self, path: str | Path, **facts: Any) -> None:
        """Write it into a folder; see `Reader.save`."""
        own = {"kind": self.kind, "beta": self.beta, "low": self.low, "high": self.high}
        self.reader.save(path, **facts, **own)

    @staticmethod
    def load(path: str | Path, device: str | None = None) -> "LearnedValue":
        """The inverse of `save`.

        Raises:
            DataError: the folder holds no value.
        """
        reader, facts = Reader.load(path, device)
        if "kind" not in facts:
            raise DataError("holds a head that is no value", str(path))
        return LearnedValue(reader, facts["kind"], facts["beta"], facts["low"], facts["high"])


def fit_value(
    seen: Experience, policy: LanguageModel, kind: Kind = "soft", beta: float = 0.1, **training: Any
) -> tuple[LearnedValue, dict[str, float]]:
    """A value by regression on samples, and how well it predicts prompts that it was not fitted to.

    Args:
        seen: samples of the frozen policy.
        policy: the policy.
        kind: "mean" for U, "soft" for V at `beta`.
        beta: of the tilt.
        training: see `fit_reader`.

    Returns:
        The value, and `explained`: the share of the variance of the targets, over all tokens of the prompts held out,
        that the prediction explains (below 0: worse than the mean).

    Raises:
        DataError: all samples have the same reward, so that there is nothing to learn.
    """
    low, high = float(seen.reward.min()), float(seen.reward.max())
    if low == high:
        raise DataError(f"all {len(seen.reward)} samples have the reward {low:g}", "value", "Sample more prompts.")
    target = (seen.reward if kind == "mean" else ((seen.reward - high) / beta).exp()).float()
    criterion = F.mse_loss if kind == "mean" else F.binary_cross_entropy_with_logits
    reader = fit_reader(seen, policy, lambda out, sample, place: criterion(out[:, 0], target[sample]), **training)
    value = LearnedValue(reader, kind, beta, low, high)
    if not bool(seen.held.any()):
        return value, {"explained": math.nan}
    out, sample, _ = held_out_outputs(reader, seen, policy)
    guess, wanted = (out if kind == "mean" else out.sigmoid())[:, 0], target[sample]
    return value, {"explained": 1 - float((guess - wanted).square().mean() / wanted.var().clamp(min=1e-12))}


@dataclass(frozen=True, eq=False)
class LearnedRestart:
    """The chance that another sample of the prompt would be better, for adaptive best-of-N.

    Args:
        reader: one number for each state.
    """

    reader: Reader

    def __call__(self, chain: TokenChain, x: Prefix) -> Float[Tensor, "B"]:
        return self.reader(chain, x)[:, 0].sigmoid()


def fit_restart_reader(
    seen: Experience, policy: LanguageModel, **training: Any
) -> tuple[LearnedRestart, dict[str, float]]:
    """A prediction of restarts from groups of samples, and its calibration error on the prompts held out.

    Raises:
        ValueError: fewer than two samples of each prompt.
    """
    label = restart_labels(seen.reward.view(-1, seen.count)).flatten().float()

    def loss(out: Tensor, sample: Tensor, place: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out[:, 0], label[sample])

    reader = fit_reader(seen, policy, loss, **training)
    out, sample, _ = held_out_outputs(reader, seen, policy)
    return LearnedRestart(reader), {"calibration_error": calibration_error(out[:, 0].sigmoid(), label[sample])}


@dataclass(frozen=True, eq=False)
class LearnedJoint:
    """Final reward and remaining length together, for introspection.

    Args:
        reader: R L numbers for each state.
        bins: what they mean.
        low, high: rewards that stand for 0 and 1 of the bins.
    """

    reader: Reader
    bins: JointBins
    low: float = 0.0
    high: float = 1.0

    @property
    def values(self) -> Float[Tensor, "R"]:
        """Reward of each bin."""
        return self.low + (self.high - self.low) * self.bins.values

    @property
    def lengths(self) -> Float[Tensor, "L"]:
        """Tokens of each bin."""
        return self.bins.lengths

    def __call__(self, chain: TokenChain, x: Prefix) -> Float[Tensor, "B R L"]:
        found = self.reader(chain, x, finished=False).double().softmax(-1).unflatten(-1, (self.bins.states, -1))
        return found.masked_fill(x.done[:, None, None], math.nan)  # the last prediction stays


def fit_joint(
    seen: Experience, policy: LanguageModel, bins: JointBins, **training: Any
) -> tuple[LearnedJoint, dict[str, float]]:
    """A joint prediction, and its cross-entropy on the prompts held out against that of the bins' frequencies.

    Raises:
        DataError: all samples have the same reward.
    """
    low, high = float(seen.reward.min()), float(seen.reward.max())
    if low == high:
        raise DataError(f"all {len(seen.reward)} samples have the reward {low:g}", "joint", "Sample more prompts.")
    label = joint_labels(seen.rows, ((seen.reward - low) / (high - low)).float(), bins)

    def loss(out: Tensor, sample: Tensor, place: Tensor) -> Tensor:
        return F.cross_entropy(out, label[sample, place])

    reader = fit_reader(seen, policy, loss, outputs=bins.count, **training)
    out, sample, place = held_out_outputs(reader, seen, policy)
    wanted = label[sample, place]
    share = torch.bincount(wanted, minlength=bins.count).double() / len(wanted)
    plain = -float((share * share.clamp(min=1e-12).log()).sum())
    found = {"cross_entropy": float(F.cross_entropy(out, wanted)), "entropy_of_bins": plain}
    return LearnedJoint(reader, bins, low, high), found
