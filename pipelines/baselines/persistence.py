"""Persistence: the newest frame stays as it is (Eulerian persistence)."""

from dataclasses import dataclass

from metnet.batch import Batch
from metnet.rain import EnsembleForecast


@dataclass(frozen=True)
class Persistence:
    """One member: the newest frame at every lead time. NaN stays NaN."""

    @property
    def frames(self) -> int:
        """How many past frames it wants to see."""
        return 1

    def __call__(self, batch: Batch) -> EnsembleForecast:
        """The forecast at `batch.lead_time`, as a single member."""
        newest = batch.radar[:, -1, None, None]
        return EnsembleForecast(newest.repeat(1, 1, len(batch.lead_time), 1, 1))
