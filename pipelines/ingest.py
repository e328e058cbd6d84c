"""`ingest`: files of a source -> decode -> window -> regrid -> judge -> cube; it goes on where it stopped."""

import logging
import math
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path

from pipelines import destination
from pipelines.cube import RADAR, STATIC, Cube, Written, groups, judged
from pipelines.decode import Decoder
from pipelines.decoding.refusal import Code, Refusal
from pipelines.feeds.feed import Feed, NewFile, open_feed
from pipelines.feeds.web import DeniedError, Manners, SystemClock, UnreachableError
from pipelines.frame import Frame, iso, parse_interval
from pipelines.grid import Grid
from pipelines.progress import track
from pipelines.quarantine import Quarantine, Refused, sha256_of
from pipelines.regrid import regrid
from pipelines.repository import Repository
from pipelines.signals import end_by, handling
from pipelines.sources.source import NamedSource, RemoteFile, Source, Unread, first_of, unread
from pipelines.spread import spread
from pipelines.static import write_static
from pipelines.words import plural

PASSING = {Code.CHANGED, Code.CHECKSUM, Code.CRASHED, Code.DAMAGED, Code.TRUNCATED, Code.UNREADABLE}
log = logging.getLogger(__name__)

BATCH_BYTES = 2**29  # of frames that wait in memory for a commit
LOOKBACK = timedelta(hours=2)  # how far behind the newest file a late one is still looked for


@dataclass(frozen=True)
class Ingested:
    """What an ingest did, counted by valid time."""

    cube: str
    group: str
    snapshot: str
    new: int
    already_there: int
    conflicting: int  # there before from another file; the first is kept
    restated: int  # there before from another file, and replaced by it
    damaged: int  # files, or frames of files, each with its reason in `quarantine`
    misfits: int  # sound files of another grid, quantity or time than the cube's, and so there too
    unlisted: int  # folders in the source's folder that could not be looked into, and so there too
    passed_over: int  # files in the source's folder whose names are not safe to use
    links: int  # in the source's folder; none is followed
    quarantine: str
    first: datetime | None  # of the frames that are in the cube now; None: there are none
    last: datetime | None

    @property
    def quarantined(self) -> int:
        """Files and folders that are written down in `quarantine`."""
        return self.damaged + self.misfits + self.unlisted

    def __str__(self) -> str:
        """What a person wants to know of it."""
        counts = [f"{self.new} new", f"{self.already_there} already there"]
        if self.conflicting:
            counts.append(
                f"{self.conflicting} there from another file, kept as they were (restate=true replaces them)"
            )
        if self.restated:
            counts.append(f"{self.restated} restated")
        if self.quarantined:
            kinds = (
                (self.damaged, "damaged"),
                (self.misfits, "sound but not of this cube"),
                (self.unlisted, f"folder{'s' if self.unlisted > 1 else ''} that cannot be listed"),
            )
            told = " and ".join(f"{count} {kind}" for count, kind in kinds if count)
            counts.append(f"{told}, see {self.quarantine}")
        if self.passed_over:
            counts.append(f"{self.passed_over} passed over for their names")
        if self.links:
            counts.append(f"{plural(self.links, 'link')} not followed")
        period = ""
        if self.first is not None and self.last is not None and self.group != STATIC:
            period = f"frames from {iso(self.first)} to {iso(self.last)}, "
        nothing = "" if self.new or self.restated else "\nNothing changed."
        return (
            f"{self.cube}: {', '.join(counts)}\n{period}group {self.group}, snapshot {self.snapshot}{nothing}"
        )


Read = tuple[RemoteFile, Frame | Refused]


