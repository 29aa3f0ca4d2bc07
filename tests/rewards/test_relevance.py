"""R3: numbers worked out by hand, the two branches, and that the usual hacks earn nothing."""

import itertools
import sys
import types

import numpy as np
import pytest

from keel.core.config import from_config, to_config
from keel.core.errors import ConfigError, UserError
from keel.parts.rewards.functions import call_reward, load_reward
from keel.parts.rewards.relevance import (
    HashedWords,
    QuantileMap,
    RelevanceReward,
    length_incentive,
    relevance,
    repetition,
)

ABC = "a b c a b c a b c"


def test_the_example():
    """9 words, LI .09; 7 trigrams of which 3 differ; relevance .8."""
    assert length_incentive(len(ABC.split())) == pytest.approx(0.09)
    assert repetition(ABC.split()) == pytest.approx(0.428571, abs=5e-7)
    assert RelevanceReward().score(0.8, ABC) == pytest.approx(0.030857, abs=5e-7)


def test_by_an_embedder_of_ones_own():
    """The vectors (1, 0) and (.8, .6) have the cosine .8, whatever their lengths."""
    vectors = {"question": [2.0, 0.0], ABC: [4.0, 3.0]}
    reward = RelevanceReward(lambda texts: np.array([vectors[text] for text in texts]))
    found = reward(prompts=["question"], completions=[ABC])
    assert found == pytest.approx([0.030857], abs=5e-7)
    closed = reward(prompts=["other"], completions=[ABC], reference=["question"])
    assert closed == pytest.approx([0.8 * 3 / 7])


@pytest.mark.parametrize("text", ["", "one", "one two"])
def test_fewer_than_three_words_repeat_nothing(text):
    assert repetition(text.split()) == 1.0


def test_different_words_repeat_nothing_and_the_cap_holds():
    words = [f"w{i}" for i in range(250)]
    assert repetition(words) == 1.0
    assert RelevanceReward().score(1.0, " ".join(words)) == 1.0
    assert RelevanceReward(cap=3.0).score(1.0, " ".join(words)) == 2.5
    assert RelevanceReward(per=500).score(1.0, " ".join(words)) == 0.5


def test_the_order_of_sentences_hardly_matters_to_repetition():
    """Only trigrams across a border change: 2 for each."""
    sentences = ["the cat sat on a mat", "dogs run in the park now", "birds fly over every house"]
    found = [repetition(" ".join(order).split()) for order in itertools.permutations(sentences)]
    assert found == [1.0] * 6


def test_copies_of_the_question_pay_no_more_than_their_length():
    question = "why is the sky blue at noon"
    reward = RelevanceReward()
    once, thrice = reward(prompts=[question] * 2, completions=[question, " ".join([question] * 3)])
    assert once == pytest.approx(0.07)
    assert thrice < 0.21 * (7 + 2) / 19 + 1e-9  # 7 trigrams and those across a border, of 19


def test_on_topic_beats_off_topic_and_forms_of_words_count():
    embed = HashedWords()
    question, near, far = embed(["walking the dogs", "the dog walks", "quarterly earnings"])
    first = relevance(question[None], near[None])[0]
    assert first > 0.3 > abs(relevance(question[None], far[None])[0])
    whole = HashedWords(letters=0)
    assert relevance(*(v[None] for v in whole(["dog", "dogs"])))[0] == 0


def test_the_embedding_does_not_depend_on_company():
    texts = ["alpha beta beta", "gamma", ""]
    together = HashedWords()(texts)
    assert np.array_equal(together, np.concatenate([HashedWords()([text]) for text in texts]))
    assert not together[2].any()
    assert relevance(together[:1], together[2:])[0] == 0.0
    assert sorted(np.abs(HashedWords(letters=0)(texts)[0][HashedWords(letters=0)(texts)[0] != 0])) == pytest.approx(
        [1.0, 1 + np.log(2)]
    )


def test_which_branch():
    reward = RelevanceReward(closed=QuantileMap((0.0, 1.0), (0.0, 0.25)))
    given = {"prompts": ["name the capital of France"] * 3, "completions": ["Paris"] * 3}
    found = reward(**given, reference=["Paris", None, "Paris"], open_ended=[None, None, True])
    assert found[0] == pytest.approx(0.25)  # F(1) * RP
    assert found[1] == found[2] < 0.01  # a word of a hundred, times a small relevance
    with pytest.raises(ConfigError, match="row 0 is a closed question"):
        reward(prompts=["x"], completions=["y"], open_ended=[False])


def test_negative_relevance_is_none():
    reward = RelevanceReward(lambda texts: np.array([[1.0 if text == "q" else -1.0] for text in texts]))
    assert reward(prompts=["q"], completions=["a b c"]) == [0.0]


def test_quantiles():
    """Uniform on [0, 1] to uniform on [0, .2]: F is a fifth; beyond the sample it stays."""
    f = QuantileMap.fit(np.linspace(0, 1, 101).tolist(), np.linspace(0, 0.2, 51).tolist())
    assert [f(v) for v in (0.0, 0.3, 0.77, 1.0, 2.0, -1.0)] == pytest.approx([0, 0.06, 0.154, 0.2, 0.2, 0.0])
    skewed = QuantileMap.fit([0.1, 0.2, 0.9, 0.95], [0.0, 0.01, 0.3, 0.31])
    values = [skewed(v) for v in np.linspace(0, 1, 50)]
    assert all(b >= a for a, b in itertools.pairwise(values))


def test_as_a_reward_function():
    found = load_reward("keel.parts.rewards.relevance:RelevanceReward")
    called = call_reward(found, ["the sky"], ["the sky"], [[1]], {"other": [3]})
    assert called == pytest.approx([0.02])
    assert from_config(to_config(RelevanceReward(cap=2.0))) == RelevanceReward(cap=2.0)


def test_a_model_of_sentence_transformers(monkeypatch):
    class Fake:
        def __init__(self, name):
            assert name == "some/model"

        def encode(self, texts, show_progress_bar):
            return [[float(len(text)), 0.0] for text in texts]

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Fake))
    assert RelevanceReward("some/model")(prompts=["q"], completions=["a b"]) == [0.02]
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="hashed"):
        RelevanceReward("another/model")(prompts=["q"], completions=["a"])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RelevanceReward(per=0.0), "per"),
        (lambda: RelevanceReward(cap=-1.0), "cap"),
        (lambda: HashedWords(size=0), "size"),
        (lambda: HashedWords(letters=-1), "letters"),
        (lambda: QuantileMap((0.0,), (1.0,)), "at least two"),
        (lambda: QuantileMap((0.0, 1.0), (1.0, 0.0)), "target"),
        (lambda: QuantileMap.fit([], [1.0]), "sample"),
        (lambda: QuantileMap.fit([1.0], [1.0], 1), "count"),
    ],
)
def test_bad_settings(make, named):
    with pytest.raises(ValueError, match=named):
        make()
