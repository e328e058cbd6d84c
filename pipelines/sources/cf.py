"""`Cf`: any field that NetCDF files or Zarr stores hold as CF-1.11 says, by configuration alone.

So are read the cubes that this software exports, those of the mlcast community (Zarr with `missing_times`
and `last_valid_timestep`), and research data sets: what their attributes leave out stands in a YAML file.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS
from pyproj.exceptions import CRSError

from pipelines import cf
from pipelines.cf import Variable
from pipelines.formats.arrays import Array, Arrays, is_store, opened
from pipelines.formats.axes import Line, TimeAxis, Times, marked, microseconds, moment, times
from pipelines.formats.georeference import crs_of
from pipelines.formats.packing import Packing
from pipelines.frame import ALWAYS, Frame, parse_time
from pipelines.grid import Grid
from pipelines.sources.source import PASSED_OVER, SAFE_NAME, RemoteFile, listable, within

FILES = (".nc", ".nc3", ".nc4", ".cdf", ".h5", ".hdf5")  # what NetCDF and HDF5 files end in
STATIC = "static"  # the group of what does not change
MOST_CELLS = 64_000_000
MOST_LABELS = 100_000
SMALLEST_EARTH = 6.3e6  # metres of a radius
LONGEST_SUM = 15.0  # minutes; a mean over more is no rain rate to nowcast with

RATES = {  # mm/h in a unit, blanks and signs of power taken out
    "mmh-1": 1.0,
    "mm/h": 1.0,
    "mm/hr": 1.0,
    "mmhr-1": 1.0,
    "mmhour-1": 1.0,
    "mm/hour": 1.0,
    "kgm-2h-1": 1.0,
    "kgm-2s-1": 3600.0,
    "kg/m2/s": 3600.0,
    "mms-1": 3600.0,
    "mm/s": 3600.0,
    "ms-1": 3.6e6,
    "m/s": 3.6e6,
}
AMOUNTS = {"mm": 1.0, "kgm-2": 1.0, "kg/m2": 1.0, "m": 1000.0}  # mm in a unit
SUM_OF_MINUTES = re.compile(r"(?:mm|kgm-2)/?(\d+)(?:min|minutes)(?:-1)?")
HOURS = {cf.PRECIPITATION_AMOUNT_1H.name: 1, cf.PRECIPITATION_AMOUNT_24H.name: 24}


@dataclass(frozen=True)
class Cf:
    """One array out of the files and stores in a folder and its subfolders, or out of one file or store."""

    path: str | None = None
    variable: str = cf.RAINFALL_RATE.name  # the array; group/array where it lies in a group
    quantity: str = cf.RAINFALL_RATE.name  # what it is, by a name of `pipelines.cf`
    attributes: Mapping[str, str | float] | None = None  # that the array must have; None: any
    factor: float | None = None  # from its numbers to the quantity's unit; None: as its units say
    missing: Sequence[float] = ()  # stored numbers, besides those it names, that are "not observed"
    select: Mapping[str, str | float] | None = None  # the label to take of each further dimension
    x: str | None = None  # arrays of cell centres, where nothing marks them
    y: str | None = None
    time: str | None = None
    crs: str | None = None  # None: its grid mapping, or EPSG:4326 of longitude and latitude
    sampling: float | None = (
        None  # of which all cell centres are whole multiples, in the CRS's unit; None: any
    )
    time_is: str = "end"  # of what it sums or averages: end or start
    interval: float | None = None  # minutes of that; None: the cadence
    cadence: float | None = None  # minutes from field to field; None: the commonest step of the file
    classes: Mapping[int, str] | None = None  # meanings, where the values are classes; None: its flags
    fill_is_observed: bool = False  # what was never written holds the format's fill value: 0 is dry then
    names: str = ".*"  # regular expression of the file and store names
    product: str | None = None  # as a person would say it; None: its title
    group: str = "radar"  # of a cube: radar, satellite or static (a field without a time)
    trusted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses settings that cannot be meant.

        Raises:
            ValueError: for such a setting.
        """
        object.__setattr__(self, "missing", tuple(float(value) for value in self.missing))
        for mapping in (
            "select",
            "classes",
            "attributes",
        ):  # plain, so that it can be sent to another process
            given = getattr(self, mapping)
            object.__setattr__(self, mapping, None if given is None else dict(given.items()))
        if self.quantity not in QUANTITIES:
            raise ValueError(f"source.quantity={self.quantity}: expected one of {', '.join(QUANTITIES)}")
        if self.time_is not in ("end", "start"):
            raise ValueError(f"source.time_is={self.time_is}: expected end or start")
        if self.sampling is not None and self.sampling <= 0:
            raise ValueError(f"source.sampling={self.sampling}: expected more than 0")

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The fields valid within [start, end], by rising valid time; then what cannot be opened.

        Raises:
            ValueError: if there is no such folder, file or store.
        """
        found = [file for path in self.places() for file in self._fields(path)]
        if self.group == STATIC:
            yield from found
            return
        yield from within(found, start, end)

    def read(self, file: RemoteFile) -> Frame:
        """The field that is valid at the file's time; NaN where it was not observed.

        Raises:
            ValueError: naming the file, if it is damaged, or not what the configuration says.
        """
        path = Path(file.url)
        try:
            with opened(path) as arrays:
                return self._frame(arrays, file.valid_time)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def places(self) -> Iterator[Path]:
        """The files and stores at `path`, none of which is opened; no symbolic link below it is followed.

        Raises:
            ValueError: if there is no such folder, file or store, or nothing of such a name in it.
        """
        if self.path is None or not Path(self.path).exists():
            raise ValueError(
                f"source.path={self.path}: not there; expected a folder, a NetCDF file or a Zarr store"
            )
        if Path(self.path).is_dir():
            listable(self.path, "NetCDF files or Zarr stores")
        waiting, seen = [Path(self.path)], 0
        while waiting:
            place = waiting.pop(0)
            inside = _inside(place)
            if inside is not None:
                waiting += inside
            elif re.fullmatch(self.names, place.name):
                seen += 1
                yield place
        if not seen:
            raise ValueError(
                f"{self.path}: no NetCDF file ({', '.join(FILES)}) and no Zarr store whose name is "
                f"{self.names} there or in its subfolders"
            )

    def _fields(self, path: Path) -> list[RemoteFile]:
        """The fields in a file; one without a time if it cannot be opened, so that reading it says why."""
        try:
            with opened(path) as arrays:
                array = self._array(arrays)
                if self.group == STATIC:
                    return [RemoteFile(str(path), ALWAYS)]
                axis = self._time_axis(arrays, array)
                return [RemoteFile(str(path), moment(at)) for at in axis.ends[axis.held]]
        except (ValueError, OSError):
            return [RemoteFile(str(path), None)]

    def _frame(self, arrays: Arrays, valid_time: datetime | None) -> Frame:
        array = self._array(arrays)
        self._check_attributes(array)
        x, y = (self._line(arrays, array, axis) for axis in ("x", "y"))
        grid = self._grid(arrays, array, x, y)
        time, cadence, fixed = ALWAYS, None, dict[str, int]()
        if self.group != STATIC:
            axis = self._time_axis(arrays, array)
            place = axis.find(valid_time)
            time, cadence = moment(axis.ends[place]), axis.cadence
            if axis.dimension is not None:
                fixed[axis.dimension] = place
        for dimension in array.dimensions:
            if dimension not in (x.dimension, y.dimension, *fixed):
                fixed[dimension] = self._label(arrays, array, dimension)
        read = array.read(fixed)
        packing = Packing.of(array, self.missing, self._factor(array, cadence), not self.fill_is_observed)
        values = packing.unpacked(read.values)
        if not self.fill_is_observed:
            for region in read.absent:
                values[region] = np.nan
        if array.dimensions.index(x.dimension) < array.dimensions.index(y.dimension):
            values = values.T
        return Frame(
            variable=self._quantity(array),
            valid_time=time,
            cadence=cadence,
            grid=grid,
            values=np.ascontiguousarray(values[:: -1 if y.ascends else 1, :: 1 if x.ascends else -1]),
            source=self._source(arrays),
            sha256=read.sha256,
            group=self.group,
        )

    def _array(self, arrays: Arrays) -> Array:
        array = arrays.array(self.variable)
        if array is None:
            raise ValueError(f"holds no array {self.variable!r}; name another by source.variable")
        return array

    def _check_attributes(self, array: Array) -> None:
        """Refuses an array whose attributes are not the registered ones.

        Formats keep no checksum of them, and one flipped bit in a bound of what is valid or in a fill value
        turns a field to "not observed".
        """
        for name, expected in (self.attributes or {}).items():
            got = array.attributes.get(name)
            if not _same(got, expected):
                raise ValueError(
                    f"its {name} is {got}, expected {expected} (source.attributes); a damaged file, fetch it "
                    "again, or another version of the product"
                )

    def _find(self, arrays: Arrays, name: str) -> Array | None:
        """An array of the same group, or of one above."""
        groups = self.variable.split("/")[:-1]
        for depth in range(len(groups), -1, -1):
            found = arrays.array("/".join((*groups[:depth], name)))
            if found is not None:
                return found
        return None

    def _line(self, arrays: Arrays, array: Array, axis: str) -> Line:
        """The axis `x` or `y`.

        Raises:
            ValueError: if nothing marks it.
        """
        found = self._axis(arrays, array, axis)
        if found is None:
            raise ValueError(
                f"nothing marks the {axis} axis of {self.variable}, whose dimensions are "
                f"{', '.join(array.dimensions)}; name the array of its cell centres by source.{axis}"
            )
        return Line.of(found[0], found[1])

    def _axis(self, arrays: Arrays, array: Array, axis: str) -> tuple[str, Array] | None:
        """The dimension that is an axis, and the array of its coordinates; None if nothing marks one."""
        given = {"x": self.x, "y": self.y, "time": self.time}[axis]
        if given is not None:
            coordinate = self._find(arrays, given)
            if coordinate is None or len(coordinate.shape) > 1:
                raise ValueError(f"source.{axis}={given}: holds no such array of one dimension")
            if coordinate.shape and coordinate.dimensions[0] in array.dimensions:
                return coordinate.dimensions[0], coordinate
            if axis == "time" and coordinate.shape in ((), (1,)):
                return None  # of all that is in the file
            raise ValueError(f"source.{axis}={given}: is not along a dimension of {self.variable}")
        lines = {
            name: coordinate
            for name in array.dimensions
            if (coordinate := self._find(arrays, name)) is not None and coordinate.dimensions == (name,)
        }
        name = marked(axis, lines.items())
        return None if name is None else (name, lines[name])

    def _time_axis(self, arrays: Arrays, array: Array) -> TimeAxis:
        """When the fields are valid.

        Raises:
            ValueError: if the file does not say, or in a way that CF does not know.
        """
        along = self._axis(arrays, array, "time")
        coordinate = self._time_of_all(arrays, array) if along is None else along[1]
        if coordinate is None:
            raise ValueError(
                f"nothing says when {self.variable} is valid; name the array of times by source.time, or "
                f"say source.group={STATIC} if it never changes"
            )
        given = times(coordinate, "time")
        late = np.flatnonzero(np.diff(given) <= 0)
        if late.size:
            name = "time" if along is None else along[0]
            raise ValueError(
                f"its times do not rise: after {moment(given[late[0]])} comes {moment(given[late[0] + 1])}; "
                f"sort them, each but once (by xarray: dataset.sortby({name!r}).drop_duplicates({name!r}))"
            )
        cadence = self._cadence(given)
        minutes = self.interval or cadence / timedelta(minutes=1)
        ends = given + (round(minutes * 60e6) if self.time_is == "start" else 0)
        self._check_bounds(arrays, coordinate, ends)
        return TimeAxis(None if along is None else along[0], ends, self._held(arrays, given), cadence)

    def _time_of_all(self, arrays: Arrays, array: Array) -> Array | None:
        """The one time of all that is in a file."""
        coordinates = str(array.attributes.get("coordinates", "")).split()
        for name in (self.time,) if self.time else (*coordinates, "time", "valid_time"):
            found = self._find(arrays, name)
            if found is None or found.shape not in ((), (1,)):
                continue
            if " since " in str(found.attributes.get("units")):
                return found
        return None

    def _cadence(self, given: Times) -> timedelta:
        if self.cadence is not None:
            return timedelta(minutes=self.cadence)
        if given.size < 2:
            raise ValueError("holds one time, which tells no cadence; give source.cadence in minutes")
        steps, counts = np.unique(np.diff(given), return_counts=True)
        return timedelta(microseconds=int(steps[np.argmax(counts)]))

    def _check_bounds(self, arrays: Arrays, coordinate: Array, ends: Times) -> None:
        """Refuses times that are not where the file's own bounds say that the intervals end."""
        name = str(coordinate.attributes.get("bounds", ""))
        bounds = self._find(arrays, name) if name else None
        if bounds is None:
            return
        told = times(bounds, name, {**coordinate.attributes, **bounds.attributes}).reshape(-1, 2)[:, 1]
        if not np.array_equal(told, ends):
            raise ValueError(
                f"its {name} say that the first interval ends at {moment(told[0])}, not {moment(ends[0])}; "
                f"set source.time_is (is {self.time_is}) and source.interval (minutes) so that they agree"
            )

    def _held(self, arrays: Arrays, given: Times) -> NDArray[np.bool_]:
        """Which times hold a field: mlcast's cubes list those that do not, and run on into the future."""
        held = np.ones(given.shape, np.bool_)
        missing = self._find(arrays, "missing_times")
        if missing is not None and missing.shape != (0,):
            held &= ~np.isin(given, times(missing, "missing_times"))
        last = arrays.attributes("/".join(self.variable.split("/")[:-1])).get("last_valid_timestep")
        if last is not None:
            held &= given <= microseconds(parse_time(str(last)))
        return held

    def _label(self, arrays: Arrays, array: Array, dimension: str) -> int:
        """Where the chosen label stands along a further dimension."""
        size = array.shape[array.dimensions.index(dimension)]
        wanted = (self.select or {}).get(dimension)
        if wanted is None:
            if size == 1:
                return 0
            raise ValueError(f"{dimension} has {size} labels; choose one by source.select.{dimension}=...")
        labels = self._find(arrays, dimension)
        if labels is None or labels.shape != (size,) or size > MOST_LABELS:
            raise ValueError(f"{dimension} has no labels to choose {wanted!r} from")
        told = [
            label.decode(errors="replace") if isinstance(label, bytes) else str(label)
            for label in labels.read({}).values.tolist()
        ]
        if str(wanted) not in told:
            raise ValueError(f"{dimension} has the labels {told[:20]}, not {wanted!r} (source.select)")
        return told.index(str(wanted))

    def _grid(self, arrays: Arrays, array: Array, x: Line, y: Line) -> Grid:
        try:
            crs = CRS.from_user_input(self._crs(arrays, array, x, y))
        except CRSError as error:
            raise ValueError(f"source.crs={self.crs}: not understood ({error})") from error
        if not crs.ellipsoid or crs.ellipsoid.semi_major_metre < SMALLEST_EARTH:
            raise ValueError(
                "its earth is smaller than ours, as where kilometres are taken for metres; give source.crs"
            )
        if not crs.is_geographic and any(axis.unit_conversion_factor != 1 for axis in crs.axis_info[:2]):
            raise ValueError("its CRS is not in metres; give source.crs in metres")
        if x.stored.size * y.stored.size > MOST_CELLS:
            raise ValueError(
                f"a field of {y.stored.size} x {x.stored.size} cells, of which {MOST_CELLS} at most are read"
            )
        return Grid.from_coordinates(
            crs.to_wkt(),
            self._sampled("x", x.centres(crs))[:: 1 if x.ascends else -1],
            self._sampled("y", y.centres(crs))[:: -1 if y.ascends else 1],
        )

    def _sampled(self, axis: str, centres: NDArray[np.float64]) -> NDArray[np.float64]:
        """The centres without the rounding of their file, where it is known of what they are multiples.

        32-bit metres round by a quarter of a metre, which at the limb of a satellite's disk is some metres on
        the ground.

        Raises:
            ValueError: if more than that rounding is between them and neighbouring multiples.
        """
        if self.sampling is None:
            return centres
        exact = np.rint(centres / self.sampling) * self.sampling
        off = np.abs(centres - exact).max()
        steps = np.diff(exact) / self.sampling
        if off > np.spacing(np.float32(np.abs(centres).max())) or not np.allclose(np.abs(steps), 1):
            raise ValueError(
                f"its {axis} are no neighbouring multiples of {self.sampling:.10g}, from which they lie up "
                f"to {off:.3g}; set source.sampling to what they are sampled at, or to null"
            )
        return exact

    def _crs(self, arrays: Arrays, array: Array, x: Line, y: Line) -> str:
        if self.crs is not None:
            return self.crs
        named = re.match(r"\s*([^\s:]+)", str(array.attributes.get("grid_mapping", "")))
        mapping = None if named is None else self._find(arrays, named[1])
        if mapping is not None:
            return crs_of(mapping.attributes)
        if x.is_degrees("lon") and y.is_degrees("lat"):
            return "EPSG:4326"
        raise ValueError(f"nothing says on which map {self.variable} lies; give source.crs")

    def _quantity(self, array: Array) -> Variable:
        """What it is; with the meanings of classes, where it has classes."""
        told = QUANTITIES[self.quantity]
        if self.classes is not None:
            return replace(told, classes=tuple((int(key), str(value)) for key, value in self.classes.items()))
        flags, meanings = (array.attributes.get(f"flag_{name}") for name in ("values", "meanings"))
        if flags is None or not isinstance(meanings, str) or told.units != "1":
            return told
        pairs = zip(np.atleast_1d(flags).tolist(), meanings.split(), strict=False)
        return replace(told, classes=tuple((int(value), meaning) for value, meaning in pairs))

    def _factor(self, array: Array, cadence: timedelta | None) -> float:
        """From the array's unit to the quantity's."""
        if self.factor is not None:
            return self.factor
        units = str(array.attributes.get("units", ""))
        quantity = QUANTITIES[self.quantity]
        minutes = self.interval or (cadence / timedelta(minutes=1) if cadence else 0.0)
        found = _unit_factor(units, quantity, minutes)
        if found is None:
            raise ValueError(
                f"{self.variable} is in {units!r}, which does not tell how to make {quantity.units} of "
                f"{quantity.name} ({minutes:g} minutes each) from it; give source.factor"
            )
        return found

    def _source(self, arrays: Arrays) -> str:
        title = self.product or arrays.attributes("").get("title")
        return str(title)[:200] if title else f"{self.variable} of a CF data set"


