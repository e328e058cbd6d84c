"""`ResidualBlock`: a pre-norm block around any attention over a map (Xiong et al. 2020, arXiv 2002.04745)."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from metnet.lead_time import FiLM


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel, so that no pixel's scale depends on another's."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Float[Tensor, "batch channel y x"]) -> Float[Tensor, "batch channel y x"]:
        """Mean 0 and variance 1 over channels, then the learned scale and shift."""
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed


class ResidualBlock(nn.Module):
    """Attention, then a small network per pixel, each added to what it read; both are told the lead time.

    The stream itself is never normalised: a stack of any depth keeps what tells one pixel from the next.
    """

    def __init__(self, attention: nn.Module, channels: int, features: int, widening: int = 2):
        super().__init__()
        self.attention = attention
        self.before_attention = ChannelNorm(channels)
        self.before_dense = ChannelNorm(channels)
        self.tell_attention = FiLM(features, channels)
        self.tell_dense = FiLM(features, channels)
        self.widen = nn.Conv2d(channels, widening * channels, 1)
        self.around = nn.Conv2d(
            widening * channels, widening * channels, 3, padding=1, groups=widening * channels
        )
        self.narrow = nn.Conv2d(widening * channels, channels, 1)

    def forward(
        self, x: Float[Tensor, "batch channel y x"], told: Float[Tensor, "batch feature"]
    ) -> Float[Tensor, "batch channel y x"]:
        """The map after the block; `told` are the features of each map's lead time."""
        x = x + self.attention(self.tell_attention(self.before_attention(x), told))
        wide = F.gelu(self.widen(self.tell_dense(self.before_dense(x), told)))
        narrowed: Tensor = self.narrow(wide + self.around(wide))
        return x + narrowed


class BothAxes(nn.Module):
    """A layer along y, then one along x; `layer` makes them from channels in, channels out and `width`."""

    def __init__(self, channels: int, layer: Callable[..., nn.Module]):
        super().__init__()
        self.along_y = layer(channels, channels, width=False)
        self.along_x = layer(channels, channels, width=True)

    def forward(self, x: Float[Tensor, "batch channel y x"]) -> Float[Tensor, "batch channel y x"]:
        """The map after both."""
        mixed: Tensor = self.along_x(self.along_y(x))
        return mixed


class ToldTrunk(nn.Module):
    """A whole stack with norms and residuals of its own, told the lead time before it starts."""

    def __init__(self, trunk: nn.Module, channels: int, features: int):
        super().__init__()
        self.tell = FiLM(features, channels)
        self.trunk = trunk

    def forward(
        self, x: Float[Tensor, "batch channel y x"], told: Float[Tensor, "batch feature"]
    ) -> Float[Tensor, "batch channel y x"]:
        """The map after the stack; `told` are the features of each map's lead time."""
        mixed: Tensor = self.trunk(self.tell(x, told))
        return mixed
