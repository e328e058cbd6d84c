"""`python -m benchmarks.endurance [kills|writers|feeds] [--s3]`: the cube under what must not hurt it.

kills: a writer is killed (SIGKILL) at a random moment of its work, again and again, on one cube. No frame
that it had acknowledged may be lost, none may show half, and the next writer must go on.
writers: eight processes write their own frames to one cube at once. Every acknowledged commit must be in the
cube and in its history, each frame once.
feeds: the frames of a feed come late, twice, out of order and restated. The cube must equal that of the
ordered feed.
--s3: the cubes of kills and writers lie in a bucket of moto's server, which stands in for an object store.
"""

import argparse
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    given = (dict(os.environ), work, *arguments, theirs)
    process = multiprocessing.get_context("forkserver").Process(target=within, args=given)
    process.start()
    theirs.close()
    return process, ours


def within(environment: dict[str, str], work: Callable[..., None], *arguments: object) -> None:
    """Does work in an environment: that of the process which forks is older than ours."""
    os.environ |= environment
    work(*arguments)


def heard(told: Connection) -> list[object]:
    """All that a process told until it ended."""
    every = []
    while True:
        try:
            every.append(told.recv())
        except EOFError:
            return every


@dataclass(frozen=True)
class Killed:
    """What became of the frames of writers that were killed."""

    kills: int
    at_work: int  # kills that met a process that had not ended yet
    acknowledged: int
    lost: int  # acknowledged, and not in the cube
    visible: int  # each once and whole, unless a check failed
    failed: int  # checks that found half a frame, or more frames than were written

    def __str__(self) -> str:
        """The line that is printed."""
        return (
            f"{self.kills} kills ({self.at_work} at work): {self.acknowledged} frames acknowledged, "
            f"{self.lost} lost, {self.visible} visible, each once and whole; {self.failed} checks failed"
        )


def kills(path: str, count: int) -> Killed:
    """Kills writers of the cube at a path; see the top."""
    noise = random.Random(1)
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
        if not known and not is_there(path):
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
    return Killed(count, at_work, acknowledged, lost, shown, failed)


def is_there(path: str) -> bool:
    """Whether there is a cube at a path."""
    try:
        Cube.open(path)
    except ValueError:
        return False
    return True


def writers(path: str, count: int) -> str:
    """Writes from eight processes at once to the cube at a path, `count` commits each; see the top."""
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


def feeds(path: str, count: int) -> str:
    """Writes shuffled feeds to cubes beside the one at a path; see the top."""
    steps, folder = 12, Path(path).parent
    ordered = made(path, SMALL)
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


@contextmanager
def bucket() -> Iterator[str]:
    """The URL of an empty bucket on a server that stands in for S3, until the end of the block."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else it tells of every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_REGION": "us-east-1",
        }
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="endurance")
        yield "s3://endurance"
    finally:
        server.stop()


RUNS = {"kills": (kills, 1000), "writers": (writers, 200), "feeds": (feeds, 1000)}


def main() -> None:
    """Runs what is named, and prints one line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    parser.add_argument("name", nargs="*", choices=[*RUNS, []], help="which; without one: all")
    parser.add_argument("--count", type=int, help="how often; else 1000 kills, 200 commits each, 1000 feeds")
    parser.add_argument("--s3", action="store_true", help="kills and writers on an object store")
    asked = parser.parse_args()
    chosen = asked.name or ([name for name in RUNS if name != "feeds"] if asked.s3 else list(RUNS))
    if asked.s3 and "feeds" in chosen:
        parser.error("--s3: feeds are not run on an object store; expected kills, writers or both")
    multiprocessing.set_forkserver_preload(["pipelines.cube"])
    with bucket() if asked.s3 else tempfile.TemporaryDirectory(prefix="metnet-") as place:
        for name in chosen:
            run, count = RUNS[name]
            found = run(f"{place}/{name}/cube", asked.count or count)
            print(f"{'on S3: ' if asked.s3 else ''}{found}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
