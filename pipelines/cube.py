"""`Cube`: frames on a regular time axis, as a CF-1.11 dataset in an Icechunk repository."""

from asyncio import gather
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.buffer import default_buffer_prototype
from zarr.core.sync import sync

from pipelines.cf import Variable
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
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.repository import Repository, create_array

GROUP = "radar"
TIME_CHUNK = 16384  # steps of the time coordinate that lie together: 57 days of 5 minutes
HASH_CHUNK = 1024  # steps of provenance that a commit rewrites
SIDE = 512  # cells of a chunk of a field
MOVED_AT_ONCE = 128  # chunks in memory while the time axis grows to the front
AXIS_LIMIT = 100_000  # steps; a longer axis may grow at most tenfold in one call


@dataclass(frozen=True)
class Written:
    """What a call of `Cube.write` did, counted by valid time."""

    snapshot: str  # the newest snapshot that holds all of it
    new: int  # written now
    unchanged: int  # there before, from the same file
    conflicting: int  # there before, from another file; the first is kept


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
                "if the date is right, write it to a cube of its own"
            )
        return _Axis(self.start - before * self.cadence, self.cadence, size)


class Cube:
    """The group "radar" of an Icechunk repository, as it was when it was opened or last written through.

    NaN is "not observed" (no radar sees the place, or no frame was written), 0 is "dry". A missing frame
    costs no space. Can be pickled; share it with other processes by spawning, not forking.
    """

    def __init__(self, path: str, snapshot: str):
        """Use `open` or `open_or_create`."""
        self.path = path
        self._see(Repository.open(path), snapshot)

    def __reduce__(self) -> tuple[type["Cube"], tuple[str, str]]:
        """Pickles the place and the snapshot; the copy opens them anew."""
        return Cube, (self.path, self.snapshot)

    def _see(self, repository: Repository, snapshot: str) -> None:
        """Reads from now on at `snapshot`."""
        self._repository = repository
        self.snapshot = snapshot
        try:
            self._group = zarr.open_group(repository.reader(snapshot), path=GROUP, mode="r", zarr_format=3)
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.path}: an Icechunk repository, but without the group {GROUP!r}, so not a cube; "
                "give the path of a cube that `metnet ingest` made"
            ) from error
        self.grid = read_grid(self._group)
        self.variable = _variable(self._group)
        self._axis = _axis(self._group)
        self._array = _array(self._group, self.variable.name)
        self.__dict__.pop("observed", None)

    @classmethod
    def open(cls, path: str) -> "Cube":
        """The cube at a local folder or URL, at its newest snapshot.

        Raises:
            ValueError: if there is none, saying what is there instead.
        """
        return cls(path, Repository.open(path).snapshot)

    @classmethod
    def open_or_create(
        cls, path: str, grid: Grid, variable: Variable, start: datetime, cadence: timedelta
    ) -> "Cube":
        """The cube at `path`; a new one, without frames, where nothing is.

        `start` is the first time of a new cube's axis; an existing cube only needs it on its axis.

        Raises:
            ValueError: if it exists with another grid, variable or cadence, or is no cube.
        """
        if cadence <= timedelta(0) or cadence % timedelta(seconds=1):
            raise ValueError(f"cadence={cadence}: expected whole seconds, above 0")
        repository = Repository.open_or_create(path)

        def create(store: Any) -> None:
            root = zarr.open_group(store, mode="a", zarr_format=3)
            if GROUP in root:
                return
            if next(iter(root.group_keys()), None) or "content" in root.attrs:
                raise ValueError(f"{path}: holds forecasts, not a cube; give another path")
            _create(root.create_group(GROUP), grid, variable, start, cadence)

        repository.commit(f"a cube of {variable.name}", create)
        cube = cls(path, repository.snapshot)
        _check_same(f"{path}: grid", cube.grid, grid)
        _check_same(f"{path}: variable", cube.variable, variable)
        _check_same(f"{path}: cadence", cube.cadence, cadence)
        cube._axis.index(start)
        return cube

    @property
    def cadence(self) -> timedelta:
        """From one step of the time axis to the next."""
        return self._axis.cadence

    @property
    def times(self) -> list[datetime]:
        """Every step of the time axis (UTC), with a frame or without."""
        return [self._axis.start + i * self._axis.cadence for i in range(self._axis.size)]

    @cached_property
    def observed(self) -> NDArray[np.bool_]:
        """For every step of the time axis, whether a frame was written."""
        digests = np.asarray(_array(self._group, "source_sha256")[:])
        return np.asarray(digests.any(axis=1))

    def write(self, frames: Sequence[Frame], message: str = "") -> Written:
        """Writes frames at their valid times in one commit; none if all were there before.

        The first frame of a valid time stays. Frames may come in any order, before the first step too.

        Raises:
            ValueError: if a frame has another grid, variable or cadence, or falls between two steps;
                nothing is written then.
        """
        for frame in frames:
            self._check(frame)
        counts = {"new": 0, "unchanged": 0, "conflicting": 0}

        def edit(store: Any) -> None:
            counts.update(_write(zarr.open_group(store, path=GROUP, mode="r+", zarr_format=3), frames))

        if frames:
            self._repository.commit(message or f"{len(frames)} frames of {self.variable.name}", edit)
            self._see(self._repository, self._repository.snapshot)
        return Written(self.snapshot, **counts)

    def _check(self, frame: Frame) -> None:
        """Refuses a frame that is not of this cube."""
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
            block[low:high] = self._array[times, y0 : y0 + ny, x0 : x0 + nx]
        return block

    def between(self, start: datetime, end: datetime) -> xr.Dataset:
        """The CF dataset of the steps within [start, end], read when it is used."""
        dataset = self._repository.dataset(self.snapshot, GROUP)
        naive = slice(start.astimezone(UTC).replace(tzinfo=None), end.astimezone(UTC).replace(tzinfo=None))
        return dataset.sel(time=naive)


