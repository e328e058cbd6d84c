"""`RainScaling`: mm/h -> the network's numbers (as in MetNet-2, arXiv 2111.07470), with NaN made visible."""

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn


class RainScaling(nn.Module):
    """Three channels per frame: value `tanh(log(rate + 1) / 4)`, mask (1 observed, 0 not), age in hours.

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
