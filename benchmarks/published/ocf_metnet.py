"""openclimatefix/metnet's `MetNet`, version 4.1.25 of PyPI (MIT), as far as its forward pass goes.

Left out is what that does not touch: other image encoders, the Hugging Face mixin, and torchvision, of which
only the centre crop is used. Module names are the published ones: a published state dict loads, and in
evaluation the forecast is then the published one's, bit for bit (seen with the wheel, at both sizes of
`benchmarks.model_speed`).
"""

import torch
import torch.nn.functional as F
from axial_attention import AxialAttention, AxialPositionalEmbedding
from torch import Tensor, nn


def centre(x: Tensor, side: int) -> Tensor:
    """The square in the middle, as torchvision's CenterCrop cuts it."""
    top, left = (round((size - side) / 2) for size in x.shape[-2:])
    return x[..., top : top + side, left : left + side]


class Preprocessor(nn.Module):
    """Satellite channels folded 2 x 2, their middle and their mean over 2 x 2; of the others the middle."""

    def __init__(self, sat_channels: int, crop_size: int):
        super().__init__()
        self.sat_channels, self.crop_size = sat_channels, crop_size

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, time, channel, y, x) to a quarter of their side."""
        satellite = F.pixel_unshuffle(x[:, :, : self.sat_channels], 2)
        other = x[:, :, self.sat_channels :]
        other = centre(centre(other, other.shape[-1] // 2), self.crop_size)
        both = [centre(satellite, self.crop_size), F.avg_pool3d(satellite, (1, 2, 2))]
        return torch.cat([*both, other], dim=2)


class DownSampler(nn.Module):
    """Four convolutions with batch norm between them and two max-pools; no other activation."""

    def __init__(self, in_channels: int, output_channels: int = 256):
        super().__init__()
        self.module = nn.Sequential(
            nn.Conv2d(in_channels, 160, 3, padding=1),
            nn.MaxPool2d((2, 2), stride=2),
            nn.Identity(),
            nn.BatchNorm2d(160),
            nn.Conv2d(160, output_channels, 3, padding=1),
            nn.BatchNorm2d(output_channels),
            nn.Conv2d(output_channels, output_channels, 3, padding=1),
            nn.BatchNorm2d(output_channels),
            nn.Conv2d(output_channels, output_channels, 3, padding=1),
            nn.MaxPool2d((2, 2), stride=2),
            nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """A quarter of the side."""
        small: Tensor = self.module(x)
        return small


class TimeDistributed(nn.Module):
    """The same module for every time step."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """All steps as one batch."""
        out = self.module(x.reshape(-1, *x.shape[2:]))
        steps: Tensor = out.view(*x.shape[:2], *out.shape[1:])
        return steps


class ConvGRUCell(nn.Module):
    """A gated recurrent unit of convolutions."""

    def __init__(self, input_dim: int, hidden_dim: int, kernel_size: int = 3):
        super().__init__()
        self.hidden_dim = hidden_dim
        pad = kernel_size // 2
        self.conv_zr = nn.Conv2d(input_dim + hidden_dim, 2 * hidden_dim, kernel_size, padding=pad)
        self.conv_h1 = nn.Conv2d(input_dim, hidden_dim, kernel_size, padding=pad)
        self.conv_h2 = nn.Conv2d(hidden_dim, hidden_dim, kernel_size, padding=pad)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """The next state."""
        z, r = torch.split(torch.sigmoid(self.conv_zr(torch.cat((x, h), dim=1))), self.hidden_dim, dim=1)
        candidate = torch.tanh(self.conv_h1(x) + r * self.conv_h2(h))
        return (1 - z) * candidate + z * h


class ConvGRU(nn.Module):
    """One layer of it, over time."""

    def __init__(self, input_dim: int, hidden_dim: int):
        super().__init__()
        self.cell_list = nn.ModuleList([ConvGRUCell(input_dim, hidden_dim)])

    def forward(self, x: Tensor) -> Tensor:
        """The state after the last step; in training a fifth of the channels is dropped in all steps."""
        if self.training:
            x = x * x.new_empty(len(x), 1, *x.shape[2:]).bernoulli_(0.8).div_(0.8)
        cell = self.cell_list[0]
        h = x.new_zeros(len(x), self.cell_list[0].get_parameter("conv_h2.bias").numel(), *x.shape[3:])
        states = []
        for step in x.unbind(dim=1):
            h = cell(step, h)
            states.append(h)
        torch.stack(states), torch.stack(states, dim=1)  # that it makes, though only the last is used
        return h


class TemporalEncoder(nn.Module):
    """Wraps the recurrence."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.rnn = ConvGRU(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """The last state."""
        last: Tensor = self.rnn(x)
        return last


class MetNet(nn.Module):
    """The whole: one lead time in a pass, as one-hot planes beside the input."""

    def __init__(
        self,
        input_channels: int,
        sat_channels: int,
        input_size: int,
        output_channels: int = 12,
        hidden_dim: int = 2048,
        num_att_layers: int = 2,
        num_att_heads: int = 16,
        forecast_steps: int = 48,
        temporal_dropout: float = 0.2,
    ):
        super().__init__()
        self.forecast_steps = forecast_steps
        self.preprocessor = Preprocessor(sat_channels, input_size)
        channels = input_channels - sat_channels + 8 * sat_channels
        self.drop = nn.Dropout(temporal_dropout)
        self.image_encoder = TimeDistributed(DownSampler(channels + forecast_steps))
        self.temporal_enc = TemporalEncoder(256, hidden_dim)
        self.position_embedding = AxialPositionalEmbedding(
            dim=hidden_dim, shape=(input_size // 4, input_size // 4)
        )
        self.temporal_agg = nn.Sequential(
            *[
                AxialAttention(dim=hidden_dim, dim_index=1, heads=num_att_heads, num_dimensions=2)
                for _ in range(num_att_layers)
            ]
        )
        self.head = nn.Conv2d(hidden_dim, output_channels, kernel_size=(1, 1))

    def forward(self, imgs: Tensor, lead_time: int = 0) -> Tensor:
        """What is forecast at lead time number `lead_time` from maps (batch, time, channel, y, x)."""
        x = self.preprocessor(imgs)
        planes = torch.eye(self.forecast_steps, dtype=torch.long, device=x.device)[lead_time]
        ones = torch.ones(1, *x.shape[3:], dtype=x.dtype, device=x.device)
        told = (planes[:, None, None] * ones).repeat(*x.shape[:2], 1, 1, 1)
        x = self.image_encoder(torch.cat([x, told], dim=2))
        state = self.temporal_enc(self.drop(x))
        forecast: Tensor = self.head(self.temporal_agg(self.position_embedding(state)))
        return forecast
