"""The training objective: noise an image, let the network undo it, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.reference import target_loss as reference
from ..backends.reference.noising import as_image
from ..ops import bound_terms, noised, q_sample, randn, random_timesteps, target_loss
from ..schedule import NoiseSchedule
from ..solvers import PREDICTIONS, VARIANCES
from .network import call_network, network_time
from .tables import bound_coefficients, target_coefficients, x0_coefficients
from .weighting import named_weighting

LOSSES = (*reference.DISTANCES, "kl", "rescaled_kl", "hybrid")
_LEARNED = ("learned", "learned_range")
# The sample whose draws are a whole batch's: the last id, which no data set reaches.
_BATCH = 2**32 - 1


def diffusion_loss(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor | None = None,
    *,
    loss: str = "mse",
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    weighting: Tensor | str | None = None,
    seed: int | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    step: int = 0,
    noise: Tensor | None = None,
    offset_noise: float = 0.0,
    self_condition: bool | str = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """One loss a sample: ``mean((model(x_t, t) - target)^2)`` over the sample's elements, or another distance or bound.

    With epsilon prediction and "mse" this is L_simple (Ho et al. 2020, eq. 14). Timesteps and noise that are not
    given are drawn from `seed`, streams "timesteps" and "training": pure functions of (seed, sample id, step). Noise
    from the seed is not kept while the network runs, but drawn again for the comparison and for its gradient (on the
    CPU, for float32 or uint8 images).

    Args:
        model: called as ``model(x_t, t, **model_kwargs)``; returns a tensor of x0's shape, with a learned variance of
            twice the channels, or an output with ``.sample``. After ``schedule.respace(...)`` t are the original's.
        schedule: the forward process, T steps.
        x0: ``(N, C, *)`` clean images, floating point in [-1, 1], or uint8, which becomes ``x / 127.5 - 1``.
        t: ``(N,)`` int64 timesteps in [0, T).
        loss: "mse", "l1" or "huber" (quadratic below a difference of 1), which leave a learned variance untrained;
            "kl", the term of the variational bound in bits per dimension; "rescaled_kl", T times that, an estimate of
            the bound; "hybrid", mse + T / 1000 * kl in which only the learned variance gets a gradient from the second
            (Nichol and Dhariwal 2021, eq. 16).
        prediction: what the network outputs: "epsilon"; "x0"; "v" (``sqrt(abar) noise - sqrt(1 - abar) x0``, Salimans
            and Ho 2022); "x_prev" (the mean of ``q(x_{t-1} | x_t, x0)``).
        variance: that of p, for the bound: "fixed_small", "fixed_large", "learned" or "learned_range".
        weighting: ``(T,)`` factors, one a timestep, or the name of one of :mod:`ddpm_fast.training.weighting`:
            "min_snr", "p2", "truncated_snr".
        seed: needed unless both `t` and `noise` are given.
        sample_ids, step: what the draws depend on besides the seed; ids are 0 .. N-1 and `step` is the optimiser
            step by default.
        noise: ``(N, C, *)`` standard normal noise to use.
        offset_noise: standard deviation of a number drawn once for each sample and channel and added to the noise
            (Guttenberg 2023, "Diffusion with Offset Noise"). Needs the seed.
        self_condition: for half of the steps, chosen from the seed, the model runs twice, and gets its first
            estimate of x0, without a gradient, as the keyword argument ``x_self_cond`` (or the one that a string
            names), else None (Chen, Zhang and Hinton 2023, "Analog Bits", section 3).
        model_kwargs: further keyword arguments of the model, e.g. labels.

    Returns:
        ``(N,)`` float32 losses (float64 for float64 images).

    Raises:
        TypeError, ValueError: an unknown name, a wrong shape or dtype, nothing to draw from, "hybrid" without a learned
            variance, or a bound for an x0 that needs a gradient.
    """
    _check(schedule, x0, loss, prediction, variance)
    factors = _factors(weighting, schedule, prediction, x0.device)
    if seed is None and (t is None or noise is None or offset_noise or self_condition):
        raise ValueError("seed is needed to draw what is not given of t and noise, an offset, and to self-condition")
    if offset_noise < 0:
        raise ValueError(f"offset_noise must be at least 0, got {offset_noise}")
    draw: dict[str, Any] = {"seed": seed, "sample_ids": sample_ids, "step": step}
    if t is None:
        assert seed is not None
        t = random_timesteps(x0.shape[0], schedule.timesteps, device=x0.device, **draw)
    if noise is None and not offset_noise and _can_draw_again(x0):
        x_t, target_noise = noised(x0, t, schedule, **draw), draw
    else:
        if offset_noise:
            noise = _with_offset(noise, offset_noise, x0, draw)
        x_t, noise = q_sample(x0, t, schedule, noise, **(draw if noise is None else {}))
        target_noise = {"noise": noise}

    channels = x0.shape[1] * (2 if variance in _LEARNED else 1)
    time, kwargs = network_time(schedule, t), dict(model_kwargs or {})
    if self_condition:
        assert seed is not None
        name = self_condition if isinstance(self_condition, str) else "x_self_cond"
        kwargs[name] = _estimate(model, schedule, x_t, t, time, prediction, channels, seed, step, kwargs)
    output = call_network(model, x_t, time, kwargs, channels)
    losses = _compared(schedule, x0, x_t, t, output, loss, prediction, variance, target_noise)
    return losses if factors is None else losses * factors[t]


def _check(schedule: NoiseSchedule, x0: Any, loss: str, prediction: str, variance: str) -> None:
    for name, value, choices in (
        ("loss", loss, LOSSES),
        ("prediction", prediction, PREDICTIONS),
        ("variance", variance, VARIANCES),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    if loss == "hybrid" and variance not in _LEARNED:
        raise ValueError(
            f"loss='hybrid' trains a learned variance: variance must be one of {_LEARNED}, got {variance!r}"
        )
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
    if x0.requires_grad and loss not in reference.DISTANCES:
        raise ValueError(f"loss={loss!r} has no gradient with respect to x0: detach it")


def _factors(
    weighting: Tensor | str | None, schedule: NoiseSchedule, prediction: str, device: torch.device
) -> Tensor | None:
    if weighting is None:
        return None
    if isinstance(weighting, str):
        return named_weighting(weighting, schedule, prediction, device)
    if tuple(weighting.shape) != (schedule.timesteps,):
        raise ValueError(
            f"weighting must hold one factor for each of {schedule.timesteps} timesteps, got {tuple(weighting.shape)}"
        )
    return weighting.to(device=device, dtype=torch.float32)


def _can_draw_again(x0: Tensor) -> bool:
    """On a GPU the reference alone could draw the noise again, in dozens of kernels: it is kept there."""
    return x0.is_cpu and x0.dtype in (torch.float32, torch.uint8) and not x0.requires_grad


def _with_offset(noise: Tensor | None, offset_noise: float, x0: Tensor, draw: dict[str, Any]) -> Tensor:
    if noise is None:
        dtype = x0.dtype if x0.is_floating_point() else torch.float32
        noise = randn(x0.shape, stream="training", dtype=dtype, device=x0.device, **draw)
    # Element 0 of the stream decides on mirroring.
    samples, channels = x0.shape[:2]
    drawn = randn((samples, 1 + channels), stream="augmentation", dtype=noise.dtype, device=x0.device, **draw)
    return noise + offset_noise * drawn[:, 1:].reshape(samples, channels, *[1] * (x0.ndim - 2))


def _estimate(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x_t: Tensor,
    t: Tensor,
    time: Tensor,
    prediction: str,
    channels: int,
    seed: int,
    step: int,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The model's own x0, for the half of the steps that have one."""
    coin = randn((1, 1), seed=seed, sample_ids=[_BATCH], step=step, stream="augmentation")
    if coin.item() < 0:
        return None
    with torch.no_grad():
        output = call_network(model, x_t, time, kwargs, channels)[:, : x_t.shape[1]]
        from_x, from_output, mean_from_x0, mean_from_x = (
            column.reshape(-1, *[1] * (x_t.ndim - 1))
            for column in x0_coefficients(schedule, prediction, x_t.device)[t].unbind(1)
        )
        if prediction == "x0":
            return output
        if prediction == "x_prev":
            return (output - mean_from_x * x_t) / mean_from_x0
        return from_x * x_t - from_output * output


