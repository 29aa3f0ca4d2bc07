"""A run that is killed at any moment resumes and ends with the same bits."""

import json
import os
import random
import signal
import time

import pytest
from tests.promises.runs import DATA

from keel.store.store import Store
from keel.train.checkpoint import damage, newest_sound, save_checkpoint

TIMED = ("step_time", "time/rollout", "time/reward")
PAIRS = [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": "+"} for row in DATA]
SAVING = {"train.save_steps": 1, "train.save_total_limit": 2}
RECIPES = {
    "grpo": {"max_steps": 8},
    "grpo_replay": {"recipe": "grpo_replay", "share": 0.5, "max_steps": 8},
    "dph_rl": {"recipe": "dph_rl", "threshold": 3.0, "solved": 0.5, "samples": 2, "eta": 0.5, "max_steps": 8},
    "ppo": {"recipe": "ppo", "target_kl": 0.1, "train.num_minibatches": 2, "max_steps": 8},
    "dpo": {"recipe": "dpo", "data": PAIRS, "train.batch_size": 2, "train.precompute_reference": True, "max_steps": 8},
}


def outcome(runs):
    """What a run ended with: its weights, and every number of every step that does not measure time."""
    summary = json.loads((runs / "run" / "summary.json").read_text())
    with Store(runs / "keel.sqlite", readonly=True) as store:
        curves = store.metrics(store.run("run").id)
    return summary["checksum"], {name: curve for name, curve in curves.items() if name not in TIMED}


def whole(launch, folder, settings):
    """An uninterrupted run, and the number of events that a kill can be aimed at."""
    process = launch(folder / "whole", {"count": str(folder / "count")}, **settings)
    assert process.wait() == 0, process.said
    return outcome(folder / "whole"), int((folder / "count").read_text())


@pytest.mark.parametrize(
    ("recipe", "share"), [("grpo", 0.0), ("grpo", 0.35), ("grpo", 0.8), ("dpo", 0.5), ("ppo", 0.6)]
)
def test_a_killed_run_ends_with_the_same_bits(launch, tmp_path, recipe, share):
    settings = {**SAVING, **RECIPES[recipe], "max_steps": 3}
    expected, events = whole(launch, tmp_path, settings)
    killed = launch(tmp_path / "killed", {"die_at": 1 + int(share * events)}, **settings)
    assert killed.wait() == -signal.SIGKILL, killed.said
    again = launch(tmp_path / "killed", resume=True, **settings)
    assert again.wait() == 0, again.said
    assert outcome(tmp_path / "killed") == expected


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_twenty_kills_at_random_moments_change_no_bit(launch, tmp_path, recipe):
    settings = {**SAVING, **RECIPES[recipe]}
    begun = time.monotonic()
    expected, events = whole(launch, tmp_path, settings)
    seconds = time.monotonic() - begun
    draw = random.Random(recipe)
    kills = while_writing = 0
    folder = tmp_path / "killed" / "run"
    while kills < 20:
        # at an event (most of them belong to the writing of a checkpoint), or at any time
        aimed = kills % 2 == 0
        attack = {"die_at": draw.randrange(1, events // 2)} if aimed else {}
        process = launch(tmp_path / "killed", attack, resume=kills > 0, **settings)
        if not aimed:
            time.sleep(draw.uniform(0.0, seconds / 2))
            process.kill()
        status = process.wait()
        assert status in (0, -signal.SIGKILL), process.said
        if status == 0:  # it has got through: begin anew
            assert outcome(tmp_path / "killed") == expected
            (tmp_path / "killed").rename(tmp_path / f"done-{kills}")
            process = launch(tmp_path / "killed", {"die_at": draw.randrange(1, events // 2)}, **settings)
            assert process.wait() == -signal.SIGKILL, process.said
        kills += 1
        while_writing += bool(list(folder.glob(".checkpoint-*.writing")))
    again = launch(tmp_path / "killed", resume=True, **settings)
    assert again.wait() == 0, again.said
    assert outcome(tmp_path / "killed") == expected
    assert while_writing >= 2, "no kill has hit the writing of a checkpoint"
    assert not list(folder.glob(".*.writing")), "what was half written is removed in the end"


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_while_a_checkpoint_is_written_leaves_a_sound_one(train, stride):
    """At each file operation of one checkpoint, which replaces a damaged one of the same step."""
    checked = []

    def attack(event, facts):
        if event == "start":
            attack.session = facts["session"]
        if event == "step" and facts["step"] == 2 and not checked:
            checked.append(crash_points(attack.session, stride))

    run = train(report=attack, max_steps=3, **SAVING)
    assert run.summary["status"] == "finished"
    assert checked[0] * stride > 15


def crash_points(session, stride: int) -> int:
    """Fork, write a checkpoint, die at some event, again and again; how many of them there were."""
    from tests.promises.zygote import watch

    path = session.path
    final = path / f"checkpoint-{session.position.step}"
    before = path / f"checkpoint-{session.position.step - 1}"
    for count, event in enumerate(range(1, 300, stride)):
        final.mkdir(exist_ok=True)
        (final / "keel").mkdir(exist_ok=True)
        (final / "keel/manifest.json").write_text("{")
        pid = os.fork()
        if pid == 0:
            watch(event)
            save_checkpoint(session)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        sound, _ = newest_sound(path)
        assert sound in (before, final), f"killed at event {event}: nothing sound is left"
        assert damage(before) is None
        if status == 0:
            assert sound == final
            return count
    raise AssertionError("it does not end")


@pytest.mark.parametrize("number", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 6))])
def test_a_run_killed_with_half_a_file_written_resumes(launch, tmp_path, number):
    """Half a configuration, half a summary: each text that a run writes."""
    settings = {"max_steps": 1}
    killed = launch(tmp_path / "killed", {"die_in_text": number}, **settings)
    assert killed.wait() == -signal.SIGKILL
    again = launch(tmp_path / "killed", resume=True, **settings)
    assert again.wait() == 0, again.said
    assert outcome(tmp_path / "killed") == whole(launch, tmp_path, settings)[0]
