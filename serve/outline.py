"""The outline of a grid in longitude and latitude, where each pole is a line and 180 degrees a seam."""

from functools import lru_cache

import numpy as np

from pipelines.grid import Coordinates, Grid
from serve import geometry

Ring = list[tuple[float, float]]

SIDES = 32  # parts that an edge is cut into
EDGE = 1e-6  # cells; a pole as near as this lies on the edge, and the rim is drawn as far within
LOOKS = 64  # places along a side, where the middle of what lies on the earth is looked for
HALVINGS = 30  # of a ray, in search of its end
WORLD: Ring = [(-180.0, -90.0), (180.0, -90.0), (180.0, 90.0), (-180.0, 90.0), (-180.0, -90.0)]


@lru_cache(maxsize=64)
def outline_of(grid: Grid) -> Ring:
    """The rim of the outer cells: a closed ring of longitude and latitude, running on past 180 degrees.

    Round a pole it goes from one side of 180 degrees to the other and back along the pole, as in GeoJSON;
    where an edge runs through a pole, it too goes along it. With both poles inside it is the whole world.
    """
    lon, lat = _rim(grid)
    if not np.isfinite(lat).all():
        lon, lat = _limb(grid)
    if not lat.size:
        return WORLD
    step = _shortest(np.diff(lon, append=lon[:1]))
    depths = dict(zip((-90.0, 90.0), _depths(grid), strict=True))
    inside = [pole for pole, depth in depths.items() if depth > EDGE]
    on_edge = [pole for pole, depth in depths.items() if abs(depth) <= EDGE]
    passed = [pole for pole in on_edge if np.abs(lat - pole).min() > 1e-5]  # between two points
    if len(inside) == 2:
        return WORLD
    if inside:
        ring = _along(inside[0], *_cut_at_seam(lon, lat, step))
    elif passed:
        ring = _along(passed[0], lon, lat, int(np.abs(step).argmax()))
    else:
        ring = np.unwrap(np.append(lon, lon[0]), period=360), np.append(lat, lat[0])
    return [(round(float(x), 5), round(float(y), 5)) for x, y in zip(*ring, strict=True)]


def bounds_of(ring: Ring) -> tuple[float, float, float, float]:
    """West, south, east and north; west is above east across 180 degrees (RFC 7946, section 5.2)."""
    lon, lat = np.array(ring).T
    west, east = lon.min(), lon.max()
    if east - west > 360 - 1e-4:
        west, east = -180.0, 180.0
    west, east = _shortest(west), -_shortest(-east)
    return round(float(west), 5), float(lat.min()), round(float(east), 5), float(lat.max())


def _rim(grid: Grid) -> tuple[Coordinates, Coordinates]:
    """Points along the four edges, clockwise from the north-west, each once."""
    x, y = grid.x_step * (0.5 - EDGE), grid.y_step * (0.5 - EDGE)
    corners = Grid(
        grid.crs,
        grid.x_first - x,
        (grid.x_step * (grid.x_size - 1) + 2 * x) / SIDES,
        SIDES + 1,
        grid.y_first - y,
        (grid.y_step * (grid.y_size - 1) + 2 * y) / SIDES,
        SIDES + 1,
    )
    lon, lat = (
        np.concatenate([edge[0, :-1], edge[:-1, -1], edge[-1, :0:-1], edge[:0:-1, 0]])
        for edge in geometry.lonlat(corners)
    )
    return lon, lat


def _limb(grid: Grid) -> tuple[Coordinates, Coordinates]:
    """Points around what lies on the earth, of a grid whose rim does not, clockwise from the north.

    They are where rays from the middle of it leave the earth or the grid; none where all is space.
    """
    west, north = grid.x_first - grid.x_step / 2, grid.y_first - grid.y_step / 2
    wide, high = grid.x_step * grid.x_size, grid.y_step * grid.y_size
    parts = (np.arange(LOOKS) + 0.5) / LOOKS
    x, y = np.meshgrid(west + wide * parts, north + high * parts)
    seen = np.isfinite(geometry.lonlat_of(grid, x, y)[1])
    if not seen.any():
        return np.empty(0), np.empty(0)
    middle = np.array([x[seen].mean(), y[seen].mean()])[:, None]
    angle = np.linspace(0, 2 * np.pi, 4 * SIDES, endpoint=False)
    ray = np.array([np.sin(angle), np.cos(angle)])
    with np.errstate(divide="ignore"):
        ends = [
            (np.array(edge)[:, None] - middle) / ray for edge in ((west, north), (west + wide, north + high))
        ]
    inner, outer = np.zeros(angle.size), np.where(np.stack(ends) > 0, ends, np.inf).min(axis=(0, 1))
    for _ in range(HALVINGS):
        half = (inner + outer) / 2
        on_earth = np.isfinite(geometry.lonlat_of(grid, *(middle + half * ray))[1])
        inner, outer = np.where(on_earth, half, inner), np.where(on_earth, outer, half)
    return geometry.lonlat_of(grid, *(middle + inner * ray))


def _depths(grid: Grid) -> Coordinates:
    """How many cells the south and the north pole lie within the edges; below 0: outside."""
    row, column = geometry.cells(grid, [0.0, 0.0], [-90.0, 90.0])
    rows, columns = np.minimum(row, grid.y_size - 1 - row), np.minimum(column, grid.x_size - 1 - column)
    return np.minimum(rows, columns) + 0.5


def _cut_at_seam(
    lon: Coordinates, lat: Coordinates, step: Coordinates
) -> tuple[Coordinates, Coordinates, int]:
    """The rim with both sides of 180 degrees as points of it, and the index of the first of them."""
    last = int(np.abs(np.diff(lon, append=lon[:1])).argmax())
    side = np.copysign(180.0, lon[last])
    share = (180 - abs(lon[last])) / abs(step[last])
    at = lat[last] + share * (lat[(last + 1) % lat.size] - lat[last])
    return np.insert(lon, last + 1, [side, -side]), np.insert(lat, last + 1, [at, at]), last + 1


def _along(pole: float, lon: Coordinates, lat: Coordinates, last: int) -> tuple[Coordinates, Coordinates]:
    """The ring that ends at the point of that index, and goes back to the next along the pole."""
    lon, lat = np.unwrap(np.roll(lon, -last - 1), period=360), np.roll(lat, -last - 1)
    return np.append(lon, [lon[-1], lon[0], lon[0]]), np.append(lat, [pole, pole, lat[0]])


def _shortest(degrees: Coordinates) -> Coordinates:
    """Within -180 (included) to 180, less whole turns."""
    return (degrees + 180) % 360 - 180
