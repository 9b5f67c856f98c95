"""What the Triton kernels are compiled to: no spills, 128-bit accesses, and where bits are promised only operations
that round by themselves; for three NVIDIA architectures and two of AMD's."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_fast.backends.triton import denoise, noising, norm_act, quantile, random, rms_norm_act
from tests.gpu import gates
from tests.gpu.ptx import sass
from tests.gpu.triton_runs import ARCHITECTURES, Call, recorded
from tests.ops.norms import laid_out

SEED, STEP = torch.tensor([1]), torch.tensor([0])
IMAGE = (1, 4, 16, 16)


def image(layout: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = IMAGE) -> Tensor:
    return laid_out(torch.empty(shape, dtype=dtype), layout)


def draw(layout: str, dtype: torch.dtype) -> None:
    random.normal(image(layout, dtype), SEED, None, STEP, 1)


def noise(layout: str, dtype: torch.dtype) -> None:
    x0 = image(layout, dtype)
    noising.noising_random(x0, STEP, torch.empty(9, 2), SEED, None, STEP, 2, torch.empty_like(x0), torch.empty_like(x0))


def step(layout: str, dtype: torch.dtype, learned: bool) -> None:
    x_t = image(layout)
    output = image(layout, dtype, (1, 8, 16, 16) if learned else IMAGE)
    unconditional = output if learned else None
    variance = 2 if learned else 0
    out = torch.empty_like(x_t)
    denoise.denoise(
        x_t,
        output,
        unconditional,
        torch.empty(9, 8),
        STEP,
        0,
        variance,
        -1.0,
        1.0,
        None,
        None,
        SEED,
        None,
        1,
        out,
        None,
    )


def norm(layout: str, dtype: torch.dtype, shape: tuple[int, ...], groups: int, backward: bool) -> None:
    x = image(layout, dtype, shape)
    row, rows = torch.empty(shape[1]), torch.empty(shape[:2])
    statistics = torch.empty(shape[0], groups, dtype=torch.float64)
    if backward:
        norm_act.norm_act_backward(
            x, x, statistics, statistics, groups, row, row, rows, rows, rows, 1, x.clone(), row, row, rows, rows, rows
        )
    else:
        norm_act.norm_act(x, groups, row, row, rows, rows, rows, 1e-5, 1, x.clone(), statistics, statistics)


def rms_norm(layout: str, dtype: torch.dtype, backward: bool) -> None:
    x = image(layout, dtype, (1, 64, 16, 16))
    row, rows, rrms = torch.empty(64), torch.empty(1, 64), torch.empty(1, 256)
    if backward:
        rms_norm_act.rms_norm_act_backward(x, x, rrms, row, rows, rows, 1e-12, 1, x.clone(), row, rows, rows)
    else:
        rms_norm_act.rms_norm_act(x, row, rows, rows, 1e-12, 1, x.clone(), rrms)


def select(size: int) -> None:
    quantile.abs_quantile(torch.empty(1, size), 0.995, torch.empty(1))


EXACT: dict[str, Callable[[], Any]] = {
    "normal-contiguous-float32": lambda: draw("contiguous", torch.float32),
    "normal-channels_last-bfloat16": lambda: draw("channels_last", torch.bfloat16),
    "noising-channels_last-float32": lambda: noise("channels_last", torch.float32),
    "noising-contiguous-bfloat16": lambda: noise("contiguous", torch.bfloat16),
    "denoise-contiguous-float32": lambda: step("contiguous", torch.float32, learned=False),
    "denoise-channels_last-float32": lambda: step("channels_last", torch.float32, learned=False),
    "denoise-contiguous-bfloat16-learned": lambda: step("contiguous", torch.bfloat16, learned=True),
}
SHARED: dict[str, Callable[[], Any]] = {
    "norm_act-once-contiguous-float32": lambda: norm("contiguous", torch.float32, (1, 64, 32, 32), 8, False),
    "norm_act-once-channels_last-bfloat16": lambda: norm("channels_last", torch.bfloat16, (1, 64, 16, 16), 16, False),
    "norm_act-cut-channels_last-float16": lambda: norm("channels_last", torch.float16, (1, 64, 64, 64), 2, False),
    "norm_act-backward-once-contiguous-float32": lambda: norm("contiguous", torch.float32, (1, 64, 32, 32), 8, True),
    "norm_act-backward-cut-channels_last-bfloat16": lambda: norm(
        "channels_last", torch.bfloat16, (1, 64, 64, 64), 2, True
    ),
    "rms_norm_act-channels_last-float32": lambda: rms_norm("channels_last", torch.float32, False),
    "rms_norm_act-backward-contiguous-float16": lambda: rms_norm("contiguous", torch.float16, True),
    "abs_quantile": lambda: select(1 << 15),
    "abs_quantile-shared-out": lambda: select(1 << 20),
}
CASES = EXACT | SHARED

# Kernels that work on (N, C) values or on partial results read and write what is far less than an image.
_SMALL = re.compile("combine|sum_over_samples|interpolate|quantile|digits|next_and_largest|channel_(moments|sums)")


@lru_cache
def calls(case: str) -> list[Call]:
    with recorded() as launched:
        CASES[case]()
    assert launched
    return launched


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", [90, *(pytest.param(t, marks=pytest.mark.slow) for t in (80, 120))])
def test_no_spills_and_whole_vectors(target: int, case: str, tmp_path: Path) -> None:
    for call in calls(case):
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(call.compiled(target).asm["cubin"])
        gates.assert_no_spills(cubin)
        ((name, code),) = sass.sass(cubin).items()
        threads = 32 * call.keywords["num_warps"]
        registers = sass.res(cubin)[name]["reg"]
        assert registers * threads <= 65536, "not even one block fits"
        # Noise and steps fill a multiprocessor; norms hold their values in registers, and so fill half of one.
        assert registers <= (64 if case in EXACT else 128), f"{name}: {registers} registers"
        if not _SMALL.search(name):
            gates.assert_vector_accesses(code, loads="normal" not in name)


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_operation_of_noise_and_steps_is_rounded_on_its_own(target: int, case: str) -> None:
    for call in calls(case):
        ptx = call.compiled(target).asm["ptx"]
        gates.assert_rounded_operations(ptx)
        assert "mul.rn.f32" in ptx


@pytest.mark.parametrize("case", ["normal-contiguous-float32", "normal-channels_last-bfloat16"])
def test_one_block_of_words_serves_four_elements(case: str) -> None:
    """Ten rounds of two widening multiplications for a block; a warp's words but the block's number are constant."""
    for call in calls(case):
        blocks = call.keywords["BLOCK"] // (4 * 32 * call.keywords["num_warps"])
        assert call.compiled(90).asm["ptx"].count("mul.wide.u32") <= 20 * blocks


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["gfx942", pytest.param("gfx1100", marks=pytest.mark.slow)])
def test_amd_gpus_spill_nothing_either(architecture: str, case: str) -> None:
    for call in calls(case):
        code = call.compiled(architecture).asm["amdgcn"]
        # Scalar registers may move to lanes of vector registers, which costs no memory.
        assert set(re.findall(r"\.vgpr_spill_count:\s+(\d+)", code)) == {"0"}
        assert set(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", code)) == {"0"}
