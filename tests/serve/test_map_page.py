"""The map page in a real browser (headless Chromium)."""

import io
import os
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
from playwright.sync_api import Browser, Page, expect, sync_playwright

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


def open_page(browser: Browser, address: str, width: int, height: int) -> Watched:
    context = browser.new_context(viewport={"width": width, "height": height}, timezone_id="Europe/Zurich")
    watched = Watched(context.new_page())
    watched.open(address)
    return watched


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
        moved = (before != seen(page)).any(
            axis=(0, 2)
        )  # by column of the picture; 180 degrees is in its middle
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
        dark = (picture[340:430] < 70).all(axis=2).any(axis=0)  # the rim's ink, where it lies
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


def test_a_forecast_made_without_some_frames_says_so(
    browser: Browser, address: str, own_service: Service
) -> None:
    missing = "2019-06-10T00:35:00Z 2019-06-10T00:40:00Z"
    write(
        own_service.path, INIT + timedelta(minutes=10), facts={"degraded": "true", "inputs_missing": missing}
    )
    watched = open_page(browser, address, 1000, 700)
    expect(watched.page.locator("#notice")).to_contain_text("radar frames of 00:35, 00:40 UTC")
    watched.page.locator("#run").select_option(index=1)
    expect(watched.page.locator("#notice")).to_be_hidden()
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
