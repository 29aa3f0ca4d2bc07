import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from keel.core.errors import ConfigError, DataError, RewardError
from keel.parts.rewards.functions import ExactMatch, check_columns
from keel.parts.rewards.worker import RewardThread, RewardTimeout, RewardWorker, RewardWorkerDied, isolate

REWARDS = r'''
import os, signal, subprocess, sys, threading, time

def act(prompts, completions, completion_ids, **columns):
    """Does what the first completion says."""
    what = completions[0]
    if what == "length":
        return [len(c) for c in completions]
    if what == "prints":
        print("{\"values\": [9]}")
        sys.stdout.flush()
        os.write(1, b"straight to the descriptor\n")
        subprocess.run(["echo", "from a child"])
        print("to stderr", file=sys.stderr)
        return [1.0]
    if what == "input":
        return [0.0 if sys.stdin.read() == "" else 1.0]
    if what == "raise":
        raise ValueError("no digits\nin it")
    if what == "hang":
        time.sleep(60)
    if what == "hang with child":
        with open(columns["file"][0], "w") as file:
            file.write(str(subprocess.Popen(["sleep", "60"]).pid))
        time.sleep(60)
    if what == "exit":
        sys.exit(3)
    if what == "die":
        print("last words")
        os._exit(7)
    if what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "count":
        return [1.0]
    if what == "text":
        return ["1"] * len(completions)
    if what == "none and nan":
        return [None, float("nan"), float("inf")]
    if what == "signal":
        signal.signal(signal.SIGALRM, lambda *_: None)
        return [float(threading.current_thread() is threading.main_thread())]
    if what == "columns":
        return [float(columns == {"answer": ["x"], "data": [{"a": [1, None]}]}), ]
    if what == "pid":
        return [os.getpid()]
    if what == "heavy":
        return [float("torch" in sys.modules)]

def narrow(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer)]
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    return tmp_path


@pytest.fixture
def worker(here):
    with RewardWorker("my_rewards:act", timeout=20) as worker:
        yield worker


def ask(function, *completions, **columns):
    return function(["p"] * len(completions), list(completions), [[1, 2]] * len(completions), **columns)


def is_running(pid):
    """Whether a process runs (one that has ended and waits for its parent does not)."""
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(status) and not status.startswith("Z")


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_values(worker):
    assert ask(worker, "length", "", "abc") == [6, 0, 3]
    values = ask(worker, "none and nan", "b", "c")
    assert values[0] is None and values[1] != values[1] and values[2] == float("inf")


def test_columns_arrive(worker):
    assert ask(worker, "columns", answer=["x"], data=[{"a": [1, None]}]) == [1.0]
    text = "“π” \U0001f600 \u2028 \x00"
    assert ask(worker, "length", text) == [6, len(text)]


def test_prints_do_not_disturb(worker, capfd):
    assert ask(worker, "prints") == [1.0]
    assert ask(worker, "length") == [6]
    said = []

    def everything_is_passed_on():
        said.append(capfd.readouterr().err)
        return "to stderr" in "".join(said)

    assert wait_until(everything_is_passed_on)
    assert {'{"values": [9]}', "straight to the descriptor", "from a child"} <= set("".join(said).splitlines())


def test_input_is_empty(worker):
    assert ask(worker, "input") == [0.0]


def test_starts_without_torch(worker):
    assert ask(worker, "heavy") == [0.0]


def test_signals_work(worker):
    assert ask(worker, "signal") == [1.0]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise", r"my_rewards:act: ValueError: no digits in it \(.*my_rewards\.py, line \d+\)"),
        ("exit", "SystemExit: 3"),
        ("count", "returned 1 values for 2 completions"),
        ("text", "returned str '1' as a reward"),
    ],
)
def test_errors_leave_the_process_alive(worker, what, message):
    before = ask(worker, "pid")
    with pytest.raises(RewardError, match=message):
        ask(worker, what, "b")
    assert ask(worker, "pid") == before


@pytest.mark.parametrize(
    ("what", "message"), [("die", "exited with status 7. It said: last words"), ("segfault", "killed by signal 11")]
)
def test_a_process_that_dies_is_replaced(worker, what, message):
    before = ask(worker, "pid")
    with pytest.raises(RewardWorkerDied, match=message):
        ask(worker, what)
    assert ask(worker, "pid") != before


def test_a_hang_is_killed_with_all_that_it_started(here):
    with RewardWorker("my_rewards:act", timeout=1.0) as worker:
        before = ask(worker, "pid")
        started = time.monotonic()
        with pytest.raises(RewardTimeout, match="no result after 1 s") as error:
            ask(worker, "hang with child", file=[str(here / "pid")])
        assert time.monotonic() - started < 5
        assert not error.value.fatal
        assert wait_until(lambda: not is_running(int((here / "pid").read_text())))
        assert ask(worker, "pid") != before


def test_killed_from_outside_while_idle(worker):
    os.kill(int(ask(worker, "pid")[0]), signal.SIGKILL)
    with pytest.raises(RewardWorkerDied, match="killed by signal 9"):
        ask(worker, "length")
    assert ask(worker, "length") == [6]


def test_close_ends_the_process(here):
    worker = RewardWorker("my_rewards:act")
    pid = int(ask(worker, "pid")[0])
    worker.close()
    assert not is_running(pid)
    assert ask(worker, "length") == [6]  # a later call starts another
    worker.close()


@pytest.mark.parametrize("what", ["length", "hang"])
def test_ends_when_its_parent_is_killed(here, what):
    script = (
        "import sys, threading, time\n"
        "from keel.parts.rewards.worker import RewardWorker\n"
        "worker = RewardWorker('my_rewards:act')\n"
        "print(int(worker(['p'], ['pid'], [[1]])[0]), flush=True)\n"
        f"worker(['p'], [{what!r}], [[1]])\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    pid = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not is_running(pid), seconds=10)


def test_only_accepted_columns_are_sent(here):
    with RewardWorker("my_rewards.py:narrow") as worker:
        assert ask(worker, "x", "y", answer=["x", "z"], image=[object(), object()]) == [1.0, 0.0]
        assert worker.parameters.required == {"completions", "answer"}
        with pytest.raises(ConfigError, match="asks for the column 'answer'"):
            check_columns("own", worker, ["image"])


def test_column_that_is_no_json(worker):
    with pytest.raises(DataError, match=r"column image: .*Object of type object .*row 1.*callable"):
        ask(worker, "length", "b", image=[1, object()])
    assert ask(worker, "length") == [6]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("my_rewards:narow", "Did you mean 'narrow'"),
        ("absent_module:f", "ModuleNotFoundError"),
        ("x", "module:function"),
    ],
)
def test_not_found(here, reward, message):
    with pytest.raises(ConfigError, match=message):
        RewardWorker(reward)


def test_verifiers_run_in_a_worker(here):
    with isolate("keel.parts.rewards.functions:MathVerify") as worker:
        assert ask(worker, "\\boxed{2/4}", answer=["0.5"]) == [1.0]


# Threads


def test_callable_in_a_thread():
    with_thread = []

    def reward(completions, **columns):
        with_thread.append(threading.current_thread())
        return [len(c) for c in completions]

    thread = isolate(reward)
    assert isinstance(thread, RewardThread)
    assert ask(thread, "a", "bc") == [1, 2]
    assert ask(thread, "abc") == [3]
    assert with_thread[0] is with_thread[1] is not threading.main_thread()
    assert isolate(thread) is thread
    thread.close()


def test_error_in_a_thread_is_passed_on():
    thread = RewardThread(lambda completions: [1 / len(c) for c in completions])
    with pytest.raises(ZeroDivisionError):
        ask(thread, "")
    assert ask(thread, "ab") == [0.5]
    with pytest.raises(RewardError, match=r"called sys\.exit\(2\)"):
        ask(RewardThread(lambda completions: sys.exit(2)), "a")


def test_hang_in_a_thread_is_fatal():
    release = threading.Event()

    def stuck(completions):
        release.wait(30)
        return [1.0]

    thread = RewardThread(stuck, timeout=0.2)
    for _ in range(2):
        with pytest.raises(RewardTimeout, match=r"stuck: no result after 0.2 s.*module:function") as error:
            ask(thread, "a")
        assert error.value.fatal
    release.set()


def test_signals_in_a_thread_are_explained():
    def reward(completions):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    with pytest.raises(RewardError, match=r"give the reward as module:function"):
        ask(RewardThread(reward), "a")


def test_math_verify_works_in_a_thread():
    from keel.parts.rewards.functions import MathVerify

    assert ask(RewardThread(MathVerify()), "\\boxed{3}", answer=[3]) == [1.0]
    assert ask(RewardThread(ExactMatch), "3", answer=[3]) == [1.0]
