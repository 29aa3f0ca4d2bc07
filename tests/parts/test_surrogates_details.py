"""Corners of the surrogates: where log-ratios are cut, and rows that the loss leaves out."""

import math

import pytest
import torch
from tests.parts.k8 import MASK, k8_rows, k8_stats

from keel.core.rows import Stream
from keel.parts.terms.surrogate import CISPO, Clipped, Surrogate, Unclipped
from keel.parts.weights.importance import TruncatedImportance
from keel.statistics.functionals import LogProb

CUT = math.exp(20.0)
FORMS = {"unclipped": Unclipped(), "clipped": Clipped(1.0, 1e12), "cispo": CISPO(0.0, 1e12)}


@pytest.mark.parametrize(("far", "ratio"), [(40.0, CUT), (-40.0, 1 / CUT), (20.0, CUT), (-20.0, 1 / CUT)])
@pytest.mark.parametrize("form", FORMS)
def test_log_ratios_are_cut_at_twenty(form, far, ratio):
    log_ratio = torch.full((1, 1), far, dtype=torch.float64, requires_grad=True)
    log_prob = torch.full((1, 1), -1.0, dtype=torch.float64)
    advantage = torch.full((1, 1), 3.0, dtype=torch.float64)
    found = FORMS[form](log_ratio, log_prob, advantage)
    assert float(found.detach()) == pytest.approx(3 * ratio * (-1 if form == "cispo" else 1), rel=1e-9)
    if form != "cispo":  # which holds the ratio constant anyway
        found.sum().backward()
        assert float(log_ratio.grad) == pytest.approx(3 * ratio if abs(far) == 20 else 0.0, rel=1e-9)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("far", "weight"), [(40.0, CUT), (-40.0, 1 / CUT)])
def test_importance_weights_are_cut_at_twenty(level, far, weight):
    rows, stats = k8_rows(), k8_stats()
    apart = torch.zeros(8, 4, dtype=torch.float64)
    apart[:, 0] = far
    old = stats[LogProb(of=("old",))]
    found = TruncatedImportance(1e12, level)(rows.with_(logp={"behaviour": old - apart}), stats)
    assert found[:, 0].tolist() == pytest.approx([weight] * 8, rel=1e-9)


@pytest.mark.parametrize(
    ("level", "wanted"),
    [("token", [0.1, -0.3, 0.5, 0.0]), ("sequence", [0.1, 0.1, 0.1, 0.0]), ("trajectory", [0.3, 0.3, 0.3, 0.0])],
)
def test_a_ratio_is_that_of_the_row_whatever_its_stream(level, wanted):
    rows = k8_rows().with_(stream=torch.full((8,), int(Stream.BASELINE)))
    found = Surrogate(Unclipped(), level).log_ratio(rows, k8_stats())
    assert found[0].tolist() == pytest.approx(wanted, abs=1e-12)
    assert not found[~MASK].any()
    weights = TruncatedImportance(100.0)(rows, k8_stats())
    assert weights[0].tolist() == pytest.approx([math.exp(0.05), math.exp(-0.1), math.exp(0.9), 1.0])
