"""From recipes to cells: configurations, keys, what cannot be compared."""

import shutil
from dataclasses import replace

import pytest

import keel
from keel.compare.arms import arms_of, default_grid, strength, swept_values
from keel.compare.asked import Asked, default_name
from keel.compare.outcomes import Arm, Budget
from keel.compare.plan import NO_LIMIT, Conditions, key_of, plan
from keel.core.errors import ConfigError
from tests.compare.small import SETTINGS, TASK, asked


def conditions(model, budget="2steps", **more):
    settings = tuple(sorted({**SETTINGS, **more.pop("settings", {})}.items()))
    return Conditions(Budget.parse(budget), **{"task": TASK, "model": model, "settings": settings, **more})


def planned(model, *recipes, budget="2steps", **more):
    swept = more.pop("swept", {})
    return plan(arms_of(recipes, swept)[0], conditions(model, budget, **more))


def test_cells_differ_in_recipe_and_seed_alone(model):
    cells = planned(model, "grpo", "dr_grpo").cells((0, 1))
    assert [(c.arm.name, c.seed) for c in cells] == [("grpo", 0), ("dr_grpo", 0), ("grpo", 1), ("dr_grpo", 1)]
    assert len({c.key for c in cells}) == 4
    assert cells[0].name == f"cell-grpo-0-{cells[0].key}"
    for cell in cells:
        data = cell.config.to_dict()
        assert (data["train"]["max_steps"], data["evaluate"]["draw_seed"], data["task"]["split_seed"]) == (2, 0, 0)
    sections = [{k: c.config.to_dict()[k] for k in ("model", "task", "train", "evaluate")} for c in cells]
    assert all(one == sections[0] for one in sections)


def test_the_key_is_of_what_decides_the_numbers(model, monkeypatch):
    cell = planned(model, "grpo").cells((0,))[0]
    config = cell.config
    train = config.train.model_copy(update={"log_completions": 7, "save_steps": 3, "trackers": ("tensorboard",)})
    assert key_of(replace(config, name="other", train=train), cell.files) == cell.key
    assert key_of(replace(config, seed=1), cell.files) != cell.key
    assert key_of(config, "other files") != cell.key
    faster = config.train.model_copy(update={"learning_rate": 0.5})
    assert key_of(replace(config, train=faster), cell.files) != cell.key
    monkeypatch.setattr(keel, "__version__", "9.9")
    assert key_of(config, cell.files) != cell.key


