"""`Fmi`: radar composites of the Finnish Meteorological Institute, as PGM pictures or GeoTIFF (5 minutes).

Both hold 8-bit counts of half a dBZ from -32: 0 is "no echo" and 255 "not observed". A PGM (netpbm P5) says
what it is in comment lines before its size, a GeoTIFF (TIFF 6.0, OGC 19-008r4) in its GDAL_METADATA tag.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import rasterio
from numpy.typing import NDArray
from pyproj import Transformer
from pyproj.exceptions import ProjError
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader, MemoryFile

from pipelines.cf import RAINFALL_RATE, REFLECTIVITY
from pipelines.formats.inflate import inflated
from pipelines.frame import Frame
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, content, named_files, stamp, unzipped
from pipelines.words import z_r_law

Counts = NDArray[np.uint8]
Told = dict[str, str]  # what a file says of itself

# The picture's lower left corner is the origin; the false origin is not in the files, but puts both corners
# that their headers name there (and is that of pysteps' importer).
SUOMI1 = Grid(
    "+proj=stere +lat_0=90 +lon_0=25 +lat_ts=60 +R=6371288 +x_0=380886.310 +y_0=3395677.920 +units=m",
    x_first=999.674053 / 2,
    x_step=999.674053,
    x_size=760,
    y_first=(1226 - 0.5) * 999.62859,
    y_step=-999.62859,
    y_size=1226,
)
LOWEST_CAPPI = (
    "producttype CAPPI",
    "productname LOWEST",
    "param CorrectedReflectivity",
    "type stereographic",
    "centrallongitude 25",
    "centrallatitude 90",
    "truelatitude 60",
)
QUANTITIES = {variable.name: variable for variable in (RAINFALL_RATE, REFLECTIVITY)}
UNDETECT, NODATA = 0, 255
TIME = "%Y%m%d%H%M"
NEAR = 1.0  # m: how far a corner may lie from the registered one; headers round to about 0.5 m

PGM_HEADER = re.compile(rb"P5\n((?:#[^\n]*\n){1,200})(\d{1,5}) (\d{1,5})\n255\n")
TIFF_MAGIC = (b"II*\0", b"MM\0*")
LARGEST_TILE = 4096  # cells of a side
TIFF_ITEM = re.compile(r'<Item name="([^"<>]{1,100})"[^<>]{0,200}>([^<>]{0,200})</Item>')
LOCKED = {  # GDAL looks at nothing but the bytes that it is given
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "INTERNAL",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": "{noext}",
}


@dataclass(frozen=True)
class Fmi:
    """Composites in a folder and its subfolders; the name, grid and header of another one are arguments.

    `says` are the lines "key value" that must stand in the header (or metadata items) of the product.
    """

    path: str | None = None
    name: str = r"(\d{12})_fmi\.radar\.composite\.lowest_FIN_SUOMI1\.pgm(?:\.gz)?"  # group 1 is the time
    product: str = "FMI lowest CAPPI"
    grid: Grid = SUOMI1
    says: Sequence[str] = LOWEST_CAPPI
    gain: float = 0.5  # dBZ of one count
    offset: float = -32.0  # dBZ of count 0, if it were an echo
    quantity: str = RAINFALL_RATE.name  # or reflectivity: then "no echo" is `offset`, the lowest value
    z_r: Sequence[float] = (223.0, 1.53)  # a and b of Z = a R^b (FMI's for rain)
    cadence: float = 5.0  # minutes
    trusted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            ValueError: for another quantity, or a Z-R that is not two numbers above 0.
        """
        if self.quantity not in QUANTITIES:
            raise ValueError(f"quantity={self.quantity}: expected one of {', '.join(QUANTITIES)}")
        if len(self.z_r) != 2 or min(self.z_r) <= 0:
            raise ValueError(f"z_r={list(self.z_r)}: expected a and b of Z = a R^b, such as [223, 1.53]")

    def valid_time(self, name: str) -> datetime | None:
        """When the frame in a file of this name is valid; None for names of other products."""
        match = re.fullmatch(self.name, name)
        return stamp(match[1], TIME) if match else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, or holds no file of this product at all.
        """
        return named_files(self, start, end, self.product, f"those that match {self.name}")

    def read(self, file: RemoteFile) -> Frame:
        """The rain rate (mm/h) or reflectivity (dBZ) of one file; NaN where no radar looks.

        Raises:
            ValueError: naming the file, if it is not this whole product on its registered grid.
        """
        path = Path(file.url)
        largest = 2 * self.grid.x_size * self.grid.y_size + 2**16  # bytes; a GeoTIFF has overviews too
        read = content(path, largest)
        try:
            counts, told = self._picture(unzipped(read, largest))
            self._check_product(told)
            return Frame(
                variable=QUANTITIES[self.quantity],
                valid_time=self._valid_time(told, path.name),
                cadence=timedelta(minutes=self.cadence),
                grid=self.grid,
                values=self._values(counts),
                source=f"{self.product}, {z_r_law(self.z_r)}",
                sha256=hashlib.sha256(read).hexdigest(),
            )
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def _picture(self, message: bytes) -> tuple[Counts, Told]:
        if message.startswith(b"P5"):
            return _pgm(message, self.grid)
        if message.startswith(TIFF_MAGIC):
            return _geotiff(message, self.grid)
        raise ValueError(f"neither a PGM (P5) nor a TIFF: begins with {message[:8]!r}; fetch it again")

    def _check_product(self, told: Told) -> None:
        lines = {f"{key} {value}" for key, value in told.items()}
        missing = [line for line in self.says if line not in lines]
        if missing:
            raise ValueError(
                f"not {self.product}: its header does not say {missing}; "
                "another product needs its own config (says, grid, name)"
            )
        expected = {"Gain": self.gain, "Offset": self.offset, "Nodata": NODATA, "Undetect": UNDETECT}
        for key in expected.keys() & told.keys():  # a PGM does not say them
            if _numbers(told, key) != [expected[key]]:
                raise ValueError(f"{key}={told[key]}, expected {expected[key]:g}; set gain and offset for it")

    def _valid_time(self, told: Told, name: str) -> datetime:
        text = told.get("obstime", told.get("Observation time", ""))
        time, named = stamp(text, TIME), self.valid_time(name)
        if time is None:
            raise ValueError(f"its header has the time {text!r}, expected one such as 201705091045")
        if named is not None and named != time:
            raise ValueError(f"its header says {time:%Y-%m-%dT%H:%MZ}, which is not the time in its name")
        return time

    def _values(self, counts: Counts) -> NDArray[np.float32]:
        dbz = self.gain * np.arange(256) + self.offset
        table = dbz
        if self.quantity == RAINFALL_RATE.name:
            a, b = self.z_r
            table = (10 ** (dbz / 10) / a) ** (1 / b)
            table[UNDETECT] = 0.0
        table[NODATA] = np.nan
        return cv2.LUT(counts, table.astype(np.float32))


def _pgm(message: bytes, grid: Grid) -> tuple[Counts, Told]:
    """The counts (y, x) of a PGM and its header, if it is whole and lies on the grid."""
    head = PGM_HEADER.match(message)
    if head is None:
        raise ValueError("not an 8-bit PGM with comment lines before its size; fetch it again")
    width, height = int(head[2]), int(head[3])
    if (height, width) != grid.shape:
        raise ValueError(f"a picture of {height} x {width} cells, expected {grid.shape[0]} x {grid.shape[1]}")
    held = len(message) - head.end()
    if held != height * width:
        raise ValueError(
            f"{held} bytes of a picture that has {height * width}; a cut or damaged file, fetch it again"
        )
    lines = head[1].decode("latin-1").split("\n")
    told = {key: value for key, _, value in (line[1:].strip().partition(" ") for line in lines)}
    _check_corners(told, grid)
    return np.frombuffer(message, np.uint8, offset=head.end()).reshape(grid.shape), told


def _check_corners(told: Told, grid: Grid) -> None:
    """Refuses a PGM whose corners or cells are not the grid's."""
    corners = [_numbers(told, "bottomleft"), _numbers(told, "topright")]  # longitude and latitude, of edges
    steps = [_numbers(told, "metersperpixel_x"), _numbers(told, "metersperpixel_y")]
    if [len(numbers) for numbers in corners + steps] != [2, 2, 1, 1]:
        raise ValueError("its header does not give two corners and the size of a cell")
    rows, columns = grid.cells(*zip(*corners, strict=True))
    y_off = -grid.y_step * np.abs(rows - [grid.y_size - 0.5, -0.5])
    x_off = grid.x_step * np.abs(columns - [-0.5, grid.x_size - 0.5])
    grown_x = abs(steps[0][0] - grid.x_step) * grid.x_size
    grown_y = abs(steps[1][0] + grid.y_step) * grid.y_size
    off = float(np.max([*x_off, *y_off, grown_x, grown_y]))
    if not off < NEAR:
        raise ValueError(f"its corners are {off:.1f} m off the registered grid ({grid})")


