"""MeteoNet archives: real ones as NumPy reads them, and none that can run anything."""

import io
import pickle
import subprocess
import sys
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import cli
from pipelines.grid import Grid
from pipelines.sources.meteonet import Meteonet
from pipelines.sources.source import RemoteFile

GRID = Grid("EPSG:4326", -5.0, 0.01, 8, 50.0, -0.01, 6)
NAME = "rainfall_NW_2016_08.3.npz"
START = datetime(2016, 8, 21)
DATES = [START + timedelta(minutes=minutes) for minutes in (5, 10, 60)]


def source(name: str, path: Path) -> Meteonet:
    config = OmegaConf.load(cli.CONFIGS / "source" / f"{name}.yaml")
    config.path = str(path)
    return instantiate(config)


def rain(seed: int = 0, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 400, (frames, *GRID.shape)).astype(np.int16)


def write(path: Path, data: np.ndarray, dates: object) -> Path:
    np.savez_compressed(path, data=data, dates=np.array(dates), miss_dates=np.array([START]))
    return path


def read_all(path: Path, **settings) -> list[np.ndarray]:
    meteonet = Meteonet(GRID, path=str(path.parent), **settings)
    return [meteonet.read(file).values for file in meteonet.files(None, None)]


def refusal(path: Path) -> str:
    """Why a file gives no frame; it is listed, without a time, all the same."""
    meteonet = Meteonet(GRID, path=str(path.parent))
    (file,) = meteonet.files(None, None)
    assert file == RemoteFile(str(path), None)
    with pytest.raises(ValueError, match=rf"^{path.name}: ") as refused:
        meteonet.read(file)
    return str(refused.value)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "scale", "missing", "count"),
    [("meteonet", 0.12, -1, 45), ("meteonet_reflectivity", 1.0, 255, 29)],
)
def test_every_real_frame_reads_as_numpy_reads_it(name, scale, missing, count, data):
    meteonet = source(name, data / "meteonet")
    files = list(meteonet.files(None, None))
    assert len(files) == count
    with np.load(files[0].url, allow_pickle=True) as trusted:
        numbers, dates = trusted["data"], trusted["dates"]
    assert [file.valid_time.replace(tzinfo=None) for file in files] == list(dates)
    for file, expected in zip(files, numbers, strict=True):
        frame = meteonet.read(file)
        assert frame.valid_time == file.valid_time
        assert frame.cadence == timedelta(minutes=5)
        assert np.array_equal(np.isnan(frame.values), expected == missing)
        seen = expected != missing
        assert np.abs(frame.values[seen] - expected[seen] * scale).max() < 1e-5
        assert (frame.values == 0).any()


@pytest.mark.data
def test_the_real_quality_reads_as_numpy_reads_it_beside_the_rain(data):
    meteonet = source("meteonet_quality", data / "meteonet")
    files = list(meteonet.files(None, None))
    with np.load(files[0].url, allow_pickle=True) as trusted:
        numbers, days = trusted["data"], trusted["dates"]
    assert [file.valid_time for file in files] == [
        datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1) for day in days
    ]
    for file, expected in zip(files, numbers, strict=True):
        frame = meteonet.read(file)
        assert (frame.variable.units, frame.cadence, frame.group) == ("%", timedelta(days=1), "quality")
        assert np.array_equal(frame.values, np.where(expected == 255, np.nan, expected), equal_nan=True)
    rain = source("meteonet", data / "meteonet")
    assert rain.grid == meteonet.grid
    frame = rain.read(next(rain.files(None, None)))
    both = np.isnan(frame.values) == (numbers[0] == 255)
    assert both.mean() > 0.998  # nobody looks there, say both


def test_the_days_of_quality_end_at_midnight(tmp_path):
    days = [date.date() for date in (START, START + timedelta(days=1), START + timedelta(days=2))]
    path = write(tmp_path / "rainfall_mean_quality-code_NW_2016_08.3.npz", rain() % 101, days)
    for protocol in (2, 3, 4, 5):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (3,)})
        rewrite(
            path, "dates.npy", header.getvalue() + pickle.dumps(np.array(days, object), protocol=protocol)
        )
        meteonet = Meteonet(GRID, path=str(tmp_path), product="rainfall_mean_quality-code")
        files = list(meteonet.files(None, None))
        assert [file.valid_time for file in files] == [
            datetime(2016, 8, 22 + day, tzinfo=UTC) for day in range(3)
        ]
    assert np.array_equal(meteonet.read(files[2]).values, rain()[2] % 101)


