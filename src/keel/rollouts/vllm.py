"""A generator on vLLM, in this process, with the weights of the model that is trained."""

import os
import tempfile
from collections.abc import Sequence
from typing import Any

from keel.core.errors import UserError
from keel.core.rows import Rows
from keel.models.language import LanguageModel
from keel.models.load import merged
from keel.rollouts.decoding import Prompts
from keel.rollouts.reported import Reported, drawn
from keel.rollouts.sampling import Sampling


class VLLMGenerator:
    """Draws completions with vLLM; see `Generator` for what it promises.

    The engine starts at the first call, in this process, with empty weights, and takes those of the model before each
    call (`sync`), adapters merged in; cached prefixes of older weights are dropped. Log-probabilities are those of what
    is sampled, after temperature and filters; at temperature 0 those of the unfiltered distribution at temperature 1.
    Each row has a seed of its own, made of its identity. vLLM applies min_p before top_p, Keel after it: with both, the
    two draw from different sets.

    Args:
        model: the policy.
        live: take the model's weights before each call; False leaves it to `sync`.
        **options: of `vllm.LLM`, such as gpu_memory_utilization=0.4; they come before Keel's.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(self, model: LanguageModel, *, live: bool = True, **options: Any):
        self.model, self.live, self.options = model, live, options
        self.vllm = _library()
        self.engine: Any = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int = 0,
        data_index: Sequence[int] | None = None,
    ) -> Rows:
        """Completions for tokenised prompts; see `Generator`.

        Raises:
            UserError: prompts that do not fit the model's context or vocabulary.
        """
        room = sampling.max_completion_length
        asked = Prompts.of(self.model, prompts, num_generations, room, seed=seed, step=step, data_index=data_index)
        if self.live or self.engine is None:
            self.sync()
        ids, mask, index = asked.ids.cpu(), asked.mask.cpu(), asked.index.tolist()
        found = self.engine.generate(
            [self.vllm.TokensPrompt(prompt_token_ids=ids[i][mask[i]].tolist()) for i in index],
            sampling_params=[self._settings(sampling, row) for row in asked.row.tolist()],
            use_tqdm=False,
        )
        reported = [_reported(request.outputs[0]) for request in found]
        return asked.rows(drawn(reported, self.model, sampling), self.model.pad_id)

    def sync(self) -> None:
        """Give the engine the weights of the model as they are now."""
        if self.engine is None:
            self.engine = self._start()
        weights = [(name, parameter.detach()) for name, parameter in merged(self.model).named_parameters()]

        def load(module: Any) -> None:
            module.load_weights(weights)

        self.engine.apply_model(load)
        self.engine.reset_prefix_cache()

    def _start(self) -> Any:
        """An engine with the model's shape; its weights are not read from anywhere."""
        transformer = self.model.transformer
        with tempfile.TemporaryDirectory(prefix="keel-vllm-") as folder:
            transformer.config.save_pretrained(folder)
            self.model.tokenizer.save_pretrained(folder)
            options = {
                "model": folder,
                "load_format": "dummy",
                "dtype": str(transformer.dtype).removeprefix("torch."),
                "max_model_len": self.model.context_length,
                "generation_config": "vllm",  # not the model's own, which would change the distribution
                "logprobs_mode": "processed_logprobs",
            }
            return self.vllm.LLM(**{**options, **self.options})

    def _settings(self, sampling: Sampling, row: int) -> Any:
        return self.vllm.SamplingParams(
            n=1,
            seed=row,
            temperature=sampling.temperature,
            top_k=sampling.top_k or 0,
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            min_p=sampling.min_p or 0.0,
            max_tokens=sampling.max_completion_length,
            stop=list(sampling.stop_strings),
            include_stop_str_in_output=True,
            ignore_eos=True,  # the ends are the model's, and all of them
            stop_token_ids=list(self.model.eos_ids),
            skip_special_tokens=False,
            detokenize=bool(sampling.stop_strings),
            logprobs=0,  # of the token drawn, and no other
        )


def _reported(found: Any) -> Reported:
    tokens = list(found.token_ids)
    logp = [found.logprobs[t][token].logprob for t, token in enumerate(tokens)]
    return Reported(tokens, logp, found.finish_reason == "length")


def _library() -> Any:
    # With the engine in a process of its own the weights would have to be sent there as code, which vLLM refuses.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            "vLLM is not installed", "rollout.generator", "pip install 'keel-rl[vllm]', on a machine with a GPU."
        ) from error
    return vllm
