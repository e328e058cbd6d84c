"""ODIM_H5 composites: real ones read as other readers read them, written ones in every layout, and refusals."""

import math
import random
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import hydra
import netCDF4
import numpy as np
import pyproj
import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import cli
from pipelines.cf import PRECIPITATION_AMOUNT_1H, PRECIPITATION_AMOUNT_24H, RAINFALL_RATE, REFLECTIVITY
from pipelines.decode import Decoder
from pipelines.grid import Grid
from pipelines.sources.odim import Odim
from pipelines.sources.source import RemoteFile

NODATA, UNDETECT = -9999000.0, -8888000.0
PROJDEF = "+proj=laea +lat_0=55.0 +lon_0=10.0 +x_0=1950000.0 +y_0=-2100000.0 +units=m +ellps=WGS84"
NAME = "T_PAAH22_C_EUOC_20241126010000.hdf"
TIME = datetime(2024, 11, 26, 1, tzinfo=UTC)
REAL = {"opera_odyssey": 11, "opera_cirrus": 1, "opera_nimbus": 2, "opera_nimbus_hourly": 2}


def configured(name: str, path: Path) -> Odim:
    with hydra.initialize_config_dir(str(cli.CONFIGS), version_base="1.3"):
        config = hydra.compose(f"source/{name}", overrides=[f"source.path={path}"])
    return instantiate(config.source, _convert_="all")


# A writer of its own: what a file of a service holds, group by group.


def says(
    raw: Any,
    quantity: str = "RATE",
    packing: tuple = (1.0, 0.0, NODATA, UNDETECT),
    what: str = "dataset1/data1/what",
) -> dict[str, Any]:
    """The attributes by group/name of a composite of cells of 2 km, its upper left corner at (0, 0)."""
    rows, columns = np.shape(raw)
    to_lonlat = pyproj.Proj(PROJDEF)
    said = {
        "/Conventions": "ODIM_H5/V2_4",
        "what/object": "COMP",
        "what/version": "H5rad 2.4",
        "what/date": "20241126",
        "what/time": "010000",
        "what/source": "ORG:247",
        "where/projdef": PROJDEF,
        "where/xsize": columns,
        "where/ysize": rows,
        "where/xscale": 2000.0,
        "where/yscale": 2000.0,
        "dataset1/what/product": "COMP",
        "dataset1/what/startdate": "20241126",
        "dataset1/what/starttime": "004500",
        "dataset1/what/enddate": "20241126",
        "dataset1/what/endtime": "010000",
        f"{what}/quantity": quantity,
    }
    said |= {
        f"{what}/{name}": value
        for name, value in zip(("gain", "offset", "nodata", "undetect"), packing, strict=True)
    }
    for corner, x, y in (("UL", 0, 0), ("UR", columns, 0), ("LL", 0, -rows), ("LR", columns, -rows)):
        lon, lat = to_lonlat(2000.0 * x, 2000.0 * y, inverse=True)
        said |= {f"where/{corner}_lon": lon, f"where/{corner}_lat": lat}
    return said


def write(path: Path, raw: Any, said: dict[str, Any], place: str = "dataset1/data1") -> RemoteFile:
    with h5py.File(path, "a") as file:
        rows, columns = np.shape(raw)
        chunks = (min(rows, 3), min(columns, 4))
        file.create_dataset(f"{place}/data", data=raw, chunks=chunks, compression="gzip", compression_opts=6)
        for key, value in said.items():
            group, _, name = key.rpartition("/")
            value = np.bytes_(value) if isinstance(value, str) else value
            (file.require_group(group) if group else file).attrs[name] = value
    return RemoteFile(str(path), None)


RATES = np.array([[0.0, 1.5, NODATA, 3.25], [UNDETECT, 0.01, 1205.22, NODATA], [UNDETECT, 2.0, 0.5, 7.0]])
RATES_READ = np.array([[0, 1.5, np.nan, 3.25], [0, 0.01, 1205.22, np.nan], [0, 2, 0.5, 7]], np.float32)


