"""How much key content is gone: phrases, copies, and the head that tells the copies apart."""

import math
from itertools import pairwise

import pytest
import torch
from tests.worlds import outcome

from keel.core.errors import MethodError
from keel.core.rows import Rows, Stream
from keel.parts.terms.degrees import DEGREE, DeletionDegree
from keel.recipes.registry import recipe_named
from keel.statistics.functionals import Value
from keel.statistics.stats import Stats
from keel.tasks.key_phrases import WORD, deleted, key_phrases, without
from keel.train.degraded import degraded

TEXT = "The quick brown fox jumps over the lazy dog, and the quick brown fox sleeps."


def test_key_phrases():
    """Runs between stop words and commas: degree over frequency, quick brown fox 4 each, jumps 4, sleeps 4, rest 2."""
    found = key_phrases(TEXT)
    assert [(phrase.text, phrase.score) for phrase in found] == [
        ("quick brown fox jumps", 16.0),
        ("quick brown fox sleeps", 16.0),
        ("lazy dog", 4.0),
    ]
    assert [TEXT[a:b] for phrase in found for a, b in phrase.spans] == [
        "quick brown fox jumps",
        "quick brown fox sleeps",
        "lazy dog",
    ]
    twice = key_phrases("Red tea, red tea and milk")
    assert [(p.text, p.spans) for p in twice] == [("red tea", ((0, 7), (9, 16))), ("milk", ((21, 25),))]
    assert key_phrases("of the, and so.") == [] and key_phrases("") == []
    assert [p.text for p in key_phrases("(3+12)*5")] == ["3", "12", "5"]


def test_a_text_without_spans():
    assert without("a b c", [(0, 1), (4, 5)]) == "b"
    assert without("(3+12)*5", [(3, 5)]) == "(3+)*5"
    assert without("same", []) == "same"


@pytest.mark.parametrize(("count", "share", "wanted"), [(4, 0.5, 2), (3, 0.5, 2), (1, 0.25, 0), (1, 0.5, 1), (7, 0, 0)])
def test_the_number_of_deleted_phrases(count, share, wanted):
    assert deleted(count, float(share)) == wanted


def test_copies():
    """0, 1, 2 and all of 3 phrases, each copy without what the one before lacks; what is no key stays."""
    copies = degraded(TEXT, DeletionDegree(shares=(0.0, 0.25, 0.5, 1.0)), seed=3)
    assert copies[0] == TEXT
    gone = [{p.text for p in key_phrases(TEXT)} - {p.text for p in key_phrases(copy)} for copy in copies]
    assert [len(phrases) for phrases in gone] == [0, 1, 2, 3]
    assert all(a <= b for a, b in pairwise(gone))
    for copy in copies:
        assert [w for w in copy.split() if w in ("The", "over", "the", "and")] == ["The", "over", "the", "and", "the"]
    copies = degraded(TEXT, DeletionDegree(), seed=3)
    assert copies[3] is None  # round(0.75 * 3) = 2, as for a half
    assert degraded(TEXT, DeletionDegree(), seed=3) == copies
    assert len({degraded(TEXT, DeletionDegree(), seed=seed)[1] for seed in range(20)}) == 3


def test_copies_that_say_nothing_are_left_out():
    """One phrase is gone from a half on; a text without phrases has no copy."""
    assert degraded("the cat", DeletionDegree(), 0) == ["the cat", None, "the", None]
    assert degraded("of the", DeletionDegree(), 0) == [None] * 4


def test_random_deletion_takes_as_many_words():
    key = degraded(TEXT, DeletionDegree(), 1)
    chance = degraded(TEXT, DeletionDegree(deletion="random"), 1)
    for a, b in zip(key, chance, strict=True):
        assert (a is None) == (b is None) and (a is None or len(WORD.findall(a)) == len(WORD.findall(b)))
    assert chance[0] == TEXT and chance[2] != key[2]


# -- the term --------------------------------------------------------------------------------------------------------


