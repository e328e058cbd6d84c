"""`Radolan`, `RadolanAscii` and `RadvorAnalysis`: Germany's radar composites (DWD).

A RADOLAN composite is a text header that ends in ETX, and behind it one count a cell, row 0 south
(DWD, "RADOLAN/RADVOR: Beschreibung des Kompositformats"; the grids are from DWD, "Radarkomposits:
Projektionen und Gitter", 2022). The header says how long the file is, so a cut or longer one is refused.
"""

import bz2
import hashlib
import io
import re
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pipelines.cf import (
    PRECIPITATION_AMOUNT_1H,
    PRECIPITATION_AMOUNT_24H,
    RAINFALL_RATE,
    REFLECTIVITY,
    Variable,
)
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, content, named_files, paths, stamp, unzipped, within

Table = NDArray[np.float32]  # the value of each count; inf: no file of the product holds that count

STEREOGRAPHIC = "+proj=stere +lat_0=90 +lat_ts=60 +lon_0=10 +units=m +no_defs"
SPHERE, ELLIPSOID = f"{STEREOGRAPHIC} +R=6370040", f"{STEREOGRAPHIC} +datum=WGS84"
NATIONAL = Grid(SPHERE, -522962.16692185635, 1000.0, 900, -3759144.724265574, -1000.0, 900)
NATIONAL_WGS84 = Grid(ELLIPSOID, -523196.83521777776, 1000.0, 900, -3772588.861931134, -1000.0, 900)
DE1200 = Grid(ELLIPSOID, -543196.835217764, 1000.0, 1100, -3622588.861931002, -1000.0, 1200)
GRIDS = {  # by format version (0 to 3 differ in the radars' range), rows and columns
    (0, 900, 900): NATIONAL,
    (1, 900, 900): NATIONAL,
    (2, 900, 900): NATIONAL,
    (3, 900, 900): NATIONAL,
    (5, 900, 900): NATIONAL_WGS84,
    (5, 1200, 1100): DE1200,
}

LARGEST = 4 * 2**20  # bytes of a composite, which has 2.6 MB at most
LARGEST_ASCII = 8 * 2**20  # bytes of a composite as text
LARGEST_ARCHIVE = 128 * 2**20  # bytes of an unpacked archive; 25 composites have 66 MB
MOST_MEMBERS = 25  # of an archive: an analysis and 24 forecasts

HEADER = re.compile(
    rb"(?P<product>[A-Z]{2})(?P<day>\d\d)(?P<hour>\d\d)(?P<minute>\d\d)10000(?P<month>\d\d)(?P<year>\d\d)"
    rb"BY(?P<length>[ \d]{6}\d(?:[ \d]{2}\d)?)VS(?P<version> \d)SW[ -~]{9}PR(?P<precision> E[+-]\d\d)"
    rb"INT(?P<interval>[ \d]{3}\d)(?:U(?P<unit>[01]))?GP(?P<rows>[ \d]{3}\d)x(?P<columns>[ \d]{3}\d)"
    rb"(?:VV(?P<lead>[ \d]{3}\d))?(?:MF[ \d]{8}\d)?(?:QN[ \d]{3}\d)?"
    rb"(?P<lists>(?:(?:MS|ST)[ \d]{2}\d<[^<>]*> ?)*)"
)
LISTS = re.compile(rb"(?:MS|ST)([ \d]{2}\d)(<[^<>]*> ?)")  # of radars and of their days: length and text
LONGEST_HEADER = 1000  # bytes; 17 radars and their days have 300

NO_DATA, NEGATIVE, CLUTTER = 0x2000, 0x4000, 0x8000  # bits 14 to 16 of a two-byte count; 13: secondary
NO_DATA_AMOUNT = 2500  # what the lower 12 bits hold where there are no data
CLUTTER_BYTE, NO_DATA_BYTE = 249, 250  # of a one-byte count


@dataclass(frozen=True)
class Product:
    """What sets one composite apart in its header, and what its counts mean."""

    name: str
    title: str
    variable: Variable
    precision: str  # of the counts, as the header has it
    interval: int  # minutes that it sums over
    cadence: timedelta
    scale: float  # units of the variable, of one count
    offset: float = 0.0
    is_one_byte: bool = False
    system: str = "RADOLAN"


