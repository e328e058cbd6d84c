"""`Downsampler`: each frame to a quarter of its resolution (MetNet's spatial one, arXiv 2003.12140)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Downsampler(nn.Module):
    """3x3 convolutions and two 2x2 max-pools, each width half of the next; a residual at half resolution.

    Frames do not see each other, so all of them go through in one call.
    """

    factor = 4

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        if channels % 4:
            raise ValueError(f"channels={channels}: expected a multiple of 4 (the first width is a quarter)")
        self.first = nn.Conv2d(in_channels, channels // 4, 3, padding=1)
        self.second = nn.Conv2d(channels // 4, channels // 2, 3, padding=1)
        self.third = nn.Conv2d(channels // 2, channels // 2, 3, padding=1)
        self.last = nn.Conv2d(channels // 2, channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "sample in_channel y x"]
    ) -> Float[Tensor, "sample channel rows columns"]:
        """The features of maps whose sides are multiples of 4.

        Raises:
            ValueError: for other sides.
        """
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"a map of {x.shape[2]} x {x.shape[3]}: expected sides that are multiples of 4")
        half = F.gelu(self.second(F.max_pool2d(F.gelu(self.first(x)), 2)))
        half = half + F.gelu(self.third(half))
        return F.gelu(self.last(F.max_pool2d(half, 2)))


def middle(field: Float[Tensor, "*any y x"], side: int) -> Float[Tensor, "*any side side"]:
    """The square in the middle of a map."""
    top, left = ((size - side) // 2 for size in field.shape[-2:])
    return field[..., top : top + side, left : left + side]
