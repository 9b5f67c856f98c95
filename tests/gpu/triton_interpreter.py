"""Runs every Triton kernel in Triton's own interpreter against the reference; `python -m tests.gpu.triton_interpreter`
with TRITON_INTERPRET=1. A second opinion on the kernels, from another executor than the PTX simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.backends.reference import denoise as reference_denoise
from ddpm_fast.backends.reference import noising as reference_noising
from ddpm_fast.backends.reference import norm_act as reference_norm_act
from ddpm_fast.backends.reference import quantile as reference_quantile
from ddpm_fast.backends.reference import random as reference_random
from ddpm_fast.backends.reference import rms_norm_act as reference_rms_norm_act
from ddpm_fast.backends.triton import denoise, noising, norm_act, quantile, random, rms_norm_act
from ddpm_fast.solvers import ddpm_table
from tests.ops.common import laid_out, same_bits
from tests.ops.norms import assert_close

SEED, STEP = torch.tensor([0x0123456789ABCDEF]), torch.tensor([7])

_cast = interpreter.InterpreterBuilder.cast_impl


def _rounding_cast(self: Any, value: Any, to: Any) -> Any:
    """The interpreter cuts float32 off to bfloat16 where hardware rounds to nearest even."""
    if value.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        bits = np.ascontiguousarray(value.data, dtype=np.float32).view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(value.data), np.uint16(0x7FFF), rounded), tl.bfloat16)
    return _cast(self, value, to)


interpreter.InterpreterBuilder.cast_impl = _rounding_cast


def noise(dtype: torch.dtype, layout: str) -> None:
    x0 = laid_out(torch.randn(2, 3, 5, 7).to(dtype), layout)
    got, expected = torch.empty_like(x0), torch.empty_like(x0)
    random.normal(got, SEED, None, STEP, 1)
    reference_random.normal(expected, SEED, None, STEP, 1)
    assert same_bits(got, expected)

    t, coefficients = torch.tensor([3, 900]), df.NoiseSchedule.linear(1000).noising_coefficients(torch.device("cpu"))
    for made in (True, False):
        results = []
        for module in (noising, reference_noising):
            out, z = torch.empty_like(x0), torch.empty_like(x0)
            if made:
                module.noising_random(x0, t, coefficients, SEED, None, STEP, 2, out, z)
            else:
                module.noising(x0, t, coefficients, x0.flip(0), out)
            results.append(out)
        assert same_bits(*results)


def step(dtype: torch.dtype, layout: str) -> None:
    x_t = laid_out(torch.randn(2, 3, 5, 7), layout)
    output = laid_out(torch.randn(2, 6, 5, 7).to(dtype), layout)
    rows = ddpm_table(df.NoiseSchedule.linear(100), variance="learned_range", guidance_scale=2.0).rows
    index, results = torch.tensor([5, 99]), []
    for module in (denoise, reference_denoise):
        out, x0 = torch.empty_like(x_t), torch.empty_like(x_t)
        module.denoise(
            x_t,
            output,
            output.flip(0),
            rows,
            index,
            0,
            2,
            -1.0,
            1.0,
            None,
            None,
            SEED,
            None,
            1,
            out,
            x0,
        )
        results.append((out, x0))
    assert same_bits(results[0][0], results[1][0])
    assert same_bits(results[0][1], results[1][1])


def group_norm(dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    x, grad = (laid_out(torch.randn(shape).to(dtype), layout) for _ in range(2))
    row = [torch.randn(shape[1]) for _ in range(2)]
    rows = [torch.randn(shape[:2]).to(dtype) for _ in range(3)]
    results: list[list[Tensor]] = []
    for module, precision in ((norm_act, dtype), (reference_norm_act, torch.float64)):
        out, grad_x = torch.empty_like(x, dtype=precision), torch.empty_like(x, dtype=precision)
        mean = torch.empty(shape[0], 2, dtype=torch.float64)
        rstd = torch.empty_like(mean)
        module.norm_act(x, 2, *row, *rows, 1e-5, 1, out, mean, rstd)
        gradients = [torch.empty(t.shape) for t in (*row, *rows)]
        module.norm_act_backward(grad, x, mean, rstd, 2, *row, *rows, 1, grad_x, *gradients)
        results.append([out, grad_x, *gradients[:4]])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected.double(), relative=1e-5)


def rms_norm(dtype: torch.dtype, layout: str) -> None:
    x, grad = (laid_out(torch.randn(2, 12, 5, 7).to(dtype), layout) for _ in range(2))
    weight, rows = torch.randn(12), [torch.randn(2, 12).to(dtype) for _ in range(2)]
    results: list[list[Tensor]] = []
    for module, precision in ((rms_norm_act, dtype), (reference_rms_norm_act, torch.float64)):
        out, grad_x = torch.empty_like(x, dtype=precision), torch.empty_like(x, dtype=precision)
        rrms, gradients = torch.empty(2, 35), [torch.empty(t.shape) for t in (weight, *rows)]
        module.rms_norm_act(x, weight, *rows, 1e-12, 1, out, rrms)
        module.rms_norm_act_backward(grad, x, rrms, weight, *rows, 1e-12, 1, grad_x, *gradients)
        results.append([out, grad_x, *gradients])
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected.double(), relative=1e-5)


def select() -> None:
    x = torch.randn(2, 1000)
    for alone in (1 << 16, 0):
        quantile._ALONE, quantile._BLOCK, quantile._CHUNK = alone, 256, 600
        got, expected = torch.empty(2), torch.empty(2)
        quantile.abs_quantile(x, 0.9, got)
        reference_quantile.abs_quantile(x, 0.9, expected)
        assert same_bits(got, expected)


def main() -> None:
    torch.manual_seed(0)
    select()
    for dtype, layout in (
        (torch.float32, "contiguous"),
        (torch.float16, "channels_last"),
        (torch.bfloat16, "contiguous"),
    ):
        noise(dtype, layout)
        step(dtype, layout)
        rms_norm(dtype, layout)
        group_norm(dtype, layout, (2, 12, 5, 7))
        group_norm(dtype, layout, (1, 6, 80, 90))
    print("all agree")


if __name__ == "__main__":
    main()
