"""The claim on memory of `benchmarks.distillation`, at a size that takes a second."""

import sys

import pytest
import torch
from benchmarks import distillation
from benchmarks.head import problem
from benchmarks.measuring import in_process


@pytest.mark.parametrize("kind", distillation.KINDS)
def test_both_ways_do_the_same(kind):
    policy, teacher, rows = problem(8, 3, 64)
    found = []
    for way in distillation.WAYS.values():
        value = way(kind, policy, teacher, rows)()
        found.append((value, policy.states.grad.clone(), policy.output.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert float(found[0][1].abs().max()) > 1e-5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_update_takes_a_small_part_of_the_memory_of_all_logits():
    """A quarter of the benchmark's tokens, and so of the logits; what a chunk takes stays as it is."""
    code = "from benchmarks.distillation import memory; memory({!r}, 'kl_policy_ref', 1024, 32768)"
    runs = {"materialised": 1, "engine": 3}  # the least of three: what else the machine does may add to one
    extra = {way: min(in_process(code.format(way), 1)["extra"] for _ in range(n)) for way, n in runs.items()}
    assert extra["materialised"] > 8 * extra["engine"], extra
