"""The evidence: what finished cells are said to show, and who runs again."""

import math
from dataclasses import replace

import numpy as np
import pytest
from benchmarks import cells, halving, methods, methods_page, plan
from benchmarks.choice import Wish, answer
from benchmarks.claims import APPEARED, NOT, NOTHING, UNDECIDED, Effect, Part, as_good, effects, judge, more, own
from benchmarks.evidence import Arm, Evidence, at, minus, two_way

from keel.evaluate.intervals import Interval
from keel.recipes.registry import recipes


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
