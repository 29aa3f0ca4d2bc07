"""A user's loss: correct ones hold, and each planted mistake is told from the others."""

import io
import json
import re
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from keel.cli.verify_loss import print_loss
from keel.core.errors import UserError
from keel.verify.losses import LossReport, verify_loss

BETA = 0.3


def total(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1)


# -- losses that are what they are meant to be ------------------------------------------------------------------------


def k2_of_sequences(log_prob, ref_log_prob, advantages, mask, beta=BETA):
    log_u = total(log_prob - ref_log_prob, mask)
    return (beta * log_u.square() / 2 - advantages * total(log_prob, mask)).mean()


def k1_in_reward(logp, old_logp, ref_logp, rewards, completion_mask, beta=BETA):
    returns = rewards - beta * total(old_logp - ref_logp, completion_mask)
    others = (returns.sum() - returns) / (len(returns) - 1)
    return -((returns - others) * total(logp, completion_mask)).mean()


def k3_times_ratio(log_prob, old_log_prob, ref_log_prob, advantages, mask, beta=BETA):
    ratio = (log_prob - old_log_prob).exp()
    log_u = ref_log_prob - log_prob
    return total(ratio * (beta * (log_u.exp() - log_u - 1) - advantages[:, None]), mask).mean()


def full_vocabulary(logits, ref_logits, tokens, advantages, mask, beta=BETA):
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    chosen = log_p.gather(-1, tokens[..., None])[..., 0]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return total(beta * kl - advantages[:, None] * chosen, mask).mean(), {"kl": kl}


# -- losses with a mistake --------------------------------------------------------------------------------------------


def k3_in_loss(log_prob, ref_log_prob, advantages, mask, beta=BETA):
    log_u = ref_log_prob - log_prob
    return total(beta * (log_u.exp() - log_u - 1) - advantages[:, None] * log_prob, mask).mean()


def k1_in_loss(log_prob, ref_log_prob, advantages, mask, beta=BETA):
    return total(beta * (log_prob - ref_log_prob) - advantages[:, None] * log_prob, mask).mean()


def wrong_sign(log_prob, ref_log_prob, advantages, mask, beta=BETA):
    return -k2_of_sequences(log_prob, ref_log_prob, advantages, mask, beta)


def wrong_sign_of_divergence(log_prob, ref_log_prob, advantages, mask, beta=BETA):
    return k2_of_sequences(log_prob, ref_log_prob, advantages, mask, -beta)


def half_the_coefficient(log_prob, ref_log_prob, advantages, mask, beta=BETA):
    return k2_of_sequences(log_prob, ref_log_prob, advantages, mask, beta / 2)


def shifted_mask(log_prob, ref_log_prob, advantages, mask, beta=BETA):
    return k2_of_sequences(log_prob, ref_log_prob, advantages, mask.roll(1, 1), beta)


def no_mask(log_prob, ref_log_prob, advantages, beta=BETA):
    return k2_of_sequences(log_prob, ref_log_prob, advantages, torch.ones_like(log_prob), beta)


def first_token_left_out(log_prob, ref_log_prob, advantages, mask, beta=BETA):
    return k2_of_sequences(log_prob[:, 1:], ref_log_prob[:, 1:], advantages, mask[:, 1:], beta)


def mean_of_each_sequence(log_prob, old_log_prob, advantages, mask):
    ratio = (log_prob - old_log_prob).exp()
    return -(total(ratio * advantages[:, None], mask) / mask.sum(1)).mean()


def missing_detach(log_prob, ref_log_prob, rewards, mask, beta=BETA):
    returns = rewards - beta * total(log_prob - ref_log_prob, mask)
    return -((returns - returns.mean()) * total(log_prob, mask)).mean()


def order_of_rows(log_prob, advantages, mask):
    place = torch.arange(len(log_prob), dtype=log_prob.dtype)
    return -(place * advantages * total(log_prob, mask)).mean()


def constant_denominator(log_prob, old_log_prob, advantages, mask, max_length):
    return -((log_prob - old_log_prob).exp() * advantages[:, None] * mask).sum() / (len(mask) * max_length)


HOLDS = [
    (k2_of_sequences, "sequence"),
    (k1_in_reward, "sequence"),
    (k3_times_ratio, "state"),
    (full_vocabulary, "state"),
]


@pytest.mark.parametrize(("loss", "level"), HOLDS)
def test_a_correct_loss_holds(loss, level) -> None:
    report = verify_loss(loss, objective="kl_policy_ref", level=level, seeds=(0, 1))
    where = "sequences" if level == "sequence" else "states held"
    assert report.status == "holds" and report.gradient_relative_error is not None
    assert report.gradient_relative_error < 1e-9 and report.cosine == pytest.approx(1, abs=1e-9)
    assert report.follows == report.objective == f"E[r] - {BETA:g} kl_policy_ref, {where}"
    assert report.beta == pytest.approx(BETA, rel=1e-9) and report.findings == ()
    assert (report.field_asymmetry < 1e-6) == (level == "sequence")


