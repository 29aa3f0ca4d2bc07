"""Cells on a Ray cluster, and what comes back of them."""

import builtins
import json
from pathlib import Path

import pytest

from keel.compare.cluster import _packed, take_in
from keel.compare.entry import run
from keel.compare.record import load
from keel.core.errors import RunError
from keel.store.store import Store
from tests.compare.small import Told, asked, compared


def test_without_ray_the_extra_is_named(model, tmp_path, monkeypatch):
    find = builtins.__import__

    def without(name, *rest):
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return find(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RunError, match=r"pip install 'keel-rl\[ray\]'"):
        run(asked(model, tmp_path, "grpo", name="one", ray="local"), shown=Told())


def test_a_run_comes_back_with_all_that_was_stored_of_it(finished, tmp_path):
    """Packed there, entered here: curves, rollouts with their numbers, evaluations, summary and folder."""
    found, _, _, runs = finished
    name = found.comparison.outcomes[0].run
    there = tmp_path / "there"
    there.mkdir()
    (there / name).symlink_to(runs / name)
    import shutil

    shutil.copy(runs / "keel.sqlite", there / "keel.sqlite")
    (there / name).unlink()
    shutil.copytree(runs / name, there / name)
    packed, here = _packed(there), tmp_path / "here"
    for _ in range(2):  # a second time replaces the first
        take_in(packed, name, here)
    with Store(runs / "keel.sqlite", readonly=True) as one, Store(here / "keel.sqlite", readonly=True) as other:
        a, b = one.run(name), other.run(name)
        assert (a.summary, a.config, a.status, a.recipe) == (b.summary, b.config, b.status, b.recipe)
        assert one.metrics(a.id) == other.metrics(b.id)
        assert [e.evaluation for e in one.evaluations(a.id)] == [e.evaluation for e in other.evaluations(b.id)]
        drawn = [
            [(r.step, r.completion, sorted(r.numbers)) for r in s.rollouts(n)] for s, n in ((one, a.id), (other, b.id))
        ]
        assert drawn[0] == drawn[1] != []
    names = {p.relative_to(here / name).as_posix() for p in (here / name).rglob("*") if p.is_file()}
    assert {"config.yaml", "summary.json", "report.html", "checkpoint-2/model.safetensors"} <= names


def test_large_checkpoints_stay_where_they_are(finished, tmp_path, monkeypatch):
    found, _, _, runs = finished
    monkeypatch.setattr("keel.compare.cluster.LARGEST", 100)
    name = found.comparison.outcomes[0].run
    take_in(_packed(runs), name, tmp_path)
    assert not list((tmp_path / name).glob("checkpoint-*"))
    assert (tmp_path / name / "summary.json").exists()


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs on this machine."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_cells_on_a_cluster_give_the_same_numbers_as_here(cluster, finished, model, tmp_path):
    here, *_ = finished
    shown = Told()
    found = run(asked(model, tmp_path, "grpo", "dr_grpo", name="both", ray="local"), shown=shown)
    assert any("2 CPUs of the Ray cluster" in text for text in shown.said), shown.said
    assert not found.comparison.failed, found.comparison.failed
    for one, other in zip(found.comparison.outcomes, here.comparison.outcomes, strict=True):
        assert (one.arm, one.seed, one.run, one.tokens) == (other.arm, other.seed, other.run, other.tokens)
        for metric in ("pass@1", "kl", "entropy"):
            assert one.values[metric].tolist() == other.values[metric].tolist()
    assert load("both", tmp_path).of("grpo")[0].curves["reward"]
    _, said = compared(asked(model, tmp_path, "grpo", "dr_grpo", name="both"))
    assert "4 finished" in said[0]


@pytest.mark.slow
def test_failures_and_lost_nodes_are_reported(cluster, model, tmp_path, monkeypatch):
    """One cell ends its process, as a lost node does; one cannot find its data there."""
    own = tmp_path / "own.py"
    text = Path(__file__).with_name("lengths.py").read_text()
    own.write_text(
        text.replace(
            "    return [float", "    import os, signal\n    os.kill(os.getpid(), signal.SIGKILL)\n    return [float"
        )
    )
    shown = Told()
    wanted = asked(model, tmp_path / "runs", "grpo", name="one", seeds=1, ray="local", task=f"{own}:Lengths")
    found = run(wanted, shown=shown)
    (failed,) = found.comparison.failed
    assert failed.error.startswith("lost on the cluster (")
    assert sum("it is started again" in said for said in shown.said) == 2
    entry = json.loads((found.path / "comparison.json").read_text())["cells"]["grpo/0"]
    assert entry["error"] == failed.error
