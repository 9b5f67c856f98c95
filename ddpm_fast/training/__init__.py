"""Training: loss, data sets, checkpoints and the loop."""

from __future__ import annotations

from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainConfig
from .datasets import ImageData, load_dataset
from .ema import EMA
from .loss import diffusion_loss
from .trainer import TrainResult, train

__all__ = [
    "EMA",
    "ImageData",
    "TrainConfig",
    "TrainResult",
    "diffusion_loss",
    "load_checkpoint",
    "load_dataset",
    "save_checkpoint",
    "train",
]
