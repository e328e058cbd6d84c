"""`regrid`: a field on another grid, by how much of each new cell each old cell covers on the ground.

The overlaps of two grids are worked out once. They are exact but for one thing: the edges of a new cell,
whose corners are transformed exactly, are taken as straight between them in the rows and columns of the old
grid. Neighbours share their edges, so that nothing is lost or counted twice.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RectBivariateSpline
from scipy.sparse import csr_array

from pipelines.cf import Variable
from pipelines.frame import Frame
from pipelines.grid import Coordinates, Grid

Field = NDArray[np.float32]  # (y, x); NaN is "not observed"
Whole = NDArray[np.int64]
Mask = NDArray[np.bool_]
Shares = tuple[Whole, Whole, Whole, Coordinates]  # flat new cell, old row, old column, share of the new cell

HALF = 0.5 - 1e-3  # the least share of a cell that must be seen; the last digits of PROJ do not decide
SLIVER = 1e-6  # share of a new cell: a smaller piece is rounding
TILE = 128  # cells a side, of the finer grid: what is worked out at once stays in the processor's cache
HELD_BYTES = 2**30  # of overlaps kept in memory; the last used are always kept
NODES = 256  # a side: between them the area of cells is interpolated, as it varies slowly
EQUATOR, FLATNESS = 6378137.0, 1 / 298.257223563  # WGS 84


@dataclass(frozen=True, eq=False)
class Tile:
    """The overlaps of a window of the new grid with the window of the old one below it."""

    new: tuple[slice, slice]  # rows and columns
    old: tuple[slice, slice]
    weights: csr_array  # (flat new cell, flat old cell) of the windows, float32: share of the new cell's area

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.weights.data.nbytes + self.weights.indices.nbytes + self.weights.indptr.nbytes


def regrid(frame: Frame, grid: Grid) -> Frame:
    """The frame on `grid`: for each new cell the mean over the observed part of its area.

    The mean of reflectivity (dBZ) is that of the linear factor Z. Of classes it is the one that covers the
    largest part. A new cell inside one old cell has its value. NaN where less than half of the cell was
    observed: its mean would tell more of places not seen than of places seen. A window of the frame's own
    grid is cut out as it is.

    Raises:
        ValueError: if no cell of `grid` lies, by half, on the frame's own grid.
    """
    if grid == frame.grid:
        return frame
    window = _window(frame.grid, grid)
    if window is not None:
        return replace(frame.window(*window), grid=grid)
    values = np.full(grid.shape, np.nan, np.float32)
    for tile in _overlaps(frame.grid, grid):
        new = _combined(frame.variable, tile.weights, frame.values[tile.old].ravel())
        values[tile.new] = new.reshape(values[tile.new].shape)
    return replace(frame, grid=grid, values=values, scale_factor=None)


def _combined(variable: Variable, weights: csr_array, old: Field) -> Coordinates:
    """The new cells' values, by the rule for the variable."""
    if variable.classes:
        return _largest(weights, old)
    if variable.units == "dBZ":
        decibel = np.log(10) / 10
        return np.log(_mean(weights, np.exp(decibel * old.astype(np.float64)))) / decibel
    return _mean(weights, old)


def _mean(weights: csr_array, old: NDArray[np.floating]) -> Coordinates:
    """The mean over what was observed, in float64: that of equal values is that value once it is float32."""
    pairs = np.empty((old.size, 2))
    observed = ~np.isnan(old)
    pairs[:, 0] = np.where(observed, old, 0)
    pairs[:, 1] = observed
    total, seen = (weights @ pairs).T
    return np.divide(total, seen, out=np.full(seen.size, np.nan), where=seen >= HALF)


def _largest(weights: csr_array, old: Field) -> Coordinates:
    """The class that covers the most; the smaller of two that cover the same."""
    classes = np.unique(old[~np.isnan(old)])
    if not classes.size:
        return np.full(weights.shape[0], np.nan)
    covered = weights @ (old[:, None] == classes).astype(np.float64)
    return np.where(covered.sum(axis=1) >= HALF, classes[covered.argmax(axis=1)], np.nan)


