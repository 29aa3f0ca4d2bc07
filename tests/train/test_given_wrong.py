"""What is given wrong is refused at once and by its name: changed data on resume, odd models, rewards, names, seeds."""

import json
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.train.judging import plus
from typer.testing import CliRunner

import keel
from keel.cli.main import app
from keel.core.errors import ConfigError, DataError, RunError, UserError
from keel.models.load import checksum, load
from keel.tasks.preference_data import load_preferences
from keel.tasks.task import Example
from keel.train.beginning import data_digests
from keel.train.judging import judge

PAIRS = [
    {"prompt": f"{n} {n + 1} 3>{2 * n + 4}=", "chosen": f"{n}+{n + 1}+3", "rejected": f"{n + 1}-{n}*3"}
    for n in range(1, 13)
]
TURNED = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
QUIET = {"evaluate.before": False, "evaluate.after": False, "train.log_completions": 0}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def dpo(base, tmp_path):
    """A short `dpo`, on a file of the pairs above unless other data are given."""

    def start(recipe="dpo", **settings):
        given = {"model": base, "runs": tmp_path / "runs", "name": "run", "max_steps": 3, "learning_rate": 1e-3}
        return keel.train(recipe, **{**given, "train.batch_size": 4, "train.save_steps": 1, **QUIET, **settings})

    return start


class Cut(Exception):
    """The power goes."""


def cut_after(step):
    def report(event, facts):
        if event == "step" and facts["step"] > step:
            raise Cut

    return report


# The data of a run that goes on


def test_a_stopped_run_goes_on_over_its_own_data_alone(dpo, tmp_path):
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    whole = dpo(data=data, name="whole")
    with pytest.raises(Cut):
        dpo(data=data, report=cut_after(1))
    write(tmp_path / "pairs.jsonl", TURNED)
    with pytest.raises(RunError, match=r"pairs\.jsonl: the data are not those this run began with.*--name"):
        dpo(data=data, resume=True)
    # the same rows with their columns in another order are the same data
    write(tmp_path / "pairs.jsonl", [dict(reversed(row.items())) for row in PAIRS])
    again = dpo(data=data, resume=True)
    assert checksum(again.model) == checksum(whole.model)


def test_a_finished_run_is_not_passed_for_one_of_other_data(dpo):
    dpo(data=PAIRS, max_steps=1)
    assert dpo(data=PAIRS, max_steps=1, resume=True).summary["steps"] == 1
    with pytest.raises(RunError, match=r"^data: the data are not those"):
        dpo(data=TURNED, max_steps=1, resume=True)


def test_held_out_rows_of_a_file_of_their_own_are_named(dpo, tmp_path):
    data, aside = write(tmp_path / "pairs.jsonl", PAIRS[2:]), write(tmp_path / "aside.jsonl", PAIRS[:2])
    settings = {"data": data, "task.held_out": aside, "max_steps": 1}
    dpo(**settings)
    write(tmp_path / "aside.jsonl", PAIRS[:1])
    with pytest.raises(RunError) as refused:
        dpo(**settings, resume=True)
    assert refused.value.where == aside


def test_data_of_supervised_training_are_guarded_too(dpo):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    dpo("sft", data=rows, max_steps=1)
    assert dpo("sft", data=rows, max_steps=1, resume=True).summary["steps"] == 1
    with pytest.raises(RunError, match="the data are not those"):
        dpo("sft", data=[*rows[:-1], {**rows[-1], "completion": "1"}], max_steps=1, resume=True)


def test_a_run_that_says_nothing_of_its_data_goes_on(dpo, tmp_path):
    """As runs do that an earlier version began."""
    with pytest.raises(Cut):
        dpo(data=PAIRS, report=cut_after(1))
    file = tmp_path / "runs" / "run" / "initial.json"
    facts = json.loads(file.read_text())
    del facts["data"]
    file.write_text(json.dumps(facts))
    assert dpo(data=PAIRS, resume=True).summary["steps"] == 3


