"""`Surroundings`: the wide context beside the fine centre (the two scales of MetNet, arXiv 2003.12140)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from metnet.attention.positions import AxialPositionalEmbedding
from metnet.attention.residual import ResidualBlock
from metnet.batch import Batch
from metnet.conv_lstm import ConvLSTM
from metnet.downsampler import Downsampler
from metnet.scaling import RainScaling

DEPTH = 2  # blocks: enough for attention along rows and columns to reach from any cell to any other


class Surroundings(nn.Module):
    """Coarse frames far beyond the centre: encoded, mixed, and brought onto the cells of the centre.

    They go through a downsampler, a memory and attention of their own, at their own resolution, so that what
    is far away has reached the centre before the rest is cut off. Then the middle is laid, bilinearly, over
    the very cells it belongs to.

    Args:
        factor: cells of the fine grid along a side of a coarse one.
        channels: width.
        attention: makes the attention of one block from its channels.
        grid: rows and columns the positions are learned on.
    """

    def __init__(
        self, factor: int, channels: int, attention: Callable[[int], nn.Module], grid: Sequence[int]
    ):
        super().__init__()
        self.factor = factor
        self.scaling = RainScaling()
        self.downsampler = Downsampler(self.scaling.channels, channels)
        self.memory = ConvLSTM(channels, channels)
        self.positions = AxialPositionalEmbedding(channels, tuple(grid), interpolate=True, scale=0.02)
        self.blocks = nn.ModuleList([ResidualBlock(attention(channels), channels, 1) for _ in range(DEPTH)])
        self.rise = nn.Conv2d(channels, channels, 1)

    def forward(self, batch: Batch) -> Float[Tensor, "batch channel rows columns"]:
        """What the surroundings say, on cells of 4 x 4 pixels of the grid of `batch.radar`.

        Raises:
            ValueError: if the batch has no surroundings, or these do not reach over the grid.
        """
        wide = batch.surroundings
        if wide is None:
            raise ValueError(
                "the batch has no surroundings: this network was made to see them, "
                f"rain at the times of its frames in means over {self.factor} x {self.factor} cells"
            )
        size, covered = tuple(batch.radar.shape[2:]), [side * self.factor for side in wide.shape[2:]]
        if any(whole < part for whole, part in zip(covered, size, strict=True)):
            raise ValueError(
                f"the surroundings are {covered[0]} x {covered[1]} cells of the fine grid: "
                f"expected at least the {size[0]} x {size[1]} of the batch, in whose middle they lie"
            )
        down, right = (-side % Downsampler.factor for side in wide.shape[2:])
        seen = self.scaling(F.pad(wide, (0, right, 0, down), value=torch.nan), batch.age)
        small = self.downsampler(rearrange(seen, "batch time channel y x -> (batch time) channel y x"))
        memory = self.memory(rearrange(small, "(batch time) c y x -> batch time c y x", time=seen.shape[1]))
        field = self.positions(memory)
        told = field.new_ones(len(field), 1)
        for block in self.blocks:
            field = block(field, told)
        y, x = (
            self._places(size[axis], wide.shape[2 + axis], field.shape[2 + axis]).to(wide.device)
            for axis in (0, 1)
        )
        place = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).expand(len(field), -1, -1, -1)
        risen = self.rise(field).to(place.dtype)  # places in half precision would be off by cells
        return F.grid_sample(risen, place, padding_mode="border", align_corners=False).to(field.dtype)

    def _places(self, size: int, wide: int, cells: int) -> Float[Tensor, "place"]:
        """Where along an axis the centre's cells of 4 pixels lie on the wide map, -1 to 1 from edge to edge.

        Args:
            size: pixels of the centre.
            wide: coarse pixels of the surroundings, before these were filled up.
            cells: cells of the map they became, of 4 coarse pixels each.
        """
        pixel = 4.0 * torch.arange(-(-size // 4)) + 2.0 - size / 2  # from the common middle
        coarse = pixel / self.factor + wide / 2
        return coarse / 4 / cells * 2 - 1
