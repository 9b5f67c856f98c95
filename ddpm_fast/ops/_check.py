"""Checks that the public functions share. Each raises before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

STREAMS = {"x_T": 0, "noise": 1, "training": 2, "timesteps": 3, "corrector": 4, "augmentation": 5}


def stream_number(stream: str) -> int:
    number = STREAMS.get(stream)
    if number is None:
        raise ValueError(f"stream must be one of {list(STREAMS)}, not {stream!r}")
    return number


def _one_int64(value: int, device: torch.device) -> Tensor:
    # A third of the time of torch.tensor, and no copy from the host where the device is another.
    return torch.full((1,), value, dtype=torch.int64, device=device)


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as the ops take it: one int64 element whose 64 bits are the key."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed must be an int or an int64 tensor of one element on {device}, "
                f"not {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            )
        return seed if seed.dim() == 1 else seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or an int64 tensor, not {type(seed).__name__}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must lie in [0, 2^64), not {seed}")
    return _one_int64(seed if seed < 1 << 63 else seed - (1 << 64), device)


def counter_tensor(value: int | Tensor, name: str, samples: int, device: torch.device) -> Tensor:
    """A step number, or one for each sample, as the ops take them: int64, (1,) or (N,)."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() not in (1, samples) or value.device != device:
            raise ValueError(
                f"{name} must be an int or an int64 tensor of 1 or {samples} elements on {device}, "
                f"not {value.dtype} of shape {tuple(value.shape)} on {value.device}"
            )
        return value if value.dim() == 1 else value.reshape(-1)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or an int64 tensor, not {type(value).__name__}")
    if not 0 <= value < 1 << 32:
        raise ValueError(f"{name} must lie in [0, 2^32), not {value}")
    return _one_int64(value, device)


def sample_id_tensor(sample_ids: Sequence[int] | Tensor | None, samples: int, device: torch.device) -> Tensor | None:
    """Sample numbers as the ops take them: int64 (N,), or None for 0 .. N-1."""
    if sample_ids is None:
        return None
    if not isinstance(sample_ids, Tensor):
        sample_ids = list(sample_ids)
        for i, number in enumerate(sample_ids):
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 32:
                raise ValueError(f"sample_ids must be ints in [0, 2^32); number {i} is {number!r}")
        sample_ids = torch.tensor(sample_ids, dtype=torch.int64, device=device)
    if sample_ids.dtype != torch.int64 or sample_ids.shape != (samples,) or sample_ids.device != device:
        raise ValueError(
            f"sample_ids must be int64 of shape ({samples},) on {device}, "
            f"not {sample_ids.dtype} of shape {tuple(sample_ids.shape)} on {sample_ids.device}"
        )
    return sample_ids.contiguous()


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor is contiguous or channels_last, the layouts that kernels write."""
    if tensor.is_contiguous():
        return True
    if tensor.dim() == 4:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)


def one_pixel_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied where its spatial dimensions do not lie one within the other, as the kernels read them."""
    if is_dense(tensor):  # the usual case, ten times faster than looking at each stride
        return tensor
    size, stride = tensor.shape[2:], tensor.stride()[2:]
    run = None
    for n, s in zip(reversed(size), reversed(stride), strict=True):
        if n != 1:
            if run is not None and s != run:
                return tensor.contiguous()
            run = s * n
    return tensor


def rows_in_range(index: Tensor, count: int, name: str) -> None:
    """Rejects rows outside a table; on another device than the CPU that would make the host wait, and is left out."""
    if not index.is_cpu or torch.compiler.is_compiling():
        return
    rows = index.tolist()
    if rows and (min(rows) < 0 or max(rows) >= count):
        i = next(i for i, row in enumerate(rows) if not 0 <= row < count)
        raise ValueError(f"{name} must lie in [0, {count}); element {i} is {rows[i]}")


def first_derivative_only(op: str) -> None:
    """Refuses a backward pass that autograd would have to look into."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op} has no second derivative: call backward without create_graph=True")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know of an op on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a loop: a generator alone would cost as much as all of this
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_transformed() -> bool:
    """Whether functorch or forward-mode differentiation is at work, of which an op without a rule for it knows nothing.

    In a graph that torch.compile traces they are part of the trace.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
