"""The variational bound on the negative log-likelihood, term by term, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..backends.reference.noising import as_image
from ..ops import bound_terms, q_sample
from ..sampler.arguments import parse_clip
from ..sampler.network import evaluating, home
from ..schedule import NoiseSchedule
from .network import call_network, network_time
from .tables import bound_coefficients

NoiseFunction = Callable[[int, int, tuple[int, ...]], Tensor]


class BitsPerDim(NamedTuple):
    """The bound of N images, in bits per dimension.

    Attributes:
        total: ``(N,)``, the sum of the prior and of all columns of `vlb`.
        prior: ``(N,)``, L_T: KL(q(x_T | x_0) || N(0, I)).
        vlb: ``(N, T)``, L_{t-1} from t = T-1 down to 1, then L_0, the decoder's.
        mse: ``(N, T)``, mean squared error of epsilon (that of the clipped x0), in the same order.
        x0_mse: ``(N, T)``, mean squared error of the clipped x0.
    """

    total: Tensor
    prior: Tensor
    vlb: Tensor
    mse: Tensor
    x0_mse: Tensor


@torch.no_grad()
def bits_per_dim(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x0: Tensor,
    *,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    clip: Literal["auto"] | tuple[float, float] | None = "auto",
    seed: int | Tensor = 0,
    noise: Tensor | NoiseFunction | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> BitsPerDim:
    """An upper bound on ``-log2 p(x0)`` a dimension, by one draw of x_t for each of the T timesteps.

    Ho et al. 2020, equations 5 and 13, as openai's ``calc_bpd_loop`` evaluates them: the model runs T times on the
    batch. The bound is that of the ancestral sampler with this schedule, so a respaced one has a looser bound.

    Args:
        model: called as ``model(x_t, t, **model_kwargs)``, in evaluation mode; returns ``(N, C, *)``, with a learned
            variance ``(N, 2C, *)``, or an output with ``.sample``.
        schedule: the process, T steps.
        x0: ``(N, C, *)`` 8-bit images: uint8, or floating point in [-1, 1] with ``byte / 127.5 - 1``.
        prediction: what the network outputs: "epsilon", "x0", "v" or "x_prev".
        variance: "fixed_small", "fixed_large", "learned" or "learned_range".
        clip: the range that x0 is clipped to; "auto" is (-1, 1).
        seed: of the noise: column i of the result has the noise of ``q_sample(..., seed=seed, step=i)``.
        noise: ``(T, N, C, *)`` to use instead, a row a column; or ``noise(column, t, shape)``.
        model_kwargs: further keyword arguments of the model.

    Returns:
        float32 tensors on x0's device (float64 for a float64 x0).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong shape, dtype, name or range, values of x0 outside [-1, 1], or a schedule without a decoder
            (log_snr) or with coefficients beyond float32 (epsilon prediction and zero terminal SNR).
    """
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
    x0 = as_image(x0)
    if not x0.is_floating_point() or x0.ndim < 2:
        raise ValueError(f"x0 must be uint8 or floating point (N, C, *), got {x0.dtype} of shape {tuple(x0.shape)}")
    x0 = x0 if x0.dtype == torch.float64 else x0.float()
    if x0.numel() == 0 or not bool((x0.abs() <= 1.0).all()):
        raise ValueError("x0 must hold values, all of them in [-1, 1]")
    shape, device, steps = tuple(x0.shape), x0.device, schedule.timesteps
    bounds = parse_clip(clip, (-1.0, 1.0))
    coefficients = bound_coefficients(schedule, prediction, variance, x0.dtype, device)
    if isinstance(noise, Tensor):
        if noise.ndim != x0.ndim + 1 or len(noise) < steps or noise.shape[1:] != x0.shape:
            raise ValueError(f"noise must have {steps} rows of shape {shape}, got shape {tuple(noise.shape)}")
    elif noise is not None and not callable(noise):
        raise TypeError(f"noise must be a tensor of rows or noise(column, t, shape), got {type(noise).__name__}")
    kind = "fixed" if variance.startswith("fixed") else variance
    channels = x0.shape[1] * (1 if kind == "fixed" else 2)
    dtype = home(model)[1] if isinstance(model, torch.nn.Module) else x0.dtype
    columns: list[tuple[Tensor, Tensor]] = []
    with evaluating(model):
        for column, number in enumerate(reversed(range(steps))):
            t = torch.full((shape[0],), number, dtype=torch.int64, device=device)
            if noise is None:
                x_t, _ = q_sample(x0, t, schedule, seed=seed, step=column)
            else:
                row = noise[column] if isinstance(noise, Tensor) else noise(column, number, shape)
                x_t, _ = q_sample(x0, t, schedule, row)
            output = call_network(model, x_t.to(dtype), network_time(schedule, t), model_kwargs or {}, channels)
            columns.append(
                bound_terms(x0, x_t, output, t, coefficients, prediction=prediction, variance=kind, clip=bounds)
            )
    vlb, x0_mse = (torch.stack(part, dim=1) for part in zip(*columns, strict=True))
    # x_t fixes x0 given epsilon and the other way round: their errors differ by a factor.
    mse = x0_mse * schedule.snr.flip(0).to(device=device, dtype=x0.dtype)
    abar = float(schedule.alphas_cumprod[-1])
    # KL(N(m, s^2) || N(0, 1)) with m^2 = abar x0^2, s^2 = 1 - abar, in which 1 - abar itself cancels.
    constant = -abar - math.log1p(-abar) if abar > 0.0 else 0.0
    power = x0.double().square().flatten(1).mean(1)
    prior = (0.5 * (abar * power + constant) / math.log(2)).to(x0.dtype)
    total = (vlb.double().sum(1) + prior.double()).to(x0.dtype)
    return BitsPerDim(total, prior, vlb, mse, x0_mse)
