"""Distillation in the loop: from data, from the policy's and the teacher's completions, and from stored numbers."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import keel as keel_package
from keel.cli.main import app
from keel.core.errors import ConfigError, DataError, UserError
from keel.core.rows import Stop
from keel.models.load import checksum, load, save
from keel.models.sources import RandomInitial, build
from keel.models.tiny import SMALL, build_tiny
from keel.parts.rewards.stored_teacher import stored
from keel.statistics.engine import Engine
from keel.statistics.functionals import Divergence, LogProb
from keel.train.configuration import Request, resolve
from keel.train.given import given_batch
from keel.train.online import prepare
from keel.train.session import build_session
from keel.train.setup import prepare_setup
from keel.train.teachers import store_top_k

CHARACTERS = "0123456789+-*/()= ,>;."
DATA = [{"prompt": f"{i}+{j}=", "completion": str(i + j)} for i, j in itertools.product(range(4), range(3))]
QUICK = {"train.batch_size": 6, "train.log_completions": 0, "evaluate.before": False, "evaluate.after": False}
ROLLOUT = {"rollout.num_prompts": 4, "rollout.max_completion_length": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """A policy and a teacher of one alphabet."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 0), ("teacher", 1)):
        save(build_tiny(CHARACTERS, SMALL, seed), root / name)
    return str(root / "policy"), str(root / "teacher")


@pytest.fixture
def train(folders, tmp_path):
    def start(recipe, teacher: str | None = folders[1], **settings):
        known = {"model": folders[0], "data": DATA, "runs": tmp_path / "runs", "max_steps": 2, "learning_rate": 1e-3}
        drawn = ROLLOUT if resolve(Request(recipe)).method.rollout is not None else {}
        return keel_package.train(recipe, teacher=teacher, **{**known, **QUICK, **drawn, **settings})

    return start


def session_of(folders, recipe, teacher=True, **settings):
    """A session at step 0."""
    known = {"seed": None, "name": None, "config": None, "settings": {**QUICK, **settings}}
    path = folders[1] if teacher else None
    setup = prepare_setup(recipe, folders[0], None, None, DATA, None, teacher=path, **known)
    return build_session(setup.config, setup.task, load(folders[0], device="cpu"))


EVERY = [
    ("distillation", {}),
    ("distillation", {"divergence": "js:0.1", "temperature": 2.0, "nll": 0.5}),
    ("on_policy_distillation", {}),
    ("on_policy_distillation", {"level": "sequence", "num_generations": 2}),
    ("gkd", {"per": "row"}),
    ("sequence_kd", {}),
    ("minillm", {"num_generations": 2}),
    ("g_opd", {}),
    ("sampled_distillation", {"gamma": 1.0}),
    ("sin_kd", {}),
    ("relational_distillation", {"space": "gram"}),
    ("bd_kd", {"temperature": 2.0}),
    ("pld", {}),
    ("kdrl", {"reward": lambda completions: [float(len(c)) for c in completions]}),
]


