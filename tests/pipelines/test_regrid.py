"""What `regrid` keeps: constants, mass, places and gaps."""

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyproj import Transformer

from pipelines import regrid as module
from pipelines.cf import ELEVATION, PRECIPITATION_FLAG, RAINFALL_RATE, REFLECTIVITY, Variable
from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.regrid import regrid

KANSAS = Grid("EPSG:4326", -99.995, 0.01, 500, 40.995, -0.01, 400)  # 4 x 5 degrees
ALBERS = Grid("EPSG:5070", -250000.0, 1000.0, 300, 1900000.0, -1000.0, 250)  # wholly within it


def frame(grid: Grid, values: NDArray[np.float64], variable: Variable = RAINFALL_RATE) -> Frame:
    time = datetime(2020, 6, 1, tzinfo=UTC)
    field = np.broadcast_to(values, grid.shape).astype(np.float32)
    return Frame(variable, time, timedelta(minutes=5), grid, field, "test", "00" * 32)


def hill(grid: Grid) -> NDArray[np.float64]:
    """A smooth hill (mm/h) in the middle of Kansas, by place and not by cell; nothing near the edges."""
    lon, lat = grid.lonlat()
    return 40 * np.exp(-(((lon + 97.6) / 0.35) ** 2) - ((lat - 39.0) / 0.3) ** 2)


def cell_areas(grid: Grid) -> NDArray[np.float64]:
    """Of cells in degrees (m2), by the closed form for bands of the WGS 84 ellipsoid."""
    e = np.sqrt(6.69437999014e-3)
    sine = np.sin(np.radians(np.append(grid.y - grid.y_step / 2, grid.y[-1] + grid.y_step / 2)))
    from_equator = (1 - e**2) * (sine / (1 - (e * sine) ** 2) + np.arctanh(e * sine) / e) / 2
    bands = 6378137.0**2 * np.radians(grid.x_step) * -np.diff(from_equator)
    return np.repeat(bands[:, None], grid.x_size, axis=1)


def test_a_constant_stays_that_constant_everywhere():
    assert (regrid(frame(KANSAS, np.array(7.3)), ALBERS).values == np.float32(7.3)).all()


def test_its_own_grid_changes_nothing():
    rain = frame(KANSAS, hill(KANSAS))
    assert regrid(rain, KANSAS) is rain


def water(rain: Frame) -> float:
    """Of a field in degrees or in an equal-area CRS (in units that cancel out)."""
    grid = rain.grid
    areas = cell_areas(grid) if grid.is_geographic else np.full(grid.shape, -grid.x_step * grid.y_step)
    return float(np.nansum(rain.values.astype(np.float64) * areas))


AROUND = Grid(ALBERS.crs, -280e3, 1000.0, 360, 1920e3, -1000.0, 290)  # with all of the hill
COARSE = Grid(ALBERS.crs, -280e3, 5000.0, 72, 1920e3, -5000.0, 58)


@pytest.mark.parametrize("there", [AROUND, COARSE], ids=["as fine", "coarser"])
def test_the_water_is_kept_there_and_back_again(there):
    rain = frame(KANSAS, hill(KANSAS))
    over = regrid(rain, there)
    back = regrid(over, KANSAS)
    assert water(over) == pytest.approx(water(rain), rel=1e-6)
    assert water(back) == pytest.approx(water(rain), rel=1e-6)


def test_the_water_of_a_coarse_field_is_kept_in_finer_cells_and_back_again():
    rain = frame(COARSE, hill(COARSE))
    over = regrid(rain, KANSAS)
    back = regrid(over, COARSE)
    assert water(over) == pytest.approx(water(rain), rel=1e-6)
    assert water(back) == pytest.approx(water(rain), rel=1e-6)


@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_water_of_any_field_is_kept_however_rough(seed):
    rng = np.random.default_rng(seed)
    showers = np.minimum(hill(KANSAS) * rng.gamma(0.1, 10, KANSAS.shape), 1500)
    rain = frame(KANSAS, np.where(hill(KANSAS) > 1e-4, showers, 0))
    assert water(regrid(rain, COARSE)) == pytest.approx(water(rain), rel=1e-5)


