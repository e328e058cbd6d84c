"""`Batch`: what a forecaster is told about the past, and what then happened."""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples on one grid size, in physical units; NaN is "not observed", 0 is "dry".

    The newest frame of `radar` is the one at `init_time` (age 0), or an older one where a source is late. Row
    0 is north. What lies behind `target` may be left out; a network says what it misses.
    """

    radar: Float[Tensor, "batch time y x"]  # mm/h, oldest first
    age: Float[Tensor, "batch time"]  # minutes before init_time, falling, not below 0
    init_time: Int[Tensor, "batch"]  # seconds since 1970-01-01 UTC
    lead_time: Float[Tensor, "lead"]  # minutes after init_time, rising
    cell_size: Float[Tensor, "batch"]  # metres, side of a cell
    # cells a minute, to the east and to the south; and, where it is told, how much that is in doubt
    motion: Float[Tensor, "batch component y x"] | None = None
    target: Float[Tensor, "batch lead y x"] | None = None  # mm/h at init_time + lead_time
    static: Float[Tensor, "batch field y x"] | None = None  # elevation (m), share of land, ...
    # satellite channels (K, reflectance, ...) and other radars (mm/h), each a band, oldest image first; one
    # with a cadence of its own may have fewer images than another: its first ones are then not observed
    satellite: Float[Tensor, "batch image band y x"] | None = None
    # minutes before init_time, falling, not below 0: of one source that has all bands, or of each band
    satellite_age: Float[Tensor, "batch image source"] | None = None
    place: Float[Tensor, "batch 2 y x"] | None = None  # longitude and latitude of each cell, degrees
    # mm/h at the times of `radar`, centred on the grid: means over as many cells as the network says
    surroundings: Float[Tensor, "batch time wide_y wide_x"] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device (Lightning calls this)."""
        tensors = {
            field.name: value.to(device, non_blocking=value.is_pinned())
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)

    def pin_memory(self) -> "Batch":
        """The same in memory that a GPU copies from while it computes (torch's loader calls this)."""
        pinned = {
            field.name: value.pin_memory()
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **pinned)

    def filled_up(self, multiple: int) -> "Batch":
        """The same without target, on a grid made up to multiples of this by cells that are not observed.

        Cells are added in the south and in the east; `surroundings` stay where they are.
        """
        down, right = (-size % multiple for size in self.radar.shape[2:])

        def wider(field: Tensor | None) -> Tensor | None:
            return None if field is None else F.pad(field, (0, right, 0, down), value=torch.nan)

        motion = self.motion
        if motion is not None:
            motion = F.pad(motion, (0, right, 0, down), mode="replicate")
        return replace(
            self,
            radar=F.pad(self.radar, (0, right, 0, down), value=torch.nan),
            motion=motion,
            target=None,
            static=wider(self.static),
            satellite=wider(self.satellite),
            place=wider(self.place),
        )
