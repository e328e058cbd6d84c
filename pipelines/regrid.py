"""`regrid`: a field on another grid, by the mean over the area of each new cell."""

from dataclasses import replace
from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from pipelines.frame import Frame
from pipelines.grid import Coordinates, Grid

Places = NDArray[np.int32]  # (sample, y, x): the flat source cell of each sample; the one past the end: none


def regrid(frame: Frame, grid: Grid) -> Frame:
    """The frame on `grid`: the mean over the observed part of each cell.

    NaN where less than half of the cell was observed.

    Raises:
        ValueError: if no part of `grid` lies on the frame's own grid.
    """
    if grid == frame.grid:
        return frame
    places = _places(frame.grid, grid)
    values = np.append(frame.values, np.float32(np.nan))
    observed = ~np.isnan(values)
    filled = np.where(observed, values, np.float32(0))
    rain = np.zeros(grid.shape)  # float64: the mean of equal rates is that rate, to the last bit
    seen = np.zeros(grid.shape, np.float32)
    for place in places:
        rain += filled[place]
        seen += observed[place]
    mean = np.where(2 * seen >= len(places), rain / np.maximum(seen, 1), np.nan)
    return replace(frame, grid=grid, values=mean.astype(np.float32))


@lru_cache(maxsize=1)  # grids stay the same from frame to frame
def _places(source: Grid, target: Grid) -> Places:
    """The source cells under evenly spread samples of every target cell.

    The samples lie at least twice as close as the source's cells. The corners of the target cells are
    transformed exactly; within one cell the transformation is taken as linear.
    """
    side = max(3, ceil(2 * target.cell_size / source.cell_size - 0.01))  # even spread over whole multiples
    outside = source.x_size * source.y_size
    places = np.empty((side * side, *target.shape), np.int32)
    rows_at_once = max(1, 2**18 // target.x_size)
    for y0 in range(0, target.y_size, rows_at_once):
        part = target.window(y0, 0, min(rows_at_once, target.y_size - y0), target.x_size)
        corners = _corners(source, part)
        for sample in range(side * side):
            down, right = (np.array(divmod(sample, side)) + 0.5) / side
            places[sample, y0 : y0 + part.y_size] = _flat(source, *_within(corners, down, right))
    if (places == outside).all():
        raise ValueError("the grid lies wholly outside the frames'; choose one that overlaps their area")
    return places


def _corners(source: Grid, target: Grid) -> Coordinates:
    """Fractional source row and column of the corners of each cell: (2, 4, y, x), in reading order."""
    x_first, y_first = target.x_first - target.x_step / 2, target.y_first - target.y_step / 2
    x_size, y_size = target.x_size + 1, target.y_size + 1
    edges = Grid(target.crs, x_first, target.x_step, x_size, y_first, target.y_step, y_size)
    lattice = np.stack(source.cells(*edges.lonlat()))
    upper, lower = lattice[:, :-1], lattice[:, 1:]
    corners = np.stack([upper[..., :-1], upper[..., 1:], lower[..., :-1], lower[..., 1:]], axis=1)
    if source.is_geographic:  # the four corners of a cell lie on one turn around the earth
        turn = 360 / source.x_step
        with np.errstate(invalid="ignore"):  # a place that the CRS cannot hold is infinite
            corners[1] -= turn * np.round((corners[1] - corners[1, 0]) / turn)
    return corners


def _within(corners: Coordinates, down: float, right: float) -> Coordinates:
    """Fractional source row and column at a share of each cell's height and width: (2, y, x)."""
    weights = np.array([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right])
    with np.errstate(invalid="ignore"):
        return np.asarray(np.einsum("c,acyx->ayx", weights, corners))


def _flat(source: Grid, row: Coordinates, column: Coordinates) -> Places:
    """The flat index of the cell at a fractional row and column; one past the last where there is none."""
    if source.is_geographic:
        with np.errstate(invalid="ignore"):
            column = np.mod(column + 0.5, 360 / source.x_step) - 0.5
    inside = (row >= -0.5) & (row < source.y_size - 0.5) & (column >= -0.5) & (column < source.x_size - 0.5)
    row, column = np.where(inside, row, 0), np.where(inside, column, 0)
    flat = np.floor(row + 0.5) * source.x_size + np.floor(column + 0.5)
    return np.where(inside, flat, source.x_size * source.y_size).astype(np.int32)
