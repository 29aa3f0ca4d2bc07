"""The loss of a judge that teaches itself to do without a reference."""

import pytest
import torch

from keel.core.errors import DataError, MethodError
from keel.core.policy import Head
from keel.core.rows import Pairs, Rows
from keel.models.tiny import SMALL, build_tiny
from keel.parts.terms.judge_distillation import JudgeDistillation, WholeLogProbs
from keel.recipes.registry import recipe_named
from keel.statistics.engine import Engine
from keel.statistics.functionals import LogProb
from keel.statistics.stats import Stats
from keel.tasks.task import Example
from keel.train.encode import Encoder
from keel.train.twins import twin_column, twin_rows

LOGITS = {"T": [2.0, 1.0, 0.0], "S": [1.0, 1.0, 0.0]}


def pair(teacher=(2.0, 1.0, 0.0), student=(1.0, 1.0, 0.0), answer=(0, 0), dtype=torch.float64):
    """T and S write the token `answer`; S has another token before it, which is off the mask `distil`."""
    z = torch.tensor([[list(teacher), [0.0] * 3], [[5.0, 0.0, 0.0], list(student)]], dtype=dtype, requires_grad=True)
    tokens = torch.tensor([[answer[0], 2], [0, answer[1]]])
    mask = torch.tensor([[True, False], [True, True]])
    distil = torch.tensor([[True, False], [False, True]])
    one = torch.ones(1)
    index = torch.tensor([0]), torch.tensor([1])
    ids = torch.zeros(2, 1, dtype=torch.long)
    rows = Rows.build(
        ids, ids == 0, tokens, mask, masks={"distil": distil}, pairs=Pairs(*index, one, one, one, 0 * one)
    )
    logp = z.log_softmax(-1)
    stats = Stats({LogProb(): logp.gather(-1, tokens[..., None])[..., 0], WholeLogProbs(): logp[distil]})
    return rows, stats, z


def test_the_example():
    """KL of softmax(2, 1, 0) to softmax(1, 1, 0): 0.119630; the reverse direction is 0.123292."""
    rows, stats, _ = pair()
    part = JudgeDistillation()
    teacher, student, kl = (float(v.detach()) for v in part.parts(rows, stats))
    assert kl == pytest.approx(0.119630, abs=5e-7)
    turned, other, _ = pair(LOGITS["S"], LOGITS["T"])
    assert float(part.parts(turned, other)[2].detach()) == pytest.approx(0.123292, abs=5e-7)
    # CE_T = -log softmax(2, 1, 0)_0; CE_S the mean of -log softmax(5, 0, 0)_0 and -log softmax(1, 1, 0)_0
    assert teacher == pytest.approx(0.407606, abs=5e-7)
    assert student == pytest.approx((0.013386 + 0.861995) / 2, abs=1e-6)
    whole = float(part(rows, stats).detach())
    assert whole == pytest.approx(0.407606 + 0.3 * 0.437690 + 2 * 0.119630, abs=2e-6)
    assert float(JudgeDistillation(coef=3.0)(rows, stats).detach()) == pytest.approx(3 * whole)
    assert {k: float(v) for k, v in part.metrics(rows, stats).items()} == {
        "judge/with_reference": pytest.approx(teacher), "judge/without_reference": pytest.approx(student),
        "judge/kl": pytest.approx(kl),
    }  # fmt: skip


def test_the_kl_does_not_reach_the_teacher():
    rows, stats, z = pair()
    JudgeDistillation().parts(rows, stats)[2].backward()
    p, q = (torch.tensor(LOGITS[name], dtype=torch.float64).softmax(0) for name in "TS")
    assert not z.grad[0].any() and not z.grad[1, 0].any()
    assert torch.allclose(z.grad[1, 1], q - p, atol=1e-12)


def test_equal_judges_have_no_kl_and_no_gradient_of_it():
    rows, stats, z = pair(LOGITS["T"], LOGITS["T"])
    kl = JudgeDistillation().parts(rows, stats)[2]
    assert float(kl.detach()) == pytest.approx(0.0, abs=1e-15)
    kl.backward()
    assert float(z.grad.abs().max()) < 1e-15