def _numbers(told: Told, key: str) -> list[float]:
    try:
        numbers = [float(word) for word in told[key].split()]
    except (KeyError, ValueError):
        numbers = []
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"its header has {key}={told.get(key)!r}, expected numbers")
    return numbers


def _geotiff(message: bytes, grid: Grid) -> tuple[Counts, Told]:
    """The counts (y, x) of a GeoTIFF and its metadata items, if it is whole and lies on the grid."""
    try:
        with rasterio.Env(**LOCKED), MemoryFile(message) as file, file.open(driver="GTiff") as picture:
            _check_picture(picture, grid)
            tags = picture.tags()
            told = tags | dict(TIFF_ITEM.findall(tags.get("GDAL_METADATA", "")))
            return _cells(picture, message), told
    except RasterioError as error:
        raise ValueError("a damaged GeoTIFF that GDAL cannot read; fetch it again") from error


def _check_picture(picture: DatasetReader, grid: Grid) -> None:
    """Refuses other sizes, types, places and layouts than the product's, before its cells are read."""
    if (picture.height, picture.width) != grid.shape or picture.dtypes != ("uint8",):
        raise ValueError(
            f"bands of {picture.dtypes} and {picture.height} x {picture.width} cells, "
            f"expected one of uint8 and {grid.shape[0]} x {grid.shape[1]}"
        )
    layout = picture.tags(ns="IMAGE_STRUCTURE") | picture.tags(1, ns="IMAGE_STRUCTURE")
    packed, predictor = layout.get("COMPRESSION"), layout.get("PREDICTOR", "1")
    tiled = picture.profile["tiled"] and max(picture.block_shapes[0]) <= LARGEST_TILE
    if packed != "DEFLATE" or predictor != "1" or "NBITS" in layout or not tiled:
        raise ValueError(f"cells packed as {layout}, {tiled=}, expected DEFLATE of 8 bits each, in tiles")
    _check_place(picture, grid)


