"""Parallel-distil-refine: budgets, what a round reads, plain sampling as its limit, a world where copying is enough."""

import pytest
import torch
from tests.rollouts.architectures import model

from keel.core.choice import row_ids, uniforms
from keel.core.rows import Rows, Stop
from keel.rollouts.local import LocalGenerator
from keel.rollouts.refine import (
    BestDrafts,
    ParallelDistilRefine,
    RandomDrafts,
    Summary,
    Template,
    success_of_copy,
    written,
)
from keel.rollouts.sampling import Sampling

EOS, RIGHT, WRONG, MARK = 0, 1, 2, 9


class Writer:
    """Writes as many tokens as it may. The first is right by a coin, or because it sees a right one in its prompt."""

    def __init__(self, p: float = 0.0, end: bool = False):
        self.p, self.end, self.calls = p, end, []

    def generate(self, prompts, num_generations, sampling, *, seed, step=0, data_index=None):
        self.calls.append((list(prompts), num_generations, sampling.max_completion_length))
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        length = torch.tensor([len(p) for p in prompts])
        group = torch.arange(len(prompts)).repeat_interleave(num_generations)
        index = torch.tensor(list(data_index))[group]
        row = row_ids(seed, step, index, torch.arange(num_generations).repeat(len(prompts)))
        knows = (ids == RIGHT).any(1)[group] | (uniforms(row, 0) < self.p)
        tokens = torch.full((len(group), sampling.max_completion_length), 5)
        tokens[:, 0] = torch.where(knows, RIGHT, WRONG)
        tokens[:, -1] = EOS if self.end else tokens[:, -1]
        mask = torch.arange(width) >= width - length[:, None]
        stop = torch.full_like(row, int(Stop.EOS if self.end else Stop.LENGTH))
        known = {"row": row, "group": group, "data_index": index, "stop": stop}
        return Rows.build(ids[group], mask[group], tokens, torch.ones_like(tokens, dtype=torch.bool), **known)


def right(rows) -> torch.Tensor:
    return (rows.tokens[:, 0] == RIGHT).double()


def test_budgets_of_the_worked_example():
    writer = Writer()
    refine = ParallelDistilRefine(Summary(), (8, 4, 1), room=1000)
    found = refine(writer, [[7] * 500, [8] * 500], Sampling(max_completion_length=4000), seed=0)
    assert found.sequential.tolist() == [66_500] * 2 and found.total.tolist() == [114_500] * 2
    assert found.context.tolist() == [500 + 32_000] * 2
    assert [(len(prompts[0]), n, length) for prompts, n, length in writer.calls] == [
        (500, 8, 4000),
        (32_500, 1, 1000),
        (1500, 4, 4000),
        (16_500, 1, 1000),
        (1500, 1, 4000),
    ]
    assert len(found.rows) == 2 and found.rows.prompt_mask.sum(1).tolist() == [1500] * 2
    assert found.rows.lengths.tolist() == [4000] * 2  # the workspace is prompt: no loss counts it


@pytest.mark.parametrize("rounds", [(1,), (3, 1), (3, 3, 1), (3, 3, 3, 3, 1)])
def test_no_call_reads_more_however_many_rounds_there_are(rounds):
    refine = ParallelDistilRefine(Summary(), rounds, room=7)
    found = refine(Writer(), [[7] * 5], Sampling(max_completion_length=10), seed=0)
    assert int(found.context) <= 5 + max(7, 3 * 10)
    drafts, calls = sum(rounds[:-1]), len(rounds) - 1
    assert int(found.total) == drafts * 10 + calls * 7 + 10 + 5 * (drafts + calls + 1) + calls * 30 + 7 * (
        (drafts - rounds[0] if calls else 0) + (1 if calls else 0)
    )


def test_an_extract_costs_no_call_and_unequal_drafts_the_longest():
    class Uneven(Writer):
        def generate(self, *args, **options):
            rows = super().generate(*args, **options)
            keep = torch.arange(rows.tokens.shape[1]) < 1 + rows.row[:, None] % 4
            return rows.with_(mask=rows.mask & keep)

    writer = Uneven()
    refine = ParallelDistilRefine(BestDrafts(right, 1), (6, 1), room=2)
    found = refine(writer, [[7] * 5], Sampling(max_completion_length=4), seed=3)
    assert len(writer.calls) == 2
    lengths = Uneven().generate([[7] * 5], 6, Sampling(max_completion_length=4), seed=3, data_index=[0]).lengths
    last = int(found.rows.lengths)
    best = min(2, int(lengths[0]))  # all equally wrong: the first
    assert int(found.sequential) == 5 + int(lengths.max()) + 5 + best + last
    assert int(found.total) == 30 + int(lengths.sum()) + 5 + best + last
    assert lengths.unique().numel() > 1


def test_one_round_of_one_draft_is_plain_sampling():
    policy = model("llama")
    generator, sampling = LocalGenerator(policy), Sampling(max_completion_length=6)
    prompts = [[5, 6, 7], [9]]
    plain = generator.generate(prompts, 1, sampling, seed=4, step=2, data_index=[3, 8])
    refine = ParallelDistilRefine(Summary(), (1,))
    found = refine(generator, prompts, sampling, seed=4, step=2, data_index=[3, 8])
    for name in ("tokens", "mask", "prompt_ids", "row", "group", "data_index", "stop"):
        assert torch.equal(getattr(found.rows, name), getattr(plain, name))
    assert found.total.tolist() == (plain.prompt_mask.sum(1) + plain.lengths).tolist() == found.sequential.tolist()


