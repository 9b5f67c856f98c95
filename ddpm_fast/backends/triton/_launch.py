"""The one place where kernels are launched, so that tests can execute everything around them without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, fp_fusion: bool = False, **constexprs: Any
) -> None:
    """Runs a `triton.jit` function on the device of its first tensor.

    Args:
        kernel: the function.
        grid: the number of programs.
        args: its run-time arguments in order; None for a tensor that is not there.
        num_warps: warps a program.
        fp_fusion: whether a multiplication and an addition may become one operation. Noise and steps promise bits,
            and so forbid it.
        constexprs: its compile-time arguments.
    """
    device = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(device):  # Triton launches on the current device, whatever the tensors' is
        kernel[grid](*args, num_warps=num_warps, enable_fp_fusion=fp_fusion, **constexprs)
