"""KNMI's rain sums: real files of both kinds read as other readers read them, written ones, and refusals."""

import random
import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import pyproj
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.cf import RAINFALL_RATE
from pipelines.decode import Decoder
from pipelines.sources.knmi import GRID, Knmi
from pipelines.sources.source import RemoteFile

NAME = "RAD_NL25_RAP_5min_201008260005.h5"
TIME = datetime(2010, 8, 26, 0, 5, tzinfo=UTC)
KILOMETRES = "+proj=stere +lat_0=90 +lon_0=0.0 +lat_ts=60.0 +a=6378.137 +b=6356.752 +x_0=0 +y_0=0"
CORNERS = np.float32([0, 49.362, 0, 55.974, 10.856, 55.389, 9.009, 48.895])
ADJUSTED = Knmi(product="RAD_NL25_RAC_MFBS_5min", recorded="RAD_NL25_RAC_MFBS_5min")


# Writers of their own, one for each layout; a key is group/attribute or variable/attribute.

SAID: dict[str, Any] = {
    "geographic/geo_column_offset": np.float32([0]),
    "geographic/geo_dim_pixel": "KM,KM",
    "geographic/geo_number_columns": np.int32([700]),
    "geographic/geo_number_rows": np.int32([765]),
    "geographic/geo_par_pixel": "X,Y",
    "geographic/geo_pixel_def": "LU",
    "geographic/geo_pixel_size_x": np.float32([1]),
    "geographic/geo_pixel_size_y": np.float32([-1]),
    "geographic/geo_product_corners": CORNERS,
    "geographic/geo_row_offset": np.float32([3650]),
    "overview/product_datetime_start": "26-AUG-2010;00:00:00.000",
    "overview/product_datetime_end": "26-AUG-2010;00:05:00.000",
}
IN_HDF5 = SAID | {
    "geographic/map_projection/projection_proj4_params": KILOMETRES,
    "image1/image_geo_parameter": "ACCUMULATED_PRECIPITATION_[MM]",
    "image1/calibration/calibration_formulas": "GEO=0.01*PV+0.0",
    "image1/calibration/calibration_missing_data": np.int32([65535]),
    "image1/calibration/calibration_out_of_image": np.int32([65535]),
    "overview/product_group_name": "RAD_NL25_RAU_5mi",
}
IN_NETCDF = SAID | {
    "projection/proj4_params": KILOMETRES,
    "image1_calibration/calibration_formulas": "GEO=0.01*PV+0.0",
    "image1_calibration/calibration_missing_data": np.int32([65535]),
    "image1_calibration/calibration_out_of_image": np.int32([65535]),
    "image1_image_data/units": "kg m-2",
    "image1_image_data/standard_name": "precipitation_amount",
    "image1_image_data/scale_factor": np.float32([0.01]),
    "image1_image_data/add_offset": np.float32([0.0]),
    "overview/product_group_name": "RAD_NL25_RAC_MFBS_5min",
    "x/units": "km",
    "y/units": "km",
    "time/units": "seconds since 2000-01-01 00:00:00",
}


def write_hdf5(path: Path, counts: Any, said: dict[str, Any]) -> RemoteFile:
    with h5py.File(path, "w") as file:
        file.create_dataset("image1/image_data", data=counts, chunks=np.shape(counts), compression="gzip")
        for key, value in said.items():
            group, _, name = key.rpartition("/")
            value = np.bytes_(value) if isinstance(value, str) else value
            file.require_group(group).attrs[name] = value
    return RemoteFile(str(path), None)


def write_netcdf(
    path: Path,
    counts: Any,
    said: dict[str, Any],
    fill: int = 65535,
    start: float = 336096000.0,
    shift: float = 0.0,
) -> RemoteFile:
    axes = {"y": -3650.5 - np.arange(765.0), "x": 0.5 + np.arange(700.0) + shift, "time": np.array([start])}
    with netCDF4.Dataset(path, "w") as file:
        for name, centres in axes.items():
            file.createDimension(name, len(centres))
            file.createVariable(name, "f8", (name,), zlib=True)[:] = centres
        image = file.createVariable(
            "image1_image_data", "u2", ("time", "y", "x"), zlib=True, shuffle=False, fill_value=fill
        )
        image.set_auto_maskandscale(False)
        image[0] = counts
        for key, value in said.items():
            variable, _, name = key.partition("/")
            if variable not in file.variables:
                file.createVariable(variable, "S1", ())
            file[variable].setncattr(name, value)
    return RemoteFile(str(path), None)


