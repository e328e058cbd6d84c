"""`ConvLSTM`: what the past frames leave in memory (Shi et al. 2015, arXiv 1506.04214, without peepholes)."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class ConvLSTM(nn.Module):
    """An LSTM whose products are convolutions; the memory starts empty.

    The convolution of the inputs does not depend on the memory: all time steps go through it in one call.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int = 3):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size={kernel_size}: expected an odd number, so that the map keeps its size"
            )
        padding = kernel_size // 2
        self.channels = channels
        self.from_input = nn.Conv2d(in_channels, 4 * channels, kernel_size, padding=padding)
        self.from_hidden = nn.Conv2d(channels, 4 * channels, kernel_size, padding=padding, bias=False)
        bias = torch.zeros(4 * channels)
        bias[channels : 2 * channels] = (
            1.0  # a forget gate that starts open lets gradients reach the oldest frame
        )
        self.from_input.bias = nn.Parameter(bias)

    def forward(self, x: Float[Tensor, "batch time in_channel y x"]) -> Float[Tensor, "batch channel y x"]:
        """The hidden state after the last time step.

        Raises:
            ValueError: if there is no time step.
        """
        return self.states(x)[0]

    def states(
        self, x: Float[Tensor, "batch time in_channel y x"]
    ) -> tuple[Float[Tensor, "batch channel y x"], Float[Tensor, "batch channel y x"]]:
        """Hidden state and cell after the last time step.

        Raises:
            ValueError: if there is no time step.
        """
        if x.shape[1] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected at least 1 time step")
        gates = self.from_input(rearrange(x, "batch time channel y x -> (batch time) channel y x"))
        steps = rearrange(gates, "(batch time) gate y x -> time batch gate y x", time=x.shape[1])
        hidden, cell = self._step(steps[0], None)
        for step in steps[1:]:
            hidden, cell = self._step(step + self.from_hidden(hidden), cell)
        return hidden, cell

    def _step(self, gates: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden state and cell after one step; i, f, o, g as in the paper, cell None is empty."""
        i, f, o, g = gates.chunk(4, dim=1)
        kept = 0 if cell is None else f.sigmoid() * cell
        cell = kept + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell
