"""The target with prescribed means: multipliers that are given, fitted on the reference, or followed.

P = ref exp(lambda . phi) / Z,     lambda such that the mean of E_P[phi] over prompts is m
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.aggregate import weighted_mean
from keel.core.errors import KeelError, UserError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.parts.terms.targets import Memory, Samples, check_samples, of
from keel.statistics.functionals import Functional, LogProb
from keel.statistics.stats import Stats
from keel.targets.moments import MomentFit, fit_multipliers

MOMENTS = "moments"  # under which `moment_features` leaves the features of each row


@part("moment_target", paper=3)
@dataclass(frozen=True)
class MomentTarget:
    """The nearest distribution to the reference whose features have given means: P = ref exp(lambda . phi).

    A moment of 1 of a feature with values in [0, 1] cannot be met by a finite lambda: it is met exactly by
    P = ref [phi = 1], and one of 0 by P = ref [phi = 0]. The other lambdas are given, or fitted: until `fit_batches`
    batches are seen, their features and log ref - log q are kept, and after each of them Newton's method minimises
    the mean over prompts of log Z(lambda) - lambda . m on all that is kept. lambda is 0 in the first batch, so that the
    policy is still the reference; from then on the weights ref / q make up for its movement. Then it stays.

    Args:
        names: of the features, in the order of the column `moments` (see the transform `moment_features`).
        moments: the mean that each shall have.
        multipliers: lambda; None fits it. That of a moment of 0 or 1 is not used.
        fit_batches: batches from which lambda is fitted.
        track: step of lambda after the fit; 0 leaves it as it is.
        against: name of the reference.
        samples: what draws the rows, where that is measured when a batch is observed; else what was recorded.

    Raises:
        ValueError: not one moment, or multiplier, for each name; fit_batches below 1, or track below 0.
        UserError: after the last fit, a moment that nothing near the reference can have.

    Source: "A Distributional Approach to Controlled Text Generation", 2021.
    """

    names: tuple[str, ...] = ("reward",)
    moments: tuple[float, ...] = (0.5,)
    multipliers: tuple[float, ...] | None = None
    fit_batches: int = 4
    track: float = 0.0
    against: str = "ref"
    samples: Samples = "old"

    def __post_init__(self) -> None:
        check_samples(self.samples)
        for what, values in (("moments", self.moments), ("multipliers", self.multipliers or self.moments)):
            if not self.names or len(values) != len(self.names):
                raise ValueError(f"{len(self.names)} features need as many {what}, not {len(values)}")
        if self.fit_batches < 1:
            raise ValueError(f"fit_batches must be at least 1, not {self.fit_batches}")
        if not self.track >= 0:
            raise ValueError(f"track must not be negative, got {self.track}")

    @property
    def needs(self) -> tuple[Functional, ...]:
        """The reference."""
        return (LogProb(of=(self.against,)),)

    @property
    def fitted(self) -> tuple[int, ...]:
        """Places of the features that have a finite multiplier."""
        return tuple(k for k, moment in enumerate(self.moments) if moment not in (0.0, 1.0))

    def init(self) -> Memory:
        """The multipliers, the batches seen, and what was kept of them."""
        start = self.multipliers or (0.0,) * len(self.names)
        done = self.multipliers is not None or not self.fitted
        return {
            "multipliers": torch.tensor(start, dtype=torch.float64),
            "batches": self.fit_batches if done else 0,
            "features": torch.zeros(0, 0, len(self.names), dtype=torch.float64),
            "log_weight": torch.zeros(0, 0, dtype=torch.float64),
        }

    def settled(self, state: Memory) -> bool:
        """Whether the multipliers stay as they are."""
        return self._done(state) and (self.track == 0 or not self.fitted)

    def _done(self, state: Memory) -> bool:
        return bool(state["batches"] >= self.fit_batches)

    def __call__(self, rows: Rows, stats: Stats, state: Memory) -> Float[Tensor, "B"]:
        phi, score = self.features(rows), of(self.against, rows, stats)
        for k, moment in enumerate(self.moments):
            if k in self.fitted:
                score = score + state["multipliers"][k].to(score) * phi[:, k].to(score)
            else:
                off = phi[:, k] != moment
                score = torch.where(off, torch.where(phi[:, k].isnan(), math.nan, -math.inf), score)
        return score

    def features(self, rows: Rows) -> Float[Tensor, "B K"]:
        """phi of each row.

        Raises:
            KeelError: the rows have no column for it, or one of another width.
        """
        phi = rows.features.get(MOMENTS)
        if phi is None or phi.shape[1] != len(self.names):
            raise KeelError(f"the rows have no '{MOMENTS}' of {len(self.names)} features", "moment_target")
        return phi

    def observe(self, rows: Rows, log_weight: Float[Tensor, "B"], metrics: dict, state: Memory) -> Memory:
        """Keep the batch, and fit again, until `fit_batches` are seen; metrics say the moments and the multipliers.

        Args:
            log_weight: log ref - log q.
        """
        phi, weight = self.features(rows).double().cpu(), (rows.weight * rows.main).double().cpu()
        valid = (weight > 0) & ~phi.isnan().any(1)
        for k, name in enumerate(self.names):
            metrics[f"moments/{name}"] = float(weighted_mean(phi[:, k], weight * valid))
        if not self._done(state) and bool(valid.any()):
            log_weight = log_weight.double().cpu() + weight.log()  # enumerated rows count at their probability
            state = self._fit(rows.group.cpu()[valid], phi[valid], log_weight[valid], metrics, state)
        elif self.track and bool(valid.any()):
            multipliers = state["multipliers"].clone()
            for k in self.fitted:
                multipliers[k] += self.track * (self.moments[k] - metrics[f"moments/{self.names[k]}"])
            state = state | {"multipliers": multipliers}
        for k in self.fitted:
            metrics[f"multipliers/{self.names[k]}"] = float(state["multipliers"][k])
        return state

    def _fit(self, group: Tensor, phi: Tensor, log_weight: Tensor, metrics: dict, state: Memory) -> Memory:
        features, weights = by_group(group, phi, log_weight)
        features, weights = _joined(state["features"], features, 0.0), _joined(state["log_weight"], weights, -math.inf)
        wanted, inner = list(self.fitted), weights
        for k, moment in enumerate(self.moments):  # a hard constraint comes first: ref given that it holds
            if k not in wanted:
                inner = inner.masked_fill(features[..., k] != moment, -math.inf)
        usable = (inner > -math.inf).any(1)
        multipliers, last = state["multipliers"].clone(), state["batches"] + 1 >= self.fit_batches
        if bool(usable.any()):
            asked = torch.tensor([self.moments[k] for k in wanted], dtype=torch.float64)
            found = _fitted(features[usable][..., wanted], asked, inner[usable], last)
            if found is not None:
                multipliers[wanted] = found.multipliers
                metrics["moments/kl"] = found.kl
        if last:  # what was kept is no longer needed
            features, weights = features[:0], weights[:0]
        kept = {"features": features, "log_weight": weights}
        return {"multipliers": multipliers, "batches": state["batches"] + 1, **kept}


def by_group(
    group: Tensor, features: Float[Tensor, "B K"], log_weight: Float[Tensor, "B"]
) -> tuple[Float[Tensor, "N G K"], Float[Tensor, "N G"]]:
    """Rows side by side in their groups; places without a row have weight 0."""
    order = torch.argsort(group, stable=True)
    ids, counts = group[order].unique_consecutive(return_counts=True)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    index = torch.arange(len(ids)).repeat_interleave(counts)
    width = int(counts.max())
    wide = features.new_zeros(len(ids), width, features.shape[1])
    weights = log_weight.new_full((len(ids), width), -math.inf)
    wide[index, place], weights[index, place] = features[order], log_weight[order]
    return wide, weights


def _joined(kept: Tensor, new: Tensor, padding: float) -> Tensor:
    """Groups of two batches, padded to the larger size."""
    width = max(kept.shape[1], new.shape[1])
    parts = []
    for part_ in (kept, new):
        wide = part_.new_full((part_.shape[0], width, *part_.shape[2:]), padding)
        wide[:, : part_.shape[1]] = part_
        parts.append(wide)
    return torch.cat(parts)


def within_reach(
    features: Float[Tensor, "N G K"], moments: Float[Tensor, "K"], log_weight: Float[Tensor, "N G"]
) -> Float[Tensor, "K"]:
    """The moments, each at least 2% of its range away from the ends of what weights on these rows can give it."""
    gone = (log_weight == -math.inf)[..., None]
    highest = features.masked_fill(gone, -math.inf).amax(1).mean(0)
    lowest = features.masked_fill(gone, math.inf).amin(1).mean(0)
    room = 0.02 * (highest - lowest)
    return torch.minimum(torch.maximum(moments, lowest + room), highest - room)


def _fitted(features: Tensor, moments: Tensor, log_weight: Tensor, last: bool) -> MomentFit | None:
    """The fit, before the last one with moments that can be reached; None where even these exclude one another."""
    try:
        return fit_multipliers(features, moments, log_weight)
    except ValueError as error:
        if last:
            fix = "Ask for less, or show more of the reference: raise num_generations or fit_batches."
            what = f"{str(error).rstrip('.')}; this is of the reference's completions"
            raise UserError(what, "moments", fix) from error
    try:
        return fit_multipliers(features, within_reach(features, moments, log_weight), log_weight)
    except ValueError:
        return None
