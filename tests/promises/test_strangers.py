"""A folder from a stranger runs no code: whatever lies in it, no canary sings, and errors say what is refused."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest

from keel.core.errors import DataError, KeelError, UserError
from keel.models.load import load
from keel.train.entry import export

EVIL = "import pathlib; pathlib.Path({canary!r}).write_text('code of a stranger was run')\n"


class Bomb:
    """Unpickling it writes the canary."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (exec, (EVIL.format(canary=str(self.canary)),))


@pytest.fixture
def canary(tmp_path):
    """A file that must not appear."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), path.read_text()


@pytest.fixture
def stranger(model, tmp_path):
    """A copy of a good model to put traps into."""
    return shutil.copytree(model, tmp_path / "stranger")


def test_the_traps_work(tmp_path):
    """Otherwise the tests below would show nothing."""
    path = tmp_path / "works"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.exists()


def bomb(path, canary):
    import torch

    torch.save({"weight": Bomb(canary)}, path)


PICKLES = ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "model.pkl")


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_beside_the_weights_are_not_opened(model, stranger, canary, name):
    bomb(stranger / name, canary)
    found, wanted = load(stranger).module.state_dict(), load(model).module.state_dict()
    assert found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_with_the_reason(stranger, canary, name):
    (stranger / "model.safetensors").unlink()
    bomb(stranger / name, canary)
    if "-of-" in name:
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (stranger / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"pickled.*Keel reads safetensors only"):
        load(stranger)


def test_pickled_weights_behind_other_safetensors_are_refused(stranger, canary):
    """A file of the right kind under another name does not lead to the pickle."""
    (stranger / "model.safetensors").rename(stranger / "decoy.safetensors")
    bomb(stranger / "pytorch_model.bin", canary)
    with pytest.raises(UserError, match="safetensors"):
        load(stranger)


def test_an_adapter_that_is_pickled_is_refused(model, tmp_path, canary):
    from keel.models.adapters import LoRA
    from keel.models.load import save

    folder = tmp_path / "adapter"
    save(load(model, lora=LoRA(2)), folder)
    load(folder)
    (folder / "adapter_model.safetensors").unlink()
    bomb(folder / "adapter_model.bin", canary)
    with pytest.raises(UserError, match=r"pickled.*Keel reads safetensors only"):
        load(folder)


def with_code(folder, canary, known):
    """A model or a tokenizer that names classes in files of its own."""
    (folder / "evil.py").write_text(EVIL.format(canary=str(canary)) + "class Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    if not known:
        config.update(model_type="evil", architectures=["Evil"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_model_is_not_run(stranger, canary, known, monkeypatch):
    """Of an architecture that transformers knows its own code is used; another is refused, and nothing is asked."""
    with_code(stranger, canary, known)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if known:
        load(stranger)
        return
    with pytest.raises(UserError, match=r"Python code of its own.*trust_remote_code"):
        load(stranger)


def test_code_of_a_tokenizer_is_not_run(model, stranger, canary, monkeypatch):
    (stranger / "evil.py").write_text(EVIL.format(canary=str(canary)) + "class Evil: pass\n")
    config = json.loads((stranger / "tokenizer_config.json").read_text())
    config.update(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    (stranger / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        found = load(stranger)
    except KeelError as error:
        assert "trust_remote_code" in str(error) or "tokenizer" in str(error)
    else:
        assert found.tokenizer("1+1=").input_ids == load(model).tokenizer("1+1=").input_ids


def test_a_model_in_memory_does_not_lead_to_the_code_of_its_folder(stranger, canary, monkeypatch):
    """Its tokenizer is looked for where it came from; on a terminal transformers would ask, and a `y` would run it."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(stranger)
    (stranger / "evil.py").write_text(EVIL.format(canary=str(canary)) + "class Evil: pass\n")
    config = json.loads((stranger / "tokenizer_config.json").read_text())
    config.update(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    (stranger / "tokenizer_config.json").write_text(json.dumps(config))
    (stranger / "tokenizer.json").unlink()
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="tokenizer"):
        load(module)


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{% for m in messages %}{{ m.content.__class__.__base__.__subclasses__() }}{% endfor %}",
    "{{ raise_exception('no') }}",
    "{{ messages[9].content }}",
    "{% for",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_is_no_way_out(stranger, canary, template):
    from keel.train.encode import Encoder

    (stranger / "chat_template.jinja").write_text(template.replace("CANARY", str(canary)))
    config = json.loads((stranger / "tokenizer_config.json").read_text())
    config["chat_template"] = template.replace("CANARY", str(canary))
    (stranger / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"chat template refuses|no tokens"):
        Encoder(load(stranger)).prompt([{"role": "user", "content": "1"}])


