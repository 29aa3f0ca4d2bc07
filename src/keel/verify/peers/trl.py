"""TRL's trainers on a world: built as usual, with the world's numbers in place of the model's.

A trainer keeps a model of a few parameters that is never run. Log-probabilities come from the world, sampled
completions from the group at hand; everything else is the trainer's own code.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from keel.verify.batches import Batch, GroupLoss
from keel.verify.peers import Option, undisturbed

LIVE = "the policy that is trained"  # stands where a trainer passes its model
UNCLIPPED = 1e6
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


def kl_options(beta: float) -> list[Option]:
    """Every way of putting a divergence to the reference into an objective."""
    grpo = partial(grpo_loss, beta=beta, loss_type="dr_grpo")
    off: dict[str, Any] = {"use_bias_correction_kl": False}
    sequence: dict[str, Any] = {"importance_sampling_level": "sequence"}
    return [
        Option("TRL", "GRPO, `use_bias_correction_kl=True` (default)", grpo(use_bias_correction_kl=True)),
        Option("TRL", "GRPO, `use_bias_correction_kl=False`", grpo(**off)),
        Option("TRL", 'GRPO, `importance_sampling_level="sequence"`', grpo(use_bias_correction_kl=True, **sequence)),
        Option(
            "TRL",
            'GRPO, `importance_sampling_level="sequence"`, `use_bias_correction_kl=False`',
            grpo(**off, **sequence),
        ),
        Option("TRL", "GMPO (experimental)", grpo_loss(beta=beta, trainer="gmpo")),
        Option("TRL", "RLOO (KL in the reward)", rloo_loss(beta=beta)),
    ]


def loss_options() -> list[Option]:
    """Every `loss_type` of the GRPO trainer, and its experimental relative GMPO, without a divergence."""
    found = [Option("TRL", f'`loss_type="{name}"`', grpo_loss(beta=0.0, loss_type=name)) for name in LOSS_TYPES]
    sequence = grpo_loss(beta=0.0, loss_type="grpo", importance_sampling_level="sequence")
    found.append(Option("TRL", '`loss_type="grpo"`, `importance_sampling_level="sequence"`', sequence))
    found.append(Option("TRL", "GMPO (experimental)", grpo_loss(beta=0.0, trainer="gmpo")))
    return found


def whole_options(beta: float) -> list[Option]:
    """Trainers from the rewards on, with their own advantages and clipping."""
    grpo = partial(grpo_loss, beta=beta, whole=True, epsilon=None)
    rloo = partial(rloo_loss, beta=beta, epsilon=None)
    plain = grpo(scale_rewards="none", loss_type="dr_grpo")
    uncorrected = grpo(scale_rewards="none", loss_type="dr_grpo", use_bias_correction_kl=False)
    name = 'GRPO, `scale_rewards="none"`'
    return [
        Option("TRL", "GRPO, else defaults", grpo()),
        Option("TRL", name, grpo(scale_rewards="none")),
        Option("TRL", f'{name}, `loss_type="dr_grpo"`', plain),
        Option("TRL", f'{name}, `loss_type="dr_grpo"`, `use_bias_correction_kl=False`', uncorrected),
        Option("TRL", "RLOO, else defaults", rloo()),
        Option("TRL", "RLOO, `normalize_advantages=True`", rloo(normalize_advantages=True)),
    ]


def grpo_loss(
    *, beta: float, trainer: str = "grpo", whole: bool = False, epsilon: float | None = UNCLIPPED, **settings: Any
) -> GroupLoss:
    """The loss of `GRPOTrainer`.

    Args:
        beta: its coefficient of the divergence.
        trainer: "grpo", or "gmpo" for the experimental trainer of that name.
        whole: compute the advantages, too, from the rewards; else they are given.
        epsilon: half-width of the clipping range; None leaves the default.
        settings: further fields of its configuration.
    """
    if trainer == "gmpo":
        from trl.experimental.gmpo import GMPOConfig as Config
        from trl.experimental.gmpo import GMPOTrainer as Trainer
    else:
        from trl import GRPOConfig as Config
        from trl import GRPOTrainer as Trainer
    made = _build(Trainer, Config, beta=beta, epsilon=epsilon, **settings)

    def loss(batch: Batch) -> Tensor:
        made.batch = batch
        made.max_completion_length = batch.mask.shape[1]  # of the world; dr_grpo divides by it
        inputs = _sampled(made, batch) if whole else _inputs(batch)
        return made._compute_loss(LIVE, inputs)

    return loss


def rloo_loss(*, beta: float, epsilon: float | None = UNCLIPPED, **settings: Any) -> GroupLoss:
    """The loss of `RLOOTrainer`, from the rewards on: the divergence is in them."""
    from trl import RLOOConfig, RLOOTrainer

    made = _build(RLOOTrainer, RLOOConfig, beta=beta, epsilon=epsilon, **settings)

    def loss(batch: Batch) -> Tensor:
        made.batch = batch
        return made._compute_loss(LIVE, _sampled(made, batch))

    return loss


def _inputs(batch: Batch) -> dict[str, Any]:
    """What the GRPO trainer prepares, with given advantages."""
    return {
        "prompt_ids": torch.zeros(len(batch.tokens), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(batch.tokens), 1, dtype=torch.long),
        "completion_ids": batch.tokens,
        "completion_mask": batch.mask.long(),
        "advantages": batch.advantage,
        "old_per_token_logps": batch.old_log_prob.detach(),
        "ref_per_token_logps": batch.ref_log_prob.detach(),
        "num_items_in_batch": batch.mask.sum(),
    }


def _sampled(trainer: Any, batch: Batch) -> dict[str, Any]:
    """What the trainer makes of a group: rewards, baselines, masks."""
    prompts = [{"prompt": "a", "score": float(score)} for score in batch.reward]
    inputs = trainer._generate_and_score_completions(prompts)
    if "old_per_token_logps" not in inputs and "old_logps" not in inputs:  # it takes the live ones for the sampler's
        inputs["old_per_token_logps"] = trainer._of_world(trainer.model, inputs["completion_ids"].shape[1])
    trainer._metrics["train"].clear()
    return inputs


def _score(score: list[float], **_: Any) -> list[float]:
    """The reward function: the world's reward, which travels in a column of the data."""
    return score


