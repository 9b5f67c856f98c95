"""Normal noise that is a pure function of (seed, sample, step, stream, element)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_fast import backends
from ddpm_fast.backends.reference import random as reference
from ddpm_fast.ops import _check
from ddpm_fast.ops._operator import Operator

NORMAL = Operator(
    "normal",
    "Tensor(a!) out, Tensor seed, Tensor? sample_ids, Tensor step, int stream",
    reference.normal,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _is_shape(shape: tuple[int, ...]) -> bool:
    for n in shape:
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            return False
    return len(shape) > 0


def randn(
    shape: Sequence[int],
    seed: int | Tensor = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    step: int | Tensor = 0,
    stream: str = "noise",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
    out: Tensor | None = None,
) -> Tensor:
    """Standard normal noise, the same bits on every backend.

    An element depends on the seed, the number of its sample, the step, the stream and its place (C, *) in the sample,
    and on nothing else: neither the batch it is drawn in, nor the layout, the device or the number of threads.
    The words are Philox4x32-10's (Salmon et al. 2011), the normals Box and Muller's; docs/noise.md has the arithmetic.

    Args:
        shape: (N, *), N samples.
        seed: an int in [0, 2^64), or an int64 tensor of one element.
        sample_ids: the N samples' numbers in [0, 2^32); 0 .. N-1 unless given.
        step: the number of the draw in [0, 2^32), or an int64 tensor with one for each sample.
        stream: "x_T", "noise", "training", "timesteps", "corrector" or "augmentation": independent draws.
        dtype: float32, float16, bfloat16 (rounded from float32) or float64 (the float32 values).
        device: where the noise is made.
        memory_format: `torch.channels_last` and the like change the layout, not the values.
        out: a contiguous or channels_last tensor of this shape to fill; dtype, device and layout are then its own.

    Returns:
        The noise, `out` where it was given.

    Raises:
        TypeError, ValueError: for anything outside the ranges above.
    """
    shape = tuple(shape)
    if not _is_shape(shape):
        raise ValueError(f"shape must be (N, *) of ints >= 0, not {shape}")
    if out is None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be float32, float16, bfloat16 or float64, not {dtype}")
        out = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
    elif out.shape != shape or out.dtype not in _DTYPES or not _check.is_dense(out):
        raise ValueError(
            f"out must be a contiguous or channels_last floating-point tensor of shape {shape}, "
            f"not {out.dtype} of shape {tuple(out.shape)} and strides {out.stride()}"
        )
    kernel = NORMAL[backends.choose(out)]
    samples, device = shape[0], out.device
    kernel(
        out,
        _check.seed_tensor(seed, device),
        _check.sample_id_tensor(sample_ids, samples, device),
        _check.counter_tensor(step, "step", samples, device),
        _check.stream_number(stream),
    )
    return out


def random_timesteps(
    samples: int,
    timesteps: int,
    *,
    seed: int | Tensor,
    sample_ids: Sequence[int] | Tensor | None = None,
    step: int | Tensor = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform timesteps for training, one for each sample, from the stream "timesteps".

    A timestep is `word * timesteps >> 32`, where the word is the first that Philox gives for the sample and step.

    Args:
        samples: N.
        timesteps: T, in [1, 2^31).
        seed, sample_ids, step: as for `randn`.

    Returns:
        int64 (N,), values in [0, T).

    Raises:
        TypeError, ValueError: for anything outside these ranges.
    """
    if not 1 <= timesteps < 1 << 31:
        raise ValueError(f"timesteps must lie in [1, 2^31), not {timesteps}")
    device = torch.device(device)
    ids = _check.sample_id_tensor(sample_ids, samples, device)
    steps = _check.counter_tensor(step, "step", samples, device)
    ids = torch.arange(samples, device=device) if ids is None else ids
    zero, stream = torch.zeros_like(ids), torch.full_like(ids, _check.stream_number("timesteps"))
    word, *_ = reference.philox((ids, zero, steps.expand(samples), stream), _check.seed_tensor(seed, device))
    return word * timesteps >> 32
