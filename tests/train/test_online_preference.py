"""The loop of the methods that compare the policy's own completions: sample, judge, pair, update."""

import pytest
from tests.slow.learners import comparing, drawn_by_policy

from keel.core.errors import ConfigError, MethodError, TrainingError
from keel.method import Method
from keel.models.load import checksum
from keel.recipes.registry import recipe_named

RECIPES = ("online_dpo", "did_dpo", "behaviour_dpo", "online_ipo", "inpo", "rebel", "sppo", "nash_md", "nash_mp")
HERE = "tests.train.judging"


def brief(completions):
    """A reward that no two completions of different lengths share."""
    return [1 / (1 + len(text)) for text in completions]


def told(run, name: str) -> list[float]:
    """A metric of every step."""
    return [value for _, value in run.metrics[name]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(recipe, train):
    run = train(recipe, reward=brief, **{"rollout.num_generations": 4, "train.num_minibatches": 2})
    assert run.summary["steps"] == 3 and told(run, "updates/skipped")[-1] == 0
    assert max(told(run, "grad_norm")) > 0
    if recipe in ("sppo", "nash_md", "nash_mp"):
        assert 0.25 <= told(run, "win_rate/ess")[-1] <= 1.0
    else:
        assert "pairs/number" in run.metrics and "rewards/margins" in run.metrics


def test_snapshots_of_the_last_iteration(train):
    """Until an iteration of two batches is over pi_t is the reference, whatever its share; at first eta is 0.1."""
    few = {"rollout.num_generations": 4, "max_steps": 3}
    one, other = (told(train("inpo", every=2, ratio=r, name=f"inpo{r}", **few), "loss") for r in (0.3, 0.9))
    assert one[0] == pytest.approx((1 / (2 * 0.1)) ** 2) and one[:2] == pytest.approx(other[:2], rel=1e-5)
    assert abs(one[2] - other[2]) > 1


def test_the_base_of_a_proximal_step_is_taken_after_both_halves(train):
    """The pull beta / eta to it is nothing in batch 1, all of the gradient in batch 2, and nothing again in batch 3."""
    few = {"rollout.num_generations": 4, "max_steps": 3, "reward": brief}
    weak, strong = (told(train("nash_mp", half_step=1, eta=eta, name=f"mp{eta}", **few), "grad_norm")
                    for eta in (0.1, 0.01))  # fmt: skip
    assert weak[0] == pytest.approx(strong[0], rel=1e-5) and 8 < strong[1] / weak[1] < 10
    assert max(weak[2], strong[2]) < weak[1] / 5


@pytest.mark.parametrize("recipe", ["nash_md", "nash_mp"])
def test_opponents_are_drawn_by_whom_the_method_names(recipe, train, monkeypatch):
    """Nash-MD asks for a mixture with the reference, Nash-MP for the target network alone; the policy plays all."""
    from keel.train import written

    asked = []
    plain = written.written_rows

    def noted(session, model, share, ids, count, **known):
        rows = plain(session, model, share, ids, count, **known)
        asked.append((model, share, count, len(rows)))
        return rows

    monkeypatch.setattr(written, "written_rows", noted)
    run = train(recipe, opponents=3, reward=brief, max_steps=2, **{"rollout.num_generations": 4})
    model, share = {"nash_md": ("ref", 0.125), "nash_mp": ("target", 1.0)}[recipe]
    assert asked == [(model, share, 3, 12)] * 2
    assert told(run, "num_rows") == [16.0, 16.0] and told(run, "win_rate/ess") == [1.0, 1.0]
    assert max(told(run, "grad_norm")) > 0
    weighted = train(recipe, opponents=0, reward=brief, max_steps=1, name="own", **{"rollout.num_generations": 4})
    assert len(asked) == 2 and told(weighted, "grad_norm")[0] > 0


@pytest.mark.parametrize(("recipe", "options"), [("did_dpo", {}), ("nash_md", {"opponents": 3, "reward": brief})])
def test_the_base_under_an_adapter_draws_alone_and_in_a_mixture(train, recipe, options):
    """With LoRA the reference is the policy's base, which is no model of its own."""
    settings = {"model.lora_rank": 2, "rollout.num_generations": 3}
    run = train(recipe, max_steps=2, **options, **settings)
    assert max(told(run, "grad_norm")) > 0
    assert recipe == "nash_md" or told(run, "pairs/number")[0] > 0


def test_inpo_learns_from_completions_of_its_last_iteration(train):
    """From step 3 on pi_t, and not the policy, has drawn both: what was drawn has its log-probability."""
    run = train("inpo", every=2, max_steps=4, **{"rollout.num_generations": 4})
    assert "rollout/logp_gap" not in run.metrics  # nothing is said of a sampler that is not the policy
    assert run.config.method.rollout.written.model == "past" and run.summary["steps"] == 4
    assert "rollout/logp_gap" in train("inpo", name="own", max_steps=1, **{"rollout.num_generations": 4}).metrics


def test_the_same_seed_gives_the_same_weights(train):
    runs = [train("online_ipo", name=f"run{i}", **{"rollout.num_generations": 4}) for i in range(2)]
    assert checksum(runs[0].model) == checksum(runs[1].model)


def test_a_judge_in_a_worker_process(train):
    run = train("online_dpo", judge=f"{HERE}:shorter", **{"rollout.num_generations": 4, "max_steps": 2})
    assert told(run, "judge/pairs")[-1] == 4 * 6
    assert told(run, "judge/errors")[-1] == 0
    assert told(run, "pairs/number")[-1] > 0
    assert 0.1 < told(run, "judge/order_gap")[-1] <= 0.2  # 0.9 against 1 - 0.3, and 0 for equals
    random = train("online_dpo", judge=f"{HERE}:shorter", pairs="random", name="random", max_steps=1,
                   **{"rollout.num_generations": 4})  # fmt: skip
    assert told(random, "judge/pairs")[-1] == 4 * 2  # asked for no more than these


@pytest.mark.parametrize(("recipe", "pairs"), [("sppo", 24), ("nash_md", 4 * 4 * 4), ("online_ipo", 24)])
def test_a_judge_serves_every_recipe(recipe, pairs, train):
    """Four prompts with four completions: every two of them, or each with each of four opponents."""
    run = train(recipe, judge=f"{HERE}:shorter", **{"rollout.num_generations": 4, "max_steps": 1})
    assert told(run, "judge/pairs")[-1] == pairs and told(run, "grad_norm")[-1] > 0


@pytest.mark.parametrize(("judge", "said"), [("raises", "the judge is ill"), ("too_large", "2 is no probability")])
def test_a_judge_that_fails_costs_its_groups(judge, said, train):
    texts = []
    with pytest.raises(TrainingError, match="no usable group"):
        train("online_dpo", judge=f"{HERE}:{judge}", max_steps=1, **{"rollout.num_prompts": 1},
              report=lambda event, facts: texts.append(str(facts)))  # fmt: skip
    assert any("the judge failed for 1 group, which is left out" in text and said in text for text in texts)


def test_two_judges_are_refused(train):
    method: Method = recipe_named("sppo")(judge=f"{HERE}:shorter")
    other = recipe_named("online_dpo")(judge=f"{HERE}:raises").transforms["pairs"]
    with pytest.raises(MethodError, match="two judges"):
        train(method.adding(transforms={"more": other}), max_steps=1)


def multiplies(completions, **_):
    """A reward that some four in ten completions of the built-in model meet."""
    return [float("*" in text) for text in completions]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in comparing(own_judge=False) if drawn_by_policy(name)])
