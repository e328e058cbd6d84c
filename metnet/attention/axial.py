"""`AxialAttention`: self-attention along one axis at a time (Ho et al. 2019, arXiv 1912.12180)."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from metnet.attention.lines import attend
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
        self.dim_index = channel_index("dim_index", dim_index, num_dimensions)
        permutations = calculate_permutations(num_dimensions, dim_index)
        self.dims = num_dimensions + 2
        self.dim, self.heads = dim, heads
        self.sum_axial_out = sum_axial_out
        self.axes = [permutation[-2] for permutation in permutations]
        self.axial_attentions = nn.ModuleList(
            PermuteToFrom(permutation, SelfAttention(dim, heads, dim_heads)) for permutation in permutations
        )

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
        attentions: Iterable[Any] = self.axial_attentions
        weights = [attention.fn.projections() for attention in attentions]
        if self.sum_axial_out:
            return attend(x, self.dim_index, self.axes, self.heads, weights)
        for axis, of_axis in zip(self.axes, weights, strict=True):
            x = attend(x, self.dim_index, (axis,), self.heads, [of_axis])
        return x


class PermuteToFrom(nn.Module):
    """`fn` on all lines along the dimension that `permutation` puts before the last, put back in place.

    Args:
        permutation: of all dimensions, the axis and the channels last.
        fn: takes (line, place, channel) and gives the same shape.
    """

    def __init__(self, permutation: Sequence[int], fn: nn.Module):
        super().__init__()
        self.fn: Any = fn
        self.permutation = list(permutation)
        self.inv_permutation = [self.permutation.index(n) for n in range(len(self.permutation))]

    def forward(self, x: Float[Tensor, "batch *places"], **kwargs: Any) -> Float[Tensor, "batch *places"]:
        """What `fn` makes of the lines; `kwargs` go to it."""
        lines = x.permute(self.permutation)
        mixed: Tensor = self.fn(lines.flatten(0, -3), **kwargs)
        return mixed.view(lines.shape).permute(self.inv_permutation)


def calculate_permutations(num_dimensions: int, emb_dim: int) -> list[list[int]]:
    """For each axis, ascending, the order of dimensions that puts it and the channels (`emb_dim`) last.

    Raises:
        ValueError: for no axis at all, or an `emb_dim` that names the batch or no dimension.
    """
    index = channel_index("emb_dim", emb_dim, num_dimensions)
    axes = [axis for axis in range(1, num_dimensions + 2) if axis != index]
    return [[n for n in range(num_dimensions + 2) if n not in (axis, index)] + [axis, index] for axis in axes]


def channel_index(name: str, index: int, num_dimensions: int) -> int:
    """`index`, counted from the front.

    Raises:
        ValueError: for no axis at all, or an index that names the batch or no dimension.
    """
    if num_dimensions < 1:
        raise ValueError(f"num_dimensions={num_dimensions}: expected at least 1")
    dims = num_dimensions + 2
    if not 0 < abs(index) < dims:
        raise ValueError(
            f"{name}={index}: expected 1..{dims - 1} or -{dims - 1}..-1 "
            f"for num_dimensions={num_dimensions} (0 is the batch)"
        )
    return index % dims
