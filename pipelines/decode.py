"""`Decoder`: a source's `read` in a process that can do no harm, and its contract checked on this side."""

import errno
import hashlib
import logging
import os
import stat
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from pipelines.counts import packed
from pipelines.decoding import checksums, sandbox
from pipelines.decoding.reader import Limits, Readers
from pipelines.decoding.refusal import Code, Refusal
from pipelines.frame import Frame
from pipelines.sources.source import SAFE_NAME, RemoteFile, Source, within

AHEAD = timedelta(hours=1)  # of our clock: clocks differ, and nobody has observed the future
COPIED = 256 * 2**20  # bytes of the largest file that is copied; a larger one is read where it lies
BLOCK = 2**20  # bytes that are copied at a time
SAMPLE = 997  # a prime, so that the cells looked at first are in no one column


def decode(source: Source, file: RemoteFile, limits: Limits | None = None) -> Frame:
    """The frame in one local file; see `Decoder`."""
    with Decoder(source, limits) as decoder:
        return decoder.decode(file)


class Decoder:
    """Reads the files of one source, in processes of their own unless the source is trusted.

    Where the system has Landlock, such a process can open one file at a time and nothing else: a copy that
    does not change while it is read, in a folder that holds nothing but it. Of a store it can open the
    folder, of a source that says `beside` all of the source's folder.
    """

    def __init__(self, source: Source, limits: Limits | None = None):
        """The processes start with the first file."""
        self.source = source
        self.limits = limits or Limits()
        self._readers: Readers | None = None
        self._inbox: tempfile.TemporaryDirectory[str] | None = None
        self._last: _Taken | None = None
        self._given_up: dict[str, Refusal] = {}  # by path: what ended its reader when it was listed

    def __enter__(self) -> Self:
        """The decoder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the processes, and leaves no copy behind."""
        if self._readers is not None:
            self._readers.end()
            self._readers = None
        if self._inbox is not None:
            self._inbox.cleanup()
            self._inbox = self._last = None

    def decode(self, file: RemoteFile) -> Frame:
        """The frame in a local file.

        Raises:
            Refusal: a `ValueError` naming the file and why it may not enter a cube: see `Code`.
            OSError: if there is no room for a copy of the file.
        """
        if file.url in self._given_up:
            raise self._given_up.pop(file.url)
        if self.source.trusted:
            frame = self._read_here(file)
        else:
            frame = self._read(file)
            _check_observed(file, frame)
            _check_steps(file, frame)
        self._check_place(file, frame)
        return frame

    def _read_here(self, file: RemoteFile) -> Frame:
        try:
            return self.source.read(file)
        except ValueError as error:
            raise Refusal(Code.DAMAGED, str(error)) from error

    def _read(self, file: RemoteFile) -> Frame:
        """The frame that the source reads in the file, and in no other bytes than those that are there."""
        path = _absolute(file.url)
        taken = self._taken(path.resolve() if path == self._place() else path)
        place = _followed(self._place()) if self._reads_beside else None
        given = RemoteFile(str(taken.given), file.valid_time)
        try:
            frame = self._running().frame(given, [taken.readable, *([place] if place else [])])
        except Refusal:
            _check_unchanged(taken)  # a file that is still being written is not damaged
            raise
        _check_unchanged(taken)
        if taken.sha256 not in (None, frame.sha256) and not self._reads_beside:
            raise Refusal(
                Code.INVALID,
                f"{taken.path.name}: its reader names the sha256 {frame.sha256}, but it has {taken.sha256}",
            )
        return frame

    def files(self, start: datetime | None, end: datetime | None) -> list[RemoteFile]:
        """What the source has within [start, end]; some have to open their files for it.

        Raises:
            ValueError: if that fails, or is nothing at all.
        """
        if self.source.trusted:
            return list(self.source.files(start, end))
        place = self._place()
        if hasattr(self.source, "places"):
            found = self._files_by_place(start, end, place)
        else:
            found = self._running().files(start, end, _followed(place))
        for file in found:
            if place is not None and not _absolute(file.url).is_relative_to(place):
                raise Refusal(Code.INVALID, f"{file.url}: listed, but not within source.path={place}")
        return found

    def _files_by_place(
        self, start: datetime | None, end: datetime | None, folder: Path | None
    ) -> list[RemoteFile]:
        """What is in each of the source's places; one that cannot be listed is a file without a time.

        Such a one is not opened again to tell why.
        """
        found: list[RemoteFile] = []
        opened = _followed(folder)
        for place in self._running().places(opened):
            try:
                found += self._running().files(start, end, opened, place)
            except Refusal as refusal:
                self._given_up[str(place)] = refusal
                found.append(RemoteFile(str(place), None))
        return list(within(found, None, None))

    def _running(self) -> Readers:
        if self._readers is not None and not self._readers.alive:
            self._readers.end()
            self._readers = None
        if self._readers is None:
            _warn_of_open_files()
            self._readers = Readers(self.source, self.limits)
        return self._readers

    def _place(self) -> Path | None:
        """The source's folder, store or only file; None if it has none, or not on this machine."""
        path = getattr(self.source, "path", None)
        if path is None or not os.path.exists(path):  # noqa: PTH110 - False too where it may not be looked at
            return None
        return _absolute(path)

    @property
    def _reads_beside(self) -> bool:
        """Whether the source says that its frames are in several files that lie side by side."""
        return bool(getattr(self.source, "beside", False))

    def _taken(self, path: Path) -> "_Taken":
        """A file as its reader is to have it.

        Raises:
            Refusal: if its name is unsafe, or it is no plain file, too large, or not what its provider
                published.
        """
        if not SAFE_NAME.fullmatch(path.name) and path != _followed(self._place()):
            raise Refusal(Code.UNSAFE_NAME, f"{path.name!r}: an unsafe name; expected {SAFE_NAME.pattern}")
        try:
            state = _state(path)
            if stat.S_ISLNK(state.mode):
                raise Refusal(Code.UNSAFE_NAME, f"{path.name}: a link, which may lead anywhere")
            if self._last is None or (self._last.path, self._last.state) != (path, state):
                self._last = None  # its copy is about to go
                self._last = self._take(path, state)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise Refusal(Code.UNREADABLE, str(error)) from error
        return self._last

    def _take(self, path: Path, state: "_State") -> "_Taken":
        """A copy of the file that nothing else writes to; or the file, where it is not to be copied."""
        if stat.S_ISDIR(state.mode):
            return _Taken(path, state, None, path, path)
        if state.size > self.limits.size:
            raise Refusal(
                Code.TOO_LARGE, f"{path.name}: {state.size} bytes; a reader takes {self.limits.size} at most"
            )
        if self._reads_beside or state.size > COPIED:
            sha256 = checksums.digest(path, "sha256")
            self._check_published(path, path, sha256)
            return _Taken(path, state, sha256, path, path)
        inbox = self._emptied_inbox()
        sha256 = _copied(path, state.size, inbox / path.name)
        self._check_published(path, inbox / path.name, sha256)
        return _Taken(path, state, sha256, inbox / path.name, inbox)

    def _emptied_inbox(self) -> Path:
        if self._inbox is None:
            self._inbox = tempfile.TemporaryDirectory(prefix="metnet-")
        inbox = Path(self._inbox.name)
        for path in inbox.iterdir():
            path.unlink()
        return inbox

    def _check_published(self, path: Path, taken: Path, sha256: str) -> None:
        """Refuses bytes that are not what the provider published a checksum of."""
        try:
            for checksum in checksums.published(path, self._place()):
                md5 = checksum.algorithm == "md5"
                got = checksums.digest(taken, "md5") if md5 else sha256
                if got != checksum.digest:
                    raise ValueError(
                        f"its {checksum.algorithm} is {got}, but {checksum.place.name} says "
                        f"{checksum.digest}; a damaged file, fetch it again"
                    )
        except ValueError as error:
            raise Refusal(Code.CHECKSUM, f"{path.name}: {error}") from error

    def _check_place(self, file: RemoteFile, frame: Frame) -> None:
        """Refuses a frame of another time than the file's, of the future, or on another grid."""
        name = Path(file.url).name
        if file.valid_time is not None and frame.valid_time != file.valid_time:
            raise Refusal(
                Code.WRONG_TIME,
                f"{name}: the frame in it is valid at {frame.valid_time:%Y-%m-%dT%H:%M:%SZ}, "
                f"but its name says {file.valid_time:%Y-%m-%dT%H:%M:%SZ}",
            )
        if not self.source.trusted and frame.valid_time > datetime.now(UTC) + AHEAD:
            raise Refusal(
                Code.FUTURE,
                f"{name}: valid at {frame.valid_time:%Y-%m-%dT%H:%M:%SZ}, which is yet to come; "
                "is this machine's clock right?",
            )


