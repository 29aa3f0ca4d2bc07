"""TPO's third answer: its likelihood is learnt, the chosen one's is not."""

import pytest
import torch

from keel.core.errors import DataError
from keel.models.tiny import TinyConfig, build_tiny
from keel.tasks.preferences import Preference
from keel.train.encode import Encoder
from keel.train.gold import with_gold
from keel.train.preferences import preference_rows

SMALL = TinyConfig(dim=16, layers=1, heads=2, feed_forward=32, context=64)


def pairs(**columns):
    return [Preference(f"{i}+", ("1" * (i + 1), "23"), (1.0, 0.0), i, columns=columns) for i in range(3)]


def rows_of(some):
    encoder = Encoder(build_tiny("0123456789+", SMALL, seed=1))
    rows, _ = preference_rows(some, "pairs", encoder, None, 0, 0)
    return with_gold(rows, some, encoder, None, 0, 0)[0], encoder


def test_the_gold_answers_alone_are_learnt_and_compared_with_nothing():
    rows, encoder = rows_of(pairs(gold="456"))
    assert len(rows) == 9 and rows.group.tolist() == [0, 0, 1, 1, 2, 2, 0, 1, 2]
    learnt = rows.masks["nll"].any(1)
    assert learnt.tolist() == [False] * 6 + [True] * 3
    assert encoder.decode(rows.tokens[6][rows.mask[6]].tolist()) == "456"
    assert rows.pairs is not None
    compared = torch.cat([rows.pairs.chosen, rows.pairs.rejected])
    assert sorted(compared.tolist()) == list(range(6))


def test_a_pair_without_one_is_named():
    with pytest.raises(DataError, match=r"preference 0.*gold"):
        rows_of(pairs())


def test_its_likelihood_rises(train):
    data = [
        {"prompt": f"{n} {n} {n}>{3 * n}=", "chosen": f"{n}*{n}", "rejected": f"{n}-{n}", "gold": f"{n}+{n}+{n}"}
        for n in range(1, 20)
    ]
    run = train("tpo", data=data, max_steps=30, learning_rate=1e-2, name="gold", **{"train.batch_size": 8})
    loss = [value for _, value in run.metrics["terms/gold"]]
    assert loss[-1] < 0.8 * loss[0]
