"""`ingest`: files of a source -> decode -> window -> regrid -> cube; it continues where it stopped."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

from pipelines.cube import Cube, Written
from pipelines.decode import Decoder
from pipelines.frame import Frame, parse_time
from pipelines.grid import Grid
from pipelines.progress import track
from pipelines.regrid import regrid
from pipelines.sources.source import RemoteFile, Source

BATCH_BYTES = 2**29  # of frames that wait in memory for a commit
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class Ingested:
    """What an ingest did, counted by valid time."""

    cube: str
    snapshot: str
    new: int
    already_there: int
    conflicting: int  # there before from another file; the first is kept
    quarantined: int  # damaged files, each with its reason in `quarantine`
    quarantine: str
    first: datetime
    last: datetime

    def __str__(self) -> str:
        """What a person wants to know of it."""
        counts = [f"{self.new} new", f"{self.already_there} already there"]
        if self.conflicting:
            counts.append(f"{self.conflicting} there from another file, kept as they were")
        if self.quarantined:
            counts.append(f"{self.quarantined} damaged, see {self.quarantine}")
        nothing = "" if self.new else "\nNothing changed."
        return (
            f"{self.cube}: {', '.join(counts)}\n"
            f"frames from {self.first:%Y-%m-%dT%H:%M:%SZ} to {self.last:%Y-%m-%dT%H:%M:%SZ}, "
            f"snapshot {self.snapshot}{nothing}"
        )


def ingest(
    source: Source,
    cube: str,
    grid: Grid | None = None,
    window: list[int] | None = None,
    start: str | datetime | None = None,
    end: str | datetime | None = None,
    batch: int = 24,
) -> Ingested:
    """Reads a source's files into a cube, `batch` frames a commit; those already there are not read again.

    A damaged file is written down in quarantine.jsonl in the cube's folder (for a cube at a URL: in the
    working directory), and the rest goes on.

    Raises:
        ValueError: if the source has no files then, if none of them can be read, or if the cube holds another
            grid or cadence.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: expected at least 1 frame a commit")
    if window is not None and len(window) != 4:
        raise ValueError(f"window={window}: expected [y0,x0,ny,nx] in cells of the native grid, row 0 north")
    files = _files(source, start, end)
    there = _observed(cube)
    fresh = [file for file in files if file.valid_time not in there]
    wanted = fresh or files[:1]  # whether window and grid are the cube's shows in any one frame
    quarantine = Quarantine(cube)
    with Decoder(source) as decoder:
        read = _read(decoder, track(wanted, "reading frames", total=len(wanted)), quarantine)
        written = _write(cube, (_place(frame, window, grid) for frame in read), batch, quarantine)
    quarantine.save()
    if not written and not there:
        raise ValueError(
            f"{cube}: none of {len(files)} files could be read; the reasons are in {quarantine.path}, "
            f"the first: {quarantine.reasons[0]}"
        )
    return Ingested(
        cube=cube,
        snapshot=Cube.open(cube).snapshot,
        new=sum(part.new for part in written),
        already_there=len(files) - len(wanted) + sum(part.unchanged for part in written),
        conflicting=sum(part.conflicting for part in written),
        quarantined=len(quarantine.reasons),
        quarantine=str(quarantine.path),
        first=files[0].valid_time,
        last=files[-1].valid_time,
    )


class Quarantine:
    """The damaged files of a cube: one line of JSON for each in quarantine.jsonl."""

    def __init__(self, cube: str):
        """Reads what is there."""
        self.path = Path(QUARANTINE) if "://" in cube else Path(cube) / QUARANTINE
        self.lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.reasons: list[str] = []  # of this time
        self._known = {(record["path"], record["sha256"]) for record in map(json.loads, self.lines)}

    def add(self, file: RemoteFile, reason: str) -> None:
        """Writes a file down; once, however often it is met."""
        self.reasons.append(reason)
        sha256 = _sha256(Path(file.url))
        if (file.url, sha256) in self._known:
            return
        self._known.add((file.url, sha256))
        record = {
            "path": file.url,
            "sha256": sha256,
            "valid_time": f"{file.valid_time:%Y-%m-%dT%H:%M:%SZ}",
            "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "reason": reason,
        }
        self.lines.append(json.dumps(record))

    def make_room(self) -> None:
        """Takes the file away until `save` where it lies alone, as a new cube needs an empty folder."""
        folder = self.path.parent
        if self.path.is_file() and list(folder.iterdir()) == [self.path]:
            self.path.unlink()

    def save(self) -> None:
        """Writes all lines, if there are any."""
        if self.lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("\n".join(self.lines) + "\n")


def _sha256(path: Path) -> str | None:
    """Of a file's bytes; None if it cannot be opened."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _read(decoder: Decoder, files: Iterable[RemoteFile], quarantine: Quarantine) -> Iterator[Frame]:
    """The frames in the files that can be read."""
    for file in files:
        try:
            yield decoder.decode(file)
        except (ValueError, OSError) as error:
            quarantine.add(file, str(error))


def _place(frame: Frame, window: list[int] | None, grid: Grid | None) -> Frame:
    """The frame in a window of its own grid and then on another grid, where they are given."""
    part = frame if window is None else frame.window(*window)
    return part if grid is None else regrid(part, grid)


def _write(path: str, frames: Iterator[Frame], batch: int, quarantine: Quarantine) -> list[Written]:
    """Writes frames to the cube, batch by batch, and the quarantine along with them."""
    first = next(frames, None)
    if first is None:
        return []
    quarantine.make_room()
    cube = Cube.open_or_create(path, first.grid, first.variable, first.valid_time, first.cadence)
    written = []
    for part in _batches(chain([first], frames), batch):
        written.append(cube.write(part))
        quarantine.save()
    return written


def _batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    """At most `size` frames and about half a gigabyte at a time."""
    part: list[Frame] = []
    for frame in frames:
        part.append(frame)
        if len(part) >= size or sum(held.values.nbytes for held in part) >= BATCH_BYTES:
            yield part
            part = []
    if part:
        yield part


def _files(source: Source, start: str | datetime | None, end: str | datetime | None) -> list[RemoteFile]:
    """What the source has between two times.

    Raises:
        ValueError: if that is nothing.
    """
    first = None if start is None else parse_time(start)
    last = None if end is None else parse_time(end)
    files = list(source.files(first, last))
    if not files:
        every = list(source.files(None, None))
        has = f"it has {every[0].valid_time} to {every[-1].valid_time}" if every else "it has none at all"
        raise ValueError(f"the source has no files within start={start}, end={end}; {has}")
    return files


def _observed(path: str) -> set[datetime]:
    """The valid times whose frames a cube has; none where there is no cube yet."""
    try:
        cube = Cube.open(path)
    except ValueError:
        return set()
    return {time for time, observed in zip(cube.times, cube.observed, strict=True) if observed}
