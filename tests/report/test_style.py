"""The palette: contrast, and colours that stay apart for every kind of colour vision."""

from itertools import combinations

import numpy as np
import pytest

from keel.report.style import ARMS, SERIES, THEMES, layout, resolve, variables

# Severe dichromacy, on linear RGB: Machado, Oliveira and Fernandes, 2009.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
LEVELS = ("good", "note", "warning", "problem")


def linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    x = XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one, other):
    dark, light = sorted(float(linear(colour) @ XYZ[1]) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def test_the_measure_itself():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", THEMES)
def test_contrast(theme):
    colours = THEMES[theme]
    for name in ("ink", "muted", *LEVELS):
        assert contrast(colours[name], colours["surface"]) > 4.5 and contrast(colours[name], colours["page"]) > 4.5, (
            name
        )
    for name in {*SERIES, *ARMS, "base", "plain", "weak", "medium", "strong"}:
        assert contrast(colours[name], colours["surface"]) > 3, name


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("together", [SERIES, ("base", "plain", "weak", "medium", "strong"), ("base", *ARMS)])
def test_colours_that_stand_together_stay_apart(theme, vision, together):
    seen = {name: lab(VISION[vision] @ linear(THEMES[theme][name])) for name in together}
    apart = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in combinations(together, 2)}
    assert min(apart.values()) > 11, min(apart, key=apart.get)


def test_themes_have_the_same_names():
    assert THEMES["light"].keys() == THEMES["dark"].keys()
    assert "--plain: #c2500a;" in variables("light")


def test_resolve_leaves_no_name():
    for theme in ("light", "dark"):
        assert "@" not in str(resolve(layout({"title": "step"}), theme))
    assert resolve(["@ink", 3, None, "a@b"], "dark") == ["#e8ebef", 3, None, "a@b"]
    with pytest.raises(KeyError):
        resolve("@mauve", "light")
