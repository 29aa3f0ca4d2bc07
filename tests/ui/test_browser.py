"""Every page in a real browser: nothing is reported or fetched from elsewhere, and it works by keyboard, on a phone,
in the dark and without scripts."""

import shutil
from pathlib import Path

import pytest
from tests.serve.running import served
from tests.ui.known_runs import build

from keel.report.style import THEMES
from keel.store.store import Store
from keel.ui.app import create_app, find_pages

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; Debian has it as the package chromium")

OF_RUNS = [
    "/runs/base?against=going",
    "/runs/going",
    "/tokens?q=thirty",
    "/tokens/17",
    "/tokens/6/group",
    "/runs/nowhere",
]
PAGES = [*(f"/{name}" for name in sorted(find_pages())), *OF_RUNS]

# Contrast of every text with what lies behind it, colours with opacity laid over each other.
LOW_CONTRAST = """() => {
  const parse = (text) => {
    const numbers = text.match(/-?[\\d.]+(e-?\\d+)?/g).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return [...numbers.slice(0, 3).map((n) => n * scale), numbers.length > 3 ? numbers[3] : 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    if (!(element instanceof HTMLElement) || !element.checkVisibility()) continue;
    if (element.closest(".plot, option, .skip, .hidden")) continue;
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())) continue;
    const ground = behind(element);
    const ink = over(parse(getComputedStyle(element).color), ground);
    const [high, deep] = [light(ink), light(ground)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (deep + 0.05);
    const text = element.textContent.trim().slice(0, 30);
    if (ratio < 4.5) low.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)} ${text}`);
  }
  return low;
}"""
NAMELESS = """() => [...document.querySelectorAll("input:not([type=hidden]), select, button, a, progress")]
  .filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map((e) => e.outerHTML)"""
DOUBLE = (
    """() => [...document.querySelectorAll("[id]")].map((e) => e.id).filter((id, i, all) => all.indexOf(id) !== i)"""
)
# By keyboard: what is to be reached, in its order, and what Tab has reached, with whether that could be seen.
WATCH = """(limit) => {
  const said = (e) => e.tagName + (e.getAttribute("href") || e.name || "");
  window.reached = [];
  document.addEventListener("focusin", (event) =>
    window.reached.push([said(event.target), getComputedStyle(event.target).outlineStyle !== "none"]));
  const all = "a[href], button, input:not([type=hidden]), select, summary, [tabindex='0']";
  return [...document.querySelectorAll(all)].filter((e) => e.checkVisibility()).slice(0, limit).map(said);
}"""


def serving(folder: Path):
    """The address of the application over a folder."""
    return served(create_app(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("browsed"))


@pytest.fixture(scope="module")
def address(folder):
    with serving(folder) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, address):
    """Opens pages, and checks in the end that none of them reported an error or asked another server."""
    contexts, wrong = [], []

    def open_page(path, scripts=True, **options):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, java_script_enabled=scripts, **options)
        context.set_default_timeout(60_000)  # the machine may be busy
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda asked: None if asked.url.startswith((address, "data:", "blob:")) else wrong.append(asked.url),
        )
        page.goto(address + path)
        page.wait_for_load_state("load")
        return page

    yield open_page
    for context in contexts:
        context.close()
    expected = "the server responded with a status of 404"
    assert [text for text in wrong if expected not in text] == []


