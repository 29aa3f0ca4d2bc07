"""verl's losses on a world: `ppo_loss` of its workers, `apply_kl_penalty` and `compute_advantage` of its trainer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keel.verify.batches import Batch, GroupLoss
from keel.verify.peers import Option, undisturbed

UNCLIPPED = 1e6
SUMMED = "seq-mean-token-sum"
ESTIMATORS = ("k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl", "full")
STRAIGHT_THROUGH = ("k1+", "kl+", "abs+", "k2+", "mse+", "k3+", "low_var_kl+")
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
LOSS_MODES = ("gspo", "sapo", "gpg", "geo_mean", "cispo", "dppo_tv", "dppo_kl", "kl_cov")


def kl_options(beta: float) -> list[Option]:
    """Every estimator, in the loss and in the reward."""
    kinds = (*ESTIMATORS, *STRAIGHT_THROUGH)
    found = [Option("verl", f"`{k}`", loss(kl_in_loss=k, beta=beta), "`kl_loss_type` (in the loss)") for k in kinds]
    for k in kinds:
        found.append(Option("verl", f"`{k}`", loss(kl_in_reward=k, beta=beta), "`kl_penalty` (in the reward)"))
    return found


def loss_options() -> list[Option]:
    """Every aggregation of the plain loss, and every kind of loss, without a divergence."""
    found = [Option("verl", f"`loss_agg_mode={mode}`", loss(aggregation=mode)) for mode in AGGREGATIONS]
    norm = loss(aggregation="seq-mean-token-sum-norm", scale_factor=3)
    found.append(Option("verl", "`loss_agg_mode=seq-mean-token-sum-norm`, `loss_scale_factor=3`", norm))
    return found + [Option("verl", f"`loss_mode={mode}`", loss(mode=mode)) for mode in LOSS_MODES]


def whole_options(beta: float) -> list[Option]:
    """From the rewards on, with verl's own advantages."""

    def in_reward(**settings: Any) -> GroupLoss:
        return loss(kl_in_reward="kl", beta=beta, clip=None, **settings)

    def in_loss(**settings: Any) -> GroupLoss:
        return loss(kl_in_loss="low_var_kl", estimator="grpo", beta=beta, clip=None, **settings)

    loss_text, reward_text = "`use_kl_loss=True`", "`use_kl_in_reward=True`"
    plain, summed = "`norm_adv_by_std_in_grpo=False`", f"`loss_agg_mode={SUMMED}`"
    settings = {
        f"{loss_text}, `adv_estimator=grpo`, else defaults": in_loss(aggregation="token-mean"),
        f"{loss_text}, `adv_estimator=grpo`, {plain}, {summed}": in_loss(divide_by_std=False),
        f"{reward_text}, `adv_estimator=grpo`, {summed}": in_reward(estimator="grpo"),
        f"{reward_text}, `adv_estimator=grpo`, {plain}, {summed}": in_reward(estimator="grpo", divide_by_std=False),
        f"{reward_text}, `adv_estimator=rloo`, {summed}": in_reward(estimator="rloo"),
        f"{reward_text}, `adv_estimator=opo`, {summed}": in_reward(estimator="opo"),
        f"{reward_text}, `adv_estimator=reinforce_plus_plus`, {summed}": in_reward(estimator="reinforce_plus_plus"),
    }
    return [Option("verl", name, made) for name, made in settings.items()]


