"""FMI composites: real ones read as other readers read them, small ones that the tests write, damaged ones refused."""

import dataclasses
import gzip
import re
import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pyproj import Proj, Transformer

import cli
from pipelines.grid import Grid
from pipelines.sources.fmi import SUOMI1, Fmi
from pipelines.sources.source import RemoteFile

# The projection as FORMATS.md and pysteps write it.
SPHERE = Proj(
    "+proj=stere +lat_0=90 +lon_0=25 +lat_ts=60 +a=6371288 +x_0=380886.310 +y_0=3395677.920 +no_defs"
)
PGM_NAME = "201705091045_fmi.radar.composite.lowest_FIN_SUOMI1.pgm"
TIFF_NAME = "201705091045_FINUTM.tif"
TIME = datetime(2017, 5, 9, 10, 45, tzinfo=UTC)
# 0: no echo, 1..63: echoes below 0 dBZ, 64: 0 dBZ, 128: 32 dBZ, 255: not observed
COUNTS = np.array([[0, 1, 64, 128], [255, 63, 100, 0], [255, 255, 140, 90]], np.uint8)
SMALL = Grid(SUOMI1.crs, 400_500.0, 1000.0, 4, 300_500.0, -1000.0, 3)
SMALL_UTM = Grid("EPSG:3067", 400_125.0, 250.0, 4, 7_000_125.0, -250.0, 3)


def configured(name: str, **changes: object) -> Any:
    """The source that a config file describes."""
    return instantiate(yaml.safe_load((cli.CONFIGS / f"source/{name}.yaml").read_text()) | changes)


def pgm(counts: np.ndarray, grid: Grid, obstime: str = "201705091045") -> bytes:
    """A PGM as FMI writes it."""
    west, north = grid.x_first - grid.x_step / 2, grid.y_first - grid.y_step / 2
    east, south = west + grid.x_size * grid.x_step, north + grid.y_size * grid.y_step
    corners = [SPHERE(x, y, inverse=True) for x, y in ((west, south), (east, north))]
    (west_lon, south_lat), (east_lon, north_lat) = corners
    lines = [
        "P5",
        "# composite_area FIN",
        "# projection_name SUOMI1",
        "# radar KOR 1 21.6460 60.1280",
        f"# obstime {obstime}",
        "# producttype CAPPI",
        "# productname LOWEST",
        "# param CorrectedReflectivity",
        f"# metersperpixel_x {grid.x_step}",
        f"# metersperpixel_y {-grid.y_step}",
        "# projection radar {",
        "# type stereographic",
        "# centrallongitude 25",
        "# centrallatitude 90",
        "# truelatitude 60",
        f"# bottomleft {west_lon:.7f} {south_lat:.7f}",
        f"# topright {east_lon:.7f} {north_lat:.7f}",
        "# }",
        f"{counts.shape[1]} {counts.shape[0]}",
        "255",
    ]
    return "\n".join(lines).encode() + b"\n" + counts.tobytes()


def items(**changes: str) -> str:
    told = {
        "Observation time": "201705091045",
        "Quantity": "Corrected reflectivity",
        "Gain": "0.500000",
        "Offset": "-32.000000",
        "Nodata": "255",
        "Undetect": "0",
    } | changes
    lines = [f'<Item name="{key}" unit="dBZ">{value}</Item>' for key, value in told.items()]
    return "\n".join(["<GDALMetadata>", *lines, "</GDALMetadata>"])


def geotiff(path: Path, counts: np.ndarray = COUNTS, told: str | None = None, **changes: Any) -> Path:
    """A GeoTIFF as FMI writes it."""
    west, north = SMALL_UTM.x_first - 125, SMALL_UTM.y_first + 125
    profile = {
        "driver": "GTiff",
        "height": counts.shape[0],
        "width": counts.shape[1],
        "count": 1,
        "dtype": counts.dtype,
        "crs": "EPSG:3067",
        "transform": rasterio.Affine(250, 0, west, 0, -250, north),
        "compress": "deflate",
        "tiled": True,
        "blockxsize": 16,
        "blockysize": 16,
    } | changes
    with rasterio.open(path, "w", **profile) as file:
        if told != "":
            file.update_tags(GDAL_METADATA=told or items())
        file.write(counts, 1)
    return path


