"""`past`: what a forecaster may know at an init time, read from a cube."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import torch

from metnet.batch import Batch
from pipelines.beside import Beside, Sides
from pipelines.observations import Observations

RADAR_ALONE = Beside()
IN_TIME = timedelta(0)


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
    age: timedelta = IN_TIME,
    stalest: timedelta = IN_TIME,
) -> Batch:
    """The same of a window of a cube's grid: (y0, x0, ny, nx) in cells.

    `age` is that of the newest radar frame; every other source may be late by up to `stalest`, and is then
    read up to its newest image.
    """
    cube = sides.cube
    back = [age + step * cube.cadence for step in reversed(range(frames))]
    radar = cube.block(init_time - back[0], frames, window)
    return Batch(
        radar=torch.from_numpy(radar)[None],
        age=torch.tensor([[time / timedelta(minutes=1) for time in back]], dtype=torch.float32),
        init_time=torch.tensor([round(init_time.timestamp())]),
        lead_time=torch.tensor(lead_times, dtype=torch.float32),
        cell_size=torch.tensor([cube.grid.cell_size], dtype=torch.float32),
        **sides.read(init_time, frames, window, age, stalest),
    )
