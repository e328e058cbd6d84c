"""The map page in a real browser (headless Chromium)."""

import io
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from pipelines.repository import Repository
from pipelines.runs import ForecastStore, RunHeader
from serve.app import create_app
from tests.serve.conftest import (
    EUROPE,
    INIT,
    LEADS,
    QUANTILES,
    THRESHOLDS,
    Service,
    block,
    service_at,
    write,
)
from tests.serve.test_outline import GRIDS

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
SOFTWARE_GL = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must have Chromium, and there is none at {CHROMIUM}")
        pytest.skip(
            f"no Chromium at {CHROMIUM}; install it (apt install chromium) or set CHROMIUM to its path"
        )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=SOFTWARE_GL)
        yield chromium
        chromium.close()


@pytest.fixture
def address(own_service: Service) -> Iterator[str]:
    """The service on a real port."""
    with listening(own_service) as address:
        yield address


@contextmanager
def listening(service: Service) -> Iterator[str]:
    config = uvicorn.Config(create_app(service.forecasts), port=0, log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


class Watched:
    """A page whose tile requests and complaints are kept."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.tiles: list[str] = []
        self.complaints: list[str] = []
        page.on(
            "request", lambda request: self.tiles.append(request.url) if "/tiles/" in request.url else None
        )
        page.on("console", lambda said: self.complaints.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("response", lambda answer: self._heard(answer.status, answer.url))

    def _heard(self, status: int, url: str) -> None:
        if status >= 400:
            self.complaints.append(f"{status} {url}")

    def open(self, address: str) -> None:
        self.page.goto(address)
        expect(self.page.locator("#lead")).to_be_enabled(timeout=30_000)
        self.wait_for_tile("probability_of_exceedance_1/10/")

    def wait_for_tile(self, part: str) -> None:
        """Until a tile of that quantity and lead has been asked for."""
        until = time.monotonic() + 15
        while not any(part in tile for tile in self.tiles):
            assert time.monotonic() < until, f"no tile of {part}: {self.tiles[-3:]}, {self.complaints}"
            self.page.wait_for_timeout(50)


def open_page(
    browser: Browser, address: str, width: int, height: int, timezone: str = "Europe/Zurich"
) -> Watched:
    watched = new_page(browser, width, height, timezone)
    watched.open(address)
    return watched


def new_page(browser: Browser, width: int, height: int, timezone: str = "Europe/Zurich") -> Watched:
    """A page that has not been anywhere yet, and whose requests a test may stop at any time."""
    context = browser.new_context(viewport={"width": width, "height": height}, timezone_id=timezone)
    page = context.new_page()
    page.route("**/nothing", lambda route: route.abort())  # the first route of an open page is late to work
    return Watched(page)


def test_the_slider_moves_the_tiles_change_and_nothing_complains(
    browser: Browser, address: str, tmp_path: Path
) -> None:
    watched = open_page(browser, address, 1280, 800)
    page = watched.page
    expect(page.locator("#local")).to_have_text("Mon 10 Jun 02:40 CEST")
    expect(page.locator("#utc")).to_contain_text("00:40 UTC")
    page.wait_for_timeout(1000)
    before = page.screenshot()

    page.locator("#lead").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")

    expect(page.locator("#utc")).to_contain_text("01:10 UTC · +40 min")
    expect(page.locator("#lead")).to_have_attribute(
        "aria-valuetext", "10 Jun 2019 01:10 UTC, 40 minutes ahead"
    )
    watched.wait_for_tile("probability_of_exceedance_1/40/")
    page.wait_for_timeout(500)
    assert page.screenshot() != before

    page.locator("#quantity").select_option("rainfall_rate_mean")
    watched.wait_for_tile("rainfall_rate_mean/40/")
    expect(page.locator("#legend")).to_contain_text("mm/h")
    expect(page.locator("#notice")).to_be_hidden()
    assert watched.complaints == []
    page.context.close()


def test_a_domain_across_180_degrees_is_drawn_and_answers_on_both_sides(
    browser: Browser, tmp_path: Path
) -> None:
    with listening(service_at(tmp_path / "forecasts", GRIDS["across 180"][0])) as address:
        watched = open_page(browser, address, 1280, 800)
        page = watched.page
        page.wait_for_timeout(2000)
        asked = [tile.split("/")[-3:-1] for tile in watched.tiles]
        assert {int(x) in (0, 2 ** int(z) - 1) for z, x in asked} == {True}
        assert {x == "0" for _, x in asked} == {True, False}

        before = seen(page)
        page.locator("#lead").fill("3")
        page.wait_for_timeout(1000)
        # by column of the picture; 180 degrees is in its middle
        moved = np.not_equal(before, seen(page)).max(axis=(0, 2))
        assert moved[400:620].any()
        assert moved[660:880].any()

        for x, side in ((500, "E"), (800, "W")):
            page.mouse.click(x, 300)
            expect(page.locator("#point h2")).to_contain_text(f"° {side}")
            expect(page.locator("#point svg.chart")).to_have_count(2)
            page.keyboard.press("Escape")
        assert watched.complaints == []
        page.context.close()


def test_a_domain_round_a_pole_has_its_outline_from_side_to_side(browser: Browser, tmp_path: Path) -> None:
    with listening(service_at(tmp_path / "forecasts", GRIDS["round the north pole"][0])) as address:
        watched = open_page(browser, address, 1280, 800)
        page = watched.page
        page.wait_for_timeout(2000)
        picture = seen(page)
        dark = (picture[340:430].max(axis=2) < 70).max(axis=0)  # the rim's ink, where it lies
        for left in range(0, 1280, 160):
            assert dark[left : left + 160].sum() > 20
        assert picture[412, 560].tolist() == [0xC9, 0xD1, 0xD6], (
            "water west of Ireland: no coast leaps over it"
        )
        assert watched.complaints == []
        page.context.close()


def test_a_run_made_anew_under_its_name_is_drawn_anew(browser: Browser, tmp_path: Path) -> None:
    path = str(tmp_path / "forecasts")
    empty = ForecastStore.open_or_create(path).snapshot
    with listening(service_at(tmp_path / "forecasts")) as address:
        context = browser.new_context(viewport={"width": 1000, "height": 700}, timezone_id="Europe/Zurich")
        watched = Watched(context.new_page())
        watched.page.clock.install()
        watched.open(address)
        watched.page.wait_for_timeout(1000)
        before, asked = seen(watched.page), len(watched.tiles)

        Repository.open(path).rollback(empty)
        header = RunHeader(INIT, EUROPE, LEADS, THRESHOLDS, QUANTILES, {"created": "later"})
        ForecastStore.open(path).write_run(header, [block(EUROPE, seed=1)])
        for _ in range(30):
            watched.page.clock.fast_forward(25_000)
            watched.page.wait_for_timeout(500)
            if len(watched.tiles) > asked:
                break
        watched.page.wait_for_timeout(1000)
        assert (seen(watched.page)[200:500, 400:600] != before[200:500, 400:600]).any()
        assert watched.complaints == []
        context.close()


def seen(page: Page) -> np.ndarray:
    """The page's pixels: row, column, colour."""
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))


