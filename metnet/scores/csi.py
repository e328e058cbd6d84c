"""The critical success index, or threat score (Schaefer 1990, Weather and Forecasting 5, 570-575)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from metnet.rain import RainForecast
from metnet.scores.score import Decided, add_up

USUAL = 0.5  # the probability that counts as a forecast of rain


@dataclass(frozen=True)
class Csi:
    """Of the pixels with rain, seen or forecast, the share where both say so: 1 is best, 0 worst.

    Hits / (hits + misses + false alarms) of rain at or above the threshold. A probability of at least `cut`
    counts as a forecast of rain; without, that of the forecast's own choice by lead time, or 1/2.
    """

    threshold: float  # mm/h
    cut: float | None = None

    @property
    def name(self) -> str:
        """Such as `CSI >= 1 mm/h`."""
        return f"CSI >= {self.threshold:g} mm/h"

    def sums(
        self, forecast: RainForecast, observed: Float[Tensor, "batch lead y x"]
    ) -> Float64[Tensor, "lead part"]:
        """Hits, misses and false alarms."""
        probability = forecast.probability_above(self.threshold)
        counted = ~(probability.isnan() | observed.isnan())
        said = counted & (probability >= self._cuts(forecast, probability))
        seen = counted & (observed >= self.threshold)
        return add_up((said & seen).float(), (seen & ~said).float(), (said & ~seen).float())

    def value(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead"]:
        """Hits by all that was not a correct "no"; NaN where it rained in neither."""
        return sums[:, 0] / sums.sum(dim=1)

    def _cuts(self, forecast: RainForecast, probability: Float[Tensor, "batch lead y x"]) -> Tensor:
        """From which probability on rain counts as forecast (lead 1 1)."""
        own = forecast.cut(self.threshold) if self.cut is None and isinstance(forecast, Decided) else None
        usual = USUAL if self.cut is None else self.cut
        return torch.tensor(own or [usual] * probability.shape[1]).to(probability)[:, None, None]
