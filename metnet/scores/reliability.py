"""Reliability: how often what was forecast happened (Murphy & Winkler 1977, doi:10.2307/2346866)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from metnet.rain import RainForecast


@dataclass(frozen=True)
class Curve:
    """A reliability diagram by lead time and bin of probability; NaN where a bin is empty."""

    probability: Float64[Tensor, "lead bin"]  # mean forecast probability
    frequency: Float64[Tensor, "lead bin"]  # how often the event then happened
    count: Float64[Tensor, "lead bin"]  # pixels


@dataclass(frozen=True)
class Reliability:
    """How far probabilities lie from the frequencies with which rain then came, on average: 0 is best.

    The expected calibration error over `bins` equal bins of probability, for rain at or above the
    threshold: the mean of |mean probability - observed frequency|, each bin weighted by its pixels.
    """

    threshold: float  # mm/h
    bins: int = 10

    @property
    def name(self) -> str:
        """Such as `Calibration error >= 1 mm/h`."""
        return f"Calibration error >= {self.threshold:g} mm/h"

    def sums(
        self, forecast: RainForecast, observed: Float[Tensor, "batch lead y x"]
    ) -> Float64[Tensor, "lead part"]:
        """For each bin the pixels, then for each the probabilities, then for each the events."""
        probability = forecast.probability_above(self.threshold)
        counted = ~(probability.isnan() | observed.isnan())
        leads, bins = probability.shape[1], self.bins + 1  # the last holds what does not count
        said = probability.nan_to_num(nan=0.0)
        bin_ = (said * self.bins).long().clamp_(0, self.bins - 1).masked_fill_(~counted, self.bins)
        place = (bin_ + bins * torch.arange(leads, device=bin_.device)[:, None, None]).flatten()
        seen = observed >= self.threshold
        parts = [
            torch.bincount(place, weight.double().flatten(), minlength=leads * bins).view(leads, bins)[:, :-1]
            for weight in (counted, said, seen)
        ]
        return torch.cat(parts, dim=1).double()  # with nothing to count, bincount says so in whole numbers

    def value(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead"]:
        """The expected calibration error."""
        count, probability, events = torch.split(sums, self.bins, dim=1)
        distance: Tensor = (probability - events).abs().sum(dim=1)
        return distance / count.sum(dim=1)

    def curve(self, sums: Float64[Tensor, "lead part"]) -> Curve:
        """The reliability diagram that the sums hold."""
        count, probability, events = torch.split(sums, self.bins, dim=1)
        return Curve(probability / count, events / count, count)
