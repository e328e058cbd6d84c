"""`Mrms`: the US radar composite's rain rate (NOAA MRMS PrecipRate, GRIB2, every 2 minutes).

A file is one GRIB2 message (WMO FM 92, edition 2) whose field is a PNG picture (data template 5.41).
It is read by its bytes: every section but the time and the picture is fixed, so that what is not
exactly this product on exactly its registered grid is refused.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.cf import RAINFALL_RATE
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile

Sections = dict[int, bytes]

GRID = Grid("EPSG:4326", -129.995, 0.01, 7000, 54.995, -0.01, 3500)
FILE_NAME = re.compile(r"(?:MRMS_)?PrecipRate_00\.00_(\d{8}-\d{6})\.grib2(?:\.gz)?")
PRODUCT = (209, 6, 1)  # discipline, category and number of PrecipRate in the local table of MRMS
LARGEST = 64 * 2**20  # bytes of a message; a field that PNG cannot shrink at all has 49 MB

# Section 3 (WMO template 3.0, edges rounded to 1e-6 degrees) as every MRMS CONUS product carries it.
GRID_SECTION = bytes.fromhex(
    "0000004803000175d720000000000201006128ee01006152b0010060ff2700001b5800000dac00000001000f4240"
    "034728380db59908300131408911e18f76000027100000271000"
)
TENTHS_NOT_OBSERVED = (-30.0, -10.0)  # -3: no radar looks there, -1: missing; never "dry"


@dataclass(frozen=True)
class Mrms:
    """PrecipRate files in a folder and its subfolders, as the service or the AWS archive names them."""

    path: str | None = None
    trusted: ClassVar[bool] = False

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, or holds no file of this product at all.
        """
        if self.path is None or not Path(self.path).is_dir():
            raise ValueError(f"source.path={self.path}: no such folder; expected one with MRMS files")
        found = sorted(_named(Path(self.path)), key=lambda file: (file.valid_time, file.url))
        if not found:
            raise ValueError(
                f"{self.path}: no MRMS rain-rate files there or in its subfolders; looked for names such as "
                "PrecipRate_00.00_20190610-004000.grib2 or MRMS_PrecipRate_00.00_20190610-004000.grib2.gz"
            )
        for file in found:
            if (start is None or start <= file.valid_time) and (end is None or file.valid_time <= end):
                yield file

    def read(self, path: Path) -> Frame:
        """The rain rate (mm/h) of one file; NaN where no radar looks or the value is missing.

        Raises:
            ValueError: naming the file, if it is not a whole PrecipRate message on the CONUS grid.
        """
        content = _content(path)
        try:
            sections = _sections(_unzipped(content))
            _check_product(sections)
            return Frame(
                variable=RAINFALL_RATE,
                valid_time=_valid_time(sections, path),
                cadence=timedelta(minutes=2),
                grid=GRID,
                values=_rain_rate(sections),
                source="NOAA MRMS PrecipRate",
                sha256=hashlib.sha256(content).hexdigest(),
            )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


def _named(folder: Path) -> Iterator[RemoteFile]:
    """The files below the folder that carry the product's name."""
    for path in folder.rglob("*.grib2*"):
        name = FILE_NAME.fullmatch(path.name)
        if name and path.is_file():
            yield RemoteFile(str(path), _stamp(name))


def _stamp(name: re.Match[str]) -> datetime:
    return datetime.strptime(name[1], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)


def _content(path: Path) -> bytes:
    """The file's bytes."""
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path.name}: larger than {LARGEST} bytes, which no MRMS file is")
    return content


def _unzipped(content: bytes) -> bytes:
    """The GRIB message, unzipped where it is zipped."""
    if not content.startswith(b"\x1f\x8b"):
        return content
    unzip = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        message = unzip.decompress(content, LARGEST)
    except zlib.error as error:
        raise ValueError(f"a damaged gzip file ({error})") from error
    if unzip.unconsumed_tail:
        raise ValueError(f"a gzip file that grows to more than {LARGEST} bytes, which no MRMS file does")
    if not unzip.eof:
        raise ValueError("a gzip file that ends too early")
    return message


