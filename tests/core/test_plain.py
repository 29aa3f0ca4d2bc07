"""Plain values for programs."""

import json
import math

import numpy as np
import pytest

from keel.cli.show import print_json
from keel.core.plain import counted, finite


def test_what_is_not_finite_is_null_however_deep() -> None:
    given = {"a": [math.nan, 1.5, {"b": (math.inf, -math.inf, 0)}], "c": np.float64("nan"), "d": "NaN", "e": True}
    assert finite(given) == {"a": [None, 1.5, {"b": [None, None, 0]}], "c": None, "d": "NaN", "e": True}


def test_facts_with_nan_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"metrics": {"loss": math.nan, "kl": 0.5}, "curve": [(1, math.inf)]})
    assert json.loads(capsys.readouterr().out) == {"metrics": {"loss": None, "kl": 0.5}, "curve": [[1, None]]}


def test_counts() -> None:
    assert [counted(n, "arm") for n in (0, 1, 2)] == ["0 arms", "1 arm", "2 arms"]
