"""The critical success index, or threat score (Schaefer 1990, Weather and Forecasting 5, 570-575)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from metnet.decision import CUTS, own_cut
from metnet.rain import RainForecast
from metnet.scores.score import add_up_by_class


@dataclass(frozen=True)
class Csi:
    """Of the pixels with rain, seen or forecast, the share where both say so: 1 is best, 0 worst.

    Hits / (hits + misses + false alarms) of rain at or above the threshold, each summed over all runs. A
    probability of at least `cut` counts as a forecast of rain. Without a cut, each forecaster has one cut a
    lead time for all runs that are summed: the one for which its probabilities expect the highest CSI over
    all of them, whatever then happens; a forecast of one number keeps to it.
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
        """By class of probability, from cut to cut: the pixels, then the probabilities, then the events.

        Which classes say yes is told by all that was summed, not by the parts.
        """
        probability = forecast.probability_above(self.threshold)
        counted = ~(probability.isnan() | observed.isnan())
        cuts = torch.tensor(self._cuts).to(probability)
        class_ = torch.bucketize(probability.contiguous(), cuts, right=True)
        said, seen = probability.nan_to_num(nan=0.0), observed >= self.threshold
        return add_up_by_class(class_, len(cuts) + 1, counted, said, seen)

    def value(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead"]:
        """Hits by all that was not a correct "no"; NaN where it rained in neither."""
        decided = self.decided(sums)
        return decided[:, 0] / decided.sum(dim=1)

    def decided(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead 3"]:
        """Hits, misses and false alarms."""
        count, probability, events = torch.split(sums, len(self._cuts) + 1, dim=1)
        yes = torch.arange(count.shape[1], device=count.device) >= own_cut(count, probability)[:, None]
        hits, said = (torch.where(yes, part, 0).sum(dim=1) for part in (events, count))
        return torch.stack([hits, events.sum(dim=1) - hits, said - hits], dim=1)

    @property
    def _cuts(self) -> tuple[float, ...]:
        """Where the cut may lie."""
        return CUTS if self.cut is None else (self.cut,)
