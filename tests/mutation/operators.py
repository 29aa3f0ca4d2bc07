"""Wrong expressions for right ones: an operator takes an expression and yields what it might wrongly have been."""

import ast
import re
from collections.abc import Callable, Iterator

from tests.mutation.places import AXIS_METHODS, Place, is_axis, name_of

COMMUTATIVE = ("minimum", "maximum", "min", "max", "isclose", "promote_types", "logaddexp", "zip", "equal")
SHAPED = (
    "where", "isinstance", "hasattr", "getattr", "setattr", "range", "full", "full_like", "new_full", "zeros",
    "new_zeros", "ones", "new_ones", "expand", "reshape", "view", "gather", "scatter", "scatter_add",
    "scatter_reduce", "index_add", "index_copy", "pad", "masked_fill", "clamp", "roll", "transpose", "flatten",
    "unflatten", "arange", "field", "replace", "print", "_one_of", "_positive", "nearest", "searchsorted",
    "next", "split", "map", "filter", "__setattr__", "expand_as",
)  # fmt: skip
OBJECTS = ("rows", "stats", "state", "states", "metrics", "groups", "divergence", "method")
NUMBERS_AS_ARGUMENTS = ("clamp", "masked_fill", "full_like", "where", "nan_to_num", "max", "min", "ratio", "full")
SMALL = {
    "k1": "k2",
    "k2": "k3",
    "k3": "k1",
    "kl_policy_ref": "kl_ref_policy",
    "kl_ref_policy": "kl_policy_ref",
    "chi2_policy_ref": "chi2_ref_policy",
    "chi2_ref_policy": "chi2_policy_ref",
    "amin": "amax",
    "amax": "amin",
}
FUNCTIONS = {
    "expm1": "exp",
    "log1p": "log",
    "exp": "expm1",
    "softmax": "log_softmax",
    "log_softmax": "softmax",
    "mean": "sum",
    "cumsum": "cumprod",
    "cummin": "cummax",
    "nansum": "sum",
    "std": "mean",
}
EXTREMA = {"minimum": "maximum", "min": "max", "amin": "amax", "any": "all", "argmin": "argmax"}
EXTREMA |= {after: before for before, after in EXTREMA.items()}
MASKS = {"mask": "loss_mask", "loss_mask": "mask"}
COUNTS = {"tokens": "sequences", "sequences": "rows", "rows": "sequences"}
MASKLIKE = re.compile(r"mask|valid|counted|\bmain\b|isnan|isfinite|weight > 0|present|\bkept\b|\bown\b")

Changed = Iterator[ast.expr]


def sign(node: ast.expr, place: Place) -> Changed:
    """-x as x; a + b as a - b and the other way round."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not is_axis(node, place):
        yield node.operand
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        if any(isinstance(side, ast.List | ast.Tuple | ast.JoinedStr) or _text(side) for side in _sides(node)):
            return
        yield ast.BinOp(node.left, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), node.right)


def swap(node: ast.expr, place: Place) -> Changed:
    """b - a for a - b, b / a for a / b, the first two arguments of a call exchanged, the branches of a `where`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub | ast.Div):
        yield ast.BinOp(node.right, node.op, node.left)
    if not isinstance(node, ast.Call) or any(isinstance(a, ast.Starred) for a in node.args):
        return
    name, args = name_of(node), list(node.args)
    if name == "where" and len(args) == 3:
        yield ast.Call(node.func, [args[0], args[2], args[1]], node.keywords)
    elif len(args) >= 2 and name not in (*SHAPED, *COMMUTATIVE, *AXIS_METHODS) and not name[:1].isupper():
        if any(isinstance(a, ast.Name) and a.id in OBJECTS for a in args[:2]):
            return  # of another type: nothing that could be overlooked
        yield ast.Call(node.func, [args[1], args[0], *args[2:]], node.keywords)


def axis(node: ast.expr, place: Place) -> Changed:
    """Axis 1 as 0 and 0 as 1, -1 as 0."""
    if is_axis(node, place):
        value = ast.literal_eval(node)
        yield ast.Constant({1: 0, 0: 1, -1: 0}.get(value, value - 1))


def denominator(node: ast.expr, place: Place) -> Changed:
    """The division left out, another count in the denominator, a product in place of a quotient."""
    if isinstance(node, ast.Call) and name_of(node) == "ratio" and len(node.args) == 2:
        yield node.args[0]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        yield node.left
        yield ast.BinOp(node.left, ast.Mult(), node.right)
    if isinstance(node, ast.Attribute) and node.attr in COUNTS and ast.unparse(node.value) == "of":
        yield ast.Attribute(node.value, COUNTS[node.attr], ast.Load())


