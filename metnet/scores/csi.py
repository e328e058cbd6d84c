"""The critical success index, or threat score (Schaefer 1990, Weather and Forecasting 5, 570-575)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from metnet.decision import own_cut
from metnet.rain import RainForecast
from metnet.scores.score import add_up


@dataclass(frozen=True)
class Csi:
    """Of the pixels with rain, seen or forecast, the share where both say so: 1 is best, 0 worst.

    Hits / (hits + misses + false alarms) of rain at or above the threshold. A probability of at least `cut`
    counts as a forecast of rain. Without a cut, each field of a forecast chooses its own: the one for which
    its probabilities expect the highest CSI, whatever then happens; a forecast of one number keeps to it.
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
        """Hits, misses and false alarms.

        They add up over samples and lead times; without a cut, a field must come whole: it has one.
        """
        probability = forecast.probability_above(self.threshold)
        counted = ~(probability.isnan() | observed.isnan())
        said = counted & (probability >= self._cut(probability.masked_fill(~counted, torch.nan)))
        seen = counted & (observed >= self.threshold)
        return add_up((said & seen).float(), (seen & ~said).float(), (said & ~seen).float())

    def value(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead"]:
        """Hits by all that was not a correct "no"; NaN where it rained in neither."""
        return sums[:, 0] / sums.sum(dim=1)

    def _cut(self, probability: Float[Tensor, "batch lead y x"]) -> Tensor:
        """From which probability on rain counts as forecast, as (batch, lead, 1, 1) or for all."""
        if self.cut is None:
            return own_cut(probability)[:, :, None, None]
        return torch.tensor(self.cut).to(probability)
