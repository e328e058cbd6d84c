"""External attention, a small memory that every place reads (EANet: Guo et al. 2021, arXiv 2105.02358)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metnet.attention.lines import nothing


class ExternalAttention(nn.Module):
    """Every pixel reads the same `k` learned slots, and keeps what it was: `relu(bn(conv(read)) + x)`.

    A slot shares itself among the pixels (softmax over pixels), then a pixel takes its shares of all slots
    as parts of one (divided by their sum). That costs k scores a pixel, and knows nothing of where a pixel
    lies: a grid may have any number of axes.

    Args:
        c: channels that come in and go out.
        k: slots.
        eps: added to the sum over slots; 1e-9 repeats the published rounding, which silences pixels that
            every slot leaves for others.
        tie_init: start the values as a copy of the keys.

    Raises:
        ValueError: naming the argument, for fewer than 1 of anything, or a negative `eps`.
    """

    def __init__(self, c: int, k: int = 64, eps: float = 0.0, tie_init: bool = False):
        super().__init__()
        _check(c=c, k=k)
        _check_eps(eps)
        self.c, self.eps = c, eps
        self.conv1 = nn.Conv2d(c, c, 1)
        self.linear_0 = nn.Conv1d(c, k, 1, bias=False)
        self.linear_1 = nn.Conv1d(k, c, 1, bias=False)
        out = nn.Conv2d(c, c, 1, bias=False)
        self.conv2 = nn.Sequential(out, nn.BatchNorm2d(c))
        for weight in (self.conv1.weight, self.linear_0.weight, self.linear_1.weight, out.weight):
            nn.init.normal_(weight, 0, math.sqrt(2 / weight.shape[0]))
        if tie_init:
            with torch.no_grad():
                self.linear_1.weight.copy_(self.linear_0.weight.transpose(0, 1))

    def forward(self, x: Float[Tensor, "batch channel *grid"]) -> Float[Tensor, "batch channel *grid"]:
        """The map after reading, nowhere negative.

        The projections before and after the memory become part of it before a pixel is seen.

        Raises:
            ValueError: for other channels than `c`, or no grid.
        """
        if x.ndim < 3 or x.shape[1] != self.c:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected a batch of grids with c={self.c} channels at index 1"
            )
        if x.numel() == 0:
            return nothing(F.relu(x), self.parameters())
        pixels = x.flatten(2)
        into: Any = self.conv1
        out: Any = self.conv2[0]
        key, value = self.linear_0.weight.squeeze(-1), self.linear_1.weight.squeeze(-1)
        asked = _product(key @ into.weight.flatten(1), pixels, key @ into.bias)
        share = shares(asked, -1, -2, self.eps).to(asked.dtype)
        read = self._normed(out.weight.flatten(1) @ value, share)
        return F.relu(read + pixels).to(x.dtype).view(x.shape)

    def _normed(
        self, weight: Float[Tensor, "channel slot"], share: Float[Tensor, "batch slot pixel"]
    ) -> Float[Tensor, "batch channel pixel"]:
        """`weight @ share`, each channel normalised; what is known beforehand becomes part of the product."""
        bn: Any = self.conv2[1]
        if bn.training:
            normed: Tensor = bn(_product(weight, share).unsqueeze(-1)).squeeze(-1)
            return normed
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        return _product(weight * scale[:, None], share, bn.bias - bn.running_mean * scale)


class TokenExternalAttention(nn.Module):
    """The bare read of the memory, for tokens: no projection, no norm, no residual.

    Args:
        d_model: channels of a token.
        S: slots.
        eps: added to the sum over slots, where the division by nothing would not do.

    Raises:
        ValueError: naming the argument, for fewer than 1 of anything, or a negative `eps`.
    """

    def __init__(self, d_model: int, S: int = 64, eps: float = 0.0):
        super().__init__()
        _check(d_model=d_model, S=S)
        _check_eps(eps)
        self.eps = eps
        self.mk = nn.Linear(d_model, S, bias=False)
        self.mv = nn.Linear(S, d_model, bias=False)
        for weight in (self.mk.weight, self.mv.weight):
            nn.init.normal_(weight, 0, 0.001)

    def forward(self, queries: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token channel"]:
        """What each token reads.

        Raises:
            ValueError: for other channels than `d_model`.
        """
        _check_tokens("queries", queries, "d_model", self.mk.in_features)
        if queries.numel() == 0:
            return nothing(queries, self.parameters())
        share = shares(self.mk(queries), -2, -1, self.eps)
        read: Tensor = self.mv(share.to(queries.dtype))
        return read


class MultiHeadExternalAttention(nn.Module):
    """The read of one memory by 4 * `num_heads` heads, on four times the channels.

    Args:
        dim: channels of a token.
        num_heads: heads for each `dim` channels.
        qkv_bias: must be False; the projection that comes in has a bias, as published, and there is no other.
        qk_scale: the scores are multiplied by it; None: they are not.
        attn_drop: dropout on the shares.
        proj_drop: dropout on what goes out.
        S: slots.
        eps: added to the sum over slots; 1e-9 repeats the published rounding.

    Raises:
        ValueError: naming the argument, for fewer than 1 of anything, a `dim` that the heads cannot share, a
            `qkv_bias`, or a negative `eps`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        S: int = 64,
        eps: float = 0.0,
    ):
        super().__init__()
        _check(dim=dim, num_heads=num_heads, S=S)
        _check_eps(eps)
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        if qkv_bias:
            raise ValueError(
                f"qkv_bias={qkv_bias}: expected False; trans_dims always has a bias, and there is no other"
            )
        self.heads, self.eps = 4 * num_heads, eps
        self.scale = 1.0 if qk_scale is None else qk_scale
        self.trans_dims = nn.Linear(dim, 4 * dim)
        self.linear_0 = nn.Linear(dim // num_heads, S)
        self.linear_1 = nn.Linear(S, dim // num_heads)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(4 * dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token channel"]:
        """What each token reads.

        Raises:
            ValueError: for other channels than `dim`.
        """
        _check_tokens("x", x, "dim", self.trans_dims.in_features)
        if x.numel() == 0:
            return nothing(x, self.parameters())
        wide = torch.unflatten(self.trans_dims(x), -1, (self.heads, -1))
        asked = self.linear_0(wide) * self.scale
        share = self.attn_drop(shares(asked, 1, -1, self.eps).to(wide.dtype))
        read: Tensor = self.proj_drop(self.proj(self.linear_1(share).flatten(2)))
        return read


def shares(asked: Tensor, over_places: int, over_slots: int, eps: float = 0.0) -> Tensor:
    """Double normalisation: softmax over places, then parts of one (or of one and `eps`) over slots.

    Both in logarithms, where a place that every slot leaves for others still has parts of one.
    """
    asked = asked.to(torch.promote_types(asked.dtype, torch.float32))
    taken = asked.log_softmax(over_places)
    if not eps:
        return taken.softmax(over_slots)
    total = taken.logsumexp(over_slots, keepdim=True)
    return (taken - total.logaddexp(total.new_tensor(math.log(eps)))).exp()


def _product(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`weight @ x + bias` for every sample."""
    product = torch.bmm(weight.to(x.dtype).expand(len(x), -1, -1), x)
    return product if bias is None else product + bias[:, None].to(product.dtype)


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")


def _check_eps(eps: float) -> None:
    if eps < 0:
        raise ValueError(f"eps={eps}: expected 0 or more")


def _check_tokens(name: str, x: Tensor, of: str, channels: int) -> None:
    if x.ndim != 3 or x.shape[2] != channels:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (batch, token, {of}={channels})")
