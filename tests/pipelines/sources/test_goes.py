"""GOES-R files: real ones read as netCDF4 reads them, and written ones of the kinds that are not at hand."""

import shutil
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import netCDF4
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Geod

from pipelines.frame import Frame
from pipelines.sources.goes import (
    Goes,
    Imagery,
    Lightning,
    MultiChannelImagery,
    Radiances,
    RainRate,
)
from pipelines.sources.source import RemoteFile

RAINFALL = "abi/CG_ABI-L2-RRQPEF-M6_G16_s20230761440209_e20230761449517_c20230761450032.nc"
RADIANCE = "abi/OR_ABI-L1b-RadM1-M3C01_G16_s20171931811268_e20171931811326_c20171931811369.nc"
IMAGE = "abi/OR_ABI-L2-CMIPM1-M3C01_G16_s20171931811268_e20171931811326_c20171931811382.nc"
LIGHTNING = "glm_gridded_conus/OR_GLM-L2-GLMC-M3_G16_s20181830433000_e20181830434000_c20191931535490.nc"
LIGHTNING_M = "glm_gridded_meso/OR_GLM-L2-GLMM1-M3_G16_s20181830433000_e20181830434000_c20191931535550.nc"

SPAN = "s20201661201170_e20201661203543_c20201661204012"
HEIGHT, EQUATOR, POLE = 35786023.0, 6378137.0, 6356752.31414  # m
PLANCK = {"planck_fk1": 10803.3, "planck_fk2": 1392.74, "planck_bc1": 0.0755, "planck_bc2": 0.99975}


def read(path: Path, source: Goes) -> Frame:
    return source.read(RemoteFile(str(path), None))


def pug_lonlat(x: Any, y: Any, lon_0: float) -> tuple[Any, Any]:
    """Longitude and latitude of scan angles (rad), by the formula of the PUG, volume 3, section 5.1.2.8.1."""
    distance = HEIGHT + EQUATOR
    a = np.sin(x) ** 2 + np.cos(x) ** 2 * (np.cos(y) ** 2 + (EQUATOR / POLE) ** 2 * np.sin(y) ** 2)
    b = -2 * distance * np.cos(x) * np.cos(y)
    with np.errstate(invalid="ignore"):
        r = (-b - np.sqrt(b**2 - 4 * a * (distance**2 - EQUATOR**2))) / (2 * a)
    s_x, s_y, s_z = r * np.cos(x) * np.cos(y), -r * np.sin(x), r * np.cos(x) * np.sin(y)
    lat = np.arctan((EQUATOR / POLE) ** 2 * s_z / np.hypot(distance - s_x, s_y))
    return lon_0 - np.degrees(np.arctan(s_y / (distance - s_x))), np.degrees(lat)


def netcdf4(path: Path, name: str, flags: str = "DQF") -> tuple[Any, Any]:
    """A field (NaN where masked) and its flags as the netCDF library unpacks them."""
    with netCDF4.Dataset(path) as dataset:
        values = dataset[name][:]
        dataset[flags].set_auto_maskandscale(False)
        return np.ma.filled(values.astype(np.float64), np.nan), dataset[flags][:].view(np.uint8)


def check_place(frame: Frame, path: Path, lon_0: float) -> None:
    """Compares cells near and at the corners with the file's angles through the PUG's formula, to 1 m."""
    with netCDF4.Dataset(path) as dataset:
        x, y = dataset["x"][:].astype(np.float64), dataset["y"][:].astype(np.float64)
    assert frame.grid.shape == (y.size, x.size)
    rows, columns = (np.linspace(0, size - 1, 9).astype(int) for size in frame.grid.shape)
    lon, lat = pug_lonlat(*np.meshgrid(x[columns].data, y[rows].data), lon_0)
    on_earth = np.isfinite(lat)
    assert on_earth.sum() > 20
    row, column = frame.grid.cells(lon[on_earth], lat[on_earth])
    expected = np.broadcast_arrays(rows[:, None], columns[None, :])
    off = np.hypot(row - expected[0][on_earth], column - expected[1][on_earth]) * frame.grid.x_step
    assert off.max() < 1  # m, as seen from above; the angles in the file are rounded to 32 bits


