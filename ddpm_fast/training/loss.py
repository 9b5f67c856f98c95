"""The training objective: noise an image, let the network undo it, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import q_sample, random_timesteps
from ..schedule import NoiseSchedule

LOSSES: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}
PREDICTIONS = ("epsilon", "x0", "v", "x_prev")


def diffusion_loss(
    model: Callable[..., Tensor],
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor | None = None,
    *,
    loss: str = "mse",
    prediction: str = "epsilon",
    weighting: Tensor | None = None,
    seed: int | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    step: int = 0,
    noise: Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """One loss a sample: ``mean((model(x_t, t) - target)^2)`` over the sample's elements, or the l1 or huber distance.

    With epsilon prediction and "mse" this is L_simple (Ho et al. 2020, eq. 14). Timesteps and noise that are not
    given are drawn from `seed`, streams "timesteps" and "training": pure functions of (seed, sample id, step).

    Args:
        model: called as ``model(x_t, t, **model_kwargs)``; returns a tensor of x0's shape.
        schedule: the forward process, T steps.
        x0: ``(N, C, *)`` clean images, floating point in [-1, 1], or uint8, which becomes ``x / 127.5 - 1``.
        t: ``(N,)`` int64 timesteps in [0, T).
        loss: "mse", "l1" or "huber" (quadratic below a difference of 1).
        prediction: what the network outputs: "epsilon"; "x0"; "v" (``sqrt(abar) noise - sqrt(1 - abar) x0``, Salimans
            and Ho 2022); "x_prev" (the mean of ``q(x_{t-1} | x_t, x0)``).
        weighting: ``(T,)`` factors, one a timestep, e.g. ``schedule.snr.clamp(max=5) / schedule.snr``.
        seed: needed unless both `t` and `noise` are given.
        sample_ids, step: what the draws depend on besides the seed; ids are 0 .. N-1 and `step` is the optimiser
            step by default.
        noise: ``(N, C, *)`` standard normal noise to use.
        model_kwargs: further keyword arguments of the model, e.g. labels.

    Returns:
        ``(N,)`` float32 losses.

    Raises:
        TypeError, ValueError: an unknown name, a wrong shape or dtype, or nothing to draw from.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {tuple(LOSSES)}, got {loss!r}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {PREDICTIONS}, got {prediction!r}")
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
    if weighting is not None and tuple(weighting.shape) != (schedule.timesteps,):
        raise ValueError(
            f"weighting must hold one factor for each of {schedule.timesteps} timesteps, got {tuple(weighting.shape)}"
        )
    if seed is None and (t is None or noise is None):
        raise ValueError("seed is needed to draw what is not given of t and noise")
    if t is None:
        assert seed is not None
        t = random_timesteps(
            x0.shape[0], schedule.timesteps, seed=seed, sample_ids=sample_ids, step=step, device=x0.device
        )
    x_t, noise = q_sample(
        x0, t, schedule, noise, seed=None if noise is not None else seed, sample_ids=sample_ids, step=step
    )
    target = _target(prediction, schedule, x0, x_t, t, noise)
    output = model(x_t, t, **(model_kwargs or {}))
    if output.shape != target.shape:
        raise ValueError(f"the model must return {tuple(target.shape)}, it returned {tuple(output.shape)}")
    losses = LOSSES[loss](output.float(), target.float(), reduction="none").flatten(1).mean(1)
    if weighting is not None:
        losses = losses * weighting.to(device=losses.device, dtype=losses.dtype)[t]
    return losses


def _target(prediction: str, schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    if prediction == "epsilon":
        return noise
    clean = x0.float() / 127.5 - 1.0 if x0.dtype == torch.uint8 else x0
    if prediction == "x0":
        return clean
    if prediction == "v":
        signal, sigma = _columns(schedule.noising_coefficients(t.device), t, x_t.ndim)
        return signal * noise - sigma * clean
    posterior = torch.stack((schedule.posterior_mean_coef1, schedule.posterior_mean_coef2), dim=1)
    from_x0, from_x_t = _columns(posterior.to(device=t.device, dtype=torch.float32), t, x_t.ndim)
    return from_x0 * clean + from_x_t * x_t


def _columns(table: Tensor, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """Both columns of a ``(T, 2)`` table at t, shaped to multiply images of `ndim` dimensions."""
    rows = table[t].reshape(-1, 2, *(1,) * (ndim - 1))
    return rows[:, 0], rows[:, 1]
