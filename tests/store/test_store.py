"""The store: round trips, resume, foreign and damaged files, several processes."""

import math
import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from keel.core.errors import KeelError, RunError, UserError
from keel.store.opening import StoreBusy
from keel.store.records import StoredRollout
from keel.store.schema import VERSION
from keel.store.store import Store

CONFIG = {"recipe": {"name": "grpo", "arguments": {"beta": 0.1}}, "seed": 3, "train": {"learning_rate": 7e-5}}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "runs" / "keel.sqlite"


@pytest.fixture
def store(path):
    with Store(path) as store:
        yield store


def new_run(store, name="first", **changes) -> int:
    known = dict(config=CONFIG, recipe="grpo", task="countdown", model="tiny", seed=3) | changes
    return store.create_run(name, **known)


def test_a_run_comes_back_as_it_was_written(store):
    number = new_run(store)
    run = store.run("first")
    assert (run.id, run.recipe, run.task, run.model, run.seed) == (number, "grpo", "countdown", "tiny", 3)
    assert run.config == CONFIG and run.status == "running" and run.finished is None and run.summary == {}
    store.finish(number, "failed", {"reason": "out of memory", "step": 7})
    run = store.run("first")
    assert run.status == "failed" and run.summary == {"reason": "out of memory", "step": 7}
    assert run.finished >= run.created


def test_names_are_unique_and_errors_say_what_to_do(store):
    new_run(store, "grpo-kl")
    with pytest.raises(RunError, match=r"named 'grpo-kl'\. Resume it"):
        new_run(store, "grpo-kl")
    with pytest.raises(RunError, match="Did you mean 'grpo-kl'"):
        store.run("grpo-k1")
    with pytest.raises(KeelError, match="no run number 99"):
        store.log_metrics(99, 1, {"reward": 1.0})
    with pytest.raises(KeelError, match="no run number 99"):
        store.rewind(99, 1)


def test_metrics_keep_every_float(store):
    number = new_run(store)
    odd = {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "tiny": 5e-324, "third": 1 / 3, "zero": -0.0}
    store.log_metrics(number, 1, odd)
    store.log_metrics(number, 2, {"third": 2 / 3, "count": 7, "array": np.float32(0.5)})
    curves = store.metrics(number)
    assert math.isnan(curves.pop("nan")[0][1])
    assert curves == {
        "inf": [(1, math.inf)],
        "minus": [(1, -math.inf)],
        "tiny": [(1, 5e-324)],
        "third": [(1, 1 / 3), (2, 2 / 3)],
        "zero": [(1, -0.0)],
        "count": [(2, 7.0)],
        "array": [(2, 0.5)],
    }
    assert store.metrics(number, ["third", "nothing"]) == {"third": [(1, 1 / 3), (2, 2 / 3)]}
    store.log_metrics(number, 2, {"third": 0.5})
    assert store.metrics(number, ["third"])["third"] == [(1, 1 / 3), (2, 0.5)]
    assert store.run("first").step == 2


def test_metrics_of_runs_stay_apart(store):
    one, two = new_run(store, "one"), new_run(store, "two")
    store.log_metrics(one, 1, {"reward": 1.0})
    store.log_metrics(two, 1, {"reward": 2.0})
    assert store.metrics(one) == {"reward": [(1, 1.0)]} and store.metrics(two) == {"reward": [(1, 2.0)]}


def test_a_step_is_written_whole_or_not_at_all(store):
    number = new_run(store)
    with pytest.raises(TypeError):
        store.log_rollouts(number, 4, [StoredRollout("p", "a", 1.0), StoredRollout("p", "b", 1.0, {"x": object()})])
    with pytest.raises((TypeError, ValueError)):
        store.log_metrics(number, 4, {"reward": 1.0, "loss": "high"})
    assert store.rollouts(number) == [] and store.metrics(number) == {} and store.run("first").step == 0


