"""Which one should I use? Answers for ten wishes, taken from the numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cells import BASE
from benchmarks.claims import EQUAL, written
from benchmarks.evidence import Arm, Evidence, Scalar, at
from keel.evaluate.intervals import Interval
from keel.recipes.registry import recipe_named

LISTED = 6  # methods that are named as not told from the best


@dataclass(frozen=True)
class Wish:
    """What somebody may want.

    Args:
        text: in words.
        measure: what is to be large.
        name: of the measure.
        task: on which it is measured.
        sign: -1 where less is better.
        equal: only methods whose pass@1 there is not below grpo's by more than `EQUAL`.
        own: only methods that learn from samples of the policy: what a sampler of the tilt draws earns more anyway.
    """

    text: str
    measure: str | Scalar
    name: str
    task: str = "countdown"
    sign: int = 1
    equal: bool = False
    own: bool = False


WISHES = (
    Wish("The best single answer", "pass@1", "pass@1"),
    Wish("Many different tries: the best of sixteen", "pass@16", "pass@16", equal=True),
    Wish("An entropy that stays", "entropy", "entropy", equal=True),
    Wish("Little change of the model", "kl", "KL", sign=-1, equal=True),
    Wish("The answer that most samples agree on", "maj@32", "maj@32"),
    Wish("Short completions", "length", "length", sign=-1, equal=True),
    Wish("Rewards that are rare at first", "pass@1", "pass@1", "sparse"),
    Wish("A task that is nearly solved, without losing its variety", "entropy", "entropy", "saturated", equal=True),
    Wish("A reward that can be hacked", "gold", "true reward", "proxy"),
    Wish("Several turns", "pass@1", "pass@1", "number_guessing"),
    Wish("A tool", "pass@1", "pass@1", "countdown_calculator"),
    Wish("The fastest learning", at("curves", "reward", 3), "training reward after a third of the steps", own=True),
)


@dataclass(frozen=True)
class Answer:
    """The best of those measured, by a wish.

    Args:
        wish: what was asked.
        best: the arm with the best mean; None if nothing was measured.
        value: its number.
        over_grpo: its difference to grpo.
        like: further arms that cannot be told from it, best first.
        among: how many were compared.
        seeds: of the best.
    """

    wish: Wish
    best: Arm | None = None
    value: Interval | None = None
    over_grpo: Interval | None = None
    like: tuple[Arm, ...] = ()
    among: int = 0
    seeds: int = 0

    def sentence(self) -> str:
        """For the page."""
        if self.best is None or self.value is None or self.over_grpo is None:
            return f"**{self.wish.text}**: not measured yet."
        where = "" if self.wish.task == "countdown" else f" on `{self.wish.task}`"
        text = f"**{self.wish.text}**: `{self.best.label}`, {self.wish.name} {self.value.value:.3f}{where}"
        if self.best != Arm("grpo", self.wish.task):
            text += f", {written(self.over_grpo)} to grpo"
            if not self.over_grpo.known or self.over_grpo.low <= 0 <= self.over_grpo.high:
                text += ", which may be chance"
        text += f"; best of {self.among}, {self.seeds} seed{'s' if self.seeds > 1 else ''}."
        if self.like:
            named = ", ".join(f"`{arm.label}`" for arm in self.like[:LISTED])
            more = f" and {len(self.like) - LISTED} more" if len(self.like) > LISTED else ""
            text += f" The interval of the difference includes 0 for {named}{more}."
        elif self.seeds > 1:
            text += " All others are measurably behind."
        else:
            text += (
                " All others are behind by more than the prompts explain; how much runs differ, one seed cannot say."
            )
        return text


def answer(wish: Wish, evidence: Evidence, arms: Sequence[Arm]) -> Answer:
    """The one that is furthest ahead of grpo, and those whose difference to it has an interval that includes 0."""
    grpo = Arm("grpo", wish.task)
    found = []
    for arm in arms:
        if arm.task != wish.task or not evidence.has(arm) or (wish.own and not _samples_of_the_policy(arm)):
            continue
        value = evidence.measure(arm, wish.measure)
        allowed = not wish.equal or evidence.difference(arm, grpo, "pass@1").value > -EQUAL
        ahead = evidence.difference(arm, grpo, wish.measure).value if evidence.has(grpo) else value.value
        if math.isfinite(ahead) and allowed:  # on the seeds that both have: some seeds are luckier than others
            found.append((wish.sign * ahead, arm, value))
    if not found:
        return Answer(wish)
    found.sort(key=lambda entry: -entry[0])
    _, best, value = found[0]
    like = []
    for _, arm, _ in found[1:]:
        apart = evidence.difference(best, arm, wish.measure)
        if not apart.known or apart.low <= 0 <= apart.high:
            like.append(arm)
    return Answer(
        wish,
        best,
        value,
        evidence.difference(best, grpo, wish.measure),
        tuple(like),
        len(found),
        len(evidence.seeds(best)),
    )


def _samples_of_the_policy(arm: Arm) -> bool:
    rollout = None if arm.recipe == BASE else recipe_named(arm.recipe)().rollout
    return rollout is not None and rollout.sampler is None
