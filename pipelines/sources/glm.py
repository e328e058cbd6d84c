"""`Glm`: lightning that the GOES-R satellites see (GLM-L2-LCFA): lists of flashes, counted on a grid.

Layout: GOES-R Product Definition and Users' Guide (PUG), volume 5. A file of 20 seconds lists events (pixels
that lit up), groups (neighbouring events of one image of 2 ms) and flashes (groups near each other in time
and space), each with the place of its middle on the ellipsoid, for which the height of clouds is reckoned
with. Counted here are the middles: how many by area and time. Where the instrument looks and saw none is 0;
where it does not look is NaN. So is a cell with a flash whose flag is not one to keep: something was there.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
from numpy.typing import NDArray
from pyproj import Proj, Transformer

from pipelines.cf import FLASH_RATE, GROUP_RATE
from pipelines.formats import hdf5
from pipelines.frame import ALWAYS, Frame, parse_time
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, named_files, stamp, within

FILE_NAME = re.compile(
    r"[A-Z]{2}_GLM-L2-LCFA_G(?P<satellite>\d{2})_s(?P<start>\d{14})_e(?P<end>\d{14})_c\d{14}\.nc"
)
EXAMPLE = "OR_GLM-L2-LCFA_G16_s20181830433000_e20181830433200_c20181830433231.nc"
LARGEST = 2**28  # bytes of a file; a stormy one has some 3 MB
CADENCE = timedelta(seconds=20)
MOST = 2_000_000  # of flashes, groups or events; the format's own limits are below 700,000

HEIGHT = 35_786_023.0  # m, of the satellite above the ellipsoid
SLOTS = {"GOES-East": -75.0, "GOES-Test": -89.5, "GOES-West": -137.0}  # degrees east
# What the instrument sees, in scan angles: a square of 15 degrees (GOES-R Data Book) with round corners. The
# farthest of the 62,000 events of four real files is 8.20 degrees from the middle.
RADIUS, HALF_SIDE = 8.2, 7.5  # degrees

COUNTED = {"flash": FLASH_RATE, "group": GROUP_RATE}


@dataclass(frozen=True)
class Glm:
    """The files of one satellite in a folder and its subfolders, as NOAA names them; each becomes a frame."""

    grid: Grid  # to count on; cells smaller than those of the instrument (8 to 14 km) are mostly 0
    path: str | None = None
    satellite: str | None = None  # such as G16; None: the one that the folder holds
    counted: str = "flash"  # or group
    quality: Sequence[int] = (
        0,
    )  # flags of what to keep: 0 good; 1, 3, 5 out of order, too many events, too long
    trusted: ClassVar[bool] = False
    group: ClassVar[str] = "satellite"

    def __post_init__(self) -> None:
        """Refuses what is not listed.

        Raises:
            ValueError: naming what is.
        """
        if self.counted not in COUNTED:
            raise ValueError(f"source.counted={self.counted}: expected one of {', '.join(COUNTED)}")
        object.__setattr__(self, "quality", tuple(self.quality))

    def valid_time(self, name: str) -> datetime | None:
        """The end of the 20 seconds; None for names of other products or satellites."""
        match = FILE_NAME.fullmatch(name)
        if match is None or self.satellite not in (None, f"G{match['satellite']}"):
            return None
        covered = _covered(match)
        return None if covered is None else _slot(covered[1])

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, holds no such file at all, or those of several satellites.
        """
        found = list(named_files(self, None, None, "GOES GLM-L2-LCFA", EXAMPLE))
        names = (FILE_NAME.fullmatch(Path(file.url).name) for file in found)
        satellites = {f"G{match['satellite']}" for match in names if match}
        if len(satellites) > 1:
            raise ValueError(
                f"{self.path}: holds {', '.join(sorted(satellites))}; choose one with source.satellite"
            )
        yield from within(found, start, end)

    def read(self, file: RemoteFile) -> Frame:
        """How many flashes (or groups) a file lists, by km2 and minute; NaN where nobody looks.

        Raises:
            ValueError: naming the file, if it is not a whole file of this product.
        """
        path = Path(file.url)
        try:
            with hdf5.opened(path, LARGEST) as opened:
                return self._frame(opened, path)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def _frame(self, file: h5py.File, path: Path) -> Frame:
        satellite, start, end = self._window(file, path.name)
        size = _count(file, self.counted)
        lon, lat = (_numbers(file, f"{self.counted}_{axis}", size) for axis in ("lon", "lat"))
        if not ((np.abs(lon) <= 360).all() and (np.abs(lat) <= 90).all()):
            raise ValueError(f"has a {self.counted} at no place on earth; a damaged file, fetch it again")
        kept = np.isin(_numbers(file, f"{self.counted}_quality_flag", size), self.quality)
        with path.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        return Frame(
            variable=COUNTED[self.counted],
            valid_time=_slot(end),
            cadence=CADENCE,
            grid=self.grid,
            values=_rates(self.grid, lon, lat, kept, (end - start) / timedelta(minutes=1), _seen_from(file)),
            source=f"NOAA GOES-{int(satellite)} GLM-L2-LCFA, {self.counted} rate",
            sha256=sha256,
            group=self.group,
        )

    def _window(self, file: h5py.File, name: str) -> tuple[str, datetime, datetime]:
        """The satellite, and the time that a file covers; its contents and its name must tell the same."""
        stated = str(hdf5.attribute(file, "dataset_name"))
        match = FILE_NAME.fullmatch(stated)
        covered = None if match is None else _covered(match)
        if match is None or covered is None or self.satellite not in (None, f"G{match['satellite']}"):
            raise ValueError(
                f"holds {stated}, expected GLM-L2-LCFA of satellite={self.satellite} (None: any)"
            )
        if FILE_NAME.fullmatch(name) and name != stated:
            raise ValueError(f"holds {stated}: another file than its name says")
        told = [parse_time(str(hdf5.attribute(file, f"time_coverage_{edge}"))) for edge in ("start", "end")]
        if told != [*covered] or hdf5.attribute(file, "platform_ID") != f"G{match['satellite']}":
            raise ValueError(
                f"covers {told[0]} to {told[1]}, but is called {stated}; a damaged file, fetch it again"
            )
        return match["satellite"], *covered


