"""What models that do not move say of the data, measured once before the first step.

The rows are measured in the batches of the first pass over the data, so that this pass gives the same bits as without;
later passes read the same numbers where they would be measured in other company, which differs by rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from keel.core.errors import ConfigError
from keel.core.rows import Rows
from keel.method import Method
from keel.models.sources import SourceModel
from keel.statistics.functionals import Functional, Value
from keel.statistics.stats import Stats, packed

if TYPE_CHECKING:
    from keel.train.session import Session

SETTING = "train.precompute_reference"
Key = tuple[int, int]  # number of a preference, and place of a completion in it


@dataclass(frozen=True)
class Precomputed:
    """Numbers of each completion of the data.

    Args:
        functionals: those that are known.
        rows: of each completion, by functional: [tokens, *F], or [*F] of its last token.
    """

    functionals: tuple[Functional, ...]
    rows: Mapping[Key, Mapping[Functional, Tensor]]

    def stats(self, rows: Rows) -> Stats:
        """The numbers of a batch, as the engine would give them."""
        keys = _keys(rows)
        found: dict[Functional, Tensor] = {}
        for functional in self.functionals:
            known = [self.rows[key][functional] for key in keys]
            if functional.where == "last":
                found[functional] = torch.stack(known).to(rows.device)
                continue
            numbers = torch.cat(known).to(rows.device)
            room = numbers.new_zeros(*rows.tokens.shape, *numbers.shape[1:])
            found[functional] = room.index_put(rows.mask.nonzero(as_tuple=True), numbers)
        return Stats(found)


def frozen_statistics(session: "Session", rows: Rows) -> Stats:
    """All that a batch needs of models that stand still while it is learnt; what is known is not measured again."""
    needs = session.method.frozen_needs(session.several_updates)
    if session.precomputed is None:
        return session.engine.measure(needs, rows, alias={"old": "policy"})
    known = session.precomputed.stats(rows)
    rest = [functional for functional in needs if functional not in known]
    return session.engine.measure(rest, rows, alias={"old": "policy"}).merged(known)


def check_precomputed(method: Method, sources: Mapping[str, SourceModel]) -> None:
    """Refuse to measure once what changes.

    Raises:
        ConfigError: the rows are not those of a file, a model moves, or nothing is read of models that do not.
    """
    if method.kind == "online" or method.reads is None:
        who = (
            "draws its completions, so that every step has new rows"
            if method.kind == "online"
            else ("compares no completions")
        )
        raise ConfigError(f"is for methods that compare the completions of a file, and this one {who}", SETTING)
    frozen = [f for f in method.frozen_needs(True) if f.of != ("old",)]
    for functional in frozen:
        for name in functional.of:
            if name == "old" or (name in sources and sources[name].moving):
                what = f"'{name}' moves, so that what it says of a completion changes from step to step"
                raise ConfigError(what, SETTING, "Set it to false.")
    if not _precomputable(method):
        raise ConfigError("this method reads no model that stands still, so there is nothing to measure", SETTING)


def precompute(session: "Session") -> None:
    """Measure all rows of the data once; the run stands afterwards where it stood before.

    Raises:
        ConfigError: batches have rows beside those of the data.
    """
    from keel.train.given import given_batch

    if not session.config.train.precompute_reference or session.precomputed is not None:
        return
    assert session.preferences is not None
    size, wanted = len(session.preferences.train), _precomputable(session.method)
    text = f"measuring {' and '.join(sorted({name for f in wanted for name in f.of}))} once"
    session.report("phase", {"name": "precompute", "steps": size, "text": text})
    found: dict[Key, Mapping[Functional, Tensor]] = {}
    stood = session.position
    session.position = type(stood)()
    try:
        while session.position.drawn < size:
            batch = given_batch(session)
            rows, keys = batch.rows.to(session.policy.device), _keys(batch.rows)
            if len(rows) != len(batch.texts) or not bool(rows.main.all()):
                what = "this method puts rows of its own beside those of the data, which differ from step to step"
                raise ConfigError(what, SETTING, "Set it to false.")
            stats = session.engine.measure(wanted, rows)
            lengths = rows.lengths.tolist()
            whole = {f: f.where == "last" for f in wanted}
            numbers = {f: (stats[f] if whole[f] else stats[f][rows.mask]).cpu() for f in wanted}
            parts = {f: value.unbind(0) if whole[f] else value.split(lengths) for f, value in numbers.items()}
            for i, key in enumerate(keys):
                found.setdefault(key, {f: parts[f][i] for f in wanted})
            session.position = replace(session.position, step=session.position.step + 1)
            session.report("progress", {"done": min(session.position.drawn, size), "total": size})
    finally:
        session.position = stood
    session.precomputed = Precomputed(wanted, found)
    start = {"steps": session.config.train.max_steps, "start": stood.step}
    session.report("phase", {"name": "train", "text": session.config.name, **start})


def _precomputable(method: Method) -> tuple[Functional, ...]:
    """What the method reads of models that stand still, at the tokens of the completions."""
    frozen = method.frozen_needs(True)
    still = [f for f in frozen if not {"old", "policy"} & set(f.of) and not isinstance(f, Value) and not packed(f)]
    return tuple(still)


def _keys(rows: Rows) -> list[Key]:
    place = rows.columns["position"].tolist()
    return list(zip(rows.data_index.tolist(), place, strict=True))
