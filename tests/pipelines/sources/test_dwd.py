"""RADOLAN and RADVOR files: real ones read as wradlib reads them, written ones to the bit, damaged ones refused."""

import bz2
import gzip
import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cf import PRECIPITATION_AMOUNT_1H, PRECIPITATION_AMOUNT_24H, RAINFALL_RATE, REFLECTIVITY
from pipelines.decode import decode
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.dwd import DE1200, NATIONAL, NATIONAL_WGS84, Radolan, RadolanAscii, RadvorAnalysis
from pipelines.sources.source import RemoteFile

TIME = datetime(2014, 8, 10, 20, 50, tzinfo=UTC)
NAME = "raa01-ry_10000-1408102050-dwd---bin"
RUN = "DE1200_RV2210180700"
RUN_TIME = datetime(2022, 10, 18, 7, tzinfo=UTC)
DAY = "RW-20221018.tar.gz"
NO_DATA = 0x29C4

# wradlib's view of every binary composite, and of the three grids; row 0 south as it gives them
WRADLIB = """
import glob, io, sys, tarfile
import numpy as np
from wradlib.georef import create_crs, get_radolan_coordinates
from wradlib.io import read_radolan_composite

data, out = sys.argv[1:]
fields = {}
for path in glob.glob(data + "/radolan_binary/*") + glob.glob(data + "/ry_20200101/*"):
    fields[path.rsplit("/", 1)[1]] = read_radolan_composite(path)[0]
(run,) = glob.glob(data + "/radvor_rv/*")
with tarfile.open(run) as archive:
    member = archive.extractfile("DE1200_RV2210180700_000")
    fields[run.rsplit("/", 1)[1]] = read_radolan_composite(io.BytesIO(member.read()))[0]
for name, earth, shape in (("NATIONAL", "sphere", (900, 900)), ("NATIONAL_WGS84", "wgs84", (900, 900)),
                           ("DE1200", "wgs84", (1200, 1100))):
    crs = create_crs("dwd-radolan-" + earth)
    x, y = get_radolan_coordinates(*shape, crs=crs, mode="center")
    fields[name] = np.array([x[0], x[-1], y[-1], y[0]])
np.savez(out, **fields)
"""


