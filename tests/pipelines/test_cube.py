"""The cube: every frame in its own place, whatever happens around it."""

import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from threading import Barrier

import icechunk
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS

from pipelines import cf, cube
from pipelines.cube import Cube
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.inspect import inspect
from pipelines.quality import CellFlag, FrameFlag
from pipelines.repository import Repository
from pipelines.rollback import rollback
from pipelines.version import version

START = datetime(2020, 1, 1, tzinfo=UTC)
CADENCE = timedelta(minutes=5)
ROTATED = {  # CORDEX Europe
    "grid_mapping_name": "rotated_latitude_longitude",
    "grid_north_pole_latitude": 39.25,
    "grid_north_pole_longitude": -162.0,
}
GRID = Grid("EPSG:3035", 4_000_000.1, 1000.3, 5, 3_000_000.7, -999.9, 4)


def at(step: int) -> datetime:
    return START + step * CADENCE


def rain(step: int, grid: Grid = GRID) -> np.ndarray:
    """Different at every step; with dry cells and cells that no radar sees."""
    noise = np.random.default_rng(step + 1000)
    values = noise.gamma(0.5, 4.0, grid.shape).astype(np.float32)
    values[noise.random(grid.shape) < 0.4] = 0.0
    values[noise.random(grid.shape) < 0.3] = np.nan
    return values


def frame(step: int, file: str = "first", grid: Grid = GRID, values: np.ndarray | None = None) -> Frame:
    digest = sha256(f"{step} {file}".encode()).hexdigest()
    values = rain(step, grid) if values is None else values
    return Frame(cf.RAINFALL_RATE, at(step), CADENCE, grid, values, "noise", digest)


def new(path: Path | str, grid: Grid = GRID) -> Cube:
    return Cube.open_or_create(str(path), grid, cf.RAINFALL_RATE, START, CADENCE)


def test_an_opened_cube_is_what_was_made(tmp_path):
    made = new(tmp_path / "cube")
    opened = Cube.open(str(tmp_path / "cube"))
    assert (opened.grid, opened.variable, opened.cadence) == (GRID, cf.RAINFALL_RATE, CADENCE)
    assert opened.snapshot == made.snapshot
    assert opened.times == [] and opened.observed.tolist() == []


@pytest.mark.parametrize(
    "crs", ["EPSG:4326", "EPSG:3413", "EPSG:3857", "+proj=stere +lat_0=90 +lat_ts=60 +a=6378140 +b=6356750"]
)
def test_a_grid_comes_back_to_the_last_bit(tmp_path, crs):
    grid = Grid(crs, 0.1 + 0.2, 1 / 3, 7, 1 / 7, -1 / 9, 1)
    new(tmp_path / "cube", grid)
    assert Cube.open(str(tmp_path / "cube")).grid == grid == replace(grid)


def test_not_observed_and_dry_come_back_as_they_were(tmp_path):
    store = new(tmp_path / "cube")
    values = np.array([[0.0, np.nan, 0.1, 0, 0]] * 4, np.float32)
    store.write([frame(0, values=values)])
    np.testing.assert_array_equal(store.block(at(0), 1)[0], values)


def test_a_frame_of_nothing_but_missing_cells_is_still_a_frame(tmp_path):
    store = new(tmp_path / "cube")
    store.write([frame(1, values=np.full(GRID.shape, np.nan, np.float32))])
    assert store.observed.tolist() == [False, True]


def test_writing_twice_changes_nothing_and_says_so(tmp_path):
    store = new(tmp_path / "cube")
    first = store.write([frame(0), frame(1)])
    again = store.write([frame(1), frame(0)])
    assert (first.new, first.unchanged, first.conflicting) == (2, 0, 0)
    assert (again.new, again.unchanged, again.conflicting) == (0, 2, 0)
    assert again.snapshot == first.snapshot == Cube.open(store.path).snapshot


def test_the_first_frame_of_a_time_stays(tmp_path):
    store = new(tmp_path / "cube")
    store.write([frame(3)])
    dry = np.zeros(GRID.shape, np.float32)
    written = store.write([frame(3, "restated", values=dry), frame(4), frame(4, "restated", values=dry)])
    assert (written.new, written.unchanged, written.conflicting) == (1, 0, 2)
    np.testing.assert_array_equal(store.block(at(3), 2), [rain(3), rain(4)])