@pytest.fixture(scope="module")
def counts() -> Any:
    field = np.random.default_rng(1).integers(0, 2000, GRID.shape).astype(np.uint16)
    field[:100], field[100:200] = 65535, 0
    field[0, 0], field[0, 1], field[1, 0] = 1, 12345, 0
    return field


@pytest.mark.data
def test_every_real_sum_reads_as_pysteps_reads_it(data):
    from pysteps.io.importers import import_knmi_hdf5

    source = Knmi(str(data / "knmi"))
    files = list(source.files(None, None))
    assert len(files) == 57
    for file in files:
        frame = source.read(file)
        theirs, _, _ = import_knmi_hdf5(file.url)
        np.testing.assert_allclose(frame.values, theirs * 12, rtol=1e-6, equal_nan=True)
        assert (frame.valid_time, frame.grid) == (file.valid_time, GRID)
        assert np.isfinite(frame.values).mean() == pytest.approx(0.2563, abs=1e-4)
        assert 0.2 < (frame.values == 0).sum() / np.isfinite(frame.values).sum() < 0.8
    times = [file.valid_time for file in files]
    assert {later - sooner for sooner, later in pairwise(times)} == {frame.cadence}


@pytest.mark.data
def test_every_real_gauge_adjusted_sum_reads_as_netcdf_reads_it(data):
    folder = str(data / "knmi_mfbs")
    source = Knmi(folder, ADJUSTED.product, ADJUSTED.recorded)
    files = list(source.files(None, None))
    assert len(files) == 91
    for file in files:
        frame = source.read(file)
        with netCDF4.Dataset(file.url) as dataset:
            theirs = dataset["image1_image_data"][0]
            start = netCDF4.num2date(dataset["time"][0], dataset["time"].units)
        np.testing.assert_allclose(frame.values, theirs.filled(np.nan) * 12, rtol=1e-6, equal_nan=True)
        assert frame.valid_time == file.valid_time
        assert frame.valid_time.isoformat()[:19] == (start + timedelta(minutes=5)).isoformat()
        assert np.isfinite(frame.values).mean() == pytest.approx(0.071, abs=1e-3)


@pytest.mark.data
def test_the_grid_is_in_metres_where_the_files_say_kilometres(data):
    file = next((data / "knmi").rglob(NAME))
    with h5py.File(file) as opened:
        geographic = opened["geographic"]
        project = pyproj.Proj(geographic["map_projection"].attrs["projection_proj4_params"].decode())
        said = geographic.attrs["geo_product_corners"].reshape(4, 2)
    lon, lat = GRID.lonlat()
    geod = pyproj.Geod(ellps="WGS84")
    for row, column in ((0, 0), (0, 699), (764, 0), (764, 699)):
        expected = project(0.5 + column, -3650.5 - row, inverse=True)  # a unit of 1 km
        assert geod.inv(lon[row, column], lat[row, column], *expected)[2] < 0.01
    edges = [project(x, y, inverse=True) for x, y in ((0, -4415), (0, -3650), (700, -3650), (700, -4415))]
    # What files say of their corners is the exact grid's, rounded to thousandths of a degree: up to 49 m off.
    assert np.abs(np.round(edges, 3) - said).max() < 1e-6 * np.abs(said).max()
    off = [geod.inv(*edge, *corner)[2] for edge, corner in zip(edges, said.astype(float), strict=True)]
    assert max(off) == pytest.approx(48.65, abs=0.01)


@pytest.mark.data
def test_what_is_observed_lies_within_200_km_of_the_radar(data):
    file = next((data / "knmi").rglob(NAME))
    rows, columns = np.nonzero(np.isfinite(Knmi().read(RemoteFile(str(file), None)).values))
    azimuth = np.arange(360.0)
    de_bilt = np.full(360, 5.179), np.full(360, 52.103)
    lon, lat, _ = pyproj.Geod(ellps="WGS84").fwd(*de_bilt, azimuth, np.full(360, 200e3))
    row, column = GRID.cells(lon, lat)
    seen = [rows.min(), rows.max(), columns.min(), columns.max()]
    assert seen == pytest.approx([row.min(), row.max(), column.min(), column.max()], abs=1.0)  # cells