def test_rollouts_round_trip(store):
    number = new_run(store)
    full = StoredRollout(
        prompt="3 6 17>20=",
        completion="6-3+17 é\n",
        reward=1.0,
        rewards={"countdown": 1.0, "format": math.nan},
        data_index=12,
        group=4,
        stop="EOS",
        length=7,
        answer="6-3+17",
        tokens=("6", "-", "3"),
        numbers={"behaviour": np.array([-0.1, -2.5, math.nan], dtype=np.float32), "grid": np.ones((3, 2), np.float32)},
    )
    store.log_rollouts(number, 5, [full, StoredRollout("p", "", math.nan)])
    first, second = store.rollouts(number)
    assert (first.prompt, first.completion, first.reward, first.data_index, first.group, first.stop, first.length) == (
        ("3 6 17>20=", "6-3+17 é\n", 1.0, 12, 4, "EOS", 7)
    )
    assert first.answer == "6-3+17" and first.tokens == ("6", "-", "3") and first.step == 5
    assert first.rewards["countdown"] == 1.0 and math.isnan(first.rewards["format"])
    assert list(first.numbers) == ["behaviour", "grid"]
    np.testing.assert_array_equal(first.numbers["behaviour"], full.numbers["behaviour"])
    assert first.numbers["grid"].shape == (3, 2)
    assert math.isnan(second.reward) and second.numbers == {} and second.answer is None and second.tokens == ()
    assert store.rollouts(number, numbers=False)[0].numbers == {}


def test_text_that_a_model_may_write(store):
    number = new_run(store)
    odd = "half \ud83d, nul \0, \u2028 and 😀"
    store.log_rollouts(number, 1, [StoredRollout(odd, odd, 1.0, answer=odd, tokens=(odd,))])
    store.log_evaluation(number, 1, "after", {"text": odd})
    (found,) = store.rollouts(number)
    assert found.completion == found.prompt == found.answer == odd.replace("\ud83d", "?")
    assert found.tokens == (odd,) and store.evaluations(number)[0].evaluation == {"text": odd}


def test_rollouts_come_in_pages(store):
    number = new_run(store)
    for step in (10, 5):
        store.log_rollouts(number, step, [StoredRollout("p", f"{step}.{i}", 0.0) for i in range(4)])
    assert [r.completion for r in store.rollouts(number, limit=3, offset=3)] == ["5.3", "10.0", "10.1"]
    assert [r.completion for r in store.rollouts(number, step=10, limit=2, offset=2)] == ["10.2", "10.3"]
    assert store.rollout_counts(number) == {5: 4, 10: 4}


def test_evaluations_round_trip(store):
    number = new_run(store)
    store.log_evaluation(number, 0, "before", {"metrics": {"pass@1": [0.4, 0.3, None]}})
    store.log_evaluation(number, 9, "after", {"metrics": {}})
    store.log_evaluation(number, 9, "after", {"metrics": {"pass@1": [0.6, 0.5, 0.7]}})
    found = store.evaluations(number)
    assert [(e.step, e.phase) for e in found] == [(0, "before"), (9, "after")]
    assert found[0].evaluation == {"metrics": {"pass@1": [0.4, 0.3, None]}}
    assert found[1].evaluation == {"metrics": {"pass@1": [0.6, 0.5, 0.7]}}


def test_rewind_deletes_what_is_after_the_step(store):
    number, other = new_run(store, "a"), new_run(store, "b")
    for run in (number, other):
        for step in range(1, 7):
            store.log_metrics(run, step, {"reward": step / 10})
            store.log_rollouts(run, step, [StoredRollout("p", str(step), 0.0)])
        store.log_evaluation(run, 0, "before", {})
        store.log_evaluation(run, 4, "during", {})
        store.log_evaluation(run, 6, "after", {})
        store.finish(run, "finished", {"pass@1": 1.0})
    store.rewind(number, 4)
    assert [step for step, _ in store.metrics(number)["reward"]] == [1, 2, 3, 4]
    assert [r.completion for r in store.rollouts(number)] == ["1", "2", "3", "4"]
    assert [e.phase for e in store.evaluations(number)] == ["before", "during"]
    run = store.run("a")
    assert run.step == 4 and run.status == "running" and run.finished is None and run.summary == {}
    store.rewind(number, -1)
    assert store.metrics(number) == {} and store.evaluations(number) == [] and store.run("a").step == 0
    assert len(store.metrics(other)["reward"]) == 6 and store.run("b").status == "finished"


