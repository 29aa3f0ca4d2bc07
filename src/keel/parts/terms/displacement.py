"""How the likelihoods of chosen, rejected and all other completions move while pairs are learnt."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.registry import part
from keel.core.rows import Pairs, Rows
from keel.parts.terms.pairs import PairLoss, pairs_of
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats


@part("watched_pair_loss", paper=152)
@dataclass(frozen=True)
class WatchedPairLoss(PairLoss):
    """A loss of pairs that also logs the displacement of likelihoods.

        displacement/drop             mean (log pi - log ref)(y_l), of the rejected completion
        displacement/chosen           mean (log pi - log ref)(y_w), of the chosen one
        displacement/degradation      mean |d loss / d log pi(y_w)|, what is left to learn from chosen completions
        displacement/unseen           mean over prompts of 1 - sum pi(y) over the distinct completions of pairs

    The first two are log-ratios to the first model of the score, or log-probabilities where it has none. Where the
    sides are scaled apart, scores are no rewards, and rewards/chosen and rewards/rejected are left out.

    Args:
        link, score, beta, rejected, offset, margin, gap, label_smoothing, noise, weight, coef: as for `PairLoss`.

    Source: Yan et al., "3D-Properties: Identifying Challenges in DPO and Charting a Path Forward", 2025.
    """

    @torch.no_grad()
    def metrics(self, rows: Rows, stats: Stats) -> dict[str, Tensor]:
        """Those of `PairLoss`, and the displacement."""
        pairs, out = pairs_of(rows), super().metrics(rows, stats)
        if self.rejected is not None and getattr(self.rejected, "scale", 1.0) != getattr(self.score, "scale", 1.0):
            out = {name: value for name, value in out.items() if name not in ("rewards/chosen", "rewards/rejected")}
        names = getattr(self.score, "against", ())
        moved = stats[LogProb()] - (stats[LogProb(of=(names[0],))] if names else 0)
        moved = torch.where(rows.mask, moved, torch.zeros_like(moved)).sum(1)
        measure = pairs.measure.to(moved)
        return out | {
            "displacement/drop": ratio((measure * moved[pairs.rejected]).sum(), measure.sum()),
            "displacement/chosen": ratio((measure * moved[pairs.chosen]).sum(), measure.sum()),
            "displacement/degradation": self._degradation(rows, stats),
            "displacement/unseen": unseen_mass(rows, pairs, stats[LogProb()]),
        }

    def _degradation(self, rows: Rows, stats: Stats) -> Float[Tensor, ""]:
        """Mean over pairs of the most that any token of the chosen completion feels, each pair with rows of its own."""
        pairs = pairs_of(rows)
        count, index = len(pairs.chosen), torch.cat([pairs.chosen, pairs.rejected])
        place = torch.arange(2 * count, device=index.device)
        alone = replace(pairs, chosen=place[:count], rejected=place[count:])
        leaf = stats[LogProb()][index].detach().requires_grad_()
        known = stats.select(index).merged({LogProb(): leaf})
        rows = rows.with_(pairs=None).select(index).with_(pairs=alone)
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(self(rows, known), leaf)
        return torch.where(rows.mask, grad.abs(), torch.zeros_like(grad))[:count].amax(1).sum()


def unseen_mass(rows: Rows, pairs: Pairs, log_prob: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean over prompts of the probability of all completions that are in no pair.

    Args:
        rows: the batch; a prompt is a group.
        pairs: its pairs.
        log_prob: of the tokens.
    """
    used = torch.cat([pairs.chosen, pairs.rejected]).unique()
    tokens = torch.where(rows.mask, rows.tokens, -1)[used]
    distinct, place = torch.cat([rows.group[used, None], tokens], 1).unique(dim=0, return_inverse=True)
    total = torch.where(rows.mask, log_prob, torch.zeros_like(log_prob))[used].sum(1).exp()
    probability = total.new_zeros(len(distinct)).index_put((place,), total)  # equal texts have equal numbers
    return 1 - ratio(probability.sum(), float(len(distinct[:, 0].unique())))
