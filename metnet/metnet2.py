"""`MetNet2`: the network of Espeholt et al. 2022 (arXiv 2111.07470), at its published sizes.

As its authors' own skeleton has it (google/ai-weather-climate, metnet2/colab.ipynb); what is other here
stands in docs/model.md.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from metnet.batch import Batch
from metnet.conv_lstm import ConvLSTM
from metnet.downsampler import middle
from metnet.head import climatology
from metnet.inputs import expect
from metnet.rain import BinnedForecast, RainBins
from metnet.scaling import GOES, FieldScaling

POOL = 4  # cells of 1 km along a cell of the network
DILATIONS = (1, 2, 4, 8, 16, 32, 64, 128)
HIGH, FAR = 2000.0, 1000.0  # metres and degrees that count as 1


class MetNet2(nn.Module):
    """2048 x 2048 km of radar and satellite -> 512 classes of rain on the 512 x 512 km in their middle.

    All inputs are averaged over 4 x 4 km. The lead time shifts and scales the inputs and what follows every
    convolution; so the whole past goes through it anew for each lead time. The same head forecasts rates and
    sums over an hour: a rate is one step of 2 minutes to it, a sum the 30 steps it covers.

    Args:
        side: cells of the input along a side.
        target: cells of the forecast along a side.
        frames: radar frames, the one at init_time included.
        satellite: centre and spread of each satellite channel, in its unit.
        satellite_frames: satellite images.
        step: minutes from one lead time to the next.
        leads: how many lead times.
        hour: steps of an hour.
        told: how many numbers tell the lead time.
        memory: channels of the ConvLSTM's hidden state, and of its cell.
        width, blocks: channels, and residual blocks before and after the first crop.
        fine_width, fine_blocks: the same at 1 km.
        dense: channels of the layer before the classes.
        bins: the classes of rain; 512 of 0.2 mm/h by default.
    """

    def __init__(
        self,
        side: int = 2048,
        target: int = 512,
        frames: int = 11,
        satellite: Sequence[Sequence[float | int]] = GOES,
        satellite_frames: int = 3,
        step: float = 2.0,
        leads: int = 360,
        hour: int = 30,
        told: int = 2048,
        memory: int = 128,
        width: int = 384,
        blocks: Sequence[int] = (16, 8),
        fine_width: int = 512,
        fine_blocks: int = 2,
        dense: int = 4096,
        bins: RainBins | None = None,
    ):
        super().__init__()
        if side % (4 * POOL) or target % POOL or not 0 < target <= side // 2:
            raise ValueError(
                f"side={side}, target={target}: expected multiples of {4 * POOL} and {POOL}, "
                "and a target no larger than half the side"
            )
        self.side, self.target = side, target
        self._frames, self.images = frames, satellite_frames
        self.bins = RainBins.linear() if bins is None else bins
        self.satellite = FieldScaling(satellite)
        self.step, self.leads, self.hour = step, leads, hour
        still = 6
        channels = 1 + still + len(satellite) + still
        self.embed = nn.Sequential(
            _without_bias(leads + hour - 1, told), nn.ReLU(), _without_bias(told, told), nn.ReLU()
        )
        self.tell = ScaleAndShift(told, channels)
        self.memory = ConvLSTM(channels, memory)
        self.first = Stack(2 * memory, width, told, blocks[0], DILATIONS)
        self.second = Stack(width, width, told, blocks[1], DILATIONS)
        self.fine = Stack(width, fine_width, told, fine_blocks, (1,))
        self.head = nn.Sequential(
            nn.Conv2d(fine_width, dense, 1), nn.ReLU(), nn.Conv2d(dense, len(self.bins), 1)
        )
        self.head[-1].bias = nn.Parameter(torch.tensor(climatology(self.bins)).log())

    @property
    def frames(self) -> int:
        """How many past frames, the one at init_time included, it wants to see."""
        return self._frames

    def forward(self, batch: Batch, summed: bool = False) -> BinnedForecast:
        """The probability of each class in the middle of the grid, one lead time after the other.

        With `summed`, of the rain that falls in the hour before each lead time (mm) in place of the rate.
        """
        leads = [self._at(batch, lead, summed).softmax(dim=2) for lead in torch.split(batch.lead_time, 1)]
        return BinnedForecast(torch.cat(leads, dim=1), self.bins)

    def logits(self, batch: Batch, summed: bool = False) -> Float[Tensor, "batch lead bin target target"]:
        """Unnormalised log-probabilities of the classes in the middle: what a loss wants."""
        return self._at(batch, batch.lead_time, summed)

    def middle(self, field: Float[Tensor, "batch lead y x"]) -> Float[Tensor, "batch lead target target"]:
        """The part of a field on the grid of the input that is forecast."""
        return middle(field, self.target)

    def _at(
        self, batch: Batch, lead_time: Float[Tensor, "lead"], summed: bool
    ) -> Float[Tensor, "batch lead bin target target"]:
        """Preprocess, tell the lead time, remember, look around at two sizes, return to 1 km, classify."""
        frames = self.preprocess(batch)
        lead = len(lead_time)
        told = self.embed(self.covered(lead_time, summed).to(frames))
        told = repeat(told, "lead feature -> (batch lead) feature", batch=len(frames))
        frames = repeat(frames, "batch t c y x -> (batch lead) c t y x", lead=lead)
        field = torch.cat(self.memory.states(self.tell(frames, told).transpose(1, 2)), dim=1)
        field = middle(self.first(field, told), self.side // POOL // 2)
        field = middle(self.second(field, told), self.target // POOL)
        field = F.interpolate(field, scale_factor=POOL, mode="nearest")
        logits: Tensor = rearrange(
            self.head(self.fine(field, told)), "(batch lead) bin y x -> batch lead bin y x", lead=lead
        )
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # as `Head` does

    def covered(self, lead_time: Float[Tensor, "lead"], summed: bool = False) -> Float[Tensor, "lead when"]:
        """1 for each step of time that a forecast is about, the last at its lead time; 0 for the others.

        The first `hour` - 1 steps lie before the init time: an hour's sum may begin there.

        Raises:
            ValueError: for a lead time that is none of the network's.
        """
        last = [round(lead / self.step) for lead in lead_time.tolist()]
        for step, lead in zip(last, lead_time.tolist(), strict=True):
            if not 1 <= step <= self.leads or not math.isclose(step * self.step, lead, rel_tol=1e-6):
                raise ValueError(
                    f"lead time {lead:g} min: expected a multiple of {self.step:g} up to "
                    f"{self.step * self.leads:g} min"
                )
        when = torch.arange(2 - self.hour, self.leads + 1)
        end = torch.tensor(last)[:, None]
        return ((when <= end) & (when > end - (self.hour if summed else 1))).float()

    def preprocess(self, batch: Batch) -> Float[Tensor, "batch time channel quarter quarter"]:
        """Radar, then satellite, each beside elevation, place and date, at 4 km: 29 channels.

        Raises:
            ValueError: if the batch lacks a source, or is of another size.
        """
        size, bands = (self.side, self.side), self.satellite.channels // 2
        expect(batch.radar, "radar", (self.frames, *size))
        expect(batch.satellite, "satellite", (self.images, bands, *size))
        expect(batch.static, "static", (1, *size))
        expect(batch.place, "place", (2, *size))
        assert batch.satellite is not None and batch.static is not None and batch.place is not None
        rate = _mean_of_observed(batch.radar)
        value = torch.tanh((rate + 1).clamp(min=0).nan_to_num(nan=0.0).log() / 4)  # not observed: -1
        images = self.satellite(_mean_of_observed(batch.satellite))[:, :, :bands]
        places = torch.cat([batch.static / HIGH, batch.place / FAR], dim=1)
        places = _mean_of_observed(places).nan_to_num(nan=0.0)
        dates = [datetime.fromtimestamp(time, UTC) for time in batch.init_time.tolist()]
        numbers = torch.tensor([[float(date.hour), date.day, date.month] for date in dates]).to(places)
        still = torch.cat([places, numbers[:, :, None, None].expand(-1, -1, *places.shape[2:])], dim=1)
        every = [_beside(value[:, :, None], still), _beside(images, still)]
        longest = max(self.frames, self.images)
        return torch.cat([F.pad(x, (0, 0) * 3 + (longest - x.shape[1], 0)) for x in every], dim=2)


class ScaleAndShift(nn.Module):
    """`(x + shift) * scale`, both without a bias of their own, of each channel by what is told."""

    def __init__(self, told: int, channels: int):
        super().__init__()
        self.dense = _without_bias(told, 2 * channels)

    def forward(
        self, x: Float[Tensor, "sample channel *places"], told: Float[Tensor, "sample feature"]
    ) -> Float[Tensor, "sample channel *places"]:
        """The map, or the maps, after both."""
        scale, shift = self.dense(told).view(*told.shape[:1], -1, *[1] * (x.ndim - 2)).chunk(2, dim=1)
        changed: Tensor = (x + shift) * scale
        return changed


class DilatedBlock(nn.Module):
    """Two convolutions, each told the lead time, added to what they read."""

    def __init__(self, in_channels: int, channels: int, told: int, dilation: int):
        super().__init__()
        self.project = (
            nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1, bias=False)
        )
        self.first = nn.Conv2d(in_channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.tell_first, self.tell_second = ScaleAndShift(told, channels), ScaleAndShift(told, channels)

    def forward(
        self, x: Float[Tensor, "sample channel y x"], told: Float[Tensor, "sample feature"]
    ) -> Float[Tensor, "sample width y x"]:
        """The map after the block."""
        y = F.relu(self.tell_first(self.first(x), told))
        y = F.relu(self.tell_second(self.second(y), told))
        changed: Tensor = self.project(x) + y
        return changed


class Stack(nn.Module):
    """Blocks one after the other; what goes out is a sum over what went in and came out of each."""

    def __init__(self, in_channels: int, channels: int, told: int, count: int, dilations: Sequence[int]):
        super().__init__()
        self.blocks = nn.ModuleList(
            DilatedBlock(channels if n else in_channels, channels, told, dilations[n % len(dilations)])
            for n in range(count)
        )
        self.skips = nn.ModuleList(
            nn.Conv2d(channels if n else in_channels, channels, 1) for n in range(count + 1)
        )

    def forward(
        self, x: Float[Tensor, "sample channel y x"], told: Float[Tensor, "sample feature"]
    ) -> Float[Tensor, "sample width y x"]:
        """The map after all blocks."""
        total = self.skips[0](x)
        for block, skip in zip(self.blocks, list(self.skips)[1:], strict=True):
            x = block(x, told)
            total = total + skip(x)
        return F.relu(total)


def _without_bias(features: int, out: int) -> nn.Linear:
    dense = nn.Linear(features, out, bias=False)
    nn.init.uniform_(dense.weight, -(out**-0.5), out**-0.5)  # as published
    return dense


def _beside(series: Tensor, still: Tensor) -> Tensor:
    """Each frame with what never changes behind its channels."""
    return torch.cat([series, repeat(still, "batch c y x -> batch t c y x", t=series.shape[1])], dim=2)


def _mean_of_observed(field: Float[Tensor, "*any y x"]) -> Float[Tensor, "*any rows columns"]:
    """Means over 4 x 4 cells of those that were observed; NaN where none was."""
    maps = field.flatten(0, -3)[:, None]
    seen = (~maps.isnan()).to(maps.dtype)
    total, share = F.avg_pool2d(maps.nan_to_num(nan=0.0), POOL), F.avg_pool2d(seen, POOL)
    mean = total / share  # 0 / 0 is NaN
    return mean.view(*field.shape[:-2], *mean.shape[-2:])
