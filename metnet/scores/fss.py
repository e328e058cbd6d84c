"""The fractions skill score (Roberts & Lean 2008, eq. 5-7, doi:10.1175/2007MWR2123.1)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from metnet.rain import RainForecast
from metnet.scores.score import add_up


@dataclass(frozen=True)
class Fss:
    """How alike the shares of rainy cells around every pixel are, seen and forecast: 1 is best, 0 worst.

    The event is rain at or above the threshold; the neighbourhood is a square of `cells` x `cells`;
    a forecast probability counts as a share. At the edge, and beside what was not observed or not
    forecast, the neighbourhood holds only the cells that are known in both fields; only such cells
    are centres.
    """

    threshold: float  # mm/h
    cells: int = 9

    def __post_init__(self) -> None:
        """Refuses a neighbourhood without a middle cell."""
        if self.cells < 1 or self.cells % 2 == 0:
            raise ValueError(f"cells={self.cells}: expected an odd number of cells, such as 9")

    @property
    def name(self) -> str:
        """Such as `FSS >= 1 mm/h, 9 cells`."""
        return f"FSS >= {self.threshold:g} mm/h, {self.cells} cells"

    def sums(
        self, forecast: RainForecast, observed: Float[Tensor, "batch lead y x"]
    ) -> Float64[Tensor, "lead part"]:
        """Squared differences of the shares, and the most they could be.

        They add up over samples and lead times; a field must come whole, for its neighbours belong together.
        """
        probability = forecast.probability_above(self.threshold)
        known = ~(probability.isnan() | observed.isnan())
        weight = known.to(probability)
        cells_known = self._neighbourhood(weight).clamp(min=1e-9)
        said = self._neighbourhood(torch.where(known, probability, 0)) / cells_known * weight
        seen = self._neighbourhood((known & (observed >= self.threshold)).to(weight)) / cells_known * weight
        return add_up((said - seen).square(), said.square() + seen.square())

    def value(self, sums: Float64[Tensor, "lead part"]) -> Float64[Tensor, "lead"]:
        """One less their ratio; NaN where it rained in neither."""
        return 1 - sums[:, 0] / sums[:, 1]

    def _neighbourhood(self, field: Float[Tensor, "batch lead y x"]) -> Float[Tensor, "batch lead y x"]:
        """The mean over the square around each pixel, with 0 outside the field; one axis after the other."""
        half = self.cells // 2
        along_y = F.avg_pool2d(field, (self.cells, 1), stride=1, padding=(half, 0))
        return F.avg_pool2d(along_y, (1, self.cells), stride=1, padding=(0, half))
