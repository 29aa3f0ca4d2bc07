"""The places of a syntax tree at which faults are planted: the expressions that are part of a formula.

Left out, because no formula stands there:
    raise, assert, except, the condition of an `if` that only raises, and `__post_init__`: validation, with tests of
        its own;
    docstrings, f-strings, names, annotations, decorators, imports;
    defaults of arguments and fields: settings, which recipes state and their tests compare;
    `needs`, `heads_read`, `init`: declarations; a functional too many is only measured in vain;
    `metrics`: what is only logged; what a part remembers (`observe`) is in;
    indices and slices; the number of an axis is replaced, a place is not.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

UNTOUCHED = ("__post_init__", "__str__", "__repr__", "needs", "heads_read", "init", "metrics")
AXIS_METHODS = (
    "sum", "mean", "any", "all", "amax", "amin", "max", "min", "cumsum", "cummin", "cummax", "logcumsumexp",
    "cumprod", "sort", "argsort", "softmax", "log_softmax", "logsumexp", "unbind", "cat", "stack", "flip", "std",
    "var", "prod", "nansum", "nanmean", "unsqueeze", "squeeze", "size", "argmax", "argmin",
)  # fmt: skip


@dataclass
class Place:
    """Where an expression stands."""

    parents: list[ast.AST]
    scope: tuple[str, ...] = ()
    gradient: tuple[str, ...] = ("",)  # beginnings of the scopes through which gradients flow

    @property
    def parent(self) -> ast.AST:
        """The node that holds it."""
        return self.parents[-1]

    def called(self) -> str | None:
        """The name of the call of which it is an argument."""
        for node in reversed(self.parents):
            if isinstance(node, ast.Call):
                return name_of(node)
            if not isinstance(node, ast.UnaryOp | ast.keyword | ast.Tuple):
                return None
        return None


def name_of(call: ast.Call) -> str:
    """The last name of what is called."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def is_axis(node: ast.expr, place: Place) -> bool:
    number = node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else node
    if not (isinstance(number, ast.Constant) and type(number.value) is int):
        return False
    if isinstance(place.parent, ast.UnaryOp):
        return False
    if isinstance(place.parent, ast.keyword):
        return place.parent.arg == "dim"
    if not (isinstance(place.parent, ast.Call) and name_of(place.parent) in AXIS_METHODS):
        return False
    call = place.parent
    method = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) not in ("torch", "math")
    if isinstance(call.func, ast.Name):
        return False
    return node in call.args[: 1 if method else 2]


def expressions(tree: ast.Module, path: str, gradient: tuple[str, ...]) -> Iterator[tuple[ast.expr, Place, ast.AST]]:
    """Expressions that are part of a formula, with where they stand and their statement."""
    stack: list[tuple[ast.AST, list[ast.AST], tuple[str, ...], ast.AST]] = [(tree, [], (path,), tree)]
    while stack:
        node, parents, scope, statement = stack.pop()
        if isinstance(node, ast.stmt):
            statement = node
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        if isinstance(node, ast.expr) and not isinstance(node, ast.Starred | ast.Slice):
            yield node, Place(parents, scope, gradient), statement
        for child in reversed(list(_children(node, parents))):
            stack.append((child, [*parents, node], scope, statement))


def _children(node: ast.AST, parents: list[ast.AST]) -> Iterator[ast.AST]:
    """The parts of a node in which formulas may stand."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.ExceptHandler):
        return
    if isinstance(node, ast.FunctionDef):
        if node.name not in UNTOUCHED:
            yield from node.body
    elif isinstance(node, ast.ClassDef):
        yield from (n for n in node.body if isinstance(n, ast.FunctionDef))
    elif isinstance(node, ast.If) and all(isinstance(n, ast.Raise) for n in node.body):
        yield from node.orelse
    elif isinstance(node, ast.Lambda):
        yield node.body
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        if node.value is not None and (len(parents) > 1 or not isinstance(node.value, ast.Subscript)):
            yield node.value
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    elif isinstance(node, ast.Subscript):
        yield node.value
        if not isinstance(node.slice, ast.Constant | ast.Tuple | ast.Slice | ast.UnaryOp):
            yield node.slice
    else:
        yield from ast.iter_child_nodes(node)
