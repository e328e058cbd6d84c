"""`Feed`: the new files of a source, as they appear in a folder, a bucket or on a web page.

A feed lists only what sorts behind the names it knows, from a little way back, because files come late and
out of order. It hands out every file once, and again when its bytes were replaced.
"""

import hashlib
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

from pipelines.feeds.places import Entry, Place, place_at
from pipelines.feeds.web import Clock, DeniedError, Manners, SystemClock, UnreachableError, Web
from pipelines.sources.source import NamedSource, RemoteFile, first_of

MOST = 1000  # files handed out at a time, so that a long past comes in parts
PROBED = 1000  # names that are looked at to learn when a folder begins
RISING = tuple(  # times that sort as text where any do
    datetime(year, month, day, hour, tzinfo=UTC)
    for year in (2023, 2024)
    for month in (1, 2, 10)
    for day in (2, 11)
    for hour in (3, 14)
)
AHEAD = timedelta(hours=1)  # a name may be that far in the future: clocks differ
ROUNDS = 5  # times that a file which does not arrive whole is handed out
LOOKS = 20  # in a row without a new file, after which none is waited for that should long be there
LONGEST_PAUSE = 300.0  # s between listings while the place does not answer


@dataclass(frozen=True)
class NewFile:
    """A file that the feed has not handed out before, or whose bytes were replaced since."""

    url: str
    valid_time: datetime  # UTC, as the name says
    arrived: datetime  # UTC, when it was first seen
    entry: Entry


