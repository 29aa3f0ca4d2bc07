"""The example of the penalties: five outcomes, reference q, policy p, an older policy mu; expectations enumerated."""

import torch

from keel.core.aggregate import Aggregation
from keel.core.rows import Rows
from keel.exact.space import SequenceSpace
from keel.method import Method
from keel.models.sources import Initial
from keel.parts.advantages.group import Returns
from keel.parts.rewards.transforms import KLInReward
from keel.parts.terms.penalties import Summand
from keel.parts.terms.surrogate import LogLikelihood, Surrogate
from keel.rollouts.rollout import Rollout
from keel.statistics.engine import Engine

FIVE = SequenceSpace(5, 1)
P = [0.10, 0.30, 0.15, 0.25, 0.20]
Q = [0.40, 0.25, 0.20, 0.10, 0.05]
MU = [0.25, 0.20, 0.30, 0.15, 0.10]
DIGITS = 5.1e-7
TOKEN_SUM = Aggregation("sequence_mean_token_sum")


def step(method: Method, rows: Rows, policy, old=None, ref=None) -> tuple[float, list[float]]:
    """Loss and gradient of the first distribution's logits."""
    models = {"policy": policy, "old": policy if old is None else old, "ref": policy if ref is None else ref}
    before = Engine({**models, "policy": models["old"]})
    frozen = before.measure(method.frozen_needs(several_updates=True), rows, alias={"old": "policy"})
    if method.kind == "online":
        rows = method.prepare(rows, frozen, {})
    policy.zero_grad()
    loss, _ = Engine(models).step(method.live_needs(), rows, frozen, lambda r, s: method.loss(r, s, {}))
    grad = torch.zeros_like(policy.table) if policy.table.grad is None else policy.table.grad
    return float(loss), grad[0, 0].tolist()


def term(penalty) -> Method:
    return Method(
        kind="supervised", aggregation=TOKEN_SUM, terms={"kl": Summand(penalty, 1.0)}, models={"ref": Initial()}
    )


def reward_kl(estimator: str, advantage=None) -> Method:
    return Method(
        rollout=Rollout(),
        aggregation=TOKEN_SUM,
        transforms={"kl": KLInReward(1.0, estimator)},
        advantage={"returns": Returns() if advantage is None else advantage},
        surrogate=Surrogate(LogLikelihood()),
        models={"ref": Initial()},
    )
