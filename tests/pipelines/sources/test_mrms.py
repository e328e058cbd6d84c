"""MRMS files: real ones read as another decoder reads them, and damaged ones refused."""

import gzip
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cf import PRECIPITATION_FLAG, RAINFALL_RATE, REFLECTIVITY
from pipelines.decode import decode
from pipelines.frame import Frame
from pipelines.sources.mrms import GRID, Mrms
from pipelines.sources.source import RemoteFile

NAME = "PrecipRate_00.00_20190610-000200.grib2"

# In a process of its own: eccodes and other decoders in one abort at its end.
ECCODES = """
import sys
import eccodes, numpy
with open(sys.argv[1], "rb") as file:
    message = eccodes.codes_grib_new_from_file(file)
shape = eccodes.codes_get(message, "Nj"), eccodes.codes_get(message, "Ni")
numpy.save(sys.argv[2], eccodes.codes_get_values(message).reshape(shape).astype(numpy.float32))
"""


@pytest.fixture(scope="module")
def real(data: Path) -> Path:
    return data / "mrms" / "2019" / "06" / "10" / NAME


@pytest.fixture(scope="module")
def message(real: Path) -> bytes:
    return real.read_bytes()


@pytest.fixture(scope="module")
def frame_of_it(real: Path) -> Frame:
    return Mrms().read(RemoteFile(str(real), None))


@pytest.fixture(scope="module")
def flags(data: Path) -> Path:
    return data / "mrms_other" / "MRMS_PrecipFlag_00.00_20260219-042400.grib2.gz"


def section(message: bytes, number: int) -> int:
    """Where a section begins."""
    place = 16
    while message[place + 4] != number:
        place += struct.unpack(">I", message[place : place + 4])[0]
    return place


def changed(message: bytes, place: int, value: bytes) -> bytes:
    return message[:place] + value + message[place + len(value) :]


def gdal_field(path: Path) -> tuple[np.ndarray, tuple[float, float], tuple[float, float]]:
    """Values, and the first and last cell centres (x, y), as GDAL reads an unzipped file."""
    with rasterio.open(path, driver="GRIB") as dataset:
        return (
            dataset.read(1, out_dtype=np.float32),
            dataset.xy(0, 0),
            dataset.xy(dataset.height - 1, dataset.width - 1),
        )


def same_as_gdal(frame: Frame, path: Path, not_observed: float) -> None:
    gdal, first, last = gdal_field(path)
    seen = gdal != not_observed
    assert np.array_equal(~np.isnan(frame.values), seen)
    assert np.abs(frame.values - gdal)[seen].max() < 2e-5  # of up to 150: the last bit of float32
    assert (frame.grid.x[0], frame.grid.y[0]) == pytest.approx(first, abs=2e-6)  # the file has 1e-6 degrees
    assert (frame.grid.x[-1], frame.grid.y[-1]) == pytest.approx(last, abs=2e-6)


@pytest.mark.data
def test_a_real_file_reads_as_gdal_reads_it(real, frame_of_it):
    frame = frame_of_it
    same_as_gdal(frame, real, -3)
    assert (frame.variable, frame.valid_time) == (RAINFALL_RATE, datetime(2019, 6, 10, 0, 2, tzinfo=UTC))
    assert 0.35 < np.isnan(frame.values).mean() < 0.36
    assert (frame.values == np.float32(0.1)).sum() > 50
    assert (frame.values == 0).sum() > 1e7


@pytest.mark.data
@pytest.mark.slow
def test_every_fourth_real_rain_rate_reads_as_gdal_reads_it(data):
    source = Mrms(str(data / "mrms"))
    files = list(source.files(None, None))
    assert len(files) == 23
    for file in files[::4]:
        frame = source.read(file)
        same_as_gdal(frame, Path(file.url), -3)
        assert frame.valid_time == file.valid_time


