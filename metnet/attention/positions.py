"""`AxialPositionalEmbedding`: where a place lies, one vector per axis (Ho et al. 2019, arXiv 1912.12180)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class AxialPositionalEmbedding(nn.Module):
    """Adds one learned vector per place of each axis; `dim * sum(shape)` numbers, not `dim * prod(shape)`.

    Args:
        dim: channels.
        shape: the grid the vectors are learned on.
        emb_dim_index: where the channels stand in the input; may count from the end.
        interpolate: on another grid, stretch the vectors linearly over it (exact at `shape`), not refuse it.
        scale: standard deviation of the vectors at the start; 1.0 as published, which swamps normalised
            features.

    Raises:
        ValueError: for an `emb_dim_index` that names the batch or no dimension, or fewer than 1 of anything.
    """

    def __init__(
        self,
        dim: int,
        shape: Sequence[int],
        emb_dim_index: int = 1,
        interpolate: bool = False,
        scale: float = 1.0,
    ):
        super().__init__()
        if min(dim, *shape) < 1:
            raise ValueError(f"dim={dim}, shape={tuple(shape)}: expected at least 1 of each")
        dims = len(shape) + 2
        index = emb_dim_index + dims if emb_dim_index < 0 else emb_dim_index
        if not 0 < index < dims:
            raise ValueError(
                f"emb_dim_index={emb_dim_index}: expected 1..{dims - 1} or -{dims - 1}..-1 "
                f"for a grid of {len(shape)} axes behind the batch"
            )
        self.dim = dim
        self.shape = tuple(shape)
        self.index = index
        self.interpolate = interpolate
        self.axes = [axis for axis in range(1, dims) if axis != index]
        for n, (axis, size) in enumerate(zip(self.axes, self.shape, strict=True)):
            sizes = [1] * dims
            sizes[axis], sizes[index] = size, dim
            self.register_parameter(f"param_{n}", nn.Parameter(scale * torch.randn(sizes)))

    def forward(self, x: Float[Tensor, "batch *places"]) -> Float[Tensor, "batch *places"]:
        """`x` plus the sum of its places' vectors.

        Raises:
            ValueError: for other channels, or for another grid where `interpolate` is off.
        """
        grid = tuple(x.shape[axis] for axis in self.axes if axis < x.ndim)
        if x.ndim != len(self.shape) + 2 or x.shape[self.index] != self.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected {len(self.shape) + 2} dimensions "
                f"with dim={self.dim} channels at emb_dim_index={self.index}"
            )
        if grid != self.shape and not self.interpolate:
            raise ValueError(f"x has a grid of {grid}: expected shape={self.shape}, or interpolate=True")
        for n, (axis, size) in enumerate(zip(self.axes, grid, strict=True)):
            x = x + _stretched(self.get_parameter(f"param_{n}"), axis, self.index, size)
        return x


def _stretched(vectors: Tensor, axis: int, index: int, size: int) -> Tensor:
    """The vectors along `axis` (channels at `index`), linearly interpolated to `size` places."""
    if vectors.shape[axis] == size:
        return vectors
    shape = list(vectors.shape)
    line = vectors.movedim((index, axis), (-2, -1)).reshape(1, shape[index], shape[axis])
    line = F.interpolate(line, size=size, mode="linear", align_corners=False)
    flipped = line if index < axis else line.transpose(1, 2)
    shape[axis] = size
    return flipped.reshape(shape)
