"""`Source`: the contract of every service and format, and what those that lie in files share."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Protocol

from pipelines.formats.inflate import GZIP, DamageError, inflater
from pipelines.frame import Frame

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
        raise ValueError(
            f"{source.path}: no files of {product} there or in its subfolders; "
            f"looked for names such as {examples}"
        )
    yield from within(found, start, end)


def paths(folder: str | None, product: str) -> Iterator[Path]:
    """The plain files in a folder and all below whose names are safe to use; links are not followed.

    Raises:
        ValueError: if the folder is not there.
    """
    if folder is None or not Path(folder).is_dir():
        raise ValueError(f"source.path={folder}: no such folder; expected one with files of {product}")
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place) / name
            if SAFE_NAME.fullmatch(name) and not PASSED_OVER.fullmatch(name) and not path.is_symlink():
                yield path


def unsafe_names(folder: str | None) -> list[str]:
    """The names in a folder and all below that `paths` passes over because they are not safe to use."""
    if folder is None:
        return []
    return [
        name for _, _, names in os.walk(folder) for name in sorted(names) if not SAFE_NAME.fullmatch(name)
    ]


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