def _create(group: zarr.Group, grid: Grid, variable: Variable, start: datetime, cadence: timedelta) -> None:
    """An empty cube: coordinates, and arrays without a step."""
    group.update_attributes({**provenance(f"{variable.long_name}, observed"), "source": "weather radar"})
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
    rate = located({**variable.attributes(), "valid_range": list(variable.valid_range)})
    create_array(
        group, variable.name, ("time", "y", "x"), (0, *grid.shape), "f4", rate, (1, *chunks(grid, SIDE))
    )
    digest = {"long_name": "SHA-256 of the file that a frame was read from; all 0: no frame"}
    create_array(group, "source_sha256", ("time", "byte"), (0, 32), "u1", digest, (HASH_CHUNK, 32))
    arrival = {"long_name": "when a frame was written", **TIME_UNITS, "missing_value": 0}
    create_array(group, "arrival_time", ("time",), (0,), "i8", arrival, (HASH_CHUNK,))


def _write(group: zarr.Group, frames: Sequence[Frame]) -> dict[str, int]:
    """Writes those of the frames whose times are free, and counts them all."""
    axis = _axis(group)
    indices = [axis.index(frame.valid_time) for frame in frames]
    first = max(0, min(indices))
    digests = np.asarray(_array(group, "source_sha256")[first : max(0, max(indices) + 1)])
    taken = {first + i: digest.tobytes() for i, digest in enumerate(digests) if digest.any()}
    new: dict[int, Frame] = {}
    unchanged = conflicting = 0
    for index, frame in zip(indices, frames, strict=True):
        digest = bytes.fromhex(frame.sha256)
        if index not in taken:
            new[index], taken[index] = frame, digest
        elif taken[index] == digest:
            unchanged += 1
        else:
            conflicting += 1
    if new:
        longer = axis.reaching(min(new), max(new))
        _extend(group, axis, longer)
        before = (axis.start - longer.start) // axis.cadence
        _store(group, {index + before: frame for index, frame in sorted(new.items())})
    return {"new": len(new), "unchanged": unchanged, "conflicting": conflicting}


def _store(group: zarr.Group, frames: dict[int, Frame]) -> None:
    """Writes frames at steps that the axis has."""
    name = next(iter(frames.values())).variable.name
    array = _array(group, name)
    for index, frame in frames.items():
        array[index] = frame.values
    span = slice(min(frames), max(frames) + 1)
    inside = [index - span.start for index in frames]
    digests, arrivals = _array(group, "source_sha256"), _array(group, "arrival_time")
    digest, arrival = np.asarray(digests[span]), np.asarray(arrivals[span])
    digest[inside] = [np.frombuffer(bytes.fromhex(frame.sha256), np.uint8) for frame in frames.values()]
    arrival[inside] = seconds(datetime.now(UTC))
    digests[span], arrivals[span] = digest, arrival


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
            array[:] = np.concatenate([np.zeros_like(whole[:before]), whole[: new.size - before]])


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
        if array.metadata.dimension_names == ("time", "y", "x"):  # type: ignore[union-attr]
            at: dict[str, Any] = dict(array.attrs)
            low, high = at["valid_range"]
            return Variable(name, at["long_name"], at["units"], (low, high), at.get("standard_name"))
    raise ValueError(f"group {group.path!r} has no array over (time, y, x), so it is no cube")


def _array(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{group.path}/{name} is a group: expected an array")
    return array


def _check_same(what: str, expected: object, got: object) -> None:
    if expected != got:
        raise ValueError(f"{what} is {got}, but the cube has {expected}; write it to a cube of its own")
