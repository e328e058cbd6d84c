"""`Forecaster`: the one contract between forecasting and whatever makes a forecast."""

from typing import Protocol

from metnet.batch import Batch
from metnet.rain import RainForecast


class Forecaster(Protocol):
    """Any callable `Batch -> RainForecast`: MetNet, persistence, extrapolation, STEPS alike."""

    @property
    def frames(self) -> int:
        """How many past frames, the one at init_time included, it wants to see."""
        ...

    def __call__(self, batch: Batch) -> RainForecast:
        """The forecast at `batch.lead_time` on the grid of `batch.radar`."""
        ...
