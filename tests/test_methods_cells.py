"""Cells of the evidence: what makes one stale, who runs it, and when it is vouched for."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import cells, fingerprint, halving, results, work
from benchmarks.evidence import Evidence

from keel.core.errors import KeelError
from keel.models.tiny import TinyConfig
from keel.train.base import BaseRecipe, ensure_base

HARDLY_TRAINED = BaseRecipe(TinyConfig(dim=32, layers=2, heads=2, feed_forward=64), steps=3, batch_size=16)
TINY = {
    "train.max_steps": 2,
    "train.num_minibatches": 2,
    "train.log_completions": 0,
    "train.save_steps": 0,
    "train.learning_rate": 1e-2,
    "rollout.num_prompts": 4,
    "rollout.num_generations": 4,
    "evaluate.num_prompts": 4,
    "evaluate.num_generations": 16,
}


def tiny(recipe, seed=0, **arguments):
    return cells.Cell(recipe, "countdown", seed, tuple(sorted(arguments.items())), tuple(sorted(TINY.items())))


# -- code ------------------------------------------------------------------------------------------------------------

SOURCE = '''
"""A module."""
from elsewhere import other
LIMIT = 3
def used(x: int) -> int:
    """Says."""
    return min(x, LIMIT)  # why
def unused(x):
    return x
class Part:
    """A part."""
    size: int = 2
    def __call__(self, x):
        return used(x) * self.size
'''


def digest_of(source, monkeypatch, root="keel.made:Part"):
    real = fingerprint._definitions
    read = fingerprint.read(source)
    monkeypatch.setattr(fingerprint, "_definitions", lambda m: read if m == "keel.made" else real(m))
    return fingerprint.digest.__wrapped__(root)


def test_comments_docstrings_and_annotations_change_nothing(monkeypatch):
    before = digest_of(SOURCE, monkeypatch)
    changes = {
        "# why": "# wherefore",
        "Says.": "Tells.",
        "A part.": "It.",
        "A module.": "M.",
        "x: int) -> int": "x)",
        "size: int = 2": "size: float = 2",
        "return x\n": "return x + 1\n",
    }
    for old, new in changes.items():
        assert old in SOURCE and digest_of(SOURCE.replace(old, new), monkeypatch) == before
    assert digest_of(SOURCE + "\nclass Further(Part):\n    pass\n", monkeypatch) == before


@pytest.mark.parametrize(("old", "new"), [("min(x", "max(x"), ("LIMIT = 3", "LIMIT = 4"), ("int = 2", "int = 3"),
                                          ("used(x) *", "used(x) +")])  # fmt: skip
def test_what_a_part_uses_changes_its_digest(old, new, monkeypatch):
    assert digest_of(SOURCE.replace(old, new), monkeypatch) != digest_of(SOURCE, monkeypatch)


def test_names_are_followed_across_modules_and_stop_where_no_number_is_decided():
    found = fingerprint.reached(["benchmarks.cells:run_cell"])
    assert {"keel.train.online:update", "keel.core.aggregate:weighted_mean", "keel.train.optimiser:Optimiser",
            "keel.statistics.engine:Engine", "keel.rollouts.local:LocalGenerator"} <= set(found)  # fmt: skip
    assert not [place for place in found if place.startswith(("keel.store", "keel.report", "keel.cli", "torch"))]
    with pytest.raises(LookupError, match=r"there is no definition keel\.core\.rows:Nothing"):
        fingerprint.digest("keel.core.rows:Nothing")


def test_a_cell_depends_on_its_own_parts_alone():
    plain, clipped, other = (results.code_of(tiny(name)) for name in ("grpo", "gspo", "rloo"))
    assert {k for k in plain if plain[k] != other[k]} == {"parts", "composition"}
    assert plain["engine"] == clipped["engine"] and plain["composition"] != clipped["composition"]
    assert results.code_of(tiny("grpo", beta=0.1))["composition"] != plain["composition"]
    assert results.code_of(tiny("grpo", seed=1)) == plain and results.key(tiny("grpo", 1)) != results.key(tiny("grpo"))


# -- results ---------------------------------------------------------------------------------------------------------


def made(cell, numbers=None, **changes):
    known = {"code": {"engine": "1"}, "times": {"seconds": 2.0, "step_cpu": 0.1}, "machine": {}}
    return results.Result(cell, numbers=numbers or {"means": {}, "values": {}}, **{**known, **changes})


def test_a_result_is_missing_then_fresh_then_stale(tmp_path, monkeypatch):
    code = {"engine": "1", "parts": "a"}
    monkeypatch.setattr(results, "code_of", lambda cell: dict(code))
    cell = tiny("grpo", beta=0.1)
    assert results.state_of(cell, tmp_path) == results.MISSING
    results.write(made(cell, code=dict(code)), tmp_path)
    assert results.state_of(cell, tmp_path) == results.FRESH and results.stored(cell, tmp_path).cell == cell
    assert results.state_of(tiny("grpo"), tmp_path) == results.MISSING
    code["parts"] = "b"
    assert results.state_of(cell, tmp_path) == results.STALE
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(results.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.write(made(tiny("grpo")), tmp_path)
    assert not list(tmp_path.iterdir())


def _held(folder, cell, seen):
    with results.claimed(cell, folder) as mine:
        seen.put(mine)


def test_two_processes_do_not_run_one_cell(tmp_path):
    fork = multiprocessing.get_context("fork")
    seen = fork.Queue()
    with results.claimed(tiny("grpo"), tmp_path) as mine:
        assert mine
        for cell in (tiny("grpo"), tiny("rloo")):
            process = fork.Process(target=_held, args=(tmp_path, cell, seen))
            process.start()
            process.join()
    assert [seen.get(timeout=5), seen.get(timeout=5)] == [False, True]


def test_work_runs_what_is_not_fresh_and_keeps_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "code_of", lambda cell: {"engine": "1"})
    monkeypatch.setattr(work, "code_of", lambda cell: {"engine": "1"})
    monkeypatch.setattr(work, "checksum_of", lambda task: "c")
    ran = []

    def run(cell):
        ran.append(cell.recipe)
        if cell.recipe == "rloo":
            raise RuntimeError("no")
        return {"numbers": {"means": {}}, "times": {"seconds": 1.0}, "machine": {}}

    monkeypatch.setattr(work, "run_cell", run)
    asked, said = [tiny("grpo"), tiny("rloo")], []
    assert work.work(asked, said.append, folder=tmp_path) == {"run": 1, "failed": 1}
    assert work.work(asked, said.append, folder=tmp_path) == {"fresh": 2} and ran == ["grpo", "rloo"]
    assert work.work([tiny("ppo")], said.append, minutes=-1.0, folder=tmp_path) == {}
    lines = work.summary([*asked, tiny("ppo")], tmp_path)
    assert lines[0] == "3 cells: 1 missing, 0 stale, 2 fresh" and "RuntimeError: no" in lines[2]
    missing = replace(tiny("grpo"), task="nowhere")
    monkeypatch.undo()
    assert "unknown task 'nowhere'" in work.summary([missing], tmp_path)[-1]


def test_vouching_keeps_the_others_only_if_all_numbers_are_the_same(tmp_path, monkeypatch):
    new = {"engine": "2"}
    monkeypatch.setattr(work, "code_of", lambda cell: dict(new))
    asked = [tiny("grpo", seed) for seed in range(6)]
    for cell in asked:
        results.write(made(cell, {"means": {"x": cell.seed}}), tmp_path)

    def again(cell, add=0):
        return {"numbers": {"means": {"x": cell.seed + add}}, "times": {"seconds": 9.0}, "machine": {}}

    assert work.vouch(asked, print, tmp_path, 2, lambda c: again(c, 1)) == {"run": 1, "stale": 5}
    assert results.stored(asked[1], tmp_path).code == {"engine": "1"}
    assert work.vouch(asked, print, tmp_path, 2, again) == {"stale": 5}  # what differed once vouches for nothing
    for cell in asked:
        results.write(made(cell, {"means": {"x": cell.seed}}), tmp_path)
    assert work.vouch(asked, print, tmp_path, 2, again) == {"run": 2, "vouched": 4}
    kept = results.stored(asked[1], tmp_path)
    assert kept.code == new and kept.vouched["changed"] == [["engine", "1", "2"]] and len(kept.vouched["by"]) == 2
    assert results.stored(asked[0], tmp_path).vouched["by"] == [asked[0].label]


def test_a_cell_is_kept_if_each_of_its_changes_changed_nothing_elsewhere(tmp_path, monkeypatch):
    """The engine's change is met by all, that of a part by one recipe on two tasks."""
    codes = {"grpo": {"engine": "2"}, "rloo": {"engine": "2", "parts": "2"}}
    monkeypatch.setattr(work, "code_of", lambda cell: codes[cell.recipe] | {"task": f"{cell.task}2"})
    cells_of = {name: [replace(tiny(name), task=task) for task in ("a", "b")] for name in codes}
    asked = [*cells_of["grpo"], *cells_of["rloo"]]

    def vouch(recipe_that_differs=""):
        for cell in asked:
            results.write(replace(made(cell), code={"engine": "1", "task": cell.task}), tmp_path)
        ran = []

        def again(cell):
            ran.append(f"{cell.recipe} {cell.task}")
            changed = {"means": {"x": 1}} if cell.recipe == recipe_that_differs else {}
            numbers = {**results.stored(cell, tmp_path).numbers, **changed}
            return {"numbers": numbers, "times": {"seconds": 9.0}, "machine": {}}

        return work.vouch(asked, print, tmp_path, 1, again), ran

    assert vouch() == ({"run": 3, "vouched": 1}, ["grpo a", "grpo b", "rloo a"])
    assert results.stored(asked[3], tmp_path).vouched["by"] == sorted(cell.label for cell in asked[:3])
    assert vouch("rloo") == ({"run": 3, "stale": 1}, ["grpo a", "grpo b", "rloo a"])
    assert vouch("grpo")[0]["vouched"] == 0


