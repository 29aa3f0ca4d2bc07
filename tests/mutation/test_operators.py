"""Each operator makes the fault that it is named for and nothing else; a trial catches a fault."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.mutation.mutants import Mutant, mutants
from tests.mutation.operators import OPERATORS
from tests.mutation.run import GRADIENTS, equivalents, gradients, key, sample, summary
from tests.mutation.trials import Failure, Verdict, in_children, nearest_tests

FAULTS = {  # of `return <expression>` in a function of tensors: operator -> all that it makes of the expression
    "-a": {"sign": ["a"]},
    "a + b": {"sign": ["a - b"]},
    "a - b": {"sign": ["a + b"], "swap": ["b - a"]},
    "a / b": {"swap": ["b / a"], "denominator": ["a", "a * b"]},
    "divergence(p, q)": {"swap": ["divergence(q, p)"]},
    "divergence(p, rows)": {"swap": []},
    "ratio(a, b)": {"swap": ["ratio(b, a)"], "denominator": ["a"]},
    "a.sum(1)": {"axis": ["0"], "function": ["a.mean(1)"]},
    "a.softmax(-1)": {"axis": ["0"], "function": ["a.log_softmax(-1)"]},
    "a.amax(dim=0)": {"axis": ["1"], "extremum": ["a.amin(dim=0)"]},
    "of.tokens": {"denominator": ["of.sequences"]},
    "x.detach()": {"stop-gradient removed": ["x"], "stop-gradient added": []},
    "a * rows.mask": {
        "mask shifted": ["rows.mask.roll(1, 1)"],
        "mask dropped": ["a"],
        "mask confused": ["rows.loss_mask"],
        "factor dropped": ["rows.mask"],
    },
    "torch.where(kept, a, 0.0)": {
        "mask dropped": ["a"],
        "swap": ["torch.where(kept, 0.0, a)"],
        "constant": ["1.0"],
    },
    "a.masked_fill(gone, 0.5)": {"mask dropped": ["a"], "constant": ["1.0"]},
    "a & b": {"logic": ["a | b"], "mask dropped": ["a", "b"]},
    "log_ratio.exp()": {"ratio dropped": ["torch.ones_like(log_ratio)"], "function": ["log_ratio.expm1()"]},
    "rho * k": {"factor dropped": ["rho", "k"]},
    "estimate('k1', d)": {"order": ["'k2'"]},
    "f_divergence('kl_ref_policy')": {"order": ["'kl_policy_ref'"]},
    "a.square()": {"order": ["a"]},
    "a ** 2": {"order": ["a"], "constant": ["1"]},
    "a.rsqrt()": {"order": ["a.reciprocal()"]},
    "torch.expm1(a)": {"function": ["torch.exp(a)"]},
    "a.clamp(0.8, 1.2)": {"clamp": ["a", "a.clamp(max=1.2)", "a.clamp(min=0.8)"], "constant": ["1.6", "2.4"]},
    "a < b": {"comparison": ["a <= b", "a > b"]},
    "a == b": {"comparison": ["a != b"]},
    "0.5 * a": {"constant": ["1.0"], "factor dropped": ["0.5", "a"]},
    "n - 1": {"constant": ["2"]},
    "a and b": {"logic": ["a or b"]},
    "~a": {"logic": ["a"]},
    "torch.minimum(a, b)": {"extremum": ["torch.maximum(a, b)"], "swap": []},
    "a if exact else b": {"branch": ["a", "b"]},
    "LogProb(of=('old',))": {"model": ["LogProb()"]},
    "LogProb()": {"model": ["LogProb(of=('old',))"]},
}


def made(body: str, path: str = "src/keel/parts/terms/example.py") -> list[Mutant]:
    return mutants(f"def f(rows, a, b) -> Tensor:\n    {body}\n", path)


@pytest.mark.parametrize("expression", FAULTS)
def test_operators(expression):
    found = [m for m in made(f"return {expression}") if m.operator in FAULTS[expression]]
    for operator, wanted in FAULTS[expression].items():
        assert sorted(m.after for m in found if m.operator == operator) == sorted(wanted), operator


def test_every_operator_is_tested():
    assert {operator for faults in FAULTS.values() for operator in faults} == set(OPERATORS)


def test_a_stop_gradient_is_put_on_what_is_returned_and_on_factors():
    found = {m.before for m in made("return rho * advantage") if m.operator == "stop-gradient added"}
    assert found == {"rho * advantage", "rho"}  # advantages carry none
    assert not [m for m in mutants("def f(a) -> Tensor:\n    return a * b\n", "x", ("\n",)) if "stop" in m.operator]


def test_a_condition_is_taken_always_or_never():
    found = {m.after for m in made("if exact:\n        return a") if m.operator == "branch"}
    assert found == {"True", "False"}


@pytest.mark.parametrize(
    "body",
    [
        "'''1 - x < 0'''",
        "raise ValueError(1 - a)",
        "assert a < 1",
        "if a < 0:\n        raise ValueError",
        "return f'{a - b}'",
        "return a[:, 1:]",
        "return a[..., None]",
        "x: Float[Tensor, '1-2'] = a",
    ],
)
def test_what_is_no_formula_stays(body):
    assert not [m for m in made(body) if m.operator != "stop-gradient added"]


def test_declarations_and_checks_of_settings_stay():
    source = "class Part:\n    x: float = 1 - 2\n    needs = (LogProb(),)\n    def __post_init__(self): self.x - 1\n"
    assert not mutants(source, "x")


def test_all_else_stays_as_it_is():
    """One expression is another; the tree and the lines are otherwise the same, also around letters beyond ASCII."""
    source = 'def f(a, b):\n    "π − ρ"\n    c = "π" or (a\n        - b)\n    return c.sum(\n        1)  # ρ\n'
    found = mutants(source, "x")
    assert {(m.line, m.after) for m in found} >= {(3, "a + b"), (3, "b - a"), (6, "0")}
    lines = [ast.unparse(node) for node in ast.parse(source).body[0].body]
    for fault in found:
        planted = fault.planted(source)
        assert planted.count("\n") == source.count("\n")
        changed = [ast.unparse(node) for node in ast.parse(planted).body[0].body]
        assert sum(x != y for x, y in zip(lines, changed, strict=True)) == 1
        assert ast.parse(planted).body[0].body[-1].lineno == 5


def test_ids():
    [fault] = [m for m in made("return a + b") if m.operator == "sign"]
    assert fault.id == "src/keel/parts/terms/example.py:2:sign:a + b -> a - b"
    assert fault.scope == "f" and fault.inside and len({m.short for m in made("return a + b - c")}) > 3


def test_constants_of_a_module_are_outside_of_functions():
    [fault] = mutants("LIMIT = 20.0\n", "x")
    assert not fault.inside and fault.after == "40.0"


def test_a_sample_takes_from_every_file_and_operator():
    faults = [*made("return (a + b) * c - d * (e + f)"), *made("return a + b + c", "other.py")]
    kinds = {(f.path, f.operator) for f in faults}
    drawn = sample(faults, len(kinds), 0)
    assert {(f.path, f.operator) for f in drawn} == kinds and drawn == sample(faults, len(kinds), 0)
    assert len(sample(faults, 10**6, 0)) == len(faults)


def test_every_path_of_gradients_exists():
    root = Path(__file__).parents[2]
    assert all((root / path).exists() for path in GRADIENTS)
    assert (
        gradients("src/keel/parts/terms/surrogate.py") == ("",)
        and "".startswith(gradients("src/keel/method.py")) is False
    )
    assert nearest_tests("src/keel/core/aggregate.py") == ("tests/core/", "src/keel/core/aggregate.py")


def test_scores(tmp_path):
    """Four faults, two caught, one of the others equivalent: two of three."""
    faults = [m for m in made("return a + b - c") if m.operator in ("sign", "swap")]
    faults += [m for m in made("return a < b") if m.operator == "comparison"][:1]
    verdicts = [Verdict(f, "survived") for f in faults]
    verdicts[0] = Verdict(faults[0], "caught", "test", "AssertionError")
    verdicts[1] = Verdict(faults[1], "caught", "test", "KeyError")
    page = tmp_path / "page.md"
    where, operator, change = key(faults[2])
    page.write_text(f"| `{where}` | {operator} | `{change}` | equivalent: for a reason |\n| x | y | z | a gap |\n")
    known = equivalents(page)
    assert known == {(where, operator, change)}
    assert "| all | 4 | 2 | 1 | 2 | 1 | 66.7 % |" in summary(verdicts, known)


SOURCE = """
def clipped(x: float) -> float:
    return min(x - 1.0, 5.0)