FIVE_MINUTES, HOUR = timedelta(minutes=5), timedelta(hours=1)
PRODUCTS = (
    Product("RX", "reflectivity", REFLECTIVITY, " E+00", 5, FIVE_MINUTES, 0.5, -32.5, is_one_byte=True),
    Product("RY", "quality-checked 5-min sums", RAINFALL_RATE, " E-02", 5, FIVE_MINUTES, 0.12),
    Product("RZ", "5-min sums", RAINFALL_RATE, " E-02", 5, FIVE_MINUTES, 0.12),
    Product("RW", "hourly sums adjusted to gauges", PRECIPITATION_AMOUNT_1H, " E-01", 60, HOUR, 0.1),
    # A sum over a day comes out every hour.
    Product("SF", "daily sums adjusted to gauges", PRECIPITATION_AMOUNT_24H, " E-01", 1440, HOUR, 0.1),
)
ANALYSIS = Product(
    "RV", "5-min sums of RADVOR", RAINFALL_RATE, " E-02", 5, FIVE_MINUTES, 0.12, system="RADVOR"
)


@dataclass(frozen=True)
class Radolan:
    """Binary composites of one product in a folder and its subfolders, plain or gzipped.

    `product`: RX (dBZ; -32.5 where a radar looked and saw no echo), RY or RZ (mm/h), RW (mm in the hour
    before) or SF (mm in the 24 hours before). Clutter is not observed. Secondary values, with which DWD
    fills RW and SF where the radars have no data, are part of those products and stay.
    """

    path: str | None = None
    product: str = "RY"
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
        match = re.fullmatch(rf"raa01-{self.product.lower()}_10000-(\d{{10}})-dwd---bin(?:\.gz)?", name)
        return stamp(match[1], "%y%m%d%H%M") if match else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, or holds no file of this product at all.
        """
        name = f"raa01-{self.product.lower()}_10000-2001011510-dwd---bin"
        return named_files(self, start, end, f"RADOLAN {self.product}", f"{name} or {name}.gz")

    def read(self, file: RemoteFile) -> Frame:
        """The field in one file; NaN where there are no data or only clutter.

        Raises:
            ValueError: naming the file, if it is not a whole composite of the product on a known grid.
        """
        path = Path(file.url)
        packed = content(path, LARGEST)
        try:
            return _composite(unzipped(packed, LARGEST), self.registered, _digest(packed))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


@dataclass(frozen=True)
class RadolanAscii:
    """Hourly sums (RW, mm) as ascii grids, a day in a tar.gz, in a folder and its subfolders."""

    path: str | None = None
    trusted: ClassVar[bool] = False

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The hours within [start, end], by rising valid time; then the archives that cannot be opened.

        Raises:
            ValueError: if the folder is not there, or holds no archive of this product at all.
        """
        product = "RADOLAN RW as ascii grids"
        archives = [
            (path, day) for path in paths(self.path, product) if (day := _archive_day(path.name)) is not None
        ]
        if not archives:
            raise ValueError(
                f"{self.path}: no files of {product} there or in its subfolders; "
                "looked for names such as RW-20221018.tar.gz"
            )
        found = [
            RemoteFile(str(path), time)
            for path, day in archives
            if (start is None or start < day + timedelta(days=1)) and (end is None or day <= end)
            for time in _hours(path)
        ]
        yield from within(found, start, end)

    def read(self, file: RemoteFile) -> Frame:
        """The field of `file.valid_time` in one archive; NaN where there are no data.

        Raises:
            ValueError: naming the archive, if it is damaged or does not hold that hour.
        """
        path = Path(file.url)
        packed = content(path, LARGEST_ARCHIVE)
        try:
            hours = _ascii_members(path.name, packed)
            if file.valid_time is None or file.valid_time not in hours:
                raise ValueError(f"holds no hour that ends at {file.valid_time}, only {len(hours)} others")
            return Frame(
                variable=PRECIPITATION_AMOUNT_1H,
                valid_time=file.valid_time,
                cadence=HOUR,
                grid=NATIONAL,
                values=_ascii_values(bytes(hours[file.valid_time])),
                source="DWD RADOLAN RW (ascii)",
                sha256=_digest(packed),
            )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


