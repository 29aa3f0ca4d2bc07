"""Compositions as YAML and back, and the errors on the way."""

from dataclasses import dataclass
from enum import Enum

import pytest
import yaml
from tests.cases import Case, recipe_cases

from keel.core.config import build, check, from_config, get_path, set_path, to_config
from keel.core.errors import ConfigError, KeelError, MethodError, UserError, nearest
from keel.core.registry import PAPERS, part, part_class, part_name
from keel.parts.advantages.stream import Whiten
from keel.parts.terms.penalties import SampledKL, Summand
from keel.parts.terms.surrogate import Clipped, Surrogate
from keel.recipes.registry import recipe_named


@pytest.mark.parametrize("case", recipe_cases(), ids=str)
def test_every_recipe_survives_yaml(case: Case):
    text = yaml.safe_dump(to_config(case.method), sort_keys=False)
    again = from_config(yaml.safe_load(text))
    assert again == case.method
    assert list(again.advantage) == list(case.method.advantage)  # chains keep their order
    assert yaml.safe_dump(to_config(again), sort_keys=False) == text


def test_plain_data():
    assert to_config(Surrogate(Clipped(0.3))) == {
        "part": "surrogate",
        "f": {"part": "clipped", "epsilon": 0.3, "epsilon_high": None, "dual": None},
        "level": "token",
    }

    class Colour(Enum):
        RED = 1

    assert to_config({"a": (1, [2.5, "x"]), "b": Colour.RED, 3: None}) == {"a": [1, [2.5, "x"]], "b": "red", "3": None}


@dataclass
class Unregistered:
    size: int = 1


@pytest.mark.parametrize(
    ("value", "what"),
    [(lambda x: x, "function cannot be written"), (Unregistered(), "Unregistered is not a registered part")],
)
def test_what_cannot_be_written(value, what):
    with pytest.raises(ConfigError, match=what):
        to_config({"reward": value})


def test_numbers_written_as_strings():
    """YAML reads 1e-3 as a string; so does a shell."""
    read = yaml.safe_load("{part: clipped, epsilon: 1e-3, dual: 3}")
    assert read["epsilon"] == "1e-3"
    assert from_config(read) == Clipped(1e-3, None, 3.0)
    assert from_config({"part": "overlong", "max_length": "256", "cache": 16}).max_length == 256


@pytest.mark.parametrize(
    ("data", "where", "what"),
    [
        ({"part": "clipped", "epsilom": 0.1}, "epsilom", "unknown key. Did you mean 'epsilon'?"),
        ({"part": "clipped", "epsilon": "much"}, "epsilon", "got 'much'"),
        ({"part": "clipped", "epsilon": -1.0}, None, "must not be negative"),
        ({"part": "clippd"}, None, "no part named 'clippd'. Did you mean 'clipped'?"),
        ({"part": "surrogate"}, None, "Surrogate needs the key 'f'"),
        ({"terms": {"kl": {"part": "summand", "coef": 1}}}, "terms.kl", "needs the key 'penalty'"),
        ({"terms": {"kl": {"part": "summand", "penalti": 1}}}, "terms.kl.penalti", "Did you mean 'penalty'?"),
        ({"part": "overlong", "max_length": 1.5, "cache": 1}, "max_length", "got 1.5"),
        ({"part": "aggregation", "mode": "mean"}, "mode", "token_mean"),
        ({"part": "surrogate", "f": {"part": "clipped", "dual": "x"}}, "f.dual", "got 'x'"),
        ({"part": "method", "surrogate": {"part": "clipped"}}, "surrogate", "Surrogate"),
        ([{"part": "clipped", "high": 1}], "[0].high", "Allowed: epsilon, epsilon_high, dual."),
    ],
)
def test_errors_name_the_key_and_what_is_allowed(data, where, what):
    with pytest.raises(ConfigError) as error:
        from_config(data)
    assert what in str(error.value)
    assert error.value.where == where and error.value.exit_code == 2