@pytest.mark.data
@pytest.mark.parametrize("name", ["opera_odyssey", "opera_nimbus", "opera_nimbus_hourly"])
def test_real_rain_reads_as_pysteps_reads_it(name, data):
    compare_with_pysteps(configured(name, data / "opera"), name, every=5)


@pytest.mark.data
@pytest.mark.slow
def test_all_real_rain_reads_as_pysteps_reads_it(data):
    for name in ("opera_odyssey", "opera_nimbus", "opera_nimbus_hourly"):
        compare_with_pysteps(configured(name, data / "opera"), name, every=1)


def compare_with_pysteps(source: Odim, name: str, every: int) -> None:
    from pysteps.io.importers import import_odim_hdf5

    files = list(source.files(None, None))
    assert len(files) == REAL[name]
    for file in files[::every]:
        frame = source.read(file)
        theirs, _, _ = import_odim_hdf5(file.url, qty=source.quantity)
        assert np.array_equal(frame.values, theirs.astype(np.float32), equal_nan=True)
        assert 0.48 < np.isnan(frame.values).mean() < 0.5
        assert (frame.values == 0).mean() > 0.3
        assert frame.valid_time == file.valid_time
        assert frame.cadence == timedelta(minutes=15)


@pytest.mark.data
def test_real_reflectivity_reads_as_netcdf_reads_it_and_its_rain_follows_from_it(data):
    source = configured("opera_cirrus", data / "opera")
    (file,) = source.files(None, None)
    with netCDF4.Dataset(file.url) as dataset:
        dataset.set_auto_maskandscale(False)
        raw = dataset["dataset1/data1/data"][:]
    plain = Odim(quantity="DBZH", name=source.name, cadence=5, packing=source.packing, grid=source.grid)
    dbz = plain.read(file)
    assert dbz.variable is REFLECTIVITY
    assert np.array_equal(np.isnan(dbz.values), raw == NODATA)
    assert (dbz.values[raw == UNDETECT] == -32.5).all()
    echo = (raw != NODATA) & (raw != UNDETECT)
    assert np.array_equal(dbz.values[echo], raw[echo].astype(np.float32))
    assert (dbz.values[echo].min(), dbz.values[echo].max()) == (-32.0, 78.0)

    rain = source.read(file)
    assert (rain.variable, rain.cadence) == (RAINFALL_RATE, timedelta(minutes=5))
    assert np.array_equal(np.isnan(rain.values), raw == NODATA)
    assert (rain.values[raw == UNDETECT] == 0).all()
    expected = (10 ** (np.minimum(raw[echo], 60) / 10) / 200) ** (1 / 1.6)
    np.testing.assert_allclose(rain.values[echo], expected, rtol=2e-6)


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_grids_have_their_corners_where_the_files_say(name, data):
    source = configured(name, data / "opera")
    for file in source.files(None, None):
        with h5py.File(file.url) as opened:
            where = dict(opened["where"].attrs)
        project = pyproj.Proj(where["projdef"].decode())
        grid = source.grid
        edges = {
            "UL": (grid.x[0] - grid.x_step / 2, grid.y[0] - grid.y_step / 2),
            "LR": (grid.x[-1] + grid.x_step / 2, grid.y[-1] + grid.y_step / 2),
        }
        for corner, place in edges.items():
            said = project(where[f"{corner}_lon"], where[f"{corner}_lat"])
            assert math.dist(said, place) < 0.01  # m


@pytest.mark.data
def test_without_a_registered_grid_files_tell_their_own(data):
    url = next((data / "opera").rglob("T_PAAH21_C_EUOC_20180824180000.hdf"))
    grid = Odim().read(RemoteFile(str(url), None)).grid
    registered = configured("opera_odyssey", data).grid
    assert grid.shape == registered.shape
    assert (grid.x[0], grid.y[-1]) == pytest.approx((registered.x[0], registered.y[-1]), abs=0.01)