@dataclass(frozen=True)
class RadvorAnalysis:
    """The analyses (RV_000, mm/h) in RADVOR's tar.bz2 archives, in a folder and its subfolders.

    An archive also holds forecasts of up to two hours. They are never read: a forecast is no observation.
    """

    path: str | None = None
    trusted: ClassVar[bool] = False

    def valid_time(self, name: str) -> datetime | None:
        """When the analysis in an archive of this name is valid; None for other names."""
        match = re.fullmatch(r"DE1200_RV(\d{10})\.tar\.bz2", name)
        return stamp(match[1], "%y%m%d%H%M") if match else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The archives whose analysis is valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, or holds no archive of this product at all.
        """
        return named_files(self, start, end, "RADVOR RV", "DE1200_RV2210180700.tar.bz2")

    def read(self, file: RemoteFile) -> Frame:
        """The analysis in one archive; NaN where there are no data or only clutter.

        Raises:
            ValueError: naming the archive, if it is damaged or its analysis is not there.
        """
        path = Path(file.url)
        packed = content(path, LARGEST_ARCHIVE)
        try:
            run = path.name.removesuffix(".tar.bz2")
            members = _members(packed, rf"{re.escape(run)}_\d{{3}}", LARGEST)
            if f"{run}_000" not in members:
                raise ValueError(f"holds no analysis ({run}_000), only {len(members)} forecasts")
            return _composite(bytes(members[f"{run}_000"]), ANALYSIS, _digest(packed))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


def _digest(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()


def _composite(message: bytes, product: Product, sha256: str) -> Frame:
    """The frame in a RADOLAN composite."""
    head, etx, counts = message.partition(b"\x03")
    header = HEADER.fullmatch(head[:LONGEST_HEADER])
    if not etx or header is None:
        raise ValueError(f"not a RADOLAN composite: begins with {head[:40]!r}")
    _check_header(header, product)
    rows, columns = int(header["rows"]), int(header["columns"])
    grid = GRIDS.get((int(header["version"]), rows, columns))
    if grid is None:
        raise ValueError(
            f"another grid than is registered: {rows} x {columns} cells in format version "
            f"{int(header['version'])}, expected one of {list(GRIDS)} (version, rows, columns)"
        )
    size = rows * columns * (1 if product.is_one_byte else 2)
    if int(header["length"]) != len(message) or len(counts) != size:
        raise ValueError(
            f"{len(message)} bytes, of which {len(counts)} are data: expected {int(header['length'])} and "
            f"{size} by its header; a cut or damaged file, fetch it again"
        )
    return Frame(
        variable=product.variable,
        valid_time=_header_time(header),
        cadence=product.cadence,
        grid=grid,
        values=_values(counts, product, grid),
        source=f"DWD {product.system} {product.name}",
        sha256=sha256,
    )


def _check_header(header: re.Match[bytes], product: Product) -> None:
    """Refuses other products, precisions, intervals, forecasts, and lists of another length than stated."""
    name = header["product"].decode()
    if name != product.name:
        raise ValueError(f"holds the product {name}, expected {product.name} ({product.title})")
    precision = header["precision"].decode()
    interval = int(header["interval"]) * (1440 if header["unit"] == b"1" else 1)
    if (precision, interval) != (product.precision, product.interval):
        raise ValueError(
            f"counts of precision{precision} over {interval} minutes: "
            f"expected{product.precision} over {product.interval}"
        )
    if int(header["lead"] or 0) != 0:
        raise ValueError(f"a forecast of {int(header['lead'])} minutes ahead, expected an observation")
    for length, text in LISTS.findall(header["lists"]):
        if int(length) != len(text):
            raise ValueError(f"a damaged header: a list of {len(text)} signs that says it has {int(length)}")


def _header_time(header: re.Match[bytes]) -> datetime:
    year, month, day, hour, minute = (int(header[key]) for key in ("year", "month", "day", "hour", "minute"))
    return datetime(2000 + year, month, day, hour, minute, tzinfo=UTC)


def _values(data: bytes, product: Product, grid: Grid) -> NDArray[np.float32]:
    """The values (y, x), row 0 north."""
    counts = np.frombuffer(data, np.uint8 if product.is_one_byte else "<u2").reshape(grid.shape)
    values = _table(product)[counts[::-1]]
    impossible = int(np.isinf(values).sum())
    if impossible:
        raise ValueError(
            f"{impossible} of {values.size} cells hold codes that no file of {product.name} does, "
            "such as negative amounts; a damaged file, fetch it again"
        )
    return values


@lru_cache
def _table(product: Product) -> Table:
    """What each count of a product means."""
    counts = np.arange(2**8 if product.is_one_byte else 2**16)
    if product.is_one_byte:
        table = counts * product.scale + product.offset
        table[[CLUTTER_BYTE, NO_DATA_BYTE]] = np.nan
        table[NO_DATA_BYTE + 1 :] = np.inf
    else:
        amount = counts & 0x0FFF
        table = amount * product.scale + product.offset
        table[counts & (NO_DATA | CLUTTER) != 0] = np.nan
        table[(counts & NO_DATA != 0) & (amount != NO_DATA_AMOUNT)] = np.inf
        table[counts & NEGATIVE != 0] = np.inf
    return table.astype(np.float32)


def _members(packed: bytes, name: str, largest: int) -> dict[str, memoryview]:
    """The files in a packed tar archive by name: nothing else than files whose names match.

    Raises:
        ValueError: if it is damaged or holds anything else.
    """
    archive = _unpacked(packed, LARGEST_ARCHIVE)
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            members = list(islice(tar, MOST_MEMBERS + 1))
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"not a tar archive, or a damaged one ({error})") from error
    if len(members) > MOST_MEMBERS:
        raise ValueError(f"an archive of more than {MOST_MEMBERS} files, which none of this product has")
    for member in members:
        if member.type != tarfile.REGTYPE or not re.fullmatch(name, member.name):
            raise ValueError(f"an archive with {member.name[:100]!r} in it, expected plain files like {name}")
        if member.size > largest:
            raise ValueError(f"an archive with a file of {member.size} bytes, expected {largest} at most")
    if len(archive) < end + 2 * tarfile.BLOCKSIZE or archive[end:].strip(b"\0"):
        raise ValueError("a tar archive without its end; a cut or damaged file, fetch it again")
    if len({member.name for member in members}) < len(members):
        raise ValueError("an archive with two files of one name")
    view = memoryview(archive)
    return {member.name: view[member.offset_data :][: member.size] for member in members}


def _unpacked(packed: bytes, largest: int) -> bytes:
    """The bytes, unpacked where they are packed (gzip or bzip2), with nothing behind the end."""
    if not packed.startswith(b"BZh"):
        return unzipped(packed, largest)
    unpack = bz2.BZ2Decompressor()
    try:
        content = unpack.decompress(packed, largest + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"a damaged bzip2 file ({error})") from error
    if len(content) > largest:
        raise ValueError(
            f"a bzip2 file that grows to more than {largest} bytes, which none of this product does"
        )
    if not unpack.eof:
        raise ValueError("a bzip2 file that ends too early")
    if unpack.unused_data:
        raise ValueError("a bzip2 file with more bytes behind its end")
    return content


ASCII_HEADER = {
    b"ncols": b"900",
    b"nrows": b"900",
    b"xllcorner": b"-523462",  # the corners of the grid, rounded to metres
    b"yllcorner": b"-4658645",
    b"cellsize": b"1000",
    b"NODATA_value": b"-1",
}


def _archive_day(name: str) -> datetime | None:
    """The day of an archive of ascii grids, by its name."""
    match = re.fullmatch(r"RW-(\d{8})\.tar\.gz", name)
    return stamp(match[1], "%Y%m%d") if match else None


def _hours(path: Path) -> list[datetime | None]:
    """The hours in an archive; a single None if it cannot be opened, so that `read` says why."""
    try:
        return list(_ascii_members(path.name, content(path, LARGEST_ARCHIVE)))
    except (ValueError, OSError):
        return [None]


@lru_cache(maxsize=1)  # the hours of one archive are read one after another
def _ascii_members(name: str, packed: bytes) -> dict[datetime | None, memoryview]:
    """The ascii grids of a day's archive, by the end of their hour."""
    day = name.removeprefix("RW-").removesuffix(".tar.gz")
    members = _members(packed, rf"RW_{re.escape(day)}-\d{{4}}\.asc", LARGEST_ASCII)
    hours = {stamp(member, "RW_%Y%m%d-%H%M.asc"): text for member, text in members.items()}
    if not hours or None in hours:
        raise ValueError(f"an archive of {sorted(members)}: expected hours such as RW_{day}-0050.asc")
    return hours


def _ascii_values(text: bytes) -> NDArray[np.float32]:
    """The sums (mm; y, x) in an ascii grid of integers, row 0 north."""
    *head, body = text.split(b"\n", len(ASCII_HEADER))
    if dict(line.split(maxsplit=1) for line in head if len(line.split()) == 2) != ASCII_HEADER:
        raise ValueError(f"another header than of the RADOLAN grid: {text[:120]!r}")
    if body.translate(None, b"-0123456789 \r\n"):
        raise ValueError("other signs in its grid than whole numbers; a damaged file, fetch it again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # some numpy only warn where a number cannot be read
        try:
            tenths = np.fromstring(body, np.int64, sep=" ")
        except (DeprecationWarning, ValueError) as error:
            raise ValueError(f"its grid cannot be read to its end ({error})") from error
    if (tenths.size, body.count(b"\n")) != (NATIONAL.x_size * NATIONAL.y_size, NATIONAL.y_size):
        raise ValueError(
            f"{tenths.size} numbers in {body.count(bytes([10]))} lines, expected 900 x 900; "
            "a cut or damaged file, fetch it again"
        )
    values = np.where(tenths == -1, np.nan, tenths / 10).astype(np.float32)
    return values.reshape(NATIONAL.shape)