def test_the_formula_of_the_guide_gives_its_own_example():
    lon, lat = pug_lonlat(-0.024052, 0.095340, -75.0)
    assert (lon, lat) == pytest.approx((-84.690932, 33.846162), abs=1e-6)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "source", "field", "lon_0", "time"),
    [
        (RAINFALL, Goes(RainRate()), "RRQPE", -75.0, "2023-03-17T14:50"),
        (RADIANCE, Goes(Radiances(calibrated=False)), "Rad", -89.5, "2017-07-12T18:12"),
        (IMAGE, Goes(Imagery(channel=1)), "CMI", -89.5, "2017-07-12T18:12"),
    ],
)
def test_a_real_file_reads_as_netcdf4_reads_it(name, source, field, lon_0, time, data):
    path = data / "goes" / name
    frame = read(path, source)
    expected, flags = netcdf4(path, field)
    expected[flags != 0] = np.nan
    assert np.array_equal(np.isnan(frame.values), np.isnan(expected))
    assert np.nanmax(np.abs(frame.values - expected)) <= 2e-6 * np.nanmax(expected)
    assert frame.valid_time == datetime.fromisoformat(time).replace(tzinfo=UTC)
    assert source.valid_time(path.name) == frame.valid_time
    assert frame.group == "satellite"
    check_place(frame, path, lon_0)


@pytest.mark.data
@pytest.mark.parametrize(("name", "unseen"), [(LIGHTNING, 0.0387), (LIGHTNING_M, 0.0)])
def test_no_flash_is_zero_where_the_lightning_mapper_looks_and_nan_beyond(name, unseen, data):
    path = data / "goes" / name
    frame = read(path, Goes(Lightning()))
    expected, _ = netcdf4(path, "flash_extent_density")
    flashed = np.isfinite(expected)
    assert np.array_equal(frame.values[flashed], expected[flashed].astype(np.float32))
    assert set(np.unique(frame.values[~flashed & np.isfinite(frame.values)])) == {0.0}
    assert np.isnan(frame.values).mean() == pytest.approx(unseen, abs=5e-4)
    assert np.isnan(frame.values[:200, :200]).all() == (unseen > 0)  # space, north-west of the earth
    assert (frame.valid_time, frame.cadence) == (
        datetime(2018, 7, 2, 4, 34, tzinfo=UTC),
        timedelta(minutes=1),
    )
    check_place(frame, path, -75.0)


@pytest.mark.data
def test_the_regions_of_the_registered_grids_are_those_that_the_files_state(data):
    with netCDF4.Dataset(data / "goes" / RAINFALL) as dataset:
        bounds = dataset["x_image_bounds"][:].data, dataset["y_image_bounds"][:].data
    grid = read(data / "goes" / RAINFALL, Goes(RainRate())).grid
    edges = (
        grid.x[[0, -1]] + np.array([-0.5, 0.5]) * grid.x_step,
        grid.y[[0, -1]] + np.array([-0.5, 0.5]) * grid.y_step,
    )
    for edge, bound in zip(edges, bounds, strict=True):
        assert edge == pytest.approx(bound * HEIGHT, abs=0.5)
    conus = read(data / "goes" / LIGHTNING, Goes(Lightning())).grid
    assert conus.x[[0, -1]] == pytest.approx(np.array([-0.101332, 0.038612]) * HEIGHT, abs=1e-3)
    assert conus.y[[0, -1]] == pytest.approx(np.array([0.128212, 0.044268]) * HEIGHT, abs=1e-3)
    assert conus.x == pytest.approx(grid.x[902:3402], abs=1e-6)  # the full disk's cells
    assert conus.y == pytest.approx(grid.y[422:1922], abs=1e-6)


@pytest.mark.data
def test_real_radiances_become_the_reflectance_of_the_image_of_the_same_scan(data):
    calibrated = read(data / "goes" / RADIANCE, Goes(Radiances()))
    image = read(data / "goes" / IMAGE, Goes(Imagery()))
    assert calibrated.grid == image.grid
    assert calibrated.variable == image.variable
    both = np.isfinite(image.values) & (image.values < 0.99)  # the image is cut at 1
    assert both.sum() > 990_000
    # In this scan of the test phase the image was made with a constant of its own, which no file states
    slope, offset = np.polyfit(calibrated.values[both], image.values[both], 1)
    assert (slope, offset) == pytest.approx((1.0272, 0.0), abs=2e-4)
    assert np.abs(slope * calibrated.values - image.values)[both].max() < 0.0013 / 2 * 1.1  # half a count


