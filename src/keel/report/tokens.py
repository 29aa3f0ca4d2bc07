"""A completion token by token: which numbers are known of each, what they mean, and how much of them is much."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keel.core.errors import UserError, nearest
from keel.store.records import StoredRollout

CHOSEN = "chosen"  # 1 for tokens of the model, 0 for those of a tool or an environment
DEFAULT = ("entropy", "advantage", "kl", "weight/")

# What a stored name means, its unit, and the value that says nothing; names with a slash mean all that begin so.
_MEANINGS: dict[str, tuple[str, str, float | None]] = {
    "entropy": ("entropy of the policy at the token", "nats", None),
    "advantage": ("advantage", "", 0.0),
    "advantage/": ("advantage {}", "", 0.0),
    "kl": ("KL to the reference", "nats", None),
    "divergence/": ("{} to the reference", "nats", None),
    "log_prob": ("log-probability under the sampler", "nats", 0.0),
    "log_prob_ref": ("log-probability under the reference", "nats", 0.0),
    "ratio": ("probability over that of the policy that sampled", "", 1.0),
    "weight/": ("weight {}", "factor", 1.0),
    "mask/": ("picked by the mask {}", "0 or 1", None),
    "term/": ("{} in the loss, before the mean over tokens", "loss", 0.0),
    "gradient": ("slope of the loss in the token's log-probability", "loss / nat", 0.0),
    "gradient/by/": ("slope of the loss in {}", "", 0.0),
    "gradient/": ("slope of {} in the token's log-probability", "loss / nat", 0.0),
}
_SHORT = ("weight/", "term/", "mask/", "divergence/")  # may be named without what stands before the slash


@dataclass(frozen=True, eq=False)
class Quantity:
    """One number per token.

    Args:
        name: as it is stored.
        says: what it is.
        unit: of the values; may be empty.
        centre: the value that says nothing (0 for an advantage, 1 for a weight); None where the least is 0.
        values: [T], NaN where there is none.
    """

    name: str
    says: str
    unit: str
    centre: float | None
    values: np.ndarray

    @property
    def range(self) -> tuple[float, float] | None:
        """Smallest and largest finite value; None without any."""
        known = self.values[np.isfinite(self.values)]
        return (float(known.min()), float(known.max())) if known.size else None


@dataclass(frozen=True)
class Scale:
    """How much is much: share(v) = (v - centre) / reach, cut to [-1, 1]; without a centre, from `low`.

    >>> Scale.of([np.array([0.5, 1.0, 3.0])], centre=1.0).share(0.0)
    -0.5
    """

    low: float
    high: float
    centre: float | None

    @staticmethod
    def of(values: Sequence[np.ndarray], centre: float | None) -> Scale:
        """The scale of the finite ones among some values; one that starts at 0 where none is negative."""
        known = np.concatenate([np.asarray(v, dtype=float).ravel() for v in values]) if values else np.zeros(0)
        known = known[np.isfinite(known)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
        if centre is None:
            return Scale(min(0.0, low), high, None)
        reach = max(abs(high - centre), abs(low - centre))
        return Scale(centre - reach, centre + reach, centre)

    def share(self, value: float) -> float:
        """Of the whole range, with the sign of the side; 0 for NaN."""
        start = self.low if self.centre is None else self.centre
        if math.isnan(value) or self.high == start:
            return 0.0
        return max(-1.0, min(1.0, (value - start) / (self.high - start)))


def chosen(rollout: StoredRollout) -> np.ndarray:
    """Which tokens the model chose, [T]; the others are a tool's."""
    flags = rollout.numbers.get(CHOSEN)
    return np.ones(len(rollout.tokens), dtype=bool) if flags is None else flags > 0.5


def quantities(rollout: StoredRollout) -> list[Quantity]:
    """All that is stored per token, in a fixed order.

    Raises:
        UserError: the tokens of this completion were not stored.
    """
    if not rollout.tokens:
        what = "there are no tokens" if rollout.length == 0 else "its tokens were not stored"
        raise UserError(f"Rollout {rollout.id} cannot be explained: {what}.")
    found = []
    for name, values in rollout.numbers.items():
        if name == CHOSEN or values.shape != (len(rollout.tokens),):
            continue
        says, unit, centre = _meaning(name)
        found.append(Quantity(name, says, unit, centre, values.astype(float)))
    order: list[str | None] = [*_MEANINGS, None]
    return sorted(found, key=lambda q: (order.index(_key(q.name)), q.name))


def pick(known: Sequence[Quantity], wanted: Sequence[str] | None) -> list[Quantity]:
    """The quantities of some names; by default entropy, advantage, KL and the weights.

    Args:
        wanted: stored names, or those of a part (`clip` for weight/clip, term/clip and mask/clip).

    Raises:
        UserError: a name that is not there; those that are, are named.
    """
    if not wanted:
        usual = [q for q in known if q.name in DEFAULT or any(q.name.startswith(d) for d in DEFAULT if "/" in d)]
        return usual or list(known)
    found: dict[str, Quantity] = {}
    for name in wanted:
        here = [q for q in known if q.name == name]
        here = here or [q for q in known if any(q.name == f"{before}{name}" for before in _SHORT)]
        if not here:
            names = [q.name for q in known]
            what = f"there is no number per token named '{name}'.{nearest(name, names)}"
            raise UserError(what, "--by", f"Stored here: {', '.join(names) or 'none'}.")
        found.update({q.name: q for q in here})
    return list(found.values())


def visible(token: str, spaces: bool = False) -> str:
    """A token as one line of printable characters; one without text is the beginning of a character, `⋯`.

    Args:
        spaces: show every space as `·`, not only those of a token that is nothing else.

    >>> visible("a b"), visible(" "), visible("\\n\\n"), visible("\\x1b[2J")
    ('a b', '·', '↵↵', '␛[2J')
    """
    if not token:
        return "⋯"
    dots = spaces or not token.strip(" \t\r\n")
    return "".join(_shown(character, dots) for character in token)


def lines(token: str) -> list[str]:
    """The same, broken after each line break of the token; the last one is empty where it ends with one.

    >>> lines("a\\n\\nb"), lines("\\n")
    (['a↵', '↵', 'b'], ['↵', ''])
    """
    if "\n" not in token:
        return [visible(token)]
    dots = not token.strip(" \t\r\n")
    return ["".join(_shown(c, dots) for c in line) + "↵" for line in token.split("\n")[:-1]] + [
        "".join(_shown(c, dots) for c in token.rpartition("\n")[2])
    ]


def _shown(character: str, dots: bool) -> str:
    if character == "\n":
        return "↵"
    if character == "\t":
        return "⇥"
    if character == " ":
        return "·" if dots else " "
    if character < " ":
        return chr(0x2400 + ord(character))
    if character == "\x7f" or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"⟨{ord(character):x}⟩"
    return character


def _key(name: str) -> str | None:
    return next((k for k in _MEANINGS if k == name or (k.endswith("/") and name.startswith(k))), None)


def _meaning(name: str) -> tuple[str, str, float | None]:
    key = _key(name)
    if key is None:
        return name.replace("_", " "), "", 0.0
    says, unit, centre = _MEANINGS[key]
    return says.format(name[len(key) :]), unit, centre
