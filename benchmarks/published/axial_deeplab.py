"""Axial-DeepLab's position-sensitive layer as published (Wang et al. 2020, arXiv 2003.07853)."""

import math

import torch
from torch import Tensor, nn


class PositionSensitive(nn.Module):
    """Content, query and key scores along one axis, all kept: normalised together, summed, softmaxed."""

    flatten_index: Tensor

    def __init__(
        self, in_planes: int, out_planes: int, groups: int = 8, kernel_size: int = 56, width: bool = False
    ):
        super().__init__()
        self.groups, self.size, self.width = groups, kernel_size, width
        self.planes = out_planes // groups
        self.qkv_transform = nn.Conv1d(in_planes, 2 * out_planes, 1, bias=False)
        self.bn_qkv = nn.BatchNorm1d(2 * out_planes)
        self.bn_similarity = nn.BatchNorm2d(3 * groups)
        self.bn_output = nn.BatchNorm1d(2 * out_planes)
        self.relative = nn.Parameter(
            torch.randn(2 * self.planes, 2 * kernel_size - 1) / math.sqrt(self.planes)
        )
        nn.init.normal_(self.qkv_transform.weight, 0, math.sqrt(1 / in_planes))
        place = torch.arange(kernel_size)
        self.register_buffer("flatten_index", (place[:, None] - place + kernel_size - 1).flatten())

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, as wide as its table along its axis."""
        x = x.permute(0, 2, 1, 3) if self.width else x.permute(0, 3, 1, 2)
        batch, lines, channels, size = x.shape
        half = self.planes // 2
        qkv = self.bn_qkv(self.qkv_transform(x.reshape(batch * lines, channels, size)))
        parts = [half, half, self.planes]
        q, k, v = qkv.view(batch * lines, self.groups, 2 * self.planes, size).split(parts, dim=2)
        table = self.relative.index_select(1, self.flatten_index).view(2 * self.planes, self.size, self.size)
        of_q, of_k, of_v = table.split(parts, dim=0)
        scores = torch.cat(
            [
                torch.einsum("bgci,bgcj->bgij", q, k),
                torch.einsum("bgci,cij->bgij", q, of_q),
                torch.einsum("bgcj,cji->bgji", k, of_k).transpose(2, 3),
            ],
            dim=1,
        )
        scores = self.bn_similarity(scores).view(batch * lines, 3, self.groups, size, size).sum(dim=1)
        weight = torch.softmax(scores, dim=3)
        content = torch.einsum("bgij,bgcj->bgci", weight, v)
        place = torch.einsum("bgij,cij->bgci", weight, of_v)
        both = torch.cat([content, place], dim=-1).view(batch * lines, -1, size)
        out = self.bn_output(both).view(batch, lines, -1, 2, size).sum(dim=-2)
        return out.permute(0, 2, 1, 3) if self.width else out.permute(0, 2, 3, 1)
