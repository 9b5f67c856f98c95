"""Linear attention: the op against its operations one by one, and modules of two libraries, accelerated and not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from benchmarks.common import LAYOUTS, laid_out, rms_error
from benchmarks.harness import Case
from ddpm_fast.backends.reference.linear_attention import attend
from examples import annotated
from tests.third_party.lucidrains import import_package

Measure = Callable[[Case], None]

# (N, heads, dim, side): the layers of the article's and lucidrains' networks for 28x28 images, and a larger image.
LAYERS = [(16, 4, 32, 28), (16, 4, 32, 14), (2, 4, 32, 64)]

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def check(got: Tensor, peer: Tensor, exact: Tensor) -> float:
    """The error against float64, which may not be above that of eager PyTorch."""
    error, allowed = rms_error(got, exact), rms_error(peer, exact)
    assert error <= allowed, f"rms error {error:.2e}, eager's is {allowed:.2e}"
    return error


@layouts
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "-".join(map(str, layer)))
def test_op(measure: Measure, layer: tuple[int, int, int, int], layout: str) -> None:
    samples, heads, dim, side = layer
    qkv = laid_out(torch.randn(samples, 3 * heads * dim, side, side), layout)
    memory, scale = torch.randn(2, heads, dim, 4), dim**-0.5
    copied = torch.empty_like(qkv)

    def ours() -> Tensor:
        return df.linear_attention(qkv, heads, memory=memory)

    exact = attend(qkv.double(), memory.double(), heads, scale)
    measure(
        Case(
            what="linear attention",
            shape=tuple(qkv.shape),
            layout=layout,
            note=f"{heads} heads of {dim}, 4 memories",
            ours=ours,
            peers={f"eager {name}": partial(attend, laid_out(qkv, name), memory, heads, scale) for name in LAYOUTS},
            floors={"copy_": lambda: copied.copy_(qkv)},
            check=lambda: check(ours(), attend(qkv, memory, heads, scale), exact),
        )
    )


@layouts
@pytest.mark.parametrize("side", [28, 14])
@pytest.mark.parametrize("library", ["article", "lucidrains"])
def test_module(measure: Measure, library: str, side: int, layout: str) -> None:
    if library == "article":
        module: nn.Module = annotated.LinearAttention(28)
    else:
        module = import_package().denoising_diffusion_pytorch.LinearAttention(28)
    module.requires_grad_(False)
    x = laid_out(torch.randn(16, 28, side, side), layout)
    accelerated = df.accelerate(copy.deepcopy(module))
    exact = copy.deepcopy(module).double()(x.double())
    measure(
        Case(
            what="linear attention module",
            shape=tuple(x.shape),
            layout=layout,
            note=library,
            ours=lambda: accelerated(x),
            peers={f"eager {name}": partial(module, laid_out(x, name)) for name in LAYOUTS},
            check=lambda: check(accelerated(x), module(x), exact),
        )
    )
