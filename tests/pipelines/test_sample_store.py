"""A store is its cube to the last bit, is made once, and never gives what is damaged."""

import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Blosc

from pipelines import cf, sample_store
from pipelines.cube import Cube
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.rain_index import RainIndex, Windows
from pipelines.sample_store import ABOUT, BLOCKS, FRAMES, PARTS, SIDE, TABLE, SampleStore, stored
from pipelines.samples import Samples, Span
from pipelines.sources.mrms import Mrms

START = datetime(2024, 6, 1, tzinfo=UTC)
FIVE = timedelta(minutes=5)
NEAR = SIDE + 7  # cells: more than one block, and no multiple of one


@dataclass
class Field:
    """A cube in memory that counts how often it is read."""

    rain: np.ndarray
    path: str = "nowhere/cube"
    snapshot: str = "first"
    cadence: timedelta = FIVE
    variable: cf.Variable = cf.RAINFALL_RATE
    read: list = field(default_factory=list)

    @property
    def grid(self):
        rows, columns = self.rain.shape[1:]
        return Grid("EPSG:3035", 4e6, 1000.0, columns, 3e6, -1000.0, rows)

    @property
    def times(self):
        return [START + i * self.cadence for i in range(len(self.rain))]

    @property
    def observed(self):
        return ~np.isnan(self.rain).all(axis=(1, 2))

    def block(self, first, count, window=None, step=1):
        self.read.append(first)
        y, x, rows, columns = window or (0, 0, *self.rain.shape[1:])
        steps = (first - START) // self.cadence + step * np.arange(count)
        fields = np.full((count, rows, columns), np.nan, np.float32)
        on = (steps >= 0) & (steps < len(self.rain))
        fields[on] = self.rain[steps[on], y : y + rows, x : x + columns]
        return fields


