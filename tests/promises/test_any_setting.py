"""Random `--set` keys and values: accepted, or refused with the key and the nearest spelling; never a traceback."""

import functools
import importlib.metadata
import random
import re

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keel.core.errors import ConfigError, MethodError, UserError
from keel.recipes.registry import recipe_named
from keel.tasks.data import load_data
from keel.train.configuration import SECTIONS, Request, from_dict, parse_value, resolve, settings_of_task

RECIPES = ("grpo", "ppo", "sft", "grpo_forward_kl", "dapo")
TASK = load_data([{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}], held_out=0.5)


def paths(recipe):
    """Every key that exists: arguments of the recipe, sections, and paths into the method."""
    known = recipe_named(recipe)
    method = known()
    found = list(known.arguments)
    found += [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]

    def walk(value, where):
        if isinstance(value, dict):
            items = value.items()
        elif hasattr(value, "__dataclass_fields__"):
            items = ((name, getattr(value, name)) for name in value.__dataclass_fields__)
        else:
            return
        for name, item in items:
            here = f"{where}.{name}" if where else name
            found.append(here)
            walk(item, here)

    walk(method, "")
    return sorted(set(found))


KEYS = {recipe: paths(recipe) for recipe in RECIPES}


@st.composite
def keys(draw, recipe):
    """A key that exists, one with a slip of the finger, pieces put together anew, or any text."""
    known = KEYS[recipe]
    key = draw(st.sampled_from(known))
    how = draw(st.integers(0, 9))
    if how <= 4:
        return key
    if how <= 6:
        place = draw(st.integers(0, len(key) - 1))
        slip = draw(st.sampled_from(["", key[place] * 2, "x", ".", "_", " ", "é"]))
        return key[:place] + slip + key[place + 1 :]
    if how == 7:
        pieces = st.sampled_from([piece for name in known for piece in name.split(".")] + [""])
        return ".".join(draw(st.lists(pieces, min_size=1, max_size=4))) or "x"
    if how == 8:
        return f"{key}.{draw(st.sampled_from(known))}"
    return draw(st.text(max_size=12).filter(lambda text: text.partition("=")[0].strip()))


PLAIN = st.one_of(
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.sampled_from(["1e-3", "inf", "-inf", "nan", ".nan", "~", "0x10", "1_000", "1e400"]),
    st.sampled_from(["2024-01-01", "1:30", "null", "true", "off"]),
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("part"), inner, max_size=3)
    ),
    max_leaves=5,
)
TEXTS = st.one_of(
    VALUES.map(lambda value: yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("\n...")),
    st.text(max_size=12),
    st.sampled_from(
        [
            "!!python/object/apply:os.system [exit]",
            "!!python/name:os.system",
            "!!int x",
            "!!float x",
            "!!binary é",
            "!!timestamp x",
            "2024-99-99",
            "&a [*a]",
            "&a {x: *a}",
            "{part: grpo}",
            "{part: [1]}",
            "{part: clipped, epsilon: x}",
            "{part: clipped}",
            "{? [1] : 2}",
            "{1: 2}",
            "[" * 300,
            "[" * 300 + "]" * 300,
            "9" * 5000,
            "\x00",
            "\ud800",
            "@",
            "*b",
            "{part: k3}",
            "!!set {a, b}",
        ]
    ),
)


@st.composite
def requests(draw):
    recipe = draw(st.sampled_from(RECIPES))
    chosen = draw(st.lists(keys(recipe), min_size=1, max_size=2, unique=True))
    return recipe, [f"{key}={draw(TEXTS)}" for key in chosen]


def attempt(recipe, options):
    """Through the functions that `keel train --set` goes through, up to the written configuration and back."""
    try:
        values = {key.strip(): parse_value(text) for key, _, text in (option.partition("=") for option in options)}
        request = Request(recipe=recipe, values=values)
        settings_of_task(request)
        found = resolve(request, TASK)
    except UserError as error:
        assert error.exit_code == 2
        said = str(error).lower()
        words = [w for o in options for w in re.split(r"[.\s]+", o.partition("=")[0].lower()) if w]
        named = (
            isinstance(error, MethodError)
            or not words
            or any(word in said or repr(word)[1:-1].lower() in said for word in words)
        )
        assert named or "recipe '" in said or "--set" in said, f"{options}: {error}"
        return None
    text = found.to_yaml()
    assert from_dict(yaml.safe_load(text)).to_yaml() == text
    return found


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Installed packages are asked for recipes at each look-up; once will do."""
    asked = importlib.metadata.entry_points
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "entry_points", functools.cache(asked))
        yield


def check(example):
    recipe, options = example
    attempt(recipe, options)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
test_a_few_hundred_settings = settings(max_examples=300, **QUIET)(given(requests())(check))
test_ten_thousand_settings = pytest.mark.slow(settings(max_examples=10_000, **QUIET)(given(requests())(check)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_slip_of_the_finger_is_told_the_nearest_spelling(recipe):
    """One letter doubled in the last word of every key that is long enough to be recognised."""
    draw = random.Random(recipe)
    for key in KEYS[recipe]:
        head, _, word = key.rpartition(".")
        if len(word) < 5:
            continue
        place = draw.randrange(1, len(word))
        wrong = word[:place] + word[place] + word[place:]
        slip = f"{head}.{wrong}" if head else wrong
        with pytest.raises(ConfigError) as error:
            resolve(Request(recipe=recipe, values={slip: 1}), TASK)
        assert "Did you mean '" in str(error.value) and wrong in str(error.value), f"{slip}: {error}"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.path.x", 1, "model.path.x"),
        ("task.options", 3, "task.options"),
        ("task.data.x", 1, "task.data.x"),
        ("train.learning_rate", float("nan"), "finite"),
        ("train.learning_rate", float("inf"), "finite"),
        ("terms", {"kl": 3}, "terms.NAME=VALUE"),
        ("rewards", [1], "rewards"),
        ("terms.kl", 3, "terms.kl"),
        ("terms.kl.penalty", 3, "terms.kl.penalty"),
        ("terms.kl.penalty", {"part": "sampled_kll"}, "Did you mean 'sampled_kl'"),
        ("terms.kl", {"part": ["summand"]}, "part"),
    ],
)
def test_values_that_only_break_later_are_refused_now(key, value, said):
    with pytest.raises(UserError, match=said):
        resolve(Request(recipe="grpo", values={"beta": 0.1, key: value}), TASK)


def test_a_part_is_set_as_it_is_written_in_a_configuration():
    found = resolve(Request(recipe="grpo", values={"surrogate.f": {"part": "clipped", "epsilon": 0.3}}), TASK)
    assert found.method.surrogate.f.epsilon == 0.3


@pytest.mark.parametrize("name", ["..", ".", "../other", "/tmp/other", "a/../../b", "\x00", "a\nb"])
def test_a_name_that_leads_out_of_the_runs_is_refused(name):
    with pytest.raises(ConfigError, match="name"):
        resolve(Request(recipe="grpo", name=name), TASK)
