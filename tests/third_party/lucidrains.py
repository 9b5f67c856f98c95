"""Imports denoising_diffusion_pytorch without what only its Trainer needs.

Its modules import torchvision, accelerate and pytorch_fid at the top, and the wheels of torchvision on PyPI
do not load beside a CPU build of torch. Stand-ins take the place of what cannot be imported, while the
package is being imported and no longer.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

_TRAINER_ONLY = (
    "torchvision",
    "torchvision.transforms",
    "accelerate",
    "pytorch_fid",
    "pytorch_fid.fid_score",
    "pytorch_fid.inception",
)


class _StandIn(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - what makes it a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError):  # absent, or built for another torch
        return False
    return True


def import_package() -> types.ModuleType:
    """The package denoising_diffusion_pytorch; ImportError if it is not installed."""
    replaced = [name for name in _TRAINER_ONLY if not _importable(name)]
    for name in replaced:
        sys.modules[name] = _StandIn(name)
    try:
        return importlib.import_module("denoising_diffusion_pytorch")
    finally:
        for name in replaced:
            del sys.modules[name]
