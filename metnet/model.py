"""`MetNet`: radar frames -> a distribution of rain for every pixel and lead time (arXiv 2003.12140, fig. 2).

Scale, downsample, remember, attend, return to full resolution. The past is encoded once; all lead times then
go through the rest as one batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from metnet.advection import advect
from metnet.attention.axial import AxialAttention
from metnet.attention.positions import AxialPositionalEmbedding
from metnet.attention.residual import ResidualBlock, ToldTrunk
from metnet.batch import Batch
from metnet.conv_lstm import ConvLSTM
from metnet.downsampler import Downsampler
from metnet.lead_time import FiLM, LeadTimeEmbedding
from metnet.prior import SIDES, AdvectionPrior, neighbourhoods
from metnet.rain import BinnedForecast, RainBins
from metnet.scaling import RainScaling

PIXELS_AT_ONCE = 2**19  # of all lead times together at full resolution; bounds the memory of a forecast
CARRIED = 3  # newest frames that are carried along their motion
DRY_SHARE = 0.85  # of pixels and times, before anything is learned
AXIAL = partial(AxialAttention, heads=4, dim_index=1)


class MetNet(nn.Module):
    """A `Forecaster` of rain bins, for any lead time and any grid.

    Args:
        frames: past frames it sees, the one at init_time included.
        channels: width of the memory and of the attention blocks, which work at a quarter of the resolution.
        fine_channels: width at full resolution.
        depth: attention blocks.
        attention: makes the attention of one block from its channels; `Float["batch channel y x"] -> same`.
        lead_features: how many numbers tell the lead time.
        grid: rows and columns the positions are learned on, in cells of the attention blocks (4 pixels).
        bins: the classes of rain; `RainBins.preferred()` by default.
        advection: start from the widened extrapolation, which needs `Batch.motion`; or be the plain MetNet.
        trunk: makes the whole attention from its channels, in place of the `depth` blocks.
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
    ):
        super().__init__()
        if frames < 1 or depth < 0 or channels < 1:
            raise ValueError(
                f"frames={frames}, depth={depth}, channels={channels}: expected at least 1 frame, "
                "no fewer than 0 blocks and at least 1 channel"
            )
        self._frames = frames
        self.bins = RainBins.preferred() if bins is None else bins
        self.scaling = RainScaling()
        self.downsampler = Downsampler(self.scaling.channels, channels)
        self.memory = ConvLSTM(channels, channels)
        self.positions = AxialPositionalEmbedding(channels, tuple(grid), interpolate=True, scale=0.02)
        self.lead_time = LeadTimeEmbedding(lead_features)
        self.blocks = nn.ModuleList(
            [ResidualBlock(attention(channels), channels, lead_features) for _ in range(depth)]
            if trunk is None
            else [ToldTrunk(trunk(channels), channels, lead_features)]
        )
        self.surface = Surface(frames * self.scaling.channels, fine_channels)
        usual = climatology(self.bins)
        self.prior = AdvectionPrior(self.bins, usual) if advection else None
        self.stream = Stream(min(frames, CARRIED), fine_channels) if advection else None
        self.head = Head(channels, fine_channels, lead_features, len(self.bins), None if advection else usual)

    @property
    def frames(self) -> int:
        """How many past frames, the one at init_time included, it wants to see."""
        return self._frames

    def forward(self, batch: Batch) -> BinnedForecast:
        """The probability of each class of rain at `batch.lead_time` on the grid of `batch.radar`.

        Raises:
            ValueError: if the batch does not have `frames` frames.
        """
        past = self.encode(batch)
        at_once = max(1, PIXELS_AT_ONCE // past.fine[:, 0].numel())
        leads = [self.decode(past, lead).softmax(dim=2) for lead in torch.split(batch.lead_time, at_once)]
        rows, columns = batch.radar.shape[2:]
        return BinnedForecast(torch.cat(leads, dim=1)[..., :rows, :columns], self.bins)

    def logits(self, batch: Batch) -> Float[Tensor, "batch lead bin y x"]:
        """Unnormalised log-probabilities of the classes, all lead times in one pass: what a loss wants."""
        rows, columns = batch.radar.shape[2:]
        return self.decode(self.encode(batch), batch.lead_time)[..., :rows, :columns]

    def encode(self, batch: Batch) -> "Past":
        """The past, which no lead time changes: its memory, and what is seen at full resolution.

        Sides that are no multiples of 4 are filled up with pixels that are not observed.

        Raises:
            ValueError: if the batch does not have `frames` frames, or lacks the motion that advection needs.
        """
        if batch.radar.shape[1] != self.frames:
            raise ValueError(f"the batch has {batch.radar.shape[1]} frames: expected frames={self.frames}")
        if self.prior is not None and batch.motion is None:
            raise ValueError(
                "the batch has no motion: a network with advection needs it, advection=False does not"
            )
        down, right = (-size % self.downsampler.factor for size in batch.radar.shape[2:])
        radar = F.pad(batch.radar, (0, right, 0, down), value=torch.nan)
        motion = batch.motion
        if motion is not None:
            motion = F.pad(motion, (0, right, 0, down), mode="replicate")

        seen = self.scaling(radar, batch.age)
        frames = rearrange(seen, "batch time channel y x -> (batch time) channel y x")
        small = self.downsampler(frames.contiguous(memory_format=torch.channels_last))
        memory = self.memory(rearrange(small, "(batch time) c y x -> batch time c y x", time=self.frames))
        stacked = rearrange(seen, "batch time channel y x -> batch (time channel) y x")
        sharp = self.surface(stacked.contiguous(memory_format=torch.channels_last))
        return Past(self.positions(memory), sharp, radar, batch.age, motion)

    def decode(self, past: "Past", lead_time: Float[Tensor, "lead"]) -> Float[Tensor, "batch lead bin Y X"]:
        """Logits at each lead time (minutes): attention that knows the lead time, then full resolution."""
        lead = len(lead_time)
        told = repeat(self.lead_time(lead_time), "lead feature -> (batch lead) feature", batch=len(past.fine))
        field = repeat(past.coarse, "batch c y x -> (batch lead) c y x", lead=lead)
        field = field.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            field = block(field, told)
        fine = repeat(past.fine, "batch c y x -> (batch lead) c y x", lead=lead)
        if self.prior is None or self.stream is None:
            logits = self.head(field, fine.contiguous(memory_format=torch.channels_last), told)
            by_lead: Tensor = rearrange(logits, "(batch lead) bin y x -> batch lead bin y x", lead=lead)
            return by_lead
        carried = past.carried(lead_time)
        fine = fine + self.stream(carried)
        logits = self.head(field, fine.contiguous(memory_format=torch.channels_last), told)
        prior = self.prior(_newest(carried), lead_time)
        learned: Tensor = rearrange(logits, "(batch lead) bin y x -> batch lead bin y x", lead=lead)
        total: Tensor = prior + learned
        return total


@dataclass(frozen=True)
class Past:
    """What is known at the init time, on a grid whose sides are multiples of 4."""

    coarse: Float[Tensor, "batch channel rows columns"]
    fine: Float[Tensor, "batch fine Y X"]
    radar: Float[Tensor, "batch time Y X"]  # mm/h
    age: Float[Tensor, "batch time"]  # minutes
    motion: Float[Tensor, "batch 2 Y X"] | None  # cells per minute

    def carried(self, lead_time: Float[Tensor, "lead"]) -> Float[Tensor, "batch frame lead Y X"]:
        """The newest frames, the newest first, carried along the motion to each lead time (mm/h)."""
        assert self.motion is not None
        newest = range(1, 1 + min(CARRIED, self.radar.shape[1]))
        with torch.no_grad():  # nothing in it is learned
            each = [
                advect(radar[-back][None], motion[None], lead_time + age[-back])
                for radar, motion, age in zip(self.radar, self.motion, self.age, strict=True)
                for back in newest
            ]
            return rearrange(
                torch.cat(each), "(batch frame) lead y x -> batch frame lead y x", frame=len(newest)
            )


def _newest(carried: Float[Tensor, "batch frame lead Y X"]) -> Float[Tensor, "batch lead Y X"]:
    """At each pixel the newest frame that was observed there; NaN where none was."""
    first, *others = carried.unbind(dim=1)
    for older in others:
        first = torch.where(first.isnan(), older, first)
    return first


class Stream(nn.Module):
    """The frames as they were carried to a lead time, with the neighbourhoods of the newest."""

    def __init__(self, frames: int, channels: int):
        super().__init__()
        self.scaling = RainScaling()
        self.mix = nn.Conv2d(2 * frames + 2 * len(SIDES), channels, 3, padding=1)

    def forward(self, carried: Float[Tensor, "batch frame lead Y X"]) -> Float[Tensor, "sample channel Y X"]:
        """One map for each sample and lead time."""
        near = neighbourhoods(rearrange(_newest(carried), "batch lead y x -> (batch lead) y x"))
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


class Head(nn.Module):
    """Back to full resolution, pixel for pixel, and to one number per class.

    Before anything is learned it says `usual`, the share of each class; or, beside a prior, nothing.
    """

    def __init__(
        self, channels: int, fine_channels: int, features: int, classes: int, usual: list[float] | None
    ):
        super().__init__()
        self.rise = nn.Conv2d(channels, 4 * fine_channels, 1)
        self.tell = FiLM(features, fine_channels)
        self.mix = nn.Conv2d(fine_channels, fine_channels, 3, padding=1)
        self.classify = nn.Conv2d(fine_channels, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.0 if usual is None else 0.01)
        start = torch.zeros(classes) if usual is None else torch.tensor(usual).log()
        self.classify.bias = nn.Parameter(start)

    def forward(
        self,
        coarse: Float[Tensor, "sample channel rows columns"],
        fine: Float[Tensor, "sample fine y x"],
        told: Float[Tensor, "sample feature"],
    ) -> Float[Tensor, "sample bin y x"]:
        """Logits from the map at a quarter of the resolution and the one at full resolution."""
        risen = F.pixel_shuffle(self.rise(coarse), 2)
        risen = F.interpolate(risen, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.gelu(risen + self.tell(fine, told))
        x = x + F.gelu(self.mix(x))
        logits: Tensor = self.classify(x)
        return logits


def climatology(bins: RainBins) -> list[float]:
    """The share of each class when nothing is known: dry mostly, wet with an exponential tail of 2 mm/h."""
    knots = (*bins.edges, bins.top)
    above = [math.exp(-rate / 2) for rate in knots]
    wet = [low - high for low, high in pairwise(above)]
    floor = 1e-3 / len(wet)  # no class is impossible
    wet = [share + floor for share in wet]
    return [DRY_SHARE, *((1 - DRY_SHARE) * share / sum(wet) for share in wet)]
