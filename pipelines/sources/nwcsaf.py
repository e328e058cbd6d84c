"""`Nwcsaf`: rain and clouds from Meteosat by the software of the NWC SAF, as netCDF-4 (GEO, from v2016).

`NwcsafHdf5`: the cloud type of its predecessor (MSG v2010 to v2013, HDF5), whose classes are others.

The convective rain rate sees only convective rain: 0 there is not dry on the ground. Space beside the
disk is "not observed". The time is the nominal start of the scan, as file names have it.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np
from numpy.typing import NDArray
from pyproj.exceptions import CRSError

from pipelines.cf import CLOUD_TYPE, RAINFALL_RATE, Variable
from pipelines.formats import hdf5
from pipelines.formats.georeference import check_grid
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, content, named_files, stamp

LARGEST = 256 * 2**20  # bytes; all fields of a full disk, unpacked
GROUP = "satellite"
GEOSTATIONARY = re.compile(r"\+proj=geos( \+(a|b|lon_0|h)=[-0-9.]+)+ *")  # what files say of their place

# Product User Manual of CT (GEO v2016 and later), section 1.2.3.
CLOUD_TYPE_GEO = replace(
    CLOUD_TYPE,
    classes=(
        (1, "cloud_free_land"),
        (2, "cloud_free_sea"),
        (3, "snow_over_land"),
        (4, "sea_ice"),
        (5, "very_low_clouds"),
        (6, "low_clouds"),
        (7, "mid_level_clouds"),
        (8, "high_opaque_clouds"),
        (9, "very_high_opaque_clouds"),
        (10, "fractional_clouds"),
        (11, "high_semitransparent_thin_clouds"),
        (12, "high_semitransparent_moderately_thick_clouds"),
        (13, "high_semitransparent_thick_clouds"),
        (14, "high_semitransparent_above_low_or_medium_clouds"),
        (15, "high_semitransparent_above_snow_or_ice"),
    ),
)
# Product User Manual of PGE02 (MSG v2013), where 0 is "not processed".
CLOUD_TYPE_MSG = replace(
    CLOUD_TYPE,
    classes=(
        (1, "cloud_free_land"),
        (2, "cloud_free_sea"),
        (3, "land_contaminated_by_snow"),
        (4, "sea_contaminated_by_snow_or_ice"),
        (5, "very_low_and_cumuliform_clouds"),
        (6, "very_low_and_stratiform_clouds"),
        (7, "low_and_cumuliform_clouds"),
        (8, "low_and_stratiform_clouds"),
        (9, "medium_and_cumuliform_clouds"),
        (10, "medium_and_stratiform_clouds"),
        (11, "high_opaque_and_cumuliform_clouds"),
        (12, "high_opaque_and_stratiform_clouds"),
        (13, "very_high_opaque_and_cumuliform_clouds"),
        (14, "very_high_opaque_and_stratiform_clouds"),
        (15, "high_semitransparent_thin_clouds"),
        (16, "high_semitransparent_meanly_thick_clouds"),
        (17, "high_semitransparent_thick_clouds"),
        (18, "high_semitransparent_above_low_or_medium_clouds"),
        (19, "fractional_clouds"),
        (20, "undefined"),
    ),
)


@dataclass(frozen=True)
class Packing:
    """How a field stands in its file, and what it means; anything else is refused."""

    variable: Variable
    units: str | None  # None: the format does not say
    scale: float  # of a count, in the variable's units
    most: int  # the largest count that is a value
    missing: int  # the count that is "not observed"


PACKINGS = {
    "crr_intensity": Packing(RAINFALL_RATE, "mm/h", 0.1, 500, 65535),
    "ct": Packing(CLOUD_TYPE_GEO, None, 1.0, 15, 255),
}
PACKING_MSG = Packing(CLOUD_TYPE_MSG, None, 1.0, 20, 0)


@dataclass(frozen=True)
class Nwcsaf:
    """One field of one product in a folder and its subfolders, netCDF-4."""

    grid: Grid  # where the region is known to lie; a file that says otherwise is refused
    region: str = "Europe-VISIR"  # as file names have it; every installation has its own
    satellite: str = "MSG4"  # as file names have it
    product: str = "CRR"
    field: str = "crr_intensity"  # or ct, of the product CT
    cadence: float = 15.0  # minutes
    path: str | None = None
    trusted: ClassVar[bool] = False
    group: ClassVar[str] = GROUP

    def __post_init__(self) -> None:
        """Refuses fields whose packing is not known.

        Raises:
            ValueError: for such a field.
        """
        if self.field not in PACKINGS:
            raise ValueError(f"source.field={self.field}: expected one of {', '.join(PACKINGS)}")

    def valid_time(self, name: str) -> datetime | None:
        """When the scan in a file of this name began; None for other products and regions."""
        begin = re.escape(f"S_NWC_{self.product}_{self.satellite}_{self.region}_")
        match = re.fullmatch(rf"{begin}(\d{{8}}T\d{{6}})Z\.nc", name)
        return stamp(match[1], "%Y%m%dT%H%M%S") if match else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, or holds no file of this product and region at all.
        """
        example = f"S_NWC_{self.product}_{self.satellite}_{self.region}_20180601T070000Z.nc"
        return named_files(self, start, end, f"NWC SAF {self.product}", example)

    def read(self, file: RemoteFile) -> Frame:
        """The field of one file; NaN where it was not observed.

        Raises:
            ValueError: naming the file, if it is not this product on its registered grid.
        """
        path, packing = Path(file.url), PACKINGS[self.field]
        try:
            sha256 = hashlib.sha256(content(path, LARGEST)).hexdigest()
            with hdf5.opened(path, LARGEST) as found:
                _check_text(found, "product_name", self.product)
                _check_text(found, "satellite_identifier", self.satellite)
                time = stamp(str(hdf5.attribute(found, "nominal_product_time")), "%Y-%m-%dT%H:%M:%SZ")
                if time is None:
                    raise ValueError("its nominal_product_time is no time")
                check_grid(_grid(found), self.grid)
                _check_packing(found[self.field], packing)
                values = _values(found[self.field], packing, self.grid.shape)
            return Frame(
                variable=packing.variable,
                valid_time=time,
                cadence=timedelta(minutes=self.cadence),
                grid=self.grid,
                values=values,
                source=f"NWC SAF {self.product} from {self.satellite}",
                sha256=sha256,
                group=self.group,
            )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


