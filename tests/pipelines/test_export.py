"""An export holds what the cube holds, bit for bit, whole or not at all, and passes the CF checker."""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from pyproj import CRS, Transformer

from pipelines import cf
from pipelines.cf import Variable
from pipelines.cube import Cube
from pipelines.export import _write, export, export_run
from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.plain import open_cube
from pipelines.repository import Repository
from pipelines.runs import ForecastStore, RunBlock, RunHeader
from pipelines.static import write_static

START, CADENCE = datetime(2020, 1, 1, tzinfo=UTC), timedelta(minutes=5)
PROJECTED = Grid("EPSG:3035", 4_000_000.1, 1000.3, 5, 3_000_000.7, -999.9, 4)
GEOGRAPHIC = Grid("EPSG:4326", 10.005, 0.01, 5, 50.0, -0.01, 4)
GEOSTATIONARY = Grid(  # of which the first rows lie in space
    "+proj=geos +sweep=x +lon_0=-75 +h=35786023 +ellps=GRS80 +units=m",
    -434894.885056,
    2004.017,
    5,
    5_410_000.0,
    -20040.17,
    4,
)
ROTATED = Grid(
    "+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39.25 +lon_0=18", -5.0, 0.5, 5, 2.0, -0.5, 4
)
POLAR = Grid("+proj=stere +lat_0=90 +lat_ts=60 +lon_0=0 +a=6378137 +b=6356752", 0.5, 1.0, 5, -3650.5, -1.0, 4)
CONIC = Grid("+proj=lcc +lat_1=46.5 +lat_0=46.5 +lon_0=3 +ellps=GRS80", 0.5, 1.0, 5, 0.5, -1.0, 4)
HELD = (0, 1, 4)  # steps with a frame


def values(variable: Variable, step: int, grid: Grid) -> np.ndarray:
    """Every kind of number: not observed, zero (dry), and others that no decimal writes exactly."""
    noise = np.random.default_rng(step)
    field = noise.random(grid.shape, dtype=np.float32) * np.float32(0.9)
    if variable.classes:
        field = noise.choice([value for value, _ in variable.classes], grid.shape).astype(np.float32)
    if variable.units == "K":
        field += np.float32(250)
    else:
        field[1] = 0.0
    field[0, :2] = np.nan
    return field


def frame(variable: Variable, step: int, grid: Grid = PROJECTED) -> Frame:
    time = START + step * CADENCE
    return Frame(variable, time, CADENCE, grid, values(variable, step, grid), "noise", f"{step + 1:02x}" * 32)


def make_cube(
    path: Path, variable: Variable = cf.RAINFALL_RATE, grid: Grid = PROJECTED, group: str = "radar"
) -> str:
    cube = Cube.open_or_create(str(path), grid, variable, START, CADENCE, group)
    cube.write([frame(variable, step, grid) for step in HELD])
    return str(path)


def make_static(path: Path, grid: Grid = PROJECTED) -> str:
    for variable in (cf.ELEVATION, cf.LAND_FRACTION):
        field = values(variable, 7, grid)
        write_static(str(path), Frame(variable, ALWAYS, None, grid, field, "hills", "ab" * 32, "static"))
    return str(path)


def opened(path: Path) -> xr.Dataset:
    """As a user would open it."""
    if path.suffix == ".zarr":
        return xr.open_zarr(path, decode_coords="all", chunks=None).load()
    with xr.open_dataset(path, decode_coords="all") as dataset:
        return dataset.load()


