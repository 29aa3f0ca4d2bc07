"""`keel.compare` from Python."""

import pytest

import keel
from keel.compare.asked import Asked
from keel.compare.entry import compare
from keel.compare.outcomes import Budget
from keel.core.errors import ConfigError
from tests.compare.small import SETTINGS, TASK, Pretending

WRONG = {
    "a callable": ({"reward": lambda **_: [1.0]}, "processes of their own"),
    "rows": ({"data": [{"prompt": "1+1=", "answer": "2"}]}, "processes of their own"),
    "a model": ({"model": object()}, "processes of their own"),
    "two strengths": ({"tune": {"beta": [1], "epsilon": [1]}}, "one thing is tuned at a time"),
    "no budget": ({"budget": "many"}, "cannot be read: 'many'"),
    "no seed": ({"seeds": 0}, "must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_is_refused(tmp_path, name):
    given, said = WRONG[name]
    with pytest.raises(ConfigError, match=said):
        keel.compare(["grpo"], runs=tmp_path, quiet=True, **given)


def test_the_function_is_the_command(model, tmp_path, monkeypatch, capsys):
    """The same cells, under the name that the recipes give; quiet is quiet."""
    launch = Pretending()
    monkeypatch.setattr("keel.compare.work.local", lambda gpus: launch)
    given = {"task": TASK, "model": model, "budget": Budget(2, "steps"), "settings": SETTINGS, "runs": tmp_path}
    found = keel.compare("grpo", seeds=2, param={"beta": [0.0, 0.1]}, quiet=True, **given)
    assert [(arm.name, arm.recipe) for arm in found.comparison.arms] == [
        ("grpo beta=0", "grpo"),
        ("grpo beta=0.1", "grpo"),
    ]
    assert found.report.read_text().startswith("<!doctype html")
    assert found.path.name.startswith("Lengths-grpo-2-steps-")
    assert found.analysis.baseline == "grpo beta=0"
    assert capsys.readouterr() == ("", "")
    assert keel.compare.__wrapped__ is compare


def test_the_command_asks_for_the_same(tmp_path):
    """What the record says can be typed again."""
    import shlex

    from keel.compare.arms import swept_values
    from keel.compare.plan import Conditions
    from keel.compare.tuning import Tuning
    from keel.train.configuration import parse_value

    settings = (("scale_rewards", "none"), ("train.learning_rate", 1e-4), ("train.trackers", ["a b"]))
    asked = Asked(
        ("grpo", "a b.py:mine"),
        Conditions(Budget(300, "seconds"), task="sparse", settings=settings),
        swept={"beta": [0.01, 0.1]},
        tuning=Tuning("epsilon", (0.1, 0.2)),
        name="it's",
    )
    words = shlex.split(asked.command)
    assert words[:4] == ["keel", "compare", "grpo", "a b.py:mine"]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert (options["--budget"], options["--task"], options["--name"]) == ("5min", "sparse", "it's")
    assert swept_values([options["--param"]], "--param") == {"beta": [0.01, 0.1]}
    assert swept_values([options["--tune"]], "--tune") == {"epsilon": [0.1, 0.2]}
    given = [words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--set"]
    assert [(key, parse_value(text)) for key, text in given] == [*settings]