def test_one_call_is_one_commit(tmp_path):
    store = new(tmp_path / "cube")
    before = store.snapshot
    store.write([frame(step) for step in (2, -3, 7)])
    history = [entry.id for entry in store._repository._repository.ancestry(branch="main")]
    assert history[:2] == [store.snapshot, before]


@pytest.mark.parametrize("steps", [[5, 3, 9], [0, -1, -2], [4, -4], [-7, 12, 0], [2, -1, 3, -30]])
def test_late_and_early_frames_land_in_their_own_place(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(cube, "SIDE", 2)  # six chunks a frame
    monkeypatch.setattr(cube, "MOVED_AT_ONCE", 4)  # so that a move takes several batches
    store = new(tmp_path / "cube")
    for step in steps:
        assert store.write([frame(step)]).new == 1

    opened = Cube.open(store.path)
    first, last = min(0, *steps), max(steps)
    first = min(steps) if steps[0] < 0 else first
    assert opened.times[0] <= at(min(steps)) and opened.times[-1] == at(last)
    assert {time for time, there in zip(opened.times, opened.observed, strict=True) if there} == set(
        map(at, steps)
    )
    expected = [
        rain(step) if step in steps else np.full(GRID.shape, np.nan) for step in range(first, last + 1)
    ]
    np.testing.assert_array_equal(opened.block(at(first), last - first + 1), expected)
    assert [store.write([frame(step)]).unchanged for step in steps] == [1] * len(steps)


def test_a_front_extension_costs_no_space_where_nothing_was_written(tmp_path):
    store = new(tmp_path / "cube")
    store.write([frame(0)])
    store.write([frame(-500)])
    array = store._array
    assert array.nchunks_initialized == 2 and array.shape[0] == 501


@settings(max_examples=6)
@given(st.permutations(range(-3, 5)), st.lists(st.integers(1, 3), min_size=8, max_size=8))
def test_any_order_of_writes_gives_the_same_arrays(order, sizes):
    with tempfile.TemporaryDirectory() as folder:
        store, left = new(Path(folder) / "cube"), list(order)
        for size in sizes:
            store.write([frame(step) for step in left[:size]])
            left = left[size:]
        opened = Cube.open(store.path)
        assert opened.times == [at(step) for step in range(-3, 5)]
        assert opened.observed.all()
        np.testing.assert_array_equal(opened.block(at(-3), 8), [rain(step) for step in range(-3, 5)])


@given(
    st.integers(-12, 12),
    st.integers(1, 9),
    st.integers(1, 5),
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 4), st.integers(1, 5)),
)
@settings(max_examples=80)
def test_a_block_is_what_a_loop_over_frames_gives(written, first, count, step, window):
    y0, x0, ny, nx = window
    ny, nx = min(ny, 4 - y0), min(nx, 5 - x0)
    rows, columns = slice(y0, y0 + ny), slice(x0, x0 + nx)
    expected = [
        rain(t)[rows, columns] if t in (-2, 0, 1, 5) else np.full((ny, nx), np.nan, np.float32)
        for t in range(first, first + count * step, step)
    ]
    block = written.block(at(first), count, (y0, x0, ny, nx), step)
    assert block.dtype == np.float32
    np.testing.assert_array_equal(block, expected)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    store = new(tmp_path_factory.mktemp("written") / "cube")
    store.write([frame(step) for step in (0, 5, 1, -2)])
    return store


@pytest.mark.parametrize("window", [(0, 0, 5, 5), (-1, 0, 2, 2), (0, 4, 1, 2), (0, 0, 0, 1)])
def test_a_window_outside_the_grid_is_refused(written, window):
    with pytest.raises(ValueError, match="outside the grid of 4 x 5 cells"):
        written.block(at(0), 1, window)


def test_a_time_between_two_steps_is_refused_and_the_nearest_step_named(written):
    off = START + timedelta(minutes=8)
    stray = Frame(cf.RAINFALL_RATE, off, CADENCE, GRID, rain(0), "noise", "ab" * 32)
    for ask in (lambda: written.write([frame(9), stray]), lambda: written.block(off, 1)):
        with pytest.raises(
            ValueError, match=r"00:08:00Z is not on the time axis.*0:05:00.*nearest step is .*00:10:00Z"
        ):
            ask()
    assert at(9) not in written.times


