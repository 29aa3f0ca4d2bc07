"""The catalogue is complete, says nothing that the code does not have, and explains a bad line."""

import importlib.util
import json
import pkgutil
import re
from collections import Counter
from datetime import date

import pytest

import keel
from keel.core import registry
from keel.core.errors import DataError, UserError
from keel.papers.catalogue import Paper, catalogue, newest_first, paper, read_catalogue
from keel.recipes.registry import recipes

LINE = {"n": 1, "title": "A title", "summary": "One sentence.", "family": "online"}


@pytest.fixture(scope="module")
def parts() -> dict[str, list[int]]:
    """Every part of the package, with the papers that it is registered for."""
    for module in pkgutil.walk_packages(keel.__path__, "keel."):
        if module.name.startswith(("keel.sampling", "keel.rollouts", "keel.parts", "keel.targets", "keel.models")):
            importlib.import_module(module.name)
    recipes()
    own = {name: cls for name, cls in registry._PARTS.items() if cls.__module__.startswith("keel.")}
    return {name: numbers(registry.PAPERS[name]) for name in own}


def numbers(said: int | list[int] | None) -> list[int]:
    return [] if said is None else [said] if isinstance(said, int) else list(said)


def test_all_papers_are_there_with_the_counts_of_the_table() -> None:
    assert [one.n for one in catalogue()] == list(range(1, 223))
    themes = Counter(theme for one in catalogue() for theme in one.themes)
    assert themes == {"behaviour": 74, "entropy": 71, "target": 47, "divergence": 44}
    assert Counter(one.family for one in catalogue())["diffusion"] == 15
    assert sum(one.date is None for one in catalogue()) == 4
    known = paper(47)
    assert (known.date, known.authors, known.comments, known.themes) == (date(2025, 5, 28), 17, 4, ("entropy",))


def test_every_summary_is_one_sentence_of_its_own() -> None:
    for one in catalogue():
        assert one.summary.endswith("."), one.n
        assert len(one.summary.split()) <= 45, one.n
        assert not re.search(r"[.!?]\s+[A-Z]", one.summary), f"{one.n} has two sentences"
        assert one.title not in one.summary, one.n
        assert one.where, f"{one.n} does not say where it runs, or why it does not"
        assert one.components, f"{one.n} names nothing that it proposes"
    assert len({one.summary for one in catalogue()}) == 222


def test_what_is_named_exists(parts: dict[str, list[int]]) -> None:
    known = recipes()
    for one in catalogue():
        assert not set(one.recipes) - set(known), f"{one.n} names recipes that are not there"
        assert not set(one.parts) - set(parts), f"{one.n} names parts that are not there"
        for module in one.modules:
            assert importlib.util.find_spec(module), f"{one.n} names {module}"
        for command in re.findall(r"`keel train (\w+)", one.where):
            assert command in known, f"{one.n} says keel train {command}"


def test_what_is_registered_for_a_paper_stands_there(parts: dict[str, list[int]]) -> None:
    papers = {one.n: one for one in catalogue()}
    for name, said in parts.items():
        for n in said:
            assert name in papers[n].parts, f"add the part {name} to line {n} of catalogue.jsonl"
    for name, recipe in recipes().items():
        for n in numbers(recipe.paper):
            assert name in papers[n].recipes, f"add the recipe {name} to line {n} of catalogue.jsonl"


def test_status_and_components_do_not_contradict_each_other() -> None:
    for one in catalogue():
        assert one.status in ("implemented", "experiment", "context"), one.n
        if one.status == "implemented":
            assert any(component.there for component in one.components), f"{one.n} has nothing of what it proposes"
            assert (one.fidelity == "partial") == bool(one.missing), f"{one.n}: partial means that something is missing"
        if one.recipes:
            assert one.status == "implemented", f"{one.n} has recipes"


def test_a_paper_survives_its_record() -> None:
    for one in catalogue():
        assert Paper.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_the_command_is_the_one_that_the_text_names() -> None:
    assert paper(47).command == "keel train kl_cov"
    assert paper(222).command == "", "a module has no command"
    assert paper(109).command == "", "context has no command"


def test_newest_first_puts_papers_without_a_date_last() -> None:
    order = newest_first(catalogue())
    assert order[0].date == max(one.date for one in catalogue() if one.date)
    assert all(one.date is None for one in order[-4:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"families": "online"}, "there is no key 'families'. Did you mean 'family'?"),
        ({"title": None}, "title must be of type str, not NoneType"),
        ({"title": " "}, "title must not be empty"),
        ({"n": "1"}, "n must be of type int, not str"),
        ({"n": True}, "n must be of type int, not bool"),
        ({"family": "onlin"}, "family must be one of online"),
        ({"themes": ["entropy", "kl"]}, "themes must be of divergence"),
        ({"date": "2025-13-01"}, "month must be in 1..12"),
        ({"links": ["javascript:alert(1)"]}, "links must begin with https:// or http://"),
        ({"status": "implemented", "fidelity": "paper"}, "must name recipes, parts or modules"),
        ({"status": "context", "fidelity": "paper"}, "fidelity is 'paper' and status 'context'"),
        ({"components": [{"name": "x"}]}, "components must have name and there"),
        ({"components": [{"name": "x", "there": "yes"}]}, "there must be of type bool"),
        ({"authors": "Ada"}, "authors must be of type int, not str"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_reason(change: dict, said: str) -> None:
    text = json.dumps(LINE) + "\n\n" + json.dumps(LINE | {"n": 2, "title": "Other"} | change)
    with pytest.raises(DataError) as error:
        read_catalogue(text, "papers.jsonl")
    assert error.value.where == "papers.jsonl:3"
    assert said in error.value.what


def test_other_faults_of_a_file() -> None:
    with pytest.raises(DataError, match=r"f:1: Expecting"):
        read_catalogue("{", "f")
    with pytest.raises(DataError, match=r"f:1: a line must be an object"):
        read_catalogue("[]", "f")
    with pytest.raises(DataError, match=r"n '1' comes 2 times"):
        read_catalogue(json.dumps(LINE) + "\n" + json.dumps(LINE | {"title": "B"}), "f")
    with pytest.raises(DataError, match=r"title 'A title' comes 2 times"):
        read_catalogue(json.dumps(LINE) + "\n" + json.dumps(LINE | {"n": 2}), "f")
    with pytest.raises(UserError, match="there is no paper 999"):
        paper(999)
    assert read_catalogue("", "f") == ()
