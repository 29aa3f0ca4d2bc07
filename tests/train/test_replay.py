"""Replay and rehearsal in real runs: killed and resumed, without effect where they should have none, and counted."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.promises.runs import DATA, start, write_model

from keel.core.errors import DataError, TrainingError
from keel.core.rows import REPLAYED, Rows, Stream
from keel.parts.replay.memory import from_tensors
from keel.parts.replay.rehearsal import Rehearsal
from keel.train import online

REPLAYING = {"recipe": "grpo_replay", "share": 0.5, "train.num_minibatches": 2}
REHEARSING = {"recipe": "dph_rl", "threshold": 3.0, "solved": 0.5, "samples": 2, "rehearsed": 3, "eta": 0.5}
DEFINED = {**REHEARSING, "kind": "js_by_definition", "rollout_share": 0.5}
TIMED = ("step_time", "time/rollout", "time/reward")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def metrics_of(run) -> dict:
    return {name: curve for name, curve in run.metrics.items() if name not in TIMED}


# -- killed and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [REPLAYING, REHEARSING, DEFINED], ids=["replay", "rehearsal", "by definition"])
def test_a_broken_run_ends_with_the_same_bits(model, tmp_path, settings):
    """Killed between two checkpoints; `tests/promises` kills such runs at any moment."""
    common = {"max_steps": 5, "train.save_steps": 2, **settings}

    def cut(event, facts):
        if event == "step" and facts["step"] == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        start(model, tmp_path / "killed", report=cut, **common)
    saved = tmp_path / "killed/run/checkpoint-2/keel"
    assert any(name.endswith("rows.tokens") for name in load_file(saved / "states.safetensors"))
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}
    said = []
    note = lambda event, facts: said.append(facts["text"]) if event in ("note", "phase") else None  # noqa: E731
    again = start(model, tmp_path / "killed", report=note, resume=True, **common)
    whole = start(model, tmp_path / "whole", **common)
    assert any("checkpoint-2" in text for text in said) and "samples to rehearse" not in said
    assert again.summary["checksum"] == whole.summary["checksum"]
    assert metrics_of(again) == metrics_of(whole)


# -- replay ----------------------------------------------------------------------------------------------------------


def test_no_share_is_grpo_to_the_bit(model, tmp_path):
    plain = start(model, tmp_path / "plain", "grpo", max_steps=4)
    none = start(model, tmp_path / "none", "grpo_replay", share=0.0, max_steps=4)
    held = start(model, tmp_path / "held", "grpo_replay", max_steps=4, **{"replay.past.share": 0.0})
    again = start(model, tmp_path / "again", "grpo_replay", max_steps=4, share=0.5)
    assert plain.summary["checksum"] == none.summary["checksum"] == held.summary["checksum"]
    assert metrics_of(plain) == metrics_of(none) == metrics_of(held)
    assert again.summary["checksum"] != plain.summary["checksum"]


def test_what_a_run_says_of_its_replay(model, tmp_path):
    """Two fresh groups a batch and two replayed ones, from the second batch on; the buffer grows by what is kept."""
    settings = {"share": 0.5, "keep": "all", "max_uses": 1, "max_lag": 3, "train.log_completions": 1}
    run = start(model, tmp_path, "grpo_replay", max_steps=6, **settings)
    told = {name: [value for _, value in curve] for name, curve in run.metrics.items()}
    assert told["replay/share"] == [0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert told["replay/size"] == [0, 2, 2, 2, 2, 2]  # each group is used once, in the next batch
    assert told["replay/dropped"] == [0, 2, 2, 2, 2, 2] and told["replay/lag"] == [1] * 5
    assert all(0 < value <= 1 + 1e-6 for value in told["replay/ess"]) and told["num_rows"] == [4] * 6


def test_stored_groups_are_those_that_were_drawn(model, tmp_path, monkeypatch):
    """Tokens, rewards and log-probabilities of a replayed row are, to the bit, those of the row when it was fresh."""
    batches: list[Rows] = []
    update = online.update
    monkeypatch.setattr(online, "update", lambda s, batch: (batches.append(batch), update(s, batch))[1])
    start(model, tmp_path, "grpo_replay", max_steps=4, share=0.5, keep="all", max_uses=None)
    drawn = {int(row): (b.fresh, i) for b in batches for i, row in enumerate(b.fresh.row)}
    seen = 0
    for batch in batches[1:]:
        rows = batch.rows
        again = rows.columns[REPLAYED].nonzero().flatten().tolist()
        assert rows.group[again].min() > rows.group[rows.fresh].max()
        for i in again:
            fresh, j = drawn[int(rows.row[i])]
            mine, theirs = rows.mask[i], fresh.mask[j]
            assert torch.equal(rows.tokens[i][mine], fresh.tokens[j][theirs])
            assert torch.equal(rows.logp["behaviour"][i][mine], fresh.logp["behaviour"][j][theirs])
            assert rows.reward[i] == fresh.reward[j].sum() and rows.data_index[i] == fresh.data_index[j]
            seen += 1
    assert seen == 12


def test_updates_share_what_stands_beside_the_batch():
    """Two updates: each has a replayed group and two of the four rehearsed rows, and no baseline row."""
    from types import SimpleNamespace

    stream = [0] * 6 + [1] + [0] * 4 + [2] * 4
    ids = torch.zeros(15, 1, dtype=torch.long)
    mask = torch.ones(15, 1, dtype=torch.bool)
    group = torch.tensor([0, 0, 1, 1, 2, 2, 0, 3, 3, 4, 4, 5, 6, 7, 8])
    again = torch.tensor([False] * 7 + [True] * 4 + [False] * 4)
    rows = Rows.build(ids, mask, ids, mask, group=group, stream=torch.tensor(stream), columns={REPLAYED: again})
    train = SimpleNamespace(num_minibatches=2)
    session = SimpleNamespace(config=SimpleNamespace(train=train, seed=0), position=SimpleNamespace(step=0))
    parts = online.minibatches(session, rows, 0)
    assert sorted(torch.cat(parts).tolist()) == [i for i in range(15) if i != 6]
    for part in parts:
        assert int(again[part].sum()) == 2 and int((rows.stream[part] == int(Stream.REGULARISER)).sum()) == 2
    fresh = rows.select(torch.arange(7)).with_(columns={})
    alone = online.minibatches(session, fresh, 0)
    assert [p[p < 7].tolist() for p in parts] == [p.tolist() for p in alone]


# -- rehearsal -------------------------------------------------------------------------------------------------------


def test_samples_of_the_initial_policy(model, tmp_path):
    """Drawn once, with progress, counted, in the checkpoint; nothing moves at first; solved prompts are left out."""
    said, seen = [], []

    def length(completions, prompts, **_):
        seen.append(set(prompts))
        return [float(sum(map(ord, c)) % 7) for c in completions]

    run = start(
        model,
        tmp_path,
        **{**REHEARSING, "max_steps": 6, "reward": length, "train.log_completions": 1},
        report=lambda event, facts: said.append((event, dict(facts))),
    )
    told = {name: [value for _, value in curve] for name, curve in run.metrics.items()}
    progress = [facts["done"] for event, facts in said if event == "progress"]
    assert progress == [2, 4, 6, 8] and told["rehearsal/rows"] == [3.0] * 6
    assert told["terms/rehearsal"][0] == pytest.approx(0, abs=1e-9) and told["terms/rehearsal"][-1] > 0
    assert told["rehearsal/rehearsal"][-1] == pytest.approx(2 * told["terms/rehearsal"][-1])
    states = load_file(run.path / "checkpoint-6/keel/states.safetensors")
    path = "replay.rehearsal/"
    pool = from_tensors({name.removeprefix(path): value for name, value in states.items() if name.startswith(path)})
    assert set(pool.logp) == {"behaviour", "stored"} and pool.reward is None
    torch.testing.assert_close(pool.logp["stored"], pool.logp["behaviour"], rtol=1e-4, atol=1e-4)
    facts = json.loads((run.path / "checkpoint-6/keel/state.json").read_text())["states"]["replay.rehearsal"]
    assert facts["made"] and facts["left"] == sorted(pool.data_index.tolist()) and 3 <= len(facts["left"]) < 8
    left = {DATA[i]["prompt"] for i in facts["left"]}
    assert len(seen) == 4 + 6 and not left & set.union(*seen[4:])
    drawn = told["num_tokens"][0]
    plain = start(model, tmp_path / "plain", "grpo", max_steps=1, epsilon_high=0.28)
    assert drawn > plain.metrics["num_tokens"][0][1] + int(pool.mask.sum())


def test_a_share_of_the_batches_is_compared_with_the_initial_policy(model, tmp_path):
    """Which batches, the seed says; on the others the reference does not run, so that there is no KL to it."""
    by_seed = []
    for seed in (0, 0, 1):
        run = start(model, tmp_path / str(len(by_seed)), **{**DEFINED, "max_steps": 6, "leave": False}, seed=seed)
        drawn = [step for step, value in run.metrics["controllers/terms.rollouts.coef"] if value == 0.5]
        assert drawn == [step for step, _ in run.metrics["terms/rollouts"]] == [step for step, _ in run.metrics["kl"]]
        assert 0 < len(drawn) < 6 and len(run.metrics["terms/rehearsal"]) == 6
        by_seed.append(drawn)
    assert by_seed[0] == by_seed[1] != by_seed[2]


def test_an_empty_pool_is_grpo_to_the_bit(model, tmp_path):
    warned = []
    none = start(
        model,
        tmp_path / "none",
        "dph_rl",
        max_steps=4,
        threshold=99.0,
        report=lambda event, facts: warned.append(facts["text"]) if event == "warning" else None,
    )
    plain = start(model, tmp_path / "plain", "grpo", max_steps=4, epsilon_high=0.28)
    assert none.summary["checksum"] == plain.summary["checksum"]
    assert any("nothing to rehearse" in text for text in warned)


def test_prompts_that_have_all_left(model, tmp_path):
    with pytest.raises(TrainingError, match="every prompt has left"):
        start(model, tmp_path, "dph_rl", threshold=-1.0)
    run = start(model, tmp_path / "kept", "dph_rl", threshold=-1.0, leave=False, max_steps=1)
    assert run.summary["steps"] == 1


def test_general_data(model, tmp_path):
    """RECAP: rows of two domains in proportion; their loss is an objective, and its weight reaches the coefficient."""
    file = tmp_path / "general.jsonl"
    lines = [{"prompt": f"{n} 1 2>{n}=", "completion": f"{n}+{n}", "domain": "ab"[n > 3]} for n in range(1, 7)]
    file.write_text("\n".join(json.dumps(line) for line in lines))

    def share(completions, **_):
        return [sum(map(ord, c)) % 7 / 7 for c in completions]

    settings = {"general": str(file), "general_rows": 2, "window": 2, "reward": share}
    run = start(model, tmp_path, "recap", max_steps=8, **settings)
    told = {name: [value for _, value in curve] for name, curve in run.metrics.items()}
    assert told["rehearsal/general"] == told["objectives/1"] and told["rehearsal/rows"] == [2.0] * 8
    coefs = [term / loss for term, loss in zip(told["terms/general"], told["rehearsal/general"], strict=True)]
    assert coefs[:2] == pytest.approx([0.1, 0.1]) and any(abs(c - 0.1) > 1e-4 for c in coefs[2:])
    assert told["rehearsal/general"][-1] < told["rehearsal/general"][0]
    facts = load_file(run.path / "checkpoint-8/keel/states.safetensors")
    assert sorted(facts["replay.general/rows.domain"].tolist()) == [0, 0, 0, 1, 1, 1]


def test_solutions_are_wanted(model, tmp_path):
    from keel.parts.terms.penalties import NegativeLogLikelihood, Summand
    from keel.recipes.policy_gradient import grpo

    method = grpo(num_generations=2, max_completion_length=4).adding(
        replay={"own": Rehearsal(2, "solutions")},
        terms={"own": Summand(NegativeLogLikelihood(), 0.1, stream="regulariser")},
    )
    less = {"num_generations": ..., "rollout.max_completion_length": ...}
    with pytest.raises(DataError, match="no completion to rehearse"):
        start(model, tmp_path / "none", method, **less)
    data = [{**row, "completion": row["answer"]} for row in DATA]
    run = start(model, tmp_path / "some", method, max_steps=1, data=data, **less)
    assert run.metrics["rehearsal/own"][0][1] > 1