def test_the_reward_rises(recipe, train):
    """The built-in model, 30 batches: from the first five to the last ten, by more than chance would move it."""
    known = {"rollout.num_prompts": 16, "learning_rate": 3e-4, "reward": multiplies}
    run = train(recipe, model="tiny", max_steps=30, **known)
    reward = told(run, "reward")
    assert sum(reward[-10:]) / 10 > sum(reward[:5]) / 5 + 0.08


@pytest.mark.slow
def test_what_the_reference_draws_teaches_by_who_is_rejected(train):
    """The reference draws all of it, so that the policy's own successes are measured apart: they become more."""
    known = {"rollout.num_prompts": 16, "evaluate.before": True, "evaluate.after": True, "evaluate.num_prompts": 128}
    known |= {"label_temperature": 0.2, "rejected": "weighted", "learning_rate": 3e-5}
    run = train("did_dpo", model="tiny", max_steps=40, **known)
    before, after = (run.evaluations[phase].metrics["pass@1"].value for phase in ("before", "after"))
    assert after > before + 0.01
    margins = told(run, "rewards/margins")
    assert sum(margins[-10:]) > sum(margins[:10])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", comparing(own_judge=True))
def test_a_policy_moves_towards_what_it_scores_itself(recipe, train):
    """The chosen completion of its own pairs gains on the rejected one within an iteration."""
    run = train(recipe, model="tiny", max_steps=24, learning_rate=3e-4, every=24, **{"rollout.num_prompts": 16})
    margins = told(run, "rewards/margins")
    assert sum(margins[-6:]) > sum(margins[:6])


# -- policies that judge themselves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["self_rewarding", "cream"])
def test_self_rewarding_on_the_loop(recipe, train):
    """No reward is read: pairs are made of the policy's own scores from the first batch on."""
    run = train(recipe, reward=lambda completions: [0.0] * len(completions), every=2, **{"rollout.num_generations": 4})
    assert told(run, "pairs/groups")[0] == 1.0 and min(told(run, "grad_norm")) > 0
    if recipe == "cream":
        assert told(run, "pairs/consistency")[0] == 1.0  # both are the initial model
        assert all(0 <= c <= 1 for c in told(run, "pairs/consistency"))


