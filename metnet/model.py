"""`MetNet`: the past -> a distribution of rain for every pixel and lead time (arXiv 2003.12140, fig. 2).

Scale, downsample, remember, attend, return to full resolution. By default the past is encoded once, and all
lead times then go through the rest as one batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from metnet.advection import advect, carry_ahead
from metnet.attention.axial import AxialAttention
from metnet.attention.positions import AxialPositionalEmbedding
from metnet.attention.residual import ResidualBlock, ToldTrunk
from metnet.batch import Batch
from metnet.cascade import Lags, continued
from metnet.chances import chances, displaced, grown_by, growth
from metnet.conv_lstm import ConvLSTM
from metnet.downsampler import Downsampler
from metnet.evolution import evolution, evolved
from metnet.head import Categorical, Head, Link, climatology, spelt
from metnet.inputs import Inputs
from metnet.lead_time import LeadTimeEmbedding, LeadTimePlanes
from metnet.local import Local, describe, pace
from metnet.mended import mended
from metnet.prior import NEAR, AdvectionPrior, Pixels, minutes_of, neighbourhoods, pixels
from metnet.quantisation import Steps
from metnet.rain import BinnedForecast, RainBins
from metnet.scaling import RainScaling, Unit
from metnet.surroundings import Surroundings

PIXELS_AT_ONCE = 2**18  # of all lead times together at full resolution; bounds the memory of a forecast
CARRIED = 3  # newest frames that are carried along their motion
STILL = 2.0  # times as far ahead counts rain whose motion nobody knows: likelier on four events of five
AXIAL = partial(AxialAttention, heads=4, dim_index=1)
CATEGORICAL = Categorical()


class MetNet(nn.Module):
    """A `Forecaster` of rain bins, for any lead time and any grid.

    Args:
        frames: past frames it sees, the one at init_time included.
        channels: width of the memory and of the attention blocks, which work at a quarter of the resolution.
        fine_channels: width at full resolution.
        depth: attention blocks.
        attention: makes the attention of one block from its channels; `Float["batch channel y x"] -> same`.
        lead_features: how many numbers tell the lead time, where every block is told.
        grid: rows and columns the positions are learned on, in cells of the attention blocks (4 pixels).
        bins: the classes of rain; `RainBins.preferred()` by default.
        advection: start from the widened extrapolation, which needs `Batch.motion`; or be the plain MetNet.
        trunk: makes the whole attention from its channels, in place of the `depth` blocks.
        head: how the distribution over the classes is spelt, `Categorical` or `Ordinal`.
        lead_time: planes at the input, for which the past is encoded anew for each lead time (MetNet); by
            default every block is told by FiLM, and the past is encoded once (MetNet-2).
        satellite: centre and spread of each satellite channel it sees, in its unit, or "rain" for another
            radar's; none by default.
        satellite_frames: how many images of each it sees. A number: all have one cadence, beside the radar's;
            a list of a number for each: each has a cadence and ages of its own.
        static: centre and spread of each static field it sees, in the field's unit; none by default.
        position: see place, sun and calendar, which needs `Batch.place`.
        surroundings: side in cells of the means in `Batch.surroundings`; 1: see no further than the grid.
        local: width of what is learned pixel by pixel beside the prior; 0: nothing.
        stochastic_depth: probability that a training sample is answered by the prior and what is local alone,
            as if the rest were one residual block (Huang et al. 2016, arXiv 1603.09382): neither leans on
            what the other learns by heart.
    """

    def __init__(
        self,
        frames: int = 6,
        channels: int = 64,
        fine_channels: int = 24,
        depth: int = 4,
        attention: Callable[[int], nn.Module] = AXIAL,
        lead_features: int = 64,
        grid: Sequence[int] = (32, 32),
        bins: RainBins | None = None,
        advection: bool = True,
        trunk: Callable[[int], nn.Module] | None = None,
        head: Link = CATEGORICAL,
        lead_time: LeadTimePlanes | None = None,
        satellite: Sequence[Unit] = (),
        satellite_frames: int | Sequence[int] = 3,
        static: Sequence[Sequence[float | int]] = (),
        position: bool = False,
        surroundings: int = 1,
        local: int = 48,
        stochastic_depth: float = 0.0,
    ):
        super().__init__()
        if not 0 <= stochastic_depth < 1:
            raise ValueError(f"stochastic_depth={stochastic_depth}: expected a probability below 1")
        if stochastic_depth and not advection:
            raise ValueError(
                f"stochastic_depth={stochastic_depth}: expected 0 with advection=false, for without a prior "
                "nothing is left to answer the samples that do not hear the network"
            )
        if min(frames, channels, surroundings) < 1 or min(depth, local) < 0:
            raise ValueError(
                f"frames={frames}, depth={depth}, channels={channels}, surroundings={surroundings}, "
                f"local={local}: expected at least 1 frame, no fewer than 0 blocks, at least 1 channel, "
                "means over at least 1 cell and no width below 0"
            )
        if min(fine_channels, lead_features) < 1 or len(grid) != 2:
            raise ValueError(
                f"fine_channels={fine_channels}, lead_features={lead_features}, grid={list(grid)}: expected "
                "at least 1 of each, and the rows and the columns of a grid"
            )
        self._frames = frames
        self.stochastic_depth = float(stochastic_depth)
        self.bins = RainBins.preferred() if bins is None else bins
        self.link = head
        self.scaling = Inputs(frames, satellite, satellite_frames, static, position)
        self.planes = lead_time
        in_channels = self.scaling.channels + (0 if lead_time is None else lead_time.count)
        self.downsampler = Downsampler(in_channels, channels)
        self.memory = ConvLSTM(channels, channels)
        self.positions = AxialPositionalEmbedding(channels, tuple(grid), interpolate=True, scale=0.02)
        self.lead_time = LeadTimeEmbedding(lead_features) if lead_time is None else lead_time
        told = self.lead_time.features
        self.blocks = nn.ModuleList(
            [ResidualBlock(attention(channels), channels, told) for _ in range(depth)]
            if trunk is None
            else [ToldTrunk(trunk(channels), channels, told)]
        )
        self.surface = Surface(self.scaling.stacked_channels, fine_channels)
        usual = climatology(self.bins)
        self.prior = AdvectionPrior(self.bins, usual) if advection else None
        self.stream = Stream(min(frames, CARRIED), fine_channels) if advection else None
        numbers = head.count(len(self.bins))
        told_of = min(frames, CARRIED)
        self.local = Local(self.bins, told_of, local) if advection and local else None
        self.head = Head(channels, fine_channels, told, numbers, None if advection else spelt(head, usual))
        self.surroundings = (
            Surroundings(surroundings, channels, attention, grid) if surroundings > 1 else None
        )

    @property
    def frames(self) -> int:
        """How many past frames, the one at init_time included, it wants to see."""
        return self._frames

    def forward(self, batch: Batch) -> BinnedForecast:
        """The probability of each class of rain at `batch.lead_time` on the grid of `batch.radar`.

        Raises:
            ValueError: if the batch does not have `frames` frames, lacks what the network was made to see, or
                asks for a lead time that is not above 0.
        """
        self._check_asked(batch.lead_time)
        past = self.encode(batch)
        pixels = past.fine[:, 0].numel() * (1 if self.planes is None else self.scaling.time)
        at_once = max(1, PIXELS_AT_ONCE // pixels)
        rain = None if past.rain is None else past.rain.carried(batch.lead_time)
        shape = len(past.fine), len(batch.lead_time), len(self.bins), *past.fine.shape[2:]
        said = past.fine.new_empty(shape, dtype=torch.promote_types(past.fine.dtype, torch.float32))
        for leads in torch.split(torch.arange(len(batch.lead_time)), at_once):
            part = slice(int(leads[0]), int(leads[-1]) + 1)
            carried = None if rain is None else rain[:, :, part]
            said[:, part] = self.decode(past, batch.lead_time[part], carried).softmax(dim=2)
        rows, columns = batch.radar.shape[2:]
        return BinnedForecast(said[..., :rows, :columns], self.bins)

    def logits(self, batch: Batch) -> Float[Tensor, "batch lead bin y x"]:
        """Unnormalised log-probabilities of the classes, all lead times in one pass: what a loss wants.

        Raises:
            ValueError: as `forward` does.
        """
        self._check_asked(batch.lead_time)
        rows, columns = batch.radar.shape[2:]
        return self.decode(self.encode(batch), batch.lead_time)[..., :rows, :columns]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles what convolves and attends, as `torch.compile` would with these arguments.

        Not what is carried along, nor what is told of each pixel: loops over bands and lead times, which keep
        a compiler busy for longer than most trainings take, and which it would go through again for others.
        """
        parts = [self.downsampler, self.memory, *self.blocks, self.surface, self.head, self.surroundings]
        for part in parts:
            if part is not None:
                part.compile(*args, **kwargs)

    def pixels(self, batch: Batch, count: int, generator: torch.Generator) -> Pixels:
        """Some pixels of the target, and what lies around each in the carried field, to fit the prior on.

        Raises:
            ValueError: if the batch has no motion or no target.
        """
        if batch.motion is None or batch.target is None:
            raise ValueError("a prior is fitted on a batch with a motion and a target; this one lacks one")
        whole = batch.filled_up(self.downsampler.factor)
        assert whole.motion is not None
        rain = self._moving(whole)
        carried = rain.carried(whole.lead_time)
        newest, frame = _newest(carried)
        ahead = rain.ahead(whole.lead_time)
        told: tuple[Tensor | None, ...] = ()
        if self.local is not None:
            changing = rain.age, rain.doubt, rain.changes
            told = _told(rain.steps, carried, newest, frame, ahead, *changing)
        down, right = (
            full - part for full, part in zip(newest.shape[2:], batch.target.shape[2:], strict=True)
        )
        target = F.pad(batch.target, (0, right, 0, down), value=torch.nan)
        drawn = target, count, generator, frame
        return pixels(self.bins, newest, ahead, whole.cell_size, *drawn, *told)

    def encode(self, batch: Batch) -> "Past":
        """The past, which no lead time changes: its memory, and what is seen at full resolution.

        Sides that are no multiples of 4 are filled up with pixels that are not observed.

        Raises:
            ValueError: if the batch does not have `frames` frames, or lacks what the network was made to see.
        """
        if self.prior is not None and batch.motion is None:
            raise ValueError(
                "the batch has no motion: a network with advection needs it, advection=False does not"
            )
        whole = batch.filled_up(self.downsampler.factor)
        frames, stacked = self.scaling(whole)
        coarse = self.remember(frames) if self.planes is None else None
        wide = None if self.surroundings is None else self.surroundings(batch)
        sharp = self.surface(stacked.contiguous(memory_format=torch.channels_last))
        seen = frames if coarse is None else None
        return Past(seen, coarse, wide, sharp, None if self.prior is None else self._moving(whole))

    def remember(
        self, frames: Float[Tensor, "sample time channel Y X"]
    ) -> Float[Tensor, "sample width rows columns"]:
        """What the frames leave in memory, at a quarter of their resolution."""
        each = rearrange(frames, "sample time channel y x -> (sample time) channel y x")
        small = self.downsampler(each.contiguous(memory_format=torch.channels_last))
        steps = rearrange(small, "(sample time) c y x -> sample time c y x", time=frames.shape[1])
        placed: Tensor = self.positions(self.memory(steps))
        return placed

    def decode(
        self,
        past: "Past",
        lead_time: Float[Tensor, "lead"],
        carried: Float[Tensor, "batch frame lead Y X"] | None = None,
    ) -> Float[Tensor, "batch lead bin Y X"]:
        """Logits at each lead time (minutes): attention that knows the lead time, then full resolution.

        `carried` is what `past.rain` is carried to; it is carried there if none is given.
        """
        lead = len(lead_time)
        told = repeat(self.lead_time(lead_time), "lead feature -> (batch lead) feature", batch=len(past.fine))
        field = self._coarse(past, lead_time).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            field = block(field, told)
        fine = repeat(past.fine, "batch c y x -> (batch lead) c y x", lead=lead)
        if self.prior is None or self.stream is None or past.rain is None:
            return self.link.logits(self._numbers(field, fine, told, lead))
        rain = past.rain
        carried = rain.carried(lead_time) if carried is None else carried
        newest, frame = _newest(carried)
        numbers = self._numbers(field, fine + self.stream(carried, newest), told, lead)
        ahead = rain.ahead(lead_time)
        said = self.prior(newest, ahead, rain.cell_size, frame)
        if self.local is not None:
            changing = rain.age, rain.doubt, rain.changes
            known, *beside = _told(rain.steps, carried, newest, frame, ahead, *changing)
            said = self.local(known, said.flatten(0, 1), *beside).unflatten(0, (-1, lead))
        return self.link.logits(self.link.numbers(said) + self._heard(numbers))

    def _heard(
        self, numbers: Float[Tensor, "batch lead number Y X"]
    ) -> Float[Tensor, "batch lead number Y X"]:
        """What is added to the prior; in training nothing to some samples, and the more to the others."""
        if not (self.training and self.stochastic_depth):
            return numbers
        heard = torch.rand(len(numbers), device=numbers.device) >= self.stochastic_depth
        return numbers * (heard / (1 - self.stochastic_depth)).to(numbers)[:, None, None, None, None]

    def _moving(self, whole: Batch) -> "Moving":
        """The frames that are carried, of a batch with a motion."""
        assert whole.motion is not None
        motion, doubt = whole.motion[:, :2], whole.motion[:, 2:].sum(dim=1)
        return Moving(*_to_carry(whole.radar, whole.age), motion, doubt, whole.cell_size, self.bins)

    def _check_asked(self, lead_time: Float[Tensor, "lead"]) -> None:
        """Refuses lead times of which a prior says nothing: its weights go by their logarithms.

        Raises:
            ValueError: for none at all, or one that is not above 0.
        """
        if self.prior is None or lead_time.is_meta:
            return
        minutes = lead_time.tolist()
        if not minutes or not all(lead > 0 for lead in minutes):
            raise ValueError(f"lead_time={minutes}: expected one or more, in minutes above 0")

    def _coarse(
        self, past: "Past", lead_time: Float[Tensor, "lead"]
    ) -> Float[Tensor, "sample channel rows columns"]:
        """The memory for each lead time, together with what the surroundings say."""
        lead = len(lead_time)
        if past.coarse is not None:
            memory = repeat(past.coarse, "batch c y x -> (batch lead) c y x", lead=lead)
        else:
            assert self.planes is not None and past.frames is not None
            memory = self.remember(self.planes.beside(past.frames, lead_time))
        if past.wide is None:
            return memory
        return memory + repeat(past.wide, "batch c y x -> (batch lead) c y x", lead=lead)

    def _numbers(
        self, field: Tensor, fine: Tensor, told: Tensor, lead: int
    ) -> Float[Tensor, "batch lead number Y X"]:
        """What the head says, by lead time."""
        numbers = self.head(field, fine.contiguous(memory_format=torch.channels_last), told)
        by_lead: Tensor = rearrange(numbers, "(batch lead) number y x -> batch lead number y x", lead=lead)
        return by_lead


