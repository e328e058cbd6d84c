"""The bias: the mean error of the expected rain rate (Wilks 2019, Statistical Methods, section 9.3.1)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from metnet.rain import RainForecast
from metnet.scores.score import add_up


@dataclass(frozen=True)
class Bias:
    """The mean forecast rate less the mean observed rate, in mm/h: 0 is best, above 0 is too wet."""

    @property
    def name(self) -> str:
        """With its unit."""
        return "Bias mm/h"

    def sums(
        self, forecast: RainForecast, observed: Float[Tensor, "batch lead y x"]
    ) -> Float64[Tensor, "lead part"]:
        """Forecast and observed rates (mm/h), and how many there are."""
        mean = forecast.mean()
        counted = ~(mean.isnan() | observed.isnan())
        return add_up(torch.where(counted, mean, 0), torch.where(counted, observed, 0), counted.float())

    def value(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead"]:
        """The difference of the means (mm/h)."""
        return (sums[:, 0] - sums[:, 1]) / sums[:, 2]
