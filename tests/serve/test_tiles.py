"""Tiles: the right cell in the right colour at the right pixel, and nothing where there is no rain or no forecast."""

import io
import math
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyproj import Transformer

from pipelines.grid import Grid
from pipelines.palette import RAIN_COLOURS, RAIN_LEVELS
from pipelines.repository import Repository
from pipelines.runs import ForecastStore
from serve.palette import BELOW, MISSING, PROBABILITY, RATE
from serve.tiles import tile_cells
from tests.serve.conftest import EUROPE, LEADS, Service, service_at, write

HALF_WORLD = math.pi * 6378137  # metres, EPSG:3857


def rgba(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGBA"))


def tile_of(lon: float, lat: float, z: int) -> tuple[int, int, int, int]:
    """x, y of the tile and column, row of the pixel that hold a place; by PROJ, not by the tiles' own formula."""
    east, north = Transformer.from_crs("EPSG:4326", "EPSG:3857", always_xy=True).transform(lon, lat)
    pixel = 2 * HALF_WORLD / (256 * 2**z)
    column, row = int((east + HALF_WORLD) // pixel), int((HALF_WORLD - north) // pixel)
    return column // 256, row // 256, column % 256, row % 256


def colour_of(rate: float) -> str | None:
    """By the words of the legend: the last level that is reached; None is transparent."""
    reached = [
        colour for level, colour in zip(RAIN_LEVELS, RAIN_COLOURS, strict=True) if rate >= np.float32(level)
    ]
    return reached[-1] if reached else None


GLOBE = Grid("EPSG:4326", -179.5, 1.0, 360, 89.5, -1.0, 180)
PACIFIC = Grid("EPSG:4326", 160.25, 0.5, 80, 10.25, -0.5, 60)  # across 180 degrees


@pytest.mark.parametrize("grid", [EUROPE, GLOBE, PACIFIC], ids=["projected", "globe", "dateline"])
def test_a_pixel_has_the_colour_of_the_cell_below_it(grid: Grid, tmp_path: Path) -> None:
    """The oracle goes the other way: from a cell's centre, by PROJ, to a pixel, at a zoom where pixels are small."""
    service = service_at(tmp_path / "forecasts", grid)
    z = 9 if grid is EUROPE else 6
    lon, lat = grid.lonlat()
    dice = np.random.default_rng(1)
    colours = set()
    for _ in range(25):
        row, column = dice.integers(0, grid.y_size), dice.integers(0, grid.x_size)
        if abs(lat[row, column]) > 80:
            continue
        x, y, across, down = tile_of(lon[row, column], lat[row, column], z)
        image = rgba(service.client.get(f"/tiles/latest/rainfall_rate_mean/30/{z}/{x}/{y}.png"))
        seen = image[down, across]
        colour = colour_of(service.written.mean[2, row, column])
        colours.add(colour)
        if colour is None:
            assert seen[3] == 0
        else:
            assert "#" + bytes(seen[:3].tolist()).hex() == colour
            assert seen[3] == 255
    assert len(colours) > 3


def test_the_tile_and_the_point_query_agree(service: Service) -> None:
    for lon, lat in ((9.123, 47.456), (8.31, 51.2), (13.9, 49.77), (6.1, 45.9)):
        point = service.client.get(f"/forecast?lat={lat}&lon={lon}").json()["forecast"]
        x, y, across, down = tile_of(lon, lat, 12)
        for lead, at in zip(LEADS, point, strict=True):
            image = rgba(service.client.get(f"/tiles/latest/rainfall_rate_median/{lead:g}/12/{x}/{y}.png"))
            colour = colour_of(at["rainfall_rate_median"])
            seen = image[down, across]
            assert (None if seen[3] == 0 else "#" + bytes(seen[:3].tolist()).hex()) == colour


def test_no_forecast_is_transparent_in_every_quantity_and_hatched_on_demand(service: Service) -> None:
    lon, lat = EUROPE.lonlat()
    row, column = 120, 115
    assert np.isnan(service.written.mean[0, row, column])
    x, y, across, down = tile_of(lon[row, column], lat[row, column], 10)
    for name in service.forecasts.run().quantities:
        image = rgba(service.client.get(f"/tiles/latest/{name}/10/10/{x}/{y}.png"))
        assert image[down, across, 3] == 0
    hatched = rgba(service.client.get(f"/tiles/latest/rainfall_rate_mean/10/10/{x}/{y}.png?gaps=hatched"))
    around = hatched[max(0, down - 8) : down + 8, max(0, across - 8) : across + 8, 3]
    assert set(np.unique(around)) == {0, 255}
    row, column = np.argwhere(service.written.mean[0] == 0)[0]
    x, y, across, down = tile_of(lon[row, column], lat[row, column], 10)
    forecast = rgba(service.client.get(f"/tiles/latest/rainfall_rate_mean/10/10/{x}/{y}.png?gaps=hatched"))
    assert not forecast[max(0, down - 8) : down + 8, max(0, across - 8) : across + 8, 3].any(), (
        "dry is not a gap"
    )


@pytest.mark.parametrize("quantity", ["rainfall_rate_mean", "probability_of_exceedance_1"])
def test_a_tile_outside_the_domain_is_wholly_transparent(service: Service, quantity: str) -> None:
    assert not rgba(service.client.get(f"/tiles/latest/{quantity}/10/5/3/12.png?gaps=hatched"))[..., 3].any()
    assert rgba(service.client.get("/tiles/latest/rainfall_rate_mean/10/5/16/11.png"))[..., 3].any()


def test_leads_and_quantities_give_different_tiles(service: Service) -> None:
    names = [
        f"/tiles/latest/{quantity}/{lead}/5/16/11.png"
        for quantity in ("rainfall_rate_mean", "probability_of_exceedance_1", "rainfall_rate_quantile_0.9")
        for lead in (10, 60)
    ]
    assert len({service.client.get(name).content for name in names}) == len(names)


def test_the_run_s_name_and_latest_give_the_same_bytes(service: Service) -> None:
    latest = service.client.get("/tiles/latest/rainfall_rate_mean/10/5/16/11.png")
    named = service.client.get("/tiles/20190610T003000Z/rainfall_rate_mean/10/5/16/11.png")
    assert named.content == latest.content
    assert named.headers["etag"] == latest.headers["etag"]
    assert named.headers["cache-control"] == latest.headers["cache-control"] == "no-cache"


def test_a_run_that_is_taken_back_and_made_anew_is_seen_by_who_has_its_tiles(tmp_path: Path) -> None:
    before = ForecastStore.open_or_create(str(tmp_path / "forecasts")).snapshot
    service = service_at(tmp_path / "forecasts")
    tile = "/tiles/20190610T003000Z/rainfall_rate_mean/10/5/16/11.png"
    held = service.client.get(tile)
    Repository.open(str(service.path)).rollback(before)
    write(service.path, seed=1)
    asked = service.client.get(tile, {"if-none-match": held.headers["etag"]})
    assert held.headers["cache-control"] == "no-cache", "the client asks again each time"
    assert asked.status_code == 200
    assert asked.content != held.content


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("nowhere/rainfall_rate_mean/10/5/16/11.png", 404),
        ("latest/rainfall_rate_mean/10/5/16/11.png?gaps=filled", 400),
        ("latest/snow/10/5/16/11.png", 404),
        ("latest/probability_of_exceedance_3/10/5/16/11.png", 404),
        ("latest/rainfall_rate_mean/15/5/16/11.png", 404),
        ("latest/rainfall_rate_mean/ten/5/16/11.png", 404),
        ("latest/rainfall_rate_mean/10/5/32/11.png", 400),
        ("latest/rainfall_rate_mean/10/5/16/32.png", 400),
        ("latest/rainfall_rate_mean/10/19/16/11.png", 400),
        ("latest/rainfall_rate_mean/10/-1/0/0.png", 400),
        ("latest/rainfall_rate_mean/10/5/16/11.jpg", 404),
        ("latest/rainfall_rate_mean/10/5/16/" + "9" * 400 + ".png", 400),
    ],
)
def test_an_address_that_is_no_tile_is_a_problem(service: Service, address: str, status: int) -> None:
    answer = service.client.get(f"/tiles/{address}")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status


