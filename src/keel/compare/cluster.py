"""Cells on a Ray cluster: each a task with its number of CPUs, whose run comes back as bytes into the store here."""

import contextlib
import fcntl
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.compare.cell import BUSY, carry_out, probe, run_cell, setup_of
from keel.compare.plan import files_digest
from keel.compare.workers import Launch, Order, Room
from keel.core.errors import KeelError, RunError
from keel.store.store import Store
from keel.train.base import cache_directory
from keel.train.configuration import TINY

if TYPE_CHECKING:
    from keel.compare.work import Work

LOST, STOPPED = -9, 143  # exit statuses: of a task that has vanished, and of one that was told to stop
LARGEST = 100 << 20  # bytes of checkpoints that come back with a run; larger ones stay where they were made


@contextlib.contextmanager
def on_ray(address: str, work: "Work") -> Iterator[Launch]:
    """Connect to a cluster, for as long as cells are run on it.

    Args:
        address: as `ray.init` takes it; `local` starts a cluster on this machine, `auto` finds the one that there is.
        work: what is run; it is given the room that the cluster has.

    Raises:
        KeelError: Ray is not installed, or the cluster does not answer.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, include_dashboard=False if address == "local" else None, **_QUIET)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(f"the Ray cluster does not answer ({reason})", f"--ray {address}") from error
    try:
        cpus = int(ray.cluster_resources().get("CPU", 0))
        threads = work.room.threads
        if cpus < threads:
            raise RunError(f"has {cpus} CPUs, fewer than the {threads} threads of a cell", f"--ray {address}")
        workers = work.asked.workers or max(1, cpus // threads)
        work.room = Room(workers, threads, 0, f"{cpus} CPUs of the Ray cluster")
        sources = {setup.source for setup in work.plan.setups.values() if setup.config.model.path == TINY}
        models = {Path(source).name: ray.put(_packed(Path(source))) for source in sources}
        yield lambda order, slot: RayWorker(ray, order, models)
    finally:
        if ours:
            ray.shutdown()


_QUIET = {"log_to_driver": False, "configure_logging": False}


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise RunError(
            f"Ray cannot be imported ({error})", "--ray", "Install it: pip install 'keel-rl[ray]'."
        ) from error
    return ray


class RayWorker:
    """A task of the cluster; what it made is entered here when it is done.

    Args:
        ray: the package.
        order: what to run.
        models: the built-in models by the names of their folders, as references to bytes: other machines do not have
            them, and would train others.
    """

    def __init__(self, ray: Any, order: Order, models: Mapping[str, Any]):
        self.ray, self.order, self.status = ray, order, None
        order.write()
        self._lock = None if order.probe else _locked(order.runs / order.cell.name)
        if self._lock is None and not order.probe:
            self.status = BUSY
            return
        spec = {**order.spec(), "cwd": os.getcwd(), "files": order.cell.files, "probe": order.probe}
        task = ray.remote(num_cpus=order.threads, max_retries=0, max_calls=1)(carry_out_there)
        self.result = task.remote(spec, list(models), *models.values())

    def poll(self) -> int | None:
        """See `Worker`."""
        if self.status is not None:
            return self.status
        ready, _ = self.ray.wait([self.result], timeout=0)
        if not ready:
            return None
        try:
            self.status = self._take_in(self.ray.get(self.result))
        except self.ray.exceptions.TaskCancelledError:
            self.status = STOPPED
        except self.ray.exceptions.RayTaskError as error:  # raised by the task: Keel is not there, say
            self._fails(str(error.cause) if getattr(error, "cause", None) else str(error).strip().splitlines()[-1], 1)
        except self.ray.exceptions.RayError as error:  # its process, its node, or its result is gone
            kind = type(error).__name__
            self._fails(f"lost on the cluster ({kind}: {' '.join(str(error).split())[:200]})", LOST)
        if self._lock is not None:
            self._lock.close()
        return self.status

    def stop(self) -> None:
        """See `Worker`; what it has done is lost, since its checkpoints are on another machine."""
        if self.status is None:
            self.ray.cancel(self.result, force=False)

    def kill(self) -> None:
        """See `Worker`."""
        if self.status is None:
            self.ray.cancel(self.result, force=True)
            self.status = LOST

    def _take_in(self, found: Mapping[str, Any]) -> int:
        with self.order.path("log").open("a", encoding="utf-8") as log:
            log.write(f"on {found['node']}\n{found['log']}")
        self.order.path("out").write_text(json.dumps(found["result"]), encoding="utf-8")
        if found["archive"]:
            try:
                take_in(found["archive"], self.order.cell.name, self.order.runs)
            except (KeelError, OSError, tarfile.TarError) as error:
                return self._fails(f"its result cannot be entered here ({error})", 1)
        return int(found["status"])

    def _fails(self, why: str, status: int) -> int:
        self.order.path("out").write_text(json.dumps({"error": why}), encoding="utf-8")
        self.status = status
        return status


def _locked(folder: Path) -> Any:
    """The lock of a run, so that nobody runs it here meanwhile; None if somebody does."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


