"""The samplers by name, with what each needs and does in one line."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from keel.core.config import build, set_path
from keel.core.errors import ConfigError, nearest
from keel.core.registry import part_name
from keel.sampling.adaptive import AdaptiveBestOf
from keel.sampling.beam import BeamSearch
from keel.sampling.best_of import BestOf, SoftBestOf
from keel.sampling.contrast import Guidance, UncertaintyContrast
from keel.sampling.decode import Decode, ValueAugmented
from keel.sampling.entropic import EntropicParticleFilter
from keel.sampling.fusion import DynamicFusion
from keel.sampling.gibbs import ParticleGibbs
from keel.sampling.introspection import Introspective
from keel.sampling.kernels import Twisted
from keel.sampling.particle_filter import ParticleFilter
from keel.sampling.rejection import QuasiRejection, Rejection
from keel.sampling.smc import SMC
from keel.sampling.soft_value import SoftValueDecoding
from keel.sampling.tree import TreeSampling

Needs = Literal["", "value", "restart", "joint", "models"]
Group = Literal["particles", "picks"]


@dataclass(frozen=True)
class Entry:
    """A sampler that can be asked for by name.

    Args:
        make: its class, or a function that composes it.
        says: what it does, in a line.
        law: what its output is distributed as.
        needs: what it needs beside a reward: a value of unfinished texts (it runs without one, to less effect), a
            learnt prediction, or further models.
        paper: in the catalogue of papers.
        knob: the setting that makes its budget.
        group: what the rows of a group are in training: the weighted particles of one run, so that N is the size of the
            group, or the picks of as many runs, each with an N of its own.
        tilts: whether its weighted particles stand for the tilt; some settings take that back (see `tilt_of`).
    """

    make: Callable[..., Any]
    says: str
    law: str
    needs: Needs = ""
    paper: int | None = None
    knob: str = "num_particles"
    group: Group = "particles"
    tilts: bool = False


def twisted_smc(k: int | None = 8, **options: Any) -> SMC:
    """SMC whose tokens are proposed by the value of what follows them."""
    return SMC(kernel=Twisted(k), **options)


def dts_search(**options: Any) -> TreeSampling:
    """The limit of diffusion tree sampling at beta 0: upper confidence bounds and the best leaf."""
    return TreeSampling(mode="search", **options)


def dynamic_logit_fusion(
    base: str = "small", experts: tuple[str, ...] = ("expert",), coefficient: float | None = None, **options: Any
) -> Decode:
    """Decoding from the large model's logits plus what the experts changed in the small one."""
    return Decode(kernel=DynamicFusion(base, tuple(experts), coefficient), **options)


def uscd(other: str = "lame", eta: float = 0.5, threshold: float = 0.3, gate: Any = "std", **options: Any) -> Decode:
    """Decoding that contrasts with a worse prompt where the model is uncertain."""
    return Decode(kernel=UncertaintyContrast(other=other, eta=eta, threshold=threshold, gate=gate), **options)


def cfg(other: str = "unconditional", gamma: float = 1.5, **options: Any) -> Decode:
    """Decoding with classifier-free guidance."""
    return Decode(kernel=Guidance(other, gamma), **options)