def test_there_and_back_keeps_a_smooth_field():
    back = regrid(regrid(frame(ALBERS, hill(ALBERS)), KANSAS), ALBERS).values
    seen = ~np.isnan(back)
    assert seen[1:-1, 1:-1].all()
    assert np.abs(back - hill(ALBERS))[seen].max() < 0.2  # of 40 mm/h


def clipped(polygon: list[tuple[float, float]], row: int, column: int) -> float:
    """The area of a convex polygon within one unit cell (Sutherland and Hodgman 1974)."""
    for axis, bound, sign in ((0, row, 1), (0, row + 1, -1), (1, column, 1), (1, column + 1, -1)):
        kept = []
        for here, after in zip(polygon, [*polygon[1:], *polygon[:1]], strict=True):
            inside, next_inside = sign * (here[axis] - bound) >= 0, sign * (after[axis] - bound) >= 0
            if inside:
                kept.append(here)
            if inside != next_inside:
                share = (bound - here[axis]) / (after[axis] - here[axis])
                kept.append(tuple(a + share * (b - a) for a, b in zip(here, after, strict=True)))
        polygon = kept
    turned = [*polygon[1:], *polygon[:1]]
    return abs(sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(polygon, turned, strict=True))) / 2


@settings(max_examples=15)
@given(
    size=st.floats(0.3, 4.0),
    angle=st.floats(-180, 180),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_every_overlap_is_the_area_of_the_clipped_cell(size, angle, place):
    turn = np.array(
        [
            [np.cos(np.radians(angle)), -np.sin(np.radians(angle))],
            [np.sin(np.radians(angle)), np.cos(np.radians(angle))],
        ]
    )
    lattice = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij"))
    row, column = np.einsum("ab,byx->ayx", turn, lattice * size) + 20 + np.reshape(place, (2, 1, 1))
    got = np.zeros((9, 40, 40))
    cell, i, j, share = module._clipped(row, column, np.ones((3, 3), bool))
    np.add.at(got, (cell, i, j), share)
    for y, x in np.ndindex(3, 3):
        corners = [(row[a, b], column[a, b]) for a, b in ((y, x), (y, x + 1), (y + 1, x + 1), (y + 1, x))]
        for i, j in np.ndindex(40, 40):
            if max(abs(i - corners[0][0]), abs(j - corners[0][1])) < 2 * size + 2:
                assert got[3 * y + x, i, j] == pytest.approx(clipped(corners, i, j) / size**2, abs=2e-6)
    assert got.sum(axis=(1, 2)) == pytest.approx(np.ones(9), abs=1e-5)


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


@settings(max_examples=25)
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


def test_a_window_of_its_own_grid_is_cut_out_as_it_is():
    rain = frame(KANSAS, np.random.default_rng(1).gamma(0.2, 9, KANSAS.shape))
    again = Grid(KANSAS.crs, KANSAS.x[37], 0.01, 60, KANSAS.y[205], -0.01, 50)
    assert np.array_equal(regrid(rain, again).values, rain.values[205:255, 37:97])
    assert regrid(rain, again).grid == again


def test_cells_that_fall_together_but_reach_beyond_keep_their_values_and_end_in_nan():
    fine = Grid("EPSG:3035", 4000500.0, 1000.0, 8, 3000500.0, -1000.0, 6)
    wider = Grid(fine.crs, fine.x_first - 3000, 1000.0, 20, fine.y_first + 2000, -1000.0, 9)
    rain = np.random.default_rng(2).gamma(0.2, 9, fine.shape)
    expected = np.full(wider.shape, np.nan, np.float32)
    expected[2:8, 3:11] = rain
    np.testing.assert_array_equal(regrid(frame(fine, rain), wider).values, expected)


def test_turning_a_world_grid_round_only_moves_its_columns():
    east = Grid("EPSG:4326", 0.5, 1.0, 360, 89.5, -1.0, 180)
    rain = np.random.default_rng(3).gamma(0.2, 9, east.shape)
    west = Grid("EPSG:4326", -179.5, 1.0, 360, 89.5, -1.0, 180)
    np.testing.assert_array_equal(
        regrid(frame(east, rain), west).values, np.roll(rain, 180, axis=1).astype(np.float32)
    )


def test_cells_of_a_grid_in_degrees_count_by_their_area_on_the_ground():
    fine = Grid("EPSG:4326", 10.5, 1.0, 4, 79.5, -1.0, 20)
    coarse = Grid("EPSG:4326", 11.0, 2.0, 2, 70.0, -20.0, 1)
    rain = np.repeat(np.arange(20.0)[:, None], 4, axis=1)
    expected = (rain[:, 0] * cell_areas(fine)[:, 0]).sum() / cell_areas(fine)[:, 0].sum()
    assert expected > 10.5  # where the plain mean has 9.5
    assert regrid(frame(fine, rain), coarse).values == pytest.approx(expected, rel=3e-3)


def test_reflectivity_is_averaged_as_power_and_a_constant_stays_to_the_last_bit():
    fine = Grid("EPSG:3035", 4000500.0, 1000.0, 4, 3000500.0, -1000.0, 2)
    coarse = Grid("EPSG:3035", 4001000.0, 2000.0, 2, 3000000.0, -2000.0, 1)
    echo = np.array([[50.0, -32.0, 23.7, 23.7], [-32.0, -32.0, 23.7, np.nan]])
    got = regrid(frame(fine, echo, REFLECTIVITY), coarse).values[0]
    assert got[0] == pytest.approx(50 - 10 * np.log10(4), abs=1e-3)
    assert got[1] == np.float32(23.7)


def test_of_classes_the_one_that_covers_most_wins_and_no_new_one_is_made():
    fine = Grid("EPSG:3035", 4000500.0, 1000.0, 6, 3000500.0, -1000.0, 2)
    coarse = Grid("EPSG:3035", 4001000.0, 2000.0, 3, 3000000.0, -2000.0, 1)
    kinds = np.array([[1.0, 96.0, 7.0, np.nan, np.nan, np.nan], [96.0, 6.0, 3.0, 3.0, np.nan, 1.0]])
    got = regrid(frame(fine, kinds, PRECIPITATION_FLAG), coarse).values[0]
    np.testing.assert_array_equal(got, [96.0, 3.0, np.nan])


def test_the_class_of_a_finer_cell_is_that_of_the_cell_it_lies_in():
    coarse = Grid("EPSG:3035", 4001000.0, 2000.0, 3, 3000000.0, -2000.0, 2)
    fine = Grid("EPSG:3035", 4000250.0, 500.0, 12, 3000750.0, -500.0, 8)
    kinds = np.array([[1.0, 96.0, 7.0], [np.nan, 6.0, 3.0]])
    got = regrid(frame(coarse, kinds, PRECIPITATION_FLAG), fine).values
    np.testing.assert_array_equal(got, kinds.repeat(4, axis=0).repeat(4, axis=1))


GOES = Grid("+proj=geos +h=35786023 +lon_0=-75 +sweep=x +ellps=GRS80", -5.4e6, 40e3, 271, 5.4e6, -40e3, 271)


def test_places_in_space_are_not_observed_and_do_not_disturb_those_on_earth():
    with np.errstate(invalid="ignore"):
        lon, lat = GOES.lonlat()
        smooth = 20 + 10 * np.cos(np.radians(lat)) * np.cos(np.radians(lon))
    seen = np.isfinite(smooth)
    world = Grid("EPSG:4326", -179.5, 1.0, 360, 89.5, -1.0, 180)
    got = regrid(frame(GOES, np.where(seen, smooth, np.nan)), world).values
    lon, lat = world.lonlat()
    arc = np.degrees(np.arccos(np.cos(np.radians(lat)) * np.cos(np.radians(lon + 75))))
    expected = 20 + 10 * np.cos(np.radians(lat)) * np.cos(np.radians(lon))
    assert np.abs(got - expected)[arc < 72].max() < 0.2
    assert np.isnan(got[arc > 83]).all()
    assert 0.2 < (~seen).mean() < 0.3


@pytest.mark.parametrize(
    "crs",
    [
        "+proj=laea +lat_0=55 +lon_0=10 +ellps=WGS84",
        "+proj=stere +lat_0=90 +lon_0=10 +lat_ts=60 +a=6370040 +b=6370040",
        "EPSG:21781",
        "EPSG:5070",
    ],
)
def test_the_other_side_of_the_earth_is_never_observed(crs):
    to_crs = Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    home = (-96.0, 40.0) if crs == "EPSG:5070" else (8.5, 47.0)
    x, y = to_crs.transform(*home)
    grid = Grid(crs, x - 600e3, 20e3, 61, y + 600e3, -20e3, 61)
    world = Grid("EPSG:4326", -179.5, 1.0, 360, 89.5, -1.0, 180)
    got = regrid(frame(grid, np.array(3.0)), world).values
    lon, lat = np.radians(world.lonlat())
    cosine = np.sin(lat) * np.sin(np.radians(home[1])) + np.cos(lat) * np.cos(np.radians(home[1])) * np.cos(
        lon - np.radians(home[0])
    )
    away = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    assert (got[away < 4] == 3).all()
    assert np.isnan(got[away > 10]).all()


def test_a_frame_without_cadence_is_regridded_too():
    relief = replace(frame(KANSAS, np.array(5.0)), cadence=None, valid_time=ALWAYS, variable=ELEVATION)
    assert regrid(relief, ALBERS).cadence is None
    assert (regrid(relief, ALBERS).values == 5).all()


def test_overlaps_are_worked_out_once_and_let_go_of_when_they_take_too_much_memory(monkeypatch):
    monkeypatch.setattr(module, "_held", type(module._held)())
    worked_out = []
    tiles = module._tiles
    monkeypatch.setattr(module, "_tiles", lambda *grids: worked_out.append(grids) or tiles(*grids))
    rain = frame(KANSAS, np.array(1.0))
    for grid in (COARSE, ALBERS, COARSE, ALBERS):
        regrid(rain, grid)
    assert len(worked_out) == 2
    monkeypatch.setattr(module, "HELD_BYTES", 1)
    for grid in (COARSE, ALBERS, ALBERS, COARSE):
        regrid(rain, grid)
    assert len(worked_out) == 2 + 2  # the first was held, the last had been let go of
    assert len(module._held) == 1


def test_the_order_of_tiles_and_their_size_change_nothing(monkeypatch):
    rain = frame(KANSAS, np.random.default_rng(7).gamma(0.2, 9, KANSAS.shape))
    whole = regrid(rain, ALBERS).values
    monkeypatch.setattr(module, "_held", type(module._held)())
    monkeypatch.setattr(module, "TILE", 37)
    np.testing.assert_allclose(regrid(rain, ALBERS).values, whole, rtol=1e-6)


@pytest.mark.data
@pytest.mark.slow
def test_a_whole_mrms_frame_keeps_its_water_in_less_than_two_gigabytes(data):
    """In a process of its own, whose peak of memory is only this."""
    done = subprocess.run(
        [sys.executable, "-c", WHOLE_MRMS, str(data)], check=True, capture_output=True, text=True
    )
    there, here, peak = map(float, done.stdout.split())
    assert here == pytest.approx(there, rel=1e-4)
    assert peak < 1.5 * 2**20


WHOLE_MRMS = """
import re, sys
from pathlib import Path
import numpy as np
from pipelines.grid import from_path
from pipelines.regrid import _areas, regrid
from pipelines.sources.mrms import Mrms
from pipelines.sources.source import RemoteFile

path = next((Path(sys.argv[1]) / "mrms").rglob("PrecipRate*"))
rain = Mrms().read(RemoteFile(str(path), None))
target = from_path("configs/grid/conus_1km.yaml")
over = regrid(rain, target)
status = Path("/proc/self/status").read_text()  # ru_maxrss would also count the process that started this one
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
back = target.cells(*rain.grid.lonlat())
inside = (back[0] > 0) & (back[0] < target.y_size - 1) & (back[1] > 0) & (back[1] < target.x_size - 1)
there = np.nansum((rain.values * _areas(rain.grid))[inside], dtype=float)
here = np.nansum(over.values, dtype=float) * 1e6
print(there, here, peak)
"""
