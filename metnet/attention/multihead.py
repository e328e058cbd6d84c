"""`SelfAttention`: heads, scaled dot product, merge (Vaswani et al. 2017, arXiv 1706.03762)."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Every place of a line attends to all places of it, or to those of `kv`; no position, no residual.

    Args:
        dim: channels that come in and go out.
        heads: how many mixtures are made side by side.
        dim_heads: channels of one head; by default `dim / heads`.

    Raises:
        ValueError: for fewer than 1 of anything, or a `dim` that the heads cannot share evenly.
    """

    def __init__(self, dim: int, heads: int, dim_heads: int | None = None):
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads), ("dim_heads", dim_heads)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        if dim_heads is None and dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}, or dim_heads be given")
        self.heads = heads
        width = heads * (dim // heads if dim_heads is None else dim_heads)
        self.to_q = nn.Linear(dim, width, bias=False)
        self.to_kv = nn.Linear(dim, 2 * width, bias=False)
        self.to_out = nn.Linear(width, dim)

    def forward(
        self, x: Float[Tensor, "line place dim"], kv: Float[Tensor, "line other dim"] | None = None
    ) -> Float[Tensor, "line place dim"]:
        """The mixture of values that each place of `x` asks for, from `kv` or from `x` itself."""
        q = rearrange(self.to_q(x), "line place (head e) -> line head place e", head=self.heads)
        k, v = rearrange(
            self.to_kv(x if kv is None else kv),
            "line place (kv head e) -> kv line head place e",
            kv=2,
            head=self.heads,
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        merged: Tensor = self.to_out(rearrange(mixed, "line head place e -> line place (head e)"))
        return merged