def test_a_frame_of_another_kind_is_refused(written):
    for wrong, said in (
        (replace(frame(9), grid=Grid("EPSG:3035", 0, 1000.3, 5, 0, -999.9, 4)), "grid is"),
        (
            replace(frame(9), variable=cf.RAINFALL_RATE_MEAN),
            r"variable is rainfall_rate_mean \(units mm h-1\), but the cube has rainfall_rate \(units mm h-1\)",
        ),
        (
            replace(frame(9), variable=replace(cf.RAINFALL_RATE, valid_range=(0.0, 500.0))),
            r"rainfall_rate \(valid_range \(0.0, 500.0\)\), but .* \(valid_range \(0.0, 2000.0\)\)",
        ),
        (replace(frame(9), cadence=timedelta(minutes=2)), "cadence is 0:02:00, but the cube has 0:05:00"),
        (replace(frame(9), sha256="0" * 64), "expected 64 hexadecimal digits"),
        (replace(frame(9), sha256="unknown"), "expected 64 hexadecimal digits"),
    ):
        with pytest.raises(ValueError, match=f"2020-01-01T00:45:00Z: .*{said}"):
            written.write([frame(8), wrong])
    assert at(8) not in written.times


def test_an_existing_cube_of_another_kind_is_refused(written):
    with pytest.raises(ValueError, match="cadence is 0:02:00, but the cube has 0:05:00"):
        Cube.open_or_create(written.path, GRID, cf.RAINFALL_RATE, START, timedelta(minutes=2))
    with pytest.raises(ValueError, match=r"grid is .*but the cube has"):
        Cube.open_or_create(written.path, GRID.window(0, 0, 2, 2), cf.RAINFALL_RATE, START, CADENCE)
    later = Cube.open_or_create(written.path, GRID, cf.RAINFALL_RATE, START + timedelta(minutes=1), CADENCE)
    assert later.times == written.times


def test_a_cube_without_the_group_that_is_asked_for_is_told_how_to_get_it(tmp_path):
    Cube.open_or_create(str(tmp_path / "cube"), GRID, cf.RAINFALL_RATE, START, CADENCE, "satellite")
    with pytest.raises(ValueError, match=r"groups of frames: satellite\); `metnet ingest group=radar` puts"):
        Cube.open(str(tmp_path / "cube"))


@pytest.mark.parametrize("year", [1971, 2090])
def test_a_wrong_date_does_not_stretch_the_axis_over_decades(written, year):
    wrong = replace(frame(0), valid_time=datetime(year, 1, 1, tzinfo=UTC))
    with pytest.raises(ValueError, match=f"valid time {year}-01-01T00:00:00Z would stretch .*a wrong date"):
        written.write([wrong])


def test_a_reader_sees_its_own_snapshot_until_it_is_opened_again(tmp_path):
    store = new(tmp_path / "cube")
    store.write([frame(0)])
    reader, table = Cube.open(store.path), Cube.open(store.path).between(at(-9), at(9))
    store.write([frame(1), frame(-1)])
    assert reader.times == [at(0)] and reader.observed.tolist() == [True]
    np.testing.assert_array_equal(reader.block(at(0), 1)[0], rain(0))
    np.testing.assert_array_equal(table.rainfall_rate.values, [rain(0)])
    assert store.times == Cube.open(store.path).times == [at(-1), at(0), at(1)]


@pytest.mark.parametrize(("first", "last"), [(None, None), (1, 4), (3, 3), (2, 2), (-9, 99), (9, 99), (4, 1)])
def test_the_files_of_frames_are_told_within_two_times(written, first, last):
    within = [None if step is None else at(step) for step in (first, last)]
    known = {at(step): frame(step).sha256 for step in (0, 5, 1, -2)}
    expected = {
        time: digest for time, digest in known.items() if first is None or within[0] <= time <= within[1]
    }
    assert written.sources(*within) == expected
    between = [None if time is None else time + timedelta(seconds=1) for time in within]
    assert written.sources(between[0], within[1]) == {
        time: digest for time, digest in expected.items() if first is None or time >= between[0]
    }


