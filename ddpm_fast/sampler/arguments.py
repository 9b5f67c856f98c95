"""What a Sampler may be given, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.modes import Mode
from ddpm_fast.ops import _check
from ddpm_fast.sampler.inpaint import BLENDS
from ddpm_fast.sampler.network import TimeFunction
from ddpm_fast.sampler.step import Hooks
from ddpm_fast.schedule import NoiseSchedule, kept_steps
from ddpm_fast.solvers import SIGMA_SOLVERS, check_snr

HISTORIES = ("plms", "dpmpp_2m")
"""Solvers whose steps depend on the ones before."""


def parse_steps(
    schedule: NoiseSchedule,
    mode: Mode,
    steps: int | str | None,
    timesteps: Iterable[int] | Tensor | str | None,
    solver: str,
) -> tuple[NoiseSchedule, list[int] | None]:
    """The schedule whose steps are made, and the numbers of those in it, ascending, or None for all."""
    if isinstance(timesteps, str):
        return _levels(schedule, steps, timesteps, solver), None
    return schedule, _chosen(schedule, mode, steps, timesteps)


def _levels(schedule: NoiseSchedule, steps: int | str | None, name: str, solver: str) -> NoiseSchedule:
    if name != "karras":
        raise ValueError(f"timesteps must be the steps' numbers or 'karras', got {name!r}")
    if solver not in SIGMA_SOLVERS:
        raise ValueError(f"timesteps='karras' is for solver {', '.join(SIGMA_SOLVERS)}, got {solver!r}")
    if steps is None or isinstance(steps, str):
        raise ValueError(f"timesteps='karras' needs steps, the number of them, got {steps!r}")
    return schedule.karras(steps)


def _chosen(
    schedule: NoiseSchedule, mode: Mode, steps: int | str | None, timesteps: Iterable[int] | Tensor | None
) -> list[int] | None:
    if timesteps is None:
        if steps is None:
            return None
        if isinstance(steps, str):
            return kept_steps(steps, None, schedule.timesteps)
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps must be None, an int or a string, got {type(steps).__name__}")
        return mode.choose(schedule, steps)
    if steps is not None:
        raise ValueError("steps and timesteps exclude each other: both choose the steps to make")
    if isinstance(timesteps, int) or not isinstance(timesteps, Iterable):
        raise TypeError(f"timesteps must be the steps' numbers, got {type(timesteps).__name__}")
    chosen = timesteps.tolist() if isinstance(timesteps, Tensor) else list(timesteps)
    if len(chosen) > 1 and chosen[0] < chosen[-1]:
        raise ValueError(f"timesteps must be descending, got {chosen[0]} .. {chosen[-1]}")
    return kept_steps(chosen, None, schedule.timesteps)


def parse_hooks(
    guidance_rescale: float,
    guidance_scale: float | None,
    denoised_fn: Callable[[Tensor], Tensor] | None,
    cond_fn: Callable[..., Tensor] | None,
    cond_mode: str,
    solver: str,
    prediction: str,
) -> Hooks:
    rescale = parse_number("guidance_rescale", guidance_rescale, 0.0, 1.0)
    if rescale != 0.0 and guidance_scale is None:
        raise ValueError("guidance_rescale needs guidance_scale: it rescales the guided output")
    for name, function in (("denoised_fn", denoised_fn), ("cond_fn", cond_fn)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")
    if denoised_fn is not None and prediction == "x_prev":
        raise ValueError("denoised_fn changes x0, which prediction='x_prev' makes no use of")
    if cond_mode not in ("mean", "score"):
        raise ValueError(f"cond_mode must be 'mean' or 'score', got {cond_mode!r}")
    if cond_fn is not None:
        if solver == "plms":
            raise ValueError("solver='plms' has no cond_fn: use solver='ddim' with cond_mode='score'")
        if cond_mode == "mean" and solver != "ddpm":
            raise ValueError(f"cond_mode='mean' moves the mean of a DDPM step: use 'score' with solver={solver!r}")
        if cond_mode == "score" and prediction == "x_prev":
            raise ValueError("cond_mode='score' changes epsilon, which prediction='x_prev' makes no use of")
    return Hooks(rescale, denoised_fn, cond_fn, cond_mode)


def parse_corrector(corrector_steps: int, corrector_snr: float, solver: str, hooks: Hooks) -> int:
    check_snr(corrector_snr)
    if isinstance(corrector_steps, bool) or not isinstance(corrector_steps, int):
        raise TypeError(f"corrector_steps must be an int, got {type(corrector_steps).__name__}")
    if corrector_steps < 0:
        raise ValueError(f"corrector_steps must be at least 0, got {corrector_steps}")
    if corrector_steps > 0 and solver in HISTORIES:
        raise ValueError(f"solver={solver!r} has a history, which a corrector would belie: corrector_steps=0")
    if corrector_steps > 0 and hooks.cond_fn is not None and hooks.cond_mode == "mean":
        raise ValueError("cond_mode='mean' moves the mean of a DDPM step: use 'score' with corrector_steps")
    return corrector_steps


def parse_self_condition(self_condition: bool | str) -> str | None:
    """The keyword that the network gets the last x0 as."""
    if isinstance(self_condition, str):
        if not self_condition.isidentifier():
            raise ValueError(f"self_condition must name a keyword of the model, got {self_condition!r}")
        return self_condition
    if not isinstance(self_condition, bool):
        raise TypeError(f"self_condition must be a bool or a keyword's name, got {type(self_condition).__name__}")
    return "x_self_cond" if self_condition else None


def parse_clip(
    clip: Literal["auto"] | tuple[float, float] | None, auto: tuple[float, float] | None
) -> tuple[float, float] | None:
    if clip is None:
        return None
    if isinstance(clip, str):
        if clip == "auto":
            return auto
        raise ValueError(f"clip must be 'auto', None or (low, high), got {clip!r}")
    if not isinstance(clip, (tuple, list)):
        raise TypeError(f"clip must be 'auto', None or (low, high), got {type(clip).__name__}")
    if len(clip) != 2:
        raise ValueError(f"clip must be 'auto', None or (low, high), got {len(clip)} values")
    low, high = (parse_number("clip", value) for value in clip)
    if low >= high:
        raise ValueError(f"clip must be (low, high) with low < high, got {(low, high)}")
    return (low, high)


def parse_threshold(threshold: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if threshold is None:
        return None
    maximum = math.inf
    if isinstance(threshold, (tuple, list)):
        if len(threshold) != 2:
            raise ValueError(f"threshold as a tuple must be (quantile, maximum), got {len(threshold)} values")
        ratio, maximum = (parse_number("threshold", value) for value in threshold)
    else:
        ratio = parse_number("threshold", threshold)
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"threshold's quantile must lie in (0, 1], got {ratio}")
    if maximum < 1.0:
        raise ValueError(f"threshold's maximum must be at least 1, got {maximum}")
    return ratio, maximum


def parse_time_input(time_input: str | TimeFunction, schedule: NoiseSchedule) -> TimeFunction | None:
    if callable(time_input):
        return time_input
    if time_input == "auto":
        return None
    if time_input == "scaled":
        if schedule.name == "log_snr":
            raise ValueError("time_input='scaled' scales timesteps, and a log_snr schedule has none: use 'auto'")
        factor = 1000.0 / schedule.original_timesteps
        return lambda t: t.float() * factor
    raise ValueError(f"time_input must be 'auto', 'scaled' or a function, got {time_input!r}")


def parse_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a float, if it is a finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if not low <= value <= high:
        allowed = f"lie in [{low}, {high}]" if math.isfinite(high) else f"be at least {low}"
        raise ValueError(f"{name} must {allowed}, got {value}")
    return float(value)


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, (str, int)) or not isinstance(shape, Sequence):
        raise TypeError(f"shape must be (N, C, *), got {type(shape).__name__}")
    size = tuple(shape)
    if len(size) < 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(f"shape must be (N, C, *) of ints >= 1, got {size}")
    return size


def parse_inpainting(
    mask: Tensor | None,
    known: Tensor | None,
    blend: str,
    resample: int,
    size: tuple[int, ...],
    device: torch.device,
) -> Tensor | None:
    """The mask in float32 and of the samples' shape, or None without one; `known`, `blend` and `resample` checked."""
    if blend not in BLENDS:
        raise ValueError(f"blend must be one of {', '.join(BLENDS)}, got {blend!r}")
    if isinstance(resample, bool) or not isinstance(resample, int):
        raise TypeError(f"resample must be an int, got {type(resample).__name__}")
    if resample < 1:
        raise ValueError(f"resample must be at least 1, got {resample}")
    if resample > 1 and blend != "repaint":
        raise ValueError(f"resample={resample} needs blend='repaint', got blend={blend!r}")
    if (mask is None) != (known is None):
        raise ValueError("mask and known need each other: the images that are known, and where")
    if mask is None or known is None:
        return None
    for name, given in (("mask", mask), ("known", known)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
    check_state("known", known, size, device)
    if not (mask.dtype.is_floating_point or mask.dtype == torch.bool) or mask.device != device:
        raise ValueError(f"mask must be floating-point or bool on {device}, got {mask.dtype} on {mask.device}")
    try:
        return mask.float().expand(size)
    except RuntimeError:
        raise ValueError(f"mask must broadcast to {size}, got shape {tuple(mask.shape)}") from None


def check_state(name: str, given: Tensor, size: tuple[int, ...], device: torch.device) -> None:
    if given.shape != size or given.dtype != torch.float32 or given.device != device:
        raise ValueError(
            f"{name} must be float32 of shape {size} on {device}, "
            f"got {given.dtype} of shape {tuple(given.shape)} on {given.device}"
        )
    if name == "out" and not _check.is_dense(given):
        raise ValueError(f"out must be contiguous or channels_last, got strides {given.stride()}")