def stop_gradient_removed(node: ast.expr, place: Place) -> Changed:
    """x.detach() as x."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
        yield node.func.value


def stop_gradient_added(node: ast.expr, place: Place) -> Changed:
    """x.detach() for what a function returns, and for a factor or a difference; only where gradients flow."""
    here = ".".join(place.scope[1:])
    if not here.startswith(place.gradient) or isinstance(node, ast.Constant | ast.Tuple) or _detached(node):
        return
    function = next((p for p in reversed(place.parents) if isinstance(p, ast.FunctionDef | ast.Lambda)), None)
    returned = isinstance(place.parent, ast.Return) and isinstance(function, ast.FunctionDef)
    if returned and function.returns is not None and _is_tensor(ast.unparse(function.returns)):
        yield _method(node, "detach")
    operand = isinstance(place.parent, ast.BinOp) and isinstance(place.parent.op, ast.Mult)
    without = "self." in ast.unparse(node) or len(ast.unparse(node)) < 2 or ast.unparse(node) == "advantage"
    plain = isinstance(node, ast.Name | ast.Attribute) and without  # settings, and advantages carry no gradient
    if operand and not plain and not MASKLIKE.search(ast.unparse(node)) and "terms" in place.scope[0]:
        yield _method(node, "detach")


def mask_shifted(node: ast.expr, place: Place) -> Changed:
    """A mask of tokens one place too far to the right."""
    token_mask = isinstance(node, ast.Attribute) and node.attr in MASKS and isinstance(node.value, ast.Name)
    if (token_mask or (isinstance(node, ast.Name) and node.id == "mask")) and isinstance(node.ctx, ast.Load):
        yield _method(node, "roll", ast.Constant(1), ast.Constant(1))


def mask_dropped(node: ast.expr, place: Place) -> Changed:
    """x * mask as x, torch.where(mask, x, 0) as x, a & b as a or as b."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        if MASKLIKE.search(ast.unparse(node.right)):
            yield node.left
        if MASKLIKE.search(ast.unparse(node.left)):
            yield node.right
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield node.left
        yield node.right
    if isinstance(node, ast.Call) and name_of(node) == "where" and len(node.args) == 3:
        yield node.args[1]
    if isinstance(node, ast.Call) and name_of(node) in ("masked_fill", "nan_to_num"):
        own = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) != "torch"
        yield node.func.value if own else node.args[0]


def mask_confused(node: ast.expr, place: Place) -> Changed:
    """What the loss counts for what a model chose, and the other way round."""
    if isinstance(node, ast.Attribute) and node.attr in MASKS and ast.unparse(node.value) == "rows":
        yield ast.Attribute(node.value, MASKS[node.attr], ast.Load())


def ratio_dropped(node: ast.expr, place: Place) -> Changed:
    """exp(log ratio) as 1."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "exp"
        and not node.args
    ):
        yield ast.Call(ast.parse("torch.ones_like", mode="eval").body, [node.func.value], [])


def factor_dropped(node: ast.expr, place: Place) -> Changed:
    """a * b as a and as b."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        if not MASKLIKE.search(ast.unparse(node.left)):
            yield node.right
        if not MASKLIKE.search(ast.unparse(node.right)):
            yield node.left


def order(node: ast.expr, place: Place) -> Changed:
    """Another estimator or the divergence turned round; a square or a root left out."""
    if _text(node) and node.value in SMALL:
        yield ast.Constant(SMALL[node.value])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args:
        if node.func.attr in ("square", "sqrt", "abs", "log"):
            yield node.func.value
        if node.func.attr == "rsqrt":
            yield _method(node.func.value, "reciprocal")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        yield node.left


def function(node: ast.expr, place: Place) -> Changed:
    """exp(x) for exp(x) - 1, log for log(1 + x), a sum for a mean and the other way round."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return
    name = node.func.attr
    if name == "sum" and ast.unparse(node.func.value) != "self":
        yield _renamed(node, "mean")
    elif name == "mean" and ast.unparse(node.func.value) == "self":
        return
    elif name in FUNCTIONS and not (name == "exp" and ast.unparse(node.func.value) == "math"):
        yield _renamed(node, FUNCTIONS[name])


def clamp(node: ast.expr, place: Place) -> Changed:
    """A clamp left out, or one of its two bounds."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "clamp"):
        return
    yield node.func.value
    if len(node.args) == 2:
        for bound, value in zip(("min", "max"), node.args, strict=True):
            yield ast.Call(node.func, [], [ast.keyword(bound, value)])