@pytest.mark.data
def test_the_means_that_files_state_are_those_of_what_is_read(data):
    for name, source, stated in (
        (RADIANCE, Goes(Radiances(calibrated=False)), "mean_radiance_value_of_valid_pixels"),
        (IMAGE, Goes(Imagery()), "mean_reflectance_factor"),
    ):
        with h5py.File(data / "goes" / name) as file:
            mean = file[stated][()]
        assert np.nanmean(read(data / "goes" / name, source).values) == pytest.approx(mean, rel=1e-4)
    with h5py.File(data / "goes" / RAINFALL) as file:
        volume, rainy = file["total_rain_volume"][()], file["total_pixels_with_rain"][()]
    rates = read(data / "goes" / RAINFALL, Goes(RainRate())).values
    assert (rates >= 1).sum() == rainy
    assert rates[rates >= 1].sum(dtype=np.float64) == pytest.approx(volume, rel=1e-4)


def write(
    path: Path,
    fields: dict[str, tuple[Any, dict[str, Any], Any]],
    scalars: dict[str, Any],
    scene: str = "M1",
    step: int = 56,
    x_first: float = -0.02002,
    y_first: float = 0.10402,
    lon_0: float = -75.0,
    slot: str = "GOES-East",
) -> Path:
    """A file in the layout of the PUG; each field is its counts, its attributes and its flags."""
    size = next(iter(fields.values()))[0].shape
    with netCDF4.Dataset(path, "w") as file:
        start, end = (
            datetime.strptime(path.name.split(f"_{key}")[1][:14] + "00000", "%Y%j%H%M%S%f") for key in "se"
        )
        file.dataset_name = "OR_" + path.name[3:]
        file.time_coverage_start, file.time_coverage_end = (
            f"{time:%Y-%m-%dT%H:%M:%S}.{time.microsecond // 100000}Z" for time in (start, end)
        )
        file.scene_id, file.orbital_slot = scene, slot
        for axis, first, cells, sign in (("y", y_first, size[0], -1), ("x", x_first, size[1], 1)):
            file.createDimension(axis, cells)
            variable = file.createVariable(axis, "i2", (axis,))
            variable.set_auto_maskandscale(False)
            variable.setncatts(
                {
                    "scale_factor": np.float32(sign * step * 1e-6),
                    "add_offset": np.float32(first),
                    "units": "rad",
                }
            )
            variable[:] = np.arange(cells)
            middle = file.createVariable(f"{axis}_image", "f4")
            middle[...] = first + sign * step * 1e-6 * cells / 2
        for name, (counts, attributes, flags) in fields.items():
            variable = file.createVariable(
                name,
                "i2",
                ("y", "x"),
                zlib=True,
                fill_value=np.int16(attributes["_FillValue"]),
                chunksizes=(250, 250),
            )
            variable.set_auto_maskandscale(False)
            variable.setncatts(
                {
                    "_Unsigned": "true",
                    "grid_mapping": "goes_imager_projection",
                    **{key: value for key, value in attributes.items() if key != "_FillValue"},
                }
            )
            variable[:] = counts.astype(np.uint16).view(np.int16)
            flag = file.createVariable(
                "DQF" + name[3:], "i1", ("y", "x"), zlib=True, fill_value=np.int8(-1), chunksizes=(250, 250)
            )
            flag.set_auto_maskandscale(False)
            flag.setncatts({"_Unsigned": "true", "units": "1"})
            flag[:] = flags.astype(np.uint8).view(np.int8)
        projection = file.createVariable("goes_imager_projection", "i4")
        projection.setncatts(
            {
                "grid_mapping_name": "geostationary",
                "perspective_point_height": HEIGHT,
                "semi_major_axis": EQUATOR,
                "semi_minor_axis": POLE,
                "inverse_flattening": 298.2572221,
                "latitude_of_projection_origin": 0.0,
                "longitude_of_projection_origin": lon_0,
                "sweep_angle_axis": "x",
            }
        )
        for name, value in scalars.items():
            if name.startswith("band_id"):
                file.createDimension("band", 1) if "band" not in file.dimensions else None
                file.createVariable(name, "i1", ("band",))[:] = value
            else:
                file.createVariable(name, "f4", fill_value=np.float32(-999))[...] = value
    return path


