"""Where a file says that it lies."""

import numpy as np
import pytest
from pyproj import CRS

from pipelines.formats.georeference import check_grid, crs_of, farthest
from pipelines.grid import Grid

LAEA = "+proj=laea +lat_0=55 +lon_0=10 +ellps=WGS84 +units=m"
GRID = Grid(LAEA, 0.0, 1000.0, 100, 0.0, -1000.0, 80)


def test_the_same_map_told_in_other_words_is_the_same_grid():
    other = Grid(crs_of(CRS(LAEA).to_cf()), 0.0, 1000.0, 100, 0.0, -1000.0, 80)
    assert farthest(other, GRID) < 1e-3
    check_grid(other, GRID)


@pytest.mark.parametrize(
    "moved",
    [
        Grid(LAEA, 2.0, 1000.0, 100, 0.0, -1000.0, 80),
        Grid(LAEA, 0.0, 1000.05, 100, 0.0, -1000.0, 80),
        Grid(LAEA, 0.0, 1000.0, 100, 2.0, -1000.0, 80),
        Grid(LAEA.replace("lon_0=10", "lon_0=10.0001"), 0.0, 1000.0, 100, 0.0, -1000.0, 80),
        Grid(LAEA.replace("laea", "aeqd"), 0.0, 1000.0, 100, 0.0, -10_000.0, 80),
        Grid(LAEA.replace("laea", "stere"), 0.0, 1000.0, 100, 0.0, -10_000.0, 80),
    ],
)
def test_a_grid_that_is_a_metre_off_anywhere_is_refused(moved):
    with pytest.raises(ValueError, match="not the registered one"):
        check_grid(moved, GRID)


def test_a_grid_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match=r"\(80, 99\) cells, expected \(80, 100\)"):
        check_grid(GRID.window(0, 0, 80, 99), GRID)


def test_what_lies_in_space_in_one_grid_must_in_the_other():
    view = "+proj=geos +h=35785831 +lon_0=0 +ellps=WGS84 +units=m"
    disk = Grid(view, -5.5e6, 1e6, 12, 5.5e6, -1e6, 12)
    check_grid(Grid(CRS(view).to_wkt(), -5.5e6, 1e6, 12, 5.5e6, -1e6, 12), disk)
    assert farthest(Grid(view, -5.4e6, 1e6, 12, 5.5e6, -1e6, 12), disk) > 1e3
    assert farthest(Grid(view, 5.5e6, 1e6, 12, 1.65e7, -1e6, 12), disk) == np.inf


def test_degrees_are_compared_in_metres():
    world = Grid("EPSG:4326", -10.0, 0.01, 100, 50.0, -0.01, 100)
    assert farthest(Grid("EPSG:4326", -10.0, 0.01, 100, 50.001, -0.01, 100), world) == pytest.approx(
        111, 0.01
    )


def test_attributes_that_describe_no_map_are_refused():
    for attributes in ({}, {"grid_mapping_name": "flat"}, {"crs_wkt": "PROJCS["}, {"crs_wkt": "x" * 10**5}):
        with pytest.raises(ValueError, match="grid mapping"):
            crs_of(attributes)
