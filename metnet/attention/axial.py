"""`AxialAttention`: self-attention along one axis at a time (Ho et al. 2019, arXiv 1912.12180)."""

import torch
from einops import pack, unpack
from jaxtyping import Float
from torch import Tensor, nn

from metnet.attention.multihead import SelfAttention


class AxialAttention(nn.Module):
    """Every place attends to its own line along each axis; all other axes are batch.

    On a map of w x h that costs w·h² + h·w² scores, where attention over the whole map would cost (w·h)².
    Each axis has its own weights. Bare, as published: no residual, no norm, no position; a stack needs all
    three (`metnet/attention/residual.py`).

    Args:
        dim: channels that come in and go out.
        num_dimensions: how many axes the grid has.
        heads: heads of each axis.
        dim_heads: channels of one head; by default `dim / heads`.
        dim_index: where the channels stand in the input; may count from the end.
        sum_axial_out: the sum of all axes, each of which reads the input; or one axis after the other.

    Raises:
        ValueError: naming the argument, for a `dim_index` that names the batch or no dimension, no axis at
            all, or a `dim` that the heads cannot share.
    """

    def __init__(
        self,
        dim: int,
        num_dimensions: int = 2,
        heads: int = 8,
        dim_heads: int | None = None,
        dim_index: int = -1,
        sum_axial_out: bool = True,
    ):
        super().__init__()
        if num_dimensions < 1:
            raise ValueError(f"num_dimensions={num_dimensions}: expected at least 1")
        self.dims = num_dimensions + 2
        index = dim_index + self.dims if dim_index < 0 else dim_index
        if not 0 < index < self.dims:
            raise ValueError(
                f"dim_index={dim_index}: expected 1..{self.dims - 1} or -{self.dims - 1}..-1 "
                f"for num_dimensions={num_dimensions} (0 is the batch)"
            )
        self.dim = dim
        self.dim_index = index
        self.sum_axial_out = sum_axial_out
        self.axes = [axis for axis in range(1, self.dims) if axis != index]
        self.along = nn.ModuleList(SelfAttention(dim, heads, dim_heads) for _ in self.axes)

    def forward(self, x: Float[Tensor, "batch *places"]) -> Float[Tensor, "batch *places"]:
        """What all lines through each place say to it.

        Raises:
            ValueError: for another number of dimensions or of channels.
        """
        if x.ndim != self.dims or x.shape[self.dim_index] != self.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected {self.dims} dimensions "
                f"with dim={self.dim} channels at dim_index={self.dim_index}"
            )
        if x.numel() == 0:
            return torch.zeros_like(x)
        summed: list[Tensor] = []
        for axis, attention in zip(self.axes, self.along, strict=True):
            lines, rest = pack([x.movedim((axis, self.dim_index), (-2, -1))], "* place channel")
            mixed = unpack(attention(lines), rest, "* place channel")[0]
            mixed = mixed.movedim((-2, -1), (axis, self.dim_index))
            if self.sum_axial_out:
                summed = [summed[0] + mixed] if summed else [mixed]
            else:
                x = mixed
        return summed[0] if self.sum_axial_out else x
