"""Methods that train a reward model: how it is measured on held-out comparisons, and how it is written at the end."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError
from keel.evaluate.evaluation import Completion, Evaluation
from keel.evaluate.reward_models import comparison_evaluation
from keel.method import Method
from keel.models.language import LanguageModel
from keel.models.reward_model import FOLDER, classifier_of, load_reward_model, save_reward_model, write_constants
from keel.parts.terms.pairs import PairLoss, pairs_of, sides
from keel.parts.terms.scores import HeadScore
from keel.rollouts.choose import choose_generator
from keel.rollouts.sampling import Sampling
from keel.statistics.stats import Stats
from keel.tasks.preferences import Preference
from keel.tasks.task import Text, completion_text
from keel.train.encode import Encoder
from keel.train.preferences import preference_rows
from keel.train.session import Session

BATCH = 64  # comparisons measured together
SAMPLED = 256  # prompts whose completions give the mean and the deviation of the scores
SHOWN = 6  # pairs that an evaluation keeps to be looked at


def scored_by(method: Method) -> HeadScore:
    """The score that a method of kind "reward" learns.

    Raises:
        ConfigError: it has no loss of pairs whose score is a head's.
    """
    for term in method.terms.values():
        if isinstance(term, PairLoss) and isinstance(term.score, HeadScore):
            return term.score
    raise ConfigError(
        "a method of kind reward learns the score of a head, and this one has no such loss",
        "terms",
        "Add PairLoss(LogSigmoid(), HeadScore(), beta=1.0), as `bradley_terry` does.",
    )


def check_reward_model(method: Method, policy: LanguageModel) -> None:
    """Refuse before training what could not be written at its end.

    Raises:
        ConfigError: the method learns no score.
        UserError: transformers has no classifier of the policy's architecture.
    """
    scored_by(method)
    classifier_of(policy)


@torch.no_grad()
def score_preferences(
    session: Session, some: Sequence[Preference]
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"], Int[Tensor, "N"]]:
    """Scores of the chosen and of the rejected completion of every pair, by the live model; and the place in `some` of
    the preference that it is of, for those that are left out (see `preference_rows`) have none.
    """
    assert session.preferences is not None
    score, limit = scored_by(session.method), session.config.train.max_length or session.policy.context_length
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(some), BATCH):
        drawn = [some[i] for i in range(start, min(start + BATCH, len(some)))]
        rows, cut = preference_rows(drawn, session.preferences.kind, session.encoder, limit, session.config.seed, 0)
        rows = rows.to(session.policy.device)
        stats: Stats = session.engine.measure(score.needs, rows)
        chosen, rejected = sides(rows, stats, pairs_of(rows))
        owner = start + torch.tensor(cut.kept)[rows.group[chosen.index].cpu()]
        found.append((score(chosen).cpu(), score(rejected).cpu(), owner))
    first, second, owners = (torch.cat(column) for column in zip(*found, strict=True))
    return first, second, owners


def measure_reward_model(session: Session, progress: Callable[[int, int], None] | None = None) -> Evaluation | None:
    """Accuracy (of each domain where there are several) and calibration on held-out comparisons; None without any."""
    assert session.preferences is not None
    held_out = session.preferences.held_out[session.config.evaluate.skip :]
    some = [held_out[i] for i in range(min(session.config.evaluate.num_prompts, len(held_out)))]
    chosen, rejected, owners = [], [], []
    for i in range(0, len(some), BATCH):
        first, second, owner = score_preferences(session, some[i : i + BATCH])
        chosen.append(first.double().numpy())
        rejected.append(second.double().numpy())
        owners += [some[i + place] for place in owner.tolist()]
        if progress is not None:
            progress(min(i + BATCH, len(some)), len(some))
    if not some or not sum(map(len, chosen)):
        return None
    both = np.concatenate(chosen), np.concatenate(rejected)
    numbers = [preference.index for preference in owners]
    whole = [preference.index for preference in some] == numbers  # one pair of each
    shown = _shown(some[:SHOWN], *both) if whole else []
    seed = counter_seed(session.config.seed, "evaluate")
    domains = [preference.domain for preference in owners]
    return comparison_evaluation(*both, index=numbers, completions=shown, seed=seed, domains=domains)


def _shown(some: Sequence[Preference], chosen: np.ndarray, rejected: np.ndarray) -> list[Completion]:
    """Both sides of the first pairs, with their scores."""
    found = []
    for i, preference in enumerate(some):
        order = sorted(range(len(preference.completions)), key=lambda k: -preference.scores[k])
        for k, scores in zip(order, (chosen, rejected), strict=False):
            text = completion_text(preference.completions[k])
            found.append(Completion(preference.index, _text(preference.prompt), text, float(scores[i]), None, 0, False))
    return found


def _text(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(m.get("content", "")) for m in prompt)


def write_reward_model(session: Session, initial: Callable[[], LanguageModel | None]) -> Path:
    """The run's `reward_model/`, with the mean and the deviation of its scores on samples of the initial policy.

    Args:
        session: at the end of training.
        initial: loads the policy before training; where it gives None, the completions of the data stand in.
    """
    assert session.path is not None
    score = scored_by(session.method)
    head: Any = session.heads[score.head]
    folder = save_reward_model(session.policy, head.weight, session.path / FOLDER)
    scorer = load_reward_model(folder, str(session.policy.device), session.engine.max_tokens)
    texts = _samples(session, initial())
    scores = scorer.scores(texts)
    if len(scores) > 1 and float(scores.std()) > 0:
        write_constants(folder, scores)
    return folder


def _samples(session: Session, policy: LanguageModel | None) -> list[tuple[Text, Text]]:
    """One completion of the initial policy for each of the first prompts, no longer than those of the data."""
    assert session.preferences is not None
    data = session.preferences.train
    some = [data[i] for i in range(min(SAMPLED, len(data)))]
    if policy is None:
        return [(p.prompt, completion) for p in some for completion in p.completions]
    encoder = Encoder(policy, None, session.config.task.system_prompt)
    prompts = [encoder.prompt(p.prompt) for p in some]
    longest = max(len(encoder.completion(c)) for p in some for c in p.completions)
    room = longest if policy.context_length is None else min(longest, policy.context_length - max(map(len, prompts)))
    drawing = choose_generator(policy, session.config.train.generator)
    rows = drawing.generate(
        prompts, 1, Sampling(max_completion_length=max(1, room)), seed=counter_seed(session.config.seed, "constants")
    )
    said = [encoder.decode(t[m].tolist()) for t, m in zip(rows.tokens.cpu(), rows.mask.cpu(), strict=True)]
    return [(some[g].prompt, text) for g, text in zip(rows.group.tolist(), said, strict=True)]
