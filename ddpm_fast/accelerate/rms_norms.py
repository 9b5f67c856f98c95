"""The modules that are an RMSNorm over the channels, whoever wrote them, and their forward on the fused op."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import rms_norm_silu
from .activations import computes
from .norms import FusedNorm, rows, stand_in, takes
from .patch import mark, marked

_EPS = 1e-12  # F.normalize's


class FusedRMSNorm(FusedNorm):
    """A module that was found to be `F.normalize(x, dim=1) * weight * sqrt(C)`, on the fused op."""

    def fused(
        self,
        x: Tensor,
        silu: bool = False,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor | None:
        # By name: the replicas of DataParallel have it as an attribute alone.
        weight = getattr(self, marked(self, "weight"))
        # Another dtype, and autocast, would change the dtype of the result.
        if weight is None or weight.dtype != x.dtype or weight.device != x.device:
            return None
        if not takes(self, x, weight.numel()) or torch.is_autocast_enabled(x.device.type):
            return None
        if embedding is not None:
            return self.fused(x + embedding, silu, scale, shift)
        found = rows((scale, shift), x)
        if found is None:
            return None
        scale, shift = found
        return rms_norm_silu(x, weight.flatten(), _EPS, scale, shift, "silu" if silu else None)


def why_no_rms_norm(norm: nn.Module) -> str | None:
    """Why a module cannot run on the fused op; None if it was found to compute the same, as lucidrains' RMSNorm does
    and imagen-pytorch's ChanRMSNorm."""
    other = (
        f"{type(norm).__name__} is neither a GroupNorm nor an RMSNorm over the channels: there is no fused op for it"
    )
    if type(norm).__module__.split(".")[0] == "torch":
        return other
    parameters = [p for p in norm._parameters.values() if p is not None]
    if len(parameters) != 1 or len(norm._parameters) != 1 or norm._buffers or norm._modules:
        return other
    (weight,) = parameters
    channels = weight.numel()
    if channels == 0 or max(weight.shape, default=0) != channels:
        return other
    twin = stand_in(norm)
    ours = next(iter(twin.parameters())).detach().flatten()
    generator = torch.Generator().manual_seed(1)
    dims = []
    for spatial in range(4):
        probe = torch.randn((2, channels, *(3,) * spatial), generator=generator) * 2 + 1
        probe[1] *= 1e-3  # what adds an eps of any size shows here

        def alone(x: Tensor, pixels: int = spatial) -> Tensor:
            return F.normalize(x, dim=1) * ours.reshape(-1, *(1,) * pixels) * math.sqrt(channels)

        if computes(twin.forward, alone, probe):
            dims.append(probe.dim())
    if not dims:
        return other
    mark(norm, "dims", tuple(dims))
    mark(norm, "weight", next(iter(norm._parameters)))
    return None
