"""`Cube`: frames on a regular time axis, as a CF-1.11 dataset in an Icechunk repository.

A repository may hold several, one a group ("radar", "satellite", ...), each with a cadence of its own, all on
one grid; and what never changes beside them (`pipelines.static`).
"""

import logging
import re
from asyncio import gather
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.buffer import default_buffer_prototype
from zarr.core.sync import sync

from pipelines.cf import Variable, described
from pipelines.coordinates import (
    EPOCH,
    TIME_UNITS,
    chunks,
    located,
    provenance,
    read_grid,
    seconds,
    write_grid,
)
from pipelines.counts import DTYPE, NOT_OBSERVED, packed, packed_attributes, plain_attributes, unpacked
from pipelines.frame import Frame
from pipelines.grid import Grid, from_path
from pipelines.quality import CellFlag, cell_flags, flag_attributes, frame_flags, statistics
from pipelines.repository import ARCHIVED, COUNTED, Repository, create_array
from pipelines.version import version
from pipelines.words import printable

STATIC = "static"  # the group of what never changes
RADAR = "radar"  # the group that forecasts are made from
GROUP_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
TIME_CHUNK = 16384  # steps of the time coordinate that lie together: 57 days of 5 minutes
HASH_CHUNK = 1024  # steps of provenance that a commit rewrites
SIDE = 512  # cells of a chunk of a field
STATISTICS = {  # of every step: type and meaning
    "observed_share": ("f4", "share of the cells that were observed"),
    "wet_share": ("f4", "share of the observed cells with rain"),
    "minimum": ("f4", "smallest value"),
    "maximum": ("f4", "largest value"),
    "fingerprint": ("i8", "hash of the values; equal values have equal hashes"),
}
MOVED_AT_ONCE = 128  # chunks in memory while the time axis grows to the front
MOST_PRODUCTS = 8  # that a cube names; some files have a title of their own
OTHERS = "and others"
AXIS_LIMIT = 100_000  # steps; a longer axis may grow at most tenfold in one call

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What a call of `Cube.write` did, counted by valid time."""

    snapshot: str  # the newest snapshot that holds all of it
    new: int  # written now
    unchanged: int  # there before, from the same file
    conflicting: int  # there before, from another file; the first is kept
    restated: int = 0  # there before, from another file, and replaced by it


@dataclass(frozen=True)
class _Axis:
    """The regular time axis: step i is valid at `start` + i * `cadence`."""

    start: datetime
    cadence: timedelta
    size: int

    def index(self, time: datetime) -> int:
        """The step valid at `time`; below 0 or beyond the size where the axis does not reach.

        Raises:
            ValueError: if `time` falls between two steps.
        """
        index, rest = divmod(time - self.start, self.cadence)
        if rest:
            nearest = self.start + round((time - self.start) / self.cadence) * self.cadence
            raise ValueError(
                f"valid time {time:%Y-%m-%dT%H:%M:%SZ} is not on the time axis, which starts at "
                f"{self.start:%Y-%m-%dT%H:%M:%SZ} with a step of {self.cadence}; "
                f"the nearest step is {nearest:%Y-%m-%dT%H:%M:%SZ}"
            )
        return index

    def seconds(self) -> NDArray[np.int64]:
        """Seconds since 1970 of all steps."""
        step = int(self.cadence.total_seconds())
        return seconds(self.start) + step * np.arange(self.size, dtype=np.int64)

    def reaching(self, first: int, last: int) -> "_Axis":
        """The axis with the steps `first` and `last` in it.

        Raises:
            ValueError: if a time so far away is more likely a wrong date.
        """
        before, after = max(0, -first), max(0, last + 1 - self.size)
        size = before + self.size + after
        if size > AXIS_LIMIT and size > 10 * max(self.size, 1):
            far = self.start + (first if before > after else last) * self.cadence
            raise ValueError(
                f"valid time {far:%Y-%m-%dT%H:%M:%SZ} would stretch the time axis from {self.size} to {size} "
                f"steps of {self.cadence}, which looks like a wrong date; "
                f"the axis starts at {self.start:%Y-%m-%dT%H:%M:%SZ}; "
                "if the date is right, write it to a cube of its own, or, if it is the axis that began with "
                "a wrong one, all to a new cube"
            )
        return _Axis(self.start - before * self.cadence, self.cadence, size)


class Cube:
    """A group of an Icechunk repository, as it was when it was opened or last written through.

    NaN is "not observed" (no radar sees the place, or no frame was written), 0 is "dry". A missing frame
    costs no space. Can be pickled; share it with other processes by spawning, not forking.
    """

    def __init__(self, path: str, snapshot: str, group: str):
        """Use `open` or `open_or_create`."""
        self.path = path
        self.group = group
        self._told_of_products = False
        self._see(Repository.open(path), snapshot)

    def __reduce__(self) -> tuple[type["Cube"], tuple[str, str, str]]:
        """Pickles the place, the snapshot and the group; the copy opens them anew."""
        return Cube, (self.path, self.snapshot, self.group)

    def _see(self, repository: Repository, snapshot: str) -> None:
        """Reads from now on at `snapshot`."""
        self._repository = repository
        self.snapshot = snapshot
        try:
            self._group = zarr.open_group(
                repository.reader(snapshot), path=self.group, mode="r", zarr_format=3
            )
        except FileNotFoundError as error:
            has = ", ".join(groups(repository, snapshot))
            raise ValueError(
                f"{self.path}: an Icechunk repository, but without the group {self.group!r} of a cube "
                f"(its groups of frames: {has or 'none'}); "
                + (
                    f"`metnet ingest group={self.group}` puts frames there"
                    if has
                    else "give the path of a cube that `metnet ingest` made"
                )
            ) from error
        self.grid = read_grid(self._group)
        self.variable = _variable(self._group)
        self._axis = _axis(self._group)
        self._array = _array(self._group, self.variable.name)
        self.scale_factor = _scale_factor(self._array)
        self.__dict__.pop("observed", None)

    @classmethod
    def open(cls, path: str, group: str = RADAR) -> "Cube":
        """The cube at a local folder or URL, at its newest snapshot.

        Raises:
            ValueError: if there is none, saying what is there instead.
        """
        return cls(path, Repository.open(path).snapshot, group)

    @classmethod
    def open_or_create(
        cls,
        path: str,
        grid: Grid,
        variable: Variable,
        start: datetime,
        cadence: timedelta,
        group: str = RADAR,
        scale_factor: float | None = None,
    ) -> "Cube":
        """The cube at `path`; a new one, without frames, where nothing is.

        A new cube's axis begins at `start`; with a `scale_factor` it holds whole multiples of that alone, in
        less room. An existing one keeps its own of both.

        Raises:
            ValueError: if it exists with another grid, variable or cadence, if another group there has
                another grid, if it is no cube, or if the variable's valid range is none of such multiples.
        """
        if not GROUP_NAME.fullmatch(group) or group == STATIC:
            raise ValueError(
                f"group={group!r}: expected lower-case letters, digits and _, beginning with a letter, "
                f"and not {STATIC!r}, where fields without a time lie"
            )
        if cadence <= timedelta(0) or cadence % timedelta(seconds=1):
            raise ValueError(f"cadence={cadence}: expected whole seconds, above 0")
        repository = Repository.open_or_create(path)

        def create(store: Any) -> None:
            root = zarr.open_group(store, mode="a", zarr_format=3)
            if group in root:
                return
            check_place(path, root, grid)
            _create(root.create_group(group), grid, variable, start, cadence, scale_factor)

        repository.commit(f"the group {group} of {variable.name}", create)
        cube = cls(path, repository.snapshot, group)
        _check_same(f"{path}: grid", cube.grid, grid)
        _check_same(f"{path}: variable", cube.variable, variable)
        _check_same(f"{path}: cadence", cube.cadence, cadence)
        return cube

    @property
    def cadence(self) -> timedelta:
        """From one step of the time axis to the next."""
        return self._axis.cadence

    @property
    def products(self) -> list[str]:
        """Each service and product that frames were read from, as they name themselves, the first first."""
        return _products(self._group)

    @property
    def times(self) -> list[datetime]:
        """Every step of the time axis (UTC), with a frame or without."""
        return [self._axis.start + i * self._axis.cadence for i in range(self._axis.size)]

    @cached_property
    def observed(self) -> NDArray[np.bool_]:
        """For every step of the time axis, whether a frame was written."""
        digests = np.asarray(_array(self._group, "source_sha256")[:])
        return np.asarray(digests.any(axis=1))

    @property
    def flags(self) -> NDArray[np.uint8]:
        """For every step of the time axis, its `pipelines.quality.FrameFlag`s; 0 where there is no frame."""
        stored = (np.asarray(_array(self._group, name)[:]) for name in STATISTICS)
        return frame_flags(*stored)

    @property
    def arrivals(self) -> list[datetime | None]:
        """For every step of the time axis, when its frame was written."""
        stored = np.asarray(_array(self._group, "arrival_time")[:])
        return [EPOCH + timedelta(seconds=int(time)) if time else None for time in stored]

    @property
    def decoders(self) -> list[str | None]:
        """For every step of the time axis, the software that read its frame."""
        array = _array(self._group, "decoder")
        names = [None, *str(array.attrs["flag_meanings"]).split()[1:]]
        return [names[int(index)] for index in np.asarray(array[:])]

    def sources(self, first: datetime | None = None, last: datetime | None = None) -> dict[datetime, str]:
        """By valid time, the SHA-256 of the files of the frames within [first, last]; None: without end."""
        start, cadence, size = self._axis.start, self._axis.cadence, self._axis.size
        low = 0 if first is None else max(0, -((start - first) // cadence))
        high = size if last is None else min(size, (last - start) // cadence + 1)
        if low >= high:
            return {}
        stored = np.asarray(_array(self._group, "source_sha256")[low:high])
        there = np.flatnonzero(stored.any(axis=1))
        return {start + (low + int(index)) * cadence: stored[index].tobytes().hex() for index in there}

    def quality(self, time: datetime) -> NDArray[np.uint8]:
        """The `pipelines.quality.CellFlag`s (y, x) of the frame at a time of the axis."""
        return np.asarray(_array(self._group, "quality_flag")[self._axis.index(time)])

    def write(self, frames: Sequence[Frame], message: str = "", restate: bool = False) -> Written:
        """Writes frames at their valid times in one commit; none if all were there before.

        The first frame of a valid time stays, or the last with `restate`. Frames may come in any order,
        before the first step too. What is flagged is written as it is, and its flags beside it.

        Raises:
            ValueError: if a frame has another grid, variable or cadence, or falls between two steps;
                nothing is written then.
        """
        snapshot = self.snapshot
        for frame in frames:
            self.check(frame)
        frames = [frame if frame.flags is not None else judged(frame) for frame in frames]
        counts = {"new": 0, "unchanged": 0, "conflicting": 0, "restated": 0}

        def edit(store: Any) -> None:
            group = zarr.open_group(store, path=self.group, mode="r+", zarr_format=3)
            done, names[:] = _write(group, frames, restate)
            counts.update(done)

        before, names = self.products, list[str]()
        if frames:
            self._repository.commit(message or f"{len(frames)} frames of {self.variable.name}", edit)
            self._see(self._repository, self._repository.snapshot)
        self._tell_of_products(before or names[:1], names, snapshot)
        return Written(self.snapshot, **counts)

    def _tell_of_products(self, before: Sequence[str], written: Sequence[str], snapshot: str) -> None:
        """Says, once, that frames of several products stand beside each other."""
        other = [name for name in dict.fromkeys(written) if name not in before]
        if not other or self._told_of_products:
            return
        self._told_of_products = True
        log.warning(
            "%s: frames of %s stand beside those of %s; where their numbers are not alike, roll back to %s "
            "(metnet rollback) and give each a cube of its own",
            self.path,
            _some(other),
            _some(before),
            snapshot,
        )

    def check(self, frame: Frame) -> None:
        """Refuses a frame that is not of this cube.

        Raises:
            ValueError: if it has another grid, variable or cadence, if its time falls between two steps or
                looks like a wrong date, if it does not say which file it was read from, or if its values are
                not of those that the cube can hold.
        """
        of = f"{self.path}: frame of {frame.valid_time:%Y-%m-%dT%H:%M:%SZ}"
        _check_same(f"{of}: grid", self.grid, frame.grid)
        _check_same(f"{of}: variable", self.variable, frame.variable)
        _check_same(f"{of}: cadence", self.cadence, frame.cadence)
        try:
            digest = bytes.fromhex(frame.sha256)
        except ValueError:
            digest = b""
        if len(digest) != 32 or not any(digest):
            raise ValueError(f"{of}: sha256={frame.sha256!r}, expected 64 hexadecimal digits, not all 0")
        index = self._axis.index(frame.valid_time)
        self._axis.reaching(index, index)
        if self.scale_factor not in (None, frame.scale_factor):
            try:
                packed(frame.values, self.scale_factor)
            except ValueError as error:
                raise ValueError(
                    f"{of}: {error}, and the cube holds only such; write it to a cube of its own"
                ) from error

    def block(
        self, first: datetime, count: int, window: tuple[int, int, int, int] | None = None, step: int = 1
    ) -> NDArray[np.float32]:
        """Fields (count, y, x) at `first`, `first` + `step` * cadence, ... in the variable's units.

        NaN where not observed, and at times outside the axis. `window` is (y0, x0, ny, nx) in cells.

        Raises:
            ValueError: if `first` falls between two steps, or the window reaches outside the grid.
        """
        y0, x0, ny, nx = window or (0, 0, *self.grid.shape)
        if not (0 <= y0 < y0 + ny <= self.grid.y_size and 0 <= x0 < x0 + nx <= self.grid.x_size):
            raise ValueError(
                f"window=[{y0},{x0},{ny},{nx}] ([y0,x0,ny,nx], row 0 north) "
                f"reaches outside the grid of {self.grid.y_size} x {self.grid.x_size} cells"
            )
        if count < 1 or step < 1:
            raise ValueError(f"count={count}, step={step}: expected 1 or more")
        begin = self._axis.index(first)
        block = np.full((count, ny, nx), np.nan, np.float32)
        low = max(0, -(begin // step))  # the first field on the axis: begin + low * step >= 0
        high = min(count, -((begin - self._axis.size) // step))  # and the first behind it
        if low < high:
            times = slice(begin + low * step, begin + (high - 1) * step + 1, step)
            found = np.asarray(self._array[times, y0 : y0 + ny, x0 : x0 + nx])
            if self.scale_factor is None:
                block[low:high] = found
            else:
                unpacked(found, self.scale_factor, block[low:high])
        return block

    def between(self, start: datetime, end: datetime) -> xr.Dataset:
        """The CF dataset of the steps within [start, end], read when it is used."""
        dataset = self._repository.dataset(self.snapshot, self.group)
        naive = slice(start.astimezone(UTC).replace(tzinfo=None), end.astimezone(UTC).replace(tzinfo=None))
        return dataset.sel(time=naive)


def judged(frame: Frame) -> Frame:
    """The frame with the quality flags of its cells."""
    return replace(frame, flags=cell_flags(frame))


def groups(repository: Repository, snapshot: str) -> list[str]:
    """The names of the groups of frames, each to be opened as a `Cube`; none of an empty repository."""
    try:
        root = zarr.open_group(repository.reader(snapshot), mode="r", zarr_format=3)
    except FileNotFoundError:
        return []  # an ingest has just made the repository, or was stopped then
    return sorted(name for name, group in root.groups() if "source_sha256" in group)


def grid_from_path(path: str) -> Grid:
    """The grid of the cube at a path, or the one that a YAML file describes.

    Raises:
        ValueError: if it is neither.
    """
    if "://" not in path and not Path(path).is_dir():
        return from_path(path)
    repository = Repository.open(path)
    root = zarr.open_group(repository.reader(repository.snapshot), mode="r", zarr_format=3)
    for _, group in root.groups():
        return read_grid(group)
    raise ValueError(f"grid={path}: a store without anything on a grid; give that of a cube, or a YAML file")


def check_place(path: str, root: zarr.Group, grid: Grid) -> None:
    """Refuses a new group in a store of forecasts, or beside groups on another grid."""
    if "content" in root.attrs:
        raise ValueError(f"{path}: holds forecasts, not a cube; give another path")
    for name, other in sorted(root.groups(), key=lambda group: group[0]):
        expected = read_grid(other)
        if expected != grid:
            raise ValueError(
                f"{path}: grid is {grid}, but the group {name!r} there has {expected}, and all groups of a "
                f"cube share one grid; put them on it with grid={path}, or give another path"
            )


def _create(
    group: zarr.Group,
    grid: Grid,
    variable: Variable,
    start: datetime,
    cadence: timedelta,
    scale_factor: float | None,
) -> None:
    """An empty cube: coordinates, and arrays without a step."""
    group.update_attributes(provenance(f"{variable.long_name}, observed"))
    write_grid(group, grid)
    axis = {
        "cadence": int(cadence.total_seconds()),
        "start": seconds(start),
    }
    create_array(
        group,
        "time",
        ("time",),
        (0,),
        "i8",
        {"standard_name": "time", "axis": "T", **TIME_UNITS, **axis},
        (TIME_CHUNK,),
    )
    field = {**variable.attributes(), "valid_range": list(variable.valid_range)}
    shape, chunk = (0, *grid.shape), (1, *chunks(grid, SIDE))
    field = located({**field, "ancillary_variables": "quality_flag"})
    dimensions = ("time", "y", "x")
    if scale_factor is None:
        create_array(group, variable.name, dimensions, shape, "f4", field, chunk, ARCHIVED)
    else:
        counted = packed_attributes(scale_factor, field)
        create_array(group, variable.name, dimensions, shape, DTYPE, counted, chunk, COUNTED, NOT_OBSERVED)
    flags = {
        "standard_name": "quality_flag",
        "long_name": "what looks wrong with a value, which stays as it is",
        **flag_attributes(CellFlag),
    }
    create_array(group, "quality_flag", ("time", "y", "x"), shape, "u1", located(flags), chunk, ARCHIVED)
    digest = {"long_name": "SHA-256 of the file that a frame was read from; all 0: no frame"}
    create_array(group, "source_sha256", ("time", "byte"), (0, 32), "u1", digest, (HASH_CHUNK, 32))
    arrival = {"long_name": "when a frame was written", **TIME_UNITS, "missing_value": 0}
    create_array(group, "arrival_time", ("time",), (0,), "i8", arrival, (HASH_CHUNK,))
    decoder = {"long_name": "software that read a frame", "flag_values": [0], "flag_meanings": "none"}
    create_array(group, "decoder", ("time",), (0,), "u1", decoder, (HASH_CHUNK,))
    for name, (dtype, meaning) in STATISTICS.items():
        about = {"long_name": meaning, "units": variable.units if name.endswith("mum") else "1"}
        create_array(group, name, ("time",), (0,), dtype, about, (HASH_CHUNK,))


def _write(group: zarr.Group, frames: Sequence[Frame], restate: bool) -> tuple[dict[str, int], list[str]]:
    """Writes those of the frames whose times are free, or all that differ; how many, and of what products."""
    axis = _axis(group)
    indices = [axis.index(frame.valid_time) for frame in frames]
    first = max(0, min(indices))
    digests = np.asarray(_array(group, "source_sha256")[first : max(0, max(indices) + 1)])
    taken = {first + i: digest.tobytes() for i, digest in enumerate(digests) if digest.any()}
    wanted: dict[int, Frame] = {}
    counts = {"new": 0, "unchanged": 0, "conflicting": 0, "restated": 0}
    for index, frame in zip(indices, frames, strict=True):
        digest = bytes.fromhex(frame.sha256)
        if taken.get(index) == digest:
            counts["unchanged"] += 1
        elif index in taken and not restate:
            counts["conflicting"] += 1
        else:
            counts["restated" if index in taken else "new"] += 1
            wanted[index], taken[index] = frame, digest
    products = [printable(frame.source) for frame in wanted.values()]
    if wanted:
        _name_products(group, products)
        longer = axis.reaching(min(wanted), max(wanted))
        _extend(group, axis, longer)
        before = (axis.start - longer.start) // axis.cadence
        _store(group, {index + before: frame for index, frame in sorted(wanted.items())})
    return counts, products


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return " and ".join(names[:2]) + more


def _name_products(group: zarr.Group, products: Sequence[str]) -> None:
    """Names what frames were read from beside what those before them were, as far as there is room."""
    known = _products(group)
    names = list(dict.fromkeys([*known, *products]))
    if len(names) > MOST_PRODUCTS:
        names = [*[name for name in names if name != OTHERS][: MOST_PRODUCTS - 1], OTHERS]
    if names != known:
        group.update_attributes({"source": "\n".join(names)})


def _products(group: zarr.Group) -> list[str]:
    """Each service and product that frames were read from, the first first; none in cubes of before."""
    return str(group.attrs.get("source", "")).splitlines()


def _store(group: zarr.Group, frames: dict[int, Frame]) -> None:
    """Writes frames at steps that the axis has, and beside them what is known of each."""
    name = next(iter(frames.values())).variable.name
    fields, flags = _array(group, name), _array(group, "quality_flag")
    scale_factor = _scale_factor(fields)
    for index, frame in frames.items():
        fields[index] = frame.values if scale_factor is None else packed(frame.values, scale_factor)
        flags[index] = np.zeros_like(frame.values, np.uint8) if frame.flags is None else frame.flags
    known = [statistics(frame) for frame in frames.values()]
    beside = {
        "source_sha256": [np.frombuffer(bytes.fromhex(frame.sha256), np.uint8) for frame in frames.values()],
        "arrival_time": seconds(datetime.now(UTC)),
        "decoder": _decoder(_array(group, "decoder")),
        **{name: [getattr(each, name) for each in known] for name in STATISTICS},
    }
    span = slice(min(frames), max(frames) + 1)
    inside = [index - span.start for index in frames]
    for name, values in beside.items():
        array = _array(group, name)
        part = np.asarray(array[span])
        part[inside] = values
        array[span] = part


def _decoder(array: "zarr.Array[Any]") -> int:
    """The number of this software among those that wrote here; a new one joins them."""
    names = str(array.attrs["flag_meanings"]).split()
    name = f"metnet-nowcast-{version()}"
    if name not in names:
        names.append(name)
        array.update_attributes({"flag_values": list(range(len(names))), "flag_meanings": " ".join(names)})
    return names.index(name)


def _extend(group: zarr.Group, old: _Axis, new: _Axis) -> None:
    """Makes the time axis longer, to the back and to the front."""
    if new == old:
        return
    before = (old.start - new.start) // old.cadence
    time = _array(group, "time")
    time.resize((new.size,))
    if before:
        time.update_attributes({"start": seconds(new.start)})
    first = 0 if before else old.size
    time[first:] = new.seconds()[first:]
    for name, array in group.arrays():
        dimensions = array.metadata.dimension_names  # type: ignore[union-attr]
        if name == "time" or not dimensions or dimensions[0] != "time":
            continue
        array.resize((new.size, *array.shape[1:]))
        if before and array.chunks[0] == 1:
            sync(_move_chunks(array, before))
        elif before:
            whole = np.asarray(array[:])
            nothing = np.full((before, *whole.shape[1:]), array.fill_value, whole.dtype)
            array[:] = np.concatenate([nothing, whole[: new.size - before]])


async def _move_chunks(array: "zarr.Array[Any]", by: int) -> None:
    """Moves the chunks of an array with one step a chunk `by` steps on, byte for byte."""
    store: Any = array.store
    places = [place async for place in store.session.chunk_coordinates(f"/{array.path}")]
    places.sort(reverse=True)  # the last steps first, so that nothing is written over before it was read

    def key(time: int, y: int, x: int) -> str:
        return f"{array.path}/{array.metadata.encode_chunk_key((time, y, x))}"

    for first in range(0, len(places), MOVED_AT_ONCE):
        some = places[first : first + MOVED_AT_ONCE]
        chunks = await gather(*(store.get(key(*place), default_buffer_prototype()) for place in some))
        moved = [key(time + by, y, x) for time, y, x in some]
        await gather(*(store.set(*pair) for pair in zip(moved, chunks, strict=True)))
    kept = {(time + by, y, x) for time, y, x in places}
    await gather(*(store.delete(key(*place)) for place in places if place not in kept))


def _axis(group: zarr.Group) -> _Axis:
    time = _array(group, "time")
    start = EPOCH + timedelta(seconds=int(time.attrs["start"]))  # type: ignore[arg-type]
    cadence = timedelta(seconds=int(time.attrs["cadence"]))  # type: ignore[arg-type]
    return _Axis(start, cadence, int(time.shape[0]))


def _variable(group: zarr.Group) -> Variable:
    """The quantity of the group's fields."""
    for name, array in group.arrays():
        at = plain_attributes(array.attrs)
        if array.metadata.dimension_names == ("time", "y", "x") and "valid_range" in at:  # type: ignore[union-attr]
            return described(name, at)
    raise ValueError(f"group {group.path!r} has no array over (time, y, x), so it is no cube")


def _scale_factor(array: "zarr.Array[Any]") -> float | None:
    """Of an array of whole numbers, what they are multiplied with; None of one that holds the values."""
    factor: Any = array.attrs.get("scale_factor")
    return None if factor is None else float(factor)


def _array(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{group.path}/{name} is a group: expected an array")
    return array


def _check_same(what: str, expected: object, got: object) -> None:
    if expected == got:
        return
    if isinstance(expected, Variable) and isinstance(got, Variable):
        expected, got = _told_apart(expected, got)
    raise ValueError(f"{what} is {got}, but the cube has {expected}; write it to a cube of its own")


def _told_apart(one: Variable, other: Variable) -> tuple[str, str]:
    """Two quantities, each by its name and, if that is the same, by what else sets it apart."""
    names = [field.name for field in fields(Variable)]
    unlike = [name for name in names if getattr(one, name) != getattr(other, name)]
    shown = ["units"] if "name" in unlike else unlike

    def told(variable: Variable) -> str:
        return f"{variable.name} ({', '.join(f'{name} {getattr(variable, name)}' for name in shown)})"

    return told(one), told(other)
