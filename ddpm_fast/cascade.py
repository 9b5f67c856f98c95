"""Cascades: what a super-resolution network is shown of the images of the stage before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.ops.noising import q_sample
from ddpm_fast.schedule import NoiseSchedule

__all__ = ["low_resolution"]

_MODES = ("nearest", "bilinear", "bicubic")


def low_resolution(
    images: Tensor,
    size: int | tuple[int, int],
    schedule: NoiseSchedule,
    t: int,
    *,
    mode: str = "nearest",
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Enlarged and noised images, and the noise level that goes with them.

    Conditioning augmentation: a network that has seen its low-resolution images noised forgives the faults of the
    stage before it (Ho, Saharia, Chan, Fleet, Norouzi, Salimans, "Cascaded Diffusion Models for High Fidelity Image
    Generation" (2022), section 4.2; Imagen fixes the level when it samples and tells it to the network). Both results
    go into the `model_kwargs` of the next stage's sampler, and into its `uncond_kwargs` under guidance.

    Args:
        images: floating-point ``(N, C, H, W)``, what the stage before made.
        size: height and width of the next stage's images.
        schedule: the schedule of the augmentation; :meth:`NoiseSchedule.log_snr` for Imagen's.
        t: how far to noise, in [0, T). Step t of T in continuous time is the time (t + 1) / T.
        mode: how to enlarge: "nearest", "bilinear" or "bicubic" (`torch.nn.functional.interpolate`).
        noise: ``(N, C, *size)`` standard normal; drawn from `seed` unless given.
        seed, sample_ids: as for `q_sample`; stream "augmentation", so that the seed of the next stage will do. The
            stages themselves need a seed each: a stage with that of the one before starts from the same noise.

    Returns:
        The noised images ``(N, C, *size)`` in the dtype of `images`, and ``(N,)``: what the network gets as their
        time, int64 or, for a log_snr schedule, the float32 log signal-to-noise ratio.

    Raises:
        TypeError, ValueError: for anything outside the shapes, dtypes and ranges above.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating-point (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
    if isinstance(t, bool) or not isinstance(t, int):
        raise TypeError(f"t must be an int, got {type(t).__name__}")
    if not 0 <= t < schedule.timesteps:
        raise ValueError(f"t must lie in [0, {schedule.timesteps}), got {t}")
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    samples, device = images.shape[0], images.device
    enlarged = F.interpolate(images, size, mode=mode)
    noised, _ = q_sample(
        enlarged,
        torch.full((samples,), t, dtype=torch.int64, device=device),
        schedule,
        noise,
        seed=seed,
        sample_ids=sample_ids,
        stream="augmentation",
    )
    return noised, schedule.network_times[t].to(device).expand(samples)
