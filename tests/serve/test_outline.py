"""The outline: right where longitudes are not, at the poles and across 180 degrees."""

import numpy as np
import pytest
from matplotlib.path import Path as Polygon

from pipelines.grid import Grid
from serve.outline import bounds_of, outline_of
from tests.serve.conftest import EUROPE


def square(crs: str, west: float, south: float, east: float, north: float, cells: int = 61) -> Grid:
    x, y = (east - west) / cells, (north - south) / cells
    return Grid(crs, west + x / 2, x, cells, north - y / 2, -y, cells)


NORTH, SOUTH = "EPSG:3995", "EPSG:3031"  # polar stereographic; 0 E is down, and up
R = 3e6  # metres
GEOS = "+proj=geos +sweep=x +lon_0=-75 +h=35786023 +ellps=GRS80 +units=m"
GRIDS = {
    "europe": (EUROPE, (3.70724, 43.3629, 18.8489, 52.84469)),
    "round the north pole": (square(NORTH, -R, -R, R, R), (-180, 52.3171, 180, 90)),
    "round the south pole": (square(SOUTH, -R, -R, R, R), (-180, -90, 180, -52.3171)),
    "the north pole off centre": (square("EPSG:3413", -R / 3, -R, R, R / 15), (-180, 52.21175, 180, 90)),
    "about another pole": (
        Grid("+proj=ob_tran +o_proj=longlat +o_lat_p=39.25 +lon_0=18", -30, 0.5, 121, 60, -0.5, 161),
        (-180, 24.11761, 180, 90),
    ),
    "an edge through the pole, at a point of it": (square(NORTH, 0, -R, R, R), (0, 52.3171, 180, 90)),
    "an edge through the pole, between two": (square(NORTH, 0, -R, R, 1.1 * R), (0, 50.52911, 180, 90)),
    "the top edge through the south pole": (
        square(SOUTH, -R, -R, 1.1 * R, 0),
        (90, -90, -90, -50.52911),
    ),
    "a corner at the pole": (square(NORTH, 0, 0, R, R), (90, 52.3171, 180, 90)),
    "just beside the pole": (square(NORTH, 1, -R, R, 1.1 * R), (0, 50.52911, 180, 89.56858)),
    "the pole just inside": (square(NORTH, -1, -R, R, 1.1 * R), (-180, 50.52911, 180, 90)),
    "both poles": (square("+proj=laea +lat_0=0 +lon_0=10", -8.5e6, -9.1e6, 8.5e6, 9.1e6), (-180, -90, 180, 90)),
    "across 180": (Grid("EPSG:4326", 170, 0.5, 41, 10, -0.5, 41), (169.75, -10.25, -169.75, 10.25)),
    "across -180": (Grid("EPSG:4326", -190, 0.5, 41, 10, -0.5, 41), (169.75, -10.25, -169.75, 10.25)),
    "across 180, projected": (square("EPSG:3832", R, -1e6, 4e6, 1e6), (176.94946, -9.00588, -174.06739, 9.00588)),
    "up to 180": (Grid("EPSG:4326", 160.25, 0.5, 40, 10, -0.5, 41), (160, -10.25, 180, 10.25)),
    "the globe": (Grid("EPSG:4326", -179.5, 1, 360, 89.5, -1, 180), (-180, -90, 180, 90)),
    "the globe from 0 to 360": (Grid("EPSG:4326", 0.5, 1, 360, 89.5, -1, 180), (-180, -90, 180, 90)),
    "from pole to pole": (Grid("EPSG:4326", -29.5, 1, 60, 89.5, -1, 180), (-30, -90, 30, 90)),
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_the_bounds_are_the_domain_s(name: str) -> None:
    grid, expected = GRIDS[name]
    assert bounds_of(outline_of(grid)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", GRIDS)
def test_the_ring_holds_the_places_of_the_domain_and_no_others(name: str) -> None:
    """The oracle is the grid itself: whether a place lies within its rows and columns."""
    grid, _ = GRIDS[name]
    ring = outline_of(grid)
    assert ring[0] == ring[-1]
    dice = np.random.default_rng(1)
    lon, lat = dice.uniform(-180, 180, 4000), np.degrees(np.arcsin(dice.uniform(-1, 1, 4000)))
    row, column = grid.cells(lon, lat)
    depth = np.minimum(
        np.minimum(row + 0.5, grid.y_size - 0.5 - row) / grid.y_size,
        np.minimum(column + 0.5, grid.x_size - 0.5 - column) / grid.x_size,
    )
    turned = [Polygon(ring).contains_points(np.stack([lon + turn, lat], 1)) for turn in (-360, 0, 360)]
    clear = np.abs(depth) > 0.05  # of its side from the edge, which is straight on the grid alone
    assert (depth[clear] > 0).any()
    if name != "both poles":  # whose rim no ring of longitude and latitude tells
        np.testing.assert_array_equal(np.any(turned, axis=0)[clear], depth[clear] > 0)


@pytest.mark.parametrize("name", [name for name in GRIDS if "round" in name or "off" in name])
def test_a_ring_round_a_pole_stays_on_the_map_and_goes_back_along_the_pole(name: str) -> None:
    ring = np.array(outline_of(GRIDS[name][0]))
    assert np.abs(ring[:, 0]).max() == 180
    at_pole = ring[np.abs(ring[:, 1]) == 90]
    assert sorted(at_pole[:, 0]) == [-180, 180]


@pytest.mark.parametrize("cells", [64, 256, 543])
def test_the_disk_that_a_satellite_sees_has_a_finite_outline_within_the_limb(cells: int) -> None:
    side = 2 * 5434894.9
    ring = outline_of(square(GEOS, -side / 2, -side / 2, side / 2, side / 2, cells))
    assert np.isfinite(ring).all() and ring[0] == ring[-1]
    # arccos(r / (r + h)) from the point below the satellite, on the equator and towards the poles
    assert bounds_of(ring) == pytest.approx((-156.3, -81.33, 6.3, 81.33), abs=0.01)
    assert Polygon(ring).contains_points([(-75, 0), (-75, 60), (-120, -30)]).all()
    assert not Polygon(ring).contains_points([(-75, 85), (60, 0), (10, 40)]).any()


def test_a_grid_that_holds_no_place_on_earth_is_said_to_lie_anywhere() -> None:
    assert bounds_of(outline_of(square(GEOS, -5.4e6, 5.3e6, -5.3e6, 5.4e6))) == (-180, -90, 180, 90)


def test_a_part_of_the_disk_ends_at_its_own_edges_where_they_are_on_earth() -> None:
    grid = square(GEOS, -5434894.9, 1e6, 0, 5434894.9, 200)
    west, south, east, north = bounds_of(outline_of(grid))
    _, lat = grid.lonlat()
    assert south == pytest.approx(lat[np.isfinite(lat)].min(), abs=0.2)
    assert east == pytest.approx(-75) and -156.3 < west < -150 and 80 < north < 81.33
