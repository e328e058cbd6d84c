"""`Goes`: images, rain rate and lightning of the GOES-R satellites (GOES-16 to -19), netCDF-4.

Layout, calibration and fixed grid: GOES-R Product Definition and Users' Guide (PUG), volumes 3 and 5;
lightning on the same grid: glmtools (Bruning et al. 2019, doi:10.1029/2019JD030874). A field lies on a grid
of equal scan angles (PROJ: `geos`, sweep x). The grids of the regular scenes are registered here, and a
mesoscale scene must lie on the same lattice.

The files of lightning points (GLM-L2-LCFA) are lists of flashes: `pipelines.sources.glm` counts them.

A scan takes its time, and its times jitter by a second or so. A frame is valid at the end of the slot in
which its scan is complete, slots being whole multiples of the cadence: a forecast that starts from a frame
then knows nothing that was not yet seen. A scan that ends up to a sixth of the cadence late still counts to
its slot, so that jitter moves no frame to the next one.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from pipelines.cf import (
    BRIGHTNESS_TEMPERATURE,
    FLASH_EXTENT_DENSITY,
    RADIANCE,
    RADIANCE_PER_WAVENUMBER,
    RAINFALL_RATE,
    REFLECTANCE,
    Variable,
)
from pipelines.formats import hdf5
from pipelines.frame import ALWAYS, Frame, parse_time
from pipelines.grid import Grid
from pipelines.sources.source import RemoteFile, named_files, stamp, within

FILE_NAME = re.compile(
    r"[A-Z]{2}_(?P<product>ABI-L1b-Rad|ABI-L2-CMIP|ABI-L2-MCMIP|ABI-L2-RRQPE|GLM-L2-GLM)(?P<scene>F|C|M1|M2)"
    r"-M(?P<mode>\d{1,2})(?:C(?P<channel>\d{2}))?_G(?P<satellite>\d{2})"
    r"_s(?P<start>\d{14})_e(?P<end>\d{14})_c\d{14}\.nc"
)
EXAMPLE = "OR_{product}C-M6_G16_s20191611801229_e20191611804002_c20191611804092.nc"
LARGEST = 2**29  # bytes of a file; the full disk of channel 2 in cells of 0.5 km has some 400 MB
BLOCK = 2**22  # cells that are unpacked at once

HEIGHT = 35786023.0  # m, of the satellite above the ellipsoid
PROJECTION: dict[str, float | str] = {
    "grid_mapping_name": "geostationary",
    "perspective_point_height": HEIGHT,
    "semi_major_axis": 6378137.0,
    "semi_minor_axis": 6356752.31414,
    "latitude_of_projection_origin": 0.0,
    "sweep_angle_axis": "x",
}
STEPS = (14, 28, 56)  # microradians: cells of 0.5, 1 and 2 km below the satellite
DISK_EDGE = 5424  # half cells of 2 km from the middle of the full disk to its edges
DISK_FIRST = 0.151844  # radians: the first centre of the full disk of 2 km
SIZES = {"F": (5424, 5424), "C": (1500, 2500), "M1": (500, 500), "M2": (500, 500)}  # rows, columns of 2 km
CONUS = {-75.0: (422, 902), -89.5: (452, 1372), -137.0: (422, 1462)}  # first row, column in the full disk's
SLOTS = {"GOES-East": -75.0, "GOES-Test": -89.5, "GOES-West": -137.0}  # degrees east, of the projection

MINUTES = {"F": 10, "C": 5, "M1": 1, "M2": 1}  # from scan to scan, in mode 6
MINUTES_OF_MODE = {("F", 3): 15, ("F", 4): 5}  # where another scan mode has others
LAST_REFLECTIVE = 6  # channels to here see sunlight, the others heat
CHANNELS = range(1, 17)

# What GLM sees, as scan angles in radians: a circle and a square of 15 degrees. The GOES-R Data Book says 16
# degrees of the circle, but events are seen to 8.195 degrees from its middle.
VIEW = (float(np.radians(8.2)), float(np.radians(7.5)))  # radius and half side
PER_MINUTES = re.compile(r"Count per nominal +3136 microradian\^2 pixel per (\d+\.\d+) min")

Table = NDArray[np.float64]  # the physical value of each of the 65,536 counts


@dataclass(frozen=True)
class Scan:
    """What a file's name says of it."""

    product: str
    scene: str
    mode: int
    channel: int | None  # None: the product has none, or many in one file
    satellite: str  # such as G16
    start: datetime
    end: datetime

    @classmethod
    def of(cls, name: str) -> "Scan | None":
        """The scan in a file of this name; None for names of other products."""
        match = FILE_NAME.fullmatch(name)
        if match is None:
            return None
        start, end = (stamp(match[key] + "00000", "%Y%j%H%M%S%f") for key in ("start", "end"))
        if start is None or end is None or not start < end:
            return None
        return cls(
            product=match["product"],
            scene=match["scene"],
            mode=int(match["mode"]),
            channel=None if match["channel"] is None else int(match["channel"]),
            satellite=f"G{match['satellite']}",
            start=start,
            end=end,
        )

    def __str__(self) -> str:
        """The satellite and product as a person would say them."""
        channel = "" if self.channel is None else f" channel {self.channel}"
        return f"NOAA GOES-{int(self.satellite[1:])} {self.product}{self.scene}{channel}"


