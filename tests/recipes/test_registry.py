"""Recipes by name: their arguments, what they say of themselves, and what they refuse."""

import dataclasses
import inspect

import pytest
from tests.cases import recipe_cases

from keel.core.errors import ConfigError
from keel.method import Method
from keel.parts.rewards.transforms import KLInReward
from keel.parts.terms.penalties import SampledKL, Summand, VocabularyDivergence
from keel.parts.terms.surrogate import CISPO, Clipped, Surrogate
from keel.recipes.registry import recipe, recipe_named, recipes

NAMES = ["cispo", "dapo", "dr_grpo", "gspo", "grpo", "grpo_forward_kl", "ppo", "reinforce", "reinforce_pp", "remax",
         "rloo", "sft"]  # fmt: skip


def test_the_standard_methods_are_there():
    assert set(NAMES) <= set(recipes()) and list(recipes()) == sorted(recipes())


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_explains_itself(name):
    """One sentence, the arguments, the source; a claim; a baseline that exists; neutral arguments that it has."""
    found = recipes()[name]
    text = inspect.getdoc(found.make)
    assert text and found.summary.endswith(".") and "Source:" in text
    own = [
        n for n, p in inspect.signature(found.make).parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    described = text.partition("Args:")[2].partition("Source:")[0]
    assert all(argument in described for argument in own)
    assert found.baseline is None or found.baseline in recipes()
    assert set(found.neutral) <= set(found.arguments)
    assert found().claim is not None


@pytest.mark.parametrize("case", recipe_cases(), ids=str)
def test_no_reference_is_loaded_in_vain(case):
    """A model is declared if and only if something reads it."""
    method: Method = case.method
    needs = [*method.prepare_needs(), *method.update_needs()]
    writers = set() if method.rollout is None else set(method.rollout.writers)
    drawn = {getattr(item, "source", None) for item in method.controllers.values()}  # who draws what a part looks at
    read = {name for need in needs for name in need.of} | writers | (drawn - {None})
    assert set(method.models) == read - {"policy", "old"}


def test_arguments_pass_on_to_the_baseline():
    dapo = recipe_named("dapo")
    assert dapo.arguments["num_generations"].default == 16 and dapo.arguments["beta"].default == 0.0
    method = dapo(beta="0.1", kl="k2", epsilon_high=0.3, max_completion_length="100")
    assert method.terms["kl"].coef == 0.1 and method.surrogate == Surrogate(Clipped(0.2, 0.3))
    assert method.rollout.num_generations == 16 and method.transforms["overlong"].cache == 20


def test_published_settings():
    grpo = recipe_named("grpo")
    assert grpo(beta=0.1).terms == {"kl": Summand(SampledKL("k3", ratio="differentiable"), 0.1)}
    assert grpo(beta=0.1, kl="k2").terms == {"kl": Summand(SampledKL("k2"), 0.1)}
    assert recipe_named("grpo_forward_kl")().terms == {"kl": Summand(VocabularyDivergence("kl_ref_policy"), 0.1)}
    assert recipe_named("rloo")().transforms == {"kl": KLInReward(0.05, "k1")}
    assert recipe_named("dr_grpo")().aggregation.max_length == 256
    assert set(recipe_named("dr_grpo")().advantage) == {"centre"}
    assert recipe_named("gspo")().surrogate == Surrogate(Clipped(3e-4, 4e-4), "sequence")
    assert recipe_named("gspo")().aggregation.mode == "sequence_mean_token_mean"
    assert recipe_named("cispo")().surrogate == Surrogate(CISPO(0.0, 5.0))
    assert recipe_named("remax")().rollout.greedy_baseline
    assert recipe_named("dapo").preset == {"train.dynamic_sampling": True}
    assert recipe_named("ppo")(critic="model").heads["value"].kind == "model"
    assert recipe_named("ppo")(target_kl=6.0).controllers["beta"].path == "transforms.kl.coef"


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("grpo", {"epsilonn": 0.1}, "recipe 'grpo' has no argument 'epsilonn'. Did you mean 'epsilon'?"),
        ("dapo", {"betta": 0.1}, "Did you mean 'beta'?"),
        ("grpo", {"epsilon": "wide"}, "epsilon: "),
        ("gspo", {"kl": "k4"}, "kl: "),
        ("grpo", {"num_generations": 1}, "num_generations must be at least 2"),
        ("rloo", {"num_generations": 1}, "num_generations must be at least 2"),
        ("sft", {"aggregation": "constant"}, "recipe 'sft': aggregation 'constant' needs max_length"),
    ],
)
def test_wrong_arguments(name, options, what):
    with pytest.raises(ConfigError) as error:
        recipe_named(name)(**options)
    assert what in str(error.value) and error.value.exit_code == 2


