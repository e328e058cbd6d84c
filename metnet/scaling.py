"""`RainScaling`, `FieldScaling`: physical units -> the network's numbers, with NaN made visible."""

from collections.abc import Sequence

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

RAIN = "rain"  # in place of centre and spread: a channel of mm/h, scaled as the radar is
RAIN_VALUE = "tanh(log(rate + 1) / 4), rate in mm/h, 0 where not observed"
Unit = Sequence[float | int] | str  # of a channel: its centre and its spread, or RAIN


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
        value = scaled_rain(radar)
        hours = repeat(age / 60, "batch time -> batch time y x", y=radar.shape[2], x=radar.shape[3])
        return torch.stack([value, observed.to(value), hours], dim=2)

    def card(self) -> dict[str, str]:
        """What a model file says of the scaling, channel by channel."""
        return {
            "value": RAIN_VALUE,
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
    the weights. Rain is valued as by `RainScaling`. What is not observed has value 0 and mask 0.

    Args:
        units: centre and spread of each channel, or "rain".
    """

    centre: Tensor
    spread: Tensor
    is_rain: Tensor

    def __init__(self, units: Sequence[Unit]):
        super().__init__()
        pairs = [_centre_and_spread(unit) for unit in units]
        self.rain = tuple(unit == RAIN for unit in units)
        self.register_buffer("centre", torch.tensor([pair[0] for pair in pairs]))
        self.register_buffer("spread", torch.tensor([pair[1] for pair in pairs]))
        self.register_buffer("is_rain", torch.tensor(self.rain), persistent=False)
        self.channels = 2 * len(pairs)  # values, then masks

    def forward(self, x: Float[Tensor, "*batch channel y x"]) -> Float[Tensor, "*batch both y x"]:
        """Scales fields in their units; NaN is "not observed"."""
        observed = ~x.isnan()
        value = (x - self.centre[:, None, None]) / self.spread[:, None, None]
        value = value.nan_to_num(nan=0.0).clamp(-FARTHEST, FARTHEST)
        if any(self.rain):
            value = torch.where(self.is_rain[:, None, None], scaled_rain(x), value)
        return torch.cat([value, observed.to(value)], dim=-3)

    def card(self) -> list[dict[str, float | str]]:
        """What a model file says of the scaling, channel by channel."""
        units = zip(self.rain, self.centre.tolist(), self.spread.tolist(), strict=True)
        return [
            {"value": RAIN_VALUE} if rain else {"centre": centre, "spread": spread}
            for rain, centre, spread in units
        ]


def _centre_and_spread(unit: Unit) -> tuple[float, float]:
    """Of a channel; those of rain, which has none, are never looked at."""
    pair = (0.0, 1.0) if unit == RAIN else unit
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 or not pair[1] > 0:
        raise ValueError(
            f"the unit of a channel is {unit}: expected its centre and its spread above 0, or the word {RAIN}"
            "; in a list of a pair for each channel, such as [[250, 25]] of one"
        )
    return float(pair[0]), float(pair[1])


def scaled_rain(rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The value of rain in mm/h as networks see it; 0 where it was not observed."""
    return torch.tanh(torch.log1p(rate.nan_to_num(nan=0.0).clamp(min=0)) / 4)


def unscaled_rain(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The rate in mm/h that has this value."""
    return torch.expm1(4 * torch.atanh(value))