def test_nodata_is_missing_undetect_is_dry_and_both_stay_apart(tmp_path):
    frame = Odim().read(write(tmp_path / NAME, RATES, says(RATES)))
    assert np.array_equal(frame.values, RATES_READ, equal_nan=True)
    assert (frame.variable, frame.valid_time, frame.group) == (RAINFALL_RATE, TIME, "radar")
    assert frame.grid == Grid(PROJDEF, 1000, 2000, 4, -1000, -2000, 3) or (
        frame.grid.x == pytest.approx([1000, 3000, 5000, 7000], abs=1e-3)
        and frame.grid.y == pytest.approx([-1000, -3000, -5000], abs=1e-3)
    )


@pytest.mark.parametrize("what", ["dataset1/data1/what", "dataset1/what", "what"])
@pytest.mark.parametrize("version", ["ODIM_H5/V2_0", "ODIM_H5/V2_3"])
def test_what_is_said_of_the_data_holds_from_the_data_the_dataset_or_the_file(what, version, tmp_path):
    said = says(RATES, what=what) | {"/Conventions": version}
    frame = Odim().read(write(tmp_path / NAME, RATES, said))
    assert np.array_equal(frame.values, RATES_READ, equal_nan=True)


def test_the_nearest_word_counts(tmp_path):
    said = says(RATES) | {"dataset1/what/gain": 10.0, "what/quantity": "TH", "dataset1/data1/where/xsize": 4}
    said |= {"where/xsize": 5}
    frame = Odim().read(write(tmp_path / NAME, RATES, said))
    assert np.array_equal(frame.values, RATES_READ, equal_nan=True)


def test_quality_and_other_fields_beside_it_are_not_taken_for_the_rain(tmp_path):
    said = says(RATES) | {"dataset2/data1/what/quantity": "QIND", "dataset1/data2/what/quantity": "TH"}
    file = write(tmp_path / NAME, RATES, said)
    quality = np.full_like(RATES, 0.5)
    for place in ("dataset2/data1", "dataset1/data2", "dataset1/data1/quality1"):
        write(tmp_path / NAME, quality, {}, place)
    assert np.array_equal(Odim().read(file).values, RATES_READ, equal_nan=True)


def test_a_quantity_that_is_there_twice_has_to_be_chosen(tmp_path):
    said = says(RATES) | {
        key.replace("dataset1", "dataset2"): value for key, value in says(RATES).items() if "dataset1" in key
    }
    file = write(tmp_path / NAME, RATES, said)
    write(tmp_path / NAME, np.where(RATES == 1.5, 0.75, RATES), {}, "dataset2/data1")
    with pytest.raises(ValueError, match=r"RATE 2 times.*RATE in dataset1/data1, RATE in dataset2/data1"):
        Odim().read(file)
    assert Odim(dataset="dataset1/data1").read(file).values[0, 1] == 1.5
    assert Odim(dataset="dataset2/data1").read(file).values[0, 1] == 0.75


COUNTS = np.array([[0, 1, 64, 103], [255, 184, 244, 65]], np.uint8)
COUNTED = (0.5, -32.0, 255.0, 0.0)


def test_counts_become_reflectivity_and_no_echo_a_stated_low_value(tmp_path):
    frame = Odim(quantity="DBZH").read(write(tmp_path / NAME, COUNTS, says(COUNTS, "DBZH", COUNTED)))
    assert frame.variable is REFLECTIVITY
    expected = np.array([[-32.5, -31.5, 0, 19.5], [np.nan, 60, 90, 0.5]], np.float32)
    assert np.array_equal(frame.values, expected, equal_nan=True)