def test_unknown_recipes():
    with pytest.raises(ConfigError, match=r"there is no recipe 'grop'\. Did you mean 'grpo'"):
        recipe_named("grop")


def test_names_are_unique():
    def grpo() -> Method:
        raise AssertionError

    with pytest.raises(ConfigError, match=r"'grpo' is taken by keel\.recipes\.policy_gradient"):
        recipe()(grpo)
    assert recipe_named("grpo")().surrogate == Surrogate(Clipped())


OTHERS = {"epsilon": 0.37, "epsilon_high": 0.41, "dual_clip": 7.0, "scale_rewards": "group"}


@pytest.mark.parametrize("argument", OTHERS)
def test_no_recipe_takes_a_clip_range_or_a_scale_that_it_does_not_read(argument):
    """hapo reads its scale where it does not take the statistics of tokens."""
    checked = 0
    for name, known in recipes().items():
        if argument in known.arguments:
            given = {"token_average": False} if name == "hapo" else {}
            values = [v for v in known.choices(argument) if v != known.arguments[argument].default]
            other = known(**given, **{argument: (values or [OTHERS[argument]])[0]})
            plain = known(**given)
            assert dataclasses.replace(other, claim=plain.claim) != plain, name
            checked += 1
    assert checked > 10


def test_no_recipe_takes_a_form_of_the_kl_that_it_does_not_read():
    checked = 0
    for name, known in recipes().items():
        if "kl" in known.arguments:
            plain = known(beta=0.1)
            assert dataclasses.replace(known(beta=0.1, kl="k2"), claim=plain.claim) != plain, name
            checked += 1
    assert checked > 10
    with pytest.raises(ConfigError, match="its KL is k3: leave kl out"):
        recipe_named("dph_rl")(kind="reverse_kl", kl="k2")


def test_the_default_that_is_shown_is_the_one_that_holds():
    """Giving it changes nothing: also where it is passed on to a baseline that has another."""
    checked = 0
    for name, known in recipes().items():
        plain = known()
        for argument, parameter in known.arguments.items():
            if parameter.default is not parameter.empty:
                assert known(**{argument: parameter.default}) == plain, (name, argument)
                checked += argument in known.passes
    assert checked > 10
    assert recipe_named("dr_grpo").arguments["scale_rewards"].default == "none"
    assert recipe_named("siren").arguments["aggregation"].default == "constant"  # of its baseline dr_grpo


def test_a_setting_that_nothing_reads_is_an_error():
    for name, argument in (("cispo", "epsilon_high"), ("kl_cov", "epsilon"), ("maxrl", "scale_rewards")):
        with pytest.raises(ConfigError, match=f"recipe '{name}' has no argument '{argument}'"):
            recipe_named(name)(**{argument: OTHERS[argument]})
    for name, known in recipes().items():
        passed_on = recipe_named(known.baseline).arguments if known.without else {}
        assert set(known.without) <= set(passed_on), name


def test_a_group_baseline_needs_a_group():
    """A completion less the mean of itself alone teaches nothing, in silence."""
    for name, given in (("reinforce_pp", {"group_baseline": True}), ("rloo", {"num_generations": 1})):
        with pytest.raises(ConfigError, match="num_generations must be at least 2"):
            recipe_named(name)(**given)
    assert recipe_named("reinforce_pp")(group_baseline=True, num_generations=2).rollout.num_generations == 2
