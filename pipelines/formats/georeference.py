"""What a file says about its place: the CRS of its grid mapping, and whether its grid is a registered one."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from pyproj import CRS
from pyproj.exceptions import CRSError

from pipelines.grid import Grid

TOLERANCE = 1.0  # metres
SAMPLES = 5  # rows and columns that are compared
METRES_PER_DEGREE = 111_320.0  # of latitude
LONGEST_CRS = 50_000  # characters


def crs_of(grid_mapping: Mapping[str, Any]) -> str:
    """The WKT of the CRS that the attributes of a grid mapping describe (CF-1.11 appendix F).

    Raises:
        ValueError: if they describe none.
    """
    text = json.dumps({name: np.asarray(value).tolist() for name, value in grid_mapping.items()}, default=str)
    if len(text) > LONGEST_CRS:
        raise ValueError(f"its grid mapping has more than {LONGEST_CRS} characters, which is not read")
    return _crs_of(text)


@lru_cache(maxsize=64)
def _crs_of(text: str) -> str:
    """Kept, because PROJ takes half a second to look up a datum by its ellipsoid."""
    try:
        return CRS.from_cf(json.loads(text)).to_wkt()
    except (CRSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"its grid mapping cannot be understood ({error})") from error


def check_grid(found: Grid, registered: Grid) -> None:
    """Refuses a georeference that is not the registered one.

    Raises:
        ValueError: if the grids have other sizes, or any of a lattice of cells (the corners included) lies
            more than a metre off.
    """
    if found == registered:
        return
    if found.shape != registered.shape:
        raise ValueError(f"its grid has {found.shape} cells, expected {registered.shape}: {registered}")
    if not farthest(found, registered) <= TOLERANCE:
        raise ValueError(
            f"its grid is not the registered one: it has {found}, expected {registered}; if the service has "
            "moved its grid, change source.grid"
        )


def farthest(found: Grid, registered: Grid) -> float:
    """Metres from a cell to the same cell of the other grid, at most; inf if only one is on the earth."""
    rows = np.linspace(0, registered.y_size - 1, SAMPLES)
    columns = np.linspace(0, registered.x_size - 1, SAMPLES)
    with np.errstate(invalid="ignore"):  # space beside the disk of a satellite has no longitude
        lon, lat = _lattice(found).lonlat()
        y, x = registered.cells(lon, lat)
        seen = np.isfinite(y) & np.isfinite(x)
        if not seen.any() or not np.array_equal(seen, np.isfinite(_lattice(registered).lonlat()[0])):
            return float("inf")
    scale = METRES_PER_DEGREE if registered.is_geographic else 1.0
    off = np.hypot(
        (y - rows[:, None])[seen] * registered.y_step, (x - columns[None, :])[seen] * registered.x_step
    )
    return float(off.max()) * scale


def _lattice(grid: Grid) -> Grid:
    """Some cells of a grid, corners included."""
    return Grid(
        grid.crs,
        grid.x_first,
        grid.x_step * (grid.x_size - 1) / (SAMPLES - 1),
        SAMPLES,
        grid.y_first,
        grid.y_step * (grid.y_size - 1) / (SAMPLES - 1),
        SAMPLES,
    )