def _sections(message: bytes) -> Sections:
    """The sections of a GRIB2 message by number; 0 is the indicator."""
    if not message.startswith(b"GRIB"):
        raise ValueError(f"not a GRIB file: begins with {message[:8]!r} instead of b'GRIB'")
    if len(message) < 16 or message[7] != 2:
        raise ValueError("not a GRIB file of edition 2")
    (length,) = struct.unpack(">Q", message[8:16])
    if length != len(message) or not message.endswith(b"7777"):
        raise ValueError(
            f"{len(message)} bytes of a GRIB message that says it has {length} and ends in 7777; "
            "a cut or damaged file, fetch it again"
        )
    sections, place = {0: message[:16]}, 16
    while place < length - 4:
        size, number = struct.unpack(">IB", message[place : place + 5])
        if size < 5 or number in sections:
            break
        sections[number] = message[place : place + size]
        place += size
    if list(sections) != [0, 1, 3, 4, 5, 6, 7] or place != length - 4:
        raise ValueError(
            f"GRIB sections {list(sections)}, or their lengths, are not those of one MRMS field "
            "(0, 1, 3, 4, 5, 6, 7); a damaged file, fetch it again"
        )
    return sections


def _check_product(sections: Sections) -> None:
    """Refuses other products, grids, packings and bitmaps than PrecipRate's."""
    if (len(sections[1]), len(sections[4]), len(sections[5]), len(sections[6])) != (21, 34, 21, 6):
        raise ValueError("GRIB sections of other sizes than in an MRMS file")
    product = (sections[0][6], sections[4][9], sections[4][10])
    if product != PRODUCT:
        raise ValueError(
            f"holds the product {product}, expected {PRODUCT} (discipline, category, number: PrecipRate)"
        )
    if sections[3] != GRID_SECTION:
        raise ValueError(
            "another grid than MRMS CONUS (3500 x 7000 cells of 0.01 degrees, 20..55 N, 130..60 W)"
        )
    if struct.unpack(">H", sections[5][9:11]) != (41,) or sections[6][5] != 255:
        raise ValueError("packed otherwise than as PNG without a bitmap (GRIB2 templates 5.41 and 6.255)")
    if sections[4][7:9] != b"\0\0" or struct.unpack(">I", sections[4][18:22]) != (0,):
        raise ValueError("a forecast or a statistic, expected an observation at one time")


def _valid_time(sections: Sections, path: Path) -> datetime:
    """The time in the message, which must be the one in the file's name if the name has one."""
    year, month, day, hour, minute, second = struct.unpack(">HBBBBB", sections[1][12:19])
    time = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    name = FILE_NAME.fullmatch(path.name)
    if name and _stamp(name) != time:
        raise ValueError(f"valid at {time:%Y-%m-%dT%H:%M:%SZ}, which is not the time in its name")
    return time


def _rain_rate(sections: Sections) -> NDArray[np.float32]:
    """The field, counted in tenths of mm/h from a reference; NaN where it was not observed."""
    reference, binary, decimal, bits = struct.unpack(">fHHB", sections[5][11:20])
    if (binary, decimal) != (0, 1) or reference not in (*TENTHS_NOT_OBSERVED, 0.0):
        raise ValueError(
            f"counts of {binary=}, {decimal=} scale from {reference=}: "
            "expected tenths of mm/h from -30, -10 or 0"
        )
    counts = _picture(sections[7][5:], bits)
    tenths = reference + np.arange(2.0**bits)
    rates = tenths / 10
    rates[np.isin(tenths, TENTHS_NOT_OBSERVED)] = np.nan
    field: NDArray[np.float32] = rates.astype(np.float32)[counts]
    return field


def _picture(png: bytes, bits: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The counts (y, x) of a grey PNG of the grid's size; its header is checked before memory is spent."""
    height, width = GRID.shape
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    if bits not in (8, 16) or not png.startswith(header):
        raise ValueError(f"its field is not a grey PNG of {height} x {width} cells")
    counts = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if counts is None or counts.shape != GRID.shape:
        raise ValueError("its PNG is damaged; fetch it again")
    return counts
