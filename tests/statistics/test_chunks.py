"""Chunks of a large vocabulary in fp32: values and gradients of every chunk size are those of fp64 autograd."""

import pytest
import torch
from tests.worlds import Network, noise, text_rows
from torch import Tensor, nn

from keel.core.policy import Head
from keel.core.rows import Rows
from keel.statistics import engine as engines
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence, Entropy, LogProb, TopK
from keel.statistics.stats import Stats

ROWS, LENGTH, DIM, VOCABULARY = 4, 16, 8, 1 << 13
ASKED = (LogProb(), Entropy(), Divergence("kl_policy_ref"), TopK(2, under="ref"))


class Table(nn.Module):
    """A policy whose states are parameters."""

    def __init__(self, seed: str, dtype: torch.dtype):
        super().__init__()
        self.states = nn.Parameter(noise(seed, "states", shape=(ROWS, LENGTH, DIM)).to(dtype))
        self.output = nn.Linear(DIM, VOCABULARY, dtype=dtype)
        with torch.no_grad():
            self.output.weight.copy_(noise(seed, "weight", shape=(VOCABULARY, DIM)))
            self.output.bias.copy_(noise(seed, "bias", shape=(VOCABULARY,)))
        self.module, self.head = self, Head(self.output, scale=0.7)

    def hidden(self, rows: Rows) -> Tensor:
        return self.states


def rows() -> Rows:
    tokens = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) * 127
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Rows.build(tokens[:, :1], mask[:, :1], tokens, mask)


def loss(rows: Rows, stats) -> Tensor:
    return sum((stats[f].sin() * (i + 1)).mean() for i, f in enumerate(ASKED))


@pytest.mark.parametrize("positions", [64, 40, 32, 7], ids=lambda n: f"{n} positions a chunk")
def test_every_chunk_size_gives_the_gradient(positions):
    """64 is one chunk, whose numbers are kept; 40 and 32 are stored with the vocabulary first, 7 and 24 are not."""
    exact, ref = Table("policy", torch.float64), Table("ref", torch.float64)
    z, q = ((t.output(t.states) * 0.7 / 0.9).log_softmax(-1) for t in (exact, ref))
    p, q = z.exp(), q.detach()
    values = {
        ASKED[0]: z.gather(-1, rows().tokens[..., None])[..., 0],
        ASKED[1]: -(p * z).sum(-1),
        ASKED[2]: (p * (z - q)).sum(-1),
        ASKED[3]: z.gather(-1, q.topk(2, -1).indices),
    }
    true = loss(rows(), values)
    true.backward()
    models = {"policy": Table("policy", torch.float32), "ref": Table("ref", torch.float32).requires_grad_(False)}
    engine = Engine(models, temperature=0.9, chunk_bytes=positions * 4 * VOCABULARY)
    found, stats = engine.step(ASKED, rows(), Stats(), loss)
    assert float(found) == pytest.approx(float(true.detach()), rel=1e-5)
    for functional, value in values.items():
        torch.testing.assert_close(stats[functional].double(), value.detach(), rtol=1e-5, atol=1e-5)
    for (name, parameter), wanted in zip(models["policy"].named_parameters(), exact.parameters(), strict=True):
        assert wanted.grad is not None and parameter.grad is not None, name
        scale = float(wanted.grad.abs().max())
        torch.testing.assert_close(parameter.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5 * scale)


def test_gradients_are_added_to_those_that_are_there():
    model = Table("policy", torch.float32)
    engine = Engine({"policy": model}, chunk_bytes=9 * 4 * VOCABULARY)
    once = {}
    for turn in (1, 2):
        engine.step([LogProb()], rows(), Stats(), lambda r, s: s[LogProb()].mean())
        for name, parameter in model.named_parameters():
            once.setdefault(name, parameter.grad.clone())
            torch.testing.assert_close(parameter.grad, turn * once[name], rtol=1e-5, atol=1e-7)


def test_the_automatic_size_keeps_a_small_vocabulary_in_one_chunk(monkeypatch):
    """64 tokens: 40960 positions on a CPU. With a vocabulary of 2^13, 64 positions are a fifth of a chunk."""
    engine = Engine({"policy": Table("policy", torch.float32)})
    batch = engine._forward(rows(), torch.arange(ROWS), [LogProb()], grad=False)
    assert list(engine._chunks(batch, [LogProb()])) == [(0, 64)]
    assert engines.CHUNK_BYTES_CPU // (4 * 64) == 32768
    monkeypatch.setattr(engines, "CHUNK_BYTES_CPU", 4 * VOCABULARY * 48)
    assert list(engine._chunks(batch, [LogProb()])) == [(0, 48), (48, 64)]


@pytest.mark.parametrize(
    "positions, pieces", [(6, [1, 1, 2, 1]), (11, [2, 3]), (5, [1, 1, 1, 2]), (4, [5]), (100, [5])]
)
def test_additive_losses_take_rows_by_the_chunk(positions, pieces):
    """Logits of whole rows that fit a chunk are computed once; if the longest does not fit, all are one piece."""
    rows = text_rows(5)
    policy, ref = Network(seed="policy"), Network(seed="ref")
    seen: list[int] = []
    needs = [LogProb(), Divergence("kl_policy_ref")]

    def loss(rows, stats):
        seen.append(len(rows))
        total = rows.totals.tokens if rows.totals is not None else rows.mask.sum()
        return sum((stats[f] * rows.mask).sum() for f in needs) / total

    results = []
    for additive in (True, False):
        engine = Engine({"policy": policy, "ref": ref}, max_tokens=10**6, chunk_bytes=positions * 4 * 11)
        value, stats = engine.step(needs, rows, Stats(), loss, additive=additive)
        results.append((value, stats[needs[0]], [p.grad.clone() for p in policy.parameters()]))
        policy.zero_grad()
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)
    assert seen == [*pieces, 5]
