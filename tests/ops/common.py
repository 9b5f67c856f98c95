"""Shapes, layouts and comparisons that the op tests share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ddpm_fast.ops.conv import cpu_isa

needs_vectors = pytest.mark.skipif(
    cpu_isa() not in ("avx512", "avx2"), reason="without vector instructions torch computes the convolutions"
)

# abs_quantile keeps the arithmetic that torch.quantile had until then (docs/backends.md).
bits_of_torchs_quantile = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14), reason="torch 2.14 rounds a quantile's rank otherwise"
)

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# Sizes no multiple of a vector, a tile or a Philox block; one channel; more channels than a tile has pixels; 2-D, 3-D
# and 5-D; more than one tile a sample.
SHAPES = [
    (2, 3, 32, 32),
    (3, 3, 17, 19),
    (1, 1, 1, 1),
    (2, 70, 5, 5),
    (3, 5),
    (2, 3, 33),
    (2, 2, 3, 4, 5),
    (2, 3, 61, 67),
]


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def layouts_of(shape: tuple[int, ...]) -> list[str]:
    return list(LAYOUTS) if len(shape) == 4 else ["contiguous"]


SHAPES_AND_LAYOUTS = [(shape, layout) for shape in SHAPES for layout in layouts_of(shape)]


def shape_and_layout_id(case: tuple[tuple[int, ...], str]) -> str:
    return f"{shape_id(case[0])}-{case[1]}"


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    return tensor.contiguous(memory_format=LAYOUTS[layout])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, the signs of zeros and NaNs included."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def run_with_isa(isa: str, code: str) -> str:
    """Runs Python code in a process whose CPU kernels use one instruction set; what it prints."""
    environment = {**os.environ, "DDPM_FAST_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()
