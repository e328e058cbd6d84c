"""A plain store or file read as a cube: what was exported comes back, others' data as they mean it."""

import json
import pickle
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
import zarr

from metnet.forecaster import Forecaster
from metnet.scores.crps import Crps
from pipelines import cf
from pipelines.baselines.extrapolation import Extrapolation
from pipelines.baselines.persistence import Persistence
from pipelines.cf import Variable
from pipelines.cube import Cube
from pipelines.export import export
from pipelines.forecast import forecast
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.plain import PlainCube, open_cube
from pipelines.runs import ForecastStore
from pipelines.samples import Samples, Span, split
from pipelines.verify import verify

START, CADENCE = datetime(2020, 1, 1, tzinfo=UTC), timedelta(minutes=5)
GRID = Grid("EPSG:3035", 4_000_000.1, 1000.3, 6, 3_000_000.7, -999.9, 4)
SUFFIXES = ("zarr", "nc")


def at(step: int) -> datetime:
    return START + step * CADENCE


def rain(step: int, shape: tuple[int, int] = GRID.shape) -> np.ndarray:
    """Different at every step; with dry cells and cells that no radar sees."""
    noise = np.random.default_rng(step + 1000)
    field = noise.gamma(0.5, 4.0, shape).astype(np.float32)
    field[noise.random(shape) < 0.4] = 0.0
    field[noise.random(shape) < 0.2] = np.nan
    return field


def make_cube(
    path: Path, steps: tuple[int, ...], variable: Variable = cf.RAINFALL_RATE, grid: Grid = GRID
) -> Cube:
    cube = Cube.open_or_create(str(path), grid, variable, START, CADENCE)
    cube.write(
        [
            Frame(variable, at(step), CADENCE, grid, rain(step, grid.shape), "noise", f"{step + 1:02x}" * 32)
            for step in steps
        ]
    )
    return cube


def assert_same(plain: PlainCube, cube: Cube) -> None:
    """All that a cube tells, to the last bit."""
    assert (plain.grid, plain.variable, plain.cadence) == (cube.grid, cube.variable, cube.cadence)
    assert plain.times == cube.times
    assert plain.observed.tolist() == cube.observed.tolist()
    count = len(cube.times)
    expected = cube.block(at(-2), count + 4)
    assert plain.block(at(-2), count + 4).view(np.uint32).tolist() == expected.view(np.uint32).tolist()
    window = (1, 2, 3, 4)
    np.testing.assert_array_equal(plain.block(at(-3), 4, window, 3), cube.block(at(-3), 4, window, 3))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "crs",
    ["EPSG:3035", "EPSG:4326", "EPSG:3413", "+proj=stere +lat_0=90 +lat_ts=60 +a=6378140 +b=6356750"],
)
def test_what_was_exported_is_the_cube_it_was(tmp_path, suffix, crs):
    grid = Grid(crs, 0.1 + 0.2, 1 / 3, 6, 1 / 7, -1 / 9, 4)
    cube = make_cube(tmp_path / "cube", (0, 1, 4, 6), grid=grid)
    export(cube.path, str(tmp_path / f"out.{suffix}"))
    assert_same(PlainCube.open(str(tmp_path / f"out.{suffix}")), cube)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "variable", [cf.BRIGHTNESS_TEMPERATURE, cf.PRECIPITATION_FLAG, cf.PRECIPITATION_AMOUNT_1H]
)
def test_every_quantity_comes_back_as_what_it_is(tmp_path, suffix, variable):
    cube = Cube.open_or_create(str(tmp_path / "cube"), GRID, variable, START, CADENCE, "satellite")
    values = np.full(GRID.shape, 91, np.float32)
    values[0, 0] = np.nan
    cube.write([Frame(variable, at(0), CADENCE, GRID, values, "noise", "ab" * 32, "satellite")])
    to = str(tmp_path / f"out.{suffix}")
    export(cube.path, to, group="satellite")
    assert_same(open_cube(to), cube)  # one frame: its cadence is told by time_coverage_resolution


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_steps_without_a_frame_at_both_ends_stay_on_the_axis(tmp_path, suffix):
    cube = make_cube(tmp_path / "cube", (0, 2, 4, 8))
    to = tmp_path / f"out.{suffix}"
    export(cube.path, str(to), start="2020-01-01T00:05Z", end="2020-01-01T00:35Z")
    plain = PlainCube.open(str(to))
    assert plain.times == cube.times[1:8] and plain.cadence == CADENCE
    assert plain.observed.tolist() == [False, True, False, True, False, False, False]
    np.testing.assert_array_equal(plain.block(at(1), 7), cube.block(at(1), 7))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_copy_is_named_the_same_and_another_content_otherwise(tmp_path, suffix):
    names = []
    for number, steps in enumerate(((0, 1), (0, 1), (0, 2))):
        cube = make_cube(tmp_path / f"cube{number}", steps)
        export(cube.path, str(tmp_path / f"{number}.{suffix}"))
        names.append(PlainCube.open(str(tmp_path / f"{number}.{suffix}")).snapshot)
    copy = shutil.copytree if suffix == "zarr" else shutil.copy
    copy(tmp_path / f"0.{suffix}", tmp_path / f"copy.{suffix}")
    assert PlainCube.open(str(tmp_path / f"copy.{suffix}")).snapshot == names[0]
    assert len(set(names)) == 3  # the history says which cube each is from


