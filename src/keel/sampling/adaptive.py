"""Best-of-N that stops when nothing better is to be expected: draws are stopped, pruned and ranked by one prediction.

    c(y_<=t) = P(a fresh sample beats what this one becomes), ties counted half
    draw, in batches, until min_i c(y_i) < tau or N draws;   put out argmin_i c(y_i)

For continuous rewards a perfect predictor is c = 1 - F(r), uniform on (0, 1), and with q = 1 - tau

    E[draws] = (1 - q^N) / tau,    E[F(r)] = (1 - q^N) (1 + q) / 2 + q^(N + 1) N / (N + 1)

c compares a sample with others of its own prompt: it says nothing across prompts, and after samples were chosen by it,
it is too good an estimate of their quality.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keel.core.chain import FIELDS, Chain, Prefix, TokenChain
from keel.core.chance import Choice
from keel.core.registry import part
from keel.exact.chain import TabularChain, mean_value_table
from keel.sampling.kernels import by_token
from keel.sampling.particles import Particles, best
from keel.sampling.settings import positive, share

NEWTON_STEPS = 100


@runtime_checkable
class Restart(Protocol):
    """Predicts c, the probability that starting again would give something better."""

    def __call__(self, chain: TokenChain, x: Prefix) -> Float[Tensor, "B"]:
        """c of states, in [0, 1]: finished ones, without memory, or (to prune) some that are still being written."""
        ...


# -- learning to predict --------------------------------------------------------------------------------------------


def restart_labels(score: Float[Tensor, "P n"]) -> Float[Tensor, "P n"]:
    """How often another response of the same prompt was better; ties count half.

        z_i = mean over j != i of [s_j > s_i] + [s_j = s_i] / 2

    It is an unbiased estimate of c, for the response and for every beginning of it.

    >>> restart_labels(torch.tensor([[1.0, 2.0, 2.0]]))
    tensor([[1.0000, 0.2500, 0.2500]])

    Args:
        score: of n responses to each prompt, all drawn from the policy that is to predict.

    Raises:
        ValueError: fewer than two responses.

    Source: "Adaptive Inference-Time Compute: LLMs Can Predict if They Can Do Better, Even Mid-Generation", 2024.
    """
    n = score.shape[1]
    if n < 2:
        raise ValueError(f"score must hold at least 2 responses to each prompt, not {n}")
    mine, other = score[:, :, None], score[:, None, :]
    beaten = (other > mine).to(score) + (other == mine).to(score) / 2
    return (beaten.sum(2) - 0.5) / (n - 1)  # every response ties with itself


def yes_no_logit(logits: Float[Tensor, "B V"], yes: int, no: int) -> Float[Tensor, "B"]:
    """log p(Yes) / p(No) after an evaluation prompt such as "would starting again give a better answer?"."""
    return logits[:, yes] - logits[:, no]


def restart_loss(logit: Float[Tensor, "B"], label: Float[Tensor, "B"]) -> Float[Tensor, ""]:
    """Cross-entropy of c = sigmoid(logit) with soft labels z, mean of log(1 + exp(logit)) - z logit.

    The logit is that of Yes against No (`yes_no_logit`), or of a head on the state after the text so far.
    """
    return (torch.nn.functional.softplus(logit) - label * logit).mean()


def calibration_error(c: Float[Tensor, "n"], label: Float[Tensor, "n"], bins: int = 10) -> float:
    """Expected calibration error: sum over equal bins of c of their share times |mean c - mean label|.

    >>> calibration_error(torch.tensor([0.2, 0.2, 0.9]), torch.tensor([0.0, 1.0, 1.0]))
    0.233...

    Raises:
        ValueError: no predictions, or fewer than one bin.
    """
    if not len(c) or bins < 1:
        raise ValueError(f"calibration needs predictions and at least one bin, not {len(c)} and {bins}")
    place = (c * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=c.device).index_add(0, place, (c - label).double())
    return float(gap.abs().sum() / len(c))


@dataclass(frozen=True, eq=False)
class PromptedRestart:
    """c = p(Yes) / (p(Yes) + p(No)) as the model answers an evaluation prompt after the text so far.

    Args:
        logits: of the token after the evaluation prompt, for each state; the evaluation is no part of the text.
        yes, no: tokens.
    """

    logits: Callable[[TokenChain, Prefix], Float[Tensor, "B V"]]
    yes: int
    no: int

    def __call__(self, chain: TokenChain, x: Prefix) -> Float[Tensor, "B"]:
        """See `Restart`."""
        return yes_no_logit(self.logits(chain, x), self.yes, self.no).sigmoid()


@dataclass(frozen=True, eq=False)
class LinearRestart:
    """c = sigmoid(w . features + b).

    Args:
        features: of states, such as the model's own states after the text so far, shape [B, D].
        weight: w.
        bias: b.
    """

    features: Callable[[TokenChain, Prefix], Float[Tensor, "B D"]]
    weight: Float[Tensor, "D"]
    bias: float

    def __call__(self, chain: TokenChain, x: Prefix) -> Float[Tensor, "B"]:
        """See `Restart`."""
        return (self.features(chain, x).to(self.weight) @ self.weight + self.bias).sigmoid()


def fit_restart(
    features: Float[Tensor, "n D"], label: Float[Tensor, "n"], ridge: float = 1e-3
) -> tuple[Float[Tensor, "D"], float]:
    """Weights and bias of a linear head: the minimum of `restart_loss` + ridge |w|^2 / 2, by Newton's method in fp64.

    Args:
        features: of responses and of beginnings of responses.
        label: `restart_labels` of what they became.
        ridge: keeps the weights finite where the labels can be told apart.

    Raises:
        ValueError: ridge not above 0.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, not {ridge}")
    inputs = torch.cat([features.double(), torch.ones_like(features[:, :1], dtype=torch.float64)], 1)
    penalty = torch.full_like(inputs[0], ridge)
    penalty[-1] = 1e-12  # the bias goes free
    label, w = label.double(), torch.zeros_like(inputs[0])

    def loss(w: Tensor) -> Tensor:
        return restart_loss(inputs @ w, label) + (penalty * w * w).sum() / 2

    for _ in range(NEWTON_STEPS):
        c = (inputs @ w).sigmoid()
        gradient = inputs.T @ (c - label) / len(label) + penalty * w
        curvature = (inputs * (c * (1 - c))[:, None]).T @ inputs / len(label) + penalty.diag()
        step = torch.linalg.solve(curvature, gradient)
        while bool(loss(w - step) > loss(w)) and float(step.abs().max()) > 1e-12:
            step = step / 2
        w = w - step
        if float(step.abs().max()) < 1e-12:
            break
    return w[:-1], float(w[-1])


