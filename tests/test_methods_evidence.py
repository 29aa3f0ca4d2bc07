"""The evidence: what makes a cell stale, who runs it, and what finished cells are said to show."""

import json
import math
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
from benchmarks import cells, fingerprint, halving, methods, methods_page, plan, results, work
from benchmarks.choice import Wish, answer
from benchmarks.claims import APPEARED, NOT, NOTHING, UNDECIDED, Effect, Part, as_good, effects, judge, more, own
from benchmarks.evidence import Arm, Evidence, at, minus, two_way

from keel.core.errors import KeelError
from keel.evaluate.intervals import Interval
from keel.models.tiny import TinyConfig
from keel.recipes.registry import recipes
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
    assert work.vouch(asked, print, tmp_path, 1, again, tmp_path / "old") == {"run": 1, "vouched": 3}
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
    assert work.apart([*asked, tiny("sft")], tmp_path) == {"here": [asked[1]]}


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


# -- what they show --------------------------------------------------------------------------------------------------


def test_the_interval_of_a_table_is_that_of_the_two_way_model():
    """By hand: [[0, 2], [2, 4]] has MS 4 for seeds, 4 for prompts, none left: variance 8 / 4, 2 degrees of freedom."""
    found = two_way(np.array([[0.0, 2.0], [2.0, 4.0]]))
    assert found.value == 2 and found.high - 2 == pytest.approx(4.302653 * math.sqrt(2), rel=1e-6)
    seeds = two_way(np.array([[1.0], [3.0]]))  # t of one degree of freedom times sqrt(2 / 2)
    assert seeds.high - 2 == pytest.approx(12.706205, rel=1e-6)
    assert not two_way(np.array([[1.0]])).known and math.isnan(two_way(np.full((2, 2), math.nan)).value)
    same = two_way(np.array([[0.0, 1.0], [0.0, 1.0]]))  # the prompts alone: MS 1, variance 1 / 4, one degree
    assert same.high - 0.5 == pytest.approx(12.706205 * 0.5, rel=1e-6)


def table(**means):
    """Three seeds and eight prompts of each recipe: a mean, with a little noise that the recipes share."""
    noise = np.random.default_rng(0).normal(0, 0.05, (3, 8))
    own = np.random.default_rng(1)
    evidence = Evidence()
    for name, values in means.items():
        for seed in range(3):
            columns = {m: (v + noise[seed] + own.normal(0, 0.005, 8)).tolist() for m, v in values.items()}
            numbers = {
                "values": columns,
                "means": {m: float(np.mean(c)) for m, c in columns.items()},
                "entropy_end": values["entropy"] + 0.001 * seed,
            }
            evidence.numbers.setdefault(Arm(name), {})[seed] = numbers
            evidence.times.setdefault(Arm(name), {})[seed] = {"step_cpu": 0.2 if name == "grpo" else 0.3}
    return evidence


MADE = {
    "base": {"pass@1": 0.36, "pass@16": 0.95, "entropy": 0.40, "kl": 0.0, "length": 7.0},
    "grpo": {"pass@1": 0.45, "pass@16": 0.85, "entropy": 0.25, "kl": 1.0, "length": 7.0},
    "clip_cov": {"pass@1": 0.45, "pass@16": 0.90, "entropy": 0.32, "kl": 0.8, "length": 7.0},
    "kl_cov": {"pass@1": 0.30, "pass@16": 0.90, "entropy": 0.32, "kl": 0.8, "length": 7.0},
    "rloo": {"pass@1": 0.4505, "pass@16": 0.85, "entropy": 0.25, "kl": 1.0, "length": 6.0},
}


def elsewhere():
    """`rloo` began with another base, on a processor of twice the speed, on which grpo and base are .1 better."""
    evidence, other = table(**MADE), table(**{k: {m: x + 0.1 for m, x in v.items()} for k, v in MADE.items()})
    for known in (evidence, other):
        for arm, numbers in known.numbers.items():
            known.bases[arm] = {seed: "there" if known is evidence else "here" for seed in numbers}
            known.processors[arm] = {seed: "old" if known is evidence else "new" for seed in numbers}
    for part in ("numbers", "bases", "processors"):
        getattr(evidence, part)[Arm("rloo")] = getattr(other, part)[Arm("rloo")]
    for name, step in {"rloo": 0.15, "grpo": 0.1}.items():
        (evidence if name == "rloo" else other).times[Arm(name)] = {seed: {"step_cpu": step} for seed in range(3)}
    evidence.elsewhere["here"] = Evidence(
        *({arm: part[arm] for arm in (Arm("base"), Arm("grpo"))} for part in (other.numbers, other.times)),
        bases={arm: other.bases[arm] for arm in (Arm("base"), Arm("grpo"))},
    )
    return evidence


