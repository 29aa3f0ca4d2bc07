"""Gradients at weights that are a step ahead, and the weights put back to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError
from keel.core.rows import Rows
from keel.models.language import LanguageModel
from keel.parts.controllers.ahead import LookAhead, spread
from keel.rollouts.choose import choose_generator
from keel.rollouts.sampling import Sampling
from keel.statistics.functionals import Value
from keel.statistics.stats import Stats
from keel.train.session import Session


@contextmanager
def ahead(session: Session, rows: Rows, number: int) -> Iterator[dict[str, float]]:
    """The weights moved along the spread of rewards while the block runs; where no part asks for it, as they are.

    Args:
        rows: of the update; their prompts are the ones that are answered again.
        number: of the update within its batch.

    Yields:
        What is worth logging: `meta/spread`, J before the step ahead.
    """
    part = next((item for item in session.method.controllers.values() if isinstance(item, LookAhead)), None)
    if part is None or part.rate == 0:
        yield {}
        return
    parameters = list(session.optimiser.parameters)
    drawn = _drawn(session, part, rows, number)
    value = _ascend(session, part, drawn, number)
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-part.rate)  # the gradients are those of -J
    session.optimiser.zero_grad()
    try:
        yield {"meta/spread": value}
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)


def _ascend(session: Session, part: LookAhead, drawn: Rows, number: int) -> float:
    """J, with the gradient of -J left in the parameters."""
    score = Value(part.head, where="last")

    def loss(rows: Rows, stats: Stats) -> Any:
        return -spread(stats[score], rows)

    counter = (session.config.seed, session.position.step, number, 1)
    value, _ = session.engine.step([score], drawn, Stats(), loss, counter=counter)
    return -float(value)


def _drawn(session: Session, part: LookAhead, rows: Rows, number: int) -> Rows:
    """Completions of the first prompts of a batch by the model that `source` names."""
    model: Any = session.sources[part.source].model if part.source in session.sources else session.policy
    if not isinstance(model, LanguageModel):
        fix = "Name another: models={'sampler': Pretrained(path)}."
        raise ConfigError("the model that answers the prompts cannot be drawn from", f"models.{part.source}", fix)
    prompts: dict[tuple[int, ...], None] = {}
    for ids, mask in zip(rows.prompt_ids.cpu(), rows.prompt_mask.cpu(), strict=True):
        prompts[tuple(ids[mask].tolist())] = None
    some = [list(ids) for ids in list(prompts)[: part.num_prompts]]
    length = part.max_completion_length or int(rows.lengths.max())
    seed = counter_seed(session.config.seed, "ahead", number)
    drawing = choose_generator(model, session.config.train.generator)
    sampling = Sampling(max_completion_length=length)
    found = drawing.generate(some, part.num_generations, sampling, seed=seed, step=session.position.step)
    return found.to(session.policy.device)
