"""`Cuts`: how probable rain must be to be called rain, by threshold and lead time, for the highest CSI.

Few scores of yes and no are best at the probability 1/2. The critical success index of well calibrated
probabilities is best at CSI / (1 + CSI) of the highest CSI (Lipton et al. 2014, arXiv:1402.1892, theorem 1,
which tells it of F1 = 2 CSI / (1 + CSI)).
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metnet.calibration import REFERENCE, Exceedances
from metnet.rain import RainForecast

LEVELS = 100  # cuts to choose from
EVENTS = 100  # pixels that reach a threshold at a lead time, below which no cut is chosen of its own
USUAL = 0.5


@dataclass(frozen=True)
class Cuts:
    """The probability from which on a threshold counts as reached, for each threshold and lead time."""

    thresholds: tuple[float, ...]  # mm/h, rising
    lead_times: tuple[float, ...]  # minutes, rising
    cut: tuple[tuple[float, ...], ...]  # of each threshold: by lead time

    @classmethod
    def chosen(cls, said: Exceedances, edges: Sequence[float]) -> "Cuts":
        """Those with the highest CSI on some pixels, for each edge (mm/h) that `said` has a probability of.

        Where few pixels reached a threshold, all lead times choose together; where too few did, it is 1/2.
        """
        leads = sorted(set(said.lead_time.tolist())) or [REFERENCE]
        level = (said.above * LEVELS).long().clamp(0, LEVELS - 1)
        happened = said.happened().bool()
        counts = torch.zeros(len(leads), len(edges), 2, LEVELS, dtype=torch.float64)
        for index, lead in enumerate(leads):
            here = said.lead_time == lead
            for edge in range(len(edges)):
                for row, which in enumerate((happened[here, edge], ~happened[here, edge])):
                    counts[index, edge, row] = torch.bincount(level[here, edge][which], minlength=LEVELS)
        together = _best(counts.sum(dim=0))
        rows = [
            tuple(_best(counts[:, edge], otherwise=float(together[edge])).tolist())
            for edge in range(len(edges))
        ]
        return cls(tuple(edges), tuple(leads), tuple(rows))

    def at(self, threshold: float, lead_times: Sequence[float]) -> tuple[float, ...] | None:
        """The cuts of a threshold (mm/h) at some lead times (minutes), each that of the next one there is."""
        if threshold not in self.thresholds:
            return None
        row = self.cut[self.thresholds.index(threshold)]
        last = len(self.lead_times) - 1
        return tuple(row[min(bisect_left(self.lead_times, lead), last)] for lead in lead_times)

    def card(self) -> dict[str, Any]:
        """What a model file says of them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> "Cuts":
        """The cuts of a model file.

        Raises:
            ValueError: if these are none.
        """
        try:
            thresholds, lead_times = (tuple(map(float, card[name])) for name in ("thresholds", "lead_times"))
            cut = tuple(tuple(map(float, row)) for row in card["cut"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cuts: expected thresholds, lead_times and cut, got {card}") from error
        fits = len(cut) == len(thresholds) and {len(row) for row in cut} == {len(lead_times)}
        if not fits or not all(0 < number < 1 for row in cut for number in row):
            raise ValueError(
                f"cuts: expected a probability for each of {len(thresholds)} thresholds and "
                f"{len(lead_times)} lead times; the file is damaged"
            )
        return cls(thresholds, lead_times, cut)


@dataclass(frozen=True)
class DecidedForecast:
    """A `RainForecast` that also says from which probability on it means yes."""

    said: RainForecast
    cuts: Mapping[float, tuple[float, ...]]  # by threshold (mm/h): of each lead time

    def probability_above(self, threshold: float) -> Float[Tensor, "batch lead y x"]:
        """As it was said."""
        return self.said.probability_above(threshold)

    def quantile(self, level: float) -> Float[Tensor, "batch lead y x"]:
        """As it was said."""
        return self.said.quantile(level)

    def mean(self) -> Float[Tensor, "batch lead y x"]:
        """As it was said."""
        return self.said.mean()

    def crps(self, observed: Float[Tensor, "batch lead y x"]) -> Float[Tensor, "batch lead y x"]:
        """As it was said."""
        return self.said.crps(observed)

    def cut(self, threshold: float) -> tuple[float, ...] | None:
        """From which probability on the threshold counts as reached, by lead time; None: it does not say."""
        return self.cuts.get(threshold)


def _best(counts: Float[Tensor, "n 2 level"], otherwise: float = USUAL) -> Float[Tensor, "n"]:
    """The cut with the highest CSI, from how often each level was said where rain came, and where not."""
    from_there_on = counts.flip(2).cumsum(dim=2).flip(2)
    hits, alarms = from_there_on.unbind(dim=1)
    events = counts[:, 0].sum(dim=1)
    index = hits / (events[:, None] + alarms).clamp(min=1)
    best = index[:, 1:].argmax(dim=1).double() + 1  # never 0: everything is above it
    return torch.where(events >= EVENTS, best / LEVELS, otherwise)
