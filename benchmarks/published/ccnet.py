"""CCNet's criss-cross attention as published in pure PyTorch (Huang et al. 2019, arXiv 1811.11721)."""

import torch
from torch import Tensor, nn


class CrissCross(nn.Module):
    """Scores of the column and of the row, the centre masked in the column, one softmax over both."""

    def __init__(self, in_dim: int):
        super().__init__()
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """`gamma * attended + x`, every step a tensor of its own."""
        batch, _, height, width = x.shape
        query, key, value = self.query_conv(x), self.key_conv(x), self.value_conv(x)

        def columns(t: Tensor) -> Tensor:
            return t.permute(0, 3, 1, 2).contiguous().view(batch * width, -1, height)

        def rows(t: Tensor) -> Tensor:
            return t.permute(0, 2, 1, 3).contiguous().view(batch * height, -1, width)

        centre = -torch.diag(torch.full((height,), float("inf"), device=x.device, dtype=x.dtype))
        down = torch.bmm(columns(query).permute(0, 2, 1), columns(key))
        down = down + centre.unsqueeze(0).repeat(batch * width, 1, 1)
        down = down.view(batch, width, height, height).permute(0, 2, 1, 3)
        along = torch.bmm(rows(query).permute(0, 2, 1), rows(key)).view(batch, height, width, width)
        weight = torch.softmax(torch.cat([down, along], 3), 3)
        down = weight[..., :height].permute(0, 2, 1, 3).contiguous().view(batch * width, height, height)
        along = weight[..., height:].contiguous().view(batch * height, width, width)
        from_column = torch.bmm(columns(value), down.permute(0, 2, 1)).view(batch, width, -1, height)
        from_row = torch.bmm(rows(value), along.permute(0, 2, 1)).view(batch, height, -1, width)
        attended = from_column.permute(0, 2, 3, 1) + from_row.permute(0, 2, 1, 3)
        result: Tensor = self.gamma * attended + x
        return result
