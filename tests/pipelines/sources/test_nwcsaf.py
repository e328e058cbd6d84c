"""NWC SAF files: real ones as pysteps and netCDF4 read them, written ones to the last class, others refused."""

from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import h5py
import netCDF4
import numpy as np
import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pyproj import Geod, Proj

import cli
from pipelines.grid import Grid
from pipelines.sources.nwcsaf import CLOUD_TYPE_MSG, Nwcsaf, NwcsafHdf5
from pipelines.sources.source import RemoteFile

GEOS = "+proj=geos +a=6378137.000000 +b=6356752.300000 +lon_0=0.000000 +h=35785863.000000"
GRID = Grid(f"{GEOS} +units=m", -30000.0, 3000.0, 20, 4500000.0, -3000.0, 12)
NAME = "S_NWC_CRR_MSG4_Europe-VISIR_20180601T070000Z.nc"
TIME = datetime(2018, 6, 1, 7, tzinfo=UTC)
OLD = "SAFNWC_MSG3_CT___201304290415_BEL_________.h5"


def source(name: str, path: Path | None = None) -> Nwcsaf | NwcsafHdf5:
    config = OmegaConf.load(cli.CONFIGS / "source" / f"{name}.yaml")
    config.path = str(path) if path else None
    return instantiate(config)


def write(path: Path, counts: np.ndarray, **changes) -> Path:
    """A file as GEO v2016 writes it."""
    told = {
        "field": "crr_intensity",
        "product_name": "CRR",
        "satellite_identifier": "MSG4",
        "nominal_product_time": "2018-06-01T07:00:00Z",
        "gdal_projection": GEOS,
        "units": "mm/h",
        "scale_factor": np.float32(0.1),
        "fill": 65535,
        "shift": 0.0,
    } | changes
    with netCDF4.Dataset(path, "w") as file:
        for name in ("product_name", "satellite_identifier", "nominal_product_time", "gdal_projection"):
            file.setncattr(name, told[name])
        for name, line in (("nx", GRID.x + told["shift"]), ("ny", GRID.y)):
            file.createDimension(name, line.size)
            axis = file.createVariable(name, "f4", (name,))
            axis.units = "m"
            axis[:] = line
        field = file.createVariable(
            told["field"], counts.dtype, ("ny", "nx"), zlib=True, fill_value=told["fill"]
        )
        field.set_auto_maskandscale(False)
        if told["scale_factor"] is not None:
            field.setncatts({"scale_factor": told["scale_factor"], "add_offset": np.float32(0)})
        field.units = told["units"]
        field[:] = counts
    return path


def write_old(path: Path, classes: np.ndarray, **changes) -> Path:
    """A file as the MSG package v2013 writes it: all as attributes."""
    rows, columns = classes.shape
    told = {
        "PRODUCT_NAME": np.bytes_("CT__"),
        "REGION_NAME": np.bytes_("BEL"),
        "IMAGE_ACQUISITION_TIME": np.bytes_("201304290415"),
        "PROJECTION": np.bytes_("+proj=geos +a=6378169.0 +b=6356583.8 +lon_0=0.0 +h=35785831.0"),
        "NC": np.uint16(columns),
        "NL": np.uint16(rows),
        "XGEO_UP_LEFT": np.float64(0.0),
        "XGEO_LOW_RIGHT": np.float64(3000.0 * (columns - 1)),
        "YGEO_UP_LEFT": np.float64(4500000.0),
        "YGEO_LOW_RIGHT": np.float64(4500000.0 - 3000.0 * (rows - 1)),
    } | changes
    with h5py.File(path, "w") as file:
        file.attrs.update({name: value for name, value in told.items() if name != "scale"})
        field = file.create_dataset("CT", data=classes, compression="gzip")
        field.attrs.update({"SCALING_FACTOR": np.float32(told.get("scale", 1)), "OFFSET": np.float32(0)})
    return path


def read(path: Path, **settings) -> np.ndarray:
    return Nwcsaf(**({"grid": GRID} | settings)).read(RemoteFile(str(path), None)).values


def rain(value: int = 0) -> np.ndarray:
    return np.full(GRID.shape, value, np.uint16)


