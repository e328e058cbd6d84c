"""`newest_past`: the past of a source that is late, with the ages its frames then have."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import torch

from metnet.batch import Batch
from pipelines.beside import Beside
from pipelines.observations import Observations
from pipelines.past import RADAR_ALONE, past


def newest_past(
    cube: Observations,
    init_time: datetime,
    frames: int,
    lead_times: Sequence[float],
    stalest: float,
    beside: Beside = RADAR_ALONE,
) -> Batch | None:
    """One sample of the whole grid: the `frames` up to the newest that holds anything, with their true ages.

    Args:
        cube: where the frames are.
        init_time: on the time axis of the cube, or of its continuation.
        frames: how many, those that are missing in between included, which are NaN.
        lead_times: minutes after `init_time`.
        stalest: minutes that the newest may be old.
        beside: what the forecaster sees beside the radar.

    Returns:
        None if no frame that is new enough holds an observation.
    """
    written = {time for time, seen in zip(cube.times, cube.observed, strict=True) if seen}
    age = timedelta(0)
    while age <= timedelta(minutes=stalest):
        if init_time - age in written:
            batch = past_at(cube, init_time, frames, lead_times, age, beside)
            if not batch.radar[:, -1].isnan().all():
                return batch
        age += cube.cadence
    return None


def past_at(
    cube: Observations,
    init_time: datetime,
    frames: int,
    lead_times: Sequence[float],
    age: timedelta,
    beside: Beside = RADAR_ALONE,
) -> Batch:
    """One sample of the whole grid as it is known at `init_time`, when the newest frame has this age.

    Of the satellite, too, it has no newer image.
    """
    batch, minutes = past(cube, init_time - age, frames, lead_times, beside), age.total_seconds() / 60
    images = batch.satellite_age
    return replace(
        batch,
        age=batch.age + minutes,
        init_time=torch.tensor([round(init_time.timestamp())]),
        satellite_age=None if images is None else images + minutes,
    )
