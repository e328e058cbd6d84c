"""`XBand`: pictures of a small X-band radar (PNG, grey and alpha), such as that of Cagliari.

Grey is reflectivity; alpha tells where there is an echo. Nothing tells "dry" from "not seen" but the radar's
range: beyond it is NaN, within it no echo is 0. The time is in the name only. tdm-project/tdm-tools is the
source of scale, Z-R and turn; nothing in the real files confirms the turn.
"""

import hashlib
import io
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.cf import RAINFALL_RATE
from pipelines.frame import Frame, parse_time
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, content, named_files, stamp
from pipelines.words import z_r_law

Pairs = NDArray[np.uint16]  # grey in the lower byte, alpha in the upper

CAGLIARI = Grid("EPSG:3003", 1_478_729.0, 60.0, 1024, 4_372_885.0, -60.0, 1024)  # of radarfootprint.tif
LARGEST = 8 * 2**20  # bytes; a picture that PNG cannot shrink at all has 2 MB
SIGNATURE = b"\x89PNG\r\n\x1a\n"
ECHO = 255  # alpha; any other is no echo
TURN, TURN_BEFORE = 54.0, "2018-12-21T17:30Z"  # degrees anticlockwise, of the pictures before


@dataclass(frozen=True)
class XBand:
    """Pictures in a folder and its subfolders, on a square grid with the radar in its middle.

    They come a little more or less than a minute apart: the valid time is that in the name, rounded to the
    cadence. Of two that share one, the earlier comes first.
    """

    path: str | None = None
    name: str = r"(\d{4}-\d\d-\d\d_\d\d:\d\d:\d\d)\.png"  # group 1 is the time (taken as UTC)
    time: str = "%Y-%m-%d_%H:%M:%S"  # its form
    product: str = "Cagliari X-band radar"
    grid: Grid = CAGLIARI
    gain: float = 0.39216  # dBZ of one step of grey
    offset: float = -8.6  # dBZ of grey 0
    z_r: Sequence[float] = (100.0, 1.5)  # a and b of Z = a R^b
    reach: float = (
        30_744.0  # m from the radar, of cells before the turn; no echo of 60 real pictures is beyond
    )
    turn: float = TURN  # degrees anticlockwise about the middle, of the pictures before `turn_before`
    turn_before: str = TURN_BEFORE
    cadence: float = 1.0  # minutes
    trusted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            ValueError: for a grid that is not square, or a Z-R that is not two numbers above 0.
        """
        if self.grid.x_size != self.grid.y_size or self.grid.x_step != -self.grid.y_step:
            raise ValueError(f"grid={self.grid}: expected as many columns as rows, and square cells")
        if len(self.z_r) != 2 or min(self.z_r) <= 0:
            raise ValueError(f"z_r={list(self.z_r)}: expected a and b of Z = a R^b, such as [100, 1.5]")

    def valid_time(self, name: str) -> datetime | None:
        """The time in the name, rounded to the cadence; None for names of other products."""
        taken = self._taken(name)
        if taken is None:
            return None
        cadence = 60 * self.cadence
        return datetime.fromtimestamp(math.floor(taken.timestamp() / cadence + 0.5) * cadence, UTC)

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, or holds no file of this product at all.
        """
        return named_files(self, start, end, self.product, f"those that match {self.name}")

    def read(self, file: RemoteFile) -> Frame:
        """The rain rate (mm/h) of one picture; NaN beyond the radar's range.

        Raises:
            ValueError: naming the file, if it is not a whole picture of this radar.
        """
        path = Path(file.url)
        read = content(path, LARGEST)
        try:
            taken, valid_time = self._taken(path.name), self.valid_time(path.name)
            if taken is None or valid_time is None:
                raise ValueError(f"no time in its name, which nothing else tells; expected {self.name}")
            turn = self.turn if taken < parse_time(self.turn_before) else 0.0
            return Frame(
                variable=RAINFALL_RATE,
                valid_time=valid_time,
                cadence=timedelta(minutes=self.cadence),
                grid=self.grid,
                values=self._rain_rate(_picture(read, self.grid.x_size), turn),
                source=f"{self.product}, {z_r_law(self.z_r)}",
                sha256=hashlib.sha256(read).hexdigest(),
            )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def _taken(self, name: str) -> datetime | None:
        """The time in a name."""
        match = re.fullmatch(self.name, name)
        return stamp(match[1], self.time) if match else None

    def _rain_rate(self, pairs: Pairs, turn: float) -> NDArray[np.float32]:
        size = self.grid.x_size
        beyond = _beyond(size, self.reach / self.grid.x_step)
        echoes = int((pairs[beyond] >> 8 == ECHO).sum())
        if echoes:
            raise ValueError(
                f"{echoes} echoes beyond the {self.reach / 1000:g} km that this radar reaches: "
                "another radar's picture, or a damaged one"
            )
        origin = _turned(size, turn)
        rate: NDArray[np.float32] = self._rates()[pairs.ravel()[origin]]
        rate[(origin < 0) | beyond.ravel()[origin]] = np.nan
        return rate

    def _rates(self) -> NDArray[np.float32]:
        """The rain rate (mm/h) of every pair of grey and alpha."""
        a, b = self.z_r
        dbz = self.gain * np.arange(256) + self.offset
        rates = np.zeros((256, 256), np.float32)  # alpha, grey
        rates[ECHO] = (10 ** (dbz / 10) / a) ** (1 / b)
        return rates.ravel()


