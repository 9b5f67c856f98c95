"""Training: loss, data sets, checkpoints and the loop."""

from __future__ import annotations

from .bound import BitsPerDim, bits_per_dim
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .datasets import ImageData, load_dataset
from .ema import averaged_model
from .loss import diffusion_loss
from .timesteps import LossSecondMoment, UniformTimesteps
from .trainer import TrainResult, train

__all__ = [
    "BitsPerDim",
    "ImageData",
    "LossSecondMoment",
    "TrainConfig",
    "TrainResult",
    "UniformTimesteps",
    "averaged_model",
    "bits_per_dim",
    "diffusion_loss",
    "load_checkpoint",
    "load_dataset",
    "save_checkpoint",
    "train",
]
