"""`MetNet1`: the network of Sonderby et al. 2020 (arXiv 2003.12140), at its published sizes.

What the paper leaves open, and how it is closed here, stands in docs/model.md.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from metnet.attention.image_transformer import AlongAxis, PreNorm
from metnet.attention.multihead import SelfAttention
from metnet.attention.positions import AxialPositionalEmbedding
from metnet.attention.residual import ChannelNorm
from metnet.batch import Batch
from metnet.conv_lstm import ConvLSTM
from metnet.downsampler import middle
from metnet.head import climatology
from metnet.inputs import expect
from metnet.lead_time import LeadTimePlanes
from metnet.rain import BinnedForecast, RainBins
from metnet.scaling import GOES, FieldScaling
from metnet.sun import calendar

ELEVATION = (200.0, 600.0)  # m; about the centre and spread over land
DEGREES = ((-95.0, 30.0), (37.5, 15.0))  # longitude and latitude of the conterminous United States


class MetNet1(nn.Module):
    """1024 x 1024 km of radar and satellite -> 512 classes of rain on the 64 x 64 km in their middle.

    Seven frames of 90 minutes, on cells of 1 km: radar is folded 2 x 2 into channels, the satellite averaged
    over 2 x 2; of both the network sees the middle half as it is and the whole at half the resolution, beside
    elevation, place and time, and the lead time as one of 240 planes. The whole past goes through it anew for
    each lead time.

    Args:
        side: cells of the input along a side.
        target: cells of the forecast along a side, one for each position of the attention.
        frames: past frames, the one at init_time included.
        satellite: centre and spread (median, interquartile range) of each satellite channel, in its unit.
        step: minutes from one lead time to the next.
        leads: how many lead times.
        first, channels: widths of the downsampler's first and of its other three convolutions.
        memory: channels of the ConvLSTM.
        width, heads, depth: of the axial attention, whose layers look along columns and rows in turn.
        bins: the classes of rain; 512 of 0.2 mm/h by default.
    """

    def __init__(
        self,
        side: int = 1024,
        target: int = 64,
        frames: int = 7,
        satellite: Sequence[Sequence[float | int]] = GOES,
        step: float = 2.0,
        leads: int = 240,
        first: int = 160,
        channels: int = 256,
        memory: int = 384,
        width: int = 2048,
        heads: int = 16,
        depth: int = 8,
        bins: RainBins | None = None,
    ):
        super().__init__()
        if side != 16 * target or target < 1:
            raise ValueError(
                f"side={side}, target={target}: expected a side of 16 targets, "
                "since four halvings leave one position for each cell of the forecast"
            )
        self.side, self.target, self._frames = side, target, frames
        self.bins = RainBins.linear() if bins is None else bins
        self.satellite = FieldScaling(satellite)
        self.elevation, self.degrees = FieldScaling((ELEVATION,)), FieldScaling(DEGREES)
        self.planes = LeadTimePlanes(step, leads)
        scales, folded, still = 2, 4 + len(satellite), 6
        self.downsampler = nn.Sequential(
            nn.Conv2d(scales * folded + still + leads, first, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.memory = ConvLSTM(channels, memory)
        self.widen = nn.Conv2d(memory, width, 1)
        self.positions = AxialPositionalEmbedding(width, (target, target), 1, scale=0.02)
        self.layers = nn.ModuleList(AxialLayer(width, heads, axis=2 + n % 2) for n in range(depth))
        self.head = nn.Sequential(
            ChannelNorm(width), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, len(self.bins), 1)
        )
        self.head[-1].bias = nn.Parameter(torch.tensor(climatology(self.bins)).log())

    @property
    def frames(self) -> int:
        """How many past frames, the one at init_time included, it wants to see."""
        return self._frames

    def forward(self, batch: Batch) -> BinnedForecast:
        """The probability of each class of rain in the middle of the grid, one lead time after the other."""
        leads = [self._at(batch, lead).softmax(dim=2) for lead in torch.split(batch.lead_time, 1)]
        return BinnedForecast(torch.cat(leads, dim=1), self.bins)

    def logits(self, batch: Batch) -> Float[Tensor, "batch lead bin target target"]:
        """Unnormalised log-probabilities of the classes in the middle: what a loss wants."""
        return self._at(batch, batch.lead_time)

    def middle(self, field: Float[Tensor, "batch lead y x"]) -> Float[Tensor, "batch lead target target"]:
        """The part of a field on the grid of the input that is forecast."""
        return middle(field, self.target)

    def _at(
        self, batch: Batch, lead_time: Float[Tensor, "lead"]
    ) -> Float[Tensor, "batch lead bin target target"]:
        """Preprocess, tell the lead time, downsample, remember, attend, classify."""
        frames = self.planes.beside(self.preprocess(batch), lead_time)
        small = self.downsampler(rearrange(frames, "sample time c y x -> (sample time) c y x"))
        field = self.memory(rearrange(small, "(sample time) c y x -> sample time c y x", time=self.frames))
        field = self.positions(self.widen(field))
        for layer in self.layers:
            field = layer(field)
        logits: Tensor = rearrange(
            self.head(field), "(batch lead) bin y x -> batch lead bin y x", lead=len(lead_time)
        )
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # as `Head` does

    def preprocess(self, batch: Batch) -> Float[Tensor, "batch time channel quarter quarter"]:
        """All that a frame shows, on a quarter of the side: 46 channels where the satellite has 16.

        Raises:
            ValueError: if the batch lacks a source, or is of another size.
        """
        size = (self.side, self.side)
        expected = {
            "radar": (self.frames, *size),
            "satellite": (self.frames, self.satellite.channels // 2, *size),
            "static": (1, *size),
            "place": (2, *size),
        }
        for name, shape in expected.items():
            expect(getattr(batch, name), name, shape)
        assert batch.satellite is not None and batch.static is not None and batch.place is not None
        radar = F.pixel_unshuffle(_scaled(batch.radar)[:, :, None], 2)
        images = self.satellite(batch.satellite)[:, :, : self.satellite.channels // 2]
        moving = torch.cat([radar, _halved(images)], dim=2)
        both = torch.cat([middle(moving, self.side // 4), _halved(moving)], dim=2)
        still = torch.cat([self.elevation(batch.static)[:, :1], self.degrees(batch.place)[:, :2]], dim=1)
        still = middle(_halved(still[:, None]), self.side // 4)
        hour_day = calendar(batch.init_time)[:, [0, 1, 3], None, None]
        times = hour_day.to(still).expand(-1, -1, *still.shape[3:])[:, None]
        every = repeat(torch.cat([still, times], dim=2), "batch 1 c y x -> batch t c y x", t=self.frames)
        return torch.cat([both, every], dim=2)


class AxialLayer(nn.Module):
    """Attention along one axis, then a dense network per position, each added to what it read."""

    def __init__(self, width: int, heads: int, axis: int):
        super().__init__()
        self.attention = AlongAxis(axis, PreNorm(width, SelfAttention(width, heads)))
        self.dense = nn.Sequential(
            ChannelNorm(width), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1)
        )

    def forward(self, x: Float[Tensor, "sample channel y x"]) -> Float[Tensor, "sample channel y x"]:
        """The map after both."""
        x = x + self.attention(x)
        changed: Tensor = x + self.dense(x)
        return changed


def _scaled(rate: Float[Tensor, "batch time y x"]) -> Float[Tensor, "batch time y x"]:
    """MetNet's own scaling of mm/h: dry is -0.82, and what is not observed 0, which is about 1 mm/h."""
    return torch.tanh((rate.clamp(min=0) + 0.01).log() / 4).nan_to_num(nan=0.0)


def _halved(
    field: Float[Tensor, "batch time channel y x"],
) -> Float[Tensor, "batch time channel rows columns"]:
    """Means over 2 x 2 cells."""
    small = F.avg_pool2d(rearrange(field, "batch time c y x -> (batch time) c y x"), 2)
    halved: Tensor = rearrange(small, "(batch time) c y x -> batch time c y x", time=field.shape[1])
    return halved
