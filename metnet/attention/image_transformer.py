"""`AxialImageTransformer`: axial attention and convolutions on one stream (axial_attention 0.6.1)."""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metnet.attention.multihead import SelfAttention
from metnet.attention.positions import AxialPositionalEmbedding
from metnet.attention.reversible import ReversibleSequence


class ChanLayerNorm(nn.Module):
    """`(x - mean) / (std + eps) * g + b` over the channels; `eps` stands outside the root, as published."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Float[Tensor, "batch dim y x"]) -> Float[Tensor, "batch dim y x"]:
        """The normalised map, worked out in at least float32; a pixel of equal channels gives `b`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(dim=1, keepdim=True)
        # the slope of a norm at 0 is 0 by definition, where that of the root of the variance is infinite
        std = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / math.sqrt(x.shape[1])
        return torch.addcmul(self.b, centred * (std + self.eps).reciprocal(), self.g).to(x.dtype)


class PreNorm(nn.Module):
    """LayerNorm over the channels of each place, then `fn`, then dropout."""

    def __init__(self, dim: int, fn: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "line place dim"]) -> Float[Tensor, "line place dim"]:
        """What `fn` makes of the normalised lines."""
        changed: Tensor = self.dropout(self.fn(self.norm(x)))
        return changed


class AlongAxis(nn.Module):
    """`fn` on every column (axis 2) or every row (axis 3) of a map."""

    def __init__(self, axis: int, fn: nn.Module):
        super().__init__()
        self.axis = axis
        self.fn = fn

    def forward(self, x: Float[Tensor, "batch dim y x"]) -> Float[Tensor, "batch dim y x"]:
        """The lines after `fn`, put back in place."""
        lines = x.permute(0, 3, 2, 1) if self.axis == 2 else x.permute(0, 2, 3, 1)
        changed: Tensor = self.fn(lines.flatten(0, 1)).unflatten(0, lines.shape[:2])
        return changed.permute(0, 3, 2, 1) if self.axis == 2 else changed.permute(0, 3, 1, 2)


class Sequential(nn.Module):
    """One stream; every branch of every pair reads it and adds to it."""

    def __init__(self, blocks: Sequence[nn.ModuleList]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Float[Tensor, "batch dim y x"]) -> Float[Tensor, "batch dim y x"]:
        """The stream after all branches."""
        for pair in self.blocks.children():
            for branch in pair.children():
                change: Tensor = branch(x)
                x = x + change.to(x.dtype)
        return x


class AxialImageTransformer(nn.Module):
    """Attention down the columns, attention along the rows, two convolution networks; `depth` times.

    Reversible, there are two streams, and the memory of activations does not grow with `depth`; otherwise
    there is one: another function, with its weights under other names (`reversible_keys`, `plain_keys`).

    Args:
        dim: channels that come in and go out.
        depth: how many times.
        heads: heads of each attention.
        dim_heads: channels of one head; by default `dim / heads`.
        dim_index: where the channels stand in the input; may count from the end.
        reversible: two streams that are recomputed, or one that is remembered.
        axial_pos_emb_shape: the grid (y, x) of learned positions; none without it.
        dropout: the share of what a branch adds that is dropped in training.
        interpolate: on another grid than `axial_pos_emb_shape`, stretch the positions over it.
        remember: keep the activations of the two streams, for less time and more memory.

    Raises:
        ValueError: naming the argument that cannot be.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_heads: int | None = None,
        dim_index: int = 1,
        reversible: bool = True,
        axial_pos_emb_shape: Sequence[int] | None = None,
        dropout: float = 0.0,
        interpolate: bool = False,
        remember: bool = False,
    ):
        super().__init__()
        index = dim_index + 4 if dim_index < 0 else dim_index
        if not 0 < index < 4:
            raise ValueError(f"dim_index={dim_index}: expected 1..3 or -3..-1 (0 is the batch)")
        if depth < 1:
            raise ValueError(f"depth={depth}: expected at least 1")
        if axial_pos_emb_shape is not None and len(axial_pos_emb_shape) != 2:
            raise ValueError(
                f"axial_pos_emb_shape={tuple(axial_pos_emb_shape)}: expected 2 sizes, of y and x"
            )
        self.dim = dim
        self.dim_index = index
        self.pos_emb: nn.Module = nn.Identity()
        if axial_pos_emb_shape is not None:
            self.pos_emb = AxialPositionalEmbedding(dim, axial_pos_emb_shape, index, interpolate)
        pairs = []
        for _ in range(depth):
            pairs.append(nn.ModuleList(_attention(dim, axis, heads, dim_heads, dropout) for axis in (2, 3)))
            pairs.append(nn.ModuleList(_convolutions(dim, dropout) for _ in range(2)))
        self.layers = ReversibleSequence(pairs, remember) if reversible else Sequential(pairs)

    def forward(self, x: Float[Tensor, "batch *map"]) -> Float[Tensor, "batch *map"]:
        """The map after `depth` layers.

        Raises:
            ValueError: for another number of dimensions or of channels, or a grid without positions.
        """
        if x.ndim != 4 or x.shape[self.dim_index] != self.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected 4 dimensions "
                f"with dim={self.dim} channels at dim_index={self.dim_index}"
            )
        placed = self.pos_emb(x).movedim(self.dim_index, 1)
        mixed: Tensor = self.layers(placed.contiguous(memory_format=torch.channels_last))
        return mixed.movedim(1, self.dim_index)


def _attention(dim: int, axis: int, heads: int, dim_heads: int | None, dropout: float) -> nn.Module:
    return AlongAxis(axis, PreNorm(dim, SelfAttention(dim, heads, dim_heads), dropout))


def _convolutions(dim: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        ChanLayerNorm(dim),
        nn.Conv2d(dim, 4 * dim, 3, padding=1),
        nn.LeakyReLU(inplace=True),
        nn.Conv2d(4 * dim, dim, 3, padding=1),
        nn.Dropout(dropout),
    )


def plain_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a reversible transformer under the names of one with `reversible=False`."""
    branch = {"f": "0", "g": "1"}
    pattern = re.compile(r"^(layers\.blocks\.\d+)\.([fg])\.net\.")
    return {pattern.sub(lambda m: f"{m[1]}.{branch[m[2]]}.", key): value for key, value in state.items()}


def reversible_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a transformer with `reversible=False` under the names of a reversible one."""
    branch = {"0": "f", "1": "g"}
    pattern = re.compile(r"^(layers\.blocks\.\d+)\.([01])\.(?!net\.)")
    return {pattern.sub(lambda m: f"{m[1]}.{branch[m[2]]}.net.", key): value for key, value in state.items()}