def exported(tmp_path: Path) -> Path:
    export(make_cube(tmp_path / "cube", (0, 1, 2)).path, str(tmp_path / "out.zarr"))
    return tmp_path / "out.zarr"


def test_a_chunk_that_is_gone_is_no_missing_frame(tmp_path):
    store = exported(tmp_path)
    (store / "rainfall_rate/c/1/0/0").unlink()
    assert np.isnan(zarr.open_array(store / "rainfall_rate", mode="r")[1]).all()  # as Zarr has it
    plain = PlainCube.open(str(store))
    np.testing.assert_array_equal(plain.block(at(0), 1)[0], rain(0))
    with pytest.raises(
        ValueError, match=r"rainfall_rate/c/1/0/0: the chunk cannot be read .*export the store"
    ):
        plain.block(at(0), 3)


def test_a_chunk_in_anothers_place_or_with_a_flipped_bit_is_refused(tmp_path):
    store = exported(tmp_path)
    shutil.copy(store / "rainfall_rate/c/0/0/0", store / "rainfall_rate/c/1/0/0")
    content = bytearray((store / "rainfall_rate/c/2/0/0").read_bytes())
    content[len(content) // 2] ^= 4
    (store / "rainfall_rate/c/2/0/0").write_bytes(content)
    plain = PlainCube.open(str(store))
    with pytest.raises(ValueError, match="another chunk than the one that was exported"):
        plain.block(at(1), 1)
    with pytest.raises(ValueError, match="damaged Zarr array"):
        plain.block(at(2), 1)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("lat/c/0/0", "the chunk cannot be read"),
        ("time/c/0", "the chunk cannot be read"),
        ("rainfall_rate/metnet_chunks.json", "lacks its metnet_chunks.json"),
    ],
)
def test_a_store_that_lost_another_part_is_refused_at_once(tmp_path, file, reason):
    store = exported(tmp_path)
    (store / file).unlink()
    with pytest.raises(ValueError, match=reason):
        PlainCube.open(str(store))


def test_changed_metadata_are_refused(tmp_path):
    store = exported(tmp_path)
    head = json.loads((store / "rainfall_rate/zarr.json").read_text())
    head["attributes"]["units"] = "mm s-1"
    (store / "rainfall_rate/zarr.json").write_text(json.dumps(head))
    with pytest.raises(ValueError, match="does not belong to the array beside it"):
        PlainCube.open(str(store))


