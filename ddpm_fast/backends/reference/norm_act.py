"""GroupNorm, scale and shift, SiLU, and their derivative.

    v = x + embedding        xhat = (v - mean) * rstd        z = (xhat * weight + bias) * (1 + scale) + shift
    y = z * sigmoid(z), or z

All of it in float64, whatever the dtypes, and rounded once: what the kernels' errors are measured against.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor


def rows_of(parameter: Tensor | None, x: Tensor, absent: float) -> Tensor:
    """A (C,) or (N, C) parameter as float64 that broadcasts against (N, C, P)."""
    if parameter is None:
        return torch.full((1, 1, 1), absent, dtype=torch.float64, device=x.device)
    return parameter.double().reshape(-1, x.shape[1], 1)


def _groups(v: Tensor, num_groups: int) -> Tensor:
    return v.reshape(v.shape[0], num_groups, -1)


def norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    embedding: Tensor | None,
    eps: float,
    activation: int,
    out: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Writes y (N, C, *) to `out` and, where given, the statistics (N, G) of the groups, in float64."""
    if x.numel() == 0:
        return
    v = x.double().reshape(*x.shape[:2], -1) + rows_of(embedding, x, 0)
    group_variance, group_mean = torch.var_mean(_groups(v, num_groups), dim=2, correction=0)
    group_rstd = (group_variance + eps).rsqrt()
    xhat = ((_groups(v, num_groups) - group_mean.unsqueeze(2)) * group_rstd.unsqueeze(2)).reshape(v.shape)
    z = xhat * rows_of(weight, x, 1) + rows_of(bias, x, 0)
    z = z * (1 + rows_of(scale, x, 0)) + rows_of(shift, x, 0)
    out.copy_((torch.nn.functional.silu(z) if activation else z).reshape(x.shape))
    if mean is not None:
        mean.copy_(group_mean)
    if rstd is not None:
        rstd.copy_(group_rstd)


def norm_act_backward(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    embedding: Tensor | None,
    activation: int,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_scale: Tensor | None,
    grad_shift: Tensor | None,
    grad_embedding: Tensor | None,
) -> None:
    """Writes the gradients that are given: like x, (C,) for weight and bias, (N, C) for the others."""
    parameters = (grad_weight, grad_bias, grad_scale, grad_shift, grad_embedding)
    if x.numel() == 0:
        for gradient in parameters:
            if gradient is not None:
                gradient.zero_()
        return
    grouped, row = partial(_groups, num_groups=num_groups), partial(rows_of, x=x)
    v = x.double().reshape(*x.shape[:2], -1) + row(embedding, absent=0)
    xhat = ((grouped(v) - mean.double().unsqueeze(2)) * rstd.double().unsqueeze(2)).reshape(v.shape)
    w, b, one_plus_scale = row(weight, absent=1), row(bias, absent=0), 1 + row(scale, absent=0)
    grad_z = grad_out.double().reshape(v.shape)
    if activation:
        z = (xhat * w + b) * one_plus_scale + row(shift, absent=0)
        sigmoid = torch.sigmoid(z)
        grad_z = grad_z * (sigmoid * (1 + z * (1 - sigmoid)))
    sums, products = grad_z.sum(2, keepdim=True), (grad_z * xhat).sum(2, keepdim=True)  # (N, C, 1)
    if grad_weight is not None:
        grad_weight.copy_((products * one_plus_scale).sum((0, 2)))
    if grad_bias is not None:
        grad_bias.copy_((sums * one_plus_scale).sum((0, 2)))
    if grad_scale is not None:
        grad_scale.copy_((w * products + b * sums).squeeze(2))
    if grad_shift is not None:
        grad_shift.copy_(sums.squeeze(2))
    if grad_x is None and grad_embedding is None:
        return
    grad_xhat = grad_z * (w * one_plus_scale)
    along_mean = grouped(grad_xhat).mean(2, keepdim=True)
    along_xhat = (grouped(grad_xhat) * grouped(xhat)).mean(2, keepdim=True)
    grad_v = (grouped(grad_xhat) - along_mean - grouped(xhat) * along_xhat) * rstd.double().unsqueeze(2)
    grad_v = grad_v.reshape(v.shape)
    if grad_x is not None:
        grad_x.copy_(grad_v.reshape(x.shape))
    if grad_embedding is not None:
        grad_embedding.copy_(grad_v.sum(2))
