"""How far ahead: `LeadTimeEmbedding` and `FiLM` tell every block, `LeadTimePlanes` only the input.

The first is how MetNet-2 does it (arXiv 2111.07470), the second MetNet (arXiv 2003.12140).
"""

import math
from collections.abc import Iterable

import torch
from einops import rearrange, repeat
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


class LeadTimePlanes(nn.Module):
    """One plane for each lead time there is, beside the channels of every frame: 1 all over, or 0.

    Between two planes a lead time has its share of both. The whole past must go through what follows once
    more for each lead time; blocks behind it are told the same number for all of them.

    Args:
        step: minutes from one plane's lead time to the next; the first plane stands for one step.
        count: how many planes.
    """

    features = 1

    def __init__(self, step: float, count: int):
        super().__init__()
        if not step > 0 or count < 1:
            raise ValueError(f"step={step}, count={count}: expected minutes above 0 and at least 1 plane")
        self.step, self.count = step, count

    def forward(self, lead_time: Float[Tensor, "lead"]) -> Float[Tensor, "lead feature"]:
        """What the blocks are told, which is nothing that differs."""
        return torch.ones_like(lead_time)[:, None]

    def beside(
        self, x: Float[Tensor, "batch time channel y x"], lead_time: Float[Tensor, "lead"]
    ) -> Float[Tensor, "sample time more_channel y x"]:
        """The frames with the planes of each lead time (minutes) behind their channels, all as one batch.

        Raises:
            ValueError: for a lead time before the first plane's or after the last one's.
        """
        self.check(lead_time.tolist())
        plane = torch.arange(1, self.count + 1, device=lead_time.device)
        share = (1 - (lead_time[:, None] / self.step - plane).abs()).clamp(min=0).to(x)
        batch, time, _, rows, columns = x.shape
        planes = repeat(share, "lead plane -> batch lead t plane y x", batch=batch, t=time, y=rows, x=columns)
        frames = repeat(x, "batch t c y x -> batch lead t c y x", lead=len(lead_time))
        return rearrange(torch.cat([frames, planes], dim=3), "batch lead t c y x -> (batch lead) t c y x")

    def check(self, lead_times: Iterable[float]) -> None:
        """Refuses lead times (minutes) that no plane stands for.

        Raises:
            ValueError: for one before the first plane's or after the last one's.
        """
        last = self.step * self.count
        near = 1e-6  # lead times may have come by float32
        outside = [lead for lead in lead_times if not self.step * (1 - near) <= lead <= last * (1 + near)]
        if outside:
            raise ValueError(
                f"lead times {', '.join(f'{lead:g}' for lead in outside)} min: the network's planes stand "
                f"for {self.step:g} to {last:g} min; ask for these, or train one with other planes "
                "(model.lead_time.step= and model.lead_time.count=; of MetNet1 model.step= and model.leads=)"
            )


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
        return torch.addcmul(shift, x, 1 + scale)
