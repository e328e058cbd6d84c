"""X-band pictures: real ones turned and scaled as other tools do it, small ones that the tests write, damaged ones refused."""

import struct
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pyproj import Transformer
from scipy import ndimage

import cli
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile
from pipelines.sources.xband import CAGLIARI, XBand, _turned

OLD, NEW = "2018-05-01_23:00:04.png", "2019-05-01_23:00:04.png"  # before and after the pictures were turned
SIDE = 8
SMALL = Grid("EPSG:3003", 1_500_030.0, 60.0, SIDE, 4_300_000.0, -60.0, SIDE)


def png(grey: np.ndarray, alpha: np.ndarray, *between: bytes) -> bytes:
    """A PNG as the service writes it: grey and alpha, no filter."""
    height, width = grey.shape
    rows = np.zeros((height, 1 + 2 * width), np.uint8)
    rows[:, 1::2], rows[:, 2::2] = grey, alpha
    header = struct.pack(">IIBBBBB", width, height, 8, 4, 0, 0, 0)
    zipped = zlib.compress(rows.tobytes())
    parts = [chunk(b"IHDR", header), *between]
    parts += [chunk(b"IDAT", zipped[:20]), chunk(b"IDAT", zipped[20:]), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def storm() -> tuple[np.ndarray, np.ndarray]:
    """Grey and alpha: an echo in two cells right of the middle, the rest without."""
    grey, alpha = np.zeros((SIDE, SIDE), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
    grey[3, 5], grey[4, 5] = 100, 0
    alpha[3, 5] = alpha[4, 5] = 255
    grey[0, 3] = 99  # grey without alpha is no echo
    return grey, alpha


def read(path: Path, message: bytes, **changes: object):
    path.write_bytes(message)
    return XBand(grid=SMALL, **{"reach": 240.0, **changes}).read(RemoteFile(str(path), None))


def rain(grey: float) -> float:
    """mm/h, in float64."""
    return (10 ** ((0.39216 * grey - 8.6) / 10) / 100) ** (1 / 1.5)


@pytest.fixture(scope="module")
def source(data: Path) -> XBand:
    config = yaml.safe_load((cli.CONFIGS / "source/xband.yaml").read_text())
    return instantiate(config | {"path": str(data / "xband_cagliari")}, _convert_="all")


@pytest.fixture(scope="module")
def pictures(data: Path) -> list[Path]:
    return sorted((data / "xband_cagliari").glob("*.png"))


def as_gdal_and_scipy_see_it(path: Path) -> np.ndarray:
    """The rain rate (mm/h): read by GDAL, turned by scipy, with NaN wherever there is no echo."""
    with rasterio.open(path, driver="PNG") as file:
        grey, alpha = (ndimage.rotate(band, 54, reshape=False, order=0) for band in file.read())
    rates = np.vectorize(rain)(np.arange(256))[grey]
    return np.where(alpha == 255, rates, np.nan)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_real_pictures_read_as_gdal_and_scipy_read_them(pictures, source):
    check_pictures(pictures[::20], source)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_all_real_pictures_read_as_gdal_and_scipy_read_them(pictures, source):
    check_pictures(pictures, source)


def check_pictures(paths: list[Path], source: XBand) -> None:
    y, x = np.indices((1024, 1024)) - 511.5
    disc = (np.hypot(x, y) * 60 <= 30_744).astype(np.uint8)
    within = ndimage.rotate(disc, 54, reshape=False, order=0) == 1
    for path in paths:
        frame, other = source.read(RemoteFile(str(path), None)), as_gdal_and_scipy_see_it(path)
        echo = ~np.isnan(other)
        np.testing.assert_allclose(frame.values[echo], other[echo], rtol=3e-6)
        assert (frame.values[~echo & within] == 0).all()
        assert np.array_equal(np.isnan(frame.values), ~within)


@pytest.mark.data
def test_no_echo_of_the_real_pictures_lies_beyond_the_reach_and_some_lie_at_it(pictures):
    y, x = np.indices((1024, 1024)) - 511.5
    seen = np.zeros((1024, 1024), bool)
    for path in pictures:
        with Image.open(path) as picture:
            seen |= np.asarray(picture)[..., 1] == 255
    farthest = 60 * np.hypot(x, y)[seen].max()
    assert farthest == pytest.approx(30_741.35, abs=0.01)
    assert XBand().reach - 5 < farthest < XBand().reach


@pytest.mark.parametrize("size, degrees", [(1024, 54), (1024, 0), (64, 54), (65, 90), (65, -17.3)])
def test_a_turn_takes_the_cells_that_scipy_takes(size, degrees):
    cells = np.arange(size * size, dtype=np.int32).reshape(size, size)
    turned = ndimage.rotate(cells, degrees, reshape=False, order=0, cval=-1)
    assert np.array_equal(_turned(size, float(degrees)), turned)


@pytest.mark.data
def test_the_grid_is_that_of_the_real_footprint(data):
    with rasterio.open(data / "xband_cagliari" / "radarfootprint.tif", driver="GTiff") as file:
        assert file.crs.to_epsg() == 3003
        assert file.shape == CAGLIARI.shape
        assert file.xy(0, 0) == (CAGLIARI.x[0], CAGLIARI.y[0])
        assert file.xy(1023, 1023) == (CAGLIARI.x[-1], CAGLIARI.y[-1])
    lon, lat = CAGLIARI.lonlat()
    expected = Transformer.from_crs("EPSG:3003", "EPSG:4326", always_xy=True).transform(1_478_729, 4_372_885)
    assert (lon[0, 0], lat[0, 0]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.data
def test_the_real_footprint_holds_a_picture_that_stands_as_those_before_the_turn(data, pictures):
    """So it does not confirm by how much they are to be turned: something shades the beam in the west of both."""
    y, x = np.indices((1024, 1024)) - 511.5
    near = (np.hypot(x, y) * 60 > 2000) & (np.hypot(x, y) * 60 < 10_000)
    towards = (np.degrees(np.arctan2(x, -y)) % 360).astype(int)[near]

    def shares(echoes: np.ndarray) -> np.ndarray:
        """How often there is an echo, by degree, less the mean of the 31 degrees round it."""
        by_degree = np.bincount(towards, echoes[near], 360) / np.bincount(towards, minlength=360)
        return by_degree - ndimage.uniform_filter1d(by_degree, 31, mode="wrap")

    with rasterio.open(data / "xband_cagliari" / "radarfootprint.tif", driver="GTiff") as file:
        footprint = shares(file.read(2) == 255)
    raw = np.zeros((1024, 1024))
    for path in pictures[::6]:
        with Image.open(path) as picture:
            raw += np.asarray(picture)[..., 1] == 255
    alike = [np.corrcoef(shares(raw / 10), np.roll(footprint, turn))[0, 1] for turn in range(360)]
    assert np.argmax(alike) == 0
    assert alike[0] > 0.5
    assert max(alike[54], alike[-54]) < 0.2
    assert {footprint.argmin(), shares(raw).argmin()} <= {273, 274, 275}  # degrees


@pytest.mark.data
def test_the_real_pictures_have_a_minute_each(source):
    files = list(source.files(None, None))
    assert len(files) == 60
    assert {later.valid_time - sooner.valid_time for sooner, later in pairwise(files)} == {
        timedelta(minutes=1)
    }
    assert files[0].valid_time == datetime(2018, 5, 1, 23, 0, tzinfo=UTC)
    assert source.read(files[0]).valid_time == files[0].valid_time


def test_grey_is_reflectivity_and_no_echo_is_dry_within_reach_and_missing_beyond(tmp_path):
    frame = read(tmp_path / NEW, png(*storm()))
    assert frame.values[3, 5] == pytest.approx(rain(100), rel=1e-6)
    assert frame.values[4, 5] == pytest.approx(rain(0), rel=1e-6)
    assert frame.values[3, 5] == pytest.approx((10 ** (30.616 / 10) / 100) ** (1 / 1.5), rel=1e-5)
    assert frame.values[0, 3] == 0
    assert np.isnan(frame.values[0, 0])  # 297 m from the middle
    assert np.isnan(frame.values).sum() == 4 * 3
    assert (frame.values == 0).sum() == SIDE**2 - 12 - 2
    assert frame.variable.units == "mm h-1"
    other = read(tmp_path / NEW, png(*storm()), z_r=[200, 1.6])
    assert other.values[3, 5] == pytest.approx((10 ** (30.616 / 10) / 200) ** (1 / 1.6), rel=1e-5)


def test_only_pictures_from_before_the_change_are_turned_anticlockwise(tmp_path):
    straight = read(tmp_path / NEW, png(*storm()), turn=90.0)
    turned = read(tmp_path / OLD, png(*storm()), turn=90.0)
    assert np.array_equal(turned.values, np.rot90(straight.values), equal_nan=True)
    assert turned.values[2, 3] == straight.values[3, 5]
    for name, same in (("2018-12-21_17:30:00.png", straight), ("2018-12-21_17:29:59.png", turned)):
        frame = read(tmp_path / name, png(*storm()), turn=90.0)
        assert np.array_equal(frame.values, same.values, equal_nan=True)


@settings(max_examples=30)
@given(
    grey=arrays(np.uint8, (SIDE, SIDE), elements=st.integers(0, 190)),
    alpha=arrays(np.uint8, (SIDE, SIDE), elements=st.sampled_from([0, 128, 254, 255])),
)
def test_cells_beyond_the_reach_and_only_those_are_nan(grey, alpha, tmp_path_factory):
    y, x = np.indices((SIDE, SIDE)) - (SIDE - 1) / 2
    beyond = 60 * np.hypot(x, y) > 240
    alpha[beyond] = 0
    frame = read(tmp_path_factory.mktemp("xband") / NEW, png(grey, alpha))
    assert np.array_equal(np.isnan(frame.values), beyond)
    assert np.array_equal(frame.values > 0, alpha == 255)


@pytest.mark.parametrize(
    "name, time",
    [
        ("2018-05-01_23:00:04.png", "23:00"),
        ("2018-05-01_23:00:29.png", "23:00"),
        ("2018-05-01_22:59:30.png", "23:00"),
        ("2018-05-01_22:59:29.png", "22:59"),
    ],
)
def test_the_valid_time_is_that_in_the_name_rounded_to_the_minute(name, time):
    hour, minute = map(int, time.split(":"))
    assert XBand().valid_time(name) == datetime(2018, 5, 1, hour, minute, tzinfo=UTC)


def test_of_two_pictures_of_one_minute_the_earlier_comes_first(tmp_path):
    names = ["2018-05-01_23:00:29.png", "2018-05-01_22:59:31.png", "2018-05-01_23:01:02.png", "notes.png"]
    for name in names:
        (tmp_path / name).touch()
    found = list(XBand(str(tmp_path)).files(None, None))
    assert [Path(file.url).name for file in found] == [names[1], names[0], names[2]]
    assert found[0].valid_time == found[1].valid_time


def test_another_radar_needs_arguments_only(tmp_path):
    source = XBand(
        str(tmp_path), name=r"radar(\d{12})\.png", time="%Y%m%d%H%M", grid=SMALL, reach=240.0, cadence=5.0
    )
    (tmp_path / "radar201901020304.png").write_bytes(png(*storm()))
    (file,) = source.files(None, None)
    frame = source.read(file)
    assert frame.valid_time == datetime(2019, 1, 2, 3, 5, tzinfo=UTC)
    assert frame.cadence == timedelta(minutes=5)


def without(message: bytes, kind: bytes, number: int = 0) -> bytes:
    """A PNG without one of its chunks."""
    place = -1
    for _ in range(number + 1):
        place = message.index(kind, place + 1)
    length = int.from_bytes(message[place - 4 : place])
    return message[: place - 4] + message[place + 8 + length :]


def with_rows(data: bytes) -> Callable[[bytes], bytes]:
    """Other rows under the same header."""
    return lambda m: m[:33] + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def everywhere(message: bytes) -> bytes:
    return png(storm()[0], np.full((SIDE, SIDE), 255, np.uint8))


ROWS = bytes(SIDE * (1 + 2 * SIDE))
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "text": (lambda m: b"<html>Not found</html>", "not a PNG: begins"),
    "nothing": (lambda m: b"", "not a PNG: begins"),
    "only the signature": (lambda m: m[:8], "not a PNG of 8 x 8"),
    "cut": (lambda m: m[:-3], "cut or whose checksum"),
    "cut before the end": (lambda m: m[:-12], "not a PNG of 8 x 8"),
    "longer": (lambda m: m + b"\0", "cut or whose checksum"),
    "more behind the end": (lambda m: m + chunk(b"IDAT", b"\0"), "not a PNG of 8 x 8"),
    "a flipped bit": (lambda m: m[:60] + bytes([m[60] ^ 1]) + m[61:], "checksum does not fit"),
    "a chunk of 4 GB": (lambda m: m[:8] + b"\xff\xff\xff\xff" + m[12:], "cut or whose checksum"),
    "another size": (lambda m: png(*(band[:, :7] for band in storm())), "not a PNG of 8 x 8"),
    "a huge size": (
        lambda m: m[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 10**6, 10**6, 8, 4, 0, 0, 0)) + m[33:],
        "not a PNG of 8 x 8",
    ),
    "no alpha": (
        lambda m: m[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)) + m[33:],
        "of grey and of alpha",
    ),
    "interlaced": (
        lambda m: m[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 4, 0, 0, 1)) + m[33:],
        "not a PNG of 8 x 8",
    ),
    "no rows": (lambda m: without(without(m, b"IDAT"), b"IDAT"), "not a PNG of 8 x 8"),
    "its first half missing": (lambda m: without(m, b"IDAT"), "damaged PNG"),
    "its second half missing": (lambda m: without(m, b"IDAT", 1), "fewer or more rows"),
    "half of the rows": (with_rows(zlib.compress(ROWS[: len(ROWS) // 2])), "fewer or more rows"),
    "twice the rows": (with_rows(zlib.compress(ROWS * 2)), "fewer or more rows"),
    "a bomb": (with_rows(zlib.compress(bytes(10**7), 9)), "fewer or more rows"),
    "more behind the rows": (with_rows(zlib.compress(ROWS) + b"\0"), "fewer or more rows"),
    "an unknown filter": (with_rows(zlib.compress(b"\x09" + ROWS[1:])), "damaged PNG"),
    "echoes beyond the reach": (everywhere, "12 echoes beyond the 0.24 km that this radar reaches"),
    "too many bytes": (lambda m: m + bytes(9 * 2**20), "larger than"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_with_its_name_and_a_reason(damage, tmp_path):
    spoil, reason = DAMAGE[damage]
    with pytest.raises(ValueError, match=rf"^{NEW}: .*({reason})"):
        read(tmp_path / NEW, spoil(png(*storm())))


def test_a_file_without_a_time_in_its_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^radar.png: no time in its name"):
        read(tmp_path / "radar.png", png(*storm()))


def test_what_else_stands_in_a_png_changes_nothing(tmp_path):
    plain = read(tmp_path / NEW, png(*storm()))
    more = [
        chunk(b"tEXt", b"Comment\0by hand"),
        chunk(b"gAMA", struct.pack(">I", 1)),
        chunk(b"acTL", b"\0\0\0\2" * 2),
    ]
    other = read(tmp_path / NEW, png(*storm(), *more))
    assert np.array_equal(plain.values, other.values, equal_nan=True)


@pytest.mark.data
def test_a_real_picture_cut_or_flipped_anywhere_is_refused(pictures, source, tmp_path):
    whole, path = pictures[0].read_bytes(), tmp_path / OLD
    for number, place in enumerate(range(0, len(whole), 4003)):
        flipped = bytes([whole[place] ^ 1 << number % 8])
        for message in (whole[:place], whole[:place] + flipped + whole[place + 1 :]):
            path.write_bytes(message)
            with pytest.raises(ValueError, match=rf"^{OLD}: "):
                source.read(RemoteFile(str(path), None))


def test_what_cannot_be_meant_is_refused_at_once():
    with pytest.raises(ValueError, match="expected as many columns as rows"):
        XBand(grid=Grid("EPSG:3003", 0.0, 60.0, 3, 0.0, -60.0, 4))
    with pytest.raises(ValueError, match=r"z_r=\[0, 1.5\]"):
        XBand(z_r=[0, 1.5])
