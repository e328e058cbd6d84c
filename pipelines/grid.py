"""`Grid`: where the cells of a field lie, by CRS and the centres of evenly spaced cells."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray
from pyproj import CRS, Geod, Transformer

from pipelines.words import nearest

Coordinates = NDArray[np.float64]
NAMED = Path(__file__).parents[1] / "configs" / "grid"


@dataclass(frozen=True)
class Grid:
    """Evenly spaced cells in a CRS; row 0 is north, column 0 is west.

    `x`, `y` and their steps are in the CRS's own unit (metres, or degrees where it is geographic).
    """

    crs: str  # WKT, or anything else that PROJ reads
    x_first: float  # centre of column 0
    x_step: float  # above 0
    x_size: int
    y_first: float  # centre of row 0
    y_step: float  # below 0: row 0 is north
    y_size: int

    def __post_init__(self) -> None:
        """Stores the CRS as WKT, so that equal grids compare equal.

        Raises:
            ValueError: for no cells, or cells that do not run east and south.
        """
        if self.x_size < 1 or self.y_size < 1:
            raise ValueError(f"a grid of {self.y_size} x {self.x_size} cells: expected at least 1 x 1")
        if self.x_step <= 0 or self.y_step >= 0:
            raise ValueError(
                f"x_step={self.x_step}, y_step={self.y_step}: expected x_step > 0 and y_step < 0 "
                "(row 0 is north); flip the field first"
            )
        object.__setattr__(self, "crs", _wkt(self.crs))

    def __str__(self) -> str:
        """The cells, the CRS by name and the first cell centre, in one line."""
        return (
            f"{self.y_size} x {self.x_size} cells of {-self.y_step:g} x {self.x_step:g} in "
            f"{self._crs_name}, the first at x={self.x_first:.10g}, y={self.y_first:.10g}"
        )

    @property
    def _crs_name(self) -> str:
        """Of the CRS, or where it has none that of its projection."""
        crs = CRS.from_wkt(self.crs)
        crs = crs.source_crs if crs.is_bound and crs.source_crs else crs
        unnamed = crs.name.lower() in ("unknown", "unnamed", "undefined")
        return crs.coordinate_operation.method_name if unnamed and crs.coordinate_operation else crs.name

    @classmethod
    def from_coordinates(cls, crs: str, x: ArrayLike, y: ArrayLike) -> "Grid":
        """The grid with these cell centres.

        Raises:
            ValueError: if they are not evenly spaced, to a thousandth of a cell.
        """
        x_first, x_step, x_size = _even("x", x)
        y_first, y_step, y_size = _even("y", y)
        return cls(crs, x_first, x_step, x_size, y_first, y_step, y_size)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.y_size, self.x_size

    @property
    def x(self) -> Coordinates:
        """Cell centres, west to east."""
        return self.x_first + self.x_step * np.arange(self.x_size, dtype=np.float64)

    @property
    def y(self) -> Coordinates:
        """Cell centres, north to south."""
        return self.y_first + self.y_step * np.arange(self.y_size, dtype=np.float64)

    @property
    def is_geographic(self) -> bool:
        """Whether x and y are degrees: longitude and latitude, or those about another pole."""
        return bool(CRS.from_wkt(self.crs).is_geographic)

    @property
    def is_lonlat(self) -> bool:
        """Whether x and y are longitude and latitude in degrees."""
        return self.is_geographic and not CRS.from_wkt(self.crs).is_derived

    @cached_property
    def cell_size(self) -> float:
        """Metres: the root of the area of the middle cell."""
        row, column = self.y_size // 2, self.x_size // 2
        x = self.x_first + self.x_step * (column + np.array([-0.5, 0.5, 0.0, 0.0]))
        y = self.y_first + self.y_step * (row + np.array([0.0, 0.0, -0.5, 0.5]))
        lon, lat = _to_lonlat(self.crs).transform(x, y)
        _, _, lengths = Geod(ellps="WGS84").inv(lon[::2], lat[::2], lon[1::2], lat[1::2])
        return float(np.sqrt(lengths[0] * lengths[1]))

    def lonlat(self) -> tuple[Coordinates, Coordinates]:
        """Longitude and latitude (degrees, WGS 84) of every cell centre, each (y, x).

        Where the CRS holds no place on earth, such as beside a geostationary disk, both are not finite.
        """
        return self.lonlat_of(*np.meshgrid(self.x, self.y))

    def lonlat_of(self, x: ArrayLike, y: ArrayLike) -> tuple[Coordinates, Coordinates]:
        """As `lonlat`, of any places in the CRS."""
        lon, lat = _to_lonlat(self.crs).transform(np.asarray(x, float), np.asarray(y, float))
        with np.errstate(invalid="ignore"):  # a place that the CRS cannot hold is infinite
            return (np.asarray(lon) + 180) % 360 - 180, np.asarray(lat)

    def cells(self, lon: ArrayLike, lat: ArrayLike) -> tuple[Coordinates, Coordinates]:
        """Fractional row and column of each place; cell centres are whole numbers.

        A place that the CRS cannot hold, or outside the grid, gives numbers outside it (or inf).
        """
        x, y = _from_lonlat(self.crs).transform(np.asarray(lon, float), np.asarray(lat, float))
        if self.is_geographic:  # whole turns until the place lies on the grid's side of the earth
            west = self.x_first - self.x_step / 2
            x = west + np.mod(x - west, 360)
        return (y - self.y_first) / self.y_step, (x - self.x_first) / self.x_step

    def window(self, y0: int, x0: int, y_size: int, x_size: int) -> "Grid":
        """The part of `y_size` x `x_size` cells whose first cell is (`y0`, `x0`).

        Raises:
            ValueError: if it holds no cells, or reaches outside the grid.
        """
        asked = f"window=[{y0},{x0},{y_size},{x_size}] ([y0,x0,ny,nx], row 0 north)"
        if y_size < 1 or x_size < 1:
            raise ValueError(f"{asked} holds no cells: expected at least 1 x 1")
        if min(y0, x0) < 0 or y0 + y_size > self.y_size or x0 + x_size > self.x_size:
            raise ValueError(f"{asked} reaches outside the grid of {self.y_size} x {self.x_size} cells")
        return Grid(
            self.crs,
            self.x_first + x0 * self.x_step,
            self.x_step,
            x_size,
            self.y_first + y0 * self.y_step,
            self.y_step,
            y_size,
        )


def native() -> None:
    """No other grid: frames stay on the one they came on."""
    return None


def from_path(path: str) -> Grid:
    """The grid that a YAML file describes with the fields of `Grid`.

    Raises:
        ValueError: if the file is not such a description.
    """
    if not Path(path).is_file():
        names = sorted(file.stem for file in NAMED.glob("*.yaml") if file.stem != "from_path")
        raise ValueError(
            f"grid={path}: no such file, and no grid of that name in configs/grid/{nearest(path, names)}; "
            f"expected one of {', '.join(names)}, the path of a cube, or of a YAML file with crs, x_first, "
            "x_step, x_size, y_first, y_step, y_size"
        )
    fields = yaml.safe_load(Path(path).read_text())
    try:
        return Grid(**{key: value for key, value in fields.items() if key != "_target_"})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"grid={path}: not the description of a grid: {error}") from error


def _even(axis: str, centres: ArrayLike) -> tuple[float, float, int]:
    """First value, step and count of evenly spaced numbers."""
    values = np.asarray(centres, dtype=np.float64)
    if values.ndim != 1 or values.size < 2:
        raise ValueError(f"{axis} has shape {values.shape}: expected a line of at least 2 cell centres")
    step = (values[-1] - values[0]) / (values.size - 1)
    off = np.abs(values - (values[0] + step * np.arange(values.size))).max()
    if not off <= abs(step) * 1e-3:
        raise ValueError(f"{axis} is not evenly spaced: a centre is {off:g} off a step of {step:g}")
    return float(values[0]), float(step), int(values.size)


@lru_cache(maxsize=64)
def _wkt(crs: str) -> str:
    """One text for one CRS: some that PROJ writes (EPSG:3857) are written otherwise once read again."""
    return CRS.from_wkt(CRS.from_user_input(crs).to_wkt()).to_wkt()


@lru_cache(maxsize=64)
def _to_lonlat(crs: str) -> Transformer:
    return Transformer.from_crs(crs, "EPSG:4326", always_xy=True)


@lru_cache(maxsize=64)
def _from_lonlat(crs: str) -> Transformer:
    return Transformer.from_crs("EPSG:4326", crs, always_xy=True)