@lru_cache(maxsize=4)
def _beyond(size: int, cells: float) -> NDArray[np.bool_]:
    """Whether a cell centre of a square is more than some cells from the middle."""
    along = np.arange(size) - (size - 1) / 2
    return np.hypot(along[:, None], along) > cells


@lru_cache(maxsize=4)
def _turned(size: int, degrees: float) -> NDArray[np.int32]:
    """For each cell (y, x) of a turned square the nearest cell of the one before; -1 where there was none.

    The same cells as `scipy.ndimage.rotate(square, degrees, reshape=False, order=0)` takes.
    """
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    middle = (size - 1) / 2
    y, x = np.indices((size, size))
    y_before = cosine * y + sine * x + (middle - (cosine * middle + sine * middle))
    x_before = -sine * y + cosine * x + (middle - (-sine * middle + cosine * middle))
    inside = (np.minimum(y_before, x_before) >= 0) & (np.maximum(y_before, x_before) <= size - 1)
    nearest = np.floor(y_before + 0.5) * size + np.floor(x_before + 0.5)
    return np.where(inside, nearest, -1).astype(np.int32)


def _picture(png: bytes, size: int) -> Pairs:
    """The pairs (y, x) of a PNG of grey and alpha, of `size` x `size` cells."""
    chunks = _chunks(png)
    kinds = [kind for kind, _ in chunks]
    header = b"IHDR" + struct.pack(">IIBBBBB", size, size, 8, 4, 0, 0, 0)
    whole = kinds[:1] + sorted(set(kinds[1:-1])) + kinds[-1:] == [b"IHDR", b"IDAT", b"IEND"]
    if not whole or chunks[0][1][4:-4] != header:
        raise ValueError(f"not a PNG of {size} x {size} cells, each with 8 bits of grey and of alpha")
    _check_rows(b"".join(chunk[8:-4] for kind, chunk in chunks if kind == b"IDAT"), size)
    try:
        with Image.open(
            io.BytesIO(SIGNATURE + b"".join(chunk for _, chunk in chunks)), formats=["PNG"]
        ) as picture:
            picture.load()
            return np.frombuffer(picture.tobytes(), "<u2").reshape(size, size)
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"a damaged PNG ({error}); fetch it again") from error


def _check_rows(zipped: bytes, size: int) -> None:
    """Refuses a picture of too few or too many rows; Pillow would fill up the missing ones with "no echo"."""
    length = size * (1 + 2 * size)  # a filter byte before every row
    unzip = zlib.decompressobj()
    try:
        held = len(unzip.decompress(zipped, length + 1))
    except zlib.error as error:
        raise ValueError(f"a damaged PNG ({error}); fetch it again") from error
    if held != length or not unzip.eof or unzip.unused_data:
        raise ValueError("a PNG with fewer or more rows than it says; a damaged file, fetch it again")


def _chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks that make up the picture, each with its kind; every byte of the file is accounted for."""
    if not png.startswith(SIGNATURE):
        raise ValueError(f"not a PNG: begins with {png[:8]!r}; fetch it again")
    chunks, place = [], len(SIGNATURE)
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4].rjust(4, b"\xff"))
        chunk = png[place : place + 12 + length]
        if len(chunk) < 12 + length or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
            raise ValueError(
                "a PNG that is cut or whose checksum does not fit; a damaged file, fetch it again"
            )
        if chunk[4:5].isupper():  # the others are not needed to show the picture
            chunks.append((chunk[4:8], chunk))
        place += len(chunk)
    return chunks