def rain(times=11, rows=NEAR, columns=2 * SIDE - 3, values=200, seed=0):
    """So many different rates, dry places, places without radar, and a frame that is missing."""
    noise = np.random.default_rng(seed)
    known = noise.gamma(0.5, 4.0, values).astype(np.float32)
    fields = known[noise.integers(values, size=(times, rows, columns))]
    fields[noise.random(fields.shape) < 0.3] = 0.0
    fields[:, : rows // 3, : columns // 3] = np.nan
    fields[:, -5:] = -0.0
    fields[min(times - 1, 5)] = np.nan
    return fields


def same(one, other):
    return np.array_equal(one.view(np.uint32), other.view(np.uint32))


@pytest.mark.parametrize(("values", "width"), [(200, 1), (3000, 2), (100_000, 4)])
def test_every_value_comes_back_to_the_last_bit_however_many_there_are(tmp_path, values, width):
    cube = Field(rain(rows=200, columns=250, values=values))
    store = stored(cube, folder=tmp_path)
    assert store._parts[0, -1] == width
    assert same(store.block(START, 11), cube.rain)
    assert (store.grid, store.times, store.cadence) == (cube.grid, cube.times, cube.cadence)
    assert store.observed.tolist() == cube.observed.tolist()


@pytest.mark.parametrize(("values", "width"), [(256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_as_many_values_as_a_number_can_tell_come_back_and_one_more_takes_a_wider_number(
    tmp_path, values, width
):
    known = np.arange(values, dtype=np.float32) / 8
    cells = FRAMES * 3 * SIDE * SIDE
    fields = np.resize(known, cells).reshape(FRAMES, SIDE, 3 * SIDE)
    np.random.default_rng(0).shuffle(fields.reshape(-1))
    cube = Field(fields)
    store = stored(cube, folder=tmp_path)
    assert len(np.unique(fields)) == values and store._parts[0, -1] == width
    assert same(store.block(START, FRAMES), fields)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    cube = Field(rain())
    return cube, stored(cube, folder=tmp_path_factory.mktemp("stores"))


@settings(max_examples=80)
@given(
    first=st.integers(-15, 15),
    count=st.integers(1, 14),
    step=st.integers(1, 6),
    corner=st.tuples(st.integers(0, NEAR - 1), st.integers(0, 2 * SIDE - 4)),
    size=st.tuples(st.integers(1, NEAR), st.integers(1, 2 * SIDE - 3)),
)
def test_any_part_of_it_is_that_of_the_cube(both, first, count, step, corner, size):
    cube, store = both
    size = tuple(min(n, whole - at) for n, whole, at in zip(size, cube.rain.shape[1:], corner, strict=True))
    asked = START + first * FIVE, count, (*corner, *size), step
    assert same(store.block(*asked), cube.block(*asked))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ((START + FIVE / 2, 1), "not on the time axis"),
        ((START, 0), "count=0"),
        ((START, 1, (0, 0, NEAR + 1, 3)), "reaches outside the grid"),
    ],
)
def test_what_no_cube_gives_no_store_gives(both, asked, told):
    with pytest.raises(ValueError, match=told):
        both[1].block(*asked)


@pytest.mark.data
def test_a_real_cube_and_its_store_are_the_same(tmp_path, data):
    source = Mrms(str(data / "mrms"))
    frames = [source.read(file).window(1200, 3600, 300, 400) for file in list(source.files(None, None))[:2]]
    cube = Cube.open_or_create(
        str(tmp_path / "cube"), frames[0].grid, frames[0].variable, frames[0].valid_time, frames[0].cadence
    )
    cube.write(frames)
    store = stored(cube, 128)
    assert same(store.block(cube.times[0], 2), np.stack([frame.values for frame in frames]))
    assert store.folder.parent == tmp_path / "cube.samples"  # beside it
    copy = pickle.loads(pickle.dumps(store))
    assert same(copy.block(cube.times[0], 2), store.block(cube.times[0], 2))
    assert copy.between(*cube.times)["rainfall_rate"].shape == (2, 300, 400)


def test_a_cube_without_frames_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a cube without frames; fill it with metnet ingest"):
        stored(Field(np.empty((0, 9, 9), np.float32)), folder=tmp_path)


def test_what_is_missing_or_dry_everywhere_takes_no_space(tmp_path):
    empty = stored(Field(np.full((8, 600, 600), np.nan, np.float32)), folder=tmp_path / "empty")
    dry = stored(Field(np.zeros((8, 600, 600), np.float32)), folder=tmp_path / "dry")
    for store in (empty, dry):
        assert (store.folder / BLOCKS).stat().st_size < 100
    assert np.isnan(empty.block(START, 8)).all() and (dry.block(START, 8) == 0).all()
    assert empty.cube.read == []  # a frame that is not there is not asked for


def test_it_is_made_once_and_opened_after_without_the_frames(tmp_path):
    cube = Field(rain())
    stored(cube, 32, tmp_path)
    there = [time for time, observed in zip(cube.times, cube.observed, strict=True) if observed]
    assert cube.read == there  # one pass, for the blocks and for the index; no more than a frame at once
    cube.read.clear()
    again = stored(cube, 32, tmp_path)
    assert same(again.block(START, 11), cube.rain) and cube.read[1:] == []


def test_it_follows_its_cube_and_keeps_the_one_before(tmp_path):
    folders = []
    for snapshot in ("first", "second", "third"):
        cube = Field(rain(seed=len(folders)), snapshot=snapshot)
        store = stored(cube, folder=tmp_path)
        assert same(store.block(START, 11), cube.rain)
        folders.append(store.folder)
    assert [folder.is_dir() for folder in folders] == [False, True, True]


@pytest.mark.parametrize("older", [{"FORMAT": 1, "FRAMES": 4}, {"FORMAT": 1}, {"FRAMES": 4}, {"SIDE": 32}])
def test_a_store_of_another_layout_is_told_apart_and_made_anew(tmp_path, monkeypatch, older):
    cube = Field(rain())
    for name, value in older.items():
        monkeypatch.setattr(sample_store, name, value)
    monkeypatch.setattr(sample_store, "CODEC", Blosc(cname="lz4hc", clevel=5, shuffle=Blosc.SHUFFLE))
    before = stored(cube, folder=tmp_path).folder
    monkeypatch.undo()
    cube.read.clear()
    store = stored(cube, folder=tmp_path)
    assert store.folder != before and len(cube.read) == cube.observed.sum()
    assert same(store.block(START, 11), cube.rain)


def drifting(times):
    """Smooth rain of 0.1 mm/h steps that moves by two cells a step."""
    y, x = np.ogrid[:400, : 400 + 2 * times]
    waves = 8 * np.sin(x / 23) * np.sin(y / 17 + x / 60) + np.random.default_rng(0).normal(0, 0.2, x.shape)
    rates = np.round(np.maximum(waves, 0), 1).astype(np.float32)
    return np.stack([rates[:, 2 * step : 2 * step + 400] for step in range(times)])


def test_a_block_takes_a_quarter_less_than_the_same_numbers_in_lz4(tmp_path, monkeypatch):
    cube = Field(drifting(16))
    blocks = stored(cube, folder=tmp_path / "ours").folder / BLOCKS
    monkeypatch.setattr(sample_store, "CODEC", Blosc(cname="lz4hc", clevel=5, shuffle=Blosc.SHUFFLE))
    other = stored(cube, folder=tmp_path / "lz4").folder / BLOCKS
    assert blocks.stat().st_size < 0.75 * other.stat().st_size


def test_of_many_that_ask_at_once_one_makes_it(tmp_path):
    cube, made, wrong = Field(rain()), [], []

    def ask():
        try:
            made.append(stored(cube, 32, tmp_path).block(START, 11))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(made) == 4 and all(same(block, cube.rain) for block in made)
    assert len(cube.read) == cube.observed.sum()


def test_a_making_that_was_stopped_leaves_nothing_that_is_taken_for_a_store(tmp_path, monkeypatch):
    cube = Field(rain())
    packed, calls = sample_store._packed, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return packed(*args)

    monkeypatch.setattr(sample_store, "_packed", stop)
    with pytest.raises(KeyboardInterrupt):
        stored(cube, folder=tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    assert same(stored(cube, folder=tmp_path).block(START, 11), cube.rain)


def test_what_a_making_that_was_killed_left_behind_goes_with_the_next_and_nothing_else_does(tmp_path):
    cube = Field(rain())
    code = f"""
        import os, signal
        from pathlib import Path
        from pipelines import sample_store
        from tests.pipelines.test_sample_store import Field, rain
        sample_store._packed = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        sample_store.stored(Field(rain()), folder=Path({str(tmp_path)!r}))
    """
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root, check=False)
    (place,) = tmp_path.iterdir()
    (left,) = place.glob(".radar-*")
    other = place / ".radar-of-another-snapshot.at-work"  # under its own lock
    other.mkdir()
    assert killed.returncode == -signal.SIGKILL and (left / BLOCKS).is_file()
    store = stored(cube, folder=tmp_path)
    assert same(store.block(START, 11), cube.rain)
    assert {path for path in place.iterdir() if path.is_dir()} == {store.folder, other}


@pytest.mark.parametrize("told", ["{}", "[]", "null", "3", '{"bytes": null}'])
def test_a_store_that_does_not_tell_its_size_is_made_anew(tmp_path, told):
    cube = Field(rain())
    folder = stored(cube, folder=tmp_path).folder
    (folder / ABOUT).write_text(told)
    assert same(stored(cube, folder=tmp_path).block(START, 11), cube.rain)
    assert '"bytes"' in (folder / ABOUT).read_text()


@pytest.mark.parametrize("name", [TABLE, PARTS, ABOUT, BLOCKS])
def test_a_store_that_is_not_whole_is_made_anew(tmp_path, name):
    cube = Field(rain())
    folder = stored(cube, folder=tmp_path).folder
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert same(stored(cube, folder=tmp_path).block(START, 11), cube.rain)


@given(place=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=25)
def test_a_flipped_bit_is_an_error_and_never_another_number(both, place, bit):
    cube, store = both
    path: Path = store.folder / BLOCKS
    before = path.read_bytes()
    changed = bytearray(before)
    at = len(sample_store.MAGIC) + int(place * (len(before) - len(sample_store.MAGIC) - 1))
    changed[at] ^= 1 << bit
    try:
        path.write_bytes(changed)
        with pytest.raises(
            ValueError, match=r"damaged at byte .*; delete .*makes it again from nowhere/cube"
        ):
            SampleStore(cube, store.folder).block(START, 11)
    finally:
        path.write_bytes(before)


def test_the_index_is_kept_and_draws_the_same_samples_as_the_cube_itself(tmp_path, monkeypatch):
    cube, span, inits = Field(rain()), Span(2, (1, 3)), np.array([1, 3, 6])
    loose = Samples(cube, inits, span, 32, 20, seed=4, augment=True)
    stored(cube, 32, tmp_path)
    monkeypatch.setattr(Windows, "weights", lambda *_: pytest.fail("the index is made a second time"))
    kept = Samples(stored(cube, 32, tmp_path), inits, span, 32, 20, seed=4, augment=True)
    monkeypatch.undo()
    for one, other in zip(loose, kept, strict=True):
        assert same(one.radar.numpy(), other.radar.numpy()) and same(one.target.numpy(), other.target.numpy())


def test_an_index_of_another_size_is_worked_out_when_it_is_wanted_and_a_damaged_one_too(tmp_path):
    cube = Field(rain())
    store = stored(cube, 32, tmp_path)
    expected = RainIndex.of(cube, 48, np.arange(11)).weights
    assert np.array_equal(store.rain_index(48).weights, expected)
    path = store.rain_index(48).path
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    assert np.array_equal(store.rain_index(48).weights, expected)


def test_an_index_in_a_file_is_pickled_by_its_place(tmp_path):
    index = stored(Field(rain()), 32, tmp_path).rain_index(32)
    pickled = pickle.dumps(index)
    assert len(pickled) < index.weights.nbytes / 2 + 3000
    assert np.array_equal(pickle.loads(pickled).weights, index.weights)


def test_a_cube_nothing_can_be_written_beside_has_its_store_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sample_store.os, "access", lambda *_: False)
    store = stored(Field(rain(), path=str(tmp_path / "cube")))
    assert store.folder.is_relative_to(tmp_path / "cache" / "metnet" / "samples")
    assert stored(Field(rain(), path="s3://bucket/cube")).folder.parent != store.folder.parent


def test_the_groups_of_a_cube_have_a_store_each(tmp_path):
    grid = Grid("EPSG:3035", 4e6, 1000.0, 9, 3e6, -1000.0, 9)
    cubes = []
    for number, group in enumerate(("ir_087", "ir_108")):
        cube = Cube.open_or_create(
            str(tmp_path / "cube"), grid, cf.BRIGHTNESS_TEMPERATURE, START, FIVE, group
        )
        values = np.full(grid.shape, 250 + number, np.float32)
        cube.write([Frame(cf.BRIGHTNESS_TEMPERATURE, START, FIVE, grid, values, "noise", "ab" * 32, group)])
        cubes.append(Cube.open(cube.path, group))
    fields = [stored(cube, group=cube.group).block(START, 1) for cube in cubes]
    assert [field.mean() for field in fields] == [250, 251]