def test_a_quality_above_a_hundred_percent_is_refused(tmp_path):
    path = write(tmp_path / "rainfall_mean_quality-code_NW_2016_08.3.npz", rain(frames=1) * 0 + 101, [START])
    meteonet = Meteonet(GRID, path=str(tmp_path), product="rainfall_mean_quality-code")
    with pytest.raises(
        ValueError, match=rf"^{path.name}: 48 of 48 values of radar_quality lie outside 0..100 %"
    ):
        meteonet.read(next(meteonet.files(None, None)))


@pytest.mark.data
def test_the_grid_is_the_real_coordinates(data):
    grid = source("meteonet", data).grid
    with np.load(data / "meteonet/radar/radar_coords_NW.npz") as coordinates:
        lon, lat = grid.lonlat()
        assert np.abs(lon - coordinates["lons"]).max() < 1e-9
        assert np.abs(lat - coordinates["lats"]).max() < 1e-9


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_dates_come_out_of_every_pickle_that_numpy_writes(protocol, tmp_path):
    path = write(tmp_path / NAME, rain(), DATES)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (3,)})
    pickled = pickle.dumps(np.array(DATES, object), protocol=protocol)
    rewrite(path, "dates.npy", header.getvalue() + pickled)
    files = list(Meteonet(GRID, path=str(tmp_path)).files(None, None))
    assert [file.valid_time for file in files] == [date.replace(tzinfo=UTC) for date in DATES]