@dataclass(frozen=True)
class Past:
    """What is known at the init time, on a grid whose sides are multiples of 4."""

    frames: Float[Tensor, "batch every input Y X"] | None  # where they are encoded anew for each lead time
    coarse: Float[Tensor, "batch channel rows columns"] | None  # and where they are not, their memory
    wide: Float[Tensor, "batch channel rows columns"] | None  # what the surroundings say
    fine: Float[Tensor, "batch fine Y X"]
    rain: "Moving | None"  # where it is carried along its motion


@dataclass(frozen=True)
class Moving:
    """The newest frames, the newest first, and their motion."""

    radar: Float[Tensor, "batch frame Y X"]  # mm/h
    age: Float[Tensor, "batch frame"]  # minutes
    motion: Float[Tensor, "batch 2 Y X"]  # cells per minute
    doubt: Float[Tensor, "batch Y X"]  # by how much it is in doubt, likewise
    cell_size: Float[Tensor, "batch"]  # metres
    bins: RainBins  # that are forecast

    @cached_property
    def steps(self) -> Steps:
        """The rates from which on the sensor tells each class."""
        return Steps.of(self.radar, self.bins)

    @cached_property
    def together(self) -> Float[Tensor, "batch frame Y X"]:
        """The frames carried along the motion to the time of the newest."""
        return _together(self.radar, self.age, self.motion)

    @cached_property
    def mended(self) -> Float[Tensor, "batch 2 Y X"]:
        """The motion from there on."""
        return mended(self.motion, self.together, self.age)

    @cached_property
    def changes(self) -> "Changes":
        """How rain changes, the same for all lead times."""
        return Changes.of(self.together, self.age, self.mended)

    def ahead(self, lead_time: Float[Tensor, "lead"]) -> Float[Tensor, "batch frame lead"]:
        """By how many minutes each frame counts as ahead: as many as it is carried, or `STILL` times as many.

        So many where all other frames are empty and nothing moves, for a single frame tells no motion: what
        stands still in place of moving is soon somewhere else. (Part of a grid may hold a single frame, and
        have the motion of the whole.) A network that never sees a second one is fitted as it is.
        """
        minutes = self.age[:, :, None] + lead_time
        if self.radar.shape[1] == 1:
            return minutes
        several = (~self.radar.isnan()).flatten(2).any(dim=2).sum(dim=1) > 1
        told = several | (self.motion != 0).flatten(1).any(dim=1)
        return torch.where(told[:, None, None], minutes, STILL * minutes)

    def carried(self, lead_time: Float[Tensor, "lead"]) -> Float[Tensor, "batch frame lead Y X"]:
        """The frames carried to the time of the newest, and all from there to each lead time (mm/h)."""
        with torch.no_grad():  # nothing in it is learned
            each = [
                carry_ahead(frames[None], way[None], lead_time + ages[0])
                for frames, way, ages in zip(self.together, self.mended, self.age, strict=True)
            ]
            return torch.cat(each)