def test_past_and_future_on_the_loop(train, monkeypatch):
    """Rounds of 2 x 2 batches: in their middle the policy is the round's model again, and its end is the next one's."""
    from keel.train import online

    seen = {}
    plain = online.go_back

    def noted(session):
        plain(session)
        step = session.position.step
        models = {"policy": session.policy, **{n: session.sources[n].model for n in ("ref", "past", "future")}}
        seen[step] = {name: checksum(model.module) for name, model in models.items()}
        seen[step]["moments"] = len(session.optimiser.tensors()) > 0

    monkeypatch.setattr(online, "go_back", noted)
    run = train("temporal_self_rewarding", every=2, max_steps=8, **{"rollout.num_generations": 4})
    first = seen[1]["ref"]
    assert seen[1]["policy"] != first and seen[1]["past"] == seen[1]["future"] == first
    assert seen[2]["policy"] == seen[2]["past"] == first != seen[2]["future"]
    assert [seen[step]["moments"] for step in range(1, 9)] == [True, False, True, True, True, False, True, True]
    assert seen[3]["policy"] != first and seen[3]["past"] == first
    assert seen[4]["past"] == seen[4]["policy"] == seen[6]["policy"] == seen[6]["past"] != first
    assert seen[6]["future"] != seen[2]["future"] and seen[8]["policy"] == checksum(run.model)
    ahead = told(run, "pairs/ahead")
    assert [ahead[i] for i in (0, 1, 4, 5)] == [0.0] * 4 and max(ahead[i] for i in (2, 3, 6, 7)) > 0
    assert max(told(run, "pairs/anchored")) > 0 and min(told(run, "pairs/gap")) > 0


def test_a_round_goes_on_where_it_was_broken_off(train):
    """Between its two halves, and right after the policy has gone back."""
    settings = {"every": 2, "max_steps": 4, "train.save_steps": 1, "rollout.num_generations": 3, "anchor": 2}
    whole = train("temporal_self_rewarding", future=2, name="whole", **settings)
    for cut in (2, 3):

        def stop(event, facts, cut=cut):
            if event == "step" and facts["step"] == cut + 1:
                raise RuntimeError("power cut")

        with pytest.raises(RuntimeError):
            train("temporal_self_rewarding", future=2, name=f"cut{cut}", report=stop, **settings)
        again = train("temporal_self_rewarding", future=2, name=f"cut{cut}", resume=True, **settings)
        assert checksum(again.model) == checksum(whole.model)


def test_a_run_that_ends_within_a_look_ahead_is_told(train):
    texts = []
    settings = {"every": 2, "max_steps": 1, "rollout.num_generations": 3}
    train("temporal_self_rewarding", report=lambda event, facts: texts.append(str(facts.get("text"))), **settings)
    assert any("take a multiple of that for train.max_steps" in text for text in texts)


def test_rounds_with_past_and_future(base, tmp_path):
    """Two rounds by a judge that likes what is short; every run begins from the model of its round."""
    from keel.train.self_rewarding import self_reward

    found = self_reward(
        base, "countdown", rounds=2, completions=3, num_prompts=6, reward=brief, runs=tmp_path, agreement="mean",
        max_steps=2, learning_rate=1e-3, **{"train.batch_size": 4, "evaluate.before": False, "evaluate.after": False},
    )  # fmt: skip
    assert [entry.path.name for entry in found] == ["self_rewarding-1", "self_rewarding-2"]
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} >= {"self_rewarding-1-ahead", "self_rewarding-2-ahead"}
    for entry in found:
        assert entry.pairs and entry.gap > 0 and 0 <= entry.anchored <= 1 and 0 <= entry.ahead <= 1
        assert all(len(pair["chosen"]) < len(pair["rejected"]) for pair in entry.pairs)
        assert entry.agreement == 1.0  # one judge for all rounds
        assert (entry.model / "config.json").is_file()


def test_rounds_without_a_judge_are_repeatable(base, tmp_path):
    from keel.train.self_rewarding import self_reward

    def once(place):
        return self_reward(
            base, "countdown", rounds=2, completions=3, num_prompts=6, runs=place, look_ahead=False, agreement="prompt",
            max_steps=2, learning_rate=1e-2,
            **{"train.batch_size": 4, "evaluate.before": False, "evaluate.after": False},
        )  # fmt: skip

    first, again = once(tmp_path / "a"), once(tmp_path / "b")
    assert [entry.pairs for entry in first] == [entry.pairs for entry in again]
    assert first[0].ahead == 0 and {"prompt", "chosen", "rejected", "probability"} == set(first[0].pairs[0])
    assert first[0].agreement == 1.0 and 0 <= first[1].agreement <= 1.0


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"completions": 1}, {"num_prompts": 0}])
def test_rounds_out_of_range(base, tmp_path, wrong):
    from keel.train.self_rewarding import self_reward

    with pytest.raises(ConfigError, match="at least"):
        self_reward(base, "countdown", runs=tmp_path, **wrong)
