"""`Pointwise`: a convolution that looks at one cell at a time, as the matrix product that it is."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Pointwise(nn.Conv2d):
    """As `nn.Conv2d(in_channels, channels, 1)`, with the same weights, for forecasts on several threads.

    On a CPU a convolution then packs maps that are given channel after channel, and takes twice as long; and
    of maps given cell after cell it makes such, which are slow to add to others. The product makes them
    channel after channel; where gradients go back to `x` that would be the slower way.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__(in_channels, channels, 1)

    def forward(self, x: Float[Tensor, "sample in_channel y x"]) -> Float[Tensor, "sample channel y x"]:
        """The product of the weights and each cell's numbers, and the bias."""
        if x.requires_grad:
            return super().forward(x)
        weight = self.weight[:, :, 0, 0].expand(len(x), -1, -1)
        cells = torch.baddbmm(self.get_parameter("bias")[:, None], weight, x.flatten(2))
        return cells.view(len(x), -1, *x.shape[2:])
