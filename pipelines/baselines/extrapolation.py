"""Extrapolation: the newest frame carried along the motion of the last ones (Lagrangian persistence)."""

from dataclasses import dataclass

import numpy as np
import torch

from metnet.advection import advect
from metnet.batch import Batch
from metnet.rain import EnsembleForecast
from pipelines.motion import motion


@dataclass(frozen=True)
class Extrapolation:
    """One member: optical flow between the past frames, then semi-Lagrangian advection.

    Where rain would come from outside the grid or from unobserved cells there is no forecast (NaN). A
    missing newest frame is replaced by the newest that is there, carried further.
    """

    frames: int = 4  # how many past frames tell the motion

    def __post_init__(self) -> None:
        """Refuses fewer frames than motion needs."""
        if self.frames < 2:
            raise ValueError(f"frames={self.frames}: motion needs at least 2 frames")

    def __call__(self, batch: Batch) -> EnsembleForecast:
        """The forecast at `batch.lead_time`, as a single member."""
        members = [self._carry(batch, sample) for sample in range(len(batch.radar))]
        return EnsembleForecast(torch.stack(members))

    def _carry(self, batch: Batch, sample: int) -> torch.Tensor:
        """The member (1, lead, y, x) of one sample."""
        radar, age = batch.radar[sample], batch.age[sample]
        seen = (~radar.isnan()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        newest = seen[-1] if seen else -1
        flow = motion(np.asarray(radar.detach().cpu()), age.tolist())
        moving = torch.from_numpy(flow).to(radar)
        return advect(radar[newest][None], moving[None], batch.lead_time + age[newest])