def loss(
    *,
    beta: float = 0.0,
    kl_in_loss: str | None = None,
    kl_in_reward: str | None = None,
    mode: str = "vanilla",
    aggregation: str = SUMMED,
    estimator: str | None = None,
    divide_by_std: bool = True,
    clip: float | None = UNCLIPPED,
    scale_factor: int | None = None,
) -> GroupLoss:
    """The loss that verl's actor minimises.

    Args:
        beta: coefficient of the divergence, wherever it is.
        kl_in_loss: `actor.kl_loss_type`, with `actor.use_kl_loss`.
        kl_in_reward: `algorithm.kl_penalty`, with `algorithm.use_kl_in_reward`; advantages are then verl's own.
        mode: `policy_loss.loss_mode`.
        aggregation: `actor.loss_agg_mode`.
        estimator: `algorithm.adv_estimator`; None gives the exact advantages, and rloo with a divergence in the reward.
        divide_by_std: `algorithm.norm_adv_by_std_in_grpo`.
        clip: half-width of the clipping range; None leaves the default.
        scale_factor: `actor.loss_scale_factor`.
    """
    with undisturbed():
        from verl.workers.config import ActorConfig, PolicyLossConfig
        from verl.workers.utils.losses import ppo_loss
    wide = {} if clip is None else dict(clip_ratio=clip, clip_ratio_low=clip, clip_ratio_high=clip, clip_ratio_c=clip)
    if mode.startswith("dppo"):
        wide.pop("clip_ratio_c", None)  # there a cap of the ratio, of 20
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=4,
        loss_agg_mode=aggregation,
        loss_scale_factor=scale_factor,
        policy_loss=PolicyLossConfig(loss_mode=mode),
        use_kl_loss=kl_in_loss is not None,
        kl_loss_coef=beta,
        kl_loss_type=kl_in_loss or "low_var_kl",
        **wide,
    )
    estimator = estimator or ("rloo" if kl_in_reward else None)
    advantages = _exact if estimator is None else _estimated(estimator, beta, kl_in_reward, divide_by_std)

    def found(batch: Batch) -> Tensor:
        return ppo_loss(config, {"log_probs": _unpadded(batch)}, _data(batch, advantages(batch)))[0]

    return found


def _exact(batch: Batch) -> Tensor:
    return batch.advantage[:, None].expand(batch.mask.shape)


def _estimated(name: str, beta: float, kl: str | None, divide_by_std: bool) -> Callable[[Batch], Tensor]:
    """Advantages from rewards, by verl: first the penalty, then the estimator."""
    with undisturbed():
        from verl import DataProto
        from verl.trainer.config import AlgoConfig
        from verl.trainer.ppo.core_algos import FixedKLController
        from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
    config = AlgoConfig(adv_estimator=name)

    def advantages(batch: Batch) -> Tensor:
        last = batch.mask.sum(1) - 1
        scores = torch.zeros_like(batch.log_prob).detach()
        scores[torch.arange(len(last)), last] = batch.reward
        tensors = {
            "response_mask": batch.mask.long(),
            "token_level_scores": scores,
            "token_level_rewards": scores,
            "old_log_probs": batch.old_log_prob.detach(),
            "ref_log_prob": batch.ref_log_prob.detach(),
        }
        group = np.array(["prompt"] * len(last), dtype=object)
        data = DataProto.from_dict(tensors=tensors, non_tensors={"uid": group})
        if kl is not None:
            data, _ = apply_kl_penalty(data, FixedKLController(beta), kl)
        data = compute_advantage(data, name, norm_adv_by_std_in_grpo=divide_by_std, config=config)
        return data.batch["advantages"]

    return advantages


def _unpadded(batch: Batch) -> Tensor:
    """Log-probabilities as the model returns them: prompt and completion in one row, each number one place early."""
    end = batch.log_prob.new_zeros(1)
    rows = [torch.cat([row[keep], end]) for row, keep in zip(batch.log_prob, batch.mask, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _data(batch: Batch, advantages: Tensor) -> Any:
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    count = len(batch.tokens)

    def nested(values: Tensor) -> Tensor:
        rows = [row[keep] for row, keep in zip(values.detach(), batch.mask, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    data = TensorDict(
        {
            "prompts": torch.nested.as_nested_tensor([torch.zeros(1, dtype=torch.long)] * count, layout=torch.jagged),
            "responses": nested(batch.tokens),
            "response_mask": nested(batch.mask.long()),
            "old_log_probs": nested(batch.old_log_prob),
            "ref_log_prob": nested(batch.ref_log_prob),
            "advantages": nested(advantages),
        },
        batch_size=[count],
    )
    single = {  # one process, and a mini-batch of this one group
        "dp_size": 1,
        "batch_num_tokens": int(batch.mask.sum()),
        "global_batch_size": count,
        "max_response_len": int(batch.mask.sum(1).max()),
    }
    for name, value in single.items():
        tensordict_utils.assign_non_tensor_data(data, name, value)
    return data
