"""Values kept as counts come back as they were, in a cube and out of it, or are refused."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import icechunk
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

from pipelines import cf
from pipelines.counts import LARGEST, packed, packed_attributes, plain_attributes, unpacked
from pipelines.cube import Cube
from pipelines.decode import decode
from pipelines.export import export
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.ingest import ingest
from pipelines.plain import open_cube
from pipelines.regrid import regrid
from pipelines.repository import Repository
from pipelines.sources.mrms import Mrms
from pipelines.sources.source import RemoteFile

START, CADENCE = datetime(2020, 1, 1, tzinfo=UTC), timedelta(minutes=2)
GRID = Grid("EPSG:3035", 4_000_000.1, 1000.3, 130, 3_000_000.7, -999.9, 110)
COARSE = Grid(GRID.crs, GRID.x[1], 2 * GRID.x_step, 60, GRID.y[1], 2 * GRID.y_step, 50)
TENTH = 0.1


def tenths(step: int, grid: Grid = GRID) -> np.ndarray:
    """What a file tells in tenths of mm/h: the float32 that is nearest to each; dry, unseen, and the largest."""
    noise = np.random.default_rng(step + 100)
    counts = np.floor(noise.gamma(0.5, 40.0, grid.shape))
    counts[noise.random(grid.shape) < 0.4] = 0
    counts[0, 0] = 20_000
    values = (counts / 10).astype(np.float32)
    values[noise.random(grid.shape) < 0.2] = np.nan
    return values


def frame(step: int, values: np.ndarray | None = None, scale_factor: float | None = TENTH) -> Frame:
    values = tenths(step) if values is None else values
    digest = f"{step % 200 + 1:02x}" * 32
    return Frame(
        cf.RAINFALL_RATE,
        START + step * CADENCE,
        CADENCE,
        GRID,
        values,
        "noise",
        digest,
        scale_factor=scale_factor,
    )


def new(path: Path, scale_factor: float | None = TENTH) -> Cube:
    return Cube.open_or_create(str(path), GRID, cf.RAINFALL_RATE, START, CADENCE, scale_factor=scale_factor)


@pytest.mark.parametrize("per_unit", [1, 2, 5, 10, 100, 1000])
def test_every_number_is_the_float_nearest_to_its_value_and_comes_back(per_unit):
    numbers = np.arange(-LARGEST, LARGEST + 1, dtype=np.int16)[:, None]
    values = unpacked(numbers, 1 / per_unit)
    np.testing.assert_array_equal(values, (numbers / per_unit).astype(np.float32))
    np.testing.assert_array_equal(packed(values, 1 / per_unit), numbers)


@given(st.floats(width=32), st.sampled_from([1.0, 0.1, 0.01]))
def test_any_value_comes_back_or_is_refused(value, scale_factor):
    field = np.array([[0.0, np.nan, value]], np.float32)
    try:
        numbers = packed(field, scale_factor)
    except ValueError as error:
        assert f"is no whole multiple of {scale_factor:g} within" in str(error)
    else:
        np.testing.assert_array_equal(unpacked(numbers, scale_factor), field)


def test_a_cube_of_whole_tenths_reads_as_one_of_floats_and_takes_two_thirds_of_it(tmp_path):
    sizes = {}
    for name, scale_factor in (("counts", TENTH), ("floats", None)):
        cube = new(tmp_path / name, scale_factor)
        empty = sum(chunk.stat().st_size for chunk in (tmp_path / name / "chunks").iterdir())
        cube.write([frame(step, scale_factor=scale_factor) for step in (0, 1, 3, -2)])
        chunks = (tmp_path / name / "chunks").iterdir()
        sizes[name] = sum(chunk.stat().st_size for chunk in chunks) - empty
        for read in (cube, Cube.open(cube.path)):
            assert read.scale_factor == scale_factor
            unseen = np.full(GRID.shape, np.nan, np.float32)
            expected = [tenths(-2), unseen, tenths(0), tenths(1), unseen, tenths(3), unseen]
            got = read.block(START - 2 * CADENCE, 7)
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, expected)
            np.testing.assert_array_equal(read.block(START, 2, (20, 30, 40, 50), 3), got[2:6:3, 20:60, 30:80])
    assert sizes["counts"] < 0.67 * sizes["floats"]


def test_software_from_before_there_were_counts_does_not_take_them_for_values(tmp_path):
    """It took the array over time, y and x that tells a valid range."""
    cube = new(tmp_path / "cube")
    group = zarr.open_group(Repository.open(cube.path).reader(cube.snapshot), path="radar", mode="r")
    assert not [name for name, array in group.arrays() if "valid_range" in array.attrs]
    assert Cube.open(cube.path).variable == cf.RAINFALL_RATE


@dataclass(frozen=True)
class Counting:
    """A source that counts in tenths."""

    path: str | None = None
    trusted: ClassVar[bool] = True

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        yield from (RemoteFile(str(step), START + step * CADENCE) for step in (0, 1, 3))

    def read(self, file: RemoteFile) -> Frame:
        return frame(int(file.url))


@pytest.mark.parametrize(("grid", "scale_factor"), [(None, TENTH), (COARSE, None)])
def test_an_ingest_keeps_the_counts_and_means_of_them_as_they_are(tmp_path, grid, scale_factor):
    path = str(tmp_path / "cube")
    ingest(Counting(), path, grid=grid)
    cube = Cube.open(path)
    assert cube.scale_factor == scale_factor and cube.observed.tolist() == [True, True, False, True]
    for step in (0, 1, 3):
        expected = frame(step) if grid is None else regrid(frame(step), grid)
        np.testing.assert_array_equal(cube.block(START + step * CADENCE, 1)[0], expected.values)


@pytest.mark.parametrize(("rows", "columns"), [(1, 130), (110, 1), (1, 1), (66, 3)])
def test_a_strip_and_a_restated_frame_are_as_they_came(tmp_path, rows, columns):
    cube = Cube.open_or_create(
        str(tmp_path / "cube"),
        GRID.window(0, 0, rows, columns),
        cf.RAINFALL_RATE,
        START,
        CADENCE,
        scale_factor=TENTH,
    )
    part = frame(0).window(0, 0, rows, columns)
    cube.write([part])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cube)).block(START, 1)[0], part.values)
    blind = replace(part, values=np.full((rows, columns), np.nan, np.float32), sha256="cd" * 32)
    assert cube.write([blind], restate=True).restated == 1
    assert np.isnan(Cube.open(cube.path).block(START, 1)).all() and cube.observed.all()


def test_any_reader_of_cf_unpacks_it(tmp_path):
    path = tmp_path / "cube"
    new(path).write([frame(0), frame(2)])
    plain = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    store = plain.readonly_session("main").store
    expected = [tenths(0), np.full(GRID.shape, np.nan), tenths(2)]
    for table in (
        xr.open_zarr(store, group="radar", consolidated=False, chunks=None),
        Cube.open(str(path)).between(START, START + 2 * CADENCE),
    ):
        np.testing.assert_array_equal(table.rainfall_rate.values.astype(np.float32), expected)
        assert table.rainfall_rate.attrs["units"] == "mm h-1"


@pytest.mark.parametrize("name", ["out.zarr", "out.nc"])
def test_an_export_of_it_holds_the_values_themselves(tmp_path, name):
    cube = new(tmp_path / "cube")
    cube.write([frame(0), frame(2)])
    export(cube.path, str(tmp_path / name))
    with xr.open_dataset(tmp_path / name, decode_coords="all", mask_and_scale=False) as table:
        assert table.rainfall_rate.dtype == np.float32
        assert not {"scale_factor", "add_offset"} & set(table.rainfall_rate.attrs)
        np.testing.assert_array_equal(table.rainfall_rate.values, [tenths(0), tenths(2)])
    again = open_cube(str(tmp_path / name))
    np.testing.assert_array_equal(again.block(START, 3), cube.block(START, 3))


def test_a_frame_that_does_not_tell_its_steps_is_taken_if_it_has_them_and_refused_if_not(tmp_path):
    cube = new(tmp_path / "cube")
    assert cube.write([frame(0), frame(1, scale_factor=None)]).new == 2
    other = tenths(2)
    other[100, 4] = 0.25
    for said in (None, TENTH):
        with pytest.raises(
            ValueError, match=r"its value 0\.25 is no whole multiple of 0\.1 within 3276\.7 of 0"
        ):
            cube.write([frame(3), frame(2, other, said)])
    assert Cube.open(cube.path).times == [START, START + CADENCE]


@pytest.mark.parametrize("scale_factor", [0.0, -0.1, np.inf, np.nan])
def test_no_frame_has_steps_that_are_none(scale_factor):
    with pytest.raises(ValueError, match=r"scale_factor=.*expected a number above 0"):
        frame(0, scale_factor=scale_factor)


def test_steps_that_cannot_tell_every_valid_value_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"its value 2000 is no whole multiple of 0\.01"):
        new(tmp_path / "cube", 0.01)
    with pytest.raises(ValueError, match=r"valid_range=\[0\.0, 999\.95\]|999\.95\d* is no whole multiple"):
        packed_attributes(TENTH, {"valid_range": [0.0, 999.95]})
    strange = {"scale_factor": 0.5, "valid_range": [0, 9]}  # of somebody else's array
    assert plain_attributes(strange) == strange
    told = {"units": "mm h-1", "valid_range": [-0.1, 999.9]}
    assert plain_attributes(packed_attributes(TENTH, told)) == told


def test_a_cube_of_floats_goes_on_as_one(tmp_path):
    cube = new(tmp_path / "cube", None)
    cube.write([frame(0, tenths(0) / 3, None)])
    again = new(tmp_path / "cube")
    again.write([frame(1)])
    assert again.scale_factor is None
    np.testing.assert_array_equal(again.block(START, 2), [tenths(0) / 3, tenths(1)])


def test_means_over_other_cells_are_no_whole_steps_any_more():
    assert regrid(frame(0), COARSE).scale_factor is None
    inside = GRID.window(10, 20, 30, 40)
    assert regrid(frame(0), inside).scale_factor == frame(0).window(10, 20, 30, 40).scale_factor == TENTH


def test_a_flipped_bit_in_packed_values_is_an_error(tmp_path):
    cube = new(tmp_path / "cube")
    before = set((tmp_path / "cube" / "chunks").iterdir())
    cube.write([frame(0)])
    chunks = set((tmp_path / "cube" / "chunks").iterdir()) - before
    chunk = max(chunks, key=lambda path: path.stat().st_size)
    sound = chunk.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(sound), 20):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << int(position) % 8
        chunk.write_bytes(damaged)
        with pytest.raises((ValueError, OSError)):
            Cube.open(cube.path).block(START, 1)
    chunk.write_bytes(sound)
    np.testing.assert_array_equal(Cube.open(cube.path).block(START, 1), [tenths(0)])


@pytest.mark.data
def test_mrms_is_kept_in_tenths(data, tmp_path):
    source = Mrms(str(data / "mrms"))
    read = decode(source, next(source.files(None, None)))
    assert read.scale_factor == TENTH
    window = read.window(1500, 4400, 512, 600)
    cube = Cube.open_or_create(
        str(tmp_path / "cube"),
        window.grid,
        window.variable,
        window.valid_time,
        CADENCE,
        scale_factor=window.scale_factor,
    )
    cube.write([window])
    np.testing.assert_array_equal(cube.block(window.valid_time, 1)[0], window.values)
    assert (window.values > 5).any() and (window.values == 0).any()