class Changes(NamedTuple):
    """How rain changes, as frames tell that were carried to one time."""

    paces: Float[Tensor, "batch 2 Y X"]  # how fast
    lags: Lags  # how rain of each size hangs together from frame to frame
    growth: Float[Tensor, "batch 1 rows columns"]  # how fast the area grows that it rains on
    evolution: Float[Tensor, "batch 1 y x"]  # what rain gains at each place
    motion: Float[Tensor, "batch 2 Y X"]  # that it goes on along

    @classmethod
    def of(
        cls,
        frames: Float[Tensor, "batch frame Y X"],
        age: Float[Tensor, "batch frame"],
        motion: Float[Tensor, "batch 2 Y X"],
    ) -> "Changes":
        """Those of frames (mm/h), the newest first, their ages (minutes) and their motion from there on."""
        lags, source = Lags.of(frames, age), evolution(frames, age)
        return cls(pace(frames), lags, growth(frames, age), source, motion)


def _to_carry(
    radar: Float[Tensor, "batch time Y X"], age: Float[Tensor, "batch time"]
) -> tuple[Float[Tensor, "batch frame Y X"], Float[Tensor, "batch frame"]]:
    """The newest frames that hold anything, the newest first, and their ages; empty ones fill the number."""
    empty = radar.isnan().flatten(2).all(dim=2).flip(1)
    back = empty.byte().argsort(dim=1, stable=True)[:, :CARRIED]
    chosen = radar.shape[1] - 1 - back
    fields = [sample[few] for sample, few in zip(radar, chosen, strict=True)]
    return torch.stack(fields), age.gather(1, chosen)