@pytest.mark.parametrize("name", ["out.zarr", "out.nc"])
def test_frames_are_exported_bit_for_bit_with_what_is_known_of_them(tmp_path, name):
    cube = make_cube(tmp_path / "cube")
    done = export(cube, str(tmp_path / "new" / name), license="CC-BY-4.0")
    assert "3 frames of rainfall_rate, 2 steps without one" in str(done)

    got = opened(tmp_path / "new" / name)

    expected = np.stack([values(cf.RAINFALL_RATE, step, PROJECTED) for step in HELD])
    assert got.rainfall_rate.values.view(np.uint32).tolist() == expected.view(np.uint32).tolist()
    utc = np.datetime64("2020-01-01", "ns") + np.array([0, 5, 20]) * np.timedelta64(1, "m")
    assert got.time.values.tolist() == utc.tolist()
    missing = np.datetime64("2020-01-01", "ns") + np.array([10, 15]) * np.timedelta64(1, "m")
    assert got.missing_times.values.tolist() == missing.tolist()
    assert got.source_sha256.dims == ("byte", "time")
    assert [bytes(digest).hex() for digest in got.source_sha256.values.T] == ["01" * 32, "02" * 32, "05" * 32]
    source = Cube.open(cube)
    flags = [source.quality(START + step * CADENCE) for step in HELD]
    np.testing.assert_array_equal(got.quality_flag.values, np.stack(flags))
    np.testing.assert_array_equal(got.x.values, PROJECTED.x)
    assert (got.attrs["license"], got.attrs["time_coverage_resolution"]) == ("CC-BY-4.0", "PT300S")
    assert source.snapshot in got.attrs["history"]
    assert got.rainfall_rate.attrs["units"] == "mm h-1" and "spatial_ref" in got.crs.attrs
    told = xr.open_dataset(tmp_path / "new" / name, decode_coords=False).rainfall_rate
    beside = told.attrs["ancillary_variables"].split()
    assert beside == ["quality_flag", "arrival_time", "decoder"]
    assert all(set(got[other].dims) <= set(told.dims) for other in beside), "CF-1.11, appendix I"


@pytest.mark.parametrize("name", ["out.zarr", "out.nc"])
@pytest.mark.parametrize(
    ("variable", "hours"), [(cf.PRECIPITATION_AMOUNT_1H, 1), (cf.PRECIPITATION_AMOUNT_24H, 24)]
)
def test_an_amount_says_from_when_to_when_it_fell(tmp_path, name, variable, hours):
    cube = Cube.open(make_cube(tmp_path / "cube", variable))
    export(cube.path, str(tmp_path / name))

    got = opened(tmp_path / name)

    assert (got.time.encoding["bounds"], got[variable.name].attrs["cell_methods"]) == (
        "time_bounds",
        "time: sum",
    )
    begin, end = got.time_bounds.values.T
    assert end.tolist() == got.time.values.tolist()
    assert set(end - begin) == {
        np.timedelta64(hours, "h").astype(end.dtype.name.replace("datetime", "timedelta"))
    }
    plain = open_cube(str(tmp_path / name))
    assert (plain.times, plain.variable) == (cube.times, cube.variable)


def test_a_store_has_one_checked_chunk_for_every_step_and_every_chunk_of_it_is_there(tmp_path):
    cube = Cube.open(make_cube(tmp_path / "cube"))
    blind = np.full(PROJECTED.shape, np.nan, np.float32)
    cube.write([replace(frame(cf.RAINFALL_RATE, 5), values=blind)])
    export(cube.path, str(tmp_path / "out.zarr"))
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert group["rainfall_rate"].chunks == (1, *PROJECTED.shape)
    assert np.isnan(group["rainfall_rate"].fill_value)
    for name, array in group.arrays():
        assert array.nchunks == array.nchunks_initialized, name
        assert array.metadata.to_dict()["codecs"][-1]["name"] == "crc32c", name


@pytest.mark.parametrize("name", ["out.zarr", "out.nc"])
def test_only_the_steps_asked_for_are_exported(tmp_path, name):
    cube = make_cube(tmp_path / "cube")
    export(cube, str(tmp_path / name), start="2020-01-01T00:05Z", end="2020-01-01T00:15Z")
    got = opened(tmp_path / name)
    assert [str(time)[11:16] for time in got.time.values] == ["00:05"]
    assert [str(time)[11:16] for time in got.missing_times.values] == ["00:10", "00:15"]
    with pytest.raises(
        ValueError, match=r"no frame within start=2021.*2020-01-01T00:00:00Z to 2020-01-01T00:20"
    ):
        export(cube, str(tmp_path / "none.nc"), start="2021-01-01")


@pytest.mark.parametrize("name", ["out.zarr", "out.nc"])
def test_static_fields_are_exported_with_their_source(tmp_path, name):
    make_static(tmp_path / "cube")
    export(str(tmp_path / "cube"), str(tmp_path / name), group="static")
    got = opened(tmp_path / name)
    np.testing.assert_array_equal(got.elevation.values, values(cf.ELEVATION, 7, PROJECTED))
    assert got.elevation.attrs["source_sha256"] == "ab" * 32 and "time" not in got.dims
    make_cube(tmp_path / "frames")
    with pytest.raises(ValueError, match="has no static fields"):
        export(str(tmp_path / "frames"), str(tmp_path / "none.nc"), group="static")