# -- on the cluster --------------------------------------------------------------------------------------------------


def carry_out_there(spec: dict[str, Any], names: list[str], *models: bytes) -> dict[str, Any]:
    """Run a cell in a folder that is thrown away, and give back what is to be kept of it."""
    import platform

    if Path(spec["cwd"]).is_dir():
        os.chdir(spec["cwd"])
    for name, packed in zip(names, models, strict=True):
        _unpack_model(name, packed)
    folder = Path(tempfile.mkdtemp(prefix="keel-cell-"))
    spec = {**spec, "runs": str(folder / "runs"), "result": str(folder / "out"), "launched": time.time()}
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = carry_out(spec, probe if spec["probe"] else _checked)
        result = json.loads((folder / "out").read_text(encoding="utf-8")) if (folder / "out").exists() else {}
        return {
            "status": status,
            "result": result,
            "node": platform.node(),
            "log": said.getvalue(),
            "archive": _packed(folder / "runs") if status == 0 and not spec["probe"] else b"",
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _checked(spec: Mapping[str, Any]) -> dict[str, float]:
    """Run a cell if the model and the data here are those of the machine that asked."""
    if (found := files_digest(setup_of(spec["config"]))) != spec["files"]:
        what = f"the model or the data are not the same there ({found} for {spec['files']})"
        raise RunError(what, spec["config"]["name"], "Put them under the same paths on all machines.")
    return run_cell(spec)


def _unpack_model(name: str, packed: bytes) -> None:
    final = cache_directory() / name
    if final.is_dir():
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=final.parent))
    try:
        _unpacked(packed, temporary)
        with contextlib.suppress(OSError):  # another task was faster
            os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _packed(folder: Path) -> bytes:
    """A folder as bytes; checkpoints only as far as they are small."""
    heavy = sum(p.stat().st_size for p in folder.rglob("checkpoint-*/**/*") if p.is_file()) > LARGEST
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz", compresslevel=1) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not (heavy and any(part.startswith("checkpoint-") for part in path.parts)):
                archive.add(path, str(path.relative_to(folder)))
    return target.getvalue()


def _unpacked(packed: bytes, folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
        archive.extractall(folder, filter="data")


# -- back here -------------------------------------------------------------------------------------------------------


def take_in(packed: bytes, name: str, runs: Path) -> None:
    """Enter a run that was made elsewhere into the runs here: its folder, and all that the store there says of it.

    Args:
        packed: the folder of runs there.
        name: of the run.
        runs: the folder of runs here.

    Raises:
        RunError: there is no such run in it.
    """
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".taken-in-", dir=runs) as temporary:
        _unpacked(packed, Path(temporary))
        shutil.copytree(Path(temporary) / name, runs / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        with Store(Path(temporary) / "keel.sqlite") as there, Store(runs / "keel.sqlite") as here:
            _copy_run(there, here, name)


def _copy_run(there: Store, here: Store, name: str) -> None:
    run = there.run(name)
    try:
        number = here.create_run(name, run.config or {}, run.recipe, run.task, run.model, run.seed)
    except RunError:
        number = here.run(name).id
        here.rewind(number, -1)
    by_step: dict[int, dict[str, float]] = {}
    for metric, curve in there.metrics(run.id).items():
        for step, value in curve:
            by_step.setdefault(step, {})[metric] = value
    for step, metrics in sorted(by_step.items()):
        here.log_metrics(number, step, metrics)
    for step, count in there.rollout_counts(run.id).items():
        here.log_rollouts(number, step, there.rollouts(run.id, step, limit=count))
    for one in there.evaluations(run.id):
        here.log_evaluation(number, one.step, one.phase, one.evaluation)
    here.finish(number, run.status, run.summary)