class Cache:
    """A bounded folder for fetched files, of one feed; each is deleted once it was used, or to make room."""

    def __init__(self, folder: Path, largest: int = 4 * 2**30):
        """`largest`: bytes of all files together."""
        self.folder = folder
        self.largest = largest
        self._held: set[Path] = set()

    def path(self, file: NewFile) -> Path:
        """Where a file goes: its own name, in a folder of its own for each version of each file."""
        digest = hashlib.sha256(f"{file.url}\n{file.entry.version}".encode()).hexdigest()[:32]
        return self.folder / digest / Path(file.entry.key).name

    def make_room(self, path: Path, size: int) -> None:
        """Keeps `size` bytes free for `path`, deleting files that nobody holds, the oldest first.

        Raises:
            OSError: if the files that are held leave no room.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._held.add(path)
        told = [(item, item.stat()) for item in self.folder.glob("*/*") if item != path]
        used = sum(stat.st_size for _, stat in told)
        for item, stat in sorted(told, key=lambda pair: pair[1].st_mtime_ns):
            if used + size <= self.largest:
                break
            if item not in self._held:
                shutil.rmtree(item.parent)
                used -= stat.st_size
        if used + size > self.largest:
            self.release(path)
            raise OSError(
                f"{self.folder}: no room for {size} bytes beside {used} in use; it may hold {self.largest}"
            )

    def release(self, path: Path) -> None:
        """Deletes a file that was used, if it lies here."""
        if path in self._held:
            self._held.remove(path)
            shutil.rmtree(path.parent, ignore_errors=True)


class Feed:
    """What is new at a place. Not for several threads."""

    def __init__(
        self,
        source: NamedSource,
        place: Place,
        cache: Cache,
        clock: Clock,
        start: datetime | None = None,
        lookback: timedelta = timedelta(hours=2),
        largest: int = 2**29,
    ):
        """Use `open_feed`."""
        self.source = source
        self.place = place
        self.cache = cache
        self.clock = clock
        self.start = start
        self.lookback = lookback
        self.largest = largest
        self.behind = False  # whether more waited than the last listing handed out
        self.newest: datetime | None = None  # the newest valid time so far
        self._after: str | None = None  # listings begin behind this key
        self._seen: dict[str, tuple[str, datetime]] = {}  # by key behind `_after`: version, valid time
        self._failed: dict[tuple[str, str], int] = {}  # by key and version: how often it did not arrive
        self._again: dict[str, NewFile] = {}  # to be handed out once more

    def listing(self) -> list[NewFile]:
        """The files that are new since the last call, by valid time; `behind` tells if there are still more.

        Raises:
            UnreachableError: if the place does not answer; nothing is lost, the next call has it all.
            DeniedError: if the place refuses.
        """
        if self._after is None:
            self._after = "" if self.start is None else self._begin(self.start)
        now = self.clock.now()
        fresh = list(islice(self._fresh(now, self._after), MOST + 1))
        self.behind = len(fresh) > MOST
        files = [NewFile(self.place.root + entry.key, time, now, entry) for entry, time in fresh[:MOST]]
        for file in files:
            self._seen[file.entry.key] = (file.entry.version, file.valid_time)
            self._again.pop(file.url, None)
            self.newest = max(self.newest or file.valid_time, file.valid_time)
        self._move_on()
        again, self._again = list(self._again.values()), {}
        return sorted(again + files, key=lambda file: (file.valid_time, file.url))

    @property
    def is_done(self) -> bool:
        """Whether the last listing handed out all that there was, and all of it has arrived or never will."""
        return not self.behind and not self._again

    @property
    def unlisted(self) -> dict[str, str]:
        """The folders that the last listing could not look into, and why."""
        return {
            f"{self.place.root}{prefix}".rstrip("/"): reason
            for prefix, reason in sorted(self.place.unlisted().items())
        }

    def comes_again(self, file: NewFile) -> bool:
        """Whether the next listing hands a file out once more, because it did not arrive."""
        return file.url in self._again

    def fetch(self, file: NewFile) -> RemoteFile:
        """The file on this machine; to be given to `release` when it was read.

        Raises:
            UnreachableError: if it did not arrive whole; a later listing has it again, a few times.
            DeniedError: if the place refuses it, or it is too large.
            OSError: if it cannot be stored.
        """
        local = self.place.local(file.entry)
        if local is not None:
            return RemoteFile(str(local), file.valid_time)
        size, path = file.entry.size, self.cache.path(file)
        if size is not None and size > self.largest:
            raise DeniedError(f"{file.url}: {size} bytes, more than the allowed {self.largest}")
        if not path.is_file():
            self.cache.make_room(path, self.largest if size is None else size)
            try:
                self.place.fetch(file.entry, path, self.largest)
            except (OSError, ValueError) as error:
                self.cache.release(path)
                if isinstance(error, UnreachableError):
                    self.hand_out_again(file)
                raise
        return RemoteFile(str(path), file.valid_time)

    def release(self, file: RemoteFile) -> None:
        """Says that a fetched file is not needed any more; one that the place itself holds stays."""
        self.cache.release(Path(file.url))

    def follow(
        self, every: float, until: datetime | None = None, tell: Callable[[str], None] | None = None
    ) -> Iterator[list[NewFile]]:
        """New files, as they come, until the clock is stopped, or shows `until` and what is valid then is in.

        That is so when a file valid at `until` or later has come; else, from `lookback` after it on, as soon
        as LOOKS listings in a row have brought nothing: stored files may still be played into the place.
        It is not so while a file of then or before is still being written, or has to be fetched once more.

        Listings are about `every` seconds apart: never at the same second of the minute, so that not all who
        follow a service ask at once. `tell` is called with what a person wants to know: that a place does not
        answer (once for each reason), that it does again, which folders in it cannot be listed (once, as long
        as that is so), and what is waited for.

        Raises:
            ValueError: if `every` is not above 0 s.
            DeniedError: if the place refuses the first listing.
        """
        if every <= 0:
            raise ValueError(f"every={every}: expected above 0 s")
        tell = tell or _nothing
        failures, problem, waiting, idle = 0, "", "", 0
        told: set[str] = set()  # of the folders that cannot be listed
        while not self.clock.stopped:
            listed = self.clock.seconds()
            try:
                files = self.listing()
            except (UnreachableError, DeniedError) as error:
                if isinstance(error, DeniedError) and not self._seen:
                    raise
                if failures == 0 or _without_numbers(error) != problem:
                    tell(f"{error}; trying again")
                failures, problem, idle = failures + 1, _without_numbers(error), idle + 1
                if self._is_over(until, idle):
                    return
                rest = error.rest if isinstance(error, UnreachableError) else 0.0
                self.clock.sleep(max(rest, _pause(every, failures)))
                continue
            if failures:
                tell(f"{self.place.root}: answers again")
                failures = 0
            if unlisted := [reason for folder, reason in self.unlisted.items() if folder not in told]:
                tell(first_of(unlisted))
            told = set(self.unlisted)
            idle = 0 if files else idle + 1
            if files:
                yield files
            if self._is_over(until, idle):
                return
            if not files and waiting != self._waiting(until):
                waiting = self._waiting(until)
                tell(waiting)
            if not self.behind and not self.clock.stopped:
                gone = self.clock.seconds() - listed
                self.clock.sleep(max(0.0, every * random.uniform(0.75, 1.25) - gone))

    def _fresh(self, now: datetime, after: str) -> Iterator[tuple[Entry, datetime]]:
        """The entries behind a key that were not handed out in this version, and are of this product."""
        for entry in self.place.entries("", after):
            time = self.source.valid_time(Path(entry.key).name)
            if time is None or time > now + AHEAD or (self.start is not None and time < self.start):
                continue
            told = self._seen.get(entry.key)  # None: it is new, even of a page that tells no versions
            if told is None or told[0] != entry.version:
                yield entry, time

    def _begin(self, start: datetime) -> str:
        """The key behind which everything from `start` lies, where folders sort by time; "": the first one.

        Goes down through the last folder, of those of each level, that begins before `start`. Only names
        are asked for, and by halving, so it costs few requests for years of files.
        """
        prefix = ""
        while folders := self.place.folders(prefix):
            low, high = 0, len(folders)
            while low < high:
                middle = (low + high) // 2
                place, begins = next(
                    (
                        (index, time)
                        for index in range(middle, high)
                        if (time := self._first_time(folders[index])) is not None
                    ),
                    (middle, None),
                )
                if begins is not None and begins < start:
                    low = place + 1
                else:
                    high = middle
            if low == 0:
                break
            prefix = folders[low - 1]
        return prefix

    def _first_time(self, prefix: str) -> datetime | None:
        """When the first file of this product below a prefix is valid."""
        names = (Path(entry.key).name for entry in islice(self.place.entries(prefix, ""), PROBED))
        return next((time for name in names if (time := self.source.valid_time(name)) is not None), None)

    def _move_on(self) -> None:
        """Lets listings begin further behind, and forgets what lies before.

        Files valid within `lookback` of the newest one stay in sight, and so do those being written, and
        folders that could not be looked into: somebody may give the right to. Where the names in the first
        folder sort by time, listings begin right behind the last older one there, else at the folder.
        """
        if self.newest is None or self._after is None:
            return
        young = self.newest - self.lookback
        first = min((key for key, (_, time) in self._seen.items() if time >= young), default="")
        folder = _folder(first)
        there = sorted((key, time) for key, (_, time) in self._seen.items() if _folder(key) == folder)
        times = [time for _, time in there]
        after = folder
        if times == sorted(times):
            after = max((key for key, _ in there if key < first), default=folder)
        after = min([after, *map(_folder, self.place.unfinished()), *self.place.unlisted()])
        self._after = max(self._after, after)
        self._seen = {key: told for key, told in self._seen.items() if key > self._after}

    def hand_out_again(self, file: NewFile) -> None:
        """Has a later listing hand a file out once more, a few times; `comes_again` tells whether it does."""
        known = (file.entry.key, file.entry.version)
        self._failed[known] = self._failed.get(known, 0) + 1
        if self._failed[known] < ROUNDS:
            self._again[file.url] = file
        else:
            del self._failed[known]

    def _is_over(self, until: datetime | None, idle: int) -> bool:
        """Whether no more is waited for, after so many listings in a row that brought nothing."""
        now = self.clock.now()
        if until is None or now < until or not self.is_done or self._is_unsettled(until):
            return False
        if self.newest is not None and self.newest >= until:
            return True
        return idle >= LOOKS and now >= until + self.lookback

    def _is_unsettled(self, until: datetime) -> bool:
        """Whether a file valid by then was still being written at the last listing."""
        names = (Path(key).name for key in self.place.unfinished())
        times = (time for name in names if (time := self.source.valid_time(name)) is not None)
        return any(time <= until and (self.start is None or time >= self.start) for time in times)

    def _waiting(self, until: datetime | None) -> str:
        since = "" if self.newest is None else f" after {self.newest:%Y-%m-%dT%H:%M:%SZ}"
        is_past = until is not None and self.clock.now() >= until + self.lookback
        return f"{self.place.root}: waiting for the next file{since}" + (
            f", until {LOOKS} looks in a row have found none" if is_past else ""
        )


def open_feed(
    source: NamedSource,
    cache: Path,
    start: datetime | None = None,
    lookback: timedelta = timedelta(hours=2),
    manners: Manners | None = None,
    largest: int = 2**29,
    cache_largest: int = 4 * 2**30,
    quiet: float = 5.0,
    clock: Clock | None = None,
) -> Feed:
    """The feed of a source at its `path` (a folder, s3://, gs:// or https://), from a valid time on.

    Files fetched go to the folder `cache`, of at most `cache_largest` bytes; a file may have `largest` bytes.
    Files that come more than `lookback` behind the newest one may be missed. See `place_at`.

    Raises:
        ValueError: if the path is none of these, the folder is not there, or the names of the source's files
            do not sort by time.
    """
    if source.path is None:
        raise ValueError("source.path=null: expected the folder or URL to follow")
    _check_sorted(source)
    if largest > cache_largest:
        raise ValueError(f"cache_largest={cache_largest}: expected at least the {largest} bytes of one file")
    web = Web(manners, clock or SystemClock())
    place = place_at(source.path, web, quiet)
    return Feed(source, place, Cache(cache, cache_largest), web.clock, start, lookback, largest)


def _check_sorted(source: NamedSource) -> None:
    """Refuses a form of times that do not sort as text: behind the newest name, later ones would be lost."""
    form = getattr(source, "time_format", None)
    if form is not None and (told := [f"{time:{form}}" for time in RISING]) != sorted(told):
        raise ValueError(
            f"source.time_format={form}: names with such times do not sort by time; expected the year first, "
            "then month and day, to follow a folder or read a URL; ingest a folder on this machine instead"
        )


def _pause(every: float, failures: int) -> float:
    """How long to wait after so many failures in a row (s), with jitter."""
    longest = min(LONGEST_PAUSE, every * 2 ** min(failures, 16))
    return random.uniform(longest / 2, longest)


def _folder(key: str) -> str:
    """The prefix of the folder that a key lies in."""
    return key[: key.rfind("/") + 1]


def _without_numbers(error: Exception) -> str:
    """What an error says, whatever the seconds and bytes in it."""
    return re.sub(r"\d+", "", str(error))


def _nothing(_: str) -> None:
    """Nobody wants to know."""
