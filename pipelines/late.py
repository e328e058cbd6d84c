"""`newest_past`: the past where sources are late, each by itself, with the ages its frames then have."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from metnet.batch import Batch
from pipelines.beside import Beside, Sides
from pipelines.observations import Observations
from pipelines.past import IN_TIME, RADAR_ALONE, cut


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
        stalest: minutes that the newest may be old; every other source, too, may be as late.
        beside: what the forecaster sees beside the radar.

    Returns:
        None if no frame that is new enough holds an observation.
    """
    written = {time for time, seen in zip(cube.times, cube.observed, strict=True) if seen}
    age, oldest = timedelta(0), timedelta(minutes=stalest)
    while age <= oldest:
        if init_time - age in written:
            batch = past_at(cube, init_time, frames, lead_times, age, beside, oldest)
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
    stalest: timedelta = IN_TIME,
) -> Batch:
    """One sample of the whole grid as it is known at `init_time`, when the newest radar frame has this age.

    Every other source is there as it came, or late by up to `stalest`.
    """
    window = (0, 0, *cube.grid.shape)
    return cut(Sides(cube, beside), init_time, frames, lead_times, window, age, stalest)