def _check_observed(file: RemoteFile, frame: Frame) -> None:
    """Refuses an observation without an observed cell, or with one value everywhere but "nothing there".

    Both are what a failing service sends, and neither says anything of the weather: a missing frame
    is NaN in the cube as well. A field of zeros (or below: reflectivity of no echo) is a dry day. What
    does not change (land everywhere, say) may be the same everywhere.
    """
    if frame.cadence is None:
        return
    cells = frame.values.ravel()
    for part in (cells[::SAMPLE], cells):
        observed = part[~np.isnan(part)]
        if observed.size and observed.min() != observed.max():
            return
    name = Path(file.url).name
    if not observed.size:
        raise Refusal(Code.UNOBSERVED, f"{name}: not one of its {cells.size} cells was observed")
    if observed[0] > 0:
        raise Refusal(
            Code.ALL_EQUAL,
            f"{name}: all of its {observed.size} observed cells are {observed[0]:g} {frame.variable.units}",
        )


def _check_steps(file: RemoteFile, frame: Frame) -> None:
    """Refuses values that are not what the reader says they are multiples of."""
    if frame.scale_factor is not None:
        try:
            packed(frame.values, frame.scale_factor)
        except ValueError as error:
            raise Refusal(Code.INVALID, f"{Path(file.url).name}: {error}, which it is said to be") from error