def test_a_click_shows_the_forecast_of_that_place(browser: Browser, address: str) -> None:
    watched = open_page(browser, address, 390, 780)
    page = watched.page
    page.mouse.click(195, 300)
    expect(page.locator("#point svg.chart")).to_have_count(2)
    page.locator("#point summary").click()
    expect(page.locator("#point tbody tr")).to_have_count(6)
    page.keyboard.press("Escape")
    expect(page.locator("#point")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert watched.complaints == []
    page.context.close()


def test_a_browser_without_webgl_is_told_where_the_numbers_are(browser: Browser, address: str) -> None:
    page = browser.new_page()
    page.add_init_script(
        "const made = HTMLCanvasElement.prototype.getContext;"
        "HTMLCanvasElement.prototype.getContext = function (kind, ...how) {"
        "  return kind === 'webgl2' ? null : made.call(this, kind, ...how); };"
    )
    page.goto(address)
    expect(page.locator("#notice")).to_contain_text("needs WebGL 2")
    expect(page.locator("#notice")).to_contain_text(f"{address}?f=json")
    page.close()


FRAMES = "2019-06-10T00:35:00Z 2019-06-10T00:40:00Z"


@pytest.mark.parametrize(
    ("frames", "sources", "told"),
    [
        (FRAMES, None, "without the radar frames of 00:35, 00:40 UTC."),
        (FRAMES, "msg", "without the radar frames of 00:35, 00:40 UTC and msg."),
        ("none", "msg elevation", "without msg, elevation."),
    ],
)
def test_a_forecast_made_without_some_of_its_inputs_says_so(
    browser: Browser, address: str, own_service: Service, frames: str, sources: str | None, told: str
) -> None:
    facts = {"degraded": "true", "inputs_missing": frames} | ({"sources_missing": sources} if sources else {})
    write(own_service.path, INIT + timedelta(minutes=10), facts=facts)
    watched = open_page(browser, address, 1000, 700)
    expect(watched.page.locator("#notice")).to_contain_text(told)
    watched.page.locator("#run").select_option(index=1)
    expect(watched.page.locator("#notice")).to_have_text(
        "This is an old forecast; the newest is that of 10 Jun 2019 00:40 UTC."
    )
    watched.page.locator("#run").select_option(index=0)
    expect(watched.page.locator("#notice")).not_to_contain_text("old forecast")
    watched.page.context.close()


def test_playing_goes_round_and_old_data_is_told(
    browser: Browser, address: str, own_service: Service
) -> None:
    own_service.clock.now = INIT + timedelta(hours=3)
    watched = open_page(browser, address, 1000, 700)
    page = watched.page
    expect(page.locator("#notice")).to_contain_text("Old data")
    page.locator("#play").click()
    expect(page.locator("#utc")).to_contain_text("+30 min", timeout=10_000)
    page.locator("#play").click()
    stopped = page.locator("#utc").inner_text()
    page.wait_for_timeout(1000)
    assert page.locator("#utc").inner_text() == stopped
    assert watched.complaints == []
    page.context.close()


def test_a_new_run_is_followed_without_a_reload(browser: Browser, address: str, own_service: Service) -> None:
    context = browser.new_context(viewport={"width": 1000, "height": 700}, timezone_id="Europe/Zurich")
    watched = Watched(context.new_page())
    watched.page.clock.install()
    watched.open(address)
    watched.page.locator("#lead").focus()
    watched.page.keyboard.press("ArrowRight")
    expect(watched.page.locator("#utc")).to_contain_text("00:50 UTC · +20 min")

    write(own_service.path, INIT + timedelta(minutes=10))
    for _ in range(30):  # the page looks again and again; a slow server may be late to see the run
        watched.page.clock.fast_forward(25_000)
        watched.page.wait_for_timeout(500)
        if watched.page.locator("#run option").count() == 2:
            break

    expect(watched.page.locator("#run option")).to_have_count(2)
    expect(watched.page.locator("#utc")).to_contain_text("00:50 UTC · +10 min")
    watched.wait_for_tile("20190610T004000Z/")
    assert watched.complaints == []
    context.close()


TILES_OF_40 = re.compile(r"/tiles/.*/40/\d+/\d+/\d+\.png")
ONE_PLACE = "**/forecast?*"


def test_tiles_that_do_not_load_are_hatched_and_told_until_they_are_there(
    browser: Browser, address: str
) -> None:
    watched = new_page(browser, 1000, 700)
    page = watched.page
    page.clock.install()
    watched.open(address)
    page.route(TILES_OF_40, lambda route: route.abort())
    page.locator("#lead").fill("3")
    expect(page.locator("#notice")).to_contain_text("Part of the map did not load: it is hatched in red")
    page.wait_for_timeout(500)
    assert red(page) > 1000
    page.locator("#lead").fill("0")
    expect(page.locator("#notice")).to_be_hidden()
    page.locator("#lead").fill("3")
    expect(page.locator("#notice")).to_contain_text("Part of the map did not load")

    page.unroute(TILES_OF_40)
    look_again(page)
    expect(page.locator("#notice")).to_be_hidden(timeout=15_000)
    page.wait_for_timeout(500)
    assert red(page) == 0
    assert not_of_the_network(watched) == []
    page.context.close()


def test_tiles_that_are_refused_for_a_moment_are_asked_for_after_it(browser: Browser, address: str) -> None:
    watched = open_page(browser, address, 1000, 700)
    page = watched.page
    refusal = {"Retry-After": "1", "Content-Type": "application/problem+json"}
    page.route(TILES_OF_40, lambda route: route.fulfill(status=503, headers=refusal, body="{}"))
    page.locator("#lead").fill("3")
    expect(page.locator("#notice")).to_contain_text("did not load")
    page.unroute(TILES_OF_40)
    expect(page.locator("#notice")).to_be_hidden(timeout=8_000)  # long before the next look at the runs
    page.context.close()


def test_a_place_whose_forecast_failed_is_asked_for_again(browser: Browser, address: str) -> None:
    watched = new_page(browser, 1000, 700)
    page = watched.page
    page.clock.install()
    watched.open(address)
    page.route(ONE_PLACE, lambda route: route.abort())
    page.mouse.click(500, 300)
    expect(page.locator("#point p")).to_have_text(
        "The server does not answer; this page asks again by itself."
    )
    page.unroute(ONE_PLACE)
    look_again(page)
    expect(page.locator("#point svg.chart")).to_have_count(2, timeout=15_000)
    page.context.close()


def test_only_the_place_last_asked_for_is_shown(browser: Browser, address: str) -> None:
    watched = open_page(browser, address, 1000, 700)
    page = watched.page
    page.mouse.click(500, 250)
    expect(page.locator("#point svg.chart")).to_have_count(2)
    first = page.locator("#point h2").inner_text()

    held: list[Route] = []
    page.route(ONE_PLACE, lambda route: held.append(route))
    page.mouse.click(520, 300)
    expect(page.locator("#point p")).to_have_text("Loading…")
    expect(page.locator("#point svg.chart")).to_have_count(0)
    page.mouse.click(540, 350)
    page.wait_for_timeout(300)
    last = page.locator("#point h2").inner_text()
    assert last != first
    held[1].continue_()
    expect(page.locator("#point svg.chart")).to_have_count(2)
    held[0].abort()
    page.wait_for_timeout(500)
    expect(page.locator("#point svg.chart")).to_have_count(2)
    assert page.locator("#point h2").inner_text() == last

    page.mouse.click(500, 250)
    page.wait_for_timeout(300)
    page.keyboard.press("Escape")
    held[2].continue_()
    page.wait_for_timeout(500)
    expect(page.locator("#point")).to_be_hidden()
    assert not_of_the_network(watched) == []
    page.context.close()


@pytest.mark.parametrize(("width", "height"), [(390, 844), (768, 1024), (640, 360), (844, 390), (1400, 900)])
def test_no_panel_covers_another_nor_the_pin(
    browser: Browser, address: str, own_service: Service, width: int, height: int
) -> None:
    own_service.clock.now = INIT + timedelta(hours=3)
    watched = open_page(browser, address, width, height)
    page = watched.page
    expect(page.locator("#notice")).to_contain_text("Old data")
    assert overlaps(page, width, height) == []

    page.wait_for_timeout(1000)
    sight = page.locator("#sight").bounding_box()
    assert sight is not None
    page.mouse.click(sight["x"] + 0.48 * sight["width"], sight["y"] + 0.7 * sight["height"])
    expect(page.locator("#point svg.chart")).to_have_count(2)
    page.wait_for_timeout(1500)  # the map has moved
    assert overlaps(page, width, height, ".pin") == []
    assert not_of_the_network(watched) == []
    page.context.close()


def overlaps(page: Page, width: int, height: int, *more: str) -> list[str]:
    """Which parts of the page cover each other, or leave the window."""
    names = ("#choice", "#legend", "#time", "#point", *more)
    boxes = {name: box for name in names if (box := page.locator(name).bounding_box())}
    found = [
        name
        for name, box in boxes.items()
        if box["x"] < 0
        or box["y"] < 0
        or box["x"] + box["width"] > width
        or box["y"] + box["height"] > height
    ]
    for one, a in boxes.items():
        for other, b in boxes.items():
            across = a["x"] < b["x"] + b["width"] and b["x"] < a["x"] + a["width"]
            down = a["y"] < b["y"] + b["height"] and b["y"] < a["y"] + a["height"]
            if one < other and across and down:
                found.append(f"{one} and {other}")
    return found


def test_the_panel_of_a_place_speaks_utc_and_says_what_is_shaded(browser: Browser, address: str) -> None:
    watched = open_page(browser, address, 1280, 800)  # in Zurich, two hours ahead
    page = watched.page
    page.mouse.click(500, 300)
    expect(page.locator("#point svg.chart")).to_have_count(2)
    for chart in page.locator("#point svg.chart").all():
        expect(chart).to_contain_text("UTC")
        expect(chart).to_contain_text("00:40")
        expect(chart).not_to_contain_text("02:40")
    expect(page.locator("#point")).to_contain_text("quantiles 10 % to 90 %, 25 % to 75 %")
    expect(page.locator("#legend")).to_contain_text("Probability of 1 mm/h or more, %")

    for selector, property, least in (
        ("text", "fill", 4.5),
        (".line", "stroke", 3),
        (".band", "stroke", 3),
    ):
        found = page.locator(f"#point svg.chart {selector}").evaluate_all(
            f"all => all.map((one) => getComputedStyle(one).{property})"
        )
        assert len(found) > 1
        assert min(map(contrast_on_white, found)) >= least
    assert watched.complaints == []
    page.context.close()


def contrast_on_white(colour: str) -> float:
    """The contrast ratio of rgb(r, g, b) on white (WCAG 2.2)."""
    part = np.array([int(digits) for digits in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return float(1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05))


def test_only_quantiles_that_mirror_each_other_are_shaded(browser: Browser, address: str) -> None:
    def lopsided(route: Route) -> None:
        body = route.fetch().json()
        for at in body["forecast"]:
            del at["rainfall_rate_quantile"]["0.9"]
        route.fulfill(body=json.dumps(body), content_type="application/json")

    watched = open_page(browser, address, 1280, 800)
    watched.page.route(ONE_PLACE, lopsided)
    watched.page.mouse.click(500, 300)
    expect(watched.page.locator("#point figure p")).to_have_text(
        "Line: median. Shaded, darker inwards: quantiles 25 % to 75 %."
    )
    watched.page.context.close()


def test_rain_does_not_wait_for_the_base_map_and_what_it_lacks_is_told(
    browser: Browser, address: str
) -> None:
    watched = new_page(browser, 1000, 700)
    page = watched.page
    page.clock.install()
    held: list[Route] = []
    page.route("**/countries-50m.json", lambda route: held.append(route))
    page.route("**/states-10m.json", lambda route: route.abort())
    watched.open(address)
    expect(page.locator("#notice")).to_have_text(
        "The map is without its borders of states, which did not load. This page asks again by itself. "
        "The base map is loading."
    )
    held[0].continue_()
    expect(page.locator("#notice")).not_to_contain_text("loading")
    page.unroute("**/states-10m.json")
    look_again(page)
    expect(page.locator("#notice")).to_be_hidden(timeout=15_000)
    assert not_of_the_network(watched) == []
    page.context.close()


def test_before_the_first_answer_the_page_says_that_it_loads(browser: Browser, address: str) -> None:
    page = new_page(browser, 1000, 700).page
    page.route("**/*.mjs", lambda route: None)
    page.goto(address, wait_until="commit")
    expect(page.locator("#notice")).to_contain_text("The forecast is loading.")
    expect(page.locator("#notice .late")).to_be_hidden()
    expect(page.locator("#notice .late")).to_be_visible(timeout=15_000)
    page.context.close()


def test_a_long_name_of_a_time_zone_leaves_the_slider_its_place(browser: Browser, address: str) -> None:
    for width, height in ((1280, 800), (640, 360), (390, 844)):
        watched = open_page(browser, address, width, height, "Asia/Kathmandu")
        page = watched.page
        expect(page.locator("#local")).to_have_text("Mon 10 Jun 06:25 GMT+5:45")
        text, slide = page.locator("#local").bounding_box(), page.locator("#lead").bounding_box()
        assert text is not None
        assert slide is not None
        beside = text["x"] + text["width"] <= slide["x"]
        above = text["y"] + text["height"] <= slide["y"]
        assert beside or above
        page.context.close()


def test_what_has_not_changed_is_not_said_again(browser: Browser, address: str, own_service: Service) -> None:
    own_service.clock.now = INIT + timedelta(hours=3)
    watched = new_page(browser, 1000, 700)
    page = watched.page
    page.clock.install()
    watched.open(address)
    page.mouse.click(500, 300)
    expect(page.locator("#heard")).to_contain_text("loaded.")
    expect(page.locator("#notice")).to_contain_text("Old data")
    assert page.locator("output, [aria-live]").count() == 0
    page.wait_for_timeout(1500)

    page.evaluate(
        "window.said = [];"
        "new MutationObserver((all) => said.push(...all.map((one) => one.target.textContent)))"
        ".observe(document.querySelector('[role=status]'),"
        " { childList: true, attributes: true, characterData: true, subtree: true });"
        "new MutationObserver((all) => said.push(...all.map((one) => one.target.textContent)))"
        ".observe(document.querySelector('#heard'), { childList: true, characterData: true })"
    )
    page.locator("#play").click()
    for _ in range(3):
        page.clock.fast_forward(21_000)
        page.wait_for_timeout(700)
    assert page.evaluate("said") == []
    page.context.close()


def test_closing_the_panel_gives_the_focus_to_the_map(browser: Browser, address: str) -> None:
    watched = open_page(browser, address, 1000, 700)
    page = watched.page
    page.locator("canvas.maplibregl-canvas").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#point svg.chart")).to_have_count(2)
    page.locator("#close").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#point")).to_be_hidden()
    expect(page.locator("canvas.maplibregl-canvas")).to_be_focused()
    page.context.close()


def look_again(page: Page) -> None:
    """Lets the time pass after which the page asks for the runs anew."""
    page.clock.fast_forward(25_000)
    page.wait_for_timeout(500)


def red(page: Page) -> int:
    """How many pixels are of the lines that stand for tiles that did not load."""
    colours = seen(page).astype(int)
    return int(((colours[..., 0] > 150) & (colours[..., 1:] < 120).all(axis=-1)).sum())


def not_of_the_network(watched: Watched) -> list[str]:
    """The complaints but those of the browser over requests that the test let fail."""
    return [said for said in watched.complaints if "Failed to load resource" not in said]