TEMPERATURE = {  # as channel 13 of the imagery is packed
    "_FillValue": -1,
    "valid_range": np.array([0, 4095], np.int16),
    "scale_factor": np.float32(0.06145332),
    "add_offset": np.float32(89.62),
    "units": "K",
    "standard_name": "toa_brightness_temperature",
}
REFLECTANCE = {
    "_FillValue": -1,
    "valid_range": np.array([0, 4095], np.int16),
    "scale_factor": np.float32(0.00031746001),
    "add_offset": np.float32(0.0),
    "units": "1",
    "standard_name": "toa_lambertian_equivalent_albedo_multiplied_by_cosine_solar_zenith_angle",
}
RADIANCE_13 = {  # as channel 13 of the radiances is packed
    "_FillValue": 4095,
    "valid_range": np.array([0, 4094], np.int16),
    "scale_factor": np.float32(0.04572892),
    "add_offset": np.float32(-1.6443),
    "units": "mW m-2 sr-1 (cm-1)-1",
    "standard_name": "toa_outgoing_radiance_per_unit_wavenumber",
}


@pytest.fixture(scope="module")
def scene() -> tuple[Any, Any]:
    """Counts of 12 bits and flags of a mesoscale scene, some missing, some flagged."""
    random = np.random.default_rng(5)
    counts = random.integers(1500, 3800, (500, 500))
    counts[:3, :3], counts[10, 10] = 65535, 5000  # missing; not a count of this product
    flags = random.choice([0, 1, 2, 3, 255], (500, 500), p=[0.8, 0.1, 0.04, 0.04, 0.02])
    flags[:12, :12] = 0
    return counts, flags


@pytest.fixture(scope="module")
def infrared(scene, tmp_path_factory) -> Path:
    counts, flags = scene
    path = (
        tmp_path_factory.mktemp("goes")
        / "OR_ABI-L2-CMIPM1-M6C13_G16_s20201661201276_e20201661201334_c20201661201401.nc"
    )
    return write(path, {"CMI": (counts, TEMPERATURE, flags)}, {"band_id": 13})


def test_an_infrared_image_reads_as_netcdf4_reads_it(infrared, scene):
    frame = read(infrared, Goes(Imagery(13)))
    expected, flags = netcdf4(infrared, "CMI")
    assert np.isnan(expected[10, 10])
    assert np.isnan(expected[:3, :3]).all()
    expected[flags != 0] = np.nan
    assert np.array_equal(np.isnan(frame.values), np.isnan(expected))
    assert np.nanmax(np.abs(frame.values - expected)) < 5e-5  # K
    assert frame.values[5, 5] == np.float32(
        scene[0][5, 5] * np.float64(np.float32(0.06145332)) + np.float64(np.float32(89.62))
    )
    assert frame.variable.name == "brightness_temperature"
    assert frame.source == "NOAA GOES-16 ABI-L2-CMIPM1 channel 13"
    check_place(frame, infrared, -75.0)


def test_conditionally_usable_cells_are_kept_where_asked_for(infrared, scene):
    kept = ~np.isnan(read(infrared, Goes(Imagery(13), quality=[0, 1])).values)
    counts, flags = scene
    assert np.array_equal(kept, np.isin(flags, [0, 1]) & (counts <= 4095))
    with pytest.raises(ValueError, match=r"source\.quality"):
        Goes(Imagery(), quality=[])


def test_one_of_many_channels_is_read_with_its_own_scale_and_flags(scene, tmp_path):
    counts, flags = scene
    path = write(
        tmp_path / f"OR_ABI-L2-MCMIPM1-M6_G19_{SPAN}.nc",
        {
            "CMI_C02": (counts[::-1], REFLECTANCE, flags[::-1]),
            "CMI_C13": (counts, TEMPERATURE, flags),
        },
        {"band_id_C02": 2, "band_id_C13": 13},
    )
    for channel, variable in ((2, "reflectance"), (13, "brightness_temperature")):
        frame = read(path, Goes(MultiChannelImagery(channel)))
        expected, stored = netcdf4(path, f"CMI_C{channel:02d}", f"DQF_C{channel:02d}")
        expected[stored != 0] = np.nan
        assert np.array_equal(np.isnan(frame.values), np.isnan(expected))
        assert np.nanmax(np.abs(frame.values - expected)) < 5e-5
        assert frame.variable.name == variable
    with pytest.raises(ValueError, match="CMI_C08"):
        read(path, Goes(MultiChannelImagery(8)))


