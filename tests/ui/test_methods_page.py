"""The pages about recipes: what stands on them follows from the recipes, and from what was measured of them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tests.ui.reading import Text

from keel.core.config import from_config, to_config
from keel.evaluate.intervals import Interval
from keel.papers.catalogue import catalogue
from keel.recipes.registry import recipe_named, recipes
from keel.ui import measurements
from keel.ui.docstrings import read_docstring
from keel.ui.formula import loss_formula
from keel.ui.measurements import is_apart, results, verified
from keel.ui.recipe_view import entries, recipe_view

ROOT = Path(__file__).parents[2]


def names(page: str) -> list[str]:
    """The recipes that a page lists."""
    return re.findall(r'class="name" href="/methods/(\w+)"', page)


def test_every_recipe_is_listed_once(client):
    page = client.get("/methods").text
    assert sorted(names(page)) == sorted(recipes())
    assert f"{len(recipes())} recipes" in Text(page).said


@pytest.mark.parametrize(
    "query, wanted",
    [
        ("kind=reward", lambda entry: recipe_named(entry.name)().kind == "reward"),
        ("family=ratios", lambda entry: recipe_named(entry.name).make.__module__ == "keel.recipes.ratios"),
        ("status=holds&kind=online", lambda e: e.kind == "online" and verified([e.name]).get(e.name) == "holds"),
    ],
)
def test_filters(client, query, wanted):
    expected = {entry.name for entry in entries() if wanted(entry)}
    assert set(names(client.get(f"/methods?{query}").text)) == expected and expected


def test_search_reads_names_docstrings_and_papers(client):
    assert names(client.get("/methods?q=kl_cov").text)[0] == "kl_cov"
    assert "clip_cov" in names(client.get("/methods?q=entropy+mechanism").text)  # the title of its paper
    assert names(client.get("/methods?q=zyzzyva").text) == []
    found = client.get("/methods?q=%3Cscript%3E").text
    assert "<script>" not in found.partition("<main")[2].partition("</main>")[0]


def test_wrong_names(client):
    missing = client.get("/methods/kl_cof")
    assert missing.status_code == 404 and "Did you mean 'kl_cov'?" in Text(missing.text).said
    assert client.get("/methods?kind=x").status_code == 400


def test_every_recipe_has_a_page_that_says_how_it_is_composed(client):
    numbers = {paper.n for paper in catalogue()}
    for name, recipe in recipes().items():
        answer = client.get(f"/methods/{name}")
        assert answer.status_code == 200, name
        links = Text(answer.text).links
        assert {int(link.rpartition("/")[2]) for link in links if re.fullmatch(r"/papers/\d+", link)} <= numbers
        others = {link.rpartition("/")[2] for link in links if re.fullmatch(r"/methods/\w+", link)}
        assert others <= set(recipes()) and (recipe.baseline is None or recipe.baseline in others)
        view = recipe_view(name)
        assert {argument.name for argument in view.arguments} == set(recipe.arguments)
        assert view.doc.summary and view.doc.summary.split()[0] in Text(answer.text).said


@pytest.mark.parametrize("name", ["grpo", "kl_cov", "dpo", "gkd", "ppo", "bradley_terry"])
def test_the_yaml_is_the_method(name):
    composition = yaml.safe_load(recipe_view(name).yaml)["method"]
    assert from_config({"part": "method", **composition}) == replace(recipe_named(name)(), claim=None)


def test_the_loss_of_known_recipes():
    assert recipe_view("kl_cov").loss.splitlines() == [
        "loss   = token_mean[ −A f(ρ) ] + kl_cov on cov",
        "A      = group_centre, then group_std(epsilon=0.0001, scope=group)",
        "f      = unclipped",
        "ρ      = ratio to the policy that sampled, by token",
        "kl_cov = absolute_log_ratio(against=old)",
    ]
    assert recipe_view("ppo").loss.startswith("loss  = token_mean[ −A f(ρ) ] + 0.1 value\n")
    assert recipe_view("dpo").loss.startswith("loss  = pairs\npairs = pair_loss(link=log_sigmoid,")
    with_kl = to_config(recipe_named("grpo")(beta=0.04, kl="k3"))
    assert "] + 0.04 " in loss_formula(with_kl).splitlines()[0]
    assert loss_formula({"terms": {"off": {"coef": 0, "penalty": {"part": "x"}}}}) == ""


def test_a_weight_and_a_coefficient_of_nought():
    method = {
        "surrogate": {"f": {"part": "clipped"}, "level": "sequence"},
        "aggregation": {"mode": "constant"},
        "advantage": {"a": {"part": "returns"}},
        "weights": {"one": {"part": "u"}, "two": {"part": "v", "cap": 2.0}},
        "terms": {"kl": {"part": "summand", "coef": 0.0, "penalty": {"part": "k3"}}},
    }
    assert loss_formula(method).splitlines() == [
        "loss = constant[ −w A f(ρ) ]",
        "w    = u · v(cap=2)",
        "A    = returns",
        "f    = clipped",
        "ρ    = ratio to the policy that sampled, by sequence",
    ]


def test_arguments_with_defaults_choices_and_meanings(client):
    by_name = {argument.name: argument for argument in recipe_view("kl_cov").arguments}
    assert by_name["fraction"].default == "0.002" and by_name["fraction"].of == ""
    assert by_name["scale_rewards"].choices == ("group", "batch", "none") and by_name["scale_rewards"].of == "grpo"
    assert by_name["beta"].meaning.startswith("coefficient of the KL")
    assert [a.of == "" for a in recipe_view("kl_cov").arguments][:2] == [True, True]  # its own come first
    said = Text(client.get("/methods/kl_cov").text).said
    assert "the same as its baseline at coef=0" in said and "keel compare grpo kl_cov --seeds 3" in said


@pytest.mark.parametrize(
    "name, compared", [("grpo", False), ("dr_grpo", True), ("dpo", False), ("bradley_terry", False)]
)
def test_a_comparison_is_proposed_where_there_is_something_to_compare(name, compared):
    commands = [command for command, _ in recipe_view(name).commands]
    assert any(command.startswith("keel compare") for command in commands) == compared
    assert f"keel train {name}" in commands


def test_docstrings_in_their_parts():
    def thing():
        """Do it `well`,
        at once.

            a = b
                + c

        And more.

        >>> thing()

        Args:
            one, two: both: of them,
                and on.
            three: last.

        Returns:
            Nothing.

        Source: "A", 2025;
        and B.
        """

    found = read_docstring(thing)
    assert found.summary == "Do it `well`, at once."
    assert [(block.text, block.formula) for block in found.body] == [("a = b\n    + c", True), ("And more.", False)]
    assert found.arguments == {"one": "both: of them, and on.", "two": "both: of them, and on.", "three": "last."}
    assert found.source == '"A", 2025; and B.'
    assert read_docstring(lambda: None).summary == ""


# What was measured


@pytest.mark.parametrize(
    "ends, apart",
    [((0.0, 0.0), False), ((0.0, 0.1), False), ((0.01, 0.1), True), ((-0.2, -0.1), True), ((-0.1, 0.1), False)],
)
def test_when_a_difference_counts(ends, apart):
    assert is_apart(Interval(sum(ends) / 2, *ends)) is apart
    assert not is_apart(Interval(1.0, float("nan"), float("nan")))


def test_measured_results_are_those_of_the_documentation():
    text = (ROOT / "docs" / "methods.md").read_text().partition("## Countdown")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([\d.]+) \| ([^|]*) \|", text, re.MULTILINE)
    checked = 0
    for name, score, to_grpo in rows:
        found = next((one for one in results(name) if one.task == "countdown" and not one.settings), None)
        if found is None:  # of older code than the package's
            continue
        assert found.values["pass@1"].value == pytest.approx(float(score), abs=6e-4)
        if found.against == "grpo":
            more = found.more["pass@1"]
            told = [float(number) for number in re.findall(r"[+-][\d.]+", to_grpo)]
            assert [more.value, more.low, more.high] == pytest.approx(told, abs=6e-4)
            assert ("**" in to_grpo) == is_apart(more) or min(map(abs, told[1:])) < 1e-3, name
            checked += 1
    assert checked > 20


def test_measured_results_on_the_page(client):
    said = Text(client.get("/methods/kl_cov").text).said
    assert "0.418 (0.351 to 0.485)" in said and "−0.012 (−0.057 to +0.032)" in said
    assert "to grpo" in said and "80 steps" in said


def test_without_evidence_or_verification_the_page_says_so(client, monkeypatch):
    assert results("bradley_terry") == []
    assert "No runs of it come with this version" in Text(client.get("/methods/bradley_terry").text).said
    monkeypatch.setattr(measurements, "_evidence", dict)
    monkeypatch.setattr("keel.ui.pages.methods.verification", lambda: None)
    said = Text(client.get("/methods/kl_cov").text).said
    assert "No runs of it come" in said and "Not in the measured table" in said
