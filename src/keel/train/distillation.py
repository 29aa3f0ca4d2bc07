"""Rows for distillation that the policy, a teacher or a mixture of both has drawn, without any reward."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from keel.core.choice import row_ids
from keel.core.errors import ConfigError
from keel.core.rows import Rows, Stop
from keel.models.language import LanguageModel
from keel.rollouts.choose import choose_generator
from keel.rollouts.local import LocalGenerator
from keel.rollouts.taught import generate_mixture
from keel.tasks.environment import InteractiveTask
from keel.tasks.task import Example
from keel.train.strategies import distinct, draw_rows

if TYPE_CHECKING:
    from keel.train.session import Session


def taught_rows(session: "Session", examples: Sequence[Example]) -> Rows:
    """Completions of these prompts, by whom the method's rollout says.

    Args:
        session: whose models; the randomness depends on its seed, its step and the examples alone.
        examples: prompts.

    Raises:
        ConfigError: another model is to write, and it cannot here.
    """
    assert session.method.rollout is not None
    step, index = session.position.step, distinct([example.index for example in examples])
    if session.method.rollout.written is None:
        rows, _ = draw_rows(session, examples, step, index)
    else:
        rows = _written(session, examples, step, index)
    own = torch.tensor([examples[i].index for i in rows.group.tolist()], device=rows.device)
    sample = torch.arange(len(rows), device=rows.device) % session.method.rollout.num_generations
    place = torch.tensor(index, device=rows.device)[rows.group]
    return rows.with_(data_index=own, row=row_ids(session.config.seed, step, place, sample))


def _written(session: "Session", examples: Sequence[Example], step: int, index: Sequence[int]) -> Rows:
    """Completions of another model, or of a mixture with it."""
    rollout = session.method.rollout
    assert rollout is not None and rollout.written is not None
    teacher, alpha = session.sources[rollout.written.model].model, rollout.written.alpha
    if isinstance(session.task, InteractiveTask):
        fix = "Leave rollout.written out, or take a task of one turn."
        raise ConfigError("another model writes single completions, and this task has several turns", "rollout", fix)
    if not isinstance(teacher, LanguageModel):
        what = f"'{rollout.written.model}' is the policy's base under its adapter, which does not write by itself"
        raise ConfigError(what, "rollout.written", "Name a folder or a hub name: models.teacher.path.")
    ids = [session.encoder.prompt(example.prompt) for example in examples]
    asked: tuple[Any, ...] = (ids, rollout.num_generations, rollout.sampling)
    known: dict[str, Any] = {"seed": session.config.seed, "step": step, "data_index": index}
    drawing = choose_generator(teacher, session.config.train.generator)
    if alpha == 1:
        rows = drawing.generate(*asked, **known)
        return rows.with_(logp={"mixture": rows.logp["behaviour"]})
    if not isinstance(session.generator, LocalGenerator) or not isinstance(drawing, LocalGenerator):
        fix = "Set train.generator=local (or auto), on models with a key-value cache, or rollout.written.alpha=1."
        raise ConfigError("a mixture of two models is drawn here, token by token", "rollout.written", fix)
    return generate_mixture(session.generator, drawing, alpha, *asked, **known)


def taught_metrics(rows: Rows) -> dict[str, float]:
    """What can be said of the drawn rows before any model looks at them."""
    return {
        "completions/mean_length": float(rows.lengths.float().mean()),
        "completions/clipped_ratio": float((rows.stop == int(Stop.LENGTH)).float().mean()),
        "completions/given_ratio": float((rows.stop == int(Stop.DATA)).float().mean()),
        "num_rows": float(len(rows)),
    }