@dataclass(frozen=True)
class Field:
    """A packed field: its counts, their flags, and what each count means."""

    variable: Variable
    counts: h5py.Dataset
    flags: h5py.Dataset
    table: Table
    view: tuple[float, float] | None = None  # radius and half side that are seen; None: the flags tell


class Product(Protocol):
    """A product: its name in the names of files, and which field of a file it is."""

    code: ClassVar[str]
    summed: ClassVar[bool]  # whether it counts what happened in the file's time, which then is its cadence

    @property
    def channel(self) -> int | None:
        """1..16; None: the product has none, or any will do."""
        ...

    def field(self, file: h5py.File, scan: Scan) -> Field:
        """The packed field of an open file.

        Raises:
            ValueError: if the file does not hold it as the product is defined.
        """
        ...


@dataclass(frozen=True)
class Imagery:
    """ABI-L2-CMIP: the image of one channel; reflectance (1..6) or brightness temperature in K (7..16)."""

    channel: int | None = None  # None: the one that the folder holds
    code: ClassVar[str] = "ABI-L2-CMIP"
    summed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses channels that there are not."""
        _check_channel(self.channel)

    def field(self, file: h5py.File, scan: Scan) -> Field:
        """The image of the channel that the file's name says."""
        return _image(file, "", scan.channel)


@dataclass(frozen=True)
class MultiChannelImagery:
    """ABI-L2-MCMIP: the images of all channels in one file, in cells of 2 km; one of them is read."""

    channel: int = 13  # 1..6 reflectance, 7..16 brightness temperature; 13 is the clean infrared window
    code: ClassVar[str] = "ABI-L2-MCMIP"
    summed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses channels that there are not."""
        _check_channel(self.channel)

    def field(self, file: h5py.File, scan: Scan) -> Field:
        """The image of the channel that was chosen."""
        return _image(file, f"_C{self.channel:02d}", self.channel)


@dataclass(frozen=True)
class Radiances:
    """ABI-L1b-Rad: the radiance of one channel, or what the file's own constants make of it."""

    channel: int | None = None  # 1..16; None: the one that the folder holds
    calibrated: bool = True  # to reflectance (1..6) or brightness temperature in K (7..16)
    code: ClassVar[str] = "ABI-L1b-Rad"
    summed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuses channels that there are not."""
        _check_channel(self.channel)

    def field(self, file: h5py.File, scan: Scan) -> Field:
        """The channel that the file's name says."""
        counts, flags = _dataset(file, "Rad"), _dataset(file, "DQF")
        _check_band(file, "", scan.channel)
        radiance = RADIANCE if _is_reflective(scan.channel) else RADIANCE_PER_WAVENUMBER
        _check_units(counts, radiance.units)
        table = _unpacked(counts)
        if not self.calibrated:
            return Field(radiance, counts, flags, table)
        if _is_reflective(scan.channel):
            return Field(REFLECTANCE, counts, flags, table * _constant(file, "kappa0"))
        return Field(BRIGHTNESS_TEMPERATURE, counts, flags, _temperature(file, table))


