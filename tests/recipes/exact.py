"""Exact gradients of a recipe on enumerated rows, and steps along them."""

from functools import partial

import torch
from torch import Tensor

from keel.core.rows import Rows, Stop
from keel.exact.space import SequenceSpace, TabularPolicy
from keel.method import Method
from keel.statistics.engine import Engine
from keel.statistics.stats import Stats

# Five outcomes with closed forms everywhere: the reference, a policy, the rewards.
FIVE = SequenceSpace(5, 1)
REF = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
POLICY = torch.tensor([0.10, 0.30, 0.15, 0.25, 0.20], dtype=torch.float64)
REWARD = torch.tensor([0.0, 1.0, 0.5, 2.0, 1.5], dtype=torch.float64)


def outcomes(probs) -> TabularPolicy:
    """A policy over the five outcomes."""
    return TabularPolicy(FIVE, torch.as_tensor(probs, dtype=torch.float64).log()[None, None])


def probabilities(policy: TabularPolicy) -> Tensor:
    """Of every sequence of its world."""
    return policy.log_prob(policy.space.rows()).exp().detach()


def prepared(method: Method, rows: Rows, models: dict[str, TabularPolicy]) -> tuple[Rows, Stats]:
    """Rows with advantages, and the frozen statistics; `models["old"]` has sampled."""
    frozen = Engine({**models, "policy": models["old"]}).measure(
        method.frozen_needs(several_updates=True), rows, alias={"old": "policy"}
    )
    return method.prepare(rows, frozen, method.initial_states()), frozen


def gradient(
    method: Method, policy: TabularPolicy, ref: TabularPolicy, reward: Tensor, old: TabularPolicy | None = None
) -> Tensor:
    """Of the recipe's loss at `policy`, over all completions of `old` (the policy itself by default)."""
    sampler = policy if old is None else old
    models = {"policy": policy, "old": sampler, "ref": ref}
    rows = sampler.weighted(policy.space.rows()).with_(reward=reward[:, None])
    rows, frozen = prepared(method, rows, models)
    policy.table.grad = None
    step = partial(_loss, method)
    Engine(models).step(method.live_needs(), rows, frozen, step)
    assert policy.table.grad is not None
    return policy.table.grad.clone()


def _loss(method: Method, rows: Rows, stats: Stats) -> Tensor:
    return method.loss(rows, stats, method.initial_states())


def next_round(method: Method, policy: TabularPolicy, ref: TabularPolicy, reward: Tensor) -> Tensor:
    """What a round of maximum likelihood would fit to, over single tokens: the gradient of a logit is p - p_next."""
    return probabilities(policy) - gradient(method, policy, ref, reward).flatten()


def climb(method: Method, policy: TabularPolicy, ref: TabularPolicy, reward: Tensor, rate: float, steps: int) -> None:
    """Natural gradient steps: each logit's gradient over the probability of reaching it."""
    rows = policy.space.rows()
    before = policy.space.prefix_index(rows.tokens)
    for _ in range(steps):
        reached = torch.zeros_like(policy.table)
        share = (probabilities(policy)[:, None] * rows.mask).flatten()
        reached[0].index_put_((before.flatten(), rows.tokens.flatten()), share, accumulate=True)
        grad = gradient(method, policy, ref, reward)
        with torch.no_grad():
            policy.table.sub_(rate * torch.where(reached > 0, grad / reached, 0.0))


def groups(draws: Tensor, reward: Tensor) -> Rows:
    """Groups of sampled outcomes, shape [N, G]; every row has an identity of its own."""
    count, size = draws.shape
    tokens = draws.reshape(-1, 1)
    known = torch.ones_like(tokens, dtype=torch.bool)
    return Rows.build(
        torch.zeros_like(tokens),
        known,
        tokens,
        known,
        group=torch.arange(count).repeat_interleave(size),
        weight=torch.ones(len(tokens), dtype=torch.float64),
        stop=torch.full((len(tokens),), int(Stop.EOS)),
        reward=reward[tokens],
    )