def _covered(match: re.Match[str]) -> tuple[datetime, datetime] | None:
    """The beginning and end that a name tells, to a tenth of a second; None if it tells no 20 seconds."""
    start, end = (stamp(match[key] + "00000", "%Y%j%H%M%S%f") for key in ("start", "end"))
    if start is None or end is None or not abs(end - start - CADENCE) <= timedelta(seconds=1):
        return None
    return start, end


def _slot(end: datetime) -> datetime:
    """The nearest whole multiple of 20 seconds: some names are tenths of a second beside it."""
    return ALWAYS + round((end.astimezone(UTC) - ALWAYS) / CADENCE) * CADENCE


def _count(file: h5py.File, counted: str) -> int:
    """How many a file lists, as it says itself."""
    stated = hdf5.values(file[f"{counted}_count"], ())
    size = file[f"{counted}_lat"].shape
    if size != (int(stated),) or not 0 <= stated <= MOST:
        raise ValueError(f"lists {size} of {counted}, but says {stated}; a damaged file, fetch it again")
    return int(stated)


def _numbers(file: h5py.File, name: str, size: int) -> NDArray[np.float64]:
    """A list, unpacked (CF-1.11 section 8.1, and `_Unsigned` of the NetCDF Users' Guide).

    Raises:
        ValueError: if some of it is missing.
    """
    node = file[name]
    told: dict[str, Any] = {key: hdf5.attribute(node, key) for key in node.attrs if key != "DIMENSION_LIST"}
    stored = hdf5.values(node, (size,), np.float64)
    if np.isin(stored, told.get("_FillValue", np.nan)).any() or not np.isfinite(stored).all():
        raise ValueError(f"some of {name} is missing; a damaged file, fetch it again")
    if str(told.get("_Unsigned")) == "true" and stored.dtype.kind == "i":
        stored = stored.view(stored.dtype.str.replace("i", "u"))
    numbers: NDArray[np.float64] = stored * float(told.get("scale_factor", 1.0))
    return numbers + float(told.get("add_offset", 0.0))


def _seen_from(file: h5py.File) -> float:
    """Degrees east of the satellite's slot."""
    slot = str(hdf5.attribute(file, "orbital_slot"))
    middle = float(hdf5.values(file["lon_field_of_view"], ()))
    if slot not in SLOTS or not abs(middle - SLOTS[slot]) <= 1:
        raise ValueError(f"looks at {middle:g} degrees east as {slot}; expected one of {SLOTS}")
    return SLOTS[slot]


def _rates(
    grid: Grid, lon: Any, lat: Any, kept: NDArray[np.bool_], minutes: float, seen_from: float
) -> NDArray[np.float32]:
    """The points to keep, by km2 and minute; NaN where others lie, and where none lies and nobody looks."""
    rows, columns = (np.floor(place + 0.5) for place in grid.cells(lon, lat))
    inside = (
        (rows >= 0) & (rows < grid.y_size) & (columns >= 0) & (columns < grid.x_size)
    )  # false if infinite
    places = np.where(inside, rows * grid.x_size + columns, 0).astype(np.int64)
    size = grid.y_size * grid.x_size
    counts = np.bincount(places[inside & kept], minlength=size).astype(np.float64)
    left_out = np.bincount(places[inside & ~kept], minlength=size) > 0
    struck = np.flatnonzero(counts)
    counts[struck] /= _areas(grid, struck) * minutes
    counts[left_out | ((counts == 0) & ~_seen(grid, seen_from).ravel())] = np.nan
    return counts.reshape(grid.shape).astype(np.float32)


def _areas(grid: Grid, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Area on the ellipsoid (km2) of the cells at these places, by their corners on an equal-area map."""
    rows, columns = np.divmod(places, grid.x_size)
    down, right = np.array([-0.5, -0.5, 0.5, 0.5])[:, None], np.array([-0.5, 0.5, 0.5, -0.5])[:, None]
    x, y = Transformer.from_crs(grid.crs, "EPSG:6933", always_xy=True).transform(
        grid.x_first + (columns + right) * grid.x_step, grid.y_first + (rows + down) * grid.y_step
    )
    area = np.abs((x[2] - x[0]) * (y[3] - y[1]) - (x[3] - x[1]) * (y[2] - y[0])) / 2e6
    if not np.isfinite(area).all():
        raise ValueError(
            "has lightning at the edge of the map, where cells have no area; choose another grid"
        )
    return np.asarray(area)


@lru_cache(maxsize=2)
def _seen(grid: Grid, longitude: float) -> NDArray[np.bool_]:
    """Whether the instrument looks at a cell's centre (y, x), from above the equator there."""
    looks = Proj(proj="geos", h=HEIGHT, lon_0=longitude, sweep="x", a=6378137.0, b=6356752.31414)
    x, y = (np.degrees(np.asarray(metres) / HEIGHT) for metres in looks(*grid.lonlat()))
    with np.errstate(invalid="ignore"):  # what the satellite cannot see at all is infinite
        return (np.hypot(x, y) <= RADIUS) & (np.abs(x) <= HALF_SIDE) & (np.abs(y) <= HALF_SIDE)