def holds_up(opened, path):
    """Check what must be true of every page: colours, names, keys, figures and a phone's width."""
    page = opened(path, color_scheme="light")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        red, green, blue = (int(THEMES[theme]["page"][i : i + 2], 16) for i in (1, 3, 5))
        assert page.evaluate(ground) == f"rgb({red}, {green}, {blue})"
        assert page.evaluate(LOW_CONTRAST) == []
    assert page.locator("h1").count() == 1 and page.locator("main").count() == 1
    assert page.evaluate(NAMELESS) == [] and page.evaluate(DOUBLE) == []
    section = path.split("/")[1].split("?")[0]
    assert page.locator("nav [aria-current=page]").get_attribute("href") == f"/{section}"
    assert page.locator(".plot").count() == page.locator(".plot .main-svg:first-child").count()
    wanted = page.evaluate(WATCH, 30)
    for _ in wanted:
        page.keyboard.press("Tab")
    assert page.evaluate("() => window.reached") == [[name, True] for name in wanted] and wanted[0] == "A#content"
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("() => document.scrollingElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("path", PAGES)
def test_every_page(opened, path):
    holds_up(opened, path)


def test_the_first_key_leads_to_the_content(opened):
    page = opened("/runs")
    page.keyboard.press("Tab")
    assert page.locator(".skip").bounding_box()["x"] > 0
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.name") == "name"


def test_the_switch_of_colours_is_remembered(opened):
    page = opened("/runs/base", color_scheme="light")
    theme = "() => [document.documentElement.dataset.theme, getComputedStyle(document.body).colorScheme]"
    line = "() => document.querySelector('.plot .js-line').style.stroke"
    button = page.locator("button.theme")
    before = page.evaluate(line)
    button.click()
    assert button.get_attribute("aria-label") == "Colours: light" and page.evaluate(line) == before
    button.click()
    assert page.evaluate(theme) == ["dark", "dark"] and page.evaluate(line) != before
    page.goto(page.url.replace("/runs/base", "/tokens"))
    assert page.evaluate(theme) == ["dark", "dark"]
    page.locator("button.theme").click()
    page.reload()
    assert page.evaluate(theme) == [None, "light dark"]


def test_curves_grow_while_a_run_trains(opened, browser, tmp_path):
    with serving(build(tmp_path)) as own, Store(tmp_path / "keel.sqlite") as store:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"{own}/runs/going")
        values = "() => document.querySelector('.plot').data.at(-1).y"
        page.wait_for_function("() => document.querySelector('.plot').data")
        assert page.evaluate(values) == pytest.approx([0.1, 0.2, 0.3])
        store.log_metrics(2, 4, {"reward": 0.7})
        page.wait_for_function("() => document.querySelector('.plot').data.at(-1).y.length === 4", timeout=20_000)
        assert page.evaluate(values) == pytest.approx([0.1, 0.2, 0.3, 0.7])
        assert "step 4 of 40; training" in page.inner_text(".progress")
        assert page.evaluate("() => document.querySelector('progress').value") == 4
        store.finish(2)
        page.wait_for_selector(".facts .state.good", timeout=20_000)  # the page was loaded anew
        assert page.locator("[data-points]").count() == 0
        context.close()


def test_tokens_are_coloured_by_what_is_chosen(opened, address):
    page = opened("/tokens/6/group")
    share = (
        "() => [...document.querySelectorAll('.tokens')].map((e) => e.children[0].style.getPropertyValue('--share'))"
    )
    # Entropies of the first token are 0.5 of at most 1.5, advantages -1 to 2 of 2; the strongest colour is 70%.
    assert page.evaluate(share) == ["23.3%"] * 4
    page.select_option(".chooser select", "advantage")
    assert page.evaluate(share) == ["35.0%", "0.0%", "35.0%", "70.0%"]
    assert "advantage" in page.inner_text(".chooser .says")
    page.goto(f"{address}/tokens/8")
    assert page.input_value(".chooser select") == "advantage"
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    said = page.inner_text(".hover")
    assert "entropy\t1" in said and "advantage\t2" in said and "kl\t0.25" in said


def test_filters_act_at_once_and_leave_a_short_address(opened, address):
    page = opened("/runs")
    page.select_option("select[name=recipe]", "grpo")
    page.wait_for_url(f"{address}/runs?recipe=grpo")
    assert page.locator("tbody tr").count() == 2
    page.fill("input[name=name]", "bas")
    page.keyboard.press("Enter")
    page.wait_for_url(f"{address}/runs?name=bas&recipe=grpo")
    assert page.locator("tbody tr").count() == 1


def test_a_hostile_name_runs_nothing(opened):
    page = opened("/runs")
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    page.locator("tbody a", has_text="alert(1)").click()
    page.wait_for_selector("h1")
    assert page.inner_text("h1") == "<script>alert(1)</script>"
    page.locator("a", has_text="token by token").click()
    page.wait_for_selector(".completions")
    page.locator(".completions tbody th a").click()
    page.wait_for_selector(".tokens")
    assert page.inner_text(".tokens").startswith("<sc")


def test_pages_work_without_scripts(opened, address):
    page = opened("/runs/base", scripts=False)
    assert "reward 0.025 → 0.385" in page.inner_text("main")
    assert not page.locator("button.theme").is_visible()
    page = opened("/tokens", scripts=False)
    page.fill("input[name=q]", "thirty")
    page.locator("form button").click()
    assert page.locator("tbody tr").count() == 1
    page.locator("tbody th a").click()
    page.locator("summary").click()
    assert "entropy" in page.inner_text("details pre")


def test_a_report_stands_alone(opened):
    page = opened("/reports/base")
    assert (
        page.evaluate("() => { try { return localStorage.length } catch (error) { return error.name } }")
        == "SecurityError"
    )
