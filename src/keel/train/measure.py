"""Measuring a policy on held-out prompts."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from keel.core.policy import PolicyModel
from keel.core.rows import Rows
from keel.evaluate.collect import collect
from keel.evaluate.evaluation import Evaluation, assess
from keel.models.language import LanguageModel
from keel.parts.rewards.score import score
from keel.rollouts.choose import choose_generator
from keel.rollouts.sampling import Sampling
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence, Entropy, Functional
from keel.tasks.task import Example, RewardFunction, Task
from keel.train.encode import Encoder
from keel.train.settings import EvaluateSettings

MAX_ROWS = 2048  # completions sampled together


def measure_policy(
    policy: LanguageModel,
    task: Task,
    rewards: Mapping[str, RewardFunction],
    settings: EvaluateSettings,
    *,
    encoder: Encoder,
    max_completion_length: int,
    seed: int,
    reference: PolicyModel | None = None,
    generator: str = "auto",
    max_tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """avg@k, pass@k, maj@k, entropy, KL to the reference and lengths on the first held-out prompts.

    Args:
        policy: the model to measure.
        task: its held-out examples and answers.
        rewards: functions that score completions.
        settings: number of prompts and completions, sampling, threshold.
        encoder: prompts to tokens.
        max_completion_length: tokens at most.
        seed: of the completions; the same one before and after gives common random numbers.
        reference: for the KL, per token over the whole vocabulary; None leaves it out.
        generator: local, transformers or auto.
        max_tokens: tokens of a micro-batch of the statistics.
        progress: called with (prompts done, all prompts).
    """
    examples: Sequence[Example] = [task.held_out[i] for i in range(min(settings.num_prompts, len(task.held_out)))]
    sampling = Sampling(settings.temperature, None, settings.top_p, None, max_completion_length)
    n = settings.num_generations
    models: dict[str, PolicyModel] = {"policy": policy} | ({} if reference is None else {"ref": reference})
    engine = Engine(models, max_tokens=max_tokens)

    def statistics(rows: Rows) -> dict[str, Tensor]:
        needs: list[Functional] = [Entropy()] if reference is None else [Entropy(), Divergence("kl_policy_ref")]
        stats = engine.measure(needs, rows.to(policy.device))
        return {"entropy": stats[Entropy()]} | ({} if reference is None else {"kl": stats[Divergence("kl_policy_ref")]})

    samples = collect(
        choose_generator(policy, generator),
        examples,
        lambda prompts, completions, ids, columns, group: score(rewards, prompts, completions, ids, columns, group),
        num_generations=n,
        sampling=sampling,
        seed=seed,
        encode=encoder.prompt,
        decode=encoder.decode,
        answer=task.answer,
        statistics=statistics,
        max_rows=MAX_ROWS,
        progress=progress,
    )
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= n]
    return assess(samples, ks, seed=seed, threshold=settings.threshold)
