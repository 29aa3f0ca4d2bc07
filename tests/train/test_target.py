"""`keel.target` and its command: from numbers, from a model's own samples, and how they refuse."""

import json
import math

import pytest
import torch
from tests.commands import keel as command

import keel
from keel.core.errors import ConfigError, RewardError, UserError
from keel.models.tiny import TinyConfig, build_tiny
from keel.train.encode import Encoder

FIVE = {"ref": [0.40, 0.25, 0.20, 0.10, 0.05], "reward": [0, 1, 0.5, 2, 1.5]}


@pytest.fixture(scope="module")
def policy(task):
    """Two layers of random weights: knows nothing, and has a distribution all the same."""
    return build_tiny(task.characters, TinyConfig(dim=16, layers=1, heads=2, feed_forward=32), 0)


def test_the_known_optimum():
    found = keel.target(**FIVE, beta=0.5).to_json()
    (target,) = found["targets"]
    assert target["kl"] == pytest.approx(0.918026, abs=1e-6)
    assert target["log_z"]["mean"] == pytest.approx(2.225165, abs=1e-6)
    best = found["prompts"][0]["outcomes"][0]
    assert (best["name"], best["good"], best["ref"]) == ("4", True, pytest.approx(0.1))
    assert best["target"] == [pytest.approx(0.589931, abs=1e-6)]


def test_a_sweep_over_strengths_and_divergences():
    found = keel.target(**FIVE, beta=[0.2, 0.5], divergence=["pearson", "js"], per_curvature=True)
    assert [f.beta for f in found.found] == [0.2, 0.5, 0.2, 0.5]
    pearson, js = found.found[1].log_prob[0].exp(), found.found[3].log_prob[0].exp()
    assert pearson.tolist() == pytest.approx([0, 0.395833, 0.116667, 0.358333, 0.129167], abs=1e-6)
    assert js.tolist() == pytest.approx([0.053953, 0.119315, 0.048742, 0.721004, 0.056987], abs=1e-6)
    assert "probability exactly 0 for 1 outcome of the reference" in " ".join(found.findings())


def test_collapse_by_design_is_said_with_its_numbers():
    """Good answers at 0.60, 0.045 and 0.005: the first holds 0.60 / 0.65 of the good mass, before and after."""
    found = keel.target(ref=[0.6, 0.045, 0.005, 0.35], reward=[1, 1, 1, 0])
    said = " ".join(found.findings())
    share = 0.60 / 0.65
    assert found.found[0].beta == 0.1
    assert f"holds {share:.1%} of the target; under the reference it held {share:.1%} of the good mass" in said
    assert "restricted to them" in said
    assert "`mara`" in said
    assert "would hold 33.3%" in said
    assert found.found[0].facts.surviving == 2  # 0.005 / 0.65 is below one in a hundred
    graded = " ".join(keel.target(**FIVE, beta=0.5).findings())
    assert "restricted" not in graded


def test_odds_that_are_kept_to_the_last_bit_are_kept_exactly():
    said = " ".join(keel.target(ref=[0.25, 0.25, 0.5], reward=[1, 1, 0], beta=0.1).findings())
    assert "under every divergence and every beta (here exactly)." in said and "0e+00" not in said


def sequences(policy, prompt, length):
    """All completions of a prompt up to a length with their probabilities, by the model's own softmax."""
    encoder = Encoder(policy)
    end = policy.tokenizer.eos_token_id
    found, open_ = {}, [((), 0.0)]
    for _ in range(length):
        grown = []
        for tokens, log_p in open_:
            ids = torch.tensor([encoder.prompt(prompt) + list(tokens)])
            with torch.no_grad():
                step = policy.module(ids).logits[0, -1].double().log_softmax(-1)
            for token, value in enumerate(step.tolist()):
                (found if token == end else dict()).update({(*tokens, token): log_p + value})
                if token != end:
                    grown.append(((*tokens, token), log_p + value))
        open_ = grown
    return found | dict(open_)


