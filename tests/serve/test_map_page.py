"""The map page in a real browser (headless Chromium)."""

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serve.app import create_app
from tests.serve.conftest import INIT, Service, write

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
    config = uvicorn.Config(create_app(own_service.forecasts), port=0, log_level="error", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
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
