"""`Inputs`: everything a network is told of the past, as channels: of each source value, mask and age."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from metnet.batch import Batch
from metnet.scaling import FieldScaling, RainScaling, Unit
from metnet.sun import calendar, solar_elevation_sine


class Inputs(nn.Module):
    """Radar always; satellites, other radars, static fields, place and time of day where they are asked for.

    Each source has frames of its own cadence, the newest last: a shorter series gets frames that are not
    observed in front, and then all stand side by side (as in MetNet-2, arXiv 2111.07470). The ages say what
    lies how far back. Nothing that leaves is NaN.

    Args:
        frames: radar frames, the one at init_time included.
        satellite: centre and spread of each satellite channel, in its unit; "rain" for another radar's mm/h.
        satellite_frames: images of each of these. A number: they are one source, with one cadence and one
            channel of ages; a number for each: each is a source by itself, and has ages of its own.
        static: centre and spread of each static field, in its unit.
        position: longitude, latitude, the sun's height, the hour of the day and the day of the year.
    """

    def __init__(
        self,
        frames: int,
        satellite: Sequence[Unit] = (),
        satellite_frames: int | Sequence[int] = 1,
        static: Sequence[Sequence[float | int]] = (),
        position: bool = False,
    ):
        super().__init__()
        self.rain = RainScaling()
        self.satellite = FieldScaling(satellite) if satellite else None
        self.static = FieldScaling(static) if static else None
        self.place = PlaceAndTime() if position else None
        self.frames = frames
        self.images = _images(satellite_frames, len(satellite))  # of each source
        self.image_channels = self.satellite.channels + len(self.images) if self.satellite else 0
        self.still_channels = sum(part.channels for part in (self.static, self.place) if part is not None)

    @property
    def time(self) -> int:
        """How many frames the longest series has."""
        return max((self.frames, *self.images))

    @property
    def channels(self) -> int:
        """Channels of one frame with all that stands beside it."""
        return self.rain.channels + self.image_channels + self.still_channels

    @property
    def stacked_channels(self) -> int:
        """Channels of all frames on top of each other."""
        moving = self.frames * self.rain.channels + max(self.images, default=0) * self.image_channels
        return moving + self.still_channels

    def forward(
        self, batch: Batch
    ) -> tuple[Float[Tensor, "batch time channel y x"], Float[Tensor, "batch stacked_channel y x"]]:
        """The frames in time, each with what never changes; and all of it stacked as one map.

        Raises:
            ValueError: if the batch lacks a source, or has it in another size.
        """
        self._check(batch)
        moving = [self.rain(batch.radar, batch.age)]
        still = []
        if self.satellite is not None:
            assert batch.satellite is not None and batch.satellite_age is not None
            rows, columns = batch.radar.shape[2:]
            hours = repeat(
                batch.satellite_age / 60, "batch t source -> batch t source y x", y=rows, x=columns
            )
            moving.append(torch.cat([self.satellite(batch.satellite), hours], dim=2))
        if self.static is not None:
            assert batch.static is not None
            still.append(self.static(batch.static))
        if self.place is not None:
            still.append(self.place(batch))
        stacked = [rearrange(series, "batch t channel y x -> batch (t channel) y x") for series in moving]
        every = [self._as_long_as_the_longest(series) for series in moving]
        every += [repeat(fields, "batch channel y x -> batch t channel y x", t=self.time) for fields in still]
        return _joined(every, dim=2), _joined([*stacked, *still], dim=1)

    def _as_long_as_the_longest(self, series: Tensor) -> Tensor:
        """Frames of zeros, mask included, before the oldest: not observed."""
        missing = self.time - series.shape[1]
        return F.pad(series, (0, 0, 0, 0, 0, 0, missing, 0)) if missing else series

    def _check(self, batch: Batch) -> None:
        """Says what is missing of a batch, or too much."""
        size = tuple(batch.radar.shape[2:])
        if batch.radar.shape[1] != self.frames:
            raise ValueError(f"the batch has {batch.radar.shape[1]} frames: expected frames={self.frames}")
        if self.satellite is not None:
            longest = max(self.images)
            expect(batch.satellite, "satellite", (longest, self.satellite.channels // 2, *size))
            expect(batch.satellite_age, "satellite_age", (longest, len(self.images)))
        if self.static is not None:
            expect(batch.static, "static", (self.static.channels // 2, *size))
        if self.place is not None:
            expect(batch.place, "place", (2, *size))

    def card(self) -> dict[str, Any]:
        """What a model file says of the scaling of each source."""
        sources: dict[str, Any] = {"radar": self.rain.card()}
        if self.satellite is not None:
            sources["satellite"] = self.satellite.card()
        if self.static is not None:
            sources["static"] = self.static.card()
        return sources


def _images(frames: int | Sequence[int], channels: int) -> tuple[int, ...]:
    """How many of each source: of all channels together, or of each.

    Raises:
        ValueError: if that leaves one without, or there are other channels.
    """
    images, sources = ((frames,), 1) if isinstance(frames, int) else (tuple(frames), channels)
    if len(images) != sources or any(count < 1 for count in images):
        raise ValueError(
            f"satellite_frames={frames}: expected at least 1 for all {channels} in satellite, or a list of a "
            "number for each, which then has a cadence of its own"
        )
    return images if channels else ()


class PlaceAndTime(nn.Module):
    """A cell's place on the unit sphere, the sine of the sun's height, hour of the day and day of the year.

    A place is three numbers, so that nothing jumps at the date line; a cell without a place (NaN) is at the
    centre of the Earth, in a twilight without end.
    """

    channels = 8

    def forward(self, batch: Batch) -> Float[Tensor, "batch channel y x"]:
        """The channels at `batch.init_time`."""
        assert batch.place is not None
        east, north = torch.deg2rad(batch.place).unbind(dim=1)
        sun = solar_elevation_sine(batch.place, batch.init_time)
        sphere = [north.cos() * east.cos(), north.cos() * east.sin(), north.sin(), sun]
        rows, columns = batch.place.shape[2:]
        times = repeat(calendar(batch.init_time), "batch four -> batch four y x", y=rows, x=columns)
        return torch.cat([torch.stack(sphere, dim=1).nan_to_num(nan=0.0), times.to(sun)], dim=1)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """All parts as one; one part as it is, since the frames of a whole country are not copied for nothing."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def expect(field: Tensor | None, name: str, shape: tuple[int, ...]) -> None:
    """Refuses a source that is missing, or of another shape behind the batch.

    Raises:
        ValueError: naming it.
    """
    if field is None:
        raise ValueError(
            f"the batch has no {name}: this network was made to see it, of shape {shape} a sample"
        )
    if tuple(field.shape[1:]) != shape:
        raise ValueError(f"the batch's {name} has shape {tuple(field.shape[1:])} a sample: expected {shape}")
