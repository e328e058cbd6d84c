"""`Mch`: the rain of MeteoSwiss' radar composite AQC (GIF89a, sums of 5 minutes every 5 minutes).

The palette INDEX of a cell is its value; the colours mean nothing. The file says in a comment which product,
scale and time it is. A GIF has no checksum, but its LZW code of a picture is the only one that the service's
encoder writes: a stream that is not exactly that is damaged.
"""

import hashlib
import io
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.cf import RAINFALL_RATE
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, content, named_files, stamp

Counts = NDArray[np.uint8]

# Swiss CH1903/LV03 as swisstopo and pysteps give it; the place is not in the files.
SWISS = Grid(
    "+proj=somerc +lat_0=46.95240555555556 +lon_0=7.43958333333333 +k_0=1 +x_0=600000 +y_0=200000 "
    "+ellps=bessel +towgs84=674.374,15.056,405.346,0,0,0,0 +units=m",
    x_first=255_500.0,
    x_step=1000.0,
    x_size=710,
    y_first=479_500.0,
    y_step=-1000.0,
    y_size=640,
)
AQC = ("SCALE=mmh2LASSEN8bitmm_mn", "ACCUm=000005", "DeltaT=000005", "TOTn=000001")
TIME = "%y%j%H%M"  # the year of the century, the day of the year, hour and minute
TOLD_TIME = re.compile(rb"PRDT=[A-Z]{3}(\d{9})\s")
LARGEST = 2 * 2**20  # bytes; LZW at its worst takes 12 bits a cell, 0.7 MB
DRY = [0, 1, *range(251, 255)]  # indices that stand for no rain
NODATA = 255
EXTENSION, IMAGE, TRAILER, COMMENT = 0x21, 0x2C, 0x3B, 0xFE  # GIF89a, labels of blocks


@dataclass(frozen=True)
class Mch:
    """AQC files in a folder and its subfolders.

    `says` are words that must stand in the comment of the product. `checked_encoding=False` reads files that
    another program has written again, and then damage within the picture may go unseen.
    """

    path: str | None = None
    name: str = r"AQC(\d{9})[A-Z0-9]_00005\.801\.gif"  # group 1 is the time; the letter varies within a day
    product: str = "MeteoSwiss AQC"
    grid: Grid = SWISS
    says: Sequence[str] = AQC
    cadence: float = 5.0  # minutes, also those that the sums are over
    checked_encoding: bool = True
    trusted: ClassVar[bool] = False

    def valid_time(self, name: str) -> datetime | None:
        """When the sum in a file of this name ends; None for names of other products."""
        match = re.fullmatch(self.name, name)
        return _time(match[1]) if match else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, or holds no file of this product at all.
        """
        return named_files(self, start, end, self.product, f"those that match {self.name}")

    def read(self, file: RemoteFile) -> Frame:
        """The mean rain rate (mm/h) over the interval that ends at the file's time; NaN where no radar looks.

        Raises:
            ValueError: naming the file, if it is not this whole product on its registered grid.
        """
        path = Path(file.url)
        read = content(path, LARGEST)
        try:
            comment, stream = _blocks(read, self.grid)
            return Frame(
                variable=RAINFALL_RATE,
                valid_time=self._valid_time(comment, path.name),
                cadence=timedelta(minutes=self.cadence),
                grid=self.grid,
                values=self._rain_rate(self._counts(read, stream)),
                source=self.product,
                sha256=hashlib.sha256(read).hexdigest(),
            )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def _valid_time(self, comment: bytes, name: str) -> datetime:
        words = comment.decode("latin-1").split()
        missing = [word for word in self.says if word not in words]
        if missing:
            raise ValueError(f"not {self.product}: its comment does not say {missing}, but {words[:12]}")
        told = TOLD_TIME.search(comment)
        time, named = _time(told[1].decode()) if told else None, self.valid_time(name)
        if time is None:
            raise ValueError(
                "its comment has no time such as PRDT=AQC151351545 (year, day of year, hour, minute)"
            )
        if named is not None and named != time:
            raise ValueError(f"its comment says {time:%Y-%m-%dT%H:%MZ}, which is not the time in its name")
        return time

    def _counts(self, gif: bytes, stream: bytes) -> Counts:
        """The palette indices (y, x)."""
        try:
            with Image.open(io.BytesIO(gif), formats=["GIF"]) as picture:
                counts = np.asarray(picture)
        except (OSError, SyntaxError, EOFError) as error:
            raise ValueError(f"a damaged GIF ({error}); fetch it again") from error
        if counts.shape != self.grid.shape or counts.dtype != np.uint8:
            raise ValueError(
                f"a picture of shape {counts.shape} and {counts.dtype}, expected {self.grid.shape}"
            )
        if self.checked_encoding and _encoded(counts, self.grid) != stream:
            raise ValueError(
                "its LZW code is not the one that the service's encoder writes for this picture: a damaged "
                "file, fetch it again (or set checked_encoding=false, if another program wrote it)"
            )
        return counts

    def _rain_rate(self, counts: Counts) -> NDArray[np.float32]:
        """In mm/h, by the service's scale, as pysteps gives it: 20 log10(316 R^1.5) + 71.5, R in mm."""
        amount = (10 ** ((np.arange(256) - 71.5) / 20) / 316) ** (1 / 1.5)
        amount[DRY] = 0.0
        amount[NODATA] = np.nan
        return cv2.LUT(counts, (amount * (60 / self.cadence)).astype(np.float32))


