"""Samplers that need a whole generator, registered beside those of `keel.sampling.catalogue`.

Both are blind to beta, and draw from another law than the policy's, which `kl` measures: x ~ q costs
E_q[log q - log p_0] nats, with log p_0 read again over what was written.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from keel.core.chain import Chain, Prefix
from keel.core.chance import Choice
from keel.core.errors import UserError
from keel.core.registry import part
from keel.core.rows import Rows
from keel.rollouts.chain import LocalChain
from keel.rollouts.refine import BestDrafts, ParallelDistilRefine, RandomDrafts, Template
from keel.rollouts.sampling import Sampling
from keel.rollouts.value_cache import EntropyTuned, ValueTuning
from keel.sampling.catalogue import SAMPLERS, Entry
from keel.sampling.particles import Particles
from keel.sampling.settings import positive
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb

PROMPT, DRAFTS = "{prompt}", "{drafts}"
MAX_TOKENS = 16384  # read at once
LAYOUT = f"{PROMPT}\n\nDrafts:\n\n{DRAFTS}\n\nFinal answer:\n\n"


@part("v_reason", paper=45)
@dataclass(frozen=True)
class VReason:
    """N independent completions while the entropy is steered through the cached values; see `value_cache`.

    The weights are equal and the first is the output; log-probabilities are the policy's, and `kl` is the mean of
    log q - log p_0, q the steered distribution: unbiased for KL(q || p_0).

    Args:
        num_particles: N.
        tuning: how the values are tuned.

    Raises:
        ValueError: N below 1.
        UserError: when called, a chain that is no local model's, or one whose last layer cannot be run by itself.

    Source: "Video Reasoning without Training", 2025.
    """

    num_particles: int = 1
    tuning: ValueTuning = ValueTuning()

    def __post_init__(self) -> None:
        positive(self, "num_particles")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Draw for all prompts of a chain."""
        main = getattr(chain, "main", chain)
        if not isinstance(main, LocalChain):
            raise UserError(
                "tunes the caches of a model that runs here, token by token", "v_reason", "Leave server and step out."
            )
        tuned = EntropyTuned(main.model, self.tuning)
        steered = LocalChain(tuned, main.texts, main.sampling, data_index=main.data_index)
        x = steered.complete(steered.init(1), self.num_particles, rng)
        chain.meter.add("generated", x.length)
        return _equal(main, x, self.num_particles)


@part("parallel_distil_refine", paper=215)
@dataclass(frozen=True)
class DistilRefine:
    """One answer after rounds of drafts, the best (or random) k of which the next round reads; see `refine`.

    The only particle is the answer. Its log-probability is the policy's given the plain prompt, which makes `kl`, the
    mean of log p(answer | prompt, drafts) - log p(answer | prompt), a bound on KL(output || p_0) from above. On servers
    and on chains by steps it is that given the drafts, and there is no `kl`.

    Args:
        num_particles: drafts of every round but the last, which writes one answer.
        rounds: the last one included; 1 is a plain completion.
        keep: k, drafts in a workspace.
        choose: "best" takes those of the highest reward, "random" others for each draft that follows.
        room: tokens of a workspace at most.
        template: what a draft is given, from the second round on. The prompt stands first, {drafts} behind it.

    Raises:
        ValueError: a setting out of its range, or a template without both places in this order.

    Source: "Rethinking Thinking Tokens: LLMs as Improvement Operators", 2025.
    """

    num_particles: int = 8
    rounds: int = 2
    keep: int = 1
    choose: Literal["best", "random"] = "best"
    room: int = 1024
    template: str = LAYOUT

    def __post_init__(self) -> None:
        positive(self, "num_particles", "rounds", "keep", "room")
        if self.choose not in ("best", "random"):
            raise ValueError(f"choose must be best or random, not '{self.choose}'")
        if not self.template.startswith(PROMPT) or self.template.count(DRAFTS) != 1 or self.template.count(PROMPT) != 1:
            raise ValueError(f"template must begin with {PROMPT} and hold {DRAFTS} once, not {self.template!r}")

    def __call__(self, chain: Chain, rng: Choice) -> Particles:
        """Refine answers for all prompts of a chain."""
        main: Any = getattr(chain, "main", chain)
        before, after = self.template.removeprefix(PROMPT).split(DRAFTS)
        layout = Template(_tokens(main, before), (), _tokens(main, after))
        between = Template(between=_tokens(main, "\n\n"))
        score = lambda rows: chain.reward(_prefix(rows, chain.horizon, main.pad))  # noqa: E731
        distil = BestDrafts(score, self.keep, between) if self.choose == "best" else RandomDrafts(self.keep, between)
        counts = (*[self.num_particles] * (self.rounds - 1), 1)
        refine = ParallelDistilRefine(distil, counts, self.room, layout)
        found = refine(Counted(main), main.texts, main.sampling, seed=rng.seed("refine"), data_index=main.data_index)
        details = {name: getattr(found, name).double() for name in ("sequential", "total", "context")}
        return _equal(main, _prefix(found.rows, chain.horizon, main.pad), 1, details, is_bound=True)