def _window(source: Grid, target: Grid) -> tuple[int, int, int, int] | None:
    """The first cell and size of the window of the source that the target is; None if it is none."""
    if (source.crs, source.x_step, source.y_step) != (target.crs, target.x_step, target.y_step):
        return None
    row = (target.y_first - source.y_first) / source.y_step
    column = (target.x_first - source.x_first) / source.x_step
    y0, x0 = round(row), round(column)
    aligned = max(abs(row - y0), abs(column - x0)) < 1e-6
    down, right = source.y_size - target.y_size, source.x_size - target.x_size
    return (y0, x0, *target.shape) if aligned and 0 <= y0 <= down and 0 <= x0 <= right else None


_held: OrderedDict[tuple[Grid, Grid], tuple[Tile, ...]] = OrderedDict()  # the last used is the last
_holding = Lock()


def _overlaps(source: Grid, target: Grid) -> tuple[Tile, ...]:
    """The overlaps of two grids, worked out once; the longest unused are let go of beyond `HELD_BYTES`."""
    with _holding:
        tiles = _held.pop((source, target), None) or tuple(_tiles(source, target))
        if not tiles:
            raise ValueError("the grid lies wholly outside the frames'; choose one that overlaps their area")
        _held[source, target] = tiles
        while len(_held) > 1 and sum(tile.nbytes for held in _held.values() for tile in held) > HELD_BYTES:
            _held.popitem(last=False)
    return tiles


def _tiles(source: Grid, target: Grid) -> Iterator[Tile]:
    """The overlaps of two grids, but for new cells that do not lie on the old ones by half."""
    old_in_new = float(np.median(_node_areas(target)) / np.median(_node_areas(source)))
    side = max(1, int(TILE / max(1.0, old_in_new) ** 0.5))
    areas, turn = _areas(source), 360 / source.x_step if source.is_geographic else np.inf
    for y0, x0 in product(range(0, target.y_size, side), range(0, target.x_size, side)):
        y_size, x_size = min(side, target.y_size - y0), min(side, target.x_size - x0)
        cell, row, column, share = _shares(source, turn, target.window(y0, x0, y_size, x_size))
        inside = np.bincount(cell, share, y_size * x_size)
        enough = (inside >= HALF)[cell]
        if enough.any():
            cell, row, column, share = cell[enough], row[enough], column[enough], share[enough]
            weight = share * areas[row, column]
            weight *= inside[cell] / np.bincount(cell, weight, inside.size)[cell]
            new = slice(y0, y0 + y_size), slice(x0, x0 + x_size)
            old = slice(row.min(), row.max() + 1), slice(column.min(), column.max() + 1)
            old_y_size, old_x_size = (window.stop - window.start for window in old)
            flat = (row - old[0].start) * old_x_size + column - old[1].start
            starts = np.searchsorted(cell, np.arange(inside.size + 1))
            parts = weight.astype(np.float32), flat.astype(np.int32), starts.astype(np.int32)
            yield Tile(new, old, csr_array(parts, shape=(inside.size, old_y_size * old_x_size)))


def _shares(source: Grid, turn: float, target: Grid) -> Shares:
    """Each overlap of a cell of the target with one of the source, by rising cell of the target.

    `turn` is the number of the source's columns around the earth; infinite where they are not meridians.
    """
    with np.errstate(invalid="ignore"):  # a place that a CRS cannot hold is infinite
        row, column = (place + 0.5 for place in source.cells(*_corners(target).lonlat()))  # of cell edges
        low, high = _range(row)
        near = (low < source.y_size) & (high > 0) & (high < np.inf)
    found = []
    for view in _views(column, source.x_size, turn):
        with np.errstate(invalid="ignore"):
            low, high = _range(view)
            whole = high - low < turn / 2  # not cut in two, and not around a pole
            beside = (high <= 0) | (low >= source.x_size)
        found.append(_clipped(row, view, near & whole & ~beside))
        near &= ~whole
    cell, i, j, share = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if len(found) > 1:
        order = np.argsort(cell, kind="stable")
        cell, i, j, share = cell[order], i[order], j[order] % round(turn), share[order]
    inside = np.flatnonzero((i >= 0) & (i < source.y_size) & (j >= 0) & (j < source.x_size))
    return cell[inside], i[inside], j[inside], share[inside]


