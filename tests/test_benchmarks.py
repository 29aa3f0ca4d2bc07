"""The benchmarks compare equal work, and write what they found. Nothing here looks at a clock."""

import sys
from dataclasses import replace

import pytest
import torch
from benchmarks import head, page, samplers
from benchmarks.measuring import Row, alternate, in_process
from benchmarks.models import build
from benchmarks.sampling import gap

from keel.rollouts.local import LocalGenerator
from keel.rollouts.sampling import Sampling
from tests.train.test_sampling import curves

ROW = Row("adding", "default", 1234.5, 2469.0, "ms", 2.0, 1.5, "exact", "python -m benchmarks head")


def test_both_ways_through_the_head_do_the_same():
    policy, ref, rows = head.problem(4, 6, 64)
    found = []
    for way in head.WAYS.values():
        value = way(policy, ref, rows)()
        found.append((value, policy.states.grad.clone(), policy.output.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)
    assert float(found[0][1].abs().max()) > 1e-4


def test_the_gap_is_that_of_the_log_probabilities():
    model = build("1M", 64)
    rows = LocalGenerator(model).generate([[5, 6], [7]], 2, Sampling(max_completion_length=6), seed=0)
    assert gap(model, rows) < 1e-5
    shifted = rows.with_(logp={"behaviour": rows.logp["behaviour"] - 0.5})
    assert gap(model, shifted) == pytest.approx(0.5, abs=1e-4)


def test_ways_are_measured_in_turn_and_the_first_turn_is_not_counted(monkeypatch):
    monkeypatch.setattr("benchmarks.measuring.gc.collect", lambda: 0)  # seconds, among all that the tests have imported
    calls: list[str] = []
    spent = alternate([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == ["a", "b"] * 4 and [len(found) for found in spent] == [3, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_seen_after_the_memory_is_gone():
    code = """
import json
from benchmarks.measuring import PeakMemory
with PeakMemory() as peak:
    len(b"x" * (64 << 20))
print(json.dumps({"extra": peak.extra}))
"""  # in a process of its own, as it is used: among the tests, free memory that is still resident may serve the request
    found = [in_process(code, 1)["extra"] for _ in range(3)]  # a system short of memory may take pages back in one
    assert 60 << 20 < max(found) < 200 << 20


def test_a_measured_process_that_fails_says_why():
    assert in_process("print('noise'); print('{\"x\": 3}')", 1) == {"x": 3}
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        in_process("1 / 0", 1)


def test_the_page_keeps_its_prose(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "version", lambda name: "1.0")
    target = tmp_path / "page.md"
    target.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    for _ in range(2):  # again over what was written
        page.write([ROW], 2, 5, target)
    text = target.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("| adding | default | 1,234\u00a0ms | 2,469\u00a0ms | **2.00** | 1.5 | exact | `head` |") == 1
    assert "| not measured |" in text
    target.write_text("nothing")
    with pytest.raises(ValueError, match="measured: begin"):
        page.write([ROW], 2, 5, target)


def test_a_part_of_the_rows_replaces_its_own_and_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "version", lambda name: "1.0")
    target = tmp_path / "page.md"
    target.write_text(f"{page.BEGIN}\n{page.END}\n")
    other = replace(ROW, work="taking away", setting="x=1")
    page.write([ROW, other], 2, 5, target)
    whole = target.read_text()
    page.write([other], 2, 5, target, whole=False)
    assert target.read_text() == whole
    page.write([replace(other, theirs=1e6, ratio=9.0), replace(ROW, work="new")], 2, 5, target, whole=False)
    text = target.read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines() if "`head`" in line] == [
        "adding", "taking away", "new",
    ]  # fmt: skip
    assert "**9.00**" in text and text.count("taking away") == 1
    with pytest.raises(ValueError, match="measure all"):
        page.write([ROW], 1, 5, target, whole=False)


def test_every_sampler_has_its_curve_and_the_page_keeps_its_prose(tmp_path, monkeypatch):
    asked = [request for request, _ in samplers.requests()]
    assert {request.method for request in asked} | {"decode"} == set(samplers.SAMPLERS)
    assert len({request.label for request in asked}) == len(asked) and asked[0].label == "best_of_n"
    for name in ("PAGE", "PICTURE", "DATA"):
        monkeypatch.setattr(samplers, name, tmp_path / getattr(samplers, name).name)
    samplers.PAGE.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    samplers.write(curves(), {"soft": {"explained": 0.125}})
    written = samplers.PAGE.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert "explained 0.125" in written and written.count("| smc |") == 3
    assert samplers.PICTURE.read_text().startswith("<svg") and len(samplers.DATA.read_text()) > 100