def rates(counts: np.ndarray, a: float = 223, b: float = 1.53) -> np.ndarray:
    """Count by count, in float64."""

    def rate(count: int) -> float:
        if count == 255:
            return np.nan
        return 0.0 if count == 0 else (10 ** ((count - 64) / 20) / a) ** (1 / b)

    return np.vectorize(rate, otypes=[float])(counts)


def read_pgm(path: Path, message: bytes, **changes: Any):
    path.write_bytes(message)
    return Fmi(grid=SMALL, **changes).read(RemoteFile(str(path), None))


def read_geotiff(path: Path):
    source = dataclasses.replace(configured("fmi_geotiff", path=""), grid=SMALL_UTM)
    return source.read(RemoteFile(str(path), None))


@pytest.mark.data
def test_every_real_pgm_reads_as_pysteps_reads_it(data):
    from pysteps.io.importers import import_fmi_pgm

    source = configured("fmi", path=str(data / "fmi" / "pgm"), quantity="reflectivity")
    files = list(source.files(None, None))
    assert len(files) == 40
    assert {later.valid_time - sooner.valid_time for sooner, later in pairwise(files)} == {
        timedelta(minutes=5)
    }
    for file in files:
        frame = source.read(file)
        dbz, _, told = import_fmi_pgm(file.url, gzipped=True)
        assert frame.valid_time == file.valid_time
        assert np.array_equal(frame.values, dbz.astype(np.float32), equal_nan=True)
    assert (told["xpixelsize"], told["ypixelsize"]) == (frame.grid.x_step, -frame.grid.y_step)
    corners = frame.grid.x[[0, -1]], frame.grid.y[[-1, 0]]
    half = frame.grid.x_step / 2, -frame.grid.y_step / 2
    assert corners[0] == pytest.approx([told["x1"] + half[0], told["x2"] - half[0]], abs=0.5)
    assert corners[1] == pytest.approx([told["y1"] + half[1], told["y2"] - half[1]], abs=0.5)


@pytest.mark.data
def test_real_rain_is_the_z_r_of_the_real_reflectivity(data):
    path = data / "fmi" / "pgm" / "20170509" / f"{PGM_NAME}.gz"
    message = gzip.decompress(path.read_bytes())
    counts = np.frombuffer(message[-1226 * 760 :], np.uint8).reshape(1226, 760)
    for z_r in ([223, 1.53], [100, 2.0]):
        frame = configured("fmi", path="", z_r=z_r).read(RemoteFile(str(path), None))
        assert frame.variable.units == "mm h-1"
        np.testing.assert_allclose(frame.values, rates(counts, *z_r), rtol=1e-6)
    assert np.isnan(frame.values).mean() == pytest.approx(1 - 0.757, abs=1e-3)  # MANIFEST.md


@pytest.mark.data
def test_the_corner_cells_of_the_pgm_are_those_that_formats_md_gives(data):
    lon, lat = SUOMI1.lonlat()
    for row, column, x_edge, y_edge in ((0, 0, 0, 1225544), (1225, 759, 759752, 0)):
        x = x_edge + (999.674 / 2 if column == 0 else -999.674 / 2)
        y = y_edge + (999.629 / 2 if row == 1225 else -999.629 / 2)
        expected = SPHERE(x, y, inverse=True)
        assert np.subtract((lon[row, column], lat[row, column]), expected) == pytest.approx([0, 0], abs=9e-6)


