"""The Brier score (Brier 1950, doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from metnet.rain import EnsembleForecast, RainForecast
from metnet.scores.score import add_up


@dataclass(frozen=True)
class Brier:
    """The mean squared difference between the probability and what happened (0 or 1): 0 is best.

    The event is rain at or above the threshold. Where it is `fair`, an ensemble gets what endlessly many such
    members would get on average (Ferro 2014, doi:10.1002/qj.2270, eq. 4).
    """

    threshold: float  # mm/h
    fair: bool = False

    @property
    def name(self) -> str:
        """Such as `Brier >= 1 mm/h`."""
        return f"{'fair ' if self.fair else ''}Brier >= {self.threshold:g} mm/h"

    def sums(
        self, forecast: RainForecast, observed: Float[Tensor, "batch lead y x"]
    ) -> Float64[Tensor, "lead part"]:
        """The squared differences, and how many there are."""
        probability = forecast.probability_above(self.threshold)
        counted = ~(probability.isnan() | observed.isnan())
        squared = (probability - (observed >= self.threshold).to(probability)).square()
        if self.fair and isinstance(forecast, EnsembleForecast) and forecast.members.shape[1] > 1:
            squared = squared - probability * (1 - probability) / (forecast.members.shape[1] - 1)
        return add_up(torch.where(counted, squared, 0), counted.float())

    def value(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead"]:
        """The mean over the pixels counted."""
        return sums[:, 0] / sums[:, 1]
