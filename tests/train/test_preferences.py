"""Learning from comparisons: rows, built-in preferences, held-out numbers, precomputed references, what is shown."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tests.train.judging import plus

from keel.core.errors import ConfigError, DataError
from keel.models.language import LanguageModel
from keel.models.load import load
from keel.models.sources import EMA
from keel.recipes.registry import recipe_named
from keel.store.store import Store
from keel.tasks.preferences import Preference
from keel.train.comparisons import Drawn, built_in_preferences
from keel.train.encode import Encoder
from keel.train.lifecycle import Stopped
from keel.train.preferences import preference_rows

PAIRS = [
    {"prompt": f"{n} {n + 1} 3>{2 * n + 4}=", "chosen": f"{n}+{n + 1}+3", "rejected": f"{n + 1}-{n}*3"}
    for n in range(1, 25)
]
TIMED = ("step_time",)


@pytest.fixture(scope="module")
def policy(base) -> LanguageModel:
    return load(base)


@pytest.fixture(scope="module")
def encoder(policy) -> Encoder:
    return Encoder(policy)


def preference(prompt="1 2>3=", completions=("1+2", "2-1"), scores=(1.0, 0.0), **more):
    return Preference(prompt, completions, scores, 0, **more)


def dpo(train, **settings):
    """A short run of `dpo` on the pairs above, without the settings of online methods."""
    import keel

    given = {"data": PAIRS, "train.batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "name": "run"}
    return keel.train(
        "dpo",
        **{**given, "evaluate.before": False, "evaluate.after": False, "train.log_completions": 0, **settings, **train},
    )


@pytest.fixture
def where(base, tmp_path):
    return {"model": base, "runs": tmp_path / "runs"}


# Rows


def test_rows_of_pairs(encoder):
    rows, cut = preference_rows(
        [preference(weight=2.0, margin=0.5, probability=0.8), preference(completions=("2", "22"))],
        "pairs", encoder, None, 0, 0,
    )  # fmt: skip
    assert [encoder.decode(ids[mask]) for ids, mask in zip(rows.tokens, rows.mask, strict=True)] == [
        "1+2", "2-1", "2", "22",
    ]  # fmt: skip
    # every completion ends with one end token
    ends = torch.isin(rows.tokens, torch.tensor(encoder.model.eos_ids)) & rows.mask
    assert ends.sum(1).tolist() == [1, 1, 1, 1]
    assert rows.pairs.chosen.tolist() == [0, 2]
    assert rows.pairs.rejected.tolist() == [1, 3]
    assert rows.pairs.measure.tolist() == [2.0, 1.0]
    assert rows.pairs.offset.tolist() == [0.5, 0.0]
    assert torch.allclose(rows.pairs.label, torch.tensor([0.8, 1.0]))
    assert rows.group.tolist() == [0, 0, 1, 1]
    assert rows.masks["nll"].any(1).tolist() == [True, False, True, False]
    assert (cut.prompts, cut.completions, cut.empty, cut.same) == (0, 0, 0, 0)


def test_rows_of_lists_compare_all_that_differ(encoder):
    rows, _ = preference_rows(
        [preference(completions=("1", "2", "3"), scores=(1.0, 5.0, 1.0))], "lists", encoder, None, 0, 0
    )
    assert list(zip(rows.pairs.chosen.tolist(), rows.pairs.rejected.tolist(), strict=True)) == [(1, 0), (1, 2)]
    assert rows.columns["score"].tolist() == [1.0, 5.0, 1.0]


def test_ratings_stand_beside_the_order(encoder):
    rows, _ = preference_rows([preference(ratings=(3.0, 4.0))], "pairs", encoder, None, 0, 0)
    assert rows.columns["score"].tolist() == [3.0, 4.0]
    assert rows.pairs.chosen.tolist() == [0]


def test_completions_are_cut_before_prompts(encoder):
    """The prompt has 6 tokens, the completions 4 and 8 with their end tokens."""
    long = preference(completions=("1+2", "2-1+1+1"))
    rows, cut = preference_rows([long], "pairs", encoder, 10, 0, 0)
    assert rows.prompt_mask.sum(1).tolist() == [6, 6]
    assert rows.lengths.tolist() == [4, 4]
    assert (cut.prompts, cut.completions) == (0, 1)
    # a prompt that leaves no token loses its beginning, up to half of the limit
    rows, cut = preference_rows([long], "pairs", encoder, 6, 0, 0)
    assert rows.prompt_mask.sum(1).tolist() == [3, 3]
    assert encoder.decode(rows.prompt_ids[0][rows.prompt_mask[0]]) == ">3="
    assert rows.lengths.tolist() == [3, 3]
    assert (cut.prompts, cut.completions) == (2, 2)


def test_pairs_with_nothing_to_compare_are_left_out_and_counted(encoder):
    alike = preference(completions=("1+2+3", "1+2-3"))
    rows, cut = preference_rows([alike, preference()], "pairs", encoder, 9, 0, 0)
    assert (cut.same, cut.kept) == (1, (1,))
    assert len(rows) == 2
    with pytest.raises(DataError, match=r"train\.max_length"):
        preference_rows([alike], "pairs", encoder, 9, 0, 0)


def test_what_is_cut_is_said_once(where):
    said = []
    run = dpo(where, **{"train.max_length": 14}, report=lambda event, facts: said.append((event, facts)))
    warnings = [facts["text"] for event, facts in said if event == "warning"]
    assert len([text for text in warnings if "cut at 14 tokens" in text]) == 1
    assert "truncated/* counts them" in warnings[0]
    assert sum(value for _, value in run.metrics["truncated/completions"]) > 0


# Runs


def test_metrics_of_a_step_are_those_of_the_definition(where, policy):
    run = dpo(where, max_steps=1, **{"train.batch_size": 24, "task.held_out": 0.0})
    first = {name: curve[0][1] for name, curve in run.metrics.items()}
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    encoder = Encoder(policy)
    for side in ("chosen", "rejected"):
        total = 0.0
        for row in PAIRS:
            prompt, answer = encoder.prompt(row["prompt"]), encoder.completion(row[side])
            with torch.no_grad():
                logits = policy.module(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            total += sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        assert first[f"logps/{side}"] == pytest.approx(total / len(PAIRS), abs=1e-4)


def test_held_out_pairs_of_several_domains(where):
    """What the two say of themselves is the mean of the whole, weighted by pairs; one domain is not told apart."""
    rows = [{**row, "domain": "odd" if i % 2 else "even"} for i, row in enumerate(PAIRS)]
    known = {"max_steps": 1, "evaluate.after": True, "task.held_out": 0.25}
    values = dpo(where, data=rows, **known).evaluations["after"].values
    for metric in ("rewards/accuracies", "rewards/margins"):
        of = [[v for v in values[f"{metric}/{name}"] if v == v] for name in ("even", "odd")]
        assert len(of[0]) + len(of[1]) == 6 and min(map(len, of)) > 0
        assert sum(map(sum, of)) == pytest.approx(sum(values[metric]))
    assert not any("/even" in name for name in dpo(where, name="one", **known).evaluations["after"].metrics)


def test_held_out_pairs_are_measured_before_during_and_after(where):
    settings = {"evaluate.before": True, "evaluate.after": True, "train.eval_steps": 6, "task.held_out": 0.25}
    run = dpo(where, max_steps=12, **settings)
    before, after = run.summary["before"], run.summary["after"]
    assert before["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("displacement/chosen", "displacement/rejected", "kl/held_out", "rewards/margins"):
        assert before[name][0] == pytest.approx(0, abs=1e-6), name
    assert after["loss"][0] < before["loss"][0]
    assert after["rewards/margins"][0] > 0.01
    assert after["kl/held_out"][0] > 0
    moved = after["logps/chosen"][0] - before["logps/chosen"][0]
    assert after["displacement/chosen"][0] == pytest.approx(moved, abs=1e-4)
    assert after["rewards/chosen"][0] == pytest.approx(0.1 * moved, abs=1e-5)
    assert run.evaluations["after"].prompts == 6
    with Store(where["runs"] / "keel.sqlite", readonly=True) as store:
        phases = [(e.step, e.phase) for e in store.evaluations(store.run("run").id)]
    assert phases == [(0, "before"), (6, "during"), (12, "after")]
    assert "displacement/chosen" in (run.path / "report.html").read_text()


def test_data_in_memory_and_data_sets(where):
    from datasets import Dataset

    one = dpo({**where, "name": "one"}, max_steps=1)
    other = dpo({**where, "name": "other", "data": Dataset.from_list(PAIRS)}, max_steps=1)
    assert one.summary["checksum"] == other.summary["checksum"]


def test_a_mixture_round_trips_and_resumes(where, tmp_path):
    paths = []
    for k, some in enumerate((PAIRS[:16], PAIRS[16:])):
        paths.append(str(tmp_path / f"{k}.jsonl"))
        (tmp_path / f"{k}.jsonl").write_text("\n".join(map(json.dumps, some)))
    data = {paths[0]: 2, paths[1]: 1}
    whole = dpo({**where, "name": "whole", "data": data}, seed=3)
    assert "2 data sets are mixed" in whole.summary["notes"][0]
    again = dpo({**where, "name": "again", "data": None, "config": whole.path / "config.yaml"})
    assert again.summary["checksum"] == whole.summary["checksum"]

    def stop(event, facts):
        if event == "step" and facts["step"] == 2:
            stop.session.stopping = lambda: True
        if event == "start":
            stop.session = facts["session"]

    with pytest.raises(Stopped, match="stopped at step"):
        dpo({**where, "data": data}, seed=3, report=stop)
    resumed = dpo({**where, "data": data}, seed=3, resume=True)
    assert resumed.summary["checksum"] == whole.summary["checksum"]
    assert resumed.summary["last"]["loss"] == whole.summary["last"]["loss"]


def test_pairs_are_stored_token_by_token(where):
    run = dpo(where, **{"train.log_completions": 2})
    with Store(run.path.parent / "keel.sqlite", readonly=True) as store:
        stored = store.rollouts(store.run("run").id, 4)
    assert [one.reward for one in stored] == [1.0, 0.0, 1.0, 0.0]
    chosen, rejected = stored[:2]
    assert "".join(chosen.tokens).startswith(chosen.completion)
    assert (chosen.numbers["gradient"] < 0).all()  # the loss falls where log pi of the chosen grows
    assert (rejected.numbers["gradient"] > 0).all()
    assert {"log_prob_ref", "kl"} <= set(chosen.numbers)


# Precomputed references


@pytest.mark.parametrize("settings", [{}, {"train.num_iterations": 2}, {"lists": True}])
def test_a_precomputed_reference_changes_no_bit(where, settings):
    """Within the first pass over the data."""
    settings = dict(settings)
    if settings.pop("lists", False):
        settings["data"] = [{"prompt": p["prompt"], "completions": [p["chosen"], "1", p["rejected"]]} for p in PAIRS]
        settings["task.options.pairs"] = "all"
    runs = [
        dpo({**where, "name": str(once)}, **{**settings, "train.precompute_reference": once}) for once in (False, True)
    ]
    assert runs[0].summary["checksum"] == runs[1].summary["checksum"]
    said = [{k: v for k, v in run.summary["last"].items() if k not in TIMED} for run in runs]
    assert said[0] == said[1]


def test_a_precomputed_reference_saves_the_pass(where, monkeypatch):
    from keel.models.sources import SourceModel

    count = []
    hidden = SourceModel.hidden
    monkeypatch.setattr(SourceModel, "hidden", lambda self, rows: count.append(len(rows)) or hidden(self, rows))
    dpo(where, max_steps=20, **{"train.precompute_reference": True})
    assert sum(count) == 2 * 24  # 23 pairs to train on, in batches of 4: one comes twice
    count.clear()
    dpo({**where, "name": "each"}, max_steps=20)
    assert sum(count) == 20 * 8


def test_later_passes_agree_to_rounding_and_resume_to_the_same_bits(where):
    settings = {"max_steps": 14, "train.save_steps": 9, "train.precompute_reference": True}
    whole = dpo({**where, "name": "whole"}, **settings)
    plain = dpo({**where, "name": "plain"}, **{**settings, "train.precompute_reference": False})
    assert whole.summary["last"]["loss"] == pytest.approx(plain.summary["last"]["loss"], abs=1e-5)

    def stop(event, facts):
        if event == "start":
            stop.session = facts["session"]
        if event == "step" and facts["step"] == 9:
            stop.session.stopping = lambda: True

    with pytest.raises(Stopped, match="stopped at step"):
        dpo(where, **settings, report=stop)
    assert dpo(where, **settings, resume=True).summary["checksum"] == whole.summary["checksum"]


def test_what_cannot_be_precomputed(where, train):
    method = recipe_named("dpo")().replacing(models={"ref": EMA(0.9)})
    import keel

    with pytest.raises(ConfigError, match="'ref' moves"):
        keel.train(method, data=PAIRS, **where, **{"train.precompute_reference": True})
    with pytest.raises(ConfigError, match="draws its completions"):
        train("grpo", **{"train.precompute_reference": True})


# Built-in preferences


def test_the_rule():
    drawn = Drawn(0, ("1+2", "3", "1+1+1", "9"), (1.0, 1.0, 1.0, 0.0))
    assert drawn.ranks() == (2.0, 3.0, 1.0, 0.0)


@pytest.fixture(scope="module")
def small(task):
    """Few prompts of the task, under a rule that an untrained hand meets now and then."""
    known = {"name": task.name, "rewards": {"plus": plus}, "preset": {}, "characters": task.characters}
    sides = {"train": [task.train[i] for i in range(24)], "held_out": [task.held_out[i] for i in range(8)]}
    return SimpleNamespace(**known, **sides, max_completion_length=task.max_completion_length)


def test_built_in_preferences(small, base, monkeypatch, tmp_path):
    from keel.train import comparisons

    events = []
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path))
    monkeypatch.setattr(small, "solution", lambda *_: None, raising=False)
    monkeypatch.setattr(comparisons, "ensure_base", lambda *_, **__: type(tmp_path)(base))
    found = built_in_preferences(small, "pairs", report=lambda event, facts: events.append(event))
    assert "progress" in events
    assert len(found.train) >= 8
    for p in found.train:
        better, worse = plus(p.completions)
        assert better > worse or (better == worse == 1 and len(p.completions[0]) < len(p.completions[1]))
    assert not {p.prompt for p in found.train} & {p.prompt for p in found.held_out}
    events.clear()
    assert built_in_preferences(small, "pairs", report=lambda *_: events.append("drawn")) == found
    assert not events, "they come from the cache"
    labels = built_in_preferences(small, "labels")
    assert {p.scores for p in labels.train} == {(1.0,), (0.0,)}
    lists = built_in_preferences(small, "lists")
    assert [p.prompt for p in lists.train] == [p.prompt for p in found.train]
    assert all(len(set(p.completions)) == len(p.completions) for p in lists.train)
    for path in tmp_path.glob("preferences-*"):
        path.unlink()
    assert built_in_preferences(small, "lists") == lists, "the same is drawn again"


def test_tasks_without_built_in_preferences(small):
    from keel.tasks.load import load_task

    with pytest.raises(ConfigError, match="several turns"):
        built_in_preferences(load_task("number_guessing"), "pairs")
    with pytest.raises(ConfigError, match="alphabet"):
        built_in_preferences(SimpleNamespace(**{**vars(small), "characters": None}), "pairs")


# What fits


def test_other_methods_say_what_fits(where, train):
    with pytest.raises(ConfigError, match="learns from one completion"):
        train("sft", data=PAIRS)
    with pytest.raises(ConfigError, match="draws its own completions"):
        train("grpo", data=PAIRS)
    with pytest.raises(DataError, match="compares nothing"):
        dpo({**where, "data": [{"prompt": "1=", "answer": "1"}] * 3})


def test_a_dry_run_shows_pairs(base, tmp_path):
    from typer.testing import CliRunner

    from keel.cli.main import app

    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [*PAIRS, PAIRS[0]])))
    shown = CliRunner().invoke(app, ["train", "dpo", "--model", base, "--data", str(path), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    row = next(row for row in PAIRS if repr(row["prompt"]) in shown.output)
    assert f"  {row['prompt']!r}\n         1  {row['chosen']!r}\n         0  {row['rejected']!r}\n" in shown.output
    assert "1 pair is a duplicate (line 25)" in shown.output


def test_weights_on_the_command_line():
    from keel.cli.options import data_sets

    assert data_sets(None) is None
    for wrong, said in ((["a=x"], "must be PATH"), (["a=0"], "a positive weight"), (["a", "a=2"], "is given twice")):
        with pytest.raises(ConfigError, match=said):
            data_sets(wrong)
