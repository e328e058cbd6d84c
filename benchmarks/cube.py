"""`python -m benchmarks.cube`: how fast a cube is read, beside `numpy.memmap` of the same float32 values.

Two ways of reading, as training and forecasting do: random crops of 13 frames x 256 x 256 cells, and the
whole newest frame. Each through `Cube.block`, through xarray (`Cube.between(...).isel`), from the plain
copies that `metnet export` makes, and from the memory map; for each side of a chunk. All in one process, in
turns, with the files in the page cache, and only after all were found to read the same values.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from pipelines.cube import Cube
from pipelines.export import export
from pipelines.frame import Frame
from pipelines.plain import open_cube
from pipelines.sources.mrms import Mrms

ROOT = Path(__file__).parent.parent
WINDOW = (1200, 3600, 1024, 2048)  # of the 3500 x 7000 cells of MRMS: the middle of the country
SIDES = (128, 256, 512)  # cells
CROP = (13, 256, 256)
Values = NDArray[np.float32]
Region = tuple[int, int, int, int, int, int]  # time, y, x of the first cell; how many of each
Read = Callable[[Region], Values]


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    side: str
    reader: str
    kilobytes: float  # on disk, a frame
    writing: float  # s, a frame
    crop: float  # s, the median
    newest: float  # s, the median

    def cells(self) -> tuple[str, ...]:
        """As the table shows it; rates are of float32 values as they arrive."""
        crop, frame = 4 * np.prod(CROP) / 1e6, 4 * np.prod(WINDOW[2:]) / 1e6
        return (
            self.side,
            self.reader,
            f"{self.kilobytes:.0f}",
            f"{1000 * self.writing:.0f}" if math.isfinite(self.writing) else "",
            f"{1000 * self.crop:.2f}",
            f"{crop / self.crop:.0f}",
            f"{1000 * self.newest:.2f}",
            f"{frame / self.newest:.0f}",
        )


HEADS = (
    "chunk side",
    "read by",
    "kB a frame",
    "ms to write a frame",
    "ms a crop",
    "MB/s",
    "ms a frame",
    "MB/s",
)


def frames(folder: Path, count: int) -> list[Frame]:
    """The window of so many real frames."""
    source = Mrms(str(folder))
    files = list(source.files(None, None))[:count]
    return [source.read(file).window(*WINDOW) for file in files]


def regions(steps: int, crops: int, seed: int = 1) -> list[Region]:
    """Random crops, and the newest frame."""
    rng = np.random.default_rng(seed)
    free = [whole - part + 1 for whole, part in zip((steps, *WINDOW[2:]), CROP, strict=True)]
    places = [tuple(int(rng.integers(size)) for size in free) for _ in range(crops)]
    return [*((*place, *CROP) for place in places), (steps - 1, 0, 0, 1, *WINDOW[2:])]  # type: ignore[misc]


def readers(path: str, folder: Path) -> Iterator[tuple[str, Read]]:
    """The ways to read a cube, and the plain copies of it."""
    cube = Cube.open(path)
    times = cube.times
    dataset = cube.between(times[0], times[-1])[cube.variable.name]

    def block(region: Region) -> Values:
        step, y, x, count, rows, columns = region
        return cube.block(times[step], count, (y, x, rows, columns))

    def isel(region: Region) -> Values:
        t, y, x, *sizes = region
        slices = [slice(first, first + size) for first, size in zip((t, y, x), sizes, strict=True)]
        return np.asarray(dataset.isel(time=slices[0], y=slices[1], x=slices[2]).values, np.float32)

    yield "Cube.block", block
    yield "xarray isel", isel
    for suffix in (".zarr", ".nc"):
        to = str(folder / f"plain{suffix}")
        if not Path(to).exists():
            continue
        plain = open_cube(to)

        def copied(region: Region, plain: object = plain) -> Values:
            step, y, x, count, rows, columns = region
            return plain.block(times[step], count, (y, x, rows, columns))  # type: ignore[attr-defined]

        yield f"PlainCube.block of {suffix}", copied


def mapped(folder: Path, given: list[Frame]) -> Read:
    """The same values in one flat file."""
    path = folder / "values.f4"
    shape = (len(given), *given[0].values.shape)
    flat = np.memmap(path, np.float32, "w+", shape=shape)
    for step, frame in enumerate(given):
        flat[step] = frame.values
    flat.flush()
    flat = np.memmap(path, np.float32, "r", shape=shape)

    def read(region: Region) -> Values:
        t, y, x, count, rows, columns = region
        return np.array(flat[t : t + count, y : y + rows, x : x + columns])

    return read


def timed(reads: dict[str, Read], asked: list[Region]) -> dict[str, tuple[float, float]]:
    """Seconds of a crop and of the newest frame (medians), for each reader, in turns.

    Raises:
        ValueError: if a reader reads other values than the others.
    """
    *crops, newest = asked
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in reads}
    expected = list(reads.values())[-1]
    for name, read in reads.items():
        for region in (crops[0], newest):
            if not np.array_equal(read(region), expected(region), equal_nan=True):
                raise ValueError(f"{name} reads other values in {region}")
    for crop in crops:
        for which, region in ((0, crop), (1, newest)):
            for name, read in reads.items():
                begin = time.perf_counter()
                read(region)
                taken[name][which].append(time.perf_counter() - begin)
    return {name: (statistics.median(one), statistics.median(other)) for name, (one, other) in taken.items()}


def size(folder: Path) -> int:
    """Bytes of all files."""
    files = folder.rglob("*") if folder.is_dir() else [folder]
    return sum(file.stat().st_size for file in files if file.is_file())


def race(given: list[Frame], crops: int, place: Path) -> Iterator[Outcome]:
    """All readers at all sides of a chunk, and the memory map at last."""
    asked = regions(len(given), crops)
    memory = mapped(place, given)
    start = min(frame.valid_time for frame in given)
    cadence = given[0].cadence
    assert cadence is not None
    for side in SIDES:
        path = place / f"cube{side}"
        with patch("pipelines.cube.SIDE", side):
            cube = Cube.open_or_create(
                str(path),
                given[0].grid,
                given[0].variable,
                start,
                cadence,
                scale_factor=given[0].scale_factor,
            )
        empty, begin = size(path), time.perf_counter()
        cube.write(given)
        writing = (time.perf_counter() - begin) / len(given)
        disk = (size(path) - empty) / len(given) / 1e3
        sizes = {}
        if side == SIDES[-1]:
            for suffix in (".zarr", ".nc"):
                begin = time.perf_counter()
                export(str(path), str(place / f"plain{suffix}"))
                taken = (time.perf_counter() - begin) / len(given)
                sizes[suffix] = (size(place / f"plain{suffix}") / len(given) / 1e3, taken)
        reads = {**dict(readers(str(path), place)), "np.memmap": memory}
        for name, (crop, newest) in timed(reads, asked).items():
            if name == "np.memmap":
                if side == SIDES[-1]:
                    whole = 4 * given[0].values.size / 1e3
                    yield Outcome("-", name, whole, math.nan, crop, newest)
                continue
            own = next((sizes[suffix] for suffix in sizes if name.endswith(suffix)), None)
            label = str(side) if own is None else "whole frame" if name.endswith("zarr") else "256"
            yield Outcome(label, name, *(own or (disk, writing)), crop, newest)


def main() -> int:
    """Prints the table; 0 also where there are no real files to read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cube", description=__doc__)
    parser.add_argument("--crops", type=int, default=60, help="how many, and how often the newest frame")
    parser.add_argument("--frames", type=int, default=23, help="how many of the real frames")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    asked = parser.parse_args()
    if not (asked.data / "mrms").is_dir():
        print(f"skipped: no real MRMS files at {asked.data / 'mrms'}; give their folder with --data")
        return 0
    begin = datetime.now(UTC)
    given = frames(asked.data / "mrms", asked.frames)
    wet = float(np.mean([np.nanmean(frame.values > 0) for frame in given]))
    missing = float(np.mean([np.isnan(frame.values).mean() for frame in given]))
    print(
        f"{len(given)} MRMS frames of {WINDOW[2]} x {WINDOW[3]} cells, {100 * wet:.0f} % wet, "
        f"{100 * missing:.0f} % not observed; {asked.crops} crops of {' x '.join(map(str, CROP))}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        outcomes = list(race(given, asked.crops, Path(folder)))
    for line in (HEADS, ("---",) * len(HEADS), *(outcome.cells() for outcome in outcomes)):
        print("| " + " | ".join(line) + " |")
    print(f"\n{(datetime.now(UTC) - begin).total_seconds():.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