def make_runs(path: Path) -> ForecastStore:
    header = RunHeader(START, PROJECTED, (5.0, 10.0, 15.0), (0.1, 1.0), (0.25, 0.75), {"model": "dice"})
    noise = np.random.default_rng(3)

    def draw(*shape: int) -> np.ndarray:
        drawn = noise.random((*shape, *PROJECTED.shape), dtype=np.float32)
        drawn[..., 0, 0] = np.nan
        return drawn

    every = slice(None)
    block = RunBlock(every, every, every, draw(3, 2), draw(2, 3), draw(3), draw(3))
    store = ForecastStore.open_or_create(str(path))
    store.write_run(header, [block])
    store.write_run(replace(header, init_time=START + CADENCE), [block])
    return store


@pytest.mark.parametrize("name", ["out.zarr", "out.nc"])
def test_a_run_is_exported_as_it_is_stored_the_newest_unless_one_is_named(tmp_path, name):
    store = make_runs(tmp_path / "runs")
    export(store.path, str(tmp_path / name))
    export(store.path, str(tmp_path / f"first_{name}"), run=store.names()[0])
    for run, path in zip(store.names(), (f"first_{name}", name), strict=True):
        kwargs = {"decode_coords": "all", "decode_timedelta": False}
        if path.endswith(".zarr"):
            got = xr.open_zarr(tmp_path / path, chunks=None, **kwargs).load()
        else:
            with xr.open_dataset(tmp_path / path, **kwargs) as dataset:
                got = dataset.load()
        xr.testing.assert_equal(got, store.dataset(run))
        assert got.attrs["model"] == "dice"
    with pytest.raises(ValueError, match="no run '19'"):
        export(store.path, str(tmp_path / "none.nc"), run="19")


@pytest.mark.parametrize("name", ["run.zarr", "run.nc"])
def test_a_run_is_written_over_its_earlier_export(tmp_path, name):
    store = make_runs(tmp_path / "runs")
    for run in store.names():
        export_run(store, run, str(tmp_path / name))
    with opened(tmp_path / name) as file:
        assert file["forecast_reference_time"].values == np.datetime64((START + CADENCE).replace(tzinfo=None))


def test_what_appears_at_the_place_while_a_cube_is_exported_stays(tmp_path, monkeypatch):
    cube, place = make_cube(tmp_path / "cube"), tmp_path / "out.zarr"

    def meanwhile(steps, *_, **__):
        place.mkdir()
        (place / "mine").write_text("precious")
        return steps

    monkeypatch.setattr("pipelines.export.track", meanwhile)
    with pytest.raises(OSError, match="not empty"):
        export(cube, str(place))
    assert (place / "mine").read_text() == "precious"