def test_what_began_with_another_base_is_compared_on_that_base():
    evidence, rloo, grpo = elsewhere(), Arm("rloo"), Arm("grpo")
    plain = table(**MADE)
    assert [arm for arm in evidence.numbers if evidence.apart(arm)] == [rloo] and evidence.usual("countdown") == "there"
    for one, two in ((rloo, grpo), (grpo, rloo), (rloo, Arm("base"))):
        found, wanted = evidence.difference(one, two, "pass@1"), plain.difference(one, two, "pass@1")
        assert (found.value, found.low, found.high) == pytest.approx((wanted.value, wanted.low, wanted.high))
    assert math.isnan(evidence.difference(rloo, Arm("clip_cov"), "pass@1").value)  # which nobody ran there
    assert evidence.time_ratio(rloo, grpo) == pytest.approx(1.5) == plain.time_ratio(rloo, grpo)
    assert evidence.measure(rloo, "pass@1").value == pytest.approx(plain.measure(rloo, "pass@1").value + 0.1)
    assert halving.reached(evidence, rloo, "pass@1") == pytest.approx(plain.measure(rloo, "pass@1").value)
    assert halving.reached(evidence, grpo, "pass@1") == plain.measure(grpo, "pass@1").value
    some = evidence.on({1})
    assert some.seeds(rloo) == [1] and some.apart(rloo) and some.elsewhere["here"].seeds(grpo) == [1]
    assert evidence.processor() == "old" and evidence.processor(rloo) == "new"
    rows = methods_page.table(evidence, ["grpo", "rloo", "clip_cov"], {})
    assert sum("†" in row for row in rows) == 2 and any(row.startswith("| `rloo` † |") for row in rows)
    assert "† on new, which rounds otherwise" in "\n".join(rows) and "(pass@1 0.5" in "\n".join(rows)


def test_the_baselines_of_a_cell():
    assert [one.recipe for one in plan.baselines(plan.cell("hapo", seed=2))] == ["base", "grpo", "dapo"]
    assert [one.recipe for one in plan.baselines(plan.cell("grpo"))] == ["base"]
    assert plan.baselines(plan.cell("hapo", "sparse", 2))[2] == plan.cell("dapo", "sparse", 2)


def test_effects_appear_or_do_not_or_stay_open():
    evidence = table(**MADE)
    by_name = {e.recipe: judge(e, evidence) for e in effects(["clip_cov", "kl_cov", "gtpo", "prl"])}
    assert {n: v.verdict for n, v in by_name.items()} == {
        "clip_cov": APPEARED, "kl_cov": NOT, "gtpo": NOTHING, "prl": UNDECIDED}  # fmt: skip
    assert by_name["prl"].numbers[0].endswith("not run")
    assert by_name["clip_cov"].numbers[1].startswith("entropy, less grpo's: +0.0")
    open_still = judge(Effect("rloo", "", (more("pass@1", "pass@1", "rloo"),)), evidence)
    assert open_still.verdict in (UNDECIDED, APPEARED)
    assert judge(Effect("rloo", "", (as_good("rloo"),)), evidence).verdict == APPEARED
    ends = own("end", at("entropy_end"), "grpo", low=0.2, high=0.3)
    assert ends.judge(evidence)[0] == APPEARED and replace(ends, low=0.3, high=1.0).judge(evidence)[0] == NOT
    one = Part("one seed", lambda _: Interval(1.0, math.nan, math.nan), low=0.0)
    assert one.judge(evidence)[0] == UNDECIDED
    gap = minus(at("means", "pass@16"), at("means", "pass@1"))
    assert evidence.difference(Arm("clip_cov"), Arm("grpo"), gap).value == pytest.approx(0.05, abs=0.01)


def test_every_effect_is_of_a_recipe_and_can_be_read_without_cells():
    known = set(recipes())
    for effect in effects(sorted(known)):
        found = judge(effect, Evidence())
        assert found.verdict == (NOTHING if effect.not_here else UNDECIDED) and effect.says.endswith(".")
        assert bool(effect.parts) != bool(effect.not_here)