class _State(NamedTuple):
    """Which file it is, and what shows that it changed."""

    device: int
    number: int
    mode: int
    size: int
    written: int  # ns, when its bytes last changed
    changed: int  # ns, when anything of it did


@dataclass(frozen=True)
class _Taken:
    """A file as its reader has it."""

    path: Path
    state: _State
    sha256: str | None  # None: a store
    given: Path  # the same, or a copy
    readable: Path  # it, or the folder it is alone in


def _state(path: Path) -> _State:
    found = path.stat(follow_symlinks=False)
    return _State(
        found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    )


def _check_unchanged(taken: _Taken) -> None:
    """Refuses what is another file, or another's bytes, than when it was taken."""
    try:
        same = _state(taken.path) == taken.state
    except OSError:
        same = False
    if not same:
        raise Refusal(Code.CHANGED, f"{taken.path.name}: changed while it was read; try again later")


def _copied(path: Path, size: int, copy: Path) -> str:
    """Copies as many bytes of a plain file; returns the sha256 of what was copied.

    Raises:
        OSError: if it cannot be opened, is no plain file, or there is no room.
    """
    digest = hashlib.sha256()
    with checksums.opened(path) as file, copy.open("xb") as copied:
        while part := file.read(min(BLOCK, size)):
            size -= len(part)
            digest.update(part)
            copied.write(part)
    return digest.hexdigest()


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - the name as it is: links are not followed


def _followed(place: Path | None) -> Path | None:
    """What the user's own path leads to, who may have made a link of it; none is followed below it."""
    return None if place is None else place.resolve()


@lru_cache(maxsize=1)
def _warn_of_open_files() -> None:
    """Says once that readers are less confined than they should be, where that is so."""
    if not sandbox.landlock_version():
        logging.getLogger(__name__).warning(
            "this system has no Landlock: what reads a file from outside can open other files as well"
        )
