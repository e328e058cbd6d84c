"""`ingest`: files become a cube, once, whatever some of the files are."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from pipelines.cube import Cube
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.ingest import ingest
from pipelines.regrid import regrid
from pipelines.sources.mrms import Mrms
from pipelines.sources.simulated import Simulated
from pipelines.sources.source import RemoteFile

SMALL = Simulated(size=24, frames=20)
START = datetime(2020, 6, 1, tzinfo=UTC)
WINDOW = [1800, 3900, 96, 128]


@dataclass
class Flaky:
    """The simulated source with some files damaged; counts what is read."""

    bad: frozenset[int] = frozenset()
    trusted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.read_names: list[str] = []

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        yield from SMALL.files(start, end)

    def read(self, path: Path) -> Frame:
        self.read_names.append(path.name)
        if [file.url for file in self.files(None, None)].index(path.name) in self.bad:
            raise ValueError(f"{path.name}: spoilt")
        return SMALL.read(path)


def test_a_source_becomes_a_cube_frame_by_frame(tmp_path):
    result = ingest(SMALL, str(tmp_path / "cube"))
    cube = Cube.open(str(tmp_path / "cube"))
    files = list(SMALL.files(None, None))
    assert (result.new, result.already_there, result.quarantined) == (len(files), 0, 0)
    assert result.snapshot == cube.snapshot
    assert cube.grid == SMALL.grid
    for file in files:
        stored = cube.block(file.valid_time, 1)[0]
        assert np.array_equal(stored, SMALL.read(Path(file.url)).values, equal_nan=True)
    missing = {START + timedelta(minutes=5 * i) for i in range(20)} - {file.valid_time for file in files}
    for time in missing:
        assert np.isnan(cube.block(time, 1)).all()


def test_the_second_time_nothing_is_read_nor_changed_and_it_says_so(tmp_path):
    source = Flaky()
    first = ingest(source, str(tmp_path / "cube"))
    source.read_names.clear()
    second = ingest(source, str(tmp_path / "cube"))
    assert second.snapshot == first.snapshot
    assert (second.new, second.already_there) == (0, first.new)
    assert "Nothing changed" in str(second)
    assert "Nothing changed" not in str(first)
    assert len(source.read_names) == 1  # to see that grid and window are the cube's


def test_a_damaged_file_is_written_down_once_and_the_rest_goes_on(tmp_path):
    cube, source = str(tmp_path / "cube"), Flaky(frozenset({0, 7}))
    files = list(SMALL.files(None, None))
    for _ in range(2):
        result = ingest(source, cube)
        lines = [
            json.loads(line) for line in (tmp_path / "cube" / "quarantine.jsonl").read_text().splitlines()
        ]
        assert result.quarantined == 2
        assert result.new + result.already_there == len(files) - 2
        assert "2 damaged, see" in str(result)
        assert [line["path"] for line in lines] == [files[0].url, files[7].url]
        assert lines[1]["reason"] == f"{files[7].url}: spoilt"
        assert lines[1]["valid_time"] == f"{files[7].valid_time:%Y-%m-%dT%H:%M:%SZ}"
    healed = ingest(SMALL, cube)
    assert (healed.new, healed.quarantined) == (2, 0)
    assert Cube.open(cube).times[0] == files[0].valid_time


def test_when_every_file_is_damaged_that_is_an_error_and_a_good_feed_mends_it(tmp_path):
    cube = str(tmp_path / "cube")
    count = len(list(SMALL.files(None, None)))
    with pytest.raises(ValueError, match=rf"none of {count} files could be read.*quarantine.jsonl.*spoilt"):
        ingest(Flaky(frozenset(range(20))), cube)
    assert len((tmp_path / "cube" / "quarantine.jsonl").read_text().splitlines()) == count
    assert ingest(SMALL, cube).new == count
    assert len((tmp_path / "cube" / "quarantine.jsonl").read_text().splitlines()) == count


def test_an_ingest_that_stops_goes_on_where_it_stopped(tmp_path):
    class Stopping(Flaky):
        def read(self, path: Path) -> Frame:
            if len(self.read_names) == 11:
                raise KeyboardInterrupt
            return super().read(path)

    cube = str(tmp_path / "cube")
    with pytest.raises(KeyboardInterrupt):
        ingest(Stopping(), cube, batch=4)
    assert Cube.open(cube).observed.sum() == 8
    source = Flaky()
    whole = len(list(SMALL.files(None, None)))
    assert ingest(source, cube, batch=4).new == whole - 8
    assert len(source.read_names) == whole - 8
    ingest(SMALL, str(tmp_path / "at once"))
    one, other = Cube.open(cube), Cube.open(str(tmp_path / "at once"))
    assert np.array_equal(one.block(START, 20), other.block(START, 20), equal_nan=True)


def test_start_and_end_choose_and_earlier_files_may_come_later(tmp_path):
    cube = str(tmp_path / "cube")
    late = ingest(SMALL, cube, start="2020-06-01T00:50", end="2020-06-01T01:10Z")
    assert late.first >= START + timedelta(minutes=50)
    assert late.last <= START + timedelta(minutes=70)
    ingest(SMALL, cube)
    file = next(SMALL.files(None, None))
    assert Cube.open(cube).times[0] == file.valid_time
    stored = Cube.open(cube).block(file.valid_time, 1)[0]
    assert np.array_equal(stored, SMALL.read(Path(file.url)).values, equal_nan=True)


def test_a_window_and_then_a_grid(tmp_path):
    coarse = Grid("EPSG:3035", 4321000.0 - 6000, 4000.0, 4, 3210000.0 + 6000, -4000.0, 4)
    window = [4, 4, 16, 16]
    ingest(SMALL, str(tmp_path / "cube"), grid=coarse, window=window)
    cube = Cube.open(str(tmp_path / "cube"))
    assert cube.grid == coarse
    file = list(SMALL.files(None, None))[9]
    expected = regrid(SMALL.read(Path(file.url)).window(*window), coarse).values
    assert np.array_equal(cube.block(file.valid_time, 1)[0], expected, equal_nan=True)


def test_another_window_on_the_same_cube_is_refused_even_if_all_times_are_there(tmp_path):
    ingest(SMALL, str(tmp_path / "cube"))
    with pytest.raises(ValueError, match=r"grid is 8 x 8 cells of 1000 x 1000 .* has 24 x 24 cells"):
        ingest(SMALL, str(tmp_path / "cube"), window=[0, 0, 8, 8])


def test_a_mistyped_window_is_an_error_and_no_damage(tmp_path):
    for window, reason in (([0, 0, 25, 8], "reaches outside the grid"), ([0, 0, 8], "expected .y0,x0,ny,nx")):
        with pytest.raises(ValueError, match=reason):
            ingest(SMALL, str(tmp_path / "cube"), window=window)
    assert not (tmp_path / "cube").exists()


def test_a_time_without_files_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"no files within start=2031-01-01, .*2020-06-01"):
        ingest(SMALL, str(tmp_path / "cube"), start="2031-01-01")


def test_a_folder_that_is_no_cube_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(ValueError, match=r"photos: a folder that is no Icechunk repository"):
        ingest(SMALL, str(tmp_path / "photos"))
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_another_file_of_the_same_time_does_not_replace_the_first(tmp_path):
    class Twice(Flaky):
        def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
            for file in SMALL.files(start, end):
                yield file
                yield replace(file, url=f"{file.url}.again")

        def read(self, path: Path) -> Frame:
            frame = SMALL.read(path.with_name(path.name.removesuffix(".again")))
            if not path.name.endswith(".again"):
                return frame
            return replace(frame, values=frame.values * 0, sha256=hashlib.sha256(b"again").hexdigest())

    result = ingest(Twice(), str(tmp_path / "cube"))
    count = len(list(SMALL.files(None, None)))
    assert (result.new, result.conflicting) == (count, count)
    assert "kept as they were" in str(result)
    assert np.nanmax(Cube.open(str(tmp_path / "cube")).block(START, 20)) > 0


def test_a_cube_on_an_object_store(s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ingest(Flaky(frozenset({3})), f"{s3}/ingest/cube")
    assert result.quarantined == 1
    assert "spoilt" in (tmp_path / "quarantine.jsonl").read_text()
    assert ingest(SMALL, f"{s3}/ingest/cube").new == 1


@pytest.fixture
def feed(data: Path, tmp_path: Path) -> Path:
    """Three real files, and three damaged copies of others."""
    folder = tmp_path / "feed"
    folder.mkdir()
    real = sorted((data / "mrms").rglob("*.grib2"))
    for path in real[:3]:
        shutil.copyfile(path, folder / path.name)
    (folder / real[3].name).write_bytes(real[3].read_bytes()[:-5000])
    (folder / real[4].name).write_bytes(b"<html>503</html>")
    (folder / real[5].name).write_bytes(real[2].read_bytes())  # under another time's name
    return folder


@pytest.mark.data
def test_real_files_become_a_cube_and_damaged_ones_a_report(feed, tmp_path):
    source, cube = Mrms(str(feed)), str(tmp_path / "cube")
    result = ingest(source, cube, window=WINDOW)
    assert (result.new, result.quarantined) == (3, 3)
    lines = [json.loads(line) for line in Path(result.quarantine).read_text().splitlines()]
    assert [line["reason"].split(": ", 1)[1][:20] for line in lines] == [
        lines[0]["reason"].split(": ", 1)[1][:20],
        "not a GRIB file: beg",
        "valid at 2019-06-10T",
    ]
    assert "cut or damaged" in lines[0]["reason"]
    for line in lines:
        assert line["sha256"] == hashlib.sha256(Path(line["path"]).read_bytes()).hexdigest()
    stored = Cube.open(cube)
    assert stored.cadence == timedelta(minutes=2)
    assert stored.observed.tolist() == [True] * 3
    file = next(source.files(None, None))
    expected = source.read(Path(file.url)).window(*WINDOW).values
    assert np.array_equal(stored.block(file.valid_time, 1)[0], expected, equal_nan=True)
    assert stored.grid.x[0] == pytest.approx(-129.995 + 39.0)
    assert stored.grid.y[0] == pytest.approx(54.995 - 18.0)
    again = ingest(source, cube, window=WINDOW)
    assert (again.snapshot, again.new, again.already_there) == (result.snapshot, 0, 3)


def test_an_empty_folder_says_what_names_it_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no MRMS rain-rate files.*grib2"):
        ingest(Mrms(str(tmp_path / "empty")), str(tmp_path / "cube"))
    assert not (tmp_path / "cube").exists()
