"""Processes that run cells on this machine, and how many of them there is room for."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from keel.compare.plan import Cell

ROOM = 1 << 30  # bytes of a worker besides its model
COPIES = 6  # of the weights: gradients, two moments, a reference, activations


class Worker(Protocol):
    """A cell that is being run somewhere."""

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        ...

    def stop(self) -> None:
        """Ask it to write a checkpoint after the step in progress, and to end."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


Launch = Callable[["Order", int], Worker]  # an order and the slot that it is given


@dataclass(frozen=True)
class Order:
    """What a worker is told.

    Args:
        cell: what to run.
        runs: folder of all runs.
        folder: where its files are: NAME.json (this order), NAME.log, NAME.out.
        threads: of torch.
        probe: only see how long it takes.
    """

    cell: Cell
    runs: Path
    folder: Path
    threads: int
    probe: bool = False

    def path(self, ending: str) -> Path:
        """One of its files."""
        return self.folder / f"{'probe-' if self.probe else ''}{self.cell.name}.{ending}"

    def spec(self) -> dict[str, Any]:
        """What `keel.compare.cell` reads."""
        return {
            "config": self.cell.config.to_dict(),
            "runs": str(self.runs.resolve()),
            "threads": self.threads,
            "result": str(self.path("out").resolve()),
            "launched": time.time(),
        }

    def write(self) -> Path:
        """The file of the order; the result of an earlier try is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path("out").unlink(missing_ok=True)
        self.path("json").write_text(json.dumps(self.spec(), indent=1, default=str), encoding="utf-8")
        return self.path("json")

    def result(self) -> dict[str, Any]:
        """What it wrote at its end; empty where it did not come so far."""
        try:
            found = json.loads(self.path("out").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


class LocalWorker:
    """A process of its own, in a session of its own: Ctrl-C reaches it through who started it alone."""

    def __init__(self, order: Order, slot: int, gpus: int = 0):
        path = order.write()
        threads = str(order.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        if gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = visible_gpu(slot % gpus)
        flags = ["--probe"] if order.probe else []
        with order.path("log").open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "keel.compare.cell", *flags, str(path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    def poll(self) -> int | None:
        """See `Worker`."""
        status = self.process.poll()
        if status is not None and self.process.stdin is not None:
            self.process.stdin.close()
        return status

    def stop(self) -> None:
        """See `Worker`."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """See `Worker`."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


def local(gpus: int = 0) -> Launch:
    """Launches processes here.

    Args:
        gpus: over how many of them the slots are dealt; 0 or 1 leaves the choice to the run.
    """
    return lambda order, slot: LocalWorker(order, slot, gpus)


def visible_gpu(place: int) -> str:
    """The name of one of the GPUs that this process may use."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[place] if place < len(named) else str(place)


@dataclass(frozen=True)
class Room:
    """How cells share this machine.

    Args:
        workers: processes at a time.
        threads: of each.
        gpus: that they share.
        why: in words.
    """

    workers: int
    threads: int
    gpus: int = 0
    why: str = ""

    def __str__(self) -> str:
        processes = f"{self.workers} process{'' if self.workers == 1 else 'es'}"
        each = "" if self.workers == 1 else " each"
        said = f"{processes} of {self.threads} thread{'' if self.threads == 1 else 's'}{each}"
        return f"{said} ({self.why})" if self.why else said


def room_for(count: int, weights: int, device: str | None, workers: int | None, threads: int | None) -> Room:
    """As many workers as cores, memory, GPUs and cells allow, unless the numbers are given.

    Args:
        count: cells to run.
        weights: bytes of the model's weights.
        device: of the configuration; None takes a GPU where there is one.
        workers, threads: as asked for; threads are 1 by default, so that numbers do not depend on the machine's cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    each = threads or 1
    gpus = _gpus(device)
    if gpus:
        limits = {f"{gpus} GPU{'' if gpus == 1 else 's'}": gpus}
    else:
        limits = {f"{cores} cores": max(1, cores // each)}
        if (free := _free_memory()) is not None:
            limits["memory"] = max(1, free // (ROOM + COPIES * weights))
    limits[f"{count} cell{'' if count == 1 else 's'}"] = max(1, count)
    why, most = min(limits.items(), key=lambda item: item[1])
    return Room(workers, each, gpus) if workers is not None else Room(most, each, gpus, why)


def _gpus(device: str | None) -> int:
    if device is not None and not device.startswith("cuda"):
        return 0
    import torch

    if not torch.cuda.is_available():
        return 0
    return 1 if device not in (None, "cuda") else torch.cuda.device_count()


def _free_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def weights_of(source: Any) -> int:
    """Bytes of a model's weights on disk; 0 where that is not known."""
    if not isinstance(source, str | Path) or not Path(source).is_dir():
        return 0
    return sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))


def failure(status: int, result: Mapping[str, Any]) -> str:
    """Why a worker ended without a result, in one line.

    >>> failure(-9, {})
    'killed by SIGKILL (out of memory, perhaps)'
    """
    if result.get("error"):
        return " ".join(str(result["error"]).split())[:400]
    if status < 0:
        name = signal.Signals(-status).name if -status in signal.valid_signals() else f"signal {-status}"
        return f"killed by {name}{' (out of memory, perhaps)' if -status == signal.SIGKILL else ''}"
    return f"ended with status {status}" if status else "ended without a result"