@pytest.fixture(scope="module")
def wradlib(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("wradlib") / "fields.npz"
    subprocess.run([sys.executable, "-W", "ignore", "-c", WRADLIB, str(data / "dwd"), str(out)], check=True)
    with np.load(out) as fields:
        return dict(fields)


def read(source: Radolan | RadvorAnalysis, path: Path) -> Frame:
    return source.read(RemoteFile(str(path), None))


def composite(
    counts: np.ndarray,
    product: str = "RY",
    precision: str = " E-02",
    interval: str = "   5",
    version: int = 3,
    lead: str = "",
    lists: str = "MS  9<boo,ros>",
    time: str = "102050100000814",
    shape: tuple[int, int] | None = None,
) -> bytes:
    """A composite of counts (y, x), row 0 north, as DWD writes it."""
    rows, columns = shape or counts.shape
    rest = f"VS {version}SW   2.13.1PR{precision}INT{interval}GP{rows:4}x{columns:4}{lead and f'VV {lead}'}{lists}"
    digits = 10 if version == 5 else 7
    size = len(product) + len(time) + 2 + digits + len(rest) + 1 + counts.nbytes
    return f"{product}{time}BY{size:{digits}}{rest}\x03".encode() + counts[::-1].tobytes()


def dry(shape: tuple[int, int] = (900, 900)) -> np.ndarray:
    return np.zeros(shape, "<u2")


def packed_tar(members: dict[str, bytes | str], mode: str = "w:bz2", copies: int = 1) -> bytes:
    """An archive; text instead of bytes is a link to that."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode=mode) as tar:
        for name, body in [*members.items()] * copies:
            member = tarfile.TarInfo(name)
            if isinstance(body, str):
                member.type, member.linkname = tarfile.SYMTYPE, body
                tar.addfile(member)
            else:
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    return archive.getvalue()


# Real files against other readers


@pytest.mark.data
def test_every_real_composite_reads_as_wradlib_reads_it(data, wradlib):
    expected = {
        "RX": (1, REFLECTIVITY, timedelta(minutes=5), lambda raw: raw / 2 - 32.5),
        "RY": (14, RAINFALL_RATE, timedelta(minutes=5), lambda mm: mm * 12),
        "RZ": (1, RAINFALL_RATE, timedelta(minutes=5), lambda mm: mm * 12),
        "RW": (1, PRECIPITATION_AMOUNT_1H, timedelta(hours=1), lambda mm: mm),
        "SF": (1, PRECIPITATION_AMOUNT_24H, timedelta(hours=1), lambda mm: mm),
    }
    sources = {name: Radolan(str(data / "dwd"), name) for name in expected}
    expected["RV"] = (1, RAINFALL_RATE, timedelta(minutes=5), lambda mm: mm * 12)
    sources["RV"] = RadvorAnalysis(str(data / "dwd"))
    for name, source in sources.items():
        count, variable, cadence, convert = expected[name]
        files = list(source.files(None, None))
        assert len(files) == count
        for file in files:
            frame, theirs = source.read(file), wradlib[Path(file.url).name][::-1]
            assert (frame.variable, frame.cadence, frame.valid_time) == (variable, cadence, file.valid_time)
            assert np.array_equal(np.isnan(frame.values), theirs == -9999)
            seen = theirs != -9999
            assert np.abs(frame.values[seen] - convert(theirs[seen])).max() < 3e-5  # of up to 435: float32
            assert seen.mean() > 0.5


def ascii_grids(data: Path) -> dict[str, bytes]:
    with tarfile.open(data / "dwd" / "radolan_asc" / DAY) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


@pytest.mark.data
def test_every_ascii_grid_reads_as_numpy_reads_it(data):
    grids = ascii_grids(data)
    source = RadolanAscii(str(data / "dwd"))
    files = list(source.files(None, None))
    assert len(files) == len(grids) == 24
    for file in files:
        text = grids[f"RW_{file.valid_time:%Y%m%d-%H%M}.asc"]
        tenths = np.loadtxt(io.BytesIO(text), skiprows=6)
        frame = source.read(file)
        assert np.array_equal(np.isnan(frame.values), tenths == -1)
        assert np.array_equal(frame.values[tenths >= 0], (tenths[tenths >= 0] / 10).astype(np.float32))
        assert (frame.valid_time, frame.grid) == (file.valid_time, NATIONAL)


# Where the cells lie


def corners(grid: Grid) -> np.ndarray:
    """West, east, north and south centres."""
    return np.array([grid.x[0], grid.x[-1], grid.y[0], grid.y[-1]])


@pytest.mark.data
def test_the_grids_are_wradlibs_to_a_millimetre(wradlib):
    for name, grid in (("NATIONAL", NATIONAL), ("NATIONAL_WGS84", NATIONAL_WGS84), ("DE1200", DE1200)):
        assert np.abs(corners(grid) - wradlib[name]).max() < 1e-3


def test_the_national_grid_follows_the_formulas_of_the_format_description():
    lon, lat = NATIONAL.lonlat()
    latitude, longitude = np.radians(lat[::100, ::100]), np.radians(lon[::100, ::100] - 10)
    stretch = 6370040 * (1 + np.sin(np.radians(60))) / (1 + np.sin(latitude)) * np.cos(latitude)
    x, y = np.meshgrid(NATIONAL.x[::100], NATIONAL.y[::100])
    assert np.abs(stretch * np.sin(longitude) - x).max() < 0.01
    assert np.abs(-stretch * np.cos(longitude) - y).max() < 0.01


def test_the_corner_of_the_national_grid_is_the_published_one():
    row, column = NATIONAL.cells([3.5889, 15.7208], [46.9526, 54.7405])  # DWD gives 4 decimals: 5 m
    assert row == pytest.approx([899.5, -0.5], abs=0.01)
    assert column == pytest.approx([-0.5, 899.5], abs=0.01)


def test_the_corners_of_the_1100_x_1200_grid_are_the_published_ones():
    lon, lat = (
        [1.463301510, 18.73161645, 16.58086935, 3.566994635],
        [55.86208711, 55.84543856, 45.68460578, 45.69642538],
    )
    row, column = DE1200.cells(lon, lat)
    assert row == pytest.approx([-0.5, -0.5, 1199.5, 1199.5], abs=1e-4)  # 0.1 m
    assert column == pytest.approx([-0.5, 1099.5, 1099.5, -0.5], abs=1e-4)


@pytest.mark.data
def test_an_ascii_grid_lies_where_gdal_puts_it(data, tmp_path):
    path = tmp_path / "RW.asc"
    path.write_bytes(ascii_grids(data)["RW_20221018-0050.asc"])
    with rasterio.open(path, driver="AAIGrid") as dataset:
        west, north = dataset.xy(0, 0)
        east, south = dataset.xy(899, 899)
    assert np.abs(corners(NATIONAL) - [west, east, north, south]).max() < 0.5  # corners rounded to metres


# What the counts mean


@pytest.mark.parametrize(
    ("product", "precision", "interval", "variable", "unit"),
    [
        ("RY", " E-02", "   5", RAINFALL_RATE, 0.12),
        ("RZ", " E-02", "   5", RAINFALL_RATE, 0.12),
        ("RW", " E-01", "  60", PRECIPITATION_AMOUNT_1H, 0.1),
        ("SF", " E-01", "1440", PRECIPITATION_AMOUNT_24H, 0.1),
    ],
)
def test_every_bit_of_a_two_byte_count_is_read(product, precision, interval, variable, unit, tmp_path):
    counts = dry()
    counts[0, :7] = [0, 1, 4095, NO_DATA, 0x8000 | 70, 0x1000 | 70, 0x1000 | NO_DATA]
    path = tmp_path / "x"
    path.write_bytes(composite(counts, product, precision, interval))
    frame = read(Radolan(product=product), path)
    expected = np.array([0, 1, 4095, np.nan, np.nan, 70, np.nan]) * unit
    assert np.array_equal(frame.values[0, :7], expected.astype(np.float32), equal_nan=True)
    assert not frame.values[1:].any()
    assert (frame.variable, frame.valid_time, frame.grid) == (variable, TIME, NATIONAL)


def test_every_value_of_a_one_byte_count_is_read(tmp_path):
    counts = np.zeros((900, 900), np.uint8)
    counts[0, :251] = np.arange(251)
    path = tmp_path / "x"
    path.write_bytes(composite(counts, "RX", " E+00"))
    values = read(Radolan(product="RX"), path).values
    assert np.array_equal(values[0, :249], np.arange(249, dtype=np.float32) / 2 - 32.5)
    assert np.isnan(values[0, 249:251]).all()  # clutter, no data
    assert (values[1:] == -32.5).all()


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_exactly_what_has_no_data_is_not_observed(seed, share, tmp_path_factory):
    draw = np.random.default_rng(seed)
    counts = draw.integers(0, 4096, (900, 900)).astype("<u2")
    hidden = draw.random(counts.shape) < share
    path = tmp_path_factory.mktemp("mask") / "x"
    path.write_bytes(composite(np.where(hidden, NO_DATA, counts).astype("<u2")))
    values = read(Radolan(), path).values
    assert np.array_equal(np.isnan(values), hidden)
    assert np.array_equal(values[~hidden], (counts[~hidden] * 0.12).astype(np.float32))


def test_row_0_is_north(tmp_path):
    counts = dry()
    counts[0, 899] = 50
    path = tmp_path / "x"
    path.write_bytes(composite(counts))
    assert path.read_bytes()[-2:] == b"\x32\0"  # the last count of the file: the file begins in the south
    values = read(Radolan(), path).values
    assert np.argwhere(values > 0).tolist() == [[0, 899]]


def test_the_format_version_tells_the_shape_of_the_earth(tmp_path):
    path = tmp_path / "x"
    for version, shape, grid in (
        (3, (900, 900), NATIONAL),
        (5, (900, 900), NATIONAL_WGS84),
        (5, (1200, 1100), DE1200),
    ):
        path.write_bytes(composite(dry(shape), version=version))
        assert read(Radolan(), path).grid == grid


def test_headers_of_other_software_read_alike(tmp_path):
    path = tmp_path / "x"
    lists = "VV 000MF 00000008QN 016MS  9<boo,ros>ST 16<boo 24,ros 24> "
    path.write_bytes(composite(dry() + np.uint16(2), lists=lists, interval="   5U0"))
    assert (read(Radolan(), path).values == np.float32(0.24)).all()


def test_a_zipped_composite_is_the_same_frame_from_another_file(tmp_path):
    plain, zipped = tmp_path / NAME, tmp_path / f"{NAME}.gz"
    plain.write_bytes(composite(dry() + np.uint16(3)))
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    ours, again = read(Radolan(), plain), read(Radolan(), zipped)
    assert np.array_equal(ours.values, again.values)
    assert ours.sha256 != again.sha256


# Damage


def damaged(message: bytes, old: bytes, new: bytes) -> bytes:
    assert message.count(old) == 1
    return message.replace(old, new)


def with_count(value: int) -> bytes:
    counts = dry()
    counts[5, 7] = value
    return composite(counts)


DAMAGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: b"<html>Not found</html>", "not a RADOLAN composite"),
    "nothing": (lambda: b"", "not a RADOLAN composite"),
    "no end of the header": (lambda: composite(dry()).replace(b"\x03", b" "), "not a RADOLAN composite"),
    "a longer header": (lambda: composite(dry(), lists=f"MS999<{'x' * 997}>"), "not a RADOLAN composite"),
    "cut": (lambda: composite(dry())[:-1000], "cut or damaged"),
    "longer": (lambda: composite(dry()) + b"\0", "cut or damaged"),
    "fewer rows than it says": (lambda: composite(dry((899, 900)), shape=(900, 900)), "cut or damaged"),
    "another length": (lambda: damaged(composite(dry()), b"BY1620", b"BY1621"), "cut or damaged"),
    "another product": (lambda: composite(dry(), "RZ"), "holds the product RZ, expected RY"),
    "another precision": (lambda: composite(dry(), precision=" E-01"), "precision E-01 over 5 minutes"),
    "another interval": (lambda: composite(dry(), interval="  60"), "over 60 minutes"),
    "an interval in days": (lambda: damaged(composite(dry()), b"INT   5", b"INT   5U1"), "over 7200 minutes"),
    "another size": (lambda: composite(dry((460, 460))), "another grid"),
    "another format version": (lambda: composite(dry(), version=4), "another grid"),
    "another earth": (lambda: composite(dry((1200, 1100)), version=3), "another grid"),
    "a declared giant": (lambda: composite(dry(), shape=(9999, 9999)), "another grid"),
    "a forecast": (lambda: composite(dry(), lead="005"), "a forecast of 5 minutes"),
    "a damaged list": (lambda: composite(dry(), lists="MS 10<boo,ros>"), "says it has 10"),
    "a single radar": (lambda: composite(dry(), time="102050101320814"), "not a RADOLAN composite"),
    "month 13": (lambda: composite(dry(), time="102050100001314"), "month must be in"),
    "a negative amount": (lambda: with_count(0x4001), "1 of 810000 cells hold codes"),
    "no data that is no code": (lambda: with_count(0x2001), "1 of 810000 cells hold codes"),
    "half a gzip file": (lambda: gzip.compress(composite(dry()))[:-20], "ends too early"),
    "a gzip bomb": (lambda: gzip.compress(bytes(2**24), 9), "grows to more than"),
    "a giant": (lambda: bytes(2**23), "larger than"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_composite_is_refused_with_its_name_and_a_reason(damage, tmp_path):
    spoil, reason = DAMAGE[damage]
    path = tmp_path / NAME
    path.write_bytes(spoil())
    with pytest.raises(ValueError, match=rf"^{NAME}: .*{reason}"):
        read(Radolan(), path)


def test_a_reflectivity_of_no_meaning_is_refused(tmp_path):
    counts = np.full((900, 900), 251, np.uint8)
    path = tmp_path / "x"
    path.write_bytes(composite(counts, "RX", " E+00"))
    with pytest.raises(ValueError, match="810000 of 810000 cells hold codes that no file of RX does"):
        read(Radolan(product="RX"), path)


@settings(max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_header_moves_or_rescales_a_field(share, bit, tmp_path_factory):
    message = bytearray(composite(dry() + np.uint16(5)))
    place = int(share * (message.index(b"\x03") + 1))
    message[place] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / NAME
    path.write_bytes(message)
    try:
        frame = read(Radolan(), path)
    except ValueError as error:
        assert str(error).startswith(NAME)
        return
    assert frame.grid == NATIONAL
    assert (frame.values == np.float32(0.6)).all()
    if frame.valid_time != TIME:  # what `decode` compares with the name
        assert 2 <= place < 17


def test_another_time_than_the_names_is_refused(tmp_path):
    path = tmp_path / NAME
    path.write_bytes(composite(dry(), time="102055100000814"))
    (file,) = Radolan(str(tmp_path)).files(None, None)
    with pytest.raises(
        ValueError, match=rf"{NAME}: .*valid at 2014-08-10T20:55.* name says 2014-08-10T20:50"
    ):
        decode(Radolan(str(tmp_path)), file)


# The archives of RADVOR


def analysis(value: int = 0, lead: str = "000", time: str = "180700100001022") -> bytes:
    counts = dry((1200, 1100))
    counts[0, 0] = value
    return composite(counts, "RV", version=5, lead=lead, time=time)


RUNS: dict[str, tuple[Callable[[], bytes], str]] = {
    "no archive": (lambda: analysis(), "not a tar archive"),
    "only forecasts": (
        lambda: packed_tar({f"{RUN}_005": analysis(lead="005")}),
        "no analysis .* only 1 forecasts",
    ),
    "a forecast as the analysis": (
        lambda: packed_tar({f"{RUN}_000": analysis(lead="005")}),
        "a forecast of 5 minutes",
    ),
    "another run": (
        lambda: packed_tar({"DE1200_RV2210180705_000": analysis()}),
        "DE1200_RV2210180705_000' in it",
    ),
    "a path": (lambda: packed_tar({f"{RUN}_000": analysis(), "../../etc/passwd": b"x"}), "etc/passwd' in it"),
    "a link": (lambda: packed_tar({f"{RUN}_000": "/etc/passwd"}), "expected plain files"),
    "two of a name": (lambda: packed_tar({f"{RUN}_000": analysis()}, copies=2), "two files of one name"),
    "many files": (lambda: packed_tar({f"{RUN}_{i:03}": b"" for i in range(26)}), "more than 25 files"),
    "a large file": (lambda: packed_tar({f"{RUN}_000": bytes(5 * 2**20)}), "a file of 5242880 bytes"),
    "cut before packing": (
        lambda: bz2.compress(bz2.decompress(packed_tar({f"{RUN}_000": analysis()}))[: 2**20], 1),
        "a tar archive, or a damaged one|without its end",
    ),
    "something behind its end": (
        lambda: bz2.compress(bz2.decompress(packed_tar({f"{RUN}_000": analysis()})) + b"x", 1),
        "without its end",
    ),
    "cut": (lambda: packed_tar({f"{RUN}_000": analysis()})[:-10], "ends too early"),
    "longer": (lambda: packed_tar({f"{RUN}_000": analysis()}) + b"x", "more bytes behind its end"),
    "a damaged block": (
        lambda: damaged(packed_tar({f"{RUN}_000": analysis()}), b"BZh91AY", b"BZh91AZ"),
        "a damaged bzip2 file",
    ),
    "a bzip2 bomb": (lambda: bz2.compress(bytes(130 * 2**20)), "grows to more than"),
}


@pytest.mark.parametrize("damage", RUNS)
def test_a_damaged_run_is_refused_with_its_name_and_a_reason(damage, tmp_path):
    spoil, reason = RUNS[damage]
    path = tmp_path / f"{RUN}.tar.bz2"
    path.write_bytes(spoil())
    with pytest.raises(ValueError, match=rf"^{RUN}\.tar\.bz2: .*{reason}"):
        read(RadvorAnalysis(), path)


def test_of_a_run_only_the_analysis_is_an_observation(tmp_path):
    path = tmp_path / f"{RUN}.tar.bz2"
    path.write_bytes(
        packed_tar(
            {f"{RUN}_005": analysis(9, "005"), f"{RUN}_000": analysis(3), f"{RUN}_010": analysis(9, "010")}
        )
    )
    (file,) = RadvorAnalysis(str(tmp_path)).files(None, None)
    frame = RadvorAnalysis().read(file)
    assert file.valid_time == frame.valid_time == RUN_TIME
    assert (frame.values[0, 0], frame.values.max()) == (np.float32(0.36), np.float32(0.36))


@pytest.mark.data
def test_the_forecasts_of_a_real_run_are_not_listed(data):
    (file,) = RadvorAnalysis(str(data / "dwd")).files(None, None)
    assert file.valid_time == RUN_TIME


# The archives of ascii grids

ASCII_HEAD = b"ncols         900\nnrows         900\nxllcorner     -523462\nyllcorner     -4658645\ncellsize      1000\nNODATA_value  -1\n"
ROW = b"0 " * 899 + b"0 \n"


def ascii_grid(first: bytes = b"0", head: bytes = ASCII_HEAD, rows: int = 900) -> bytes:
    return head + first + ROW[1:] + ROW * (rows - 1)


def hour(body: bytes, name: str = "RW_20221018-0050.asc") -> bytes:
    return packed_tar({name: body}, "w:gz")


ASCII: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: b"<html>Not found</html>", "not a tar archive"),
    "empty": (lambda: packed_tar({}, "w:gz"), "expected hours such as"),
    "another day": (lambda: hour(ascii_grid(), "RW_20221019-0050.asc"), "RW_20221019-0050.asc' in it"),
    "no hour": (lambda: hour(ascii_grid(), "RW_20221018-2550.asc"), "expected hours such as"),
    "a path": (lambda: hour(ascii_grid(), "/tmp/RW_20221018-0050.asc"), "in it"),
    "another place": (
        lambda: hour(ascii_grid(head=ASCII_HEAD.replace(b"-523462", b"-523461"))),
        "another header",
    ),
    "another size": (lambda: hour(ascii_grid(head=ASCII_HEAD.replace(b"900", b"901"))), "another header"),
    "another no data": (
        lambda: hour(ascii_grid(head=ASCII_HEAD.replace(b"  -1", b"  -9"))),
        "another header",
    ),
    "no header": (lambda: hour(ascii_grid(head=b"")), "another header"),
    "cut": (lambda: hour(ascii_grid(rows=899)), "809100 numbers in 899 lines"),
    "a number less": (lambda: hour(ascii_grid(b" ")), "809999 numbers in 900 lines"),
    "letters": (lambda: hour(ascii_grid(b"nan")), "other signs"),
    "no number": (lambda: hour(ascii_grid(b"--1")), "cannot be read"),
    "a negative sum": (lambda: hour(ascii_grid(b"-2")), "outside 0..500"),
    "an impossible sum": (lambda: hour(ascii_grid(b"99999")), "outside 0..500"),
    "an endless number": (lambda: hour(ascii_grid(b"9" * 40)), "outside 0..500"),
    "half a gzip file": (lambda: hour(ascii_grid())[:-20], "ends too early"),
}


@pytest.mark.parametrize("damage", ASCII)
def test_a_damaged_archive_of_ascii_grids_is_refused_with_its_name_and_a_reason(damage, tmp_path):
    spoil, reason = ASCII[damage]
    path = tmp_path / DAY
    path.write_bytes(spoil())
    files = list(RadolanAscii(str(tmp_path)).files(None, None))
    assert len(files) == 1
    with pytest.raises(ValueError, match=rf"^{DAY}: .*{reason}"):
        RadolanAscii().read(files[0])


def test_an_hour_that_is_not_in_the_archive_is_refused(tmp_path):
    (tmp_path / DAY).write_bytes(hour(ascii_grid()))
    for time in (None, RUN_TIME):
        with pytest.raises(ValueError, match=re.escape(f"{DAY}: holds no hour that ends at {time}")):
            RadolanAscii().read(RemoteFile(str(tmp_path / DAY), time))


def test_an_ascii_grid_has_its_north_first_and_keeps_missing_from_dry(tmp_path):
    (tmp_path / DAY).write_bytes(hour(ascii_grid(b"-1") + b""))
    (file,) = RadolanAscii(str(tmp_path)).files(None, None)
    values = RadolanAscii().read(file).values
    assert file.valid_time == datetime(2022, 10, 18, 0, 50, tzinfo=UTC)
    assert np.argwhere(np.isnan(values)).tolist() == [[0, 0]]
    assert not values[np.isfinite(values)].any()


def test_hours_come_by_time_over_archives_and_a_damaged_archive_comes_last(tmp_path):
    for day, names in (("20221019", ("0050", "0150")), ("20221018", ("2350", "2250"))):
        members = {f"RW_{day}-{name}.asc": b"" for name in names}
        (tmp_path / f"RW-{day}.tar.gz").write_bytes(packed_tar(members, "w:gz"))
    (tmp_path / "RW-20221020.tar.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "RW-20221017.tar.gz").write_bytes(b"\x1f\x8b")
    source = RadolanAscii(str(tmp_path))
    hours = [
        datetime(2022, 10, 18, 22, 50, tzinfo=UTC),
        datetime(2022, 10, 18, 23, 50, tzinfo=UTC),
        datetime(2022, 10, 19, 0, 50, tzinfo=UTC),
        datetime(2022, 10, 19, 1, 50, tzinfo=UTC),
    ]
    assert [file.valid_time for file in source.files(None, None)] == [*hours, None, None]
    assert [file.valid_time for file in source.files(hours[1], hours[2])] == hours[1:3]


# Finding files


def test_files_are_found_in_subfolders_by_product_in_order_of_time(tmp_path):
    names = [
        "b/raa01-ry_10000-1408102055-dwd---bin.gz",
        f"a/2014/{NAME}",
        "a/raa01-rx_10000-1408102050-dwd---bin.gz",
        "a/raa01-ry_10000-latest-dwd---bin.gz",
        "a/raa01-ry_10000-1413102050-dwd---bin.gz",
        "a/readme.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    source = Radolan(str(tmp_path))
    assert [Path(file.url).name for file in source.files(None, None)] == [NAME, Path(names[0]).name]
    assert [file.valid_time for file in source.files(TIME, TIME)] == [TIME]
    assert [Path(file.url).name for file in Radolan(str(tmp_path), "RX").files(None, None)] == [
        Path(names[2]).name
    ]


@pytest.mark.parametrize("source", [Radolan, RadolanAscii, RadvorAnalysis])
def test_a_folder_without_such_files_says_what_names_it_looked_for(source, tmp_path):
    (tmp_path / "radar.h5").touch()
    with pytest.raises(ValueError, match=r"no files of .* looked for names such as (raa01-ry|RW-|DE1200_RV)"):
        list(source(str(tmp_path)).files(None, None))
    with pytest.raises(ValueError, match="no such folder"):
        list(source(str(tmp_path / "nowhere")).files(None, None))


def test_a_product_that_is_not_registered_is_refused():
    with pytest.raises(ValueError, match=r"source.product=RV: expected one of RX, RY, RZ, RW, SF"):
        Radolan(product="RV")