@dataclass(frozen=True)
class NwcsafHdf5:
    """The cloud type (PGE02) of one region in a folder and its subfolders, HDF5."""

    grid: Grid  # where the region is known to lie; a file that says otherwise is refused
    region: str = "BEL"  # as file names have it, without the _ behind
    satellite: str = "MSG3"
    cadence: float = 15.0  # minutes
    path: str | None = None
    trusted: ClassVar[bool] = False
    group: ClassVar[str] = GROUP

    def valid_time(self, name: str) -> datetime | None:
        """When the scan in a file of this name began; None for other products and regions."""
        region = re.escape(self.region.ljust(12, "_"))
        match = re.fullmatch(rf"SAFNWC_{re.escape(self.satellite)}_CT___(\d{{12}})_{region}\.h5", name)
        return stamp(match[1], "%Y%m%d%H%M") if match else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, or holds no file of this region at all.
        """
        example = f"SAFNWC_{self.satellite}_CT___201304290415_{self.region.ljust(12, '_')}.h5"
        return named_files(self, start, end, "NWC SAF cloud type (HDF5)", example)

    def read(self, file: RemoteFile) -> Frame:
        """The cloud types of one file; NaN where they were not worked out.

        Raises:
            ValueError: naming the file, if it is not the cloud type on its registered grid.
        """
        path = Path(file.url)
        try:
            sha256 = hashlib.sha256(content(path, LARGEST)).hexdigest()
            with hdf5.opened(path, LARGEST) as found:
                _check_text(found, "PRODUCT_NAME", "CT__")
                _check_text(found, "REGION_NAME", self.region)
                time = stamp(str(hdf5.attribute(found, "IMAGE_ACQUISITION_TIME")), "%Y%m%d%H%M")
                if time is None:
                    raise ValueError("its IMAGE_ACQUISITION_TIME is no time")
                check_grid(_grid_of_cut_out(found), self.grid)
                scale, offset = (hdf5.attribute(found["CT"], name) for name in ("SCALING_FACTOR", "OFFSET"))
                if (scale, offset) != (1, 0):
                    raise ValueError(f"its classes are scaled by {scale} from {offset}")
                values = _values(found["CT"], PACKING_MSG, self.grid.shape)
            return Frame(
                variable=PACKING_MSG.variable,
                valid_time=time,
                cadence=timedelta(minutes=self.cadence),
                grid=self.grid,
                values=values,
                source=f"NWC SAF CT from {self.satellite}",
                sha256=sha256,
                group=self.group,
            )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


def _check_text(found: h5py.File, name: str, expected: str) -> None:
    text = hdf5.attribute(found, name)
    if text != expected:
        raise ValueError(f"its {name} is {text!r}, expected {expected!r}")


def _check_packing(stored: h5py.Dataset, packing: Packing) -> None:
    """Refuses another scale, unit or missing count than the product's."""
    missing = hdf5.attribute(stored, "_FillValue")
    scale = hdf5.attribute(stored, "scale_factor") if "scale_factor" in stored.attrs else 1.0
    offset = hdf5.attribute(stored, "add_offset") if "add_offset" in stored.attrs else 0.0
    if not isinstance(scale, float | int) or abs(scale - packing.scale) > 1e-6 or offset != 0:
        raise ValueError(f"counts {scale} from {offset}, expected {packing.scale} from 0")
    if packing.units is not None and hdf5.attribute(stored, "units") != packing.units:
        raise ValueError(f"is in {hdf5.attribute(stored, 'units')!r}, expected {packing.units!r}")
    if missing != packing.missing:
        raise ValueError(f"marks what is missing by {missing}, expected {packing.missing}")


