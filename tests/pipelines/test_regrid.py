"""What `regrid` keeps: constants, mass, places and gaps."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyproj import Transformer

from pipelines.cf import RAINFALL_RATE
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.regrid import regrid

KANSAS = Grid("EPSG:4326", -99.995, 0.01, 500, 40.995, -0.01, 400)  # 4 x 5 degrees
ALBERS = Grid("EPSG:5070", -250000.0, 1000.0, 300, 1900000.0, -1000.0, 250)  # wholly within it


def frame(grid: Grid, values: NDArray[np.float64]) -> Frame:
    time = datetime(2020, 6, 1, tzinfo=UTC)
    field = np.broadcast_to(values, grid.shape).astype(np.float32)
    return Frame(RAINFALL_RATE, time, timedelta(minutes=5), grid, field, "test", "00" * 32)


def hill(grid: Grid) -> NDArray[np.float64]:
    """A smooth hill (mm/h) in the middle of Kansas, by place and not by cell; nothing near the edges."""
    lon, lat = grid.lonlat()
    return 40 * np.exp(-(((lon + 97.6) / 0.35) ** 2) - ((lat - 39.0) / 0.3) ** 2)


def cell_areas(grid: Grid) -> NDArray[np.float64]:
    """Of cells in degrees (m2, on a sphere, whose size cancels out)."""
    south, north = grid.y + grid.y_step / 2, grid.y - grid.y_step / 2
    bands = 6371007.0**2 * np.radians(grid.x_step) * (np.sin(np.radians(north)) - np.sin(np.radians(south)))
    return np.repeat(bands[:, None], grid.x_size, axis=1)


def test_a_constant_stays_that_constant_everywhere():
    assert (regrid(frame(KANSAS, np.array(7.3)), ALBERS).values == np.float32(7.3)).all()


def test_its_own_grid_changes_nothing():
    rain = frame(KANSAS, hill(KANSAS))
    assert regrid(rain, KANSAS) is rain


def test_the_water_is_kept():
    coarse = Grid(ALBERS.crs, ALBERS.x_first, 5000.0, 60, ALBERS.y_first, -5000.0, 50)
    water = (hill(KANSAS) * cell_areas(KANSAS)).sum()
    fine_water = regrid(frame(KANSAS, hill(KANSAS)), ALBERS).values.sum(dtype=float) * 1000**2
    coarse_water = regrid(frame(KANSAS, hill(KANSAS)), coarse).values.sum(dtype=float) * 5000**2
    assert fine_water == pytest.approx(water, rel=5e-3)
    assert coarse_water == pytest.approx(fine_water, rel=2e-4)


def test_there_and_back_keeps_a_smooth_field():
    back = regrid(regrid(frame(ALBERS, hill(ALBERS)), KANSAS), ALBERS).values
    there = hill(ALBERS)
    seen = ~np.isnan(back)
    assert seen[5:-5, 5:-5].all()
    assert back[seen].sum(dtype=float) == pytest.approx(there[seen].sum(), rel=1e-3)
    assert np.abs(back - there)[seen].max() < 0.5  # of 40 mm/h


def test_a_cell_of_whole_cells_is_their_mean():
    fine = Grid("EPSG:3035", 4000500.0, 1000.0, 8, 3000500.0, -1000.0, 6)
    coarse = Grid("EPSG:3035", 4001000.0, 2000.0, 4, 3000000.0, -2000.0, 3)
    rain = np.random.default_rng(5).uniform(0, 20, fine.shape)
    expected = rain.reshape(3, 2, 4, 2).mean(axis=(1, 3))
    assert regrid(frame(fine, rain), coarse).values == pytest.approx(expected, rel=1e-5)


def test_a_pixel_lands_where_pyproj_says():
    rain = np.zeros(KANSAS.shape)
    rain[150, 200] = 90.0
    got = regrid(frame(KANSAS, rain), ALBERS).values
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:5070", always_xy=True).transform(
        KANSAS.x[200], KANSAS.y[150]
    )
    rows, columns = np.mgrid[: ALBERS.y_size, : ALBERS.x_size]
    middle_x = ALBERS.x_first + ALBERS.x_step * (columns * got).sum() / got.sum()
    middle_y = ALBERS.y_first + ALBERS.y_step * (rows * got).sum() / got.sum()
    assert (middle_x, middle_y) == pytest.approx((x, y), abs=150)  # m, of cells of 1000 m
    assert (got > 0).sum() <= 6


def test_unseen_halves_stay_unseen():
    rain = hill(KANSAS)
    rain[:, :230] = np.nan
    got = regrid(frame(KANSAS, rain), ALBERS)
    lon, _ = ALBERS.lonlat()
    border = KANSAS.x[230] - KANSAS.x_step / 2
    assert np.isnan(got.values[lon < border - 0.012]).all()
    assert not np.isnan(got.values[lon > border + 0.012]).any()
    assert np.isnan(got.values).any()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_nan_exactly_where_less_than_half_was_seen_and_never_dry_instead(seed):
    rng = np.random.default_rng(seed)
    fine = Grid("EPSG:3035", 4000500.0, 1000.0, 12, 3000500.0, -1000.0, 8)
    coarse = Grid("EPSG:3035", 4001000.0, 4000.0, 3, 2999000.0, -4000.0, 2)
    rain = np.where(rng.random(fine.shape) < rng.random(), np.nan, rng.uniform(1, 9, fine.shape))
    padded = np.pad(rain, ((0, 0), (1, 0)), constant_values=np.nan)[:, :12]  # coarse begins 1 km west of fine
    cells = padded.reshape(2, 4, 3, 4).swapaxes(1, 2).reshape(2, 3, 16)
    seen = (~np.isnan(cells)).sum(axis=2)
    mean = np.nansum(cells, axis=2) / np.maximum(seen, 1)
    expected = np.where(seen >= 8, mean, np.nan)
    if np.isnan(rain).all():
        return
    np.testing.assert_allclose(regrid(frame(fine, rain), coarse).values, expected, rtol=1e-5)


def test_outside_the_source_is_not_observed():
    wider = Grid(ALBERS.crs, ALBERS.x_first - 400e3, 4000.0, 250, ALBERS.y_first + 400e3, -4000.0, 250)
    got = regrid(frame(KANSAS, np.array(2.0)), wider).values
    row, column = KANSAS.cells(*wider.lonlat())
    inside = (row > 5) & (row < 394) & (column > 5) & (column < 494)
    outside = (row < -5) | (row > 404) | (column < -5) | (column > 504)
    assert (got[inside] == 2).all()
    assert np.isnan(got[outside]).all()
    assert inside.any()
    assert outside.any()


def test_cells_on_the_date_line_and_on_the_seam_of_a_world_grid_see_both_sides():
    world = Grid("EPSG:4326", 0.5, 1.0, 360, 89.5, -1.0, 180)
    by_longitude = np.abs(np.where(world.x > 180, world.x - 360, world.x)) + 1.0
    rain = frame(world, np.broadcast_to(by_longitude, world.shape))
    for middle in (0, 180):
        laea = Grid(f"+proj=laea +lat_0=50 +lon_0={middle} +datum=WGS84", -390e3, 60e3, 14, 390e3, -60e3, 14)
        lon, _ = laea.lonlat()
        got = regrid(rain, laea).values
        assert got == pytest.approx(np.abs(lon) + 1.0, abs=0.8)


def test_a_grid_elsewhere_is_refused():
    europe = Grid("EPSG:3035", 4000000.0, 1000.0, 20, 3000000.0, -1000.0, 20)
    with pytest.raises(ValueError, match="wholly outside"):
        regrid(frame(KANSAS, np.array(1.0)), europe)