def rewrite(path: Path, member: str, content: bytes | None) -> None:
    """Replaces one member of an archive; None takes it out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members.pop(member, None)
    if content is not None:
        members[member] = content
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, kept in members.items():
            archive.writestr(name, kept)


def test_frames_come_in_any_order(tmp_path):
    data = rain()
    path = write(tmp_path / NAME, data, DATES)
    meteonet = Meteonet(GRID)
    for place in (2, 0, 1, 1, 2, 0):
        frame = meteonet.read(RemoteFile(str(path), DATES[place].replace(tzinfo=UTC)))
        assert np.allclose(frame.values, data[place] * 0.12)


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    path = write(tmp_path / NAME, rain(0), DATES)
    before = read_all(path)
    write(path, rain(1), DATES)
    assert not np.array_equal(before[0], read_all(path)[0])


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_what_is_minus_one_and_nothing_else_is_not_observed(seed, tmp_path_factory):
    generator = np.random.default_rng(seed)
    data = rain(seed)
    masked = generator.random(data.shape) < generator.random()
    path = write(
        tmp_path_factory.mktemp("meteonet") / NAME, np.where(masked, -1, data).astype(np.int16), DATES
    )
    values = np.stack(read_all(path))
    assert np.array_equal(np.isnan(values), masked)
    assert np.allclose(values[~masked], data[~masked] * 0.12)


class Canary:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_a_command_never_runs_it(tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / NAME
    write(path, rain(frames=1), np.array([Canary(canary)], object))
    assert "its dates ask for posix.system" in refusal(path)
    assert not canary.exists()
    subprocess.run(
        [sys.executable, "-c", f"import numpy; numpy.load({str(path)!r}, allow_pickle=True)['dates']"],
        check=True,
    )
    assert canary.exists()  # which NumPy would have run


def pickled(*opcodes: bytes) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (3,)})
    return header.getvalue() + b"".join(opcodes)


HOSTILE = {
    "another module": (pickled(b"cbuiltins\neval\n(S'1'\ntR."), "ask for builtins.eval"),
    "a class of ours": (pickled(b"cpipelines.grid\nGrid\n."), "ask for pipelines.grid.Grid"),
    "an attribute of what is known": (pickled(b"cnumpy\nload\n."), "ask for numpy.load"),
    "only a number": (pickled(b"K\x07."), "no list of dates"),
    "a date of two bytes": (pickled(b"cdatetime\ndatetime\n(C\x02abtR."), "a date that is not"),
    "a date in month 13": (
        pickled(b"cdatetime\ndatetime\n(C\x0a\x07\xe0\x0d\x15\x00\x0a\x00\x00\x00\x00tR."),
        "month",
    ),
    "a day of ten bytes": (
        pickled(b"cdatetime\ndate\n(C\x0a\x07\xe0\x08\x15\x00\x0a\x00\x00\x00\x00tR."),
        "a day that is not",
    ),
    "a day in month 13": (pickled(b"cdatetime\ndate\n(C\x04\x07\xe0\x0d\x15tR."), "month"),
    "half a pickle": (pickled(b"cdatetime\ndatetime\n(C\x0a"), "cannot be read"),
    "no pickle": (pickled(b"hello"), "cannot be read"),
    "no array": (b"hello, world", "magic"),
    "too many": (pickled(b"N") + bytes(2**20), "more than 1048576 bytes"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_dates_are_refused(attack, tmp_path):
    content, reason = HOSTILE[attack]
    path = write(tmp_path / NAME, rain(), DATES)
    rewrite(path, "dates.npy", content)
    assert reason in refusal(path)


def test_a_hostile_pickle_changes_nothing_for_the_next_file(tmp_path):
    good, bad = (tmp_path / name / NAME for name in ("good", "bad"))
    for path in (good, bad):
        path.parent.mkdir()
        write(path, rain(), DATES)
    sets_an_attribute = b"cdatetime\ndatetime\nN}S'__call__'\nNs\x86b."
    rewrite(bad, "dates.npy", pickled(sets_an_attribute))
    refusal(bad)
    assert len(read_all(good)) == 3


WRONG = {
    "falling dates": (lambda: (rain(), DATES[::-1]), "do not rise"),
    "a date twice": (lambda: (rain(), [DATES[0], *DATES[:2]]), "do not rise"),
}


@pytest.mark.parametrize("case", WRONG)
def test_dates_that_do_not_rise_are_refused(case, tmp_path):
    make, reason = WRONG[case]
    assert reason in refusal(write(tmp_path / NAME, *make()))


def test_data_of_another_shape_type_or_length_is_refused(tmp_path):
    cases = {
        r"shape \(2, 6, 8\)": rain(frames=2),
        r"shape \(3, 5, 8\)": rain()[:, :5],
        "type int32": rain().astype(np.int32),
        "2 of .*outside|outside": np.full((3, *GRID.shape), -2, np.int16),
    }
    for reason, data in cases.items():
        path = write(tmp_path / NAME, data, DATES)
        with pytest.raises(ValueError, match=rf"^{NAME}: .*{reason}"):
            read_all(path)


def test_a_bomb_is_refused_without_holding_it(tmp_path):
    path = write(tmp_path / NAME, rain(), DATES)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i2", "fortran_order": False, "shape": (3, 1_000, 8_000)}
    )
    rewrite(path, "data.npy", header.getvalue() + bytes(3 * 1_000 * 8_000 * 2))
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match="expected \\(3, 6, 8\\)"):
        read_all(path)


def test_other_archives_and_damaged_ones_are_refused(tmp_path):
    path = write(tmp_path / NAME, rain(), DATES)
    whole = path.read_bytes()
    rewrite(path, "more.npy", b"")
    assert "more.npy" in refusal(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refusal(path)
    path.write_bytes(b"<html>Not found</html>")
    assert "damaged" in refusal(path)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        begin = archive.getinfo("data.npy").header_offset + 60
        size = archive.getinfo("data.npy").compress_size
    for place in range(begin, begin + size, 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=rf"^{NAME}: "):
            read_all(path)


def test_each_of_its_places_may_stand_for_its_folder(tmp_path):
    later = NAME.replace("08.3", "09.1")
    write(tmp_path / NAME, rain(), DATES)
    write(tmp_path / later, rain(1), [date + timedelta(days=20) for date in DATES])
    whole = Meteonet(GRID, path=str(tmp_path))
    assert [path.name for path in whole.places()] == [NAME, later]
    parts = [file for place in whole.places() for file in Meteonet(GRID, path=str(place)).files(None, None)]
    assert parts == list(whole.files(None, None))
    with pytest.raises(ValueError, match="no files of MeteoNet reflectivity_old"):
        list(Meteonet(GRID, product="reflectivity_old", path=str(tmp_path / NAME)).files(None, None))


def test_other_zones_and_products_are_passed_over(tmp_path):
    write(tmp_path / NAME, rain(), DATES)
    for name in ("rainfall_SE_2016_08.3.npz", "rainfall_mean_quality-code_NW_2016_08.3.npz", "notes.txt"):
        (tmp_path / name).touch()
    files = list(Meteonet(GRID, path=str(tmp_path)).files(None, DATES[1].replace(tzinfo=UTC)))
    assert [Path(file.url).name for file in files] == [NAME, NAME]
    with pytest.raises(ValueError, match="no files of MeteoNet reflectivity_old"):
        list(Meteonet(GRID, product="reflectivity_old", path=str(tmp_path)).files(None, None))
    with pytest.raises(
        ValueError, match="expected one of rainfall, reflectivity_old, rainfall_mean_quality-code"
    ):
        Meteonet(GRID, product="quality")
