"""The losses of TRL and verl, where they are installed, on worlds whose answers are known."""

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from keel.verify.batches import Situation, everything, situations
from keel.verify.identify import Identified, Identifier
from keel.verify.peers import Option, table, text
from keel.verify.peers.__main__ import main

BETA = 0.5
ON = situations((0,), on_policy=True)
OFF = situations((0,), on_policy=False)


@pytest.fixture(scope="module", autouse=True)
def no_accelerator_is_left() -> Iterator[None]:
    """TRL's trainers fix the device of the whole process."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@cache
def identifier(where: tuple[Situation, ...]) -> Identifier:
    return Identifier(where, on_policy=where[0].on_policy)


def followed(loss, where: tuple[Situation, ...] = ON) -> Identified:
    from keel.verify.batches import expected_gradient

    here = identifier(where)
    return here.identify({s: expected_gradient(loss, here.worlds[s]) for s in where})


# -- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "follows"),
    [
        ({"use_bias_correction_kl": True}, "E[r] - 0.5 kl_policy_ref, states held"),
        ({"use_bias_correction_kl": False}, "E[r] - 0.5 kl_ref_policy, states held"),
    ],
)
def test_trl_grpo_on_policy(settings: dict, follows: str) -> None:
    pytest.importorskip("trl")
    from keel.verify.peers.trl import grpo_loss

    found = followed(grpo_loss(beta=BETA, loss_type="dr_grpo", **settings))
    assert found.exact and found.follows == follows
    assert found.scale == pytest.approx((1 / 2, 1 / 3), rel=1e-6)  # it divides by the longest length


def test_trl_grpo_off_policy_follows_the_surrogate() -> None:
    pytest.importorskip("trl")
    from keel.verify.peers.trl import grpo_loss

    found = followed(grpo_loss(beta=BETA, loss_type="dr_grpo"), OFF)
    assert found.exact and found.follows == "token-ratio surrogate of E[r] - 0.5 kl_policy_ref, states held"


def test_trl_rloo_has_the_divergence_of_sequences() -> None:
    pytest.importorskip("trl")
    from keel.verify.peers.trl import rloo_loss

    found = followed(rloo_loss(beta=BETA))
    assert found.exact and found.follows == "E[r] - 0.5 kl_policy_ref, sequences"
    assert found.scale == pytest.approx((1.0, 1.0), rel=1e-6)


def test_trl_computes_its_own_advantages() -> None:
    """A group mean that includes the sample: the reward shrinks by 3/4, the divergence does not."""
    pytest.importorskip("trl")
    from keel.verify.peers.trl import grpo_loss

    whole = grpo_loss(beta=BETA, whole=True, epsilon=None, scale_rewards="none", loss_type="dr_grpo")
    found = followed(whole)
    assert found.exact and found.beta == pytest.approx(BETA * 4 / 3, rel=1e-6)
    assert found.scale == pytest.approx((0.75 / 2, 0.75 / 3), rel=1e-6)


def test_trl_s_loss_by_hand() -> None:
    """dr_grpo off-policy, one group: -sum(rho A) / (B T), and the k3 that is multiplied by rho."""
    pytest.importorskip("trl")
    from keel.verify.peers.trl import grpo_loss

    world = OFF[-1].world()
    batch = everything(world, world.policy.clone().requires_grad_())
    rho = (batch.log_prob - batch.old_log_prob).exp()
    log_u = batch.ref_log_prob - batch.log_prob
    each = rho * (BETA * (log_u.exp() - log_u - 1) - batch.advantage[:, None])
    by_hand = (each * batch.mask).sum() / batch.mask.numel()
    torch.testing.assert_close(grpo_loss(beta=BETA, loss_type="dr_grpo")(batch), by_hand, atol=1e-12, rtol=0)


# -- verl -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "follows"),
    [
        ({"kl_in_loss": "kl"}, "E[r]"),
        ({"kl_in_loss": "abs"}, "E[r] - 1 tv, states held"),
        ({"kl_in_loss": "mse"}, "E[r] - 0.5 kl_policy_ref, states held"),
        ({"kl_in_loss": "low_var_kl"}, "E[r] - 0.5 kl_ref_policy, states held"),
        ({"kl_in_loss": "k3+"}, "E[r] - 0.5 kl_policy_ref, states held"),
        ({"kl_in_loss": "abs+"}, "E[r] - 0.5 kl_policy_ref, states held"),
        ({"kl_in_reward": "kl"}, "E[r] - 0.5 kl_policy_ref, sequences"),
        ({"kl_in_reward": "k3"}, "E[r] - 0.5 (kl_policy_ref, sequences - kl_ref_policy, states held)"),
    ],
)
def test_verl_on_policy(settings: dict, follows: str) -> None:
    pytest.importorskip("verl")
    from keel.verify.peers.verl import loss

    found = followed(loss(beta=BETA, **settings))
    assert found.exact and found.follows == follows and found.scale == pytest.approx((1.0, 1.0), rel=1e-6)


def test_verl_s_k1_rewards_distance_from_the_sampler_off_policy() -> None:
    pytest.importorskip("verl")
    from keel.verify.peers.verl import loss

    found = followed(loss(beta=BETA, kl_in_loss="k1"), OFF)
    assert found.exact and found.follows == "token-ratio surrogate of E[r] + 0.5 kl_old_policy, states held"


def test_verl_s_full_estimator_is_not_there() -> None:
    pytest.importorskip("verl")
    from keel.verify.peers.verl import loss

    with pytest.raises(NotImplementedError):
        followed(loss(beta=BETA, kl_in_loss="full"))


def test_verl_s_loss_by_hand() -> None:
    """Off-policy, one group, sequences of different lengths: -sum(rho A) / B + beta k2 / B."""
    pytest.importorskip("verl")
    from keel.verify.peers.verl import loss

    world = OFF[-1].world()
    batch = everything(world, world.policy.clone().requires_grad_())
    rho = (batch.log_prob - batch.old_log_prob).exp()
    each = BETA * (batch.log_prob - batch.ref_log_prob).square() / 2 - rho * batch.advantage[:, None]
    by_hand = (each * batch.mask).sum() / len(batch.mask)
    torch.testing.assert_close(loss(beta=BETA, kl_in_loss="k2")(batch), by_hand, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("aggregation", "equal", "ended"),
    [
        ("seq-mean-token-sum", True, True),
        ("token-sum", True, True),
        ("token-mean", True, False),
        ("seq-mean-token-mean", True, False),
    ],
)
def test_denominators_matter_where_lengths_differ(aggregation: str, equal: bool, ended: bool) -> None:
    pytest.importorskip("verl")
    from keel.verify.peers.verl import loss

    option, worlds = Option("verl", aggregation, loss(aggregation=aggregation)), table.Worlds(True)
    found = worlds.gradients(option)
    for lengths, exact in (("equal lengths", equal), ("lengths 1 to 3", ended)):
        assert (max(worlds.errors(found, table.REWARD, lengths=lengths)) < 1e-6) == exact


# -- the page ---------------------------------------------------------------------------------------------------------


def test_settings_with_the_same_numbers_share_a_line() -> None:
    options = [
        Option("lib", "`a`", lambda batch: batch.reward.sum(), "family"),
        Option("lib", "`b`", lambda batch: batch.reward.sum(), "family"),
        Option("lib", "`c`", lambda batch: batch.reward.sum() + 1, "family"),
        Option("lib", "`d`", lambda batch: batch.reward.sum()),
        Option("lib", "`e`", lambda batch: batch.reward.sum()),
    ]
    world = ON[0].world()
    batch = everything(world, world.policy.clone())

    def measure(option: Option) -> tuple[str, ...]:
        return (f"{float(option.loss(batch) - batch.reward.sum()):g}",)

    names = [line.name for line in table.lines(options, measure, 1)]
    assert names == ["lib, family: `a`, `b`", "lib, family: `c`", "lib: `d`", "lib: `e`"]


def test_what_is_not_implemented_has_no_numbers() -> None:
    def measure(option: Option) -> tuple[str, ...]:
        raise NotImplementedError

    (line,) = table.lines([Option("lib", "`a`", lambda batch: batch.reward.sum())], measure, 3)
    assert line.markdown() == "| lib: `a` | - | - | raises NotImplementedError |"


@pytest.mark.parametrize(
    ("error", "shown"), [(3e-9, "0"), (0.00193, "0.19%"), (0.0353, "3.5%"), (0.1315, "13%"), (0.9998, "100%")]
)
def test_errors_are_shown_in_percent(error: float, shown: str) -> None:
    assert table.percent(error) == shown


def test_a_page_without_a_folder_is_said(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "nowhere" / "page.md")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_text_of_the_page_takes_its_numbers() -> None:
    shown = text.BEFORE.format(beta=0.5, on=40, off=90, trl="1", verl="2")
    assert "TRL 1 and verl 2" in shown and "beta = 0.5" in shown


@pytest.mark.slow
def test_the_page_is_the_one_that_is_published() -> None:
    """The numbers of docs/peers.md come from the installed versions, if they are the ones that it names."""
    from importlib.metadata import version
    from pathlib import Path

    pytest.importorskip("trl"), pytest.importorskip("verl")
    published = Path(__file__).parents[2] / "docs" / "peers.md"
    if {name: version(name) for name in table.TESTED} != table.TESTED:
        pytest.skip("other versions")
    assert table.page() == published.read_text(encoding="utf-8")
