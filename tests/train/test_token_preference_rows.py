"""What the loop puts beside, or on, the rows of pairs: copies with key content deleted, and phrases that data mark."""

import json
from types import SimpleNamespace

import pytest
import torch

import keel
from keel.core.errors import DataError
from keel.core.rows import Rows, Stream
from keel.models.tiny import TinyConfig, build_tiny
from keel.recipes.registry import recipe_named
from keel.tasks.preferences import Preference
from keel.train.degraded import with_degraded
from keel.train.encode import Encoder
from keel.train.phrases import with_phrases
from keel.train.preferences import preference_rows

LETTERS = "abcdefghijklmnopqrstuvwxyz ,."
ENCODER = Encoder(build_tiny(LETTERS, TinyConfig(dim=16, layers=1, heads=2, feed_forward=16, context=128)))
DATA = [
    Preference("say ", ("red tea, hot milk", "tea"), (1.0, 0.0), 5, weight=2.0),
    Preference("go ", ("of the", "sun"), (1.0, 0.0), 9),
]


def rows_of(data: list[Preference]) -> Rows:
    return preference_rows(data, "pairs", ENCODER, None, 0, 3)[0]


def session_of(name: str, **options) -> SimpleNamespace:
    config = SimpleNamespace(seed=0, train=SimpleNamespace(max_length=None))
    return SimpleNamespace(
        method=recipe_named(name)(**options),
        config=config,
        position=SimpleNamespace(step=3),
        policy=SimpleNamespace(context_length=128),
        encoder=ENCODER,
    )


def test_copies_stand_beside_the_pairs():
    """Of "red tea, hot milk" without 0, 1 and 2 of two phrases; of "of the", which has none, no copy."""
    rows = rows_of(DATA)
    texts = [(p.prompt, text) for p in DATA for text in p.completions]
    found = with_degraded(session_of("spo_degree", shares=(0.0, 0.5, 1.0)), rows, texts)
    copies = found.select(found.stream == int(Stream.REGULARISER))
    said = [ENCODER.decode(t[m].tolist()) for t, m in zip(copies.tokens, copies.mask, strict=True)]
    assert said[0] == "red tea, hot milk" and said[1] in ("red tea, ", "red tea,", ", hot milk") and said[2] == ","
    assert copies.columns["degree"].tolist() == [0, 1, 2] and copies.weight.tolist() == [1.0, 1.0, 1.0]
    assert not set(copies.group.tolist()) & set(rows.group.tolist())
    assert len(set(found.row.tolist())) == len(found) == len(rows) + 3
    kept = found.select(found.main)
    assert kept.pairs.chosen.tolist() == rows.pairs.chosen.tolist()
    assert torch.equal(kept.tokens[:, : rows.tokens.shape[1]], rows.tokens)


def test_without_the_term_nothing_is_added():
    rows = rows_of(DATA)
    assert with_degraded(session_of("dpo"), rows, []) is rows
    assert with_degraded(session_of("spo_degree", gamma=0.0), rows, []) is rows


def test_marked_phrases():
    """Characters 4 to 6 of the chosen one, "tea", and none of the rejected one; the other pair is aligned."""
    marked = Preference("say ", ("red tea", "tea"), (1.0, 0.0), 0, columns={"chosen_phrases": [[4, 7]],
                                                                            "rejected_phrases": []})  # fmt: skip
    plain = Preference("go ", ("ab", "ac"), (1.0, 0.0), 1, columns={"chosen_phrases": None, "rejected_phrases": None})
    found = with_phrases(rows_of([marked, plain]), [marked, plain], ENCODER).masks["phrases"]
    assert found[0].int().tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    assert not found[1].any()
    assert found[2:, :3].int().tolist() == [[0, 1, 0], [0, 1, 0]] and not found[2:, 3:].any()
    assert "phrases" not in with_phrases(rows_of([plain]), [plain], ENCODER).masks


def test_marks_of_another_form():
    bad = Preference("say ", ("red tea", "tea"), (1.0, 0.0), 7, columns={"chosen_phrases": [4, 7]})
    with pytest.raises(DataError, match="preference 7, chosen_phrases"):
        with_phrases(rows_of([bad]), [bad], ENCODER)


def test_marked_phrases_through_the_loop(base, tmp_path):
    """Marks that cover nothing leave log 2 and no gradient of the preference."""
    none = {"chosen_phrases": [], "rejected_phrases": []}
    data = [{"prompt": f"{a} 2>", "chosen": f"{a}+2", "rejected": f"{a}-2", **none} for a in range(2, 9)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in data), encoding="utf-8")
    quiet = {"evaluate.before": False, "evaluate.after": False, "train.log_completions": 0, "train.batch_size": 4}
    run = keel.train("rrpo", model=base, data=str(path), runs=tmp_path / "runs", max_steps=2, **quiet, alpha=0.0)
    assert [value for _, value in run.metrics["loss"]] == pytest.approx([0.693147] * 2, abs=1e-6)
    assert [value for _, value in run.metrics["grad_norm"]] == [0.0, 0.0]
