"""RMSNorm over the channels of each pixel, scale and shift, SiLU, and their derivative.

    r = sqrt(C) / max(|x|, eps)        z = x * r * weight * (1 + scale) + shift        y = z * sigmoid(z), or z

where |x| is the Euclidean norm over the C channels of a pixel. All of it in float64, whatever the dtypes, and rounded
once: what the kernels' errors are measured against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast.backends.reference.norm_act import rows_of


def rms_norm_act(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: int,
    out: Tensor,
    rrms: Tensor | None,
) -> None:
    """Writes y (N, C, *) to `out` and, where given, r (N, P) of the pixels to `rrms`."""
    if x.numel() == 0:
        return
    v = x.double().reshape(*x.shape[:2], -1)
    r = math.sqrt(x.shape[1]) / v.norm(dim=1).clamp(min=eps)
    z = v * r.unsqueeze(1) * (rows_of(weight, x, 1) * (1 + rows_of(scale, x, 0))) + rows_of(shift, x, 0)
    out.copy_((torch.nn.functional.silu(z) if activation else z).reshape(x.shape))
    if rrms is not None:
        rrms.copy_(r)


def rms_norm_act_backward(
    grad_out: Tensor,
    x: Tensor,
    rrms: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: int,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_scale: Tensor | None,
    grad_shift: Tensor | None,
) -> None:
    """Writes the gradients that are given: like x, (C,) for weight, (N, C) for the others."""
    if x.numel() == 0:
        for gradient in (grad_weight, grad_scale, grad_shift):
            if gradient is not None:
                gradient.zero_()
        return
    v = x.double().reshape(*x.shape[:2], -1)
    r = rrms.double().unsqueeze(1)
    w, one_plus_scale = rows_of(weight, x, 1), 1 + rows_of(scale, x, 0)
    xhat = v * r
    grad_z = grad_out.double().reshape(v.shape)
    if activation:
        z = xhat * w * one_plus_scale + rows_of(shift, x, 0)
        sigmoid = torch.sigmoid(z)
        grad_z = grad_z * (sigmoid * (1 + z * (1 - sigmoid)))
    products = (grad_z * xhat).sum(2, keepdim=True)
    if grad_weight is not None:
        grad_weight.copy_((products * one_plus_scale).sum((0, 2)))
    if grad_scale is not None:
        grad_scale.copy_((products * w).squeeze(2))
    if grad_shift is not None:
        grad_shift.copy_(grad_z.sum(2))
    if grad_x is not None:
        grad_xhat = grad_z * (w * one_plus_scale)
        # Where |x| is below eps, r is a constant.
        along = torch.where(v.norm(dim=1, keepdim=True) < eps, 0, (grad_xhat * xhat).mean(1, keepdim=True))
        grad_x.copy_(((grad_xhat - xhat * along) * r).reshape(x.shape))