def test_a_flipped_bit_in_a_netcdf_file_is_an_error(tmp_path):
    export(make_cube(tmp_path / "cube", (0, 1, 2)).path, str(tmp_path / "out.nc"))
    with h5py.File(tmp_path / "out.nc") as file:
        stored = file["rainfall_rate"].id.get_chunk_info_by_coord((1, 0, 0))
    content = bytearray((tmp_path / "out.nc").read_bytes())
    content[stored.byte_offset + stored.size // 2] ^= 1
    (tmp_path / "out.nc").write_bytes(content)
    with pytest.raises(ValueError, match="damaged chunk"):
        PlainCube.open(str(tmp_path / "out.nc")).block(at(1), 1)


def stranger(units: str = "mm h-1", factor: float = 1.0, **changes: object) -> xr.Dataset:
    """Rain as others write it: south first, packed, in a projection, with words of their own."""
    steps = (0, 1, 3)
    fields = np.stack([rain(step)[::-1] for step in steps])  # row 0 south
    rate = (("time", "y", "x"), (fields * factor).astype(np.float32), {"units": units, "grid_mapping": "map"})
    dataset = xr.Dataset(
        {"RR": rate, "map": ((), np.int32(0), {"crs_wkt": GRID.crs})},
        {
            "time": [np.datetime64(at(step).replace(tzinfo=None), "ns") for step in steps],
            "y": ("y", GRID.y[::-1], {"standard_name": "projection_y_coordinate", "units": "m"}),
            "x": ("x", GRID.x, {"standard_name": "projection_x_coordinate", "units": "m"}),
        },
    )
    return dataset.assign(changes)


ENCODING = {"time": {"units": "minutes since 1999-12-31", "dtype": "int32", "_FillValue": None}}


def written(dataset: xr.Dataset, path: Path) -> str:
    """By xarray: Zarr v2 or v3, NetCDF-4 or NetCDF-3."""
    if path.suffix == ".zarr":
        version = 2 if "v2" in path.name else 3
        dataset.to_zarr(path, zarr_format=version, consolidated=False, encoding=ENCODING)
    else:
        kind = "NETCDF3_64BIT" if "v3" in path.name else "NETCDF4"
        dataset.to_netcdf(path, format=kind, encoding=ENCODING)
    return str(path)


@pytest.mark.parametrize("name", ["v2.zarr", "v3.zarr", "v4.nc", "v3.nc"])
def test_a_strangers_data_are_turned_north_up_and_placed_on_a_regular_axis(tmp_path, name):
    plain = open_cube(written(stranger(), tmp_path / name))
    assert isinstance(plain, PlainCube) and plain.variable == cf.RAINFALL_RATE
    assert plain.times == [at(step) for step in range(4)]
    assert plain.observed.tolist() == [True, True, False, True]
    np.testing.assert_allclose([plain.grid.x_first, plain.grid.y_first], [GRID.x_first, GRID.y_first])
    assert plain.grid.shape == GRID.shape and plain.grid.y_step < 0
    expected = np.stack([rain(0), rain(1), np.full(GRID.shape, np.nan), rain(3)])
    np.testing.assert_array_equal(plain.block(at(0), 4), expected)


@pytest.mark.parametrize(
    ("units", "factor"),
    [("mm/h", 1.0), ("kg m-2 s-1", 1 / 3600), ("mm", 1 / 12), ("kg m-2", 1 / 12), ("m s-1", 1 / 3.6e6)],
)
def test_units_of_rain_become_mm_per_hour(tmp_path, units, factor):
    plain = open_cube(written(stranger(units, factor), tmp_path / "out.zarr"))
    np.testing.assert_allclose(plain.block(at(3), 1)[0], rain(3), rtol=1e-6)


def test_packed_numbers_are_unpacked_and_their_fill_is_not_rain(tmp_path):
    encoding = {
        "RR": {"dtype": "int16", "scale_factor": 0.1, "add_offset": 5.0, "_FillValue": -1},
        **ENCODING,
    }
    stranger().to_zarr(tmp_path / "out.zarr", zarr_format=3, consolidated=False, encoding=encoding)
    got = open_cube(str(tmp_path / "out.zarr")).block(at(0), 1)[0]
    np.testing.assert_allclose(got, rain(0), atol=0.051)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(rain(0)))


def test_mlcasts_missing_times_are_steps_without_a_frame(tmp_path):
    missing = [np.datetime64(at(step).replace(tzinfo=None), "ns") for step in (2, 4)]
    dataset = stranger().assign_coords(missing_times=("missing_times", missing))
    plain = open_cube(written(dataset, tmp_path / "v2.zarr"))
    assert plain.observed.tolist() == [True, True, False, True, False]


def test_a_quality_layer_beside_the_rain_is_not_taken_for_it(tmp_path):
    quality = (
        ("time", "y", "x"),
        np.ones((3, *GRID.shape), np.float32),
        {"units": "1", "grid_mapping": "map"},
    )
    plain = open_cube(written(stranger(quality=quality), tmp_path / "out.nc"))
    np.testing.assert_array_equal(plain.block(at(1), 1)[0], rain(1))


