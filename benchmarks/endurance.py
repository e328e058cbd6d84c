"""`python -m benchmarks.endurance [kills|writers|feeds] [--count N]`: the cube under what must not hurt it.

kills: a writer is killed (SIGKILL) at a random moment of its work, again and again, on one cube. No frame
that it had acknowledged may be lost, none may show half, and the next writer must go on.
writers: eight processes write their own frames to one cube at once. Every acknowledged commit must be in the
cube and in its history, each frame once.
feeds: the frames of a feed come late, twice, out of order and restated. The cube must equal that of the
ordered feed.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from pipelines.cf import RAINFALL_RATE
from pipelines.cube import Cube
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.progress import track
from pipelines.repository import Repository

START = datetime(2020, 1, 1, tzinfo=UTC)
CADENCE = timedelta(minutes=5)
GRID = Grid("EPSG:3035", 4_000_000, 1000, 700, 3_000_000, -1000, 600)  # four chunks a frame
SMALL = Grid("EPSG:3035", 4_000_000, 1000, 12, 3_000_000, -1000, 10)
WRITERS = 8
LONGEST = 0.4  # s that a writer lives after its first acknowledged frame


def rain(step: int, grid: Grid, version: int = 0) -> np.ndarray:
    """Rates in tenths of mm/h that no other step or version has, with dry and unobserved cells."""
    noise = np.random.default_rng((step + 10_000, version))
    values = noise.integers(0, 300, grid.shape).astype(np.float32) / 10
    values[noise.random(grid.shape) < 0.4] = 0.0
    values[noise.random(grid.shape) < 0.3] = np.nan
    return values


def frame(step: int, grid: Grid, version: int = 0) -> Frame:
    """The frame of a step of the feed."""
    digest = sha256(f"{step} {version}".encode()).hexdigest()
    time = START + step * CADENCE
    return Frame(RAINFALL_RATE, time, CADENCE, grid, rain(step, grid, version), "noise", digest)


def made(path: str, grid: Grid) -> Cube:
    """The cube at a path, made if it is not there."""
    return Cube.open_or_create(path, grid, RAINFALL_RATE, START, CADENCE)


def write(path: str, grid: Grid, steps: range, told: Connection) -> None:
    """Writes one frame a commit, and tells the step of each when it is acknowledged."""
    cube = made(path, grid)
    for step in steps:
        if cube.write([frame(step, grid)]).new != 1:
            raise RuntimeError(f"step {step} was there before")
        told.send(step)


def check(path: str, grid: Grid, steps: range, told: Connection) -> None:
    """Tells which of the steps are visible; raises if one shows anything but its whole frame."""
    cube = Cube.open(path)
    there = {time for time, seen in zip(cube.times, cube.observed, strict=True) if seen}
    visible = [step for step in steps if START + step * CADENCE in there]
    for step in visible:
        field = cube.block(START + step * CADENCE, 1)[0]
        if not np.array_equal(field, rain(step, grid), equal_nan=True):
            raise RuntimeError(f"step {step} shows another field than was written")
    told.send((visible, len(there)))


def started(work: Callable[..., None], *arguments: object) -> tuple[multiprocessing.Process, Connection]:
    """A process that does this work and tells of it."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(target=work, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours


def heard(told: Connection) -> list[object]:
    """All that a process told until it ended."""
    every = []
    while True:
        try:
            every.append(told.recv())
        except EOFError:
            return every