class Counted:
    """The generator of a chain, on whose meter it counts: tokens written, and prompts read again after the first call.

    Args:
        chain: by tokens or by steps.
    """

    def __init__(self, chain: Any):
        self.chain, self.again = chain, False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int = 0,
        data_index: Sequence[int] | None = None,
    ) -> Rows:
        """See `Generator`; the prompts are as many of each prompt of the chain, those of one together."""
        known: dict[str, Any] = {"seed": seed, "step": step, "data_index": data_index}
        rows = self.chain.generator.generate(prompts, num_generations, sampling, **known)
        self.chain.meter.add("generated", rows.lengths)
        if self.again:
            self.chain.meter.add("read", torch.tensor([len(prompt) for prompt in prompts]))
        self.again = True
        return rows


def _prefix(rows: Rows, horizon: int, pad: int) -> Prefix:
    """Rows as finished states."""
    extra = horizon - rows.tokens.shape[1]
    tokens = F.pad(rows.tokens.masked_fill(~rows.mask, pad), (0, extra), value=pad)
    return Prefix(tokens, F.pad(rows.logp["behaviour"], (0, extra)), rows.lengths, rows.stop, rows.group)


def _equal(
    chain: Any, x: Prefix, count: int, details: dict[str, Float[Tensor, "P"]] | None = None, is_bound: bool = False
) -> Particles:
    """Finished states of equal weight, drawn with the log-probabilities that they carry."""
    reward = chain.reward(x).view(-1, count)
    none = torch.full_like(reward[:, 0], math.nan)
    kl = none
    if isinstance(chain, LocalChain):
        logp = _log_prob(chain, x)
        kl = (x.logp.double() - logp.double()).sum(1).view(-1, count).mean(1)
        x = Prefix(x.tokens, logp, x.length, x.stop, x.prompt)
    return Particles(
        states=x,
        log_w=torch.full_like(reward, -math.log(count)),
        reward=reward,
        pick=torch.zeros_like(none, dtype=torch.long),
        log_z=none,
        log_z_error=none,
        kl=kl,
        meter=chain.meter,
        kl_is_bound=is_bound,
        details={name: value.to(none) for name, value in (details or {}).items()},
    )


def _log_prob(chain: LocalChain, x: Prefix) -> Float[Tensor, "B T"]:
    """log p_0 of what was written, 0 after the end."""
    wanted = LogProb(transform=chain.sampling.filter)
    engine = Engine({"policy": chain.model}, temperature=chain.sampling.temperature, max_tokens=MAX_TOKENS)
    rows = chain.rows(x)
    found = engine.measure((wanted,), rows)[wanted].masked_fill(~rows.mask, 0.0)
    return F.pad(found, (0, x.tokens.shape[1] - found.shape[1]))


def _tokens(chain: Any, text: str) -> tuple[int, ...]:
    known = getattr(chain.generator, "vocabulary", None) or chain.generator.model
    return tuple(known.tokenizer(text, add_special_tokens=False).input_ids) if text else ()


SAMPLERS |= {
    "v_reason": Entry(
        VReason,
        "N completions whose entropy is steered through the cache",
        "the steered policy; blind to the reward",
        paper=45,
    ),
    "parallel_distil_refine": Entry(
        DistilRefine,
        "rounds of drafts, each reading the best of the last",
        "none: an answer made of drafts",
        paper=215,
        group="picks",
    ),
}
