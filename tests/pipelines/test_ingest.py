"""`ingest`: files become a cube, once, whatever some of the files are."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import boto3
import numpy as np
import pytest

from pipelines.cf import ELEVATION
from pipelines.cube import Cube
from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.ingest import LOOKBACK, _since, ingest
from pipelines.regrid import regrid
from pipelines.repository import Repository
from pipelines.signals import ending_in_order
from pipelines.sources.elevation import Etopo, Gtopo, Srtm
from pipelines.sources.fmi import Fmi
from pipelines.sources.grib1 import StaticGrib1
from pipelines.sources.mrms import Mrms
from pipelines.sources.nwcsaf import NwcsafHdf5
from pipelines.sources.simulated import Simulated
from pipelines.sources.source import RemoteFile, named_files
from pipelines.static import StaticFields
from tests.pipelines.ordinary_user import ordinary_user

ROOT = Path(__file__).parent.parent.parent
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

    def read(self, file: RemoteFile) -> Frame:
        self.read_names.append(file.url)
        if [known.url for known in self.files(None, None)].index(file.url) in self.bad:
            raise ValueError(f"{file.url}: spoilt")
        return SMALL.read(file)


def test_a_source_becomes_a_cube_frame_by_frame(tmp_path):
    result = ingest(SMALL, str(tmp_path / "cube"))
    cube = Cube.open(str(tmp_path / "cube"))
    files = list(SMALL.files(None, None))
    assert (result.new, result.already_there, result.quarantined) == (len(files), 0, 0)
    assert result.snapshot == cube.snapshot
    assert cube.grid == SMALL.grid
    for file in files:
        stored = cube.block(file.valid_time, 1)[0]
        assert np.array_equal(stored, SMALL.read(file).values, equal_nan=True)
    missing = {START + timedelta(minutes=5 * i) for i in range(20)} - {file.valid_time for file in files}
    for gap in missing:
        assert np.isnan(cube.block(gap, 1)).all()


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
        lines = [json.loads(line) for line in (tmp_path / "cube.quarantine.jsonl").read_text().splitlines()]
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
    with pytest.raises(
        ValueError, match=rf"nothing could be read \({count} refused\).*quarantine.jsonl.*spoilt"
    ):
        ingest(Flaky(frozenset(range(20))), cube)
    assert len((tmp_path / "cube.quarantine.jsonl").read_text().splitlines()) == count
    assert ingest(SMALL, cube).new == count
    assert len((tmp_path / "cube.quarantine.jsonl").read_text().splitlines()) == count


def test_each_damaged_frame_of_a_file_is_written_down_and_once(tmp_path):
    class OneFile(Flaky):
        """All frames in one file, of which some are damaged alike."""

        def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
            return (replace(file, url="all.nc") for file in SMALL.files(start, end))

        def read(self, file: RemoteFile) -> Frame:
            [known] = [each for each in SMALL.files(None, None) if each.valid_time == file.valid_time]
            if file.valid_time.minute in (10, 20):
                raise ValueError("all.nc: no observation")
            return SMALL.read(known)

    cube = str(tmp_path / "cube")
    for _ in range(2):
        result = ingest(OneFile(), cube)
        lines = [json.loads(line) for line in Path(result.quarantine).read_text().splitlines()]
        times = [line["valid_time"] for line in lines]
        assert len(times) == len(set(times)) == result.quarantined > 2
        assert {time[14:16] for time in times} == {"10", "20"}


def test_an_ingest_that_stops_goes_on_where_it_stopped(tmp_path):
    class Stopping(Flaky):
        def read(self, file: RemoteFile) -> Frame:
            if len(self.read_names) == 11:
                raise KeyboardInterrupt
            return super().read(file)

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
    assert np.array_equal(stored, SMALL.read(file).values, equal_nan=True)


def test_a_window_and_then_a_grid(tmp_path):
    coarse = Grid("EPSG:3035", 4321000.0 - 6000, 4000.0, 4, 3210000.0 + 6000, -4000.0, 4)
    window = [4, 4, 16, 16]
    ingest(SMALL, str(tmp_path / "cube"), grid=coarse, window=window)
    cube = Cube.open(str(tmp_path / "cube"))
    assert cube.grid == coarse
    file = list(SMALL.files(None, None))[9]
    expected = regrid(SMALL.read(file).window(*window), coarse).values
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


@pytest.mark.parametrize("every", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_pause_that_is_none_is_refused_before_anything_is_made(tmp_path, every):
    with pytest.raises(ValueError, match=rf"^every={every:g}: expected seconds, above 0"):
        ingest(SMALL, str(tmp_path / "cube"), every=every)
    assert not any(tmp_path.iterdir())


def test_a_time_without_files_says_what_there_is(tmp_path):
    with pytest.raises(ValueError, match=r"no files within start=2031-01-01.*2020-06-01"):
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

        def read(self, file: RemoteFile) -> Frame:
            frame = SMALL.read(replace(file, url=file.url.removesuffix(".again")))
            if not file.url.endswith(".again"):
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
    assert "spoilt" in (tmp_path / "cube.quarantine.jsonl").read_text()
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
        "the frame in it is v",
    ]
    assert "cut or damaged" in lines[0]["reason"]
    for line in lines:
        assert line["sha256"] == hashlib.sha256(Path(line["path"]).read_bytes()).hexdigest()
    stored = Cube.open(cube)
    assert stored.cadence == timedelta(minutes=2)
    assert stored.observed.tolist() == [True] * 3
    file = next(source.files(None, None))
    expected = source.read(file).window(*WINDOW).values
    assert np.array_equal(stored.block(file.valid_time, 1)[0], expected, equal_nan=True)
    assert stored.grid.x[0] == pytest.approx(-129.995 + 39.0)
    assert stored.grid.y[0] == pytest.approx(54.995 - 18.0)
    again = ingest(source, cube, window=WINDOW)
    assert (again.snapshot, again.new, again.already_there) == (result.snapshot, 0, 3)


def test_an_empty_folder_says_what_names_it_looked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no files of MRMS .*grib2"):
        ingest(Mrms(str(tmp_path / "empty")), str(tmp_path / "cube"))
    assert not (tmp_path / "cube").exists()


def told(path: Path) -> dict[str, np.ndarray]:
    """All of a cube but when it was written."""
    table = Cube.open(str(path)).between(START - timedelta(days=1), START + timedelta(days=1))
    return {str(name): array.values for name, array in table.drop_vars("arrival_time").variables.items()}


@pytest.mark.slow
def test_workers_make_the_cube_that_one_process_makes(tmp_path):
    for name, workers in (("alone", 0), ("together", 2)):
        ingest(SMALL, str(tmp_path / name), grid=SMALL.grid.window(3, 3, 20, 20), workers=workers, batch=5)
    alone, together = told(tmp_path / "alone"), told(tmp_path / "together")
    assert alone.keys() == together.keys()
    for name, values in alone.items():
        assert values.tobytes() == together[name].tobytes(), name


def test_a_restated_file_replaces_a_frame_only_when_asked(tmp_path):
    class Restated(Flaky):
        def read(self, file: RemoteFile) -> Frame:
            frame = super().read(file)
            if file != next(SMALL.files(None, None)):
                return frame
            return replace(frame, values=frame.values * 0 + 7, sha256=hashlib.sha256(b"new").hexdigest())

    cube, first = str(tmp_path / "cube"), next(SMALL.files(None, None))
    ingest(SMALL, cube)
    assert ingest(Restated(), cube).restated == 0
    result = ingest(Restated(), cube, restate=True)
    assert (result.new, result.restated) == (0, 1) and "1 restated" in str(result)
    stored = Cube.open(cube).block(first.valid_time, 1)
    assert (stored[~np.isnan(stored)] == 7).all()


def test_frames_go_to_the_group_of_their_kind_or_the_one_asked_for(tmp_path):
    cube = str(tmp_path / "cube")
    ingest(SMALL, cube)
    result = ingest(SMALL, cube, group="second", end=START + timedelta(minutes=30))
    assert result.group == "second" and result.new == result.new + result.already_there > 1
    assert Cube.open(cube, "second").block(START, 1).shape == Cube.open(cube).block(START, 1).shape
    again = ingest(SMALL, cube, group="second", end=START + timedelta(minutes=30))
    assert (again.new, again.already_there) == (0, result.new)


def test_a_file_of_another_kind_than_the_cube_is_quarantined_and_the_rest_goes_on(tmp_path):
    class Moved(Flaky):
        def read(self, file: RemoteFile) -> Frame:
            frame = super().read(file)
            odd = file == list(SMALL.files(None, None))[3]
            return replace(frame, grid=replace(frame.grid, x_first=0.0)) if odd else frame

    result = ingest(Moved(), str(tmp_path / "cube"))
    assert result.quarantined == 1
    assert result.new == len(list(SMALL.files(None, None))) - 1
    line = json.loads(Path(result.quarantine).read_text())
    assert line["code"] == "not_of_this_cube" and "grid is" in line["reason"]


def fmi_files(data: Path, count: int) -> list[Path]:
    return sorted((data / "fmi" / "pgm").rglob("*.pgm.gz"))[:count]


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def frames_of(cube: str) -> int:
    try:
        return int(Cube.open(cube).observed.sum())
    except ValueError:
        return 0


@pytest.mark.data
def test_a_bucket_is_read_once_and_fetched_files_do_not_stay(data, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bucket = boto3.client("s3")
    for path in fmi_files(data, 3):
        bucket.upload_file(str(path), "radar", f"once/{path.name}")
    bucket.put_object(Bucket="radar", Key=f"once/{fmi_files(data, 4)[3].name}", Body=b"<html>503</html>")
    source, cube = Fmi(path=f"{s3}/once"), str(tmp_path / "cube")
    result = ingest(source, cube, window=[400, 300, 64, 64], start="2017-05-09T00:00Z")
    assert (result.new, result.quarantined) == (3, 1)
    line = json.loads((tmp_path / "cube.quarantine.jsonl").read_text())
    assert line["path"].startswith("s3://radar/once/") and line["code"] == "damaged"
    local = Fmi(path=str(data / "fmi" / "pgm")).read(RemoteFile(str(fmi_files(data, 1)[0]), None))
    stored = Cube.open(cube).block(local.valid_time, 1)[0]
    assert np.array_equal(stored, local.window(400, 300, 64, 64).values, equal_nan=True)
    assert Cube.open(cube).sources()[local.valid_time] == local.sha256
    assert ingest(source, cube, window=[400, 300, 64, 64]).new == 0
    assert [path.name for path in tmp_path.rglob("*.pgm.gz")] == []


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_feed_is_followed_until_it_is_told_to_stop(place, data, s3, tmp_path):
    live, cube = tmp_path / "live", str(tmp_path / "cube")
    live.mkdir()

    def deliver(path: Path) -> None:
        if place == "bucket":
            boto3.client("s3").upload_file(str(path), "radar", f"live/{path.name}")
        else:
            shutil.copyfile(path, live / f"{path.name}.part")
            (live / f"{path.name}.part").rename(live / path.name)

    first, *later = fmi_files(data, 4)
    deliver(first)
    words = [f"source.path={s3}/live" if place == "bucket" else f"source.path={live}", f"cube={cube}"]
    words += ["window=[400,300,64,64]", "follow=true", "every=0.3", "start=2017-05-09T00:00Z"]
    command = [sys.executable, str(ROOT / "cli.py"), "ingest", "source=fmi", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as follower:
        wait_for(lambda: frames_of(cube) == 1 or follower.poll() is not None)
        for path in reversed(later):
            deliver(path)
        wait_for(lambda: frames_of(cube) == 4 or follower.poll() is not None)
        follower.terminate()
        said, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0, said
    assert "4 new" in said and "Traceback" not in said


def test_a_source_whose_names_tell_nothing_cannot_be_followed(tmp_path):
    with pytest.raises(ValueError, match="source=Simulated: cannot be followed"):
        ingest(SMALL, str(tmp_path / "cube"), follow=True)


@dataclass
class Odd(Flaky):
    """The simulated source, whose frame of the first file is valid at another time."""

    odd_time: datetime = START

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        first, *rest = SMALL.files(None, None)
        yield from (replace(first, valid_time=self.odd_time), *rest)

    def read(self, file: RemoteFile) -> Frame:
        frame = SMALL.read(replace(file, valid_time=None))
        return replace(frame, valid_time=self.odd_time) if file.valid_time == self.odd_time else frame


@pytest.mark.parametrize("odd", [START + timedelta(minutes=2), datetime(1950, 1, 1, tzinfo=UTC)])
def test_a_first_new_file_of_a_time_off_the_axis_does_not_stop_the_rest(odd, tmp_path):
    cube, files = str(tmp_path / "cube"), list(SMALL.files(None, None))
    ingest(SMALL, cube, start=files[5].valid_time, end=files[5].valid_time)
    result = ingest(Odd(odd_time=odd), cube)
    assert (result.new, result.quarantined) == (len(files) - 2, 1)
    assert json.loads(Path(result.quarantine).read_text())["code"] == "not_of_this_cube"


def test_a_first_file_of_a_wrong_year_does_not_begin_the_cube_that_the_others_are_of(tmp_path, caplog):
    files = list(SMALL.files(None, None))
    result = ingest(Odd(odd_time=datetime(1950, 1, 1, tzinfo=UTC)), str(tmp_path / "cube"))
    assert (result.new, result.damaged, result.misfits) == (len(files) - 1, 0, 1)
    assert Cube.open(str(tmp_path / "cube")).times[0] == files[1].valid_time
    assert f"{len(files) - 1} new, 0 already there, 1 sound but not of this cube, see" in str(result)
    (warning,) = caplog.messages
    assert (
        "looks like a wrong date" in warning
        and "if the date is right, write it to a cube of its own" in warning
    )


def test_the_span_that_is_told_is_of_the_frames_that_are_in_the_cube(tmp_path):
    files = list(SMALL.files(None, None))
    bad = Flaky(frozenset({0, len(files) - 1}))
    for _ in range(2):  # new, and already there
        result = ingest(bad, str(tmp_path / "cube"))
        assert (result.first, result.last) == (files[1].valid_time, files[-2].valid_time)


@dataclass
class Live(Flaky):
    """The simulated source as files in a folder, which can be followed; `looked`: called with each name."""

    path: str | None = None
    looked: Callable[[str], None] = lambda name: None

    def valid_time(self, name: str) -> datetime | None:
        self.looked(name)
        return datetime.strptime(name, "%Y%m%d%H%M.txt").replace(tzinfo=UTC) if name[0] == "2" else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        yield from named_files(self, start, end, "simulated rain", "202006010000.txt")

    def read(self, file: RemoteFile) -> Frame:
        return next(SMALL.read(known) for known in SMALL.files(file.valid_time, file.valid_time))


@pytest.fixture
def live(tmp_path: Path) -> Live:
    """All files of the simulated source, at rest for long."""
    folder = tmp_path / "live"
    folder.mkdir()
    for file in SMALL.files(None, None):
        path = folder / f"{file.valid_time:%Y%m%d%H%M}.txt"
        path.touch()
        os.utime(path, (0, 0))
    return Live(path=str(folder))


def test_following_ends_by_itself_when_all_up_to_the_end_is_in(live, tmp_path):
    times = [file.valid_time for file in SMALL.files(None, None)]
    result = ingest(live, str(tmp_path / "cube"), follow=True, end=times[4])
    assert (result.new, result.first, result.last) == (5, times[0], times[4])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
@pytest.mark.parametrize("follow", [False, True])
def test_a_signal_before_anything_was_read_ends_with_the_code_of_that_signal(
    number, code, follow, live, tmp_path
):
    for path in Path(str(live.path)).iterdir():
        path.rename(path.with_name(f"other{path.name}"))  # as if none had come yet
    live.looked = lambda name: os.kill(os.getpid(), number)
    if not follow:
        live.files = lambda start, end: iter([live.valid_time("other")])
    with pytest.raises(KeyboardInterrupt if code is None else SystemExit) as ended, ending_in_order():
        ingest(live, str(tmp_path / "cube"), follow=follow)
    assert getattr(ended.value, "code", None) == code
    assert not (tmp_path / "cube").exists()


def test_a_feed_that_a_signal_ends_after_its_first_frames_is_told_as_done(live, tmp_path):
    first = next(SMALL.files(None, None))
    live.read = lambda file: os.kill(os.getpid(), signal.SIGTERM) or SMALL.read(first)
    result = ingest(live, str(tmp_path / "cube"), follow=True, end=first.valid_time)
    assert result.new == 1


def test_two_ingests_do_not_share_what_they_fetch(live, tmp_path):
    times = [file.valid_time for file in SMALL.files(None, None)]
    shared = str(tmp_path / "shared")

    def meanwhile(file):
        with pytest.raises(ValueError, match=f"cache={shared}: another ingest keeps its files there"):
            ingest(Live(path=str(live.path)), str(tmp_path / "other"), follow=True, end=START, cache=shared)
        return next(of for of in SMALL.files(None, None) if of.valid_time == file.valid_time)

    live.read = lambda file: SMALL.read(meanwhile(file))
    result = ingest(live, str(tmp_path / "cube"), follow=True, end=times[1], cache=shared)
    assert (result.new, result.damaged) == (2, 0)
    assert not (tmp_path / "other").exists()


def test_names_that_are_not_safe_to_use_are_counted_and_told(live, tmp_path, caplog):
    (Path(str(live.path)) / "below").mkdir()
    for name in ("my rain.txt", "below/rain;rm.txt", "fine.txt"):
        (Path(str(live.path)) / name).touch()
    result = ingest(live, str(tmp_path / "cube"))
    assert result.passed_over == 2 and "2 passed over for their names" in str(result)
    assert "2 files passed over for their names, such as 'my rain.txt'" in caplog.text


@pytest.mark.parametrize("follow", [False, True])
def test_a_folder_that_may_not_be_listed_is_told_and_written_down_and_the_rest_goes_on(
    follow, live, tmp_path, caplog
):
    times = [file.valid_time for file in SMALL.files(None, None)]
    closed = Path(str(live.path)) / "closed"
    closed.mkdir()
    for path in sorted(Path(str(live.path)).glob("*.txt"))[2:5]:
        path.rename(closed / path.name)
    for rights in (0o000, 0o444):  # without the right to enter it, its names are all that there is
        closed.chmod(rights)
        with ordinary_user():
            result = ingest(live, str(tmp_path / "cube"), follow=follow, end=times[-1])
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    said = f"{closed}: cannot be listed (Permission denied), so nothing in it is read; give this user"
    assert [warning.startswith(said) for warning in warnings] == [True, True]  # in each of two runs
    assert (result.already_there, result.damaged, result.unlisted) == (len(times) - 3, 0, 1)
    assert "1 folder that cannot be listed, see" in str(result)
    (line,) = Path(result.quarantine).read_text().splitlines()
    record = json.loads(line)
    assert (record["path"], record["code"]) == (str(closed), "unreadable")
    assert record["reason"] in warnings
    closed.chmod(0o755)
    result = ingest(live, str(tmp_path / "cube"))
    assert (result.new, result.unlisted) == (3, 0)


def test_a_folder_of_a_source_that_is_none_or_may_not_be_listed_is_an_error_that_says_so(live, tmp_path):
    root = Path(str(live.path))
    file = replace(live, path=str(next(root.iterdir())))
    for follow in (False, True):
        with pytest.raises(
            ValueError, match=r"\.txt: is a file; expected a folder with .*, such as the one it"
        ):
            ingest(file, str(tmp_path / "cube"), follow=follow)
    for rights in (0o000, 0o444):
        root.chmod(rights)
        with (
            ordinary_user(),
            pytest.raises(ValueError, match=r"live: cannot be listed \(Permission denied\)"),
        ):
            ingest(live, str(tmp_path / "cube"), follow=follow)
    root.chmod(0o755)
    assert not (tmp_path / "cube").exists()


def test_links_are_told_by_their_number_the_first_names_and_what_to_do(live, tmp_path, caplog):
    root, stored = Path(str(live.path)), tmp_path / "stored"
    root.rename(stored)
    (root / "below").mkdir(parents=True)
    for path in stored.iterdir():
        (root / path.name).symlink_to(path)
    with pytest.raises(
        ValueError, match=rf"no files of simulated rain .* \({len(list(root.iterdir())) - 1} links"
    ):
        ingest(live, str(tmp_path / "cube"))

    caplog.clear()
    first, second, *_ = sorted(path.name for path in stored.iterdir())
    for path in [*root.glob("*.txt")]:
        path.unlink()
    shutil.copyfile(stored / second, root / second)
    (root / "latest.txt").symlink_to(second)  # which is no name of the source's files: nothing is missed
    (root / "again").symlink_to("below")
    (root / "below" / first).symlink_to("nowhere")
    (root / "more").symlink_to(stored)
    result = ingest(live, str(tmp_path / "cube"))
    (warning,) = caplog.messages
    assert f"{root}: 2 links not followed, such as 'more', 'below/{first}'; copy" in warning
    assert "or give the folder that they lead to as source.path" in warning
    assert (result.new, result.links) == (1, 2) and "2 links not followed" in str(result)


def test_a_cube_that_may_not_be_written_says_which_and_what_to_do(live, tmp_path):
    cube = tmp_path / "cube"
    ingest(live, str(cube), end=START)
    for path in (cube, *cube.rglob("*")):
        path.chmod(path.stat().st_mode & 0o555)
    with (
        ordinary_user(),
        pytest.raises(PermissionError, match=rf"^{cube}: cannot be written .* the right to, or"),
    ):
        ingest(live, str(cube))


def test_a_window_that_is_the_cubes_part_of_the_files_is_named(tmp_path):
    cube = str(tmp_path / "cube")
    ingest(SMALL, cube, window=[3, 4, 10, 12])
    with pytest.raises(ValueError, match=r"cube of its own, or give window=\[3,4,10,12\], which"):
        ingest(SMALL, cube)
    with pytest.raises(ValueError, match=r"cube of its own, or give window=\[3,4,10,12\], which"):
        ingest(SMALL, cube, window=[2, 2, 18, 18])
    assert ingest(SMALL, cube, window=[3, 4, 10, 12]).new == 0
    apart = [[0, 0, 8, 8], [5, 5, 10, 12]]
    coarse = Grid("EPSG:3035", 4321000.0 - 6000, 4000.0, 4, 3210000.0 + 6000, -4000.0, 4)
    for options in (*({"window": window} for window in apart), {"grid": coarse}):
        with pytest.raises(ValueError, match=r"write it to a cube of its own$"):
            ingest(SMALL, cube, **options)


def test_a_damaged_first_file_of_times_that_another_group_has_does_not_hide_the_others(tmp_path):
    class Satellite(Flaky):
        def read(self, file: RemoteFile) -> Frame:
            return replace(super().read(file), group="satellite")

    cube, count = str(tmp_path / "cube"), len(list(SMALL.files(None, None)))
    ingest(SMALL, cube)
    result = ingest(Satellite(frozenset({0})), cube)
    assert (result.group, result.new, result.quarantined) == ("satellite", count - 1, 1)


def test_two_files_of_one_time_do_not_take_turns_when_restated(tmp_path):
    class Twice(Flaky):
        def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
            for number, file in enumerate(SMALL.files(start, end)):
                for name in ("first", "second"):
                    path = tmp_path / f"{number}.{name}"
                    path.write_text(str(path))
                    yield replace(file, url=str(path))

        def read(self, file: RemoteFile) -> Frame:
            self.read_names.append(file.url)
            frame = SMALL.read(list(SMALL.files(None, None))[int(Path(file.url).stem)])
            return replace(frame, sha256=hashlib.sha256(Path(file.url).read_bytes()).hexdigest())

    cube, count = str(tmp_path / "cube"), len(list(SMALL.files(None, None)))
    first = ingest(Twice(), cube, restate=True)
    assert (first.new, first.restated) == (count, count)
    again = ingest(Twice(), cube, restate=True)
    assert (again.new, again.restated, again.snapshot) == (0, 0, first.snapshot)


def test_an_ingest_goes_on_where_another_one_had_only_made_the_repository(tmp_path):
    Repository.open_or_create(str(tmp_path / "cube"))
    assert ingest(SMALL, str(tmp_path / "cube")).new == len(list(SMALL.files(None, None)))


def test_a_torn_line_of_the_quarantine_stops_nothing(tmp_path):
    path = tmp_path / "cube.quarantine.jsonl"
    path.write_bytes(b'[]\n{"path": "x", "sh\xc3')
    assert ingest(Flaky(frozenset({3})), str(tmp_path / "cube")).quarantined == 1
    assert json.loads(path.read_bytes().splitlines()[-1])["code"] == "damaged"


def test_a_pipe_in_place_of_a_file_is_quarantined(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    os.mkfifo(folder / "PrecipRate_00.00_20190610-004000.grib2")
    with pytest.raises(ValueError, match="no plain file"):
        ingest(Mrms(str(folder)), str(tmp_path / "cube"))


def test_a_lack_of_room_is_no_damage_of_a_file(tmp_path):
    class Full(Flaky):
        def read(self, file: RemoteFile) -> Frame:
            if len(self.read_names) == 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().read(file)

    with pytest.raises(OSError, match="No space left"):
        ingest(Full(), str(tmp_path / "cube"), batch=2)
    assert not (tmp_path / "cube.quarantine.jsonl").exists()
    assert Cube.open(str(tmp_path / "cube")).observed.sum() == 4


def test_a_window_outside_the_frames_puts_no_file_into_quarantine(tmp_path):
    with pytest.raises(ValueError, match="reaches outside the grid"):
        ingest(SMALL, str(tmp_path / "cube"), window=[0, 0, 25, 8])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.data
def test_a_file_that_a_server_refuses_does_not_end_the_others(data, tmp_path):
    class Site(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(tmp_path / "site"))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "site").mkdir()
    first, gone, third = fmi_files(data, 3)
    for path in (first, third):
        shutil.copyfile(path, tmp_path / "site" / path.name)
    (tmp_path / "site" / gone.name).symlink_to("nowhere")
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = Fmi(path=f"http://127.0.0.1:{server.server_port}/")
        window, start = [400, 300, 64, 64], "2017-05-09T00:00Z"
        result = ingest(source, str(tmp_path / "cube"), window=window, start=start)
        server.shutdown()
    assert (result.new, result.quarantined) == (2, 1)
    assert json.loads(Path(result.quarantine).read_text())["code"] == "unreachable"


@dataclass
class Hills:
    """Two fields that never change, as files on a web page."""

    path: str | None
    trusted: ClassVar[bool] = True
    group: ClassVar[str] = "static"

    def valid_time(self, name: str) -> datetime | None:
        return ALWAYS if name.endswith(".hills") else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        yield from named_files(self, start, end, "hills", "x.hills")

    def read(self, file: RemoteFile) -> Frame:
        digest = hashlib.sha256(Path(file.url).read_bytes()).hexdigest()
        height = np.full(SMALL.grid.shape, 100, np.float32)
        return Frame(ELEVATION, ALWAYS, None, SMALL.grid, height, "hills", digest, group="static")


def test_what_never_changes_is_read_from_a_url_however_old_it_is(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "all.hills").write_text("100 m")
    monkeypatch.chdir(tmp_path / "site")
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = ingest(Hills(f"http://127.0.0.1:{server.server_port}/"), str(tmp_path / "cube"))
        server.shutdown()
    assert (result.group, result.new) == ("static", 1)
    assert (StaticFields.open(str(tmp_path / "cube")).field("elevation") == 100).all()


@pytest.mark.parametrize("source", [Etopo, Gtopo, Srtm, StaticGrib1])
def test_a_source_of_what_never_changes_says_so_before_it_is_read(source):
    assert source.group == "static"


def test_a_feed_begins_behind_the_frames_of_its_own_group(tmp_path):
    cube = str(tmp_path / "cube")
    ingest(SMALL, cube)
    ingest(SMALL, cube, group="satellite", end=START)
    url = "s3://bucket/x"
    assert _since(Fmi(path=url), cube, None) == Cube.open(cube).times[-1] - LOOKBACK
    assert (
        _since(NwcsafHdf5(SMALL.grid, path=url), cube, None)
        == Cube.open(cube, "satellite").times[-1] - LOOKBACK
    )