@pytest.mark.parametrize(
    ("source", "write", "said", "name"),
    [
        (Knmi(), write_hdf5, IN_HDF5, NAME),
        (ADJUSTED, write_netcdf, IN_NETCDF, "RAD_NL25_RAC_MFBS_5min_201008260005.nc"),
    ],
    ids=["hdf5", "netcdf"],
)
def test_sums_of_5_minutes_become_rates_and_65535_alone_is_missing(
    source, write, said, name, counts, tmp_path
):
    frame = source.read(write(tmp_path / name, counts, said))
    assert frame.variable is RAINFALL_RATE
    assert (frame.valid_time, frame.cadence) == (TIME, timedelta(minutes=5))
    assert frame.valid_time == source.valid_time(name)
    assert np.array_equal(np.isnan(frame.values), counts == 65535)
    assert np.array_equal(frame.values == 0, counts == 0)
    assert frame.values[0, :2].tolist() == pytest.approx([0.12, 1481.4], rel=1e-6)
    seen = counts != 65535
    np.testing.assert_allclose(frame.values[seen], counts[seen] * 0.12, rtol=1e-6)


@settings(max_examples=8)
@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_exactly_the_masked_part_is_missing(share, seed, tmp_path_factory):
    masked = np.random.default_rng(seed).random(GRID.shape) < share
    field = np.where(masked, 65535, 0).astype(np.uint16)
    path = tmp_path_factory.mktemp("masked") / NAME
    values = Knmi().read(write_hdf5(path, field, IN_HDF5)).values
    assert np.array_equal(np.isnan(values), masked)
    assert (values[~masked] == 0).all()


BOTH: dict[str, tuple[dict[str, Any], str]] = {
    "another product": (
        {"overview/product_group_name": "RAD_NL25_PCP"},
        "product RAD_NL25_PCP, expected RAD_NL25_RA",
    ),
    "an hour": ({"overview/product_datetime_start": "25-AUG-2010;23:05:00.000"}, "expected 0:05:00"),
    "no time": (
        {"overview/product_datetime_end": "26-AUG-2010"},
        "product_datetime_end='26-AUG-2010', expected",
    ),
    "month 13": ({"overview/product_datetime_end": "26-AGU-2010;00:05:00.000"}, "expected a time such as"),
    "in metres": ({"geographic/geo_dim_pixel": "M,M"}, "geo_dim_pixel='M,M', expected 'KM,KM'"),
    "pixel centres": ({"geographic/geo_pixel_def": "CC"}, "geo_pixel_def='CC', expected 'LU'"),
    "axes exchanged": ({"geographic/geo_par_pixel": "Y,X"}, "geo_par_pixel='Y,X'"),
    "moved south": ({"geographic/geo_row_offset": np.float32([3651])}, "corners .* lie up to"),
    "moved a little": ({"geographic/geo_row_offset": np.float32([3650.01])}, "another grid"),
    "moved east": ({"geographic/geo_column_offset": np.float32([1])}, "corners .* lie up to"),
    "other corners": ({"geographic/geo_product_corners": CORNERS + np.float32(0.01)}, "corners .* lie up to"),
    "few corners": ({"geographic/geo_product_corners": CORNERS[:6]}, "expected 8 numbers"),
    "no place": ({"geographic/geo_product_corners": CORNERS * 9}, "no places"),
    "far away": ({"geographic/geo_row_offset": np.float32([1e9])}, "expected a number below"),
    "rows are text": ({"geographic/geo_number_rows": "many"}, "geo_number_rows='many', expected a number"),
    "no rows": ({"geographic/geo_number_rows": np.int32([0])}, "at least 1 x 1"),
    "south up": ({"geographic/geo_pixel_size_y": np.float32([1])}, "row 0 is north"),
    "fewer rows": ({"geographic/geo_number_rows": np.int32([764])}, "corners .* lie up to"),
}
ONE: dict[str, tuple[dict[str, Any], str]] = {
    "tenths": ({"calibration_formulas": "GEO=0.1*PV+0.0"}, "calibration 'GEO=0.1"),
    "offset": ({"calibration_formulas": "GEO=0.01*PV+1.0"}, "calibration"),
    "a program": ({"calibration_formulas": "__import__('os').abort()"}, "calibration"),
    "other missing": (
        {"calibration_missing_data": np.int32([0])},
        "calibration_missing_data=0, expected 65535",
    ),
    "other outside": ({"calibration_out_of_image": np.int32([255])}, "calibration_out_of_image=255"),
}