@dataclass(frozen=True)
class RainRate:
    """ABI-L2-RRQPE: the rain rate that is estimated from infrared."""

    channel: ClassVar[int | None] = None
    code: ClassVar[str] = "ABI-L2-RRQPE"
    summed: ClassVar[bool] = False

    def field(self, file: h5py.File, scan: Scan) -> Field:
        """The rain rate (mm/h)."""
        counts = _dataset(file, "RRQPE")
        _check_units(counts, "mm h-1")
        return Field(RAINFALL_RATE, counts, _dataset(file, "DQF"), _unpacked(counts))


@dataclass(frozen=True)
class Lightning:
    """GLM on the grid of ABI, by glmtools: how many flashes touched a cell in the file's minutes."""

    channel: ClassVar[int | None] = None
    code: ClassVar[str] = "GLM-L2-GLM"
    summed: ClassVar[bool] = True

    def field(self, file: h5py.File, scan: Scan) -> Field:
        """The flash extent density; its fill value is 0 and says "no flash", not "not observed"."""
        counts = _dataset(file, "flash_extent_density")
        units = str(hdf5.attribute(counts, "units"))
        match = PER_MINUTES.fullmatch(units)
        if match is None or timedelta(minutes=float(match[1])) != scan.end - scan.start:
            raise ValueError(f"counts in {units!r}, but of the time from {scan.start} to {scan.end}")
        if (hdf5.attribute(counts, "_FillValue"), hdf5.attribute(counts, "add_offset")) != (0, 0.0):
            raise ValueError("_FillValue or add_offset is not 0: then the fill value does not mean no flash")
        table = _unpacked(counts)
        table[0] = 0.0
        return Field(FLASH_EXTENT_DENSITY, counts, _dataset(file, "DQF"), table, VIEW)


