"""Controllers against their formulas."""

import pytest

from keel.parts.controllers.coefficients import AdaptiveKL, Constant, Schedule
from keel.recipes.registry import recipe_named

PATH = "transforms.kl.coef"


def test_adaptive_kl():
    """c (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), from 0.05 at target 6, 256 rows of 10000."""
    part = AdaptiveKL(PATH, 0.05, 6.0, 10000.0)
    values, state = part.update({}, part.init(), 0)
    assert values == {PATH: 0.05}
    for kl, factor in ((9.0, 1 + 0.2 * 0.0256), (6.6, 1 + 0.1 * 0.0256), (6.0, 1.0), (0.0, 1 - 0.2 * 0.0256)):
        values, _ = part.update({"kl": kl, "num_rows": 256.0}, state, 1)
        assert values[PATH] == pytest.approx(0.05 * factor, rel=1e-12)


def test_adaptive_kl_remembers():
    part = AdaptiveKL(PATH, 1.0, 1.0, 10.0, metric="kl/ref")
    state = part.init()
    for _ in range(3):
        values, state = part.update({"kl/ref": 5.0, "num_rows": 10.0, "kl": 0.0}, state, 0)
    assert values[PATH] == pytest.approx(1.2**3, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "wanted"), [("linear", [1.0, 0.75, 0.5, 0.0, 0.0]), ("cosine", [1.0, 0.853553, 0.5, 0.0, 0.0])]
)
def test_schedule(shape, wanted):
    part = Schedule(PATH, 1.0, 0.0, 4, shape)
    found = [part.update({}, part.init(), step)[0][PATH] for step in (0, 1, 2, 4, 9)]
    assert found == pytest.approx(wanted, abs=5.1e-7)


def test_values_arrive_in_the_method():
    method = recipe_named("ppo")(target_kl=2.0, beta=0.05)
    controller = method.controllers["beta"]
    values, _ = controller.update({"kl": 4.0, "num_rows": 10000.0}, controller.init(), 0)
    for path, value in values.items():
        method = method.set(path, value)
    assert method.transforms["kl"].coef == pytest.approx(0.06, rel=1e-12)


def test_the_neutral_controller():
    plain = recipe_named("reinforce")(beta=0.1)
    held = plain.adding(controllers={"same": Constant(PATH, 0.1)})
    (path, value), *_ = held.controllers["same"].update({}, {}, 7)[0].items()
    assert (path, value) == (PATH, 0.1) and held.set(path, value).transforms == plain.transforms


@pytest.mark.parametrize(
    "make",
    [lambda: Schedule(PATH, 0.0, 1.0, 0), lambda: AdaptiveKL(PATH, target=0.0), lambda: AdaptiveKL(PATH, horizon=-1.0)],
)
def test_settings_out_of_range(make):
    with pytest.raises(ValueError, match="must be"):
        make()
