"""Forecast runs: whole or absent, once, and readable by every CF tool."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import cf, runs
from pipelines.cube import Cube
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.repository import Repository
from pipelines.runs import ForecastStore, RunBlock, RunHeader

INIT = datetime(2020, 1, 1, 6, 5, tzinfo=UTC)
GRID = Grid("EPSG:3035", 4_000_000.1, 1000.3, 7, 3_000_000.7, -999.9, 6)
GEOGRAPHIC = Grid("EPSG:4326", -99.995, 0.01, 7, 40.005, -0.01, 6)
HEADER = RunHeader(
    INIT, GRID, (5.0, 10.0, 15.0, 20.0), (0.1, 1.0, 5.0), (0.1, 0.9), {"model": "persistence", "cube": "V1CP"}
)


def whole(header: RunHeader = HEADER, seed: int = 0) -> RunBlock:
    """A run as one block, with cells that have no forecast."""
    noise = np.random.default_rng(seed)
    leads, cells = len(header.lead_times), header.grid.shape
    unknown = noise.random(cells) < 0.3

    def field(*sizes):
        values = noise.random((*sizes, *cells), dtype=np.float32)
        return np.where(unknown, np.float32(np.nan), values)

    return RunBlock(
        slice(0, leads),
        slice(0, cells[0]),
        slice(0, cells[1]),
        field(leads, len(header.thresholds)),
        field(len(header.quantiles), leads),
        field(leads),
        field(leads),
    )


def part(block: RunBlock, lead: slice, y: slice, x: slice) -> RunBlock:
    return RunBlock(
        lead,
        y,
        x,
        block.exceedance[lead, :, y, x],
        block.quantile[:, lead, y, x],
        block.median[lead, y, x],
        block.mean[lead, y, x],
    )


def new(path: Path | str) -> ForecastStore:
    return ForecastStore.open_or_create(str(path))


def assert_holds(store: ForecastStore, name: str, block: RunBlock) -> None:
    table = store.dataset(name)
    np.testing.assert_array_equal(table.probability_of_exceedance, block.exceedance)
    np.testing.assert_array_equal(table.rainfall_rate_quantile, block.quantile)
    np.testing.assert_array_equal(table.rainfall_rate_median, block.median)
    np.testing.assert_array_equal(table.rainfall_rate_mean, block.mean)


def test_a_run_comes_back_as_it_was_written(tmp_path):
    snapshot = new(tmp_path / "runs").write_run(HEADER, [whole()])
    store = ForecastStore.open(str(tmp_path / "runs"))
    assert store.snapshot == snapshot
    assert store.names() == ["20200101T060500Z"] and "20200101T060500Z" in store
    assert store.header("20200101T060500Z") == HEADER
    assert_holds(store, "20200101T060500Z", whole())


def test_times_and_axes_are_those_of_the_run(tmp_path):
    store = new(tmp_path / "runs")
    store.write_run(HEADER, [whole()])
    table = store.dataset(HEADER.name)
    assert table.forecast_reference_time.values == np.datetime64("2020-01-01T06:05")
    assert table.valid_time.dims == ("lead_time",)
    assert (
        table.valid_time.values[[0, 3]].tolist()
        == np.array(["2020-01-01T06:10", "2020-01-01T06:25"], "datetime64[ns]").tolist()
    )
    assert table.lead_time.dtype == np.float64 and table.lead_time.attrs["units"] == "minutes"
    assert table.lead_time.attrs["standard_name"] == "forecast_period"
    assert table.probability_of_exceedance.sel(threshold=1.0, lead_time=10.0).shape == GRID.shape
    assert table.rainfall_rate_quantile.sel(quantile=0.9).dims == ("lead_time", "y", "x")
    assert table.attrs["model"] == "persistence" and table.attrs["Conventions"] == "CF-1.11"
    np.testing.assert_allclose(table.lat, GRID.lonlat()[1], atol=1e-5)


@pytest.mark.parametrize("large", [False, True])
@given(
    lead=st.integers(1, 3),
    y=st.integers(1, 5),
    x=st.integers(1, 6),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=4)
def test_blocks_of_any_size_and_order_make_the_same_run(tmp_path_factory, large, lead, y, x, order):
    block = whole()
    blocks = [
        part(block, slice(a, b), slice(c, d), slice(e, f))
        for a, b in ((0, lead), (lead, 4))
        for c, d in ((0, y), (y, 6))
        for e, f in ((0, x), (x, 7))
    ]
    order.shuffle(blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SIDE", 4)  # several chunks
        patch.setattr(runs, "LARGE", 0 if large else 10**9)
        store = new(tmp_path_factory.mktemp("any") / "runs")
        store.write_run(HEADER, blocks)
    assert_holds(store, HEADER.name, block)


def test_what_no_block_covers_is_no_forecast(tmp_path):
    store = new(tmp_path / "runs")
    store.write_run(HEADER, [part(whole(), slice(0, 2), slice(0, 6), slice(0, 7))])
    table = store.dataset(HEADER.name)
    assert bool(table.rainfall_rate_mean[2:].isnull().all())
    np.testing.assert_array_equal(table.rainfall_rate_mean[:2], whole().mean[:2])


def test_a_point_is_one_chunk_on_small_grids_and_a_lead_time_on_large_ones(tmp_path):
    def chunks(header):
        return runs._chunks(header)

    assert chunks(replace(HEADER, grid=Grid("EPSG:3035", 0, 1, 1500, 0, -1, 1500))) == (4, (256, 256))
    many = tuple(float(lead) for lead in range(1, 61))
    leads, (rows, columns) = chunks(
        replace(HEADER, lead_times=many, grid=Grid("EPSG:3035", 0, 1, 1500, 0, -1, 1500))
    )
    assert leads == 60 and 60 * 3 * rows * columns * 4 <= 16 * 2**20
    assert chunks(replace(HEADER, grid=Grid("EPSG:3035", 0, 1, 7000, 0, -1, 3500))) == (1, (512, 512))


def test_the_same_run_is_done_once(tmp_path):
    store = new(tmp_path / "runs")
    first = store.write_run(HEADER, [whole()])

    def never():
        raise AssertionError("the forecast was computed again")
        yield

    assert store.write_run(HEADER, never()) is None
    assert store.snapshot == first == ForecastStore.open(store.path).snapshot
    assert_holds(store, HEADER.name, whole())


def test_a_half_written_run_is_never_visible(tmp_path):
    store = new(tmp_path / "runs")
    before = store.snapshot

    def blocks():
        yield part(whole(), slice(0, 2), slice(0, 6), slice(0, 7))
        assert ForecastStore.open(store.path).names() == []
        raise MemoryError("killed")

    with pytest.raises(MemoryError):
        store.write_run(HEADER, blocks())

    assert ForecastStore.open(store.path).snapshot == before
    assert store.write_run(HEADER, [whole(seed=1)]) is not None
    assert_holds(store, HEADER.name, whole(seed=1))


def test_a_reader_stays_on_its_snapshot_until_it_refreshes(tmp_path):
    writer, reader = new(tmp_path / "runs"), new(tmp_path / "runs")
    before = reader.snapshot
    writer.write_run(HEADER, [whole()])
    assert reader.names() == [] and reader.snapshot == before
    assert reader.refresh() == writer.snapshot
    assert reader.names() == [HEADER.name]


def test_runs_are_listed_oldest_first(tmp_path):
    store = new(tmp_path / "runs")
    for hours in (3, 1, 2):
        store.write_run(replace(HEADER, init_time=INIT + timedelta(hours=hours)), [whole()])
    assert store.names() == ["20200101T070500Z", "20200101T080500Z", "20200101T090500Z"]


@pytest.mark.parametrize("kind", ["local", "object store"])
def test_of_schedulers_that_race_exactly_one_writes_the_run(tmp_path, s3, kind):
    path = str(tmp_path / "runs") if kind == "local" else f"{s3}/race"
    new(path)
    start = Barrier(4)

    def schedule(seed):
        start.wait()
        return ForecastStore.open(path).write_run(HEADER, [whole(seed=seed)])

    with ThreadPoolExecutor(4) as threads:
        snapshots = list(threads.map(schedule, range(4)))

    [winner] = [seed for seed, snapshot in enumerate(snapshots) if snapshot is not None]
    store = ForecastStore.open(path)
    assert store.snapshot == snapshots[winner]
    assert_holds(store, HEADER.name, whole(seed=winner))


def test_two_runs_written_at_once_are_both_kept(tmp_path):
    path = str(tmp_path / "runs")
    new(path)
    headers = [replace(HEADER, init_time=INIT + timedelta(minutes=5 * i)) for i in range(3)]
    start = Barrier(3)

    def schedule(header):
        start.wait()
        return ForecastStore.open(path).write_run(header, [whole(seed=header.init_time.minute)])

    with ThreadPoolExecutor(3) as threads:
        assert None not in list(threads.map(schedule, headers))

    store = ForecastStore.open(path)
    for header in headers:
        assert_holds(store, header.name, whole(seed=header.init_time.minute))


def test_what_is_no_forecast_store_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder.*metnet forecast"):
        ForecastStore.open(str(tmp_path / "none"))
    cube = str(tmp_path / "cube")
    Cube.open_or_create(cube, GRID, cf.RAINFALL_RATE, INIT, timedelta(minutes=5))
    for open_store in (ForecastStore.open, ForecastStore.open_or_create):
        with pytest.raises(ValueError, match="not of forecasts"):
            open_store(cube)
    store = new(tmp_path / "runs").path
    with pytest.raises(ValueError, match="without the group 'radar' of a cube"):
        Cube.open(store)
    with pytest.raises(ValueError, match="holds forecasts, not a cube"):
        Cube.open_or_create(store, GRID, cf.RAINFALL_RATE, INIT, timedelta(minutes=5))


def test_an_unknown_run_is_said_with_the_newest(tmp_path):
    store = new(tmp_path / "runs")
    with pytest.raises(ValueError, match="no run 'latest'; there are none yet"):
        store.header("latest")
    store.write_run(HEADER, [whole()])
    with pytest.raises(ValueError, match=r"no run '../x'; the newest is 20200101T060500Z"):
        store.dataset("../x")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"init_time": datetime(2020, 1, 1)}, "whole seconds in UTC"),
        ({"lead_times": ()}, "one or more rising numbers"),
        ({"thresholds": (1.0, 0.1)}, "one or more rising numbers"),
        ({"quantiles": (0.5, 0.5)}, "one or more rising numbers"),
        ({"lead_times": (float("nan"),)}, "minutes above 0"),
        ({"lead_times": (5.0, float("inf"))}, "minutes above 0"),
        ({"lead_times": (0.0, 5.0)}, "minutes above 0"),
        ({"thresholds": (-1.0, 1.0)}, "mm/h above 0"),
        ({"thresholds": (1.0, float("nan"))}, "mm/h above 0"),
        ({"thresholds": (1.0, 1.0000000001)}, "first six figures"),
        ({"quantiles": (0.0, 0.5)}, "within 0..1"),
        ({"quantiles": (0.5, 1.0)}, "within 0..1"),
        ({"attributes": {"Conventions": "mine"}}, "none of"),
    ],
)
def test_a_header_that_cannot_be_a_run_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        replace(HEADER, **wrong)


def test_a_block_that_does_not_fit_is_refused_before_anything_is_visible(tmp_path):
    store = new(tmp_path / "runs")
    block = whole()
    for wrong in (
        replace(block, mean=block.mean[:1]),
        replace(block, quantile=block.quantile.swapaxes(0, 1)),
        replace(block, y=slice(0, 3)),
    ):
        with pytest.raises(ValueError, match="of shape"):
            store.write_run(HEADER, [wrong])
    assert ForecastStore.open(store.path).names() == []


def test_every_array_of_a_run_notices_damage(tmp_path):
    store = new(tmp_path / "runs")
    store.write_run(HEADER, [whole()])
    root = zarr.open_group(Repository.open(store.path).reader(store.snapshot), mode="r")
    arrays = dict(root[HEADER.name].arrays())
    assert len(arrays) == 4 + 8 + 2
    for name, array in arrays.items():
        assert array.metadata.to_dict()["codecs"][-1]["name"] == "crc32c", name


def test_runs_on_an_object_store_keep_the_same_promises(s3):
    store = new(f"{s3}/runs")
    assert store.write_run(HEADER, [whole()]) is not None
    assert store.write_run(HEADER, [whole()]) is None
    assert_holds(ForecastStore.open(f"{s3}/runs"), HEADER.name, whole())


def test_exported_cubes_and_runs_pass_the_cf_checker(tmp_path):
    for name, grid in (("projected", GRID), ("geographic", GEOGRAPHIC)):
        cube = Cube.open_or_create(
            str(tmp_path / f"{name}_cube"), grid, cf.RAINFALL_RATE, INIT, timedelta(minutes=5)
        )
        rain = np.random.default_rng(0).random(grid.shape, dtype=np.float32)
        cube.write([Frame(cf.RAINFALL_RATE, INIT, timedelta(minutes=5), grid, rain, "noise", "ab" * 32)])
        cube.between(INIT, INIT).to_netcdf(tmp_path / f"{name}_cube.nc")
        header = replace(HEADER, grid=grid)
        store = new(tmp_path / f"{name}_runs")
        store.write_run(header, [whole(header)])
        store.dataset(header.name).to_netcdf(tmp_path / f"{name}_run.nc")
    files = sorted(tmp_path.glob("*.nc"))
    assert len(files) == 4

    checker = Path(sys.executable).with_name("compliance-checker")
    report = tmp_path / "report.json"
    subprocess.run(
        [checker, "--test", "cf:1.11", "--format", "json_new", "--output", report, *files],
        capture_output=True,
        check=False,
    )
    results = json.loads(report.read_text())

    assert len(results) == 4
    for file, result in results.items():
        checks = result["cf:1.11"]["all_priorities"]
        failed = {check["name"]: check["msgs"] for check in checks if check["value"][0] != check["value"][1]}
        if file.endswith("_cube.nc"):  # a recommendation only: the bytes of the hash stand right of the time
            [remark] = failed.pop("§2.4 Dimensions")
            assert "source_sha256" in remark
        assert failed == {} and len(checks) > 10, file


def test_an_exported_run_reads_back_the_same(tmp_path):
    store = new(tmp_path / "runs")
    store.write_run(HEADER, [whole()])
    table = store.dataset(HEADER.name)
    table.to_netcdf(tmp_path / "run.nc")
    with xr.open_dataset(tmp_path / "run.nc", decode_coords="all", decode_timedelta=False) as again:
        xr.testing.assert_equal(again, table)
