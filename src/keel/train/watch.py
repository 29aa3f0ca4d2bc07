"""The diagnosis while a run goes on: a sentence when something begins, and not again."""

from collections.abc import Mapping, Sequence
from typing import Any

from keel.report.diagnosis import Finding, Level, diagnose

EVERY = 5  # steps between two looks, at least; later a fiftieth of the steps done, so that long runs are not slowed
GRAVE = (Level.PROBLEM, Level.WARNING)
TOLD = ("not_finite", "reward_errors")  # of which the loop warns by itself, each time


class Watch:
    """Looks at the metrics now and then; what is found twice in a row has begun.

    A finding is told once, and again only if it has become graver.

    Args:
        config: the resolved configuration.
        metrics: curves of the steps that an earlier process has done, whose findings count as told.
    """

    def __init__(self, config: Mapping[str, Any], metrics: Mapping[str, Sequence[tuple[int, float]]] | None = None):
        self.config = config
        self.curves = {name: list(curve) for name, curve in (metrics or {}).items()}
        self.told: dict[tuple[str, str], Level] = {}
        self.last: dict[tuple[str, str], Finding] = self._look() if self.curves else {}
        self.told = {key: finding.level for key, finding in self.last.items()}
        self.next = max((curve[-1][0] for curve in self.curves.values() if curve), default=0) + EVERY

    def step(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """What has begun, as of this step."""
        for name, value in metrics.items():
            self.curves.setdefault(name, []).append((step, value))
        if step < self.next:
            return []
        self.next = step + max(EVERY, step // 50)
        found, before = self._look(), self.last
        self.last = found
        begun = [f for key, f in found.items() if key in before and self._graver(f, self.told.get(key))]
        self.told |= {_key(f): f.level for f in begun}
        return begun

    def _look(self) -> dict[tuple[str, str], Finding]:
        found = diagnose(self.curves, self.config)
        return {_key(f): f for f in found if f.level in GRAVE and f.kind not in TOLD}

    @staticmethod
    def _graver(finding: Finding, told: Level | None) -> bool:
        return told is None or (finding.level is Level.PROBLEM and told is not Level.PROBLEM)


def _key(finding: Finding) -> tuple[str, str]:
    return finding.kind, finding.setting
