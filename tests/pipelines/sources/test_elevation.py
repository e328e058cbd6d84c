"""Heights of the ground: real files read as other tools read them, and damaged ones refused."""

import gzip
import struct
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Geod
from rasterio.transform import Affine

from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.sources.elevation import Etopo, Gtopo, Srtm
from pipelines.sources.source import RemoteFile, Source

LATER = datetime(2020, 6, 1, tzinfo=UTC)
TILE = 1201


def only_frame(source: Source) -> Frame:
    """The field of a source that has one, which it has at any time."""
    (file,) = source.files(LATER, LATER)
    assert file.valid_time == ALWAYS
    frame = source.read(file)
    assert (frame.valid_time, frame.cadence, frame.group) == (ALWAYS, None, "static")
    assert (frame.variable.name, frame.variable.units) == ("elevation", "m")
    return frame


def corners(grid: Grid) -> tuple[Any, Any]:
    """Longitude and latitude of the centres of the four corner cells."""
    lon, lat = grid.lonlat()
    return lon[[0, 0, -1, -1], [0, -1, 0, -1]], lat[[0, 0, -1, -1], [0, -1, 0, -1]]


def metres_off(grid: Grid, lon: list[float], lat: list[float]) -> float:
    """The largest distance of the corner cells' centres from these places."""
    _, _, off = Geod(ellps="WGS84").inv(*corners(grid), lon, lat)
    return float(max(off))


# ETOPO


@pytest.fixture(scope="module")
def etopo(data: Path) -> Path:
    return data / "dem" / "etopo20"


@pytest.mark.data
def test_etopo_reads_as_numpy_reads_its_texts_turned_to_a_west_to_east_grid(etopo):
    frame = only_frame(Etopo(str(etopo), sea_floor=True))
    heights, lats, lons = (np.loadtxt(etopo / f"etopo20{name}.gz") for name in ("data", "lats", "lons"))
    assert frame.values.shape == (540, 1080)
    for row, column in np.random.default_rng(1).integers(0, (540, 1080), (300, 2)):
        y = np.abs(lats - frame.grid.y[row]).argmin()
        x = np.abs((lons - frame.grid.x[column] + 180) % 360 - 180).argmin()
        assert frame.values[row, column] == np.float32(heights[y, x])
    assert np.array_equal(
        np.sort(frame.values, axis=None), np.sort(heights[:, :-1].astype(np.float32), axis=None)
    )
    west, east, north, south = -180 + 1 / 6, 180 - 1 / 6, 90 - 1 / 6, -90 + 1 / 6
    assert metres_off(frame.grid, [west, east, west, east], [north, north, south, south]) < 1
    assert (
        frame.values[np.abs(frame.grid.y - 27.99).argmin(), np.abs(frame.grid.x - 86.93).argmin()] > 4000
    )  # Everest
    assert (
        frame.values[np.abs(frame.grid.y - 20).argmin(), np.abs(frame.grid.x + 150).argmin()] < -4000
    )  # Pacific


@pytest.mark.data
def test_the_sea_is_zero_unless_its_floor_is_asked_for(etopo):
    frame, floor = only_frame(Etopo(str(etopo))), only_frame(Etopo(str(etopo), sea_floor=True))
    assert np.array_equal(frame.values, np.maximum(floor.values, 0))
    assert 0.6 < (frame.values == 0).mean() < 0.8


