"""Weights of the timesteps in the training objective, each a float64 ``(T,)`` tensor for ``diffusion_loss``.

The papers weigh the squared error of x0. With snr = abar / (1 - abar), that error is the squared error of epsilon
divided by snr, and of v divided by snr + 1, so that a weight of x0's error becomes one of whatever is predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..schedule import NoiseSchedule
from ..solvers import PREDICTIONS


def min_snr(schedule: NoiseSchedule, gamma: float = 5.0, *, prediction: str = "epsilon") -> Tensor:
    """x0's error weighed by min(snr, gamma) (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR").

    Args:
        schedule: its T timesteps.
        gamma: the largest weight, positive.
        prediction: what the loss compares: "epsilon", "x0", "v" or "x_prev".

    Raises:
        ValueError: an unknown prediction, a value out of range, or a weight that is not finite.
    """
    _check_positive("gamma", gamma)
    return _converted(schedule, schedule.snr.clamp(max=gamma), prediction, f"min_snr({gamma})")


def p2(schedule: NoiseSchedule, gamma: float = 1.0, k: float = 1.0, *, prediction: str = "epsilon") -> Tensor:
    """epsilon's error weighed by 1 / (k + snr)^gamma (Choi et al. 2022, "Perception Prioritized Training").

    Args:
        gamma, k: of the formula, positive.
        schedule, prediction: as for :func:`min_snr`.

    Raises: as :func:`min_snr`.
    """
    _check_positive("gamma", gamma)
    _check_positive("k", k)
    snr = schedule.snr
    if prediction == "epsilon":  # also where snr is 0
        return (k + snr) ** -gamma
    return _converted(schedule, snr * (k + snr) ** -gamma, prediction, f"p2({gamma}, {k})")


def truncated_snr(schedule: NoiseSchedule, *, prediction: str = "epsilon") -> Tensor:
    """x0's error weighed by max(snr, 1) (Salimans and Ho 2022, "Progressive Distillation", section 4).

    Args:
        schedule, prediction: as for :func:`min_snr`.

    Raises: as :func:`min_snr`.
    """
    return _converted(schedule, schedule.snr.clamp(min=1.0), prediction, "truncated_snr")


WEIGHTINGS: dict[str, Callable[..., Tensor]] = {"min_snr": min_snr, "p2": p2, "truncated_snr": truncated_snr}
"""By name, with the defaults of their papers."""


@lru_cache(maxsize=64)
def named_weighting(name: str, schedule: NoiseSchedule, prediction: str, device: torch.device) -> Tensor:
    """float32 ``(T,)`` on a device. Raises ValueError for an unknown name, and as the weighting does."""
    if name not in WEIGHTINGS:
        raise ValueError(f"weighting must be a tensor or one of {tuple(WEIGHTINGS)}, got {name!r}")
    return WEIGHTINGS[name](schedule, prediction=prediction).float().to(device)


def _converted(schedule: NoiseSchedule, of_x0: Tensor, prediction: str, name: str) -> Tensor:
    """The weight of the predicted quantity's error that weighs x0's by `of_x0`."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {PREDICTIONS}, got {prediction!r}")
    snr = schedule.snr
    error = {  # of the prediction, for an error 1 of x0
        "epsilon": snr,
        "x0": torch.ones_like(snr),
        "v": snr + 1.0,
        "x_prev": schedule.posterior_mean_coef1.square(),
    }[prediction]
    weights = of_x0 / error
    if not torch.isfinite(weights).all():
        t = int((~torch.isfinite(weights)).nonzero()[0])
        raise ValueError(f"{name} has no finite weight for {prediction} at timestep {t}, where the snr is {snr[t]:.3g}")
    return weights


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
