"""The backends, and which of them a call uses.

A backend holds nothing but kernels, one file an op. `reference` is plain PyTorch: the specification, and what runs
where nothing faster does. `cpu` is the C++ extension.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator

import torch

NAMES = ("reference", "cpu")

_CPU_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

_forced: str | None = None


def _load_cpu() -> str | None:
    """Loads the extension; the reason, where it cannot be."""
    try:
        importlib.import_module("ddpm_fast._C")
    except ImportError as error:
        return str(error)
    return None


cpu_missing = _load_cpu()
if cpu_missing is not None:
    warnings.warn(
        f"ddpm_fast runs without its CPU kernels, on the slower reference backend: {cpu_missing}. "
        "To build them, install a C++17 compiler (Debian: apt-get install g++) and reinstall ddpm_fast.",
        RuntimeWarning,
        stacklevel=2,
    )


def available_backends() -> list[str]:
    """The backends that can run here, the specification first.

    Returns:
        A list out of "reference" and "cpu".
    """
    return ["reference"] if cpu_missing is not None else ["reference", "cpu"]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every op inside the block run on one backend; the choice holds for the whole process.

    Args:
        name: one of `available_backends()`.

    Raises:
        ValueError: for a backend that is not available.
    """
    global _forced
    if name not in available_backends():
        why = f" ({cpu_missing})" if name == "cpu" else ""
        raise ValueError(f"use_backend: {name!r} is not available{why}; available are {available_backends()}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def choose(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """The backend for an op whose main tensor is `tensor`: the one forced, or the best that takes it.

    float64, and any device but the CPU, are the reference's.
    """
    takes = tensor.is_cpu and (dtype or tensor.dtype) in _CPU_DTYPES
    if _forced is None:
        return "cpu" if takes and cpu_missing is None else "reference"
    if _forced == "cpu" and not takes:
        raise ValueError(
            f"backend 'cpu' takes float32, float16 and bfloat16 tensors on the CPU, "
            f"not {dtype or tensor.dtype} on {tensor.device}"
        )
    return _forced
