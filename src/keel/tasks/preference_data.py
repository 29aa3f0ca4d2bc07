"""One's own preferences: JSON lines, Parquet, data sets of `datasets`, and lists of dictionaries."""

from typing import Any

from keel.core.errors import DataError
from keel.tasks.data import DataTask
from keel.tasks.preferences import COLUMNS, Kind, Preference, Preferences
from keel.tasks.task import Example


def load_preferences(data: Any, kind: Kind, held_out: Any = 0.05, seed: int = 0) -> Preferences:
    """Preferences of one's own data, as a method of this kind reads them."""
    found = []
    for i, row in enumerate(data):
        if not {"prompt", "chosen", "rejected"} <= set(row):
            raise DataError(f"no pair: this method reads {COLUMNS[kind]}", f"row {i + 1}")
        found.append(Preference(row["prompt"], (row["chosen"], row["rejected"]), (1.0, 0.0), i))
    cut = max(1, round(len(found) * (1 - held_out)))
    return Preferences("data", kind, found[:cut], found[cut:])


def prompts_of(preferences: Preferences) -> DataTask:
    """The prompts of preferences as a task without verifiers; each prompt once."""
    sides = []
    for split in (preferences.train, preferences.held_out):
        seen = {str(p.prompt): p for p in split}
        sides.append([Example(p.prompt, dict(p.columns), i, p.domain) for i, p in enumerate(seen.values())])
    return DataTask(preferences.name, *sides)