def test_counts_become_rain_by_the_stated_relation_up_to_the_cap(tmp_path):
    file = write(tmp_path / NAME, COUNTS, says(COUNTS, "TH", COUNTED))
    rain = Odim(quantity="TH", z_r=[200, 1.6], cap=60).read(file)
    assert rain.variable is RAINFALL_RATE
    z = 10 ** (np.array([-31.5, 0, 19.5, 60, 60, 0.5]) / 10)
    expected = (z / 200) ** (1 / 1.6)
    assert rain.values[0, 0] == 0
    assert np.isnan(rain.values[1, 0])
    np.testing.assert_allclose(np.delete(rain.values.ravel(), [0, 4]), expected, rtol=2e-6)
    with pytest.raises(ValueError, match=r"1 of 8 values of rainfall_rate lie outside 0..2000 mm h-1"):
        Odim(quantity="TH", z_r=[200, 1.6]).read(file)


@pytest.mark.parametrize("kind", ["u1", "<u2", ">u2", "i2", "i4", "f4", "f8"])
def test_a_field_is_the_same_from_every_type_of_numbers(kind, tmp_path):
    raw = np.array([[0, 1, 2], [99, 100, 7]]).astype(kind)
    frame = Odim().read(write(tmp_path / NAME, raw, says(raw, packing=(0.1, 0.5, 99.0, 0.0))))
    expected = np.array([[0, 0.6, 0.7], [np.nan, 10.5, 1.2]])
    np.testing.assert_allclose(frame.values, expected, rtol=1e-6)


def test_nodata_may_be_no_number_or_the_largest(tmp_path):
    for nodata in (np.nan, 1.7976931348623157e308):
        raw = np.where(RATES == NODATA, nodata, RATES)
        (tmp_path / NAME).unlink(missing_ok=True)
        frame = Odim().read(write(tmp_path / NAME, raw, says(raw, packing=(1.0, 0.0, nodata, UNDETECT))))
        assert np.array_equal(frame.values, RATES_READ, equal_nan=True)


@settings(max_examples=25)
@given(
    masks=arrays(np.bool_, st.tuples(st.just(2), st.integers(1, 9), st.integers(1, 9))),
    counted=st.booleans(),
)
def test_exactly_the_masked_part_is_missing_and_exactly_the_undetected_dry(masks, counted, tmp_path_factory):
    missing, dry = masks
    packing = (0.5, 1.0, 255.0, 0.0) if counted else (1.0, 0.0, NODATA, UNDETECT)
    raw = np.select([missing, dry], packing[2:], 7.0).astype(np.uint8 if counted else np.float64)
    path = tmp_path_factory.mktemp("masked") / NAME
    frame = Odim().read(write(path, raw, says(raw, packing=packing)))
    assert np.array_equal(np.isnan(frame.values), missing)
    assert np.array_equal(frame.values == 0, dry & ~missing)


def test_sums_are_amounts_that_end_at_the_end_of_their_interval_or_mean_rates(tmp_path):
    for minutes, start, variable, factor in (
        (60, ("20241126", "000000"), PRECIPITATION_AMOUNT_1H, 1),
        (1440, ("20241125", "010000"), PRECIPITATION_AMOUNT_24H, 1),
        (5, ("20241126", "005500"), RAINFALL_RATE, 12),
    ):
        said = says(RATES, "ACRR") | {
            "dataset1/what/startdate": start[0],
            "dataset1/what/starttime": start[1],
            "what/time": "005500",
        }
        path = tmp_path / f"{minutes}_{NAME}"
        raw = np.where(RATES > 1000, 7, RATES)
        frame = Odim(quantity="ACRR", interval=minutes).read(write(path, raw, said))
        assert (frame.variable, frame.valid_time) == (variable, TIME)
        assert frame.values[0, 3] == 3.25 * factor
        with pytest.raises(ValueError, match=r"sums from .*, expected 15 minutes"):
            Odim(quantity="ACRR", interval=15).read(RemoteFile(str(path), None))