@pytest.mark.data
def test_real_geotiffs_read_as_pillow_reads_them_and_lie_where_their_header_says(data):
    source = configured("fmi_geotiff", path=str(data / "fmi" / "geotiff"), quantity="reflectivity")
    files = list(source.files(None, None))
    assert len(files) == 4
    frame = source.read(files[0])
    with Image.open(files[0].url, formats=["TIFF"]) as picture:
        counts = np.asarray(picture)
        scale, tie = picture.tag_v2[33550], picture.tag_v2[33922]  # ModelPixelScale, ModelTiepoint
    assert frame.valid_time == files[0].valid_time == TIME
    assert np.array_equal(np.isnan(frame.values), counts == 255)
    seen = counts != 255
    assert np.array_equal(frame.values[seen], (counts[seen] * np.float32(0.5)) - np.float32(32))
    assert frame.grid.x[[0, -1]] == pytest.approx(tie[3] + scale[0] * np.array([0.5, 4962.5]), abs=1e-3)
    assert frame.grid.y[[0, -1]] == pytest.approx(tie[4] - scale[1] * np.array([0.5, 7315.5]), abs=1e-3)
    # 27 E, the central meridian of EPSG:3067, is at 500 km
    assert Transformer.from_crs(frame.grid.crs, "EPSG:4326", always_xy=True).transform(500_000, 7e6)[0] == 27


@pytest.mark.data
def test_the_geotiff_shows_the_scene_of_the_pgm_where_the_pgm_does(data):
    pgm_source = configured("fmi", path=str(data / "fmi" / "pgm"), quantity="reflectivity")
    tiff_source = configured("fmi_geotiff", path=str(data / "fmi" / "geotiff"), quantity="reflectivity")
    coarse = pgm_source.read(next(pgm_source.files(TIME, TIME)))
    fine = tiff_source.read(next(tiff_source.files(TIME, TIME)))
    rows, columns = fine.grid.cells(*coarse.grid.lonlat())
    rows, columns = np.rint(rows).astype(int), np.rint(columns).astype(int)
    inside = (rows >= 0) & (columns >= 0) & (rows < 7316) & (columns < 4963)
    here, there = coarse.values[inside], fine.values[rows[inside], columns[inside]]
    both = np.isfinite(here) & np.isfinite(there)
    assert (here[both] == there[both]).mean() > 0.8
    assert np.corrcoef(here[both], there[both])[0, 1] > 0.94
    shifted = fine.values[rows[inside] + 8, columns[inside] - 8]  # 2 km away it is not the same
    both &= np.isfinite(shifted)
    assert np.corrcoef(here[both], shifted[both])[0, 1] < np.corrcoef(here[both], there[both])[0, 1] - 0.05


def test_a_count_is_half_a_dbz_and_0_is_dry_and_255_is_missing(tmp_path):
    frame = read_pgm(tmp_path / PGM_NAME, pgm(COUNTS, SMALL))
    np.testing.assert_allclose(frame.values, rates(COUNTS), rtol=1e-6)
    assert frame.values[0, 0] == 0
    assert frame.valid_time == TIME
    assert (frame.variable.name, frame.cadence) == ("rainfall_rate", timedelta(minutes=5))
    dbz = read_pgm(tmp_path / PGM_NAME, pgm(COUNTS, SMALL), quantity="reflectivity")
    assert dbz.values[0].tolist() == [-32, -31.5, 0, 32]
    assert dbz.variable.units == "dBZ"


def test_a_geotiff_is_read_as_the_pgm_of_the_same_counts(tmp_path):
    values = read_pgm(tmp_path / PGM_NAME, pgm(COUNTS, SMALL)).values
    frame = read_geotiff(geotiff(tmp_path / TIFF_NAME))
    assert np.array_equal(frame.values, values, equal_nan=True)
    assert frame.valid_time == TIME
    assert frame.grid == SMALL_UTM


def test_a_zipped_pgm_is_the_same_frame_of_another_file(tmp_path):
    plain = read_pgm(tmp_path / PGM_NAME, pgm(COUNTS, SMALL))
    zipped = read_pgm(tmp_path / f"{PGM_NAME}.gz", gzip.compress(pgm(COUNTS, SMALL)))
    assert np.array_equal(plain.values, zipped.values, equal_nan=True)
    assert plain.sha256 != zipped.sha256


