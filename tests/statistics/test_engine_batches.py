"""What the engine runs and holds: logits of a chunk only, the models that are read, and micro-batches that fit."""

import pytest
import torch
from tests.statistics.whole_logits import ROWS, assert_gradients, critic_of, gradients, last, log_prob, logits, mixture
from tests.worlds import EVERYTHING, Network, text_rows
from torch import nn

from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence, Entropy, LogProb, TopK, TopPEntropy, Value
from keel.statistics.stats import Stats

# -- what it costs ---------------------------------------------------------------------------------------------------


class Counting(nn.Linear):
    """Records the most positions that it ever saw; being no plain linear layer, its backward goes through autograd."""

    most = 0

    def forward(self, hidden):
        self.most = max(self.most, len(hidden))
        return super().forward(hidden)


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("max_tokens", [EVERYTHING, 20])
@pytest.mark.parametrize("kind", ["plain", "own"])
def test_logits_exist_for_a_chunk_only(kind, max_tokens, positions):
    policy = Network(seed="policy", head=Counting(6, 11) if kind == "own" else None)
    most = [0]
    policy.output.register_forward_pre_hook(lambda module, given: most.append(len(given[0])))
    engine = Engine({"policy": policy}, max_tokens=max_tokens, chunk_bytes=positions * 4 * 11)
    needs = [LogProb(), TopPEntropy(0.8), TopK(2)]
    engine.step(needs, ROWS, Stats(), lambda rows, stats: mixture([stats[f] for f in needs]))
    assert max(most) == positions
    assert kind == "plain" or policy.output.most == positions


def test_models_run_only_if_they_are_read():
    policy, ref = Network(seed="policy"), Network(seed="ref")
    engine = Engine({"policy": policy, "ref": ref}, max_tokens=EVERYTHING)
    engine.measure([LogProb(), Entropy()], ROWS)
    assert (len(policy.calls), len(ref.calls)) == (1, 0)
    engine.measure([LogProb(of=("ref",))], ROWS)
    assert (len(policy.calls), len(ref.calls)) == (1, 1)
    assert engine.measure([], ROWS) == {} and (len(policy.calls), len(ref.calls)) == (1, 1)
    engine.measure([LogProb(of=("old",))], ROWS, alias={"old": "policy"})
    assert (len(policy.calls), len(ref.calls)) == (2, 1)


def test_frozen_states_are_reused_in_the_second_pass():
    policy, ref = Network(seed="policy"), Network(seed="ref")
    engine = Engine({"policy": policy, "ref": ref}, max_tokens=20)
    batches = len(engine.split(ROWS))
    need = Divergence("js")
    engine.step([need], ROWS, Stats(), lambda rows, stats: stats[need].sum())
    assert (len(policy.calls), len(ref.calls)) == (2 * batches, batches)


@pytest.mark.parametrize("functional", [LogProb(), LogProb(where="last"), LogProb(where="nll")], ids=str)
def test_micro_batches_without_gradient_are_skipped(functional):
    """Only the last row matters to the loss: one body runs again."""
    policy = Network(seed="policy")
    engine = Engine({"policy": policy}, max_tokens=1)
    rows = ROWS.with_(masks={"nll": ROWS.mask})
    only = {"mask": lambda v: v[4].sum(), "last": lambda v: v[4], "nll": lambda v: v[-int(ROWS.lengths[4]) :].sum()}
    loss, _ = engine.step([functional], rows, Stats(), lambda rows, stats: only[functional.where](stats[functional]))
    assert len(engine.split(rows)) == 5 and len(policy.calls) == 6
    found = gradients(policy)
    z = logits(policy, ROWS, 1.0)
    token = log_prob(z, ROWS)
    wanted = token[4][ROWS.mask[4]].sum() if functional.where != "last" else last(token, ROWS)[4]
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())
    assert_gradients(found, gradients(policy))


def test_without_any_gradient_nothing_runs_again():
    policy = Network(seed="policy")
    engine = Engine({"policy": policy}, max_tokens=1)
    loss, _ = engine.step([LogProb()], ROWS, Stats(), lambda rows, stats: stats[LogProb()].detach().sum())
    assert len(policy.calls) == 5 and not loss.requires_grad
    assert all(p.grad is None for p in policy.parameters())


# -- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 9, 14, 20, 40, EVERYTHING])
def test_micro_batches_fit_and_cover(max_tokens):
    engine = Engine({"policy": Network()}, max_tokens=max_tokens)
    plan = engine.split(ROWS)
    assert sorted(i for index in plan for i in index.tolist()) == list(range(5))
    for index in plan:
        part = ROWS.select(index).trim()
        size = len(part) * (part.prompt_ids.shape[1] + part.tokens.shape[1])
        assert size <= max_tokens or len(part) == 1


def test_rows_of_similar_length_share_a_micro_batch():
    """Two long rows and two short ones: 2 x 9 tokens and 2 x 3, not 9 + 3 twice."""
    rows = text_rows(10).select(torch.tensor([0, 3, 5, 8]))
    plan = Engine({"policy": Network()}, max_tokens=18).split(rows)
    assert [sorted(index.tolist()) for index in plan] == [[0, 2], [1, 3]]


def test_order_and_padding_do_not_change_the_numbers():
    policy = Network(seed="policy")
    engine = Engine({"policy": policy}, max_tokens=20)
    wanted = engine.measure([Entropy()], ROWS)[Entropy()]
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(engine.measure([Entropy()], ROWS.select(order))[Entropy()], wanted[order])
    padded = engine.measure([Entropy()], ROWS.padded(8, 9))[Entropy()]
    torch.testing.assert_close(padded[:, :6], wanted)
    assert not padded[:, 6:].any() and not wanted[~ROWS.mask].any()


NEEDS = [LogProb(), LogProb(where="last"), TopK(2), TopK(3, where="last"), LogProb(where="nll"), Value("value")]


EMPTY = torch.zeros_like(ROWS.mask)


@pytest.mark.parametrize(
    "rows",
    [ROWS.with_(mask=EMPTY, masks={"nll": EMPTY}), ROWS.select(EMPTY[:, 0])],
    ids=["no tokens", "no rows"],
)
def test_rows_without_tokens(rows):
    policy = Network(seed="policy")
    engine = Engine({"policy": policy}, {"value": critic_of(policy, "head")})
    stats = engine.measure(NEEDS, rows)
    n = len(rows)
    assert [tuple(stats[f].shape) for f in NEEDS] == [(n, 6), (n,), (n, 6, 2), (n, 3), (0,), (n, 6)]
    loss, _ = engine.step(NEEDS, rows, Stats(), lambda rows, stats: sum(stats[f].sum() for f in NEEDS))
    assert float(loss) == 0 and not any(bool(g.any()) for g in gradients(policy).values())
