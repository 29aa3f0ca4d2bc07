"""The table of verification that comes with the package: what `keel verify --all --full` found when it was made.

`python -m keel.verify.page docs` writes it beside the page of the documentation. It is read without the recipes and
what they import, so that pages and programs need not verify anything to show it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keel
from keel.core.errors import DataError

if TYPE_CHECKING:
    from keel.verify.placements import Point
    from keel.verify.recipes import Verification

FILE = "measured.json"
FORMAT = 1
DIGITS = 6  # significant ones
STATUSES = ("holds", "falls short", "no objective")


@dataclass(frozen=True)
class World:
    """The expected update on one world; see `keel.verify.recipes.Comparison`."""

    world: str
    relative_error: float
    cosine: float


@dataclass(frozen=True)
class Groups:
    """The update over all groups of one size; see `keel.verify.recipes.GroupCheck`. `deviation` may be None."""

    size: int
    relative_error: float
    deviation: float | None


@dataclass(frozen=True)
class Row:
    """What was found of a recipe with some arguments; the fields are those of `keel.verify.recipes.Verification`.

    `family` is the file in which the recipe stands, in words.
    """

    recipe: str
    label: str
    family: str
    objective: str
    status: str
    gradient_relative_error: float | None = None
    cosine: float | None = None
    off_policy_relative_error: float | None = None
    fixed_point_tv: float | None = None
    comparisons: tuple[World, ...] = ()
    groups: tuple[Groups, ...] = ()
    invariances: Mapping[str, bool] = field(default_factory=dict)
    reduces_to_baseline: bool | None = None
    bf16_relative_error: float | None = None
    follows: str | None = None
    exact_with: Mapping[str, Any] | None = None
    reasons: tuple[str, ...] = ()

    @property
    def group_error(self) -> float | None:
        """That of the largest group; None where there is none."""
        return self.groups[-1].relative_error if self.groups else None


@dataclass(frozen=True)
class PlacementError:
    """Error of one placement of the KL at one distance from the reference; see `keel.verify.placements.Point`."""

    placement: str
    distance: float
    on_policy: bool
    error: float


@dataclass(frozen=True)
class Measured:
    """The whole table.

    Args:
        keel: version that it was measured with.
        rows: by recipe.
        placements: errors against the distance from the reference.
    """

    keel: str
    rows: tuple[Row, ...]
    placements: tuple[PlacementError, ...] = ()

    @property
    def of_another_version(self) -> bool:
        """Whether the recipes may have changed since."""
        return self.keel != keel.__version__

    def of(self, recipe: str) -> list[Row]:
        """The rows of a recipe: at its defaults, and with a regulariser that is off by default."""
        return [row for row in self.rows if row.recipe == recipe]


def to_text(found: Sequence[Verification], points: Sequence[Point]) -> str:
    """The file; equal results give equal bytes."""
    data = {
        "format": FORMAT,
        "keel": keel.__version__,
        "recipes": [_row(one) for one in found],
        "placements": [_placement(point) for point in points],
    }
    return json.dumps(_plain(data), indent=1, allow_nan=False) + "\n"


def write(found: Sequence[Verification], points: Sequence[Point], path: Path | None = None) -> Path:
    """Write the file; without a path, the one of the package."""
    path = path or Path(__file__).with_name(FILE)
    path.write_text(to_text(found, points), encoding="utf-8")
    return path


@functools.cache
def measured() -> Measured:
    """The table of the package.

    Raises:
        DataError: the file is missing or damaged.
    """
    file = resources.files("keel.verify") / FILE
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        fix = "python -m keel.verify.page docs writes it."
        raise DataError("there is no measured table of verification", f"keel/verify/{FILE}", fix) from error
    return read(text)


def read(text: str) -> Measured:
    """A table as `to_text` writes it.

    Raises:
        DataError: it is none.
    """
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise DataError(f"has format {data['format']}, this version reads {FORMAT}", f"keel/verify/{FILE}")
        rows = tuple(_read_row(row) for row in data["recipes"])
        return Measured(data["keel"], rows, tuple(PlacementError(**point) for point in data["placements"]))
    except (ValueError, KeyError, TypeError) as error:
        what = f"is no table of verification ({type(error).__name__}: {error})"
        raise DataError(what, f"keel/verify/{FILE}", "python -m keel.verify.page docs writes it.") from error


def _row(one: Verification) -> dict[str, Any]:
    from keel.recipes.registry import recipe_named

    family = recipe_named(one.recipe).make.__module__.rpartition(".")[2].replace("_", " ")
    data = asdict(one) | {"label": one.label, "family": family}
    for name in ("arguments", "seconds"):
        del data[name]
    for comparison in data["comparisons"]:
        del comparison["step"]
    return data


def _placement(point: Point) -> dict[str, Any]:
    return {name: getattr(point, name) for name in ("placement", "distance", "on_policy", "error")}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _read_row(data: Mapping[str, Any]) -> Row:
    inner = {
        "comparisons": tuple(World(**one) for one in data["comparisons"]),
        "groups": tuple(Groups(**one) for one in data["groups"]),
        "reasons": tuple(data["reasons"]),
    }
    row = Row(**{**data, **inner})
    if row.status not in STATUSES:
        raise ValueError(f"status must be one of {', '.join(STATUSES)}, not '{row.status}'")
    return row
