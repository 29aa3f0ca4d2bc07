"""A joint prediction of final reward and remaining length, read off logits that no token uses.

With R reward states and L length bins, reserved tokens z_0 .. z_0 + R L - 1 and bin(r, l) = l + r L:

    p(r, l | y_<=t) = softmax of the reserved slice alone
    pi(token | ...) = softmax of all other logits

so that one forward pass gives both. Training has three stages: (1) R = 2 states on 0/1 correctness without the KL;
(2) every rollout gets the mean of E[r] over its last positions as a denoised value (`denoised_value`); (3) R = 7 states
on that value, with the KL to the frozen model. One joint, not two marginals: long texts are wrong more often.

The state that chose response token t is labelled with the T - 1 - t tokens that follow that token. Tied embeddings
train the input embeddings of the reserved tokens too, which nothing reads.

Source: "Zero-Overhead Introspection for Adaptive Test-Time Compute", 2025.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.rows import Rows

EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
IGNORED = -1


@dataclass(frozen=True)
class JointBins:
    """The bins, and the slice of the logits that holds them.

    Reward state i stands for i / (R - 1); the edges lie half-way between states and belong to the upper one, and values
    outside [0, 1] to the nearest state. Length bin j holds edges[j] <= length < edges[j + 1], the last one everything
    beyond too.

    >>> bins = JointBins()
    >>> bins.index(torch.tensor([300, 256, 40_000]), torch.tensor([1.0, 0.0, 0.0]))
    tensor([49,  1,  7])

    Args:
        states: R.
        length_edges: L + 1 increasing numbers of tokens, the first 0.
        first_token: z_0.

    Raises:
        ValueError: fewer than two states, edges that do not increase from 0, or a negative first token.
    """

    states: int = 7
    length_edges: tuple[int, ...] = EDGES
    first_token: int = 151669

    def __post_init__(self) -> None:
        edges = self.length_edges
        if self.states < 2:
            raise ValueError(f"states must be at least 2, not {self.states}")
        if len(edges) < 2 or edges[0] != 0 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"length_edges must increase from 0, not {edges}")
        if self.first_token < 0:
            raise ValueError(f"first_token must be a token, not {self.first_token}")

    @property
    def count(self) -> int:
        """R L, the number of reserved tokens."""
        return self.states * (len(self.length_edges) - 1)

    @property
    def values(self) -> Float[Tensor, "R"]:
        """What each reward state stands for."""
        return torch.arange(self.states, dtype=torch.float64) / (self.states - 1)

    @property
    def lengths(self) -> Float[Tensor, "L"]:
        """What each length bin stands for: its middle, in tokens."""
        edges = torch.tensor(self.length_edges, dtype=torch.float64)
        return (edges[1:] + edges[:-1]) / 2

    def index(self, remaining: Int[Tensor, "*n"], value: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """The bin l + r L of tokens to come and a final value.

        Args:
            remaining: tokens to come.
            value: final reward or denoised value, in [0, 1].
        """
        edges = torch.tensor(self.length_edges[1:-1], device=remaining.device)
        length = torch.searchsorted(edges, remaining.contiguous(), right=True)
        middles = ((self.values[1:] + self.values[:-1]) / 2).to(value.device)
        reward = torch.searchsorted(middles, value.double().contiguous(), right=True)
        return length + reward * (len(self.length_edges) - 1)

    def joint(self, logits: Float[Tensor, "*n V"]) -> Float[Tensor, "*n R L"]:
        """p(r, l): softmax of the slice, in fp32 at least. Log-probabilities of all tokens will do for the logits."""
        piece = self.slice(logits)
        wide = piece.to(torch.promote_types(piece.dtype, torch.float32))
        return wide.softmax(-1).unflatten(-1, (self.states, -1))

    def masked(self, logits: Float[Tensor, "*n V"]) -> Float[Tensor, "*n V"]:
        """Logits from which a next token may be drawn: -inf on the slice."""
        self.slice(logits)
        place = torch.arange(logits.shape[-1], device=logits.device)
        reserved = (place >= self.first_token) & (place < self.first_token + self.count)
        return logits.masked_fill(reserved, float("-inf"))

    def slice(self, logits: Float[Tensor, "*n V"]) -> Float[Tensor, "*n RL"]:
        """The reserved logits.

        Raises:
            ValueError: the slice does not fit the vocabulary.
        """
        end = self.first_token + self.count
        if end > logits.shape[-1]:
            raise ValueError(
                f"first_token {self.first_token} leaves no room for {self.count} reserved tokens in a vocabulary of "
                f"{logits.shape[-1]}"
            )
        return logits[..., self.first_token : end]


def joint_labels(rows: Rows, value: Float[Tensor, "B"], bins: JointBins) -> Int[Tensor, "B T"]:
    """The bin of every response position, -1 on padding: T_i - 1 - t tokens to come, and the row's value.

    Args:
        rows: responses that ran to their end; of one that was cut off the remaining length is not known.
        value: correctness, or denoised value, of each row.
        bins: see `JointBins`.
    """
    place = torch.arange(rows.tokens.shape[1], device=rows.device)
    remaining = (rows.present.sum(1, keepdim=True) - 1 - place).clamp(min=0)
    found = bins.index(remaining, value[:, None].expand(remaining.shape))
    return torch.where(rows.mask, found, torch.full_like(found, IGNORED))


def expected_reward(joint: Float[Tensor, "*n R L"], bins: JointBins) -> Float[Tensor, "*n"]:
    """sum_r r p(r)."""
    return joint.sum(-1) @ bins.values.to(joint)


def denoised_value(
    joint: Float[Tensor, "B T R L"], mask: Bool[Tensor, "B T"], bins: JointBins, last: int = 512
) -> Float[Tensor, "B"]:
    """Mean of the expected reward over the last positions of each row: the label of the third stage.

    Args:
        joint: as the model of the first stage predicts it.
        mask: response positions.
        bins: of that model.
        last: positions at most; NaN for a row without any.

    Raises:
        ValueError: last below 1.
    """
    if last < 1:
        raise ValueError(f"last must be at least 1, not {last}")
    to_come = mask.long().flip(1).cumsum(1).flip(1)  # 1 at the last position
    used = mask & (to_come <= last)
    reward = expected_reward(joint, bins)
    return torch.where(used, reward, torch.zeros_like(reward)).sum(1) / used.sum(1)


def truncated_kl(
    student: Float[Tensor, "n V"], teacher: Float[Tensor, "n V"], bins: JointBins, top_k: int = 32
) -> Float[Tensor, "n"]:
    """KL of the teacher on its k likeliest tokens, renormalised, to the whole student; the slice left out of both.

    It is not 0 where student and teacher agree, but -log of the teacher's mass on the k tokens (0.105361 at mass 0.9):
    its minimum gives the other tokens no mass.

    Args:
        student, teacher: logits; the teacher is constant.
        bins: the reserved slice.
        top_k: tokens of the teacher.

    Raises:
        ValueError: top_k below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    known = bins.masked(teacher.detach())
    known = known.to(torch.promote_types(known.dtype, torch.float32))
    top = known.topk(min(top_k, known.shape[-1] - bins.count), -1)
    log_t = top.values.log_softmax(-1)
    masked = bins.masked(student)
    log_s = masked.to(torch.promote_types(masked.dtype, torch.float32)).log_softmax(-1).gather(-1, top.indices)
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def introspection_loss(
    logits: Float[Tensor, "n V"],
    label: Int[Tensor, "n"],
    bins: JointBins,
    teacher: Float[Tensor, "n V"] | None = None,
    kl_coef: float = 10.0,
    top_k: int = 32,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Mean over response positions of CE(slice, bin) + kl_coef * truncated KL.

    Args:
        logits: at the positions with a label.
        label: `joint_labels` there; positions labelled -1 are left out.
        bins: see `JointBins`.
        teacher: logits of the frozen model; without it there is no KL.
        kl_coef: c_KL.
        top_k: tokens of the teacher in the KL.

    Returns:
        The loss, and its parts "ce" and "kl", detached.

    Raises:
        ValueError: kl_coef below 0.
    """
    if kl_coef < 0:
        raise ValueError(f"kl_coef must be 0 or positive, not {kl_coef}")
    counted = label != IGNORED
    logits, label = logits[counted], label[counted]
    piece = bins.slice(logits)
    wide = piece.to(torch.promote_types(piece.dtype, torch.float32))
    ce = torch.nn.functional.cross_entropy(wide, label) if len(label) else wide.sum()
    if teacher is None or kl_coef == 0 or not len(label):
        return ce, {"ce": ce.detach(), "kl": torch.zeros_like(ce)}
    kl = truncated_kl(logits, teacher[counted], bins, top_k).mean()
    return ce + kl_coef * kl, {"ce": ce.detach(), "kl": kl.detach()}