def calibrated(at: str) -> dict[str, tuple[dict[str, Any], str]]:
    return {
        name: ({f"{at}/{key}": value for key, value in changes.items()}, reason)
        for name, (changes, reason) in ONE.items()
    }


HDF5_REFUSALS = (
    BOTH
    | calibrated("image1/calibration")
    | {
        "reflectivity": ({"image1/image_geo_parameter": "REFLECTIVITY_[DBZ]"}, r"holds REFLECTIVITY_\[DBZ\]"),
        "another pole": (
            {"geographic/map_projection/projection_proj4_params": KILOMETRES.replace("=90", "=-90")},
            "projection",
        ),
        "metres": (
            {"geographic/map_projection/projection_proj4_params": KILOMETRES.replace("6378.", "6378")},
            "projection",
        ),
        "another ellipsoid": (
            {"geographic/map_projection/projection_proj4_params": KILOMETRES.replace("8.137", "8.138")},
            "another grid",
        ),
    }
)
NETCDF_REFUSALS = (
    BOTH
    | calibrated("image1_calibration")
    | {
        "another quantity": ({"image1_image_data/standard_name": "rainfall_rate"}, "holds rainfall_rate"),
        "another unit": ({"image1_image_data/units": "mm h-1"}, "units='mm h-1'"),
        "another scale": ({"image1_image_data/scale_factor": np.float32([0.1])}, "scale_factor=0.1"),
        "another offset": ({"image1_image_data/add_offset": np.float32([1])}, "add_offset=1"),
        "axes in metres": ({"x/units": "m"}, "x in m, expected km"),
        "another epoch": ({"time/units": "seconds since 1970-01-01 00:00:00"}, "expected seconds since 2000"),
        "another pole": ({"projection/proj4_params": KILOMETRES.replace("=90", "=-90")}, "projection"),
    }
)


@pytest.mark.parametrize("change", HDF5_REFUSALS)
def test_an_hdf5_that_is_not_the_product_is_refused_with_its_name_and_a_reason(change, counts, tmp_path):
    changes, reason = HDF5_REFUSALS[change]
    file = write_hdf5(tmp_path / NAME, counts, IN_HDF5 | changes)
    with pytest.raises(ValueError, match=rf"^{re.escape(NAME)}: .*{reason}"):
        Knmi().read(file)


@pytest.mark.parametrize("change", NETCDF_REFUSALS)
def test_a_netcdf_that_is_not_the_product_is_refused_with_its_name_and_a_reason(change, counts, tmp_path):
    changes, reason = NETCDF_REFUSALS[change]
    name = "RAD_NL25_RAC_MFBS_5min_201008260005.nc"
    file = write_netcdf(tmp_path / name, counts, IN_NETCDF | changes)
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: .*{reason}"):
        ADJUSTED.read(file)


def test_a_netcdf_whose_axes_time_or_fill_value_say_otherwise_is_refused(counts, tmp_path):
    for change, reason in (
        ({"start": 336096300.0}, "is not the start of its sum"),
        ({"start": float("nan")}, "is not the start of its sum"),
        ({"shift": 0.5}, "other x than"),
        ({"fill": 0}, "_FillValue"),
    ):
        file = write_netcdf(tmp_path / "x.nc", counts, IN_NETCDF, **change)
        with pytest.raises(ValueError, match=rf"^x.nc: .*{reason}"):
            ADJUSTED.read(file)


@pytest.mark.parametrize("missing", IN_HDF5)
def test_whatever_an_hdf5_does_not_say_is_missed(missing, counts, tmp_path):
    file = write_hdf5(
        tmp_path / NAME, counts, {key: value for key, value in IN_HDF5.items() if key != missing}
    )
    with pytest.raises(
        ValueError, match=rf"^{re.escape(NAME)}: .*({missing.rpartition('/')[2]}|lacks a part)"
    ):
        Knmi().read(file)


def test_counts_of_another_shape_or_type_and_impossible_rain_are_refused(counts, tmp_path):
    for field, reason in (
        (counts[:764], r"shape \(764, 700\): expected \(765, 700\)"),
        (counts.astype("i4"), "type int32, expected uint16"),
        (np.where(counts == 12345, 60000, counts), r"1 of 535500 values .* outside 0..2000"),
    ):
        file = write_hdf5(tmp_path / NAME, field, IN_HDF5)
        with pytest.raises(ValueError, match=rf"^{re.escape(NAME)}: .*{reason}"):
            Knmi().read(file)


