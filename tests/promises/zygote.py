"""Forks a run for every order that it reads, so that many killed processes cost one import of torch.

Orders and replies are lines of JSON. {"settings", "model", "runs", "log"} starts a run and replies with its process
number; further keys say how it is attacked:

    die_at      kill the process with SIGKILL at that event (a file or a folder is opened, made, renamed or removed)
    die_in_text kill it when it has written half of that many-th text file
    count       write the number of such events to this file at the end
    limit       bytes that a file may have at most from step `limit_from` on
    slow_saves  seconds that each checkpoint takes longer

{"wait": number} replies with the exit status of a process, negative for a signal.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def main() -> None:
    """Serve until the pipe is closed."""
    import runs
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM  # noqa: F401 (here once, not in each)

    import keel.train.entry  # noqa: F401
    from keel.recipes.registry import recipes

    torch.set_num_threads(1)
    recipes()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            carry_out(order, runs.start)
        print(pid, flush=True)


def carry_out(order: dict[str, Any], start: Any) -> None:
    """What the command does with errors: one line and the exit status; never returns."""
    from keel.core.errors import KeelError

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.dup2(2, 1)
    status = 0
    try:
        events = watch(order.get("die_at"))
        tear(order.get("die_in_text"))
        slow(order.get("slow_saves", 0.0))
        start(order["model"], Path(order["runs"]), report=reporter(order), **order["settings"])
        if "count" in order:
            Path(order["count"]).write_text(str(events[0]))
    except KeelError as error:
        say(f"keel: {error}")
        status = error.exit_code
    except BaseException:
        say(traceback.format_exc())
        status = 99
    finally:
        os._exit(status)


def say(text: str) -> None:
    """Write to the log, whatever the limit on files."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.write(2, text.encode() + b"\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def reporter(order: dict[str, Any]):
    """Write what is said to the log; at a step narrow the limit on files."""

    def report(event: str, facts: Any) -> None:
        if event in ("note", "warning", "phase"):
            say(f"{event}: {facts['text']}")
        if event == "step":
            say(f"step {facts['step']}")
            if "limit" in order and facts["step"] >= order["limit_from"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], resource.RLIM_INFINITY))

    return report


def watch(die_at: int | None) -> list[int]:
    """Count events, and die at one of them."""
    seen = [0]

    def hook(event: str, _: Any) -> None:
        if event in EVENTS:
            seen[0] += 1
            if seen[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def tear(number: int | None) -> None:
    """Die in the middle of a text file."""
    write, seen = Path.write_text, 0

    def torn(path: Path, text: str, **options: Any) -> int:
        nonlocal seen
        seen += 1
        if seen != number:
            return write(path, text, **options)
        write(path, text[: len(text) // 2], **options)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    Path.write_text = torn  # type: ignore[method-assign]


def slow(seconds: float) -> None:
    """Make the writing of a checkpoint take long, so that a signal hits it."""
    if not seconds:
        return
    import keel.train.checkpoint as checkpoint

    save = checkpoint.save

    def slow_save(*arguments: Any) -> None:
        save(*arguments)
        say("writing a checkpoint")
        end = time.monotonic() + seconds  # a signal must not cut it short
        while time.monotonic() < end:
            time.sleep(0.01)

    checkpoint.save = slow_save


if __name__ == "__main__":
    main()
