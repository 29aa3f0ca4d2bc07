"""Was this text sampled from that model? Log-perplexity against entropy, a mean of martingale differences.

    l_t = - log A(y_t | y_<t),   h_t = H(A(. | y_<t)),   S = mean over the N tokens of l_t - h_t

If A wrote the text, E[l_t - h_t | past] = 0 and S -> 0; otherwise S tends to the mean of cross-entropy(B, A) - H(A).
With probabilities of at least p_min, every difference lies in a window of width R <= log(1 / p_min), and

    P(|S| > delta | A) <= 2 exp(-2 N delta^2 / R^2)                                     (Azuma and Hoeffding)

for N fixed in advance; an end token makes N random. The test has two sides: greedy text has S < 0. For models with
large vocabularies R is so large that the bound says little; then `z`, S over its standard error, is what decides.

It tells a wrong temperature, forgotten filters, or a numerical mismatch between sampler and trainer from a sound
rollout, if A is what the tokens were meant to be drawn from, temperature and filters applied.

Source: the statistic is that of "Zero-Shot Statistical Tests for LLM-Generated Text Detection using Finite Sample
Concentration Inequalities", 2025; the bound with R is derived here.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.special import erfc
from torch import Tensor

from keel.core.aggregate import ratio
from keel.core.policy import PolicyModel
from keel.core.rows import Rows
from keel.rollouts.sampling import Sampling
from keel.statistics.engine import Engine
from keel.statistics.functionals import Entropy, LogProb
from keel.statistics.transforms import Transform


def source_statistic(
    logp: Float[Tensor, "B T"], entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B"]:
    """S of each text, 0 for one without tokens.

    Args:
        logp: log A of each token, end tokens included.
        entropy: of A at each position, in nats.
        mask: tokens that were drawn.
    """
    return ratio(_differences(logp, entropy, mask).sum(1), mask.sum(1).double())


def from_logits(
    logits: Float[Tensor, "B T V"], tokens: Int[Tensor, "B T"], transform: Transform | None = None
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Log-probability of each token and entropy at each position, in fp32 at least.

    Args:
        logits: from which each token was drawn, the temperature applied.
        tokens: the text.
        transform: filters of the sampler.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if transform is not None:
        wide = transform(wide.flatten(0, 1)).view_as(wide)
    log_p = wide.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, torch.zeros_like(p)).sum(-1)
    return log_p.gather(-1, tokens[..., None])[..., 0], entropy


def hoeffding_bound(count: int, delta: float, width: float) -> float:
    """2 exp(-2 N delta^2 / R^2), above the probability that a text of A has |S| > delta; at most 1.

    >>> round(hoeffding_bound(200, 0.3, 2.197225), 6)
    0.001155

    Args:
        count: N, tokens.
        delta: threshold, in nats.
        width: R, the widest window that l_t can vary in.

    Raises:
        ValueError: count below 1, or width not above 0.
    """
    _checked(count, width)
    return min(1.0, 2 * math.exp(-2 * count * delta**2 / width**2))


def hoeffding_delta(count: int, level: float, width: float) -> float:
    """R sqrt(log(2 / level) / (2 N)): the threshold at which the bound is the level.

    >>> round(hoeffding_bound(200, hoeffding_delta(200, 0.05, 3.0), 3.0), 12)
    0.05

    Raises:
        ValueError: level outside (0, 1), count below 1, or width not above 0.
    """
    _checked(count, width)
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), not {level}")
    return width * math.sqrt(math.log(2 / level) / (2 * count))


def widest(logits: Float[Tensor, "*n V"]) -> float:
    """R of a set of distributions: the widest log p_max - log p_min over tokens that can be drawn."""
    low = logits.masked_fill(logits == -math.inf, math.inf).amin(-1)
    return float((logits.amax(-1) - low).max())


@dataclass(frozen=True)
class Verdict:
    """What the tokens of a set of texts say about a model.

    Args:
        statistic: S over all of them; infinite where a token stands that the model cannot write.
        count: N.
        error: standard error of S, from the spread of the differences.
        delta: threshold of |S| at the level asked for.
        bound: of the probability of so large an |S|, by the inequality where R is given, else NaN.
    """

    statistic: float
    count: int
    error: float
    delta: float
    bound: float

    @property
    def z(self) -> float:
        """S over its standard error."""
        if self.error > 0 or self.statistic == 0:
            return self.statistic / max(self.error, 1e-300)
        return math.copysign(math.inf, self.statistic)

    @property
    def p_value(self) -> float:
        """Two-sided, by the central limit theorem of martingales."""
        return float(erfc(abs(self.z) / math.sqrt(2)))

    @property
    def rejected(self) -> bool:
        """Whether |S| is beyond the threshold: another source, on either side."""
        return abs(self.statistic) > self.delta

    def __str__(self) -> str:
        word = "another source" if self.rejected else "no objection"
        return f"S = {self.statistic:+.4f} over {self.count} tokens, z = {self.z:+.2f}: {word}"


def judge_source(
    logp: Float[Tensor, "B T"],
    entropy: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    level: float = 0.01,
    width: float | None = None,
) -> Verdict:
    """The two-sided test over all tokens together.

    Args:
        logp, entropy, mask: see `source_statistic`.
        level: probability of a false alarm.
        width: R; without it the threshold is that of the normal approximation, for many tokens.

    Raises:
        ValueError: no tokens, level outside (0, 1), or width not above 0.
    """
    differences = _differences(logp, entropy, mask)[mask]
    count = len(differences)
    if not count:
        raise ValueError("mask must hold at least one token")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), not {level}")
    statistic = float(differences.mean())
    known = differences[differences.isfinite()]  # a token that A cannot write decides, whatever the others say
    error = math.sqrt(float(known.square().sum()) / count) / math.sqrt(count)
    if width is None:
        return Verdict(statistic, count, error, _normal_quantile(level) * error, math.nan)
    delta = hoeffding_delta(count, level, width)
    return Verdict(statistic, count, error, delta, hoeffding_bound(count, abs(statistic), width))


def likelier_source(first: Float[Tensor, "B"], second: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """0 where the first model's |S| is the smaller one, 1 where the second's is."""
    return (second.abs() < first.abs()).long()


def rollout_source(
    model: PolicyModel, rows: Rows, sampling: Sampling | None = None, *, level: float = 0.01, max_tokens: int = 16384
) -> Verdict:
    """Whether rows were drawn from a model as the settings say; the recorded log-probabilities are not read.

    Args:
        model: that is said to have written them.
        rows: completions.
        sampling: temperature and filters; plain sampling without it.
        level: probability of a false alarm.
        max_tokens: of a micro-batch.

    Raises:
        ValueError: greedy settings, under which nothing is random, or rows without tokens.
    """
    sampling = Sampling() if sampling is None else sampling
    if sampling.temperature == 0:
        raise ValueError("temperature must be positive: greedy text has no entropy to compare with")
    wanted = LogProb(transform=sampling.filter), Entropy(transform=sampling.filter)
    engine = Engine({"policy": model}, temperature=sampling.temperature, max_tokens=max_tokens)
    found = engine.measure(wanted, rows)
    return judge_source(found[wanted[0]], found[wanted[1]], rows.mask, level=level)


def _differences(
    logp: Float[Tensor, "B T"], entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    found = -logp.double() - entropy.double()
    return torch.where(mask, found, torch.zeros_like(found))


def _normal_quantile(level: float) -> float:
    """The two-sided quantile of the normal distribution."""
    return float(torch.special.ndtri(torch.tensor(1 - level / 2, dtype=torch.float64)))


def _checked(count: int, width: float) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if not width > 0:
        raise ValueError(f"width must be positive, not {width}")