@settings(max_examples=20)
@given(seen=arrays(np.uint8, SMALL.shape, elements=st.integers(0, 200)), missing=arrays(bool, SMALL.shape))
def test_what_is_not_observed_and_only_that_is_nan(seen, missing, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fmi")
    counts = np.where(missing, np.uint8(255), seen)
    for frame in (
        read_pgm(folder / PGM_NAME, pgm(counts, SMALL)),
        read_geotiff(geotiff(folder / TIFF_NAME, counts)),
    ):
        assert np.array_equal(np.isnan(frame.values), missing)
        assert np.array_equal(frame.values == 0, (seen == 0) & ~missing)


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def spoil(message: bytes) -> bytes:
        assert message.count(old) == 1
        return message.replace(old, new)

    return spoil


PGM_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "text": (lambda m: b"<html>Not found</html>", "neither a PGM"),
    "nothing": (lambda m: b"", "neither a PGM"),
    "no metadata": (lambda m: b"P5\n4 3\n255\n" + COUNTS.tobytes(), "not an 8-bit PGM with comment lines"),
    "16 bits": (replaced(b"\n255\n", b"\n65535\n"), "not an 8-bit PGM"),
    "cut": (lambda m: m[:-1], "11 bytes of a picture that has 12"),
    "longer": (lambda m: m + b"\0", "13 bytes of a picture that has 12"),
    "cut in its header": (lambda m: m[:200], "not an 8-bit PGM"),
    "another size": (replaced(b"\n4 3\n", b"\n3 4\n"), "a picture of 4 x 3 cells, expected 3 x 4"),
    "a huge size": (replaced(b"\n4 3\n", b"\n99999 99999\n"), "a picture of 99999 x 99999 cells"),
    "another product": (replaced(b"LOWEST", b"ECHOTOP"), r"does not say \['productname LOWEST'\]"),
    "another quantity": (replaced(b"CorrectedReflectivity", b"Velocity"), "does not say .*param"),
    "another projection": (replaced(b"stereographic", b"mercator"), "does not say .*type"),
    "another meridian": (replaced(b"# centrallongitude 25", b"# centrallongitude 24"), "does not say"),
    "another corner": (replaced(b"# topright 2", b"# topright 3"), "m off the registered grid"),
    "a corner that is no number": (
        replaced(b"# topright 2", b"# topright x"),
        "topright='x.*expected numbers",
    ),
    "a corner in infinity": (
        lambda m: re.sub(rb"# topright [^\n]*", b"# topright inf 65", m),
        "topright='inf 65', expected numbers",
    ),
    "no corner": (replaced(b"# bottomleft", b"# bottom"), "bottomleft=None, expected numbers"),
    "another cell": (replaced(b"metersperpixel_x 1000.0", b"metersperpixel_x 1001.0"), "4.0 m off"),
    "another time": (replaced(b"201705091045", b"201705091050"), "not the time in its name"),
    "no time": (replaced(b"obstime 201705091045", b"obstime yesterday"), "the time 'yesterday'"),
    "half a gzip file": (lambda m: gzip.compress(m)[:-20], "ends too early"),
    "a damaged gzip file": (lambda m: gzip.compress(m)[:60] + gzip.compress(m)[61:], "damaged gzip"),
    "a gzip bomb": (lambda m: gzip.compress(bytes(10**6), 9), "grows to more than"),
    "too many bytes": (lambda m: m + bytes(10**6), "larger than"),
    "rain of 47 m an hour": (lambda m: m[:-1] + b"\xfe", "outside 0..2000 mm h-1"),
}


@pytest.mark.parametrize("damage", PGM_DAMAGE)
def test_a_damaged_pgm_is_refused_with_its_name_and_a_reason(damage, tmp_path):
    spoil, reason = PGM_DAMAGE[damage]
    with pytest.raises(ValueError, match=rf"^{PGM_NAME}: .*({reason})"):
        read_pgm(tmp_path / PGM_NAME, spoil(pgm(COUNTS, SMALL)))