def ingest(
    source: Source,
    cube: str,
    grid: Grid | None = None,
    window: list[int] | None = None,
    start: str | datetime | None = None,
    end: str | datetime | None = None,
    batch: int = 24,
    group: str | None = None,
    restate: bool = False,
    workers: int = 0,
    scheduler: str | None = None,
    follow: bool = False,
    every: float = 30.0,
    max_rate: float | None = None,
    cache: str | None = None,
) -> Ingested:
    """Reads a source's files into a cube, `batch` frames a commit; those already there are not read again.

    The source's path may be a URL too; its files are fetched one by one, and deleted when they were read.

    A damaged file is written down in CUBE.quarantine.jsonl beside the cube (for a cube at a URL: in the
    working directory), and the rest goes on.

    Args:
        source: where the files are and how they read.
        cube: folder or URL of the cube; made if it is not there.
        grid: that the frames are put on; None: their own.
        window: [y0, x0, ny, nx] in cells of the frames' own grid, row 0 north; None: all of it.
        start: first valid time to read; None: the source's first.
        end: last valid time to read; None: the source's last.
        batch: frames a commit.
        group: of the cube; None: the one that the source's frames belong to ("radar", "satellite", "static").
        restate: also read files of valid times that are there from other files, and replace those.
        workers: processes that decode and regrid; 0: this one alone.
        scheduler: address of a Dask scheduler whose workers do so instead; see `pipelines.spread`.
        follow: go on with the files that appear, until SIGINT or SIGTERM, or until those up to `end` are in:
            when a file valid then or later has come, and none of then or before is still being written; or,
            from two hours after `end` on, when 20 looks in a row have found nothing new.
        every: seconds between two looks for new files, on average.
        max_rate: bytes/s of what is fetched from a URL; None: as fast as it comes.
        cache: folder for what is fetched; None: a temporary one.

    Raises:
        ValueError: if the source has no files then, if none of them can be read, or if the cube holds another
            grid or cadence.
        KeyboardInterrupt: by SIGINT, where nothing was read yet or nothing is followed.
        SystemExit: with code 143 by SIGTERM, where it is followed or fetched and nothing was read yet.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: expected at least 1 frame a commit")
    if not 0 < every < math.inf:
        raise ValueError(f"every={every:g}: expected seconds, above 0")
    place = Placing(_window(window), grid)
    first, last = parse_interval(start, end)
    signals: list[int] = []  # that stopped a feed
    left = Unread() if _is_remote(source) else unread(source)
    for told in left.passed_over(getattr(source, "path", None)):
        log.warning("%s", told)
    with Decoder(source) as decoder, spread(workers, scheduler) as workforce:
        work = (
            partial(_prepared, decoder, place)
            if workforce.is_here
            else partial(_prepared_by_worker, pickle.dumps(source), place)
        )
        read = partial(workforce.map, work)
        if not follow and not _is_remote(source):
            if left.folders:
                log.warning("%s", first_of(list(left.folders.values())))
            intake = Intake(cube, group, batch, restate, place, read)
            files = _files(decoder, first, last)
            intake.leave_out(left.folders)
            intake.take(files)
        else:
            offered: dict[str, NewFile] = {}  # by URL
            since = None if _group_of(source, group) == STATIC else first or _since(source, cube, group)
            with _feed(source, since, max_rate, cache, signals) as feed:
                intake = Intake(
                    cube, group, batch, restate, place, partial(_fetched, feed, offered, read, follow)
                )
                for listed in feed.follow(every, last, log.warning) if follow else _once(feed):
                    wanted = [file for file in listed if last is None or file.valid_time <= last]
                    offered |= {file.url: file for file in wanted}
                    intake.leave_out(feed.unlisted)
                    _take_new(intake, wanted)
                    offered.clear()
                intake.leave_out(feed.unlisted)
    if not intake.began:
        reasons = intake.quarantine.reasons
        if signals and not reasons:
            end_by(signals[0])
        if not reasons:
            raise ValueError(f"{cube}: there was no file to read")
        raise ValueError(
            f"{cube}: nothing could be read ({len(reasons)} refused); the reasons are in "
            f"{intake.quarantine.path}, the first: {reasons[0]}"
        )
    return intake.result(left)


def _take_new(intake: "Intake", files: list[NewFile]) -> None:
    """Takes what a feed has handed out, and says so."""
    before = dict(intake.counts)
    intake.take([RemoteFile(file.url, file.valid_time) for file in files])
    counts = {name: count - before[name] for name, count in intake.counts.items() if count != before[name]}
    if files and counts:
        told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
        log.info(
            "%s: %s, the newest valid at %s",
            intake.cube,
            told,
            iso(max(file.valid_time for file in files)),
        )


def _is_remote(source: Source) -> bool:
    return "://" in str(getattr(source, "path", None))


def _since(source: Source, cube: str, group: str | None) -> datetime | None:
    """From when on a feed is taken: all of a folder; of a URL, which may hold years, what came since last.

    So a cube that was not fed for a while gets all that it missed, late frames too.
    """
    if not _is_remote(source):
        return None
    there = _there(cube, [_group_of(source, group)])
    return max(there, default=datetime.now(UTC)) - LOOKBACK


def _group_of(source: Source, group: str | None) -> str:
    """Where the source's frames go."""
    return group or str(getattr(source, "group", RADAR))


