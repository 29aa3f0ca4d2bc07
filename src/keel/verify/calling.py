"""A user's loss function: found in its file, called by the names of its arguments.

    def loss(log_prob, old_log_prob, ref_log_prob, advantages, mask, beta=0.1): ...     -> scalar to be minimised

Log-probabilities, entropies and masks are [B, T]; rewards are [B]; logits are [B, T, V]; advantages are [B] or [B, T],
as the function takes them. Everything is double precision, and single where a function refuses that.
"""

import importlib
import importlib.util
import inspect
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from keel.core.errors import UserError, nearest
from keel.verify.batches import Batch

Shape = Literal["row", "token"]
ALIASES: dict[str, tuple[str, ...]] = {
    "log_prob": (
        *("log_probs", "logp", "logps", "logprob", "logprobs", "per_token_logps"),
        *("policy_log_prob", "new_log_prob"),
    ),
    "old_log_prob": (
        *("old", "old_log_probs", "old_logp", "old_logps", "old_logprob", "old_logprobs"),
        "old_per_token_logps",
    ),
    "rollout_log_prob": ("rollout_log_probs", "behaviour_log_prob", "behavior_log_prob", "sampling_per_token_logps"),
    "ref_log_prob": (
        *("ref", "ref_log_probs", "ref_logp", "ref_logps", "ref_logprob", "ref_logprobs", "ref_per_token_logps"),
        *("reference", "reference_log_prob"),
    ),
    "advantage": ("advantages", "adv"),
    "reward": ("rewards", "score", "scores"),
    "mask": ("response_mask", "completion_mask", "loss_mask", "action_mask"),
    "logits": ("policy_logits",),
    "old_logits": (),
    "ref_logits": ("reference_logits",),
    "entropy": ("entropies",),
    "tokens": ("completion_ids", "response_ids", "responses", "labels"),
    "beta": ("kl_coef", "kl_coeff", "kl_loss_coef", "kl_beta"),
    "max_length": ("max_completion_length", "loss_scale_factor"),
    "num_generations": ("group_size",),
}
_CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in (name, *aliases)}
_SETTINGS = ("beta", "max_length", "num_generations")  # numbers; a function's own default counts where there is one
_LIVE = ("log_prob", "logits", "entropy")


@dataclass(frozen=True)
class Form:
    """How a function wants its numbers.

    Args:
        dtype: precision.
        boolean: masks are of type bool; else 0 and 1.
        advantage: "row" is [B], "token" is [B, T].
    """

    dtype: torch.dtype = torch.float64
    boolean: bool = False
    advantage: Shape = "row"


