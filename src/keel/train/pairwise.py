"""What a judge of pairs says of the completions of a batch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from keel.core.errors import MethodError
from keel.core.plain import counted
from keel.core.rows import Rows, Stream
from keel.method import Method
from keel.parts.rewards.pairing import JUDGE, PLACE, rows_to_compare
from keel.parts.rewards.score import score
from keel.tasks.task import Text

if TYPE_CHECKING:
    from keel.train.session import Session


def judge_of(method: Method) -> str | None:
    """The pairwise judge that the parts of a method name, or None.

    Raises:
        MethodError: they name two.
    """
    named = {path: item.judge for path, item in method.parts() if getattr(item, "judge", None) is not None}
    if len(set(named.values())) > 1:
        raise MethodError(f"two judges, {' and '.join(sorted(set(named.values())))}", sorted(named)[0], "Name one.")
    return next(iter(named.values()), None)


def with_judgements(
    session: "Session",
    rows: Rows,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> tuple[Rows, Tensor, dict[str, float]]:
    """The rows with what the judge of the method says of their pairs; which groups it failed for; and metrics.

    Each pair is shown in both orders, and P(i beats j) = (p_ij + 1 - p_ji) / 2. A failure of the judge, or a number
    that is no probability, makes the group leave, as with reward functions.

    Args:
        session: whose judge.
        rows: of the round.
        prompts, completions, completion_ids: of each row.
        columns: further keyword lists, one entry for each row.
    """
    failed = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    if session.judge is None:
        return rows, failed, {}
    own = rows.to("cpu")
    place, width = _places(own)
    asking = [item for _, item in session.method.parts() if _asks(item)]
    asked = list(dict.fromkeys("beside" if getattr(i, "drawn", False) else getattr(i, "how", "all") for i in asking))
    within: Literal["all", "random"] = "random" if set(asked) <= {"random", "beside"} else "all"
    found = [rows_to_compare(own, "beside")] if "beside" in asked else []
    found += [rows_to_compare(own, within)] if set(asked) - {"beside"} else []
    first, second = (torch.cat(side) for side in zip(*found, strict=True))
    one, other = torch.cat([first, second]).tolist(), torch.cat([second, first]).tolist()
    shown = {name: [values[i] for i in one] for name, values in columns.items()}
    shown |= {"firsts": [completions[i] for i in one], "seconds": [completions[i] for i in other]}
    ids = [completion_ids[i] for i in one]
    group = own.group[torch.tensor(one, dtype=torch.long)]
    answers = score({"judge": session.judge}, [prompts[i] for i in one], shown["firsts"], ids, shown, group)
    said = answers.values[:, 0].double()
    wrong = ~said.isnan() & ((said < 0) | (said > 1))
    guilty = group[answers.failed | wrong].unique()
    if len(guilty):
        reason = f"{float(said[wrong][0]):g} is no probability" if bool(wrong.any()) else ""
        reason = reason or "; ".join(answers.messages.get("judge", [])[:1])
        left = f"{counted(len(guilty), 'group')}, which {'is' if len(guilty) == 1 else 'are'} left out"
        text = f"the judge failed for {left}: {reason}"
        session.report("warning", {"text": text})
    count = len(first)
    wins = (said[:count] + 1 - said[count:]) / 2
    table = torch.full((len(rows), width), torch.nan, dtype=torch.float64)
    table[first, place[second]], table[second, place[first]] = wins, 1 - wins
    rows = rows.with_(
        features={**rows.features, JUDGE: table.to(rows.weight.dtype).to(rows.device)},
        columns={**rows.columns, PLACE: place.to(rows.device)},
    )
    agreed = wins[~wins.isnan()]
    swayed = (said[:count] - (1 - said[count:])).abs()
    metrics = {"judge/pairs": float(count), "judge/errors": float(len(guilty))}
    if len(agreed):  # 0 for a judge that does not mind the order
        metrics["judge/order_gap"] = float(swayed[~wins.isnan()].mean())
    return rows, torch.isin(own.group, guilty).to(rows.device), metrics


def _asks(item: Any) -> bool:
    return getattr(item, "judge", None) is not None


def _places(rows: Rows) -> tuple[Tensor, int]:
    """The place of each row within its group, -1 for one that is not compared; and the size of the largest group."""
    compared = (rows.stream == int(Stream.MAIN)) | (rows.stream == int(Stream.CANDIDATE))
    before = (rows.group[:, None] == rows.group[None]).tril(-1) & compared[None]
    place = torch.where(compared, before.sum(1), -1)
    return place, int(rows.group.unique(return_counts=True)[1].max())
