"""`Etopo`, `Srtm`, `Gtopo`: the height of the ground (m), which never changes."""

import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.errors import RasterioError
from rasterio.io import MemoryFile

from pipelines.cf import ELEVATION
from pipelines.frame import ALWAYS, Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, content, named_files, paths, unzipped

Heights = NDArray[np.float32]

LARGEST = 256 * 2**20  # bytes of a file
MOST_CELLS = 64_000_000  # of a field

ETOPO_NAME = "etopo20data.gz"
ETOPO_TEXT = 32 * 2**20  # bytes; each of 540 x 1081 numbers takes 25
ETOPO_GRID = Grid("EPSG:4326", -180 + 1 / 6, 1 / 3, 1080, 90 - 1 / 6, -1 / 3, 540)
ETOPO_EAST = 600  # columns from the first, at 20 E, to the date line

SRTM_NAME = re.compile(r"([NS])(\d{2})([EW])(\d{3})(?:\.SRTMGL[13])?\.hgt(?:\.zip)?")
SRTM_VOID = -32768

GTOPO_OCEAN = -9999
GTOPO_CELL = 1 / 120  # degrees


@dataclass(frozen=True)
class Etopo:
    """The relief of the whole earth in cells of 20 minutes, as basemap carries it: three zipped text files.

    Rows run northward and columns from 20 E once round the earth, the first of them twice.
    """

    path: str | None = None
    sea_floor: bool = False  # keep what lies below sea level; False: it is 0 (dry depressions too)
    trusted: ClassVar[bool] = False
    group: ClassVar[str] = "static"
    beside: ClassVar[bool] = True  # the heights, and the coordinates

    def valid_time(self, name: str) -> datetime | None:
        """Always, for the name of the file of heights."""
        return ALWAYS if name == ETOPO_NAME else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The field, whatever the time.

        Raises:
            ValueError: if the folder is not there, or holds no such file.
        """
        return named_files(self, None, None, "ETOPO 20-minute relief", ETOPO_NAME)

    def read(self, file: RemoteFile) -> Frame:
        """The heights of the earth, from the date line eastward.

        Raises:
            ValueError: naming the file, if it or its coordinates beside it are not the registered ones.
        """
        path = Path(file.url)
        read = content(path, LARGEST)
        try:
            _check_line(path.with_name("etopo20lons.gz"), 20 + (np.arange(1081) + 0.5) / 3)
            _check_line(path.with_name("etopo20lats.gz"), -90 + (np.arange(540) + 0.5) / 3)
            values = _round_the_earth(_numbers(read, 540, 1081))
            if not self.sea_floor:
                np.maximum(values, 0, out=values)
            return _frame(ETOPO_GRID, values, "ETOPO relief, 20 minutes", hashlib.sha256(read).hexdigest())
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


@dataclass(frozen=True)
class Srtm:
    """All tiles of the Shuttle Radar Topography Mission (.hgt, plain or in a zip) of a folder, as one field.

    A tile's name is its south-west corner; its samples lie on whole seconds, so that neighbours share an
    edge. The sea is 0; tiles that are not there, and voids, are NaN.
    """

    path: str | None = None
    seconds: int = 3  # of arc, between samples: 3 (SRTMGL3) or 1 (SRTMGL1)
    trusted: ClassVar[bool] = False
    group: ClassVar[str] = "static"

    def __post_init__(self) -> None:
        """Refuses other spacings."""
        if self.seconds not in (1, 3):
            raise ValueError(f"source.seconds={self.seconds}: expected 1 or 3 (seconds of arc)")

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The folder as one field, whatever the time.

        Raises:
            ValueError: if the folder is not there, or holds no tile.
        """
        self._tiles(Path(str(self.path)))
        yield RemoteFile(str(self.path), ALWAYS)

    def read(self, file: RemoteFile) -> Frame:
        """The heights of all tiles below a folder, or of one tile.

        Raises:
            ValueError: naming the file, if one is damaged, if two are for the same place, or if the field
                would have too many cells.
        """
        tiles = self._tiles(Path(file.url))
        grid = self._grid(list(tiles))
        values = np.full(grid.shape, np.nan, np.float32)
        sha256 = hashlib.sha256()
        for (south, west), path in tiles.items():
            read = content(path, LARGEST)
            sha256.update(read)
            row = round((grid.y_first - (south + 1)) * self._per_degree)
            column = round((west - grid.x_first) * self._per_degree)
            place = values[row : row + self._per_degree + 1, column : column + self._per_degree + 1]
            np.copyto(place, self._tile(path, read), where=np.isnan(place))
        name = f"NASA SRTM, {self.seconds} seconds, {len(tiles)} tiles"
        return _frame(grid, values, name, sha256.hexdigest())

    @property
    def _per_degree(self) -> int:
        return 3600 // self.seconds

    def _tiles(self, place: Path) -> dict[tuple[int, int], Path]:
        """Tiles by the latitude and longitude of their south-west corners."""
        tiles: dict[tuple[int, int], Path] = {}
        for path in [place] if place.is_file() else paths(str(place), "SRTM tiles"):
            corner = _corner(path.name)
            if corner is None:
                continue
            if corner in tiles:
                raise ValueError(f"{path}: the same tile as {tiles[corner]}; keep one of them")
            tiles[corner] = path
        if not tiles:
            raise ValueError(
                f"{place}: no SRTM tiles there or in its subfolders; "
                "looked for names such as N38W028.hgt or N38W028.SRTMGL3.hgt.zip"
            )
        return tiles

    def _grid(self, corners: list[tuple[int, int]]) -> Grid:
        """The samples from the westernmost to the easternmost tile, and from north to south."""
        souths, wests = zip(*corners, strict=True)
        rows = (max(souths) + 1 - min(souths)) * self._per_degree + 1
        columns = (max(wests) + 1 - min(wests)) * self._per_degree + 1
        if rows * columns > MOST_CELLS:
            raise ValueError(
                f"SRTM tiles of {min(souths)}..{max(souths) + 1} N, {min(wests)}..{max(wests) + 1} E are "
                f"{rows} x {columns} cells: more than {MOST_CELLS}; give a folder with fewer of them"
            )
        step = 1 / self._per_degree
        return Grid("EPSG:4326", min(wests), step, columns, max(souths) + 1, -step, rows)

    def _tile(self, path: Path, read: bytes) -> Heights:
        """The heights of one tile, row 0 north; NaN where void."""
        side = self._per_degree + 1
        try:
            samples = _unpacked(path.name, read, 2 * side * side) if path.suffix == ".zip" else read
            if len(samples) != 2 * side * side:
                raise ValueError(
                    f"{len(samples)} bytes of samples, expected {side} x {side} of 2 bytes: cut, or not of "
                    f"source.seconds={self.seconds}"
                )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
        values = np.frombuffer(samples, ">i2").astype(np.float32).reshape(side, side)
        values[values == SRTM_VOID] = np.nan
        return values


