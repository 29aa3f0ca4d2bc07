"""Models by name: frozen, moving and adapted copies of the policy, and pretrained ones."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keel.core.choice import counter_seed
from keel.core.errors import UserError
from keel.core.policy import PolicyModel
from keel.core.registry import part
from keel.core.rows import Rows
from keel.models.adapters import AdapterView
from keel.models.language import LanguageModel
from keel.models.load import frozen_copy, load, reference
from keel.models.view import ModelView


@part("initial")
@dataclass(frozen=True)
class Initial:
    """The policy as it was before training; with LoRA the adapter-free base."""


@part("pretrained")
@dataclass(frozen=True)
class Pretrained:
    """Another model with the policy's vocabulary.

    Args:
        path: folder or hub name.
        dtype: of its weights.
    """

    path: str
    dtype: str = "float32"


@part("snapshot")
@dataclass(frozen=True)
class Snapshot:
    """The policy as it was at the last step that `every` divides, or leaves `offset` of; before the first, the initial.

    Raises:
        ValueError: `every` below 1, or an offset outside [0, every).
    """

    every: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")
        if not 0 <= self.offset < self.every:
            raise ValueError(f"offset must be in [0, {self.every}), not {self.offset}")


@part("ema")
@dataclass(frozen=True)
class EMA:
    """theta_ema <- kappa theta_ema + (1 - kappa) theta, after each step that `every` divides.

    Raises:
        ValueError: kappa outside [0, 1), or `every` below 1.
    """

    kappa: float = 0.99
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.kappa < 1:
            raise ValueError(f"kappa must be in [0, 1), not {self.kappa}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")


@part("adapter")
@dataclass(frozen=True)
class Adapter:
    """The policy's base with another of its adapters."""

    name: str


