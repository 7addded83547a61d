"""The report as a reader has it: opened from disk in Chromium, without a network, light, dark, printed, by keyboard."""

from __future__ import annotations

import shutil
import statistics

import pytest

from reported import HOSTILE, compared, further, made_up
from tdgeom.report import write_report

pytestmark = pytest.mark.browser

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.fail(f"these tests need one of {CHROMIUM}: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    runs = {
        "one": [made_up()],
        "two": [made_up("first"), made_up("second", seed=1)],
        "comparison": [compared()],
        "hostile": [made_up(hostile=HOSTILE)],
        "kinds": [further()],
    }
    return {name: write_report(of, folder / f"{name}.html") for name, of in runs.items()}


class Opened:
    """A page, and what it said and asked for while it was open."""

    def __init__(self, browser, path, **how):
        self.said, self.asked = [], []
        self.page = browser.new_page(**how)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.locator("html[data-drawn=yes]").wait_for(state="attached")

    def count(self, selector):
        return self.page.locator(selector).count()

    def becomes(self, selector, count):
        """Waits until so many elements are there; a function would be a string to evaluate, which the page forbids."""
        self.page.locator(selector).nth(max(count - 1, 0)).wait_for(state="attached" if count else "detached")
        self.page.locator(selector).nth(count).wait_for(state="detached")
        assert self.count(selector) == count

    def colour(self, selector, name="color"):
        return self.page.eval_on_selector(selector, f"node => getComputedStyle(node)['{name}']")


@pytest.fixture
def opened(browser, files):
    made = []

    def open_(name, **how):
        made.append(Opened(browser, files[name], **how))
        return made[-1]

    yield open_
    for one in made:
        one.page.close()


NAMES = ("one", "two", "comparison", "hostile", "kinds")


@pytest.mark.parametrize("name", NAMES)
def test_a_report_draws_everything_and_asks_nobody(opened, files, name):
    report = opened(name)
    assert report.said == []
    assert report.asked == [files[name].as_uri()]
    charts = report.page.locator("[data-chart]")
    assert charts.count() == report.count("figure .chart") > 0
    for index in range(charts.count()):
        chart = charts.nth(index)
        marks = chart.locator(".mark-line path, .mark-symbol path, .mark-rect path").count()
        assert marks > 0, chart.get_attribute("data-chart")
        assert len(chart.get_attribute("aria-label") or "") > 20  # the chart in words


def test_the_page_itself_forbids_every_request(opened):
    page = opened("one").page
    assert (
        page.evaluate("() => fetch('https://example.org/').then(() => 'sent', () => 'refused')") == "refused"
    )
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s) }"
    )
    assert page.evaluate("window.ran") is None


def test_hostile_names_are_text(opened):
    report = opened("hostile")
    assert report.page.evaluate("window.hurt") is None
    assert report.count("img") == report.count("main b") == report.count("header b") == 0
    assert HOSTILE in report.page.inner_text("#protocol") and "onerror=" in report.page.inner_text("h1")
    report.page.locator("summary").first.click()
    report.page.mouse.move(0, 0)
    point = report.page.locator(".mark-symbol path").first
    point.hover(force=True)
    assert report.page.evaluate("window.hurt") is None and report.count("#vg-tooltip-element img") == 0


def test_a_layer_is_toggled_by_the_keyboard(opened):
    report = opened("one")
    lines = "[data-chart=spectra-0] .mark-line path"
    assert report.count(lines) == 6
    report.page.focus("input[data-hides=hidden_layers][value='2']")
    report.page.keyboard.press("Space")
    report.becomes(lines, 5)
    report.page.get_by_role("button", name="None", exact=True).focus()
    report.page.keyboard.press("Enter")
    report.becomes(lines, 0)
    report.page.get_by_role("button", name="All", exact=True).press("Enter")
    report.becomes(lines, 6)
    assert report.said == []


def test_a_run_is_toggled_in_every_chart(opened):
    report = opened("two")
    lines = "[data-chart=dimension-1] .mark-line path"
    assert report.count(lines) == 2
    report.page.uncheck("input[data-hides=hidden_series][value='second']")
    report.becomes(lines, 1)


