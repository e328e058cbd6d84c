"""`LeadTimeEmbedding`, `FiLM`: how far ahead, told to every block (MetNet-2, arXiv 2111.07470)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

SHORTEST, LONGEST = 8.0, 2048.0  # minutes; the periods of the waves that spell a lead time


class LeadTimeEmbedding(nn.Module):
    """Minutes ahead -> features, for any lead time and not only the trained ones.

    A ramp and waves of periods from 8 minutes to 34 hours, through two dense layers.
    """

    periods: Tensor

    def __init__(self, features: int, waves: int = 9):
        super().__init__()
        self.features = features
        periods = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), waves)
        self.register_buffer("periods", periods)
        self.dense = nn.Sequential(
            nn.Linear(2 * waves + 1, features), nn.GELU(), nn.Linear(features, features), nn.GELU()
        )

    def forward(self, lead_time: Float[Tensor, "lead"]) -> Float[Tensor, "lead feature"]:
        """The features of lead times in minutes."""
        phase = 2 * math.pi * lead_time[:, None] / self.periods
        told: Tensor = self.dense(torch.cat([lead_time[:, None] / 60, phase.sin(), phase.cos()], dim=1))
        return told


class FiLM(nn.Module):
    """Each channel scaled and shifted by what is told; starts as the identity (arXiv 2306.06079)."""

    def __init__(self, features: int, channels: int):
        super().__init__()
        self.dense = nn.Linear(features, 2 * channels)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(
        self, x: Float[Tensor, "sample channel y x"], told: Float[Tensor, "sample feature"]
    ) -> Float[Tensor, "sample channel y x"]:
        """`x * (1 + scale) + shift`, with both made from `told`."""
        scale, shift = torch.chunk(self.dense(told)[:, :, None, None], 2, dim=1)
        return x * (1 + scale) + shift