def test_mass_of_zero_is_no_nan():
    """T is (1/2, 1/2, 0), S softmax(1, 1, 0): KL log(.5 / .422319); S is pulled by .15 (S - e_1) + 2 (S - T)."""
    rows, stats, z = pair((1.0, 1.0, float("-inf")), (1.0, 1.0, 0.0))
    loss = JudgeDistillation()(rows, stats)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.693147 + 0.3 * 0.437690 + 2 * 0.168848, abs=2e-6)
    assert z.grad[1, 1].tolist() == pytest.approx([-0.242014, -0.092014, 0.334028], abs=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_narrow_numbers(dtype, tolerance):
    rows, stats, _ = pair(dtype=dtype)
    wide = JudgeDistillation()(*pair()[:2])
    assert float(JudgeDistillation()(rows, stats).detach()) == pytest.approx(float(wide.detach()), rel=tolerance)


def test_without_coefficients_it_is_cross_entropy_and_measures_no_distributions():
    rows, stats, z = pair()
    part = JudgeDistillation(0.0, 0.0)
    assert part.needs == (LogProb(),)
    part(rows, Stats({LogProb(): stats[LogProb()]})).backward()
    assert not z.grad[1].any() and bool(z.grad[0, 0].any())


def test_whole_distributions_exist_at_the_digits_alone():
    """Two rows of three tokens and a vocabulary of 40: numbers and gradients are [2, 40], and the gradient is right."""
    model = Small(40)
    rows = pair()[0]
    wide = rows.padded(1, 3)
    shapes, part = [], JudgeDistillation()

    def loss(own, stats):
        shapes.append(stats[WholeLogProbs()].shape)
        return part(own, stats)

    value, stats = Engine({"policy": model}, max_tokens=1).step([LogProb(), WholeLogProbs()], wide, Stats(), loss)
    assert shapes == [(2, 40)]  # in the step, where a [2, 3, 40] would be the whole
    found = model.table.grad.clone()
    logp = model.table[wide.tokens * 0 + torch.arange(3)].log_softmax(-1)
    known = {LogProb(): logp.gather(-1, wide.tokens[..., None])[..., 0], WholeLogProbs(): logp[wide.masks["distil"]]}
    plain = part(wide, Stats(known))
    (grad,) = torch.autograd.grad(plain, model.table)
    assert torch.allclose(value, plain.detach()) and torch.allclose(found, grad, atol=1e-6) and bool(grad.any())
    both = stats.select(torch.tensor([1, 0]))
    assert torch.equal(both[WholeLogProbs()], stats[WholeLogProbs()].flip(0))


class Small(torch.nn.Module):
    """Logits that depend on the position alone."""

    def __init__(self, vocab: int):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(3, vocab, generator=torch.Generator().manual_seed(1)))
        self.head = Head()

    @property
    def module(self):
        return self

    def hidden(self, rows):
        return self.table[rows.tokens * 0 + torch.arange(rows.tokens.shape[1])]


def test_bad_settings_and_rows():
    for where in ("mask", "last"):
        with pytest.raises(ValueError, match="named mask"):
            WholeLogProbs(where=where)
    for name in ("student", "distil"):
        with pytest.raises(ValueError, match=name):
            JudgeDistillation(**{name: -0.1})
    rows, stats, _ = pair()
    with pytest.raises(MethodError, match="this loss compares pairs"):
        JudgeDistillation()(rows.with_(pairs=None), stats)


# -- rows with two prompts ---------------------------------------------------------------------------------------------


def test_twins():
    encoder = Encoder(build_tiny("abc0123456789", SMALL))
    examples = [Example("abc", {"other": "c"}, 4), Example("ab", {"other": "cab"}, 7)]
    rows, cut = twin_rows(examples, ["7", "31"], "other", encoder, 64, 0, 3)
    texts = [encoder.decode(ids[mask].tolist()) for ids, mask in zip(rows.prompt_ids, rows.prompt_mask, strict=True)]
    assert texts == ["abc", "c", "ab", "cab"] and rows.group.tolist() == [0, 0, 1, 1]
    assert (rows.pairs.chosen.tolist(), rows.pairs.rejected.tolist()) == ([0, 2], [1, 3])
    assert rows.masks["distil"].sum(1).tolist() == [1, 1, 2, 2] and rows.lengths.tolist() == [2, 2, 3, 3]
    assert len(rows.row.unique()) == 4 and not cut.completions
    with pytest.raises(DataError, match="example 4: has no 'missing'"):
        twin_rows(examples, ["7", "31"], "missing", encoder, 64, 0, 3)
    assert twin_column(recipe_named("self_judge")()) == "prompt_without_reference"
    assert twin_column(recipe_named("sft")()) is None
