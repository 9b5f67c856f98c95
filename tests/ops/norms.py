"""What the tests of the norms share."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The layout at any number of dimensions, in which channels_last is (N, *, C) in memory."""
    return x.contiguous() if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def is_laid_out(x: Tensor, layout: str) -> bool:
    return (x if layout == "contiguous" else x.movedim(1, -1)).is_contiguous()


def assert_close(got: Tensor, expected: Tensor, relative: float = 3e-6, of: str = "y") -> None:
    """Within `relative` of the largest element, the arithmetic's error, and half a unit of the last place of the
    dtype, the final rounding's."""
    assert got.shape == expected.shape
    allowed = relative * expected.abs().max() + expected.abs() * torch.finfo(got.dtype).eps / 2
    allowed = allowed + torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    error = (got.double() - expected).abs()
    assert bool((error <= allowed).all()), f"{of}: error {error.max():.3e} of {expected.abs().max():.3e}"


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