def _corners(grid: Grid) -> Grid:
    """The corners of a grid's cells, as cells of a grid."""
    x_first, y_first = grid.x_first - grid.x_step / 2, grid.y_first - grid.y_step / 2
    return Grid(grid.crs, x_first, grid.x_step, grid.x_size + 1, y_first, grid.y_step, grid.y_size + 1)


def _views(column: Coordinates, size: int, turn: float) -> Iterator[Coordinates]:
    """Columns with the earth cut open opposite the grid, and for a grid around the earth elsewhere too."""
    if np.isinf(turn):
        yield column
        return
    opposite = (size - turn) / 2
    for cut in (opposite, opposite + turn / 4) if size > turn - 0.5 else (opposite,):
        with np.errstate(invalid="ignore"):
            yield cut + np.mod(column - cut, turn)


def _range(corners: Coordinates) -> tuple[Coordinates, Coordinates]:
    """The smallest and the largest of the four corners of each cell."""
    four = corners[:-1, :-1], corners[:-1, 1:], corners[1:, 1:], corners[1:, :-1]
    return np.minimum.reduce(four), np.maximum.reduce(four)


def _clipped(row: Coordinates, column: Coordinates, chosen: Mask) -> Shares:
    """The pieces that unit cells cut out of the chosen of the quadrilaterals with these corners.

    Each quadrilateral has a window of unit cells for it, one after the other in one flat array, with a
    spare column to the right. A quadrilateral that is inside out is none: it lies around the point at which
    a projection turns over, on the other side of the earth.
    """
    low_row, high_row, low_column, high_column = (b[chosen] for c in (row, column) for b in _range(c))
    first_row, first_column = np.floor(low_row).astype(np.int64), np.floor(low_column).astype(np.int64)
    width = np.floor(high_column).astype(np.int64) + 2 - first_column
    size = np.maximum(np.ceil(high_row).astype(np.int64) - first_row, 1) * width
    start = np.cumsum(size) - size
    widths, origins = np.zeros((2, *chosen.shape), np.int64)
    widths[chosen], origins[chosen] = width, start - first_row * width - first_column
    covered = _covered(row, column, np.pad(widths, 1), np.pad(origins, 1), int(size.sum()))
    quad = np.repeat(np.arange(size.size), size)
    area = np.bincount(quad, covered, size.size)
    share = covered / np.where(area > 0, area, np.inf)[quad]
    kept = np.flatnonzero(share > SLIVER)
    quad = quad[kept]
    below, right = np.divmod(kept - start[quad], width[quad])
    return np.flatnonzero(chosen)[quad], first_row[quad] + below, first_column[quad] + right, share[kept]


def _covered(row: Coordinates, column: Coordinates, widths: Whole, origins: Whole, size: int) -> Coordinates:
    """How much of the unit cells of all windows their quadrilaterals cover.

    As smooth polygons are drawn: a piece of an edge covers a part of the unit cell that it runs through, and
    its own height of all cells to the right of it; around a quadrilateral this cancels out but inside.

    Args:
        row: of the corners (y + 1, x + 1).
        column: of the corners.
        widths: of the windows, with a frame of no windows around them (y + 2, x + 2); 0: no window.
        origins: the places in the flat array where row 0 and column 0 would be.
        size: of the flat array.
    """
    changes = np.zeros(size + 1)  # from each unit cell to the next
    across = (row[:, :-1], column[:, :-1], row[:, 1:], column[:, 1:])
    upward = (row[1:], column[1:], row[:-1], column[:-1])
    for edges, sides in (
        (across, (np.s_[:-1, 1:-1], np.s_[1:, 1:-1])),  # above and below
        (upward, (np.s_[1:-1, :-1], np.s_[1:-1, 1:])),  # left and right
    ):
        used = ((widths[sides[0]] > 0) | (widths[sides[1]] > 0)) & (edges[0] != edges[2])
        edge, i, j, height, part = _pieces(*(end[used] for end in edges))
        for side, sign in zip(sides, (1.0, -1.0), strict=True):
            width = widths[side][used][edge]
            mine = np.flatnonzero(width)
            at = origins[side][used][edge[mine]] + i[mine] * width[mine] + j[mine]
            changes += np.bincount(at, sign * part[mine], changes.size)
            changes += np.bincount(at + 1, sign * (height - part)[mine], changes.size)
    return np.cumsum(changes)[:-1]


