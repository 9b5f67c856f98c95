"""Imports denoising_diffusion_pytorch without what only its Trainer needs."""

from __future__ import annotations

import types

from tests.third_party.stand_ins import import_package as import_with_stand_ins

_TRAINER_ONLY = (
    "torchvision",
    "torchvision.transforms",
    "accelerate",
    "pytorch_fid",
    "pytorch_fid.fid_score",
    "pytorch_fid.inception",
)


def import_package() -> types.ModuleType:
    """The package denoising_diffusion_pytorch; ImportError if it is not installed."""
    return import_with_stand_ins("denoising_diffusion_pytorch", _TRAINER_ONLY)