@pytest.mark.data
@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_real_rain_files_read_as_pysteps_reads_them(step, data):
    from pysteps.io.importers import import_saf_crri

    crr = source("nwcsaf", data / "saf")
    for file in list(crr.files(None, None))[::step]:
        frame = crr.read(file)
        reference, _, _ = import_saf_crri(file.url)
        assert frame.valid_time == file.valid_time
        assert frame.group == "satellite"
        assert np.array_equal(np.isnan(frame.values), np.isnan(reference))
        assert np.nanmax(np.abs(frame.values - reference)) < 1e-5
        assert 0.168 < np.isnan(frame.values).mean() < 0.17


@pytest.mark.data
def test_the_real_cloud_types_are_the_files_classes(data):
    clouds = source("nwcsaf_cloud_type", data / "saf")
    (file,) = clouds.files(None, None)
    frame = clouds.read(file)
    with netCDF4.Dataset(file.url) as reference:
        assert np.array_equal(frame.values, reference["CT"][:])
    assert frame.valid_time == datetime(2013, 4, 29, 4, 15, tzinfo=UTC)
    assert {int(value) for value in np.unique(frame.values)} <= {value for value, _ in frame.variable.classes}


@pytest.mark.data
def test_the_real_folder_has_a_scan_every_quarter_of_an_hour(data):
    times = [file.valid_time for file in source("nwcsaf", data / "saf").files(None, None)]
    assert len(times) == 23
    assert {(late - soon).total_seconds() for soon, late in pairwise(times)} == {900}


@pytest.mark.parametrize(
    ("name", "projection", "x", "y"),
    [
        ("nwcsaf", GEOS, (-3300000, 3297000), (5568000, 2514000)),
        (
            "nwcsaf_cloud_type",
            "+proj=geos +a=6378169.0 +b=6356583.8 +lon_0=0.0 +h=35785831.0",
            (-618083.0915715238, 1179158.5193573255),  # XGEO_UP_LEFT and XGEO_LOW_RIGHT of the real file
            (4968667.95942934, 4071547.3556434875),
        ),
    ],
)
def test_the_cells_are_where_the_projection_puts_them_to_a_metre(name, projection, x, y):
    grid = source(name).grid
    assert (grid.x[0], grid.x[-1]) == pytest.approx(x, abs=1e-3)
    assert (grid.y[0], grid.y[-1]) == pytest.approx(y, abs=1e-3)
    row, column = grid.y_size - 1, grid.x_size // 2  # the upper corners lie in space
    window = grid.window(row, column, 1, 1)
    lon, lat = window.lonlat()
    places = Proj(projection)(grid.x[column], grid.y[row], inverse=True)
    _, _, metres = Geod(ellps="WGS84").inv(lon[0, 0], lat[0, 0], *places)
    assert metres < 1


def test_a_count_is_a_tenth_and_space_is_not_dry(tmp_path):
    counts = rain()
    counts[3, 4:7] = 1, 500, 65535
    values = read(write(tmp_path / NAME, counts))
    assert values[3, 4:6] == pytest.approx([0.1, 50])
    assert np.isnan(values[3, 6])
    assert (values == 0).sum() == values.size - 3


def test_cloud_types_of_today_are_classes_with_meanings(tmp_path):
    counts = (np.arange(GRID.shape[0] * GRID.shape[1]) % 16).reshape(GRID.shape).astype(np.uint8)
    counts[counts == 0] = 255
    path = write(
        tmp_path / "ct.nc", counts, field="ct", product_name="CT", fill=255, units="1", scale_factor=None
    )
    frame = Nwcsaf(GRID, product="CT", field="ct").read(RemoteFile(str(path), None))
    assert np.array_equal(frame.values, np.where(counts == 255, np.nan, counts), equal_nan=True)
    assert dict(frame.variable.classes)[8] == "high_opaque_clouds"


