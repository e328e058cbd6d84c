"""The axes of a CF field (CF-1.11 chapter 4): which dimension is x, y or time, and what it says."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from pipelines.formats.arrays import Array, Attributes

Times = NDArray[np.int64]  # microseconds since 1970 (UTC)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MOST_CENTRES = 100_000  # of a line
MOST_TIMES = 10_000_000

MICROSECONDS = {
    "microsecond": 1,
    "millisecond": 10**3,
    "sec": 10**6,
    "second": 10**6,
    "min": 60 * 10**6,
    "minute": 60 * 10**6,
    "hr": 3600 * 10**6,
    "hour": 3600 * 10**6,
    "h": 3600 * 10**6,
    "day": 86400 * 10**6,
    "d": 86400 * 10**6,
}
SINCE = re.compile(
    r"(?P<unit>[a-z]+?)s? since (?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})"
    r"(?:(?:T| +)(?P<hour>\d{1,2}):(?P<minute>\d{1,2})(?::(?P<second>\d{1,2})(?:\.0*)?)?)?"
    r" ?(?:Z|UTC|GMT|[+-]00:?00)?",
    re.IGNORECASE,
)
CALENDARS = ("standard", "gregorian", "proleptic_gregorian")
GREGORIAN = 1583  # the first year that is the same in all of them

# What marks an axis: its standard names, its units, and its own names.
MARKS: dict[str, tuple[set[str], set[str], set[str]]] = {
    "x": (
        {"projection_x_coordinate", "longitude"},
        {"degrees_east", "degree_east", "degrees_e", "degree_e"},
        {"x", "lon", "longitude", "x_geostationary", "nx", "easting"},
    ),
    "y": (
        {"projection_y_coordinate", "latitude"},
        {"degrees_north", "degree_north", "degrees_n", "degree_n"},
        {"y", "lat", "latitude", "y_geostationary", "ny", "northing"},
    ),
    "time": ({"time"}, set(), {"time", "valid_time"}),
}
METRES = {
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1.0),
    **dict.fromkeys(("km", "kilometer", "kilometers", "kilometre", "kilometres"), 1000.0),
}
RADIANS = ("rad", "radian", "radians")  # scan angles of a geostationary satellite


def marked(axis: str, lines: Iterable[tuple[str, Array]]) -> str | None:
    """Which of the dimensions (each with its coordinates) is the axis `x`, `y` or `time`; None: not told.

    The attribute `axis` counts most, then `standard_name`, units, and the dimension's own name.
    """
    standard_names, units, names = MARKS[axis]
    told = {name: {key: str(value) for key, value in line.attributes.items()} for name, line in lines}
    marks: tuple[Callable[[str, Mapping[str, str]], bool], ...] = (
        lambda name, attributes: attributes.get("axis", "").lower() == axis[0],
        lambda name, attributes: attributes.get("standard_name") in standard_names,
        lambda name, attributes: attributes.get("units", "").lower() in units,
        lambda name, attributes: axis == "time" and " since " in attributes.get("units", ""),
        lambda name, attributes: name.lower() in names,
    )
    for is_marked in marks:
        found = [name for name, attributes in told.items() if is_marked(name, attributes)]
        if len(found) == 1:
            return found[0]
    return None


@dataclass(frozen=True, eq=False)
class Line:
    """An axis of cell centres, in the order and unit in which a file has it."""

    dimension: str
    stored: NDArray[np.float64]
    units: str  # in lower case; "": not told

    @classmethod
    def of(cls, dimension: str, coordinate: Array) -> "Line":
        """The axis that an array of coordinates describes.

        Raises:
            ValueError: if it is no line of at least two numbers, or some were never written.
        """
        if len(coordinate.shape) != 1 or not 2 <= coordinate.shape[0] <= MOST_CENTRES:
            raise ValueError(f"{dimension} has shape {coordinate.shape}: expected a line of cell centres")
        stored = _numbers(coordinate, dimension)
        centres = stored.astype(np.float64)
        if stored.dtype == np.float32:  # its rounding is not taken for uneven cells
            even = np.linspace(centres[0], centres[-1], centres.size)
            if np.abs(centres - even).max() <= 2 * np.finfo(np.float32).eps * np.abs(centres).max():
                centres = even
        return cls(dimension, centres, str(coordinate.attributes.get("units", "")).lower())

    @property
    def ascends(self) -> bool:
        """Whether the numbers rise."""
        return bool(self.stored[-1] > self.stored[0])

    def is_degrees(self, name: str) -> bool:
        """Whether it is a longitude ("lon") or a latitude ("lat"), by its unit or else its name."""
        if self.units in METRES or self.units in RADIANS:
            return False
        return self.units.startswith("degree") or self.dimension.lower().startswith(name)

    def centres(self, crs: CRS) -> NDArray[np.float64]:
        """The cell centres in the CRS's unit (metres or degrees).

        Raises:
            ValueError: if its unit cannot be one of that CRS.
        """
        if crs.is_geographic:
            if self.units and not self.units.startswith("degree"):
                raise ValueError(f"{self.dimension} is in {self.units!r}, expected degrees, as its CRS has")
            return self.stored
        if self.units in RADIANS:
            height = crs.to_cf().get("perspective_point_height")
            if height is None:
                raise ValueError(f"{self.dimension} is in {self.units!r}, but its CRS is no satellite's view")
            return self.stored * float(height)
        if self.units and self.units not in METRES:
            raise ValueError(f"{self.dimension} is in {self.units!r}, expected m, km or rad")
        return self.stored * METRES.get(self.units, 1.0)


@dataclass(frozen=True, eq=False)
class TimeAxis:
    """When the fields of a file are valid."""

    dimension: str | None  # None: the file is of one time
    ends: Times  # rising
    held: NDArray[np.bool_]  # which times hold a field
    cadence: timedelta

    def find(self, valid_time: datetime | None) -> int:
        """The place of a field in the file.

        Raises:
            ValueError: if it holds none of that time, or several and none is asked for.
        """
        if valid_time is None:
            if self.ends.size != 1:
                raise ValueError(f"holds {self.ends.size} times; one has to be asked for")
            return 0
        wanted = microseconds(valid_time)
        place = int(np.searchsorted(self.ends, wanted))
        if place == self.ends.size or self.ends[place] != wanted or not self.held[place]:
            raise ValueError(
                f"holds no field valid at {valid_time:%Y-%m-%dT%H:%M:%SZ}, but {self.held.sum()} from "
                f"{moment(self.ends[0])} to {moment(self.ends[-1])}"
            )
        return place


def microseconds(time: datetime) -> int:
    """Since 1970."""
    return (time - EPOCH) // timedelta(microseconds=1)


def moment(time: int | np.integer[Any]) -> datetime:
    """The UTC time that many microseconds after 1970.

    Raises:
        ValueError: if there is no such year.
    """
    try:
        return EPOCH + timedelta(microseconds=int(time))
    except OverflowError as error:
        raise ValueError(f"{time} microseconds after 1970 is no time of a radar or satellite") from error


def times(coordinate: Array, name: str, attributes: Attributes | None = None) -> Times:
    """The times in an array of CF times (CF-1.11 section 4.4), to a millisecond.

    `attributes` holds the units and the calendar where the array itself does not (bounds).

    Raises:
        ValueError: if they are not counted as CF says, or any is missing.
    """
    told = coordinate.attributes if attributes is None else attributes
    if np.prod(coordinate.shape, dtype=object) > MOST_TIMES:
        raise ValueError(f"{name} holds more than {MOST_TIMES} times")
    begin, step = _clock(str(told.get("units", "")), str(told.get("calendar", "standard")).lower(), name)
    counts = _numbers(coordinate, name)
    if np.any(np.abs(counts.astype(np.float64) * step) > 2.0**61):
        raise ValueError(f"{name} holds numbers that are no times")
    if counts.dtype.kind == "f":
        passed = (np.rint(counts.astype(np.float64) * (step / 1000)) * 1000).astype(np.int64)
    elif step < 1:
        passed = counts.astype(np.int64) // round(1 / step)
    else:
        passed = counts.astype(np.int64) * round(step)
    return np.atleast_1d(passed + microseconds(begin))


def _clock(units: str, calendar: str, name: str) -> tuple[datetime, float]:
    """When a clock begins (UTC), and the microseconds that it counts."""
    match = SINCE.fullmatch(units.strip())
    step = None if match is None else {**MICROSECONDS, "nanosecond": 1e-3}.get(match["unit"].lower())
    if match is None or step is None or calendar not in CALENDARS:
        raise ValueError(
            f"{name} is counted in {units!r} of the calendar {calendar!r}; expected a unit such as 'seconds "
            f"since 1970-01-01' (UTC) of one of {', '.join(CALENDARS)}"
        )
    hour, minute, second = (int(match[part] or 0) for part in ("hour", "minute", "second"))
    year, month, day = (int(match[part]) for part in ("year", "month", "day"))
    if year < GREGORIAN and calendar != "proleptic_gregorian":
        raise ValueError(f"{name} is counted from {year:04d}, before the Gregorian calendar")
    return datetime(year, month, day, hour, minute, second, tzinfo=UTC), step


def _numbers(coordinate: Array, name: str) -> NDArray[Any]:
    """All the numbers of an array of coordinates, none of which may be missing."""
    read = coordinate.read({})
    if read.values.dtype.kind not in "iuf":
        raise ValueError(f"{name} holds {read.values.dtype}, expected numbers")
    if read.absent and read.values.size:
        raise ValueError(f"some of {name} was never written; a damaged file or store, fetch it again")
    fills = [coordinate.attributes.get(key) for key in ("_FillValue", "missing_value")]
    known = np.array([fill for fill in fills if isinstance(fill, int | float)], float)
    if not np.all(np.isfinite(read.values)) or np.isin(read.values, known).any():
        raise ValueError(f"some of {name} is missing")
    return read.values