@dataclass(frozen=True)
class Gtopo:
    """A GeoTIFF cut out of USGS GTOPO30 (30 seconds), whose sea (-9999) is 0."""

    path: str | None = None
    name: str = r".*\.tif"  # regular expression of the file's name
    crs: str = "EPSG:4326"  # the file itself need not say it
    grid: Grid | None = None  # that it must lie on; None: any cells of GTOPO30
    sha256: str | None = None  # that it must have, as the format has no checksum; None: any
    trusted: ClassVar[bool] = False
    group: ClassVar[str] = "static"

    def valid_time(self, name: str) -> datetime | None:
        """Always, for the name of the file."""
        return ALWAYS if re.fullmatch(self.name, name) else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The field, whatever the time.

        Raises:
            ValueError: if the folder is not there, or holds no such file.
        """
        return named_files(self, None, None, "GTOPO30 relief", self.name)

    def read(self, file: RemoteFile) -> Frame:
        """The heights in one file.

        Raises:
            ValueError: naming the file, if it is not a GeoTIFF of heights on cells of GTOPO30.
        """
        path = Path(file.url)
        read = content(path, LARGEST)
        try:
            counts, grid = _geotiff(read, self.crs)
            sha256 = hashlib.sha256(read).hexdigest()
            if self.sha256 not in (None, sha256):
                raise ValueError(f"has SHA-256 {sha256}, expected {self.sha256}; damaged, or another edition")
            if self.grid not in (None, grid):
                raise ValueError(f"lies on {grid}, expected {self.grid}")
            values = counts.astype(np.float32)
            values[counts == GTOPO_OCEAN] = 0.0
            return _frame(grid, values, "USGS GTOPO30", sha256)
        except (ValueError, RasterioError) as error:
            raise ValueError(f"{path.name}: {error}") from error


def _frame(grid: Grid, values: Heights, source: str, sha256: str) -> Frame:
    return Frame(ELEVATION, ALWAYS, None, grid, values, source, sha256, group="static")


def _check_line(path: Path, expected: NDArray[np.float64]) -> None:
    """Compares a file of coordinates, which lies beside the heights, with the registered ones (degrees)."""
    if not path.is_file():
        raise ValueError(f"lacks its coordinates {path.name} in the same folder")
    numbers = _numbers(content(path, LARGEST), 1, expected.size)[0]
    if np.abs(numbers - expected).max() > 1e-4:  # they add up steps of 8 digits
        raise ValueError(f"{path.name} holds other coordinates than the registered ones")


def _numbers(zipped: bytes, rows: int, columns: int) -> NDArray[np.float64]:
    """A zipped text of numbers; a line, or several, of `columns` numbers each."""
    lines = unzipped(zipped, ETOPO_TEXT).split(b"\n")
    if rows == 1:
        lines = [b" ".join(lines)]
    words = [words for line in lines if (words := line.split())]
    if [len(line) for line in words] != [columns] * rows:
        raise ValueError(f"not a text of {rows} x {columns} numbers; a cut or damaged file, fetch it again")
    numbers = np.array(words, dtype="S32").astype(np.float64)
    if not (np.abs(numbers) < 1e5).all():
        raise ValueError("numbers in it that are neither heights (m) nor degrees")
    return numbers


def _round_the_earth(northward: NDArray[np.float64]) -> Heights:
    """Rows from the north and columns from the date line, without the column that is there twice."""
    if (northward[:, 0] != northward[:, -1]).any():
        raise ValueError("its last column does not repeat the first, as it goes once round the earth")
    eastward = np.roll(northward[::-1, :-1], ETOPO_EAST, axis=1)
    return np.ascontiguousarray(eastward, np.float32)


def _corner(name: str) -> tuple[int, int] | None:
    """Latitude and longitude (degrees) of the south-west corner that an SRTM tile's name tells."""
    match = SRTM_NAME.fullmatch(name)
    if match is None:
        return None
    south, west = int(match[2]), int(match[4])
    corner = (-south if match[1] == "S" else south, -west if match[3] == "W" else west)
    return corner if -90 <= corner[0] < 90 and -180 <= corner[1] < 180 else None


