"""Divergences between occupancies, and what they promise about a reward that one cannot see.

A proxy reward is correlated with the true one on what the reference does. Optimising it is safe as far as the policy's
occupancy d, not its actions, stays close to the reference's: with R the correlation of the two rewards under d_ref,
their standard deviations under d_ref, and gains in mean reward per step (normalised occupancies),

    gain_true / sd_true  >=  ( gain_proxy / sd_proxy - sqrt((1 - R^2) chi2(d || d_ref)) ) / R

so maximising proxy - sd_proxy sqrt(1 - R^2) sqrt(chi2(d || d_ref)) never loses true reward. A chi-square or a KL over
actions promises nothing of the kind: small changes of actions add up to a different place.

Source: "Correlated Proxies: A New Definition and Improved Mitigation for Reward Hacking", 2024.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keel.divergences.family import FDivergence, f_divergence
from keel.exact.mdp import TabularMDP

NEWTON_STEPS = 200
BISECTIONS = 60
TINY = 1e-300


@dataclass(frozen=True, eq=False)
class OccupancyOptimum:
    """The best occupancy under a divergence to the reference's.

    Args:
        occupancy: d(s, a), normalised.
        policy: d(a | s); the reference's where d(s) is 0.
        reward: mean reward per step, sum d r.
        divergence: D(d || d_ref), before any square root.
        objective: of the problem that was solved.
    """

    occupancy: Float[Tensor, "S A"]
    policy: Float[Tensor, "S A"]
    reward: float
    divergence: float
    objective: float


@dataclass(frozen=True)
class Proxy:
    """A proxy reward seen from the reference's occupancy.

    Args:
        correlation: R of true and proxy reward under d_ref.
        sd_true, sd_proxy: standard deviations under d_ref.
    """

    correlation: float
    sd_true: float
    sd_proxy: float

    @property
    def safe_coefficient(self) -> float:
        """sd_proxy sqrt(1 - R^2), the coefficient of sqrt(chi2) from which on the true reward cannot fall."""
        return self.sd_proxy * math.sqrt(max(0.0, 1 - self.correlation**2))

    def least_true_gain(self, proxy_gain: float, chi2: float) -> float:
        """The lower bound on the gain in true reward per step.

        Raises:
            ValueError: the correlation is not positive, so that nothing is promised.
        """
        if self.correlation <= 0:
            raise ValueError(f"the bound needs a positive correlation, not {self.correlation:g}")
        slack = proxy_gain / self.sd_proxy - math.sqrt((1 - self.correlation**2) * max(chi2, 0.0))
        return self.sd_true * slack / self.correlation


def proxy_of(true: Float[Tensor, "S A"], proxy: Float[Tensor, "S A"], reference: Float[Tensor, "S A"]) -> Proxy:
    """Correlation and standard deviations under an occupancy.

    Args:
        reference: d_ref(s, a), normalised.

    Raises:
        ValueError: one of the rewards is constant under it.
    """
    x, y = (r - (reference * r).sum() for r in (true, proxy))
    sd = [float((reference * z.square()).sum().sqrt()) for z in (x, y)]
    if min(sd) == 0:
        raise ValueError("a reward that is constant under the reference correlates with nothing")
    return Proxy(float((reference * x * y).sum()) / (sd[0] * sd[1]), *sd)


def occupancy_divergence(
    d: Float[Tensor, "S A"], reference: Float[Tensor, "S A"], divergence: FDivergence | str = "chi2_policy_ref"
) -> float:
    """D_f(d || d_ref) over state-action pairs."""
    return float(f_divergence(divergence).value(d.flatten().log(), reference.flatten().log()))


def occupancy_optimum(
    mdp: TabularMDP,
    ref: Float[Tensor, "S A"],
    beta: float,
    divergence: FDivergence | str = "chi2_policy_ref",
) -> OccupancyOptimum:
    """max over policies of  sum_sa d(s, a) r(s, a) - beta D_f(d || d_ref).

    With e_V(s, a) = r + gamma P V - V and f* the conjugate over u >= 0, the dual is convex and without constraints:

        min_V  (1 - gamma) initial . V + beta sum_sa d_ref f*(e_V / beta),    d = d_ref (f')^{-1}(e_V / beta)

    It is solved by Newton's method, from a large coefficient down to beta.

    Args:
        beta: coefficient, in units of reward per step.

    Raises:
        ValueError: beta is not positive, episodes may end (then the mass of d depends on the policy), or Newton's
            method did not converge.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if float((1 - mdp.transition.sum(-1)).abs().max()) > 1e-9 or mdp.gamma == 1:
        raise ValueError("occupancies need a discount and transitions that never end: add an absorbing state")
    f, d_ref, values = f_divergence(divergence), mdp.occupancy(ref), mdp.values(ref)
    now = max(beta, float((mdp.action_values(values) - values[:, None]).abs().max()))
    while True:
        values, d = _newton(mdp, d_ref, values, now, f)
        if now == beta:
            break
        now = max(beta, now / 2)
    seen = d.sum(1, keepdim=True)
    policy = torch.where(seen > TINY, d / seen.clamp(min=TINY), ref)
    d = mdp.occupancy(policy)
    reward, cost = float((d * mdp.reward).sum()), occupancy_divergence(d, d_ref, f)
    return OccupancyOptimum(d, policy, reward, cost, reward - beta * cost)


def root_chi2_optimum(mdp: TabularMDP, ref: Float[Tensor, "S A"], coefficient: float) -> OccupancyOptimum:
    """max over policies of  sum_sa d r - coefficient sqrt(chi2(d || d_ref)).

    sqrt(x) = min over t of x / (2 t) + t / 2, so the optimum is that of chi2 with coefficient / (2 t) at the t with
    t = sqrt(chi2), found by bisection. Above a threshold there is none but t = 0: the reference itself.

    Raises:
        ValueError: as `occupancy_optimum`.
    """
    high = math.sqrt(1 / float(mdp.occupancy(ref).clamp(min=1e-12).min()))
    low = 1e-4 * high

    def at(t: float) -> OccupancyOptimum:
        return occupancy_optimum(mdp, ref, coefficient / (2 * t))

    found = at(low)
    if math.sqrt(found.divergence) <= low * (1 + 1e-6):
        d = mdp.occupancy(ref)
        reward = float((d * mdp.reward).sum())
        return OccupancyOptimum(d, ref, reward, 0.0, reward)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = at(middle)
        low, high = (middle, high) if math.sqrt(found.divergence) > middle else (low, middle)
        if high - low < 1e-10 * high:
            break
    objective = found.reward - coefficient * math.sqrt(found.divergence)
    return OccupancyOptimum(found.occupancy, found.policy, found.reward, found.divergence, objective)


def tempting_world(
    exploit_proxy: float = 2.0, exploit_true: float = -1.0, slip: float = 0.01, stay: float = 0.7
) -> tuple[TabularMDP, Float[Tensor, "S A"], Float[Tensor, "S A"]]:
    """A place to work and, one rare action away, a place where the proxy is high and the true reward is not.

    At work (state 0) the actions are to work, to idle and to slip into the exploit; both rewards are 1 for work and 0
    for the others. In the exploit (state 1) the first action stays and the others leave. The reference works and idles
    equally, slips with probability `slip`, and stays with probability `stay`.

    Returns:
        The MDP with the proxy as its reward, the true reward [2, 3], and the reference policy [2, 3].
    """

    def table(rows: list) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    transition = table([[[1, 0], [1, 0], [0, 1]], [[0, 1], [1, 0], [1, 0]]])
    proxy, true = (table([[1, 0, 0], [value] * 3]) for value in (exploit_proxy, exploit_true))
    ref = table([[0.5, 0.5 - slip, slip], [stay, (1 - stay) / 2, (1 - stay) / 2]])
    return TabularMDP(transition, proxy, table([1, 0]), gamma=0.95), true, ref


def demonstration(
    coefficients: Sequence[float] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0), exploit_proxy: float = 2.0
) -> list[dict]:
    """The optimum of the proxy under each regulariser and coefficient, and what it is truly worth.

    Returns:
        For each: `where` the divergence is taken, its name, `coefficient`, and the gains over the reference in mean
        reward per step, `proxy_gain` and `true_gain`, with `promised`, the lower bound on the latter. The last entry is
        the square root of chi2 at the safe coefficient.
    """
    mdp, true, ref = tempting_world(exploit_proxy)
    reference = mdp.occupancy(ref)
    proxy = proxy_of(true, mdp.reward, reference)

    def entry(where: str, divergence: str, coefficient: float, d: Tensor) -> dict:
        proxy_gain, true_gain = (float(((d - reference) * r).sum()) for r in (mdp.reward, true))
        chi2 = occupancy_divergence(d, reference)
        promised = proxy.least_true_gain(proxy_gain, chi2) if proxy.correlation > 0 else -math.inf
        found = {"where": where, "divergence": divergence, "coefficient": coefficient}
        return {**found, "proxy_gain": proxy_gain, "true_gain": true_gain, "promised": promised}

    found = []
    for name in ("kl_policy_ref", "chi2_policy_ref"):
        for c in coefficients:
            found.append(entry("actions", name, c, mdp.occupancy(mdp.regularised_optimum(ref, c, name).policy)))
    for name in ("kl_policy_ref", "chi2_policy_ref"):
        for c in coefficients:
            found.append(entry("occupancy", name, c, occupancy_optimum(mdp, ref, c, name).occupancy))
    safe = proxy.safe_coefficient
    return [*found, entry("occupancy", "root of chi2", safe, root_chi2_optimum(mdp, ref, safe).occupancy)]


