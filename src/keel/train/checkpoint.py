"""Checkpoints: safetensors and JSON only, checksummed, written under a temporary name and renamed.

checkpoint-N/    weights and tokenizer as `from_pretrained` reads them
  keel/          optimiser, heads, moving models, states, position, and a manifest with a checksum of every file
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from keel.core.errors import CheckpointError
from keel.core.rows import Rows
from keel.models.load import save
from keel.statistics.stats import Stats

if TYPE_CHECKING:
    from keel.train.session import Session

FORMAT = 1
MANIFEST = "keel/manifest.json"
STATE = "keel/state.json"


def save_checkpoint(session: "Session") -> Path:
    """Write the session's state; older checkpoints beyond `save_total_limit` are removed afterwards.

    A sound checkpoint of the same step holds the same state already, so it stays.

    Raises:
        CheckpointError: it cannot be written, because the disk is full for example; the earlier ones are untouched.
    """
    assert session.path is not None
    step = session.position.step
    final = session.path / f"checkpoint-{step}"
    if final.is_dir() and damage(final) is None:
        return final
    temporary = session.path / f".checkpoint-{step}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(session, temporary)
        _put_in_place(temporary, final)
    except CheckpointError:
        shutil.rmtree(temporary, ignore_errors=True)  # what was written would fill the disk for nothing
        raise
    earlier = [old for old in checkpoints(session.path) if _step(old) < step]
    for old in earlier[: max(0, len(earlier) + 1 - session.config.train.save_total_limit)]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(session: "Session", folder: Path) -> None:
    with _explained(folder):
        (folder / "keel").mkdir(parents=True)
    with _explained(folder / "model.safetensors"):
        save(session.policy, folder)
    _write_tensors(folder / "keel/optimiser.safetensors", session.optimiser.tensors())
    _write_tensors(folder / "keel/heads.safetensors", _heads(session))
    for name, source in session.sources.items():
        if source.moving:
            _write_tensors(folder / f"keel/model-{name}.safetensors", source.tensors())
    states, tensors = _split(session.states)
    _write_tensors(folder / "keel/states.safetensors", tensors)
    facts = {
        "format": FORMAT,
        "position": asdict(session.position),
        "updates": session.optimiser.count,
        "states": states,
        "controllers": session.controller_states,
        "last_metrics": session.metrics[-1] if session.metrics else {},
    }
    with _explained(folder / STATE):
        (folder / STATE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    with _explained(folder / MANIFEST):
        manifest = {str(p.relative_to(folder)): _digest(p) for p in files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for place in [*files, folder / MANIFEST, folder / "keel", folder]:
        with _explained(place):
            _flush(place)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename what was written; a damaged checkpoint of the same step goes only when the new one is there."""
    aside = final.with_name(f".{final.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    with _explained(final):
        if final.exists():
            os.rename(final, aside)
        os.rename(temporary, final)
        _flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _explained(place: Path) -> Iterator[None]:
    """Say which file cannot be written, and what to do; the libraries that write raise errors of many kinds."""
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"this checkpoint cannot be written ({reason})",
            str(place),
            "Make room on the disk (or raise its quota) and continue with --resume; earlier checkpoints are untouched.",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)


def remove_unfinished(path: Path) -> None:
    """Remove what a process left that was killed while it wrote; nobody else may be working on the run."""
    for ending in ("writing", "damaged"):
        for left in path.glob(f".checkpoint-*.{ending}"):
            shutil.rmtree(left, ignore_errors=True)


def checkpoints(path: Path) -> list[Path]:
    """Complete or damaged, the oldest first."""
    found = [p for p in path.glob("checkpoint-*") if p.name.split("-")[-1].isdigit() and p.is_dir()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def newest_sound(path: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as they were written, and what was wrong with newer ones."""
    complaints: list[str] = []
    for candidate in reversed(checkpoints(path)):
        fault = damage(candidate)
        if fault is None:
            return candidate, complaints
        complaints.append(f"{candidate.name} is damaged ({fault})")
    return None, complaints


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "its manifest cannot be read"
    if not isinstance(manifest, dict) or STATE not in manifest:
        return "its manifest cannot be read"
    for name, digest in manifest.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            found = _digest(file)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != digest:
            return f"{name} was changed"
    return None


def restore(session: "Session", checkpoint: Path) -> None:
    """Everything but the policy's weights, which were loaded from the checkpoint before the session was built.

    Raises:
        CheckpointError: it was written by another version of Keel, or does not fit the method.
    """
    facts = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"has format {facts.get('format')}, this version reads {FORMAT}", str(checkpoint))
    try:
        _restore(session, checkpoint, facts)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"does not fit this run ({what})", str(checkpoint)) from error


def _restore(session: "Session", checkpoint: Path, facts: Mapping[str, Any]) -> None:
    session.position = type(session.position)(**facts["position"])
    session.optimiser.restore(load_file(checkpoint / "keel/optimiser.safetensors"), facts["updates"])
    tensors = load_file(checkpoint / "keel/heads.safetensors")
    for name, head in session.heads.items():
        head.load_state_dict({k.split("/", 1)[1]: v for k, v in tensors.items() if k.split("/", 1)[0] == name})
    for name, source in session.sources.items():
        if source.moving:
            source.restore(load_file(checkpoint / f"keel/model-{name}.safetensors"))
    session.states = _joined(facts["states"], load_file(checkpoint / "keel/states.safetensors"))
    session.controller_states = facts["controllers"]
    session.metrics = [facts["last_metrics"]] if facts["last_metrics"] else []


def keep_batch(session: "Session", rows: Rows, stats: Stats) -> Path | None:
    """The tokens and statistics of an update that was skipped, for inspection."""
    if session.path is None:
        return None
    folder = session.path / "skipped"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"prompt_ids": rows.prompt_ids, "tokens": rows.tokens, "mask": rows.mask}
    for name in ("reward", "advantage", "token_reward"):
        if (value := getattr(rows, name)) is not None:
            tensors[name] = value
    tensors |= {f"logp.{name}": value for name, value in rows.logp.items()}
    tensors |= {functional.name: value.detach() for functional, value in stats.items()}
    path = folder / f"step-{session.position.step}-{session.position.skipped}.safetensors"
    _write_tensors(path, tensors)
    return path


def _heads(session: "Session") -> dict[str, Tensor]:
    return {f"{name}/{key}": value for name, head in session.heads.items() for key, value in head.state_dict().items()}


def _split(states: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Parts' memories as JSON with their tensors apart; every memory is a dictionary of tensors and plain values."""
    plain: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for path, memory in states.items():
        plain[path] = {key: value for key, value in memory.items() if not isinstance(value, Tensor)}
        tensors |= {f"{path}/{key}": value for key, value in memory.items() if isinstance(value, Tensor)}
    return plain, tensors


def _joined(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    states: dict[str, Any] = {path: dict(memory) for path, memory in plain.items()}
    for name, value in tensors.items():
        path, key = name.rsplit("/", 1)
        states[path][key] = value
    return states


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with _explained(path):
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _flush(path: Path) -> None:
    """Make sure that a file or a directory entry is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