@contextmanager
def _feed(
    source: Source, start: datetime | None, max_rate: float | None, cache: str | None, signals: list[int]
) -> Iterator[Feed]:
    """The feed of a source, which SIGINT and SIGTERM end between two files; they are added to `signals`.

    Raises:
        ValueError: if the names of the source's files do not tell their times, or another feed uses `cache`.
    """
    if not hasattr(source, "valid_time"):
        raise ValueError(
            f"source={type(source).__name__}: cannot be followed or read from a URL, as the "
            "names of its files do not tell what is in them; ingest its folder again when there is more"
        )
    named: NamedSource = source  # type: ignore[assignment]
    clock = SystemClock()
    with tempfile.TemporaryDirectory(prefix="metnet-") as temporary, _stopping(clock.stop, signals):
        manners, place = Manners(max_rate=max_rate), destination.folder("cache", cache or temporary)
        taken = f"cache={place}: another ingest keeps its files there; give each a folder of its own"
        with destination.alone_in(place, "feed", taken):
            yield open_feed(named, place, start, LOOKBACK, manners, clock=clock)


def _stopping(event: threading.Event, signals: list[int]) -> AbstractContextManager[None]:
    """Lets SIGINT and SIGTERM set an event, and says which came."""

    def stop(number: int, _: object) -> None:
        signals.append(number)
        event.set()

    return handling(stop, signal.SIGINT, signal.SIGTERM)


def _once(feed: Feed) -> Iterator[list[NewFile]]:
    """All that is there now."""
    while True:
        yield feed.listing()
        if feed.is_done or feed.clock.stopped:
            return


def _fetched(
    feed: Feed,
    offered: dict[str, NewFile],
    read: Callable[[Iterable[RemoteFile]], Iterator[Read]],
    asks_again: bool,
    files: Iterable[RemoteFile],
) -> Iterator[Read]:
    """What is in the files of a feed, each fetched when it is wanted and deleted when it was read.

    One that is refused, by its place or, for a reason that may pass, by its reader, is had again from a later
    listing, a few times, if `asks_again`: it may have been half there.

    None are fetched any more once the feed's clock is stopped; those that did not come are the next ingest's.

    Raises:
        OSError: if there is no room for them.
    """
    names: dict[str, RemoteFile] = {}
    missing: list[Read] = []

    def fetched() -> Iterator[RemoteFile]:
        for file in files:
            if feed.clock.stopped:
                return
            try:
                here = feed.fetch(offered[file.url])
            except (UnreachableError, DeniedError) as error:
                if asks_again and isinstance(error, DeniedError):
                    feed.hand_out_again(offered[file.url])
                if not feed.clock.stopped and not feed.comes_again(offered[file.url]):
                    missing.append((file, Refused(file, Code.UNREACHABLE, str(error))))
                continue
            names[here.url] = file
            yield here

    for here, result in read(fetched()):
        feed.release(here)
        file = names.pop(here.url)
        if isinstance(result, Refused) and result.code in PASSING and asks_again:
            feed.hand_out_again(offered[file.url])
            if feed.comes_again(offered[file.url]):
                continue
        yield file, replace(result, file=file) if isinstance(result, Refused) else result
    yield from missing


