"""`Mrms`: the US radar composites of NOAA MRMS on their CONUS grid (GRIB2, every 2 minutes).

A file is one GRIB2 message (WMO FM 92, edition 2) whose field is a PNG picture (data template 5.41).
It is read by its bytes: every section but the time and the picture is fixed, so that what is not
exactly the chosen product on exactly its registered grid is refused. The numbers of products, and
their codes for "not observed", are from the Operational MRMS GRIB2 Tables of NOAA NSSL.
"""

import hashlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.cf import PRECIPITATION_FLAG, RAINFALL_RATE, REFLECTIVITY, Variable
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, content, named_files, stamp, unzipped

Sections = dict[int, bytes]
Counts = NDArray[np.uint8] | NDArray[np.uint16]

GRID = Grid("EPSG:4326", -129.995, 0.01, 7000, 54.995, -0.01, 3500)
CADENCE = timedelta(minutes=2)
LARGEST = 64 * 2**20  # bytes of a message; a field that PNG cannot shrink at all has 49 MB

# Section 3 (WMO template 3.0, edges rounded to 1e-6 degrees) as every MRMS CONUS product carries it.
GRID_SECTION = bytes.fromhex(
    "0000004803000175d720000000000201006128ee01006152b0010060ff2700001b5800000dac00000001000f4240"
    "034728380db59908300131408911e18f76000027100000271000"
)


@dataclass(frozen=True)
class Product:
    """What sets one MRMS product apart in the names and the bytes of its files."""

    name: str
    height: int  # m above sea level, of the field; in names of files in km
    number: tuple[int, int, int]  # discipline, category and number in the local table of MRMS
    variable: Variable
    digits: int  # decimal places that values are counted in
    not_observed: tuple[float, ...]  # codes for "no radar looks there" and "missing"; never "dry"
    lowest: float  # of what was observed

    @property
    def label(self) -> str:
        """Product and height as names of files have them."""
        return f"{self.name}_{self.height / 1000:05.2f}"


PRODUCTS = (
    Product("PrecipRate", 0, (209, 6, 1), RAINFALL_RATE, 1, (-3.0, -1.0), 0.0),
    Product("PrecipFlag", 0, (209, 6, 0), PRECIPITATION_FLAG, 0, (-3.0, -1.0), 0.0),
    # -99 dBZ is "looked, and no echo": it stays as the lowest reflectivity, so that only -999 is NaN.
    Product("ReflectivityAtLowestAltitude", 500, (209, 3, 57), REFLECTIVITY, 1, (-999.0,), -99.0),
)


@dataclass(frozen=True)
class Mrms:
    """Files of one product in a folder and its subfolders, as the service or the AWS archive names them.

    `product`: PrecipRate (mm/h), PrecipFlag (classes) or ReflectivityAtLowestAltitude (dBZ, -99 where
    a radar looked and saw no echo).
    """

    path: str | None = None
    product: str = "PrecipRate"
    trusted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses products that are not registered above.

        Raises:
            ValueError: naming those that are.
        """
        if self.product not in (product.name for product in PRODUCTS):
            raise ValueError(
                f"source.product={self.product}: expected one of "
                f"{', '.join(product.name for product in PRODUCTS)}"
            )

    @property
    def registered(self) -> Product:
        """The chosen product."""
        return next(product for product in PRODUCTS if product.name == self.product)

    def valid_time(self, name: str) -> datetime | None:
        """When the frame in a file of this name is valid; None for names of other products."""
        label = re.escape(self.registered.label)
        match = re.fullmatch(rf"(?:MRMS_)?{label}_(\d{{8}}-\d{{6}})\.grib2(?:\.gz)?", name)
        time = stamp(match[1], "%Y%m%d-%H%M%S") if match else None
        return None if time is None else _slot(time)

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, or holds no file of this product at all.
        """
        name = f"{self.registered.label}_20190610-004000.grib2"
        return named_files(self, start, end, f"MRMS {self.product}", f"{name} or MRMS_{name}.gz")

    def read(self, file: RemoteFile) -> Frame:
        """The product's field in one file; NaN where no radar looks or the value is missing.

        Raises:
            ValueError: naming the file, if it is not a whole message of the product on the CONUS grid.
        """
        path, product = Path(file.url), self.registered
        read = content(path, LARGEST)
        try:
            sections = _sections(unzipped(read, LARGEST))
            _check_product(sections, product)
            return Frame(
                variable=product.variable,
                valid_time=_slot(_valid_time(sections)),
                cadence=CADENCE,
                grid=GRID,
                values=_values(sections, product),
                source=f"NOAA MRMS {product.name}",
                sha256=hashlib.sha256(read).hexdigest(),
                scale_factor=None if product.variable.classes else 10.0**-product.digits,
            )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


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