def _newton(mdp: TabularMDP, d_ref: Tensor, values: Tensor, beta: float, f: FDivergence) -> tuple[Tensor, Tensor]:
    """The V that minimises the dual, and the occupancy that belongs to it."""
    n, a = d_ref.shape
    weight, start = d_ref.flatten(), (1 - mdp.gamma) * mdp.initial
    moves = mdp.gamma * mdp.transition.reshape(n * a, n) - torch.eye(n, dtype=weight.dtype).repeat_interleave(a, 0)

    def dual(v: Tensor) -> tuple[float, Tensor]:
        e = (mdp.reward.flatten() + moves @ v) / beta
        conjugate = torch.where(weight > 0, weight * f.conjugate(e), torch.zeros_like(e))
        return float(start @ v + beta * conjugate.sum()), e

    value, e = dual(values)
    if value == math.inf:  # f'(inf) is finite: raising V lowers every e
        values = values + beta * (float(e.max()) - 0.9 * f.f_prime_at_infinity) / (1 - mdp.gamma)
        value, e = dual(values)
    before = math.inf
    for _ in range(NEWTON_STEPS):
        log_u = f.f_prime_inverse(e)
        d = weight * log_u.exp()
        residual = start + moves.T @ d  # what the flow lacks
        error = float(residual.abs().max())
        if error < 1e-14 or (error < 1e-10 and error > before / 2):  # rounding
            break
        before = error
        inside = (log_u > -math.inf) & (weight > 0)
        curved = torch.where(inside, weight / f.f_second(torch.where(inside, log_u, 0.0)), torch.zeros_like(e))
        hessian = moves.T @ (curved[:, None] * moves) / beta
        hessian = hessian + 1e-13 * hessian.diagonal().max() * torch.eye(n, dtype=hessian.dtype)
        step, size = torch.linalg.solve(hessian, residual), 1.0
        decrease = float(residual @ step)
        while size > 1e-18:  # a state none of whose actions has mass yet gives a huge step
            new_value, new_e = dual(values - size * step)
            if new_value <= value - 1e-4 * size * decrease + 1e-15 * abs(value):
                break
            size /= 2
        else:
            break  # no descent left in fp64
        values, value, e = values - size * step, new_value, new_e
    if not error < 1e-8:
        raise ValueError(f"the dual at coefficient {beta:g} did not converge: the flow lacks {error:.1e}")
    return values, d.reshape(n, a)
