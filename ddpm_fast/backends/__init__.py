"""The backends, and which of them a call uses.

A backend holds nothing but kernels, one file an op. `reference` is plain PyTorch: the specification, and what runs
where nothing faster does. `cpu` and `cuda` are the C++ and CUDA extensions, `triton` needs a GPU and no compiler.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

NAMES = ("reference", "cpu", "triton", "cuda")

_KERNEL_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

_forced: str | None = None


def _load_cpu() -> str | None:
    """Loads the extension; the reason, where it cannot be."""
    try:
        importlib.import_module("ddpm_fast._C")
    except ImportError as error:
        return str(error)
    return None


def _no_gpu() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def _load_cuda() -> str | None:
    if (reason := _no_gpu()) is not None:
        return reason
    try:
        importlib.import_module("ddpm_fast._cuda")
    except ImportError as error:
        return str(error)
    return None


def _find_triton() -> str | None:
    if (reason := _no_gpu()) is not None:
        return reason
    # Not imported before a kernel is called: it takes a second.
    return None if importlib.util.find_spec("triton") is not None else "the package triton is not installed"


# Why a backend cannot run here; None where it can.
missing: dict[str, str | None] = {
    "reference": None,
    "cpu": _load_cpu(),
    "triton": _find_triton(),
    "cuda": _load_cuda(),
}
if missing["cpu"] is not None:
    warnings.warn(
        f"ddpm_fast runs without its CPU kernels, on the slower reference backend: {missing['cpu']}. "
        "To build them, install a C++17 compiler (Debian: apt-get install g++) and reinstall ddpm_fast.",
        RuntimeWarning,
        stacklevel=2,
    )


# docs/noise.md's test vector: seed, sample number, step and stream, and the bits of the first eight normals.
_SEED, _SAMPLE, _STEP, _STREAM = 0x0123456789ABCDEF, 7, 123, 3
_NORMALS = (
    0x3FE6DFB0, 0x3F8308DD, 0xBF1FED19, 0xBF619C79, 0xC027ABFE, 0xBF7B2601, 0xBE915DE4, 0xBF7E1789,
)  # fmt: skip


def check_noise(kernel: Callable[..., None], device: torch.device) -> str | None:
    """Why a backend's `normal` is not to be trusted on a device, None where it gives the contract's bits."""

    def number(value: int) -> torch.Tensor:
        return torch.full((1,), value, dtype=torch.int64, device=device)

    out = torch.empty(1, len(_NORMALS), device=device)
    try:
        kernel(out, number(_SEED), number(_SAMPLE), number(_STEP), _STREAM)
        words = out.cpu().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    except Exception as error:  # a kernel that does not load, launch or finish; whatever it is, it is the reason
        return f"its self-check failed: {error}"
    return None if words.tolist() == [list(_NORMALS)] else "its self-check gave wrong noise"


def check_ops(name: str, device: torch.device) -> str | None:
    """Why the kernels of the backend that is chosen on a device are not to be trusted, None where all pass."""
    from ddpm_fast import selftest  # it imports the ops, which import this

    # In a thread of its own no gradient mode, autocast or torch.func of the caller's is at work.
    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(selftest.results, name, device).result()
    failed = [f"{r.op} gave an error of {r.error:.0e} {r.problem}".rstrip() for r in results if not r.passed]
    return f"its self-test failed: {', '.join(failed)}" if failed else None


_checked: set[str] = set()


def _passes(name: str, device: torch.device) -> bool:
    """Checks a GPU backend when it is first chosen; one that fails is missing from then on, and a warning says why."""
    if name in _checked or torch.compiler.is_compiling():
        return True
    _checked.add(name)  # before the check, which chooses the backend for every op
    missing[name] = check_noise(getattr(torch.ops.ddpm_fast.normal, name), device) or check_ops(name, device)
    if missing[name] is None:
        return True
    warnings.warn(
        f"ddpm_fast does not use its backend {name!r}: {missing[name]}. `ddpm-fast doctor` tests every op.",
        RuntimeWarning,
        stacklevel=4,
    )
    return False


def available_backends() -> list[str]:
    """The backends that can run here, the specification first.

    Returns:
        A list out of "reference", "cpu", "triton" and "cuda".
    """
    return [name for name in NAMES if missing[name] is None]


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
        why = f" ({missing[name]})" if name in NAMES else ""
        raise ValueError(f"use_backend: {name!r} is not available{why}; available are {available_backends()}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def forced() -> str | None:
    """The backend that `use_backend` asks for just now, if any: what is slower than torch runs only where it is."""
    return _forced


def choose(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """The backend for an op whose main tensor is `tensor`: the one forced, or the best that takes it.

    float64, and any device but the CPU and CUDA's, are the reference's.
    """
    if _forced == "reference":
        return _forced
    on_cpu = tensor.is_cpu
    takes = (dtype or tensor.dtype) in _KERNEL_DTYPES
    if _forced is None:
        if takes:
            for name in ("cpu",) if on_cpu else ("cuda", "triton") if tensor.is_cuda else ():
                if missing[name] is None and (on_cpu or _passes(name, tensor.device)):
                    return name
        return "reference"
    if not takes or on_cpu != (_forced == "cpu"):
        raise ValueError(
            f"backend {_forced!r} takes float32, float16 and bfloat16 tensors on the "
            f"{'CPU' if _forced == 'cpu' else 'GPU'}, not {dtype or tensor.dtype} on {tensor.device}"
        )
    return _forced