def _check_product(sections: Sections, product: Product) -> None:
    """Refuses other products, heights, grids, packings and bitmaps than this product's."""
    if (len(sections[1]), len(sections[4]), len(sections[5]), len(sections[6])) != (21, 34, 21, 6):
        raise ValueError("GRIB sections of other sizes than in an MRMS file")
    number = (sections[0][6], sections[4][9], sections[4][10])
    if number != product.number:
        raise ValueError(
            f"holds the product {number}, expected {product.number} "
            f"(discipline, category, number: {product.name}); choose it by source.product"
        )
    if sections[3] != GRID_SECTION:
        raise ValueError(
            "another grid than MRMS CONUS (3500 x 7000 cells of 0.01 degrees, 20..55 N, 130..60 W)"
        )
    if struct.unpack(">H", sections[5][9:11]) != (41,) or sections[6][5] != 255:
        raise ValueError("packed otherwise than as PNG without a bitmap (GRIB2 templates 5.41 and 6.255)")
    if sections[4][7:9] != b"\0\0" or struct.unpack(">I", sections[4][18:22]) != (0,):
        raise ValueError("a forecast or a statistic, expected an observation at one time")
    if struct.unpack(">BBIB", sections[4][22:29]) != (102, 0, product.height, 255):
        raise ValueError(f"a field at another height than {product.height} m above sea level")


def _slot(time: datetime) -> datetime:
    """The nearest time of the product's even minutes: reflectivity is stamped up to a minute beside them."""
    beside = (time - datetime(2000, 1, 1, tzinfo=UTC) + CADENCE / 2) % CADENCE - CADENCE / 2
    return time - beside


def _valid_time(sections: Sections) -> datetime:
    year, month, day, hour, minute, second = struct.unpack(">HBBBBB", sections[1][12:19])
    return datetime(year, month, day, hour, minute, second, tzinfo=UTC)


def _values(sections: Sections, product: Product) -> NDArray[np.float32]:
    """The field, counted in decimal steps from a reference; NaN where it was not observed."""
    reference, binary, decimal, bits = struct.unpack(">fHHB", sections[5][11:20])
    references = [round(code * 10**product.digits) for code in (*product.not_observed, product.lowest)]
    if (binary, decimal) != (0, product.digits) or reference not in references:
        raise ValueError(
            f"counts of {binary=}, {decimal=} scale from {reference=}: expected steps of "
            f"{10**-product.digits:g} {product.variable.units} from one of {references}"
        )
    counts = _picture(sections[7][5:], bits)
    table = (reference + np.arange(2.0**bits)) / 10**product.digits
    table[np.isin(table, product.not_observed)] = np.nan
    if product.variable.classes:
        _check_classes(table, counts, product.variable)
    field: NDArray[np.float32] = table.astype(np.float32)[counts]
    return field


def _check_classes(table: NDArray[np.float64], counts: Counts, variable: Variable) -> None:
    """Refuses values that are no class; `table` is the value of each count."""
    unknown = ~np.isnan(table) & ~np.isin(table, [value for value, _ in variable.classes])
    cells = unknown[counts]
    if cells.any():
        raise ValueError(
            f"{int(cells.sum())} of {cells.size} values of {variable.name} are no class of it, "
            f"such as {table[counts[cells][0]]:g}"
        )


def _picture(png: bytes, bits: int) -> Counts:
    """The counts (y, x) of a grey PNG of the grid's size; its header is checked before memory is spent."""
    height, width = GRID.shape
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    if bits not in (8, 16) or not png.startswith(header):
        raise ValueError(f"its field is not a grey PNG of {height} x {width} cells")
    counts = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if counts is None or counts.shape != GRID.shape:
        raise ValueError("its PNG is damaged; fetch it again")
    return counts