@dataclass(frozen=True, eq=False)
class OracleRestart:
    """The exact c on a tabular chain: P(r' > r) + P(r' = r) / 2 at the end, its mean over what may follow before.

    Args:
        leaf: for every sequence, shape [Q, S].
        prefix: for every prefix, shape [Q, X].
    """

    leaf: Float[Tensor, "Q S"]
    prefix: Float[Tensor, "Q X"]

    @staticmethod
    def of(chain: TabularChain) -> "OracleRestart":
        """Of the chain's own prior and reward."""
        space, policy, reward = chain.space, chain.logits, chain.rewards
        prior = torch.stack([policy.log_prob(space.rows(q)) for q in range(space.prompts)]).detach().double().exp()
        mine, other = reward[:, :, None], reward[:, None, :]
        leaf = (((other > mine).double() + (other == mine).double() / 2) * prior[:, None]).sum(2)
        return OracleRestart(leaf, mean_value_table(policy, leaf))

    def __call__(self, chain: TokenChain, x: Prefix) -> Float[Tensor, "B"]:
        """See `Restart`."""
        assert isinstance(chain, TabularChain)
        row = chain.index[x.prompt]
        before = self.prefix[row, chain.prefix(x).clamp(max=self.prefix.shape[1] - 1)]
        return torch.where(x.done, self.leaf[row, chain.leaf(x)], before)


# -- sampling ---------------------------------------------------------------------------------------------------------


