"""Sampling and scoring with a generator whose completions are known."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from keel.core.choice import row_ids, uniforms
from keel.core.rows import Rows, Stop
from keel.evaluate.collect import collect
from keel.evaluate.evaluation import assess
from keel.rollouts.sampling import Sampling

EOS = 0


@dataclass
class Question:
    prompt: str
    index: int
    columns: dict = field(default_factory=dict)


class Digits:
    """Completes with one digit that depends on the row id alone, then EOS, or runs on for row ids that say so."""

    def __init__(self):
        self.sizes = []

    def generate(self, prompts, num_generations, sampling, *, seed, step=0, data_index=None):
        self.sizes.append(len(prompts))
        n = len(prompts) * num_generations
        group = torch.arange(len(prompts)).repeat_interleave(num_generations)
        index = torch.tensor(list(data_index))[group]
        sample = torch.arange(num_generations).repeat(len(prompts))
        row = row_ids(seed, step, index, sample)
        digit = (uniforms(row, 0) * 3).long() + 1
        clipped = uniforms(row, 1) < 0.25
        tokens = torch.stack([digit, torch.where(clipped, 5, EOS), torch.where(clipped, 5, EOS)], 1)
        mask = torch.ones(n, 3, dtype=torch.bool)
        mask[:, 2] = clipped
        return Rows.build(
            torch.ones(n, 2, dtype=torch.long),
            torch.ones(n, 2, dtype=torch.bool),
            tokens,
            mask,
            group=group,
            data_index=index,
            row=row,
            stop=torch.where(clipped, int(Stop.LENGTH), int(Stop.EOS)),
        )


@dataclass
class Scores:
    values: torch.Tensor
    names: tuple
    failed: torch.Tensor


def score(prompts, completions, completion_ids, columns, group):
    assert len(prompts) == len(completions) == len(completion_ids) == len(columns["target"]) == len(group)
    targets = columns["target"]
    right = torch.tensor([float(text[0] == str(target)) for text, target in zip(completions, targets, strict=True)])
    form = torch.tensor([0.6 if len(ids) == 2 else math.nan for ids in completion_ids])
    failed = torch.tensor([text.startswith("3") for text in completions])
    return Scores(torch.stack([right, form], 1), ("right", "form"), failed)


def questions(count):
    return [Question(f"q{i}", 100 + i, {"target": 1 + i % 2}) for i in range(count)]


def run(generator, count=6, **options):
    settings = dict(
        num_generations=4,
        sampling=Sampling(max_completion_length=3),
        seed=1,
        encode=lambda prompt: [7, 8],
        decode=lambda ids: "".join(str(i) for i in ids if i != EOS),
        answer=lambda text, example: text[:1],
    )
    return collect(generator, questions(count), score, **(settings | options))


def test_batches_do_not_change_the_samples():
    one, many = Digits(), Digits()
    whole, parts = run(one), run(many, max_rows=8)
    assert one.sizes == [6] and many.sizes == [2, 2, 2]
    assert torch.equal(torch.tensor(whole.reward).nan_to_num(-1), torch.tensor(parts.reward).nan_to_num(-1))
    assert whole.answers == parts.answers
    assert repr(whole.completions) == repr(parts.completions)
    assert whole.index == tuple(range(100, 106))


def test_numbers_agree_with_the_generator():
    found = run(Digits())
    digits = [[int(a) for a in row] for row in found.answers]
    for i, row in enumerate(digits):
        for j, digit in enumerate(row):
            if digit == 3:
                assert math.isnan(found.reward[i, j])  # a failed score is no zero
            else:
                right = float(digit == 1 + i % 2)
                assert found.reward[i, j] == pytest.approx(right + (0.0 if found.clipped[i, j] else 0.6))
    assert ((found.lengths == 3) == found.clipped).all()
    assert assess(found).errors == sum(digit == 3 for row in digits for digit in row)


def test_verdict_names_the_reward_that_tells_right_from_wrong():
    found = run(Digits(), verdict="right")
    scored = ~torch.tensor(found.reward).isnan().numpy()
    by_hand = [
        sum(a == str(1 + i % 2) for a in row) / sum(a != "3" for a in row) for i, row in enumerate(found.answers)
    ]
    assert assess(found, ks=(1,)).values["pass@1"] == pytest.approx(by_hand)
    assert scored.any(1).all()
    with pytest.raises(ValueError, match="no reward function is named 'speed'; there are right, form"):
        run(Digits(), verdict="speed")


def test_combine_replaces_the_sum():
    found = run(Digits(), combine=lambda values: values[:, 0])
    assert set(found.reward[~(found.reward != found.reward)].tolist()) <= {0.0, 1.0}


def test_statistics_are_means_over_chosen_tokens():
    def statistics(rows):
        width = rows.tokens.shape[1]
        counted = torch.arange(1.0, width + 1).expand(len(rows), -1)
        return {"entropy": counted, "kl": torch.where(rows.mask, 0.5, math.nan)}

    found = run(Digits(), statistics=statistics)
    assert found.entropy.tolist() == [[2.0 if clipped else 1.5 for clipped in row] for row in found.clipped]
    assert (found.kl == 0.5).all()


def test_a_few_completions_are_kept_and_progress_is_told():
    told = []
    found = run(Digits(), count=6, max_rows=16, keep=3, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 6), (6, 6)]
    assert [kept.index for kept in found.completions] == [100, 100, 102, 102, 104, 104]
    assert found.completions[0].prompt == "q0" and found.completions[0].text[0] == found.completions[0].answer


def test_messages_are_answered_with_messages():
    asked = Question([{"role": "user", "content": "one?"}], 0, {"target": 1})

    def see(prompts, completions, completion_ids, columns, group):
        assert prompts[0] == asked.prompt
        assert [[message["role"] for message in completion] for completion in completions] == [["assistant"]] * 2
        texts = [completion[-1]["content"] for completion in completions]
        return score(prompts, texts, completion_ids, columns, group)

    found = collect(
        Digits(),
        [asked],
        see,
        num_generations=2,
        sampling=Sampling(max_completion_length=3),
        seed=0,
        encode=lambda prompt: [7, 8],
        decode=lambda ids: "".join(str(i) for i in ids),
        answer=lambda completion, example: completion[-1]["content"],
    )
    assert found.completions[0].prompt == "78" and found.completions[0].text == found.answers[0][0]


def test_no_examples():
    with pytest.raises(ValueError, match="no examples"):
        run(Digits(), count=0)
