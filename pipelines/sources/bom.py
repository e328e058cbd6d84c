"""`Bom`: rain sums round one Australian radar (Bureau of Meteorology, Rainfields 3, netCDF-4).

A file holds one sum of 6 or 10 minutes (`prcp-cscn`, `prcp-c10`) on 512 x 512 cells of 500 m round the
radar. It writes 0 where the radar does not reach: the rain frequency halves or vanishes at 148 km, while the
corners lie 181 km away.
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
from numpy.typing import NDArray

from pipelines.cf import RAINFALL_RATE
from pipelines.formats import hdf5
from pipelines.formats.georeference import check_grid, crs_of
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, content, named_files, stamp

LARGEST = 16 * 2**20  # bytes; a field that cannot be packed at all has 0.5 MB
MM = 0.05  # in a count, of both products
NOT_RAIN = (-1, -2)  # counts; -1 is c10's fill, and among such cells of a real file stands a -2
TIME_UNITS = "seconds since 1970-01-01 00:00:00 UTC"
METRES = {"km": 1000.0, "m": 1.0}  # in the unit of x and y


@dataclass(frozen=True)
class Bom:
    """The sums of one radar and product in a folder and its subfolders, as mean rates."""

    grid: Grid  # where the product is known to lie; a file that says otherwise is refused
    station: int  # the Bureau's number of the radar
    product: str = "prcp-c10"  # as file names end
    cadence: float = 10.0  # minutes, of one sum and from one to the next
    reach: float = 147.0  # km from the radar, in the grid's middle; what lies beyond is not observed
    path: str | None = None
    trusted: ClassVar[bool] = False

    def valid_time(self, name: str) -> datetime | None:
        """When the sum in a file of this name ends; None for other radars and products."""
        match = re.fullmatch(rf"{self.station}_(\d{{8}}_\d{{6}})\.{re.escape(self.product)}\.nc", name)
        return stamp(match[1], "%Y%m%d_%H%M%S") if match else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, or holds no file of this radar and product at all.
        """
        example = f"{self.station}_20201031_001000.{self.product}.nc"
        return named_files(self, start, end, f"Rainfields {self.product} of radar {self.station}", example)

    def read(self, file: RemoteFile) -> Frame:
        """The mean rain rate (mm/h) over one sum; NaN beyond the radar's reach and where nothing is stored.

        Raises:
            ValueError: naming the file, if it is not this product of this radar on its registered grid.
        """
        path = Path(file.url)
        try:
            sha256 = hashlib.sha256(content(path, LARGEST)).hexdigest()
            with hdf5.opened(path, LARGEST) as found:
                self._check_station(found)
                check_grid(_grid(found), self.grid)
                ends = self._ends(found)
                rate = _rate(found, self.grid.shape, MM * 60 / self.cadence)
            rate[_out_of_reach(self.grid, self.reach)] = np.nan
            return Frame(
                variable=RAINFALL_RATE,
                valid_time=ends,
                cadence=timedelta(minutes=self.cadence),
                grid=self.grid,
                values=rate,
                source=f"BoM Rainfields {self.product}, radar {self.station}",
                sha256=sha256,
            )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def _check_station(self, found: h5py.File) -> None:
        station = hdf5.attribute(found, "station_id")
        if station != self.station:
            raise ValueError(f"is of radar {station}, expected {self.station}; choose another source.station")

    def _ends(self, found: h5py.File) -> datetime:
        """When the sum ends; it must be as long as the product's."""
        start, end = (_seconds(found, name) for name in ("start_time", "valid_time"))
        if end - start != self.cadence * 60:
            raise ValueError(
                f"sums over {end - start} s, expected {self.cadence * 60:g} s (source.cadence) "
                f"of {self.product}"
            )
        return datetime.fromtimestamp(end, UTC)


def _seconds(found: h5py.File, name: str) -> int:
    """A time (UTC) as seconds since 1970."""
    units = hdf5.attribute(found[name], "units")
    if units != TIME_UNITS or found[name].shape != () or found[name].dtype.kind != "i":
        raise ValueError(f"{name} is counted in {units!r}, expected one whole number of {TIME_UNITS!r}")
    seconds = int(hdf5.values(found[name], ()))
    if not 0 <= seconds < 2**32:
        raise ValueError(f"{name}={seconds} s after 1970 is no time of a radar")
    return seconds


def _grid(found: h5py.File) -> Grid:
    """The grid that the file describes.

    c10 gives cell centres, with their bounds. cscn gives no bounds and numbers from -128 to 127.5 km for
    cells of 0.5 km round a radar at 0: they are the west and north edges of the cells.
    """
    mapping = found["proj"]
    crs = crs_of({name: hdf5.attribute(mapping, name) for name in mapping.attrs})
    return Grid.from_coordinates(crs, _centres(found, "x"), _centres(found, "y"))


def _centres(found: h5py.File, axis: str) -> NDArray[np.float64]:
    """The centres of columns or rows, in metres."""
    units = hdf5.attribute(found[axis], "units")
    if units not in METRES:
        raise ValueError(f"{axis} is in {units!r}, expected one of {', '.join(METRES)}")
    if found[axis].ndim != 1 or not 2 <= found[axis].size <= 10_000:
        raise ValueError(f"{axis} has shape {found[axis].shape}: expected a line of cells")
    given = hdf5.values(found[axis], found[axis].shape, np.float64) * METRES[str(units)]
    bounds = f"{axis}_bounds"
    if bounds not in found:
        return np.asarray(given + (given[-1] - given[0]) / (given.size - 1) / 2)
    if found[bounds].shape != (given.size, 2):
        raise ValueError(f"{bounds} has shape {found[bounds].shape}, expected {(given.size, 2)}")
    edges: NDArray[np.float64] = hdf5.values(found[bounds], (given.size, 2), np.float64)
    return edges.mean(axis=1) * METRES[str(units)]


def _rate(found: h5py.File, shape: tuple[int, int], count: float) -> NDArray[np.float32]:
    """The mean rain rate (mm/h), of which a count is `count`; NaN where the file has none."""
    stored = found["precipitation"]
    if stored.shape != shape or stored.dtype.str != "<i2":
        raise ValueError(f"precipitation is {stored.shape} of {stored.dtype}, expected {shape} of int16")
    units, offset = (hdf5.attribute(stored, name) for name in ("units", "add_offset"))
    scale, fill = (hdf5.attribute(stored, name) for name in ("scale_factor", "_FillValue"))
    if units != "kg m-2" or offset != 0 or not isinstance(scale, float) or abs(scale - MM) > 1e-9:
        raise ValueError(f"counts {scale} {units} from {offset}, expected {MM} kg m-2 from 0")
    if not isinstance(fill, int) or fill >= 0:
        raise ValueError(f"marks what is missing by {fill}, expected a number below 0")
    counts = hdf5.values(stored, shape)
    reserved = counts < 0
    wrong = reserved & ~np.isin(counts, (fill, *NOT_RAIN))
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} sums are below 0, such as {counts[wrong][0]} counts; a damaged file"
        )
    rate: NDArray[np.float32] = counts * np.float32(count)
    rate[reserved] = np.nan
    return rate


@lru_cache(maxsize=16)
def _out_of_reach(grid: Grid, reach: float) -> NDArray[np.bool_]:
    """Which cells lie further than `reach` km from the grid's middle."""
    x, y = grid.x - (grid.x[0] + grid.x[-1]) / 2, grid.y - (grid.y[0] + grid.y[-1]) / 2
    return np.hypot(x[None, :], y[:, None]) > reach * 1000
