"""The three-step binary chain on which every sampler has known numbers, and laws of samplers on it."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.chance import Sample, law
from keel.exact.chain import TabularChain, mean_value_table, soft_value_table
from keel.exact.space import SequenceSpace, TabularPolicy

BETA = 0.5
SPACE = SequenceSpace(vocab=2, horizon=3)
LEAVES = ["".join(map(str, bits)) for bits in itertools.product((0, 1), repeat=3)]
ONE = torch.tensor([0.6, 0.3, 0.5, 0.2, 0.7, 0.4, 0.9], dtype=torch.float64)  # P(next = 1), prefixes level by level
PREFIXES = ["", "0", "1", "00", "01", "10", "11"]
REWARD = torch.tensor([[0.0, 1.0, 0.5, 2.0, -1.0, 1.5, 0.25, 0.75]], dtype=torch.float64)
POLICY = TabularPolicy(SPACE, torch.stack([1 - ONE, ONE], -1).log()[None].double())
PRIOR = torch.tensor([0.224, 0.056, 0.036, 0.084, 0.180, 0.120, 0.030, 0.270], dtype=torch.float64)
TILT = torch.tensor([0.024845, 0.045895, 0.010854, 0.508677, 0.002702, 0.267331, 0.005486, 0.134212]).double()
Z, LOG_Z = 9.016032, 2.199004
SOFT = soft_value_table(POLICY, REWARD, BETA)
MEAN = mean_value_table(POLICY, REWARD)


def chain(copies: int = 1, value: Float[Tensor, "Q X"] | None = None) -> TabularChain:
    """The chain, its prompt `copies` times, with a table of values or none."""
    return TabularChain(POLICY, REWARD, torch.zeros(copies, dtype=torch.long), value)


def leaf_law(sampler, value: Float[Tensor, "Q X"] | None = None) -> Float[Tensor, "S"]:
    """The exact law of what a sampler puts out."""
    probability, found = law(lambda copies, rng: sampler(chain(copies, value), rng))
    return torch.zeros(8, dtype=torch.float64).index_add(0, leaves(found)[found.picked], probability)


def leaves(found) -> Tensor:
    """The leaf of every state."""
    return chain().leaf(found.states)


def total_variation(p: Float[Tensor, "S"], q: Float[Tensor, "S"] = TILT) -> float:
    """Half the sum of absolute differences."""
    return float((p - q).abs().sum() / 2)


def estimates(sampler, value: Float[Tensor, "Q X"] | None = None) -> tuple[float, float, Float[Tensor, "S"]]:
    """E[Z_hat], its standard deviation, and E[Z_hat 1(pick = leaf)] / Z for every leaf, all exact."""
    probability, found = law(lambda copies, rng: sampler(chain(copies, value), rng))
    z = found.log_z.exp()
    mean = float((probability * z).sum())
    deviation = float((probability * (z - mean) ** 2).sum().sqrt())
    tilted = torch.zeros(8, dtype=torch.float64).index_add(0, leaves(found)[found.picked], probability * z) / Z
    return mean, deviation, tilted


def sampled_law(sampler, runs: int, seed: int = 0, value: Float[Tensor, "Q X"] | None = None) -> Float[Tensor, "S"]:
    """Shares of the leaves in so many independent runs."""
    found = sampler(chain(runs, value), Sample(seed))
    return torch.bincount(leaves(found)[found.picked], minlength=8).double() / runs
