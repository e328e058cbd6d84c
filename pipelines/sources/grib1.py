"""`StaticGrib1`: a relief or a land-sea mask that never changes, as one message of a GRIB1 file.

WMO FM 92 GRIB edition 1 (Manual on Codes I.2, 2009): simple packing on a grid of longitude and latitude,
whose coordinates are the centres of its cells. Read by its bytes, and only what such a field needs: anything
else is refused. The masks of MeteoNet (Meteo-France AROME, 0.025 degrees) come this way.
"""

import hashlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pipelines.cf import ELEVATION, LAND_FRACTION, Variable
from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, content, named_files

LARGEST = 64 * 2**20  # bytes of a file
MOST_CELLS = 64_000_000
MOST_MESSAGES = 1000
PARAMETERS: dict[int, Variable] = {8: ELEVATION, 81: LAND_FRACTION}  # code table 2, version 1
HAS_GRID = 0x80  # flags of section 1: a grid, and no bitmap


@dataclass(frozen=True)
class StaticGrib1:
    """The field of one parameter in a file that a folder holds, on a registered grid."""

    parameter: int  # of code table 2: 8 height of the surface (m), 81 share of land
    grid: Grid
    path: str | None = None
    name: str = r".*\.gri?b1?"  # regular expression of the file's name
    product: str = "relief and land-sea mask in GRIB1"  # as a person would say it
    sha256: str | None = None  # that the file must have, as the format has no checksum; None: any
    trusted: ClassVar[bool] = False
    group: ClassVar[str] = "static"

    def __post_init__(self) -> None:
        """Refuses parameters that are no static field."""
        if self.parameter not in PARAMETERS:
            raise ValueError(f"source.parameter={self.parameter}: expected one of {list(PARAMETERS)}")

    def valid_time(self, name: str) -> datetime | None:
        """Always, for the name of the file."""
        return ALWAYS if re.fullmatch(self.name, name) else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The field, whatever the time.

        Raises:
            ValueError: if the folder is not there, or holds no such file.
        """
        return named_files(self, None, None, self.product, self.name)

    def read(self, file: RemoteFile) -> Frame:
        """The field in one file.

        Raises:
            ValueError: naming the file, if it has not exactly one message of the parameter, or that is not
                one on the registered grid.
        """
        path = Path(file.url)
        read = content(path, LARGEST)
        try:
            sha256 = hashlib.sha256(read).hexdigest()
            if self.sha256 not in (None, sha256):
                raise ValueError(f"has SHA-256 {sha256}, expected {self.sha256}; damaged, or another edition")
            return Frame(
                variable=PARAMETERS[self.parameter],
                valid_time=ALWAYS,
                cadence=None,
                grid=self.grid,
                values=self._values(self._message(read)),
                source=self.product,
                sha256=sha256,
                group="static",
            )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def _message(self, read: bytes) -> list[bytes]:
        """The sections of the one message of the parameter."""
        messages = list(_messages(read))
        found = [sections for sections in messages if sections[0][8] == self.parameter]
        if len(found) != 1:
            held = [sections[0][8] for sections in messages]
            raise ValueError(f"holds the parameters {held}, expected {self.parameter} once")
        return found[0]

    def _values(self, sections: list[bytes]) -> NDArray[np.float32]:
        product, place, packed = sections
        if product[3] != 1 or product[9:12] != b"\x01\0\0":
            raise ValueError("a parameter of another table or level than the surface in version 1 of table 2")
        grid = _grid(place)
        if grid != self.grid:
            raise ValueError(f"lies on {grid}, expected {self.grid}")
        (decimal,) = struct.unpack(">H", product[26:28])
        return _unpacked(packed, grid.x_size * grid.y_size, _signed(decimal, 16)).reshape(grid.shape)


def _messages(read: bytes) -> Iterator[list[bytes]]:
    """The sections 1 (product), 2 (grid) and 4 (data) of all messages of a file, which hold nothing else."""
    place = count = 0
    while place < len(read):
        count += 1
        if read[place : place + 4] != b"GRIB" or read[place + 7 : place + 8] != b"\1":
            raise ValueError(f"not GRIB edition 1: {read[place : place + 8]!r} at byte {place}")
        end = place + int.from_bytes(read[place + 4 : place + 7])
        if count > MOST_MESSAGES or end > len(read) or read[end - 4 : end] != b"7777":
            raise ValueError("a message that does not end as it says; a cut or damaged file, fetch it again")
        yield _sections(read[place + 8 : end - 4])
        place = end


def _sections(body: bytes) -> list[bytes]:
    """A message's sections, of which each begins with its length."""
    sections, place = [], 0
    while place < len(body):
        size = int.from_bytes(body[place : place + 3])
        if size < 11 or place + size > len(body):
            break
        sections.append(body[place : place + size])
        place += size
    if place != len(body) or len(sections) != 3 or len(sections[0]) < 28 or sections[0][7] != HAS_GRID:
        raise ValueError(
            f"{len(sections)} sections with flags {sections[0][7] if sections else None}, expected product, "
            "grid and data without a bitmap; another kind of field, or a damaged file"
        )
    return sections


