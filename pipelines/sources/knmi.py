"""`Knmi`: rain sums of the Netherlands every 5 minutes, in KNMI's HDF5 and in the netCDF-4 made from it.

The real-time composite (RAD_NL25_RAP_5min) is KNMI HDF5 3.5 ("HDF5 Data Format Specification", KNMI 2003);
the gauge-adjusted climatology (RAD_NL25_RAC_MFBS_5min) is netCDF with the same attributes in other places.
Both give lengths in KILOMETRES, the axes of the ellipsoid too; a `Grid` is in metres.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np
from pyproj import CRS, Geod, Transformer

from pipelines.cf import RAINFALL_RATE
from pipelines.formats import hdf5
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, content, named_files, stamp

LARGEST = 16 * 2**20  # bytes of a file; a field that cannot be packed at all has 1 MB
INTERVAL = timedelta(minutes=5)
STEREOGRAPHIC = "+proj=stere +lat_0=90 +lon_0=0 +lat_ts=60 +a={:.0f} +b={:.0f} +x_0=0 +y_0=0 +units=m"
GRID = Grid(STEREOGRAPHIC.format(6378137, 6356752), 500.0, 1000.0, 700, -3650500.0, -1000.0, 765)

# The ellipsoid is the only part of the projection that differs between products; some lack the last "+".
PROJECTION = re.compile(
    r"\+proj=stere \+lat_0=90 \+lon_0=0(?:\.0)? \+lat_ts=60(?:\.0)? "
    r"\+a=(6378\.\d{1,3}) \+b=(6356\.\d{1,3}) \+x_0=0 \+?y_0=0"
)
FORMULA = re.compile(r"GEO *= *(\d+\.\d+) *\* *PV *\+ *(-?\d+\.\d+)")
CORNER_TOLERANCE = 70.0  # m: files give corners in thousandths of a degree, which round by up to 67 m

MISSING = 65535  # not observed, or outside of the radars' range
MILLIMETRES = 0.01  # of one count
RATES = np.arange(65536) * (MILLIMETRES * (timedelta(hours=1) / INTERVAL))  # mm/h by count
RATES[MISSING] = np.nan
RATES = RATES.astype(np.float32)


@dataclass(frozen=True)
class Layout:
    """Where things stand in a file."""

    image: str
    calibration: str
    geographic: str
    overview: str
    projection: tuple[str, str]  # object and attribute
    quantity: tuple[str, str, str]  # object, attribute, and what it must say
    dimensions: tuple[int, ...]  # of the image, before y and x
    coordinates: bool  # whether x, y and time are there once more as arrays


HDF5 = Layout(
    image="image1/image_data",
    calibration="image1/calibration",
    geographic="geographic",
    overview="overview",
    projection=("geographic/map_projection", "projection_proj4_params"),
    quantity=("image1", "image_geo_parameter", "ACCUMULATED_PRECIPITATION_[MM]"),
    dimensions=(),
    coordinates=False,
)
NETCDF = Layout(
    image="image1_image_data",
    calibration="image1_calibration",
    geographic="geographic",
    overview="overview",
    projection=("projection", "proj4_params"),
    quantity=("image1_image_data", "standard_name", "precipitation_amount"),
    dimensions=(1,),
    coordinates=True,
)


@dataclass(frozen=True)
class Knmi:
    """Files of one product in a folder and its subfolders; the time in their names ends the interval."""

    path: str | None = None
    product: str = "RAD_NL25_RAP_5min"  # as file names begin
    recorded: str = "RAD_NL25_RAU_5mi"  # the product's name inside its files
    grid: Grid | None = GRID  # that files must be on; None: the one that they say they are on
    trusted: ClassVar[bool] = False

    def valid_time(self, name: str) -> datetime | None:
        """When the frame in a file of this name is valid; None for names of other products."""
        match = re.fullmatch(re.escape(self.product) + r"_(\d{12})\.(?:h5|nc)", name)
        return stamp(match[1], "%Y%m%d%H%M") if match else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, or holds no file of this product at all.
        """
        examples = f"{self.product}_201008260000.h5 or {self.product}_201008260000.nc"
        return named_files(self, start, end, f"KNMI {self.product}", examples)

    def read(self, file: RemoteFile) -> Frame:
        """The mean rain rate (mm/h) of the 5 minutes of one file; NaN where no radar looks.

        Raises:
            ValueError: naming the file, if it is damaged or not this product on its grid.
        """
        path = Path(file.url)
        try:
            sha256 = hashlib.sha256(content(path, LARGEST)).hexdigest()
            with hdf5.opened(path, LARGEST) as opened:
                return self._frame(opened, HDF5 if "image1" in opened else NETCDF, sha256)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def _frame(self, file: h5py.File, layout: Layout, sha256: str) -> Frame:
        recorded = hdf5.attribute(file[layout.overview], "product_group_name")
        if recorded != self.recorded:
            raise ValueError(f"holds the product {recorded}, expected {self.recorded}")
        start, end = (_time(file[layout.overview], f"product_datetime_{edge}") for edge in ("start", "end"))
        if end - start != INTERVAL:
            raise ValueError(f"sums from {start} to {end}, expected {INTERVAL}")
        grid = _grid(file, layout)
        if self.grid not in (None, grid):
            raise ValueError(f"is on another grid: {grid}; expected {self.grid}")
        counts = hdf5.values(file[layout.image], (*layout.dimensions, *grid.shape))
        if counts.dtype != np.uint16:
            raise ValueError(f"holds counts of type {counts.dtype}, expected uint16")
        _check_meaning(file, layout)
        if layout.coordinates:
            _check_coordinates(file, grid, start)
        return Frame(
            variable=RAINFALL_RATE,
            valid_time=end,
            cadence=INTERVAL,
            grid=grid,
            values=RATES.take(counts.reshape(grid.shape)),
            source=f"KNMI {self.product}",
            sha256=sha256,
        )