def test_data_in_a_group_are_found_by_its_name(tmp_path):
    stranger().to_zarr(
        tmp_path / "out.zarr", group="satellite", zarr_format=3, consolidated=False, encoding=ENCODING
    )
    with pytest.raises(ValueError, match="no array of three dimensions"):
        open_cube(str(tmp_path / "out.zarr"))
    plain = open_cube(str(tmp_path / "out.zarr"), "satellite")
    np.testing.assert_array_equal(plain.block(at(1), 1)[0], rain(1))


def off_axis() -> xr.Dataset:
    times = [np.datetime64("2020-01-01", "ns") + np.timedelta64(minute, "m") for minute in (0, 5, 12)]
    return stranger().assign_coords(time=times)


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        (lambda: stranger("inch"), r"RR is in 'inch'.*give source.factor.*metnet ingest source=cf"),
        (lambda: stranger("dBZ"), r"RR is in 'dBZ'.*metnet ingest source=cf"),
        (
            off_axis,
            r"time 2020-01-01T00:12:00Z is no whole number of steps after .*commonest step is 0:05:00",
        ),
        (lambda: stranger(other=stranger()["RR"]), r"holds several quantities \(RR, other\)"),
        (lambda: stranger().isel(time=slice(1)), "no time_coverage_resolution"),
        (lambda: stranger().isel(time=[1, 0, 2]), "times do not rise.*sort them"),
        (lambda: stranger().drop_vars("map"), "on which map"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_not_understood_is_refused_with_what_to_do(tmp_path, suffix, dataset, reason):
    with pytest.raises(ValueError, match=reason):
        open_cube(written(dataset(), tmp_path / f"out.{suffix}"))


def test_a_file_that_leads_to_other_files_is_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"canary" * 100)
    written(stranger(), tmp_path / "out.nc")
    with h5py.File(tmp_path / "out.nc", "r+") as file:
        external = [(str(secret), 0, 3 * 4 * 6 * 4)]
        file.create_dataset("rainfall_rate", (3, 4, 6), "f4", external=external)
    with pytest.raises(ValueError, match="stored in another file"):
        open_cube(str(tmp_path / "out.nc"))


def test_a_store_with_a_link_to_another_file_is_refused(tmp_path):
    store = Path(written(stranger(), tmp_path / "v3.zarr"))
    (store / "RR/c/0/0/0").rename(tmp_path / "secret")
    (store / "RR/c/0/0/0").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link; refused"):
        open_cube(str(store))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_places_and_times_outside_are_refused_as_a_cube_does(tmp_path, suffix):
    export(make_cube(tmp_path / "cube", (0, 1)).path, str(tmp_path / f"out.{suffix}"))
    plain = open_cube(str(tmp_path / f"out.{suffix}"))
    with pytest.raises(ValueError, match="reaches outside the grid"):
        plain.block(at(0), 1, (0, 0, 5, 6))
    with pytest.raises(ValueError, match="is not on the time axis"):
        plain.block(at(0) + timedelta(minutes=1), 1)
    with pytest.raises(ValueError, match="expected 1 or more"):
        plain.block(at(0), 0)
    assert np.isnan(plain.block(at(90), 2)).all()


def test_a_cube_is_opened_as_a_cube_and_nothing_as_nothing(tmp_path):
    made = make_cube(tmp_path / "cube", (0,))
    assert isinstance(open_cube(made.path), Cube)
    with pytest.raises(ValueError, match="no such folder"):
        open_cube(str(tmp_path / "nothing"))
    (tmp_path / "text.nc").write_text("rain")
    with pytest.raises(ValueError, match=r"^/.*: neither NetCDF nor HDF5"):
        open_cube(str(tmp_path / "text.nc"))