def test_a_file_of_a_teacher_that_changed_is_named(base, dpo, tmp_path):
    from keel.train.teachers import store_top_k

    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    file = tmp_path / "teacher.safetensors"
    store_top_k(base, rows, file, k=4, device="cpu")
    settings = {"data": rows, "max_steps": 1, "stored": str(file)}
    dpo("stored_distillation", **settings)
    store_top_k(base, rows, file, k=2, device="cpu")
    with pytest.raises(RunError) as refused:
        dpo("stored_distillation", **settings, resume=True)
    assert refused.value.where == str(file) and "began with" in str(refused.value)


def test_a_built_in_task_has_no_digest(train):
    run = train("grpo", name="one", max_steps=1)
    assert json.loads((run.path / "initial.json").read_text())["data"] == {}


def digests(*columns):
    """Of a data set with these columns."""
    config = SimpleNamespace(task=SimpleNamespace(data="in memory"), method=SimpleNamespace(transforms={}))
    rows = [Example("p", dict(column), i) for i, column in enumerate(columns)]
    task = SimpleNamespace(train=rows, held_out=[])
    return data_digests(SimpleNamespace(config=config, task=task, preferences=None))


def test_digests_depend_on_what_rows_say_and_on_nothing_else():
    same = [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": np.float64(0.5)}, {"a": 0.5}),
        ({"a": np.array([1, 2])}, {"a": [1, 2]}),
        ({"a": torch.tensor([1, 2])}, {"a": [1, 2]}),
        ({"a": {"x", "y", "z"}}, {"a": {"z", "y", "x"}}),
        ({"a": object()}, {"a": object()}),  # where it lies in memory says nothing
        ({"a": {1: 2, "k": 3}}, {"a": {1: 2, "k": 3}}),
        ({"a": np.longdouble(1)}, {"a": np.longdouble(1)}),
    ]
    for one, other in same:
        assert digests(one) == digests(other), one
    different = [({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1}), ({"a": "1"}, {"a": 1}), ({"a": {1: 2, "k": 3}}, {"a": {}})]
    for one, other in different:
        assert digests(one) != digests(other), one
    assert digests({"a": 1}, {"a": 2}) != digests({"a": 2}, {"a": 1})  # their order counts


# A run as the model that another begins with


