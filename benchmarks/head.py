"""Log-probability, entropy and full-vocabulary KL: the engine's chunks against materialised logits."""

import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.measuring import PeakMemory, Row, in_process, medians
from keel.core.aggregate import Aggregation
from keel.core.policy import Head
from keel.core.rows import Rows
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence, Entropy, LogProb
from keel.statistics.stats import Stats

TOKENS, DIM, VOCABULARY = 4096, 256, 32768
COMMAND = "python -m benchmarks head"


class States(nn.Module):
    """A policy whose states are its parameters: only the head is measured."""

    def __init__(self, states: Tensor, weight: Tensor):
        super().__init__()
        self.states = nn.Parameter(states)
        self.output = nn.Linear(*reversed(weight.shape), bias=False)
        self.output.weight = nn.Parameter(weight)
        self.module, self.head = self, Head(self.output)

    def hidden(self, rows: Rows) -> Tensor:
        """The states of the rows."""
        return self.states


def problem(length: int, count: int, vocabulary: int = VOCABULARY) -> tuple[States, States, Rows]:
    """A policy, a reference near it, and `count` rows of `length` tokens."""
    chance = torch.Generator().manual_seed(0)
    states = torch.randn(count, length, DIM, generator=chance)
    weight = torch.randn(vocabulary, DIM, generator=chance) / DIM**0.5
    near = weight + 0.1 * torch.randn(vocabulary, DIM, generator=chance) / DIM**0.5
    tokens = torch.randint(0, vocabulary, (count, length), generator=chance)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    rows = Rows.build(tokens[:, :1], mask[:, :1], tokens, mask)
    ref = States(states.clone(), near).requires_grad_(False)
    return States(states, weight), ref, rows


def engine_way(policy: States, ref: States, rows: Rows) -> Callable[[], Tensor]:
    """One step of the engine at its default chunk size; the loss is a mean over tokens, as most are."""
    engine, mean = Engine({"policy": policy, "ref": ref}), Aggregation("token_mean")
    asked = [LogProb(), Entropy(), Divergence("kl_policy_ref", "ref")]

    def loss(rows: Rows, stats: Stats) -> Tensor:
        return sum(mean(stats[f], rows) * c for f, c in zip(asked, WEIGHTS, strict=True))

    def run() -> Tensor:
        policy.zero_grad(set_to_none=True)
        return engine.step(asked, rows, Stats(), loss, additive=True)[0]

    return run


def materialised_way(policy: States, ref: States, rows: Rows) -> Callable[[], Tensor]:
    """The same sum with all logits in memory, by autograd, as a trainer would write it."""

    def run() -> Tensor:
        policy.zero_grad(set_to_none=True)
        logp = policy.output(policy.states.flatten(0, 1)).log_softmax(-1)
        with torch.no_grad():
            other = ref.output(ref.states.flatten(0, 1)).log_softmax(-1)
        p = logp.exp()
        chosen = logp.gather(-1, rows.tokens.reshape(-1, 1))[:, 0]
        values = chosen, -(p * logp).sum(-1), (p * (logp - other)).sum(-1)
        loss = sum(value.mean() * c for value, c in zip(values, WEIGHTS, strict=True))
        loss.backward()
        return loss.detach()

    return run


WEIGHTS = (-1.0, -0.01, 0.04)
WAYS = {"engine": engine_way, "materialised": materialised_way}


def rows(repeats: int = 5, threads: int = 2) -> Iterator[Row]:
    """Short rows, whose logits are computed once, and longer ones, whose logits are computed twice."""
    for length in (32, 128):
        yield from measure(length, repeats, threads)


def measure(length: int, repeats: int, threads: int) -> Iterator[Row]:
    """Time, then memory, each way in a process of its own for the latter."""
    policy, ref, batch = problem(length, TOKENS // length)
    ours, theirs = engine_way(policy, ref, batch), materialised_way(policy, ref, batch)
    gradients = []
    for way in (ours, theirs):
        value = way()
        gradients.append((value, policy.states.grad, policy.output.weight.grad))
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*gradients, strict=True))
    spent = medians([theirs, ours], repeats, warm=0)
    shape = f"{TOKENS // length} x {length} tokens, d {DIM}, vocabulary {VOCABULARY}"
    work = f"log p, entropy and KL of the vocabulary, {shape}"
    accuracy = f"gradients to {apart:.0e}"
    ratio = spent[0] / spent[1]
    yield Row(f"{work}: time", "default", 1e3 * spent[1], 1e3 * spent[0], "ms", ratio, 2.0, accuracy, COMMAND)
    code = "from benchmarks.head import memory; memory({!r}, {})"
    extra = {name: in_process(code.format(name, length), threads)["extra"] for name in WAYS}
    ratio = extra["materialised"] / extra["engine"]
    mega = [extra[name] / 2**20 for name in ("engine", "materialised")]
    yield Row(f"{work}: extra memory", "default", *mega, "MiB", ratio, 40.0, "", COMMAND)


def memory(way: str, length: int) -> None:
    """Peak of one way beyond its inputs and gradients, and beyond the libraries that a first small step loads."""
    WAYS[way](*problem(2, 32, 1024))()
    policy, ref, batch = problem(length, TOKENS // length)
    run = WAYS[way](policy, ref, batch)
    policy.states.grad, policy.output.weight.grad = (
        torch.zeros_like(policy.states),
        torch.zeros_like(policy.output.weight),
    )
    policy.zero_grad = lambda set_to_none=True: None  # the gradients' own memory is the same for both
    with PeakMemory() as peak:
        run()
    print(json.dumps({"extra": peak.extra}))