def test_a_national_composite_needs_no_more_than_settings(tmp_path):
    projdef = "+proj=stere +lat_0=90 +lon_0=0 +lat_ts=60 +a=6371000 +units=m"
    project = pyproj.Proj(projdef)
    raw = np.uint8([[0, 2], [255, 3]])
    said = says(raw, "DBZH", (0.5, -32.0, 255.0, 0.0)) | {"where/projdef": projdef, "where/xscale": 500.0}
    said["where/yscale"] = 1000.0
    for corner, x, y in (("UL", 0, 0), ("UR", 1000, 0), ("LL", 0, -2000), ("LR", 1000, -2000)):
        lon, lat = project(1e5 + x, -3e6 + y, inverse=True)
        said |= {f"where/{corner}_lon": round(lon, 3), f"where/{corner}_lat": round(lat, 3)}
    source = Odim(
        path=str(tmp_path),
        product="A national service's DBZH",
        quantity="DBZH",
        name=r"comp_(\d{8}T\d{4})Z\.h5",
        time_format="%Y%m%dT%H%M",
        cadence=5,
        z_r=[223, 1.53],
        corner_tolerance=100,
        grid=Grid(projdef, 1e5 + 250, 500, 2, -3e6 - 500, -1000, 2),
    )
    write(tmp_path / "comp_20241126T0100Z.h5", raw, said)
    (tmp_path / NAME).touch()
    (file,) = source.files(None, None)
    assert file.valid_time == TIME
    frame = source.read(file)
    assert frame.grid == source.grid
    assert frame.source == "A national service's DBZH, Z = 223 R^1.53"
    assert frame.values[0, 0] == 0
    assert np.isnan(frame.values[1, 0])
    with pytest.raises(ValueError, match=r"corners \(lon, lat\) lie up to \d+.\d+ m from"):
        Odim(quantity="DBZH", grid=source.grid, corner_tolerance=1).read(file)


@pytest.mark.parametrize("projdef", ["EPSG:3035", "+init=epsg:3035"])
def test_a_projection_may_be_an_epsg_code(projdef, tmp_path):
    said = says(RATES) | {"where/projdef": projdef}
    for corner, x, y in (("UL", 0, 0), ("UR", 8000, 0), ("LL", 0, -6000), ("LR", 8000, -6000)):
        crs = pyproj.CRS("EPSG:3035")
        to_lonlat = pyproj.Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True)
        lon, lat = to_lonlat.transform(4e6 + x, 3e6 + y)
        said |= {f"where/{corner}_lon": lon, f"where/{corner}_lat": lat}
    grid = Odim().read(write(tmp_path / NAME, RATES, said)).grid
    assert (grid.x[0], grid.y[0]) == pytest.approx((4e6 + 1000, 3e6 - 1000), abs=1e-3)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "polar volume": ({"what/object": "PVOL"}, "object of kind PVOL, expected a composite"),
    "another standard": ({"/Conventions": "CF-1.7"}, "follows CF-1.7, expected ODIM_H5"),
    "another version": ({"/Conventions": "ODIM_H5/V3_0"}, "follows ODIM_H5/V3_0"),
    "another quantity": ({"dataset1/data1/what/quantity": "VRADH"}, r"RATE 0 times.*VRADH in dataset1/data1"),
    "another gain": ({"dataset1/data1/what/gain": 1.5}, r"gain=1\.5.*expected \(1.0, 0.0"),
    "another offset": ({"dataset1/data1/what/offset": 2.0}, r"offset=2\.0"),
    "another nodata": ({"dataset1/data1/what/nodata": 0.0}, r"nodata=0\.0"),
    "another undetect": ({"dataset1/data1/what/undetect": 0.0}, r"undetect=0\.0"),
    "gain is text": ({"dataset1/data1/what/gain": "one"}, "what/gain='one', expected a number"),
    "gain is infinite": ({"dataset1/data1/what/gain": np.inf}, "what/gain=inf, expected a number"),
    "gain is several": ({"dataset1/data1/what/gain": np.ones(2)}, "expected a number"),
    "month 13": ({"what/date": "20241326"}, "'20241326010000', expected YYYYMMDD"),
    "hour and minute": ({"what/time": "0100"}, "'202411260100', expected YYYYMMDD and HHmmss"),
    "another day": ({"what/date": "20241127"}, "its data are from 2024-11-26"),
    "ends before it starts": ({"dataset1/what/enddate": "20241125"}, "its data are from 2024-11-26"),
    "another west": ({"where/UL_lon": -39.5}, r"corners \(lon, lat\) lie up to"),
    "another south": ({"where/LL_lat": 67.0}, r"corners \(lon, lat\) lie up to"),
    "no latitude": ({"where/LL_lat": 167.0}, "not on the map"),
    "another projection": ({"where/projdef": PROJDEF.replace("55.0", "56.0")}, "lie up to"),
    "wider cells": ({"where/xscale": 2001.0}, "lie up to"),
    "no cells": ({"where/xsize": 0}, "no grid"),
    "cells without end": ({"where/xsize": 10**6, "where/ysize": 10**6}, "no grid"),
    "cells below 0": ({"where/yscale": -2000.0}, "no grid"),
    "more columns": ({"where/xsize": 5}, "lie up to"),
    "a projection that reads a file": (
        {"where/projdef": PROJDEF + " +nadgrids=/etc/passwd"},
        "nadgrids=/etc/passwd is not",
    ),
    "a projection out of a file": ({"where/projdef": "+init=/etc/passwd:1"}, "is not accepted"),
    "a pipeline": ({"where/projdef": "+proj=pipeline +step +proj=laea"}, r"\+step is not accepted"),
    "no projection": ({"where/projdef": "+proj=nothing"}, "no projection"),
    "no words": ({"where/projdef": ""}, "no projection"),
    "kilometres": ({"where/projdef": PROJDEF.replace("=m", "=km")}, r"\+units=km is not accepted"),
}