@pytest.mark.parametrize(("loss", "level"), HOLDS)
def test_it_does_not_hold_at_the_other_level(loss, level) -> None:
    other = "state" if level == "sequence" else "sequence"
    report = verify_loss(loss, objective="reverse_kl", level=other, seeds=(0,))
    assert report.status == "falls short" and report.gradient_relative_error is not None
    assert report.gradient_relative_error > 0.01


@cache
def of_sequences(loss) -> LossReport:
    return verify_loss(loss, objective="kl_policy_ref", level="sequence", beta=BETA, seeds=(0,))


@pytest.mark.parametrize(
    ("loss", "follows"),
    [
        (k3_in_loss, "E[r] - 0.3 kl_ref_policy, states held"),
        (k1_in_loss, "E[r]"),
        (wrong_sign, "the opposite of E[r] - 0.3 kl_policy_ref, sequences"),
        (wrong_sign_of_divergence, "E[r] + 0.3 kl_policy_ref, sequences"),
        (half_the_coefficient, "E[r] - 0.15 kl_policy_ref, sequences"),
    ],
)
def test_another_objective_is_named(loss, follows: str) -> None:
    report = of_sequences(loss)
    assert report.status == "falls short" and report.follows == follows and report.residual < 1e-9


@pytest.mark.parametrize(
    ("loss", "finding"),
    [
        (wrong_sign, "the sign is wrong"),
        (wrong_sign_of_divergence, "its coefficient is -0.3"),
        (half_the_coefficient, "its coefficient is 0.15"),
        (shifted_mask, "the mask is ignored or shifted"),
        (no_mask, "the mask is ignored or shifted"),
        (first_token_left_out, "never reaches token 1"),
        (order_of_rows, "change places"),
    ],
)
def test_a_mistake_is_named(loss, finding: str) -> None:
    findings = of_sequences(loss).findings
    assert sum(finding in text for text in findings) >= 1, findings


def test_only_those_mistakes_are_named() -> None:
    assert not any(
        "mask" in text for loss in (wrong_sign, first_token_left_out) for text in of_sequences(loss).findings
    )
    assert of_sequences(missing_detach).findings == ()


@pytest.mark.parametrize("loss", [shifted_mask, no_mask, first_token_left_out, missing_detach])
def test_what_is_no_objective_misses(loss) -> None:
    report = of_sequences(loss)
    assert report.status == "falls short" and report.residual > 0.01 and "nearest" in report.follows


def test_a_mean_of_each_sequence_holds_where_lengths_are_equal() -> None:
    report = verify_loss(mean_of_each_sequence, objective="reward", seeds=(0,))
    far = [row for row in report.rows if row.on_policy and row.distance == "far"]
    errors = {row.lengths: row.gradient_relative_error for row in far}
    assert report.status == "falls short" and errors["equal lengths"] < 1e-9 < 0.01 < errors["lengths 1 to 3"]
    assert any("short and long ones get different weights" in text for text in report.findings)


def test_a_constant_denominator_holds_and_shows_as_the_scale() -> None:
    report = verify_loss(constant_denominator, objective="reward", seeds=(0,))
    assert report.status == "holds" and report.follows == "E[r]"
    scale = {row.lengths: row.scale for row in report.rows if row.on_policy}
    assert scale == pytest.approx({"equal lengths": 1 / 2, "lengths 1 to 3": 1 / 3}, rel=1e-9)
    assert report.follows_off_policy == "token-ratio surrogate of E[r]"


def test_the_group_mean_shrinks_the_reward_only() -> None:
    report = verify_loss(k3_in_loss, baseline="group", seeds=(0,))
    assert report.status == "no objective" and report.objective is None and report.gradient_relative_error is None
    assert report.beta == pytest.approx(BETA * 4 / 3, rel=1e-9)  # the group's mean contains the sample itself
    assert report.follows == "E[r] - 0.4 kl_ref_policy, states held"


# -- how a function is called -----------------------------------------------------------------------------------------


def test_advantages_come_as_the_function_takes_them() -> None:
    def by_token(log_prob, advantages, mask):
        return -((log_prob * advantages) * mask).sum(1).mean()

    def by_annotation(log_prob, advantages: Float[Tensor, "B T"], mask):
        return -(log_prob * advantages[:, 0:1] * mask).sum(1).mean()

    def by_row(log_prob, advantages, mask):
        return -(log_prob * advantages.unsqueeze(1) * mask).sum(1).mean()

    for loss in (by_token, by_annotation, by_row):
        assert verify_loss(loss, objective="reward", seeds=(0,)).status == "holds"


def test_masks_come_as_the_function_takes_them() -> None:
    def boolean(log_prob, advantages, mask):
        return -torch.where(mask, log_prob * advantages[:, None], 0.0).sum(1).mean()

    def number(log_prob, advantages, mask):
        return -(log_prob * advantages[:, None] * (1 - (1 - mask))).sum(1).mean()

    for loss in (boolean, number):
        assert verify_loss(loss, objective="reward", seeds=(0,)).status == "holds"


