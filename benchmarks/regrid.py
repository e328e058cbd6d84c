"""A radar field onto another grid, once the overlaps are known, against GDAL's warp by area mean.

GDAL works out where the cells lie for every frame anew. Memory is torch's, which neither arm uses.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import torch
from rasterio.transform import Affine
from rasterio.warp import Resampling, reproject

from benchmarks.harness import Row, Work
from pipelines.cf import RAINFALL_RATE
from pipelines.frame import Frame
from pipelines.grid import Grid, from_path
from pipelines.regrid import regrid

CONUS = Path(__file__).parent.parent / "configs/grid/conus_1km.yaml"
MRMS = Grid("EPSG:4326", -129.995, 0.01, 7000, 54.995, -0.01, 3500)
LAEA = Grid("+proj=laea +lat_0=55 +lon_0=10 +ellps=WGS84", -1949e3, 2000.0, 1900, 2099e3, -2000.0, 2200)
DEGREES = Grid("EPSG:4326", -9.975, 0.05, 800, 69.975, -0.05, 700)


def rain(grid: Grid) -> Frame:
    """Smooth showers on a tenth of a field (mm/h), and a third that no radar sees."""
    noise = np.random.default_rng(0).normal(size=(grid.y_size // 8, grid.x_size // 8)).astype(np.float32)
    smooth = cv2.resize(cv2.GaussianBlur(noise, (0, 0), 3.0), (grid.x_size, grid.y_size))
    smooth /= smooth.std()
    values = np.where(smooth > 1.3, np.exp(smooth), 0).astype(np.float32)
    values[:, : grid.x_size // 3] = np.nan
    time = datetime(2020, 6, 1, tzinfo=UTC)
    return Frame(RAINFALL_RATE, time, timedelta(minutes=2), grid, values, "benchmark", "00" * 31 + "01")


def affine(grid: Grid) -> Affine:
    """A grid as GDAL says it: by the corner of its first cell."""
    corner = grid.x_first - grid.x_step / 2, grid.y_first - grid.y_step / 2
    return Affine(grid.x_step, 0, corner[0], 0, grid.y_step, corner[1])


def warping(source: Grid, target: Callable[[], Grid]) -> Callable[[], tuple[Work, Work]]:
    """Both arms on the same frame; ours has met the grids before."""

    def make() -> tuple[Work, Work]:
        frame, grid = rain(source), target()
        regrid(frame, grid)

        def ours() -> tuple[torch.Tensor, ...]:
            return (torch.from_numpy(np.nan_to_num(regrid(frame, grid).values)),)

        def gdal() -> tuple[torch.Tensor, ...]:
            values = np.full(grid.shape, np.nan, np.float32)
            reproject(
                frame.values,
                values,
                src_transform=affine(source),
                src_crs=source.crs,
                src_nodata=np.nan,
                dst_transform=affine(grid),
                dst_crs=grid.crs,
                dst_nodata=np.nan,
                resampling=Resampling.average,
            )
            return (torch.from_numpy(np.nan_to_num(values)),)

        return ours, gdal

    return make


ROWS = (
    Row(
        "regrid_mrms",
        "3500 x 7000 cells of 0.01 degrees to 2950 x 4700 of 1 km",
        "GDAL",
        warping(MRMS, lambda: from_path(str(CONUS))),
        goal=2.0,
        tolerance=0.1,
        rounds=3,
    ),
    Row(
        "regrid_opera",
        "2200 x 1900 cells of 2 km to 700 x 800 of 0.05 degrees",
        "GDAL",
        warping(LAEA, lambda: DEGREES),
        goal=2.0,
        tolerance=0.1,
    ),
)
