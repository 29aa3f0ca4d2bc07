"""Labelling completions by a judge: from a file of prompts with completions to one that preference methods learn from.

    PATH                     what was decided, one line an item, in the order of the data; --resume appends
    PATH.undecided.jsonl     ties, what could not be read, and failures, each with its reason and what the judge said
    PATH.judge.json          the settings, so that nobody goes on with another judge

Every item ends up in one of the two files of lines, and the summary counts them.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from keel.core.errors import ConfigError, DataError
from keel.parts.rewards.asking import Asker, LocalAsker, ServerAsker, opened
from keel.parts.rewards.functions import call_reward, check_columns
from keel.parts.rewards.generative_judge import GenerativeJudge
from keel.parts.rewards.judges import PAIRWISE, WITHOUT_REFERENCE, DigitJudge, PairwiseJudge, both_orders, digit_tokens
from keel.parts.rewards.named import guarded
from keel.parts.rewards.score import score
from keel.tasks.data import DataTask
from keel.tasks.judging import check_template
from keel.train.judgements import (
    FAILED,
    Counts,
    Item,
    Judged,
    Rules,
    Ties,
    begin,
    check_target,
    read_items,
    undecided_name,
    write,
)
from keel.train.session import Reporter, silent
from keel.train.setup import model_source

How = Literal["pairwise", "scores", "digit"]
Ask = Callable[[Sequence[Item], Counts], list[Judged]]
PLACES = {
    "pairwise": ("prompt", "first", "second"),
    "scores": ("query", "responses"),
    "digit": ("prompt", "completion"),
}


def judge(
    data: Any,
    path: str | Path,
    reward: Any = None,
    *,
    model: Any = None,
    server: str | None = None,
    served: str | None = None,
    how: How = "pairwise",
    template: str | None = None,
    num_samples: int = 1,
    temperature: float = 0.0,
    max_completion_length: int = 512,
    ties: Ties = "apart",
    threshold: float | None = None,
    least_gap: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    timeout: float = 60.0,
    resume: bool = False,
    report: Reporter = silent,
) -> dict[str, float]:
    """Judge completions and write preferences for `keel train dpo --data` (or kto, reward models, ...).

    Two completions become `chosen` and `rejected`, and single ones `score`, or with a threshold `label`. Where any item
    has more than two, all become `completions` with `scores`, the best first. Columns of an earlier judgement
    (`JUDGEMENTS`) are given to a reward function, and are not written; all others are.

    Args:
        data: rows with `prompt` and `completions`, `chosen` and `rejected` (to be judged anew), or `completion`.
        path: the file to write.
        reward: the judge as a reward: `module:function`, a reward model's folder, a callable.
        model: the judge as a language model: a folder, a run's folder, a hub name.
        server: the judge as a model behind an OpenAI-compatible address.
        served: its name there.
        how: a language model compares each two completions in both orders (pairwise), writes scores of all
            (scores), or is read at a digit (digit; local models only). A single completion cannot be compared.
        template: of the question, with {prompt}, {first} and {second} for pairwise, {query} and {responses} for scores,
            {prompt} and {completion} for a digit; None takes Keel's.
        num_samples: judgements of an item for `scores`, each in another order.
        temperature, max_completion_length: of the judge's answers.
        ties: apart puts them with the undecided; half writes them as pairs with `probability` 0.5, and the gap of the
            scores of all pairs as `margin` in place of both scores; lists get equal scores.
        threshold: score from which on a single completion is labelled good; None writes the score.
        least_gap: difference of scores up to which two completions are tied.
        seed: of drawn answers and of orders.
        batch_size: items that are judged and written together.
        timeout: seconds for a call of a reward function.
        resume: go on with a file that is there; what it has is not judged again, but for those whose judge failed,
            whose lines then stand last.
        report: called with (event, facts).

    Returns:
        Counts: items, decided, ties, unparsable, failed, resumed; of pairwise judges the pairs asked and those for
        which the two orders disagree; of data that were ordered the share that the judge agrees with.

    Raises:
        ConfigError: not one judge, a setting out of range, a template that lacks a place, no file can be written
            there, the file exists, or another judge has begun it. Nothing is written before the judge stands.
        DataError: malformed rows, all of them named; or single completions beside several.
    """
    chosen = [name for name, given in (("reward", reward), ("model", model), ("server", server)) if given is not None]
    if len(chosen) != 1:
        raise ConfigError(f"name one judge, not {' and '.join(chosen) or 'none'}", "judge", "reward, model or server.")
    _check(how, ties, batch_size, least_gap, num_samples, server)
    _check_template(template, how, reward)
    items = read_items(data)
    _check_sizes(items, how if reward is None else None)
    target, lists = Path(path), any(len(item.completions) > 2 for item in items)
    settings = {"judge": str(reward or model or server), "served": served, "how": None if reward else how,
                "template": template, "num_samples": num_samples, "temperature": temperature,
                "max_completion_length": max_completion_length, "ties": ties, "threshold": threshold,
                "least_gap": least_gap, "seed": seed, "lists": lists}  # fmt: skip
    check_target(target, settings, resume)
    rules = Rules(ties, threshold, least_gap, lists)
    counts = Counts(dict.fromkeys(("items", "decided", "ties", "unparsable", "failed", "resumed"), 0))
    asker = _asker(model, server, served, temperature, max_completion_length, report)
    function = None if reward is None else guarded(reward, timeout)
    try:
        if function is not None:
            check_columns("judge", function, sorted({name for item in items for name in item.columns}))
        ask = _by_function(function) if asker is None else _by_model(asker, how, template, num_samples, seed)
        done = begin(target, settings, resume)
        left = [item for item in items if item.key not in done]
        counts.add("items", len(items))
        counts.add("resumed", len(items) - len(left))
        report("phase", {"name": "judge", "steps": None, "text": f"judging {len(left)} items"})
        for start in range(0, len(left), batch_size):
            some = left[start : start + batch_size]
            write(target, some, ask(some, counts), counts, rules)
            report("progress", {"done": start + len(some), "total": len(left)})
    finally:
        if (close := getattr(function, "close", None)) is not None:
            close()
    if said := counts.undecided(undecided_name(target), lists):
        report("warning", {"text": said})
    return _summary(counts)


# -- judging -----------------------------------------------------------------------------------------------------------


def _by_function(function: Any) -> Ask:
    return lambda items, counts: _by_reward(function, items)


def _by_model(asker: Asker, how: How, template: str | None, num_samples: int, seed: int) -> Ask:
    """How a language model judges."""
    if how == "pairwise":
        pairwise = PairwiseJudge(asker, PAIRWISE if template is None else template, seed)
        return lambda items, counts: _pairwise(pairwise, items, counts)
    if how == "scores":
        generative = GenerativeJudge(asker, num_samples, template, seed=seed)
        return lambda items, counts: _by_scores(generative, items)
    assert isinstance(asker, LocalAsker)
    digit = DigitJudge(asker.path, WITHOUT_REFERENCE if template is None else template)
    digit_tokens(opened(asker.path, asker.device).tokenizer)
    return lambda items, counts: _by_digit(digit, items)


def _by_reward(function: Any, items: Sequence[Item]) -> list[Judged]:
    flat = [(i, completion) for i, item in enumerate(items) for completion in item.completions]
    names = sorted({name for item in items for name in item.columns})
    columns = {name: [items[i].columns.get(name) for i, _ in flat] for name in names}
    prompts, texts = [items[i].prompt for i, _ in flat], [completion for _, completion in flat]
    group = [i for i, _ in flat]
    found = score({"judge": function}, prompts, texts, [[]] * len(flat), columns, group)
    reason = "; ".join(found.messages.get("judge", [])[:1])
    out = []
    for i in range(len(items)):
        own = [place for place, number in enumerate(group) if number == i]
        values = [float(found.values[place, 0]) for place in own]
        if any(bool(found.failed[place]) for place in own):
            out.append(Judged(None, FAILED, (reason,)))
        elif any(math.isnan(value) for value in values):
            out.append(Judged(None, "unparsable", ("the reward does not apply",)))
        else:
            out.append(Judged(tuple(values)))
    return out


def _pairwise(judge: PairwiseJudge, items: Sequence[Item], counts: Counts) -> list[Judged]:
    pairs = [
        (i, a, b) for i, item in enumerate(items) for a, b in itertools.combinations(range(len(item.completions)), 2)
    ]
    shown = []
    for i, a, b in pairs:
        first, second = items[i].completions[a], items[i].completions[b]
        shown += [(items[i].prompt, first, second), (items[i].prompt, second, first)]
    verdicts = judge.verdicts(shown)
    counts.add("asked", len(verdicts))
    counts.add("first_wins", sum(verdict == "first" for verdict, _ in verdicts))
    wins = [[0.0] * len(item.completions) for item in items]
    unread, said = [False] * len(items), [[] for _ in items]  # type: ignore[var-annotated]
    for k, (i, a, b) in enumerate(pairs):
        (forward, one), (backward, other) = verdicts[2 * k], verdicts[2 * k + 1]
        said[i] += [one, other]
        p = both_orders(forward, backward)
        if p is None:
            unread[i] = True
            continue
        counts.add("inconsistent", int(p == 0.5 and (forward, backward) != ("tie", "tie")))
        wins[i][a] += p / (len(wins[i]) - 1)
        wins[i][b] += (1 - p) / (len(wins[i]) - 1)
    return [
        Judged(None, "unparsable", tuple(said[i])) if unread[i] else Judged(tuple(wins[i]), "", tuple(said[i]), False)
        for i in range(len(items))
    ]


def _by_scores(judge: GenerativeJudge, items: Sequence[Item]) -> list[Judged]:
    found = judge.judge([(item.prompt, item.completions) for item in items])
    return [
        Judged(tuple(said.samples.double().mean(0).tolist()), "", tuple(said.texts))
        if len(said.samples)
        else Judged(None, "unparsable", tuple(said.texts))
        for said in found
    ]


def _by_digit(judge: DigitJudge, items: Sequence[Item]) -> list[Judged]:
    flat = [(item, completion) for item in items for completion in item.completions]
    columns = {"reference": [item.columns.get("reference") for item, _ in flat]}
    values = iter(call_reward(judge, [i.prompt for i, _ in flat], [c for _, c in flat], [[]] * len(flat), columns))
    out = []
    for item in items:
        own = [next(values) for _ in item.completions]
        known = [value for value in own if value is not None]
        out.append(Judged(tuple(known)) if len(known) == len(own) else Judged(None, "unparsable"))
    return out


def _summary(counts: Counts) -> dict[str, float]:
    found = {name: float(value) for name, value in counts.known.items()}
    asked, ordered = found.get("asked", 0.0), found.pop("ordered", 0.0)
    if asked:
        found["first_wins"] /= asked
    if ordered:
        found["agrees"] /= ordered
    return found


# -- the judge ---------------------------------------------------------------------------------------------------------


def _check(how: How, ties: Ties, batch_size: int, least_gap: float, num_samples: int, server: str | None) -> None:
    for name, value, known in (("how", how, ("pairwise", "scores", "digit")), ("ties", ties, ("apart", "half"))):
        if value not in known:
            raise ConfigError(f"must be one of {', '.join(known)}, not '{value}'", f"--{name}")
    if batch_size < 1 or num_samples < 1:
        raise ConfigError("must be at least 1", "--batch-size" if batch_size < 1 else "--num-samples")
    if not least_gap >= 0:
        raise ConfigError(f"must not be negative, got {least_gap}", "--least-gap")
    if how == "digit" and server is not None:
        raise ConfigError("a digit is read in the model's probabilities, which needs a local one", "--how", "--model.")


def _check_template(template: str | None, how: How, reward: Any) -> None:
    if template is None:
        return
    if reward is not None:
        what = "is a question to a language model, and a reward is asked none"
        raise ConfigError(what, "--template", "Leave it out.")
    try:
        check_template(template, PLACES[how])
    except ValueError as error:
        places = ", ".join(f"{{{name}}}" for name in PLACES[how])
        raise ConfigError(str(error), "--template", f"For --how {how} it needs {places}.") from error


def _check_sizes(items: Sequence[Item], how: How | None) -> None:
    alone = sum(len(item.completions) < 2 for item in items)
    if alone and how == "pairwise":
        fix = "Take --how digit or --how scores."
        raise ConfigError(f"{alone} items have one completion, and pairwise compares two", "--how", fix)
    if 0 < alone < len(items):
        what = f"{alone} items have one completion, and {len(items) - alone} have more; one data set has one form"
        raise DataError(what, "judge", "Judge them in two files.")


def _asker(
    model: Any, server: str | None, served: str | None, temperature: float, length: int, report: Reporter
) -> Asker | None:
    try:
        if server is not None:
            return ServerAsker(server, served, temperature, length).prepare()
        if model is None:
            return None
        place = str(model_source(str(model), DataTask("judge", (), ()), report))
        asker = LocalAsker(place, temperature, length)
    except ValueError as error:
        raise ConfigError(str(error), "judge") from error
    opened(asker.path, asker.device)
    return asker