def test_a_changed_model_is_another_cell(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    before = planned(str(folder), "grpo").cells((0,))[0]
    assert planned(str(folder), "grpo").cells((0,))[0].key == before.key
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert planned(str(folder), "grpo").cells((0,))[0].key != before.key


def test_a_changed_task_file_is_another_cell(model, tmp_path):
    own = tmp_path / "own.py"
    shutil.copy(TASK.rpartition(":")[0], own)
    before = planned(model, "grpo", task=f"{own}:Lengths").cells((0,))[0].key
    own.write_text(own.read_text() + "\n# changed\n")
    assert planned(model, "grpo", task=f"{own}:Lengths").cells((0,))[0].key != before


@pytest.mark.parametrize(
    ("budget", "steps", "tokens", "seconds"),
    [("3steps", 3, None, None), ("2k-tokens", NO_LIMIT, 2000, None), ("1.5min", NO_LIMIT, None, 90.0)],
)
def test_budgets_become_limits_of_training(model, budget, steps, tokens, seconds):
    train = planned(model, "grpo", budget=budget).cells((0,))[0].config.train
    assert (train.max_steps, train.max_train_tokens, train.max_train_seconds) == (steps, tokens, seconds)


def test_what_a_user_sets_is_kept(model):
    config = planned(model, "grpo", settings={"train.save_steps": 1, "evaluate.draw_seed": 5}).cells((0,))[0].config
    assert (config.train.save_steps, config.evaluate.draw_seed) == (1, 5)


def test_arms_of_a_sweep(model):
    arms, notes = arms_of(("grpo", "kl_cov"), {"masks.cov.fraction": [1e-3, 1e-2], "beta": [0.0, 0.1]})
    assert [arm.name for arm in arms] == [
        "grpo beta=0",
        "grpo beta=0.1",
        "kl_cov beta=0 masks.cov.fraction=0.001",
        "kl_cov beta=0.1 masks.cov.fraction=0.001",
        "kl_cov beta=0 masks.cov.fraction=0.01",
        "kl_cov beta=0.1 masks.cov.fraction=0.01",
    ]
    assert notes == ["grpo has no masks.cov.fraction, which does not set it apart"]
    cell = planned(model, "grpo", swept={"beta": [0.25]}).cells((0,))[0]
    assert dict(cell.arm.settings) == {"beta": 0.25}
    assert cell.config.arguments["beta"] == 0.25


def test_values_of_options():
    assert swept_values(["beta=0.01,1e-1", "scale_rewards=group,none"], "--param") == {
        "beta": [0.01, 0.1],
        "scale_rewards": ["group", "none"],
    }
    for bad in (["beta"], ["beta="], ["=1"], ["beta=1,1"], ["beta=1", "beta=2"]):
        with pytest.raises(ConfigError, match="--param"):
            swept_values(bad, "--param")


def test_strengths():
    assert (strength("grpo"), strength("kl_cov"), strength("remax")) == ("beta", "coef", strength("remax"))
    assert default_grid("mara", "beta") == [0.015, 0.05, 0.15]
    assert default_grid("grpo", "beta") == [0.0, 0.01, 0.04]


WRONG = {
    "unknown": (("grpo", "dr_grop"), {}, "Did you mean 'dr_grpo'"),
    "none": ((), {}, "no recipe is named"),
    "twice": (("grpo", "grpo"), {}, "given twice"),
    "other data": (
        ("grpo", "dpo"),
        {"task": None, "data": "own.jsonl"},
        "grpo draws its own completions and dpo learns from comparisons",
    ),
    "nobody has it": (("grpo",), {"swept": {"betta": [1]}}, "Did you mean 'beta'"),
    "a part of a step": (("grpo",), {"budget": "0.5steps"}, "no whole number of steps"),
    "less than a step": (("grpo",), {"budget": "7tokens"}, "draws or reads 8 completions in a step"),
    "two budgets": (("grpo",), {"settings": {"train.max_steps": 5}}, "is what the budget says"),
    "two budgets, bare": (("grpo",), {"settings": {"max_steps": 5}}, "is what the budget says"),
    "not measured": (("grpo",), {"settings": {"evaluate.after": False}}, "nothing to compare"),
    "an argument": (("grpo", "dr_grpo"), {"settings": {"betta": 1}}, "nothing is called 'betta'. Did you mean 'beta'"),
    "no policy": (("bradley_terry",), {}, "trains a reward model"),
    "nothing held out": (("grpo",), {"settings": {"evaluate.skip": 64}}, "no prompt is held out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_compared_is_refused_with_the_reason(model, name):
    recipes, more, said = WRONG[name]
    with pytest.raises(ConfigError, match=said):
        planned(model, *recipes, **more)


def test_other_data_of_one_task_are_told(model):
    common = {"evaluate.num_prompts": 8, "evaluate.num_generations": 2}
    both = plan(
        arms_of(("grpo", "sft"), {})[0], Conditions(Budget.parse("2steps"), TASK, model, settings=tuple(common.items()))
    )
    assert [note for note in both.notes if "grpo draws its own completions, sft learns from given" in note]
    assert not [note for note in planned(model, "grpo", "dr_grpo").notes if "different data" in note]


def test_two_arms_that_are_the_same_are_refused(model):
    arms = [Arm("one", "grpo", (("beta", 0.1),)), Arm("two", "grpo", (("beta", 0.1),))]
    with pytest.raises(ConfigError, match="'two' and 'one' are the same"):
        plan(arms, conditions(model))


def test_data_without_answers_have_nothing_to_compare_by(model, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f'{{"prompt": "{n}+1="}}\n' for n in range(40)))
    with pytest.raises(ConfigError, match="no column `answer`"):
        planned(model, "grpo", task=None, data=str(file))


def test_steps_of_different_size_are_told(model):
    assert planned(model, "grpo", "dr_grpo").notes == ()
    settings = {key: value for key, value in SETTINGS.items() if key != "rollout.num_generations"}
    own = Conditions(Budget.parse("2steps"), task=TASK, model=model, settings=tuple(sorted(settings.items())))
    notes = plan(arms_of(("grpo", "reinforce"), {})[0], own).notes
    assert "completions in a step are grpo 16, reinforce 2" in notes[0]


def test_names(model, tmp_path):
    def name(*recipes, **more):
        task, given = more.pop("task", None), more.pop("settings", ())
        return default_name(
            Asked(recipes, Conditions(Budget.parse(more.pop("budget", "100steps")), task, settings=given))
        )

    assert name("grpo", "dr_grpo") == "grpo-dr_grpo"
    assert name("grpo", task="sparse", budget="200k-tokens") == "sparse-grpo-200000-tokens"
    assert name("a", "b", "c", "d", "e", "f").startswith("a-b-c-d-and-2-more-")
    assert name("grpo", settings=(("beta", 1),)) != name("grpo", settings=(("beta", 2),))


@pytest.mark.parametrize("field", ["seeds", "workers", "threads"])
def test_numbers_below_one_are_refused(model, tmp_path, field):
    with pytest.raises(ConfigError, match=f"--{field}"):
        asked(model, tmp_path, "grpo", **{field: 0})


def test_a_cell_is_the_same_for_whoever_resolves_it(model):
    """What a worker makes of the configuration is what it was given."""
    from keel.compare.cell import setup_of

    cell = planned(model, "kl_cov").cells((1,))[0]
    assert setup_of(cell.config.to_dict()).config.to_dict() == cell.config.to_dict()