@dataclass(frozen=True)
class UserLoss:
    """A user's function as a loss of a batch.

    Args:
        function: what was written.
        name: where, as `file.py:function`.
        beta: coefficient handed to it; None leaves its default.
        form: see there.
    """

    function: Callable[..., Any]
    name: str
    beta: float | None = None
    form: Form = field(default_factory=Form)

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of one group.

        Raises:
            UserError: it failed, or what it returned is no finite scalar that depends on the policy.
        """
        try:
            result = self.raw(batch)
        except UserError:
            raise
        except Exception as error:
            raise _failure(error, self.name, self.function) from error
        return _scalar(result, self.name)

    def raw(self, batch: Batch) -> Any:
        """What the function returns."""
        signature = inspect.signature(self.function)
        given = self._given(batch.to(self.form.dtype), signature)
        positional = [n for n in given if signature.parameters[n].kind is inspect.Parameter.POSITIONAL_ONLY]
        return self.function(*(given.pop(name) for name in positional), **given)

    @property
    def default_beta(self) -> float | None:
        """The value of its own coefficient, if it has one."""
        for name, parameter in inspect.signature(self.function).parameters.items():
            if _CANONICAL.get(name.lower()) == "beta" and isinstance(parameter.default, int | float):
                return float(parameter.default)
        return None

    @property
    def arguments(self) -> dict[str, str]:
        """Which argument receives what."""
        parameters = inspect.signature(self.function).parameters
        return {name: _CANONICAL[name.lower()] for name in parameters if name.lower() in _CANONICAL}

    def _given(self, batch: Batch, signature: inspect.Signature) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for argument, parameter in signature.parameters.items():
            what = _CANONICAL.get(argument.lower())
            if what is None:
                continue
            value = self._value(what, batch)
            own = parameter.default is not inspect.Parameter.empty
            if what in _SETTINGS and own and (what != "beta" or value is None):
                continue
            if value is None:
                raise UserError(
                    f"argument '{argument}' has no default", self.name, "State the coefficient: --beta 0.1."
                )
            found[argument] = value
        return found

    def _value(self, what: str, batch: Batch) -> Any:
        if what == "beta":
            return self.beta
        if what == "max_length":
            return batch.mask.shape[1]
        if what == "num_generations":
            return batch.mask.shape[0]
        if what == "mask":
            return batch.mask if self.form.boolean else batch.mask.to(self.form.dtype)
        if what == "advantage":
            row = batch.advantage
            return row if self.form.advantage == "row" else row[:, None].expand(batch.mask.shape).clone()
        value = getattr(batch, "old_log_prob" if what == "rollout_log_prob" else what)
        return value if what in _LIVE else value.detach().clone()


def load_loss(what: str) -> Callable[..., Any]:
    """A function from `file.py:name` or `package.module:name`.

    Raises:
        UserError: there is no such file, module or function, or importing it failed.
    """
    place, colon, name = what.rpartition(":")
    if not colon or not place or not name:
        raise UserError(f"'{what}' does not name a function", None, "Write my_loss.py:loss.")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_package(place)
    if not hasattr(module, name):
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        known = f" Functions there: {', '.join(functions)}." if functions else ""
        raise UserError(f"there is no '{name}'.{nearest(name, functions)}{known}", place)
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"'{name}' is no function but of type {type(function).__name__}", place)
    return function


def user_loss(
    function: Callable[..., Any],
    name: str,
    trials: Mapping[str, Batch],
    *,
    beta: float | None = None,
    advantage: Shape | None = None,
) -> UserLoss:
    """The function with the form of arguments that it takes.

    The shape of the advantages is read from an annotation such as `Float[Tensor, "B T"]`; without one, [B] is tried
    before [B, T]. The mask is of 0 and 1, or of type bool where that fails; single precision comes last.

    Args:
        trials: groups of different lengths to try.
        advantage: shape of the advantages, if it is known.

    Raises:
        UserError: an argument has no known name, or the function fails in every form.
    """
    _check_signature(function, name)
    shapes: tuple[Shape, ...] = (advantage,) if advantage else _shapes(function)
    first: UserError | None = None
    for dtype, shape, boolean in itertools.product((torch.float64, torch.float32), shapes, (False, True)):
        loss = UserLoss(function, name, beta, Form(dtype, boolean, shape))
        try:
            for batch in trials.values():
                loss(batch)
        except UserError as error:
            first = first or error
            continue
        _check_same(loss, next(iter(trials.values())))
        return loss
    assert first is not None
    raise first


def depends_on_order(loss: UserLoss, batch: Batch) -> bool:
    """Whether the loss of the same rows in another order is another one."""
    count = len(batch.reward)
    orders = [torch.arange(count), torch.arange(count).flip(0), torch.arange(count).roll(1)]
    values = torch.stack([loss(batch.select(order)).detach().double() for order in orders])
    tolerance = 1e-9 if loss.form.dtype is torch.float64 else 1e-5
    return float((values - values[0]).abs().max()) > tolerance * (1 + float(values[0].abs()))


def _check_signature(function: Callable[..., Any], name: str) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"its arguments cannot be read: {error}", name) from None
    known = list(_CANONICAL)
    for argument, parameter in parameters.items():
        optional = parameter.default is not inspect.Parameter.empty or parameter.kind in (
            inspect.Parameter.VAR_KEYWORD,
            inspect.Parameter.VAR_POSITIONAL,
        )
        if argument.lower() not in _CANONICAL and not optional:
            names = ", ".join(ALIASES)
            raise UserError(f"unknown argument '{argument}'.{nearest(argument, known)} Known: {names}", name)
    if not any(_CANONICAL.get(argument.lower()) in _LIVE for argument in parameters):
        raise UserError("it takes neither log_prob nor logits, so it cannot depend on the policy", name)


def _check_same(loss: UserLoss, batch: Batch) -> None:
    once, again = float(loss(batch).detach()), float(loss(batch).detach())
    if once != again:
        raise UserError(
            f"it is random: the same batch gave {once:g} and {again:g}", loss.name, "Take the randomness out."
        )


def _shapes(function: Callable[..., Any]) -> tuple[Shape, ...]:
    for argument, parameter in inspect.signature(function).parameters.items():
        if _CANONICAL.get(argument.lower()) != "advantage" or parameter.annotation is inspect.Parameter.empty:
            continue
        shape = getattr(parameter.annotation, "dim_str", None) or _quoted(parameter.annotation)
        if shape is not None:
            return ("token",) if len(shape.split()) == 2 else ("row",)
    return ("row", "token")


def _quoted(annotation: Any) -> str | None:
    """The shape in an annotation that is still text."""
    found = re.search(r"""["']([^"']+)["']""", annotation) if isinstance(annotation, str) else None
    return found.group(1) if found else None


def _scalar(result: Any, name: str) -> Tensor:
    if isinstance(result, tuple | list) and result:
        result = result[0]
    if not isinstance(result, Tensor):
        raise UserError(
            f"it returned {type(result).__name__}, not a tensor",
            name,
            "Return a scalar, or a tuple that begins with it.",
        )
    if result.numel() != 1:
        shape = tuple(result.shape)
        raise UserError(f"it returned a tensor of shape {shape}, not a scalar", name, "Sum it or average it.")
    if not result.requires_grad:
        raise UserError("its result has no gradient", name, "Is log_prob detached, or inside torch.no_grad()?")
    if not torch.isfinite(result):
        raise UserError(
            f"it returned {float(result.detach())}", name, "Is something divided by 0, or a masked number used?"
        )
    return result.reshape(())


def _failure(error: Exception, name: str, function: Callable[..., Any]) -> UserError:
    """The user's own line, not one of ours or of a library's."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    own = code.co_filename if code else None
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if frame.filename == own] or frames[-1:]
    where = f"{lines[-1].filename}:{lines[-1].lineno}" if lines else name
    return UserError(f"{type(error).__name__}: {error}", where)


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError("there is no such file", str(path))
    spec = importlib.util.spec_from_file_location(f"keel_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent.resolve())
    sys.modules[spec.name] = module
    sys.path.insert(0, folder)  # what lies beside it may be imported
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{error.msg}", f"{path}:{error.lineno}") from None
    except Exception as error:
        raise _import_failure(error, path) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return module


def _import_failure(error: Exception, path: Path) -> UserError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    line = f":{frames[-1].lineno}" if frames else ""
    return UserError(f"importing it failed: {type(error).__name__}: {error}", f"{path}{line}")


def _from_package(place: str) -> Any:
    try:
        return importlib.import_module(place)
    except Exception as error:
        fix = "A file is named with its ending: my_loss.py:loss."
        raise UserError(f"importing it failed: {type(error).__name__}: {error}", place, fix) from error
