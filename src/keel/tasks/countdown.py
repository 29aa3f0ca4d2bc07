"""Countdown: make a target from three numbers, `3 6 17>20=` -> `6-3+17`.

Expressions are read by a parser of their own. A value is a pair (numerator, denominator), so that arithmetic is
exact, on integers and on arrays of them alike.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations_with_replacement, permutations
from typing import Any, overload

import numpy as np

from keel.core.errors import ConfigError
from keel.tasks.task import Example, RewardFunction, Text, check_disjoint, completion_text

LARGEST_NUMBER = 20
LARGEST_TARGET = 60
LONGEST_EXPRESSION = 64  # characters; longer ones are not read
HELD_OUT_SHARE = 0.08  # of the instances (unordered numbers and target)

Tree = int | tuple[str, Any, Any]  # a number, or (operator, left, right)

_TOKEN = re.compile(r"[0-9]+|\S")
_DIGITS = "0123456789"


@lru_cache(maxsize=1 << 16)
def parse(text: str) -> Tree | None:
    """Read an expression of numbers, + - * /, and parentheses; None if the text is no such expression.

    sum = product (("+" | "-") product)*,  product = factor (("*" | "/") factor)*,  factor = number | "(" sum ")".
    White space may stand between symbols. There is no sign before a number. It never raises.

    >>> parse("6-3+17")
    ('+', ('-', 6, 3), 17)
    >>> parse("-3+6") is None
    True
    """
    if len(text) > LONGEST_EXPRESSION:
        return None
    tokens = _TOKEN.findall(text)
    tree, end = _chain(tokens, 0, "+-")
    return tree if end == len(tokens) else None


def _chain(tokens: list[str], at: int, operators: str) -> tuple[Tree | None, int]:
    tree, at = _operand(tokens, at, operators)
    while tree is not None and at < len(tokens) and tokens[at] in operators:
        operator = tokens[at]
        right, at = _operand(tokens, at + 1, operators)
        if right is None:
            return None, at
        tree = (operator, tree, right)
    return tree, at


def _operand(tokens: list[str], at: int, operators: str) -> tuple[Tree | None, int]:
    if operators == "+-":
        return _chain(tokens, at, "*/")
    if at < len(tokens) and tokens[at][0] in _DIGITS:
        return int(tokens[at]), at + 1
    if at < len(tokens) and tokens[at] == "(":
        tree, at = _chain(tokens, at + 1, "+-")
        if tree is not None and at < len(tokens) and tokens[at] == ")":
            return tree, at + 1
    return None, at


def evaluate(tree: Tree, numbers: Any = None) -> tuple[Any, Any]:
    """Exact value as (numerator, denominator), not reduced; the denominator is 0 where the value does not exist.

    Args:
        tree: an expression.
        numbers: if given, the expression's numbers are positions in it; its entries may be arrays.

    >>> evaluate(parse("1/2+3/4"))
    (10, 8)
    >>> evaluate(parse("6/(3-3)"))[1]
    0
    """
    if not isinstance(tree, tuple):
        return (tree if numbers is None else numbers[tree]), 1
    operator, left, right = tree
    a, b = evaluate(left, numbers)
    c, d = evaluate(right, numbers)
    if operator == "*":
        return a * c, b * d
    if operator == "/":
        return a * d * d, b * c * d  # the further d keeps a denominator of 0 at 0
    return (a * d + c * b if operator == "+" else a * d - c * b), b * d


def leaves(tree: Tree) -> list[int]:
    """The numbers of an expression, from left to right."""
    return leaves(tree[1]) + leaves(tree[2]) if isinstance(tree, tuple) else [tree]


def normal_form(tree: Tree) -> str:
    """One spelling for all expressions that differ by order, grouping, or signs and quotients of parentheses.

    Terms of a sum and factors of a product are sorted, a - (b - c) becomes a + c - b, a / (b / c) becomes a * c / b,
    and parentheses stay only where a sum is a factor. Two normal forms are two ways to the target.

    >>> normal_form(parse("17-(3-6)")), normal_form(parse("6-3+17"))
    ('6+17-3', '6+17-3')
    >>> normal_form(parse("4*(2+1)")), normal_form(parse("(1+2)*4"))
    ('(1+2)*4', '(1+2)*4')
    """
    return _sum_form(tree)[0]


def _sum_form(tree: Tree) -> tuple[str, bool]:
    """Normal form, and whether it is a sum of several terms."""
    plus, minus = _flatten(tree, "+", "-")
    if not minus and len(plus) == 1:
        return _product_form(plus[0]), False
    first, second = (sorted((_product_form(term) for term in terms), key=_order) for terms in (plus, minus))
    return "+".join(first) + "".join(f"-{term}" for term in second), True


def _product_form(tree: Tree) -> str:
    if not isinstance(tree, tuple):
        return str(tree)
    above, below = _flatten(tree, "*", "/")
    first, second = (sorted((_factor_form(factor) for factor in factors), key=_order) for factors in (above, below))
    return "*".join(first) + "".join(f"/{factor}" for factor in second)


def _factor_form(tree: Tree) -> str:
    text, is_sum = _sum_form(tree)
    return f"({text})" if is_sum else text


def _order(text: str) -> tuple[bool, int, str]:
    return not text.startswith("("), len(text), text


def _flatten(tree: Tree, forward: str, inverse: str) -> tuple[list[Tree], list[Tree]]:
    """Operands of a sum (or product) of any grouping: those that are added, and those that are subtracted."""
    if not isinstance(tree, tuple) or tree[0] not in (forward, inverse):
        return [tree], []
    plus, minus = _flatten(tree[1], forward, inverse)
    right_plus, right_minus = _flatten(tree[2], forward, inverse)
    if tree[0] == inverse:
        right_plus, right_minus = right_minus, right_plus
    return plus + right_plus, minus + right_minus


def is_correct(text: str, numbers: Sequence[int], target: int) -> bool:
    """Whether the text is an expression that uses each number exactly once and has the target's value.

    >>> is_correct("6-3+17", [3, 6, 17], 20), is_correct("20", [3, 6, 17], 20)
    (True, False)
    """
    tree = parse(text.strip())
    if tree is None or sorted(leaves(tree)) != sorted(numbers):
        return False
    numerator, denominator = evaluate(tree)
    return denominator != 0 and numerator == target * denominator


def correct(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    *,
    numbers: Sequence[Sequence[int]],
    target: Sequence[int],
    **columns: Any,
) -> list[float | None]:
    """Reward: 1 for a correct expression (and nothing else in the completion), 0 otherwise."""
    return [float(is_correct(completion_text(c), n, t)) for c, n, t in zip(completions, numbers, target, strict=True)]


def templates() -> Iterator[str]:
    """Every expression of three numbers without needless parentheses, {0} standing for the first number.

    Needless are those whose removal is a matter of signs, too: not a-(b-c) but a-b+c.
    """
    for x, y, z in permutations(("{0}", "{1}", "{2}")):
        for p in "+-*/":
            for q in "+-*/":
                yield f"{x}{p}{y}{q}{z}"
        for p in "+-":
            for q in "*/":
                yield f"({x}{p}{y}){q}{z}"
                yield f"{z}{q}({x}{p}{y})"


class _Table:
    """All values of all templates: `values[m, s]` is that of template s for numbers m, or 0 if no possible target."""

    def __init__(self) -> None:
        self.templates = tuple(templates())
        triples = list(combinations_with_replacement(range(1, LARGEST_NUMBER + 1), 3))
        self.row = {triple: m for m, triple in enumerate(triples)}
        self.triples = np.array(triples, dtype=np.int64)
        columns = []
        for template in self.templates:
            tree = parse(template.format(0, 1, 2))
            assert tree is not None
            numerator, denominator = (np.broadcast_to(x, len(triples)) for x in evaluate(tree, self.triples.T))
            value, rest = np.divmod(numerator, np.where(denominator == 0, 1, denominator))
            possible = (denominator != 0) & (rest == 0) & (value >= 1) & (value <= LARGEST_TARGET)
            columns.append(np.where(possible, value, 0).astype(np.int8))
        self.values = np.stack(columns, axis=1)
        self.plain = np.array([not set("(/") & set(template) for template in self.templates])
        digits = (1 + (self.triples >= 10)).sum(axis=1)
        signs = np.array([len(template.replace("{", "").replace("}", "")) - 3 for template in self.templates])
        self.longest = int(np.where(self.values > 0, digits[:, None] + signs, 0).max())

    def reached(self, templates: Any) -> np.ndarray:
        """Whether one of the templates (an index into them) gives the target, by numbers and target - 1."""
        values = self.values[:, templates]
        return np.stack([(values == target).any(axis=1) for target in range(1, LARGEST_TARGET + 1)], axis=1)


_table = lru_cache(maxsize=1)(_Table)


@lru_cache(maxsize=1 << 16)
def solutions(numbers: tuple[int, ...], target: int) -> tuple[str, ...]:
    """All distinct correct expressions without needless parentheses, in alphabetical order.

    >>> solutions((3, 6, 17), 20)
    ('17+6-3', '17-3+6', '6+17-3', '6-3+17')
    """
    table = _table()
    triple = tuple(sorted(numbers))
    if triple not in table.row:
        return ()
    found = np.nonzero(table.values[table.row[triple]] == target)[0] if 1 <= target <= LARGEST_TARGET else ()
    return tuple(sorted({table.templates[s].format(*triple) for s in found}))


def _scramble(numbers: np.ndarray) -> np.ndarray:
    """A fixed hash of integers to 64 bits (the output function of SplitMix64)."""
    z = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _code(rows: np.ndarray) -> np.ndarray:
    """One integer for each row (a, b, c, target), in the order of the rows."""
    return ((rows[:, 0] * 32 + rows[:, 1]) * 32 + rows[:, 2]) * 64 + rows[:, 3]


def _orderings(instances: np.ndarray) -> np.ndarray:
    """All distinct prompts of the instances: rows (a, b, c, target), shuffled by hash."""
    rows = np.concatenate([instances[:, [*order, 3]] for order in permutations(range(3))])
    codes, first = np.unique(_code(rows), return_index=True)
    return rows[first][np.argsort(_scramble(codes), kind="stable")]


class Instances(Sequence[Example]):
    """Examples made from rows (a, b, c, target) when they are asked for."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        a, b, c, target = self.rows[i].tolist()
        return Example(f"{a} {b} {c}>{target}=", {"numbers": [a, b, c], "target": target}, i)


