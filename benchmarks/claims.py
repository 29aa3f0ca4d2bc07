"""What papers say their methods do, as comparisons that cells can decide."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.evidence import Arm, Evidence, Scalar, at, minus, over
from keel.evaluate.intervals import Interval

APPEARED, NOT, UNDECIDED, NOTHING = "appeared", "did not appear", "undecided", "not measurable here"
EQUAL = 0.03  # what "at equal reward" leaves room for, in pass@1

Quantity = Callable[[Evidence], Interval]


@dataclass(frozen=True)
class Part:
    """One number and where it has to lie.

    Args:
        what: the number, in words.
        quantity: reads it.
        low, high: where it has to lie.
    """

    what: str
    quantity: Quantity
    low: float = -math.inf
    high: float = math.inf

    def judge(self, evidence: Evidence) -> tuple[str, Interval]:
        """Appeared if the whole interval lies where it has to, did not appear if all of it lies elsewhere."""
        found = self.quantity(evidence)
        if not math.isfinite(found.value) or not found.known:
            return UNDECIDED, found
        if found.low > self.low and found.high < self.high:
            return APPEARED, found
        if found.high <= self.low or found.low >= self.high:
            return NOT, found
        return UNDECIDED, found


@dataclass(frozen=True)
class Effect:
    """An effect that a paper claims.

    Args:
        recipe: the method.
        says: the effect.
        parts: all of which have to hold.
        not_here: why it cannot be measured, in place of parts.
    """

    recipe: str
    says: str
    parts: tuple[Part, ...] = ()
    not_here: str = ""


@dataclass(frozen=True)
class Verdict:
    """An effect as measured.

    Args:
        effect: the claim.
        verdict: appeared, did not appear, undecided, not measurable here.
        numbers: each part's number in words.
    """

    effect: Effect
    verdict: str
    numbers: tuple[str, ...]


def judge(effect: Effect, evidence: Evidence) -> Verdict:
    """The verdict: one part that did not appear decides, all have to appear."""
    if effect.not_here:
        return Verdict(effect, NOTHING, (effect.not_here,))
    found = [(part, *part.judge(evidence)) for part in effect.parts]
    said = tuple(f"{part.what}: {written(number)}" for part, _, number in found)
    verdicts = [verdict for _, verdict, _ in found]
    if NOT in verdicts:
        return Verdict(effect, NOT, said)
    return Verdict(effect, APPEARED if all(v == APPEARED for v in verdicts) else UNDECIDED, said)


def written(number: Interval) -> str:
    """
    >>> written(Interval(0.1234, 0.1, 0.15)), written(Interval(math.nan, math.nan, math.nan))
    ('+0.123 [+0.100, +0.150]', 'not run')
    """
    if not math.isfinite(number.value):
        return "not run"
    if not number.known:
        return f"{number.value:+.3f} (one seed)"
    return f"{number.value:+.3f} [{number.low:+.3f}, {number.high:+.3f}]"


# -- how parts are written -------------------------------------------------------------------------------------------


Against = str | Arm
BONUS, HELD = Arm("grpo", arguments=(("entropy_coef", 0.001),)), Arm("grpo", arguments=(("beta", 0.04),))


def change(
    name: str,
    measure: str | Scalar,
    recipe: str,
    other: Against = "grpo",
    task: str = "countdown",
    low: float = -math.inf,
    high: float = math.inf,
) -> Part:
    """recipe - other."""
    one, two = Arm(recipe, task), Arm(other, task) if isinstance(other, str) else other
    return Part(f"{name}, less {two.label}'s", lambda evidence: evidence.difference(one, two, measure), low, high)


def more(name: str, measure: str | Scalar, recipe: str, other: Against = "grpo", task: str = "countdown") -> Part:
    """Above the other's."""
    return change(name, measure, recipe, other, task, low=0.0)


def less(name: str, measure: str | Scalar, recipe: str, other: Against = "grpo", task: str = "countdown") -> Part:
    """Below the other's."""
    return change(name, measure, recipe, other, task, high=0.0)


