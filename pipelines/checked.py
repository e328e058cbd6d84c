"""`save`, `load`: an array in a file of its own (.npy) with a CRC-32C behind it, to be mapped."""

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

CHECKSUM = 4  # bytes behind the array, the most significant first
AT_ONCE = 2**24  # bytes in memory while a file is checked


def save(path: Path, array: NDArray[Any]) -> None:
    """Writes an array, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        np.save(file, array)
    crc = _crc(unfinished, unfinished.stat().st_size)
    with unfinished.open("ab") as file:
        file.write(crc)
    unfinished.replace(path)


def load(path: Path) -> NDArray[Any]:
    """The array in a file, mapped.

    Raises:
        ValueError: if the file is not what was written.
    """
    length = path.stat().st_size - CHECKSUM
    with path.open("rb") as file:
        file.seek(max(0, length))
        written = file.read()
    if length <= 0 or _crc(path, length) != written:
        raise ValueError(f"{path}: damaged: its CRC-32C is not the one at its end; delete it")
    mapped: NDArray[Any] = np.load(path, mmap_mode="r")
    return mapped


def _crc(path: Path, length: int) -> bytes:
    """Of the first bytes of a file."""
    crc = 0
    with path.open("rb") as file:
        while part := file.read(min(AT_ONCE, length)):
            crc = google_crc32c.extend(crc, part)
            length -= len(part)
    return crc.to_bytes(CHECKSUM, "big")