class _OfWorld:
    """A trainer whose numbers are those of a group."""

    batch: Batch
    model: Any
    ref_model: Any
    _tokenizer: Any

    def _of_world(self, model: Any, width: int) -> Tensor:
        if model is LIVE:
            found = self.batch.log_prob
        else:
            found = (self.batch.ref_log_prob if model is self.ref_model else self.batch.old_log_prob).detach()
        return found[:, :width]

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, None]:
        return self._of_world(model, logits_to_keep), self.batch.entropy[:, :logits_to_keep], None

    def _completions(self) -> list[list[int]]:
        first = self._tokenizer.convert_tokens_to_ids("a")
        return [(row[keep] + first).tolist() for row, keep in zip(self.batch.tokens, self.batch.mask, strict=True)]


class _OfWorldGRPO(_OfWorld):
    def _generate_single_turn(self, *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self._completions(), None


class _OfWorldRLOO(_OfWorld):
    def _generate_single_turn(self, *_: Any, **__: Any) -> list[list[int]]:
        return self._completions()


def _build(trainer: type, config: type, *, beta: float, epsilon: float | None, **settings: Any) -> Any:
    """A trainer on the CPU, for groups of 4."""
    from datasets import Dataset

    base = _OfWorldRLOO if "RLOO" in trainer.__name__ else _OfWorldGRPO
    if epsilon is not None:
        settings |= {"epsilon": epsilon, "epsilon_high": epsilon}
    with undisturbed(), _without_bars(), _tiny_model() as folder:
        arguments = config(
            output_dir=folder,
            beta=beta,
            num_generations=4,
            per_device_train_batch_size=4,
            max_completion_length=8,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            **settings,
        )
        made = type(trainer.__name__, (base, trainer), {})(
            model=folder,
            args=arguments,
            reward_funcs=_score,
            train_dataset=Dataset.from_list([{"prompt": "a", "score": 0.0}]),
            processing_class=_tokenizer(),
        )
    made.model.train()
    made.current_gradient_accumulation_steps = 1  # what the training loop sets
    return made


@contextlib.contextmanager
def _tiny_model() -> Iterator[str]:
    """A folder with a model of one layer, which is loaded and never run."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = dict(hidden_size=8, intermediate_size=8, head_dim=8)
    heads = dict(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    with tempfile.TemporaryDirectory() as folder:
        Qwen3ForCausalLM(Qwen3Config(vocab_size=4, **sizes, **heads)).save_pretrained(folder)
        yield folder


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
