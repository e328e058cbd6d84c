"""`metnet_chunks.json`: which chunks an array of a plain Zarr store must have, and their checksums.

Zarr reads a chunk that was deleted as its fill value, without a word. The arrays that this software
exports have every chunk, each with a CRC-32C as its last four bytes (codec crc32c, which finds a changed
chunk); the list of these, beside the array's zarr.json, finds chunks that are gone or in another's place.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

NAME = "metnet_chunks.json"
METADATA = "zarr.json"
CHECKSUM = 4  # bytes at the end of a chunk
LARGEST = 2**28  # bytes of a list: thirty million chunks


@dataclass(frozen=True)
class Manifest:
    """The chunks of one array in a folder."""

    folder: Path
    shape: tuple[int, ...]  # how many chunks along each dimension
    checksums: (
        str  # CRC-32C of each chunk as it ends the file, 8 hexadecimal digits, the last dimension first
    )
    metadata: str  # SHA-256 of the array's zarr.json

    @classmethod
    def of(cls, folder: Path, shape: tuple[int, ...]) -> "Manifest":
        """Of an array as it lies in a folder.

        Raises:
            OSError: if a chunk is not there.
        """
        checksums = "".join(_checksum(folder / _key(place)) for place in _places(shape))
        return cls(folder, shape, checksums, _sha256(folder / METADATA))

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """As it was written; None if there is none.

        Raises:
            ValueError: if it is damaged, or the array's metadata are other than they were.
        """
        path = folder / NAME
        if not path.is_file():
            return None
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path}: larger than {LARGEST} bytes; export the store again")
        try:
            told = json.loads(path.read_bytes())
            shape, checksums = tuple(int(size) for size in told["chunks"]), str(told["crc32c"])
            found = cls(folder, shape, checksums, str(told["metadata_sha256"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: a damaged list of chunks ({error}); export the store again") from error
        if len(checksums) != 2 * CHECKSUM * math.prod(shape) or found.metadata != _sha256(folder / METADATA):
            raise ValueError(f"{path}: does not belong to the array beside it; export the store again")
        return found

    def write(self) -> None:
        """Writes the list beside the array's metadata."""
        told: dict[str, Any] = {
            "about": "all chunks of this array, by the CRC-32C that ends each, the last dimension first",
            "chunks": self.shape,
            "crc32c": self.checksums,
            "metadata_sha256": self.metadata,
        }
        (self.folder / NAME).write_text(json.dumps(told))

    def check(self, step: int | None = None) -> None:
        """Looks whether the chunks are there, each in its place; `step`: only those of an index of the first.

        Raises:
            ValueError: naming the first that is not.
        """
        together = math.prod(self.shape[1:])
        first, last = (0, math.prod(self.shape)) if step is None else (step * together, (step + 1) * together)
        if not 0 <= first <= last <= math.prod(self.shape):
            raise ValueError(f"{self.folder / NAME}: does not know of step {step}; export the store again")
        places = self._keys if step is None else self._keys[first:last]
        for number, key in enumerate(places, first):
            digits = slice(2 * CHECKSUM * number, 2 * CHECKSUM * (number + 1))
            try:
                found = _checksum(self.folder / key)
            except OSError as error:
                raise ValueError(
                    f"{self.folder / key}: the chunk cannot be read ({error.strerror or error}), though it "
                    "was exported; export the store again"
                ) from error
            if found != self.checksums[digits]:
                raise ValueError(
                    f"{self.folder / key}: another chunk than the one that was exported; "
                    "export the store again"
                )

    @cached_property
    def _keys(self) -> list[str]:
        return [_key(place) for place in _places(self.shape)]


def _places(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return product(*map(range, shape))


def _key(place: tuple[int, ...]) -> str:
    """The file of a chunk (Zarr v3, chunk key encoding "default")."""
    return "/".join(["c", *map(str, place)])


def _checksum(chunk: Path) -> str:
    with chunk.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - CHECKSUM))
        return file.read().hex()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
