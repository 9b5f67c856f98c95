"""3x3 convolution with fewer multiplications, on the CPU."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast import backends
from ddpm_fast.backends.reference import conv as reference
from ddpm_fast.ops import _check
from ddpm_fast.ops._derived import Derived
from ddpm_fast.ops._operator import Operator

CONV3X3 = Operator(
    "conv3x3",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? prepared, bool upsample, int tile_height, "
    "int tile_width, int block, Tensor(a!) out",
    reference.conv3x3,
    on=("reference", "cpu"),
)

MODES = ("exact", "strict", "fast", "torch")

_PANEL = 32  # output channels side by side, as in csrc/cpu/conv.cpp


class ConvPlan(NamedTuple):
    """How a 3x3 convolution is computed, and why."""

    tile: tuple[int, int] | None  # height and width of Winograd's tiles; None leaves it to torch
    block: int  # channels whose products are summed from zero before they are added to the rest
    reason: str

    @property
    def planes(self) -> int:
        """Multiplications a tile, input channel and output channel."""
        return 0 if self.tile is None else (self.tile[0] + 2) * (self.tile[1] + 2)


def _by_torch(reason: str) -> ConvPlan:
    return ConvPlan(None, 0, reason)


@lru_cache(maxsize=4096)
def plan_conv3x3(
    channels: int,
    outputs: int,
    height: int,
    width: int,
    *,
    mode: str = "exact",
    isa: str = "avx2",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    stride: int = 1,
    upsample: bool = False,
) -> ConvPlan:
    """Decides how a 3x3 convolution with padding 1 is computed.

    The number of samples is no argument: a sample's bits must not depend on its batch.

    Args:
        channels, outputs, height, width: C, K, H and W of the input.
        mode: "exact", "strict", "fast" or "torch"; see `conv3x3`.
        isa: the instruction set of the CPU kernels: "avx512", "avx2", "generic", or "none" where there are none.
        dtype, device, stride: the input's dtype and kind of device, and the convolution's stride.
        upsample: whether the image is doubled first; tiles are single pixels then, of 2x2 outputs.

    Raises:
        ValueError: for another mode.
    """
    _check_mode(mode)
    if mode == "torch":
        return _by_torch("mode is 'torch'")
    if stride != 1:
        return _by_torch(f"stride is {stride}, and the kernel's is 1")
    if device != "cpu" or dtype != torch.float32:
        return _by_torch(f"the kernel takes float32 on the CPU, not {dtype} on {device}")
    if isa not in ("avx512", "avx2"):
        return _by_torch("the processor has no vector instructions that the kernel is fast with")
    if min(channels, outputs) < _LEAST_CHANNELS:
        few = f"{channels} to {outputs} channels"
        return _by_torch(f"{few}, one below {_LEAST_CHANNELS}: transforms cost more than they save")
    if upsample:
        return ConvPlan((1, 1), _UPSAMPLED_BLOCKS[mode], "a pixel at a time: 9 products for its four outputs")
    candidates = [
        ConvPlan(tile, block, reason)
        for tile, block, reason, least_channels, least_side in _TILES[mode]
        if channels >= least_channels and min(height, width) >= least_side
    ]
    # The last of those with the fewest multiplications: the one with the longest sums.
    best = min(reversed(candidates), key=lambda plan: _multiplications(plan, height, width))
    if _multiplications(best, height, width) > _WORTH_WHILE * 9 * height * width:
        return _by_torch(f"tiles do not fit {height}x{width} pixels well enough to save much")
    return best


# Below, Winograd's transforms take longer than the multiplications they save (docs/conv.md).
_LEAST_CHANNELS = 16
_WORTH_WHILE = 0.7

# Tile, block, why, and from how many channels and pixels a side on. Small tiles and short sums round less. Torch's
# error grows with the square root of the channels, ours hardly, so that more channels admit larger tiles; the numbers
# are measured (docs/conv.md), and tests/ops/test_conv.py holds them to what "exact" promises.
_F22, _F42, _F44 = "F(2x2, 3x3)", "F(4x2, 3x3)", "F(4x4, 3x3)"
_TILES: dict[str, list[tuple[tuple[int, int], int, str, int, int]]] = {
    "exact": [
        ((2, 2), 64, f"{_F22}: torch's error with so few channels is below that of larger tiles", 0, 0),
        ((4, 2), 16, f"{_F42}: torch's error with so few channels is below that of larger tiles", 48, 0),
        ((4, 2), 32, f"{_F42}: torch's error with so few channels is below that of larger tiles", 96, 0),
        ((4, 4), 16, _F44, 128, 12),
        ((4, 4), 16, _F44, 192, 0),
        ((4, 4), 32, _F44, 256, 7),
        ((4, 4), 64, _F44, 512, 0),
    ],
    "strict": [((2, 2), 32, f"{_F22}: the smallest error", 0, 0)],
    "fast": [((4, 4), 128, f"{_F44}: the fewest multiplications", 0, 0)],
}


_UPSAMPLED_BLOCKS = {"exact": 64, "strict": 32, "fast": 128}


def _multiplications(plan: ConvPlan, height: int, width: int) -> int:
    assert plan.tile is not None
    return plan.planes * -(-height // plan.tile[0]) * -(-width // plan.tile[1])


@lru_cache(maxsize=1)
def cpu_isa() -> str:
    """The instruction set that the CPU kernels use; "none" where there are none."""
    if backends.missing["cpu"] is not None:
        return "none"
    return str(importlib.import_module("ddpm_fast._C").cpu_isa())


def pack(weight: Tensor) -> Tensor:
    """The weight (K, C, 3, 3) in the order in which the C++ kernel reads it: panels [channel][9][output].

    A panel has 32 output channels, the last one 16 where that is enough; zeros fill the panels, and C up to a
    multiple of four.
    """
    outputs, channels = weight.shape[:2]
    rows = -(-channels // 4) * 4
    taps = weight.permute(1, 2, 3, 0).reshape(channels, 9, outputs)
    count = -(-outputs // _PANEL)
    last = outputs - (count - 1) * _PANEL
    width = _PANEL // 2 if last <= _PANEL // 2 else _PANEL
    packed = weight.new_zeros(rows * 9 * ((count - 1) * _PANEL + width))
    if count > 1:
        whole = packed[: rows * 9 * (count - 1) * _PANEL].view(count - 1, rows, 9, _PANEL)
        whole[:, :channels] = taps[:, :, :-last].unflatten(2, (count - 1, _PANEL)).permute(2, 0, 1, 3)
    packed[-rows * 9 * width :].view(rows, 9, width)[:channels, :, :last] = taps[:, :, -last:]
    return packed


class PreparedConv3x3:
    """A weight (K, C, 3, 3) and what the kernel reads in its place, of the same size: see `prepare_conv3x3`."""

    __slots__ = ("_packed", "weight")

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._packed: Derived[Tensor] = Derived()

    def packed(self) -> Tensor:
        """The packed weight, packed again where the weight has changed since the last call."""
        return self._packed.get((self.weight,), pack)

    def __reduce__(self) -> tuple[type[PreparedConv3x3], tuple[Tensor]]:
        """Copies and pickles hold the weight, which is the copy's own, and are packed at their first call."""
        return PreparedConv3x3, (self.weight,)


