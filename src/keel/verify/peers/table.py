"""The page about other libraries: every option measured, every number of the page from this run."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median

from jaxtyping import Float
from torch import Tensor

from keel.verify.batches import Situation, expected_gradient, situations
from keel.verify.identify import (
    EXACT,
    GAINS,
    Candidate,
    Identifier,
    candidates,
    gradient_error,
    state_gradient,
)
from keel.verify.objectives import Objective
from keel.verify.peers import Option, text, undisturbed

BETA = 0.5
TESTED = {"trl": "1.16.0", "verl": "0.9.1"}
REWARD = Objective("reward")
SEQUENCE = Objective("reward", "kl_policy_ref", "sequence", BETA)
STATE = Objective("reward", "kl_policy_ref", "state", BETA)
EQUAL, ENDED = "equal lengths", "lengths 1 to 3"
Cells = tuple[str, ...]
Gradients = dict[Situation, Float[Tensor, "X V"]]


class Worlds:
    """The worlds of one kind of sampling, with the objectives' gradients there.

    Args:
        on_policy: whether the policy itself sampled.
    """

    def __init__(self, on_policy: bool):
        self.where = situations(on_policy=on_policy)
        self.identifier = Identifier(self.where, on_policy=on_policy)

    def gradients(self, option: Option, *, group: int = 4, lengths: str | None = None) -> Gradients:
        """The expected gradient in each world, or in each with sequences of those lengths."""
        chosen = [s for s in self.where if lengths in (None, s.lengths)]
        return {s: expected_gradient(option.loss, self.identifier.worlds[s], group) for s in chosen}

    def errors(self, found: Gradients, objective: Objective, **facts: str) -> list[float]:
        """The relative error in each world of which `facts` are true."""
        chosen = [s for s in found if all(getattr(s, name) == value for name, value in facts.items())]
        return [self._error(found[s], objective, s) for s in chosen]

    def _error(self, gradient: Float[Tensor, "X V"], objective: Objective, where: Situation) -> float:
        world = self.identifier.worlds[where]
        held = objective.level == "state"
        wanted = state_gradient(objective, world) if held else objective.gradient(world)[0]
        return gradient_error(gradient, wanted)[0]


@dataclass(frozen=True)
class Line:
    """One row of a table: settings that give the same numbers, and the numbers."""

    name: str
    cells: Cells

    def markdown(self) -> str:
        """With bars between the columns."""
        return f"| {' | '.join((self.name, *self.cells))} |"


def kl_cells(option: Option, worlds: Worlds) -> Cells:
    """Errors against the objective over sequences and per state, near and far, and what is followed."""
    found = worlds.gradients(option)
    errors = [worlds.errors(found, o, distance=d) for o in (SEQUENCE, STATE) for d in ("near", "far")]
    return (*map(summary, errors), worlds.identifier.identify(found).follows)


def loss_cells(option: Option, on: Worlds, off: Worlds, gains: Identifier) -> Cells:
    """Errors against E[r] in groups of 4 and 8, and what the reward's part is off-policy."""
    small = on.gradients(option)
    errors = [on.errors(small, REWARD, lengths=lengths) for lengths in (EQUAL, ENDED)]
    errors.append(on.errors(on.gradients(option, group=8, lengths=ENDED), REWARD))
    follows = gains.identify(off.gradients(option, lengths=EQUAL))
    return (*map(summary, errors), follows.follows if follows.exact else "none of the three")


def whole_cells(option: Option, on: Worlds) -> Cells:
    """Errors against the objective over sequences, and what is followed."""
    found = on.gradients(option)
    errors = [on.errors(found, SEQUENCE, lengths=lengths) for lengths in (EQUAL, ENDED)]
    return (*map(summary, errors), on.identifier.identify(found).follows)


def lines(options: Iterable[Option], measure: Callable[[Option], Cells], columns: int) -> list[Line]:
    """One line for each option, or for those of a family that give the same numbers."""
    found: dict[tuple[str, str, Cells], list[str]] = {}
    for option in options:
        try:
            with undisturbed():
                cells = measure(option)
        except NotImplementedError:
            cells = (*["-"] * (columns - 1), "raises NotImplementedError")
        title = option.library if option.family is None else f"{option.library}, {option.family}"
        alone = option.setting if option.family is None else ""
        found.setdefault((title, alone, cells), []).append(option.setting)
    return [Line(f"{title}: {', '.join(names)}", cells) for (title, _, cells), names in found.items()]


def summary(errors: Sequence[float]) -> str:
    """The median, and the largest in brackets where it is another one.

    >>> summary([0.1, 0.2, 0.3, 1.0])
    '25% (100%)'
    """
    middle, largest = percent(median(errors)), percent(max(errors))
    return middle if middle == largest else f"{middle} ({largest})"


def percent(error: float) -> str:
    """Two or three digits, and 0 for rounding noise."""
    if error <= EXACT:
        return "0"
    return f"{100 * error:.0f}%" if error >= 0.1 else f"{100 * error:.2g}%"


def page() -> str:
    """The whole page in Markdown.

    Raises:
        ImportError: TRL or verl is not installed.
    """
    from keel.verify.peers import trl, verl

    installed = {name: version(name) for name in TESTED}
    on, off = Worlds(True), Worlds(False)
    gains = [s for s in off.where if s.lengths == EQUAL]
    rewards = Identifier(gains, on_policy=False, among=tuple(Candidate(gain) for gain in GAINS))
    divergences = [*trl.kl_options(BETA), *verl.kl_options(BETA)]
    losses = [*trl.loss_options(), *verl.loss_options()]
    whole = [*trl.whole_options(BETA), *verl.whole_options(BETA)]
    parts = [
        text.BEFORE.format(beta=BETA, on=len(candidates()), off=len(candidates(on_policy=False)), **installed),
        text.ON_POLICY,
        table(text.KL, lines(divergences, lambda option: kl_cells(option, on), 5)),
        text.OFF_POLICY,
        table(text.KL, lines(divergences, lambda option: kl_cells(option, off), 5)),
        text.LOSSES,
        table(text.LOSS, lines(losses, lambda option: loss_cells(option, on, off, rewards), 4)),
        text.FROM_REWARDS.format(beta=BETA),
        table(text.WHOLE, lines(whole, lambda option: whole_cells(option, on), 3)),
        text.TAKEAWAYS if installed == TESTED else "",
        text.AFTER,
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def table(columns: Sequence[str], rows: Sequence[Line]) -> str:
    """A table in Markdown."""
    return "\n".join([f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(row.markdown() for row in rows)])