def test_single_precision_where_double_is_refused() -> None:
    def single(log_prob, advantages, mask):
        weight = torch.ones(log_prob.shape[1], 1)  # float32
        return -((log_prob * advantages[:, None] * mask) @ weight).mean()

    report = verify_loss(single, objective="reward", seeds=(0,))
    assert report.precision == "float32" and report.status == "holds"


def test_beta_is_handed_over() -> None:
    report = verify_loss(k2_of_sequences, objective="kl_policy_ref", beta=0.7, seeds=(0,))
    assert report.status == "holds" and report.beta == pytest.approx(0.7)
    assert report.arguments["advantages"] == "advantage" and report.arguments["ref_log_prob"] == "ref_log_prob"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logp, advantage, maks: logp.sum(), "unknown argument 'maks'. Did you mean 'mask'?"),
        (lambda advantages, mask: advantages.sum(), "cannot depend on the policy"),
        (lambda log_prob, mask: log_prob.detach().sum(), "no gradient"),
        (lambda log_prob, mask: (log_prob / 0).sum(), "returned"),
        (lambda log_prob, mask: log_prob.sum(1), "shape (4,)"),
        (lambda log_prob, mask: 3.0, "returned float"),
        (lambda log_prob, beta: log_prob.sum() * beta, "State the coefficient"),
        (lambda log_prob: log_prob[:, 7].sum(), "test_losses.py:"),
        (lambda log_prob: (log_prob * torch.rand(())).sum(), "random"),
    ],
)
def test_what_cannot_be_verified_is_said(loss, message: str) -> None:
    with pytest.raises(UserError) as caught:
        verify_loss(loss)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "beta", "message"), [("kl_polcy_ref", 0.1, "Did you mean"), ("js", None, "Add --beta")]
)
def test_a_wrong_objective_is_said(objective: str, beta: float | None, message: str) -> None:
    def loss(log_prob, advantages, mask):
        return -(log_prob * advantages[:, None] * mask).sum()

    with pytest.raises(UserError) as caught:
        verify_loss(loss, objective=objective, beta=beta)
    assert message in str(caught.value)


MINE = """
import torch
from beside import BETA

def loss(log_prob, ref_log_prob, advantages, mask, beta=BETA):
    log_u = ((log_prob - ref_log_prob) * mask).sum(1)
    return (beta * log_u.square() / 2 - advantages * (log_prob * mask).sum(1)).mean()

def broken(log_prob):
    return log_prob.no_such_method()
"""


def test_a_function_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("BETA = 0.25\n")
    (tmp_path / "mine.py").write_text(MINE)
    report = verify_loss(f"{tmp_path}/mine.py:loss", objective="kl_policy_ref", seeds=(0,))
    assert report.status == "holds" and report.objective == "E[r] - 0.25 kl_policy_ref, sequences"
    with pytest.raises(UserError, match=r"mine.py:10: AttributeError"):
        verify_loss(f"{tmp_path}/mine.py:broken")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("def loss(:\n", "loss", r"bad.py:1: "),
        ("x = 1\nimport no_such_module\n", "loss", r"bad.py:2: importing it failed: ModuleNotFoundError"),
        ("def loss(log_prob): ...\n", "los", "there is no 'los'. Did you mean 'loss'?"),
        ("loss = 3\n", "loss", "is no function"),
    ],
)
def test_a_bad_file_is_said_with_its_line(tmp_path: Path, text: str, name: str, message: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError) as caught:
        verify_loss(f"{tmp_path}/bad.py:{name}")
    assert message in str(caught.value)


@pytest.mark.parametrize("what", ["nowhere.py:loss", "my_loss.py", "no.such.module:loss", ":loss"])
def test_a_name_without_a_function_is_said(what: str) -> None:
    with pytest.raises(UserError):
        verify_loss(what)


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_the_report_is_printed_for_people_and_for_programs() -> None:
    report = of_sequences(k3_in_loss)
    shown, data = io.StringIO(), io.StringIO()
    with redirect_stdout(shown):
        print_loss(report)
    assert "falls short" in shown.getvalue() and "E[r] - 0.3 kl_ref_policy, states held" in shown.getvalue()
    with redirect_stdout(data):
        print_loss(report, as_json=True)
    parsed = json.loads(data.getvalue())
    assert parsed == report.to_dict() | {"rows": parsed["rows"]} and len(parsed["rows"]) == 8
    assert {"name", "objective", "gradient_relative_error", "cosine", "follows", "status"} <= parsed.keys()


def test_the_page_shows_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "verify_your_loss.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(import torch.*?)```", page, re.DOTALL)
    printed = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert len(examples) == len(printed) == 2
    monkeypatch.chdir(tmp_path)
    for code, wanted in zip(examples, printed, strict=True):
        (tmp_path / "my_loss.py").write_text(code)
        shown = io.StringIO()
        with redirect_stdout(shown):
            print_loss(verify_loss("my_loss.py:loss", objective="kl_policy_ref", beta=0.1))
        assert [line.rstrip() for line in shown.getvalue().splitlines()] == wanted.splitlines()