def test_a_pickled_cube_reads_the_same_snapshot(tmp_path):
    store = new(tmp_path / "cube")
    store.write([frame(0)])
    packed = pickle.dumps(store)
    store.write([frame(1)])
    copy = pickle.loads(packed)
    assert copy.times == [at(0)]
    np.testing.assert_array_equal(copy.block(at(0), 2), [rain(0), np.full(GRID.shape, np.nan)])


def test_between_has_both_ends_and_every_step(written):
    table = written.between(at(-1), at(5))
    assert table.time.values.tolist() == [
        np.datetime64(at(t).replace(tzinfo=None), "ns").item() for t in range(-1, 6)
    ]
    np.testing.assert_array_equal(table.rainfall_rate.sel(time="2020-01-01T00:25"), rain(5))
    np.testing.assert_array_equal(
        table.source_sha256.any("byte"), [False, True, True, False, False, False, True]
    )
    arrived = table.arrival_time.values
    assert np.isnat(arrived[0]) and abs(arrived[1] - np.datetime64("now")) < np.timedelta64(300, "s")


def test_between_of_a_cube_without_frames_is_empty(tmp_path):
    assert new(tmp_path / "cube").between(at(0), at(9)).sizes["time"] == 0


def test_any_tool_that_reads_icechunk_finds_a_cf_dataset(written):
    store = (
        icechunk.Repository.open(icechunk.local_filesystem_storage(written.path))
        .readonly_session("main")
        .store
    )
    table = xr.open_zarr(store, group="radar", consolidated=False, chunks=None)

    assert table.rainfall_rate.dims == ("time", "y", "x")
    assert table.rainfall_rate.attrs["units"] == "mm h-1"
    assert table.rainfall_rate.attrs["standard_name"] == "rainfall_rate"
    assert table[table.rainfall_rate.attrs["grid_mapping"]].attrs["crs_wkt"] == GRID.crs
    assert table.x.attrs["standard_name"] == "projection_x_coordinate" and table.x.attrs["axis"] == "X"
    assert {"lat", "lon"} <= set(table.rainfall_rate.coords)
    lon, lat = GRID.lonlat()
    np.testing.assert_allclose(table.lon, lon, atol=1e-5)
    np.testing.assert_allclose(table.lat, lat, atol=1e-5)
    np.testing.assert_array_equal(table.y, GRID.y)
    raw = zarr.open_group(store, path="radar", mode="r")
    assert raw["time"].dtype == np.int64
    assert raw["time"].attrs["units"].startswith("seconds since 1970-01-01")
    assert raw["rainfall_rate"].chunks == (1, 4, 5) and raw["time"].chunks == (16384,)
    for name, array in raw.arrays():
        assert array.metadata.to_dict()["codecs"][-1]["name"] == "crc32c", name


def test_rows_of_a_geographic_grid_are_alike_in_latitude(tmp_path):
    grid = Grid("EPSG:4326", 170.0, 5.0, 4, 50.0, -1.0, 3)
    table = new(tmp_path / "cube", grid).between(at(0), at(0))
    lon, lat = grid.lonlat()
    np.testing.assert_allclose(table.lon, lon, atol=1e-4)
    np.testing.assert_allclose(table.lat, lat, atol=1e-4)
    assert table.x.attrs["standard_name"] == "longitude"


def test_rows_of_a_grid_about_another_pole_are_not_alike_in_latitude(tmp_path):
    grid = Grid(CRS.from_cf(ROTATED).to_wkt(), -20, 0.5, 80, 20, -0.5, 80)
    table = new(tmp_path / "cube", grid).between(at(0), at(0))
    lon, lat = grid.lonlat()
    assert np.ptp(lat[0]) > 5
    np.testing.assert_allclose(table.lon, lon, atol=1e-4)
    np.testing.assert_allclose(table.lat, lat, atol=1e-4)
    assert table.lat.attrs["standard_name"] == "latitude"
    assert table.y.attrs["standard_name"] == "grid_latitude"