def _pieces(
    row_from: Coordinates, column_from: Coordinates, row_to: Coordinates, column_to: Coordinates
) -> tuple[Whole, Whole, Whole, Coordinates, Coordinates]:
    """Lines cut where they pass from one unit cell to the next.

    Gives the line, row and column of the unit cell, the rows that the piece runs down (below 0: up), and
    the area between it and the right end of the unit cell.
    """
    line, row, *ends = _cut(row_from, column_from, row_to, column_to)
    piece, column, left, left_row, right, right_row = _cut(ends[1], ends[0], ends[3], ends[2])
    line = line[piece]
    height = np.abs(right_row - left_row) * np.sign(row_to - row_from)[line]
    return line, row[piece], column, height, height * (column + 1 - (left + right) / 2)


def _cut(
    a_from: Coordinates, b_from: Coordinates, a_to: Coordinates, b_to: Coordinates
) -> tuple[Whole, Whole, Coordinates, Coordinates, Coordinates, Coordinates]:
    """Lines cut where `a` passes a whole number.

    Gives the line, the whole number below, and `a` and `b` at the low and at the high end in `a`.
    """
    rises = a_from <= a_to
    low, high = np.where(rises, a_from, a_to), np.where(rises, a_to, a_from)
    b_low, b_high = np.where(rises, b_from, b_to), np.where(rises, b_to, b_from)
    first = np.floor(low).astype(np.int64)
    count = np.maximum(np.ceil(high).astype(np.int64) - first, 1)
    line = np.repeat(np.arange(low.size), count)
    whole = np.arange(line.size) + (first - np.cumsum(count) + count)[line]
    share = np.divide(1.0, high - low, out=np.zeros_like(low), where=high > low)[line]
    low, high, b_low, b_high = low[line], high[line], b_low[line], b_high[line]
    start, end = np.maximum(low, whole), np.minimum(high, whole + 1)
    b_start = b_low + (b_high - b_low) * ((start - low) * share)
    b_end = b_high - (b_high - b_low) * ((high - end) * share)
    return line, whole, start, b_start, end, b_end


def _areas(grid: Grid) -> Field:
    """The area on the ground of every cell (y, x), m2."""
    nodes = (np.linspace(0, max(1, size - 1), NODES) for size in grid.shape)
    between = RectBivariateSpline(*nodes, _node_areas(grid), kx=1, ky=1)
    return between(np.arange(grid.y_size), np.arange(grid.x_size)).astype(np.float32)


def _node_areas(grid: Grid) -> Coordinates:
    """The area on the ground (m2) of cells at evenly spread nodes, from the first cell to the last."""
    y_apart, x_apart = (max(1, size - 1) / (NODES - 1) for size in grid.shape)
    corners = []
    for down, right in ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5)):
        x_first, y_first = grid.x_first + right * grid.x_step, grid.y_first + down * grid.y_step
        nodes = Grid(grid.crs, x_first, x_apart * grid.x_step, NODES, y_first, y_apart * grid.y_step, NODES)
        with np.errstate(invalid="ignore"):  # a place that the CRS cannot hold is infinite
            corners.append(_earth_centred(*nodes.lonlat()))
    first, second, third, fourth = corners
    areas = np.linalg.norm(np.cross(third - first, fourth - second), axis=-1) / 2
    on_earth = np.isfinite(areas)
    return np.where(on_earth, areas, areas[on_earth].max(initial=1.0))


def _earth_centred(lon: Coordinates, lat: Coordinates) -> Coordinates:
    """Metres from the centre of the earth (..., 3)."""
    east, north = np.radians(lon), np.radians(lat)
    eccentricity2 = FLATNESS * (2 - FLATNESS)
    normal = EQUATOR / np.sqrt(1 - eccentricity2 * np.sin(north) ** 2)
    flat, polar = normal * np.cos(north), (1 - eccentricity2) * normal * np.sin(north)
    return np.stack([flat * np.cos(east), flat * np.sin(east), polar], axis=-1)