TIFF_DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "another system": ({"crs": "EPSG:32634"}, "m off the registered grid"),
    "no system": ({"crs": None}, "no coordinate system"),
    "another place": ({"transform": rasterio.Affine(250, 0, 400_002, 0, -250, 7_000_250)}, "2.0 m off"),
    "another cell": ({"transform": rasterio.Affine(251, 0, 400_000, 0, -250, 7_000_250)}, "4.0 m off"),
    "turned": ({"transform": rasterio.Affine(250, 1, 400_000, 0, -250, 7_000_250)}, "3.0 m off"),
    "another size": ({"counts": np.zeros((4, 3), np.uint8)}, r"4 x 3 cells, expected one of uint8 and 3 x 4"),
    "more bits": ({"counts": np.zeros((3, 4), np.uint16)}, r"bands of \('uint16',\)"),
    "two bands": ({"count": 2}, r"bands of \('uint8', 'uint8'\)"),
    "single bits": ({"nbits": 1, "counts": COUNTS % 2}, "cells packed as .*NBITS"),
    "differences": ({"predictor": 2}, "cells packed as .*PREDICTOR"),
    "another packing": ({"compress": "packbits"}, "cells packed as .*PACKBITS"),
    "another quantity": ({"told": items(Quantity="Velocity")}, "does not say .*Corrected reflectivity"),
    "no quantity": ({"told": ""}, "does not say"),
    "another gain": ({"told": items(Gain="0.4")}, "Gain=0.4, expected 0.5"),
    "another offset": ({"told": items(Offset="-30")}, "Offset=-30, expected -32"),
    "another missing value": ({"told": items(Nodata="0")}, "Nodata=0, expected 255"),
    "a gain that is no number": ({"told": items(Gain="half")}, "Gain='half', expected numbers"),
    "another time": ({"told": items(**{"Observation time": "201705091050"})}, "not the time in its name"),
    "no time": ({"told": items(**{"Observation time": ""})}, "the time ''"),
    "absent blocks": ({"sparse_ok": True, "counts": np.zeros((3, 4), np.uint8)}, "absent or repeated tiles"),
}


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("damage", TIFF_DAMAGE)
def test_another_geotiff_is_refused_with_its_name_and_a_reason(damage, tmp_path):
    changes, reason = TIFF_DAMAGE[damage]
    with pytest.raises(ValueError, match=rf"^{TIFF_NAME}: .*({reason})"):
        read_geotiff(geotiff(tmp_path / TIFF_NAME, **changes))


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_geotiff_cut_anywhere_is_refused(tmp_path):
    path = geotiff(tmp_path / TIFF_NAME)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"^{TIFF_NAME}: "):
            read_geotiff(path)


def test_a_tile_that_is_damaged_or_said_to_be_shorter_is_refused(tmp_path):
    path = geotiff(tmp_path / TIFF_NAME)
    with rasterio.open(path, driver="GTiff") as file:
        offset, size = (
            int(file.get_tag_item(f"BLOCK_{what}_0_0", "TIFF", bidx=1)) for what in ("OFFSET", "SIZE")
        )
    whole = path.read_bytes()
    said = whole.index(struct.pack("<HHII", 325, 4, 1, size)) + 8  # TileByteCounts
    for place, damage in (
        (offset + size - 4, b"\0\0\0\0"),  # its checksum
        (offset + 5, bytes([whole[offset + 5] ^ 8])),
        (said, struct.pack("<I", size - 4)),
        (said, struct.pack("<I", 0)),
    ):
        path.write_bytes(whole[:place] + damage + whole[place + len(damage) :])
        with pytest.raises(ValueError, match=r"(damaged tile|absent)"):
            read_geotiff(path)


@pytest.mark.data
def test_a_flipped_bit_in_the_directory_of_a_real_geotiff_moves_and_changes_nothing(data, tmp_path):
    source = configured("fmi_geotiff", path="")
    real = next((data / "fmi" / "geotiff").rglob(TIFF_NAME))
    message, frame = real.read_bytes(), source.read(RemoteFile(str(real), None))
    spots = [*range(8, 234, 23), 27, 29, 101, 2600, 4875, 5585, 5610, 5660, 5720]  # of the first directory
    for number, place in enumerate(spots):
        flipped = message[place] ^ 1 << number % 8
        (tmp_path / TIFF_NAME).write_bytes(message[:place] + bytes([flipped]) + message[place + 1 :])
        try:
            again = source.read(RemoteFile(str(tmp_path / TIFF_NAME), None))
        except ValueError:
            continue
        assert again.valid_time == frame.valid_time
        assert np.array_equal(again.values, frame.values, equal_nan=True)