def test_runs_are_found_by_what_they_are(store):
    new_run(store, "alpha-0")
    new_run(store, "beta-0", recipe="dapo", seed=1)
    store.finish(new_run(store, "beta-1", recipe="dapo", seed=2))
    assert [r.name for r in store.runs()] == ["beta-1", "beta-0", "alpha-0"]
    assert [r.name for r in store.runs(recipe="dapo", status="running")] == ["beta-0"]
    assert [r.name for r in store.runs(name="BETA")] == ["beta-1", "beta-0"]
    assert [r.name for r in store.runs(seed=3, task="countdown", model="tiny")] == ["alpha-0"]
    assert [r.name for r in store.runs(limit=1, offset=1)] == ["beta-0"]
    assert store.runs()[0].config is None
    assert store.runs(name="%") == []


def test_a_viewer_reads_and_cannot_write(path, store):
    number = new_run(store)
    with Store(path, readonly=True) as viewer:
        store.log_metrics(number, 1, {"reward": 0.5})
        assert viewer.metrics(number) == {"reward": [(1, 0.5)]}
        with pytest.raises(KeelError, match="reading only"):
            viewer.log_metrics(number, 2, {"reward": 0.5})
        with pytest.raises(KeelError, match="reading only"):
            new_run(viewer, "second")
    store.close()
    with Store(path, readonly=True) as viewer:  # the journal is gone now
        assert viewer.run("first").step == 1


def test_a_viewer_needs_a_store(tmp_path):
    with pytest.raises(UserError, match="no store here"):
        Store(tmp_path / "keel.sqlite", readonly=True)
    assert not (tmp_path / "keel.sqlite").exists()
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match="no store of Keel"):
        Store(tmp_path / "empty", readonly=True)


@pytest.mark.parametrize("readonly", [False, True])
def test_other_files_are_refused_and_left_alone(tmp_path, readonly):
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but longer than a header")
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE runs (id INTEGER)")
    db.close()
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    for file in (text, other, damaged):
        before = file.read_bytes()
        with pytest.raises(UserError, match="no store of Keel") as error:
            Store(file, readonly=readonly)
        assert error.value.exit_code == 2 and str(file) in str(error.value)
        assert file.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"notes.txt", "other.sqlite", "damaged.sqlite"}
    with pytest.raises(UserError, match="folder"):
        Store(tmp_path, readonly=readonly)


@pytest.mark.parametrize("readonly", [False, True])
def test_a_newer_schema_is_refused(path, store, readonly):
    store.close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    with pytest.raises(UserError, match=rf"schema {VERSION + 1}.*Upgrade Keel"):
        Store(path, readonly=readonly)


def test_a_path_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be"):
        Store(tmp_path / "file" / "keel.sqlite")


def test_damaged_entries_are_named(path, store):
    number = new_run(store)
    store.log_rollouts(number, 1, [StoredRollout("p", "c", 1.0, numbers={"logp": np.ones(3)})])
    store.log_evaluation(number, 1, "after", {})
    db = sqlite3.connect(path)
    db.execute("UPDATE rollouts SET numbers = substr(numbers, 1, 20)")
    db.execute("UPDATE evaluations SET evaluation = '{\"metrics\": '")
    db.commit()
    db.close()
    with pytest.raises(KeelError, match="rollout 1: The stored numbers are damaged"):
        store.rollouts(number)
    assert store.rollouts(number, numbers=False)[0].completion == "c"
    with pytest.raises(KeelError, match="damaged"):
        store.evaluations(number)


def test_a_locked_store_is_an_error_soon_and_recovers(path, store):
    number = new_run(store)
    with Store(path, timeout=0.2) as impatient:
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        start = time.monotonic()
        with pytest.raises(StoreBusy, match=r"locked for more than 0\.2 s"):
            impatient.log_metrics(number, 1, {"reward": 1.0})
        assert time.monotonic() - start < 2.0
        assert impatient.run("first").step == 0  # reading does not wait
        blocker.execute("ROLLBACK")
        blocker.close()
        impatient.log_metrics(number, 1, {"reward": 1.0})
    assert store.metrics(number) == {"reward": [(1, 1.0)]}