def test_a_newer_product_tells_its_own_grid(counts, tmp_path):
    # Numbers of RAD_NL25_PCP_NA of 2020 (wradlib issue 400): another ellipsoid, and no last "+".
    said = IN_HDF5 | {
        "geographic/map_projection/projection_proj4_params": "+proj=stere +lat_0=90 +lon_0=0 +lat_ts=60 "
        "+a=6378.14 +b=6356.75 +x_0=0 y_0=0",
        "geographic/geo_pixel_size_x": np.float32([1.0000035]),
        "geographic/geo_pixel_size_y": np.float32([-1.0000048]),
        "geographic/geo_row_offset": np.float32([3649.982]),
        "geographic/geo_product_corners": np.float32(
            [0, 49.362064, 0, 55.973602, 10.856453, 55.388973, 9.0093, 48.8953]
        ),
    }
    file = write_hdf5(tmp_path / NAME, counts, said)
    with pytest.raises(ValueError, match="another grid"):
        Knmi().read(file)
    grid = Knmi(grid=None).read(file).grid
    to_lonlat = pyproj.Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True)
    south, east = grid.y[-1] + grid.y_step / 2, grid.x[-1] + grid.x_step / 2
    corner = to_lonlat.transform(east, south)
    assert pyproj.Geod(ellps="WGS84").inv(*corner, 9.0093, 48.8953)[2] < 1  # m


def test_a_sector_of_zeros_does_not_become_dryness(counts, tmp_path):
    whole = Path(write_hdf5(tmp_path / NAME, counts, IN_HDF5).url).read_bytes()
    refused = 0
    sound = Knmi().read(RemoteFile(str(tmp_path / NAME), None))
    for place in [*range(0, 16384, 512), *range(16384, len(whole), 32768)]:
        (tmp_path / NAME).write_bytes(whole[:place] + bytes(512) + whole[place + 512 :])
        try:
            frame = Knmi().read(RemoteFile(str(tmp_path / NAME), None))
        except ValueError:
            refused += 1
            continue
        assert np.array_equal(frame.values, sound.values, equal_nan=True)
        assert (frame.grid, frame.valid_time) == (sound.grid, sound.valid_time)
    assert refused > 30


@pytest.mark.data
def test_no_flipped_bit_changes_a_value_place_or_time_in_silence(data, tmp_path):
    whole = next((data / "knmi").rglob(NAME)).read_bytes()
    chance = random.Random(1)
    path = tmp_path / NAME
    path.write_bytes(whole)
    with Decoder(Knmi()) as decoder:
        sound = decoder.decode(RemoteFile(str(path), TIME))
        for number in range(60):
            place = chance.randrange(8000 if number % 2 else len(whole))
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << chance.randrange(8)
            path.write_bytes(spoiled)
            try:
                frame = decoder.decode(RemoteFile(str(path), TIME))
            except ValueError as error:
                assert str(error).startswith(NAME)
                continue
            assert frame.grid == sound.grid
            assert np.array_equal(frame.values, sound.values, equal_nan=True)


def test_a_link_out_of_the_file_is_refused(counts, tmp_path):
    file = write_hdf5(tmp_path / NAME, counts, IN_HDF5)
    write_hdf5(tmp_path / "other.h5", counts, IN_HDF5)
    with h5py.File(file.url, "a") as opened:
        del opened["image1/image_data"]
        opened["image1/image_data"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "image1/image_data")
    with pytest.raises(ValueError, match=rf"^{re.escape(NAME)}: has an external link at /image1/image_data"):
        Knmi().read(file)


def test_files_of_both_kinds_are_found_by_the_end_of_their_interval(tmp_path):
    names = ["b/RAD_NL25_RAP_5min_201008260010.nc", "a/RAD_NL25_RAP_5min_201008260005.h5"]
    others = ["RAD_NL25_RAC_MFBS_5min_201008260005.nc", "RAD_NL25_RAP_5min_201008260005.h5.md5", "x.h5"]
    for name in [*names, *others, "RAD_NL25_RAP_5min_201013260005.h5"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = list(Knmi(str(tmp_path)).files(None, None))
    assert [file.valid_time.minute for file in found] == [5, 10]
    assert [file.url for file in Knmi(str(tmp_path)).files(TIME, TIME)] == [str(tmp_path / names[1])]
    with pytest.raises(ValueError, match="no files of KNMI RAD_NL25_PCP there"):
        list(Knmi(str(tmp_path), "RAD_NL25_PCP").files(None, None))