class Countdown:
    """Three numbers from 1 to 20 and a target from 1 to 60, `3 6 17>20=`; every instance has a solution.

    An instance is three unordered numbers and a target. A hash of it decides whether it is set aside (8% are), so
    that no permutation of a held-out prompt is ever trained on, whatever the arguments are. `train` has every order of
    the numbers of each remaining instance, in an order fixed by hash. `held_out` has one order for each instance,
    arranged so that every beginning of it covers easy and hard instances (those with many and few solutions) evenly.

    Args:
        held_out: number of held-out examples.
        hard: also take the instances (four in ten) that cannot be solved without parentheses or a division. The
            built-in model learns those far more slowly.
        needs: if given, only instances that cannot be solved without one of these symbols, of + - * / and (.

    Raises:
        ConfigError: `held_out` below 1 or above the number of instances set aside, or `needs` that no instance has.
    """

    name = "countdown"
    characters: str | None = _DIGITS + " >=+-*/()"

    def __init__(self, held_out: int = 512, hard: bool = False, needs: str = ""):
        table = _table()
        found = table.reached(slice(None) if hard else table.plain)
        if needs:
            found &= ~table.reached(np.array([not set(needs) & set(template) for template in table.templates]))
        if not found.any():
            what = f"no instance needs one of {needs!r}{'' if hard else ' where hard ones are left out'}."
            raise ConfigError(what, where="task countdown, needs", fix='Give symbols of "+-*/(", or hard=True.')
        triple, column = np.nonzero(found)
        instances = np.concatenate([table.triples[triple], column[:, None] + 1], axis=1)
        aside = _scramble(_code(instances)) < np.uint64(int(HELD_OUT_SHARE * 2**64))
        kept = instances[aside]
        kept = kept[_evenly(np.array([len(solutions((a, b, c), target)) for a, b, c, target in kept.tolist()]))]
        if not 1 <= held_out <= len(kept):
            raise ConfigError(f"must be from 1 to {len(kept)}, got {held_out}.", where="task countdown, held_out")
        train, test = _orderings(instances[~aside]), _one_ordering(kept[:held_out])
        check_disjoint(self.name, _unordered(train), _unordered(test), _show)
        self.train: Sequence[Example] = Instances(train)
        self.held_out: Sequence[Example] = Instances(test)
        self.rewards: dict[str, RewardFunction] = {"correct": correct}
        self.max_completion_length = table.longest + 1  # the end of sequence
        self.preset: dict[str, Any] = {
            "advantage_epsilon": 1e-4,
            "rollout.num_prompts": 64,
            "rollout.num_generations": 8,
            "rollout.temperature": 1.0,
            "rollout.max_completion_length": self.max_completion_length,
            "train.learning_rate": 7e-5,
            "train.adam_beta1": 0.9,
            "train.adam_beta2": 0.95,
            "train.max_grad_norm": 1.0,
            "train.max_steps": 220,
        }

    def solution(self, example: Example, seed: int) -> str | None:
        """One of the distinct correct expressions, each with the same probability; of those without parentheses and
        division where there are some."""
        every = solutions(tuple(example.columns["numbers"]), example.columns["target"])
        found = [text for text in every if not set("(/") & set(text)] or every
        return random.Random(f"{seed} {example.prompt}").choice(found) if found else None

    def answer(self, completion: Text, example: Example) -> str | None:
        """The normal form of the expression, correct or not; None where it cannot be read or has no value."""
        tree = parse(completion_text(completion).strip())
        return None if tree is None or evaluate(tree)[1] == 0 else normal_form(tree)


