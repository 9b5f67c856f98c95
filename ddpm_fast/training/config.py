"""The settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..nn import UNetConfig
from ..ops.conv import MODES as CONV_MODES
from ..solvers import PREDICTIONS, VARIANCES
from .datasets import DATASETS
from .loss import LOSSES
from .timesteps import TIMESTEP_SAMPLERS
from .weighting import WEIGHTINGS

PRECISIONS = ("float32", "bfloat16")
LR_DECAYS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines the weights a run ends with, apart from the machine it runs on.

    Args:
        dataset: "digits", "fashion-mnist" or "folder" (see :func:`ddpm_fast.training.load_dataset`).
        data_folder: where the data set's files are, None for digits; checkpoints do not record it.
        image_size: side in pixels, for "folder" only.
        unet: the network.
        schedule, timesteps: a name that :meth:`NoiseSchedule.named` knows, and T.
        prediction, loss, variance, weighting, offset_noise: as for :func:`diffusion_loss`; prediction "epsilon", "x0"
            or "v", weighting a name or None. A learned variance needs a network with `learned_variance`. A network with
            `self_condition` is trained so.
        timestep_sampler: "uniform", or "loss_second_moment" (:class:`ddpm_fast.training.LossSecondMoment`).
        steps: optimiser steps of the whole run.
        batch_size: images a step.
        accumulate: parts that a batch is cut into, one after the other through the network, to need less memory.
        precision: "float32", or "bfloat16" for convolutions and matrix products (torch.autocast); weights, norms' sums
            and losses are float32.
        conv_mode: how 3x3 convolutions in float32 on the CPU are computed, see :func:`ddpm_fast.conv3x3`. With "fast"
            the whole gradient's error is about that of torch's own convolutions (docs/training.md). The averaged
            network that a run ends with is in the default mode.
        gradient_checkpointing: keep a block's input only, and compute the block again for its gradient.
        learning_rate, weight_decay: of AdamW.
        warmup_steps: the learning rate rises linearly over these.
        lr_decay: what it does afterwards: "constant", or fall to 0 at `steps`, "linear" or "cosine".
        gradient_clip: largest norm of the gradient.
        ema_decay: of the moving average that is kept as the result.
        flip: mirror half of the images, chosen at random.
        seed: of initial weights, order of the data, timesteps, noise, flips and dropout.

    Raises:
        ValueError: a value outside what is described above, naming the field.
    """

    dataset: str = "fashion-mnist"
    data_folder: str | None = None
    image_size: int | None = None
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: str = "linear"
    timesteps: int = 1000
    prediction: str = "epsilon"
    loss: str = "mse"
    variance: str = "fixed_small"
    weighting: str | None = None
    timestep_sampler: str = "uniform"
    offset_noise: float = 0.0
    steps: int = 10000
    batch_size: int = 64
    accumulate: int = 1
    precision: str = "float32"
    conv_mode: str = "fast"
    gradient_checkpointing: bool = False
    learning_rate: float = 4e-4
    weight_decay: float = 0.0
    warmup_steps: int = 100
    lr_decay: str = "constant"
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("dataset", DATASETS),
            ("loss", LOSSES),
            ("prediction", tuple(p for p in PREDICTIONS if p != "x_prev")),
            ("variance", VARIANCES),
            ("weighting", (None, *WEIGHTINGS)),
            ("timestep_sampler", tuple(TIMESTEP_SAMPLERS)),
            ("precision", PRECISIONS),
            ("conv_mode", CONV_MODES),
            ("lr_decay", LR_DECAYS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, smallest in (
            ("timesteps", 1),
            ("steps", 1),
            ("batch_size", 1),
            ("accumulate", 1),
            ("warmup_steps", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"{name} must be an integer of at least {smallest}, got {value!r}")
        for name in ("learning_rate", "gradient_clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        for name in ("weight_decay", "offset_noise"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate must divide batch_size {self.batch_size}, got {self.accumulate}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay!r}")
        learned = self.variance in ("learned", "learned_range")
        if self.unet.output_channels != self.unet.in_channels * (2 if learned else 1):
            raise ValueError(
                f"variance={self.variance!r} needs a network with {'twice ' if learned else ''}as many output as input "
                f"channels, got {self.unet.output_channels} and {self.unet.in_channels}"
            )
        if self.loss == "hybrid" and not learned:
            raise ValueError(f"loss='hybrid' trains a learned variance, got variance={self.variance!r}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimiser step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.lr_decay == "linear":
            return self.learning_rate * (1.0 - progress)
        if self.lr_decay == "cosine":
            return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.learning_rate

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold."""
        return {**asdict(self), "unet": self.unet.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`. Raises ValueError for fields that do not exist."""
        unknown = sorted(set(values) - {item.name for item in fields(cls)})
        if unknown:
            raise ValueError(f"unknown fields in a training config: {unknown}")
        return cls(**{**values, "unet": UNetConfig.from_dict(values.get("unet", {}))})