def _time(text: str) -> datetime | None:
    """The UTC time in YYDDDHHMM; `strptime` alone would take day 366 of any year."""
    time = stamp(text, TIME)
    return time if time is not None and time.strftime(TIME) == text else None


def _blocks(gif: bytes, grid: Grid) -> tuple[bytes, bytes]:
    """The comment and the LZW code of a GIF of one picture that fills a screen of the grid's size."""
    size = struct.pack("<HH", grid.x_size, grid.y_size)
    if not gif.startswith((b"GIF89a", b"GIF87a")):
        raise ValueError(f"not a GIF: begins with {gif[:8]!r}; fetch it again")
    if gif[6:10] != size or gif[10] & 0x87 != 0x87:  # flags: a palette, of 2^(7 + 1) colours
        raise ValueError(f"not a GIF of {grid.y_size} x {grid.x_size} cells with a palette of 256")
    try:
        return _walked(gif, b"\0\0\0\0" + size + b"\0\x08")
    except IndexError:
        raise ValueError("a GIF that ends too early; a cut file, fetch it again") from None


def _walked(gif: bytes, descriptor: bytes) -> tuple[bytes, bytes]:
    """The comments and the LZW code, block by block to the trailer.

    Raises:
        IndexError: if it ends before.
        ValueError: for another block, picture or number of pictures, or bytes behind the trailer.
    """
    comment, streams, place = b"", [], 13 + 3 * 256  # behind the screen and the palette
    while gif[place] != TRAILER:
        if gif[place] == EXTENSION:
            body, after = _joined(gif, place + 2)
            comment += body if gif[place + 1] == COMMENT else b""
        elif gif[place] == IMAGE and gif[place + 1 : place + 11] == descriptor:
            body, after = _joined(gif, place + 11)
            streams.append(body)
        else:
            raise ValueError(
                f"a GIF with an unexpected block at byte {place}; a damaged file, fetch it again"
            )
        place = after
    if len(streams) != 1 or place != len(gif) - 1:
        raise ValueError(f"{len(streams)} pictures and {len(gif) - 1 - place} bytes behind, expected 1 and 0")
    return comment, streams[0]


def _joined(gif: bytes, place: int) -> tuple[bytes, int]:
    """The bytes of a chain of sub-blocks, and where it ends."""
    parts = []
    while size := gif[place]:
        parts.append(gif[place + 1 : place + 1 + size])
        place += 1 + size
    return b"".join(parts), place + 1


def _encoded(counts: Counts, grid: Grid) -> bytes:
    """The LZW code of a picture."""
    written = io.BytesIO()
    Image.fromarray(counts).save(written, "GIF", optimize=False, interlace=False)
    return _blocks(written.getvalue(), grid)[1]
