"""How an op is defined: one schema, and one torch operator for each backend.

`torch.ops.ddpm_fast.normal.cpu` and `torch.ops.ddpm_fast.normal.reference` are overloads of the same op. Ops write
into tensors they are given and return nothing: the public function beside the schema checks its input and allocates,
so that `out=`, in-place use and reused buffers are one path. Hence the fake implementation of every op is the same,
an empty one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast import backends

_library = torch.library.Library("ddpm_fast", "DEF")


def _fake(*args: Any) -> None:
    """All that an op does is write into its arguments."""


class Operator:
    """An op of this package.

    Args:
        name: the op's name, the same in every backend.
        arguments: its schema's argument list, as `torch.library` writes it.
        reference: the kernel of the reference backend. The C++ kernels register themselves, in csrc/ops.cpp.
    """

    def __init__(self, name: str, arguments: str, reference: Callable[..., None]) -> None:
        self.name = name
        for backend in backends.NAMES:
            _library.define(f"{name}.{backend}({arguments}) -> ()")
            torch.library.register_fake(f"ddpm_fast::{name}.{backend}", _fake, lib=_library)
        _library.impl(f"{name}.reference", reference, "CompositeExplicitAutograd")
        packet = getattr(torch.ops.ddpm_fast, name)
        self._overloads: dict[str, Callable[..., None]] = {
            backend: getattr(packet, backend) for backend in backends.NAMES
        }

    def __getitem__(self, backend: str) -> Callable[..., None]:
        """The torch operator of one backend."""
        return self._overloads[backend]