def test_buttons_zoom_and_show_all_again(opened):
    report = opened("one")
    labels = report.page.locator("[data-chart=dimension-1] .role-axis-label text")
    before = sorted(labels.all_text_contents())

    def pressed(tool):
        report.page.locator(f"#chart-dimension-1 button[data-tool={tool}]").press("Enter")
        report.page.wait_for_timeout(300)
        return sorted(labels.all_text_contents())

    near = pressed("in")
    assert near != before and pressed("in") != near
    assert pressed("reset") == before != pressed("out")


def test_tables_sort_filter_and_download(opened, tmp_path):
    page = opened("one").page
    page.locator("#dimension summary").first.click()
    table = page.locator("[data-table^=metrics_dimension]").first
    column = [text.strip() for text in table.locator("thead th").all_inner_texts()].index("d pr")

    def values():
        return [
            float(text) for text in table.locator(f"tbody tr > :nth-child({column + 1})").all_inner_texts()
        ]

    start = values()
    button = table.locator("thead button").nth(column)
    button.press("Enter")
    assert values() == sorted(start) != start
    assert table.locator("thead th").nth(column).get_attribute("aria-sort") == "ascending"
    button.press("Enter")
    assert values() == sorted(start, reverse=True)
    table.locator("input[type=search]").fill("input.3")
    assert table.locator("tbody tr").count() == 1 and "1 of 6" in table.inner_text()
    with page.expect_download() as saved:
        page.get_by_role("button", name="metrics.csv").click()
    saved.value.save_as(tmp_path / "metrics.csv")
    import pandas as pd

    frame = pd.read_csv(tmp_path / "metrics.csv")
    expected = made_up().tables["metrics"]
    assert frame["d_pr"].tolist() == expected["d_pr"].tolist()  # to the last digit
    assert list(frame) == list(expected)


def luminance(colour: str) -> float:
    return statistics.mean(map(float, colour.split("(")[1].rstrip(")").split(",")[:3]))


@pytest.mark.parametrize("by", ["system", "switch"])
def test_dark_turns_page_and_charts(opened, by):
    light = opened("one", color_scheme="light")
    assert luminance(light.colour("body", "backgroundColor")) > 200
    ink, line = light.colour(".role-axis-title text", "fill"), light.colour(".mark-line path", "stroke")
    if by == "system":
        light.page.emulate_media(color_scheme="dark")
    else:
        light.page.check("input[name=theme][value=dark]")
    assert luminance(light.colour("body", "backgroundColor")) < 50
    assert luminance(light.colour(".role-axis-title text", "fill")) > 200 > 50 > luminance(ink)
    assert light.colour(".mark-line path", "stroke") != line
    light.page.check("input[name=theme][value=light]")
    assert luminance(light.colour("body", "backgroundColor")) > 200


def test_print_shows_everything_in_light_colours(opened):
    report = opened("one", color_scheme="dark")
    report.page.emulate_media(media="print", color_scheme="dark")
    assert luminance(report.colour("body", "backgroundColor")) > 200
    small = report.page.evaluate(
        """() => [...document.querySelectorAll('figure, .chart svg, table, tbody tr, pre, .warnings li, .facts div, h2, h3')]
        .filter(node => { const box = node.getBoundingClientRect(); return box.width < 1 || box.height < 1; })
        .map(node => node.outerHTML.slice(0, 80))"""
    )
    assert small == []
    hidden = report.page.evaluate(
        """() => [...document.querySelectorAll('main *')].filter(node => node.scrollHeight > node.clientHeight + 2 &&
        ['auto', 'scroll', 'hidden'].includes(getComputedStyle(node).overflowY)).length"""
    )
    assert hidden == 0  # nothing left to scroll to


@pytest.mark.parametrize("width", [360, 800, 1400])
@pytest.mark.parametrize("name", ["one", "two", "kinds"])
def test_nothing_is_wider_than_its_box(opened, name, width):
    report = opened(name, viewport={"width": width, "height": 900})
    assert report.page.evaluate("document.documentElement.scrollWidth") <= width
    texts = report.page.evaluate(
        """() => [...document.querySelectorAll('.chart svg text, .chart svg')].filter(svg => {
        const box = svg.closest('figure').getBoundingClientRect(), own = svg.getBoundingClientRect();
        return own.right > box.right + 1 || own.left < box.left - 1; }).length"""
    )
    assert texts == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(opened, name, scheme):
    from axe_playwright_python.sync_playwright import Axe

    report = opened(name, color_scheme=scheme)
    report.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    found = Axe().run(report.page).response["violations"]
    bad = [
        (one["id"], one["nodes"][0]["html"][:200])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert bad == []