@torch.no_grad()  # nothing in it is learned
def _together(
    radar: Float[Tensor, "batch frame Y X"],
    age: Float[Tensor, "batch frame"],
    motion: Float[Tensor, "batch 2 Y X"],
) -> Float[Tensor, "batch frame Y X"]:
    """Each frame (mm/h) carried along the motion by as many minutes as it is older than the first."""
    each = [
        advect(field[None], flow[None], minutes[None])
        for fields, flow, gaps in zip(radar, motion, (age - age[:, :1]).clamp(min=0), strict=True)
        for field, minutes in zip(fields, gaps, strict=True)
    ]
    return rearrange(torch.cat(each), "(batch frame) 1 y x -> batch frame y x", frame=radar.shape[1])


def _newest(
    carried: Float[Tensor, "batch frame lead Y X"],
) -> tuple[Float[Tensor, "batch lead Y X"], UInt8[Tensor, "batch lead Y X"]]:
    """At each pixel the newest value there is, and which frame it is of (the first, where none has any)."""
    value, *others = carried.unbind(dim=1)
    frame = torch.zeros_like(value, dtype=torch.uint8)
    for index, older in enumerate(others, start=1):
        filled = value.isnan() & ~older.isnan()
        value = torch.where(filled, older, value)
        frame.masked_fill_(filled, index)
    return value, frame