def comparison(node: ast.expr, place: Place) -> Changed:
    """< as <= and as >, == as !=."""
    if not isinstance(node, ast.Compare) or len(node.ops) != 1:
        return
    other: dict[type, tuple[type, ...]] = {
        ast.Lt: (ast.LtE, ast.Gt),
        ast.LtE: (ast.Lt, ast.GtE),
        ast.Gt: (ast.GtE, ast.Lt),
        ast.GtE: (ast.Gt, ast.LtE),
        ast.Eq: (ast.NotEq,),
        ast.NotEq: (ast.Eq,),
    }
    for op in other.get(type(node.ops[0]), ()):
        yield ast.Compare(node.left, [op()], node.comparators)


def constant(node: ast.expr, place: Place) -> Changed:
    """Another number in a formula: 0 as 1, 1 as 2, 1/2 as 1, any other doubled."""
    if not isinstance(node, ast.Constant) or type(node.value) not in (int, float) or is_axis(node, place):
        return
    parent = place.parent
    keyword = isinstance(parent, ast.keyword) and parent.arg not in ("dim", "threshold", "correction", "minlength")
    formula = isinstance(
        parent, ast.BinOp | ast.Compare | ast.UnaryOp | ast.IfExp | ast.Lambda | ast.Return | ast.Assign
    )
    if isinstance(parent, ast.UnaryOp) and len(place.parents) > 1 and isinstance(place.parents[-2], ast.Call):
        formula = place.called() in NUMBERS_AS_ARGUMENTS
    if formula or keyword or (isinstance(parent, ast.Call) and place.called() in NUMBERS_AS_ARGUMENTS):
        value = node.value
        if value == 0:
            yield ast.Constant(type(value)(1))
        else:
            yield ast.Constant(2 * value if value != 2 else type(value)(1))


def logic(node: ast.expr, place: Place) -> Changed:
    """& as |, and as or, ~x as x, not x as x."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        yield ast.BinOp(node.left, ast.BitOr() if isinstance(node.op, ast.BitAnd) else ast.BitAnd(), node.right)
    if isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert | ast.Not):
        yield node.operand


def extremum(node: ast.expr, place: Place) -> Changed:
    """Smallest for largest, any for all."""
    if not isinstance(node, ast.Call):
        return
    if isinstance(node.func, ast.Attribute) and node.func.attr in EXTREMA:
        yield _renamed(node, EXTREMA[node.func.attr])
    elif isinstance(node.func, ast.Name) and node.func.id in EXTREMA:
        yield ast.Call(ast.Name(EXTREMA[node.func.id], ast.Load()), node.args, node.keywords)


def branch(node: ast.expr, place: Place) -> Changed:
    """A case that is always taken, or never: such as the correction for the size of a sample."""
    if isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    if isinstance(place.parent, ast.If) and node is place.parent.test:
        yield ast.Constant(True)
        yield ast.Constant(False)


def model(node: ast.expr, place: Place) -> Changed:
    """The policy for the one that sampled, and the other way round."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("LogProb", "Value")):
        return
    named = [k for k in node.keywords if k.arg == "of"]
    if not named:
        of = ast.keyword("of", ast.Tuple([ast.Constant("old")], ast.Load()))
        yield ast.Call(node.func, node.args, [*node.keywords, of])
    elif "old" in ast.unparse(named[0]):
        yield ast.Call(node.func, node.args, [k for k in node.keywords if k.arg != "of"])


OPERATORS: dict[str, Callable[[ast.expr, Place], Changed]] = {
    "sign": sign,
    "swap": swap,
    "axis": axis,
    "denominator": denominator,
    "stop-gradient removed": stop_gradient_removed,
    "stop-gradient added": stop_gradient_added,
    "mask shifted": mask_shifted,
    "mask dropped": mask_dropped,
    "mask confused": mask_confused,
    "ratio dropped": ratio_dropped,
    "factor dropped": factor_dropped,
    "order": order,
    "function": function,
    "clamp": clamp,
    "comparison": comparison,
    "constant": constant,
    "logic": logic,
    "extremum": extremum,
    "branch": branch,
    "model": model,
}


# -- reading and building --------------------------------------------------------------------------------------------


def _sides(node: ast.BinOp) -> tuple[ast.expr, ast.expr]:
    return node.left, node.right


def _text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_tensor(annotation: str) -> bool:
    return annotation.startswith(("Float", "Tensor"))


def _detached(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and name_of(node) == "detach"


def _method(node: ast.expr, name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Attribute(node, name, ast.Load()), list(args), [])


def _renamed(node: ast.Call, name: str) -> ast.Call:
    assert isinstance(node.func, ast.Attribute)
    return ast.Call(ast.Attribute(node.func.value, name, ast.Load()), node.args, node.keywords)
