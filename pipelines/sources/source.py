"""`Source`: the contract of every service and format, and what those that lie in files share."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Protocol

from pipelines.formats.inflate import GZIP, DamageError, inflater
from pipelines.frame import Frame
from pipelines.words import plural, printable

SAFE_NAME = re.compile(r"[A-Za-z0-9._@+,=:-]{1,200}")  # what a file may be called
UNZIPPED_AT_ONCE = 2**24  # bytes
PASSED_OVER = re.compile(r".*\.(md5|sha1|sha256|idx|tmp|part|partial)")  # beside the data, or half of it


@dataclass(frozen=True)
class RemoteFile:
    """A frame that a source knows of: the file it is in and the time it is valid at."""

    url: str  # a local path, or a URL
    valid_time: datetime | None  # UTC; None: the name does not tell, and the file could not be opened


class Source(Protocol):
    """Where frames come from. Sources do not know each other, nor the cube.

    One whose frames are in several files that lie side by side also says `beside: ClassVar[bool] = True`, so
    that its reader may open all of the source's folder, and not one file alone. One whose frames belong to
    another group of a cube than "radar" says which: `group: ClassVar[str]`. One that opens its files to list
    them has `places() -> Iterator[Path]`: what it would open, by name alone; each of them may stand for its
    `path`, so that a file which holds up whoever opens it holds up no other.
    """

    trusted: ClassVar[bool]  # whether it reads no bytes from outside, and so needs no process of its own

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The frames valid within [start, end], by rising valid time; those of an unknown time come last.

        Raises:
            ValueError: if the place is not there, or holds nothing of this source at all.
        """
        ...

    def read(self, file: RemoteFile) -> Frame:
        """The frame that `files` named, out of a local file, on its native grid.

        Raises:
            ValueError: naming the file, what was expected and what was got, if it is not this
                source's product or is damaged.
        """
        ...


class NamedSource(Source, Protocol):
    """A source with one frame a file, whose name tells the time: one that can be followed."""

    @property
    def path(self) -> str | None:
        """A folder, or the URL of a bucket."""
        ...

    def valid_time(self, name: str) -> datetime | None:
        """When the frame in a file of this name is valid (UTC); None if it is no file of this product."""
        ...


def named_files(
    source: NamedSource, start: datetime | None, end: datetime | None, product: str, examples: str
) -> Iterator[RemoteFile]:
    """The files of a source within [start, end], by rising valid time, out of its folder and all below.

    `product` and `examples` (of names) are for the message where there are none.

    Raises:
        ValueError: if the folder is not there, or holds no file of this product at all.
    """
    found = [
        RemoteFile(str(path), time)
        for path in paths(source.path, product)
        if (time := source.valid_time(path.name)) is not None
    ]
    if not found:
        links = len(unread(source).links)
        not_followed = f" ({plural(links, 'link')} not followed)" if links else ""
        raise ValueError(
            f"{source.path}: no files of {product} there or in its subfolders{not_followed}; "
            f"looked for names such as {examples}"
        )
    yield from within(found, start, end)


def paths(folder: str | None, product: str) -> Iterator[Path]:
    """The plain files in a folder and all below whose names are safe to use; `unread` has the others.

    Raises:
        ValueError: if the folder is not there, is none, or cannot be listed.
    """
    for item in _below(listable(folder, f"files of {product}")):
        if _is_data(item.name) and not item.is_symlink() and not item.is_dir():
            yield Path(item.path)


@dataclass(frozen=True)
class Unread:
    """What lies in a source's folder and all below, and is read by nobody."""

    names: Sequence[str] = ()  # of files, not safe to use
    links: Sequence[str] = ()  # paths below the folder; none is followed
    folders: Mapping[str, str] = field(default_factory=dict)  # that cannot be listed, and why

    def passed_over(self, folder: str | None) -> Iterator[str]:
        """What a person wants to know of the files in a source's folder that are not read, and what to do."""
        if self.names:
            yield (
                f"{folder}: {plural(len(self.names), 'file')} passed over for their names, such as "
                f"{self.names[0]!r}; expected letters, digits and ._@+,=:-"
            )
        if self.links:
            yield (
                f"{folder}: {plural(len(self.links), 'link')} not followed, such as "
                f"{', '.join(map(repr, self.links[:3]))}; copy or hard-link what is to be read, or give the "
                "folder that they lead to as source.path"
            )


