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
Chance = np.random.Generator


@dataclass(frozen=True)
class DropOut:
    """How likely each failure is; it takes away most of a sample's frames at times, but never all of them."""

    frames: float = 0.0  # that a radar frame is missing, each by itself
    sectors: float = 0.0  # that nothing is observed in a sector, in none of the frames: a dead radar
    late: float = 0.0  # that a source of frames or images, each by itself, lacks its newest; see `_moved_up`
    sources: float = 0.0  # that a source beside the radar, each by itself, is missing

    def __post_init__(self) -> None:
        """Refuses what is no probability.

        Raises:
            ValueError: naming it.
        """
        for field in fields(self):
            chance = getattr(self, field.name)
            if not 0 <= chance <= 1:
                raise ValueError(f"drop_out.{field.name}={chance}: expected a probability, from 0 to 1")

    def __call__(self, batch: Batch, random: Chance, factor: int = 1, ages: bool = True) -> Batch:
        """A batch of one sample without what was drawn to fail; it needs a new motion then.

        Where the newest frames of a source are missing, they are so in one half of the samples; in the other,
        the newest that there is stands last, with its true age, as in a forecast from a source that is late.

        Args:
            batch: the sample, whole.
            random: what to draw from.
            factor: cells of the grid along a side of a cell of the surroundings.
            ages: whether the network is told them; where not, nothing is moved, for it could not know.
        """
        gone = self._gone(_there(batch.radar), random)
        series = {"radar": _without(batch.radar, gone)}
        if batch.surroundings is not None:
            series["surroundings"] = _without(batch.surroundings, gone)
        if random.random() < self.sectors:
            series = _blinded(series, factor, random)
        changed = {"age": batch.age, **series}
        if gone[-1] and random.random() < 0.5 and ages:
            changed = dict(zip(changed, _moved_up(batch.age, *series.values()), strict=True))
        if batch.satellite is not None and batch.satellite_age is not None:
            changed["satellite"], changed["satellite_age"] = self._each(
                batch.satellite, batch.satellite_age, random, ages
            )
        for name in ("static", "surroundings"):
            field = getattr(batch, name)
            if field is not None and random.random() < self.sources:
                changed[name] = torch.full_like(field, torch.nan)
        return replace(batch, **changed)

    def _each(self, images: Tensor, age: Tensor, random: Chance, ages: bool) -> tuple[Tensor, Tensor]:
        """Satellites and other radars (batch, image, band, y, x) after their failures, and their ages."""
        sources = zip(images.chunk(age.shape[2], dim=2), age.chunk(age.shape[2], dim=2), strict=True)
        left, each = zip(*(self._source(*source, random, ages) for source in sources), strict=True)
        return torch.cat(left, dim=2), torch.cat(each, dim=2)

    def _source(self, images: Tensor, age: Tensor, random: Chance, ages: bool) -> tuple[Tensor, Tensor]:
        """The bands of one source, with ages (batch, image, 1), after its failures."""
        there = _there(images)
        if random.random() < self.late:
            count, held = len(there), len(there) - int(there.argmax())
            images = _without(images, np.arange(count) >= count - random.integers(1, held, endpoint=True))
            if random.random() < 0.5 and ages:
                age, images = _moved_up(age, images)
        if random.random() < self.sources:
            images = torch.full_like(images, torch.nan)
        return images, age

    def _gone(self, seen: NDArray[np.bool_], random: Chance) -> NDArray[np.bool_]:
        """Which frames are missing or late; of those that were seen, one stays at least."""
        count = len(seen)
        missing = random.random(count) < self.frames
        late = np.zeros(count, bool)
        if count > 1 and random.random() < self.late:
            late[-random.integers(1, count) :] = True
        gone = missing | late
        if seen.any() and not (seen & ~gone).any():
            in_time = seen & ~late
            gone[np.flatnonzero(in_time if in_time.any() else seen)[-1]] = False
        return gone


def _there(series: Tensor) -> NDArray[np.bool_]:
    """Which frames of a series (1, time, ...) hold any observation."""
    return ~series[0].isnan().flatten(1).all(dim=1).numpy()


def _without(series: Tensor, gone: NDArray[np.bool_]) -> Tensor:
    """A series (batch, time, ...) without some of its frames."""
    left = series.clone()
    left[:, torch.from_numpy(gone)] = torch.nan
    return left


def _moved_up(age: Tensor, *series: Tensor) -> tuple[Tensor, ...]:
    """Ages and series, with the newest frame that there is as the last: how a late source is read.

    The first series says which that is. As many of the oldest frames are missing then; ages go on in the
    steps they have.
    """
    late = int(_there(series[0])[::-1].argmax())
    if not late:
        return age, *series
    moved = [torch.full_like(field, torch.nan) for field in series]
    for field, before in zip(moved, series, strict=True):
        field[:, late:] = before[:, :-late]
    step = age[:, -2] - age[:, -1]
    return age + late * step[:, None], *moved


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
