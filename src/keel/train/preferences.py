"""From preferences to rows: every completion a row, every prompt a group, pairs and labels over them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from keel.core.choice import row_ids
from keel.core.rows import Pairs, Rows
from keel.tasks.preferences import Kind, Preference
from keel.tasks.task import Example
from keel.train.encode import Encoder, Truncated, supervised_rows

NLL = "nll"  # mask: the tokens of the best completion of each prompt


def preference_rows(
    preferences: Sequence[Preference],
    kind: Kind,
    encoder: Encoder,
    max_length: int | None,
    seed: int,
    step: int,
) -> tuple[Rows, Truncated]:
    """Rows of preferences; `max_length` cuts completions first, and the cuts are counted.

    `columns["score"]` is what the data say of each completion, `columns["position"]` its place in the data, from 0. Of
    pairs `rows.pairs` are all ordered pairs of a prompt whose scores differ; of labels `rows.label` is 1 for a good
    completion and 0 for a bad one.
    """
    owners = [i for i, preference in enumerate(preferences) for _ in preference.completions]
    place = [k for preference in preferences for k in range(len(preference.completions))]
    examples = [Example(preferences[i].prompt, {}, preferences[i].index) for i in owners]
    completions = [completion for preference in preferences for completion in preference.completions]
    rows, cut = supervised_rows(examples, completions, encoder, max_length, seed, step)
    scores = torch.tensor([score for preference in preferences for score in preference.scores])
    position, group = torch.tensor(place), torch.tensor(owners)
    weight = torch.tensor([float(preferences[i].weight) for i in owners])
    best = _best(scores, group)
    rows = rows.with_(
        group=group,
        row=row_ids(seed, step, rows.data_index, position),
        masks={NLL: rows.mask & best[:, None]},
        columns={"score": scores, "position": position},
    )
    if kind == "labels":
        return rows.with_(label=(scores > 0).float(), weight=weight), cut
    return rows.with_(pairs=_pairs(preferences, scores, group)), cut


def _best(scores: Tensor, group: Tensor) -> Tensor:
    """The first of the highest scores of each group, where not all are the same."""
    out = torch.zeros(len(scores), dtype=torch.bool)
    for number in group.unique().tolist():
        own = (group == number).nonzero().flatten()
        if len(own) == 1 or bool((scores[own] != scores[own][0]).any()):
            out[own[int(scores[own].argmax())]] = True
    return out


def _pairs(preferences: Sequence[Preference], scores: Tensor, group: Tensor) -> Pairs:
    first, second = [], []
    for number in range(len(preferences)):
        own = (group == number).nonzero().flatten().tolist()
        ordered = [(i, j) for i in own for j in own if scores[i] > scores[j]]
        first += [i for i, _ in ordered]
        second += [j for _, j in ordered]
    chosen, rejected = torch.tensor(first, dtype=torch.long), torch.tensor(second, dtype=torch.long)
    owner = group[chosen].tolist()
    return Pairs(
        chosen=chosen,
        rejected=rejected,
        measure=torch.tensor([float(preferences[i].weight) for i in owner]),
        coef=torch.ones(len(owner)),
        label=torch.tensor([float(preferences[i].probability) for i in owner]),
        offset=torch.tensor([float(preferences[i].margin) for i in owner]),
    )
