"""`SampleStore`: the frames of a cube once more, bit for bit, in blocks from which crops are cut fast.

A cube is written frame by frame, so a crop of many frames touches many of its chunks. Here a block holds a
few frames of a small square, as one-byte or two-byte numbers of the values that occur in these frames: a
radar knows few different values. Blocks of one value take no space. A store belongs to one snapshot of a cube
and is never changed: when the cube has grown, another one is made.
"""

import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
import xarray as xr
from filelock import FileLock
from numcodecs import Blosc
from numpy.typing import NDArray

from pipelines import checked
from pipelines.cube import RADAR
from pipelines.observations import Observations
from pipelines.progress import track
from pipelines.rain_index import RainIndex, Windows

FORMAT = 2  # in the name of a store, as are FRAMES and SIDE: one of another layout is not opened
FRAMES, SIDE = 8, 64  # of a block: steps of time, cells along a side
ABOUT, PARTS, TABLE, BLOCKS = "about.json", "parts.npy", "table.npy", "blocks.bin"
MAGIC = b"metnet blocks\n"  # so that the file is never empty, and can be mapped
KEPT = 1  # older stores of a cube that stay when one is made: a training may be at work on one
MOST_VALUES = 2**16  # different ones in FRAMES frames; of more, the values themselves are stored
# A third smaller than LZ4, and 1 ms of CPU slower a rainy crop. Level 5: half the time, and 7 % more room.
CODEC = Blosc(cname="zstd", clevel=8, shuffle=Blosc.SHUFFLE)
Bits = NDArray[np.uint32]  # of float32 values: equal bits are equal values, NaN and -0 too
Window = tuple[int, int, int, int]  # first row, first column, rows, columns
Entry = tuple[int, int, int]  # offset, size and CRC-32C in the file; of a block of one value its number, 0, 0


def stored(
    cube: Observations, crop: int | None = None, folder: str | Path | None = None, group: str = RADAR
) -> "SampleStore":
    """The store of a cube at its snapshot; made where there is none yet, or a damaged one.

    Several processes may ask at once: one makes it, the others wait.

    Args:
        cube: where the frames are.
        crop: side of the samples that will be drawn, for the index of where it rains; None: no index yet.
        folder: where the stores of many cubes lie; None: beside a local cube, or in the user's cache where
            nothing can be written there, or the cube is at a URL.
        group: of the cube that was opened.

    Raises:
        ValueError: if the cube has no frames.
        OSError: if the store cannot be written.
    """
    if not cube.times:
        raise ValueError(f"{cube.path}: a cube without frames; fill it with metnet ingest")
    place = _beside(cube.path) if folder is None else Path(folder) / _digest(cube.path)
    return _stored(cube, crop, place, group)


def _stored(cube: Observations, crop: int | None, place: Path, group: str) -> "SampleStore":
    """The store of a group of a cube in a folder of this cube alone."""
    place.mkdir(parents=True, exist_ok=True)
    facts = FORMAT, FRAMES, SIDE, cube.snapshot, cube.variable.name, cube.cadence, cube.grid
    path = place / f"{group}-{_digest(*facts)}"
    with FileLock(f"{path}.lock"):
        try:
            store = SampleStore(cube, path)
        except (OSError, ValueError):  # there is none, or it is not whole
            _make(cube, path, crop)
            _forget(place, group)
            store = SampleStore(cube, path)
        if crop is not None:
            store.rain_index(crop)
    return store