@pytest.mark.data
def test_precipitation_flags_are_classes_as_gdal_reads_them(data, flags, tmp_path):
    plain = tmp_path / "flags.grib2"
    plain.write_bytes(gzip.decompress(flags.read_bytes()))
    source = Mrms(str(data / "mrms_other"), "PrecipFlag")
    (file,) = source.files(None, None)
    frame = source.read(file)
    same_as_gdal(frame, plain, -3)
    assert (frame.variable, frame.source) == (PRECIPITATION_FLAG, "NOAA MRMS PrecipFlag")
    assert frame.valid_time == file.valid_time == datetime(2026, 2, 19, 4, 24, tzinfo=UTC)
    assert (frame.values == 3).sum() == 919929  # snow
    assert (frame.values == 10).sum() == 137757  # cold stratiform rain


@pytest.mark.data
def test_reflectivity_keeps_no_echo_from_not_observed_as_eccodes_reads_them(data, tmp_path):
    source = Mrms(str(data / "mrms_other"), "ReflectivityAtLowestAltitude")
    (file,) = source.files(None, None)
    plain, out = tmp_path / "reflectivity.grib2", tmp_path / "eccodes.npy"
    plain.write_bytes(gzip.decompress(Path(file.url).read_bytes()))
    subprocess.run([sys.executable, "-c", ECCODES, str(plain), str(out)], check=True)
    eccodes, frame = np.load(out), source.read(file)
    assert (frame.variable, frame.valid_time) == (REFLECTIVITY, file.valid_time)
    assert frame.valid_time == datetime(2023, 4, 6, 12, tzinfo=UTC)  # stamped 12:00:39
    assert np.array_equal(np.isnan(frame.values), eccodes == -999)
    assert np.array_equal(frame.values[eccodes != -999], eccodes[eccodes != -999])
    assert (frame.values == -99).sum() == 15041671
    assert np.nanmax(frame.values) == 60.0


def test_the_grid_is_the_registered_one():
    assert GRID.shape == (3500, 7000)
    assert (GRID.x[0], GRID.x[-1]) == pytest.approx((-129.995, -60.005), abs=1e-9)
    assert (GRID.y[0], GRID.y[-1]) == pytest.approx((54.995, 20.005), abs=1e-9)
    assert GRID.is_geographic


@pytest.mark.data
def test_a_zipped_file_under_the_archives_name_is_the_same_frame(message, tmp_path):
    zipped = tmp_path / f"MRMS_{NAME}.gz"
    zipped.write_bytes(gzip.compress(message, 1))
    (tmp_path / NAME).write_bytes(message)
    plain, again = (
        Mrms().read(RemoteFile(str(tmp_path / NAME), None)),
        Mrms().read(RemoteFile(str(zipped), None)),
    )
    assert np.array_equal(plain.values, again.values, equal_nan=True)
    assert plain.valid_time == again.valid_time
    assert plain.sha256 != again.sha256