def as_good(recipe: str, other: Against = "grpo", task: str = "countdown") -> Part:
    """At equal reward."""
    return change("pass@1", "pass@1", recipe, other, task, low=-EQUAL)


def own(name: str, measure: str | Scalar, recipe: str, task: str = "countdown", **bounds: float) -> Part:
    """A number of the method itself."""
    return Part(name, lambda evidence: evidence.measure(Arm(recipe, task), measure), **bounds)


def kept(recipe: str, measure: str, task: str = "countdown") -> Part:
    """Not below the model before training."""
    return change(measure, measure, recipe, "base", task, low=-EQUAL)


ENTROPY = "entropy"
CURVE = at("entropy_end")
FALL = over(at("entropy_end"), at("entropy_start"))
ZERO = at("probe_before", "zero_groups")
EARLY = at("curves", "reward", 3)
RARE = minus(at("probe_after", "rare_share"), at("probe_before", "rare_share"))


def _keeps_entropy(*names: str) -> tuple[Effect, ...]:
    says = "At equal reward, entropy ends clearly above GRPO's."
    return tuple(Effect(n, says, (as_good(n), more("entropy", ENTROPY, n))) for n in names)


def _keeps_answers(*names: str) -> tuple[Effect, ...]:
    says = "pass@16 does not fall below the initial model's, where GRPO's does, and pass@1 is not lower than GRPO's."
    return tuple(
        Effect(
            n,
            says,
            (kept(n, "pass@16"), more("pass@16", "pass@16", n), less("pass@16", "pass@16", "grpo", "base"), as_good(n)),
        )
        for n in names
    )