class Intake:
    """Takes files into one group of a cube, as often as there are new ones."""

    def __init__(
        self,
        cube: str,
        group: str | None,
        batch: int,
        restate: bool,
        place: "Placing",
        read: Callable[[Iterable[RemoteFile]], Iterator[Read]],
    ):
        """Nothing is read or made before the first files come."""
        self.cube, self.batch, self.restate = cube, batch, restate
        self.group = group
        self.quarantine = Quarantine(cube)
        self._place = place
        self._read = read
        self._first: Frame | None = None
        self._cube: Cube | None = None  # None for fields without a time
        self.counts = {"new": 0, "already_there": 0, "conflicting": 0, "restated": 0}
        self._misfits = 0
        self._left_out: set[str] = set()  # folders
        self._span: tuple[datetime, datetime] | None = None  # of the frames that are there

    @property
    def began(self) -> bool:
        """Whether any frame could be read yet, so that there is a cube."""
        return self._first is not None

    def take(self, files: list[RemoteFile]) -> None:
        """Writes the frames in those of the files that are not there yet.

        Raises:
            ValueError: if the cube holds another grid, quantity or cadence.
        """
        frames: Iterator[Frame] = iter(())
        if self._first is None:
            files, frames = self._begin(files)
            if self._first is None:
                return
        fresh = self._fresh(files)
        self.counts["already_there"] += len(files) - len(fresh)
        self._saw(file.valid_time for file in set(files) - set(fresh))
        rest = self._frames(track(fresh, "reading frames", total=len(fresh)))
        for part in _batches(chain(frames, rest), self.batch):
            self._count(self._write(part))
            self._saw(frame.valid_time for frame in part)

    def leave_out(self, folders: Mapping[str, str]) -> None:
        """Writes down folders that cannot be listed, with the reason of each, once."""
        for folder in [folder for folder in folders if folder not in self._left_out]:
            self._left_out.add(folder)
            self.quarantine.add(Refused(RemoteFile(folder, None), Code.UNREADABLE, folders[folder]))

    def result(self, left: Unread) -> Ingested:
        """All that was done; what was left unread in the source's folder is not known here."""
        first, last = self._span or (None, None)
        return Ingested(
            cube=self.cube,
            group=str(self.group),
            snapshot=Repository.open(self.cube).snapshot,
            **self.counts,
            damaged=len(self.quarantine.reasons) - self._misfits - len(self._left_out),
            misfits=self._misfits,
            unlisted=len(self._left_out),
            passed_over=len(left.names),
            links=len(left.links),
            quarantine=str(self.quarantine.path),
            first=first,
            last=last,
        )

    def _saw(self, times: Iterable[datetime | None]) -> None:
        """Widens the span of what is there."""
        known = [*filter(None, times), *(self._span or ())]
        self._span = (min(known), max(known)) if known else None

    def _begin(self, files: list[RemoteFile]) -> tuple[list[RemoteFile], Iterator[Frame]]:
        """The files not tried yet, and the frame that opens the cube.

        Whether group, grid and window are the cube's shows in any one frame: a new one, if any can be read.
        """
        names = [name for name in _groups(self.cube) if self.group in (None, name)]
        there = _there(self.cube, names, files)
        new = _from_the_middle([file for file in files if file.valid_time not in there])
        old = [file for file in files if file.valid_time in there]
        tried: set[RemoteFile] = set()
        for file in (*new, *old):
            tried.add(file)
            for frame in self._frames([file], into_new=not names):
                refused = self._open(file, frame)
                if refused is not None:
                    self._refuse(refused)
                elif file in old:  # it has shown what it was read for; `_fresh` says whether it is written
                    return [other for other in files if other not in tried or other == file], iter(())
                else:
                    return [other for other in files if other not in tried], iter([frame])
        return [], iter(())

    def _open(self, file: RemoteFile, frame: Frame) -> Refused | None:
        """Makes the cube where there is none; why the frame cannot be in it, if its time is not the cube's.

        Raises:
            ValueError: if the cube holds another grid, quantity or cadence.
        """
        self.group = self.group or frame.group
        if frame.cadence is not None:
            try:
                self._cube = Cube.open_or_create(
                    self.cube,
                    frame.grid,
                    frame.variable,
                    frame.valid_time,
                    frame.cadence,
                    self.group,
                    frame.scale_factor,
                )
            except ValueError as error:
                raise ValueError(f"{error}{self._other_window(frame.grid)}") from error
            checked = self._checked(file, frame)
            if isinstance(checked, Refused):
                return checked
        self._first = frame
        return None

    def _other_window(self, grid: Grid) -> str:
        """Which window would put frames, which are on `grid`, on that of the cube, if there is one."""
        with suppress(ValueError):  # there is no cube
            there = next((Cube.open(self.cube, name).grid for name in _groups(self.cube)), grid)
            fitting = self._place.window_onto(there, grid)
            if there != grid and fitting is not None:
                window = ",".join(map(str, fitting))
                return f", or give window=[{window}], which is the cube's part of the files' grid"
        return ""

    def _fresh(self, files: list[RemoteFile]) -> list[RemoteFile]:
        """Those of the files that the group does not have yet; to restate, also those that differ.

        Of several files of a time that is there, only the last can restate it: else they would take turns.
        """
        there = _there(self.cube, [str(self.group)], files)
        last = {file.valid_time: file for file in files} if self.restate else {}
        return [
            file
            for file in files
            if file.valid_time not in there
            or (last.get(file.valid_time) == file and sha256_of(Path(file.url)) != there[file.valid_time])
        ]

    def _frames(self, files: Iterable[RemoteFile], into_new: bool = False) -> Iterator[Frame]:
        """The frames of the files that can be read and belong to the cube.

        Raises:
            ValueError: if nothing is there yet, and a frame does not cover what was asked for.
        """
        for file, read in self._read(files):
            if isinstance(read, Frame):
                read = self._checked(file, read)
            if isinstance(read, Frame):
                yield read
            elif read.misplaced and into_new:
                raise ValueError(f"{Path(file.url).name}: {read.reason}")
            else:
                self._refuse(read)

    def _refuse(self, refused: Refused) -> None:
        """Writes a file down; the first sound one that is not of this cube is told at once."""
        self.quarantine.add(refused)
        if refused.code == Code.OTHER_CUBE:
            self._misfits += 1
            if self._misfits == 1:
                log.warning("%s", refused.reason)

    def _checked(self, file: RemoteFile, frame: Frame) -> Frame | Refused:
        """The frame, unless it is not of the kind that the cube holds; the first decides for a new cube."""
        try:
            if self._cube is not None:
                self._cube.check(frame)
            elif self._first is not None and frame.cadence is not None:
                raise ValueError(f"{frame.source} changes with time, and the files before it do not")
        except ValueError as error:
            return Refused(file, Code.OTHER_CUBE, f"{Path(file.url).name}: {error}")
        return frame

    def _write(self, frames: list[Frame]) -> list[Written]:
        if self._cube is None:
            return [write_static(self.cube, frame, self.restate) for frame in frames]
        return [self._cube.write(frames, restate=self.restate)]

    def _count(self, written: list[Written]) -> None:
        for part in written:
            self.counts["new"] += part.new
            self.counts["already_there"] += part.unchanged
            self.counts["conflicting"] += part.conflicting
            self.counts["restated"] += part.restated


