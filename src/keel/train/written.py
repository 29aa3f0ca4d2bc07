"""Completions that other models of the method write: in place of the policy's, mixed with them, or beside them."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError
from keel.core.rows import Rows, Stream, cat
from keel.models.adapters import AdapterView
from keel.models.language import LanguageModel
from keel.rollouts.beside import AUTHOR
from keel.rollouts.choose import choose_generator
from keel.rollouts.local import LocalGenerator
from keel.rollouts.rollout import Rollout
from keel.rollouts.taught import generate_mixture

if TYPE_CHECKING:
    from keel.train.session import Session

MIXTURE = "mixture"  # log-probabilities of what was drawn, where the policy did not draw alone


def written_rows(
    session: "Session",
    model: str,
    share: float,
    ids: Sequence[Sequence[int]],
    count: int,
    *,
    geometric: bool = False,
    **known: Any,
) -> Rows:
    """Completions of tokenised prompts by a model of the method, or by a mixture of it with the policy.

    Args:
        model: its name.
        share: of it; 1 is that model alone.
        ids: prompts.
        count: completions of each.
        geometric: how the two are mixed; see `generate_mixture`.
        **known: seed, step and data_index, as the generator takes them.

    Raises:
        ConfigError: the model cannot write, or not here.
    """
    rollout = session.method.rollout
    assert rollout is not None
    source = session.sources[model].model
    writing: contextlib.AbstractContextManager[LanguageModel]
    if share < 1 and isinstance(source, AdapterView):
        view, writing = source, contextlib.nullcontext(source.model)
    else:
        view, writing = None, writer(source, f"models.{model}")
    with writing as author:
        drawing = choose_generator(author, session.config.train.generator)
        if share == 1:
            rows = drawing.generate(ids, count, rollout.sampling, **known)
            return rows.with_(logp={MIXTURE: rows.logp["behaviour"]})
        if not isinstance(session.generator, LocalGenerator) or not isinstance(drawing, LocalGenerator):
            fix = "Set train.generator=local (or auto), on models with a key-value cache, or take that model alone."
            raise ConfigError("a mixture of two models is drawn here, token by token", "rollout", fix)
        asked: tuple[Any, ...] = (share, ids, count, rollout.sampling)
        return generate_mixture(session.generator, drawing, *asked, geometric=geometric, view=view, **known)


def with_rows_beside(
    session: "Session", rollout: Rollout, rows: Rows, ids: Sequence[Sequence[int]], step: int, index: Sequence[int]
) -> Rows:
    """The rows and, in their groups, those of other models for which it is time; `columns["author"]` says whose."""
    (kind,) = rows.logp  # of all rows the same, so that they fit into one batch
    parts = [_by(rows, 0)]
    for i, item in enumerate(rollout.beside):
        if not item.due(session.position.step):
            continue
        known = {"seed": counter_seed(session.config.seed, AUTHOR, i), "step": step, "data_index": index}
        more = written_rows(session, item.model, item.share, ids, item.count, geometric=True, **known)
        stream = torch.full_like(more.stream, int(Stream.CANDIDATE))
        more = more.with_(stream=stream, logp={kind: more.logp[MIXTURE]}).to(rows.device)
        parts.append(_by(more, i + 1))
    return cat(parts)


def _by(rows: Rows, author: int) -> Rows:
    return rows.with_(columns={**rows.columns, AUTHOR: torch.full_like(rows.row, author)})


@contextlib.contextmanager
def writer(source: Any, where: str) -> Iterator[LanguageModel]:
    """A model as one that writes; a view of the policy's base is the policy with its adapters off.

    Raises:
        ConfigError: it is no language model.
    """
    if isinstance(source, AdapterView):
        with source.active():
            yield source.model
    elif isinstance(source, LanguageModel):
        yield source
    else:
        raise ConfigError(f"{type(source).__name__} cannot write completions", where, "Name a language model.")