def copies_of(logits: list[list[float]], degree: list[int], weight: list[float], wide: int = 0) -> tuple[Rows, Stats]:
    n = len(degree)
    mask = torch.arange(2 + wide) < 2
    rows = Rows.build(
        torch.zeros(n, 1, dtype=torch.long),
        torch.ones(n, 1, dtype=torch.bool),
        torch.zeros(n, 2 + wide, dtype=torch.long),
        mask.expand(n, -1),
        weight=torch.tensor(weight),
        stream=torch.full((n,), int(Stream.REGULARISER)),
        columns={DEGREE: torch.tensor(degree)},
    )
    return rows, Stats({Value("degree", where="last"): torch.tensor(logits, requires_grad=True)})


def test_at_uniform_logits_it_is_log_k():
    rows, stats = copies_of([[0.0] * 4] * 3, [0, 1, 3], [1.0, 1.0, 1.0])
    assert DeletionDegree(1.0)(rows, stats).item() == pytest.approx(1.386294, abs=5e-7)
    rows, stats = copies_of([[2.0] * 3] * 3, [0, 1, 2], [1.0, 1.0, 1.0])
    assert DeletionDegree(0.5, (0.0, 0.4, 0.8))(rows, stats).item() == pytest.approx(0.5 * math.log(3), abs=1e-6)


def test_the_cross_entropy_by_hand():
    """softmax(log 3, 0) = 3/4, 1/4: (1 (-log 3/4) + 3 (-log 1/4)) / 4, and its gradient p - onehot."""
    rows, stats = copies_of([[math.log(3), 0.0], [math.log(3), 0.0]], [0, 1], [1.0, 3.0])
    term = DeletionDegree(2.0, (0.0, 0.5))
    loss = term(rows, stats)
    assert loss.item() == pytest.approx(2 * (math.log(4 / 3) + 3 * math.log(4)) / 4, abs=1e-6)
    (grad,) = torch.autograd.grad(loss, list(stats.values()))
    torch.testing.assert_close(grad, torch.tensor([[-0.125, 0.125], [1.125, -1.125]]))
    assert term.metrics(rows, stats) == {"degree/accuracy": torch.tensor(0.5)}
    assert term.metrics(rows.with_(stream=0 * rows.stream), stats) == {}


def test_no_coefficient_is_dpo():
    assert recipe_named("spo_degree")(gamma=0.0) == recipe_named("dpo")()
    method = recipe_named("spo_degree")()
    found, wanted = outcome(method.set("terms.degree.coef", 0.0)), outcome(recipe_named("dpo")())
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.grads["policy.table"], wanted.grads["policy.table"])


def test_the_gradient_is_that_of_both_parts():
    """Of the whole: DPO's, and gamma times that of the cross-entropy, by finite differences of the policy's table."""
    method = recipe_named("spo_degree")(gamma=0.7)
    found = outcome(method)
    grad = found.grads["policy.table"].flatten()
    for place in grad.abs().topk(5).indices.tolist():
        step = torch.zeros_like(grad)
        step[place] = 1e-5
        up, down = outcome(method, nudge=step), outcome(method, nudge=-step)
        assert float(up.loss - down.loss) / 2e-5 == pytest.approx(float(grad[place]), abs=1e-8)
    alone = outcome(method.set("terms.degree.coef", 1e-30)).grads["policy.table"].flatten()
    twice = outcome(method.set("terms.degree.coef", 1.4)).grads["policy.table"].flatten()
    torch.testing.assert_close(twice - alone, 2 * (grad - alone), atol=1e-12, rtol=1e-9)
    assert bool((grad - alone).abs().max() > 1e-3) and bool(found.grads["degree.weight"].any())


def test_bad_settings():
    for settings in ({"shares": (0.0,)}, {"shares": (0.1, 0.5)}, {"shares": (0.0, 0.5, 0.5)}, {"shares": (0.0, 1.5)},
                     {"deletion": "some"}, {"copied": "rejected"}):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            DeletionDegree(**settings)
    rows, stats = copies_of([[0.0] * 3], [0], [1.0])
    with pytest.raises(MethodError, match="4 shares and a head of 3 classes"):
        DeletionDegree()(rows, stats)
