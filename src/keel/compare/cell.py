"""One cell in a process of its own: `python -m keel.compare.cell SPEC`, or `--probe SPEC` to see how long one takes.

SPEC is a JSON file: the complete configuration, the folder of runs, the number of threads, where the result is
written, and when the process was launched. The process ends when its standard input does, after a checkpoint: so it
does not outlive who started it, however that ended.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUSY = 75  # another process is at the run
PROBE_STEPS, PROBE_SECONDS = 5, 8.0  # at most so many steps, and none after so long, but at least two


def run_cell(spec: Mapping[str, Any]) -> dict[str, float]:
    """Run the cell, from its last checkpoint if there is one.

    Returns:
        What its parts took, in seconds, with steps and tokens; empty where it did not begin at the beginning.

    Raises:
        KeelError: it failed, was stopped, or is run elsewhere.
    """
    from keel.train.lifecycle import execute

    setup = setup_of(spec["config"])
    clock = _Clock(spec["launched"])
    run = execute(setup, Path(spec["runs"]), resume=True, report=clock)
    return clock.times(int(run.summary["steps"]), int(run.summary["num_tokens"]), float(run.summary["seconds"]))


def setup_of(config: Mapping[str, Any]) -> Any:
    """What runs a complete configuration.

    Raises:
        RunError: it means something else here than where it was resolved.
    """
    import yaml

    from keel.core.errors import RunError
    from keel.train.configuration import differences
    from keel.train.setup import prepare_setup

    known: dict[str, Any] = {"seed": None, "name": None, "settings": {}}
    setup = prepare_setup(None, None, None, None, None, None, config=config, **known)
    there, here = (json.loads(json.dumps(data, default=str)) for data in (config, setup.config.to_dict()))
    if found := differences(yaml.safe_load(yaml.safe_dump(there)), yaml.safe_load(yaml.safe_dump(here))):
        raise RunError(f"the configuration means something else here: {'; '.join(found[:4])}", str(config.get("name")))
    return setup


class _Clock:
    """A reporter that notes when each phase began; warnings and findings go to the log."""

    def __init__(self, launched: float):
        self.launched, self.began = launched, {"startup": launched}

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        if event == "phase":
            self.began.setdefault(facts["name"], time.time())
            if facts["name"] == "train":
                self.began["start"] = facts["start"]
        if event in ("warning", "note", "finding", "phase"):
            print(f"{time.strftime('%H:%M:%S')} {event}: {facts['text']}", flush=True)

    def times(self, steps: int, tokens: int, seconds: float) -> dict[str, float]:
        """By part; the time from the last measurement to the end belongs to that measurement."""
        if self.began.get("start", 1) != 0 or "after" not in self.began:
            return {}
        began, now = self.began, time.time()
        ready = began.get("before", began["train"])
        return {
            "startup": ready - self.launched,
            "before": began["train"] - ready,
            "train": began["after"] - began["train"],
            "after": now - began["after"],
            "steps": steps,
            "tokens": tokens,
            "seconds": seconds,
        }


def probe(spec: Mapping[str, Any]) -> dict[str, float]:
    """How long the parts of a cell take: it starts up, measures some prompts and does some steps; nothing is stored.

    Returns:
        The same as `run_cell`, with the measurements at their full size.
    """
    from dataclasses import replace

    from keel.train.measure import MAX_ROWS
    from keel.train.online import run
    from keel.train.session import build_session
    from keel.train.setup import load_model

    setup = setup_of(spec["config"])
    config = setup.config
    policy = load_model(config.model, setup.source, setup.tokenizer, config.seed)
    session = build_session(config, setup.task, policy, setup.rewards, preferences=setup.preferences)
    try:
        ready = time.time()
        n = config.evaluate.num_generations
        whole = min(config.evaluate.num_prompts, len(setup.task.held_out) - config.evaluate.skip)
        some = min(whole, max(1, MAX_ROWS // n))
        _measure_some(
            session, setup, replace(config, evaluate=config.evaluate.model_copy(update={"num_prompts": some}))
        )
        measured = time.time()
        ends: list[float] = []

        def report(event: str, facts: Mapping[str, Any]) -> None:
            if event == "step":
                ends.append(time.time())

        session.report = report
        session.stopping = lambda: len(ends) >= PROBE_STEPS or (len(ends) >= 2 and ends[-1] - measured > PROBE_SECONDS)
        run(session)
        steps = max(1, len(ends) - 1)  # the first one warms up
        each = (ends[-1] - ends[0]) / steps if len(ends) > 1 else ends[0] - measured
    finally:
        session.close()
    evaluation = (measured - ready) * whole / some
    first = ends[0] - measured
    return {
        "startup": ready - spec["launched"] + max(0.0, first - each),
        "before": evaluation if config.evaluate.before else 0.0,
        "train": each * len(ends),
        "after": evaluation,
        "steps": len(ends),
        "tokens": session.position.tokens,
        "seconds": each * len(ends),
    }


def _measure_some(session: Any, setup: Any, config: Any) -> None:
    from keel.core.choice import counter_seed
    from keel.models.load import frozen_copy
    from keel.train.episodes import evaluation_limits
    from keel.train.measure import measure_policy
    from keel.train.session import reward_functions

    rollout = config.method.rollout
    length = config.evaluate.max_completion_length or (
        setup.task.max_completion_length if rollout is None else rollout.max_completion_length
    )
    measure_policy(
        session.policy,
        setup.task,
        session.rewards or reward_functions(config.task, setup.task, setup.rewards),
        config.evaluate,
        encoder=session.encoder,
        max_completion_length=length,
        seed=counter_seed(0, "probe"),
        reference=frozen_copy(session.policy),
        generator=config.train.generator,
        max_tokens=session.engine.max_tokens,
        hidden=session.hidden,
        limits=evaluation_limits(setup.task, rollout, session.policy.context_length, length),
    )


# -- the process -----------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Run what the file says; the exit status is 0, 75 where another process is at the run, or that of the error."""
    spec = json.loads(Path(arguments[-1]).read_text(encoding="utf-8"))
    if not sys.stdin.closed and not sys.stdin.isatty():
        threading.Thread(target=_end_with_parent, daemon=True).start()
    return carry_out(spec, probe if "--probe" in arguments else run_cell)


def carry_out(spec: Mapping[str, Any], what: Any = run_cell) -> int:
    """Do it and write what came of it, also where it failed; the exit status."""
    import torch

    from keel.core.errors import KeelError
    from keel.train.lifecycle import RunBusy

    torch.set_num_threads(int(spec["threads"]))
    status, found = 0, {}
    try:
        found = {"times": what(spec)}
    except RunBusy as error:
        return _said(str(error), BUSY)
    except KeelError as error:
        status, found = _said(str(error), error.exit_code), {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "keel" in frame.filename]
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        status, found = 1, {"error": f"{type(error).__name__}: {error}{where}"}
    temporary = Path(f"{spec['result']}.writing")
    temporary.write_text(json.dumps(found), encoding="utf-8")
    os.replace(temporary, spec["result"])
    return status


def _said(text: str, status: int) -> int:
    print(f"keel: {text}", flush=True)
    return status


def _end_with_parent() -> None:
    """Whoever started this process holds the other end of standard input."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
