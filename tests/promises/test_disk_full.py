"""A disk that is full: what was written before stays, and the error says which file and what to do."""

import sqlite3

import pytest
from tests.promises.test_killed import outcome, whole

from keel.core.errors import CheckpointError, KeelError, RunError
from keel.store.store import Store
from keel.train.checkpoint import checkpoints, damage

SETTINGS = {"max_steps": 4, "train.save_steps": 1, "train.save_total_limit": 2}


def sound_store(path):
    with sqlite3.connect(path) as db:
        return db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("limit", [10, 2_000, 12_000])
def test_no_earlier_checkpoint_is_lost_and_the_run_goes_on_when_there_is_room(launch, tmp_path, limit):
    expected, _ = whole(launch, tmp_path, SETTINGS)
    runs = tmp_path / "full"
    process = launch(runs, {"limit": limit, "limit_from": 3}, **SETTINGS)
    assert process.wait() == 1, process.said
    assert "Traceback" not in process.said
    error = next(line for line in process.said.splitlines() if line.startswith("keel:"))
    assert str(runs) in error and "Make room" in error and "--resume" in error
    folder = runs / "run"
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    assert all(damage(found) is None for found in checkpoints(folder))
    assert not list(folder.glob(".checkpoint-*")), "half a checkpoint would fill the disk for nothing"
    assert sound_store(runs / "keel.sqlite")
    again = launch(runs, resume=True, **SETTINGS)
    assert again.wait() == 0, again.said
    assert outcome(runs) == expected


def test_a_store_that_cannot_grow_says_so_and_is_not_damaged(launch, tmp_path):
    """The journal of the store is larger than the limit, the files of a checkpoint are not yet written."""
    process = launch(attack={"limit": 10, "limit_from": 1}, **{**SETTINGS, "train.save_steps": 0})
    assert process.wait() == 1, process.said
    assert "keel.sqlite" in process.said and "Make room" in process.said and "Traceback" not in process.said
    assert sound_store(tmp_path / "runs" / "keel.sqlite")
    with Store(tmp_path / "runs" / "keel.sqlite", readonly=True) as store:
        assert store.run("run").step == 1


def test_a_report_that_cannot_be_written_is_an_error_in_one_line(train, tmp_path, monkeypatch):
    """After the last checkpoint: the run can be finished once there is room."""
    import keel.train.lifecycle as module

    def full(path):
        raise OSError(28, "No space left on device", str(path / "report.html"))

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_report", full)
        with pytest.raises(RunError, match=r"report\.html: cannot be written .*Make room"):
            train(max_steps=1)
    assert train(max_steps=1, resume=True).summary["status"] == "finished"


@pytest.mark.parametrize("part", ["optimiser.safetensors", "heads.safetensors", "states.safetensors", "manifest.json"])
def test_the_error_names_the_file(train, tmp_path, monkeypatch, part):
    """Errors of any kind from what writes: Rust's, Python's, SQLite's."""
    import keel.train.checkpoint as module

    whole_write, text = module.save_file, module.Path.write_text

    def save_file(tensors, path):
        if path.name == part:
            raise module.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return whole_write(tensors, path)

    def write_text(path, *arguments, **options):
        if path.name == part:
            raise OSError(28, "No space left on device", str(path))
        return text(path, *arguments, **options)

    monkeypatch.setattr(module, "save_file", save_file)
    monkeypatch.setattr(module.Path, "write_text", write_text)
    with pytest.raises(CheckpointError, match=f"{part}: this checkpoint cannot be written .*No space left") as error:
        train(max_steps=1)
    assert isinstance(error.value, KeelError) and "Make room" in error.value.fix
    with Store(tmp_path / "runs" / "keel.sqlite", readonly=True) as store:
        assert store.run("run").status == "failed"
