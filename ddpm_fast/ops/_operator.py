"""How an op is defined: one schema, and one torch operator for each backend.

`torch.ops.ddpm_fast.normal.cpu` and `torch.ops.ddpm_fast.normal.reference` are overloads of the same op. Ops write
into tensors they are given and return nothing: the public function beside the schema checks its input and allocates,
so that `out=`, in-place use and reused buffers are one path. Hence the fake implementation of every op is the same,
an empty one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ddpm_fast import backends

_library = torch.library.Library("ddpm_fast", "DEF")


def _fake(*args: Any) -> None:
    """All that an op does is write into its arguments."""


def _triton(reference: Callable[..., None]) -> Callable[..., None]:
    """The kernel of the reference's name in backends/triton, imported when it is first called."""
    module = f"ddpm_fast.backends.triton.{reference.__module__.rpartition('.')[2]}"

    def kernel(*args: Any) -> None:
        getattr(importlib.import_module(module), reference.__name__)(*args)

    return kernel


class Operator:
    """An op of this package.

    Args:
        name: the op's name, the same in every backend.
        arguments: its schema's argument list, as `torch.library` writes it.
        reference: the kernel of the reference backend; Triton's has the same name in the file of the same name. The
            C++ and CUDA kernels register themselves, in csrc/ops.cpp and csrc/ops_cuda.cpp.
        on: the backends that have the op.
    """

    def __init__(
        self, name: str, arguments: str, reference: Callable[..., None], on: Sequence[str] = backends.NAMES
    ) -> None:
        self.name = name
        for backend in on:
            _library.define(f"{name}.{backend}({arguments}) -> ()")
            torch.library.register_fake(f"ddpm_fast::{name}.{backend}", _fake, lib=_library)
        _library.impl(f"{name}.reference", reference, "CompositeExplicitAutograd")
        if "triton" in on:
            _library.impl(f"{name}.triton", _triton(reference), "CUDA")
        packet = getattr(torch.ops.ddpm_fast, name)
        self._overloads: dict[str, Callable[..., None]] = {backend: getattr(packet, backend) for backend in on}

    def choose(self, *tensors: torch.Tensor | None) -> str:
        """The backend for a call on these tensors: `backends.choose` for the first, if it has this op and takes all.

        Where it does not, the reference.
        """
        main, *others = (tensor for tensor in tensors if tensor is not None)
        backend = backends.choose(main)
        takes = all(tensor.dtype != torch.float64 for tensor in others)
        return backend if takes and backend in self._overloads else "reference"

    def __getitem__(self, backend: str) -> Callable[..., None]:
        """The torch operator of one backend."""
        return self._overloads[backend]
