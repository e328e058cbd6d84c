"""Lightning lists: real ones counted as NumPy counts them, small ones that the tests write, damaged ones refused."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import pytest
import yaml
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Geod, Proj

import cli
from pipelines.decode import decode
from pipelines.grid import Grid
from pipelines.sources.glm import Glm
from pipelines.sources.source import RemoteFile

NAME = "OR_GLM-L2-LCFA_G16_s20181830433000_e20181830433200_c20181830433231.nc"
END = datetime(2018, 7, 2, 4, 33, 20, tzinfo=UTC)
DEGREES = Grid("EPSG:4326", -79.75, 0.5, 20, 34.75, -0.5, 20)  # 80 to 70 west, 25 to 35 north
SIZE, HEIGHT = 1356, 35_786_023.0


def write(path: Path, **other: Any) -> RemoteFile:
    """A list in the layout of the service: three flashes, of which the last is flagged, unless told otherwise."""
    told: dict[str, Any] = {
        "lat": [30.1, 30.2, 28.2],
        "lon": [-75.1, -75.2, -72.3],
        "flag": [0, 0, 3],
        "packed": False,
        "count": None,
        "title": NAME,
        "start": "2018-07-02T04:33:00.0Z",
        "slot": "GOES-East",
        "middle": -75.0,
        "counted": "flash",
    } | other
    with netCDF4.Dataset(path, "w") as file:
        file.setncatts(
            {
                "dataset_name": told["title"],
                "platform_ID": "G16",
                "orbital_slot": told["slot"],
                "time_coverage_start": told["start"],
                "time_coverage_end": "2018-07-02T04:33:20.0Z",
            }
        )
        kind = told["counted"]
        file.createDimension(f"number_of_{kind}s", None)
        for axis in ("lat", "lon"):
            numbers = np.asarray(told[axis])
            name, dimensions = f"{kind}_{axis}", (f"number_of_{kind}s",)
            if told["packed"]:
                least = -66.56 if axis == "lat" else -141.56
                variable = file.createVariable(name, "i2", dimensions, chunksizes=(256,))
                variable.set_auto_maskandscale(False)
                variable.setncatts(
                    {
                        "_Unsigned": "true",
                        "scale_factor": np.float32(0.00203128),
                        "add_offset": np.float32(least),
                    }
                )
                variable[:] = np.round((numbers - least) / 0.00203128).astype(np.uint16).view(np.int16)
            else:
                file.createVariable(name, "f4", dimensions, chunksizes=(256,))[:] = numbers
        flags = file.createVariable(
            f"{kind}_quality_flag", "i2", dimensions, fill_value=-1, chunksizes=(256,)
        )
        flags.set_auto_maskandscale(False)
        flags.setncattr("_Unsigned", "true")
        flags[:] = told["flag"]
        count = len(told["lat"]) if told["count"] is None else told["count"]
        file.createVariable(f"{kind}_count", "i4", ())[...] = count
        file.createVariable("lon_field_of_view", "f4", ())[...] = told["middle"]
    return RemoteFile(str(path), None)


def configured(path: Path, **changes: Any) -> Glm:
    page = yaml.safe_load((cli.CONFIGS / "source/glm_lcfa.yaml").read_text())
    return instantiate(page | {"path": str(path)} | changes, _convert_="all")


def square_kilometres(grid: Grid, row: int, column: int) -> float:
    """Of a cell, by its geodesic outline."""
    corners = [grid.window(row, column, 1, 1)]
    west, east = corners[0].x_first - grid.x_step / 2, corners[0].x_first + grid.x_step / 2
    north, south = corners[0].y_first - grid.y_step / 2, corners[0].y_first + grid.y_step / 2
    lon, lat = [], []
    for x, y in ((west, north), (west, south), (east, south), (east, north)):
        a, b = Grid(grid.crs, x, 1.0, 1, y, -1.0, 1).lonlat()
        lon.append(a[0, 0])
        lat.append(b[0, 0])
    area, _ = Geod(ellps="WGS84").polygon_area_perimeter(lon, lat)
    return abs(area) / 1e6


@pytest.mark.data
@pytest.mark.parametrize("counted", ["flash", "group"])
@pytest.mark.parametrize("folder, count", [("glm_l2_lcfa", 3), ("abi", 1)])
def test_real_lists_count_as_netcdf4_and_numpys_histogram_count_them(folder, count, counted, data):
    source = configured(data / "goes" / folder, counted=counted)
    files = list(source.files(None, None))
    assert len(files) == count
    edges = (np.arange(SIZE + 1) - SIZE / 2) * 224e-6
    view = Proj("+proj=geos +h=35786023 +lon_0=-75 +sweep=x +a=6378137 +b=6356752.31414")
    for file in files:
        frame = source.read(file)
        with netCDF4.Dataset(file.url) as dataset:
            lon, lat, flag = (dataset[f"{counted}_{name}"][:] for name in ("lon", "lat", "quality_flag"))
        x, y = (np.asarray(metres) / HEIGHT for metres in view(lon, lat))
        good, bad = (
            np.histogram2d(-y[chosen], x[chosen], (edges, edges))[0] for chosen in (flag == 0, flag != 0)
        )
        assert int(good.sum() + bad.sum()) == len(lon)  # none lies outside
        assert np.isnan(frame.values[bad > 0]).all()
        left = bad == 0
        assert np.array_equal(frame.values[left] > 0, good[left] > 0)
        for row, column in np.argwhere((good > 0) & left)[::7]:
            flashes = frame.values[row, column] * square_kilometres(frame.grid, row, column) / 3
            assert flashes == pytest.approx(good[row, column], rel=2e-4)
        assert frame.valid_time == file.valid_time
        assert frame.cadence == timedelta(seconds=20)
        assert np.isnan(frame.values).mean() == pytest.approx(0.3442, abs=1e-3)
        assert (frame.values == 0).mean() > 0.65


@pytest.mark.data
@pytest.mark.parametrize("counted, total, theirs", [("flash", 347, 342), ("group", 6453, 6365)])
def test_a_real_minute_is_that_of_glmtools_but_on_the_ground_and_not_at_the_tops_of_clouds(
    counted, total, theirs, data
):
    (path,) = (data / "goes" / "glm_gridded_conus").iterdir()
    with netCDF4.Dataset(path) as dataset:
        x, y = (dataset[axis][:] * HEIGHT for axis in "xy")
        gridded = dataset[f"{counted}_centroid_density"][:].filled(0)
    crs = "+proj=geos +h=35786023 +lon_0=-75 +sweep=x +a=6378137 +b=6356752.31414 +units=m"
    grid = Grid.from_coordinates(crs, x, y)
    source = Glm(grid, str(data / "goes" / "glm_l2_lcfa"), counted=counted, quality=(0, 1, 3, 5))
    rates = sum(source.read(file).values for file in source.files(None, None))
    rows, columns = np.nonzero(np.nan_to_num(rates))
    ours = [
        round(rates[row, column] * square_kilometres(grid, row, column) / 3)
        for row, column in zip(rows, columns, strict=True)
    ]
    assert (sum(ours), gridded.sum()) == (total, theirs)  # glmtools leaves out a few
    around = np.pad(gridded, 6)
    moved = [
        (np.minimum(ours, around[rows + 6 + down, columns + 6 + right]).sum(), down, right)
        for down in range(-6, 7)
        for right in range(-6, 7)
    ]
    _, down, right = max(moved)
    assert (down, right) in {(-3, -3), (-3, -2)}  # cells of 2 km, away from the satellite's foot point


@pytest.mark.data
def test_every_real_event_lies_in_the_instruments_view_and_some_at_its_edge(data):
    view = Proj("+proj=geos +h=35786023 +lon_0=-75 +sweep=x +a=6378137 +b=6356752.31414")
    farthest = 0.0
    for path in (data / "goes").glob("*/OR_GLM-L2-LCFA*"):
        with netCDF4.Dataset(path) as dataset:
            x, y = (
                np.degrees(np.asarray(m) / HEIGHT)
                for m in view(dataset["event_lon"][:], dataset["event_lat"][:])
            )
        farthest = max(farthest, np.hypot(x, y).max())
        assert max(np.abs(x).max(), np.abs(y).max()) < 7.5
    assert farthest == pytest.approx(8.1953, abs=1e-4)


def test_the_configured_grid_is_every_fourth_cell_of_the_full_disk_to_a_metre():
    grid = configured(Path(), satellite="G16").grid
    assert (grid.x[0], grid.x[-1]) == pytest.approx(
        (-677.5 * 224e-6 * HEIGHT, 677.5 * 224e-6 * HEIGHT), abs=1e-3
    )
    assert (grid.y[0], grid.y[-1]) == pytest.approx(
        (677.5 * 224e-6 * HEIGHT, -677.5 * 224e-6 * HEIGHT), abs=1e-3
    )
    view = Proj("+proj=geos +h=35786023 +lon_0=-75 +sweep=x +a=6378137 +b=6356752.31414")
    for row, column in ((200, 678), (678, 100), (1100, 900)):
        lon, lat = grid.window(row, column, 1, 1).lonlat()
        theirs = view((column - 677.5) * 224e-6 * HEIGHT, (677.5 - row) * 224e-6 * HEIGHT, inverse=True)
        _, _, metres = Geod(ellps="WGS84").inv(lon[0, 0], lat[0, 0], *theirs)
        assert metres < 0.01


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("counted", ["flash", "group"])
def test_a_cell_holds_its_flashes_by_area_and_time_and_nan_where_one_was_not_kept(packed, counted, tmp_path):
    file = write(tmp_path / NAME, packed=packed, counted=counted)
    frame = Glm(DEGREES, counted=counted).read(file)
    expected = 2 * 3 / square_kilometres(DEGREES, 9, 9)
    assert frame.values[9, 9] == pytest.approx(expected, rel=1e-4)
    assert np.isnan(frame.values[13, 15])
    assert (frame.values == 0).sum() == frame.values.size - 2
    everything = Glm(DEGREES, counted=counted, quality=(0, 3)).read(file)
    assert everything.values[13, 15] == pytest.approx(3 / square_kilometres(DEGREES, 13, 15), rel=1e-4)
    assert (frame.valid_time, frame.cadence, frame.group) == (END, timedelta(seconds=20), "satellite")
    assert (frame.variable.name, frame.variable.units) == (f"lightning_{counted}_rate", "km-2 min-1")


def test_where_the_instrument_does_not_look_is_not_observed_and_no_flash_is_zero(tmp_path):
    world = Grid("EPSG:4326", -179.5, 1.0, 360, 89.5, -1.0, 180)
    file = write(tmp_path / NAME, lat=[], lon=[], flag=[])
    values = Glm(world).read(file).values
    assert (values[~np.isnan(values)] == 0).all()
    for lon, lat, seen in (
        (-75, 0, True),
        (-75, 51, True),
        (-75, 56, False),
        (-30, 0, True),
        (100, 0, False),
    ):
        assert np.isnan(values[int(89.5 - lat), int(lon + 179.5)]) != seen
    beyond = Glm(world).read(write(tmp_path / NAME, lat=[57.3], lon=[-75.2], flag=[0])).values
    assert beyond[32, 104] > 0  # seen, whatever the outline says


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(0, 400))
def test_flashes_are_neither_lost_nor_doubled(seed, size, tmp_path_factory):
    generator = np.random.default_rng(seed)
    lon, lat = generator.uniform(-81, -69, size), generator.uniform(24, 36, size)
    path = tmp_path_factory.mktemp("glm") / NAME
    values = Glm(DEGREES).read(write(path, lat=lat, lon=lon, flag=np.zeros(size, int))).values
    areas = np.array([square_kilometres(DEGREES, row, 0) for row in range(20)])
    inside = (np.abs(lon + 75) < 5) & (np.abs(lat - 30) < 5)
    assert (values * areas[:, None] / 3).sum() == pytest.approx(inside.sum(), rel=1e-3)


def test_a_frame_has_the_time_that_its_name_promises(tmp_path):
    write(tmp_path / NAME)
    source = Glm(DEGREES, path=str(tmp_path))
    (file,) = source.files(None, None)
    assert decode(source, file).valid_time == file.valid_time == END
    late = NAME.replace("e20181830433200", "e20181830433205")
    assert source.valid_time(late) == END
    for name in (
        NAME.replace("LCFA", "GLMF"),
        NAME.replace("e20181830433200", "e20181830434200"),
        "notes.nc",
    ):
        assert source.valid_time(name) is None


def test_files_of_several_satellites_ask_for_a_choice(tmp_path):
    for name in (NAME, NAME.replace("G16", "G18")):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"holds G16, G18; choose one with source\.satellite"):
        list(Glm(DEGREES, path=str(tmp_path)).files(None, None))
    (file,) = Glm(DEGREES, path=str(tmp_path), satellite="G18").files(END, END)
    assert Path(file.url).name == NAME.replace("G16", "G18")
    with pytest.raises(ValueError, match="no files of GOES GLM-L2-LCFA"):
        list(Glm(DEGREES, path=str(tmp_path), satellite="G19").files(None, None))
    with pytest.raises(ValueError, match=r"counted=event: expected one of flash, group"):
        Glm(DEGREES, counted="event")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another list": ({"title": NAME.replace("433231", "433232")}, "another file than its name says"),
    "another product": ({"title": NAME.replace("LCFA", "GLMF")}, "expected GLM-L2-LCFA"),
    "another time": ({"start": "2018-07-02T04:32:00.0Z"}, "but is called"),
    "another slot": ({"slot": "GOES-West"}, "looks at -75 degrees east as GOES-West"),
    "no slot": ({"slot": "GOES-North"}, "looks at -75 degrees east as GOES-North"),
    "fewer than it says": ({"count": 4}, r"lists \(3,\) of flash, but says 4"),
    "below 0": ({"count": -1}, "but says -1"),
    "no place": ({"lat": [30.0, 91.0, 0.0]}, "no place on earth"),
    "a place that is no number": ({"lon": [-75.0, np.nan, -75.0]}, "some of flash_lon is missing"),
    "a missing flag": ({"flag": [0, -1, 0]}, "some of flash_quality_flag is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_list_that_says_otherwise_is_refused_with_its_name_and_a_reason(case, tmp_path):
    changes, reason = WRONG[case]
    with pytest.raises(ValueError, match=rf"^{NAME}: .*{reason}"):
        Glm(DEGREES).read(write(tmp_path / NAME, **changes))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text": (lambda path: path.write_bytes(b"<html>Not found</html>"), "not an HDF5 file"),
    "cut": (cut, "damaged HDF5"),
    "groups only": (lambda path: write(path, counted="group"), "lacks a part of this product"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_with_its_name_and_a_reason(damage, tmp_path):
    spoil, reason = DAMAGE[damage]
    file = write(tmp_path / NAME)
    spoil(tmp_path / NAME)
    with pytest.raises(ValueError, match=rf"^{NAME}: .*{reason}"):
        Glm(DEGREES).read(file)
