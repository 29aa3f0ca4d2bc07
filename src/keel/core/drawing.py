"""Drawing from probabilities with uniforms that are given: no generator state anywhere."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 256  # entries of a block in the two-level search
BELOW = 1 - 2**-52  # of a total: rounding never leads past the last entry with weight


def draw(probs: Float[Tensor, "n V"], uniform: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
    """The first entry whose cumulative probability exceeds the uniform's share; never one of probability 0.

    Running sums are taken in fp64. A large vocabulary is searched in two levels, blocks first, because a running sum
    over all of it costs more than everything else.
    """
    rows, vocabulary = probs.shape
    if vocabulary <= 4 * BLOCK:
        return search(probs.double(), uniform[:, None])[0][:, 0]
    blocks = -(-vocabulary // BLOCK)
    if vocabulary % BLOCK:
        probs = F.pad(probs, (0, blocks * BLOCK - vocabulary))
    grid = probs.view(rows, blocks, BLOCK)
    weight = grid.sum(-1).double()
    block, goal, sums = search(weight, uniform[:, None])
    size = weight.gather(-1, block)
    rest = (1 - (sums.gather(-1, block) - goal) / size).clamp(0, 1)  # of the block, below the point
    inside = grid.gather(1, block[:, :, None].expand(rows, 1, BLOCK))[:, 0]
    return (block * BLOCK + search(inside.double(), rest)[0])[:, 0]


def search(
    weight: Float[Tensor, "n V"], share: Float[Tensor, "n m"]
) -> tuple[Int[Tensor, "n m"], Float[Tensor, "n m"], Float[Tensor, "n V"]]:
    """The entries at which the running sum exceeds each `share` of the total; the sums looked for, and all sums."""
    sums = weight.cumsum(-1)
    total = sums[:, -1:]
    goal = torch.minimum(share * total, total * BELOW)
    # weights that are no numbers must not lead past the end; their log-probability says that they are none
    place = torch.searchsorted(sums, goal, right=True).clamp_(max=sums.shape[-1] - 1)
    return place, goal, sums