def _check_place(picture: DatasetReader, grid: Grid) -> None:
    if picture.crs is None:
        raise ValueError(f"it has no coordinate system; expected that of {grid}")
    west, north = grid.x_first - grid.x_step / 2, grid.y_first - grid.y_step / 2
    east, south = west + grid.x_size * grid.x_step, north + grid.y_size * grid.y_step
    x_step, x_shear, x_edge, y_shear, y_step, y_edge = picture.transform[:6]
    corners = np.array(
        [
            (x_edge + x_step * column + x_shear * row, y_edge + y_shear * column + y_step * row)
            for column in (0, picture.width)
            for row in (0, picture.height)
        ]
    )
    expected = np.array([(x, y) for x in (west, east) for y in (north, south)])
    try:
        moved = np.transpose(_to_grid(picture.crs.to_wkt(), grid.crs).transform(*corners.T))
    except ProjError as error:
        raise ValueError(f"its coordinate system is not that of {grid}: {error}") from error
    off = float(max(np.abs(moved - expected).max(), np.abs(corners - expected).max()))
    if not off < NEAR:
        raise ValueError(f"its corners are {off:.1f} m off the registered grid ({grid})")


def _cells(picture: DatasetReader, message: bytes) -> Counts:
    """The counts (y, x), tile by tile.

    GDAL says where the tiles lie but does not read them: it gives 0 for an absent one, and does not mind one
    that is cut.
    """
    height, width = picture.block_shapes[0]
    rows, columns = -(-picture.height // height), -(-picture.width // width)
    tiles: NDArray[np.uint8] = np.empty((rows, height, columns, width), np.uint8)
    places = set()
    for row, column in product(range(rows), range(columns)):
        offset, size = (
            picture.get_tag_item(f"BLOCK_{what}_{column}_{row}", "TIFF", bidx=1)
            for what in ("OFFSET", "SIZE")
        )
        if offset is None or size is None or offset in places:
            raise ValueError("a GeoTIFF with absent or repeated tiles; a damaged file, fetch it again")
        places.add(offset)
        zipped = message[int(offset) : int(offset) + int(size)]
        tiles[row, :, column] = _tile(zipped, height * width).reshape(height, width)
    return tiles.reshape(rows * height, columns * width)[: picture.height, : picture.width]


def _tile(zipped: bytes, size: int) -> Counts:
    try:
        return np.frombuffer(inflated(zipped, size), np.uint8)
    except ValueError as error:
        raise ValueError(f"a GeoTIFF with a damaged tile ({error}); fetch it again") from error


@lru_cache(maxsize=8)
def _to_grid(wkt: str, crs: str) -> Transformer:
    return Transformer.from_crs(wkt, crs, always_xy=True)
