"""Judges that are read at one token: the expectation of a digit, and which of two answers is the better one.

score = sum_v v p_v / sum_v p_v,      p_v the probability of the digit v at the first position of the answer
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from keel.core.choice import counter_seed
from keel.core.errors import ConfigError, DataError
from keel.core.registry import part
from keel.models.language import LanguageModel
from keel.parts.rewards.asking import Asker, opened, prompt_tokens
from keel.rollouts.local import evaluating
from keel.tasks.judging import check_template, conversation, filled
from keel.tasks.task import Text, completion_text

Verdict = Literal["first", "second", "tie"]
DIGITS = 10
WITH_REFERENCE = """Rate how good an answer to a question is, from 0 (useless) to 9 (as good as can be). The reference \
is a good answer. Reply with one digit.

[Question]
{prompt}

[Reference]
{reference}

[Answer]
{completion}

[Rating]
"""
WITHOUT_REFERENCE = """Rate how good an answer to a question is, from 0 (useless) to 9 (as good as can be). Reply with \
one digit.

[Question]
{prompt}

[Answer]
{completion}

[Rating]
"""
PAIRWISE = """Which of two answers to a question is better? Compare them, then end with one line: [[A]] if the first \
is better, [[B]] if the second is, [[C]] for a tie.

[Question]
{prompt}

[Answer A]
{first}