def prepare_conv3x3(weight: Tensor) -> PreparedConv3x3:
    """Makes a weight ready for many calls of `conv3x3`.

    The result follows the weight: it is packed at the first call, and again after an in-place change
    (`load_state_dict`), after a step of any optimiser, or when its memory is replaced. Writes through `weight.data`,
    which PyTorch does not count, are not seen. Where torch.distributed is initialized it is packed in every call,
    because `fully_shard` writes so as well.

    Args:
        weight: (K, C, 3, 3), float32 on the CPU.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: for another shape, dtype or device, or for an inference tensor, whose changes nobody can see.
    """
    _check_weight(weight)
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(f"weight must be float32 on the CPU, not {weight.dtype} on {weight.device}")
    if weight.is_inference():
        raise ValueError("weight must not be an inference tensor: its changes could not be seen; clone it outside")
    return PreparedConv3x3(weight)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, not {mode!r}")


def _check_weight(weight: object) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor or prepared by prepare_conv3x3, not {type(weight).__name__}")
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or 0 in weight.shape:
        raise ValueError(f"weight must be (K, C, 3, 3), not of shape {tuple(weight.shape)}")


def _check_like(name: str, tensor: object, shape: tuple[int, ...], x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor or None, not {type(tensor).__name__}")
    if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(
            f"{name} must be {x.dtype} of shape {shape} on {x.device}, "
            f"not {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )


def _check_out(out: Tensor, x: Tensor) -> None:
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"out must be channels_last, not have strides {out.stride()}")
    if torch.compiler.is_compiling() or x.device != out.device:
        return
    first, last = x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()
    start, end = out.data_ptr(), out.data_ptr() + out.numel() * out.element_size()
    if start < last and first < end:
        raise ValueError("out must not share memory with x")


def _backward_weight(weight: Tensor) -> Tensor:
    """The weight that convolves a gradient back: channels for outputs, and the other way round."""
    return weight.flip(2, 3).transpose(0, 1)


class _Conv3x3(torch.autograd.Function):
    """The gradient of x is a convolution of the same kind; that of the weight is torch's.

    Kept for the backward pass: x and the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        prepared: PreparedConv3x3 | None,
        mode: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mode = mode
        return _convolved(x, weight, bias, residual, prepared, False, mode, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _check.first_derivative_only("conv3x3")
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = _convolved(grad, _backward_weight(weight), None, None, None, False, ctx.mode, None)
        if needs_weight or needs_bias:
            _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, x, weight, [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                [False, needs_weight, needs_bias],
            )  # fmt: skip
        return grad_x, grad_weight, grad_bias, grad if needs_residual else None, None, None


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    prepared: PreparedConv3x3 | None,
    upsample: bool,
    mode: str,
    out: Tensor | None,
) -> Tensor:
    """On the cpu backend, x and residual in channels_last."""
    plan = plan_conv3x3(weight.shape[1], weight.shape[0], *x.shape[2:], mode=mode, isa=cpu_isa(), upsample=upsample)
    if plan.tile is None:
        x = _doubled(x) if upsample else x
        y = torch.nn.functional.conv2d(x, weight, bias, padding=1).contiguous(memory_format=torch.channels_last)
        if residual is not None:
            return torch.add(residual, y, out=out)
        return y if out is None else out.copy_(y)
    if out is None:
        shape = (x.shape[0], weight.shape[0], *((2 if upsample else 1) * side for side in x.shape[2:]))
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    packed = pack(weight) if prepared is None else prepared.packed()
    CONV3X3["cpu"](x, weight, bias, residual, packed, upsample, *plan.tile, plan.block, out)
    return out


def _doubled(x: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


def conv3x3(
    x: Tensor,
    weight: Tensor | PreparedConv3x3,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    upsample: bool = False,
    mode: str = "exact",
    out: Tensor | None = None,
) -> Tensor:
    """`residual + conv2d(x, weight, bias, padding=1)` for 3x3 kernels.

    On the CPU with Winograd's minimal filtering (Winograd 1980; Lavin and Gray 2016), which needs 2.25 to 4 times
    fewer multiplications. An element's bits depend neither on the batch, nor on the number of threads, nor on the
    instruction set. What the kernel does not take, torch computes; `plan_conv3x3` says which and why. The gradient of
    x is made by the same kernel, that of the weight by torch.

    Args:
        x: (N, C, H, W) float32, or float64 on the reference backend. channels_last is taken as it is, another layout
            is copied first.
        weight: (K, C, 3, 3) of x's dtype, or better `prepare_conv3x3(weight)`, which spares packing it in each call.
        bias: (K,), or None.
        residual: of the result's shape, added to it; `out` itself is allowed.
        upsample: double the height and width of x first, each pixel repeated ("nearest"). Without gradients the large
            image is not made.
        mode: "exact": the largest tiles whose error against float64 is at most that of torch's own channels_last
            convolution. "strict": tiles of 2x2, about a third to two thirds of that error. "fast": tiles of 4x4
            always, which with few channels round up to three times as much as torch. "torch": torch's convolution.
        out: channels_last, of the result's shape, receives the result.

    Returns:
        (N, K, H, W), or (N, K, 2H, 2W) with `upsample`, channels_last; `out` where it was given. Differentiable, once.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a wrong shape, dtype, device, layout or mode.
        RuntimeError: for `out` where a gradient is needed, and when a second derivative is asked for.
    """
    prepared = weight if isinstance(weight, PreparedConv3x3) else None
    w = prepared.weight if prepared is not None else weight
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (N, C, H, W) with at least one channel and pixel, not of shape {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32, or float64 on the reference backend, not {x.dtype}")
    _check_mode(mode)
    _check_weight(w)
    assert isinstance(w, Tensor)
    samples, channels, height, width = x.shape
    outputs = w.shape[0]
    _check_like("weight", w, (outputs, channels, 3, 3), x)
    factor = 2 if upsample else 1
    shape = (samples, outputs, factor * height, factor * width)
    if bias is not None:
        _check_like("bias", bias, (outputs,), x)
    if residual is not None:
        _check_like("residual", residual, shape, x)
    if out is not None:
        _check_like("out", out, shape, x)
        _check_out(out, x)
    needs_grad = _check.needs_grad(x, w, bias, residual, out)
    if needs_grad and out is not None:
        raise RuntimeError("conv3x3: out= is for calls without gradients; use torch.no_grad()")
    if upsample and needs_grad:
        x, upsample = _doubled(x), False
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    if bias is not None:
        bias = bias.contiguous()
    if backends.choose(x) != "cpu":
        if needs_grad:
            y = torch.nn.functional.conv2d(x, w, bias, padding=1)
            return y if residual is None else residual + y
        if out is None:
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        CONV3X3["reference"](x, w, bias, residual, None, upsample, 0, 0, 0, out)
        return out
    if needs_grad:
        return _Conv3x3.apply(x, w, bias, residual, prepared, mode)  # type: ignore[no-any-return,no-untyped-call]
    return _convolved(x, w, bias, residual, prepared, upsample, mode, out)
