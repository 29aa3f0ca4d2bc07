"""Samplers on a language model, through the Python functions and the commands that people call."""

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.commands import keel as command
from typer.testing import CliRunner

import keel
from keel.cli.main import app
from keel.core.chance import Sample
from keel.core.errors import ConfigError, UserError
from keel.evaluate.cost import Curve, point
from keel.report.cost import cost_page, cost_picture, cost_table
from keel.sampling.catalogue import SAMPLERS
from keel.train import sampling
from keel.train.readers import fit_reader
from keel.train.sampling import Beside, opened
from keel.train.values import LearnedValue, fit_value

EXTRA = {"rejection": {"bound": 1.0}, "dynamic_logit_fusion": {"base": "other", "experts": ("other",)}}
EXTRA |= {name: {"other": "other"} for name in ("uscd", "cfg")}


def half(prompts, completions, **columns):
    return [0.5 for _ in completions]


def short(prompts, completions, **columns):
    """A reward that the small model meets often: few characters."""
    return [1.0 / (1 + len(completion)) for completion in completions]


@pytest.fixture(scope="module")
def bench(base, task):
    """A bench whose predictions are learnt from few samples."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sampling, "FITTED_PROMPTS", 96)
    patch.setattr(sampling, "FITTED_SAMPLES", 4)
    with opened(base, "countdown", reward={"short": short}, beside={"other": Beside(None, "1{prompt}")}) as (
        made,
        found,
    ):
        made.seen(96, 4)
        yield made, found[:6]
    patch.undo()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_on_a_language_model(bench, name):
    made, examples = bench
    options = {SAMPLERS[name].knob: 3, **EXTRA.get(name, {})}
    found = made.run(name, options, examples, seed=1)
    assert len(found) == len(examples)
    for account, example in zip(found, examples, strict=True):
        assert account.prompt == example.prompt
        assert sum(c.weight for c in account.completions) == pytest.approx(1, abs=1e-9)
        assert sum(c.picked for c in account.completions) == 1
        assert account.pick.reward == pytest.approx(short([""], [account.pick.text])[0])
        assert account.generated > 0 and account.rewards > 0 and account.seconds > 0
    again = made.run(name, options, examples, seed=1)
    assert [a.pick.text for a in again] == [a.pick.text for a in found]


def test_a_value_finds_better_texts_with_the_same_tokens(base):
    """Mean reward of 24 prompts where a text is the better the more it holds of one symbol."""

    def pluses(prompts, completions, **columns):
        return [completion.count("+") / 4 for completion in completions]

    with opened(base, "countdown", reward={"pluses": pluses}) as (made, examples):
        value, facts = fit_value(made.seen(128, 4), made.policy, "mean", epochs=12, batch_size=64, learning_rate=5e-3)
        assert facts["explained"] > 0.2

        def mean_reward(name, **options):
            found = made.run(name, {"beta": 0.05, **options}, examples[:24], 0)
            return float(np.mean([c.reward for a in found for c in a.completions]))

        plain = mean_reward("decode", num_particles=4)
        made.value = value
        assert mean_reward("value_augmented", num_particles=4) > plain + 0.1
        assert mean_reward("soft_value_decoding", num_particles=4, num_candidates=6) > plain + 0.1


def test_a_reader_with_caches_says_what_a_pass_over_the_text_says(bench):
    made, examples = bench
    reader = fit_reader(made.seen(), made.policy, lambda out, sample, place: out.square().mean(), epochs=1)
    torch.nn.init.normal_(reader.head.last.weight)
    chain = made.chain(examples, None)
    joined = sampling.JointChain(chain, {sampling.BESIDE: reader.beside(chain)})
    x = joined.init(2)
    for step in range(5):
        x = joined.extend(x, joined.propose(x, 1, Sample(step))[0])
    x = joined.select(x, torch.tensor([3, 0, 0, 7, 11]))
    before = int(joined.meter.scored.sum())
    cached = reader(joined, x)
    assert int(joined.meter.scored.sum()) - before == int(x.length[x.done].sum())
    bare = sampling.Prefix(x.tokens, x.logp, x.length, x.stop, x.prompt)
    torch.testing.assert_close(cached, reader(chain, bare), rtol=0, atol=1e-3)


def test_a_value_is_written_and_read(bench, tmp_path):
    made, examples = bench
    for own_body in (True, False):
        value, facts = fit_value(made.seen(), made.policy, "mean", own_body=own_body, epochs=1)
        value.save(tmp_path / f"value{own_body}", **facts)
        again = LearnedValue.load(tmp_path / f"value{own_body}")
        chain = made.chain(examples, None)
        x = chain.complete(chain.init(1), 2, Sample(0))
        torch.testing.assert_close(again.reader(chain, x), value.reader(chain, x), rtol=0, atol=1e-5)
        assert (again.kind, again.low, again.high) == (value.kind, value.low, value.high)


def test_chunks_of_prompts_change_nothing(bench, monkeypatch):
    made, examples = bench
    whole = made.run("smc", {"num_particles": 4}, examples, 3)
    monkeypatch.setattr(sampling, "MAX_ROWS", 8)
    parts = made.run("smc", {"num_particles": 4}, examples, 3)
    assert [c.text for a in whole for c in a.completions] == [c.text for a in parts for c in a.completions]
    assert [a.log_z for a in whole] == pytest.approx([a.log_z for a in parts], abs=1e-6)


def test_log_z_and_kl_agree_with_long_run_averages(bench):
    """300 runs of SMC with 8 particles against 8192 plain completions, on one prompt."""
    made, examples = bench
    example = examples[0]
    chain = made.chain([example], None)
    x = chain.complete(chain.init(1), 8192, Sample(5))
    beta = 0.05
    chain.reward_of = sampling.TextReward(made.functions, [example], made.encoder)
    tilt = (chain.reward(x) / beta).exp()
    z, spread = float(tilt.mean()), float(tilt.std()) / 8192**0.5
    kl = float((tilt * tilt.log()).mean()) / z - math.log(z)
    again = [replace(example, index=i) for i in range(300)]  # the index decides the randomness
    runs = made.run("smc", {"num_particles": 8, "beta": beta}, again, 7)
    assert len({a.pick.text for a in runs}) > 10
    estimates = np.exp([a.log_z for a in runs])
    error = 5 * math.hypot(estimates.std() / 300**0.5, spread)
    assert abs(estimates.mean() - z) < error
    spends = estimates * (np.array([a.kl + a.log_z for a in runs]) - math.log(z)) / z
    assert abs(spends.mean() - kl) < 5 * spends.std() / 300**0.5 + 0.05 * kl


def test_values_by_name(base, tmp_path):
    def of_states(chain, x, rng):
        return torch.where(x.done, 0.0, 0.5)

    for value in ("monte_carlo:2", of_states, f"{__name__}:half", f"odds:{__name__}:half"):
        with opened(base, "countdown", value=value) as (made, examples):
            found = made.run("smc", {"num_particles": 3}, examples[:3], 0)
            assert all(math.isfinite(a.log_z) for a in found)
            assert (max(a.scored for a in found) > 0) == (isinstance(value, str) and "half" in value)
    for wrong, what in (("fit:median", "fit"), ("monte_carlo:x", "monte_carlo"), ("nowhere", "folder")):
        with pytest.raises(ConfigError, match=what), opened(base, "countdown", value=wrong):
            pass


def test_steps_end_at_their_delimiter(base):
    found = keel.sample(base, 3, task="countdown", method="smc", num_particles=4, step="+", reward=short)
    assert len(found) == 3 and all(a.generated >= 4 for a in found)
    with pytest.raises(UserError, match="by steps"):
        keel.sample(base, 1, task="countdown", method="twisted_smc", step="+", reward=short)


def test_a_reward_that_fails_is_named(base):
    def broken(prompts, completions, **columns):
        raise RuntimeError("no oracle today")

    def too_few(prompts, completions, **columns):
        return [1.0]

    for reward, said in ((broken, "no oracle today"), (too_few, "returned 1 value")):
        with pytest.raises(UserError, match=said):
            keel.sample(base, 1, task="countdown", method="soft_best_of_n", reward=reward)


def test_what_is_wrong_is_named(base):
    with pytest.raises(ConfigError, match="smc"):
        keel.sample(base, 1, task="countdown", method="smcc")
    with pytest.raises(ConfigError, match="resampling"):
        keel.sample(base, 1, task="countdown", method="smc", resamplin="systematic")
    with pytest.raises(ConfigError, match="num_particles"):
        keel.sample(base, 1, task="countdown", method="smc", num_particles=0)
    with pytest.raises(ConfigError, match="beside"):
        keel.sample(base, 1, task="countdown", method="cfg")


def test_the_commands(base, tmp_path):
    common = ("--task", "countdown", "--json")
    drawn = command("sample", "--model", base, "--method", "smc", "--num-prompts", 2, "--num-particles", 4, *common)
    assert drawn.returncode == 0, drawn.stderr
    accounts = json.loads(drawn.stdout)
    assert len(accounts) == 2 and sum(c["weight"] for c in accounts[0]["completions"]) == pytest.approx(1)
    page = tmp_path / "cost.html"
    sizes = ("--num-particles", "1,2", "--seeds", 2, "--set", "num_prompts=4", "--html", page)
    drawn = command("eval", base, "--method", "best_of_n,smc", *sizes, *common)
    assert drawn.returncode == 0, drawn.stderr
    curves = [Curve.from_json(row) for row in json.loads(drawn.stdout)]
    assert [c.name for c in curves] == ["best_of_n", "smc"] and [p.size for p in curves[1].points] == [1, 2]
    assert curves[0].points[0].seeds == 2 and "keel eval" in page.read_text()


def test_mistakes_in_the_commands_are_named(base):
    with pytest.raises(ConfigError, match="1,4,16"):
        CliRunner().invoke(app, ["eval", base, "--method", "smc", "--num-particles", "four"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="for samplers"):
        CliRunner().invoke(app, ["sample", "1 2 3>6=", "--num-particles", "4"], catch_exceptions=False)
    listed = CliRunner().invoke(app, ["samplers", "--json"], catch_exceptions=False)
    assert set(json.loads(listed.stdout)) == set(SAMPLERS)


def test_a_value_can_be_fitted_by_a_command(base, tmp_path):
    options = ("--model", base, "--task", "countdown", "--num-prompts", 64, "-n", 4, "--head-only")
    options = (*options, "--reward", f"{__name__}:short")
    done = command("fit-value", tmp_path / "value", *options)
    assert done.returncode == 0 and "explained" in done.stdout, done.stderr
    found = keel.sample(base, 2, task="countdown", method="smc", value=str(tmp_path / "value"))
    assert len(found) == 2
    assert command("fit-value", tmp_path / "value", *options).returncode == 2


# -- accuracy against tokens ------------------------------------------------------------------------------------------


def curves() -> list[Curve]:
    rng = np.random.default_rng(0)
    found = []
    for name, family in (("best_of_n", ""), ("smc", "particles"), ("a & b", "particles"), ("tree", "search")):
        points = []
        for size in (1, 4, 16):
            correct = (rng.random((3, 40)) < 1 - 0.6**size).astype(float)
            numbers = {"generated": [[8.0 * size] * 40] * 3, "scored": [[0.0] * 40] * 3}
            rest = {key: [[math.nan] * 40] * 3 for key in ("rewards", "ess", "log_z", "log_z_error", "kl", "seconds")}
            points.append(point(size, correct, numbers | rest, kl_is_bound=True))
        found.append(Curve(name, family, tuple(points)))
    return found


def test_a_point_averages_over_seeds_and_prompts():
    made = point(
        4,
        np.array([[1.0, 0.0], [1.0, 1.0]]),
        {"generated": [[3, 5], [5, 7]], "scored": [[1, 1], [1, 1]], "kl": [[math.nan, 1.0], [2.0, math.nan]]},
        kl_is_bound=False,
    )
    assert made.accuracy.value == 0.75 and made.tokens == 6 and made.numbers["kl"] == 1.5
    assert (made.prompts, made.seeds) == (2, 2)


def test_curves_are_written_and_drawn():
    made = curves()
    again = [Curve.from_json(json.loads(json.dumps(c.to_json()))) for c in made]
    assert [c.points[2].accuracy for c in again] == [c.points[2].accuracy for c in made]
    head, rows = cost_table(made)
    assert len(rows) == 12 and all(len(row) == len(head) for row in rows)
    for theme in ("light", "dark"):
        root = ElementTree.fromstring(cost_picture(made, theme))
        said = " ".join(element.text or "" for element in root.iter())
        assert "particles" in said and "a & b" in said and said.count("best_of_n") >= 2
    assert "a &amp; b" in cost_page(made)