@pytest.fixture
def registered() -> Odim:
    grid = Grid(PROJDEF, 1000, 2000, 4, -1000, -2000, 3)
    return Odim(grid=grid, packing=[1.0, 0.0, NODATA, UNDETECT])


@pytest.mark.parametrize("change", REFUSALS)
def test_what_is_not_the_product_is_refused_with_the_files_name_and_a_reason(change, registered, tmp_path):
    changes, reason = REFUSALS[change]
    file = write(tmp_path / NAME, RATES, says(RATES) | changes)
    with pytest.raises(ValueError, match=rf"^{re.escape(NAME)}: .*{reason}"):
        registered.read(file)


@pytest.mark.parametrize("missing", says(RATES))
def test_whatever_is_not_said_is_missed(missing, registered, tmp_path):
    unused = {"what/version", "what/source", "dataset1/what/product"}
    file = write(tmp_path / NAME, RATES, {key: value for key, value in says(RATES).items() if key != missing})
    if missing in unused:
        assert np.array_equal(registered.read(file).values, RATES_READ, equal_nan=True)
        return
    with pytest.raises(ValueError, match=rf"^{re.escape(NAME)}: .*{missing.rpartition('/')[2]}|RATE 0 times"):
        registered.read(file)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (np.where(RATES == 1.5, -0.5, RATES), r"1 of 12 values .* outside 0..2000"),
        (np.where(RATES == 1.5, np.inf, RATES), "not finite"),
        (np.where(RATES == 1.5, np.nan, RATES), "not finite"),
        (np.where(RATES == 1.5, 2500.0, RATES), r"1 of 12 values"),
        (RATES[:2], r"shape \(2, 4\): expected \(3, 4\)"),
        (RATES.T, r"shape \(4, 3\): expected \(3, 4\)"),
    ],
    ids=["below 0", "infinite", "no number", "too much", "rows missing", "turned"],
)
def test_numbers_that_no_rain_has_are_refused(raw, reason, registered, tmp_path):
    file = write(tmp_path / NAME, raw, says(RATES))
    with pytest.raises(ValueError, match=rf"^{re.escape(NAME)}: .*{reason}"):
        registered.read(file)