def test_a_run_begins_with_the_newest_checkpoint_of_another(dpo, tmp_path):
    first = dpo("sft", data=[{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS], name="first")
    newest = first.path / "checkpoint-3"
    second = dpo(data=PAIRS, model=str(first.path), name="second", max_steps=1)
    assert second.config.model.path == str(newest)
    began = json.loads((second.path / "initial.json").read_text())
    assert began["checksum"] == checksum(first.model) and began["path"] == str(newest)
    assert dpo(data=PAIRS, model=first.path, name="third", max_steps=1).config.model.path == str(newest)
    # by its configuration file, and where the first run has gone on, it is still that checkpoint
    (first.path / "checkpoint-9").mkdir()
    again = keel.train(None, config=second.path / "config.yaml", data=PAIRS, runs=tmp_path / "runs", resume=True)
    assert again.summary["checksum"] == second.summary["checksum"]


def test_the_command_line_takes_a_run_as_a_model(dpo, tmp_path):
    first = dpo(data=PAIRS, name="first", max_steps=1)
    data, runs = write(tmp_path / "pairs.jsonl", PAIRS), str(tmp_path / "runs")
    arguments = ["train", "dpo", "--data", data, "--model", str(first.path), "--runs", runs, "--name", "second"]
    quiet = [part for key in QUIET for part in ("--set", f"{key}={0 if 'log' in key else 'false'}")]
    done = CliRunner().invoke(app, [*arguments, *quiet, "--max-steps", "1", "--set", "train.batch_size=4"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert str(first.path / "checkpoint-1") in (tmp_path / "runs/second/config.yaml").read_text()


def test_a_run_without_a_checkpoint_is_named(dpo, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(RunError, match="empty: this run has no checkpoint"):
        dpo(data=PAIRS, model=empty)


# Rewards


@pytest.mark.parametrize("given", ["mean:runs/rm,runs/rm", "wco:,"])
def test_a_wrong_ensemble_is_named(given, dpo, base, tmp_path):
    with pytest.raises(ConfigError, match=rf"--reward {given}: .*mod"):
        dpo("grpo", task="countdown", reward=given)
    with pytest.raises(ConfigError, match="--reward"):
        keel.evaluate(base, "countdown", reward=given)
    with pytest.raises(ConfigError, match="--reward"):
        judge(PAIRS, tmp_path / "judged.jsonl", given)


def test_a_reward_that_nothing_asks_is_still_looked_at(dpo, tmp_path):
    with pytest.raises(ConfigError, match="nope"):
        dpo(data=PAIRS, reward="nope:f")
    assert not (tmp_path / "runs" / "run").exists()
    command = ["train", "dpo", "--data", write(tmp_path / "pairs.jsonl", PAIRS), "--reward", "nope:f", "--dry-run"]
    done = CliRunner().invoke(app, [*command, "--model", "unused", "--runs", str(tmp_path / "runs")])
    assert isinstance(done.exception, ConfigError) and "nope" in str(done.exception)


@pytest.mark.parametrize(
    ("recipe", "given", "said"),
    [
        (
            "mu_ppo",
            {"thresholds": (0.5, 0.5)},
            "controllers.multipliers.thresholds: 2 thresholds for 1 reward function (plus). "
            "Give one for each function, in their order, or a single one for their sum.",
        ),
        (
            "unlikeliness",
            {"transforms.sum.weights": (1.0, 2.0)},
            "transforms.sum.weights: 2 weights for 1 reward function (plus). "
            "Give one for each function, in their order.",
        ),
    ],
)
def test_numbers_for_rewards_that_are_not_there(recipe, given, said, train, tmp_path):
    with pytest.raises(ConfigError) as error:
        train(recipe, reward=plus, name="run", max_steps=1, **given)
    assert str(error.value) == said
    assert not (tmp_path / "runs" / "run").exists()


def test_a_reward_that_is_there_is_taken(dpo):
    assert dpo(data=PAIRS, reward=plus, max_steps=1).summary["steps"] == 1


# Odd arguments


def test_names_that_no_folder_can_have(dpo, tmp_path):
    with pytest.raises(ConfigError, match=r"^name: has 300 bytes, and a folder's name at most 255"):
        dpo(data=PAIRS, name="a" * 300)
    with pytest.raises(ConfigError, match="has 280 bytes"):
        dpo(data=PAIRS, name="ä" * 140)
    with pytest.raises(RunError, match="too long"):
        dpo(data=PAIRS, runs=tmp_path.joinpath(*["a" * 200] * 25))
    assert dpo(data=PAIRS, name="a" * 255, max_steps=1).path.name == "a" * 255


def test_a_file_in_the_place_of_a_folder(dpo, tmp_path):
    file = tmp_path / "file.py"
    file.write_text("")
    with pytest.raises(RunError, match=r"run: a part of this path is a file.*--runs"):
        dpo(data=PAIRS, runs=file)
    for resume in (False, True):
        with pytest.raises(RunError, match=r"file\.py: is a file, and a run is a folder"):
            dpo(data=PAIRS, runs=tmp_path, name="file.py", resume=resume)
    for command in (["train", "dpo"], ["runs"]):
        done = CliRunner().invoke(app, [*command, "--runs", str(file)])
        assert done.exit_code == 2 and "is a file" in done.output


def test_seeds_that_the_store_cannot_hold(dpo):
    with pytest.raises(ConfigError, match=r"^seed: must be at most 9223372036854775807"):
        dpo(data=PAIRS, seed=2**63)
    with pytest.raises(ConfigError, match="must be a non-negative whole number"):
        dpo(data=PAIRS, seed=-1)
    assert dpo(data=PAIRS, seed=2**63 - 1, max_steps=1).config.seed == 2**63 - 1
    done = CliRunner().invoke(app, ["train", "dpo", "--seed", "99999999999999999999999"])
    assert done.exit_code == 2 and "--seed" in done.output


@pytest.mark.parametrize("model", [5, True, ["tiny"], {}, torch.nn.Linear(2, 2)])
def test_what_is_no_model(model, dpo):
    with pytest.raises(ConfigError, match=rf"^model: .*type {type(model).__name__}.*Give tiny, a folder"):
        dpo(data=PAIRS, model=model)
    with pytest.raises(ConfigError, match=r"^model: "):
        keel.evaluate(model, "countdown")


@pytest.mark.parametrize("tokenizer", [5, "tiny", ["a"]])
def test_what_is_no_tokenizer(tokenizer, base, dpo):
    said = rf"^tokenizer: .* is no tokenizer but of type {type(tokenizer).__name__}. Give a tokenizer of transformers"
    with pytest.raises(UserError, match=said):
        dpo(data=PAIRS, tokenizer=tokenizer)
    with pytest.raises(UserError, match=said):
        keel.evaluate(base, "countdown", tokenizer=tokenizer)


def test_a_model_whose_path_is_too_long(dpo):
    with pytest.raises(ConfigError, match=r"^model: 'a{20}\.\.\.' cannot be a path"):
        dpo(data=PAIRS, model="a" * 300)


def test_a_model_that_keel_has_loaded_is_trained_in_place(dpo, base):
    held = load(base)
    run = dpo(data=PAIRS, model=held, max_steps=1)
    assert run.model is held.module and checksum(held.module) != checksum(load(base).module)


def test_a_data_frame_is_told_what_rows_are(dpo, base):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(PAIRS)
    with pytest.raises(DataError, match=r"^data: a DataFrame is no list of rows.*df\.to_dict\('records'\)"):
        dpo(data=frame)
    with pytest.raises(DataError, match="DataFrame"):
        keel.evaluate(base, data=pandas.DataFrame({"prompt": ["1 2>3="], "answer": ["1+2"]}))
    assert dpo(data=frame.to_dict("records"), max_steps=1).summary["steps"] == 1


# Numbers of preferences


@pytest.mark.parametrize("one", [np.float32(1), np.float64(1), np.int64(1), np.float16(1), Fraction(1), 1])
def test_numbers_of_any_kind(one):
    row = {**PAIRS[0], "margin": one, "weight": one, "probability": one, "score_chosen": one, "score_rejected": 0}
    (found,) = load_preferences([row], "pairs", held_out=0).train
    assert (found.margin, found.weight, found.probability, found.ratings) == (1.0, 1.0, 1.0, (1.0, 0.0))
    assert {type(x) for x in (found.margin, found.weight, found.probability, *found.ratings)} == {float}


@pytest.mark.parametrize(
    "bad", [np.float32("nan"), np.float64("inf"), True, pytest.param(10**400, id="beyond floats"), "1", 1j]
)
def test_what_is_no_number(bad):
    with pytest.raises(DataError, match="`margin` must be a number"):
        load_preferences([{**PAIRS[0], "margin": bad}], "pairs", held_out=0)


def test_data_of_weight_nought_teach_nothing(dpo, tmp_path):
    nothing = [{**row, "weight": 0} for row in PAIRS]
    file = write(tmp_path / "nothing.jsonl", nothing)
    with pytest.raises(DataError, match=r"nothing\.jsonl: no row has a weight above 0"):
        dpo(data=file)
    other = write(tmp_path / "some.jsonl", [{**row, "prompt": f"1 {row['prompt']}"} for row in PAIRS])
    with pytest.raises(DataError, match=r"nothing\.jsonl: no row has a weight above 0"):
        dpo(data={other: 1.0, file: 1.0})
    assert dpo(data=[*nothing[1:], PAIRS[0]], max_steps=1, **{"task.held_out": 0}).summary["steps"] == 1
    with pytest.raises(UserError, match="no row has a weight"):
        load_preferences(nothing, "labels", held_out=0)


def test_a_built_in_task_takes_no_share_of_held_out_prompts(base, tmp_path):
    with pytest.raises(ConfigError, match=r"task\.held_out: is for data of one's own.*task\.options\.held_out"):
        keel.train("grpo", model=base, task="countdown", runs=tmp_path, **{"task.held_out": 0.5})
    assert not list(tmp_path.iterdir())
