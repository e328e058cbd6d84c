"""`Odim`: radar composites in ODIM_H5, versions 2.0 to 2.4 (EUMETNET OPERA data information model for HDF5).

OPERA's own composites (ODYSSEY, CIRRUS, NIMBUS) and those of most European services. A file holds fields in
`dataset{n}/data{m}/data`; what is said of one stands in the groups `what` and `where` beside it, or in those
of its dataset or of the file, the nearest counting. `nodata` is "not observed", `undetect` is "observed, and
nothing there": dry.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
from numpy.typing import NDArray
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import CRSError

from pipelines.cf import (
    PRECIPITATION_AMOUNT_1H,
    PRECIPITATION_AMOUNT_24H,
    RAINFALL_RATE,
    REFLECTIVITY,
    Variable,
)
from pipelines.formats import hdf5
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, content, named_files, stamp
from pipelines.words import z_r_law

Field = NDArray[np.float32]
Nodes = tuple[h5py.Group, ...]  # a data group, its dataset and the file: the nearest counts

LARGEST = 256 * 2**20  # bytes of a file
CONVENTIONS = re.compile(r"ODIM_H5/V2_[0-4]")
OBJECTS = ("COMP", "IMAGE")  # of what/object: those with one field over a map
REFLECTIVITIES = ("DBZH", "TH")
AMOUNTS = {60.0: PRECIPITATION_AMOUNT_1H, 1440.0: PRECIPITATION_AMOUNT_24H}  # by minutes summed over
LONGEST_RATE = 15.0  # minutes: what falls in up to so many is a mean rate
MINUTE = timedelta(minutes=1)

# A projection comes from the file, and PROJ opens other files for some words: only those that say a number or
# a name are let through.
PROJ_WORDS = re.compile(
    r"\+(?:proj|ellps|datum|type)=\w+|\+units=m|\+(?:no_defs|wktext|south)"
    r"|\+(?:lat_0|lon_0|lat_1|lat_2|lat_ts|x_0|y_0|k|k_0|a|b|R|rf|f|zone|alpha|gamma|h)=[-+.\deE]+"
    r"|\+towgs84=[-+.,\deE]+"
)
EPSG = re.compile(r"(?:\+init=)?epsg:(\d{4,6})", re.IGNORECASE)


@dataclass(frozen=True)
class Odim:
    """ODIM_H5 composites in a folder and its subfolders."""

    path: str | None = None
    product: str = "ODIM_H5 composite"  # the service and product, as a person would say it
    quantity: str = "RATE"  # RATE (mm/h), ACRR (mm), DBZH or TH (dBZ)
    name: str = r"T_PA[A-Z]{2}\d\d_C_EUOC_(\d{14})\.(?:hdf|h5)"  # of a file; its one group is the time
    time_format: str = "%Y%m%d%H%M%S"  # of the time in the name
    cadence: float = 15.0  # minutes from one file to the next
    interval: float = 60.0  # minutes that ACRR sums over, up to the valid time
    z_r: Sequence[float] | None = None  # a and b of Z = a R^b: dBZ become mm/h; None: they stay
    cap: float | None = None  # dBZ; what is above is hail or clutter, and gives no more rain than this
    no_echo: float = -32.5  # dBZ where no echo was found, in reflectivity that stays
    grid: Grid | None = None  # that files must be on; None: the one that they say they are on
    corner_tolerance: float = 1.0  # m between the corners of the grid and where the file says they are
    packing: Sequence[float] | None = None  # gain, offset, nodata, undetect that files must have; None: any
    dataset: str | None = None  # such as dataset2/data1, where files have the quantity more than once
    trusted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses what fits no file.

        Raises:
            ValueError: for an unknown quantity or interval, a Z-R for what is no reflectivity, or a name
                without exactly one group.
        """
        if self.quantity not in ("RATE", "ACRR", *REFLECTIVITIES):
            raise ValueError(f"quantity={self.quantity}: expected RATE, ACRR, DBZH or TH")
        if self.quantity == "ACRR" and self.interval > LONGEST_RATE and self.interval not in AMOUNTS:
            raise ValueError(
                f"interval={self.interval}: expected 60 or 1440 minutes, or up to {LONGEST_RATE:g}, "
                "whose sum becomes a mean rate"
            )
        if min(self.cadence, self.interval, self.corner_tolerance) <= 0:
            raise ValueError(
                f"cadence={self.cadence}, interval={self.interval}, "
                f"corner_tolerance={self.corner_tolerance}: expected more than 0"
            )
        if self.z_r is not None:
            if self.quantity not in REFLECTIVITIES or len(self.z_r) != 2 or min(self.z_r) <= 0:
                raise ValueError(
                    f"z_r={list(self.z_r)}: expected a and b of Z = a R^b, both above 0, with DBZH or TH"
                )
            object.__setattr__(self, "z_r", tuple(self.z_r))
        elif self.cap is not None:
            raise ValueError(f"cap={self.cap}: expected with z_r, whose largest rain it sets")
        if self.packing is not None:
            if len(self.packing) != 4:
                raise ValueError(f"packing={list(self.packing)}: expected gain, offset, nodata, undetect")
            object.__setattr__(self, "packing", tuple(self.packing))
        try:
            groups = re.compile(self.name).groups
        except re.error as error:
            raise ValueError(f"name={self.name}: no regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"name={self.name}: has {groups} groups, expected one, around the time")

    def valid_time(self, name: str) -> datetime | None:
        """When the frame in a file of this name is valid; None for names of other products."""
        match = re.fullmatch(self.name, name)
        return stamp(match[1], self.time_format) if match else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, or holds no file of this product at all.
        """
        return named_files(self, start, end, self.product, f"{self.name} with the time as {self.time_format}")

    def read(self, file: RemoteFile) -> Frame:
        """The field of the quantity in one file; NaN where it was not observed.

        Raises:
            ValueError: naming the file, if it is damaged or not a composite of this product on its grid.
        """
        path = Path(file.url)
        try:
            sha256 = hashlib.sha256(content(path, LARGEST)).hexdigest()
            with hdf5.opened(path, LARGEST) as opened:
                nodes = self._nodes(opened)
                grid = self._grid(nodes)
                return Frame(
                    variable=self._variable(),
                    valid_time=self._valid_time(nodes),
                    cadence=timedelta(minutes=self.cadence),
                    grid=grid,
                    values=self._values(hdf5.values(nodes[0]["data"], grid.shape), self._packing(nodes)),
                    source=self.product if self.z_r is None else f"{self.product}, {z_r_law(self.z_r)}",
                    sha256=sha256,
                )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def _nodes(self, file: h5py.File) -> Nodes:
        """Where the quantity is in the file.

        Raises:
            ValueError: if that is nowhere, or in several places, or the file is no composite.
        """
        conventions = hdf5.attribute(file, "Conventions")
        if not CONVENTIONS.fullmatch(str(conventions)):
            raise ValueError(f"follows {conventions}, expected ODIM_H5/V2_0 to ODIM_H5/V2_4")
        kind = hdf5.attribute(file["what"], "object")
        if kind not in OBJECTS:
            raise ValueError(f"holds an object of kind {kind}, expected a composite ({' or '.join(OBJECTS)})")
        held = {
            f"{dataset}/{data}": _said((file[dataset][data], file[dataset], file), "what", "quantity")
            for dataset in _groups(file, "dataset")
            for data in _groups(file[dataset], "data")
        }
        places = [place for place, quantity in held.items() if quantity == self.quantity]
        if self.dataset in places:
            places = [self.dataset]
        if len(places) != 1:
            raise ValueError(
                f"holds {self.quantity} {len(places)} times, expected once ("
                + ", ".join(f"{quantity} in {place}" for place, quantity in held.items())
                + "); set quantity, and dataset where it is there more than once"
            )
        return file[places[0]], file[places[0]].parent, file

    def _variable(self) -> Variable:
        if self.quantity in REFLECTIVITIES and self.z_r is None:
            return REFLECTIVITY
        if self.quantity == "ACRR" and self.interval > LONGEST_RATE:
            return AMOUNTS[self.interval]
        return RAINFALL_RATE

    def _valid_time(self, nodes: Nodes) -> datetime:
        """The nominal time of the file; of a sum, the end of its interval."""
        nominal = _time(nodes[-1:], "date", "time")
        start, end = _time(nodes, "startdate", "starttime"), _time(nodes, "enddate", "endtime")
        slack = timedelta(minutes=self.cadence)
        if not (start <= end and start - slack <= nominal <= end + slack):
            raise ValueError(f"says it is of {nominal}, but its data are from {start} to {end}")
        if self.quantity != "ACRR":
            return nominal
        if abs(end - start - timedelta(minutes=self.interval)) > MINUTE:
            raise ValueError(f"sums from {start} to {end}, expected {self.interval:g} minutes")
        return end

    def _grid(self, nodes: Nodes) -> Grid:
        """The grid that the file says it is on, if that is the registered one and fits its corners."""
        x_size, y_size = (int(_number(nodes, "where", name)) for name in ("xsize", "ysize"))
        x_scale, y_scale = (_number(nodes, "where", name) for name in ("xscale", "yscale"))
        if not (0 < x_size * y_size <= hdf5.MOST_CELLS and x_scale > 0 and y_scale > 0):
            raise ValueError(f"has {y_size} x {x_size} cells of {y_scale:g} x {x_scale:g}: no grid")
        corners = {
            corner: (_number(nodes, "where", f"{corner}_lon"), _number(nodes, "where", f"{corner}_lat"))
            for corner in ("UL", "UR", "LL", "LR")
        }
        crs = _crs(str(_said(nodes, "where", "projdef")))
        if self.grid is None:
            west, north = _own_lonlat(crs).transform(*corners["UL"], direction="INVERSE")
            if not (math.isfinite(west) and math.isfinite(north)):
                raise ValueError(f"its upper left corner {corners['UL']} is not on the map of {crs.name}")
            first = west + x_scale / 2, north - y_scale / 2
        else:
            first = self.grid.x_first, self.grid.y_first
        said = Grid(crs.to_wkt(), first[0], x_scale, x_size, first[1], -y_scale, y_size)
        self._check_corners(said, corners)
        if self.grid is None:
            return said
        if (said.shape, said.x_step, said.y_step) != (self.grid.shape, self.grid.x_step, self.grid.y_step):
            raise ValueError(f"is on another grid: {said}; expected {self.grid}")
        self._check_corners(self.grid, corners)
        return self.grid

    def _check_corners(self, grid: Grid, corners: dict[str, tuple[float, float]]) -> None:
        """Refuses a file whose outer corners (lon, lat) are not those of the grid."""
        x = grid.x_first - grid.x_step / 2 + grid.x_step * grid.x_size * np.array([0, 1, 0, 1])
        y = grid.y_first - grid.y_step / 2 + grid.y_step * grid.y_size * np.array([0, 0, 1, 1])
        lon, lat = _own_lonlat(CRS.from_wkt(grid.crs)).transform(x, y)
        said = np.array([corners[corner] for corner in ("UL", "UR", "LL", "LR")])
        if not (np.isfinite([lon, lat]).all() and (np.abs(said[:, 1]) <= 90).all()):
            raise ValueError(f"has corners {corners}, which are not on the map of {grid}")
        _, _, off = Geod(ellps="WGS84").inv(lon, lat, said[:, 0], said[:, 1])
        if not np.max(off) <= self.corner_tolerance:
            raise ValueError(
                f"its corners (lon, lat) lie up to {np.max(off):.2f} m from those of {grid}; "
                f"expected at most {self.corner_tolerance:g} m"
            )

    def _packing(self, nodes: Nodes) -> tuple[float, float, float, float]:
        """Gain and offset of the stored numbers, and which of them are nodata and undetect."""
        gain, offset = _number(nodes, "what", "gain"), _number(nodes, "what", "offset")
        nodata = _number(nodes, "what", "nodata", finite=False)  # some services have NaN there
        undetect = _number(nodes, "what", "undetect", finite=False)
        if self.packing not in (None, (gain, offset, nodata, undetect)):
            raise ValueError(f"has {gain=}, {offset=}, {nodata=}, {undetect=}; expected {self.packing}")
        if gain == 0:
            raise ValueError("has gain=0.0: no scale of numbers")
        if _narrow(nodata) == _narrow(undetect):
            raise ValueError(f"has {nodata=} and {undetect=}, which cannot be told apart")
        return gain, offset, nodata, undetect

    def _values(self, stored: NDArray[Any], packing: tuple[float, float, float, float]) -> Field:
        """The field in its units; each of the few possible integers is worked out once."""
        if stored.dtype.kind == "u" and stored.dtype.itemsize <= 2:
            numbers = np.arange(256**stored.dtype.itemsize, dtype=np.float32)
            return self._physical(numbers, *packing)[stored]
        return self._physical(stored.astype(np.float32, copy=False), *packing)

    def _physical(self, stored: Field, gain: float, offset: float, nodata: float, undetect: float) -> Field:
        missing = np.isnan(stored) if math.isnan(nodata) else stored == _narrow(nodata)
        nothing = stored == _narrow(undetect)
        field = stored
        if (gain, offset) != (1.0, 0.0):
            with np.errstate(over="ignore", invalid="ignore"):  # of the numbers that stand for nodata
                field = stored * np.float32(gain) + np.float32(offset)
        field[missing] = np.nan
        field[nothing] = 0.0
        if np.isfinite(field).sum() + missing.sum() != field.size:
            raise ValueError("holds numbers that are not finite, and are not its nodata either")
        field[nothing] = self._nothing()
        if self.cap is not None:
            np.minimum(field, np.float32(self.cap), out=field)
        if self.z_r is not None:  # R = (10^(dBZ / 10) / a)^(1 / b)
            a, b = self.z_r
            field *= np.float32(math.log(10) / 10 / b)
            field -= np.float32(math.log(a) / b)
            np.exp(field, out=field)
        if self.quantity == "ACRR" and self.interval <= LONGEST_RATE:
            field *= np.float32(60 / self.interval)
        return field

    def _nothing(self) -> float:
        """What `undetect` is in the units of the quantity."""
        if self.quantity not in REFLECTIVITIES:
            return 0.0
        return self.no_echo if self.z_r is None else -math.inf  # dBZ that Z-R makes 0 mm/h


def _said(nodes: Nodes, group: str, name: str) -> object:
    """An attribute of the group `what` or `where` that is nearest.

    Raises:
        ValueError: if none has it.
    """
    for node in nodes:
        if group in node and name in node[group].attrs:
            return hdf5.attribute(node[group], name)
    raise ValueError(f"says no {group}/{name} of its data, which ODIM_H5 demands")


def _groups(node: h5py.Group, name: str) -> list[str]:
    """The groups in a node that are called `name` and a number."""
    return [key for key in node if re.fullmatch(rf"{name}\d+", key) and isinstance(node.get(key), h5py.Group)]


def _narrow(number: float) -> np.float32:
    """A number as a field of float32 holds it; infinite where that is too large."""
    with np.errstate(over="ignore"):
        return np.float32(number)


def _number(nodes: Nodes, group: str, name: str, finite: bool = True) -> float:
    number = _said(nodes, group, name)
    if not isinstance(number, int | float) or (finite and not math.isfinite(number)):
        raise ValueError(f"has {group}/{name}={number!r}, expected a number")
    return float(number)


def _time(nodes: Nodes, date: str, time: str) -> datetime:
    text = f"{_said(nodes, 'what', date)}{_said(nodes, 'what', time)}"
    moment = stamp(text, "%Y%m%d%H%M%S") if re.fullmatch(r"\d{14}", text) else None
    if moment is None:
        raise ValueError(f"has what/{date} and {time} of {text!r}, expected YYYYMMDD and HHmmss")
    return moment


def _crs(projdef: str) -> CRS:
    """The CRS of a `where/projdef`.

    Raises:
        ValueError: for words that could make PROJ open other files, and for no CRS at all.
    """
    epsg = EPSG.fullmatch(projdef.strip())
    words = [word for word in projdef.split() if not PROJ_WORDS.fullmatch(word)]
    if words and not epsg:
        raise ValueError(f"has where/projdef={projdef!r}: {words[0]} is not accepted in a projection")
    try:
        return CRS.from_user_input(f"EPSG:{epsg[1]}" if epsg else projdef)
    except CRSError as error:
        raise ValueError(f"has where/projdef={projdef!r}: no projection ({error})") from error


def _own_lonlat(crs: CRS) -> Transformer:
    """From a CRS to longitude and latitude on its own ellipsoid, as ODIM's corners are."""
    geodetic = crs.geodetic_crs
    if geodetic is None:
        raise ValueError(f"{crs.name} has no longitude and latitude")
    return Transformer.from_crs(crs, geodetic, always_xy=True)
