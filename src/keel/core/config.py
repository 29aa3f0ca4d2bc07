"""Compositions as plain data and back, with errors that name the key, what is allowed and the nearest spelling."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, InstanceOf, TypeAdapter, ValidationError

from keel.core.errors import ConfigError, nearest
from keel.core.registry import part_class, part_name


def to_config(value: Any) -> Any:
    """Plain data (dict, list, str, numbers, bool, None) for a part, or for a collection of parts; complete.

    Raises:
        ConfigError: an object that is neither plain data nor a registered part, such as a lambda.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = part_name(type(value))
        if name is None:
            raise ConfigError(f"{type(value).__name__} is not a registered part, so it cannot be written down", None)
        fields = {f.name: to_config(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"part": name, **fields}
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, Mapping):
        return {str(key): to_config(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_config(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"a {type(value).__name__} cannot be written into a configuration")


def from_config(data: Any, where: str = "") -> Any:
    """The inverse of `to_config`.

    Raises:
        ConfigError: an unknown part or key, or a value of the wrong type, named by its path.
    """
    if isinstance(data, Mapping):
        if "part" in data:
            cls = _part_class(data["part"], where)
            given = {k: from_config(v, _join(where, k)) for k, v in data.items() if k != "part"}
            return build(cls, given, where)
        return {key: from_config(item, _join(where, str(key))) for key, item in data.items()}
    if isinstance(data, list):
        return tuple(from_config(item, f"{where}[{i}]") for i, item in enumerate(data))
    return data


def _part_class(name: Any, where: str) -> type:
    if not isinstance(name, str):
        raise ConfigError(f"a part is named by text (got {name!r})", where or None)
    try:
        return part_class(name)
    except ConfigError as error:
        raise ConfigError(error.what, where or None, error.fix) from None


def build(cls: type, given: Mapping[str, Any], where: str = "") -> Any:
    """An instance of a dataclass from keyword values, each checked against its annotation.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, or a value that the class refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in given:
        if key not in fields:
            allowed = ", ".join(fields) or "nothing"
            raise ConfigError(f"unknown key.{nearest(key, fields)}", _join(where, key), f"Allowed: {allowed}.")
    for key, f in fields.items():
        if key not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{cls.__name__} needs the key '{key}'", where or None)
    checked = {key: check(value, _hints(cls)[key], _join(where, key)) for key, value in given.items()}
    try:
        return cls(**checked)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(str(error), where or None) from error


def check(value: Any, hint: Any, where: str) -> Any:
    """`value` converted to the annotation, as pydantic does ("1e-3" is a float).

    Raises:
        ConfigError: it does not fit.
    """
    try:
        found = _adapter(hint).validate_python(value)
    except ValidationError as error:
        problems = "; ".join(dict.fromkeys(problem(item) for item in error.errors()[:3]))
        raise ConfigError(f"{problems} (got {value!r})", where) from None
    if any(isinstance(one, float) and math.isnan(one) for one in (found if isinstance(found, tuple) else (found,))):
        raise ConfigError(f"must be a number (got {value!r})", where)
    return found


def problem(item: Mapping[str, Any]) -> str:
    """What pydantic says of a value, in words for those who write YAML.

    >>> problem({"type": "tuple_type", "input": "wandb", "msg": "Input should be a valid tuple"})
    'Input should be a list, such as [wandb]'
    """
    if item["type"] in ("tuple_type", "list_type"):
        return f"Input should be a list, such as [{item['input']}]"
    return str(item["msg"])


def set_path(value: Any, path: str, new: Any, where: str = "") -> Any:
    """A copy of a tree of dataclasses and dicts in which the entry at a dotted path is replaced.

    Raises:
        ConfigError: the path leads nowhere; the nearest spelling is named.
    """
    key, _, rest = path.partition(".")
    here = _join(where, key)
    if isinstance(value, Mapping):
        if key not in value:
            known = ", ".join(map(str, value)) or "none"
            raise ConfigError(f"there is no entry '{key}'.{nearest(key, map(str, value))}", here, f"Entries: {known}.")
        if not rest and is_part(value[key]) and not is_part(new):
            raise ConfigError(f"must be a part (got {new!r})", here, "For example {part: NAME, ...}.")
        return {**value, key: set_path(value[key], rest, new, here) if rest else new}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise ConfigError(f"'{where}' has no settings of its own", here)
    names = [f.name for f in dataclasses.fields(value) if f.init]
    if key not in names:
        raise ConfigError(f"unknown key.{nearest(key, names)}", here, f"Allowed: {', '.join(names)}.")
    new = set_path(getattr(value, key), rest, new, here) if rest else check(new, _hints(type(value))[key], here)
    try:
        return dataclasses.replace(value, **{key: new})
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(str(error), here) from error


def get_path(value: Any, path: str) -> Any:
    """The entry at a dotted path."""
    for key in path.split("."):
        value = value[key] if isinstance(value, Mapping) else getattr(value, key)
    return value


def is_part(value: Any) -> bool:
    """Whether a value can stand where a part is wanted: an instance of a dataclass, or something to call."""
    return (dataclasses.is_dataclass(value) or callable(value)) and not isinstance(value, type)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _adapter(hint: Any) -> TypeAdapter:
    try:
        if hint not in _adapters:
            _adapters[hint] = TypeAdapter(_loosened(hint))
        return _adapters[hint]
    except TypeError:  # an annotation that cannot be hashed
        return TypeAdapter(_loosened(hint))


_adapters: dict[Any, TypeAdapter] = {}


def _loosened(hint: Any) -> Any:
    """The annotation with parts checked by class alone, and protocols by the attributes that they name."""
    if getattr(hint, "_is_protocol", False):
        return Annotated[Any, AfterValidator(functools.partial(_follows, hint))]
    if dataclasses.is_dataclass(hint):
        return InstanceOf.__class_getitem__(hint)  # what InstanceOf[hint] means, which mypy takes for an annotation
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.Union[tuple(_loosened(item) for item in typing.get_args(hint))]  # noqa: UP007
    if typing.get_origin(hint) is tuple:
        return tuple[tuple(_loosened(item) for item in typing.get_args(hint))]  # type: ignore[misc]
    return hint


def _follows(protocol: type, value: Any) -> Any:
    """A value that has what a protocol names."""
    bases = [base for base in protocol.__mro__ if getattr(base, "_is_protocol", False) and base is not Protocol]
    names = {name for base in bases for name in (*vars(base), *vars(base).get("__annotations__", {}))}
    wanted = {name for name in names if not name.startswith("_") or name == "__call__"}
    if isinstance(value, type) or not all(hasattr(value, name) for name in wanted):
        raise ValueError(f"a {protocol.__name__.lower()} is wanted, such as {{part: NAME, ...}}")
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