def _time(overview: h5py.HLObject, name: str) -> datetime:
    text = str(hdf5.attribute(overview, name))
    time = stamp(text, "%d-%b-%Y;%H:%M:%S.%f")
    if time is None:
        raise ValueError(f"has {name}={text!r}, expected a time such as 26-AUG-2010;00:05:00.000")
    return time


def _grid(file: h5py.File, layout: Layout) -> Grid:
    """The grid that the file says it is on, in metres; its corners must be where the file says."""
    node, name = layout.projection
    text = str(hdf5.attribute(file[node], name))
    projection = PROJECTION.fullmatch(text)
    if projection is None:
        raise ValueError(f"has the projection {text!r}, expected KNMI's polar stereographic one in km")
    crs = STEREOGRAPHIC.format(float(projection[1]) * 1e3, float(projection[2]) * 1e3)
    geographic = file[layout.geographic]
    for name, expected in (("geo_dim_pixel", "KM,KM"), ("geo_par_pixel", "X,Y"), ("geo_pixel_def", "LU")):
        if (said := hdf5.attribute(geographic, name)) != expected:
            raise ValueError(f"has {name}={said!r}, expected {expected!r}")
    columns, rows = (int(_number(geographic, f"geo_number_{axis}")) for axis in ("columns", "rows"))
    x_step, y_step = (1e3 * _number(geographic, f"geo_pixel_size_{axis}") for axis in "xy")
    # The offsets count pixels from the pole to the outer edge, southwards and eastwards.
    west = x_step * _number(geographic, "geo_column_offset")
    north = y_step * _number(geographic, "geo_row_offset")
    grid = Grid(crs, west + x_step / 2, x_step, columns, north + y_step / 2, y_step, rows)
    _check_corners(grid, hdf5.attribute(geographic, "geo_product_corners"))
    return grid


def _number(node: h5py.HLObject, name: str) -> float:
    number = hdf5.attribute(node, name)
    if not isinstance(number, int | float) or not abs(number) < 1e5:
        raise ValueError(f"has {name}={number!r}, expected a number below 100000")
    return float(number)


