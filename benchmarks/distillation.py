"""Distillation over a vocabulary of 32,768: the engine's chunks against materialised logits of both models.

`python -m benchmarks distillation` prints extra memory and time of one update for each divergence.
"""

import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.head import VOCABULARY, States, problem
from benchmarks.measuring import PeakMemory, Row, in_process, medians
from keel.core.rows import Rows
from keel.method import Method
from keel.models.sources import Pretrained
from keel.parts.terms.distillation import TeacherDivergence
from keel.parts.terms.penalties import Summand
from keel.statistics.engine import Engine
from keel.statistics.stats import Stats

KINDS = ("kl_ref_policy", "kl_policy_ref", "js")
TOKENS, LENGTH = 4096, 128
GOAL = 30.0  # times less memory
CHUNK: float | None = None  # train.chunk_megabytes
COMMAND = "python -m benchmarks distillation"


def engine_way(kind: str, policy: States, teacher: States, rows: Rows) -> Callable[[], Tensor]:
    """An update as the loop makes it."""
    term = {"distil": Summand(TeacherDivergence(kind), 1.0)}
    method = Method(kind="distillation", models={"teacher": Pretrained("teacher")}, terms=term)
    chunk = None if CHUNK is None else int(CHUNK * 2**20)
    engine, needs = Engine({"policy": policy, "teacher": teacher}, chunk_bytes=chunk), method.live_needs()

    def run() -> Tensor:
        policy.zero_grad(set_to_none=True)
        return engine.step(needs, rows, Stats(), lambda r, s: method.loss(r, s, {}), additive=method.splits(rows))[0]

    return run


def materialised_way(kind: str, policy: States, teacher: States, rows: Rows) -> Callable[[], Tensor]:
    """The same with the logits of both models in memory, by autograd, as a trainer would write it."""

    def run() -> Tensor:
        policy.zero_grad(set_to_none=True)
        log_p = policy.output(policy.states.flatten(0, 1)).log_softmax(-1)
        with torch.no_grad():
            log_q = teacher.output(teacher.states.flatten(0, 1)).log_softmax(-1)
        loss = divergence(kind, log_p, log_q).mean()
        loss.backward()
        return loss.detach()

    return run


def divergence(kind: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """By torch's own functions."""
    if kind == "kl_ref_policy":
        return torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if kind == "kl_policy_ref":
        return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    middle = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    both = (torch.nn.functional.kl_div(middle, log, reduction="none", log_target=True) for log in (log_p, log_q))
    return sum(both, torch.zeros(())).sum(-1) / 2


WAYS = {"engine": engine_way, "materialised": materialised_way}


def rows(repeats: int = 3, threads: int = 2, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> Iterator[Row]:
    """Memory and time of each divergence."""
    for kind in KINDS:
        yield from measure(kind, repeats, threads, tokens, vocabulary)


def measure(kind: str, repeats: int, threads: int, tokens: int, vocabulary: int) -> Iterator[Row]:
    """Memory, each way in a process of its own, then time."""
    code = "from benchmarks.distillation import memory; memory({!r}, {!r}, {}, {})"
    calls = {way: code.format(way, kind, tokens, vocabulary) for way in WAYS}
    extra = {way: in_process(call, threads)["extra"] for way, call in calls.items()}
    batch = problem(LENGTH, tokens // LENGTH, vocabulary)
    ours, theirs = (WAYS[way](kind, *batch) for way in ("engine", "materialised"))
    gradients = []
    for way in (ours, theirs):
        way()
        gradients.append(batch[0].states.grad)
    apart = float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max())
    work, accuracy = f"{kind} to a teacher, {tokens} tokens, vocabulary {vocabulary}", f"gradients to {apart:.0e}"
    setting = "default" if CHUNK is None else f"train.chunk_megabytes={CHUNK:g}"
    mega = [extra[way] / 2**20 for way in ("engine", "materialised")]
    yield Row(f"{work}: extra memory", setting, *mega, "MiB", mega[1] / mega[0], GOAL, "", COMMAND)
    spent = medians([theirs, ours], repeats, warm=0)
    milli = [1e3 * spent[1], 1e3 * spent[0]]
    yield Row(f"{work}: time", setting, *milli, "ms", spent[0] / spent[1], None, accuracy, COMMAND)


def memory(way: str, kind: str, tokens: int, vocabulary: int) -> None:
    """Print the peak of one way beyond its inputs and gradients, and beyond the libraries of a first small step."""
    WAYS[way](kind, *problem(32, 2, 1024))()
    batch = problem(LENGTH, tokens // LENGTH, vocabulary)
    policy = batch[0]
    run = WAYS[way](kind, *batch)
    policy.states.grad, policy.output.weight.grad = (
        torch.zeros_like(policy.states),
        torch.zeros_like(policy.output.weight),
    )
    policy.zero_grad = lambda set_to_none=True: None  # the gradients' own memory is the same for both
    with PeakMemory() as peak:
        run()
    print(json.dumps({"extra": peak.extra}))
