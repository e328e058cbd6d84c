"""`RainScaling`, `FieldScaling`: physical units -> the network's numbers, with NaN made visible."""

from collections.abc import Sequence

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn


class RainScaling(nn.Module):
    """Three channels per frame: value `tanh(log(rate + 1) / 4)`, mask (1 observed, 0 not), age in hours.

    The value is that of MetNet-2 (arXiv 2111.07470).
    Dry and "not observed" both have value 0; only the mask tells them apart. Nothing that leaves is NaN.
    """

    channels = 3  # value, mask, age

    def forward(
        self, radar: Float[Tensor, "batch time y x"], age: Float[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time channel y x"]:
        """Scales rates (mm/h, NaN is "not observed") that are `age` minutes old."""
        observed = ~radar.isnan()
        value = torch.tanh(torch.log1p(radar.nan_to_num(nan=0.0).clamp(min=0)) / 4)
        hours = repeat(age / 60, "batch time -> batch time y x", y=radar.shape[2], x=radar.shape[3])
        return torch.stack([value, observed.to(value), hours], dim=2)

    def card(self) -> dict[str, str]:
        """What a model file says of the scaling, channel by channel."""
        return {
            "value": "tanh(log(rate + 1) / 4), rate in mm/h, 0 where not observed",
            "mask": "1 where observed, 0 where not",
            "age": "hours before init_time",
        }


GOES = (  # centre and spread of the 16 channels of its imager: reflectance, then K
    *((0.2, 0.3),) * 6,
    *((285.0, 20.0), (240.0, 10.0), (250.0, 12.0), (257.0, 14.0), (280.0, 25.0)),
    *((258.0, 15.0), (282.0, 27.0), (281.0, 28.0), (278.0, 27.0), (263.0, 18.0)),
)
FARTHEST = 8.0  # spreads from the centre, where a value that cannot be right stops


class FieldScaling(nn.Module):
    """Two channels for each channel: value `(x - centre) / spread`, mask (1 observed, 0 not).

    Centre and spread (median and interquartile range, say) are in the channel's own unit, and are kept with
    the weights. What is not observed has value 0 and mask 0.

    Args:
        units: centre and spread of each channel.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, units: Sequence[Sequence[float | int]]):
        super().__init__()
        pairs = [tuple(float(number) for number in unit) for unit in units]
        if any(len(pair) != 2 or not pair[1] > 0 for pair in pairs):
            raise ValueError(f"units={pairs}: expected for each channel its centre and its spread above 0")
        self.register_buffer("centre", torch.tensor([pair[0] for pair in pairs]))
        self.register_buffer("spread", torch.tensor([pair[1] for pair in pairs]))
        self.channels = 2 * len(pairs)  # values, then masks

    def forward(self, x: Float[Tensor, "*batch channel y x"]) -> Float[Tensor, "*batch both y x"]:
        """Scales fields in their units; NaN is "not observed"."""
        observed = ~x.isnan()
        value = (x - self.centre[:, None, None]) / self.spread[:, None, None]
        value = value.nan_to_num(nan=0.0).clamp(-FARTHEST, FARTHEST)
        return torch.cat([value, observed.to(value)], dim=-3)

    def card(self) -> list[dict[str, float]]:
        """What a model file says of the scaling, channel by channel."""
        pairs = zip(self.centre.tolist(), self.spread.tolist(), strict=True)
        return [{"centre": centre, "spread": spread} for centre, spread in pairs]