def _check_corners(grid: Grid, said: object) -> None:
    """Refuses a file whose outer corners (lon and lat of LL, UL, UR, LR) are not those of the grid."""
    if not isinstance(said, np.ndarray) or said.shape != (8,):
        raise ValueError(f"has geo_product_corners={said}, expected 8 numbers")
    x = grid.x_first - grid.x_step / 2 + grid.x_step * grid.x_size * np.array([0, 0, 1, 1])
    y = grid.y_first - grid.y_step / 2 + grid.y_step * grid.y_size * np.array([1, 0, 0, 1])
    lon, lat = _to_lonlat(grid.crs).transform(x, y)
    if not (np.abs(said[1::2]) <= 90).all():
        raise ValueError(f"has geo_product_corners={said}, which are no places")
    _, _, off = Geod(ellps="WGS84").inv(lon, lat, said[::2].astype(float), said[1::2].astype(float))
    if not np.max(off) <= CORNER_TOLERANCE:
        raise ValueError(
            f"its corners (lon, lat) lie up to {np.max(off):.0f} m from those of {grid}; "
            f"expected at most {CORNER_TOLERANCE:g} m"
        )


@lru_cache(maxsize=8)
def _to_lonlat(wkt: str) -> Transformer:
    """From a map to the longitude and latitude of its own earth."""
    crs = CRS.from_wkt(wkt)
    return Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True)


def _check_meaning(file: h5py.File, layout: Layout) -> None:
    """Refuses other quantities than rain sums, and counts that mean anything else than those of KNMI."""
    node, name, expected = layout.quantity
    if (said := hdf5.attribute(file[node], name)) != expected:
        raise ValueError(f"holds {said}, expected {expected}")
    calibration = file[layout.calibration]
    text = str(hdf5.attribute(calibration, "calibration_formulas"))
    formula = FORMULA.fullmatch(text)
    if formula is None or (float(formula[1]), float(formula[2])) != (MILLIMETRES, 0.0):
        raise ValueError(f"has the calibration {text!r}, expected GEO=0.01*PV+0.0 (mm)")
    for name in ("calibration_missing_data", "calibration_out_of_image"):
        if (said := hdf5.attribute(calibration, name)) != MISSING:
            raise ValueError(f"has {name}={said}, expected {MISSING}")


def _check_coordinates(file: h5py.File, grid: Grid, start: datetime) -> None:
    """Refuses a netCDF whose own axes and packing say otherwise than the attributes that KNMI gave it.

    Its `time` is the START of the interval.
    """
    image = file[NETCDF.image]
    for name, expected in (("units", "kg m-2"), ("_FillValue", MISSING), ("add_offset", 0.0)):
        if (said := hdf5.attribute(image, name)) != expected:
            raise ValueError(f"has {name}={said!r} of {NETCDF.image}, expected {expected!r}")
    if (scale := hdf5.attribute(image, "scale_factor")) != float(np.float32(MILLIMETRES)):
        raise ValueError(f"has scale_factor={scale!r}, expected {MILLIMETRES}")
    for axis, centres in (("x", grid.x), ("y", grid.y)):
        if hdf5.attribute(file[axis], "units") != "km":
            raise ValueError(f"has {axis} in {hdf5.attribute(file[axis], 'units')}, expected km")
        if not np.abs(hdf5.values(file[axis], centres.shape) * 1e3 - centres).max() < 1.0:
            raise ValueError(f"has other {axis} than its pixel sizes and offsets say")
    units = hdf5.attribute(file["time"], "units")
    if units != "seconds since 2000-01-01 00:00:00":
        raise ValueError(f"has time in {units!r}, expected seconds since 2000-01-01 00:00:00")
    (seconds,) = hdf5.values(file["time"], (1,), np.float64)
    if seconds != (start - datetime(2000, 1, 1, tzinfo=UTC)).total_seconds():
        raise ValueError(f"has time={seconds:.0f} s since 2000, which is not the start of its sum, {start}")