@pytest.mark.data
def test_minus_one_is_missing_and_other_negatives_are_refused(message, tmp_path):
    png = section(message, 7) + 5
    for count, fits in ((20, True), (25, False)):
        rows = np.zeros((3500, 1 + 2 * 7000), np.uint8)  # a filter byte before every row
        picture = np.full((3500, 7000), 31, ">u2")  # 0.1 mm/h
        picture[7, 5] = count
        rows[:, 1:] = picture.view(np.uint8).reshape(3500, -1)
        packed = zlib.compress(rows.tobytes(), 1)
        body = message[png : png + 33] + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
        path = tmp_path / NAME
        path.write_bytes(with_picture(message, body))
        if not fits:
            with pytest.raises(ValueError, match=r"1 of 24500000 values .* such as -0.5"):
                Mrms().read(RemoteFile(str(path), None))
            continue
        values = Mrms().read(RemoteFile(str(path), None)).values
        assert np.isnan(values[7, 5])
        assert np.isnan(values).sum() == 1
        assert values[0, 0] == np.float32(0.1)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_picture(message: bytes, png: bytes) -> bytes:
    """The message with another field."""
    start = section(message, 7)
    body = message[:start] + struct.pack(">IB", 5 + len(png), 7) + png + b"7777"
    return changed(body, 8, struct.pack(">Q", len(body)))


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "text": (lambda m: b"<html>Not found</html>", "not a GRIB file"),
    "nothing": (lambda m: b"", "not a GRIB file"),
    "edition 1": (lambda m: changed(m, 7, b"\1"), "edition 2"),
    "cut": (lambda m: m[:-1000], "cut or damaged"),
    "longer": (lambda m: m + b"7777", "cut or damaged"),
    "two messages": (lambda m: m + m, "cut or damaged"),
    "no trailer": (lambda m: m[:-4] + b"0000", "ends in 7777"),
    "another product": (lambda m: changed(m, section(m, 4) + 10, b"\0"), r"holds the product \(209, 6, 0\)"),
    "another grid": (lambda m: changed(m, section(m, 3) + 50, b"\1"), "another grid"),
    "a bitmap": (lambda m: changed(m, section(m, 6) + 5, b"\0"), "without a bitmap"),
    "another packing": (lambda m: changed(m, section(m, 5) + 10, b"\0"), "packed otherwise"),
    "another scale": (lambda m: changed(m, section(m, 5) + 18, b"\2"), r"steps of 0.1 mm h-1"),
    "another reference": (lambda m: changed(m, section(m, 5) + 11, b"\xc2"), r"steps of 0.1 mm h-1"),
    "a forecast": (lambda m: changed(m, section(m, 4) + 21, b"\5"), "a forecast"),
    "another height": (lambda m: changed(m, section(m, 4) + 27, b"\1"), "another height than 0 m"),
    "month 13": (lambda m: changed(m, section(m, 1) + 14, b"\x0d"), "month must be in"),
    "section of length 0": (lambda m: changed(m, section(m, 5), b"\0\0\0\0"), "one MRMS field"),
    "a section twice": (lambda m: changed(m, section(m, 6) + 4, b"\5"), "one MRMS field"),
    "a bit of the field": (lambda m: changed(m, len(m) // 2, bytes([m[len(m) // 2] ^ 1])), "PNG is damaged"),
    "a larger picture": (lambda m: changed(m, section(m, 7) + 5 + 16, b"\1"), "not a grey PNG"),
    "half a gzip file": (lambda m: gzip.compress(m, 1)[:-20], "ends too early"),
    "a damaged gzip file": (lambda m: changed(gzip.compress(m, 1), 500, b"\0" * 20), "damaged gzip"),
    "a gzip bomb": (lambda m: gzip.compress(bytes(65 * 2**20), 9), "grows to more than"),
}


@pytest.mark.data
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_with_its_name_and_a_reason(damage, message, tmp_path, capfd):
    spoil, reason = DAMAGE[damage]
    path = tmp_path / NAME
    path.write_bytes(spoil(message))
    with pytest.raises(ValueError, match=rf"^{NAME}: .*({reason})"):
        Mrms().read(RemoteFile(str(path), None))


@pytest.mark.data
@settings(max_examples=20)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), head=st.booleans())
def test_no_flipped_bit_changes_a_value_place_or_time_in_silence(
    share, bit, head, message, frame_of_it, tmp_path_factory
):
    place = int(share * 170) if head else int(share * len(message))
    path = tmp_path_factory.mktemp("flip") / NAME
    path.write_bytes(changed(message, place, bytes([message[place] ^ 1 << bit])))
    try:
        frame = Mrms().read(RemoteFile(str(path), None))
    except ValueError as error:
        assert str(error).startswith(NAME)
        return
    assert np.array_equal(frame.values, frame_of_it.values, equal_nan=True)
    if frame.valid_time != frame_of_it.valid_time:  # what `decode` compares with the name
        assert section(message, 1) + 12 <= place < section(message, 1) + 19


