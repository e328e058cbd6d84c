"""`SelfAttention`: heads, scaled dot product, merge (Vaswani et al. 2017, arXiv 1706.03762)."""

from jaxtyping import Float
from torch import Tensor, nn

from metnet.attention.lines import Projections, attend, mixture, nothing


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
        self, x: Float[Tensor, "line place dim"], kv: Float[Tensor, "kv_line other kv_dim"] | None = None
    ) -> Float[Tensor, "line place dim"]:
        """The mixture of values that each place of `x` asks for, from `kv` or from `x` itself.

        Raises:
            ValueError: for other channels than `dim`, or a `kv` of other lines or without a place.
        """
        self._check("x", x)
        if kv is None:
            return attend(x, 2, (1,), self.heads, [self.projections()])
        self._check("kv", kv)
        if len(kv) != len(x) or (x.numel() and not kv.shape[1]):
            raise ValueError(
                f"kv has shape {tuple(kv.shape)}: expected the {len(x)} lines of x, "
                "and at least 1 place to attend to"
            )
        if x.numel() == 0:
            return nothing(x, (kv, *self.parameters()))
        k, v = self.to_kv(kv).chunk(2, dim=-1)
        merged: Tensor = self.to_out(mixture(self.to_q(x), k, v, self.heads))
        return merged

    def projections(self) -> Projections:
        """The weights, as `attend` takes them."""
        return Projections(self.to_q.weight, self.to_kv.weight, self.to_out.weight, self.to_out.bias)

    def _check(self, name: str, lines: Tensor) -> None:
        dim = self.to_q.in_features
        if lines.ndim != 3 or lines.shape[2] != dim:
            raise ValueError(f"{name} has shape {tuple(lines.shape)}: expected (line, place, dim={dim})")
