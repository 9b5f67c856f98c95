"""Layouts and checks that the benchmarks share."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    return tensor.contiguous(memory_format=LAYOUTS[layout])


def assert_equal(got: Tensor, expected: Tensor, whose: str) -> None:
    assert torch.equal(got, expected), (
        f"not the bits of {whose}: {int((got != expected).sum())} of {got.numel()} differ"
    )


def largest_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max())


def rms_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).square().mean().sqrt())
