"""Fields without a time lie beside the frames, on the same grid."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import numpy as np
import pytest

from pipelines import cf
from pipelines.cube import Cube
from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.static import StaticFields, write_static

GRID = Grid("EPSG:3035", 4_000_000, 1000, 5, 3_000_000, -1000, 4)


def relief(height: float = 100.0, grid: Grid = GRID) -> Frame:
    values = np.full(grid.shape, height, np.float32)
    values[0, 0] = np.nan
    return Frame(cf.ELEVATION, ALWAYS, None, grid, values, "hills", sha256(values).hexdigest(), "static")


def test_fields_come_back_as_they_were_with_their_source(tmp_path):
    path = str(tmp_path / "cube")
    land = replace(relief(0.5), variable=cf.LAND_FRACTION)
    assert write_static(path, relief()).new == write_static(path, land).new == 1
    fields = StaticFields.open(path)
    assert fields.grid == GRID
    assert fields.variables == {"elevation": cf.ELEVATION, "land_fraction": cf.LAND_FRACTION}
    np.testing.assert_array_equal(fields.field("elevation"), relief().values)
    assert fields.source("elevation") == f"hills (sha256 {relief().sha256})"
    assert fields.dataset()["elevation"].attrs["standard_name"] == "surface_altitude"
    with pytest.raises(ValueError, match="no static field 'soil'; it has elevation, land_fraction"):
        fields.field("soil")


def test_the_first_field_stays_unless_it_is_to_be_restated(tmp_path):
    path = str(tmp_path / "cube")
    first = write_static(path, relief())
    assert write_static(path, relief()).unchanged == 1
    assert write_static(path, relief(7.0)).conflicting == 1
    assert write_static(path, relief(7.0)).snapshot == first.snapshot
    np.testing.assert_array_equal(StaticFields.open(path).field("elevation"), relief().values)
    assert write_static(path, relief(7.0), restate=True).restated == 1
    np.testing.assert_array_equal(StaticFields.open(path).field("elevation"), relief(7.0).values)


def test_frames_and_fields_of_one_cube_share_a_grid(tmp_path):
    path, start = str(tmp_path / "cube"), datetime(2020, 1, 1, tzinfo=UTC)
    write_static(path, relief())
    with pytest.raises(ValueError, match=r"'static' there has .*share one grid"):
        Cube.open_or_create(path, GRID.window(0, 0, 2, 2), cf.RAINFALL_RATE, start, timedelta(minutes=5))
    Cube.open_or_create(path, GRID, cf.RAINFALL_RATE, start, timedelta(minutes=5))
    with pytest.raises(ValueError, match="share one grid"):
        write_static(path, relief(grid=GRID.window(0, 0, 2, 2)))
    with pytest.raises(ValueError, match="has no static fields"):
        Cube.open_or_create(str(tmp_path / "o"), GRID, cf.RAINFALL_RATE, start, timedelta(minutes=5))
        StaticFields.open(str(tmp_path / "o"))


def test_a_field_with_a_time_is_no_static_field(tmp_path):
    changing = replace(relief(), cadence=timedelta(minutes=5), valid_time=datetime(2020, 1, 1, tzinfo=UTC))
    with pytest.raises(ValueError, match="changes with time"):
        write_static(str(tmp_path / "cube"), changing)
    with pytest.raises(ValueError, match="a static field has no cadence"):
        replace(relief(), cadence=timedelta(minutes=5))