def _unpacked(name: str, zipped: bytes, size: int) -> bytes:
    """The one member of a tile's zip file, which has `size` bytes and the tile's own name."""
    expected = name.split(".")[0] + ".hgt"
    try:
        with zipfile.ZipFile(BytesIO(zipped)) as archive:
            members = archive.infolist()
            if [member.filename for member in members] != [expected] or members[0].file_size != size:
                held = ", ".join(
                    f"{member.filename!r:.40} ({member.file_size} bytes)" for member in members[:3]
                )
                raise ValueError(f"a zip file of {held or 'nothing'}, expected {expected} of {size} bytes")
            with archive.open(members[0]) as member:
                return member.read(size + 1)  # to its end, where its checksum is compared
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"a cut or damaged zip file, fetch it again ({error})") from error


def _geotiff(read: bytes, crs: str) -> tuple[NDArray[np.int16], Grid]:
    """The one band of a GeoTIFF of cells of GTOPO30, and its grid.

    It is opened as nothing but a GeoTIFF, out of memory: other formats, and files beside it, could have
    the library read any file or address.
    """
    if read[:4] not in (b"II*\0", b"MM\0*"):
        raise ValueError(f"not a GeoTIFF: begins with {read[:4]!r}")
    with (
        rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"),
        MemoryFile(read) as memory,
        memory.open(driver="GTiff") as raster,
    ):
        if raster.count != 1 or raster.dtypes[0] != "int16" or raster.width * raster.height > MOST_CELLS:
            raise ValueError(
                f"{raster.count} bands of {raster.height} x {raster.width} {raster.dtypes[0]}, expected one "
                f"of int16 and at most {MOST_CELLS} cells"
            )
        if raster.crs is not None and raster.crs != rasterio.CRS.from_user_input(crs):
            raise ValueError(f"lies in {raster.crs}, expected source.crs={crs}")
        grid = _grid(raster.transform, raster.width, raster.height, crs)
        return raster.read(1), grid


def _grid(transform: rasterio.Affine, width: int, height: int, crs: str) -> Grid:
    """The grid of cells of 30 seconds whose edges lie on whole ones."""
    step = (transform.a, transform.b, transform.d, transform.e)
    column, row = (transform.c + 180) / GTOPO_CELL, (90 - transform.f) / GTOPO_CELL
    even = max(abs(column - round(column)), abs(row - round(row))) < 1e-3  # of a cell
    if np.abs(np.subtract(step, (GTOPO_CELL, 0, 0, -GTOPO_CELL))).max() > 1e-9 or not even:
        raise ValueError(f"cells of {step} degrees from {transform.c}, {transform.f}: not those of GTOPO30")
    inside = 0 <= round(column) <= 43200 - width and 0 <= round(row) <= 21600 - height
    if not inside:
        raise ValueError(f"{width} cells from {transform.c} E, {height} from {transform.f} N: off the earth")
    x_first, y_first = -180 + (round(column) + 0.5) / 120, 90 - (round(row) + 0.5) / 120
    return Grid(crs, x_first, GTOPO_CELL, width, y_first, -GTOPO_CELL, height)
