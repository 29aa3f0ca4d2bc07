"""What completions of the reference earn at the prompts of a batch, for rewards that are held against them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError, DataError
from keel.core.rows import Rows
from keel.parts.rewards.score import score
from keel.parts.rewards.shaping import REFERENCES
from keel.parts.rewards.transforms import WeightedSum
from keel.rollouts.choose import choose_generator
from keel.tasks.environment import InteractiveTask
from keel.tasks.task import Example
from keel.train.draws import reply
from keel.train.written import writer

if TYPE_CHECKING:
    from keel.train.session import Session


def with_references(session: "Session", rows: Rows, examples: Sequence[Example]) -> Rows:
    """The rows with `features["reference_rewards"]`, where the data have such a column or a part asks for them.

    A prompt's completions depend on the seed of the run and the prompt alone. They are drawn and scored when it first
    comes; the part that asked remembers them.

    Args:
        session: whose reference, rewards and memories.
        rows: of the examples, by their groups.
        examples: prompts of the round.

    Raises:
        DataError: the column of the data is no list of numbers.
        ConfigError: the reference is no language model, or the task has several turns.
    """
    if any(REFERENCES in example.columns for example in examples):
        known = {e.index: _numbers(e, session.task.name) for e in examples}
    else:
        asking = [(p, item) for p, item in session.method.parts() if getattr(item, "references", 0)]
        if not asking:
            return rows
        path, item = asking[0]
        remembered = session.states[path]["known"]
        known = {e.index: remembered[str(e.index)] for e in examples if str(e.index) in remembered}
        new = list({e.index: e for e in examples if e.index not in known}.values())
        known |= _measured(session, item, new) if new else {}
    width = max(1, *(len(known[e.index]) for e in examples))
    padded = [[*known[e.index], *[float("nan")] * (width - len(known[e.index]))] for e in examples]
    table = torch.tensor(padded, dtype=torch.float64, device=rows.device)
    return rows.with_(features={**rows.features, REFERENCES: table[rows.group % len(examples)]})


def _numbers(example: Example, task: str) -> list[float]:
    """The column of one prompt; a prompt without it has no reference."""
    given = example.columns.get(REFERENCES)
    values = [] if given is None else given if isinstance(given, (list, tuple)) else [given]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        what = f"'{REFERENCES}' is no list of numbers (got {given!r})"
        raise DataError(what, f"{task}, example {example.index}", "Write the rewards of the reference's completions.")
    return [float(value) for value in values]


def _measured(session: "Session", item: Any, examples: list[Example]) -> dict[int, list[float]]:
    """Rewards of fresh completions of the reference, summed as the method sums them; NaN where none could be had."""
    if isinstance(session.task, InteractiveTask):
        raise ConfigError(
            "the reference is asked for single completions, and this task has several turns",
            "transforms.par.references",
            "Set references=0, which takes the group's own episodes.",
        )
    rollout, source = session.method.rollout, session.sources[item.against].model
    assert rollout is not None
    encoder, number = session.encoder, [example.index for example in examples]
    ids = [encoder.prompt(example.prompt) for example in examples]
    seed = counter_seed(session.config.seed, REFERENCES)
    with writer(source, f"models.{item.against}") as model:
        drawing = choose_generator(model, session.config.train.generator)
        rows = drawing.generate(ids, item.references, rollout.sampling, seed=seed, step=0, data_index=number)
    session.position.tokens += int(rows.mask.sum())
    owners = [examples[i] for i in rows.group.tolist()]
    tokens = [row[mask].tolist() for row, mask in zip(rows.tokens.cpu(), rows.mask.cpu(), strict=True)]
    replies = [reply(encoder.decode(t), e) for t, e in zip(tokens, owners, strict=True)]
    names = dict.fromkeys(name for e in owners for name in e.columns)
    columns = {name: [e.columns.get(name) for e in owners] for name in names}
    found = score(session.rewards, [e.prompt for e in owners], replies, tokens, columns, rows.group)
    total = torch.where(found.failed, torch.nan, _total(session, found.values.double()))
    return {e.index: total[rows.group.cpu() == i].tolist() for i, e in enumerate(examples)}


def _total(session: "Session", values: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """The columns as one number, NaN where no reward applies."""
    sums = [item for item in session.method.transforms.values() if isinstance(item, WeightedSum)]
    weights = values.new_tensor(sums[0].weights) if sums and sums[0].weights else values.new_ones(values.shape[1])
    return torch.where(values.isnan().all(1), torch.nan, (values * weights).nansum(1))
