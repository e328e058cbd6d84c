"""CF files and stores: the same field out of every container, real sets as xarray reads them, others refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray as xr
import zarr
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pyproj import CRS, Geod, Proj, Transformer

import cli
from pipelines.coordinates import write_grid
from pipelines.decode import Decoder
from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.sources.cf import Cf
from pipelines.sources.source import RemoteFile, unread
from tests.pipelines.ordinary_user import ordinary_user

MAP = "+proj=laea +lat_0=55 +lon_0=10 +x_0=1950000 +y_0=-2100000 +ellps=WGS84 +units=m"
GRID = Grid(MAP, 500.0, 1000.0, 7, -500.0, -1000.0, 5)
FIRST = np.datetime64("2020-05-01T00:05", "ns")
STEP = np.timedelta64(5, "m")
SIZE = 4  # times


def rain(seed: int = 0) -> np.ndarray:
    """Rates with dry and unseen cells."""
    generator = np.random.default_rng(seed)
    values = generator.gamma(0.5, 4, (SIZE, *GRID.shape)).astype(np.float32)
    values[generator.random(values.shape) < 0.4] = 0
    values[generator.random(values.shape) < 0.2] = np.nan
    return values


def dataset(values: np.ndarray | None = None, **attributes) -> xr.Dataset:
    """A cube as CF wants it."""
    values = rain() if values is None else values
    built = xr.Dataset(
        {
            "rainfall_rate": (
                ("time", "y", "x"),
                values,
                {"units": "mm h-1", "grid_mapping": "crs"} | attributes,
            ),
            "crs": ((), np.int32(0), CRS(MAP).to_cf()),
        },
        {
            "time": FIRST + STEP * np.arange(SIZE),
            "y": ("y", GRID.y, {"standard_name": "projection_y_coordinate", "units": "m"}),
            "x": ("x", GRID.x, {"standard_name": "projection_x_coordinate", "units": "m"}),
        },
        {"title": "a test"},
    )
    built["time"].encoding = {"units": "seconds since 1970-01-01", "dtype": "int64"}
    return built


def netcdf(form: str) -> Callable[[xr.Dataset, Path], Path]:
    def write(cube: xr.Dataset, folder: Path) -> Path:
        path = folder / "cube.nc"
        if form != "NETCDF4":
            cube["time"].encoding["dtype"] = "int32"
        cube.to_netcdf(path, engine="netcdf4", format=form)
        return path

    return write


def store(form: int, **encoding) -> Callable[[xr.Dataset, Path], Path]:
    def write(cube: xr.Dataset, folder: Path) -> Path:
        path = folder / "cube.zarr"
        cube.to_zarr(
            path,
            mode="w",
            zarr_format=form,
            consolidated=False,
            encoding={"rainfall_rate": {"chunks": (1, 3, 4), **encoding}},
        )
        return path

    return write


WRITERS = {
    "NetCDF-4": netcdf("NETCDF4"),
    "NetCDF-3": netcdf("NETCDF3_CLASSIC"),
    "NetCDF-3, 64 bit": netcdf("NETCDF3_64BIT"),
    "Zarr 2": store(2),
    "Zarr 3": store(3),
    "Zarr 3, sharded": store(3, shards=(2, 6, 8)),
}


def frames(path: Path, **settings) -> list[Frame]:
    source = Cf(**({"path": str(path)} | settings))
    return [source.read(file) for file in source.files(None, None)]


def refusal(path: Path, **settings) -> str:
    """Why a file gives no frame; it is listed, without a time, all the same."""
    source = Cf(**({"path": str(path)} | settings))
    files = list(source.files(None, None))
    with pytest.raises(ValueError, match=rf"^{path.name}: ") as refused:
        source.read(files[0])
    return str(refused.value)


@pytest.mark.parametrize("writer", WRITERS)
def test_the_same_cube_is_the_same_frames_out_of_every_container(writer, tmp_path):
    values = rain()
    found = frames(WRITERS[writer](dataset(values), tmp_path))
    assert [frame.valid_time for frame in found] == [
        datetime(2020, 5, 1, 0, 5 * number, tzinfo=UTC) for number in range(1, 5)
    ]
    for frame, expected in zip(found, values, strict=True):
        assert np.array_equal(frame.values, expected, equal_nan=True)
        assert frame.cadence == timedelta(minutes=5)
        assert (frame.variable.name, frame.group, frame.source) == ("rainfall_rate", "radar", "a test")
        assert (frame.grid.x_first, frame.grid.y_first, frame.grid.x_step) == (500, -500, 1000)
        lon, lat = frame.grid.lonlat()
        _, _, metres = Geod(ellps="WGS84").inv(lon[0, 0], lat[0, 0], *Proj(MAP)(500, -500, inverse=True))
        assert metres < 1


@pytest.mark.parametrize("writer", ["NetCDF-4", "NetCDF-3", "Zarr 2", "Zarr 3"])
@pytest.mark.parametrize("turn", ["south first", "east first", "both", "x before y", "time last"])
def test_however_the_axes_run_row_0_is_north_and_column_0_is_west(turn, writer, tmp_path):
    values = rain()
    cube = dataset(values)
    if turn in ("south first", "both"):
        cube = cube.isel(y=slice(None, None, -1))
    if turn in ("east first", "both"):
        cube = cube.isel(x=slice(None, None, -1))
    if turn == "x before y":
        cube = cube.transpose("time", "x", "y")
    if turn == "time last":
        cube = cube.transpose("y", "x", "time")
    chunks = {"Zarr 2": store(2, chunks=None), "Zarr 3": store(3, chunks=None)}
    found = frames(chunks.get(writer, WRITERS[writer])(cube, tmp_path))
    assert np.array_equal([frame.values for frame in found], values, equal_nan=True)
    assert {frame.grid for frame in found} == {found[0].grid}
    assert (found[0].grid.y_first, found[0].grid.x_first) == (-500, 500)


def test_uneven_cells_are_refused(tmp_path):
    cube = dataset()
    cube["x"] = cube["x"] ** 1.01
    assert "x is not evenly spaced" in refusal(netcdf("NETCDF4")(cube, tmp_path))


@pytest.mark.parametrize(
    ("units", "settings", "factor"),
    [
        ("mm/h", {}, 1),
        ("mm hr^-1", {}, 1),
        ("kg m-2 s-1", {}, 3600),
        ("mm s-1", {}, 3600),
        ("m s**-1", {}, 3.6e6),
        ("mm", {}, 12),
        ("kg m-2", {"interval": 10.0}, 6),
        ("mm/5min", {}, 12),
        ("mm (10 min)-1", {"factor": 6.0}, 6),
        ("", {"factor": 0.5}, 0.5),
        ("mm", {"quantity": "precipitation_amount_1h", "interval": 60.0}, 1),
        ("dBZ", {"quantity": "reflectivity"}, 1),
        ("%", {"quantity": "land_fraction"}, 0.01),
    ],
)
def test_numbers_are_brought_to_the_quantitys_unit(units, settings, factor, tmp_path):
    values = np.full((SIZE, *GRID.shape), 1e-4, np.float32)
    found = frames(netcdf("NETCDF4")(dataset(values, units=units), tmp_path), **settings)
    assert found[0].values == pytest.approx(1e-4 * factor, rel=1e-6)


@pytest.mark.parametrize(
    ("units", "settings"),
    [
        ("furlong", {}),
        ("", {}),
        ("dBZ", {}),
        ("mm", {"interval": 60.0}),
        ("mm", {"quantity": "precipitation_amount_1h"}),
        ("mm h-1", {"quantity": "reflectivity"}),
    ],
)
def test_a_unit_that_does_not_tell_is_refused(units, settings, tmp_path):
    path = netcdf("NETCDF4")(dataset(units=units), tmp_path)
    assert "give source.factor" in refusal(path, **settings)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["i1", "u1", "i2", "u2", "i4", "f4", "f8"]))
def test_packed_numbers_read_as_netcdf4_reads_them(seed, kind, tmp_path_factory):
    generator = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("cf") / "cube.nc"
    dataset().drop_vars("rainfall_rate").to_netcdf(path)
    size = 40  # more cells than an 8-bit number has values
    with netCDF4.Dataset(path, "a") as file:
        file.createDimension("lat", size)
        file.createDimension("lon", size)
        for name in ("lat", "lon"):
            file.createVariable(name, "f8", (name,))[:] = np.arange(size)
        rate = file.createVariable("rate", kind, ("time", "lat", "lon"), fill_value=[None, 7][seed % 2])
        rate.set_auto_maskandscale(False)
        rate.units = "mm h-1"
        rate.missing_value = np.array([3, 5], kind)
        if seed % 3:
            rate.setncatts({"scale_factor": 0.25, "add_offset": 1.5})
        if seed % 5 == 0:
            rate.valid_range = np.array([2, 90], kind)
        rate[:] = generator.integers(0, 100, (SIZE, size, size)).astype(kind)
    with netCDF4.Dataset(path) as file:
        expected = np.ma.filled(file["rate"][0].astype(float), np.nan)[::-1]
    frame = frames(path, variable="rate")[0]
    assert np.array_equal(np.isnan(frame.values), np.isnan(expected))
    assert np.nanmax(np.abs(frame.values - expected)) < 1e-5


def test_numbers_that_are_called_missing_are_not_observed(tmp_path):
    values = rain()
    values[:, 0, 0], values[:, 1, 1] = 99, 98
    path = netcdf("NETCDF4")(dataset(values), tmp_path)
    found = frames(path, missing=[99, 98])[0].values
    expected = np.where(np.isin(values[0], (98, 99)), np.nan, values[0])
    assert np.array_equal(found, expected, equal_nan=True)


def test_another_attribute_than_the_registered_one_is_refused_and_not_a_field_of_nothing(tmp_path):
    registered = {"units": "mm h-1", "valid_min": 0.0}
    path = netcdf("NETCDF4")(dataset(valid_min=0.0), tmp_path)
    assert len(frames(path, attributes=registered)) == SIZE
    path = netcdf("NETCDF4")(dataset(valid_min=7.0), tmp_path)
    assert np.isnan(frames(path)[0].values).mean() > 0.8, "nothing but the registration shows it"
    for attributes, said in (
        (registered, "its valid_min is 7.0, expected 0.0"),
        ({"valid_min": "7"}, "its valid_min is 7.0, expected 7"),
        ({"valid_max": 90.0}, "its valid_max is None, expected 90.0"),
        ({"units": 1.0}, "its units is mm h-1, expected 1.0"),
    ):
        assert said in refusal(path, attributes=attributes)


def test_signed_numbers_that_mean_unsigned_ones_are_turned(tmp_path):
    path = netcdf("NETCDF4")(dataset(), tmp_path)
    with netCDF4.Dataset(path, "a") as file:
        counts = file.createVariable("counts", "i2", ("time", "y", "x"), fill_value=-1)
        counts.set_auto_maskandscale(False)
        counts.setncatts(
            {"_Unsigned": "true", "scale_factor": 0.01, "units": "mm h-1", "grid_mapping": "crs"}
        )
        counts.valid_range = np.array([0, -2], np.int16)
        counts[:] = 0
        counts[0, 0, :2] = -1, -2
    values = frames(path, variable="counts")[0].values
    assert np.isnan(values[0, 0])
    assert values[0, 1] == pytest.approx(655.34)


def test_a_time_that_begins_an_interval_is_moved_to_its_end(tmp_path):
    path = netcdf("NETCDF4")(dataset(), tmp_path)
    begin = datetime(2020, 5, 1, 0, 5, tzinfo=UTC)
    assert frames(path)[0].valid_time == begin
    assert frames(path, time_is="start")[0].valid_time == begin + timedelta(minutes=5)
    assert frames(path, time_is="start", interval=10.0)[0].valid_time == begin + timedelta(minutes=10)


def test_times_must_end_where_the_files_bounds_end(tmp_path):
    cube = dataset()
    cube["time"].attrs["bounds"] = "time_bounds"
    ends = cube["time"].values[:, None]
    cube["time_bounds"] = (("time", "two"), np.hstack([ends, ends + STEP]))
    path = netcdf("NETCDF4")(cube, tmp_path)
    assert "set source.time_is (is end)" in refusal(path)
    assert len(frames(path, time_is="start")) == SIZE


def test_the_cadence_is_the_commonest_step_and_holes_stay_holes(tmp_path):
    cube = dataset().isel(time=[0, 1, 3])
    cube["time"] = np.array(["2020-05-01T00:05", "2020-05-01T00:10", "2020-05-01T02:00"], "M8[ns]")
    cube["time"].encoding = {"units": "hours since 1901-01-01 00:00:00.0", "dtype": "float64"}
    found = frames(netcdf("NETCDF4")(cube, tmp_path), cadence=None)
    assert [f"{frame.valid_time:%H:%M}" for frame in found] == ["00:05", "00:10", "02:00"]
    assert {frame.cadence for frame in found} == {timedelta(minutes=5)}


def test_files_of_one_time_need_a_cadence_and_come_in_order(tmp_path):
    cube = dataset()
    for place in (2, 0, 1):
        folder = tmp_path / f"{9 - place}"
        folder.mkdir()
        netcdf("NETCDF4")(cube.isel(time=place), folder)  # the time becomes a scalar
    assert "give source.cadence" in refusal(tmp_path / "9" / "cube.nc")
    found = frames(tmp_path, cadence=5.0)
    assert [frame.valid_time.minute for frame in found] == [5, 10, 15]
    assert np.array_equal(found[2].values, cube["rainfall_rate"][2], equal_nan=True)
    start = datetime(2020, 5, 1, 0, 10, tzinfo=UTC)
    times = [file.valid_time for file in Cf(str(tmp_path), cadence=5.0).files(start, start)]
    assert times == [start]


@pytest.mark.parametrize("rights", [0o000, 0o444])
def test_a_folder_that_may_not_be_listed_hides_no_other_and_is_named(rights, tmp_path):
    for folder in ("a", "closed", "closed/too"):
        (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
    netcdf("NETCDF4")(dataset(), tmp_path / "in" / "a")
    source, closed = Cf(str(tmp_path / "in")), tmp_path / "in" / "closed"
    closed.chmod(rights)
    with ordinary_user():
        assert len(list(source.files(None, None))) == SIZE
        assert unread(source).folders.keys() == {str(closed)}
        with pytest.raises(ValueError, match=r"closed: cannot be listed \(Permission denied\)"):
            list(replace(source, path=str(closed)).files(None, None))
    closed.chmod(0o755)


@pytest.mark.parametrize("writer", ["NetCDF-4", "Zarr 3"])
def test_a_link_that_the_user_gives_as_the_path_is_followed_and_links_below_are_told(writer, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "links").mkdir()
    made = WRITERS[writer](dataset(), tmp_path / "in")
    link = tmp_path / "links" / f"latest{made.suffix}"
    link.symlink_to(made)
    with Decoder(Cf(str(link))) as decoder:
        assert [decoder.decode(file).grid for file in decoder.files(None, None)] == [GRID] * SIZE
    source = Cf(str(tmp_path / "links"))
    assert list(unread(source).links) == [link.name]
    with pytest.raises(ValueError, match="no NetCDF file"):
        list(source.files(None, None))


TIMES = {
    "falling": ([300, 0, 600, 900], {}, "do not rise"),
    "twice the same": ([0, 300, 300, 600], {}, "do not rise"),
    "another calendar": ([0, 1, 2, 3], {"calendar": "noleap"}, "calendar 'noleap'"),
    "months": ([0, 1, 2, 3], {"units": "months since 1970-01-01"}, "'months since"),
    "another zone": ([0, 1, 2, 3], {"units": "hours since 1970-01-01 00:00 +02:00"}, "expected a unit"),
    "month 13": ([0, 1, 2, 3], {"units": "hours since 1970-13-01"}, "month must be in"),
    "Julian": ([0, 1, 2, 3], {"units": "days since 0001-01-01"}, "before the Gregorian calendar"),
    "far": ([0, 1, 2, 2**60], {}, "no times"),
    "missing": ([0, 300, 600, -1], {"_FillValue": np.int64(-1)}, "is missing"),
}


@pytest.mark.parametrize("case", TIMES)
def test_times_that_are_no_times_are_refused(case, tmp_path):
    counts, attributes, reason = TIMES[case]
    cube = dataset().drop_vars("time")
    cube["time"] = ("time", np.array(counts), {"units": "seconds since 1970-01-01"} | attributes)
    cube.to_netcdf(tmp_path / "cube.nc")
    assert reason in refusal(tmp_path / "cube.nc")


def test_a_time_to_the_nanosecond_is_exact(tmp_path):
    cube = dataset().drop_vars("time")
    stamps = (FIRST + STEP * np.arange(SIZE)).astype("M8[ns]").astype(np.int64)
    cube["time"] = ("time", stamps, {"units": "nanoseconds since 1970-01-01"})
    cube.to_netcdf(tmp_path / "cube.nc")
    assert frames(tmp_path)[0].valid_time == datetime(2020, 5, 1, 0, 5, tzinfo=UTC)


@pytest.mark.parametrize("form", [2, 3])
def test_one_label_of_a_further_dimension_is_chosen(form, tmp_path):
    values = rain()
    cube = xr.concat([dataset(values), dataset(values + 1)], dim="channel", data_vars=["rainfall_rate"])
    cube["channel"] = np.array([10, 20])
    path = store(form, chunks=None)(cube, tmp_path)
    assert np.array_equal(frames(path, select={"channel": 20})[1].values, values[1] + 1, equal_nan=True)
    assert "choose one by source.select.channel" in refusal(path)
    assert "has the labels ['10', '20'], not 30" in refusal(path, select={"channel": 30})


def test_the_label_of_a_single_channel_is_checked_too(tmp_path):
    cube = dataset().expand_dims(variable=np.array(["IR_016"]))
    path = store(2, chunks=None)(cube, tmp_path)
    assert len(frames(path, select={"variable": "IR_016"})) == SIZE
    assert "has the labels ['IR_016'], not 'VIS006'" in refusal(path, select={"variable": "VIS006"})


def test_longitude_and_latitude_need_no_map(tmp_path):
    cube = dataset().drop_vars("crs")
    del cube["rainfall_rate"].attrs["grid_mapping"]
    cube = cube.rename(x="lon", y="lat")
    cube["lon"] = ("lon", np.arange(7) * 0.5 + 200, {"units": "degrees_east"})
    cube["lat"] = ("lat", np.arange(5) * 0.5 - 10, {"units": "degrees_north"})
    grid = frames(netcdf("NETCDF4")(cube, tmp_path))[0].grid
    assert grid.is_geographic
    assert (grid.x_first, grid.y_first) == (200, -8)


def test_kilometres_and_scan_angles_become_metres(tmp_path):
    cube = dataset()
    for axis in "xy":
        cube[axis] = (axis, cube[axis].values / 1000, cube[axis].attrs | {"units": "km"})
    assert frames(netcdf("NETCDF4")(cube, tmp_path))[0].grid.x_first == pytest.approx(500)
    view = "+proj=geos +h=35786023 +lon_0=-75 +sweep=x +ellps=GRS80 +units=m"
    cube["crs"].attrs = CRS(view).to_cf()
    for axis in "xy":
        cube[axis] = (axis, cube[axis].values / 35786.023, cube[axis].attrs | {"units": "rad"})
    grid = frames(netcdf("NETCDF4")(cube, tmp_path))[0].grid
    assert grid.x_first == pytest.approx(500)
    to_lonlat = Transformer.from_crs(view, "EPSG:4326", always_xy=True)
    assert (grid.lonlat()[0][0, 0], grid.lonlat()[1][0, 0]) == pytest.approx(to_lonlat.transform(500, -500))


def test_a_place_that_is_not_told_or_cannot_be_is_refused(tmp_path):
    cube = dataset()
    without = cube.drop_vars("crs")
    assert "give source.crs" in refusal(netcdf("NETCDF4")(without, tmp_path))
    assert frames(tmp_path, crs=MAP)[0].grid.x_first == 500
    assert "not understood" in refusal(tmp_path / "cube.nc", crs="nowhere")
    dwarf = "+proj=stere +lat_0=90 +lon_0=0 +lat_ts=60 +a=6378.137 +b=6356.752"  # KNMI's, in km
    assert "smaller than ours" in refusal(tmp_path / "cube.nc", crs=dwarf)
    assert "not in metres" in refusal(tmp_path / "cube.nc", crs=MAP.replace("units=m", "units=km"))
    bare = without.drop_vars(["x", "y"])
    assert "nothing marks the x axis" in refusal(netcdf("NETCDF4")(bare, tmp_path), crs=MAP)
    degrees = dataset()
    degrees["x"].attrs["units"] = "degrees_east"
    assert "expected m, km or rad" in refusal(netcdf("NETCDF4")(degrees, tmp_path))


def test_axes_of_any_name_can_be_named(tmp_path):
    cube = dataset().rename(x="a", y="b", time="c")
    for name in "abc":
        cube[name].attrs = {}
    cube["c"].encoding = {"units": "seconds since 1970-01-01", "dtype": "int64"}
    path = netcdf("NETCDF4")(cube, tmp_path)
    assert np.array_equal(frames(path, x="a", y="b", time="c")[0].values, rain()[0], equal_nan=True)
    assert "source.x=z: holds no such array" in refusal(path, x="z", y="b", time="c")


def test_mlcast_cubes_leave_out_what_they_say_is_missing_and_the_future(tmp_path):
    cube = dataset()
    cube["missing_times"] = ("missing_times", cube["time"].values[[1]])
    cube["missing_times"].encoding = cube["time"].encoding
    cube.attrs |= {"last_valid_timestep": "2020-05-01T00:15:00Z", "license": "CC-BY-4.0"}
    path = store(2)(cube, tmp_path)
    assert [frame.valid_time.minute for frame in frames(path)] == [5, 15]
    with pytest.raises(ValueError, match=r"holds no field valid at 2020-05-01T00:10:00Z, but 2 from"):
        Cf().read(RemoteFile(str(path), datetime(2020, 5, 1, 0, 10, tzinfo=UTC)))


def test_a_cube_of_this_software_is_read_out_of_its_group(tmp_path):
    group = zarr.open_group(tmp_path / "cube.zarr", mode="w", zarr_format=3).create_group("radar")
    write_grid(group, GRID)
    seconds = group.create_array("time", shape=(SIZE,), dtype="i8", dimension_names=("time",))
    seconds.attrs.update({"units": "seconds since 1970-01-01T00:00:00Z", "calendar": "standard"})
    seconds[:] = 1588291500 + 300 * np.arange(SIZE)
    values = rain()
    rate = group.create_array(
        "rainfall_rate",
        shape=values.shape,
        chunks=(1, 5, 7),
        dtype="f4",
        fill_value=np.nan,
        dimension_names=("time", "y", "x"),
    )
    rate.attrs.update({"units": "mm h-1", "grid_mapping": "crs", "coordinates": "lat lon"})
    rate[:] = values
    found = frames(tmp_path, variable="radar/rainfall_rate")
    assert np.array_equal([frame.values for frame in found], values, equal_nan=True)
    assert found[0].grid == GRID


def test_classes_take_their_meanings_from_the_file_or_the_configuration(tmp_path):
    values = np.ones((SIZE, *GRID.shape), np.uint8)
    flags = {"flag_values": np.array([1, 2], np.uint8), "flag_meanings": "land sea", "units": "1"}
    path = netcdf("NETCDF4")(dataset(values, **flags), tmp_path)
    told = {"quantity": "cloud_type"}
    assert frames(path, **told)[0].variable.classes == ((1, "land"), (2, "sea"))
    given = OmegaConf.create({1: "wood"})
    assert frames(path, **told, classes=given)[0].variable.classes == ((1, "wood"),)


def test_what_never_changes_needs_no_time(tmp_path):
    cube = dataset(units="m").isel(time=0, drop=True)
    path = netcdf("NETCDF4")(cube, tmp_path)
    (frame,) = frames(path, group="static", quantity="elevation")
    assert (frame.valid_time, frame.cadence, frame.group) == (ALWAYS, None, "static")
    assert "nothing says when rainfall_rate is valid" in refusal(path, factor=1.0)


@pytest.mark.parametrize("form", [2, 3])
def test_a_chunk_that_was_never_written_is_not_dry(form, tmp_path):
    path = tmp_path / "cube.zarr"
    dataset().drop_vars("rainfall_rate").to_zarr(path, zarr_format=form, consolidated=False)
    names = {"dimension_names": ("time", "y", "x")} if form == 3 else {}
    array = zarr.create_array(
        path / "rainfall_rate",
        shape=(SIZE, *GRID.shape),
        chunks=(1, 3, 4),
        dtype="f4",
        fill_value=0,
        zarr_format=form,
        **names,
    )
    array.attrs.update({"units": "mm h-1", "grid_mapping": "crs"})
    if form == 2:
        array.attrs["_ARRAY_DIMENSIONS"] = ["time", "y", "x"]
    array[0], array[1, :3] = 1.5, 1.5
    found, filled = frames(path), frames(path, fill_is_observed=True)
    assert (found[0].values == 1.5).all()
    assert np.isnan(found[1].values[3:]).all()
    assert (found[1].values[:3] == 1.5).all()
    assert np.isnan(found[2].values).all()
    assert (filled[1].values[3:] == 0).all()
    assert (filled[1].values[:3] == 1.5).all()


def test_the_checksum_of_a_field_is_its_own_and_outlasts_an_append(tmp_path):
    cube = dataset()
    path = store(3)(cube.isel(time=[0, 1]), tmp_path)
    before = [frame.sha256 for frame in frames(path)]
    cube.isel(time=[2, 3]).drop_vars(["crs", "x", "y"]).to_zarr(path, append_dim="time", consolidated=False)
    after = [frame.sha256 for frame in frames(path)]
    assert after[:2] == before
    assert len(set(after)) == SIZE


def test_a_field_of_a_file_bears_the_files_checksum(tmp_path):
    import hashlib

    path = netcdf("NETCDF4")(dataset(), tmp_path)
    assert {frame.sha256 for frame in frames(path)} == {hashlib.sha256(path.read_bytes()).hexdigest()}


def test_files_that_cannot_be_opened_are_listed_last_and_the_rest_goes_on(tmp_path):
    netcdf("NETCDF4")(dataset(), tmp_path)
    (tmp_path / "cut.nc").write_bytes((tmp_path / "cube.nc").read_bytes()[:3000])
    (tmp_path / "page.nc").write_text("<html>Not found</html>")
    (tmp_path / "notes.txt").touch()
    source = Cf(str(tmp_path))
    files = list(source.files(None, None))
    assert [Path(file.url).name for file in files if file.valid_time is None] == ["cut.nc", "page.nc"]
    assert [file.valid_time is None for file in files] == [False] * SIZE + [True] * 2
    for file in files[SIZE:]:
        with pytest.raises(ValueError, match=rf"^{Path(file.url).name}: (a cut or|neither NetCDF)"):
            source.read(file)
    with pytest.raises(ValueError, match="no Zarr store whose name is nothing"):
        list(Cf(str(tmp_path), names="nothing").files(None, None))
    with pytest.raises(ValueError, match="not there"):
        list(Cf(str(tmp_path / "nowhere")).files(None, None))


def test_another_array_is_refused_by_name(tmp_path):
    path = netcdf("NETCDF4")(dataset(), tmp_path)
    assert "holds no array 'rain'; name another by source.variable" in refusal(path, variable="rain")
    with pytest.raises(ValueError, match="expected one of rainfall_rate"):
        Cf(quantity="rain")
    with pytest.raises(ValueError, match="expected end or start"):
        Cf(time_is="middle")


def test_it_works_in_the_bounded_process_as_configured(tmp_path):
    cube = dataset().expand_dims(channel=np.array(["A"]))
    path = store(2, chunks=None)(cube, tmp_path)
    config = OmegaConf.load(cli.CONFIGS / "source" / "cf.yaml")
    config = OmegaConf.merge(config, {"path": str(tmp_path), "missing": [-1], "select": {"channel": "A"}})
    with Decoder(instantiate(config)) as decoder:
        files = decoder.files(None, None)
        assert [file.url for file in files] == [str(path)] * SIZE
        assert np.array_equal(decoder.decode(files[1]).values, rain()[1], equal_nan=True)


def source(name: str, path: Path, **settings) -> Cf:
    config = OmegaConf.load(cli.CONFIGS / "source" / f"{name}.yaml")
    return instantiate(OmegaConf.merge(config, {"path": str(path), **settings}))


SETS = {
    "smhi_openmrg": ("smhi_openmrg", "rainfall_amount", 12, 31, {}),
    "smhi_openmrg_rate": ("smhi_openmrg", "R", 1, 145, {}),
    "openrainer": ("openrainer", "rainfall_amount", 4, 11, {}),
    "meteonet_cloud_type": ("meteonet", "CT", 1, 9, {}),
    "seviri": ("seviri", "data", 1, 25, {}),
    "seviri, 15 minutes": (
        "seviri",
        "data",
        1,
        9,
        {"names": r"sat_data_15\.zarr", "select": {"variable": None, "channels": "IR_016"}},
    ),
}


@pytest.mark.data
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_real_sets_read_as_xarray_reads_them_by_coordinate(name, step, data):
    folder, variable, factor, count, changes = SETS[name]
    config = source(name.split(",")[0], data / folder, **changes)
    files = list(config.files(None, None))
    assert len(files) == count
    url = files[0].url
    opened = xr.open_zarr(url) if url.endswith("zarr") else xr.open_dataset(url, engine="netcdf4")
    with opened:
        for file in files[::step]:
            frame = config.read(file)
            field = opened[variable].sel(
                time=np.datetime64(file.valid_time.replace(tzinfo=None)), method="nearest"
            )
            field = field.squeeze()
            y, x = field.dims
            expected = field.sortby(y, ascending=False).sortby(x).values.astype(float) * factor
            if folder == "seviri":
                expected[expected == 0] = np.nan  # a corner of every frame, and tiles
            assert np.array_equal(np.isnan(frame.values), np.isnan(expected))
            assert np.nanmax(np.abs(frame.values - expected)) < 1e-5
            assert frame.valid_time == file.valid_time


CORNERS = {  # first and last cell, computed from the numbers in the files
    "smhi_openmrg": (
        "smhi_openmrg",
        "+proj=stere +lat_ts=60 +ellps=bessel +lon_0=14 +lat_0=90",
        [(-154199.32290894, -3412560.83300758), (-82199.32290894, -3506560.83300758)],
    ),
    "openrainer": ("openrainer", None, [(8.5, 46.001), (13.2058, 43.4)]),
    "meteonet_cloud_type": ("meteonet", None, [(-5.842, 51.896), (2.0, 46.25)]),
    "seviri": (
        "seviri",
        "+proj=geos +lon_0=9.5 +h=35785831 +a=6378169 +rf=295.488065897014",
        [  # half a cell inside the attribute area_extent
            (-1816744.1169023514 + 1500.2016, 5090183.970808983 - 1500.2016),
            (28503.830075263977 - 1500.2016, 4196063.827395439 + 1500.2016),
        ],
    ),
}


@pytest.mark.data
@pytest.mark.parametrize("name", CORNERS)
def test_real_sets_lie_where_their_numbers_say_to_a_metre(name, data):
    folder, projection, corners = CORNERS[name]
    config = source(name, data / folder)
    grid = config.read(next(iter(config.files(None, None)))).grid
    assert (grid.x[0], grid.y[0]) == pytest.approx(corners[0], abs=0.01 if projection else 1e-5)
    for row, column, corner in ((0, 0, corners[0]), (grid.y_size - 1, grid.x_size - 1, corners[1])):
        place = Proj(projection)(*corner, inverse=True) if projection else corner
        lon, lat = grid.window(row, column, 1, 1).lonlat()
        _, _, metres = Geod(ellps="WGS84").inv(lon[0, 0], lat[0, 0], *place)
        assert metres < 1


@pytest.mark.data
@pytest.mark.parametrize(
    "names, select", [(r"sat_data\.zarr", {}), (r"sat_data_15\.zarr", {"channels": "IR_016"})]
)
def test_seviri_lies_on_the_satellites_own_lattice_to_the_rounding_of_its_numbers(names, select, data):
    config = source("seviri", data / "seviri", names=names, **({"select": select} if select else {}))
    file = next(iter(config.files(None, None)))
    grid = config.read(file).grid
    assert (grid.x_step, grid.y_step) == pytest.approx((3000.403165817, -3000.403165817), abs=1e-8)
    assert (grid.x[-1], grid.y[-1]) == pytest.approx((9 * 3000.403165817, 1399 * 3000.403165817), abs=1e-6)
    with xr.open_zarr(file.url) as store:
        y, x = (store["data"][name].values for name in store["data"].dims[1:3])
    assert np.abs(np.sort(x) - grid.x).max() <= np.spacing(np.abs(x).max()) / 2  # as 32 bits round them
    assert np.abs(np.sort(y)[::-1] - grid.y).max() <= np.spacing(np.abs(y).max()) / 2 * 1.01
    with pytest.raises(
        ValueError, match=r"its x are no neighbouring multiples of 3000\.4, .*source\.sampling"
    ):
        replace(config, sampling=3000.4).read(file)
    with pytest.raises(ValueError, match=r"source\.sampling=0: expected more than 0"):
        replace(config, sampling=0)


@pytest.mark.data
def test_seviri_tiles_that_were_lost_are_not_observed(data):
    config = source("seviri", data / "seviri")
    files = list(config.files(None, None))
    missing = {place: np.isnan(config.read(files[place]).values).mean() for place in (0, 4, 10, 22)}
    assert [round(100 * missing[place]) for place in (0, 4, 10, 22)] == [6, 26, 42, 12]
    frame = config.read(files[0])
    assert np.isnan(frame.values[0, -1])  # the north-east corner, wherever the store has it
    assert frame.group == "satellite"
    other = source("seviri", data / "seviri", select={"variable": "VIS006"})
    with pytest.raises(ValueError, match=r"has the labels \['IR_016'\], not 'VIS006'"):
        other.read(files[0])


@pytest.mark.data
def test_the_classes_of_meteonet_have_meanings(data):
    config = source("meteonet_cloud_type", data / "meteonet")
    frame = config.read(next(iter(config.files(None, None))))
    assert dict(frame.variable.classes)[6] == "low_clouds"
    assert frame.cadence == timedelta(minutes=15)


def test_the_configuration_is_json_at_heart():
    config = OmegaConf.to_container(OmegaConf.load(cli.CONFIGS / "source" / "cf.yaml"))
    assert json.loads(json.dumps(config)) == config