@part("soup", paper=2)
@dataclass(frozen=True)
class Soup:
    """theta = sum_i w_i theta_i, the average of the weights of models that share an architecture.

    Summed in fp32 and rounded once. Tied weights are averaged once, integer buffers are those of the first model. Where
    logits are linear in the weights it is the normalised geometric mean of the models.

    Args:
        paths: folders or hub names; "initial" is the policy as it was before training.
        weights: one for each path, together 1; None gives all the same.

    Raises:
        ValueError: no paths, another number of weights, or weights whose sum is not 1.

    Source: "SALSA: Soup-based Alignment Learning for Stronger Adaptation in RLHF", 2024.
    """

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("a soup needs at least one model")
        if self.weights is None:
            object.__setattr__(self, "weights", (1 / len(self.paths),) * len(self.paths))
        if len(self.shares) != len(self.paths) or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"a soup of {len(self.paths)} models needs as many weights with sum 1, not {self.weights}")

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights."""
        return self.weights or ()


@part("random_initial", paper=155)
@dataclass(frozen=True)
class RandomInitial:
    """A frozen model of the policy's architecture with freshly drawn weights: a teacher that knows nothing.

        ((1 - share) theta_0 + share theta') / sqrt((1 - share)^2 + share^2)

    of the policy's first weights and the drawn ones: near the policy for a small share, which the divisor keeps at the
    scale of an initialisation where theta_0 is one. At share 0 it is the policy as it was, from which nothing is to be
    learnt. Norms, whose initial weights are constants, are left out of the mixing and are those of theta'.

    Args:
        seed: of the drawn weights.
        share: of them.

    Raises:
        ValueError: a share outside [0, 1].

    Source: "Random Teachers are Good Teachers", 2023, which moves the student instead, to the same distance.
    """

    seed: int = 0
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], not {self.share}")


INITIAL = "initial"
Frozen = Initial | Pretrained | Soup
FROZEN = (Initial, Pretrained, Soup)
Source = Initial | Pretrained | Snapshot | EMA | Adapter | Soup | RandomInitial


@runtime_checkable
class View(Protocol):
    """A source that shows a frozen model in another way."""

    @property
    def of(self) -> Frozen:
        """The frozen model."""
        ...

    def view(self, model: PolicyModel) -> PolicyModel:
        """What it shows of it."""
        ...


class SourceModel(ModelView):
    """A policy model that follows its source.

    Args:
        source: what it is.
        model: what it gives now.
        policy: what it follows.
    """

    def __init__(self, source: Source | View, model: PolicyModel, policy: PolicyModel):
        super().__init__(model)
        self.source, self.policy = source, policy
        # averages in fp32: in bf16 a small step is lost to rounding
        narrow = {n: p for n, p in self._own().items() if p.dtype != torch.float32} if isinstance(source, EMA) else {}
        self._wide = {name: parameter.float() for name, parameter in narrow.items()}

    @property
    def moving(self) -> bool:
        """Whether it changes during training, so that a checkpoint must hold it."""
        return isinstance(self.source, (Snapshot, EMA))

    @torch.no_grad()
    def hidden(self, rows: Rows) -> Float[Tensor, "B T D"]:
        """States without gradient."""
        return self.model.hidden(rows)

    @torch.no_grad()
    def update(self, step: int) -> bool:
        """Follow the policy after step `step` (counted from 1); True if anything changed."""
        if isinstance(self.source, (Snapshot, EMA)) and step % self.source.every != getattr(self.source, "offset", 0):
            return False
        if isinstance(self.source, Snapshot):
            for own, live in self._pairs():
                own.copy_(live)
            return True
        if isinstance(self.source, EMA):
            for name, own in self._own().items():
                wide = self._wide.get(name, own)
                wide.lerp_(self._live()[name].to(wide.dtype), 1 - self.source.kappa)
                if wide is not own:
                    own.copy_(wide)
            return True
        return False

    @torch.no_grad()
    def lend(self) -> None:
        """Give the policy the weights of this model, of those that are trained."""
        for own, live in self._pairs():
            live.copy_(own)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of it; empty if it does not move."""
        return {**self._own(), **self._wide} if self.moving else {}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, own in (self._own() if self.moving else {}).items():
            own.copy_(tensors[name])
            if name in self._wide:
                self._wide[name].copy_(tensors[name])

    def _own(self) -> dict[str, Tensor]:
        """Its own parameters that follow trained ones of the policy."""
        live = self._live()
        return {name: p.data for name, p in self.model.module.named_parameters() if name in live}

    def _live(self) -> dict[str, Tensor]:
        return {name: p.data for name, p in self.policy.module.named_parameters() if p.requires_grad}

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        live = self._live()
        return [(own, live[name]) for name, own in self._own().items()]


def build_all(
    sources: Mapping[str, Source | View], policy: PolicyModel, initial: PolicyModel | None = None
) -> dict[str, SourceModel]:
    """The models of several names; equal sources that do not move are one model. The arguments are those of `build`."""
    known: list[SourceModel] = []

    def found(source: Source | View) -> SourceModel:
        for built in known:
            if built.source == source and not built.moving:
                return built
        if isinstance(source, View):
            built = SourceModel(source, source.view(found(source.of).model), policy)
        else:
            built = build(source, policy, initial)
        known.append(built)
        return built

    return {name: found(source) for name, source in sources.items()}


def build(source: Source | View, policy: PolicyModel, initial: PolicyModel | None = None) -> SourceModel:
    """The model of a source.

    Args:
        source: what to build.
        policy: the live one.
        initial: the policy before training, where `policy` is past that (a resumed run); it is kept, not copied.

    Raises:
        UserError: the source does not fit the policy (vocabulary, adapters).
    """
    if isinstance(source, View):
        return SourceModel(source, source.view(build(source.of, policy, initial).model), policy)
    if isinstance(source, Initial):
        return SourceModel(source, initial if initial is not None else reference(policy), policy)
    if isinstance(source, (Snapshot, EMA)):
        return SourceModel(source, frozen_copy(policy), policy)
    if not isinstance(policy, LanguageModel):
        raise UserError(f"{type(source).__name__} needs a language model", "models")
    if isinstance(source, Adapter):
        return SourceModel(source, AdapterView(policy, source.name), policy)
    if isinstance(source, RandomInitial):
        return SourceModel(source, _random(source, policy, initial), policy)
    if isinstance(source, Soup):
        return SourceModel(source, _soup(source, policy, initial), policy)
    return SourceModel(source, _pretrained(source, policy), policy)


def _pretrained(source: Pretrained, policy: LanguageModel) -> PolicyModel:
    model = load(source.path, dtype=source.dtype, device=policy.device)
    _check_same_vocabulary(model, policy, source.path)
    model.module.requires_grad_(False)
    return model


@torch.no_grad()
def _random(source: RandomInitial, policy: LanguageModel, initial: PolicyModel | None) -> PolicyModel:
    """Weights drawn as the architecture draws them, mixed with the policy's first ones."""
    first = policy if initial is None else initial
    assert isinstance(first, LanguageModel)
    if policy.adapted:
        what = "with an adapter the policy's first weights are those of its base, which is not copied"
        raise UserError(what, "models.teacher", "Train without LoRA to distil from a random teacher.")
    model = frozen_copy(first)
    assert isinstance(model, LanguageModel)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(counter_seed(source.seed, "random_initial"))
        drawn = dict(type(model.transformer)(copy.deepcopy(model.transformer.config)).named_parameters())
    scale = ((1 - source.share) ** 2 + source.share**2) ** 0.5
    for name, own in model.transformer.named_parameters():
        new = drawn[name].to(own)
        constant = bool((new == new.flatten()[0]).all())  # norms and biases
        own.copy_(new if constant and source.share else own.lerp(new, source.share) / scale)
    return model


def _soup(source: Soup, policy: LanguageModel, initial: PolicyModel | None) -> PolicyModel:
    """A frozen model whose weights are the average of those that the source names, which are loaded one by one."""
    first = policy if initial is None else initial
    assert isinstance(first, LanguageModel)
    if policy.adapted and INITIAL in source.paths:
        what = "with an adapter the initial policy is its base and has no weights of its own to average"
        raise UserError(what, "models.ref.paths", "Name the folder of the base in place of 'initial'.")
    bowl = load(source.paths[0], device=policy.device) if policy.adapted else frozen_copy(first)
    _check_same_vocabulary(bowl, policy, source.paths[0])

    def ingredients() -> Iterator[tuple[str, nn.Module]]:
        for path in source.paths:
            model = first if path == INITIAL else load(path, device=policy.device)
            assert isinstance(model, LanguageModel)
            if model.adapted:
                what = "it is an adapter: the average of the factors A and B is not the average of their products"
                raise UserError(what, path, "Merge it into its base first (`keel export`).")
            _check_same_vocabulary(model, policy, path)
            yield path, model.module

    average(bowl.module, ingredients(), source.shares)
    bowl.module.requires_grad_(False)
    return bowl


@torch.no_grad()
def average(bowl: nn.Module, parts: Iterable[tuple[str, nn.Module]], weights: Sequence[float]) -> None:
    """Fill a module with the weighted average of others of its architecture.

    Args:
        bowl: what is filled, in its own dtype; none of the parts.
        parts: names, for messages, and modules.
        weights: one for each part.

    Raises:
        UserError: a part lacks a tensor of the bowl, has one more, or one of another shape.
    """
    wanted = _averaged(bowl)
    total = {name: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for name, t in wanted.items()}
    for (path, module), weight in zip(parts, weights, strict=True):
        found = _averaged(module)
        _check_same_tensors(wanted, found, path)
        for name, tensor in found.items():
            total[name] += weight * tensor.to(total[name])
    for name, tensor in wanted.items():
        tensor.copy_(total[name])


def _averaged(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the floating buffers that a file holds."""
    kept = set(module.state_dict())
    buffers = {n: b for n, b in module.named_buffers() if n in kept and b.is_floating_point()}
    return {name: p.data for name, p in module.named_parameters()} | buffers


def _check_same_tensors(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], path: str) -> None:
    for name in [*wanted, *found]:
        if name not in found or name not in wanted:
            how = "lacks" if name not in found else "alone has"
            raise UserError(f"it {how} the weight '{name}'", path, "A soup is of models of one architecture.")
        if wanted[name].shape != found[name].shape:
            shapes = f"{tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
            raise UserError(f"its weight '{name}' has shape {shapes}", path, "A soup is of models of one architecture.")


def _check_same_vocabulary(model: Any, policy: LanguageModel, path: str) -> None:
    same = model.vocabulary_size == policy.vocabulary_size
    if not same or model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(
            f"its vocabulary ({model.vocabulary_size} tokens) is not the policy's ({policy.vocabulary_size})",
            path,
            "Token by token comparisons need one tokenizer: choose a model of the same family.",
        )