def _told(
    steps: Steps,
    carried: Float[Tensor, "batch frame lead Y X"],
    newest: Float[Tensor, "batch lead Y X"],
    frame: UInt8[Tensor, "batch lead Y X"],
    ahead: Float[Tensor, "batch frame lead"],
    age: Float[Tensor, "batch frame"],
    doubt: Float[Tensor, "batch Y X"],
    changes: Changes,
) -> tuple[
    Float[Tensor, "sample feature Y X"], Float[Tensor, "sample bin Y X"], Float[Tensor, "sample edge"]
]:
    """What is known around each pixel, its `chances`, and from which rate on each class is told.

    `newest` and `frame` are as `_newest` tells them.
    """
    filled = torch.cat([newest[:, None], carried[:, 1:]], dim=1)
    minutes, now = minutes_of(ahead, frame), newest.flatten(0, 1)
    older = filled[:, min(1, filled.shape[1] - 1)].flatten(0, 1)
    onward = continued(now, older, changes.lags.after(ahead[:, 0]).flatten(0, 1))
    gained = evolved(changes.evolution, changes.motion, ahead[:, 0])
    onward = onward._replace(rain=onward.rain + gained)
    told = describe(filled, minutes, age, changes.paces, onward)
    errs = doubt[:, None] * minutes
    grown = grown_by(changes.growth, ahead[:, 0])
    reached = steps.near.repeat_interleave(carried.shape[2], dim=0)
    likely = chances(displaced(onward, errs.flatten(0, 1)), now, minutes.flatten(0, 1), reached, grown)
    return told, likely, steps.after(ahead[:, 0])


