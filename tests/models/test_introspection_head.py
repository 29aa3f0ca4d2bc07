"""The joint head on reserved logits: bins, what is left for the next token, labels, and the loss."""

import math

import pytest
import torch

from keel.core.rows import Rows
from keel.models.introspection import (
    JointBins,
    denoised_value,
    expected_reward,
    introspection_loss,
    joint_labels,
    truncated_kl,
)

SMALL = JointBins(states=2, length_edges=(0, 2, 4), first_token=3)  # tokens 3 .. 6 of a vocabulary


def index(remaining, value, bins=None) -> int:
    return int((bins or JointBins()).index(torch.tensor([remaining]), torch.tensor([value]))[0])


def test_bins_of_the_worked_example():
    assert index(300, 1.0) == 49
    assert index(256, 0.0) == 1 and index(255, 0.0) == 0
    assert index(32_768, 0.0) == 7 and index(1_000_000, 0.0) == 7 and index(16_383, 0.0) == 6


def test_reward_bins_are_half_open_and_hold_one():
    reward = [index(0, value) // 8 for value in (0.0, 0.083, 0.084, 1 / 6, 0.25, 0.5, 0.916, 0.917, 1.0, 1.5, -0.5)]
    assert reward == [0, 0, 1, 1, 2, 3, 5, 6, 6, 6, 0]
    two = JointBins(states=2)
    assert [index(0, value, two) // 8 for value in (0.0, 0.49, 0.5, 1.0)] == [0, 0, 1, 1]
    torch.testing.assert_close(JointBins().values, torch.arange(7).double() / 6)
    assert JointBins().lengths[:2].tolist() == [128.0, 384.0] and JointBins().count == 56


def test_next_tokens_are_drawn_from_the_rest():
    torch.manual_seed(0)
    logits = torch.randn(5, 11)
    rest = [0, 1, 2, 7, 8, 9, 10]
    drawn = SMALL.masked(logits).softmax(-1)
    torch.testing.assert_close(drawn[:, rest], logits[:, rest].softmax(-1), atol=1e-6, rtol=0)
    assert float(drawn[:, 3:7].abs().max()) == 0
    joint = SMALL.joint(logits)
    torch.testing.assert_close(joint.flatten(1), logits[:, 3:7].softmax(-1))
    torch.testing.assert_close(joint[:, 1, 0], logits[:, 3:7].softmax(-1)[:, 2])  # l + r L
    torch.testing.assert_close(SMALL.joint(logits.log_softmax(-1)), joint)  # a constant does not matter
    with pytest.raises(ValueError, match="first_token"):
        SMALL.masked(torch.zeros(1, 6))


def rows(mask) -> Rows:
    mask = torch.tensor(mask).bool()
    ids = torch.zeros(len(mask), 2, dtype=torch.long)
    return Rows.build(ids, ids == 0, torch.zeros_like(mask, dtype=torch.long), mask)


def test_labels_are_the_tokens_that_follow():
    found = joint_labels(rows([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]), torch.tensor([1.0, 0.2]), SMALL)
    assert found.tolist() == [[3, 3, 3, 2, 2], [0, 0, -1, -1, -1]]  # 4, 3, 2, 1, 0 tokens to come; 1, 0
    long = joint_labels(rows([[1] * 300]), torch.tensor([1.0]), JointBins())
    assert long[0, 43:45].tolist() == [49, 48] and int(long[0, -1]) == 48  # 256 to come, then 255


def test_denoised_values_are_means_over_the_last_positions():
    joint = torch.zeros(2, 4, 2, 2)
    joint[..., 1, 0] = torch.tensor([[0.1, 0.2, 0.6, 1.0], [0.4, 0.8, 0.9, 0.9]])
    joint[..., 0, 1] = 1 - joint[..., 1, 0]
    torch.testing.assert_close(expected_reward(joint, SMALL)[0], torch.tensor([0.1, 0.2, 0.6, 1.0]))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    torch.testing.assert_close(denoised_value(joint, mask, SMALL, last=2), torch.tensor([0.8, 0.6]))
    torch.testing.assert_close(denoised_value(joint, mask, SMALL), torch.tensor([0.475, 0.6]))
    assert denoised_value(joint[:1], mask[:1] & False, SMALL).isnan().all()
    with pytest.raises(ValueError, match="last"):
        denoised_value(joint, mask, SMALL, last=0)


def test_the_kl_to_an_equal_teacher_is_the_mass_that_was_left_out():
    probs = torch.tensor([[0.5, 0.4, 0.06, 0.0, 0.0, 0.0, 0.0, 0.04]]).double()
    logits = probs.clamp(min=1e-300).log()
    logits[:, 3:7] = torch.tensor([3.0, -1.0, 0.5, 9.0])  # the slice does not matter
    assert float(truncated_kl(logits, logits, SMALL, top_k=2)) == pytest.approx(0.105361, abs=1e-6)
    assert float(truncated_kl(logits, logits, SMALL)) == pytest.approx(0.0, abs=1e-12)
    sharper = logits.clone()
    sharper[:, [2, 7]] = -1e3
    assert float(truncated_kl(sharper, logits, SMALL, top_k=2)) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="top_k"):
        truncated_kl(logits, logits, SMALL, top_k=0)


def test_the_loss_is_least_where_the_slice_gives_the_frequencies():
    label = torch.tensor([0, 0, 0, 2, 3, -1])
    logits = torch.zeros(6, 8).double()
    logits[:, 3:7] = torch.tensor([3 / 5, 1e-30, 1 / 5, 1 / 5], dtype=torch.float64).log()
    logits[5] = 1e3  # without a label: of no account
    logits.requires_grad_()
    loss, parts = introspection_loss(logits, label, SMALL)
    wanted = -(3 * math.log(0.6) + 2 * math.log(0.2)) / 5
    assert float(loss.detach()) == pytest.approx(wanted, abs=1e-6) and float(parts["ce"]) == float(loss.detach())
    gradient = torch.autograd.grad(loss, logits)[0]
    assert float(gradient.sum(0).abs().max()) < 1e-9 and float(gradient[5].abs().max()) == 0


def test_the_loss_adds_the_kl_and_holds_the_teacher_constant():
    torch.manual_seed(1)
    student, teacher = (torch.randn(4, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    label = torch.tensor([0, 1, 2, 3])
    plain, _ = introspection_loss(student, label, SMALL)
    loss, parts = introspection_loss(student, label, SMALL, teacher, kl_coef=10.0, top_k=3)
    torch.testing.assert_close(loss, plain + 10 * parts["kl"])
    torch.testing.assert_close(parts["kl"], truncated_kl(student, teacher, SMALL, 3).mean().detach())
    loss.backward()
    assert teacher.grad is None
    for place in ((0, 0), (1, 4), (3, 8)):
        step = torch.zeros(4, 9, dtype=torch.float64)
        step[place] = 1e-6
        ends = [introspection_loss(student.detach() + s, label, SMALL, teacher, 10.0, 3)[0] for s in (step, -step)]
        assert float(student.grad[place]) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, abs=1e-7)
    without, _ = introspection_loss(student, label, SMALL, teacher, kl_coef=0.0)
    torch.testing.assert_close(without, plain)
    with pytest.raises(ValueError, match="kl_coef"):
        introspection_loss(student, label, SMALL, teacher, kl_coef=-1.0)


def test_a_linear_head_learns_the_joint_law_not_the_product_of_its_margins():
    """Texts are short and right or long and wrong; a state that cannot tell which must keep the two together."""
    torch.manual_seed(2)
    weight = torch.zeros(8, 1, requires_grad=True)
    label = torch.tensor([SMALL.index(torch.tensor([0]), torch.tensor([1.0]))[0]] * 7 + [1] * 3)
    step = torch.optim.LBFGS([weight], max_iter=60)

    def closure():
        step.zero_grad()
        loss, _ = introspection_loss(torch.ones(10, 1) @ weight.T, label, SMALL)
        loss.backward()
        return loss

    step.step(closure)
    joint = SMALL.joint(weight.detach().T)[0]
    torch.testing.assert_close(joint, torch.tensor([[0.0, 0.3], [0.7, 0.0]]), atol=1e-3, rtol=0)
    assert float(weight.detach()[[0, 1, 2, 7]].abs().max()) == 0  # ordinary tokens are left alone


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"states": 1}, "states"),
        ({"length_edges": (0, 4, 4)}, "length_edges"),
        ({"length_edges": (1, 4)}, "length_edges"),
        ({"first_token": -1}, "first_token"),
    ],
)
def test_settings_out_of_range(setting, name):
    with pytest.raises(ValueError, match=name):
        JointBins(**setting)