def test_samples_of_a_model(policy, task):
    """Completions of two tokens of a model that can be enumerated: exact probabilities, merged samples, log Z."""

    def digits(completions, **_):
        return [float(text.strip().isdigit()) for text in completions]

    n = 400
    found = keel.target(
        model=policy, task=task, reward=digits, num_prompts=2, num_generations=n, beta=1.0, max_completion_length=2
    )
    assert found.sampled == n
    for place, listed in enumerate(found.survey.prompts):
        assert len(set(listed.names)) == len(listed.names) == int(listed.samples.max()) + 1
        exact, ways = {}, {}
        for tokens, log_p in sequences(policy, task.held_out[place].prompt, 2).items():
            text = Encoder(policy).decode(list(tokens))
            exact[text] = exact.get(text, 0.0) + math.exp(log_p)
            ways[text] = ways.get(text, 0) + 1  # special tokens leave no text
        assert sum(exact.values()) == pytest.approx(1)
        known = [name for name in listed.names if ways[name] == 1]
        assert len(known) > 50
        masses = dict(zip(listed.names, listed.log_ref.exp().tolist(), strict=True))
        assert [masses[name] for name in known] == pytest.approx([exact[name] for name in known], rel=1e-4)
        assert all(masses[name] <= exact[name] * 1.0001 for name in listed.names)
        assert listed.unseen == pytest.approx(1 - sum(masses.values()))
        partition = found.found[0].partition
        log_z = math.log(sum(p * math.exp(float(name.strip().isdigit())) for name, p in exact.items()))
        assert abs(float(partition.log_z[place]) - log_z) < 4 * float(partition.standard_error[place])


def test_samples_of_a_trained_model(base):
    found = keel.target(model=base, task="countdown", num_prompts=6, num_generations=48, beta=[0.1], kl_budget=0.2)
    data = found.to_json()
    assert len(data["prompts"]) == 6
    assert {outcome["reward"] for prompt in data["prompts"] for outcome in prompt["outcomes"]} <= {0.0, 1.0}
    assert data["targets"][1]["kl"] == pytest.approx(min(0.2, data["targets"][1]["kl"]), abs=1e-9)
    again = keel.target(model=base, task="countdown", num_prompts=6, num_generations=48, beta=[0.1], kl_budget=0.2)
    assert again.to_json() == data  # the seed decides everything
    plain = keel.target(model=base, task="countdown", num_prompts=6, num_generations=48, count_completions=True)
    for listed, same in zip(found.survey.prompts, plain.survey.prompts, strict=True):
        assert (same.names, same.modes) == (listed.names, listed.names)
        assert len(set(listed.modes)) <= len(listed.names)
    assert any(len(set(listed.modes)) < len(listed.names) for listed in found.survey.prompts)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing to compute"),
        ({"ref": [1.0]}, "nothing to compute"),
        ({**FIVE, "beta": 0}, "beta: must be positive"),
        ({**FIVE, "best_of": 0.5}, "best_of: must be at least 1"),
        ({**FIVE, "kl_budget": -1}, "kl_budget: must be 0 or more"),
        ({**FIVE, "divergence": "kl_ref"}, "Did you mean"),
        ({**FIVE, "divergence": "tv", "per_curvature": True}, "no curvature"),
        ({**FIVE, "moments": {"reward": 3.0}}, "strictly between 0 and 2"),
        ({**FIVE, "model": "tiny"}, "either a model or the numbers"),
        ({**FIVE, "temperature": 0.5}, "belongs to a model's samples"),
        ({**FIVE, "reward": len}, "one number for each outcome"),
    ],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(UserError, match=says):
        keel.target(**options)


def test_a_model_needs_a_distribution_and_a_reward(policy, task):
    with pytest.raises(ConfigError, match="greedy"):
        keel.target(model=policy, task=task, temperature=0)

    def broken(completions, **_):
        raise RuntimeError("no verdict today")

    with pytest.raises(RewardError, match="no verdict today"):
        keel.target(model=policy, task=task, reward=broken, num_prompts=1, num_generations=2)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_a_page(tmp_path):
    (tmp_path / "o.csv").write_text("name,ref,reward\na+b,0.6,1\n<b>,0.05,1\nc,0.35,0\n")
    done = command("target", "o.csv", "--beta", "0.1,1", "--best-of", "8", "--html", "page.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "kl_policy_ref, beta 0.1" in done.stdout
    assert "* a+b" in done.stdout
    assert "92.3%" in done.stdout  # 0.6 / 0.65
    page = (tmp_path / "page.html").read_text()
    assert "<b>" not in page  # names are no markup
    assert page.count('data-figure="target-') == 1
    assert "default-src 'none'" in page


def test_the_command_as_json(tmp_path):
    options = ("--ref", "4/10,.25,.2,.1,.05", "--reward", "0,1,.5,2,1.5", "--beta", "0.05:5:3", "--moment", "reward=1")
    done = command("target", *options, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert [t["beta"] for t in found["targets"]] == [pytest.approx(0.05), pytest.approx(0.5), pytest.approx(5), None]
    assert found["targets"][1]["kl"] == pytest.approx(0.918026, abs=1e-6)
    assert found["targets"][3]["reward"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--ref", "a", "--reward", "1"), "'a' is not a number"),
        (("--ref", "1", "--reward", "1", "--moment", "x"), "NAME=VALUE"),
        (("none.csv",), "cannot be read"),
    ],
)
def test_the_command_refuses_without_a_traceback(options, says, tmp_path):
    done = command("target", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