def test_the_base_vouches_for_nothing(tmp_path, monkeypatch):
    """It trains nothing, so that its numbers say nothing of a change in training."""
    monkeypatch.setattr(work, "code_of", lambda cell: {"engine": "2"})
    asked = [tiny(cells.BASE), tiny("grpo"), tiny("rloo")]
    for cell in asked:
        results.write(made(cell), tmp_path)
    ran = []

    def again(cell):
        ran.append(cell.recipe)
        return {"numbers": results.stored(cell, tmp_path).numbers, "times": {"seconds": 9.0}, "machine": {}}

    assert work.vouch(asked, print, tmp_path, 1, again) == {"run": 1, "vouched": 2} and ran == ["grpo"]
    known = {"by": [asked[0].label], "changed": [["engine", "1", "2"]]}
    results.write(replace(made(asked[0]), code={"engine": "2"}, vouched=known), tmp_path)
    assert work.witnesses(asked, tmp_path)[0] == {("engine", "1", "2"): [(asked[1].label, asked[1].task)]}


def test_on_another_processor_the_code_before_is_run_too(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "code_of", lambda cell: {"engine": "2"})
    monkeypatch.setattr(work, "checksum_of", lambda task: "here")
    asked = [tiny("grpo", seed) for seed in range(4)]
    for cell in asked:
        results.write(made(cell, {"means": {"x": 1}}, base="there"), tmp_path)

    def again(cell):
        return {"numbers": {"means": {"x": 7}}, "times": {"seconds": 9.0}, "machine": {"processor": "new"}}

    with pytest.raises(KeelError, match=r"grpo on countdown, seed 0 began with another base than.*--before"):
        work.vouch(asked, print, tmp_path, 1, again)
    assert {results.stored(cell, tmp_path).code["engine"] for cell in asked} == {"1"}
    old = tmp_path / "old" / "benchmarks"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text("")
    (old / "results.py").write_text("def code_of(cell):\n    return {'engine': '1'}\n")
    (old / "cells.py").write_text(
        "class Cell:\n    from_json = staticmethod(lambda data: data)\n\n"
        "def run_cell(cell):\n    return {'numbers': {'means': {'x': 7 + 10 * cell['seed']}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert work.vouch(asked, print, tmp_path, 1, again, Path("old")) == {"run": 1, "vouched": 3}
    kept = results.stored(asked[0], tmp_path)
    assert kept.numbers == {"means": {"x": 1}} and kept.base == "there" and kept.machine == {}  # as they were
    for cell in asked[1:3]:  # one whose numbers differ here takes those of this machine
        results.write(made(cell, {"means": {"x": 1}}, base="there", code={"engine": "0"}), tmp_path)
    with pytest.raises(KeelError, match="is not that of the result of grpo on countdown, seed 1"):
        work.vouch(asked[1:2], print, tmp_path, 1, again, tmp_path / "old")
    results.write(made(asked[1], {"means": {"x": 1}}, base="there"), tmp_path)
    assert work.vouch(asked[1:2], print, tmp_path, 1, again, tmp_path / "old") == {"run": 1}
    moved = results.stored(asked[1], tmp_path)
    assert (moved.numbers, moved.base) == ({"means": {"x": 7}}, "here") and moved.machine == {"processor": "new"}
    evidence = Evidence.of(results.everything(tmp_path))
    assert [evidence.base(halving.arm_of(cell), cell.seed) for cell in asked] == ["there", "here", "there", "there"]
    assert evidence.usual("countdown") == "there" and evidence.apart(halving.arm_of(asked[1]))


def test_processes_that_vouch_share_the_changes(tmp_path, monkeypatch):
    """What another process runs for is left to it; the rest is not."""
    codes = {"grpo": {"engine": "2"}, "rloo": {"engine": "2", "parts": "2"}}
    monkeypatch.setattr(work, "code_of", lambda cell: codes[cell.recipe])
    asked = [tiny(name, seed) for name in codes for seed in range(2)]
    for cell in asked:
        results.write(made(cell), tmp_path)
    fork = multiprocessing.get_context("fork")
    ran = fork.Queue()

    def run(cell):
        numbers = results.stored(cell, tmp_path).numbers
        if multiprocessing.parent_process() is None:  # the first process, in the middle of its first change
            other = fork.Process(target=work.vouch, args=(asked, print, tmp_path, 1, run))
            other.start()
            other.join()
        ran.put((cell.recipe, multiprocessing.parent_process() is None))
        return {"numbers": numbers, "times": {"seconds": 9.0}, "machine": {}}

    assert work.vouch(asked, print, tmp_path, 1, run) == {"run": 1, "vouched": 1}
    assert [ran.get(timeout=5), ran.get(timeout=5)] == [("rloo", False), ("grpo", True)] and ran.empty()
    assert {results.stored(cell, tmp_path).code["engine"] for cell in asked} == {"2"}


def test_a_cell_for_real(tmp_path, monkeypatch):
    """Two steps: it trains, measures, and is the same again; the base before them is not moved."""
    monkeypatch.setattr(cells, "model_source", lambda model, task: ensure_base(task, HARDLY_TRAINED))
    cells.base_of.cache_clear(), cells.checksum_of.cache_clear()
    try:
        first = work.do(tiny("sft"), tmp_path)
        assert first.error is None and first.base
        again, base, grpo = (cells.run_cell(tiny(name))["numbers"] for name in ("sft", cells.BASE, "grpo"))
    finally:
        cells.base_of.cache_clear(), cells.checksum_of.cache_clear()
    read = results.stored(tiny("sft"), tmp_path)
    assert json.loads(json.dumps(again)) == read.numbers and read.numbers["means"]["kl"] > 0 == base["means"]["kl"]
    for name in ("pass@1", "pass@16", "entropy", "kl", "length"):
        assert len(read.numbers["values"][name]) == len(grpo["values"][name]) == 4
    assert 0 <= grpo["probe_before"]["zero_groups"] <= 1 and len(grpo["curves"]["reward"]) == 2
    assert grpo["steps"] == 2 and grpo["prompts"] == 8 and grpo["tokens"] > 32
    assert results.path_of(read.cell, tmp_path).stat().st_size < 6000