class Stream(nn.Module):
    """The frames as they were carried to a lead time, with the neighbourhoods of the newest."""

    def __init__(self, frames: int, channels: int):
        super().__init__()
        self.scaling = RainScaling()
        self.mix = nn.Conv2d(2 * frames + 2 * len(NEAR), channels, 3, padding=1)

    def forward(
        self, carried: Float[Tensor, "batch frame lead Y X"], newest: Float[Tensor, "batch lead Y X"]
    ) -> Float[Tensor, "sample channel Y X"]:
        """One map for each sample and lead time."""
        near = neighbourhoods(rearrange(newest, "batch lead y x -> (batch lead) y x"))
        frames = rearrange(carried, "batch frame lead y x -> (batch lead) frame y x")
        ages = torch.zeros(frames.shape[:2]).to(frames)
        value_mask = self.scaling(frames, ages)[:, :, :2]
        shown = torch.cat([rearrange(value_mask, "n frame two y x -> n (frame two) y x"), near], dim=1)
        return F.gelu(self.mix(shown.contiguous(memory_format=torch.channels_last)))


class Surface(nn.Module):
    """The frames side by side at full resolution, for the detail that downsampling loses."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch in_channel y x"]) -> Float[Tensor, "batch channel y x"]:
        """Two convolutions, the second residual."""
        x = F.gelu(self.first(x))
        return x + F.gelu(self.second(x))