def kills(folder: Path, count: int) -> str:
    """Kills writers; see the top."""
    path, noise = str(folder / "cube"), random.Random(1)
    acknowledged = lost = shown = failed = 0
    at_work = 0
    for kill in track(range(count), "killing", total=count):
        steps = range(kill * 50, kill * 50 + 50)
        writer, told = started(write, path, GRID, steps)
        first = [told.recv()] if kill % 2 == 0 and told.poll(60) else []
        time.sleep(noise.uniform(0, LONGEST if first else 2 * LONGEST))
        at_work += writer.is_alive()
        os.kill(writer.pid or 0, signal.SIGKILL)
        known = [*first, *heard(told)]
        writer.join()
        if not Path(path).exists():
            continue  # killed before the cube was made
        checker, told = started(check, path, GRID, steps)
        answer = heard(told)
        checker.join()
        failed += not answer
        if answer:
            visible, total = answer[0]  # type: ignore[misc]
            acknowledged, shown = acknowledged + len(known), shown + len(visible)
            lost += len(set(known) - set(visible))
            failed += total != shown
    return (
        f"{count} kills ({at_work} at work): {acknowledged} frames acknowledged, {lost} lost, "
        f"{shown} visible, each once and whole; {failed} checks failed"
    )


def writers(folder: Path, count: int) -> str:
    """Writes from eight processes at once, `count` commits each; see the top."""
    path = str(folder / "cube")
    made(path, SMALL)
    before = len(Repository.open(path).history(10**6))
    start = time.monotonic()
    every = [started(write, path, SMALL, range(first, count * WRITERS, WRITERS)) for first in range(WRITERS)]
    acknowledged = [step for _, told in every for step in heard(told)]
    gone = time.monotonic() - start
    cube = Cube.open(path)
    fields = cube.block(START, count * WRITERS)
    right = sum(
        np.array_equal(fields[step], rain(step, SMALL), equal_nan=True) for step in range(count * WRITERS)
    )
    commits = len(Repository.open(path).history(10**6)) - before
    return (
        f"{WRITERS} writers x {count} commits: {len(acknowledged)} acknowledged "
        f"({len(set(acknowledged))} different), {int(cube.observed.sum())} visible, {right} right, "
        f"{commits} in the history; {len(acknowledged) / gone:.1f} commits/s"
    )


def feeds(folder: Path, count: int) -> str:
    """Writes shuffled feeds; see the top."""
    steps = 12
    ordered = made(str(folder / "ordered"), SMALL)
    for step in range(steps):
        ordered.write([frame(step, SMALL)])
    ordered.write([frame(5, SMALL, 1)], restate=True)
    expected, wrong = _told(ordered), 0
    for seed in track(range(count), "shuffling", total=count):
        noise = random.Random(seed)
        feed = [frame(step, SMALL) for step in range(steps)]
        feed += noise.sample(feed, 4)
        noise.shuffle(feed)
        feed.append(frame(5, SMALL, 1))
        with tempfile.TemporaryDirectory(dir=folder) as place:
            cube = Cube.open_or_create(
                str(Path(place) / "cube"), SMALL, RAINFALL_RATE, feed[0].valid_time, CADENCE
            )
            while feed:
                size = noise.randint(1, 8)
                cube.write(feed[:size], restate=True)
                feed = feed[size:]
            wrong += _told(Cube.open(cube.path)) != expected
    return f"{count} shuffled feeds of {steps} frames: {wrong} cubes differ from the ordered feed's"


def _told(cube: Cube) -> dict[str, bytes]:
    """All of a cube but when it was written."""
    table = cube.between(START - timedelta(days=1), START + timedelta(days=1)).drop_vars("arrival_time")
    return {
        str(name): np.ascontiguousarray(array.values).tobytes() for name, array in table.variables.items()
    }


RUNS = {"kills": (kills, 1000), "writers": (writers, 200), "feeds": (feeds, 1000)}


def main() -> None:
    """Runs what is named, and prints one line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    parser.add_argument("name", nargs="*", choices=[*RUNS, []], help="which; without one: all")
    parser.add_argument("--count", type=int, help="how often; else 1000 kills, 200 commits each, 1000 feeds")
    asked = parser.parse_args()
    multiprocessing.set_forkserver_preload(["pipelines.cube"])
    for name in asked.name or RUNS:
        run, count = RUNS[name]
        with tempfile.TemporaryDirectory(prefix="metnet-") as folder:
            print(run(Path(folder), asked.count or count), flush=True)


if __name__ == "__main__":
    sys.exit(main())