def test_a_flipped_bit_in_a_stored_field_is_an_error(tmp_path):
    grid = Grid("EPSG:3035", 0, 1000, 40, 0, -1000, 40)
    store = new(tmp_path / "cube", grid)
    values = np.random.default_rng(1).random(grid.shape, dtype=np.float32)
    before = {chunk.name for chunk in (tmp_path / "cube" / "chunks").iterdir()}
    store.write([frame(0, grid=grid, values=values)])
    [chunk] = [
        chunk
        for chunk in (tmp_path / "cube" / "chunks").iterdir()
        if chunk.name not in before and chunk.stat().st_size > 2000
    ]
    sound = chunk.read_bytes()
    for position in random.Random(0).sample(range(len(sound)), 20):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << position % 8
        chunk.write_bytes(damaged)
        with pytest.raises((ValueError, RuntimeError, icechunk.IcechunkError)):
            Cube.open(store.path).block(at(0), 1)
    chunk.write_bytes(sound)
    np.testing.assert_array_equal(Cube.open(store.path).block(at(0), 1)[0], values)


WRITER = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_cube import new, frame
store = new(sys.argv[3])
for step in map(int, sys.argv[4:]):
    store.write([frame(step)])
    print(step, flush=True)
"""


def start_writer(path: Path, steps: range) -> subprocess.Popen:
    here = Path(__file__).parent
    arguments = [str(here), str(here.parent.parent), str(path), *map(str, steps)]
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdout=pipe, stderr=pipe, text=True)


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    writers = [start_writer(tmp_path / "cube", range(first, 10, 2)) for first in (0, 1)]
    for writer in writers:
        _, said = writer.communicate(timeout=60)
        assert writer.returncode == 0, said
    opened = Cube.open(str(tmp_path / "cube"))
    assert opened.observed.all() and len(opened.times) == 10
    np.testing.assert_array_equal(opened.block(at(0), 10), [rain(step) for step in range(10)])


def test_a_killed_writer_loses_no_acknowledged_frame_and_shows_no_partial_one(tmp_path):
    acknowledged: set[int] = set()
    for kill in range(3):
        writer = start_writer(tmp_path / "cube", range(kill * 1000, kill * 1000 + 900))
        assert writer.stdout is not None
        acknowledged.add(int(writer.stdout.readline()))
        time.sleep(random.Random(kill).uniform(0.02, 0.15))
        writer.send_signal(signal.SIGKILL)
        acknowledged |= {int(line) for line in writer.stdout.read().splitlines()}
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL

        opened = Cube.open(str(tmp_path / "cube"))
        visible = np.flatnonzero(opened.observed).tolist()
        assert acknowledged <= set(visible)
        for step in visible:
            np.testing.assert_array_equal(opened.block(at(step), 1)[0], rain(step))
    assert new(tmp_path / "cube").write([frame(5000)]).new == 1


def test_a_cube_on_an_object_store_keeps_the_same_promises(s3):
    store = new(f"{s3}/cube")
    assert store.write([frame(2), frame(0)]).new == 2
    assert store.write([frame(-3), frame(2)]) == cube.Written(store.snapshot, 1, 1, 0)
    opened = Cube.open(f"{s3}/cube")
    assert opened.grid == GRID
    nothing = np.full(GRID.shape, np.nan)
    np.testing.assert_array_equal(
        opened.block(at(-3), 6), [rain(-3), nothing, nothing, rain(0), nothing, rain(2)]
    )
    with pytest.raises(ValueError, match=r"s3://radar/elsewhere: .*metnet ingest"):
        Cube.open(f"{s3}/elsewhere")


def test_writers_of_one_cube_on_an_object_store_lose_nothing(s3):
    new(f"{s3}/shared")

    def write(steps):
        store = Cube.open(f"{s3}/shared")
        return [store.write([frame(step)]).new for step in steps]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(write, (range(0, 8, 2), range(-1, 7, 2)))) == [[1] * 4] * 2

    opened = Cube.open(f"{s3}/shared")
    np.testing.assert_array_equal(opened.block(at(-1), 8), [rain(step) for step in range(-1, 7)])
    assert opened.observed.all() and len(opened.times) == 8


def test_writers_of_the_same_frame_at_once_write_it_once(tmp_path):
    new(tmp_path / "cube")
    start = Barrier(3)

    def write(file):
        store = Cube.open(str(tmp_path / "cube"))
        start.wait()
        return store.write([frame(0, file, values=np.full(GRID.shape, ord(file), np.float32))])

    with ThreadPoolExecutor(3) as threads:
        written = list(threads.map(write, "abc"))

    [winner] = [file for file, done in zip("abc", written, strict=True) if done.new]
    assert sum(done.conflicting for done in written) == 2
    assert (Cube.open(str(tmp_path / "cube")).block(at(0), 1) == ord(winner)).all()


def test_groups_of_one_cube_share_a_grid_and_nothing_else(tmp_path):
    path = str(tmp_path / "cube")
    radar = new(path)
    radar.write([frame(0), frame(1)])
    ten = timedelta(minutes=10)
    satellite = Cube.open_or_create(path, GRID, cf.BRIGHTNESS_TEMPERATURE, START, ten, "satellite")
    warm = np.full(GRID.shape, 280.0, np.float32)
    satellite.write([replace(frame(2, values=warm), variable=cf.BRIGHTNESS_TEMPERATURE, cadence=ten)])

    assert cube.groups(satellite._repository, satellite.snapshot) == ["radar", "satellite"]
    opened = Cube.open(path, "satellite")
    assert (opened.variable, opened.cadence, opened.times) == (cf.BRIGHTNESS_TEMPERATURE, ten, [at(0), at(2)])
    assert pickle.loads(pickle.dumps(opened)).variable == cf.BRIGHTNESS_TEMPERATURE
    assert Cube.open(path).times == [at(0), at(1)]
    with pytest.raises(ValueError, match=r"'radar' there has .*share one grid"):
        Cube.open_or_create(path, GRID.window(0, 0, 2, 2), cf.RAINFALL_RATE, START, CADENCE, "other")
    with pytest.raises(ValueError, match=r"group 'lightning' of a cube .*radar, satellite"):
        Cube.open(path, "lightning")
    for name in ("static", "Radar", "a/b", ""):
        with pytest.raises(ValueError, match="expected lower-case letters"):
            Cube.open_or_create(path, GRID, cf.RAINFALL_RATE, START, CADENCE, name)


def test_a_variable_of_classes_comes_back_with_them(tmp_path):
    Cube.open_or_create(str(tmp_path / "cube"), GRID, cf.PRECIPITATION_FLAG, START, CADENCE)
    assert Cube.open(str(tmp_path / "cube")).variable == cf.PRECIPITATION_FLAG


def test_a_restated_frame_replaces_the_first_only_when_asked(tmp_path):
    store = new(tmp_path / "cube")
    store.write([frame(0), frame(1)])
    dry = np.zeros(GRID.shape, np.float32)
    wetter = frame(0, "restated", values=dry)
    written = store.write([wetter, frame(1), frame(2)], restate=True)
    assert (written.new, written.unchanged, written.conflicting, written.restated) == (1, 1, 0, 1)
    np.testing.assert_array_equal(store.block(at(0), 3), [dry, rain(1), rain(2)])
    assert [*store.sources().values()] == [wetter.sha256, frame(1).sha256, frame(2).sha256]
    again = store.write([wetter], restate=True)
    assert (again.unchanged, again.restated, again.snapshot) == (1, 0, written.snapshot)


def test_every_frame_keeps_when_it_came_and_what_read_it(tmp_path, monkeypatch):
    store = new(tmp_path / "cube")
    before = datetime.now(UTC).replace(microsecond=0)
    store.write([frame(0)])
    monkeypatch.setattr(cube, "version", lambda: "9.9.9")
    store.write([frame(2), frame(-1)])
    opened = Cube.open(store.path)
    assert opened.decoders == [
        "metnet-nowcast-9.9.9",
        f"metnet-nowcast-{version()}",
        None,
        "metnet-nowcast-9.9.9",
    ]
    assert opened.arrivals[2] is None
    now = datetime.now(UTC) + timedelta(seconds=1)  # whole seconds are kept
    assert all(time is None or before <= time <= now for time in opened.arrivals)


def test_what_looks_wrong_is_flagged_beside_the_value_which_stays(tmp_path):
    grid = Grid("EPSG:3035", 0, 1000, 64, 0, -1000, 64)
    store = new(tmp_path / "cube", grid)
    values = np.zeros(grid.shape, np.float32)
    values[20:40, 20:40] = 3.0
    values[30, 30] = 1205.0
    values[:4, :4] = np.nan
    store.write([frame(0, grid=grid, values=values), frame(1, "again", grid=grid, values=values)])
    opened = Cube.open(store.path)
    np.testing.assert_array_equal(opened.block(at(0), 1)[0], values)
    spikes = opened.quality(at(0)) & CellFlag.SPIKE
    assert np.argwhere(spikes).tolist() == [[30, 30]]
    assert [bool(flags & FrameFlag.FROZEN) for flags in opened.flags] == [False, True]


def told(path: Path | str) -> dict[str, np.ndarray]:
    """All of a cube but when it was written."""
    table = Cube.open(str(path)).between(at(-999), at(999)).drop_vars("arrival_time")
    return {str(name): array.values for name, array in table.variables.items()}


def shuffled_feed(noise: random.Random) -> list[Frame]:
    """Nine frames late, twice, out of order; one of a time that another file restates."""
    feed = [frame(step) for step in range(9)] + [frame(noise.randrange(9)) for _ in range(4)]
    noise.shuffle(feed)
    return [*feed, frame(4, "restated", values=rain(77))]


def assert_any_order_gives_the_cube_of_the_ordered_feed(folder: Path, seeds: range) -> None:
    ordered = new(folder / "ordered")
    for step in range(9):
        ordered.write([frame(step)])
    ordered.write([frame(4, "restated", values=rain(77))], restate=True)
    expected = told(folder / "ordered")
    for seed in seeds:
        noise = random.Random(seed)
        feed, store = (
            shuffled_feed(noise),
            Cube.open_or_create(
                str(folder / f"{seed}"), GRID, cf.RAINFALL_RATE, at(noise.randrange(9)), CADENCE
            ),
        )
        while feed:
            size = noise.randint(1, 6)
            store.write(feed[:size], restate=True)
            feed = feed[size:]
        got = told(folder / f"{seed}")
        assert got.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(got[name], values, err_msg=f"{name}, seed {seed}")


def test_late_repeated_shuffled_and_restated_frames_end_in_the_cube_of_the_ordered_feed(tmp_path):
    assert_any_order_gives_the_cube_of_the_ordered_feed(tmp_path, range(4))


def test_a_rollback_returns_to_an_earlier_snapshot_and_keeps_the_later_ones(tmp_path):
    store = new(tmp_path / "cube")
    earlier = store.write([frame(0)]).snapshot
    later = store.write([frame(1)]).snapshot
    done = rollback(store.path, earlier)
    assert Cube.open(store.path).times == [at(0)] and Cube.open(store.path).snapshot == earlier
    kept = icechunk.Repository.open(icechunk.local_filesystem_storage(store.path)).lookup_tag(done.kept)
    assert kept == later and done.kept in str(done)
    assert Cube.open(store.path).write([frame(5)]).new == 1
    for wrong, said in (
        ("ZZZZZZZZZZZZZZZZZZZ0", "no snapshot of its history"),
        (Cube.open(store.path).snapshot, "newest snapshot already"),
    ):
        with pytest.raises(ValueError, match=f"{said}; metnet inspect"):
            rollback(store.path, wrong)
    *_, (_, _, first) = Repository.open(store.path).history(99)
    with pytest.raises(ValueError, match=f"{first} is of before anything was written"):
        rollback(store.path, first)


def test_a_commit_waits_for_a_clock_that_was_a_little_ahead_and_says_so_of_one_far_off(tmp_path, monkeypatch):
    store, publish, told = new(tmp_path / "cube"), Repository._published, []
    store.write([frame(0)])

    def too_early(self, *arguments):
        told.append(arguments)
        if len(told) == 2:
            return publish(self, *arguments)
        raise icechunk.IcechunkError("session error: invalid snapshot timestamp ordering. parent: ...")

    monkeypatch.setattr(Repository, "_published", too_early)
    assert store.write([frame(1)]).new == 1
    ahead = datetime.now(UTC) + timedelta(hours=1)
    monkeypatch.setattr(Repository, "history", lambda self, count: [(ahead, "", "")])
    with pytest.raises(OSError, match=f"newest commit is of {ahead:%Y-%m-%dT%H:%M:%SZ}, but the clock"):
        store.write([frame(2)])


def test_a_group_that_fills_while_its_store_is_rolled_back_says_so(tmp_path):
    store = new(tmp_path / "cube")
    earlier = store.write([frame(0)]).snapshot
    store.write([frame(1)])
    repository = Repository.open(store.path)
    with pytest.raises(OSError, match="was rolled back meanwhile; give the same command again"):
        repository.add_group("other", "a test", lambda group: rollback(store.path, earlier) and None)
    assert Cube.open(store.path).snapshot == earlier


def test_a_cube_that_is_gone_is_not_made_anew_by_its_lock(tmp_path):
    store = new(tmp_path / "cube")
    store.write([frame(0)])
    Path(store.path).rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"is gone|cannot be written"):
        store.write([frame(1)])
    assert not Path(store.path).exists()


def test_what_frames_were_read_from_is_kept_and_another_product_is_told(tmp_path, caplog):
    store = new(tmp_path / "cube")
    store.write([frame(0), frame(1)])
    snapshot = store.snapshot
    assert store.products == ["noise"] and not caplog.text
    store.write([replace(frame(2), source="noise, Z = 200 R^1.6")])
    assert "frames of noise, Z = 200 R^1.6 stand beside those of noise; where" in caplog.text
    assert f"roll back to {snapshot}" in caplog.text
    opened = Cube.open(store.path)
    assert opened.products == ["noise", "noise, Z = 200 R^1.6"]
    assert "read from     noise; noise, Z = 200 R^1.6" in str(inspect(store.path, picture=None))
    assert opened.between(at(0), at(0)).attrs["source"] == "noise\nnoise, Z = 200 R^1.6"
    caplog.clear()
    store.write([replace(frame(step), source=f"title {step}\x1b") for step in range(5, 40)])
    assert len(store.products) == 8 and "\x1b" not in "".join(store.products)
    assert store.products[-1] == "and others" and not caplog.text, "it was told once"

    store = Cube.open(store.path)
    store.write([replace(frame(0, "another"), source="not written")])
    assert not caplog.text
    store.write([replace(frame(50), source="title 50")])
    assert "frames of title 50 stand beside those of noise and noise, Z = 200 R^1.6 and 6 more" in caplog.text


def test_two_products_in_the_first_commit_are_told(tmp_path, caplog):
    new(tmp_path / "cube").write([frame(0), replace(frame(1), source="B")])
    assert "frames of B stand beside those of noise;" in caplog.text


@pytest.mark.parametrize("by", ["tag", "snapshot"])
def test_a_rollback_is_taken_back_by_its_tag_or_what_that_keeps(tmp_path, by):
    store = new(tmp_path / "cube")
    earlier = store.write([frame(0)]).snapshot
    later = store.write([frame(1)]).snapshot
    done = rollback(store.path, earlier)
    assert done.kept in str(inspect(store.path, picture=None))
    assert rollback(store.path, done.kept if by == "tag" else later).snapshot == later
    assert Cube.open(store.path).times == [at(0), at(1)]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, and a call that makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("this process may not mount a file system to fill up")
    yield place, lambda: subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_fails_the_commit_whole_and_the_next_one_goes_on_when_there_is_room(small_disk):
    place, enlarge = small_disk
    grid = Grid("EPSG:3035", 0, 1000, 150, 0, -1000, 150)
    store, acknowledged = new(place / "cube", grid), []
    with pytest.raises(OSError, match=r"cube: cannot be written: .*[Nn]o space left|No space left"):
        for step in range(100):
            store.write([frame(step, grid=grid)])
            acknowledged.append(step)
    assert acknowledged
    opened = Cube.open(store.path)
    assert np.flatnonzero(opened.observed).tolist() == acknowledged
    np.testing.assert_array_equal(
        opened.block(at(0), len(acknowledged)), [rain(step, grid) for step in acknowledged]
    )
    enlarge()
    assert Cube.open(store.path).write([frame(200, grid=grid)]).new == 1
    np.testing.assert_array_equal(Cube.open(store.path).block(at(200), 1)[0], rain(200, grid))


def test_the_grid_of_a_cube_can_be_asked_for_by_its_path(written, tmp_path):
    assert cube.grid_from_path(written.path) == GRID
    with pytest.raises(ValueError, match="no such file"):
        cube.grid_from_path(str(tmp_path / "nothing.yaml"))


def test_a_projection_that_cf_has_no_full_name_for_comes_back_whole(tmp_path):
    grid = Grid("EPSG:21781", 600_000.0, 1000.0, 4, 200_000.0, -1000.0, 3)  # Swiss, oblique Mercator
    new(tmp_path / "cube", grid)
    assert Cube.open(str(tmp_path / "cube")).grid == grid