def _compared(
    schedule: NoiseSchedule,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    output: Tensor,
    loss: str,
    prediction: str,
    variance: str,
    target_noise: dict[str, Any],
) -> Tensor:
    def bound(mean_gradient: bool) -> Tensor:
        state = x_t if x_t.dtype == torch.float64 else x_t.float()
        coefficients = bound_coefficients(schedule, prediction, variance, state.dtype, x_t.device)
        kind = variance if variance in _LEARNED else "fixed"
        terms, _ = bound_terms(
            x0, state, output, t, coefficients, prediction=prediction, variance=kind, mean_gradient=mean_gradient
        )
        return terms

    if loss == "kl":
        return bound(True)
    if loss == "rescaled_kl":
        return schedule.timesteps * bound(True)
    distance = "mse" if loss == "hybrid" else loss
    coefficients = target_coefficients(schedule, prediction, x_t.device)
    mean = output[:, : x0.shape[1]]
    noise: Tensor | None = target_noise.get("noise")
    if noise is not None and (x0.requires_grad or noise.requires_grad):
        losses = reference.losses(reference.difference(mean, as_image(x0), t, coefficients, noise), distance)
        losses = losses if x0.dtype == torch.float64 else losses.float()
    else:
        losses = target_loss(mean, x0, t, coefficients, distance=distance, **target_noise)
    return losses if loss != "hybrid" else losses + schedule.timesteps / 1000.0 * bound(False)