def _grid(section: bytes) -> Grid:
    """A grid of longitude and latitude from the north-west (section 2, in thousandths of degrees)."""
    if len(section) != 32 or section[5] != 0 or section[16] != 0x80 or section[27] != 0:
        raise ValueError("not on a plain grid of longitude and latitude from the north-west with even steps")
    columns, rows = struct.unpack(">HH", section[6:10])
    north, west, south, east = (
        _signed(int.from_bytes(section[start : start + 3]), 24) for start in (10, 13, 17, 20)
    )
    x_step, y_step = struct.unpack(">HH", section[23:27])
    if (east - west, north - south) != ((columns - 1) * x_step, (rows - 1) * y_step):
        raise ValueError("its last cell is not where its steps lead from the first; a damaged file")
    if not 0 < columns * rows <= MOST_CELLS:
        raise ValueError(f"{rows} x {columns} cells: expected up to {MOST_CELLS}")
    return Grid("EPSG:4326", west / 1000, x_step / 1000, columns, north / 1000, -y_step / 1000, rows)


def _unpacked(section: bytes, cells: int, decimal: int) -> NDArray[np.float32]:
    """The field of section 4: (reference + count * 2^binary) / 10^decimal."""
    flags, unused = section[3] >> 4, section[3] & 0xF
    binary = _signed(int.from_bytes(section[4:6]), 16)
    bits = section[10]
    if flags != 0 or bits not in (8, 16, 24) or not (-64 <= binary <= 64 and -10 <= decimal <= 10):
        raise ValueError(f"packed with {flags=}, {bits=}, {binary=}, {decimal=}: not simply, in whole bytes")
    size = bits // 8
    if 8 * (len(section) - 11) - unused != cells * bits:
        raise ValueError(
            f"{len(section) - 11} bytes of data for {cells} cells of {bits} bits; a damaged file"
        )
    octets = np.frombuffer(section, np.uint8, cells * size, 11).reshape(cells, size)
    counts = np.zeros(cells, np.uint32)
    for octet in octets.T:
        counts = counts << np.uint32(8) | octet.astype(np.uint32)
    values = (_ibm_float(section[6:10]) + counts * 2.0**binary) / 10.0**decimal
    return values.astype(np.float32)


def _signed(number: int, bits: int) -> int:
    """A number whose first bit is its sign, and not a complement."""
    sign = 1 << (bits - 1)
    return sign - number if number & sign else number


def _ibm_float(octets: bytes) -> float:
    """A single-precision number of the IBM System/360: sign, power of 16 (plus 64), 24-bit fraction."""
    (number,) = struct.unpack(">I", octets)
    value = (number & 0xFFFFFF) / 2**24 * 16.0 ** ((number >> 24 & 0x7F) - 64)
    return -value if number >> 31 else value