TILT = "the tilt"
SAMPLERS: dict[str, Entry] = {  # keel.rollouts.samplers adds those that need a generator
    "best_of_n": Entry(BestOf, "the best of N completions", "best of N; blind to beta", group="picks"),
    "soft_best_of_n": Entry(SoftBestOf, "one of N completions by softmax(r / beta)", f"{TILT} as N grows", tilts=True),
    "rejection": Entry(
        Rejection,
        "completions until one is accepted; needs a bound on the reward",
        f"{TILT}, exactly",
        group="picks",
        tilts=True,
    ),
    "quasi_rejection": Entry(
        QuasiRejection,
        "rejection with a ceiling on the weight, and its distance",
        f"{TILT} with its peaks cut off",
        group="picks",
    ),
    "smc": Entry(SMC, "N partial texts, weighted and resampled", f"{TILT} as N grows", "value", 205, tilts=True),
    "twisted_smc": Entry(
        twisted_smc,
        "SMC that proposes tokens by the value",
        f"{TILT} as N grows; at once if exact",
        "value",
        tilts=True,
    ),
    "particle_filter": Entry(
        ParticleFilter,
        "SMC that weighs the full score at every step",
        "the product of the scores",
        "value",
        205,
        tilts=True,
    ),
    "entropic_particle_filter": Entry(
        EntropicParticleFilter,
        "a particle filter that resamples gently at first",
        "the same, flattened",
        "value",
        91,
        tilts=True,
    ),
    "particle_gibbs": Entry(
        ParticleGibbs,
        "sweeps of SMC, each keeping the path of the last",
        f"{TILT} as sweeps go on",
        "value",
        205,
        tilts=True,
    ),
    "soft_value_decoding": Entry(
        SoftValueDecoding,
        "M candidates a step, one kept by value",
        f"{TILT} for exact values, M large",
        "value",
        211,
        "num_candidates",
    ),
    "value_augmented": Entry(
        ValueAugmented,
        "the k likeliest tokens reweighted by value",
        f"{TILT} for exact values, all k",
        "value",
        201,
        tilts=True,
    ),
    "tree_sampling": Entry(
        TreeSampling, "a tree of texts with soft backups", f"{TILT} as rollouts grow", "", 182, "rollouts", tilts=True
    ),
    "tree_search": Entry(
        dts_search,
        "the same with upper confidence bounds",
        "none: the best leaf found",
        "",
        182,
        "rollouts",
        group="picks",
    ),
    "beam_search": Entry(BeamSearch, "the N best beginnings of each step", "none: a search", "value", group="picks"),
    "adaptive_best_of_n": Entry(
        AdaptiveBestOf,
        "completions until a better one is unlikely",
        "best of fewer than N",
        "restart",
        200,
        group="picks",
    ),
    "introspection": Entry(
        Introspective,
        "texts branched, pruned and stopped by utility",
        "none: a search",
        "joint",
        186,
        group="picks",
    ),
    "decode": Entry(Decode, "N plain completions", "the policy", tilts=True),
    "dynamic_logit_fusion": Entry(
        dynamic_logit_fusion, "a small expert's change added to a large model", "the fused policy", "models", 24
    ),
    "uscd": Entry(uscd, "contrast with a worse prompt where uncertain", "the contrasted policy", "models", 40),
    "cfg": Entry(cfg, "classifier-free guidance", "the guided policy", "models"),
}


def sampler(name: str, options: Mapping[str, Any]) -> Any:
    """A sampler by name, with options by their (dotted) names; those that it does not have are named in the error.

    >>> sampler("smc", {"num_particles": 4}).num_particles
    4

    Raises:
        ConfigError: an unknown sampler or option, or a value that does not fit.
    """
    entry = entry_named(name)
    plain = {key: value for key, value in options.items() if "." not in key}
    dotted = {key: value for key, value in options.items() if "." in key}
    if dataclasses.is_dataclass(entry.make):
        made = build(entry.make, plain, name)  # type: ignore[arg-type]
    else:
        try:
            made = entry.make(**plain)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error).replace("__init__()", name), name) from error
    for key, value in dotted.items():
        made = set_path(made, key, value, name)
    return made


def entry_named(name: str) -> Entry:
    """The entry of a sampler.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in SAMPLERS:
        raise ConfigError(
            f"there is no sampler '{name}'.{nearest(name, SAMPLERS)}", "method", f"One of {', '.join(SAMPLERS)}."
        )
    return SAMPLERS[name]


def entry_of(made: Any) -> Entry:
    """The entry of a sampler that is made: of a kernel among the catalogue's, that of the sampler made with it.

    >>> entry_of(TreeSampling(mode="search")) == SAMPLERS["tree_search"]
    True

    Raises:
        ConfigError: it is none of the catalogue.
    """
    kernel = part_name(type(getattr(made, "kernel", None))) or ""
    name = kernel if kernel in SAMPLERS else part_name(type(made)) or ""
    if name == "tree_sampling" and made.mode == "search":
        name = "tree_search"
    if name not in SAMPLERS:
        raise ConfigError(
            f"{type(made).__name__} is no sampler of the catalogue", None, f"One of {', '.join(SAMPLERS)}."
        )
    return SAMPLERS[name]


def tilt_of(made: Any) -> float | None:
    """How sharply the weighted particles of a sampler are tilted, 1 / beta: 0 for the policy, None for another law.

    >>> [tilt_of(sampler(name, {})) for name in ("smc", "decode", "particle_filter", "best_of_n")]
    [10.0, 0.0, None, None]
    """
    settings = {"weight": "ratio", "correct": True, "reweight": True}  # those that the tilt needs, where there is one
    wrong = [name for name, value in settings.items() if getattr(made, name, value) != value]
    if wrong == ["reweight"] and getattr(made, "kernel", made) is None:
        return 0.0
    return None if wrong or not entry_of(made).tilts else 1 / made.beta


def accepts(name: str, option: str) -> bool:
    """Whether a sampler has a setting of this name, or one that a dotted name begins with."""
    return option.partition(".")[0] in settings_of(name)


def settings_of(name: str) -> tuple[str, ...]:
    """The settings of a sampler."""
    make = entry_named(name).make
    if dataclasses.is_dataclass(make):
        return tuple(f.name for f in dataclasses.fields(make))
    of_function = [name for name in inspect.signature(make).parameters if name != "options"]
    return tuple(dict.fromkeys([*of_function, *(f.name for f in dataclasses.fields(make()))]))