[Answer B]
{second}
"""
_SPACES = str.maketrans("", "", " \u2581\u0120")  # of a tokenizer's own marks, too
_TOKENS = 8192  # of one forward pass, padding included
_VERDICTS: Mapping[str, Verdict] = {"A": "first", "B": "second", "C": "tie", "TIE": "tie"}


def digit_tokens(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """The tokens that write each digit by themselves, with or without a space before it.

    Raises:
        ConfigError: a digit has none, so that it cannot be read at one position.
    """
    found: list[list[int]] = [[] for _ in range(DIGITS)]
    for token, number in tokenizer.get_vocab().items():
        bare = token.translate(_SPACES)
        if len(bare) == 1 and bare in "0123456789":
            found[int(bare)].append(number)
    for digit, ids in enumerate(found):
        if not ids:
            fix = "Take a model whose tokenizer has one for every digit."
            raise ConfigError(f"the tokenizer has no token for the digit {digit}", "judge", fix)
    return tuple(tuple(sorted(ids)) for ids in found)


def expected_digit(
    log_probs: Float[Tensor, "n V"], digits: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """The expectation of the digit, renormalised over the digits; and the mass that they have together.

    Without any mass nothing is known of the digit, and the expectation is the mean of all digits.

    Args:
        log_probs: log-probabilities of a position.
        digits: the tokens of each digit.

    Returns:
        Scores in [0, 9], and masses in [0, 1].
    """
    each = torch.stack([log_probs[:, list(ids)].double().logsumexp(1) for ids in digits], 1)
    mass = each.logsumexp(1)
    nothing = mass.isneginf()[:, None]
    share = torch.where(nothing, torch.zeros_like(each), each).softmax(1)
    values = torch.arange(len(digits), dtype=torch.float64, device=log_probs.device)
    return (share * values).sum(1), mass.exp()


@torch.no_grad()
def digit_scores(model: LanguageModel, prompts: Sequence[Text]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """The expected digit of each prompt, and the mass of the digits, on the CPU; long prompts first, in batches.

    Args:
        model: the judge.
        prompts: filled templates.

    Raises:
        ConfigError: a prompt longer than the model's context, or a tokenizer without digits.
    """
    digits = digit_tokens(model.tokenizer)
    ids = [prompt_tokens(model, prompt) for prompt in prompts]
    limit, longest = model.context_length, max(map(len, ids), default=0)
    if limit is not None and longest > limit:
        raise ConfigError(f"a prompt of {longest} tokens does not fit the judge's context of {limit}", "judge")
    score, mass = torch.zeros(len(ids), dtype=torch.float64), torch.zeros(len(ids), dtype=torch.float64)
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    with evaluating(model):
        while order:
            take = max(1, _TOKENS // len(ids[order[0]]))
            some, order = order[:take], order[take:]
            width = len(ids[some[0]])
            padded = torch.tensor([ids[i] + [model.pad_id] * (width - len(ids[i])) for i in some], device=model.device)
            last = torch.tensor([len(ids[i]) - 1 for i in some], device=model.device)
            with model.mixed():
                states = model.states(padded)[torch.arange(len(some), device=model.device), last]
            found = expected_digit(model.head.logits(states).float().log_softmax(-1), digits)
            score[some], mass[some] = found[0].cpu(), found[1].cpu()
    return score, mass


def judging_text(template: str, prompt: Text, completion: Text, reference: Any = None) -> str:
    """A filled template of `DigitJudge`."""
    known = {} if reference is None else {"reference": completion_text(reference)}
    return filled(template, prompt=conversation(prompt), completion=completion_text(completion), **known)


@part("digit_judge", paper=179)
@dataclass(frozen=True)
class DigitJudge:
    """Reward: the digit that a judge expects to write about a completion, in [0, 9].

    A row with an entry in the column `reference` is judged by the template with a reference. None, which is no reward,
    is given where the digits have less than `least_mass` together: the judge would have written something else.

    Args:
        path: the judge, a folder or hub name.
        template: with {prompt} and {completion}.
        with_reference: with {reference}, too.
        least_mass: of the digits.
        device: None takes the best there is.

    Raises:
        ValueError: a template that lacks a place, or least_mass outside [0, 1].

    Source: "Self-Judge: Selective Instruction Following with Alignment Self-Evaluation", 2024; the authors read the
    twenty likeliest tokens only, and digits without a space.
    """

    path: str
    template: str = WITHOUT_REFERENCE
    with_reference: str = WITH_REFERENCE
    least_mass: float = 0.0
    device: str | None = None

    def __post_init__(self) -> None:
        check_template(self.template, ("prompt", "completion"))
        check_template(self.with_reference, ("prompt", "completion", "reference"))
        if not 0 <= self.least_mass <= 1:
            raise ValueError(f"least_mass must be in [0, 1], not {self.least_mass}")

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        reference: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        known = [None] * len(completions) if reference is None else list(reference)
        texts = [
            judging_text(self.template if r is None else self.with_reference, p, c, r)
            for p, c, r in zip(prompts, completions, known, strict=True)
        ]
        scores, mass = digit_scores(opened(self.path, self.device), texts)
        sure = mass >= self.least_mass
        return [float(s) if bool(own) else None for s, own in zip(scores, sure, strict=True)]


# -- data for a judge ------------------------------------------------------------------------------------------------


def quality_label(self_score: float, similarity: float | None = None) -> int:
    """The digit that a judge is taught: its own score with a reference, and how near the answer is to the reference.

        round((score + 9 max(0, cosine)) / 2),      round(score) without a cosine; halves go up

    >>> quality_label(6.0, 0.9), quality_label(6.5)
    (7, 7)

    Args:
        self_score: in [0, 9], as `DigitJudge` gives it with a reference.
        similarity: cosine of the embeddings of answer and reference.

    Raises:
        ValueError: a score outside [0, 9], or a cosine outside [-1, 1].

    Source: "Self-Judge", 2024, which combines the two; the equal weights are chosen here.
    """
    if not 0 <= self_score <= DIGITS - 1:
        raise ValueError(f"self_score must be in [0, 9], not {self_score}")
    if similarity is not None and not -1 <= similarity <= 1:
        raise ValueError(f"similarity must be in [-1, 1], not {similarity}")
    mixed = self_score if similarity is None else (self_score + 9 * max(0.0, similarity)) / 2
    return int(mixed + 0.5)


def judge_data(
    rows: Sequence[Mapping[str, Any]], template: str = WITHOUT_REFERENCE, with_reference: str = WITH_REFERENCE
) -> list[dict[str, Any]]:
    """Rows for `keel.train("self_judge", data=...)`: both prompts of each answer, and its digit to learn.

    Args:
        rows: with `prompt`, `completion`, `reference` and `label`, a digit.
        template, with_reference: as of `DigitJudge`.

    Raises:
        DataError: a row without one of these, or a label that is no digit.
    """
    out = []
    for i, row in enumerate(rows):
        for name in ("prompt", "completion", "reference", "label"):
            if row.get(name) is None:
                raise DataError(f"row {i} has no '{name}'", "judge_data", "Each row needs it.")
        label = row["label"]
        if isinstance(label, bool) or label not in range(DIGITS):
            raise DataError(f"row {i}: the label {label!r} is no digit", "judge_data", "Give a whole number, 0 to 9.")
        texts = (row["prompt"], row["completion"])
        known = judging_text(with_reference, *texts, row["reference"])
        out.append(
            {
                "prompt": known,
                "prompt_without_reference": judging_text(template, *texts),
                "completion": str(int(label)),
            }
        )
    return out


# -- two at a time -----------------------------------------------------------------------------------------------------


def pairwise_text(prompt: Text, first: Text, second: Text, template: str = PAIRWISE) -> str:
    """A filled template that asks which of two answers is better."""
    known = {"first": completion_text(first), "second": completion_text(second)}
    return filled(template, prompt=conversation(prompt), **known)


@dataclass(frozen=True)
class PairwiseJudge:
    """P(the first completion is better), of a model that is asked about two completions in one order.

    For judges of pairs in training, which are shown each pair in both orders: 1, 0, or 1/2 for a tie, None for an
    answer that cannot be read.

    Args:
        ask: the judge, `LocalAsker` or `ServerAsker`.
        template: with {prompt}, {first} and {second}.
        seed: of answers that are drawn.

    Raises:
        ValueError: a template that lacks a place.
    """

    ask: Asker
    template: str = PAIRWISE
    seed: int = 0

    def __post_init__(self) -> None:
        check_template(self.template, ("prompt", "first", "second"))

    def __call__(
        self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        found = [verdict for verdict, _ in self.verdicts(list(zip(prompts, firsts, seconds, strict=True)))]
        known = {"first": 1.0, "second": 0.0, "tie": 0.5}
        return [None if verdict is None else known[verdict] for verdict in found]

    def verdicts(self, shown: Sequence[tuple[Text, Text, Text]]) -> list[tuple[Verdict | None, str]]:
        """What is said of each (prompt, first, second), and its text."""
        texts = [pairwise_text(*one, self.template) for one in shown]
        said = self.ask(texts, [counter_seed("verdict", self.seed, text) for text in texts])
        return [(parse_verdict(text), text) for text in said]


def parse_verdict(text: str) -> Verdict | None:
    """The last `[[A]]`, `[[B]]` or `[[C]]` of an answer, or its only word; None where it says neither.

    >>> parse_verdict("A is longer, yet [[B]]"), parse_verdict(" a."), parse_verdict("both are fine")
    ('second', 'first', None)
    """
    marked = re.findall(r"\[\[\s*(A|B|C|tie)\s*\]\]", text, re.IGNORECASE)
    if not marked:
        alone = re.fullmatch(r"\W*(A|B|C|tie)\W*", text.strip(), re.IGNORECASE)
        marked = [alone.group(1)] if alone else []
    return _VERDICTS[marked[-1].upper()] if marked else None


def both_orders(forward: Verdict | None, backward: Verdict | None) -> float | None:
    """P(first is better) of verdicts in both orders: 1 or 0 where they agree, 1/2 where they do not or one is a tie.

    `backward` is of the same two with their places exchanged. None where one of them could not be read.

    >>> both_orders("first", "second"), both_orders("first", "first"), both_orders("first", None)
    (1.0, 0.5, None)
    """
    for said in (forward, backward):
        if said is not None and said not in get_args(Verdict):
            raise ValueError(f"a verdict is one of {', '.join(get_args(Verdict))}, not {said}")
    if forward is None or backward is None:
        return None
    if (forward, backward) == ("first", "second"):
        return 1.0
    return 0.0 if (forward, backward) == ("second", "first") else 0.5