def test_infrared_radiances_come_from_the_temperatures_that_are_read(tmp_path):
    temperature = np.linspace(180.0, 320.0, 250_000).reshape(500, 500)
    fk1, fk2, bc1, bc2 = PLANCK.values()
    radiance = fk1 / (np.exp(fk2 / (bc1 + bc2 * temperature)) - 1)  # forward, as the sensor sees it
    counts = np.round((radiance + 1.6443) / 0.04572892)
    counts[0, 0] = 3  # below zero radiance: no temperature
    path = write(
        tmp_path / f"OR_ABI-L1b-RadM1-M6C13_G16_{SPAN}.nc",
        {"Rad": (counts, RADIANCE_13, np.zeros((500, 500)))},
        {"band_id": 13, "kappa0": -999, **PLANCK},
    )
    frame = read(path, Goes(Radiances()))
    assert np.isnan(frame.values[0, 0])
    assert np.isnan(frame.values).sum() == 1
    off = np.abs(frame.values - temperature).ravel()[1:]
    assert off.max() < 0.3  # K: half a count of radiance at 180 K
    assert off[-100_000:].max() < 0.05
    raw = read(path, Goes(Radiances(calibrated=False)))
    assert raw.variable.units == "mW m-2 sr-1 (cm-1)-1"
    assert np.nanmax(np.abs(raw.values - radiance).ravel()[1:]) < 0.024


@pytest.mark.parametrize(
    ("step", "lon_0", "slot", "x_first", "y_first", "corner"),
    [  # first centres as the PUG states them, volume 3, table 5.1.2.6
        (56, -75.0, "GOES-East", -0.101332, 0.128212, (422, 902)),
        (28, -75.0, "GOES-East", -0.101346, 0.128226, (422, 902)),
        (56, -137.0, "GOES-West", -0.069972, 0.128212, (422, 1462)),
        (56, -89.5, "GOES-Test", -0.075012, 0.126532, (452, 1372)),
    ],
)
def test_the_grid_of_the_united_states_is_registered_at_every_place_of_the_satellite(
    step, lon_0, slot, x_first, y_first, corner, tmp_path
):
    part = 56 // step
    counts = np.full((1500 * part, 2500 * part), 2000, np.uint16)
    path = tmp_path / f"OR_ABI-L2-CMIPC-M6C01_G18_{SPAN}.nc"
    args = ({"CMI": (counts, REFLECTANCE, np.zeros(counts.shape, np.uint8))}, {"band_id": 1})
    write(path, *args, scene="CONUS", step=step, x_first=x_first, y_first=y_first, lon_0=lon_0, slot=slot)
    frame = read(path, Goes(Imagery(1)))
    assert frame.grid.x_first - frame.grid.x_step / 2 == pytest.approx(
        (corner[1] * 56e-6 - 0.151872) * HEIGHT, abs=1e-3
    )
    assert frame.grid.y_first - frame.grid.y_step / 2 == pytest.approx(
        (0.151872 - corner[0] * 56e-6) * HEIGHT, abs=1e-3
    )
    check_place(frame, path, lon_0)
    assert frame.valid_time == datetime(2020, 6, 14, 12, 5, tzinfo=UTC)
    with h5py.File(path, "a") as file:
        file["x"].attrs["add_offset"] = np.float32(x_first + step * 1e-6)
    with pytest.raises(ValueError, match="not the grid of scene C"):
        read(path, Goes(Imagery(1)))


