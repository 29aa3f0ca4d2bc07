"""A discriminator finds the log-ratio of two occupancies, and the reward made of it has the right policy gradient."""

import pytest
import torch

from keel.core.errors import DataError
from keel.exact.mdp import TabularMDP
from keel.models.density_ratio import discriminator_loss, fit_density_ratio
from keel.parts.rewards.occupancy import slope


def world() -> tuple[TabularMDP, torch.Tensor, torch.Tensor]:
    """Four states, two actions, policy and reference."""
    chance = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.rand(shape, generator=chance, dtype=torch.float64) + 0.1  # noqa: E731
    move, start = draw(4, 2, 4), draw(4)
    mdp = TabularMDP(move / move.sum(-1, keepdim=True), torch.zeros(4, 2).double(), start / start.sum(), 0.9)
    logits, ref = draw(4, 2) * 2, draw(4, 2)
    return mdp, logits, ref / ref.sum(-1, keepdim=True)


def test_its_optimum_is_the_log_ratio():
    """Of the occupancies, by minimising the loss over a table of d."""
    mdp, logits, ref = world()
    mu, mu_ref = (mdp.occupancy(p).flatten() for p in (logits.softmax(-1), ref))
    d = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([d], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure():
        optimiser.zero_grad()
        loss = discriminator_loss(d, d, mu, mu_ref)
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(d.detach(), (mu / mu_ref).log(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "power"), [("kl", 1.0), ("chi2", 1.0), ("sqrt_chi2", 0.5)])
def test_the_reward_is_the_gradient_of_the_divergence_of_occupancies(kind, power):
    """Policy gradient of the reward at d, by exact action values, against autograd through the occupancy."""
    mdp, logits, ref = world()
    logits.requires_grad_()
    mu, mu_ref = mdp.occupancy(logits.softmax(-1)), mdp.occupancy(ref)
    chi2 = ((mu / mu_ref).log() * mu).sum() if kind == "kl" else ((mu - mu_ref).square() / mu_ref).sum()
    (wanted,) = torch.autograd.grad(chi2**power, logits)
    d = (mu / mu_ref).log().detach()
    reward = slope(d.flatten(), mu.detach().flatten(), kind, 0.0).reshape(4, 2)
    share = mdp.occupancy(logits.softmax(-1))
    (found,) = torch.autograd.grad((share * reward).sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_from_samples():
    """20000 visits of either side; the head's numbers are near the log-ratio where both go often."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    chance = torch.Generator().manual_seed(0)
    visits = [torch.multinomial(law, n, True, generator=chance) for law, n in ((p, 20000), (q, 10000))]
    features = [torch.eye(3)[seen] for seen in visits]
    head = fit_density_ratio(*features, width=16, epochs=8, learning_rate=2e-2)
    found = head(torch.eye(3))[:, 0].detach()
    assert found.tolist() == pytest.approx((p / q).log().tolist(), abs=0.08)
    assert float((p * torch.expm1(found)).sum()) == pytest.approx(0.63, abs=0.1)


def test_what_is_refused():
    with pytest.raises(ValueError, match="visits"):
        fit_density_ratio(torch.zeros(2, 3), torch.zeros(0, 3))
    with pytest.raises(DataError, match="no states"):
        fit_density_ratio(torch.zeros(0, 3), torch.zeros(0, 3))
