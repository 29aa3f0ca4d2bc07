"""Datamodel targets: an exact one, what the weights mean, and that a student learns from what is stored."""

import itertools

import pytest
import torch

from keel.core.errors import ConfigError
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.parts.rewards.stored_teacher import stored
from keel.train.datamodels import effect_weights, store_datamodel_targets

X, Y = torch.tensor([0.0, 1.0, 2.0, 3.0]).double(), torch.tensor([0.0, 1.0, 2.0, 5.0]).double()


def fitted(kept: list[int], at: float = 3.0) -> float:
    """A line through some of the points, read at x."""
    design = torch.stack([torch.ones(len(kept)).double(), X[kept]], 1)
    return float(torch.tensor([1.0, at]).double() @ torch.linalg.lstsq(design, Y[kept, None]).solution[:, 0])


def test_a_model_of_which_the_target_is_exact():
    """Least squares on x = (0, 1, 2, 3), y = (0, 1, 2, 5): 4.4 at 3 with all points, 3.0 without the last one."""
    full, without = fitted([0, 1, 2, 3]), fitted([0, 1, 2])
    design = torch.stack([torch.ones(4).double(), X], 1)
    leverage = float((design @ torch.linalg.inv(design.T @ design) @ design.T)[3, 3])
    assert (full, without) == pytest.approx((4.4, 3.0))
    assert without == pytest.approx(5 - (5 - full) / (1 - leverage))
    subsets = torch.tensor([[True, True, True, True], [True, True, True, False]])
    weights = effect_weights(subsets, [3])
    assert full + float(weights @ torch.tensor([full, without]).double()) == pytest.approx(3.0)


def test_outputs_that_are_linear_in_the_subset_are_predicted_exactly():
    chance = torch.Generator().manual_seed(0)
    theta, constant = torch.randn(5, generator=chance).double(), 1.7
    subsets = torch.tensor([s for s in itertools.product([False, True], repeat=5) if sum(s) in (2, 3)])
    outputs = constant + subsets.double() @ theta
    for forget in ([0], [1, 4], [0, 1, 2]):
        weights = effect_weights(subsets, forget)
        assert float(weights @ outputs) == pytest.approx(-float(theta[forget].sum()))
        assert float(weights.sum()) == pytest.approx(0.0, abs=1e-12)
    assert float(effect_weights(subsets, [0], ridge=1e9).abs().max()) < 1e-6  # all is shrunk away


def test_what_is_stored_is_the_softmax_of_the_mixed_logits(tmp_path):
    """One prompt, two tokens of three: logits that are linear in the subset, of which the target takes one part out."""
    space = SequenceSpace(vocab=3, horizon=2)
    chance = torch.Generator().manual_seed(1)
    base, one, two = (torch.randn(1, space.prefixes, 3, generator=chance).double() for _ in range(3))
    subsets = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    logits = [base + a * one + b * two for a, b in subsets.double().tolist()]
    models = [TabularPolicy(space, z + 0.7) for z in logits]  # a constant is no matter
    rows = space.rows(0)
    whole = TabularPolicy(space, base + one + two)
    rows = rows.with_(data_index=torch.arange(len(rows)))
    path = store_datamodel_targets(whole, models, subsets, [1], rows, tmp_path / "t.safetensors", k=2)
    found = stored(path)
    wanted = (base + one)[0, space.prefix_index(rows.tokens)].log_softmax(-1)  # [B, T, V]
    logp, ids = wanted.topk(2, -1)
    assert torch.equal(found.ids.long().view(len(rows), 2, 2), ids)
    torch.testing.assert_close(found.logp.double().view(len(rows), 2, 2), logp, atol=1e-6, rtol=0)
    rest = (1 - logp.exp().sum(-1)).log()
    torch.testing.assert_close(found.rest.double().view(len(rows), 2), rest, atol=1e-5, rtol=0)


def test_a_student_comes_nearer_to_the_target(base, teacher, train, tmp_path):
    """`stored_distillation` reads the file: with theta the whole difference of two models the target is the other."""
    data = [{"prompt": f"{a} {b} 3>{a + b + 3}=", "completion": f"{a}+{b}+3"} for a in range(1, 7) for b in range(1, 5)]
    subsets = torch.tensor([[True, False], [True, True]])
    path = store_datamodel_targets(base, [teacher, base], subsets, [1], data, tmp_path / "t.safetensors", k=16)
    known = {"data": data, "max_steps": 30, "train.batch_size": 8, "learning_rate": 3e-3}
    run = train("stored_distillation", stored=str(path), **known)
    loss = [value for _, value in run.metrics["loss"]]
    assert sum(loss[-5:]) < 0.7 * sum(loss[:5])


@pytest.mark.parametrize(
    ("subsets", "forget", "more", "said"),
    [
        ([[True, True], [True, False]], [0], {}, "in all subsets or in none"),
        ([[True, True], [True, False]], [2], {}, "no example 2"),
        ([[True, True], [True, False]], [1], {"ridge": -1.0}, "ridge"),
        ([[True, True]], [1], {}, "1 subsets for 2 models"),
        ([[True, True], [True, False]], [1], {"k": 0}, "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(subsets, forget, more, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        store_datamodel_targets(None, [None, None], torch.tensor(subsets), forget, [], tmp_path / "t", **more)