def attribute_of(node: str, name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[node].attrs[name] = value

    return change


def replaced(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return change


WRONG: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "another product": (attribute_of("/", "dataset_name", f"OR_ABI-L2-ACMM1-M6_G16_{SPAN}.nc"), "holds OR_ABI-L2-ACMM1"),
    "another channel": (attribute_of("/", "dataset_name", f"OR_ABI-L2-CMIPM1-M6C14_G16_{SPAN}.nc"), "expected ABI-L2-CMIP of channel=13"),
    "another band": (replaced("band_id", np.array([14], np.int8)), "band_id is 14, expected channel 13"),
    "another scan": (attribute_of("/", "dataset_name", f"OR_ABI-L2-CMIPM1-M6C13_G16_{SPAN}.nc"), "another scan than its name"),
    "another time": (attribute_of("/", "time_coverage_end", "2020-06-14T12:02:33.4Z"), "covers 2020-06-14 12:01"),
    "no time": (attribute_of("/", "time_coverage_end", "today"), "not a time"),
    "another unit": (attribute_of("CMI", "units", "1"), "is in 1, expected K"),
    "a negative scale": (attribute_of("CMI", "scale_factor", np.float32(-1)), "scale_factor=-1"),
    "no scale": (attribute_of("CMI", "scale_factor", np.float32("nan")), "scale_factor=nan"),
    "another offset": (attribute_of("CMI", "add_offset", np.float32(-89.62)), "outside 50..450 K"),
    "fewer flags": (replaced("DQF", np.zeros((500, 499), np.int8)), r"flags of \(500, 499\)"),
    "no flags": (lambda file: file.__delitem__("DQF"), "lacks a part"),
    "a group for a field": (lambda file: (file.__delitem__("CMI"), file.create_group("CMI")), "CMI is not a field"),
    "floats": (replaced("CMI", np.zeros((500, 500), np.float32)), "has no attribute|expected counts of 16 bits"),
    "another sweep": (attribute_of("goes_imager_projection", "sweep_angle_axis", "y"), "sweep_angle_axis='y'"),
    "another height": (attribute_of("goes_imager_projection", "perspective_point_height", 35786024.0), "perspective_point_height"),
    "another longitude": (attribute_of("goes_imager_projection", "longitude_of_projection_origin", -75.5), "projected from -75.5"),
    "another slot": (attribute_of("/", "orbital_slot", "GOES-West"), "as GOES-West"),
    "a place between cells": (attribute_of("x", "add_offset", np.float32(-0.02003)), "off the fixed grid"),
    "another place": (attribute_of("x", "add_offset", np.float32(-0.02002 + 10 * 56e-6)), "x_image is"),
    "rows from the south": (attribute_of("y", "scale_factor", np.float32(56e-6)), "y southward"),
    "larger steps": (attribute_of("x", "scale_factor", np.float32(57e-6)), "off the fixed grid|steps of 57"),
    "cells that jump": (replaced("x", np.r_[0:250, 251:501].astype(np.int16)), "has no attribute units|even steps"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_of_something_else_is_refused_with_its_name_and_a_reason(kind, infrared, tmp_path):
    spoil, reason = WRONG[kind]
    path = tmp_path / infrared.name
    shutil.copy(infrared, path)
    with h5py.File(path, "a") as file:
        spoil(file)
    with pytest.raises(ValueError, match=rf"^{infrared.name}: .*({reason})"):
        read(path, Goes(Imagery(13)))


def test_cut_and_foreign_files_are_refused(infrared, tmp_path):
    path = tmp_path / infrared.name
    for bytes_ in (b"", b"CDF\1" + bytes(100), infrared.read_bytes()[:-1000]):
        path.write_bytes(bytes_)
        with pytest.raises(ValueError, match=rf"^{infrared.name}: .*HDF5"):
            read(path, Goes(Imagery(13)))


def test_a_link_to_another_file_is_refused(infrared, tmp_path):
    path = tmp_path / infrared.name
    shutil.copy(infrared, path)
    with h5py.File(path, "a") as file:
        del file["CMI"]
        file["CMI"] = h5py.ExternalLink(str(infrared), "/CMI")
    with pytest.raises(ValueError, match="external link"):
        read(path, Goes(Imagery(13)))


@pytest.mark.data
def test_a_file_of_lightning_points_is_no_field(data):
    (path, *_) = (data / "goes" / "glm_l2_lcfa").iterdir()
    assert Goes(Lightning()).valid_time(path.name) is None
    with pytest.raises(ValueError, match="holds OR_GLM-L2-LCFA"):
        read(path, Goes(Lightning()))


@pytest.mark.data
def test_lightning_whose_fill_value_or_minutes_mean_something_else_is_refused(data, tmp_path):
    source = data / "goes" / LIGHTNING_M
    path = tmp_path / source.name
    for name, value, reason in (
        ("add_offset", 1.0, "does not mean no flash"),
        ("units", "Count per nominal    3136 microradian^2 pixel per 5.0 min", "5.0 min"),
        ("units", "nJ", "counts in 'nJ'"),
    ):
        path.unlink(missing_ok=True)
        path.write_bytes(source.read_bytes())
        with h5py.File(path, "a") as file:
            file["flash_extent_density"].attrs[name] = value
        with pytest.raises(ValueError, match=reason):
            read(path, Goes(Lightning()))
    path.write_bytes(source.read_bytes())
    with h5py.File(path, "a") as file:
        file["x"].attrs["add_offset"] = -0.151844 + 56e-6
    with pytest.raises(ValueError, match="not counted from the first cell"):
        read(path, Goes(Lightning()))


def test_a_lost_part_of_a_field_is_refused_and_never_read_as_the_fill_value(scene, tmp_path):
    counts, flags = scene
    path = tmp_path / f"OR_ABI-L2-CMIPM1-M6C13_G16_{SPAN}.nc"
    write(path, {"CMI": (counts, TEMPERATURE, flags)}, {"band_id": 13})
    with h5py.File(path, "a") as file:
        attributes = dict(file["CMI"].attrs)
        del file["CMI"]
        field = file.create_dataset(
            "CMI", (500, 500), "<i2", chunks=(250, 250), compression="gzip", fillvalue=0
        )
        field.attrs.update({key: value for key, value in attributes.items() if key != "DIMENSION_LIST"})
        field[:, :250] = counts[:, :250].astype(np.uint16).view(np.int16)
    with pytest.raises(ValueError, match="parts of its field or flags are lost"):
        read(path, Goes(Imagery(13)))


@pytest.mark.parametrize("node", ["CMI", "DQF", "x"])
@pytest.mark.parametrize("count", [16, 400, 2**17, 2**24])
def test_a_chunk_of_another_size_is_refused_and_never_filled_with_what_lies_in_memory(
    node, count, infrared, tmp_path
):
    path = tmp_path / infrared.name
    shutil.copy(infrared, path)
    with h5py.File(path, "r+") as file:
        links = ("DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME")
        kept = {key: value for key, value in file[node].attrs.items() if key not in links}
        values = file[node][()]
        chunks = tuple(-(-size // 2) for size in values.shape)
        del file[node]
        field = file.create_dataset(node, data=values, chunks=chunks, compression="gzip", shuffle=True)
        field.attrs.update(kept)
    read(path, Goes(Imagery(13)))
    with h5py.File(path, "r+") as file:
        file[node].id.write_direct_chunk(file[node].chunks, zlib.compress(bytes(count)))
    with pytest.raises(ValueError, match=f"{path.name}: /{node} has a (damaged )?chunk"):
        read(path, Goes(Imagery(13)))


@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_exactly_the_missing_part_is_nan(seed, share, tmp_path_factory):
    random = np.random.default_rng(seed)
    missing = random.random((500, 500)) < share
    counts = np.where(missing & (random.random((500, 500)) < 0.5), 65535, 2500)
    flags = np.where(missing & (counts == 2500), random.choice([1, 2, 3, 255], (500, 500)), 0)
    path = tmp_path_factory.mktemp("goes") / f"OR_ABI-L2-CMIPM1-M6C13_G16_{SPAN}.nc"
    write(path, {"CMI": (counts, TEMPERATURE, flags)}, {"band_id": 13})
    assert np.array_equal(np.isnan(read(path, Goes(Imagery(13))).values), missing)


@pytest.mark.parametrize(
    ("scene", "mode", "span", "valid"),
    [  # as the archives name them
        ("C", 6, "s20191611801229_e20191611804002", "18:05"),
        ("C", 3, "s20181711712199_e20181711714572", "17:15"),
        ("F", 3, "s20181711715399_e20181711726166", "17:30"),
        ("F", 6, "s20230761440209_e20230761449517", "14:50"),
        ("F", 6, "s20230761450209_e20230761500002", "15:00"),  # late by a jitter
        ("M1", 6, "s20200151200250_e20200151200307", "12:01"),
        ("M2", 6, "s20200151200550_e20200151201007", "12:01"),  # late by a jitter
        ("C", 6, "s20193652356170_e20193652358543", "00:00"),
    ],
)
def test_a_scan_is_valid_at_the_end_of_the_slot_in_which_it_is_complete(scene, mode, span, valid):
    name = f"OR_ABI-L2-CMIP{scene}-M{mode}C13_G16_{span}_c20210010000000.nc"
    time = Goes(Imagery()).valid_time(name)
    assert f"{time:%H:%M}" == valid
    end = datetime.strptime(span.split("_e")[1] + "00000", "%Y%j%H%M%S%f").replace(tzinfo=UTC)
    assert time - end > timedelta(minutes=-10 / 6)


@settings(max_examples=20)
@given(jitter=st.lists(st.floats(-1.5, 1.5), min_size=2, max_size=12))
def test_scans_that_jitter_fall_on_a_regular_time_axis(jitter):
    begin = datetime(2020, 6, 14, 12, 1, 17)
    names = []
    for step, late in enumerate(jitter):
        start = begin + step * timedelta(minutes=5) + timedelta(seconds=late)
        times = (
            f"{time:%Y%j%H%M%S}{time.microsecond // 100000}"
            for time in (start, start + timedelta(seconds=157))
        )
        names.append("OR_ABI-L2-CMIPC-M6C13_G16_s{}_e{}_c20201661204012.nc".format(*times))
    times = [Goes(Imagery()).valid_time(name) for name in names]
    assert {later - sooner for sooner, later in pairwise(times)} == {timedelta(minutes=5)}


def test_files_are_chosen_by_their_names_and_a_mixture_is_refused(tmp_path):
    names = [
        f"OR_ABI-L2-CMIPC-M6C13_G16_{SPAN}.nc",
        "OR_ABI-L2-CMIPC-M6C13_G16_s20201661206170_e20201661208543_c20201661209012.nc",
        f"OR_ABI-L2-CMIPC-M6C08_G16_{SPAN}.nc",
        f"OR_ABI-L2-CMIPM1-M6C13_G16_{SPAN}.nc",
        f"OR_ABI-L2-CMIPC-M6C13_G18_{SPAN}.nc",
        f"OR_ABI-L1b-RadC-M6C13_G16_{SPAN}.nc",
        f"OR_ABI-L2-CMIPC-M6C13_G16_{SPAN}.nc.tmp",
        "OR_ABI-L2-CMIPC-M6C13_G16_s20203671201170_e20203671203543_c20201661204012.nc",  # no such day
    ]
    for name in names:
        (tmp_path / name).touch()
    chosen = Goes(Imagery(13), str(tmp_path), satellite="G16", scene="C")
    assert [Path(file.url).name for file in chosen.files(None, None)] == names[:2]
    late = datetime(2020, 6, 14, 12, 10, tzinfo=UTC)
    assert [file.valid_time for file in chosen.files(late, None)] == [late]
    with pytest.raises(ValueError, match=r"holds NOAA GOES-16 .*C channel 13, .*GOES-18.*; choose one"):
        list(Goes(Imagery(), str(tmp_path)).files(None, None))
    with pytest.raises(ValueError, match="no files of GOES ABI-L2-RRQPE"):
        list(Goes(RainRate(), str(tmp_path)).files(None, None))


def test_wrong_arguments_are_refused_at_once():
    for make, reason in (
        (lambda: Imagery(17), "expected 1..16"),
        (lambda: MultiChannelImagery(0), "expected 1..16"),
        (lambda: Goes(Imagery(), scene="CONUS"), "expected one of F, C, M1, M2"),
        (lambda: Goes(Imagery(), cadence=0), "cadence"),
    ):
        with pytest.raises(ValueError, match=reason):
            make()
    assert Goes(Imagery(), quality=[0, 1]) == Goes(Imagery(), quality=(0, 1))


@pytest.mark.data
def test_a_place_on_the_earth_is_where_two_products_of_the_same_grid_say(data):
    """Ground distances, beside the scan angles of `check_place`: a corner of the scene to 1 m."""
    frame = read(data / "goes" / IMAGE, Goes(Imagery()))
    rows, columns = np.array([0, 0, 999, 999]), np.array([0, 999, 0, 999])
    lon, lat = (values[rows, columns] for values in frame.grid.lonlat())
    expected = pug_lonlat(-0.04032 + 28e-6 * columns, 0.12264 - 28e-6 * rows, -89.5)
    _, _, off = Geod(a=EQUATOR, b=POLE).inv(lon, lat, *expected)
    assert max(off) < 1
