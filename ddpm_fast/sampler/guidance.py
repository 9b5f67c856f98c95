"""Classifier-free guidance outside the kernel, where something has to be done with the mixture."""

from __future__ import annotations

import torch
from torch import Tensor


def mixed(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float) -> Tensor:
    """``u + scale * (c - u)``, and of it the part `rescale` brought to the standard deviation of c.

    Ho, Salimans, "Classifier-Free Diffusion Guidance" (2022), eq. 6; Lin, Liu, Li, Yang, "Common Diffusion
    Noise Schedules and Sample Steps are Flawed" (2024), section 3.4.

    Args:
        conditional, unconditional: ``(N, C, *)`` in any floating-point dtype.
        scale: w.
        rescale: phi in [0, 1].

    Returns:
        float32 ``(N, C, *)``.
    """
    c, u = conditional.float(), unconditional.float()
    e = u + scale * (c - u)
    if rescale == 0.0:
        return e
    dims = list(range(1, c.dim()))
    wanted, found = torch.std(c, dims, keepdim=True), torch.std(e, dims, keepdim=True)
    return rescale * (e * (wanted / found)) + (1 - rescale) * e
