"""Which code decides a number: a digest of definitions, followed by name from where they are used.

A definition (function, class, constant of a module) is hashed without docstrings, comments and annotations of
functions; what it names within `keel` and `benchmarks` is hashed with it, and so on. A new part in a file, a renamed
comment or a new module changes nothing for those who do not use it.
"""

import ast
import hashlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PACKAGES = ("keel", "benchmarks")
# What is reached from the loop and decides no number of a cell: where runs are kept, told of, and shown, engines on
# other machines, and lists of everything. Of tasks, parts and samplers, those in use are named one by one.
OUTSIDE = (
    "keel.cli",
    "keel.core.config",
    "keel.core.errors",
    "keel.core.registry",
    "keel.models.adapters",
    "keel.recipes",
    "keel.report",
    "keel.rollouts.choose",
    "keel.rollouts.openai",
    "keel.rollouts.reported",
    "keel.rollouts.samplers",
    "keel.rollouts.transformers",
    "keel.rollouts.vllm",
    "keel.sampling.catalogue",
    "keel.serve",
    "keel.store",
    "keel.tasks.gym",
    "keel.tasks.load",
    "keel.train.base",
    "keel.train.checkpoint",
    "keel.train.configuration",
    "keel.train.lifecycle",
    "keel.train.settings",
    "keel.verify",
)


@cache
def digest(*roots: str, without: frozenset[str] = frozenset()) -> str:
    """Of definitions, each as `module:name`, and of all that they name.

    Args:
        roots: where to begin.
        without: definitions that do not count.

    Raises:
        LookupError: a root does not exist.
    """
    found: dict[str, str] = {}
    for root in roots:
        if not _known(root):
            raise LookupError(f"there is no definition {root}")
        _collect(root, found)
    lines = "\n".join(f"{place} {text}" for place, text in sorted(found.items()) if place not in without)
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


def reached(roots: Iterable[str]) -> list[str]:
    """The definitions that `digest` reads."""
    found: dict[str, str] = {}
    for root in roots:
        _collect(root, found)
    return sorted(found)


def remember(modules: Iterable[str]) -> None:
    """Read the text of modules now: what is hashed later is then what was imported, should files change meanwhile."""
    for module in modules:
        if module.split(".")[0] in PACKAGES:
            _definitions(module)


def place_of(thing: object) -> str:
    """`module:name` of a class or function, or of the class of anything else.

    >>> place_of(place_of)
    'benchmarks.fingerprint:place_of'
    """
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}:{named.__qualname__.split('.')[0]}"


def _known(place: str) -> bool:
    module, _, name = place.partition(":")
    return name in _definitions(module)[0]


def _collect(place: str, found: dict[str, str]) -> None:
    waiting = [place]
    while waiting:
        here = waiting.pop()
        if here in found:
            continue
        module, _, name = here.partition(":")
        definitions, imports = _definitions(module)
        if name not in definitions:
            target = _target(imports.get(name), name)
            if target is not None:
                waiting.append(target)
            continue
        text, names, inner = definitions[name]
        found[here] = text
        for used in names:
            if used in definitions:
                waiting.append(f"{module}:{used}")
            else:
                origin = inner.get(used) or imports.get(used)
                target = _target(origin, used)
                if target is not None:
                    waiting.append(target)


def _target(origin: tuple[str, str] | None, used: str) -> str | None:
    """Where an imported name is defined, if that counts."""
    if origin is None:
        return None
    module, name = origin
    if module.split(".")[0] not in PACKAGES or any(module == o or module.startswith(f"{o}.") for o in OUTSIDE):
        return None
    return f"{module}:{name}"


Definition = tuple[str, frozenset[str], dict[str, tuple[str, str]]]


@cache
def _definitions(module: str) -> tuple[dict[str, Definition], dict[str, tuple[str, str]]]:
    """The definitions of a module with their text and the names in them, and what the module imports."""
    path = _path(module)
    if path is None:
        return {}, {}
    return read(path.read_text(encoding="utf-8"))


def read(source: str) -> tuple[dict[str, Definition], dict[str, tuple[str, str]]]:
    """The same of a text.

    >>> one, two = (read(f"def f(x): # {word}\\n    return x + g(x)")[0]["f"] for word in ("a", "b"))
    >>> one == two, sorted(one[1])
    (True, ['g', 'x'])
    """
    tree = _Bare().visit(ast.parse(source))
    definitions: dict[str, Definition] = {}
    imports = _imports(tree.body)
    for node in tree.body:
        names = _defined(node)
        if not names:
            continue
        used = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
        entry = ast.dump(node), used, _imports(ast.walk(node))
        for name in names:
            known = definitions.get(name)
            definitions[name] = entry if known is None else (known[0] + entry[0], known[1] | used, known[2] | entry[2])
    return definitions, imports


def _defined(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return []


def _imports(nodes: Iterable[ast.AST]) -> dict[str, tuple[str, str]]:
    out = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            out |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.If):  # if TYPE_CHECKING
            out |= _imports(node.body)
    return out


class _Bare(ast.NodeTransformer):
    """Without docstrings, and without annotations of functions."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        for argument in every:
            if argument is not None:
                argument.annotation = None
        return self._without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._without_docstring(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def _without_docstring(self, node) -> ast.AST:
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        return self.generic_visit(node)


@cache
def _path(module: str) -> Path | None:
    if module.split(".")[0] not in PACKAGES:
        return None
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None
