"""`Steps`: from which rate on a sensor tells a class of rain, as the values that it tells show.

Radars tell rain in steps: KNMI's accumulations of 5 minutes in 0.12 mm/h, the Bureau of Meteorology's of 6
in 0.5 mm/h, MeteoSwiss' in half decibels of reflectivity. What is told as 0.5 mm/h is rain from 0.25 to
0.75, if the sensor rounds; so "at least 1 mm/h" is 0.75 mm/h to it, and 1 mm/h to one whose values are fine.
Who tells smooth distributions of rain must know what is asked of them (docs/experiments.md, "Sensors tell
rain in steps").
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from metnet.rain import RainBins

EVERY = 2  # of so many rows and columns one is looked at
SHARED = 5  # cells have a value, or more: then it may be a step
MANY = 20  # so many are half believed, where none lies between two of them
ALIKE = 1e-4  # of a value: as much apart they are the same
FADES = 10.0  # minutes in which what tells dry from the least value loses its hold, exponentially


class Steps(NamedTuple):
    """The rates (mm/h) that a sensor tells as each class or a higher one, rising."""

    near: Float[Tensor, "batch edge"]  # of what was seen, and is carried: half way between two values
    far: Float[Tensor, "batch edge"]  # of rain to come: below its least value nobody knows what it sees

    @classmethod
    @torch.no_grad()
    def of(cls, frames: Float[Tensor, "batch frame Y X"], bins: RainBins) -> "Steps":
        """As the values of frames have it: the edge of a class itself, where none has reached it or all have.

        The more so, the more cells have the very values between which it lies, and the fewer lie between.

        Args:
            frames: mm/h, as the sensor told them; NaN = not observed.
            bins: the classes.
        """
        few = frames[..., ::EVERY, ::EVERY].flatten(1)
        every = few.where(few.isfinite(), torch.inf).sort(dim=1).values
        told = _shared(every)
        edges = torch.tensor(bins.edges).to(told).expand(len(told), -1)
        first = torch.searchsorted(told, edges * (1 - 1e-6))
        above = told.gather(1, first.clamp(max=told.shape[1] - 1))
        below = told.gather(1, (first - 1).clamp(min=0))
        from_above, to_below = above * (1 - ALIKE), below * (1 + ALIKE)
        ends = torch.searchsorted(told, above * (1 + ALIKE), right=True)
        starts = torch.searchsorted(told, below * (1 - ALIKE))
        many = torch.minimum(ends - first, first - starts)  # 0 where there is none above or below
        others = torch.searchsorted(every, from_above) - torch.searchsorted(every, to_below, right=True)
        between = above.isfinite()
        near = ((below + above) / 2).where(between, edges)
        far = torch.where(below == 0, edges, near)
        believed = (many / (many + others.clamp(min=0) + MANY)).where(between, 0.0).to(told)
        return cls(torch.lerp(edges, near, believed), torch.lerp(edges, far, believed))

    def after(self, minutes: Float[Tensor, "batch lead"]) -> Float[Tensor, "sample edge"]:
        """Those of rain so many minutes ahead."""
        held = torch.exp(-minutes / FADES)[:, :, None]
        return torch.lerp(self.far[:, None], self.near[:, None], held).flatten(0, 1)


def _shared(told: Float[Tensor, "batch value"]) -> Float[Tensor, "batch value"]:
    """Of values that rise those that `SHARED` cells or more have; infinite in place of the others."""
    if told.shape[1] < SHARED:
        return torch.full_like(told, torch.inf)
    alike = told[:, SHARED - 1 :] <= told[:, : 1 - SHARED] * (1 + ALIKE)
    begun = F.pad(alike.to(told.dtype), (SHARED - 1, SHARED - 1))
    within = F.max_pool1d(begun, SHARED, stride=1) > 0
    return told.where(within, torch.inf).sort(dim=1).values
