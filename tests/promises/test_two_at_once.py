"""Two processes on one run, and on one store."""

import signal

import pytest
from tests.promises.test_killed import outcome

from keel.core.errors import RunError
from keel.store.store import Store

SETTINGS = {"max_steps": 400, "train.save_steps": 1}


def test_a_second_process_is_refused_until_the_first_has_died(launch, tmp_path):
    first = launch(**SETTINGS)
    first.until("step 2")
    second = launch(resume=True, **SETTINGS)
    assert second.wait() == 2
    assert "another process is working on this run" in second.said and "--name" in second.said
    third = launch(**SETTINGS)
    assert third.wait() == 2
    assert "there is a run of that name" in third.said and "--resume" in third.said
    first.kill(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    fourth = launch(resume=True, **SETTINGS)
    fourth.until("step 5")
    assert "continuing from" in fourth.said


def test_a_second_process_works_after_the_first_has_ended(launch):
    first = launch(max_steps=1)
    assert first.wait() == 0
    second = launch(max_steps=1, resume=True)
    assert second.wait() == 0 and "is finished" in second.said


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_that_start_at_once_one_is_refused_and_the_other_is_whole(launch, tmp_path, resume):
    both = [launch(max_steps=3, resume=resume) for _ in range(2)]
    status = sorted(process.wait() for process in both)
    assert status in ([0, 2], [0, 0] if resume else None), [process.said for process in both]
    assert outcome(tmp_path / "runs")[1]["loss"][-1][0] == 3


def test_a_run_whose_name_is_taken_meanwhile_deletes_nothing(train, tmp_path, monkeypatch):
    """The other one has come and gone between the first look and the lock."""
    import keel.train.lifecycle as module

    runs = tmp_path / "runs"
    only_one = module._only_one

    def late(path):
        monkeypatch.setattr(module, "_only_one", only_one)
        with Store(runs / "keel.sqlite") as store:
            store.create_run("run", {}, "grpo", "countdown", "tiny", 0)
        (path / "checkpoint-7").mkdir()
        return only_one(path)

    monkeypatch.setattr(module, "_only_one", late)
    with pytest.raises(RunError, match="There is a run named 'run'"):
        train(max_steps=1)
    assert (runs / "run" / "checkpoint-7").is_dir()


def test_two_runs_share_a_store_and_lose_nothing(launch, tmp_path):
    both = [launch(name=name, max_steps=25, **{"train.log_completions": 1}) for name in ("one", "two")]
    assert [process.wait() for process in both] == [0, 0], [process.said for process in both]
    with Store(tmp_path / "runs" / "keel.sqlite", readonly=True) as store:
        for name in ("one", "two"):
            run = store.run(name)
            curves = store.metrics(run.id)
            assert run.status == "finished"
            assert all([step for step, _ in curve] == list(range(1, 26)) for curve in curves.values())
            assert store.rollout_counts(run.id) == {step: 4 for step in range(1, 26)}
    one, two = (curves_of(tmp_path / "runs", name) for name in ("one", "two"))
    assert one == two


def curves_of(runs, name):
    with Store(runs / "keel.sqlite", readonly=True) as store:
        return store.metrics(store.run(name).id, ["loss", "reward", "grad_norm", "entropy"])
