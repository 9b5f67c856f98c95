"""GroupNorm, scale and shift, and SiLU in one pass, forward and backward, against eager and compiled PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from benchmarks.common import LAYOUTS, laid_out, rms_error, shape_id
from benchmarks.eager import group_norm_silu as eager
from benchmarks.harness import Case, FloorTarget, Target

SHAPES = [(4, 128, 32, 32), (4, 256, 16, 16), (1, 320, 64, 64), (16, 64, 28, 28)]
LARGE = (1, 128, 256, 256)
GROUPS = 32

Measure = Callable[[Case], None]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def parameters(shape: tuple[int, ...], extra: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    samples, channels = shape[:2]
    result = {"weight": 1 + 0.1 * torch.randn(channels), "bias": 0.1 * torch.randn(channels)}
    if extra:
        result |= {"scale": 0.1 * torch.randn(samples, channels), "shift": 0.1 * torch.randn(samples, channels)}
    return {name: value.to(dtype) for name, value in result.items()}


def check(x: Tensor, given: Mapping[str, Tensor]) -> float:
    """The error against float64, which may not be above that of eager PyTorch on a contiguous tensor."""
    exact = eager(x.double(), GROUPS, **{name: value.double() for name, value in given.items()})
    got, peer = df.group_norm_silu(x, GROUPS, **given), eager(x.contiguous(), GROUPS, **given)
    assert got.stride() == x.stride(), f"laid out as {got.stride()}, x is {x.stride()}"
    error, allowed = rms_error(got, exact), rms_error(peer, exact)
    assert error <= allowed, f"rms error {error:.2e}, eager's is {allowed:.2e}"
    return error


def forward_case(
    what: str, target: Target | FloorTarget | None, x: Tensor, layout: str, given: dict[str, Tensor], **options: Any
) -> Case:
    copy = torch.empty_like(x)
    peers = {f"eager {name}": partial(eager, laid_out(x, name), GROUPS, **given) for name in LAYOUTS}
    return Case(
        **{
            "what": what,
            "shape": tuple(x.shape),
            "dtype": x.dtype,
            "layout": layout,
            "ours": lambda: df.group_norm_silu(x, GROUPS, **given),
            "peers": peers,
            "floors": {"copy_": lambda: copy.copy_(x)},
            "check": lambda: check(x, given),
            "target": target,
            **options,
        }
    )


@layouts
@shapes
def test_forward(measure: Measure, shape: tuple[int, ...], layout: str) -> None:
    x = laid_out(torch.randn(shape), layout)
    measure(forward_case("GroupNorm+SiLU", Target(1.8, 2.7), x, layout, parameters(shape, extra=False)))


@layouts
@shapes
def test_scale_shift(measure: Measure, shape: tuple[int, ...], layout: str) -> None:
    x = laid_out(torch.randn(shape), layout)
    what = "GroupNorm+SiLU with scale/shift"
    measure(forward_case(what, Target(2.4, 3.5), x, layout, parameters(shape, extra=True)))


@layouts
@shapes
def test_bfloat16(measure: Measure, shape: tuple[int, ...], layout: str) -> None:
    x = laid_out(torch.randn(shape).bfloat16(), layout)
    given = parameters(shape, extra=False, dtype=torch.bfloat16)
    measure(forward_case("GroupNorm+SiLU bfloat16", Target(1.8, 3.0), x, layout, given))


class Block(nn.Module):
    """What is compiled: a module, so that its parameters can be frozen into the code."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return eager(x, GROUPS, self.weight, self.bias)


@layouts
@shapes
def test_against_compiled(measure: Measure, quick: bool, threads: int, shape: tuple[int, ...], layout: str) -> None:
    if quick and (shape, layout) != (SHAPES[0], "contiguous"):
        pytest.skip("--quick compiles one case")
    x, given = laid_out(torch.randn(shape), layout), parameters(shape, extra=False)
    # The code object is the same for every case: without a reset the compiler would give up on its ninth.
    torch._dynamo.reset()
    peers = {}
    with torch.no_grad(), torch._inductor.config.patch({"freezing": True, "cpp.threads": threads}):
        for name in LAYOUTS:
            module = torch.compile(Block(**given).eval(), mode="max-autotune-no-cudagraphs", fullgraph=True)
            peers[f"compiled {name}"] = partial(module, laid_out(x, name))
            peers[f"compiled {name}"]()
    what = "GroupNorm+SiLU vs torch.compile"
    measure(forward_case(what, Target(2.3, 3.0), x, layout, given, peers=peers))


@layouts
def test_large_out(measure: Measure, layout: str) -> None:
    x, given = laid_out(torch.randn(LARGE), layout), parameters(LARGE, extra=False)
    out = torch.empty_like(x)
    measure(
        forward_case(
            "GroupNorm+SiLU, 256x256, out=",
            FloorTarget(2.4, 1.5),
            x,
            layout,
            given,
            ours=lambda: df.group_norm_silu(x, GROUPS, **given, out=out),
        )
    )


@layouts
def test_embedding(measure: Measure, layout: str) -> None:
    shape = SHAPES[0]
    x = laid_out(torch.randn(shape), layout)
    given = {**parameters(shape, extra=False), "embedding": torch.randn(shape[:2])}
    measure(forward_case("GroupNorm+SiLU with embedding", None, x, layout, given))


def gradients(
    function: Callable[..., Tensor], x: Tensor, given: Mapping[str, Tensor], grad: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass alone: the forward is done here, once."""
    leaves = [x.detach().requires_grad_(), *(value.detach().requires_grad_() for value in given.values())]
    y = function(leaves[0], GROUPS, **dict(zip(given, leaves[1:], strict=True)))
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def check_gradients(
    ours: Callable[[], tuple[Tensor, ...]], x: Tensor, given: Mapping[str, Tensor], grad: Tensor
) -> float:
    """Errors of the gradients against float64, relative to the largest element of each."""
    exact = gradients(eager, x.double(), {n: v.double() for n, v in given.items()}, grad.double())()
    worst = 0.0
    for name, got, expected in zip(("x", *given), ours(), exact, strict=True):
        error = float((got - expected).abs().max() / expected.abs().max())
        assert error < 2e-6, f"relative error {error:.2e} in the gradient of {name}"
        worst = max(worst, error)
    return worst


@layouts
@shapes
def test_backward(measure: Measure, shape: tuple[int, ...], layout: str) -> None:
    x, given, grad = torch.randn(shape), parameters(shape, extra=False), torch.randn(shape)
    inputs = {name: (laid_out(x, name), given, laid_out(grad, name)) for name in LAYOUTS}
    with torch.enable_grad():
        ours = gradients(df.group_norm_silu, *inputs[layout])
        peers = {f"eager {name}": gradients(eager, *inputs[name]) for name in LAYOUTS}
    copy = torch.empty_like(inputs[layout][0])
    measure(
        Case(
            what="GroupNorm+SiLU backward",
            shape=shape,
            layout=layout,
            ours=ours,
            peers=peers,
            floors={"copy_": lambda: copy.copy_(inputs[layout][0])},
            check=lambda: check_gradients(ours, *inputs[layout]),
            target=Target(1.6, 2.7),
            grad=True,
        )
    )