def _there(
    path: str, groups: Iterable[str], files: Iterable[RemoteFile] | None = None
) -> dict[datetime, str]:
    """The valid times whose frames a cube has in any of some groups, with the SHA-256 of their files.

    Only between the times of some files, if those are given: a cube may hold years.
    """
    times = [file.valid_time for file in files or () if file.valid_time is not None]
    first, last = min(times, default=None), max(times, default=None)
    there: dict[datetime, str] = {}
    for group in groups:
        try:
            cube = Cube.open(path, group)
        except ValueError:
            continue  # made by the first frame
        there.update(cube.sources(first, last))
    return there


def _groups(cube: str) -> list[str]:
    """The groups of frames in a cube; none where there is no cube yet."""
    try:
        repository = Repository.open(cube)
    except ValueError:
        return []
    return groups(repository, repository.snapshot)


@dataclass(frozen=True)
class Placing:
    """Where on its own grid a frame is taken, and what it is put on."""

    window: tuple[int, int, int, int] | None
    grid: Grid | None

    def __call__(self, frame: Frame) -> Frame:
        """The frame in the window and then on the grid, judged."""
        part = frame if self.window is None else frame.window(*self.window)
        return judged(part if self.grid is None else regrid(part, self.grid))

    def window_onto(self, wanted: Grid, got: Grid) -> list[int] | None:
        """The window by which frames that are put on `got` would be put on `wanted`; None: there is none."""
        if self.grid is not None:
            return None
        y0 = round((wanted.y_first - got.y_first) / got.y_step)
        x0 = round((wanted.x_first - got.x_first) / got.x_step)
        try:
            if got.window(y0, x0, *wanted.shape) != wanted:
                return None
        except ValueError:
            return None  # it reaches outside
        top, left = (0, 0) if self.window is None else self.window[:2]
        return [top + y0, left + x0, *wanted.shape]