class SampleStore:
    """`Observations` of a cube, read from a store of it. Can be pickled; share it by spawning."""

    def __init__(self, cube: Observations, folder: Path):
        """Use `stored`."""
        self.cube, self.folder = cube, folder
        self.path, self.snapshot = cube.path, cube.snapshot
        self.grid, self.variable = cube.grid, cube.variable
        size = _told_size(folder / ABOUT)
        self._parts, self._table = checked.load(folder / PARTS), checked.load(folder / TABLE)
        with (folder / BLOCKS).open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._data) != size:
            raise ValueError(f"{folder / BLOCKS}: has {len(self._data)} bytes, expected {size}")
        self._start, self._size = cube.times[0], len(cube.times)

    def __reduce__(self) -> tuple[type["SampleStore"], tuple[Observations, Path]]:
        """Pickles the places; the copy opens them anew."""
        return SampleStore, (self.cube, self.folder)

    @property
    def cadence(self) -> timedelta:
        """From one step of the time axis to the next."""
        return self.cube.cadence

    @property
    def times(self) -> list[datetime]:
        """Every step of the time axis (UTC), with a frame or without."""
        return self.cube.times

    @property
    def observed(self) -> NDArray[np.bool_]:
        """For every step of the time axis, whether there is a frame."""
        return self.cube.observed

    def between(self, start: datetime, end: datetime) -> xr.Dataset:
        """The CF dataset of the steps within [start, end], read from the cube when it is used."""
        return self.cube.between(start, end)

    def block(
        self, first: datetime, count: int, window: Window | None = None, step: int = 1
    ) -> NDArray[np.float32]:
        """Fields (count, y, x) at `first`, `first` + `step` * cadence, ... in the variable's units.

        NaN where not observed, and at times outside the axis. `window` is (y0, x0, ny, nx) in cells.

        Raises:
            ValueError: if `first` falls between two steps, the window reaches outside the grid, or the store
                is damaged.
        """
        window = window or (0, 0, *self.grid.shape)
        self.grid.window(*window)
        if count < 1 or step < 1:
            raise ValueError(f"count={count}, step={step}: expected 1 or more")
        begin, rest = divmod(first - self._start, self.cadence)
        if rest:
            raise ValueError(
                f"valid time {first:%Y-%m-%dT%H:%M:%SZ} is not on the time axis, which starts at "
                f"{self._start:%Y-%m-%dT%H:%M:%SZ} with a step of {self.cadence}"
            )
        steps = begin + step * np.arange(count)
        fields = np.empty((count, *window[2:]), np.float32)
        fields[(steps < 0) | (steps >= self._size)] = np.nan
        parts = steps // FRAMES
        for part in range(max(0, int(parts[0])), min(len(self._parts) - 1, int(parts[-1])) + 1):
            wanted = np.flatnonzero((parts == part) & (steps < self._size))
            if len(wanted):
                to = fields[wanted[0] : wanted[-1] + 1]
                self._read(
                    part, slice(steps[wanted[0]] % FRAMES, steps[wanted[-1]] % FRAMES + 1, step), window, to
                )
        return fields

    def beside(self, cube: Observations, group: str) -> "SampleStore":
        """The store of another group of the same cube, in the same place."""
        return _stored(cube, None, self.folder.parent, group)

    def rain_index(self, crop: int) -> RainIndex:
        """Of all steps, for samples of that side; kept in the store, and worked out where it is not there."""
        windows = Windows.of(self.grid.shape, crop)
        path = self.folder / _index_name(windows)
        every = np.arange(self._size)
        try:
            return RainIndex.load(windows, path, every)
        except (OSError, ValueError):
            pass
        with FileLock(f"{path}.lock"):  # of several trainings one makes it, the others wait
            try:
                return RainIndex.load(windows, path, every)
            except (OSError, ValueError):
                checked.save(path, np.stack([windows.weights(field) for field in self._fields()]))
        return RainIndex.load(windows, path, every)

    def _fields(self) -> Iterator[NDArray[np.float32]]:
        """The field of every step, one after the other."""
        firsts = range(0, self._size, FRAMES)
        for step in track(firsts, "where it rains", total=len(firsts)):
            yield from self.block(self._start + step * self.cadence, min(FRAMES, self._size - step))

    def _read(self, part: int, inside: slice, window: Window, to: NDArray[np.float32]) -> None:
        """Writes a window of some of the frames of a part of the time axis into `to`."""
        y0, x0, ny, nx = window
        *palette, width = self._parts[part].tolist()
        numbers = np.empty(to.shape, f"u{width}") if width < 4 else to.view(np.uint32)
        block = np.empty((FRAMES, SIDE, SIDE), numbers.dtype)
        rows, columns = _touched(y0, ny), _touched(x0, nx)
        entries = self._table[part, rows.start : rows.stop, columns.start : columns.stop].tolist()
        for row, line in zip(rows, entries, strict=True):
            to_rows, from_rows = _common(row, y0, ny)
            for column, entry in zip(columns, line, strict=True):
                to_columns, from_columns = _common(column, x0, nx)
                if entry[1]:
                    CODEC.decode(self._checked(entry), block)
                    numbers[:, to_rows, to_columns] = block[inside, from_rows, from_columns]
                else:
                    numbers[:, to_rows, to_columns] = entry[0]
        if width < 4:
            values = np.frombuffer(self._checked(palette), np.float32)
            np.take(values, numbers, out=to, mode="clip")  # with "raise", numpy would buffer `to`

    def _checked(self, entry: Entry | list[int]) -> bytes:
        """The bytes of an entry.

        Raises:
            ValueError: if they are not what was written.
        """
        offset, size, crc = entry
        found = self._data[offset : offset + size]
        if google_crc32c.value(found) != crc:
            raise ValueError(
                f"{self.folder / BLOCKS}: damaged at byte {offset}: its CRC-32C is not the one that was "
                f"written; delete {self.folder}, and the next training makes it again from {self.path}"
            )
        return found


