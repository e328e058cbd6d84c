"""Map tiles: 256 x 256 pixels of Web Mercator (EPSG:3857), numbered z/x/y from the north-west, as PNG."""

import io
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Path, Query, Request, Response
from numpy.typing import NDArray
from PIL import Image

from pipelines.grid import Grid
from serve import geometry
from serve.caching import answers, cached
from serve.forecasts import Forecasts, Values
from serve.palette import HATCH, MISSING, PROBABILITY, RATE, Palette
from serve.problems import Problem

SIZE = 256  # pixels a side
DEEPEST = 18  # zoom; a pixel is 0.6 m on the equator

NOWHERE = -1
"""The cell index of a pixel outside the domain."""


def routes(forecasts: Forecasts) -> APIRouter:
    """The tiles of every run, quantity and lead time."""
    router = APIRouter(tags=["map"])

    @router.get(
        "/tiles/{run}/{quantity}/{lead}/{z}/{x}/{y}.png",
        response_class=Response,
        responses=answers("image/png"),
    )
    def tile(
        request: Request,
        run: Annotated[str, Path(description="a run's name, or latest")],
        quantity: Annotated[str, Path(description="a name that /runs lists")],
        lead: Annotated[str, Path(description="minutes after the init time, one of the run's")],
        z: Annotated[int, Path(ge=0, le=DEEPEST)],
        x: Annotated[int, Path(ge=0)],
        y: Annotated[int, Path(ge=0)],
        gaps: Annotated[Literal["clear", "hatched"], Query(description="cells without a forecast")] = "clear",
    ) -> Response:
        """One tile, nearest cell; transparent where it is dry, not forecast, or outside the domain."""
        if max(x, y) >= 2**z:
            raise Problem(400, f"zoom {z} has tiles 0 to {2**z - 1} each way")
        found = forecasts.run(run)
        shown = found.quantity(quantity)
        index = found.lead(lead)

        def make() -> bytes:
            field = forecasts.field(found, shown, index)
            cells = tile_cells(found.header.grid, z, x, y)
            palette = PROBABILITY if shown.kind == "probability" else RATE
            return png(pixels(field, cells, palette, gaps == "hatched"), palette)

        return cached(request, (quantity, index, z, x, y, gaps), make, "image/png", found)

    return router


def pixels(field: Values, cells: NDArray[np.int64], palette: Palette, hatched: bool) -> NDArray[np.uint8]:
    """The palette index of each pixel: that of its cell, or `MISSING` outside the domain.

    If `hatched`, diagonal lines of `HATCH` run over the domain's missing cells, and on from tile to tile.
    """
    values = field.reshape(-1)[np.maximum(cells, 0)]
    outside = cells == NOWHERE
    indices = palette.indices(np.where(outside, np.float32(np.nan), values))
    if hatched:
        down, across = np.ogrid[: indices.shape[0], : indices.shape[1]]
        indices[(indices == MISSING) & ~outside & ((down + across) % 8 == 0)] = HATCH
    return indices


def png(indices: NDArray[np.uint8], palette: Palette) -> bytes:
    """A PNG of palette indices; dry and missing keep their own index though both are transparent."""
    image = Image.fromarray(indices, "L")
    image.putpalette(palette.rgb)  # makes it mode P, index for index
    file = io.BytesIO()
    image.save(file, "PNG", transparency=palette.alpha, compress_level=3)
    return file.getvalue()


@lru_cache(maxsize=512)  # half a megabyte each
def tile_cells(grid: Grid, z: int, x: int, y: int) -> NDArray[np.int64]:
    """The flat index of the grid's cell below each pixel's centre, (y, x); `NOWHERE` outside the grid."""
    whole = SIZE * 2**z
    across = (x * SIZE + np.arange(SIZE) + 0.5) / whole
    down = (y * SIZE + np.arange(SIZE) + 0.5) / whole
    lon = 360 * across - 180
    lat = np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * down))))
    row, column = geometry.cells(grid, *np.meshgrid(lon, lat))
    inside = (row >= -0.5) & (row < grid.y_size - 0.5) & (column >= -0.5) & (column < grid.x_size - 0.5)
    row, column = np.where(inside, row, 0), np.where(inside, column, 0)
    flat = np.floor(row + 0.5) * grid.x_size + np.floor(column + 0.5)
    return np.where(inside, flat, NOWHERE).astype(np.int64)