def _values(stored: h5py.Dataset, packing: Packing, shape: tuple[int, int]) -> NDArray[np.float32]:
    """The field in physical units; NaN where it was not observed."""
    if stored.shape != shape or stored.dtype.kind != "u" or stored.dtype.itemsize > 2:
        raise ValueError(f"{stored.name} is {stored.shape} of {stored.dtype}, expected {shape} of counts")
    counts = hdf5.values(stored, shape)
    wrong = (counts > packing.most) & (counts != packing.missing)
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} counts of {stored.name} are above {packing.most}, such as "
            f"{counts[wrong][0]}; a damaged file"
        )
    table = (np.arange(2 ** (8 * stored.dtype.itemsize)) * packing.scale).astype(np.float32)
    table[packing.missing] = np.nan
    return np.asarray(table[counts])


def _grid(found: h5py.File) -> Grid:
    """The grid that a netCDF file describes: `nx`, `ny` are cell centres in metres."""
    for name in ("nx", "ny"):
        if found[name].ndim != 1 or not 2 <= found[name].size <= 12_000:
            raise ValueError(f"{name} has shape {found[name].shape}: expected a line of cells")
        if hdf5.attribute(found[name], "units") != "m":
            raise ValueError(f"{name} is in {hdf5.attribute(found[name], 'units')!r}, expected 'm'")
    x, y = (hdf5.values(found[name], found[name].shape, np.float64) for name in ("nx", "ny"))
    return _placed(hdf5.attribute(found, "gdal_projection"), x, y)


def _grid_of_cut_out(found: h5py.File) -> Grid:
    """The grid that an HDF5 file describes: the centres of its first and last cell, in metres."""
    sizes = [hdf5.attribute(found, name) for name in ("NC", "NL")]
    ends = [
        [hdf5.attribute(found, f"{axis}GEO_{corner}") for corner in ("UP_LEFT", "LOW_RIGHT")] for axis in "XY"
    ]
    lines = []
    for size, (first, last) in zip(sizes, ends, strict=True):
        if not isinstance(size, int) or not 2 <= size <= 12_000:
            raise ValueError(f"its grid has {size} cells on a side")
        if not isinstance(first, float) or not isinstance(last, float):
            raise ValueError(f"its grid reaches from {first} to {last}: expected metres")
        lines.append(np.linspace(first, last, size))
    return _placed(hdf5.attribute(found, "PROJECTION"), *lines)


def _placed(projection: object, x: NDArray[np.float64], y: NDArray[np.float64]) -> Grid:
    if not isinstance(projection, str) or not GEOSTATIONARY.fullmatch(projection):
        raise ValueError(f"its projection is {projection!r}, expected a geostationary one")
    try:
        return Grid.from_coordinates(projection, x, y)
    except CRSError as error:
        raise ValueError(f"its projection {projection!r} cannot be understood ({error})") from error
