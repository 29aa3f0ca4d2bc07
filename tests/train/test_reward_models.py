"""Reward models from a run to a reward: trained, written, resumed, and trained on."""

import json

import pytest
import torch
from tests.slow.learners import of_kind

from keel.core.errors import ConfigError, UserError
from keel.models.load import checksum
from keel.models.reward_model import load_reward_model
from keel.train import strengths as measuring

WORDS = [("3 4 5>12=", "3+4+5"), ("6 3 9>18=", "6+3+9"), ("2 7 4>13=", "2+7+4"), ("8 1 5>14=", "8+1+5")]
PAIRS = [{"prompt": p, "chosen": good, "rejected": good.replace("+", "-")} for p, good in WORDS * 5]
FEW = {"data": PAIRS, "rollout.num_prompts": ..., "train.batch_size": 4, "task.held_out": 0.25}


@pytest.fixture
def learn(train):
    """A reward recipe on a few pairs."""

    def start(recipe="bradley_terry", **settings):
        import inspect

        import keel

        runs = inspect.getclosurevars(train).nonlocals["tmp_path"] / "runs"
        base = inspect.getclosurevars(train).nonlocals["base"]
        given = {k: v for k, v in FEW.items() if v is not ...}
        known = {"max_steps": 4, "learning_rate": 1e-3, "train.log_completions": 0, **given, **settings}
        return keel.train(recipe, model=base, runs=runs, **known)

    return start


def cut_at(step):
    def report(event, facts):
        if event == "step" and facts["step"] == step:
            raise RuntimeError("power cut")

    return report


RECIPES = {
    "bradley_terry": {"centring": 0.01},
    "contrastive_rm": {"coef": 0.1},
    "early_learning_rm": {"coef": 3.0},
    "meta_rm": {"rate": 0.1, "num_generations": 2},
    "preference_strength_rm": {"members": 1},
}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_run_that_was_cut_off_ends_with_the_same_bits(recipe, learn):
    settings = {**RECIPES[recipe], "train.save_steps": 2, "evaluate.before": False}
    whole = learn(recipe, name="whole", **settings)
    with pytest.raises(RuntimeError, match="power cut"):
        learn(recipe, name="cut", report=cut_at(3), **settings)
    again = learn(recipe, name="cut", resume=True, **settings)
    assert checksum(again.model) == checksum(whole.model)
    files = [run.path / "reward_model" / name for run in (whole, again) for name in ("model.safetensors", "keel.json")]
    assert files[0].read_bytes() == files[2].read_bytes() and files[1].read_bytes() == files[3].read_bytes()


def test_accuracy_is_told_by_domain_where_there_are_several(learn):
    """Two data sets in one, one of them the wrong way round: an accuracy of each, which add up to that of all."""
    turned = [{"prompt": p["prompt"] + " ", "chosen": p["rejected"], "rejected": p["chosen"]} for p in PAIRS]
    both = [{**p, "domain": "right"} for p in PAIRS] + [{**p, "domain": "turned"} for p in turned]
    run = learn(data=both, max_steps=2, **{"task.held_out": 0.5})
    found = run.evaluations["after"]
    names = [name for name in found.metrics if name.startswith("accuracy/")]
    assert names == ["accuracy/right", "accuracy/turned"]
    of = {name: [v for v in found.values[name] if v == v] for name in names}
    assert sum(map(len, of.values())) == found.prompts and min(map(len, of.values())) > 0
    assert sum(map(sum, of.values())) == pytest.approx(sum(found.values["accuracy"]))
    assert "accuracy/turned" in (run.path / "report.html").read_text()


def test_what_is_written_gives_the_scores_of_the_last_evaluation(learn):
    run = learn()
    after = run.evaluations["after"]
    assert {"accuracy", "log_loss", "margin", "calibration_error"} <= set(after.metrics)
    first, second = after.completions[:2]
    found = load_reward_model(run.path, "cpu").scores([(k.prompt, k.text) for k in (first, second)])
    torch.testing.assert_close(found, torch.tensor([first.reward, second.reward]), atol=1e-5, rtol=0)
    facts = json.loads((run.path / "reward_model" / "keel.json").read_text())
    assert facts["samples"] >= 4 and facts["std"] > 0
    assert (run.path / "report.html").read_text().count("Calibration") >= 1


def test_a_step_ahead_of_nothing_is_no_step(learn):
    plain = learn("bradley_terry", name="plain")
    still = learn("meta_rm", name="still", rate=0.0)
    moved = learn("meta_rm", name="moved", rate=0.5, num_generations=2)
    assert checksum(still.model) == checksum(plain.model) != checksum(moved.model)
    assert all(0 < value < 1 for _, value in moved.metrics["meta/spread"])


def test_members_never_score_a_prompt_that_they_have_learnt(learn, monkeypatch):
    seen = []
    real = measuring._member

    def watched(session, part, outside, inside, fold, m):
        seen.append(({str(p.prompt) for p in outside}, {str(p.prompt) for p in inside}, [p.index for p in inside]))
        return real(session, part, outside, inside, fold, m)

    monkeypatch.setattr(measuring, "_member", watched)
    learn("preference_strength_rm", max_steps=1, members=2, folds=2)
    assert len(seen) == 4 and all(not outside & inside for outside, inside, _ in seen)
    scored = [i for _, _, index in seen[::2] for i in index]
    assert sorted(scored) == list(range(len(scored))) and scored


def test_margins_of_the_data_are_strengths(learn, monkeypatch):
    monkeypatch.setattr(measuring, "_member", lambda *_: pytest.fail("no model is needed"))
    data = [{**pair, "margin": 0.5} for pair in PAIRS]
    learn("preference_strength_rm", data=data, mode="margin", max_steps=1)