@pytest.mark.parametrize(("recipe", "settings"), EVERY, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_every_recipe_trains(train, recipe, settings):
    run = train(recipe, max_steps=1, **settings)
    assert run.config.method.models["teacher"].path.endswith("teacher")
    assert 0 < run.metrics["grad_norm"][0][1] < 1e4


@pytest.mark.parametrize("recipe", ["ps_kd", "random_teacher"])
def test_those_without_a_teacher_of_their_own(train, recipe):
    assert len(train(recipe, teacher=None).metrics["grad_norm"]) == 2


# -- whose completions -----------------------------------------------------------------------------------------------


def test_completions_of_the_data(folders):
    rows = given_batch(session_of(folders, "distillation")).rows
    assert len(rows) == 6 and bool((rows.stop == int(Stop.DATA)).all())


def test_completions_of_the_policy_have_no_reward(folders):
    session = session_of(folders, "on_policy_distillation", **ROLLOUT)
    batch = prepare(session)
    assert batch.rows.reward is None and "behaviour" in batch.rows.logp
    assert not session.rewards and len(batch.rows) == 4
    again = prepare(session_of(folders, "on_policy_distillation", **ROLLOUT))
    assert torch.equal(batch.rows.tokens, again.rows.tokens)


def test_a_share_of_the_batch_is_given(folders):
    settings = {"share": 0.5, "per": "row", "num_generations": 3, **ROLLOUT}
    batch = given_batch(session_of(folders, "gkd", **settings))
    rows = batch.rows
    assert (rows.stop == int(Stop.DATA)).tolist() == [True] * 2 + [False] * 6
    assert rows.group.tolist() == [0, 1, 2, 2, 2, 3, 3, 3] and not rows.logp
    assert batch.metrics["completions/given_ratio"] == 0.25 and len(batch.texts) == 8
    assert len(set(rows.data_index.tolist())) == 4


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_share_and_all_of_it_are_the_plain_methods(train, share):
    mixed = train("gkd", share=share, name="mixed")
    if share == 0:
        plain = train("on_policy_distillation", divergence="js", name="plain")
    else:
        plain = train("distillation", divergence="js", name="plain", **{"train.batch_size": 4})
    assert checksum(mixed.model) == checksum(plain.model)


def test_completions_of_the_teacher(folders):
    session = session_of(folders, "sequence_kd", **ROLLOUT)
    rows = given_batch(session).rows
    asked = LogProb(of=("teacher",))
    found = session.engine.measure([asked], rows)[asked]
    torch.testing.assert_close(rows.logp["mixture"][rows.mask], found[rows.mask], rtol=1e-4, atol=1e-4)


# -- which teacher ---------------------------------------------------------------------------------------------------


def test_a_run_is_a_teacher_by_its_newest_checkpoint(train, tmp_path):
    train("sft", teacher=None, name="first")
    run = train("pld", teacher=str(tmp_path / "runs" / "first"), name="second")
    assert run.config.method.models["teacher"].path.endswith("first/checkpoint-2")


def test_the_path_can_be_set(train, folders):
    one = train("pld", name="one")
    two = train("pld", teacher=None, name="two", **{"models.teacher.path": folders[1]})
    assert checksum(one.model) == checksum(two.model)


def test_a_teacher_must_be_named_and_wanted(train):
    with pytest.raises(ConfigError, match="no model is named") as error:
        train("on_policy_distillation", teacher=None)
    assert "--teacher" in str(error.value)
    with pytest.raises(ConfigError, match="no model of that name"):
        train("sft")


def test_a_teacher_of_another_vocabulary_is_refused_before_training(train, tmp_path):
    save(build_tiny("abc", SMALL, 1), tmp_path / "other")
    with pytest.raises(UserError, match="vocabulary") as error:
        train("on_policy_distillation", teacher=str(tmp_path / "other"))
    assert "one tokenizer" in str(error.value)
    assert not (tmp_path / "runs" / "on_policy_distillation").exists()
    swapped = build_tiny(CHARACTERS[::-1], SMALL, 1)  # as many tokens, with other meanings
    save(swapped, tmp_path / "swapped")
    with pytest.raises(UserError, match="vocabulary"):
        train("distillation", teacher=str(tmp_path / "swapped"))


def test_the_option_of_the_command(folders, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{d["prompt"]}", "completion": "{d["completion"]}"}}\n' for d in DATA))
    command = ["train", "on_policy_distillation", "--teacher", folders[1], "--model", folders[0], "--data", str(data)]
    settings = [f"--set={key}={value}" for key, value in {**QUICK, **ROLLOUT}.items()]
    found = CliRunner().invoke(
        app, [*command, *settings, "--max-steps", "1", "--runs", str(tmp_path / "runs"), "--json"]
    )
    assert found.exit_code == 0, found.output
    assert (tmp_path / "runs" / "on_policy_distillation" / "summary.json").is_file()


# -- a teacher without knowledge -------------------------------------------------------------------------------------


def test_a_random_teacher_is_drawn_by_its_seed(folders):
    policy = load(folders[0], device="cpu")
    one, two, other = (build(RandomInitial(seed), policy).model for seed in (1, 1, 2))
    assert checksum(one.module) == checksum(two.module) != checksum(other.module) != checksum(policy.module)
    weight = policy.module.get_input_embeddings().weight
    drawn = [build(RandomInitial(1, share), policy).model.module.get_input_embeddings().weight for share in (0.5, 1.0)]
    torch.testing.assert_close(drawn[0], (weight + drawn[1]) / 2 * 2**0.5)  # std 1 / sqrt 2 without the divisor
    assert float(drawn[0].std() / weight.std()) == pytest.approx(1, abs=0.05)


def test_the_policy_itself_has_nothing_to_teach(train):
    run = train("random_teacher", teacher=None, **{"models.teacher.share": 0.0})
    assert run.metrics["grad_norm"][0][1] == pytest.approx(0, abs=1e-6)
    assert run.metrics["terms/distil"][0][1] == pytest.approx(0, abs=1e-7)


# -- stored numbers --------------------------------------------------------------------------------------------------


def test_what_is_stored_is_what_the_teacher_says(folders, tmp_path):
    path = store_top_k(folders[1], DATA, tmp_path / "top.safetensors", 5, device="cpu")
    found = stored(path)
    assert found.ids.shape[1] == 5 and len(found.start) == len(found.data_index) + 1
    total = found.logp.exp().sum(-1) + found.rest.exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    assert bool((found.logp[:, :-1] >= found.logp[:, 1:]).all())


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_all_stored_tokens_train_as_the_teacher_itself(train, folders, tmp_path, tail):
    path = store_top_k(folders[1], DATA, tmp_path / "all.safetensors", 999, device="cpu")
    whole = train("distillation", name="whole")
    some = train("stored_distillation", teacher=None, name="some", stored=str(path), tail=tail)
    for (_, one), (_, two) in zip(whole.metrics["loss"], some.metrics["loss"], strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    for (_, one), (_, two) in zip(whole.metrics["grad_norm"], some.metrics["grad_norm"], strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_few_stored_tokens_are_a_lower_bound(train, folders, tmp_path):
    whole = train("distillation", name="whole", max_steps=1).metrics["loss"][0][1]
    losses = []
    for k in (1, 4, 16):
        path = store_top_k(folders[1], DATA, tmp_path / f"{k}.safetensors", k, device="cpu")
        run = train("stored_distillation", teacher=None, name=f"top {k}", stored=str(path), max_steps=1)
        losses.append(run.metrics["loss"][0][1])
    assert 0 < losses[0] < losses[1] < losses[2] < whole + 1e-6


def test_other_data_and_other_files_are_refused(train, folders, tmp_path):
    number = itertools.count()

    def start(path, data=DATA):
        return train("stored_distillation", teacher=None, name=f"{next(number)}", stored=str(path), data=data)

    with pytest.raises(DataError, match="no such file"):
        start(tmp_path / "none.safetensors")
    assert not (tmp_path / "runs").exists()  # before anything begins
    with pytest.raises(DataError, match="no file of a teacher's numbers is named"):
        start("")
    save_file({"x": torch.zeros(1)}, tmp_path / "alien.safetensors")
    with pytest.raises(DataError, match="is no file of a teacher's numbers"):
        start(tmp_path / "alien.safetensors")
    path = store_top_k(folders[1], DATA, tmp_path / "top.safetensors", 4, device="cpu")
    with pytest.raises(DataError, match="other completions"):
        start(path, [{**d, "completion": "7"} for d in DATA])
    with pytest.raises(DataError, match="no completion of example"):
        start(path, DATA + [{"prompt": f"9+{i}=", "completion": "1"} for i in range(60)])
    for settings in ({"k": 0}, {"temperature": 0.0}):
        with pytest.raises(ConfigError):
            store_top_k(folders[1], DATA, tmp_path / "bad.safetensors", **settings)
    with pytest.raises(DataError, match="no completion to learn from"):
        store_top_k(folders[1], [{"prompt": "1"}], tmp_path / "bad.safetensors", device="cpu")


# -- memory ----------------------------------------------------------------------------------------------------------


def test_the_memory_of_predictions_is_in_the_checkpoint(train, tmp_path):
    settings = {"teacher": None, "epochs": 4, "max_steps": 6}
    whole = train("ps_kd", name="whole", **settings)

    class Enough(Exception): ...

    def stop(event, facts):
        if event == "step" and facts["step"] == 4:
            raise Enough

    with pytest.raises(Enough):
        train("ps_kd", name="cut", report=stop, save_steps=3, **settings)
    kept = load_file(tmp_path / "runs/cut/checkpoint-3/keel/states.safetensors")
    assert len(kept["transforms.earlier/index"]) > 6 and kept["transforms.earlier/visits"].max() >= 1
    resumed = train("ps_kd", name="cut", resume=True, save_steps=3, **settings)
    assert checksum(resumed.model) == checksum(whole.model)


def test_nothing_of_the_whole_vocabulary_is_kept(folders):
    """The statistics of a step hold a number for each token, whatever the vocabulary."""
    session = session_of(folders, "distillation")
    batch = prepare(session)
    engine: Engine = session.engine
    found = Divergence("kl_ref_policy", "teacher")
    _, stats = engine.step([found], batch.rows, batch.frozen, lambda rows, s: s[found].sum(), additive=True)
    assert stats[found].shape == batch.rows.tokens.shape