def test_a_copy_for_another_process_reads_the_same(tmp_path):
    plain = PlainCube.open(str(exported(tmp_path)))
    copy = pickle.loads(pickle.dumps(plain))
    np.testing.assert_array_equal(copy.block(at(0), 3), plain.block(at(0), 3))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_dataset_of_some_steps_is_read_when_it_is_used_and_passes_the_cf_checker(tmp_path, suffix):
    cube = make_cube(tmp_path / "cube", (0, 1, 3))
    export(cube.path, str(tmp_path / f"out.{suffix}"))
    dataset = open_cube(str(tmp_path / f"out.{suffix}")).between(at(1), at(3))
    np.testing.assert_array_equal(dataset.rainfall_rate.values, cube.block(at(1), 3))
    expected = cube.between(at(1), at(3))
    for name in ("time", "x", "y", "lat", "lon", "crs"):
        xr.testing.assert_equal(dataset[name].variable, expected[name].variable)
    part = dataset.rainfall_rate.isel(time=slice(1, 3), y=slice(1, 2), x=slice(2, 4))
    np.testing.assert_array_equal(part.values, cube.block(at(2), 2, (1, 2, 1, 2)))
    assert dataset.isel(time=slice(0)).rainfall_rate.values.shape == (0, *GRID.shape)

    dataset.to_netcdf(tmp_path / "part.nc")
    checker, report = Path(sys.executable).with_name("compliance-checker"), tmp_path / "report.json"
    subprocess.run(
        [checker, "--test", "cf:1.11", "--format", "json_new", "--output", report, tmp_path / "part.nc"],
        capture_output=True,
        check=False,
    )
    [result] = json.loads(report.read_text()).values()
    checks = result["cf:1.11"]["all_priorities"]
    assert {check["name"]: check["msgs"] for check in checks if check["value"][0] != check["value"][1]} == {}
    assert len(checks) > 10


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_forecasts_and_scores_are_the_same_from_the_plain_copy(tmp_path, suffix):
    grid = Grid("EPSG:3035", 4_000_000.0, 1000.0, 24, 3_000_000.0, -1000.0, 20)
    cube = make_cube(tmp_path / "cube", tuple(range(8)), grid=grid)
    plain = str(tmp_path / f"out.{suffix}")
    export(cube.path, plain)
    reports = []
    for number, path in enumerate((cube.path, plain)):
        store, report = str(tmp_path / f"runs{number}"), str(tmp_path / f"report{number}")
        forecast(path, Extrapolation(), store, init_time=at(5).isoformat(), lead_times=[5, 10])
        baselines: dict[str, Forecaster] = {"persistence": Persistence()}
        done = verify(path, store, report, [Crps()], baselines, "persistence", resamples=2)
        reports.append(done.report)
    stores = [ForecastStore.open(str(tmp_path / f"runs{number}")) for number in range(2)]
    [name] = stores[0].names()
    xr.testing.assert_equal(stores[0].dataset(name), stores[1].dataset(name))
    assert stores[1].header(name).attributes["input_cube"] == plain
    for score in reports[0].skill.sums:
        assert reports[0].skill.sums[score].equal(reports[1].skill.sums[score])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_training_draws_the_same_samples_from_the_plain_copy(tmp_path, suffix):
    grid = Grid("EPSG:3035", 4_000_000.0, 1000.0, 24, 3_000_000.0, -1000.0, 20)
    cube = make_cube(tmp_path / "cube", tuple(range(9)), grid=grid)
    export(cube.path, str(tmp_path / f"out.{suffix}"))
    plain, span = open_cube(str(tmp_path / f"out.{suffix}")), Span.of(CADENCE, 3, [5, 10])
    drawn = []
    for observations in (cube, plain):
        inits = split(observations.observed, span, 0.0).training
        drawn.append(Samples(observations, inits, span, 8, seed=4)[11])
    assert drawn[0].radar.nan_to_num(-1).equal(drawn[1].radar.nan_to_num(-1))
    assert drawn[0].target.nan_to_num(-1).equal(drawn[1].target.nan_to_num(-1))


@pytest.mark.data
def test_real_rain_of_a_weather_service_is_read_as_another_tool_reads_it(data):
    path = data / "openrainer" / "openrainer_RAD.nc"
    plain = open_cube(str(path))
    with xr.open_dataset(path) as dataset:  # mm in 15 minutes
        expected = dataset.rainfall_amount.transpose("time", "lat", "lon").sortby("lat", ascending=False) * 4
        times = dataset.time.values.astype("datetime64[s]").astype(int)
    assert [round(time.timestamp()) for time in plain.times] == times.tolist()
    assert plain.cadence == timedelta(minutes=15) and plain.observed.all()
    assert plain.grid.is_geographic
    np.testing.assert_allclose(plain.grid.x, expected.lon.values, atol=1e-6)
    np.testing.assert_allclose(plain.grid.y, expected.lat.values, atol=1e-6)
    got = plain.block(plain.times[0], len(times))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected.values))
    np.testing.assert_allclose(got, expected.values, rtol=1e-6)
    assert np.nanmax(got) > 10