def _evenly(difficulty: np.ndarray) -> np.ndarray:
    """An order of the positions of `difficulty` in which every beginning takes from its whole range evenly.

    The k-th visited stands at the fraction frac(k * golden ratio) of the sorted list.
    """
    steps = (np.arange(1, len(difficulty) + 1) * ((5**0.5 - 1) / 2)) % 1.0
    return np.argsort(difficulty, kind="stable")[np.argsort(np.argsort(steps))]


def _one_ordering(instances: np.ndarray) -> np.ndarray:
    """One prompt for each instance, in the order of the instances, its numbers in the order with the smallest hash."""
    every = np.array(list(permutations(range(3))))
    rows = np.concatenate([instances[:, every], np.repeat(instances[:, None, 3:], len(every), axis=1)], axis=2)
    choice = _scramble(_code(rows.reshape(-1, 4))).reshape(rows.shape[:2]).argmin(axis=1)
    return rows[np.arange(len(rows)), choice]


def _unordered(rows: np.ndarray) -> list[int]:
    return np.unique(_code(np.concatenate([np.sort(rows[:, :3], axis=1), rows[:, 3:]], axis=1))).tolist()


def _show(code: int) -> str:
    return f"{code >> 16} {code >> 11 & 31} {code >> 6 & 31}>{code & 63}="