@pytest.mark.data
def test_another_time_than_the_names_is_refused(message, tmp_path):
    (tmp_path / NAME).write_bytes(changed(message, section(message, 1) + 16, b"\1"))
    (file,) = Mrms(str(tmp_path)).files(None, None)
    with pytest.raises(
        ValueError, match=rf"{NAME}: .*valid at 2019-06-10T01:02.* name says 2019-06-10T00:02"
    ):
        decode(Mrms(str(tmp_path)), file)


@pytest.mark.data
def test_another_mrms_product_is_refused(flags):
    with pytest.raises(
        ValueError, match=r"PrecipFlag.*holds the product \(209, 6, 0\), expected \(209, 6, 1\).*PrecipRate"
    ):
        Mrms().read(RemoteFile(str(flags), None))


@pytest.mark.data
def test_a_value_that_is_no_class_is_refused(flags, tmp_path):
    message = gzip.decompress(flags.read_bytes())
    rows = np.full((3500, 1 + 7000), 3, np.uint8)  # class 0: counted from -3
    rows[:, 0] = 0  # the filter of a row
    png = section(message, 7) + 5
    for count, value in ((2, -1), (4, 1), (5, 2)):
        rows[9, 8] = count
        body = (
            message[png : png + 33] + chunk(b"IDAT", zlib.compress(rows.tobytes(), 1)) + chunk(b"IEND", b"")
        )
        path = tmp_path / "flags"
        path.write_bytes(with_picture(message, body))
        if value == 2:
            with pytest.raises(ValueError, match="1 of 24500000 values of precipitation_flag are no class"):
                Mrms(product="PrecipFlag").read(RemoteFile(str(path), None))
            continue
        values = Mrms(product="PrecipFlag").read(RemoteFile(str(path), None)).values
        assert np.isnan(values[9, 7]) if value == -1 else values[9, 7] == value
        assert np.count_nonzero(values != 0) == 1  # true where NaN


def test_a_product_that_is_not_registered_is_refused():
    with pytest.raises(
        ValueError, match=r"source\.product=Rain: expected one of PrecipRate, PrecipFlag, Refl"
    ):
        Mrms(product="Rain")


def test_files_are_found_in_subfolders_by_both_names_in_order_of_time(tmp_path):
    names = [
        "b/MRMS_PrecipRate_00.00_20190610-000400.grib2.gz",
        "a/2019/PrecipRate_00.00_20190610-000000.grib2",
        "c/PrecipRate_00.00_20190609-235800.grib2.gz",
        "a/PrecipFlag_00.00_20190610-000000.grib2",
        "a/PrecipRate_00.00_20190610-000000.grib2.idx",
        "a/readme.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    source = Mrms(str(tmp_path))
    found = [str(Path(file.url).relative_to(tmp_path)) for file in source.files(None, None)]
    assert found == [names[2], names[1], names[0]]
    midnight = datetime(2019, 6, 10, tzinfo=UTC)
    assert [file.valid_time for file in source.files(midnight, midnight)] == [midnight]
    flags = Mrms(str(tmp_path), "PrecipFlag").files(None, None)
    assert [Path(file.url).name for file in flags] == ["PrecipFlag_00.00_20190610-000000.grib2"]


@pytest.mark.data
def test_the_real_folder_has_a_frame_every_two_minutes(data):
    times = [file.valid_time for file in Mrms(str(data / "mrms")).files(None, None)]
    assert len(times) == 23
    assert {later - sooner for sooner, later in pairwise(times)} == {
        Mrms().read(RemoteFile(str(data / "mrms/2019/06/10" / NAME), None)).cadence
    }


def test_a_folder_without_such_files_says_what_names_it_looked_for(tmp_path):
    (tmp_path / "radar.h5").touch()
    with pytest.raises(
        ValueError, match=rf"{tmp_path}: no files of MRMS .* PrecipRate_00.00_20190610-004000.grib2"
    ):
        list(Mrms(str(tmp_path)).files(None, None))
    with pytest.raises(ValueError, match="no such folder"):
        list(Mrms(str(tmp_path / "nowhere")).files(None, None))
