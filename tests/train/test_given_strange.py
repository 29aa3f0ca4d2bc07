"""What the built-in model cannot read is said, and options of the command are no settings."""

import pytest

from keel.core.errors import ConfigError
from keel.train.configuration import Request, resolve
from keel.train.setup import prepare_setup


def warnings(prompts, base, model="tiny"):
    """What is said before a run begins, of prompts and the model that reads them."""
    said = []
    report = lambda event, facts: said.append((event, facts["text"]))  # noqa: E731
    data = [{"prompt": prompt} for prompt in prompts]
    known = {"seed": 0, "name": "strange", "config": None, "settings": {"task.held_out": 0.0}, "report": report}
    prepare_setup("grpo", model if model == "tiny" else base, None, None, data, len, **known)
    return [text for event, text in said if event == "warning"]


def test_prompts_that_the_built_in_model_cannot_read_are_told(base, monkeypatch):
    monkeypatch.setattr("keel.train.setup.ensure_base", lambda task, report: base)
    strange = ["1 2 3>7=", "What is 2+3?", [{"role": "user", "content": "zwölf"}]]
    (text,) = warnings(strange, base)
    assert "2 of 3 prompts" in text and "'?'" in text and "--model" in text
    assert warnings(["1 2 3>7="], base) == [] == warnings(strange, base, "a folder")


@pytest.mark.parametrize("key", ["seed", "name"])
def test_a_setting_that_is_an_option_is_named(key):
    with pytest.raises(ConfigError, match=f"{key}: is no setting. Give it as --{key}"):
        resolve(Request("grpo", {key: 3}))