def test_a_policy_trained_on_it_has_gold_measured_and_resumes(learn, train):
    path = str(learn().path)
    settings = {"reward": path, "max_steps": 3, "train.save_steps": 1, "evaluate.after": True, "beta": 0.1}
    small = {"evaluate.num_prompts": 4, "evaluate.num_generations": 2, "num_generations": 2}
    whole = train("grpo", name="whole", **settings, **small)
    assert whole.config.task.rewards == (path,)
    assert {"rewards/bradley_terry/mean", "rewards/gold/mean", "kl"} <= set(whole.metrics)
    after = whole.evaluations["after"].metrics
    assert after["pass@1"].value == after["rewards/gold/mean"].value
    assert "Over-optimisation" in (whole.path / "report.html").read_text()
    with pytest.raises(RuntimeError, match="power cut"):
        train("grpo", name="cut", report=cut_at(2), **settings, **small)
    again = train("grpo", name="cut", resume=True, **settings, **small)
    assert checksum(again.model) == checksum(whole.model)


def test_ensembles_are_standardised_rewards(learn, base):
    import keel
    from keel.parts.rewards.named import guarded, reward_name

    paths = [str(learn(name=f"rm{seed}", seed=seed).path) for seed in (0, 1)]
    texts = {"prompts": [p for p, _ in WORDS], "completions": [c for _, c in WORDS]}
    columns = []
    for path in paths:
        scorer = load_reward_model(path, "cpu")
        scores = scorer.scores(list(zip(*texts.values(), strict=True)))
        columns.append((scores - scorer.facts["mean"]) / scorer.facts["std"])
    worst = guarded(f"wco:{','.join(paths)}", 60.0)
    assert worst(**texts) == pytest.approx(torch.stack(columns).amin(0).tolist(), abs=1e-5)
    assert reward_name(f"wco:{','.join(paths)}") == "wco"
    found = keel.evaluate(base, "countdown", reward=f"mean:{','.join(paths)}", num_prompts=2, num_generations=2)
    assert {"rewards/mean/mean", "rewards/gold/mean"} <= set(found.metrics)
    facts = load_reward_model(paths[0], "cpu").facts
    assert {"mean", "std"} <= set(facts)


def test_what_is_no_reward_model_is_said_before_training(train, base, tmp_path):
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM is no reward model"):
        train("grpo", reward=base)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="a file, not the folder"):
        train("grpo", reward=str(tmp_path / "file"))
    with pytest.raises(UserError, match="there is no such folder"):
        train("grpo", reward=str(tmp_path / "nothing"))


def planted(count: int = 200, wrong: int = 5) -> list[dict]:
    """Sums are preferred to differences; of every `wrong` pairs one is the other way round."""
    found = []
    for i in range(count):
        a, b, c = 1 + i % 9, 1 + i // 9 % 9, 1 + i // 81 % 9
        sides = [f"{a}+{b}+{c}", f"{a}-{b}-{c}"]
        good, bad = sides[::-1] if i % wrong == 0 else sides
        found.append({"prompt": f"{a} {b} {c}>{a + b + c}=", "chosen": good, "rejected": bad})
    return found


@pytest.mark.slow
def test_the_weakest_pairs_are_the_planted_ones(learn, monkeypatch):
    found = {}
    real = measuring.strengths

    def watched(session, part):
        found["mu"] = real(session, part)[0]
        pairs = session.preferences.train
        found["planted"] = {p.index for p in pairs if "+" not in p.completions[p.scores.index(max(p.scores))]}
        return real(session, part)

    monkeypatch.setattr(measuring, "strengths", watched)
    learn("preference_strength_rm", data=planted(), max_steps=40, **{"train.batch_size": 16})
    lowest = found["mu"].argsort()[: len(found["planted"])].tolist()
    assert len(set(lowest) & found["planted"]) > 0.9 * len(lowest)


OWN = {  # settings, metric, where it goes
    "contrastive_rm": ({"coef": 1.0}, "terms/contrast", -1),
    "meta_rm": ({"rate": 0.1}, "meta/spread", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", of_kind("reward"))
def test_its_own_metric_moves_the_right_way(learn, recipe):
    settings, metric, sign = OWN.get(recipe, ({}, "rewards/accuracies", 1))
    run = learn(recipe, data=planted(), max_steps=40, **{"train.batch_size": 16}, **settings)
    values = [value for _, value in run.metrics[metric]]
    assert sign * (sum(values[-5:]) - sum(values[:5])) > 0
    assert run.evaluations["after"].metrics["accuracy"].value > 0.65  # one pair in five is the other way round


@pytest.mark.slow
def test_from_built_in_pairs_to_a_policy(tmp_path):
    """Accuracy on held-out pairs rises; the policy's trained reward rises; both reports are written."""
    import keel

    known = {"task": "countdown", "runs": tmp_path, "train.log_completions": 0}
    reward = keel.train("bradley_terry", max_steps=80, learning_rate=1e-4, **{"train.batch_size": 64}, **known)
    right = [reward.evaluations[phase].metrics["accuracy"].value for phase in ("before", "after")]
    assert right[1] > right[0]  # 0.512 -> 0.585
    small = {"evaluate.num_prompts": 32, "evaluate.num_generations": 4}
    policy = keel.train("grpo", reward=str(reward.path), max_steps=15, beta=0.05, **small, **known)
    gained = [policy.evaluations[phase].metrics["reward"].value for phase in ("before", "after")]
    assert gained[1] > gained[0]
    assert "Calibration" in (reward.path / "report.html").read_text()
    assert "Over-optimisation" in (policy.path / "report.html").read_text()
