"""All faults of a module, each spliced into its source, so that all other code keeps its place and its line."""

import ast
import copy
import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace

from tests.mutation.operators import OPERATORS
from tests.mutation.places import expressions


@dataclass(frozen=True)
class Mutant:
    """One planted fault.

    Args:
        path: of the file, relative to the project.
        line, last: lines of the statement that holds it.
        operator: what kind of fault.
        before, after: the expression and what takes its place.
        start, end: the bytes of the source that are replaced.
        inside: whether it is in a function, whose code can be replaced while the program runs.
        scope: names of the classes and functions around it.
        nth: how many like it come before it in the scope.
    """

    path: str
    line: int
    last: int
    operator: str
    before: str
    after: str
    start: int = field(compare=False)
    end: int = field(compare=False)
    inside: bool = True
    scope: str = ""
    nth: int = 0

    @property
    def id(self) -> str:
        """file:line:operator:before -> after."""
        return f"{self.path}:{self.line}:{self.operator}:{self.before} -> {self.after}"

    @property
    def short(self) -> str:
        """Eight digits of the hash of all but its lines, which a change elsewhere in the file moves."""
        what = (self.path, self.scope, self.operator, self.before, self.after, str(self.nth))
        return hashlib.sha256("\n".join(what).encode()).hexdigest()[:8]

    def planted(self, source: str) -> str:
        """The source with the fault; lines keep their numbers."""
        data = source.encode()
        lines = data[self.start : self.end].count(b"\n")
        return (data[: self.start] + f"({self.after}{chr(10) * lines})".encode() + data[self.end :]).decode()


def mutants(source: str, path: str, gradient: tuple[str, ...] = ("",)) -> list[Mutant]:
    """All faults of a module, in the order of its lines; one that says the same as another is left out."""
    starts = [0]
    for line in source.encode().split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    found: dict[tuple[int, int, str], Mutant] = {}
    for node, place, statement in expressions(ast.parse(source), path, gradient):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        before = ast.unparse(node)
        inside = any(isinstance(p, ast.FunctionDef | ast.Lambda) for p in place.parents)
        for name, operator in OPERATORS.items():
            for new in operator(node, place):
                after = ast.unparse(ast.fix_missing_locations(copy.deepcopy(new)))
                if after != before and (start, end, after) not in found:
                    lines = (statement.lineno, getattr(statement, "end_lineno", statement.lineno))
                    scope = ".".join(place.scope[1:])
                    mutant = Mutant(path, node.lineno, lines[1], name, before, after, start, end, inside, scope)
                    found[start, end, after] = mutant
    seen: Counter[tuple[str, ...]] = Counter()
    numbered = []
    for mutant in sorted(found.values(), key=lambda m: (m.start, m.end, m.operator, m.after)):
        what = (mutant.scope, mutant.operator, mutant.before, mutant.after)
        numbered.append(replace(mutant, nth=seen[what]))
        seen[what] += 1
    return numbered
