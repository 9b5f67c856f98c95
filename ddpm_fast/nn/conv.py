"""A 3x3 convolution that needs fewer multiplications."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..ops._check import is_transformed, needs_grad
from ..ops.conv import ConvPlan, PreparedConv3x3, conv3x3, cpu_isa, plan_conv3x3, prepare_conv3x3


def plan_tensors(weight: Tensor, input: Tensor, mode: str, upsample: bool = False) -> ConvPlan:
    """How ``input (N, C, H, W)`` and a 3x3 weight would be convolved with padding 1 just now, and why."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or is_transformed():
        return ConvPlan(None, 0, "torch.compile, autocast and torch.func have convolutions of their own")
    if not _is_plain(input) or not _is_plain(weight) or weight.dtype != input.dtype or weight.device != input.device:
        return ConvPlan(None, 0, "the input or the weight is of a tensor type of its own, or they do not match")
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        return ConvPlan(None, 0, "the weight is not (K, C, 3, 3)")
    outputs, channels = weight.shape[:2]
    if input.dim() != 4 or input.shape[1] != channels:
        return ConvPlan(None, 0, f"the input is not (N, {channels}, H, W)")
    if backends.missing["cpu"] is not None or backends.forced() not in (None, "cpu"):
        return ConvPlan(None, 0, "the cpu backend is not the one in use")
    return plan_conv3x3(
        channels,
        outputs,
        *input.shape[2:],
        mode=mode,
        isa=cpu_isa(),
        dtype=input.dtype,
        device=input.device.type,
        upsample=upsample,
    )


def plan_module(conv: nn.Conv2d, input: Tensor, mode: str, upsample: bool = False) -> ConvPlan:
    """The same for a module, whose weight is kept prepared from call to call."""
    plan = plan_tensors(conv.weight, input, mode, upsample)
    if plan.tile is not None and conv.weight.is_inference():
        return ConvPlan(None, 0, "the weight is an inference tensor, whose changes cannot be seen")
    return plan


def prepared_weight(conv: nn.Conv2d, prepared: PreparedConv3x3 | None) -> PreparedConv3x3:
    """The module's weight, prepared; ``prepared`` itself as long as it is of the same parameter."""
    if prepared is None or prepared.weight is not conv.weight:
        return prepare_conv3x3(conv.weight)
    return prepared


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor or type(tensor) is nn.Parameter


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

    def plan(self, input: Tensor, upsample: bool = False) -> ConvPlan:
        """How ``input (N, in_channels, H, W)`` would be convolved just now, and why."""
        if needs_grad(input, self.weight, self.bias) and not input.is_contiguous(memory_format=torch.channels_last):
            return ConvPlan(None, 0, "a copy in channels_last would have to be kept for the gradient")
        return plan_module(self, input, self.mode, upsample)

    def forward(self, input: Tensor, residual: Tensor | None = None, upsample: bool = False) -> Tensor:
        """``residual + conv(input)``: ``(N, in_channels, H, W)`` -> ``(N, out_channels, H, W)``, residual's shape.

        With ``upsample`` the input's height and width are doubled first, each pixel repeated.
        """
        if self.plan(input, upsample).tile is None:
            y = super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest") if upsample else input)
            return y if residual is None else residual + y
        self._prepared = prepared = prepared_weight(self, self._prepared)
        return conv3x3(input, prepared, self.bias, residual=residual, upsample=upsample, mode=self.mode)
