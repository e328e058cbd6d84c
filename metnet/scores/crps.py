"""The continuous ranked probability score (Gneiting & Raftery 2007, doi:10.1198/016214506000001437)."""

from dataclasses import dataclass

from jaxtyping import Float, Float64
from torch import Tensor

from metnet.rain import EnsembleForecast, RainForecast
from metnet.scores.score import add_up


@dataclass(frozen=True)
class Crps:
    """How far the whole forecast distribution lies from the rain that fell, in mm/h: 0 is best.

    For a forecast of one number it is the absolute error. Where it is `fair`, an ensemble gets what endlessly
    many such members would get on average (Ferro 2014, doi:10.1002/qj.2270), which 24 members miss by 4 %.
    """

    fair: bool = False

    @property
    def name(self) -> str:
        """With its unit."""
        return "fair CRPS mm/h" if self.fair else "CRPS mm/h"

    def sums(
        self, forecast: RainForecast, observed: Float[Tensor, "batch lead y x"]
    ) -> Float64[Tensor, "lead part"]:
        """The scores (mm/h), and how many there are."""
        if self.fair and isinstance(forecast, EnsembleForecast):
            crps = forecast.fair_crps(observed)
        else:
            crps = forecast.crps(observed)
        counted = ~crps.isnan()
        return add_up(crps.nan_to_num(nan=0.0), counted.float())

    def value(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead"]:
        """The mean over the pixels counted (mm/h)."""
        return sums[:, 0] / sums[:, 1]
