"""`PlainCube`: a plain Zarr store (v2, v3) or NetCDF file, read as a cube without ingesting it.

Read are CF data sets (https://cfconventions.org), mlcast's radar archives among them, and what `export`
writes, which comes back bit for bit. The reader of `pipelines.sources.cf` says what each field is; whatever
it cannot know without being told has to be ingested with its settings.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask.array
import h5py
import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from scipy.io import netcdf_file
from zarr.storage import MemoryStore

from pipelines.cf import RAINFALL_RATE, Variable
from pipelines.coordinates import TIME_UNITS, located, provenance, seconds, write_grid
from pipelines.cube import AXIS_LIMIT, RADAR, Cube
from pipelines.formats import hdf5
from pipelines.formats.arrays import LARGEST_NETCDF4, Arrays, is_store, opened
from pipelines.formats.axes import moment, times
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.manifest import NAME, Manifest
from pipelines.observations import Observations
from pipelines.repository import store_array
from pipelines.sources.cf import QUANTITIES, Cf
from pipelines.sources.source import RemoteFile

METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata", NAME)
RESOLUTION = re.compile(r"PT(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)S)?")  # ISO 8601, up to days
ADVICE = "metnet ingest source=cf may read it, with settings for what the file does not say"
TIME = "%Y-%m-%dT%H:%M:%SZ"


def rain_cube(path: str) -> Observations:
    """The cube at a path, as `open_cube` finds it, if it holds rain.

    Raises:
        ValueError: if it holds another quantity, or is no cube.
    """
    cube = open_cube(path)
    if cube.variable.name != RAINFALL_RATE.name:
        raise ValueError(
            f"{path}: holds {cube.variable.name} ({cube.variable.units}), and rain is forecast from "
            f"{RAINFALL_RATE.name} ({RAINFALL_RATE.units}); choose a cube of rain rates"
        )
    return cube


def open_cube(path: str, group: str = RADAR) -> Observations:
    """The frames at a path: of a cube that `metnet ingest` made, a plain Zarr store, or a NetCDF file.

    Raises:
        ValueError: if there are none that can be read, saying what is there instead.
    """
    place = Path(path)
    if "://" not in path and (place.is_file() or is_store(place)):
        try:
            return PlainCube.open(path, group)
        except ValueError as error:
            if str(error).startswith(str(place)):
                raise
            raise ValueError(f"{path}: {error}") from error
    return Cube.open(path, group)


@dataclass(frozen=True, eq=False)
class PlainCube:
    """Frames of one array in a file or store, on the regular axis that their times lie on.

    NaN is "not observed" (missing in the file, or a step without a frame), 0 is "dry".
    """

    path: str
    snapshot: str
    grid: Grid
    variable: Variable
    cadence: timedelta
    start: datetime
    size: int  # steps of the time axis
    source: Cf
    files: Mapping[int, RemoteFile]  # by step, where there is a frame
    manifest: Manifest | None  # of the field's chunks, where this software exported them

    @classmethod
    def open(cls, path: str, group: str = RADAR) -> "PlainCube":
        """The frames in a NetCDF file or Zarr store; `group` counts where it has a group of that name.

        Raises:
            ValueError: if it is damaged, or does not say what, where and when its numbers are.
        """
        place = Path(path)
        _check_chunks(place, group)
        source, files, first, missing = _chosen(place, group)
        held = {file.valid_time: file for file in files if file.valid_time is not None}
        axis = sorted({*held, *missing})
        cadence, start = first.cadence or timedelta(0), axis[0]
        size = 1 + (axis[-1] - start) // cadence
        _check_axis(place, axis, cadence, size)
        array = place.joinpath(*source.variable.split("/"))
        return cls(
            path=path,
            snapshot=_digest(place) if place.is_dir() else first.sha256,
            grid=_exact(place, source.variable, first.grid),
            variable=first.variable,
            cadence=cadence,
            start=start,
            size=size,
            source=source,
            files={(time - start) // cadence: file for time, file in held.items()},
            manifest=Manifest.read(array) if place.is_dir() else None,
        )

    @property
    def times(self) -> list[datetime]:
        """Every step of the time axis (UTC), with a frame or without."""
        return [self.start + step * self.cadence for step in range(self.size)]

    @cached_property
    def observed(self) -> NDArray[np.bool_]:
        """For every step of the time axis, whether there is a frame."""
        observed = np.zeros(self.size, np.bool_)
        observed[list(self.files)] = True
        return observed

    def block(
        self, first: datetime, count: int, window: tuple[int, int, int, int] | None = None, step: int = 1
    ) -> NDArray[np.float32]:
        """Fields (count, y, x) at `first`, `first` + `step` * cadence, ... in the variable's units.

        NaN where not observed, and at times outside the axis. `window` is (y0, x0, ny, nx) in cells.

        Raises:
            ValueError: if `first` falls between two steps, the window reaches outside the grid, or a field is
                damaged.
        """
        y0, x0, ny, nx = window or (0, 0, *self.grid.shape)
        self.grid.window(y0, x0, ny, nx)
        if count < 1 or step < 1:
            raise ValueError(f"count={count}, step={step}: expected 1 or more")
        begin, rest = divmod(first - self.start, self.cadence)
        if rest:
            raise ValueError(
                f"valid time {first:{TIME}} is not on the time axis, which starts at {self.start:{TIME}} "
                f"with a step of {self.cadence}"
            )
        block = np.full((count, ny, nx), np.nan, np.float32)
        for number in range(count):
            if begin + number * step in self.files:
                field = self._field(begin + number * step)
                block[number] = field[y0 : y0 + ny, x0 : x0 + nx]
        return block

    def between(self, start: datetime, end: datetime) -> xr.Dataset:
        """The CF dataset of the steps within [start, end], read when it is used."""
        chosen = [time for time in self.times if start <= time <= end]
        group = zarr.open_group(MemoryStore(), mode="w", zarr_format=3)
        group.update_attributes(provenance(f"{self.variable.long_name}, observed"))
        write_grid(group, self.grid)
        axis = {"standard_name": "time", "axis": "T", **TIME_UNITS}
        store_array(group, "time", ("time",), np.array([seconds(time) for time in chosen], np.int64), axis)
        dataset: xr.Dataset = xr.open_dataset(
            group.store,  # type: ignore[arg-type]
            engine="zarr",
            backend_kwargs={"consolidated": False, "zarr_format": 3},
            decode_coords="all",
        )
        dataset = dataset.set_coords(["crs", "lat", "lon"])
        for name in dataset.variables:  # CF-1.11 section 2.5.1: coordinates have no missing values
            dataset[name].encoding["_FillValue"] = None
        fields = dask.array.from_array(  # type: ignore[no-untyped-call]
            _Fields(self, chosen), chunks=(1, *self.grid.shape), name=False, meta=np.empty((0, 0, 0), "f4")
        )
        attributes = located(self.variable.attributes())
        linked = {key: attributes.pop(key) for key in ("grid_mapping", "coordinates")}
        dataset[self.variable.name] = (("time", "y", "x"), fields, attributes, linked)
        return dataset

    @cached_property
    def _places(self) -> dict[int, int]:
        """Where the field of a step lies in the array."""
        return {step: place for place, step in enumerate(sorted(self.files))}

    def _field(self, step: int) -> NDArray[np.float32]:
        """The field of a step that has one."""
        if self.manifest is not None:
            self.manifest.check(self._places[step])
        return self.source.read(self.files[step]).values


@dataclass(frozen=True, eq=False)
class _Fields:
    """The fields at some times of an axis, as an array that is read when it is used."""

    cube: PlainCube
    times: Sequence[datetime]
    dtype = np.dtype(np.float32)
    ndim = 3

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.times), *self.cube.grid.shape

    def __getitem__(self, key: tuple[slice, slice, slice]) -> NDArray[np.float32]:
        time, y, x = (slice(*part.indices(size)) for part, size in zip(key, self.shape, strict=True))
        count, rows, columns = time.stop - time.start, y.stop - y.start, x.stop - x.start
        if not (count and rows and columns):
            return np.empty((count, rows, columns), np.float32)
        return self.cube.block(self.times[time.start], count, (y.start, x.start, rows, columns))


def _chosen(path: Path, group: str) -> tuple[Cf, list[RemoteFile], Frame, list[datetime]]:
    """The array that holds the frames: how to read it, its fields, the first, and times that lack one.

    An array that bears the name of a quantity comes first, then one in units of a rain rate.

    Raises:
        ValueError: if there is none, or several.
    """
    names = _names(path, group)
    own = [name for name in names if name.split("/")[-1] in QUANTITIES]
    reasons: dict[str, str] = {}
    for candidates in (own, [name for name in names if name not in own]):
        found = []
        for name in candidates:
            plain = name.split("/")[-1]
            quantities = [quantity for quantity in (plain, RAINFALL_RATE.name) if quantity in QUANTITIES]
            try:
                found.append(_fields(path, name, quantities[0]))
            except ValueError as error:
                reasons[name] = str(error)
        if len(found) > 1:
            several = ", ".join(source.variable for source, *_ in found)
            raise ValueError(f"{path}: holds several quantities ({several}); {ADVICE}")
        if found:
            return found[0]
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ValueError(
        f"{path}: no array there is known to be rain or another quantity over time, y and x "
        f"({told or 'it has no array of three dimensions'}); {ADVICE}"
    )


def _fields(path: Path, name: str, quantity: str) -> tuple[Cf, list[RemoteFile], Frame, list[datetime]]:
    """How to read an array, its fields, the first of them, and the times that lack one.

    Raises:
        ValueError: if it is no array of frames of that quantity.
    """
    source = Cf(path=str(path), variable=name, quantity=quantity, cadence=1.0)
    files = list(source.files(None, None))
    held = [file.valid_time for file in files if file.valid_time is not None]
    if not held:
        source.read(RemoteFile(str(path), None))  # says why
        raise ValueError("holds no frame")
    with opened(path) as arrays:
        inside = name.rpartition("/")[0]
        missing = _missing(arrays, inside)
        cadence = _cadence(sorted({*held, *missing}), arrays.attributes(inside))
        array = arrays.array(name)
        units = None if array is None else array.attributes.get("units")
    is_own = quantity == name.split("/")[-1] and units == QUANTITIES[quantity].units
    source = replace(source, cadence=cadence / timedelta(minutes=1), factor=1.0 if is_own else None)
    return source, files, source.read(files[0]), missing


def _names(path: Path, group: str) -> list[str]:
    """The arrays of three dimensions or more in a group of that name or, if there is none, at the root."""
    found = _arrays(path, group)
    prefix = group if found else ""
    found = found or _arrays(path, "")
    return [f"{prefix}/{name}".strip("/") for name, dimensions in found if dimensions >= 3]


def _arrays(path: Path, group: str) -> list[tuple[str, int]]:
    """The arrays in a group, by name and number of dimensions; none if there is no such group."""
    if path.is_dir():
        folder = path / group
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        with opened(path) as arrays:
            found = ((name, arrays.array(f"{group}/{name}".strip("/"))) for name in names)
            return [(name, len(array.shape)) for name, array in found if array is not None]
    with path.open("rb") as file:
        begin = file.read(len(hdf5.MAGIC))
    if begin == hdf5.MAGIC:
        with hdf5.opened(path, LARGEST_NETCDF4) as contents:
            node = contents.get(group or "/")
            inside = dict(node.items()) if isinstance(node, h5py.Group) else {}
            return [(name, each.ndim) for name, each in inside.items() if isinstance(each, h5py.Dataset)]
    if group:
        return []
    with opened(path):  # refuses what is damaged, or of another format
        pass
    with netcdf_file(path, mmap=False) as plain:
        return [(name, len(variable.dimensions)) for name, variable in plain.variables.items()]


def _missing(arrays: Arrays, group: str) -> list[datetime]:
    """The steps of the axis without a frame, where a data set lists them as mlcast asks."""
    array = arrays.array(f"{group}/missing_times".strip("/"))
    if array is None or array.shape == (0,):
        return []
    return [moment(time) for time in times(array, "missing_times")]


def _cadence(axis: Sequence[datetime], attributes: Mapping[str, Any]) -> timedelta:
    """The commonest step of the axis, the smaller of two; of one frame, the one that the data set names.

    Raises:
        ValueError: if nothing tells it.
    """
    steps = Counter(after - before for before, after in pairwise(axis))
    if steps:
        return max(steps, key=lambda step: (steps[step], -step))
    named = RESOLUTION.fullmatch(str(attributes.get("time_coverage_resolution", "")))
    hours, minutes, rest = (int(part or 0) for part in named.groups()) if named else (0, 0, 0)
    cadence = timedelta(hours=hours, minutes=minutes, seconds=rest)
    if not cadence:
        raise ValueError("holds one time, and no time_coverage_resolution (such as PT5M) tells the cadence")
    return cadence


def _check_axis(path: Path, axis: Sequence[datetime], cadence: timedelta, size: int) -> None:
    """Refuses times that lie on no regular axis.

    Raises:
        ValueError: for the first that lies off it, or an axis that is mostly empty.
    """
    off = next((time for time in axis if (time - axis[0]) % cadence), None)
    if off is not None:
        raise ValueError(
            f"{path}: its time {off:{TIME}} is no whole number of steps after {axis[0]:{TIME}}; the "
            f"commonest step is {cadence}, and frames in between have no place on a regular axis; {ADVICE}"
        )
    if size > AXIS_LIMIT and size > 10 * len(axis):
        raise ValueError(
            f"{path}: {len(axis)} times from {axis[0]:{TIME}} to {axis[-1]:{TIME}} would make an axis of "
            f"{size} steps of {cadence}; is one of them a wrong date?"
        )


def _exact(path: Path, name: str, grid: Grid) -> Grid:
    """The grid to the last bit, where x and y name their steps as this software does."""
    group = name.rpartition("/")[0]
    with opened(path) as arrays:
        x, y, crs = (arrays.array(f"{group}/{part}".strip("/")) for part in ("x", "y", "crs"))
        if x is None or y is None or crs is None:
            return grid
        x_step, y_step = (line.attributes.get("step") for line in (x, y))
        wkt = crs.attributes.get("crs_wkt")
        columns, rows = (line.read({}).values for line in (x, y))
    if not (isinstance(wkt, str) and isinstance(x_step, float) and isinstance(y_step, float)):
        return grid
    if (*rows.shape, *columns.shape) != grid.shape or not x_step > 0 > y_step:
        return grid
    told = Grid(wkt, float(columns[0]), x_step, columns.size, float(rows[0]), y_step, rows.size)
    return told if np.array_equal(told.x, columns) and np.array_equal(told.y, rows) else grid


def _check_chunks(path: Path, group: str) -> None:
    """Looks whether the exported chunks of coordinates are all there; those of a field wait until it is read.

    Raises:
        ValueError: naming the first that is not.
    """
    if not path.is_dir():
        return
    for folder, names in ((path, _arrays(path, "")), (path / group, _arrays(path, group))):
        with opened(path) as arrays:
            inside = folder.relative_to(path).as_posix() if folder != path else ""
            is_listed = arrays.attributes(inside).get("chunk_list") == NAME
        for name, dimensions in names:
            manifest = Manifest.read(folder / name)
            if manifest is None and is_listed:
                raise ValueError(f"{folder / name}: lacks its {NAME}; export the store again")
            if manifest is not None and dimensions < 3:
                manifest.check()


def _digest(path: Path) -> str:
    """Of what a store holds: metadata, lists of chunks, size and date of chunks that no list names."""
    digest = hashlib.sha256()
    for key, file in _files(path):
        if file.name in METADATA:
            digest.update(f"\n{key}\n".encode() + file.read_bytes())
        else:
            told = file.lstat()
            digest.update(f"\n{key} {told.st_size} {told.st_mtime_ns}".encode())
    return digest.hexdigest()


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """The files of a store by their keys, in the order of these.

    Raises:
        ValueError: if any is a link.
    """
    for folder, folders, names in os.walk(path):
        folders[:] = [] if NAME in names else sorted(folders)
        for name in sorted(names):
            file = Path(folder, name)
            if file.is_symlink():
                raise ValueError(f"{file}: is a link; refused, since it may lead to any file here")
            yield file.relative_to(path).as_posix(), file
