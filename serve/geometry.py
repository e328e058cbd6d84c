"""Map projection on one thread: PROJ takes 0.1 s to prepare a CRS, in every thread that uses it."""

from concurrent.futures import ThreadPoolExecutor

from numpy.typing import ArrayLike

from pipelines.grid import Coordinates, Grid

_thread = ThreadPoolExecutor(1, thread_name_prefix="geometry")


def cells(grid: Grid, lon: ArrayLike, lat: ArrayLike) -> tuple[Coordinates, Coordinates]:
    """As `Grid.cells`: fractional row and column of each place (degrees)."""
    return _thread.submit(grid.cells, lon, lat).result()


def lonlat(grid: Grid) -> tuple[Coordinates, Coordinates]:
    """As `Grid.lonlat`: degrees of every cell centre."""
    return _thread.submit(grid.lonlat).result()


def lonlat_of(grid: Grid, x: ArrayLike, y: ArrayLike) -> tuple[Coordinates, Coordinates]:
    """As `Grid.lonlat_of`: degrees of any places in its CRS."""
    return _thread.submit(grid.lonlat_of, x, y).result()
