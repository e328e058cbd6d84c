"""`Batch`: what a forecaster is told about the past, and what then happened."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples on one grid size, in physical units; NaN is "not observed", 0 is "dry".

    The newest frame of `radar` is the one at `init_time` (age 0). Row 0 is north.
    """

    radar: Float[Tensor, "batch time y x"]  # mm/h, oldest first
    age: Float[Tensor, "batch time"]  # minutes before init_time, falling to 0
    init_time: Int[Tensor, "batch"]  # seconds since 1970-01-01 UTC
    lead_time: Float[Tensor, "lead"]  # minutes after init_time, rising
    cell_size: Float[Tensor, "batch"]  # metres, side of a cell
    motion: Float[Tensor, "batch 2 y x"] | None = None  # cells a minute, to the east and to the south
    target: Float[Tensor, "batch lead y x"] | None = None  # mm/h at init_time + lead_time

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device (Lightning calls this)."""
        tensors = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)
