"""Parts by name, and what no part takes."""

import inspect
import math
from dataclasses import dataclass, replace

import pytest

from keel.core import registry
from keel.core.registry import PAPERS, part, part_class
from keel.parts.advantages.stream import Whiten
from keel.recipes.registry import recipes


@pytest.mark.parametrize("epsilon", [-1.0, -1e-9])
def test_an_epsilon_is_not_negative(epsilon):
    with pytest.raises(ValueError, match=r"^epsilon must not be negative, got -1"):
        Whiten(epsilon=epsilon)
    with pytest.raises(ValueError, match="epsilon must not be negative"):
        replace(Whiten(), epsilon=epsilon)
    assert Whiten(epsilon=0.0).epsilon == 0


def test_no_part_takes_a_number_that_is_none():
    recipes()
    asked = 0
    for name in PAPERS:
        for field in inspect.signature(part_class(name)).parameters.values():
            if type(field.default) is float:
                asked += 1
                with pytest.raises((ValueError, TypeError)):  # of a type: another argument is lacking
                    part_class(name)(**{field.name: math.nan})
    assert asked > 100


def test_a_part_of_ones_own_is_looked_at_too(monkeypatch):
    for table in (registry._PARTS, PAPERS):
        monkeypatch.setitem(table, "made_for_this_test", None)  # and so taken out at the end

    @part("made_for_this_test")
    @dataclass(frozen=True)
    class Made:
        level: float = 0.5
        epsilon: float | None = None

    assert (Made(0.2).level, Made(epsilon=1e-6).epsilon) == (0.2, 1e-6) and list(inspect.signature(Made).parameters)
    with pytest.raises(ValueError, match="level must be a number, not nan"):
        Made(math.nan)
    with pytest.raises(ValueError, match="epsilon must not be negative, got -2"):
        Made(epsilon=-2)
