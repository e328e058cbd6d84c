"""`past`: what a forecaster may know at an init time, read from a cube."""

from collections.abc import Sequence
from datetime import datetime

import torch

from metnet.batch import Batch
from pipelines.beside import Beside, Sides
from pipelines.observations import Observations

RADAR_ALONE = Beside()


def past(
    cube: Observations,
    init_time: datetime,
    frames: int,
    lead_times: Sequence[float],
    beside: Beside = RADAR_ALONE,
) -> Batch:
    """One sample of the whole grid: the `frames` newest frames up to `init_time`, and no target.

    Frames that are missing, or before the cube begins, are NaN. `lead_times` are in minutes; `beside` says
    what the forecaster sees besides.
    """
    return cut(Sides(cube, beside), init_time, frames, lead_times, (0, 0, *cube.grid.shape))


def cut(
    sides: Sides,
    init_time: datetime,
    frames: int,
    lead_times: Sequence[float],
    window: tuple[int, int, int, int],
) -> Batch:
    """The same of a window of a cube's grid: (y0, x0, ny, nx) in cells."""
    cube = sides.cube
    minutes = cube.cadence.total_seconds() / 60
    radar = cube.block(init_time - (frames - 1) * cube.cadence, frames, window)
    return Batch(
        radar=torch.from_numpy(radar)[None],
        age=minutes * torch.arange(frames - 1, -1, -1, dtype=torch.float32)[None],
        init_time=torch.tensor([round(init_time.timestamp())]),
        lead_time=torch.tensor(lead_times, dtype=torch.float32),
        cell_size=torch.tensor([cube.grid.cell_size], dtype=torch.float32),
        **sides.read(init_time, frames, window),
    )
