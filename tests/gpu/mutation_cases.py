"""Compact cases for `python -m tests.gpu.mutate`: calls of public functions, and what they must give.

Sizes are small and awkward: more than one trip of the loops, odd ends, groups and channels no powers of two, misaligned
outputs, a variance near eps, a mean of 1e3. Results that are promised bit for bit are compared so; those of norm_act
with float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast import backends
from ddpm_fast.ops import denoise
from ddpm_fast.solvers import COLUMNS
from tests.ops.common import laid_out, same_bits

Results = tuple[Tensor, ...]


@dataclass
class Call:
    """A call and its results on the reference backend; with a tolerance they are float64, and need not be equal."""

    run: Callable[[], Results]
    reference: Callable[[], Results]
    tolerance: float | None = None
    _expected: Results | None = None

    def check(self) -> None:
        """Asserts that the call gives what it must."""
        if self._expected is None:
            with mock.patch.object(backends, "choose", return_value="reference"):
                self._expected = self.reference()
        for got, want in zip(self.run(), self._expected, strict=True):
            if self.tolerance is None:
                assert same_bits(got, want)
            else:
                assert ((got.double() - want).abs() <= self.tolerance * (1 + want.abs())).all()


def _random(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return laid_out(x, layout) if len(shape) == 4 else x


def _blank(like: Tensor, offset: int = 0) -> Tensor:
    """NaNs in the shape and layout of a tensor, so many elements behind an aligned address."""
    storage = torch.full((like.numel() + offset,), float("nan"), dtype=like.dtype)
    return storage.as_strided(like.shape, like.stride(), offset)


def _exact(run: Callable[[], Results]) -> Call:
    return Call(run, run)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, layout: str, offset: int = 0) -> Call:
    like = laid_out(torch.empty(shape, dtype=dtype), layout) if len(shape) == 4 else torch.empty(shape, dtype=dtype)
    ids = torch.arange(shape[0]).flip(0) + (1 << 32) - shape[0]
    step = torch.arange(shape[0]) * 3 + 123

    def run() -> Results:
        out = _blank(like, offset)
        return (df.randn(shape, seed=(1 << 63) + 12345, sample_ids=ids, step=step, stream="noise", out=out),)

    return _exact(run)


_SCHEDULE = df.NoiseSchedule.linear(1000)


def _noising(x0: Tensor, noise: Tensor | None) -> Call:
    t = torch.arange(x0.shape[0]) * 331 + 5
    if noise is None:
        return _exact(lambda: df.q_sample(x0, t, _SCHEDULE, seed=77, step=5))
    return _exact(lambda: df.q_sample(x0, t, _SCHEDULE, noise))


def _rows(rows: int) -> Tensor:
    """A table in which every column matters."""
    values = {
        "x0_from_x": 1.21,
        "x0_from_output": 0.83,
        "mean_from_x0": 0.37,
        "mean_from_x": 0.71,
        "sigma": 0.59,
        "log_min": -3.1,
        "log_max": -0.7,
        "guidance_scale": 2.3,
    }
    scale = 1 + 0.1 * torch.arange(rows, dtype=torch.float64)[:, None]
    return (torch.tensor([values[name] for name in COLUMNS], dtype=torch.float64) * scale).float()


def _denoise(x_t: Tensor, dtype: torch.dtype, **arguments: Any) -> Call:
    learned = arguments.get("variance", "fixed") != "fixed"
    channels = x_t.shape[1] * (2 if learned else 1)
    output = _random(x_t.shape[0], channels, *x_t.shape[2:], dtype=dtype, seed=4)
    unconditional = _random(x_t.shape[0], channels, *x_t.shape[2:], dtype=dtype, seed=5)
    if arguments.pop("guided", False):
        arguments["unconditional"] = unconditional
    index = torch.arange(x_t.shape[0]) + 1

    def run() -> Results:
        out, x0 = _blank(x_t), _blank(x_t)
        denoise(x_t, output, _rows(5), index, out=out, x0_out=x0, **arguments)
        return out, x0

    return _exact(run)


@dataclass
class _Norm:
    """A GroupNorm with everything that it may have."""

    shape: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    layout: str = "contiguous"
    mean: float = 0.0
    spread: float = 1.0
    modulated: bool = True

    def tensors(self, dtype: torch.dtype | None) -> dict[str, Any]:
        n, c = self.shape[:2]
        x = (_random(*self.shape, seed=1) * self.spread + self.mean).to(self.dtype)
        x = laid_out(x, self.layout) if len(self.shape) == 4 else x
        tensors = {"x": x, "weight": _random(c, seed=2), "bias": _random(c, seed=3)}
        if self.modulated:
            tensors |= {name: _random(n, c, seed=k) for k, name in enumerate(("scale", "shift", "embedding"), 4)}
        return {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}

    def forward(self, dtype: torch.dtype | None) -> Results:
        tensors = self.tensors(dtype)
        return (df.group_norm_silu(tensors.pop("x"), self.groups, **tensors),)

    def backward(self, dtype: torch.dtype | None) -> Results:
        tensors = {name: tensor.requires_grad_() for name, tensor in self.tensors(dtype).items()}
        leaves = tuple(tensors.values())
        y = df.group_norm_silu(tensors.pop("x"), self.groups, **tensors)
        return torch.autograd.grad(y, leaves, _random(*self.shape, seed=9).to(y.dtype))

    def call(self, backward: bool, tolerance: float) -> Call:
        run = self.backward if backward else self.forward
        return Call(lambda: run(None), lambda: run(torch.float64), tolerance)


# Of a result of size 1, where the CPU backend's tests have it; gradients of parameters are sums of many products.
_FLOAT32, _BFLOAT16 = 2e-6, 4e-3
_GRADIENTS = 2e-5

_NORMS = [
    (_Norm((2, 12, 9, 7), 3, torch.float32), _FLOAT32),
    (_Norm((2, 6, 61), 2, torch.float32, mean=1e3, modulated=False), 1e-3),  # x itself is rounded to 6e-5
    (_Norm((2, 12, 9, 7), 4, torch.float32, layout="channels_last", spread=3e-3), _FLOAT32),
]

# The cheapest first: most mutants end there. The last ones make threads and blocks loop.
_OPS: dict[str, list[Call]] = {
    "normal": [
        _normal((2, 3, 17, 19), torch.float32, "contiguous"),
        _normal((2, 4, 16, 16), torch.float32, "contiguous"),
        _normal((2, 3, 17, 19), torch.bfloat16, "contiguous", offset=1),
        _normal((2, 4, 16, 16), torch.bfloat16, "contiguous"),
        _normal((2, 5, 9, 11), torch.float32, "channels_last", offset=1),
        _normal((2, 4, 8, 8), torch.float32, "channels_last"),
        _normal((1, 260, 3, 5), torch.float32, "channels_last"),
        _normal((1, 3, 37, 40), torch.float32, "channels_last"),
        _normal((1, 34001), torch.float32, "contiguous"),
        _normal((1, 3, 150, 150), torch.float32, "channels_last"),
    ],
    "noising": [
        _noising(_random(2, 3, 17, 19), None),
        _noising(_random(2, 4, 16, 16), None),
        _noising(_random(2, 3, 17, 19, layout="channels_last"), None),
        _noising(_random(2, 3, 17, 19), _random(2, 3, 17, 19, seed=8)),
        _noising(_random(2, 4, 16, 16), _random(2, 4, 16, 16, layout="channels_last", seed=8)),
    ],
    "denoise": [
        _denoise(_random(2, 3, 17, 19), torch.float32, seed=3, clip=(-1.0, 1.0)),
        _denoise(_random(2, 4, 16, 16), torch.bfloat16, seed=3, variance="learned_range", guided=True),
        _denoise(_random(2, 4, 16, 16), torch.float32, noise=_random(2, 4, 16, 16, seed=8), prediction="v"),
        _denoise(_random(2, 3, 7, 9), torch.float32, threshold=torch.tensor([1.5, 1.0]), variance="learned", seed=9),
        _denoise(_random(2, 5, 9, 11, layout="channels_last"), torch.float16, seed=3, prediction="x0"),
    ],
    "norm_act": [norm.call(False, tolerance) for norm, tolerance in _NORMS],
    "norm_act_backward": [norm.call(True, _GRADIENTS) for norm, _ in (_NORMS[0], _NORMS[2])],
}

CASES: dict[str, tuple[str, list[Call]]] = {
    f"{backend}:{op}": (backend, calls) for backend in ("cuda", "triton") for op, calls in _OPS.items()
}
