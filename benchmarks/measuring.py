"""How times, ratios and memory are measured."""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        work: what is done, in words.
        setting: how it is asked of Keel; "default" where nothing is set.
        ours, theirs: medians, in `unit`.
        unit: of the two.
        ratio: how many times better Keel is.
        goal: ratio to reach, or None.
        accuracy: what the setting costs in accuracy; empty where nothing.
        command: measures this line.
    """

    work: str
    setting: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    goal: float | None
    accuracy: str
    command: str


def alternate(ways: Sequence[Callable[[], object]], repeats: int, *, warm: int = 1) -> list[list[float]]:
    """Seconds of each way, measured in turn, so that whatever else the machine does meets all of them."""
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(warm + repeats):
        for way, found in zip(ways, seconds, strict=True):
            gc.collect()
            begun = time.perf_counter()
            way()
            if turn >= warm:
                found.append(time.perf_counter() - begun)
    return seconds


def medians(ways: Sequence[Callable[[], object]], repeats: int, *, warm: int = 1) -> list[float]:
    """Median seconds of each way."""
    return [statistics.median(found) for found in alternate(ways, repeats, warm=warm)]


class PeakMemory:
    """Resident memory of this process: `before` entering, and the `peak` until leaving, in bytes (Linux)."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        self.before = self.peak = _status("VmRSS")
        return self

    def __exit__(self, *failure: object) -> None:
        self.peak = _status("VmHWM")

    @property
    def extra(self) -> int:
        """Bytes beyond what was there before."""
        return self.peak - self.before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def in_process(code: str, threads: int) -> dict[str, float]:
    """What `code`, run in a process of its own, prints as JSON in its last line.

    Raises:
        RuntimeError: the process failed.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"a measured process failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def as_json(rows: Sequence[Row]) -> str:
    """The rows, for another program."""
    return json.dumps([asdict(row) for row in rows], indent=1)
