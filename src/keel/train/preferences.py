"""From preferences to rows: every completion a row, every prompt a group, pairs and labels over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from keel.core.choice import row_ids
from keel.core.errors import DataError
from keel.core.rows import Pairs, Rows, Stop
from keel.tasks.preferences import Kind, Preference
from keel.train.encode import Encoder, Truncated, padded

if TYPE_CHECKING:
    from keel.train.session import Session

NLL = "nll"  # mask: the tokens of the best completion of each prompt


@dataclass(frozen=True)
class Cut(Truncated):
    """How many rows lost tokens, and which preferences were left out.

    Args:
        empty: preferences left out because a completion has no token.
        same: pairs left out because their sides are the same tokens once they are cut.
        kept: places of the others.
    """

    empty: int = 0
    same: int = 0
    kept: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Tokens:
    """A preference as tokens, and whether its prompt and which of its completions lost some."""

    prompt: list[int]
    completions: list[list[int]]
    cut_prompt: bool
    cut: list[bool]


def preference_rows(
    preferences: Sequence[Preference],
    kind: Kind,
    encoder: Encoder,
    max_length: int | None,
    seed: int,
    step: int,
) -> tuple[Rows, Cut]:
    """Rows of preferences; `max_length` cuts completions first, and what is cut or left out is counted.

    Only a prompt that would leave no token for a completion loses its beginning: so much that the longest completion
    fits, or half of `max_length` is free.

    `columns["score"]` is what the data say of each completion, `columns["position"]` its place in the data, from 0. Of
    pairs `rows.pairs` are all ordered pairs of a prompt whose scores differ; of labels `rows.label` is 1 for a good
    completion and 0 for a bad one.

    Raises:
        DataError: every preference has to be left out.
    """
    encoded = [_tokens(preference, encoder, max_length) for preference in preferences]
    empty = [not all(tokens.completions) for tokens in encoded]
    same = [kind == "pairs" and len(t.completions) == 2 and t.completions[0] == t.completions[1] for t in encoded]
    kept = tuple(i for i in range(len(encoded)) if not empty[i] and not same[i])
    if not kept:
        what = "no completion of this batch has a token to learn from, or both sides of all pairs are the same"
        raise DataError(what, "train.max_length", "Raise it, or look at the data.")
    some, owned = [preferences[i] for i in kept], [encoded[i] for i in kept]
    group = [i for i, preference in enumerate(some) for _ in preference.completions]
    place = [k for preference in some for k in range(len(preference.completions))]
    prompts, prompt_mask = padded([owned[i].prompt for i in group], encoder.model.pad_id, left=True)
    ids, mask = padded([side for t in owned for side in t.completions], encoder.model.pad_id, left=False)
    index, position = torch.tensor([some[i].index for i in group]), torch.tensor(place)
    best = torch.tensor([flag for preference in some for flag in _best(preference.scores)])
    said = torch.tensor([score for preference in some for score in preference.ratings or preference.scores])
    rows = Rows.build(
        prompts,
        prompt_mask,
        ids,
        mask,
        data_index=index,
        row=row_ids(seed, step, index, position),
        stop=torch.full((len(group),), int(Stop.DATA)),
        group=torch.tensor(group),
        masks={NLL: mask & best[:, None]},
        columns={"score": said, "position": position},
    )
    cut_prompts = sum(t.cut_prompt * len(t.completions) for t in encoded)
    cut = Cut(cut_prompts, sum(sum(t.cut) for t in encoded), sum(empty), sum(same), kept)
    if kind == "labels":
        label = torch.tensor([float(score > 0) for preference in some for score in preference.scores])
        return rows.with_(label=label, weight=torch.tensor([float(some[i].weight) for i in group])), cut
    return rows.with_(pairs=_pairs(some)), cut


def report_cuts(session: "Session", cut: Cut, rows: int, limit: int | None) -> dict[str, float]:
    """Metrics of what was left out of a batch; what is cut or left out is said once, with numbers."""
    found = {
        "cut": (cut.prompts or cut.completions, f"{cut.completions} of {rows} completions and {cut.prompts} prompts "),
        "empty": (cut.empty, f"{cut.empty} preferences with a completion that has no token "),
        "same": (cut.same, f"{cut.same} pairs whose sides are the same once they are cut "),
    }
    for kind, (count, who) in found.items():
        if count and kind not in session.told:
            session.told.add(kind)
            what = f"are cut at {limit} tokens (train.max_length)" if kind == "cut" else "are left out"
            text = f"step {session.position.step}: {who}{what}; truncated/* counts them in every step"
            session.report("warning", {"text": text})
    return {"truncated/empty": float(cut.empty), "truncated/same": float(cut.same)}


def _tokens(preference: Preference, encoder: Encoder, max_length: int | None) -> _Tokens:
    prompt = encoder.prompt(preference.prompt)
    completions = [encoder.completion(completion) for completion in preference.completions]
    cut_prompt = encoder.cut(preference.prompt)
    if max_length is None:
        return _Tokens(prompt, completions, cut_prompt, [False] * len(completions))
    if len(prompt) >= max_length:
        room = max(1, min(max(map(len, completions)), max_length // 2))
        prompt, cut_prompt = prompt[len(prompt) - max_length + room :], True
    room = max_length - len(prompt)
    return _Tokens(prompt, [ids[:room] for ids in completions], cut_prompt, [len(ids) > room for ids in completions])


def _best(scores: Sequence[float]) -> list[bool]:
    """The first of the highest scores, where not all are the same."""
    first = scores.index(max(scores)) if len(scores) == 1 or len(set(scores)) > 1 else -1
    return [place == first for place in range(len(scores))]


def _pairs(preferences: Sequence[Preference]) -> Pairs:
    chosen: list[int] = []
    rejected: list[int] = []
    owners: list[Preference] = []
    start = 0
    for preference in preferences:
        scores = preference.scores
        own = range(len(scores))
        ordered = [(start + i, start + j) for i in own for j in own if scores[i] > scores[j]]
        chosen += [i for i, _ in ordered]
        rejected += [j for _, j in ordered]
        owners += [preference] * len(ordered)
        start += len(scores)
    return Pairs(
        chosen=torch.tensor(chosen, dtype=torch.long),
        rejected=torch.tensor(rejected, dtype=torch.long),
        measure=torch.tensor([float(p.weight) for p in owners]),
        coef=torch.ones(len(owners)),
        label=torch.tensor([float(p.probability) for p in owners]),
        offset=torch.tensor([float(p.margin) for p in owners]),
    )