YAML = [
    "!!python/object/apply:exec ['CODE']",
    "name: !!python/object/apply:exec ['CODE']",
    "seed: !!python/object/new:os.system [touch CANARY]",
    "recipe: !!python/module:evil",
    "recipe: !!python/name:evil.Evil",
]


def tagged(text, canary):
    return text.replace("CODE", EVIL.format(canary=str(canary)).strip().replace("'", '"')).replace(
        "CANARY", str(canary)
    )


@pytest.mark.parametrize("text", YAML)
def test_python_tags_in_a_configuration_are_refused(train, tmp_path, canary, text, monkeypatch):
    (tmp_path / "evil.py").write_text(EVIL.format(canary=str(canary)))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "config.yaml").write_text(tagged(text, canary))
    with pytest.raises(UserError, match=r"config\.yaml: is not valid YAML"):
        train(None, config=tmp_path / "config.yaml")


@pytest.mark.parametrize("text", YAML)
def test_python_tags_in_the_configuration_of_a_run_to_resume_are_refused(train, tmp_path, canary, text):
    run = train(max_steps=1)
    (run.path / "summary.json").unlink()
    (run.path / "config.yaml").write_text(tagged(text, canary))
    with pytest.raises(UserError, match=r"config\.yaml: is not valid YAML"):
        train(max_steps=1, resume=True)


def test_traps_in_a_checkpoint_are_not_touched_when_it_is_resumed_sampled_and_exported(train, tmp_path, canary):
    import keel

    def power_cut(event, facts):
        if event == "step" and facts["step"] == 2:
            raise RuntimeError("power cut")

    settings = {"max_steps": 2, "train.save_steps": 1}
    with pytest.raises(RuntimeError, match="power cut"):
        train(report=power_cut, **settings)
    folder = tmp_path / "runs/run/checkpoint-1"
    for name in (*PICKLES, "keel/optimiser.pkl", "keel/states.pt"):
        bomb(folder / name, canary)
    for name in ("sitecustomize.py", "usercustomize.py", "conftest.py", "keel/__init__.py", "torch.py", "json.py"):
        (folder / name).write_text(EVIL.format(canary=str(canary)))
    run = train(resume=True, **settings)
    assert run.summary["status"] == "finished"
    for place in (folder, run.path):
        keel.sample(str(place), ["1+1="], max_completion_length=4)
    export(run.path, tmp_path / "out")


SHADOWS = ("sitecustomize", "usercustomize", "json", "torch", "threading", "keel", "math_verify", "queue")


@pytest.mark.parametrize(
    "reward", ["keel.parts.rewards.functions:ExactMatch", "keel.parts.rewards.functions:MathVerify"]
)
def test_a_worker_started_in_the_folder_of_a_stranger_imports_nothing_from_it(tmp_path, canary, monkeypatch, reward):
    """Python puts the current directory before its own modules."""
    from keel.parts.rewards.worker import RewardWorker

    folder = tmp_path / "there"
    folder.mkdir()
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(EVIL.format(canary=str(canary)))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    with RewardWorker(reward) as worker:
        assert worker(["1+1="], ["2"], [[1]], answer=["2"]) == [1.0]


@pytest.mark.slow
def test_the_command_run_in_the_folder_of_a_stranger_imports_nothing_from_it(stranger, canary, tmp_path):
    for name in SHADOWS:
        (stranger / f"{name}.py").write_text(EVIL.format(canary=str(canary)))
    command = os.path.join(os.path.dirname(sys.executable), "keel")
    if not os.path.exists(command):
        pytest.skip("the command is not installed")
    given = ["sample", "1+1=", "--model", ".", "-n", "1", "--set", "max_completion_length=4", "--json"]
    done = subprocess.run([command, *given], cwd=stranger, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_manifest_does_not_lead_out_of_its_checkpoint(train, tmp_path):
    """The names in it are compared, never written to."""
    from keel.train.checkpoint import damage

    run = train(max_steps=1)
    checkpoint = run.path / run.summary["checkpoint"]
    manifest = json.loads((checkpoint / "keel/manifest.json").read_text())
    manifest["../../../../etc/passwd"] = "0"
    (checkpoint / "keel/manifest.json").write_text(json.dumps(manifest))
    assert damage(checkpoint) in [f"../../../../etc/passwd {what}" for what in ("is missing", "was changed")]
