"""What is left of a run when files are cut, changed or gone."""

import json
import random
import shutil

import pytest

from keel.core.errors import CheckpointError, UserError
from keel.models.load import checksum
from keel.train.checkpoint import checkpoints, damage

STOPPED = {"max_steps": 4, "train.save_steps": 1, "train.save_total_limit": 3}


def cut_off(train, name="run", at=3, **settings):
    """A run with checkpoints 1 and 2 that ended in its third step; its folder."""

    def power_cut(event, facts):
        if event == "step" and facts["step"] == at:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(name=name, report=power_cut, **{**STOPPED, **settings})


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    data = bytearray(file.read_bytes())
    place = random.Random(file.name).randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(bytes(data))


def empty(file):
    file.write_bytes(b"")


def remove(file):
    file.unlink()


def into_nothing(file):
    file.write_text("{}")


ATTACKS = [cut, flip, empty, remove]


@pytest.fixture(scope="module")
def interrupted(model, tmp_path_factory):
    """The folder `runs` of an interrupted run, and the checksum with which an uninterrupted one ends."""
    from tests.promises.runs import start

    runs = tmp_path_factory.mktemp("interrupted")
    cut_off(lambda **settings: start(model, runs, **settings))
    whole = start(model, runs / "whole", **STOPPED)
    return runs, whole.summary["checksum"]


def test_every_change_of_every_file_is_seen(interrupted, tmp_path):
    runs, _ = interrupted
    sound = runs / "run" / "checkpoint-2"
    assert damage(sound) is None
    files = [p.relative_to(sound) for p in sorted(sound.rglob("*")) if p.is_file()]
    assert len(files) >= 8
    for number, name in enumerate(files):
        for attack in ATTACKS:
            copy = tmp_path / f"{number}-{attack.__name__}"
            shutil.copytree(sound, copy)
            attack(copy / name)
            said = damage(copy)
            assert said is not None, f"{attack.__name__} {name}"
            assert name.name in said or "manifest" in said
            shutil.rmtree(copy)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"keel/state.json"', "\x00", '{"model.safetensors": ""}'])
def test_a_manifest_that_says_nothing_does_not_make_a_checkpoint_sound(interrupted, tmp_path, content):
    shutil.copytree(interrupted[0] / "run" / "checkpoint-2", tmp_path / "copy")
    (tmp_path / "copy/keel/manifest.json").write_text(content)
    assert damage(tmp_path / "copy") == "its manifest cannot be read"


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (cut, "model.safetensors"),
        (flip, "keel/optimiser.safetensors"),
        (remove, "keel/state.json"),
        (into_nothing, "keel/manifest.json"),
    ],
)
def test_the_checkpoint_before_the_damaged_one_is_taken_and_named(interrupted, train, tmp_path, attack, name):
    before, expected = interrupted
    shutil.copytree(before, tmp_path / "runs")
    attack(tmp_path / "runs/run/checkpoint-2" / name)
    said = []
    run = train(resume=True, report=lambda event, facts: said.append((event, facts)), **STOPPED)
    warnings = [facts["text"] for event, facts in said if event == "warning"]
    notes = [facts["text"] for event, facts in said if event == "note"]
    assert len(warnings) == 1 and "checkpoint-2 is damaged" in warnings[0]
    assert any(note.endswith("checkpoint-1") for note in notes)
    assert run.summary["checksum"] == expected
    assert all(damage(found) is None for found in checkpoints(run.path))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_with_all_checkpoints_damaged_nothing_is_deleted_and_the_error_says_so(interrupted, train, tmp_path):
    from keel.store.store import Store

    shutil.copytree(interrupted[0], tmp_path / "runs")
    path = tmp_path / "runs" / "run"
    for checkpoint in checkpoints(path):
        flip(checkpoint / "model.safetensors")
    before = contents(path)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is damaged \(.*\); checkpoint-1 is damaged .*Nothing was"):
        train(resume=True, **STOPPED)
    assert contents(path) == before
    with Store(tmp_path / "runs" / "keel.sqlite", readonly=True) as store:
        stored = store.run("run")
        assert stored.step == 3 and len(store.metrics(stored.id)["loss"]) == 3


def test_a_damaged_newer_checkpoint_never_pushes_out_a_sound_older_one(train, tmp_path):
    """With room for a single checkpoint, one of a later step stands there, damaged, while an earlier step is saved."""
    import keel.train.checkpoint as module

    seen = {}

    def look(event, facts):
        if event == "start":
            seen["session"] = facts["session"]
        if event == "step" and facts["step"] == 2:
            later = seen["session"].path / "checkpoint-9"
            later.mkdir()
            saved = module.save_checkpoint(seen["session"])
            seen["left"] = [p.name for p in checkpoints(seen["session"].path)]
            assert damage(saved) is None

    train(report=look, max_steps=3, **{"train.save_steps": 1, "train.save_total_limit": 1})
    assert seen["left"] == ["checkpoint-2", "checkpoint-9"]


def test_the_number_of_checkpoints_is_kept(train):
    run = train(max_steps=6, **{"train.save_steps": 1, "train.save_total_limit": 4})
    assert [p.name for p in checkpoints(run.path)] == [f"checkpoint-{n}" for n in (3, 4, 5, 6)]


def test_a_finished_run_with_a_damaged_end_does_its_last_steps_again(train):
    """It must not pass the model of an earlier checkpoint for the finished one."""
    first = train(**STOPPED)
    flip(first.path / "checkpoint-4" / "model.safetensors")
    said = []
    again = train(resume=True, report=lambda event, facts: said.append(facts.get("text", "")), **STOPPED)
    assert any("checkpoint-4 is damaged" in text for text in said)
    assert checksum(again.model) == first.summary["checksum"] == again.summary["checksum"]
    assert damage(first.path / "checkpoint-4") is None


@pytest.mark.parametrize("name", ["initial.json", "config.yaml"])
@pytest.mark.parametrize("attack", [cut, empty])
def test_other_damaged_files_are_named(interrupted, train, tmp_path, name, attack):
    shutil.copytree(interrupted[0], tmp_path / "runs")
    attack(tmp_path / "runs" / "run" / name)
    with pytest.raises(UserError, match="run"):
        train(resume=True, **STOPPED)


def test_a_state_that_does_not_fit_is_no_traceback(interrupted, train, tmp_path):
    """A checkpoint whose checksums are right, but that something else has written."""
    from keel.train.checkpoint import _digest

    shutil.copytree(interrupted[0], tmp_path / "runs")
    newest = tmp_path / "runs/run/checkpoint-2"
    facts = json.loads((newest / "keel/state.json").read_text())
    facts["position"]["__class__"] = "other"
    (newest / "keel/state.json").write_text(json.dumps(facts))
    manifest = json.loads((newest / "keel/manifest.json").read_text())
    manifest["keel/state.json"] = _digest(newest / "keel/state.json")
    (newest / "keel/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not fit this run"):
        train(resume=True, **STOPPED)