def etopo_copy(etopo: Path, folder: Path, **changes: Callable[[bytes], bytes]) -> Path:
    """The three files with some of them changed, unzipped in between."""
    for name in ("data", "lats", "lons"):
        text = gzip.decompress((etopo / f"etopo20{name}.gz").read_bytes())
        changed = changes.get(name, lambda text: text)(text)
        (folder / f"etopo20{name}.gz").write_bytes(gzip.compress(changed, 1))
    return folder


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("data", lambda text: text[:-2000], "540 x 1081 numbers"),
        ("data", lambda text: text.replace(b" ", b"\n", 1), "540 x 1081 numbers"),
        ("data", lambda text: b"nan" + text[24:], "neither heights"),
        ("data", lambda text: b"3.8" + text[3:], "does not repeat the first"),
        ("data", lambda text: b"x" + text[1:], "could not convert"),
        ("data", lambda text: text[:24] + b" 9e44 " + text[50:], "neither heights"),
        ("data", lambda text: text[:24] + b" 9500 " + text[50:], "outside -12000..9000 m"),
        ("data", lambda text: bytes(2**25 + 1), "grows to more than"),
        ("lats", lambda text: text.replace(b"8.98", b"8.97", 1), "etopo20lats.gz holds other coordinates"),
        ("lons", lambda text: text[:-26], "1 x 1081 numbers"),
    ],
)
def test_a_damaged_etopo_file_is_refused_with_its_name_and_a_reason(name, change, reason, etopo, tmp_path):
    etopo_copy(etopo, tmp_path, **{name: change})
    with pytest.raises(ValueError, match=rf"^etopo20data.gz: .*({reason})"):
        Etopo().read(RemoteFile(str(tmp_path / "etopo20data.gz"), ALWAYS))


@pytest.mark.data
def test_etopo_without_its_coordinates_is_refused(etopo, tmp_path):
    (tmp_path / "etopo20data.gz").write_bytes((etopo / "etopo20data.gz").read_bytes())
    with pytest.raises(ValueError, match=r"lacks its coordinates etopo20lons\.gz"):
        only_frame(Etopo(str(tmp_path)))


# SRTM


@pytest.mark.data
def test_srtm_tiles_read_as_gdal_reads_each_at_its_place_in_one_field(data):
    folder = data / "dem" / "srtm3_azores"
    frame = only_frame(Srtm(str(folder)))
    assert frame.values.shape == (2401, 2401)
    for path in folder.iterdir():
        name = path.name[:7]
        with rasterio.open(f"/vsizip/{path}/{name}.hgt", driver="SRTMHGT") as tile:
            row, column = (round(float(place)) for place in frame.grid.cells(*tile.xy(0, 0)))
            assert frame.grid.x[column] == pytest.approx(tile.xy(0, 0)[0], abs=1e-9)
            assert frame.grid.y[row] == pytest.approx(tile.xy(0, 0)[1], abs=1e-9)
            placed = frame.values[row : row + TILE, column : column + TILE]
            assert np.array_equal(placed, tile.read(1).astype(np.float32))
    assert metres_off(frame.grid, [-29, -27, -29, -27], [40, 40, 38, 38]) < 1
    assert frame.values[round((40 - 38.468) * 1200), round((29 - 28.399) * 1200)] > 2200  # Pico, 2351 m
    assert not np.isnan(frame.values).any()


def write_tile(folder: Path, name: str, heights: Any, suffix: str = ".hgt") -> Path:
    path = folder / (name + suffix)
    samples = np.asarray(heights).astype(">i2").tobytes()
    if suffix.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr(f"{name}.hgt", samples)
    else:
        path.write_bytes(samples)
    return path


def test_missing_tiles_and_voids_are_nan_and_shared_edges_are_filled_from_either_side(tmp_path):
    first, second = np.full((TILE, TILE), 100), np.full((TILE, TILE), 200)
    first[5, 5], first[:, -1] = -32768, -32768  # its eastern edge is the second's western one
    write_tile(tmp_path, "S01W001", first, ".SRTMGL3.hgt.zip")
    (tmp_path / "east").mkdir()
    write_tile(tmp_path / "east", "S01E000", second)
    write_tile(tmp_path, "N01E000", np.full((TILE, TILE), -3), ".hgt.zip")
    frame = only_frame(Srtm(str(tmp_path)))
    assert frame.grid == Grid(
        "EPSG:4326", -1, 1 / 1200, 2401, 2, -1 / 1200, 3601
    )  # no tile of the row 0..1 N
    assert np.isnan(frame.values[:1200]).sum() == 1200 * 1200
    assert set(frame.values[:1201, 1200:].ravel()) == {-3.0}
    assert np.isnan(frame.values[1201:2400]).all()
    assert np.isnan(frame.values[2405, 5])
    assert (frame.values[2400:, 1200] == 200).all()
    assert frame.values[2400, 0] == 100
    assert frame.source == "NASA SRTM, 3 seconds, 3 tiles"


