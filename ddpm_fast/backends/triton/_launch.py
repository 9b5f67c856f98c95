"""The one place where kernels are launched, so that tests can execute everything around them without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constexprs: Any) -> None:
    """Runs a `triton.jit` function on the device of its first tensor.

    Args:
        kernel: the function.
        grid: the number of programs.
        args: its run-time arguments in order; None for a tensor that is not there.
        num_warps: warps a program.
        constexprs: its compile-time arguments.

    Multiplications and additions are never fused unless a kernel asks for it by `tl.fma`. Noise and steps promise
    bits; and in a reduction, whose threads exchange values and write the same sum to the same place, fusing makes those
    sums differ in their last bits and leaves to chance which of them is read.
    """
    device = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(device):  # Triton launches on the current device, whatever the tensors' is
        kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=False, **constexprs)