def test_answers_come_from_the_numbers_and_say_what_cannot_be_told_apart():
    evidence = table(**MADE)
    arms = [Arm(name) for name in MADE if name != "base"]
    kept = answer(Wish("Entropy", "entropy", "entropy", equal=True), evidence, arms)
    assert kept.best == Arm("clip_cov") and kept.among == 3 and kept.like == ()  # kl_cov lost too much pass@1
    single = answer(Wish("One", "pass@1", "pass@1"), evidence, arms)
    assert Arm("kl_cov") not in single.like and len(single.like) >= 1 and "includes 0" in single.sentence()
    short = answer(Wish("Short", "length", "length", sign=-1, equal=True), evidence, arms)
    assert short.best == Arm("rloo") and "All others are measurably behind." in short.sentence()
    assert "not measured yet" in answer(Wish("Gold", "gold", "gold"), evidence, arms).sentence()


def test_the_page_is_made_of_cells(tmp_path, monkeypatch):
    evidence = table(**MADE)
    evidence.failed[Arm("otb")] = "RuntimeError: no"
    verified = tmp_path / "verification.md"
    said = {"grpo": "falls short", "rloo(beta=0.5)": "**holds**", "clip_cov": "falls short", "kl_cov": "no objective"}
    verified.write_text("".join(f"| `{name}` | {status} | E |\n" for name, status in said.items()))
    for name, path in (("PAGE", "methods.md"), ("PICTURE", "methods.svg")):
        monkeypatch.setattr(methods_page, name, tmp_path / path)
    monkeypatch.setattr(methods_page, "VERIFIED", verified)
    names = ["grpo", "clip_cov", "kl_cov", "rloo"]
    methods_page.write(evidence, names, {"rloo": "beta = 0.1"}, {"dpo": "needs pairs"})
    text = (tmp_path / "methods.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `") and "verification.md" in line]
    assert len(rows) == 4 and rows[-1][0] == "| `kl_cov`"  # by pass@1
    row = next(row for row in rows if row[0] == "| `clip_cov`")
    assert row[1] == "[falls short](verification.md)" and row[5].startswith("**+0.0") and row[-2] == "1.50"
    assert "| `clip_cov` | At equal reward, entropy ends clearly above GRPO's. | **appeared** |" in text
    assert "- `dpo`: needs pairs" in text and "`otb` on `countdown` failed: RuntimeError: no" in text
    picture = (tmp_path / "methods.svg").read_text()
    assert picture.startswith("<svg") and picture.count("<circle") == 3 and ">base</text>" in picture


def test_what_has_collapsed_does_not_squeeze_the_picture():
    """A point below half of the median on an axis is told in words; two in one place are the edge together."""
    near = [(Arm(name), x, y) for name, x, y in (("grpo", 0.40, 0.80), ("ppo", 0.44, 0.85), ("salsa", 0.44, 0.85))]
    gone = (Arm("cream"), 0.19, 0.85)
    assert methods_page.collapsed([*near, gone]) == (near, [gone])
    assert methods_page.collapsed([*near, (Arm("cream"), 0.22, 0.85)])[1] == []
    assert methods_page.edge(near) == [Arm("grpo"), Arm("ppo")]


def test_a_name_in_the_picture_covers_nothing_if_there_is_room():
    taken = [(95.0, 95.0, 105.0, 105.0), (108.0, 80.0, 160.0, 120.0)]  # the point itself, and something at its right
    at, anchor, line = methods_page.place("grpo", 300.0, 300.0, [])
    assert (at, anchor, line) == ((308.0, 304.0), "start", None)
    at, anchor, _ = methods_page.place("grpo", 200.0, 200.0, [(205.0, 150.0, 400.0, 250.0)])
    assert anchor == "end" and at[0] < 200.0
    before = list(taken)
    methods_page.place("a_long_name", 100.0, 100.0, taken)
    left, top, right, bottom = taken[-1]
    assert len(taken) == 3 and all(right <= b[0] or left >= b[2] or bottom <= b[1] or top >= b[3] for b in before)


