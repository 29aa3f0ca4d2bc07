"""Cells: run once, side by side, from checkpoints, whatever happens; failures are told."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from keel.compare.cell import BUSY
from keel.compare.entry import preview, run
from keel.compare.record import Record, folder_of, load, names
from keel.core.errors import ConfigError, RunError
from keel.store.store import Store
from keel.train.lifecycle import Stopped
from tests.compare.small import Forks, Pretended, Pretending, Told, asked, compared


def stored(runs, name):
    """What a run has drawn, by step: prompts by their number, and completions."""
    with Store(runs / "keel.sqlite", readonly=True) as store:
        found: dict[int, list] = {}
        for one in store.rollouts(store.run(name).id):
            found.setdefault(one.step, []).append((one.data_index, one.completion))
    return found


# -- what is common to all arms ---------------------------------------------------------------------------------------


def test_a_comparison_has_an_outcome_for_every_cell(finished):
    found, said, forks, runs = finished
    comparison = found.comparison
    assert [(o.arm, o.seed, o.status) for o in comparison.outcomes] == [
        ("grpo", 0, "finished"),
        ("grpo", 1, "finished"),
        ("dr_grpo", 0, "finished"),
        ("dr_grpo", 1, "finished"),
    ]
    for one in comparison.outcomes:
        for shares in (one.before["pass@1"], one.values["pass@1"]):  # of 8 prompts, each of 2 completions
            assert (2 * shares).tolist() == [round(2 * share) for share in shares.tolist()] and len(shares) == 8
            assert shares.min() >= 0 and shares.max() <= 1
        assert one.before["pass@1"].tolist() == comparison.outcomes[0].before["pass@1"].tolist()  # one base, one draw
        summary = json.loads((runs / one.run / "summary.json").read_text())
        assert one.values["pass@1"].mean() == pytest.approx(summary["after"]["pass@1"][0], abs=1e-9)
        assert [step for step, _ in one.curves["num_tokens"]] == [step for step, _ in one.curves["seconds"]] == [1, 2]
        assert one.curves["num_tokens"][-1][1] == one.tokens > 0
        assert (one.steps, one.seconds > 0) == (2, True)
    assert len(forks.begun) == 4
    assert "4 to run" in said[0]
    assert "2 processes of 1 thread each" in said[1]
    record = json.loads((found.path / "comparison.json").read_text())
    assert (record["status"], record["conditions"]["budget"]) == ("finished", "2 steps")
    assert names(runs) == ["both"]
    assert [o.run for o in load("both", runs).outcomes] == [o.run for o in comparison.outcomes]


def test_arms_with_one_seed_see_the_same_prompts_and_draw_the_same_completions(finished):
    """Common random numbers: until the policies differ, every completion is the same."""
    found, _, _, runs = finished
    drawn = {(o.arm, o.seed): stored(runs, o.run) for o in found.comparison.outcomes}
    for seed in (0, 1):
        one, other = drawn["grpo", seed], drawn["dr_grpo", seed]
        assert one[1] == other[1], "the first batch is drawn by the same policy"
        assert [index for index, _ in one[2]] == [index for index, _ in other[2]]
    assert [index for index, _ in drawn["grpo", 0][1]] != [index for index, _ in drawn["grpo", 1][1]]


def test_all_cells_are_measured_on_the_same_prompts_with_the_same_draws(finished):
    """Before training the policy is the same in all cells, and so is every number."""
    found, _, _, runs = finished
    first, *others = found.comparison.outcomes
    for other in others:
        for metric, values in first.before.items():
            np.testing.assert_array_equal(values, other.before[metric], err_msg=metric)
    with Store(runs / "keel.sqlite", readonly=True) as store:
        places = [store.evaluations(store.run(o.run).id)[1].evaluation["index"] for o in found.comparison.outcomes]
    assert all(place == list(range(8)) for place in places)


# -- each cell once ---------------------------------------------------------------------------------------------------


def test_a_second_comparison_runs_only_what_is_new(model, tmp_path):
    launch = Pretending()
    compared(asked(model, tmp_path, "grpo", "dr_grpo", name="one"), launch)
    assert len(launch.begun) == 4
    compared(asked(model, tmp_path, "grpo", "dr_grpo", name="one"), launch)
    assert len(launch.begun) == 4, "nothing is new"
    compared(asked(model, tmp_path, "grpo", "kl_cov", "dr_grpo", name="two"), launch)
    assert launch.begun[4:] == ["kl_cov, seed 0", "kl_cov, seed 1"], "cells belong to no comparison"
    found, said = compared(asked(model, tmp_path, "grpo", "dr_grpo", name="one", seeds=3), launch)
    assert launch.begun[6:] == ["grpo, seed 2", "dr_grpo, seed 2"]
    assert "4 finished, 2 to run" in said[0]
    assert found.comparison.seeds == (0, 1, 2)


def test_arms_and_seeds_come_to_a_comparison_and_nothing_else_changes(model, tmp_path):
    launch = Pretending()
    compared(asked(model, tmp_path, "grpo", name="one"), launch)
    compared(asked(model, tmp_path, "grpo", "dr_grpo", name="one"), launch)
    wrong = {
        "budget: '2 steps' -> '3 steps'": asked(model, tmp_path, "grpo", "dr_grpo", name="one", budget="3steps"),
        "without dr_grpo": asked(model, tmp_path, "grpo", name="one"),
        "seeds: 2 -> 1": asked(model, tmp_path, "grpo", "dr_grpo", name="one", seeds=1),
        "settings.train.learning_rate": asked(
            model, tmp_path, "grpo", "dr_grpo", name="one", settings={"train.learning_rate": 0.5}
        ),
    }
    for said, other in wrong.items():
        with pytest.raises(RunError, match=said):
            run(other, shown=Told(), launch=launch)
    assert len(launch.begun) == 4


def test_a_failed_cell_is_told_and_not_tried_again_until_that_is_asked_for(model, tmp_path):
    launch = Pretending({"dr_grpo, seed 1": [1]})
    found, said = compared(asked(model, tmp_path, "grpo", "dr_grpo", name="one"), launch)
    (failed,) = found.comparison.failed
    assert (failed.arm, failed.seed, failed.error) == ("dr_grpo", 1, "dr_grpo, seed 1 went wrong")
    assert "4/4 dr_grpo, seed 1 failed" in said
    entry = Record.read(found.path).cells["dr_grpo/1"]
    assert entry["log"].endswith(".log")
    assert Record.read(found.path).status == "failed"
    assert [o.seed for o in found.comparison.of("dr_grpo")] == [0], "no average has it"
    compared(asked(model, tmp_path, "grpo", "dr_grpo", name="one"), launch)
    assert len(launch.begun) == 4
    found, _ = compared(asked(model, tmp_path, "grpo", "dr_grpo", name="one"), launch, retry_failed=True)
    assert launch.begun[4:] == ["dr_grpo, seed 1"]
    assert not found.comparison.failed
    assert Record.read(found.path).status == "finished"


def test_a_process_that_is_killed_is_started_again_twice(model, tmp_path):
    launch = Pretending({"grpo, seed 0": [-9, -11], "grpo, seed 1": [-9] * 9})
    found, said = compared(asked(model, tmp_path, "grpo", name="one"), launch)
    assert launch.begun.count("grpo, seed 0") == launch.begun.count("grpo, seed 1") == 3
    assert [o.error for o in found.comparison.failed] == ["killed by SIGKILL (out of memory, perhaps)"]
    assert "grpo, seed 0: killed by SIGSEGV; it is started again" in said


def test_a_cell_that_another_process_is_at_is_waited_for(model, tmp_path):
    launch = Pretending({"grpo, seed 0": [BUSY, BUSY]})
    found, _ = compared(asked(model, tmp_path, "grpo", name="one", seeds=1), launch)
    assert launch.begun == ["grpo, seed 0"] * 3
    assert not found.comparison.failed


def test_a_locked_run_is_not_begun_until_its_process_ends(model, tmp_path):
    """Another parent has it; when that is done, its result is taken."""
    import fcntl

    from keel.compare.work import Work

    wanted = asked(model, tmp_path, "grpo", name="one", seeds=1)
    (cell,) = Work.begin(wanted, Told()).plan.cells((0,))
    folder = tmp_path / cell.name
    folder.mkdir()
    launch, held = Pretending(), (folder / ".lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)

    def elsewhere():
        time.sleep(0.5)
        from keel.compare.workers import Order

        Pretended(Order(cell, tmp_path, tmp_path / "elsewhere", 1), {})
        held.close()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    found, _ = compared(wanted, launch)
    thread.join()
    assert launch.begun == []
    assert [o.status for o in found.comparison.outcomes] == ["finished"]


def test_two_parents_of_one_name_are_refused(model, tmp_path):
    from keel.compare.record import held

    with held(folder_of(tmp_path, "one")), pytest.raises(RunError, match="another process is at this comparison"):
        run(asked(model, tmp_path, "grpo", name="one"), shown=Told(), launch=Pretending())


def test_a_damaged_record_is_named(model, tmp_path):
    folder = folder_of(tmp_path, "one")
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text("{")
    with pytest.raises(RunError, match="no record of a comparison"):
        run(asked(model, tmp_path, "grpo", name="one"), shown=Told(), launch=Pretending())
    with pytest.raises(RunError, match=r"there is no comparison 'onne'\. Did you mean 'one'"):
        load("onne", tmp_path)


# -- stopping, killing, going on --------------------------------------------------------------------------------------


class Stops(Forks):
    """Sends this process SIGTERM when the first cell has written a checkpoint."""

    def __call__(self, order, slot):
        worker = super().__call__(order, slot)
        if not order.probe and len(self.begun) == 1:
            threading.Thread(target=self._later, args=(order,), daemon=True).start()
        return worker

    def _later(self, order):
        folder = order.runs / order.cell.name
        while not list(folder.glob("checkpoint-*")):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)


LONG = {"budget": "12steps", "settings": {"train.save_steps": 2, "train.log_completions": 0}, "seeds": 1, "workers": 1}


def curves(found):
    return [
        {k: v for k, v in o.curves.items() if "time" not in k and k != "seconds"} for o in found.comparison.outcomes
    ]


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """What the cells give that nobody disturbs."""
    return curves(compared(asked(model, tmp_path_factory.mktemp("whole"), "grpo", name="one", **LONG))[0])


def test_a_stopped_comparison_goes_on_from_its_checkpoints(model, tmp_path, whole):
    wanted = asked(model, tmp_path, "grpo", name="one", **LONG)
    with pytest.raises(Stopped, match="the same command goes on"):
        run(wanted, shown=Told(), launch=Stops())
    assert Record.read(wanted.folder).status == "stopped"
    assert [o.status for o in load("one", tmp_path).outcomes] == ["missing"]
    facts = preview(wanted, launch=Forks())
    assert [cell["state"] for cell in facts["cells"]] == ["begun"]
    found, said = compared(wanted)
    assert "1 to be continued" in said[0]
    assert curves(found) == whole


def test_a_cell_killed_in_the_middle_ends_with_the_same_numbers(model, tmp_path, whole):
    class Kills(Forks):
        def __call__(self, order, slot):
            worker = super().__call__(order, slot)
            if not order.probe and len(self.begun) == 1:
                while not list((order.runs / order.cell.name).glob("checkpoint-*")):
                    time.sleep(0.002)
                worker.kill()
            return worker

    launch = Kills()
    found, said = compared(asked(model, tmp_path, "grpo", name="one", **LONG), launch)
    assert launch.begun == ["grpo, seed 0"] * 2
    assert any("killed by SIGKILL" in text for text in said)
    assert curves(found) == whole


def test_a_preview_runs_nothing_and_leaves_nothing(model, tmp_path):
    launch = Pretending()
    facts = preview(asked(model, tmp_path, "grpo", "dr_grpo", name="one"), launch=launch)
    assert launch.begun == []
    assert [cell["state"] for cell in facts["cells"]] == ["new"] * 4
    assert (facts["workers"], facts["threads"]) == (2, 1)
    # 1 s to start, 2 s and 3 s to measure, two steps of 10 s: two workers, two cells each, and the report
    assert facts["seconds"] == pytest.approx(2 * (1 + 2 + 20 + 3) + 4, abs=2)
    assert names(tmp_path) == []
    assert not folder_of(tmp_path, "one").exists()


def test_a_preview_of_more_leaves_the_record_as_it_was(model, tmp_path):
    launch = Pretending()
    found, _ = compared(asked(model, tmp_path, "grpo", name="one"), launch)
    before = (found.path / "comparison.json").read_text()
    facts = preview(asked(model, tmp_path, "grpo", "dr_grpo", name="one"), launch=launch)
    assert [cell["state"] for cell in facts["cells"]] == ["finished", "new"] * 2
    assert (found.path / "comparison.json").read_text() == before


def test_what_is_refused_takes_no_name(model, tmp_path):
    with pytest.raises(ConfigError, match="takes 50 tokens"):
        run(asked(model, tmp_path, "grpo", name="one", budget="10tokens"), shown=Told(), launch=Pretending())
    compared(asked(model, tmp_path, "grpo", name="one", budget="100tokens"), Pretending())
