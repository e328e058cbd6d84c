"""`python -m benchmarks.samples`: how many rainy crops a second, beside what others would read them with.

Crops of 13 frames x 256 x 256 cells of whole MRMS frames, at least a fifth wet and at most 1 % not observed,
drawn by the index of where it rains. Ours are read from the sample store of the cube; the others from the
cube, from a plain Zarr store in the layout that suits crops best, and from a memory map of the float32
values. All in one process, in turns, with the files in the page cache, and only after all were found to read
the same values; then each by two processes at once, in turns, which shows how many there are at the load of
the moment. Last, whole samples as training gets them.
"""

import argparse
import importlib.util
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from benchmarks.harness import machine
from pipelines.beside import Beside
from pipelines.cube import Cube
from pipelines.drop_out import DropOut
from pipelines.ingest import ingest
from pipelines.sample_store import SampleStore, stored
from pipelines.samples import Samples, Span
from pipelines.sources.mrms import Mrms

ROOT = Path(__file__).parent.parent
START = datetime(2019, 6, 10, tzinfo=UTC)  # of the real files
FRAMES, SIDE = 13, 256
WET, MISSING = 0.2, 0.01  # shares of a crop: more is wet, less is not observed
BEST = (12, 128, 128)  # chunks of the plain store, of int16
SPAN = Span(7, (1, 2, 3, 4, 5, 6))
TURNS = 4  # of the two processes, for each reader
GOAL, AIM, SPACE = 300, 700, 1.1  # samples/s on two cores, and MB a frame of cube and store together
Values = NDArray[np.float32]
Crop = tuple[int, int, int]  # step, row and column of the first cell
Read = Callable[[Crop], Values]


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    name: str
    megabytes: float  # on disk, a frame
    wall: float  # s a crop, the median
    cpu: float  # s a crop, the mean
    both: float  # crops/s of two processes together

    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        return (
            self.name,
            f"{self.megabytes:.2f}",
            f"{1e3 * self.wall:.2f}",
            f"{1e3 * self.cpu:.2f}",
            f"{self.rate:.0f}",
            f"{self.both:.0f}",
        )

    @property
    def rate(self) -> float:
        """Crops/s of two cores that nobody else uses, from the CPU time of one crop."""
        return 2 / self.cpu


HEADS = (
    "read by",
    "MB a frame",
    "ms a crop",
    "CPU ms a crop",
    "crops/s of two free cores",
    "of two processes here",
)


def prepared(place: Path, data: Path, count: int) -> None:
    """The cube, its store, the plain store and the memory map, those of them that are not there yet."""
    if not (place / "cube").exists():
        ingest(Mrms(str(data)), str(place / "cube"), end=START + (count - 1) * timedelta(minutes=2))
    cube = Cube.open(str(place / "cube"))
    stored(cube, SIDE)
    if not (place / "values.f4").exists():
        flat = np.memmap(place / "values.f4", np.float32, "w+", shape=(len(cube.times), *cube.grid.shape))
        for step, at in enumerate(cube.times):
            flat[step] = cube.block(at, 1)[0]
        flat.flush()
    if not (place / "plain.zarr").exists():
        field = cube.between(cube.times[0], cube.times[-1])[[cube.variable.name]].drop_vars(["lat", "lon"])
        packed = {
            "dtype": "int16",
            "scale_factor": 0.1,
            "_FillValue": -1,
            "chunks": tuple(
                min(best, size) for best, size in zip(BEST, field["rainfall_rate"].shape, strict=True)
            ),
        }
        field.chunk(time=12, y=512, x=-1).drop_encoding().to_zarr(
            place / "plain.zarr", encoding={cube.variable.name: packed}, consolidated=False
        )


