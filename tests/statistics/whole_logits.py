"""The oracle of the engine: whole logits, plain formulas, autograd; every functional, and a loss that couples them."""

import math

import torch
from tests.worlds import Network, noise, text_rows
from torch import Tensor, nn

from keel.core.rows import Rows
from keel.models.heads import Critic
from keel.statistics.functionals import Divergence, Entropy, LogProb, TopK, TopPEntropy
from keel.statistics.transforms import Chain, KeepMinP, KeepTopK, KeepTopP, Power, Temperature

ROWS = text_rows()
WEIRD = Chain((Temperature(0.7), KeepTopP(0.8), Power(1.5)))


def logits(model: Network, rows: Rows, temperature: float) -> Tensor:
    z = model.output(model.hidden(rows)) * model.head.scale
    z = z if model.head.softcap is None else model.head.softcap * torch.tanh(z / model.head.softcap)
    return z / temperature


def nucleus(z: Tensor, p: float) -> Tensor:
    ordered, order = z.softmax(-1).sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    keep = torch.zeros_like(z, dtype=torch.bool).scatter(-1, order, before < p)
    return z.masked_fill(~keep, -math.inf)


def weird(z: Tensor) -> Tensor:
    return nucleus(z / 0.7, 0.8) * 1.5


def log_prob(z: Tensor, rows: Rows) -> Tensor:
    return z.log_softmax(-1).gather(-1, rows.tokens[..., None])[..., 0]


def entropy(z: Tensor) -> Tensor:
    p = z.softmax(-1)
    return -(p * torch.where(p > 0, p, 1.0).log()).sum(-1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)


def js(a: Tensor, b: Tensor) -> Tensor:
    m = ((a.softmax(-1) + b.softmax(-1)) / 2).log()
    return (kl(a, m) + kl(b, m)) / 2


def last(x: Tensor, rows: Rows) -> Tensor:
    place = torch.where(rows.mask, torch.arange(x.shape[1]), -1).amax(1)
    return x[torch.arange(len(x)), place]


FUNCTIONALS: dict = {
    LogProb(): lambda z, q, rows: log_prob(z, rows),
    LogProb(transform=Temperature(0.7)): lambda z, q, rows: log_prob(z / 0.7, rows),
    LogProb(transform=WEIRD): lambda z, q, rows: log_prob(weird(z), rows),
    LogProb(transform=KeepTopK(7)): lambda z, q, rows: log_prob(
        z.masked_fill(z < z.topk(7, -1).values[..., -1:], -math.inf), rows
    ),
    Entropy(): lambda z, q, rows: entropy(z),
    Entropy(transform=WEIRD): lambda z, q, rows: entropy(weird(z)),
    Entropy(transform=KeepMinP(0.2)): lambda z, q, rows: entropy(
        z.masked_fill(z.softmax(-1) < 0.2 * z.softmax(-1).amax(-1, keepdim=True), -math.inf)
    ),
    TopPEntropy(0.6): lambda z, q, rows: entropy(nucleus(z, 0.6)),
    Divergence("kl_policy_ref"): lambda z, q, rows: kl(z, q),
    Divergence("kl_ref_policy"): lambda z, q, rows: kl(q, z),
    Divergence("js"): lambda z, q, rows: js(z, q),
    TopK(3): lambda z, q, rows: z.log_softmax(-1).sort(-1, descending=True).values[..., :3],
    TopK(3, under="ref"): lambda z, q, rows: z.log_softmax(-1).gather(-1, q.sort(-1, descending=True).indices[..., :3]),
    LogProb(where="last"): lambda z, q, rows: last(log_prob(z, rows), rows),
    TopK(2, where="last"): lambda z, q, rows: last(z.log_softmax(-1).sort(-1, descending=True).values[..., :2], rows),
    Divergence("js", where="last"): lambda z, q, rows: last(js(z, q), rows),
    LogProb(where="nll"): lambda z, q, rows: log_prob(z, rows)[rows.masks["nll"]],
    TopK(2, where="nll"): lambda z, q, rows: (
        z.log_softmax(-1).sort(-1, descending=True).values[..., :2][rows.masks["nll"]]
    ),
    Entropy(where="nll"): lambda z, q, rows: entropy(z)[rows.masks["nll"]],
}


def masked(value: Tensor, functional, rows: Rows) -> Tensor:
    if functional.where != "mask":
        return value
    shown = rows.mask.reshape(*rows.mask.shape, *(1,) * (value.dim() - 2))
    return torch.where(shown, value, torch.zeros_like(value))


def mixture(values: list[Tensor]) -> Tensor:
    """A loss that couples everything with everything."""
    total = torch.zeros((), dtype=torch.float64)
    for i, value in enumerate(values):
        finite = torch.where(value > -math.inf, value, torch.zeros_like(value))
        weight = noise("mixture", i, shape=tuple(value.shape))
        total = total + (weight * torch.sin(finite + i)).sum() + 0.01 * finite.sum() ** 2
    return total * torch.tanh(total)


def by_autograd(functionals, policy, ref, rows, temperature) -> tuple[Tensor, list[Tensor]]:
    policy.zero_grad()
    z = logits(policy, rows, temperature)
    with torch.no_grad():
        q = logits(ref, rows, temperature)
    values = [masked(FUNCTIONALS[f](z, q, rows), f, rows) for f in functionals]
    loss = mixture(values)
    loss.backward()
    return loss.detach(), values


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    return found


def assert_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for name, grad in wanted.items():
        torch.testing.assert_close(
            found[name], grad, rtol=tolerance, atol=tolerance * max(1.0, float(grad.abs().max()))
        )


def critic_of(policy: Network, kind: str) -> nn.Module:
    critic = Critic(kind).build(policy, 0).double()
    with torch.no_grad():
        for i, parameter in enumerate(critic.parameters()):
            parameter += 0.5 * noise("critic", i, shape=tuple(parameter.shape))
    return critic