@pytest.mark.parametrize("name", ["out.zarr", "out.nc"])
def test_an_export_that_fails_leaves_nothing(tmp_path, name, monkeypatch):
    cube = make_cube(tmp_path / "cube")

    def full(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == total - 2:
                raise OSError("no space left on the disk")
            yield item

    monkeypatch.setattr("pipelines.export.track", full)
    with pytest.raises(OSError, match="no space left"):
        export(cube, str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["cube"]


@pytest.mark.parametrize(
    ("to", "keys", "reason"),
    [
        ("out.tif", {}, "expected a Zarr store that ends in .zarr or a NetCDF file that ends in .nc"),
        ("s3://bucket/out.nc", {}, "on this machine"),
        ("there.nc", {}, "something is there already"),
        ("out.nc", {"run": "20200101T000000Z"}, "holds no forecasts"),
        ("out.nc", {"group": "static", "start": "2020-01-01"}, "choose from frames"),
        ("out.nc", {"group": "satellite"}, "without the group 'satellite'"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, to, keys, reason):
    cube = make_cube(tmp_path / "cube")
    (tmp_path / "there.nc").write_text("mine")
    with pytest.raises(ValueError, match=reason):
        export(cube, to if "://" in to else str(tmp_path / to), **keys)
    assert (tmp_path / "there.nc").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cube", "there.nc"]


def test_memory_holds_a_field_and_not_all_of_them(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("pipelines.export._write", lambda contents, path: seen.append(contents))
    monkeypatch.setattr("pipelines.export._size", lambda path: 0)
    export(make_cube(tmp_path / "cube"), str(tmp_path / "out.nc"))
    monkeypatch.undo()
    [contents] = seen
    for part in contents.parts:
        sizes = {part.read(number).size for number in range(len(part.regions))}
        assert max(sizes) <= max(np.prod(PROJECTED.shape), 3 * 32), part.name
    _write(contents, tmp_path / "out.nc")
    assert (tmp_path / "out.nc").is_file()


@pytest.mark.parametrize(
    ("grid", "latitude"),
    [
        (POLAR, 90.0),
        (replace(POLAR, crs="EPSG:3031"), -90.0),
        (CONIC, 46.5),
    ],
)
def test_a_grid_mapping_says_where_its_projection_begins(tmp_path, grid, latitude):
    export(make_cube(tmp_path / "cube", grid=grid), str(tmp_path / "out.nc"))
    crs = opened(tmp_path / "out.nc").crs

    assert crs.latitude_of_projection_origin == latitude
    words = {key: value for key, value in crs.attrs.items() if key not in ("crs_wkt", "spatial_ref")}
    by_words, by_wkt = (
        Transformer.from_crs("EPSG:4326", known, always_xy=True).transform(3.5, np.copysign(61, latitude))
        for known in (CRS.from_cf(words), CRS.from_wkt(grid.crs))
    )
    assert by_words == pytest.approx(by_wkt, abs=1e-3)  # m


def test_a_cube_whose_grid_mapping_lacks_a_word_is_exported_with_it(tmp_path):
    cube = make_cube(tmp_path / "cube", grid=POLAR)

    def forget(store: Any) -> None:
        del zarr.open_array(store, path="radar/crs").attrs["latitude_of_projection_origin"]

    Repository.open(cube).commit("as it was", forget)
    export(cube, str(tmp_path / "out.nc"))
    assert opened(tmp_path / "out.nc").crs.latitude_of_projection_origin == 90


@pytest.mark.slow
def test_exports_and_datasets_pass_the_cf_checker(tmp_path):
    grids = {
        "projected": PROJECTED,
        "geographic": GEOGRAPHIC,
        "geostationary": GEOSTATIONARY,
        "rotated": ROTATED,
        "polar": POLAR,
        "conic": CONIC,
    }
    groups = {
        "radar": cf.RAINFALL_RATE,
        "satellite": cf.BRIGHTNESS_TEMPERATURE,
        "kind": cf.PRECIPITATION_FLAG,
        "amount": cf.PRECIPITATION_AMOUNT_1H,
    }
    for name, grid in grids.items():
        for group, variable in groups.items():
            cube = make_cube(tmp_path / name, variable, grid, group)
            export(cube, str(tmp_path / f"{name}_{group}.nc"), group)
            dataset = Cube.open(cube, group).between(START, START + 9 * CADENCE)
            dataset.to_netcdf(tmp_path / f"{name}_{group}_between.nc")
        make_static(tmp_path / name, grid)
        export(str(tmp_path / name), str(tmp_path / f"{name}_static.nc"), "static")
    export(make_runs(tmp_path / "runs").path, str(tmp_path / "run.nc"))
    dry = replace(frame(cf.RAINFALL_RATE, 0), values=np.zeros(PROJECTED.shape, np.float32), scale_factor=0.1)
    packed = str(tmp_path / "packed")
    Cube.open_or_create(packed, PROJECTED, dry.variable, START, CADENCE, scale_factor=0.1).write([dry])
    export(packed, str(tmp_path / "packed.nc"))
    Cube.open(packed).between(START, START).to_netcdf(tmp_path / "packed_between.nc")
    files = sorted(tmp_path.glob("*.nc"))
    assert len(files) == len(grids) * (len(groups) * 2 + 1) + 1 + 2

    checker, report = Path(sys.executable).with_name("compliance-checker"), tmp_path / "report.json"
    subprocess.run(
        [checker, "--test", "cf:1.11", "--format", "json_new", "--output", report, *files],
        capture_output=True,
        check=False,
    )
    results = json.loads(report.read_text())

    assert len(results) == len(files)
    for file, result in results.items():
        checks = result["cf:1.11"]["all_priorities"]
        failed = {check["name"]: check["msgs"] for check in checks if check["value"][0] != check["value"][1]}
        if file.endswith(
            "_between.nc"
        ):  # a recommendation only: the bytes of the hash stand right of the time
            [remark] = failed.pop("§2.4 Dimensions")
            assert "source_sha256" in remark
        assert failed == {} and len(checks) > 10, file