def unread(source: Source) -> Unread:
    """What lies in a source's folder and is passed over, though somebody may want it read.

    Of links those with the name of a file of the source, and those to folders elsewhere.
    """
    root = getattr(source, "path", None)
    if root is None or not os.path.isdir(root):  # noqa: PTH112 - False too where it may not be looked at
        return Unread()
    valid_time = getattr(source, "valid_time", None)
    names, links, folders = list[str](), list[str](), dict[str, str]()

    def is_wanted(link: os.DirEntry[str]) -> bool:
        with suppress(OSError):  # it leads to nothing, or where this user may not go
            if link.is_dir():
                return not Path(link.path).resolve().is_relative_to(Path(root).resolve())
        return _is_data(link.name) and (valid_time is None or valid_time(link.name) is not None)

    def cannot_be_listed(folder: str, error: OSError) -> None:
        if folder != root:  # of which the source itself says so
            folders[folder] = unlistable(folder, error)

    for item in _below(root, cannot_be_listed):
        if item.is_symlink():
            links += [str(Path(item.path).relative_to(root))] if is_wanted(item) else []
        elif not SAFE_NAME.fullmatch(item.name) and not item.is_dir():
            names.append(item.name)
    return Unread(names, links, folders)


def listable(folder: str | None, content: str) -> str:
    """The folder of a source; `content`: what is expected in it.

    Raises:
        ValueError: if it is not there, is a file, or cannot be listed.
    """
    if folder is None:
        raise ValueError(f"source.path=null: expected a folder with {content}")
    try:
        with _scanned(folder):
            return folder
    except FileNotFoundError:
        raise ValueError(f"source.path={folder}: no such folder; expected one with {content}") from None
    except NotADirectoryError:
        raise ValueError(
            f"source.path={folder}: is a file; expected a folder with {content}, such as the one it lies in"
        ) from None
    except OSError as error:
        raise ValueError(f"source.path={unlistable(folder, error)}") from None


def unlistable(folder: str, error: OSError) -> str:
    """What a person wants to know of a folder that cannot be listed."""
    hint = "; give this user the right to (chmod u+rx)" if isinstance(error, PermissionError) else ""
    return f"{printable(folder)}: cannot be listed ({error.strerror}), so nothing in it is read{hint}"


def first_of(folders: Sequence[str]) -> str:
    """The first of some sentences about folders, and how many more there are."""
    return folders[0] + (f"; nor can {len(folders) - 1} more folders" if len(folders) > 1 else "")


def _is_data(name: str) -> bool:
    return bool(SAFE_NAME.fullmatch(name)) and not PASSED_OVER.fullmatch(name)


def _scanned(folder: str) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    """What is in a folder, whose files this user may open too.

    Raises:
        OSError: if that is not so.
    """
    os.stat(f"{folder}/.")  # noqa: PTH116 - `Path` drops the dot, which takes the right to enter the folder
    return os.scandir(folder)


def _nobody(_: str, __: OSError) -> None:
    """Nobody is told: `unread` tells."""


def _below(
    folder: str, cannot_be_listed: Callable[[str, OSError], None] = _nobody
) -> Iterator[os.DirEntry[str]]:
    """All that is in a folder and those below it, by name; no link is followed."""
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            with _scanned(place) as found:
                items = sorted(found, key=lambda item: item.name)
            folders = [item.path for item in items if item.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            continue  # it went away meanwhile
        except OSError as error:
            cannot_be_listed(place, error)
            continue
        yield from items
        waiting += reversed(folders)


def within(files: list[RemoteFile], start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
    """Those valid within [start, end], by rising valid time; those of an unknown time come last."""
    known = [(file.valid_time, file.url, file) for file in files if file.valid_time is not None]
    for time, _, file in sorted(known, key=lambda entry: entry[:2]):
        if (start is None or start <= time) and (end is None or time <= end):
            yield file
    yield from (file for file in files if file.valid_time is None)


def stamp(text: str, form: str) -> datetime | None:
    """The UTC time that `text` gives in a `strptime` format; None if it is no time."""
    try:
        return datetime.strptime(text, form).replace(tzinfo=UTC)
    except ValueError:
        return None


def content(path: Path, largest: int) -> bytes:
    """A file's bytes.

    Raises:
        ValueError: if it has more than `largest`.
    """
    with path.open("rb") as file:
        read = file.read(largest + 1)
    if len(read) > largest:
        raise ValueError(f"{path.name}: larger than {largest} bytes, which no file of this product is")
    return read


def unzipped(zipped: bytes, largest: int) -> bytes:
    """The bytes, unzipped where they are zipped (gzip), with nothing behind the end.

    Raises:
        ValueError: if they are damaged or cut, or grow to more than `largest`.
    """
    if not zipped.startswith(b"\x1f\x8b"):
        return zipped
    unzip = inflater(GZIP)
    parts, left, size = [], zipped, 0
    while left and not unzip.eof:
        try:
            parts.append(unzip.decompress(left, UNZIPPED_AT_ONCE))
        except DamageError as error:
            raise ValueError(f"a damaged gzip file ({error})") from error
        left, size = unzip.unconsumed_tail, size + len(parts[-1])
        if size > largest:
            raise ValueError(
                f"a gzip file that grows to more than {largest} bytes, which no file of this product does"
            )
    if not unzip.eof:
        raise ValueError("a gzip file that ends too early")
    if unzip.unused_data:
        raise ValueError("a gzip file with more bytes behind its end")
    return b"".join(parts)
