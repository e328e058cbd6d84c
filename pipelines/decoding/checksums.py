"""`Checksum`: what a provider published beside its files, in the form of coreutils' sha256sum and md5sum.

That is NAME.sha256 or NAME.md5, or a list SHA256SUMS or MD5SUMS in the file's folder or one above it.
"""

import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

LARGEST_LIST = 64 * 2**20  # bytes of a list of checksums: about half a million files
LINE = re.compile(r"\\?([0-9a-fA-F]{32}|[0-9a-fA-F]{64})(?: [ *](.+))?")  # coreutils: digest, mark, name
DIGITS = {"sha256": 64, "md5": 32}


@dataclass(frozen=True)
class Checksum:
    """A digest as it was published, and where."""

    algorithm: str  # "sha256" or "md5"
    digest: str  # lower-case hexadecimal
    place: Path


def published(path: Path, root: Path | None) -> Iterator[Checksum]:
    """The checksums that lie beside a file, or in lists in its folder and those above as far as `root`.

    Raises:
        ValueError: if a file of checksums is too large, or beside the file and without a digest of it.
        OSError: if one cannot be opened.
    """
    for algorithm in DIGITS:
        beside = path.with_name(f"{path.name}.{algorithm}")
        if beside.is_file():
            digests = dict(_digests(beside, algorithm))
            if not digests.keys() & {"", path.name}:
                raise ValueError(f"{beside.name} lies beside it and holds no {algorithm} checksum of it")
            yield Checksum(algorithm, digests.get(path.name) or digests[""], beside)
    for folder in _folders(path, root):
        for algorithm in DIGITS:
            listed = folder / f"{algorithm.upper()}SUMS"
            if listed.is_file():
                digest = _digests(listed, algorithm).get(path.relative_to(folder).as_posix())
                if digest is not None:
                    yield Checksum(algorithm, digest, listed)


def _folders(path: Path, root: Path | None) -> list[Path]:
    """The file's folder and those above it as far as `root`; only its own if it lies elsewhere."""
    above = [folder for folder in path.parents if root is not None and folder.is_relative_to(root)]
    return above or [path.parent]


def _digests(path: Path, algorithm: str) -> dict[str, str]:
    with opened(path) as file:
        found = os.fstat(file.fileno())
        if found.st_size > LARGEST_LIST:
            raise ValueError(f"{path.name}: larger than {LARGEST_LIST} bytes, which no list of checksums is")
    return _parsed(path, algorithm, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=16)
def _parsed(path: Path, algorithm: str, size: int, changed: int) -> dict[str, str]:
    """Digests by name ("" where none is told); read again when the size or the time of change is another."""
    digests = {}
    with opened(path) as file:
        for line in file.read(size).decode(errors="replace").splitlines():
            match = LINE.fullmatch(line.strip())
            if match and len(match[1]) == DIGITS[algorithm]:
                digests[(match[2] or "").removeprefix("./")] = match[1].lower()
    return digests


def opened(path: Path) -> io.BufferedReader:
    """A plain file, open for reading; a link, a pipe or a device is none.

    Raises:
        OSError: if it is not there, no plain file, or not to be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path}: no plain file")
    return os.fdopen(descriptor, "rb")


def digest(path: Path, algorithm: str) -> str:
    """Of a plain file's bytes, in lower-case hexadecimal.

    Raises:
        OSError: if it cannot be opened, or is no plain file.
    """
    with opened(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
