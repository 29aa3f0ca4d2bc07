"""Transport distances between distributions over the same or different outcomes.

    W1(p, q)      = min over couplings P of <P, C>
    OT_eps(p, q)  = min <P, C> + eps KL(P || p q^T)
    S_eps(p, q)   = OT_eps(p, q) - (OT_eps(p, p) + OT_eps(q, q)) / 2

Both minima are differentiated through their dual potentials: d/dp is the potential f, d/dC the coupling P.

Source: Cuturi, "Sinkhorn Distances", 2013; Feydy et al., "Interpolating between Optimal Transport and MMD using
Sinkhorn Divergences", 2019.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float
from scipy.optimize import linprog
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Transport:
    """A coupling and what it costs.

    Args:
        value: W1 or OT_eps, differentiable in the distributions and in the cost.
        cost: <P, C>, without gradient.
        plan: P; its sums are p and q.
        error: largest deviation of the sums of P from p.
    """

    value: Float[Tensor, "*n"]
    cost: Float[Tensor, "*n"]
    plan: Float[Tensor, "*n V W"]
    error: float


def wasserstein1(
    log_p: Float[Tensor, "*n V"], log_q: Float[Tensor, "*n V"], support: Float[Tensor, "V"] | None = None
) -> Float[Tensor, "*n"]:
    """W1 on a line: sum_k |P(x <= k) - Q(x <= k)| (x_(k+1) - x_k).

    Args:
        log_p, log_q: normalised log-probabilities.
        support: ascending places of the outcomes; 0, 1, 2 ... by default.

    Raises:
        ValueError: a support that is not ascending.
    """
    gap = (log_p.exp() - log_q.exp()).cumsum(-1)[..., :-1].abs()
    if support is None:
        return gap.sum(-1)
    if bool((support.diff() < 0).any()):
        raise ValueError("the support of a distance on a line must be ascending; for other costs, take `transport`")
    return (gap * support.diff()).sum(-1)


def transport(log_p: Float[Tensor, "V"], log_q: Float[Tensor, "W"], cost: Float[Tensor, "V W"]) -> Transport:
    """W1 for any cost, by a linear programme: exact, on the CPU, for supports of some hundred outcomes.

    Where several potentials are optimal, the gradient is one of the subgradients.

    Raises:
        ValueError: a cost of another shape, or one that is not finite.
    """
    p, q = log_p.exp(), log_q.exp()
    v, w = len(p), len(q)
    if tuple(cost.shape) != (v, w) or not bool(cost.isfinite().all()):
        raise ValueError(f"the cost must be finite and of shape [{v}, {w}], not {list(cost.shape)}")
    sums = scipy.sparse.vstack(
        [
            scipy.sparse.kron(scipy.sparse.eye(v), np.ones((1, w))),
            scipy.sparse.kron(np.ones((1, v)), scipy.sparse.eye(w)),
        ]
    )
    mass = torch.cat([p / p.sum(), q / q.sum()]).detach().double().cpu().numpy()
    found = linprog(cost.detach().double().cpu().numpy().ravel(), A_eq=sums.tocsr(), b_eq=mass, method="highs")
    if found.status != 0:
        raise ValueError(f"the transport problem was not solved: {found.message}")
    plan = torch.from_numpy(found.x.reshape(v, w)).to(cost)
    potential = torch.from_numpy(found.eqlin.marginals).to(cost)
    spent = (plan * cost.detach()).sum()
    change = _change(potential[:v] * p) + _change(potential[v:] * q) + _change(plan * cost)
    return Transport(spent + change, spent, plan, float((plan.sum(1) - p.detach()).abs().max()))


def _change(terms: Tensor) -> Tensor:
    """0 with the gradient of the sum."""
    return (terms - terms.detach()).sum()


def sinkhorn(
    log_p: Float[Tensor, "*n V"],
    log_q: Float[Tensor, "*n W"],
    cost: Float[Tensor, "*#n V W"],
    eps: float,
    iterations: int = 2000,
    tolerance: float = 1e-10,
) -> Transport:
    """OT_eps by updates of the potentials in log-space.

        f_i = -eps LSE_j[(g_j - C_ij) / eps + log q_j],   g_j likewise,   P_ij = p_i q_j exp((f_i + g_j - C_ij) / eps)

    The value counts eps KL(P || p q^T); with the entropy, -eps H(P), in its place it would differ by
    eps (H(p) + H(q)). It is not 0 at p = q: for that see `sinkhorn_divergence`. As eps goes to 0 it becomes W1, and as
    eps goes to infinity the cost of independent draws.

    Args:
        log_p, log_q: normalised log-probabilities; -inf is an outcome without mass.
        cost: C, finite.
        eps: strength of the entropy, in units of the cost.
        iterations: at most; small eps needs many, about max C / eps times some tens.
        tolerance: stop when no potential moves by more than this times eps.

    Raises:
        ValueError: eps not positive, or a cost that is not finite.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, not {eps}; for eps = 0 take `transport`")
    if not bool(cost.isfinite().all()):
        raise ValueError("the cost must be finite")
    with torch.no_grad():
        f, g = _potentials(log_p, log_q, cost, eps, iterations, tolerance)
    return _dual(log_p, log_q, cost, f, g, eps)


def sinkhorn_divergence(
    log_p: Float[Tensor, "*n V"],
    log_q: Float[Tensor, "*n V"],
    cost: Float[Tensor, "*#n V V"],
    eps: float,
    iterations: int = 2000,
    tolerance: float = 1e-10,
) -> Float[Tensor, "*n"]:
    """S_eps = OT_eps(p, q) - (OT_eps(p, p) + OT_eps(q, q)) / 2: at least 0, and 0 only at p = q.

    Args:
        log_p, log_q, eps, iterations, tolerance: as for `sinkhorn`.
        cost: symmetric.

    Raises:
        ValueError: as `sinkhorn`, or a cost that is not symmetric.
    """
    if not torch.allclose(cost, cost.transpose(-1, -2)):
        raise ValueError("the debiased divergence needs a symmetric cost")
    options = (eps, iterations, tolerance)
    between = sinkhorn(log_p, log_q, cost, *options).value
    own = sinkhorn(log_p, log_p, cost, *options).value + sinkhorn(log_q, log_q, cost, *options).value
    return between - own / 2


def _potentials(
    log_p: Tensor, log_q: Tensor, cost: Tensor, eps: float, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    scaled = cost / eps
    f, g = torch.zeros_like(log_p), torch.zeros_like(log_q)  # in units of eps
    for _ in range(iterations):
        before = f
        g = -((f + log_p)[..., :, None] - scaled).logsumexp(-2)
        f = -((g + log_q)[..., None, :] - scaled).logsumexp(-1)
        if float((f - before).abs().max()) <= tolerance:
            break
    return eps * f, eps * g


def _dual(log_p: Tensor, log_q: Tensor, cost: Tensor, f: Tensor, g: Tensor, eps: float) -> Transport:
    """The dual objective <p, f> + <q, g> - eps (sum P - 1), stationary in f and g: its gradient is that of OT_eps."""
    plan = (log_p[..., :, None] + log_q[..., None, :] + (f[..., :, None] + g[..., None, :] - cost) / eps).exp()
    p = log_p.exp()
    value = (p * f).sum(-1) + (log_q.exp() * g).sum(-1) - eps * (plan.sum((-1, -2)) - 1)
    plan = plan.detach()
    error = float((plan.sum(-1) - p.detach()).abs().max())
    return Transport(value, (plan * cost.detach()).sum((-1, -2)), plan, error)