@settings(max_examples=4)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_exactly_the_voids_of_a_tile_are_nan(seed, share, tmp_path_factory):
    random = np.random.default_rng(seed)
    void = random.random((TILE, TILE)) < share
    heights = random.integers(-400, 5000, (TILE, TILE))
    path = write_tile(tmp_path_factory.mktemp("srtm"), "N46E007", np.where(void, -32768, heights))
    values = Srtm().read(RemoteFile(str(path), ALWAYS)).values
    assert np.array_equal(np.isnan(values), void)
    assert np.array_equal(values[~void], heights[~void])


def test_samples_of_one_second_are_read_where_asked_for(tmp_path):
    write_tile(tmp_path, "N46E007", np.full((3601, 3601), 7))
    assert only_frame(Srtm(str(tmp_path), seconds=1)).grid == Grid(
        "EPSG:4326", 7, 1 / 3600, 3601, 47, -1 / 3600, 3601
    )
    with pytest.raises(ValueError, match=r"not of source\.seconds=3"):
        only_frame(Srtm(str(tmp_path)))
    with pytest.raises(ValueError, match="expected 1 or 3"):
        Srtm(seconds=2)


def test_damaged_srtm_tiles_are_refused_with_their_name_and_a_reason(tmp_path):
    path = write_tile(tmp_path, "N46E007", np.random.default_rng(0).integers(0, 99, (TILE, TILE)), ".hgt.zip")
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for bytes_ in (b"", whole[:-100], flipped, b"PK\3\4" + bytes(50)):
        path.write_bytes(bytes_)
        with pytest.raises(ValueError, match=r"^N46E007\.hgt\.zip: a cut or damaged zip file"):
            only_frame(Srtm(str(tmp_path)))
    for members in (
        {},
        {"N46E008.hgt": 2 * TILE**2},
        {"N46E007.hgt": 2**25},
        {"../N46E007.hgt": 2 * TILE**2},
    ):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, size in members.items():
                archive.writestr(name, bytes(size))
        with pytest.raises(
            ValueError, match=r"^N46E007\.hgt\.zip: a zip file of .* expected N46E007\.hgt of 2884802 bytes"
        ):
            only_frame(Srtm(str(tmp_path)))
    path.unlink()
    path = tmp_path / "N46E007.hgt"
    path.write_bytes(bytes(2 * TILE**2 - 1))
    with pytest.raises(ValueError, match=r"^N46E007\.hgt: 2884801 bytes of samples"):
        only_frame(Srtm(str(tmp_path)))


def test_a_member_that_unpacks_to_more_than_it_says_is_refused(tmp_path):
    path = write_tile(tmp_path, "N46E007", np.zeros((4 * TILE, TILE)), ".hgt.zip")
    true, false = struct.pack("<I", 8 * TILE**2), struct.pack("<I", 2 * TILE**2)
    path.write_bytes(path.read_bytes().replace(true, false))
    with pytest.raises(ValueError, match="cut or damaged zip"):
        only_frame(Srtm(str(tmp_path)))