def test_a_vrt_under_the_name_of_a_tiff_reads_no_other_file(tmp_path):
    canary = tmp_path / "canary.raw"
    canary.write_bytes(bytes(range(100, 112)))
    vrt = f"""<VRTDataset rasterXSize="4" rasterYSize="3"><SRS>EPSG:3067</SRS>
      <GeoTransform>400000, 250, 0, 7000250, 0, -250</GeoTransform>
      <VRTRasterBand dataType="Byte" band="1" subClass="VRTRawRasterBand">
      <SourceFilename>{canary}</SourceFilename><PixelOffset>1</PixelOffset><LineOffset>4</LineOffset>
      </VRTRasterBand></VRTDataset>"""
    path = tmp_path / TIFF_NAME
    path.write_text(vrt)
    with rasterio.open(path, sharing=False) as opened:  # what a naive reader gets
        assert opened.driver == "VRT"
    with pytest.raises(ValueError, match="neither a PGM"):
        read_geotiff(path)
    path.write_bytes(b"II*\0" + vrt.encode())
    with pytest.raises(ValueError, match="GDAL cannot read"):
        read_geotiff(path)


def test_files_beside_a_geotiff_change_nothing(tmp_path):
    path = geotiff(tmp_path / TIFF_NAME)
    before = read_geotiff(path)
    (tmp_path / f"{TIFF_NAME}.aux.xml").write_text(
        '<PAMDataset><Metadata><MDI key="GDAL_METADATA">&lt;Item name="Observation time"&gt;199901010000&lt;/Item&gt;'
        "</MDI></Metadata><GeoTransform>0, 1, 0, 0, 0, -1</GeoTransform></PAMDataset>"
    )
    (tmp_path / "201705091045_FINUTM.tfw").write_text("1\n0\n0\n-1\n0\n0\n")
    after = read_geotiff(path)
    assert (after.valid_time, after.grid) == (before.valid_time, before.grid)
    assert np.array_equal(after.values, before.values, equal_nan=True)


def test_only_files_of_the_product_are_found_in_order_of_time(tmp_path):
    names = [
        "b/201705091050_fmi.radar.composite.lowest_FIN_SUOMI1.pgm.gz",
        "a/201705091045_fmi.radar.composite.lowest_FIN_SUOMI1.pgm",
        "a/201705091045_fmi.radar.composite.dbz_FIN_SUOMI1.pgm",
        "a/201713091045_fmi.radar.composite.lowest_FIN_SUOMI1.pgm.gz",
        "a/201705091045_FINUTM.tif",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(Path(file.url).relative_to(tmp_path)) for file in Fmi(str(tmp_path)).files(None, None)]
    assert found == [names[1], names[0]]
    found = list(configured("fmi_geotiff", path=str(tmp_path)).files(None, None))
    assert [(Path(file.url).name, file.valid_time) for file in found] == [(TIFF_NAME, TIME)]


def test_what_cannot_be_meant_is_refused_at_once():
    with pytest.raises(ValueError, match="quantity=rain: expected one of rainfall_rate, reflectivity"):
        Fmi(quantity="rain")
    with pytest.raises(ValueError, match=r"z_r=\[223\]: expected a and b"):
        Fmi(z_r=[223])


def test_a_bomb_in_a_geotiff_is_refused_by_its_size_before_it_is_unpacked(tmp_path):
    path = geotiff(
        tmp_path / TIFF_NAME, np.zeros((20_000, 20_000), np.uint8), blockxsize=2000, blockysize=2000
    )
    assert path.stat().st_size < 500_000
    with pytest.raises(ValueError, match=r"(larger than|20000 x 20000 cells)"):
        read_geotiff(path)