def test_build_checks_each_value():
    assert build(Whiten, {"epsilon": "1e-6", "centre": "false"}) == Whiten(centre=False, epsilon=1e-6)
    with pytest.raises(ConfigError, match=r"advantage\.whiten\.centre"):
        build(Whiten, {"centre": "perhaps"}, "advantage.whiten")
    assert check("3", int | None, "x") == 3 and check(None, int | None, "x") is None


# -- paths -----------------------------------------------------------------------------------------------------------

GRPO = recipe_named("grpo")(beta=0.1)


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("terms.kl.coef", "1e-3", 0.001),
        ("terms.kl.penalty.estimator", "k2", "k2"),
        ("surrogate.f.epsilon", 0.3, 0.3),
        ("surrogate.f.epsilon_high", None, None),
        ("advantage.scale.scope", "batch", "batch"),
        ("rollout.num_generations", "16", 16),
        ("rollout.stop_strings", ["a", "b"], ("a", "b")),
        ("aggregation.mode", "sequence_mean_token_sum", "sequence_mean_token_sum"),
    ],
)
def test_set(path, value, wanted):
    changed = GRPO.set(path, value)
    assert get_path(changed, path) == wanted
    assert changed.set(path, get_path(GRPO, path)) == GRPO  # nothing else has changed
    assert get_path(GRPO, path) != wanted or wanted is None


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("terms.kk.coef", 1.0, "terms.kk: there is no entry 'kk'. Did you mean 'kl'? Entries: kl."),
        ("terms.kl.coeff", 1.0, "terms.kl.coeff: unknown key. Did you mean 'coef'?"),
        ("surogate.level", "token", "surogate: unknown key. Did you mean 'surrogate'?"),
        ("terms.kl.coef.x", 1.0, "'terms.kl.coef' has no settings of its own"),
        ("terms.kl.coef", "small", "terms.kl.coef: "),
        ("surrogate.level", "word", "surrogate.level: "),
        ("surrogate.f.dual", 0.5, "surrogate.f.dual: dual must be above 1"),
        ("rollout.num_generations", 0, "must be at least 1"),
    ],
)
def test_set_refuses(path, value, what):
    with pytest.raises(ConfigError) as error:
        GRPO.set(path, value)
    assert what in str(error.value)


def test_set_path_in_dictionaries_keeps_the_rest():
    data = {"a": {"b": 1, "c": 2}, "d": Summand(SampledKL(), 1.0)}
    changed = set_path(data, "a.b", 5)
    assert changed["a"] == {"b": 5, "c": 2} and data["a"] == {"b": 1, "c": 2}
    assert set_path(data, "d.coef", "2")["d"].coef == 2.0


# -- the registry ----------------------------------------------------------------------------------------------------


def test_names_are_unique():
    def local() -> type:
        @dataclass(frozen=True)
        class Clipped2:
            pass

        return Clipped2

    with pytest.raises(ConfigError, match=r"part name 'clipped' is taken by keel\.parts\.terms\.surrogate\.Clipped"):
        part("clipped")(local())
    assert part_class("clipped") is Clipped and part_name(Clipped) == "clipped"
    assert part_name(local()) is None
    part("clipped")(Clipped)  # the same class again, as when its module is reloaded


def test_every_part_can_be_found_by_its_name():
    recipe_cases()
    for name in PAPERS:
        assert part_name(part_class(name)) == name


# -- errors ----------------------------------------------------------------------------------------------------------


def test_an_error_says_what_where_and_what_to_do():
    error = MethodError("it is wrong", "terms.kl", "Do this.")
    assert str(error) == "terms.kl: it is wrong. Do this."
    assert (error.what, error.where, error.fix, error.exit_code) == ("it is wrong", "terms.kl", "Do this.", 2)
    with pytest.raises(UserError, match="it is wrong"):
        raise error
    assert KeelError("broken").exit_code == 1 and str(KeelError("broken")) == "broken"


def test_nearest():
    assert nearest("beta_", ["beta", "gamma"]) == " Did you mean 'beta'?"
    assert nearest("xyz", ["beta", "gamma"]) == ""
