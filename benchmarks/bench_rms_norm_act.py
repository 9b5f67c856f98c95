"""RMSNorm over the channels, scale and shift, and SiLU in one pass, forward and backward, against eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks.common import LAYOUTS, laid_out, rms_error, shape_id
from benchmarks.eager import rms_norm_silu as eager
from benchmarks.harness import Case

SHAPES = [(4, 128, 32, 32), (4, 256, 16, 16), (1, 320, 64, 64), (16, 64, 28, 28)]

Measure = Callable[[Case], None]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def check(got: Tensor, peer: Tensor, exact: Tensor) -> float:
    """The error against float64, which may not be above that of eager PyTorch."""
    error, allowed = rms_error(got, exact), rms_error(peer, exact)
    assert error <= allowed, f"rms error {error:.2e}, eager's is {allowed:.2e}"
    return error


@layouts
@shapes
def test_forward(measure: Measure, shape: tuple[int, ...], layout: str) -> None:
    x, copy = laid_out(torch.randn(shape), layout), laid_out(torch.empty(shape), layout)
    weight, scale, shift = 1 + 0.1 * torch.randn(shape[1]), *0.1 * torch.randn(2, *shape[:2])
    exact = eager(x.double(), *(p.double() for p in (weight, scale, shift)))

    def ours() -> Tensor:
        return df.rms_norm_silu(x, weight, scale=scale, shift=shift)

    measure(
        Case(
            what="RMSNorm+SiLU with scale/shift",
            shape=shape,
            layout=layout,
            ours=ours,
            peers={f"eager {name}": partial(eager, laid_out(x, name), weight, scale, shift) for name in LAYOUTS},
            floors={"copy_": lambda: copy.copy_(x)},
            check=lambda: check(ours(), eager(x, weight, scale, shift), exact),
        )
    )


@layouts
@shapes
def test_backward(measure: Measure, shape: tuple[int, ...], layout: str) -> None:
    leaves = [laid_out(torch.randn(shape), layout), 1 + 0.1 * torch.randn(shape[1]), *0.1 * torch.randn(2, *shape[:2])]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, weight, scale, shift = leaves
    grad, copy = laid_out(torch.randn(shape), layout), torch.empty_like(x, requires_grad=False)

    def backward(y: Tensor, inputs: list[Tensor], upstream: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(y, inputs, upstream, retain_graph=True)

    ours = backward(df.rms_norm_silu(x, weight, scale=scale, shift=shift), leaves, grad)
    peers = {}
    for name in LAYOUTS:
        other = laid_out(x.detach(), name).requires_grad_()
        peers[f"eager {name}"] = backward(eager(other, *leaves[1:]), [other, *leaves[1:]], laid_out(grad, name))
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = backward(eager(*doubles), doubles, grad.double())
    measure(
        Case(
            what="RMSNorm+SiLU backward",
            shape=shape,
            layout=layout,
            ours=ours,
            peers=peers,
            floors={"copy_": lambda: copy.copy_(x.detach())},
            grad=True,
            check=lambda: check(ours()[0], peers[f"eager {layout}"]()[0], exact()[0]),
        )
    )
