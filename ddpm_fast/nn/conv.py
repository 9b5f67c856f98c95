"""A 3x3 convolution that needs fewer multiplications."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..ops._check import needs_grad
from ..ops.conv import ConvPlan, PreparedConv3x3, conv3x3, cpu_isa, plan_conv3x3, prepare_conv3x3


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d(in_channels, out_channels, 3, padding=1)`` on the fused op, forward and backward.

    The parameters and the state dict are those of ``nn.Conv2d``. Under autocast or ``torch.compile``, in another dtype
    or on another device, and with gradients in another layout than channels_last, it is ``nn.Conv2d``, bit for bit.

    Args:
        in_channels, out_channels: C and K.
        bias: whether there is a bias of shape ``(K,)``.
    """

    # "exact", "strict", "fast" or "torch", see ddpm_fast.ops.conv3x3. A choice of the moment, not of the checkpoint.
    mode: str = "exact"
    _prepared: PreparedConv3x3 | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, device=device, dtype=dtype)

    def plan(self, input: Tensor) -> ConvPlan:
        """How ``input (N, in_channels, H, W)`` would be convolved just now, and why."""
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return ConvPlan(None, 0, "torch.compile and autocast have convolutions of their own")
        if self.weight.is_inference():
            return ConvPlan(None, 0, "the weight is an inference tensor, whose changes cannot be seen")
        if input.dim() != 4 or backends.missing["cpu"] is not None or backends.choose(input) != "cpu":
            return ConvPlan(None, 0, "the cpu backend is not the one in use")
        if needs_grad(input, self.weight, self.bias) and not input.is_contiguous(memory_format=torch.channels_last):
            return ConvPlan(None, 0, "a copy in channels_last would have to be kept for the gradient")
        return plan_conv3x3(
            self.in_channels,
            self.out_channels,
            *input.shape[2:],
            mode=self.mode,
            isa=cpu_isa(),
            dtype=input.dtype,
            device=input.device.type,
        )

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``residual + conv(input)``: ``(N, in_channels, H, W)`` -> ``(N, out_channels, H, W)``, residual's shape."""
        if self.plan(input).tile is None:
            y = super().forward(input)
            return y if residual is None else residual + y
        prepared = self._prepared
        if prepared is None or prepared.weight is not self.weight:
            self._prepared = prepared = prepare_conv3x3(self.weight)
        return conv3x3(input, prepared, self.bias, residual=residual, mode=self.mode)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a weight of its own, and a file needs none twice.
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}
