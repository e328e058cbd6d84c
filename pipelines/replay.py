"""`replay`: stored files played into a folder or bucket as if they came live, with the faults of feeds."""

import logging
import math
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Protocol
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import GCSStore, ObjectStore

from pipelines.decode import Decoder
from pipelines.feeds.places import is_safe, refusal, s3_store
from pipelines.feeds.web import Clock, SystemClock
from pipelines.frame import parse_interval
from pipelines.progress import track
from pipelines.sources.source import RemoteFile, Source, unread

log = logging.getLogger(__name__)

ALONE = 300.0  # s, the step where one file has no other to be measured against


@dataclass(frozen=True)
class Play:
    """One arrival: when, counted in seconds of the feed's own time, which file, and how much of it."""

    at: float
    path: Path
    whole: bool = True  # False: only its first half


@dataclass(frozen=True)
class Faults:
    """What goes wrong with a feed. Times are of the feed: they pass `speed` times as fast."""

    jitter: float = 0.0  # s, the longest random delay of a file
    gaps: float = 0.0  # share of the files that never come
    late: float = 0.0  # share that comes some steps later, and so out of order
    late_steps: int = 6  # the most steps of these
    duplicates: float = 0.0  # share that comes twice
    broken: float = 0.0  # share that first comes cut in half, and whole one step later
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuses what no feed has.

        Raises:
            ValueError: for a share outside 0..1, a jitter below 0 s, less than one step, or a seed below 0.
        """
        for name in ("gaps", "late", "duplicates", "broken"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share from 0 to 1")
        if not 0 <= self.jitter < math.inf:
            raise ValueError(f"jitter={self.jitter}: expected a time from 0 s")
        if self.late_steps < 1 or self.seed < 0:
            raise ValueError(
                f"late_steps={self.late_steps}, seed={self.seed}: expected at least 1 step and a seed from 0"
            )


@dataclass(frozen=True)
class Replayed:
    """What a replay did."""

    to: str
    files: int  # that arrived, each at least once
    lost: int
    arrivals: int
    first: datetime
    last: datetime

    def __str__(self) -> str:
        """What a person wants to know of it."""
        return (
            f"{self.to}: {self.files} files in {self.arrivals} arrivals, {self.lost} lost\n"
            f"frames from {self.first:%Y-%m-%dT%H:%M:%SZ} to {self.last:%Y-%m-%dT%H:%M:%SZ}"
        )


class Target(Protocol):
    """Where a replay puts its files."""

    def put(self, name: str, content: bytes) -> None:
        """Puts a file there in one moment: whole, or not at all.

        Raises:
            OSError: if it cannot be written.
            ValueError: if the place refuses it.
        """
        ...


def replay(
    source: Source,
    to: str,
    speed: float = 1.0,
    jitter: float = 0.0,
    gaps: float = 0.0,
    late: float = 0.0,
    late_steps: int = 6,
    duplicates: float = 0.0,
    broken: float = 0.0,
    seed: int = 1,
    start: str | datetime | None = None,
    end: str | datetime | None = None,
    clock: Clock | None = None,
) -> Replayed:
    """Plays the files of a source within [start, end] into a folder or bucket, as if they came live.

    Files come in the intervals of their valid times, `speed` times as fast, and keep their names and folders;
    speed=0 plays them in the same order without waiting. See `Faults` for the rest. What is not played, as
    its name is not safe, it is a link, or its folder cannot be listed, is told.

    Raises:
        ValueError: if the source has no files then, or makes its frames itself; for a speed or fault that
            cannot be; or if the target overlaps with the source's own folder.
        OSError: if a file cannot be read or written; also ValueError, if the target refuses it.
    """
    faults = Faults(jitter, gaps, late, late_steps, duplicates, broken, seed)
    if not 0 <= speed < math.inf:
        raise ValueError(
            f"speed={speed}: expected 1 for real time, 60 for a minute a second, 0 without waiting"
        )
    root = _root(source, to)
    left = unread(source)
    for told in (*left.passed_over(str(root)), *left.folders.values()):
        log.warning("%s", told)
    with Decoder(source) as decoder:
        first, last = parse_interval(start, end)
        stored = _stored(decoder.files(first, last))
    target, clock = target_at(to), clock or SystemClock()
    planned = schedule(stored, faults)
    plays = list(_played(planned, root, target, speed, clock))
    arrived = {play.path for play in plays}
    return Replayed(
        to=to,
        files=len(arrived),
        lost=len(stored) - len({play.path for play in planned}),
        arrivals=len(plays),
        first=min(stored.values()),
        last=max(stored.values()),
    )


def schedule(files: dict[Path, datetime], faults: Faults) -> list[Play]:
    """All arrivals of files with their valid times, in order; the same for the same seed.

    A file is drawn for by its place among the others, so a fault more does not move the others' faults.
    """
    ordered = sorted(files.items(), key=lambda item: (item[1], item[0]))
    origin = ordered[0][1]
    times = sorted({time for _, time in ordered})
    steps = [(after - before).total_seconds() for before, after in pairwise(times)]
    step = median(steps) if steps else ALONE
    plays: list[Play] = []
    for index, (path, time) in enumerate(ordered):
        at = (time - origin).total_seconds()
        plays.extend(_arrivals(path, at, step, faults, random.Random(f"{faults.seed} {index}")))
    return sorted(plays, key=lambda play: play.at)


def target_at(path: str) -> Target:
    """The target that a local folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX names.

    Raises:
        ValueError: for any other URL.
    """
    url = urlsplit(path)
    if "://" not in path:
        return FolderTarget(Path(path))
    if url.scheme == "s3":
        return BucketTarget(path, s3_store(url.netloc), url.path.strip("/"))
    if url.scheme == "gs":
        return BucketTarget(path, GCSStore(url.netloc), url.path.strip("/"))
    raise ValueError(f"to={path}: expected a local folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")


@dataclass(frozen=True)
class FolderTarget:
    """A local folder, made if it is not there."""

    folder: Path

    def put(self, name: str, content: bytes) -> None:
        """Writes a file aside and moves it into place."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            aside = Path(file.name)
            try:
                file.write(content)
                file.close()
                aside.chmod(0o644)
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class BucketTarget:
    """A bucket, with the credentials of the environment."""

    url: str
    store: ObjectStore
    prefix: str

    def put(self, name: str, content: bytes) -> None:
        """Puts a file by one request, so that a feed sees it whole."""
        try:
            obstore.put(self.store, f"{self.prefix}/{name}".lstrip("/"), content, use_multipart=False)
        except (BaseError, OSError) as error:
            raise refusal(self.url, error) from None