def readers(place: Path) -> dict[str, Read]:
    """The ways to read a crop; of a crop its values, in mm/h, NaN where not observed."""
    cube = Cube.open(str(place / "cube"))
    store, times = stored(cube), cube.times
    flat = np.memmap(place / "values.f4", np.float32, "r", shape=(len(times), *cube.grid.shape))
    arrays = {
        "xarray .isel().values, our cube": cube.between(times[0], times[-1])["rainfall_rate"],
        "xarray .isel().values, int16 chunks of 12 x 128 x 128": xr.open_zarr(
            place / "plain.zarr", consolidated=False, chunks=None
        )["rainfall_rate"],
    }

    def block(source: Cube | SampleStore) -> Read:
        return lambda crop: source.block(times[crop[0]], FRAMES, (*crop[1:], SIDE, SIDE))

    def isel(array: xr.DataArray) -> Read:
        return lambda crop: np.asarray(array.isel(**slices(crop)).values, np.float32)

    reads = {"SampleStore.block": block(store), "Cube.block": block(cube)}
    reads |= {name: isel(array) for name, array in arrays.items()}
    if importlib.util.find_spec("xbatcher"):
        import xbatcher

        array = arrays["xarray .isel().values, our cube"]
        sizes = {"time": FRAMES, "y": SIDE, "x": SIDE}

        def of_its_own(crop: Crop) -> Values:
            part = array.isel(**slices(crop))
            return np.asarray(xbatcher.BatchGenerator(part, sizes, preload_batch=False)[0].values, np.float32)

        reads["xbatcher, our cube"] = of_its_own
    reads["np.memmap of float32"] = lambda crop: np.array(flat[tuple(slices(crop).values())])
    return reads


def slices(crop: Crop) -> dict[str, slice]:
    """Of a crop, along each dimension."""
    return {
        name: slice(first, first + size)
        for name, first, size in zip(("time", "y", "x"), crop, (FRAMES, SIDE, SIDE), strict=True)
    }


def rainy(place: Path, count: int) -> list[Crop]:
    """Crops where it rains, drawn as training draws them."""
    store = stored(Cube.open(str(place / "cube")))
    index, random = store.rain_index(SIDE), np.random.default_rng(0)
    crops: list[Crop] = []
    while len(crops) < count:
        crop = index.draw(random)
        if crop[0] + FRAMES > len(store.times):
            continue
        values = store.block(store.times[crop[0]], FRAMES, (*crop[1:], SIDE, SIDE))
        if (values > 0).mean() > WET and np.isnan(values).mean() < MISSING:
            crops.append(crop)
    return crops


def check_same(reads: dict[str, Read], crops: Sequence[Crop]) -> None:
    """Looks whether all read the same; to the last bit where nothing is packed with a factor.

    Raises:
        ValueError: naming the reader that does not.
    """
    for crop in crops:
        expected = reads["np.memmap of float32"](crop)
        for name, read in reads.items():
            tolerance = 1e-4 if "int16" in name else 0.0
            if not np.allclose(read(crop), expected, rtol=0, atol=tolerance, equal_nan=True):
                raise ValueError(f"{name} reads other values at {crop}")