@part("adaptive_best_of_n", paper=200)
@dataclass(frozen=True)
class AdaptiveBestOf:
    """Draws one completion after another until a restart is unlikely to help; see the module.

    A prompt that has stopped draws nothing more. A constant prediction gives all N draws. The weights are a
    description, all on the pick. KL(output || p_0) <= log N, since the pick is one of N independent draws.

    Args:
        restart: predicts c of each draw.
        num_particles: N, draws at most.
        stop_below: tau; draws stop once some c is below it.
        doubling: batches of 1, 1, 2, 4, 8 ... draws, for latency, instead of single ones.
        prune_at: share of the horizon after which the draws of a batch are compared; 0 never prunes.
        prune_share: share of a batch that is then given up, those with the largest c.
        temperatures: of the first draw, the second, ...; the last one holds for all that follow. 0 is greedy.
        output: the smallest c ("self"), or the "best" reward. With "self" the reward of the pick alone is asked for,
            and that of the others is NaN.

    Raises:
        ValueError: a setting out of its range.

    Source: "Adaptive Inference-Time Compute: LLMs Can Predict if They Can Do Better, Even Mid-Generation", 2024.
    """

    restart: Restart
    num_particles: int = 16
    stop_below: float = 0.1
    doubling: bool = False
    prune_at: float = 0.0
    prune_share: float = 0.5
    temperatures: tuple[float, ...] = ()
    output: Literal["self", "best"] = "self"

    def __post_init__(self) -> None:
        positive(self, "num_particles")
        share(self, "stop_below", "prune_at", "prune_share")
        if self.prune_share == 1:
            raise ValueError("prune_share must be below 1: one draw at least goes on")
        if any(temperature < 0 for temperature in self.temperatures):
            raise ValueError(f"temperatures must be 0 or positive, not {self.temperatures}")
        if self.output not in ("self", "best"):
            raise ValueError(f"output must be 'self' or 'best', not '{self.output}'")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Draw for all prompts of a chain."""
        chain = by_token(chain, "adaptive_best_of_n")
        active = torch.ones(chain.prompts, dtype=torch.bool, device=chain.device)
        draws, drawn = torch.zeros_like(active, dtype=torch.long), 0
        parts: list[Prefix] = []
        predicted: list[Tensor] = []
        while drawn < self.num_particles and bool(active.any()):
            count = min(max(1, drawn), self.num_particles - drawn) if self.doubling else 1
            states, c = self._batch(chain, rng, f"draw {len(parts)}", active, self._heat(drawn, count))
            parts.append(states)
            predicted.append(c)
            drawn, draws = drawn + count, draws + active.long() * count
            active = active & (c.amin(1) >= self.stop_below)
        return self._result(chain, beside(parts, chain.prompts), torch.cat(predicted, 1), draws, rng)

    def _heat(self, drawn: int, count: int) -> Float[Tensor, "k"]:
        given = [*self.temperatures] or [1.0]
        return torch.tensor([given[min(i, len(given) - 1)] for i in range(drawn, drawn + count)])

    def _batch(
        self, chain: TokenChain, rng: Choice, name: str, active: Bool[Tensor, "P"], heat: Float[Tensor, "k"]
    ) -> tuple[Prefix, Float[Tensor, "P k"]]:
        """As many draws as temperatures of each active prompt, and c; inf of those that were pruned or not drawn."""
        shape = len(active), len(heat)
        slots = Slots(chain, active[:, None].expand(shape))
        tempered = None if bool((heat == 1).all()) else heat.to(active.device).repeat(shape[0])
        losers = int(self.prune_share * shape[1]) if self.prune_at > 0 else 0
        compare = math.ceil(self.prune_at * chain.horizon)
        t = 0
        while slots.busy:
            if losers and t == compare:
                slots.drop(self._worst(chain, slots, losers))
            slots.step(rng, name, tempered)
            t += 1
        states = slots.states()
        return states, predictions(self.restart, chain, states, active[:, None] & states.done.view(shape))

    def _worst(self, chain: TokenChain, slots: "Slots", losers: int) -> Bool[Tensor, "P k"]:
        """The running draws of each prompt with the largest c."""
        running = slots.running
        found = torch.full_like(running, -math.inf, dtype=torch.float64).flatten()
        c = self.restart(chain, slots.x).double()
        chain.meter.add("scored", running.flatten())
        found[slots.slot] = torch.where(slots.x.done, -math.inf, c)
        rank = found.view(running.shape).argsort(stable=True, dim=1, descending=True).argsort(1)
        return running & (rank < losers)

    def _result(
        self, chain: TokenChain, states: Prefix, c: Float[Tensor, "P N"], draws: Int[Tensor, "P"], rng: Choice
    ) -> Particles:
        drawn, place = c < math.inf, torch.arange(c.shape[1], device=c.device)
        asked = place == best(-c, rng)[:, None] if self.output == "self" else drawn
        reward = chain.reward(states, asked.flatten()).view(c.shape)
        pick = asked.int().argmax(1) if self.output == "self" else best(reward, rng, drawn)
        none = torch.full_like(c[:, 0], math.nan)
        return Particles(
            states=states,
            log_w=(place == pick[:, None]).double().log(),
            reward=reward.masked_fill(~asked, math.nan),
            pick=pick,
            log_z=none,
            log_z_error=none,
            kl=none if self.temperatures else torch.full_like(none, math.log(self.num_particles)),
            meter=chain.meter,
            kl_is_bound=True,
            details={
                "draws": draws.double(),
                "pruned": draws.double() - drawn.double().sum(1),
                "restart": c.gather(1, pick[:, None])[:, 0],
            },
        )


def predictions(
    restart: Restart, chain: TokenChain, states: Prefix, where: Bool[Tensor, "P k"]
) -> Float[Tensor, "P k"]:
    """c of the states that are asked for, inf of the others; one token each on the meter.

    Raises:
        ValueError: a prediction outside [0, 1].
    """
    index = where.flatten().nonzero(as_tuple=True)[0]
    c = restart(chain, Prefix(*(getattr(states, name)[index] for name in FIELDS))).double()
    if not bool(((c >= 0) & (c <= 1)).all()):
        raise ValueError("restart must predict probabilities, in [0, 1]")
    chain.meter.add("scored", where.flatten())
    return torch.full_like(where, math.inf, dtype=torch.float64).flatten().index_copy(0, index, c).view(where.shape)


def beside(parts: list[Prefix], prompts: int) -> Prefix:
    """Several batches of finished work as one, those of a prompt together."""
    columns = {name: [getattr(part, name) for part in parts] for name in FIELDS}
    grids = {name: torch.cat([c.view(prompts, -1, *c.shape[1:]) for c in found], 1) for name, found in columns.items()}
    return Prefix(**{name: grid.flatten(0, 1) for name, grid in grids.items()})


class Slots:
    """Places for k samples of each prompt, of which only those that are being written cost anything.

    Args:
        chain: writes them.
        used: places that start with the prompt; the others stay empty, shape [P, k].

    Attributes:
        x: the states at work, in any number.
        slot: the place of each among all P k, shape [n].
    """

    def __init__(self, chain: TokenChain, used: Bool[Tensor, "P k"]):
        self.chain, self.shape = chain, used.shape
        start = chain.init(used.shape[1])
        self.kept = replace(start, memory=None)
        self.slot = used.flatten().nonzero(as_tuple=True)[0]
        self.x = start if bool(used.all()) else chain.select(start, self.slot)

    @property
    def busy(self) -> bool:
        """Whether anything is still being written."""
        return not bool(self.x.done.all())

    @property
    def running(self) -> Bool[Tensor, "P k"]:
        """Places that are still being written."""
        return self._spread(~self.x.done)

    @property
    def finished(self) -> Bool[Tensor, "P k"]:
        """Places whose sample is finished."""
        return self.kept.done.view(self.shape) | self._spread(self.x.done)

    def states(self) -> Prefix:
        """What stands in every place, without memory; unfinished where nothing was written to its end."""
        for name in FIELDS:
            now = getattr(self.kept, name).index_copy(0, self.slot, getattr(self.x, name))
            self.kept = replace(self.kept, **{name: now})
        return self.kept

    def step(self, rng: Choice, name: str, heat: Float[Tensor, "Pk"] | None = None, mask=None) -> None:
        """Write one more token everywhere.

        Args:
            rng: draws it.
            name: of the request.
            heat: temperature of each place, 0 greedy; 1 without it.
            mask: from log-probabilities to those that are drawn from, such as without reserved tokens.
        """
        chain, x = self.chain, self.x
        log_p = chain.log_probs(x)
        log_q = log_p if mask is None else torch.where(x.done[:, None], log_p, mask(log_p))
        log_q = log_q if heat is None else _tempered(log_q, heat[self.slot])
        grid = log_q.new_full((math.prod(self.shape), log_q.shape[1]), -math.inf)
        grid[:, chain.pad] = 0.0  # nothing to decide in the other places
        grid[self.slot] = log_q
        action = rng.categorical(grid.view(*self.shape, -1), name).flatten()[self.slot]
        chain.meter.add("generated", self.running.flatten())
        self.x = chain.extend(x, action)

    def drop(self, gone: Bool[Tensor, "P k"]) -> None:
        """Stop writing in these places."""
        own = torch.arange(self.shape[1], device=gone.device).expand(self.shape)
        self.rearrange(own, self.running & ~gone)

    def rearrange(self, source: Int[Tensor, "P k"], running: Bool[Tensor, "P k"]) -> None:
        """Go on in the places `running`, in each with what is being written at `source`."""
        self.states()
        first = torch.arange(self.shape[0], device=source.device)[:, None] * self.shape[1]
        where = torch.full((running.numel(),), -1, device=source.device)
        where[self.slot] = torch.arange(len(self.slot), device=source.device)
        target = running.flatten().nonzero(as_tuple=True)[0]
        index = where[(first + source).flatten()[target]]
        self.x, self.slot = self.chain.select(self.x, index), target

    def _spread(self, flag: Bool[Tensor, "n"]) -> Bool[Tensor, "P k"]:
        everywhere = torch.zeros(math.prod(self.shape), dtype=torch.bool, device=flag.device)
        return everywhere.index_copy(0, self.slot, flag).view(self.shape)


def _tempered(log_p: Float[Tensor, "n V"], heat: Float[Tensor, "n"]) -> Float[Tensor, "n V"]:
    greedy = torch.full_like(log_p, -math.inf).scatter(1, log_p.argmax(1, keepdim=True), 0.0)
    warm = log_p / heat.clamp(min=1e-6).to(log_p)[:, None]
    return torch.where((heat == 0)[:, None], greedy, warm)