def _make(cube: Observations, path: Path, crop: int | None) -> None:
    """Makes a store aside in one pass over the frames, and moves it into place whole; wants its lock."""
    for left in path.parent.glob(f".{path.name}.*/"):  # by a making that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    windows = None if crop is None else Windows.of(cube.grid.shape, crop)
    try:
        with (aside / BLOCKS).open("wb") as file:
            file.write(MAGIC)
            size, start, observed = len(cube.times), cube.times[0], cube.observed
            firsts = range(0, size, FRAMES)
            parts, table, weights = [], [], []
            for first in track(firsts, f"{cube.path}: making samples quick to read", total=len(firsts)):
                count = min(FRAMES, size - first)
                fields = np.full((FRAMES, *cube.grid.shape), np.nan, np.float32)
                for step in np.flatnonzero(observed[first : first + count]).tolist():
                    fields[step] = cube.block(start + (first + step) * cube.cadence, 1)[0]
                part, entries = _packed(file, fields.view(np.uint32))
                parts.append(part)
                table.append(entries)
                weights += [] if windows is None else [windows.weights(field) for field in fields[:count]]
            length = file.tell()
        checked.save(aside / PARTS, np.array(parts))
        checked.save(aside / TABLE, np.array(table))
        if windows is not None:
            checked.save(aside / _index_name(windows), np.stack(weights))
        about = {"format": FORMAT, "cube": cube.path, "snapshot": cube.snapshot, "bytes": length}
        (aside / ABOUT).write_text(json.dumps(about, indent=2))
        aside.chmod(0o755)
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _told_size(about: Path) -> int:
    """How many bytes the blocks have.

    Raises:
        ValueError: if it is not told.
    """
    told = json.loads(about.read_bytes())
    size = told.get("bytes") if isinstance(told, dict) else None
    if not isinstance(size, int):
        raise ValueError(f"{about}: does not tell how many bytes {BLOCKS} has")
    return size


def _packed(file: BinaryIO, bits: Bits) -> tuple[list[int], list[list[Entry]]]:
    """Writes the blocks of some frames; where their values lie and how wide a number is, and all blocks."""
    _, y_size, x_size = bits.shape
    blocks = [
        [bits[:, y : y + SIDE, x : x + SIDE] for x in range(0, x_size, SIDE)] for y in range(0, y_size, SIDE)
    ]
    values = np.unique(np.concatenate([_values(block) for line in blocks for block in line]))
    width = 1 if len(values) <= 2**8 else 2 if len(values) <= MOST_VALUES else 4
    palette = _written(file, values.tobytes()) if width < 4 else (0, 0, 0)
    entries = [[_entry(file, block, values, width) for block in line] for line in blocks]
    return [*palette, width], entries


def _entry(file: BinaryIO, block: Bits, values: Bits, width: int) -> Entry:
    """Writes one block, made up to its full size; nothing but the number where it has only one."""
    first = block[:1, :1, :1]
    numbers = np.zeros((FRAMES, SIDE, SIDE), f"u{width}")
    if (block == first).all():
        return (first if width == 4 else np.searchsorted(values, first)).item(), 0, 0
    numbers[:, : block.shape[1], : block.shape[2]] = block if width == 4 else np.searchsorted(values, block)
    return _written(file, CODEC.encode(numbers))


def _values(block: Bits) -> Bits:
    """The different values of a block."""
    first = block[:1, :1, :1]
    return first.ravel() if (block == first).all() else np.unique(block)


def _written(file: BinaryIO, content: bytes) -> Entry:
    offset = file.tell()
    file.write(content)
    return offset, len(content), google_crc32c.value(content)


def _touched(first: int, count: int) -> range:
    """The blocks along an axis that hold any of so many cells."""
    return range(first // SIDE, (first + count - 1) // SIDE + 1)


def _common(block: int, first: int, count: int) -> tuple[slice, slice]:
    """The cells along an axis that a block shares with a window: counted in the window, and in the block."""
    low, high = max(first, block * SIDE), min(first + count, (block + 1) * SIDE)
    return slice(low - first, high - first), slice(low - block * SIDE, high - block * SIDE)


def _index_name(windows: Windows) -> str:
    rows, columns = windows.size
    return f"rain_{rows}x{columns}.npy"


def _beside(path: str) -> Path:
    """Where the stores of a cube lie: beside it, or else in the user's cache."""
    if "://" not in path:
        cube = Path(path).resolve()
        if os.access(cube.parent, os.W_OK):
            return cube.with_name(f"{cube.name}.samples")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "metnet" / "samples" / _digest(path)


def _digest(*facts: object) -> str:
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:16]


def _forget(place: Path, group: str) -> None:
    """Removes the stores of a group but the newest ones."""
    stores = sorted(place.glob(f"{group}-*/"), key=lambda store: store.stat().st_mtime, reverse=True)
    for store in stores[1 + KEPT :]:
        shutil.rmtree(store, ignore_errors=True)
        Path(f"{store}.lock").unlink(missing_ok=True)
