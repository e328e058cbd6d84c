"""`Validation`: the real scores of a network and of what it has to beat, summed by lead time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metnet.rain import EnsembleForecast, RainForecast
from metnet.scores.brier import Brier
from metnet.scores.crps import Crps
from metnet.scores.csi import Csi
from metnet.scores.reliability import Reliability
from metnet.scores.score import Score

SCORES: tuple[Score, ...] = (Crps(), Brier(0.1), Brier(1.0), Csi(1.0), Reliability(1.0))
NAMES = ("crps", "brier_0.1", "brier_1", "csi_1", "reliability_1")  # in logs; rates in mm/h
FORECAST, BEFORE = "forecast", "before training"
BASELINES = ("persistence", "extrapolation")


@dataclass(frozen=True)
class Scored:
    """What one forecaster scored: a value for each score and lead time, None where nothing was counted."""

    lead_times: tuple[float, ...]  # minutes
    values: Mapping[str, list[float | None]]

    def means(self) -> dict[str, float]:
        """Each score's mean over the lead times that have one."""
        known = {name: [value for value in row if value is not None] for name, row in self.values.items()}
        return {name: sum(row) / len(row) for name, row in known.items() if row}


class Validation:
    """Sums of scores of several forecasters, all at exactly the same pixels.

    What the baselines score, and the network before training, is found once and kept.
    """

    def __init__(self, lead_times: Sequence[float]):
        """`lead_times` in minutes; those of a batch must be among them."""
        self.lead_times = tuple(
            sorted(torch.tensor(list(lead_times), dtype=torch.float32).tolist())
        )  # as batches
        self.sums: dict[str, list[Tensor]] = {}  # by forecaster, for each score (lead, part)
        self.fixed: set[str] = set()  # forecasters whose sums are complete

    def begin(self) -> None:
        """Forgets the network's sums, and those of baselines that were not completed."""
        self.sums = {name: sums for name, sums in self.sums.items() if name in self.fixed}

    @property
    def wants_baselines(self) -> bool:
        """Whether the baselines have still to be scored."""
        return not set(BASELINES) <= self.fixed

    def add(
        self, forecaster: str, forecast: RainForecast, observed: Tensor, lead_times: Sequence[float]
    ) -> None:
        """Adds what a forecaster says of `observed` (batch, lead, y, x), mm/h; NaN is not counted."""
        places = [self.lead_times.index(float(lead)) for lead in lead_times]
        sums = self.sums.setdefault(forecaster, self._zeros())
        for score, total in zip(SCORES, sums, strict=True):
            total[places] += score.sums(forecast, observed).to(total)

    def end(self, complete: Sequence[str]) -> None:
        """Says which forecasters need not be scored again."""
        self.fixed |= set(complete)

    def keep(self, forecaster: str, name: str) -> None:
        """Keeps a forecaster's sums as they are under another name."""
        self.sums[name] = [part.clone() for part in self.sums[forecaster]]
        self.fixed.add(name)

    def flat(self, forecasters: Sequence[str]) -> Tensor:
        """The sums of some forecasters in one line, to be added up over processes."""
        return torch.cat([part.flatten() for name in forecasters for part in self._of(name)])

    def unflatten(self, line: Tensor, forecasters: Sequence[str]) -> None:
        """Takes back what `flat` gave, added up."""
        first = 0
        for name in forecasters:
            for part in self.sums.setdefault(name, self._zeros()):
                part.copy_(line[first : first + part.numel()].view_as(part))
                first += part.numel()

    def scored(self, forecaster: str) -> Scored:
        """The scores of one forecaster."""
        rows = [score.value(sums).tolist() for score, sums in zip(SCORES, self._of(forecaster), strict=True)]
        known = [[value if value == value else None for value in row] for row in rows]  # NaN is not itself
        return Scored(self.lead_times, dict(zip(NAMES, known, strict=True)))

    def table(self) -> dict[str, Any]:
        """The scores of all forecasters by lead time, as JSON takes them."""
        each = {name: dict(self.scored(name).values) for name in self.forecasters()}
        return {"lead_times": list(self.lead_times), "forecasters": each}

    def forecasters(self) -> tuple[str, ...]:
        """All that have been scored."""
        return tuple(self.sums)

    def state(self) -> dict[str, list[Tensor]]:
        """What is kept, for a checkpoint."""
        return {name: self.sums[name] for name in sorted(self.fixed)}

    def restore(self, state: Mapping[str, list[Tensor]]) -> None:
        """Takes back a `state`."""
        self.sums, self.fixed = dict(state), set(state)

    def _of(self, forecaster: str) -> list[Tensor]:
        """The sums of a forecaster; zeros where it has not been asked."""
        return self.sums.get(forecaster, self._zeros())

    def _zeros(self) -> list[Tensor]:
        nothing = torch.full((1, 1, 1, 1), torch.nan)
        parts = [score.sums(EnsembleForecast(nothing[None]), nothing).shape[1] for score in SCORES]
        return [torch.zeros(len(self.lead_times), count, dtype=torch.float64) for count in parts]


def write_down(path: Path, step: int, validation: Validation) -> None:
    """Adds the scores of all forecasters to a file with one JSON object a line.

    What a training that was cut off had written of this step and later ones is replaced.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    earlier = [line for line in lines if json.loads(line)["step"] < step]
    for name in validation.forecasters():
        scored = validation.scored(name)
        entry = {"step": step, "forecaster": name, "lead_times": scored.lead_times, **scored.values}
        earlier.append(json.dumps(entry))
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text("".join(f"{line}\n" for line in earlier))
    unfinished.replace(path)