def test_tiles_too_far_apart_or_twice_there_are_refused(tmp_path):
    for name in ("N46E007.hgt", "N46E007.SRTMGL3.hgt.zip", "S46W120.hgt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="the same tile as"):
        only_frame(Srtm(str(tmp_path)))
    (tmp_path / "N46E007.hgt").unlink()
    with pytest.raises(ValueError, match="more than 64000000; give a folder with fewer"):
        only_frame(Srtm(str(tmp_path)))
    with pytest.raises(ValueError, match="no SRTM tiles there"):
        (tmp_path / "none").mkdir()
        only_frame(Srtm(str(tmp_path / "none")))
    with pytest.raises(ValueError, match="no such folder"):
        only_frame(Srtm(str(tmp_path / "nowhere")))


# GTOPO30


@pytest.mark.data
def test_gtopo_reads_as_gdal_reads_it_on_the_cells_that_its_edges_say(data):
    folder = data / "dem" / "gtopo_bonn"
    frame = only_frame(Gtopo(str(folder)))
    with rasterio.open(folder / "bonn_gtopo.tif") as raster:
        assert np.array_equal(frame.values, raster.read(1).astype(np.float32))
        x, y = raster.xy([0, 0, 359, 359], [0, 479, 0, 479])
    assert metres_off(frame.grid, x, y) < 1
    edges = (
        frame.grid.x[[0, -1]] + np.array([-0.5, 0.5]) / 120,
        frame.grid.y[[0, -1]] - np.array([-0.5, 0.5]) / 120,
    )
    assert np.concatenate(edges) == pytest.approx([5, 9, 52, 49], abs=1e-9)


def write_geotiff(
    path: Path, heights: Any, west: float, north: float, step: float = 1 / 120, **profile: Any
) -> Path:
    transform = Affine(step, 0, west, 0, -step, north)
    height, width = heights.shape
    kind = {"driver": "GTiff", "count": 1, "dtype": "int16", "transform": transform, **profile}
    with rasterio.open(path, "w", height=height, width=width, **kind) as raster:
        raster.write(heights.astype(kind["dtype"]), 1)
    return path


def test_the_sea_of_gtopo_is_zero_and_land_below_sea_level_stays(tmp_path):
    heights = np.array([[-9999, -407, 0], [1, 8752, -9999]])
    write_geotiff(tmp_path / "w020n90.tif", heights, 34.0, 40.0)
    frame = only_frame(Gtopo(str(tmp_path)))
    assert np.array_equal(frame.values, np.float32([[0, -407, 0], [1, 8752, 0]]))
    assert frame.grid == only_frame(Gtopo(str(tmp_path), grid=frame.grid)).grid
    with pytest.raises(ValueError, match=r"^w020n90\.tif: lies on 2 x 3 cells"):
        only_frame(Gtopo(str(tmp_path), grid=frame.grid.window(0, 0, 2, 2)))
    with pytest.raises(ValueError, match=r"^w020n90\.tif: has SHA-256 [0-9a-f]{64}, expected 1234"):
        only_frame(Gtopo(str(tmp_path), sha256="1234"))
    with pytest.raises(ValueError, match=r"looked for names such as bonn\.tif"):
        only_frame(Gtopo(str(tmp_path), name="bonn.tif"))


def test_other_rasters_are_refused_with_their_name_and_a_reason(tmp_path):
    heights, path = np.full((4, 5), 7), tmp_path / "dem.tif"
    whole = write_geotiff(path, heights, 5, 52).read_bytes()
    for make, reason in (
        (lambda: write_geotiff(path, heights, 5.001, 52), "not those of GTOPO30"),
        (lambda: write_geotiff(path, heights, 5, 52, step=1 / 60), "not those of GTOPO30"),
        (lambda: write_geotiff(path, heights, 180, 52), "off the earth"),
        (lambda: write_geotiff(path, heights, 5, 52, dtype="float32"), "expected one of int16"),
        (lambda: write_geotiff(path, heights, 5, 52, crs="EPSG:3067"), "lies in EPSG:3067, expected"),
        (lambda: write_geotiff(path, np.full((4, 5), 9500), 5, 52), "outside -12000..9000 m"),
        (lambda: write_geotiff(path, heights, 5, 52, driver="PNG", dtype="uint16"), "not a GeoTIFF"),
        (lambda: path.write_bytes(whole[:-20]), ""),  # in the words of GDAL
        (lambda: path.write_bytes(whole[:7]), ""),
        (lambda: path.write_text(VRT), "not a GeoTIFF"),
    ):
        path.unlink()
        make()
        with pytest.raises(ValueError, match=rf"^dem\.tif: .*{reason}"):
            only_frame(Gtopo(str(tmp_path)))


VRT = """<VRTDataset rasterXSize="5" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1" subClass="VRTRawRasterBand">
<SourceFilename relativeToVRT="0">/etc/passwd</SourceFilename></VRTRasterBand></VRTDataset>"""


@pytest.mark.parametrize("source", [Etopo, Gtopo])
def test_a_folder_without_the_file_says_what_it_looked_for(source, tmp_path):
    with pytest.raises(ValueError, match="looked for names such as"):
        list(source(str(tmp_path)).files(None, None))