def test_a_model_refines_and_its_rows_can_be_trained_on():
    policy = model("qwen3")
    refine = ParallelDistilRefine(
        Summary(Template((6,), (7,), (8,))), (3, 1), room=5, template=Template((4,), (), (9,))
    )
    found = refine(LocalGenerator(policy), [[5, 6], [9]], Sampling(max_completion_length=6), num_generations=4, seed=0)
    assert found.rows.group.tolist() == [0] * 4 + [1] * 4 and len(found.rows.row.unique()) == 8
    assert policy.hidden(found.rows).shape[:2] == found.rows.tokens.shape
    first = found.rows.prompt_ids[0][found.rows.prompt_mask[0]].tolist()
    assert first[:3] == [5, 6, 4] and first[-1] == 9 and len(first) <= 2 + 1 + 5 + 1


@pytest.mark.parametrize(("p", "k"), [(0.2, 1), (0.2, 4), (0.5, 2)])
def test_a_reader_that_copies_any_right_draft_that_it_sees(p, k):
    class Reader(Writer):
        """Drafts by coins, then copies only."""

        def generate(self, prompts, *args, **options):
            self.p = p if len(prompts[0]) == 1 else 0.0
            return super().generate(prompts, *args, **options)

    runs = 2000
    refine = ParallelDistilRefine(RandomDrafts(k), (6, 1), room=k, extract=lambda text: text[:1])
    found = refine(Reader(), [[7]] * runs, Sampling(max_completion_length=2), seed=1)
    share = float(right(found.rows).mean())
    assert share == pytest.approx(success_of_copy(p, k), abs=4 * 0.5 / runs**0.5)
    assert success_of_copy(0.2, 4) == pytest.approx(0.5904) and success_of_copy(0.2, 1) == pytest.approx(0.2)
    verified = ParallelDistilRefine(BestDrafts(right, 1), (6, 1), room=1, extract=lambda text: text[:1])
    found = verified(Reader(), [[7]] * runs, Sampling(max_completion_length=2), seed=1)
    assert float(right(found.rows).mean()) == pytest.approx(success_of_copy(p, 6), abs=4 * 0.5 / runs**0.5)


def test_random_drafts_differ_between_readers_and_within_one():
    writer = Writer(0.5)
    refine = ParallelDistilRefine(RandomDrafts(2), (8, 6, 1), room=6, template=Template((MARK,), (), (MARK,)))
    found = refine(writer, [[7], [8]], Sampling(max_completion_length=3), seed=2, data_index=[4, 5])
    assert found.rows.data_index.tolist() == [4, 5] and found.rows.group.tolist() == [0, 1]
    middle = writer.calls[1][0]
    assert len(middle) == 12 and [text[0] for text in middle] == [7] * 6 + [8] * 6
    assert all(len(text) == 1 + 6 + 2 and text[1] == text[-1] == MARK for text in middle)
    assert len(set(middle[:6])) > 1
    drawn = writer.generate([[7]], 8, Sampling(max_completion_length=3), seed=2, data_index=[4])
    pieces = {tuple(text) for text in drawn.tokens.tolist()}
    assert all(tuple(text[2:5]) in pieces and tuple(text[5:8]) in pieces for text in middle[:6])


def test_drafts_are_cut_to_their_ends_and_the_best_come_first():
    class Numbered(Writer):
        def generate(self, prompts, num_generations, sampling, **options):
            rows = super().generate(prompts, num_generations, sampling, **options)
            tokens = torch.arange(len(rows))[:, None] * 10 + torch.arange(rows.tokens.shape[1])
            return rows.with_(tokens=tokens + 20)

    writer = Numbered()
    score = lambda rows: torch.tensor([0.0, float("nan"), 2.0, 1.0])  # noqa: E731
    refine = ParallelDistilRefine(BestDrafts(score, 2, Template(between=(3,))), (4, 1), room=7)
    refine(writer, [[7]], Sampling(max_completion_length=6), seed=0)
    assert writer.calls[1][0] == [(7, 43, 44, 45, 3, 53, 54, 55)]


def test_the_token_that_ends_a_draft_is_not_read_on():
    rows = Writer(end=True).generate([[7]], 1, Sampling(max_completion_length=3), seed=0, data_index=[0])
    assert written(rows) == [(WRONG, 5)]
    assert written(rows.with_(stop=torch.tensor([int(Stop.LENGTH)]))) == [(WRONG, 5, EOS)]


def test_settings_out_of_range():
    for rounds in ((), (2,), (0, 1), (1, 2)):
        with pytest.raises(ValueError, match="rounds"):
            ParallelDistilRefine(Summary(), rounds)
    with pytest.raises(ValueError, match="room"):
        ParallelDistilRefine(Summary(), room=0)
    for distil in (BestDrafts, RandomDrafts):
        with pytest.raises(ValueError, match="k must"):
            distil(*([right] if distil is BestDrafts else []), k=0)