@settings(max_examples=20)
@given(z=st.integers(0, 12), data=st.data())
def test_neighbouring_tiles_are_quarters_of_their_parent(z: int, data: st.DataObject) -> None:
    """A pixel of a tile covers two by two pixels of the tiles one zoom deeper, so its cell lies among theirs or beside."""
    x, y = data.draw(st.integers(0, 2**z - 1)), data.draw(st.integers(0, 2**z - 1))
    parent = tile_cells(GLOBE, z, x, y)
    whole = np.block([[tile_cells(GLOBE, z + 1, 2 * x + i, 2 * y + j) for i in (0, 1)] for j in (0, 1)])
    corners = [whole[j::2, i::2] for j in (0, 1) for i in (0, 1)]
    rows, columns = np.stack(corners) // GLOBE.x_size, np.stack(corners) % GLOBE.x_size
    assert (rows.min(0) <= parent // GLOBE.x_size).all()
    assert (parent // GLOBE.x_size <= rows.max(0)).all()
    assert (columns.min(0) <= parent % GLOBE.x_size).all()
    assert (parent % GLOBE.x_size <= columns.max(0)).all()


@given(st.floats(0, 300, width=32))
def test_a_value_has_the_last_colour_whose_level_it_reaches(value: float) -> None:
    index = int(RATE.indices(np.array([value], np.float32))[0])
    assert (None if index == BELOW else RATE.colours[index - 1]) == colour_of(np.float32(value))


def test_each_level_is_the_first_value_of_its_colour() -> None:
    for palette in (RATE, PROBABILITY):
        levels = np.array(palette.levels, np.float32)
        assert palette.indices(levels).tolist() == list(range(1, len(levels) + 1))
        assert palette.indices(np.nextafter(levels, np.float32(0))).tolist() == list(range(len(levels)))


def test_dry_and_missing_stay_apart_in_the_indices() -> None:
    assert RATE.indices(np.array([0, np.nan, 0.1], np.float32)).tolist() == [BELOW, MISSING, 1]
    assert RATE.alpha[BELOW] == RATE.alpha[MISSING] == 0
    assert RATE.alpha[1] == 255


def test_the_legend_says_percent_where_the_palette_holds_fractions() -> None:
    legend = PROBABILITY.legend()
    assert legend["units"] == "%"
    assert [entry["from"] for entry in legend["entries"]] == [5, 10, 20, 30, 40, 50, 60, 70, 80, 90]
