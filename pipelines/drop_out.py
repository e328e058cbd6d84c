"""`DropOut`: what fails when it matters, as it comes in service: frames, radars, whole sources.

A network that has met it in training knows what to do about it. What is dropped is NaN, "not observed", as if
it had never been there; the target stays whole.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metnet.batch import Batch

NARROWEST, WIDEST = 30.0, 120.0  # degrees that a sector is open
SECONDARY = ("satellite", "static", "surroundings")
Chance = np.random.Generator


@dataclass(frozen=True)
class DropOut:
    """How likely each failure is; it takes away most of a sample's frames at times, but never all of them."""

    frames: float = 0.0  # that a radar frame is missing, each by itself
    sectors: float = 0.0  # that nothing is observed in a sector, in none of the frames: a dead radar
    late: float = 0.0  # that radar or satellite, each by itself, lack their newest frames; see `_moved_up`
    sources: float = 0.0  # that satellite, static fields or surroundings, each by itself, are missing

    def __post_init__(self) -> None:
        """Refuses what is no probability.

        Raises:
            ValueError: naming it.
        """
        for field in fields(self):
            chance = getattr(self, field.name)
            if not 0 <= chance <= 1:
                raise ValueError(f"drop_out.{field.name}={chance}: expected a probability, from 0 to 1")

    def __call__(self, batch: Batch, random: Chance, factor: int = 1) -> Batch:
        """A batch of one sample without what was drawn to fail; it needs a new motion then.

        Where the newest radar frames are missing, they are so in one half of the samples; in the other, the
        newest that there is stands last, with its true age, as in a forecast from a source that is late.

        `factor`: cells of the grid along a side of a cell of the surroundings.
        """
        gone = self._gone(batch.radar[0], random)
        series = {"radar": _without(batch.radar, gone)}
        if batch.surroundings is not None:
            series["surroundings"] = _without(batch.surroundings, gone)
        if random.random() < self.sectors:
            series = _blinded(series, factor, random)
        changed = {"age": batch.age, **series}
        if gone[-1] and random.random() < 0.5:
            changed = _moved_up(batch.age, series)
        if batch.satellite is not None and random.random() < self.late:
            images = batch.satellite.shape[1]
            late = np.arange(images) >= images - random.integers(1, images, endpoint=True)
            changed["satellite"] = _without(batch.satellite, late)
        for name in SECONDARY:
            field = getattr(batch, name)
            if field is not None and random.random() < self.sources:
                changed[name] = torch.full_like(field, torch.nan)
        return replace(batch, **changed)

    def _gone(self, radar: Tensor, random: Chance) -> NDArray[np.bool_]:
        """Which frames (time, y, x) are missing or late; of those with an observation, one stays at least."""
        count = len(radar)
        missing = random.random(count) < self.frames
        late = np.zeros(count, bool)
        if count > 1 and random.random() < self.late:
            late[-random.integers(1, count) :] = True
        seen = ~radar.isnan().flatten(1).all(dim=1).numpy()
        gone = missing | late
        if seen.any() and not (seen & ~gone).any():
            in_time = seen & ~late
            gone[np.flatnonzero(in_time if in_time.any() else seen)[-1]] = False
        return gone


def _without(series: Tensor, gone: NDArray[np.bool_]) -> Tensor:
    """A series (batch, time, ...) without some of its frames."""
    left = series.clone()
    left[:, torch.from_numpy(gone)] = torch.nan
    return left


def _moved_up(age: Tensor, series: dict[str, Tensor]) -> dict[str, Tensor]:
    """The series and their ages, with the newest frame that there is as the last: how a late source is read.

    As many of the oldest frames are missing then; ages go on in the steps they have.
    """
    late = int((~series["radar"][0].isnan().flatten(1).all(dim=1)).flip(0).int().argmax())
    if not late:
        return {"age": age, **series}
    moved = {}
    for name, field in series.items():
        moved[name] = torch.full_like(field, torch.nan)
        moved[name][:, late:] = field[:, :-late]
    step = age[:, -2] - age[:, -1]
    return {"age": age + late * step[:, None], **moved}


def _blinded(series: dict[str, Tensor], factor: int, random: Chance) -> dict[str, Tensor]:
    """The series of radar without what lies in a sector; as they are where nothing would be left.

    The sector's apex, a radar, lies in the sample or near it. The same sector is cut out of the surroundings.
    """
    rows, columns = series["radar"].shape[2:]
    apex = random.uniform(-1, 1, 2) * (rows, columns)  # from the middle: up to half a side outside
    middle, half = random.uniform(0, 360), random.uniform(NARROWEST, WIDEST) / 2
    cut = {}
    for name, field in series.items():
        sides = tuple(field.shape[-2:])
        cell = 1 if name == "radar" else factor
        y, x = (cell * (np.arange(side) - (side - 1) / 2) for side in sides)
        bearing = np.rad2deg(np.arctan2(x - apex[1], apex[0] - y[:, None]))
        hidden = np.abs((bearing - middle + 180) % 360 - 180) <= half
        cut[name] = field.masked_fill(torch.from_numpy(hidden), torch.nan)
    return cut if not cut["radar"].isnan().all() else series