def test_cloud_types_of_2013_are_other_classes_and_0_is_unknown(tmp_path):
    classes = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) % 21
    grid = Grid(
        "+proj=geos +a=6378169 +b=6356583.8 +lon_0=0 +h=35785831", 0.0, 3000.0, 30, 4.5e6, -3000.0, 20
    )
    frame = NwcsafHdf5(grid).read(RemoteFile(str(write_old(tmp_path / OLD, classes.astype(np.uint8))), None))
    assert np.array_equal(frame.values, np.where(classes == 0, np.nan, classes), equal_nan=True)
    assert dict(CLOUD_TYPE_MSG.classes)[19] == "fractional_clouds"
    changes = {
        "its PRODUCT_NAME is 'CMa_'": {"PRODUCT_NAME": np.bytes_("CMa_")},
        "its REGION_NAME": {"REGION_NAME": np.bytes_("FRA")},
        "is no time": {"IMAGE_ACQUISITION_TIME": np.bytes_("201313290415")},
        "not the registered one": {"XGEO_UP_LEFT": np.float64(6000.0)},
        "expected a geostationary one": {"PROJECTION": np.bytes_("+proj=geos +nadgrids=/etc/passwd")},
        "has 30000 cells": {"NC": np.uint16(30000)},
        "scaled by 2": {"scale": 2},
    }
    for reason, change in changes.items():
        path = write_old(tmp_path / OLD, classes.astype(np.uint8), **change)
        with pytest.raises(ValueError, match=rf"^{OLD}: .*{reason}"):
            NwcsafHdf5(grid).read(RemoteFile(str(path), None))


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_what_is_masked_and_nothing_else_is_not_observed(seed, tmp_path_factory):
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 501, GRID.shape).astype(np.uint16)
    masked = generator.random(GRID.shape) < generator.random()
    path = write(tmp_path_factory.mktemp("saf") / NAME, np.where(masked, 65535, counts).astype(np.uint16))
    values = read(path)
    assert np.array_equal(np.isnan(values), masked)
    assert np.allclose(values[~masked], counts[~masked] / 10)


REFUSALS = {
    "another product": ({"product_name": "CT"}, "product_name is 'CT', expected 'CRR'"),
    "another satellite": ({"satellite_identifier": "MSG1"}, "expected 'MSG4'"),
    "no time": ({"nominal_product_time": "noon"}, "nominal_product_time is no time"),
    "another map": ({"gdal_projection": GEOS.replace("lon_0=0.", "lon_0=9.")}, "not the registered one"),
    "a map from elsewhere": ({"gdal_projection": "+proj=pipeline"}, "expected a geostationary one"),
    "another place": ({"shift": 3000.0}, "not the registered one"),
    "another unit": ({"units": "mm"}, "is in 'mm', expected 'mm/h'"),
    "another scale": ({"scale_factor": np.float32(1)}, "counts 1.0 from 0"),
    "another fill": ({"fill": 0}, "marks what is missing by 0, expected 65535"),
    "another field": ({"field": "crr_accum"}, "lacks a part"),
    "an impossible count": ({}, "1 counts of /crr_intensity are above 500, such as 501"),
}


@pytest.mark.parametrize("change", REFUSALS)
def test_what_is_not_this_product_is_refused_with_its_name_and_a_reason(change, tmp_path):
    changes, reason = REFUSALS[change]
    counts = rain(1)
    counts[0, 0] = 501 if change == "an impossible count" else 1
    path = write(tmp_path / NAME, counts, **changes)
    with pytest.raises(ValueError, match=rf"^{NAME}: .*{reason}"):
        read(path)


@pytest.mark.data
def test_a_cut_file_is_refused(data, tmp_path):
    whole = data / "saf/20180601/CRR" / NAME
    for share in (0, 100, 100_000, whole.stat().st_size - 10):
        path = tmp_path / NAME
        path.write_bytes(whole.read_bytes()[:share])
        with pytest.raises(ValueError, match=rf"^{NAME}: "):
            source("nwcsaf").read(RemoteFile(str(path), None))


def test_other_regions_are_passed_over_and_unknown_fields_refused(tmp_path):
    for name in (NAME, NAME.replace("Europe", "MSG-N"), NAME.replace("CRR", "CT")):
        (tmp_path / name).touch()
    crr = Nwcsaf(GRID, path=str(tmp_path))
    assert [file.valid_time for file in crr.files(None, None)] == [TIME]
    with pytest.raises(ValueError, match="expected one of crr_intensity, ct"):
        replace(crr, field="crr")