@dataclass(frozen=True)
class Goes:
    """Files of one product of one satellite and scene, in a folder and its subfolders, as NOAA names them."""

    product: Product
    path: str | None = None
    satellite: str | None = None  # such as G16; None: the one that the folder holds
    scene: str | None = None  # F full disk, C contiguous US, M1, M2; None: the one that the folder holds
    cadence: float | None = None  # minutes; None: what the scene has in the file's scan mode
    quality: Sequence[int] = (0,)  # flags (DQF) of cells to keep: 0 good; 1 in images: conditionally usable
    trusted: ClassVar[bool] = False
    group: ClassVar[str] = "satellite"

    def __post_init__(self) -> None:
        """Refuses scenes that there are not, and flags that are none."""
        object.__setattr__(self, "quality", tuple(self.quality))
        if self.scene is not None and self.scene not in SIZES:
            raise ValueError(f"source.scene={self.scene}: expected one of {', '.join(SIZES)}")
        if self.cadence is not None and self.cadence <= 0:
            raise ValueError(f"source.cadence={self.cadence}: expected minutes, more than 0")
        if not self.quality or not all(0 <= flag < 255 for flag in self.quality):
            raise ValueError(f"source.quality={list(self.quality)}: expected flags of 0..254, such as [0, 1]")

    def valid_time(self, name: str) -> datetime | None:
        """When the frame in a file of this name is valid; None for names of other products."""
        scan = Scan.of(name)
        return self._slot_end(scan) if scan is not None and self._wants(scan) else None

    def files(self, start: datetime | None, end: datetime | None) -> Iterator[RemoteFile]:
        """The files valid within [start, end], by rising valid time.

        Raises:
            ValueError: if the folder is not there, holds no file of this product at all, or those of several
                satellites, scenes or channels.
        """
        example = EXAMPLE.format(product=self.product.code)
        found = list(named_files(self, None, None, f"GOES {self.product.code}", example))
        kinds = {str(scan) for file in found if (scan := Scan.of(Path(file.url).name))}
        if len(kinds) > 1:
            raise ValueError(
                f"{self.path}: holds {', '.join(sorted(kinds))}; choose one with source.satellite, "
                "source.scene and, where it has channels, source.product.channel"
            )
        yield from within(found, start, end)

    def read(self, file: RemoteFile) -> Frame:
        """The field of one file, in physical units; NaN where it is missing or its flag is not to be kept.

        Raises:
            ValueError: naming the file, if it is not a whole file of this product on a registered grid.
        """
        path = Path(file.url)
        try:
            with hdf5.opened(path, LARGEST) as content:
                return self._frame(content, path)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error

    def _frame(self, content: h5py.File, path: Path) -> Frame:
        scan = self._scan(content, path.name)
        grid = _grid(content, scan)
        field = self.product.field(content, scan)
        values = _values(field, self.quality, grid.shape)
        if field.view is not None:
            values[_beyond(field.view, grid) & (values == 0)] = np.nan
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Frame(
            variable=field.variable,
            valid_time=self._slot_end(scan),
            cadence=self._step(scan),
            grid=grid,
            values=values,
            source=str(scan),
            sha256=sha256,
            group=self.group,
        )

    def _wants(self, scan: Scan) -> bool:
        return (
            scan.product == self.product.code
            and self.satellite in (None, scan.satellite)
            and self.scene in (None, scan.scene)
            and (scan.channel is None or self.product.channel in (None, scan.channel))
        )

    def _scan(self, content: h5py.File, name: str) -> Scan:
        """The scan in an open file, of which its contents and its name must tell the same."""
        stated = str(hdf5.attribute(content, "dataset_name"))
        scan = Scan.of(stated)
        if scan is None or not self._wants(scan):
            raise ValueError(
                f"holds {stated}, expected {self.product.code} of channel={self.product.channel}, "
                f"satellite={self.satellite}, scene={self.scene} (None: any)"
            )
        if Scan.of(name) not in (None, scan):
            raise ValueError(f"holds {stated}: another scan than its name says")
        covered = [
            parse_time(str(hdf5.attribute(content, f"time_coverage_{end}"))) for end in ("start", "end")
        ]
        if covered != [scan.start, scan.end]:
            raise ValueError(
                f"covers {covered[0]} to {covered[1]}, but is called {stated}; a damaged file, fetch it again"
            )
        return scan

    def _step(self, scan: Scan) -> timedelta:
        if self.cadence is not None:
            return timedelta(minutes=self.cadence)
        if self.product.summed:
            return scan.end - scan.start
        return timedelta(minutes=MINUTES_OF_MODE.get((scan.scene, scan.mode), MINUTES[scan.scene]))

    def _slot_end(self, scan: Scan) -> datetime:
        """The end of the slot in which the scan is complete, up to a sixth of it late."""
        step = self._step(scan)
        slots = -((ALWAYS - (scan.end - step / 6)) // step)
        return ALWAYS + slots * step


def _check_channel(channel: int | None) -> None:
    if channel is not None and channel not in CHANNELS:
        raise ValueError(f"source.product.channel={channel}: expected 1..16")


def _is_reflective(channel: int | None) -> bool:
    """Whether a channel sees sunlight, and not heat."""
    return channel is not None and channel <= LAST_REFLECTIVE


def _image(file: h5py.File, suffix: str, channel: int | None) -> Field:
    """The image of a channel in a file of CMIP (no suffix) or MCMIP (its number)."""
    counts = _dataset(file, f"CMI{suffix}")
    _check_band(file, suffix, channel)
    variable = REFLECTANCE if _is_reflective(channel) else BRIGHTNESS_TEMPERATURE
    _check_units(counts, variable.units)
    return Field(variable, counts, _dataset(file, f"DQF{suffix}"), _unpacked(counts))


def _dataset(file: h5py.File, name: str) -> h5py.Dataset:
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{name} is not a field, as in this product")
    return dataset


def _check_band(file: h5py.File, suffix: str, channel: int | None) -> None:
    stated = _scalar(file, f"band_id{suffix}")
    if stated != channel:
        raise ValueError(f"band_id{suffix} is {stated:g}, expected channel {channel}")


def _check_units(counts: h5py.Dataset, expected: str) -> None:
    units = hdf5.attribute(counts, "units")
    if units != expected:
        raise ValueError(f"{counts.name} is in {units}, expected {expected}")


def _scalar(file: h5py.File, name: str) -> float:
    number = _dataset(file, name)
    if number.size != 1 or number.dtype.kind not in "iuf":
        raise ValueError(f"{name} is not one number")
    return float(hdf5.values(number, number.shape, np.float64).item())


def _constant(file: h5py.File, name: str) -> float:
    """A constant of calibration; -999 stands where the channel has none."""
    constant = _scalar(file, name)
    if not 0 < constant < 1e6:
        raise ValueError(f"{name} is {constant:g}: no constant of calibration for this channel")
    return constant


def _temperature(file: h5py.File, radiance: Table) -> Table:
    """Brightness temperature (K) by Planck's function (PUG volume 3); NaN where there is no radiance."""
    fk1, fk2 = _constant(file, "planck_fk1"), _constant(file, "planck_fk2")
    bc1, bc2 = _scalar(file, "planck_bc1"), _constant(file, "planck_bc2")
    if not abs(bc1) < 10:
        raise ValueError(f"planck_bc1 is {bc1:g} K: no constant of calibration for this channel")
    positive = np.where(radiance > 0, radiance, np.nan)
    return np.asarray((fk2 / np.log(fk1 / positive + 1) - bc1) / bc2)


def _unpacked(counts: h5py.Dataset) -> Table:
    """The value of every count by its 16 bits; NaN for the fill value and outside the valid range."""
    if counts.dtype not in (np.dtype("<i2"), np.dtype("<u2")):
        raise ValueError(f"{counts.name} is of type {counts.dtype}: expected counts of 16 bits")
    codes = np.arange(2**16, dtype=np.uint16)
    unsigned = counts.dtype.kind == "u" or _text(counts, "_Unsigned") == "true"
    scale, offset = _float(counts, "scale_factor"), _float(counts, "add_offset")
    if not 0 < scale < 1e6:
        raise ValueError(f"{counts.name} has scale_factor={scale:g}: expected more than 0")
    table: Table = np.asarray(codes if unsigned else codes.view(np.int16), np.float64) * scale + offset
    if unsigned and "valid_range" in counts.attrs:
        low, high = np.asarray(hdf5.attribute(counts, "valid_range")).astype(np.uint16)
        table[(codes < low) | (codes > high)] = np.nan
    table[int(_float(counts, "_FillValue")) & 0xFFFF] = np.nan
    return table


def _text(node: h5py.HLObject, name: str) -> str | None:
    return str(hdf5.attribute(node, name)) if name in node.attrs else None


def _float(node: h5py.Dataset, name: str) -> float:
    value = hdf5.attribute(node, name)
    if not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"{node.name} has {name}={value!r}: expected a number")
    return float(value)