def test_a_long_read_does_not_hold_up_a_writer(path, store):
    number = new_run(store)
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT COUNT(*) FROM metrics").fetchone()
    start = time.monotonic()
    for step in range(20):
        store.log_metrics(number, step, {"reward": 1.0})
    assert time.monotonic() - start < 2.0
    assert reader.execute("SELECT COUNT(*) FROM metrics").fetchone() == (0,)
    reader.close()


# Several processes

PROCESSES = multiprocessing.get_context("spawn")


def write_run(path, name, steps, ready):
    ready.wait()
    with Store(path, timeout=20) as store:
        number = new_run(store, name)
        for step in range(1, steps + 1):
            store.log_metrics(number, step, {"reward": step, "loss": -step})
            store.log_rollouts(number, step, [StoredRollout("p", f"{name} {step}", 1.0, numbers={"x": np.ones(4)})])
        store.finish(number)


def test_processes_make_one_store_and_write_at_once(path):
    ready = PROCESSES.Event()
    writers = [PROCESSES.Process(target=write_run, args=(path, f"run-{i}", 60, ready)) for i in range(3)]
    for writer in writers:
        writer.start()
    ready.set()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    with Store(path, readonly=True) as viewer:
        runs = viewer.runs()
        assert sorted(run.name for run in runs) == ["run-0", "run-1", "run-2"]
        for run in runs:
            curves = viewer.metrics(run.id)
            assert curves["reward"] == [(step, float(step)) for step in range(1, 61)]
            assert curves["loss"] == [(step, float(-step)) for step in range(1, 61)]
            rollouts = viewer.rollouts(run.id, limit=1000)
            assert [r.completion for r in rollouts] == [f"{run.name} {step}" for step in range(1, 61)]
            assert run.status == "finished"


def write_for_ever(path, ready):
    with Store(path) as store:
        number = new_run(store, "killed")
        step = 0
        while True:
            step += 1
            store.log_metrics(number, step, {f"metric-{i}": step for i in range(20)})
            if step == 5:
                ready.set()


def test_a_killed_writer_leaves_whole_steps(path):
    ready = PROCESSES.Event()
    writer = PROCESSES.Process(target=write_for_ever, args=(path, ready))
    writer.start()
    assert ready.wait(60)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(60)
    with Store(path) as store:
        run = store.run("killed")
        curves = store.metrics(run.id)
        assert len(curves) == 20 and run.step >= 5
        assert all([step for step, _ in curve] == list(range(1, run.step + 1)) for curve in curves.values())
        store.rewind(run.id, 3)
        assert len(store.metrics(run.id)["metric-0"]) == 3


@pytest.mark.slow
def test_pages_stay_quick_with_many_runs(path, store):
    rollouts = [
        StoredRollout(
            "prompt " * 10, "completion " * 10, 1.0, {"a": 1.0}, numbers={"logp": np.ones(200), "adv": np.ones(200)}
        )
        for _ in range(100)
    ]
    for i in range(1000):
        number = new_run(store, f"run-{i}")
        for step in range(0, 100, 10):
            store.log_metrics(number, step, {f"metric-{j}": step for j in range(20)})
        store.log_rollouts(number, 10, rollouts)

    def seconds(call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    number = store.run("run-500").id
    pages = {
        "runs": lambda: store.runs(limit=50),
        "all runs": lambda: store.runs(),
        "metrics": lambda: store.metrics(number),
        "rollouts": lambda: store.rollouts(number, limit=50, offset=50, numbers=False),
        "numbers": lambda: store.rollouts(number, limit=10),
        "counts": lambda: store.rollout_counts(number),
    }
    taken = {name: min(seconds(call) for _ in range(3)) for name, call in pages.items()}
    assert max(taken.values()) < 0.1, taken
