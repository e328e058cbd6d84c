"""`Score`: the contract of every verification score."""

from typing import Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from metnet.rain import RainForecast


class Score(Protocol):
    """A score made of additive sums, so that any split of the data gives the same value.

    An observation that is NaN, or a pixel without a forecast, contributes nothing.
    """

    @property
    def name(self) -> str:
        """What the score is called in a report, with its threshold or scale and its unit."""
        ...

    def sums(
        self, forecast: RainForecast, observed: Float[Tensor, "batch lead y x"]
    ) -> Float64[Tensor, "lead part"]:
        """What is to be added up over batches, tiles and processes."""
        ...

    def value(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead"]:
        """The score by lead time; NaN where nothing was counted."""
        ...


def add_up(*parts: Float[Tensor, "batch lead y x"]) -> Float64[Tensor, "lead part"]:
    """Each part's sum over all pixels and samples, by lead time."""
    return torch.stack([part.sum(dim=(0, 2, 3), dtype=torch.float64) for part in parts], dim=-1)