def timed(reads: dict[str, Read], crops: Sequence[Crop]) -> dict[str, tuple[float, float]]:
    """Seconds a crop for each reader, in turns: wall (median) and CPU (mean)."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in reads}
    for crop in crops:
        for name, read in reads.items():
            wall, cpu = time.perf_counter(), time.process_time()
            read(crop)
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (statistics.median(wall for wall, _ in each), statistics.mean(cpu for _, cpu in each))
        for name, each in taken.items()
    }


@cache
def opened(place: Path) -> dict[str, Read]:
    """The readers of this process."""
    return readers(place)


def rates(place: Path, names: Sequence[str], crops: Sequence[Crop], seconds: float) -> dict[str, float]:
    """Crops/s of two processes together, for each reader the best of some turns: load only takes away."""
    best = dict.fromkeys(names, 0.0)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for _ in range(TURNS):
            for name in names:
                both = [pool.submit(rate, place, name, crops[n::2], seconds / TURNS) for n in (0, 1)]
                best[name] = max(best[name], sum(part.result() for part in both))
    return best


def rate(place: Path, name: str, crops: Sequence[Crop], seconds: float) -> float:
    """Crops/s of this process, for so long."""
    read = opened(place)[name]
    read(crops[0])
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        read(crops[done % len(crops)])
        done += 1
    return done / (time.perf_counter() - begin)


def whole_samples(place: Path, count: int) -> list[tuple[str, float]]:
    """CPU seconds of a sample as training gets it, by what is asked for."""
    store = stored(Cube.open(str(place / "cube")))
    inits = np.arange(SPAN.frames - 1, len(store.times) - SPAN.leads[-1])
    asked = {
        "past and target": Samples(store, inits, SPAN, SIDE, beside=Beside(motion=False)),
        "and turned, with drop-out": Samples(
            store,
            inits,
            SPAN,
            SIDE,
            augment=True,
            beside=Beside(motion=False),
            drop_out=DropOut(0.1, 0.1, 0.1),
        ),
        "and with the motion of the rain": Samples(
            store, inits, SPAN, SIDE, augment=True, drop_out=DropOut(0.1, 0.1, 0.1)
        ),
    }
    taken = []
    for name, samples in asked.items():
        samples[count]
        begin = time.process_time()
        for number in range(count):
            samples[number]
        taken.append((name, (time.process_time() - begin) / count))
    return taken


def size(path: Path) -> int:
    """Bytes of all files."""
    return sum(
        file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()
    )


def main() -> int:
    """Prints the tables; 0 also where there are no real files to read, 1 if the goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samples", description=__doc__)
    parser.add_argument("--crops", type=int, default=60)
    parser.add_argument("--frames", type=int, default=23, help="how many of the real frames")
    parser.add_argument("--seconds", type=float, default=6.0, help="of two processes, for each reader")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "mrms")
    parser.add_argument(
        "--place", type=Path, help="folder that keeps cube and copies (4 GB); else a temporary one"
    )
    asked = parser.parse_args()
    if not asked.data.is_dir():
        print(f"skipped: no real MRMS files at {asked.data}; give their folder with --data")
        return 0
    if not importlib.util.find_spec("xbatcher"):
        print("xbatcher is not installed, and not raced: pip install xbatcher")
    place = asked.place or Path(tempfile.mkdtemp())
    place.mkdir(parents=True, exist_ok=True)
    try:
        return raced(place, asked)
    finally:
        if asked.place is None:
            shutil.rmtree(place)


def raced(place: Path, asked: argparse.Namespace) -> int:
    """Runs and prints all; whether the goals are met."""
    prepared(place, asked.data, asked.frames)
    crops = rainy(place, asked.crops)
    reads = readers(place)
    check_same(reads, crops[:5])
    single = timed(reads, crops)
    count = len(Cube.open(str(place / "cube")).times)
    spaces = {"SampleStore": "cube.samples", "np.memmap": "values.f4", "int16": "plain.zarr"}
    together = rates(place, list(reads), crops, asked.seconds)
    outcomes = []
    for name in reads:
        folder = next((folder for key, folder in spaces.items() if key in name), "cube")
        space = size(place / folder) / count / 1e6
        outcomes.append(Outcome(name, space, *single[name], together[name]))
    told = sum(outcome.megabytes for outcome in outcomes[:2])
    print(machine())
    print(f"{len(crops)} crops of {FRAMES} x {SIDE} x {SIDE} cells from {count} whole MRMS frames\n")
    for line in (HEADS, ("---",) * len(HEADS), *(outcome.cells() for outcome in outcomes)):
        print("| " + " | ".join(line) + " |")
    print(f"\nthe store and the cube it was made from together: {told:.2f} MB a frame\n")
    for name, seconds in whole_samples(place, 40):
        print(f"a sample of {SPAN.frames} + {len(SPAN.leads)} frames, {name}: {1e3 * seconds:.1f} ms of CPU")
    ours = outcomes[0]
    reached = "aim" if ours.rate >= AIM else "goal" if ours.rate >= GOAL else "neither"
    fits = "within" if told <= SPACE else "above"
    print(f"\n{ours.rate:.0f} crops/s: {reached} of {GOAL} or {AIM}; {told:.2f} MB a frame: {fits} {SPACE}")
    return 0 if ours.rate >= GOAL and told <= SPACE else 1


if __name__ == "__main__":
    sys.exit(main())