def test_odd_layouts_and_ways_out_of_the_file_are_refused_by_name(registered, tmp_path):
    (tmp_path / "canary").write_bytes(b"canary" * 16)
    for spoil, reason in (
        (lambda file: file.pop("dataset1/data1/data"), "lacks a part"),
        (lambda file: file.pop("what"), "lacks a part"),
        (lambda file: file["dataset1/data1"].create_group("data2"), None),
        (lambda file: file.update({"dataset2": np.zeros(3)}), None),
        (
            lambda file: file.update({"aside": h5py.ExternalLink(str(tmp_path / "canary"), "/")}),
            "external link",
        ),
        (
            lambda file: file.create_dataset(
                "dataset1/data2/data", (3, 4), "f8", external=[(str(tmp_path / "canary"), 0, 96)]
            ),
            "another file",
        ),
    ):
        (tmp_path / NAME).unlink(missing_ok=True)
        file = write(tmp_path / NAME, RATES, says(RATES))
        with h5py.File(file.url, "a") as opened:
            spoil(opened)
        if reason is None:
            assert np.array_equal(registered.read(file).values, RATES_READ, equal_nan=True)
            continue
        with pytest.raises(ValueError, match=rf"^{re.escape(NAME)}: .*{reason}"):
            registered.read(file)


def test_no_flipped_bit_changes_a_value_place_or_time_in_silence(registered, tmp_path):
    said = says(RATES)
    whole = Path(write(tmp_path / NAME, RATES, said).url).read_bytes()
    chance = random.Random(1)
    with Decoder(registered) as decoder:
        sound = decoder.decode(RemoteFile(str(tmp_path / NAME), TIME))
        for _ in range(150):
            place = chance.randrange(len(whole))
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << chance.randrange(8)
            (tmp_path / NAME).write_bytes(spoiled)
            try:
                frame = decoder.decode(RemoteFile(str(tmp_path / NAME), TIME))
            except ValueError:
                continue
            assert frame.grid == sound.grid, place
            assert np.array_equal(frame.values, sound.values, equal_nan=True), place


def test_names_of_other_products_are_passed_over(tmp_path):
    names = ["b/T_PAAH21_C_EUOC_20180824181500.hdf", "T_PAAH21_C_EUOC_20180824180000.h5"]
    for name in [*names, "T_PAAH21_C_EUOC_20181324180000.hdf", "T_PAAH21_C_EUOC_20180824180000.png", "x.h5"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [Path(file.url).name for file in Odim(str(tmp_path)).files(None, None)]
    assert found == [names[1], "T_PAAH21_C_EUOC_20180824181500.hdf"]
    with pytest.raises(ValueError, match=r"no files of ODIM_H5 composite there .* such as radar_"):
        list(Odim(str(tmp_path), name=r"radar_(\d+)\.h5").files(None, None))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantity": "VRADH"}, "quantity=VRADH: expected RATE, ACRR, DBZH or TH"),
        ({"quantity": "ACRR", "interval": 30}, "interval=30: expected 60 or 1440"),
        ({"cadence": 0}, "cadence=0"),
        ({"z_r": [200, 1.6]}, "with DBZH or TH"),
        ({"quantity": "DBZH", "z_r": [200]}, r"z_r=\[200\]"),
        ({"quantity": "DBZH", "cap": 60.0}, "expected with z_r"),
        ({"packing": [1, 0]}, "gain, offset, nodata, undetect"),
        ({"name": r"(\d+)(\.h5)"}, "has 2 groups"),
        ({"name": r"(\d+"}, "no regular expression"),
    ],
)
def test_settings_that_fit_no_file_are_refused_at_once(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Odim(**settings)
