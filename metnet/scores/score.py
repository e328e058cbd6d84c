"""`Score`: the contract of every verification score."""

from typing import Protocol

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
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


def add_up_by_class(
    class_: Int64[Tensor, "batch lead y x"],
    classes: int,
    counted: Bool[Tensor, "batch lead y x"],
    *weights: Shaped[Tensor, "batch lead y x"],
) -> Float64[Tensor, "lead part"]:
    """By lead time, for each class the pixels counted; then each weight's sums over them, likewise."""
    leads, places = class_.shape[1], classes + 1  # the last holds what does not count
    lead = torch.arange(leads, device=class_.device)[:, None, None]
    place = (class_.masked_fill(~counted, classes) + places * lead).flatten()
    parts = [
        torch.bincount(place, weight.double().flatten(), minlength=leads * places).view(leads, places)[:, :-1]
        for weight in (counted, *weights)
    ]
    return torch.cat(parts, dim=1).double()  # with nothing to count, bincount says so in whole numbers
