"""What the losses and the bound read of a schedule, made once for each device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..schedule import NoiseSchedule
from ..solvers import ddpm_table


@lru_cache(maxsize=64)
def target_coefficients(schedule: NoiseSchedule, prediction: str, device: torch.device) -> Tensor:
    """float32 ``(T, 2)``: the factors of the noise and of x0 in what a network is to predict."""
    one = torch.ones(schedule.timesteps, dtype=torch.float64)
    signal, sigma = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    from_x0, from_x_t = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    columns = {
        "epsilon": (one, 0 * one),
        "x0": (0 * one, one),
        "v": (signal, -sigma),
        "x_prev": (from_x_t * sigma, from_x0 + from_x_t * signal),
    }[prediction]
    return torch.stack(columns, dim=1).float().to(device)


@lru_cache(maxsize=64)
def x0_coefficients(schedule: NoiseSchedule, prediction: str, device: torch.device) -> Tensor:
    """float32 ``(T, 4)``: how x0 follows from x_t and the output, and the posterior's mean from x0 and x_t."""
    return ddpm_table(schedule, prediction=prediction).rows.flip(0)[:, :4].to(device)


@lru_cache(maxsize=64)
def bound_coefficients(
    schedule: NoiseSchedule, prediction: str, variance: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``(T, 7)``, the columns of :data:`ddpm_fast.ops.bound.COLUMNS`; a fixed log variance stands in log_max.

    Raises:
        ValueError: as :func:`ddpm_fast.solvers.ddpm_table`, and for a continuous-time schedule, whose last level is
            noisy: it has no decoder of x0.
    """
    if schedule.network_times.is_floating_point():
        raise ValueError("a log_snr schedule has no bound: its cleanest level is noisy, and nothing decodes it")
    table = ddpm_table(schedule, prediction=prediction, variance=variance).rows64.flip(0)
    x0_from_x, x0_from_output, mean_from_x0, mean_from_x, _, log_min, log_max, _ = table.unbind(1)
    log_posterior = schedule.posterior_log_variance_clipped
    if variance == "fixed_small":
        log_max = log_posterior
    elif variance == "fixed_large":
        log_max = torch.cat([log_posterior[:1], schedule.betas[1:].log()])
    columns = [x0_from_x, x0_from_output, mean_from_x0, mean_from_x, log_posterior, log_min, log_max]
    return torch.stack(columns, dim=1).to(device=device, dtype=dtype)
