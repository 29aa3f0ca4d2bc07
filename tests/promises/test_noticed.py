"""Small slips that would break a promise without any other test being the wiser."""

import json
import os
import shutil
import signal

import pytest
from tests.promises.runs import DATA
from tests.promises.test_damaged import cut_off
from tests.promises.test_strangers import EVIL, with_code

import keel
from keel.core.errors import CheckpointError, UserError
from keel.models.adapters import LoRA
from keel.models.load import load, save
from keel.train.checkpoint import _digest, checkpoints
from keel.train.encode import Encoder
from keel.train.entry import export
from keel.train.lifecycle import Stopped
from keel.train.optimiser import Optimiser

FORGETFUL = {
    "schedule": {"train.lr_scheduler": "linear", "train.warmup_steps": 2},
    "average": {"beta": 0.5, "models.ref": {"part": "ema", "kappa": 0.5}},
    "adapter": {"model.lora_rank": 2, "model.lora_dropout": 0.5, "train.dropout": True},
    "short of data": {"data": DATA[:3], "task.held_out": 0.0},
}


@pytest.mark.parametrize("settings", FORGETFUL.values(), ids=FORGETFUL)
def test_everything_that_a_run_remembers_survives_a_resumption(train, settings):
    """Where it is in a schedule, a moving reference, an adapter, and the pass over the data."""
    settings = {"max_steps": 4, "train.save_steps": 1, "train.save_total_limit": 3, **settings}
    whole = train(name="whole", **settings)
    cut_off(train, **settings)
    again = train(resume=True, **settings)
    assert again.summary["checksum"] == whole.summary["checksum"]
    for name in ("loss", "learning_rate", "grad_norm"):
        assert again.metrics[name] == whole.metrics[name]


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(train, monkeypatch):
    """Of a name that is on the disk before its files a power cut would leave empty files."""
    flushed, renamed = set(), []
    flush, rename = os.fsync, os.rename

    def noted(handle):
        flushed.add(os.fstat(handle).st_ino)
        flush(handle)

    def checked(source, target):
        if "checkpoint" in str(target):
            renamed.append(target)
            missing = [p for p in (source, *source.rglob("*")) if p.stat().st_ino not in flushed]
            assert not missing, f"{missing} are not on the disk yet"
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", checked)
    run = train(max_steps=1)
    assert renamed == [run.path / "checkpoint-1"]
    assert run.path.stat().st_ino in flushed, "the new name itself is not on the disk"


def test_a_damaged_checkpoint_goes_when_its_successor_is_there(train, monkeypatch):
    """What is damaged may still be worth something to its owner, if the successor cannot be put in place."""
    rename, kept = os.rename, []

    def checked(source, target):
        if source.name == ".checkpoint-1.writing":
            kept.extend(target.parent.rglob("precious"))
        rename(source, target)

    def leave_a_damaged_one(event, facts):
        if event == "step":
            (facts_of["session"].path / "checkpoint-1").mkdir()
            (facts_of["session"].path / "checkpoint-1/precious").touch()
        facts_of.update(facts if event == "start" else {})

    facts_of: dict = {}
    monkeypatch.setattr(os, "rename", checked)
    run = train(max_steps=1, report=leave_a_damaged_one)
    assert len(kept) == 1 and not list(run.path.rglob("precious"))


@pytest.mark.parametrize("how", ["interrupts", "error"])
def test_half_a_step_is_never_saved(train, tmp_path, monkeypatch, how):
    """The first of two updates of a batch is made; no earlier checkpoint stands in the place of the wrong one."""
    step = Optimiser.step

    def broken(self, norm):
        step(self, norm)
        if self.count == 3:
            if how == "error":
                raise ValueError("broken")
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Optimiser, "step", broken)
    with pytest.raises((Stopped, ValueError), match=r"at once|broken"):
        train(max_steps=3, **{"train.save_steps": 100, "train.num_minibatches": 2})
    assert not checkpoints(tmp_path / "runs/run")


def test_a_checkpoint_of_another_format_is_refused(train):
    """One of a later Keel, whose checksums are right."""
    settings = {"max_steps": 2, "train.save_steps": 1}
    run = train(**settings)
    (run.path / "summary.json").unlink()
    newest = run.path / "checkpoint-2/keel"
    facts = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**facts, "format": facts["format"] + 1}))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["keel/state.json"] = _digest(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"checkpoint-2: has format 2, this version reads 1"):
        train(resume=True, **settings)


def test_what_is_left_of_a_long_prompt_is_its_end(model):
    encoder = Encoder(load(model), max_prompt_length=3)
    assert encoder.decode(encoder.prompt("1" * 60 + "+2=")) == "+2="


def test_a_value_with_a_python_tag_is_text(tmp_path):
    """What `--set` is given may have been copied from anywhere."""
    from keel.train.configuration import parse_value

    canary = tmp_path / "canary"
    for call in ("os.system", "subprocess.getoutput", "posix.system"):
        text = f"!!python/object/apply:{call} ['touch {canary}']"
        assert parse_value(text) == text
    assert parse_value("!!python/name:os.system") == "!!python/name:os.system"
    assert not canary.exists()


WAYS = {
    "train": lambda folder, train: train(model=folder, max_steps=1),
    "evaluate": lambda folder, _: keel.evaluate(folder, data=DATA, reward=lambda completions, **_: [1.0]),
    "sample": lambda folder, _: keel.sample(folder, ["1+1="], max_completion_length=2),
    "export": lambda folder, _: export(folder, folder + "-out"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_way_to_a_model_runs_its_code(train, model, tmp_path, monkeypatch, way):
    """Nobody has asked for it; on a terminal transformers would ask, and a `y` would run it."""
    canary = tmp_path / "canary"
    folder = shutil.copytree(model, tmp_path / "stranger")
    with_code(folder, canary, known=False)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match=r"Python code of its own.*trust_remote_code"):
        way(str(folder), train)
    assert not canary.exists()


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_code_behind_an_adapter_is_not_run(model, tmp_path, monkeypatch, where):
    """An adapter leads to its base, and brings a tokenizer of its own."""
    canary = tmp_path / "canary"
    base = shutil.copytree(model, tmp_path / "base")
    save(load(base, lora=LoRA(2)), tmp_path / "adapter")
    load(tmp_path / "adapter")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if where == "base":
        with_code(base, canary, known=False)
    else:
        file = tmp_path / "adapter/tokenizer_config.json"
        classes = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
        file.write_text(json.dumps({**json.loads(file.read_text()), **classes}))
        (tmp_path / "adapter/evil.py").write_text(EVIL.format(canary=str(canary)) + "class Evil: pass\n")
    with pytest.raises(UserError, match=r"Python code of its own.*trust_remote_code"):
        load(tmp_path / "adapter")
    assert not canary.exists()
