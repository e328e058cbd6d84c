"""A `Grid` as the coordinates of a Zarr group (CF-1.11 chapters 4 and 5: axes, grid mapping, lat and lon)."""

import math
import warnings
from datetime import UTC, datetime
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from pyproj import CRS

from pipelines.grid import Grid
from pipelines.repository import create_array, store_array
from pipelines.version import version

CONVENTIONS = "CF-1.11"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIME_UNITS = {  # times are counted as if every day had 86400 s
    "units": "seconds since 1970-01-01T00:00:00Z",
    "calendar": "standard",
    "units_metadata": "leap_seconds: none",
}
ROWS = 256  # of latitude and longitude computed at a time


def provenance(title: str) -> dict[str, str]:
    """The global attributes that CF asks of every group."""
    made = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "Conventions": CONVENTIONS,
        "title": title,
        "history": f"{made}: made by metnet-nowcast {version()}",
    }


def seconds(time: datetime) -> int:
    """Whole seconds since 1970."""
    return round((time - EPOCH).total_seconds())


def write_grid(group: zarr.Group, grid: Grid) -> None:
    """Writes `crs`, `y`, `x` and the auxiliary `lat`, `lon` (degrees, WGS 84)."""
    store_array(group, "crs", (), np.zeros((), "i4"), grid_mapping(grid.crs))
    axes = {axis["axis"].lower(): axis for axis in CRS.from_wkt(grid.crs).cs_to_cf()}
    store_array(group, "x", ("x",), grid.x, {**axes["x"], "step": grid.x_step})
    store_array(group, "y", ("y",), grid.y, {**axes["y"], "step": grid.y_step})
    lat, lon = (
        create_array(group, name, ("y", "x"), grid.shape, "f4", attributes, chunks(grid, 512))
        for name, attributes in _latitude_longitude(grid).items()
    )
    for row in range(0, grid.y_size, ROWS):
        rows = slice(row, min(row + ROWS, grid.y_size))
        lon[rows], lat[rows] = _lonlat(grid.window(row, 0, rows.stop - row, grid.x_size))


def grid_mapping(crs: str) -> dict[str, Any]:
    """A CRS (WKT) as the attributes of a grid mapping (CF-1.11, appendix F), of which `crs_wkt` is itself."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        mapping: dict[str, Any] = CRS.from_wkt(crs).to_cf()  # it warns of what CF has no name for
    if "latitude_of_projection_origin" not in mapping:  # PROJ leaves out what follows from the parallel
        parallel: Any = mapping.get("standard_parallel")
        if mapping.get("grid_mapping_name") == "polar_stereographic":
            mapping["latitude_of_projection_origin"] = math.copysign(90.0, parallel)
        elif mapping.get("grid_mapping_name") == "lambert_conformal_conic":
            mapping["latitude_of_projection_origin"] = parallel
    return {**mapping, "crs_wkt": crs}


def read_grid(group: zarr.Group) -> Grid:
    """The grid that `write_grid` wrote, to the last bit.

    Raises:
        ValueError: if the group has no such coordinates.
    """
    try:
        x, y, crs = group["x"], group["y"], group["crs"]
        return Grid(
            str(crs.attrs["crs_wkt"]),
            float(np.asarray(x[0])),  # type: ignore[index]
            float(x.attrs["step"]),  # type: ignore[arg-type]
            int(x.shape[0]),  # type: ignore[union-attr]
            float(np.asarray(y[0])),  # type: ignore[index]
            float(y.attrs["step"]),  # type: ignore[arg-type]
            int(y.shape[0]),  # type: ignore[union-attr]
        )
    except KeyError as error:
        raise ValueError(f"group {group.path!r} has no grid of this software: {error} is missing") from error


def chunks(grid: Grid, side: int) -> tuple[int, int]:
    """The chunk of a field: `side` cells or, where the grid is smaller, all of it."""
    return min(side, grid.y_size), min(side, grid.x_size)


def located(attributes: dict[str, Any], *more: str) -> dict[str, Any]:
    """The attributes of an array on the grid, with the names of its auxiliary coordinates."""
    return {**attributes, "grid_mapping": "crs", "coordinates": " ".join(("lat", "lon", *more))}


def _latitude_longitude(grid: Grid) -> dict[str, dict[str, str]]:
    """The attributes of `lat` and `lon`; no standard names where `x` and `y` bear them."""
    attributes = {
        "lat": {"standard_name": "latitude", "long_name": "latitude", "units": "degrees_north"},
        "lon": {"standard_name": "longitude", "long_name": "longitude", "units": "degrees_east"},
    }
    if grid.is_lonlat:
        for named in attributes.values():
            del named["standard_name"]
    return attributes


def _lonlat(grid: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """As `Grid.lonlat`, NaN beside the earth; by the edges alone where they are x and y themselves."""
    if not grid.is_lonlat:
        with np.errstate(invalid="ignore"):  # space beside the disk that a satellite sees has no longitude
            lon, lat = grid.lonlat()
        return lon, np.where(np.isfinite(lat), lat, np.nan)
    lon, _ = grid.window(0, 0, 1, grid.x_size).lonlat()
    _, lat = grid.window(0, 0, grid.y_size, 1).lonlat()
    return np.broadcast_to(lon, grid.shape), np.broadcast_to(lat, grid.shape)