def _window(window: list[int] | None) -> tuple[int, int, int, int] | None:
    if window is None:
        return None
    if len(window) != 4:
        raise ValueError(f"window={window}: expected [y0,x0,ny,nx] in cells of the native grid, row 0 north")
    y0, x0, y_size, x_size = window
    return y0, x0, y_size, x_size


def _prepared(decoder: Decoder, place: Placing, file: RemoteFile) -> Read:
    """All that is done with a file before it is written.

    Raises:
        OSError: if this machine lacks what it takes to read any file.
    """
    try:
        frame = decoder.decode(file)
    except ValueError as error:
        code = error.code if isinstance(error, Refusal) else Code.DAMAGED
        return file, Refused(file, code, str(error))
    try:
        return file, place(frame)
    except ValueError as error:
        return file, Refused(file, Code.WRONG_GRID, str(error), misplaced=True)


@lru_cache(maxsize=1)
def _decoder(source: bytes) -> Decoder:
    """Of a worker process, as long as it lives."""
    return Decoder(pickle.loads(source))


def _prepared_by_worker(source: bytes, place: Placing, file: RemoteFile) -> Read:
    return _prepared(_decoder(source), place, file)


def _from_the_middle(files: list[RemoteFile]) -> list[RemoteFile]:
    """The files, those first that are nearest in time to the middle one.

    The frame read first begins the time axis of a new cube: one of a wrong year would keep all others out.
    """
    times = sorted(file.valid_time for file in files if file.valid_time is not None)
    if not times:
        return files
    middle = times[len(times) // 2]

    def far(file: RemoteFile) -> tuple[bool, timedelta]:
        return file.valid_time is None, abs((file.valid_time or middle) - middle)

    return sorted(files, key=far)


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


def _files(decoder: Decoder, start: datetime | None, end: datetime | None) -> list[RemoteFile]:
    """What the source has between two times.

    Raises:
        ValueError: if that is nothing.
    """
    files = decoder.files(start, end)
    if not files:
        times = [file.valid_time for file in decoder.files(None, None) if file.valid_time]
        has = f"it has {iso(min(times))} to {iso(max(times))}" if times else "it has none at all"
        asked = ", ".join(
            f"{key}={iso(time)}" for key, time in (("start", start), ("end", end)) if time is not None
        )
        raise ValueError(f"the source has no files{f' within {asked}' if asked else ''}; {has}")
    return files
