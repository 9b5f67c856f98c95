"""A network for the comparisons of whole loops."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A small convolutional network, bounded, that takes t, a condition and the last x0 into account."""

    self_condition = False

    def __init__(self, channels: int = 3, outputs: int = 1, self_condition: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.channels, self.out_dim, self.self_condition = channels, channels * outputs, self_condition
        self.first = nn.Conv2d(channels * (2 if self_condition else 1), 8, 3, padding=1)
        self.last = nn.Conv2d(8, channels * outputs, 3, padding=1)
        self.time = nn.Linear(1, 8)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        time = self.time(t.reshape(-1, 1).float() / 1000)[:, :, None, None]
        if y is not None:
            time = time + y.reshape(-1, 1, 1, 1) * 0.25
        if self.self_condition:
            x = torch.cat([torch.zeros_like(x) if x_self_cond is None else x_self_cond, x], dim=1)
        return self.last(torch.nn.functional.silu(self.first(x) + time))