def test_the_best_go_on_with_a_tuned_coefficient(monkeypatch):
    evidence = table(**MADE)
    names = ["grpo", "clip_cov", "kl_cov", "rloo"]
    monkeypatch.setattr(halving, "BEST", 1)
    evidence.numbers = {replace(arm, arguments=()): seeds for arm, seeds in evidence.numbers.items()}
    best = halving.finalists(evidence, names)["countdown"]
    assert "clip_cov" in best and len(best) <= 3
    assert halving.coefficient("rloo") == "beta" and halving.grid("rloo") == [0.015, 0.15]
    assert halving.grid("grpo") == [0.01, 0.04]
    trial = Evidence()
    for cell, value in zip(halving.trials("rloo", "countdown"), (0.4, 0.5, 0.3), strict=True):
        trial.numbers[halving.arm_of(cell)] = {halving.TUNING_SEED: {"values": {"pass@1": [value]}}}
    assert dict(halving.tuned("rloo", "countdown", trial).arguments) == {"beta": 0.015}
    assert halving.tuned("grpo", "countdown", trial) is None
    monkeypatch.setattr(halving, "finalists", lambda *_: {"countdown": ["rloo"]})
    planned = plan.in_order(list(halving.second_round(evidence, trial, names)))
    assert sum(cell.arguments == (("beta", 0.015),) and cell.seed < 10 for cell in planned) == 10
    assert halving.said(evidence, trial, names) == {"rloo": "beta = 0.015 of 0.05: 0.400, 0.015: 0.500, 0.15: 0.300"}


def test_the_plan_has_every_recipe_or_a_reason():
    first = list(plan.first_round())
    asked = {cell.recipe for cell in first} - {cells.BASE}
    assert asked | {name for name in recipes() if plan.left_out(name)} == set(recipes())
    assert first[0].recipe == cells.BASE and first[1].recipe == "grpo" and first[1].seed == 0
    assert {cell.seed for cell in first if cell.task == plan.MAIN} == {0, 1, 2}
    assert len(set(first)) == len(first)


def test_the_command_lists_without_running(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["methods", "rloo", "--task", "countdown", "--list", "--results", str(tmp_path)])
    methods.main()
    assert "3 cells: 3 missing, 0 stale, 0 fresh" in capsys.readouterr().out


def test_those_that_do_the_same_count_once_and_the_first_round_alone_decides(monkeypatch):
    evidence = table(**MADE)
    evidence.numbers = {replace(arm, arguments=()): seeds for arm, seeds in evidence.numbers.items()}
    evidence.numbers[Arm("salsa")] = dict(evidence.numbers[Arm("rloo")])
    names = ["grpo", "clip_cov", "kl_cov", "rloo", "salsa"]
    assert halving.alike(evidence, names, "countdown") == [["rloo", "salsa"]]
    monkeypatch.setattr(halving, "BEST", 2)
    before = halving.finalists(evidence, names)["countdown"]
    assert "rloo" in before and "salsa" not in before
    for seed in range(3, 10):  # with these kl_cov would be the best of all
        evidence.numbers[Arm("kl_cov")][seed] = {"values": {"pass@1": [0.9] * 8, "pass@16": [1.0] * 8}}
    assert halving.finalists(evidence, names)["countdown"] == before


def test_the_second_round_is_told_on_seeds_that_chose_nothing():
    evidence, names = table(**MADE), ["grpo", "clip_cov", "rloo"]
    assert methods_page._again(evidence, [Arm("clip_cov")]) == []  # no further seeds yet
    tuned = Arm("rloo", "countdown", (("beta", 0.015),))
    for arm, value in ((Arm("base"), 0.2), (Arm("grpo"), 0.4), (Arm("clip_cov"), 0.35), (tuned, 0.5)):
        for seed in range(3, 10):
            values = {"pass@1": [value, value + 0.02 * (seed % 2)], "pass@16": [0.8, 0.9], "entropy": [0.2, 0.3]}
            evidence.numbers.setdefault(arm, {})[seed] = {"values": values | {"kl": [1.0]}}
    lines = methods_page._again(evidence, [Arm("base"), Arm("grpo"), Arm("clip_cov"), tuned])
    rows = [line.split(" | ") for line in lines if line.startswith(("| `", "| before"))]
    assert [row[0].strip("| `") for row in rows] == ["before training", "grpo", "rloo(beta=0.015)", "clip_cov"]
    assert rows[2][2].startswith("**+0.100**") and rows[3][2].startswith("**-0.050**")
    assert {row[-1] for row in rows} == {"7 |"}
    page = methods_page.page(evidence, names, {}, {}, [Arm("base"), Arm("grpo"), tuned])
    assert page.index("## The best again") > page.index("## Countdown")