EFFECTS: tuple[Effect, ...] = (
    *_keeps_entropy("clip_cov", "kl_cov"),
    Effect(
        "disco",
        "Entropy stays flat where GRPO's falls.",
        (
            more("entropy", ENTROPY, "disco"),
            own("entropy at the end over that at the start", FALL, "disco", low=0.8, high=1.25),
        ),
    ),
    Effect(
        "drpo",
        "Correct completions get shorter at equal pass@1, and none is punished.",
        (
            as_good("drpo", "disco"),
            less("length of correct ones", at("length_right"), "drpo", "disco"),
            own("share of correct ones that are punished", at("probe_after", "right_punished"), "drpo", high=1e-9),
        ),
    ),
    Effect(
        "lp_reg",
        "The share of sampled tokens of probability 0.01 to 0.1 stays nearer to the first one than GRPO's, and entropy "
        "neither collapses nor explodes.",
        (
            more("change of that share", RARE, "lp_reg"),
            own("entropy at the end over that at the start", FALL, "lp_reg", low=0.5, high=2.0),
        ),
    ),
    Effect(
        "oreal",
        "Where few completions are right at first, the reward rises faster than RLOO's.",
        (more("reward", "reward", "oreal", "rloo", "sparse"),),
    ),
    Effect(
        "copo",
        "No prompt is left without a gradient, and reward on hard prompts rises earlier than GRPO's.",
        (
            own("share of prompts without a gradient", ZERO, "copo", high=0.02),
            more("reward of the first third on `sparse`", EARLY, "copo", task="sparse"),
        ),
    ),
    Effect(
        "steer",
        "The entropy changes less from step to step than under Clip-Cov, at equal reward.",
        (
            as_good("steer", "clip_cov"),
            less("deviation of the step's change", at("entropy_change"), "steer", "clip_cov"),
        ),
    ),
    Effect(
        "gtpo",
        "Shared format tokens keep their probability while fewer than half of the completions are right.",
        not_here="the completions have no format tokens; their shared beginnings are part of the answer",
    ),
    Effect(
        "hapo",
        "Less clipping on tokens of high entropy than DAPO; entropy falls where it is low and not where it is high.",
        not_here="a batch is used for two updates, in which next to nothing is clipped",
    ),
    Effect(
        "siren",
        "Entropy stays within a factor of two of its start, and pass@16 does not fall below the initial one.",
        (
            own("entropy at the end over that at the start", FALL, "siren", low=0.5, high=2.0),
            kept("siren", "pass@16"),
        ),
    ),
    Effect(
        "epo",
        "The hinge makes the entropy vary less over the steps than the bonus alone.",
        (as_good("epo", BONUS), less("deviation of the entropy", at("entropy_spread"), "epo", BONUS)),
    ),
    Effect(
        "aepo",
        "Entropy ends within a fifth of its target, 0.5.",
        (own("entropy", ENTROPY, "aepo", low=0.4, high=0.6),),
    ),
    Effect(
        "dcpo",
        "The entropy follows its target, 0.5, as AEPO's does.",
        (own("entropy", ENTROPY, "dcpo", low=0.4, high=0.6),),
    ),
    Effect(
        "occupancy_chi2",
        "On a proxy with a hidden true reward, the true reward ends above that under a KL.",
        (more("true reward", "gold", "occupancy_chi2", "rloo", "proxy"),),
    ),
    Effect(
        "rapo",
        "pass@k of many tries ends above the initial model's, on a task whose solutions it seldom writes; GRPO's does "
        "not.",
        (
            change("pass@16", "pass@16", "rapo", "base", "sparse", low=0.0),
            more("pass@16", "pass@16", "rapo", task="sparse"),
        ),
    ),
    Effect(
        "par",
        "The true reward does not fall where a proxy is over-optimised, as PPO's does.",
        (more("true reward", "gold", "par", "ppo", "proxy"),),
    ),
    Effect(
        "unlikeliness",
        "pass@k of many tries above GRPO's, at about equal pass@1.",
        (as_good("unlikeliness"), more("pass@16", "pass@16", "unlikeliness")),
    ),
    Effect(
        "pear",
        "Completions get shorter, and accuracy stays.",
        not_here="the completions have no thinking apart from the answer",
    ),
    Effect(
        "ares",
        "Length falls on easy prompts and not on hard ones, so that it goes down with the pass rate.",
        (less("correlation of length and pass rate", at("length_against_pass"), "ares", "base"),),
    ),
    Effect(
        "riskpo",
        "At equal reward, entropy ends above GRPO's, and pass@k gains more than pass@1.",
        (
            as_good("riskpo"),
            more("entropy", ENTROPY, "riskpo"),
            more("pass@16 less pass@1", minus(at("means", "pass@16"), at("means", "pass@1")), "riskpo"),
        ),
    ),
    Effect(
        "mu_ppo",
        "The proxy stays at its threshold, and the true reward does not fall as that of PPO does.",
        (more("true reward", "gold", "mu_ppo", "ppo", "proxy"),),
    ),
    Effect(
        "xi_ppo",
        "The proxy stays at its threshold, and the true reward does not fall as that of PPO does.",
        (more("true reward", "gold", "xi_ppo", "ppo", "proxy"),),
    ),
    Effect(
        "safe",
        "The KL stays below that of PPO, at equal reward.",
        (as_good("safe", "ppo"), less("KL", "kl", "safe", "ppo")),
    ),
    Effect(
        "apo",
        "The KL ends below GRPO's without one, and wrong completions get shorter.",
        (less("KL", "kl", "apo"), less("length of wrong ones", at("length_wrong"), "apo")),
    ),
    Effect(
        "recap",
        "A further task is forgotten less than under GRPO.",
        not_here="every task here has one reward",
    ),
    *_keeps_answers("dph_rl", "grpo_forward_kl"),
    Effect(
        "kdrl",
        "Groups that are all wrong still have a gradient, and accuracy is not below GRPO's.",
        not_here="no task here has a stronger teacher; the recipe's default, the initial model, is none",
    ),
    Effect(
        "prl",
        "At equal reward, less KL and a higher pass@k than GRPO with k3 in the loss, and more entropy than GRPO.",
        (
            as_good("prl", HELD),
            less("KL", "kl", "prl", HELD),
            more("pass@16", "pass@16", "prl", HELD),
            more("entropy", ENTROPY, "prl"),
        ),
    ),
)


def effects(names: Sequence[str]) -> list[Effect]:
    """Those of the recipes that there are."""
    return [effect for effect in EFFECTS if effect.recipe in names]
