"""Methods, verification, papers and comparisons in a real browser."""

import time
from dataclasses import replace

import pytest
from tests.compare.synthetic import synthetic
from tests.ui import test_browser
from tests.ui.known_comparisons import begin, finish, store_comparison
from tests.ui.test_browser import holds_up, serving

from keel.papers.catalogue import catalogue, newest_first
from keel.store.store import Store

pytestmark, browser, opened = test_browser.pytestmark, test_browser.browser, test_browser.opened

PAGES = [
    "/papers?q=entropy&status=implemented",
    "/papers/47",
    "/methods?q=entropy",
    "/methods/kl_cov",
    "/verify?family=entropy",
    "/compare/done",
    "/compare/going",
]
NOTHING = {"values": {}, "before": {}, "curves": {}}
DRAWN = "() => document.querySelectorAll('#report .plot .main-svg:first-child').length"


def outcomes():
    """Two arms with two seeds; the last cell is still missing."""
    whole = synthetic({"gspo": 0.0, "luspo": 0.4}, seeds=2, prompts=20, steps=4)
    cells = [replace(o, run=f"going-{place}") for place, o in enumerate(whole.outcomes)]
    return replace(whole, outcomes=tuple(cells), created=time.time())


def build(runs):
    """One comparison that is done, and one that runs."""
    done = synthetic({"grpo": 0.0, "dr_grpo": 0.05, "kl_cov": 0.8}, seeds=2, prompts=30, steps=6)
    store_comparison(runs, done, name="done")
    whole = outcomes()
    unfinished = (*whole.outcomes[:3], replace(whole.outcomes[3], status="missing", **NOTHING))
    store_comparison(runs, replace(whole, outcomes=unfinished), "running", name="going")
    with Store(runs / "keel.sqlite") as store:
        begin(store, whole, whole.outcomes[3], step=2)
    return runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("compared"))


@pytest.fixture(scope="module")
def address(folder):
    with serving(folder) as found:
        yield found


@pytest.mark.parametrize("path", PAGES)
def test_every_page(opened, path):
    holds_up(opened, path)


def test_a_search_by_keyboard_leads_to_a_paper_and_to_its_recipe(opened, address):
    page = opened("/papers")
    page.locator("input[name=q]").focus()
    page.keyboard.type("covariance entropy clip-cov")
    page.keyboard.press("Enter")
    page.wait_for_url("**/papers?q=*")
    assert page.url == f"{address}/papers?q=covariance+entropy+clip-cov"  # empty fields stay out
    page.locator(".entries h2 a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/papers/47")
    page.get_by_role("link", name="kl_cov").first.click()
    page.wait_for_url("**/methods/kl_cov")
    assert page.inner_text("h1") == "kl_cov"
    page.locator("summary", has_text="YAML").click()
    assert "high_covariance" in page.inner_text("pre.yaml")


def test_filters_act_at_once(opened, address):
    page = opened("/papers")
    page.select_option("select[name=family]", "diffusion")
    page.wait_for_url(f"{address}/papers?family=diffusion")
    first = next(paper for paper in newest_first(catalogue()) if paper.family == "diffusion")
    assert page.locator(".entries h2").first.inner_text() == first.title
    page.goto(f"{address}/verify")
    page.select_option("select[name=status]", "holds")
    page.wait_for_url(f"{address}/verify?status=holds")
    assert set(page.locator("tbody .badge").all_inner_texts()) == {"holds"}


def test_arms_are_chosen(opened, address):
    page = opened("/compare/done")
    page.uncheck("input[value=dr_grpo]")
    page.select_option("select[name=baseline]", "kl_cov")
    page.get_by_role("button", name="Show").click()
    page.wait_for_url("**/compare/done?baseline=kl_cov&arm=grpo&arm=kl_cov")
    assert "dr_grpo" not in page.inner_text("#report")
    assert page.evaluate(DRAWN) == page.locator("#report .plot").count() > 5


def test_a_comparison_that_runs_shows_each_cell_as_it_ends(browser, tmp_path):
    runs = build(tmp_path)
    with serving(runs) as own:
        context = browser.new_context()
        context.add_init_script("const wait = setTimeout; window.setTimeout = (then, ms) => wait(then, ms / 10)")
        page = context.new_page()
        wrong = []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{own}/compare/going")
        page.evaluate("() => { window.same = true }")
        page.select_option(".views select >> nth=0", "1")
        with Store(runs / "keel.sqlite") as store:
            store.log_metrics(store.run("going-3").id, 3, {"reward": 0.2})
        page.wait_for_selector("text=step 3", timeout=30_000)
        whole = outcomes()
        with Store(runs / "keel.sqlite") as store:
            finish(store, whole, whole.outcomes[3], store.run("going-3").id)
        page.wait_for_selector("text=4 of 4 cells finished", timeout=30_000)
        page.wait_for_function("() => document.querySelector('#report').innerText.includes('over 2 seeds')")
        assert (
            page.evaluate("() => window.same") and page.evaluate("() => document.querySelector('progress').value") == 4
        )
        assert page.input_value(".views select >> nth=0") == "1"  # what was chosen stays
        assert page.evaluate(DRAWN) == page.locator("#report .plot").count() > 5
        record = runs / "comparisons" / "going" / "comparison.json"
        record.write_text(record.read_text().replace('"running"', '"finished"', 1))
        page.wait_for_selector(".facts .state.good", timeout=30_000)
        assert not page.evaluate("() => window.same || false") and page.locator("[data-state]").count() == 0
        assert wrong == []
        context.close()