TOP = 3
"""
TESTS = """
from area import TOP, clipped

def test_area():
    assert clipped(3.0) == 2.0 and clipped(9.0) == 5.0 and TOP == 3
"""


def test_trials(tmp_path):
    """In a project of its own: a sign is noticed, also in a constant, and a boundary that no value meets is not."""
    (tmp_path / "area.py").write_text(SOURCE.replace("return", "if x <= 4.5:\n        pass\n    return"))
    (tmp_path / "test_area.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    command = [sys.executable, str(Path(__file__).parent), "--files", "area.py", "--tests", "test_area.py"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("PYTEST_ADDOPTS", None)
    subprocess.run([*command, "--json", "out.json"], cwd=tmp_path, env=environment, check=True, capture_output=True)
    found = {(v["fault"]["operator"], v["fault"]["after"]): v for v in json.loads((tmp_path / "out.json").read_text())}
    assert found["sign", "x + 1.0"]["status"] == "caught"
    assert found["sign", "x + 1.0"]["how"] == "AssertionError"
    assert found["extremum", "max(x - 1.0, 5.0)"]["status"] == "caught"
    assert found["constant", "6"]["status"] == "caught"
    assert found["comparison", "x < 4.5"]["status"] == "survived"


def test_children_give_back_what_they_found():
    """What JSON has, what they raised, and nothing of one that takes too long or dies."""

    def fail():
        raise KeyError("gone")

    tasks = {"sound": lambda: [1, {"a": None}], "fails": fail, "object": object, "dies": lambda: os._exit(3)}
    tasks["sleeps"] = lambda: time.sleep(60)
    found = {task: result for task, result, _ in in_children(iter(tasks.items()), 2, 3.0)}
    assert found.pop("object").kind == "TypeError"  # which JSON has not
    failed = Failure("KeyError", "KeyError('gone')")
    assert found == {"sound": [1, {"a": None}], "fails": failed, "dies": None, "sleeps": None}