def _stored(files: list[RemoteFile]) -> dict[Path, datetime]:
    """The files with the (first) valid time of each."""
    stored: dict[Path, datetime] = {}
    for file in files:
        path = Path(file.url)
        if file.valid_time is not None and path.is_file():
            stored[path] = min(stored.get(path, file.valid_time), file.valid_time)
    if not stored:
        raise ValueError(
            "the source has no stored files of known time within start and end; leave them out, or choose "
            "others"
        )
    return stored


def _root(source: Source, to: str) -> Path:
    """The folder of a source, if a replay may go from there to `to`."""
    path: str | None = getattr(source, "path", None)
    if path is None:
        raise ValueError(
            "source: this one makes its frames itself; choose one that lies in files, such as source=mrms "
            "source.path=FOLDER"
        )
    if "://" not in to:
        root, place = Path(path).resolve(), Path(to).resolve()
        if place.is_relative_to(root) or root.is_relative_to(place):
            raise ValueError(f"to={to}: overlaps with source.path={path}; give a folder apart from it")
    return Path(path)


def _arrivals(path: Path, at: float, step: float, faults: Faults, draw: random.Random) -> Iterator[Play]:
    """When one file of a time comes: never, once, or more often."""
    is_lost, is_late, is_double, is_broken = (
        draw.random() < share for share in (faults.gaps, faults.late, faults.duplicates, faults.broken)
    )
    delay, steps, again = draw.uniform(0, faults.jitter), draw.randint(1, faults.late_steps), draw.random()
    if is_lost:
        return
    at += delay + (steps * step if is_late else 0.0)
    if is_broken:
        yield Play(at, path, whole=False)
        at += step
    yield Play(at, path)
    if is_double:
        yield Play(at + again * step, path)


def _played(plays: list[Play], root: Path, target: Target, speed: float, clock: Clock) -> Iterator[Play]:
    """Puts every file in its moment, until the clock is stopped."""
    began = clock.seconds()
    for play in track(plays, "playing files", total=len(plays)):
        if speed:
            clock.sleep(max(0.0, began + play.at / speed - clock.seconds()))
        if clock.stopped:
            return
        name = play.path.relative_to(root).as_posix()
        if not is_safe(name):
            raise ValueError(f"{play.path}: a name that no feed would take")
        content = play.path.read_bytes()
        target.put(name, content if play.whole else content[: len(content) // 2])
        yield play
