"""EANet's external attention as published (Guo et al. 2021, arXiv 2105.02358), its memories untied."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


class External(nn.Module):
    """Every pixel reads the same learned slots; softmax over pixels, then shares over slots."""

    def __init__(self, c: int, slots: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 1)
        self.linear_0 = nn.Conv1d(c, slots, 1, bias=False)
        self.linear_1 = nn.Conv1d(slots, c, 1, bias=False)
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))
        for layer in (self.conv1, self.linear_0, self.linear_1, self.conv2[0]):
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / layer.weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """`relu(bn(conv(read)) + x)`."""
        batch, channels, height, width = x.shape
        asked = self.linear_0(self.conv1(x).view(batch, channels, height * width))
        weight = F.softmax(asked, dim=-1)
        weight = weight / (1e-9 + weight.sum(dim=1, keepdim=True))
        read = self.linear_1(weight).view(batch, channels, height, width)
        return F.relu(self.conv2(read) + x)