QUANTITIES = {known.name: known for known in vars(cf).values() if isinstance(known, Variable)}


def _same(got: object, expected: str | float) -> bool:
    """Whether an attribute is the expected text or number."""
    if isinstance(expected, str):
        return str(got) == expected
    numbers = np.atleast_1d(np.asarray(got)) if got is not None else np.empty(0)
    return numbers.shape == (1,) and numbers.dtype.kind in "iuf" and float(numbers[0]) == expected


def _inside(place: Path) -> list[Path] | None:
    """What may be data in a folder, if it may be listed (`unread` tells); None if it is a file or a store."""
    try:
        if not place.is_dir() or is_store(place):
            return None
        return sorted(path for path in place.iterdir() if _is_data(path))
    except PermissionError:
        return []


def _is_data(path: Path) -> bool:
    """Whether it may be a file or store to read, or a folder of such, and is no link."""
    if path.is_symlink() or not SAFE_NAME.fullmatch(path.name):
        return False
    return path.is_dir() or (path.suffix in FILES and not PASSED_OVER.fullmatch(path.name))


def _unit_factor(units: str, quantity: Variable, minutes: float) -> float | None:
    """From a unit to the quantity's, `minutes` being what a sum spans; None if it is not understood."""
    plain = re.sub(r"[\s^*.]", "", units).replace("−", "-")
    sums = SUM_OF_MINUTES.fullmatch(plain)
    if quantity.name == cf.RAINFALL_RATE.name:
        if plain in RATES:
            return RATES[plain]
        if sums and 0 < int(sums[1]) <= LONGEST_SUM:
            return 60 / int(sums[1])
        return AMOUNTS[plain] * 60 / minutes if plain in AMOUNTS and 0 < minutes <= LONGEST_SUM else None
    if quantity.name in HOURS:
        return AMOUNTS.get(plain) if minutes == 60 * HOURS[quantity.name] else None
    same = plain.lower() == re.sub(r"[\s^*.]", "", quantity.units).lower()
    return 1.0 if same or (quantity.units == "1" and plain == "") else 0.01 if plain == "%" else None