def _values(field: Field, quality: Sequence[int], shape: tuple[int, int]) -> NDArray[np.float32]:
    """The field in physical units; NaN where its flag is not one to keep."""
    counts, flags = field.counts, field.flags
    if counts.shape != shape or flags.shape != shape:
        raise ValueError(f"fields of {counts.shape} and flags of {flags.shape} on a grid of {shape}")
    if flags.dtype.itemsize != 1:
        raise ValueError(f"flags of type {flags.dtype}: expected 8 bits")
    table = field.table.astype(np.float32)
    left_out = np.ones(256, bool)
    left_out[list(quality)] = False
    values = np.empty(shape, np.float32)
    for rows in _blocks(counts):
        codes, unwritten = hdf5.part(counts, (rows, slice(None)))
        marks, unmarked = hdf5.part(flags, (rows, slice(None)))
        if unwritten != unmarked:  # a chunk of empty space may lack in both; a damaged index loses one
            raise ValueError("parts of its field or flags are lost; a damaged file, fetch it again")
        part = table[codes.view(np.uint16)]
        part[left_out[marks.view(np.uint8)]] = np.nan
        values[rows] = part
    return values


def _blocks(counts: h5py.Dataset) -> Iterator[slice]:
    """Slices of rows of some million cells that cut through no chunk."""
    height, width = counts.shape
    chunk = counts.chunks[0] if counts.chunks else 1
    rows = max(1, BLOCK // (width * chunk)) * chunk
    for first in range(0, height, rows):
        yield slice(first, min(first + rows, height))


def _beyond(view: tuple[float, float], grid: Grid) -> NDArray[np.bool_]:
    """Where an instrument does not look that sees a circle and a square of scan angles (y, x)."""
    radius, side = view
    x, y = grid.x[None, :] / HEIGHT, grid.y[:, None] / HEIGHT
    return np.asarray((x**2 + y**2 > radius**2) | (np.abs(x) > side) | (np.abs(y) > side))


def _grid(file: h5py.File, scan: Scan) -> Grid:
    """The grid of the file.

    Raises:
        ValueError: if it is not the scene's registered one, or off the lattice of the fixed grid.
    """
    longitude = _longitude(file)
    x_first, x_step, columns = _axis(_dataset(file, "x"))
    y_first, y_step, rows = _axis(_dataset(file, "y"))
    if x_step != -y_step or x_step not in STEPS:
        raise ValueError(f"steps of {x_step} and {y_step} microradians: expected one of {STEPS}, y southward")
    part = 56 // x_step  # cells in one of 2 km, each way
    if (rows, columns) != tuple(part * size for size in SIZES[scan.scene]):
        raise ValueError(f"{rows} x {columns} cells of {x_step} microradians: not a scene {scan.scene}")
    if scan.scene.startswith("M"):
        _check_middle(file, "x", (x_first + columns - 1) * x_step * 0.5e-6)
        _check_middle(file, "y", (y_first - rows + 1) * x_step * 0.5e-6)
    elif (x_first, y_first) != (expected := _first_centre(scan.scene, longitude, part)):
        raise ValueError(
            f"begins {x_first}, {y_first} half cells of {x_step} microradians from the middle, expected "
            f"{expected[0]}, {expected[1]}: not the grid of scene {scan.scene} from {longitude:g} degrees"
        )
    half = x_step * 0.5e-6 * HEIGHT  # metres
    crs = f"+proj=geos +h={HEIGHT:.0f} +lon_0={longitude} +sweep=x +a=6378137 +b=6356752.31414 +units=m"
    return Grid(crs, x_first * half, 2 * half, columns, y_first * half, -2 * half, rows)


def _first_centre(scene: str, longitude: float, part: int) -> tuple[int, int]:
    """The x and y of the registered grid's first centre in half cells, of which 2 * `part` are 2 km long."""
    row, column = CONUS[longitude] if scene == "C" else (0, 0)
    return (2 * column - DISK_EDGE) * part + 1, (DISK_EDGE - 2 * row) * part - 1


def _longitude(file: h5py.File) -> float:
    """Degrees east of the middle of the projection, once the rest of it is the registered one."""
    projection = file["goes_imager_projection"]
    for name, expected in PROJECTION.items():
        got = hdf5.attribute(projection, name)
        if got != expected:
            raise ValueError(f"goes_imager_projection has {name}={got!r}, expected {expected!r}")
    longitude = hdf5.attribute(projection, "longitude_of_projection_origin")
    slot = str(hdf5.attribute(file, "orbital_slot"))
    if not isinstance(longitude, float) or SLOTS.get(slot) != longitude:
        raise ValueError(f"projected from {longitude!r} degrees east as {slot}; expected one of {SLOTS}")
    return longitude


def _axis(axis: h5py.Dataset) -> tuple[int, int, int]:
    """First centre in half cells from the middle of the disk, step in microradians, and count.

    Raises:
        ValueError: if the centres are no even steps on half cells of the fixed grid.
    """
    if not isinstance(axis, h5py.Dataset) or axis.ndim != 1 or axis.dtype.kind not in "iu":
        raise ValueError("an axis of the grid is not a line of counts")
    if not 2 <= axis.size <= 4 * max(SIZES["F"]) or hdf5.attribute(axis, "units") != "rad":
        raise ValueError(f"{axis.name} has {axis.size} cells: not an axis of the fixed grid in radians")
    counts = hdf5.values(axis, axis.shape).astype(np.int64)
    scale, offset = _float(axis, "scale_factor"), _float(axis, "add_offset")
    step = round(scale * 1e6)
    if (np.diff(counts) != 1).any() or step == 0 or abs(scale * 1e6 - step) > 1e-3:
        raise ValueError(f"{axis.name} does not run in even steps of whole microradians")
    half_cells = (offset + float(counts[0]) * scale) / (abs(step) * 0.5e-6)
    if abs(half_cells - round(half_cells)) > 0.02:  # a 32-bit offset is exact to 0.002
        raise ValueError(
            f"{axis.name} begins {half_cells:.3f} half cells from the middle: off the fixed grid"
        )
    return round(half_cells), step, axis.size


def _check_middle(file: h5py.File, name: str, middle: float) -> None:
    """Compares the place of a mesoscale scene (radians) with what the file says beside its axes.

    Files of ABI state the middle, to a cell; gridded lightning counts its cells from the full disk's first.
    """
    if f"{name}_image" in file:
        stated = _scalar(file, f"{name}_image")
        if not abs(stated - middle) <= 56e-6:
            raise ValueError(f"{name} has its middle at {middle:.6f} rad, but {name}_image is {stated:.6f}")
    elif abs(_float(file[name], "add_offset")) != DISK_FIRST:
        raise ValueError(f"{name} is not counted from the first cell of the full disk")
