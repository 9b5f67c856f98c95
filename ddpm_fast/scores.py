"""The score-matching side of a diffusion model: scores, Tweedie's x0, noise levels, exact likelihoods.

The score of a noised distribution is the gradient of its log density. A network that predicts the noise knows it:
``score(x_t, t) = -epsilon(x_t, t) / sqrt(1 - abar_t)`` (Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole,
"Score-Based Generative Modeling through Stochastic Differential Equations" (2021), section 3; Vincent 2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.ops import _check
from ddpm_fast.ops.random import randn
from ddpm_fast.sampler.network import evaluating, home, output_tensor
from ddpm_fast.schedule import NoiseSchedule

__all__ = [
    "epsilon_from_score",
    "log_likelihood",
    "score_from_epsilon",
    "sigma_from_timestep",
    "timestep_from_sigma",
    "x0_from_epsilon",
]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PREDICTIONS = ("epsilon", "x0", "v")
_DIVERGENCES = ("hutchinson", "exact")


# ---------------------------------------------------------------------- what a prediction of the noise says


def score_from_epsilon(epsilon: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The score ``-epsilon / sqrt(1 - abar_t)`` of the distribution at timestep t.

    Args:
        epsilon: ``(N, C, *)`` floating point, the network's prediction of the noise.
        t: int64 ``(N,)`` in [0, T), counted in `schedule`.
        schedule: the noise schedule.

    Returns:
        ``(N, C, *)`` in epsilon's dtype; half precision is computed in float32 and rounded once. Differentiable.

    Raises:
        TypeError: `epsilon` or `t` is no tensor, or `schedule` no NoiseSchedule.
        ValueError: another shape, dtype or device, or a timestep outside [0, T).
    """
    _, deviation = _levels("epsilon", epsilon, t, schedule)
    return (-epsilon / deviation).to(epsilon.dtype)


def epsilon_from_score(score: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The noise ``-sqrt(1 - abar_t) * score``: the inverse of :func:`score_from_epsilon`, with its errors."""
    _, deviation = _levels("score", score, t, schedule)
    return (-deviation * score).to(score.dtype)


def x0_from_epsilon(x_t: Tensor, epsilon: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Tweedie's estimate ``E[x_0 | x_t] = (x_t - sqrt(1 - abar_t) * epsilon) / sqrt(abar_t)``.

    In terms of the score it is ``(x_t + (1 - abar_t) * score) / sqrt(abar_t)`` (Efron 2011, eq. 1.4).

    Args:
        x_t: ``(N, C, *)`` floating point.
        epsilon: as x_t.
        t: int64 ``(N,)`` in [0, T), counted in `schedule`.
        schedule: the noise schedule.

    Returns:
        ``(N, C, *)`` in x_t's dtype; half precision is computed in float32 and rounded once. Differentiable.

    Raises:
        TypeError: as :func:`score_from_epsilon`.
        ValueError: as there; x_t and epsilon of different shapes, dtypes or devices; a schedule that ends without
            signal (zero terminal signal-to-noise ratio), where the noise says nothing about x_0.
    """
    signal, deviation = _levels("x_t", x_t, t, schedule)
    if not isinstance(epsilon, Tensor):
        raise TypeError(f"epsilon must be a tensor, got {type(epsilon).__name__}")
    if epsilon.shape != x_t.shape or epsilon.dtype != x_t.dtype or epsilon.device != x_t.device:
        raise ValueError(
            f"epsilon must be {x_t.dtype} of shape {tuple(x_t.shape)} on {x_t.device} as x_t is, "
            f"got {epsilon.dtype} of shape {tuple(epsilon.shape)} on {epsilon.device}"
        )
    _check_signal(schedule)
    return ((x_t - deviation * epsilon) / signal).to(x_t.dtype)


# ---------------------------------------------------------------------- sigma and t


def sigma_from_timestep(t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """``sigma(t) = sqrt((1 - abar_t) / abar_t)``, the noise level of ``x_t / sqrt(abar_t) = x_0 + sigma * noise``.

    Between the timesteps log sigma is linear in t, as in k-diffusion.

    Args:
        t: integers or floating point, any shape, in [0, T - 1], counted in `schedule`.
        schedule: the noise schedule.

    Returns:
        float64, of t's shape, on t's device.

    Raises:
        TypeError: `t` is no tensor, or `schedule` no NoiseSchedule.
        ValueError: a timestep outside the range, or a schedule that ends with an infinite sigma.
    """
    levels = _log_sigmas(t, "t", schedule)
    last = len(levels) - 1
    if t.numel() and not (t.min() >= 0 and t.max() <= last):
        raise ValueError(f"t must lie in [0, {last}], got {t.min().item()} .. {t.max().item()}")
    position = t.double()
    low = position.floor().long().clamp(max=max(0, last - 1))
    high = (low + 1).clamp(max=last)
    return torch.exp(torch.lerp(levels[low], levels[high], position - low))


def timestep_from_sigma(sigma: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The timestep, as a rule fractional, at which :func:`sigma_from_timestep` is `sigma`.

    Args:
        sigma: floating point, any shape, between the schedule's smallest and largest sigma.
        schedule: the noise schedule.

    Returns:
        float64, of sigma's shape, on sigma's device.

    Raises:
        TypeError: `sigma` is no tensor, or `schedule` no NoiseSchedule.
        ValueError: a sigma outside the range, or a schedule that ends with an infinite sigma.
    """
    levels = _log_sigmas(sigma, "sigma", schedule)
    value = sigma.double().log()
    # The ends themselves are in the range, also where the exponential and the logarithm round away from them.
    slack = 1e-12 * levels.abs().max()
    if value.numel() and not (value.min() >= levels[0] - slack and value.max() <= levels[-1] + slack):
        raise ValueError(
            f"sigma must lie in [{levels[0].exp().item():.6g}, {levels[-1].exp().item():.6g}], "
            f"got {sigma.min().item():.6g} .. {sigma.max().item():.6g}"
        )
    if len(levels) == 1:
        return torch.zeros_like(value)
    low = (torch.searchsorted(levels, value, right=True) - 1).clamp(0, len(levels) - 2)
    return (low + (value - levels[low]) / (levels[low + 1] - levels[low])).clamp(0, len(levels) - 1)


# ---------------------------------------------------------------------- likelihood


def log_likelihood(
    model: Callable[..., Any],
    schedule: NoiseSchedule,
    x0: Tensor,
    *,
    prediction: str = "epsilon",
    divergence: str = "hutchinson",
    probes: int = 1,
    seed: int | Tensor = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """The log density of images under the model, by the probability-flow ODE (Song et al. 2021, section 4.3).

    In ``y = x / sqrt(abar)`` and ``sigma = sqrt(1 / abar - 1)`` the flow is ``dy / dsigma = epsilon(sqrt(abar) y, t)``,
    and log p changes along it by the divergence of epsilon. Heun's method takes it through the schedule's own levels,
    from the first to the last, where x is standard normal: T calls of the model, each with backward passes for the
    divergence. Fewer: ``schedule.respace(100)``.

    The density is that of the distribution at the schedule's first level, which x0 is taken to be a draw of, as Song et
    al. do. For images in [-1, 1] made of bytes with uniform dequantisation noise, a density p of D elements is
    ``-log p / (D log 2) + log2(127.5)`` bits a dimension.

    Args:
        model: as in Sampler; called in evaluation mode, with gradients enabled.
        schedule: the noise schedule that the model was trained with.
        x0: ``(N, C, *)`` float32 or float64.
        prediction: what the model predicts: "epsilon", "x0" or "v".
        divergence: "hutchinson", an estimate without bias from `probes` random signs, the same along the whole flow
            (Grathwohl et al. 2019); or "exact", which takes a backward pass for each of the C * ... elements.
        probes: how many random vectors "hutchinson" averages over, each with a backward pass.
        seed: of the random signs, those of :func:`randn`, stream "noise", step 0 .. probes - 1.
        sample_ids: the samples' numbers, 0 .. N-1 unless given. The signs depend on seed and number only.
        model_kwargs: further keyword arguments of the model.

    Returns:
        float64 ``(N,)``, in nats.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: another shape or dtype, an unknown name, less than 1 probe, or a schedule that ends without signal.
    """
    if not callable(model):
        raise TypeError(f"model must be callable as model(x, t), got {type(model).__name__}")
    _check_schedule(schedule)
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, got {type(x0).__name__}")
    if x0.dim() < 2 or x0.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x0 must be float32 or float64 (N, C, *), got {x0.dtype} of shape {tuple(x0.shape)}")
    if prediction not in _PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(_PREDICTIONS)}, got {prediction!r}")
    if divergence not in _DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(_DIVERGENCES)}, got {divergence!r}")
    if isinstance(probes, bool) or not isinstance(probes, int):
        raise TypeError(f"probes must be an int, got {type(probes).__name__}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    _check_signal(schedule)
    vectors = None
    if divergence == "hutchinson":
        draws = (randn(x0.shape, seed=seed, sample_ids=sample_ids, step=k, device=x0.device) for k in range(probes))
        vectors = [torch.where(draw < 0, -1.0, 1.0).to(x0.dtype) for draw in draws]
    flow = _Flow(model, schedule, prediction, vectors, dict(model_kwargs or {}))
    abar = schedule.alphas_cumprod
    sigma = ((1.0 - abar) / abar).sqrt()
    roots = abar.sqrt().tolist()
    with evaluating(model):
        y = x0 / roots[0]
        change = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        slope, spread = flow(y, 0, roots[0])
        for k, step in enumerate(sigma.diff().tolist(), start=1):
            # The slope at the end of an Euler step serves as that at the start of the next: one call a step, and
            # still of second order, since both are at points whose distance is of second order.
            ahead, ahead_spread = flow(y + step * slope, k, roots[k])
            y = y + 0.5 * step * (slope + ahead)
            change += 0.5 * step * (spread + ahead_spread)
            slope, spread = ahead, ahead_spread
    x_last = (y * roots[-1]).double().flatten(1)
    elements = x_last.shape[1]
    prior = -0.5 * (x_last.square().sum(1) + elements * math.log(2.0 * math.pi))
    # From x to y and back: each element's density is scaled by sqrt(abar).
    scaling = 0.5 * elements * (math.log(abar[-1].item()) - math.log(abar[0].item()))
    result: Tensor = prior + change + scaling
    return result


class _Flow:
    """The slope of the probability flow in sigma, and its divergence, at one of the schedule's levels."""

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule,
        prediction: str,
        vectors: list[Tensor] | None,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model, self.prediction, self.vectors, self.model_kwargs = model, prediction, vectors, model_kwargs
        self.times = schedule.network_times
        self.signal = schedule.sqrt_alphas_cumprod.tolist()
        self.deviation = schedule.sqrt_one_minus_alphas_cumprod.tolist()
        self.device, self.dtype = home(model)

    def __call__(self, y: Tensor, k: int, root: float) -> tuple[Tensor, Tensor]:
        """``epsilon(root * y)`` and its divergence with respect to y, float64 ``(N,)``, both without gradients."""
        with torch.enable_grad():
            x = (root * y).detach().requires_grad_()
            epsilon = self._epsilon(x, k)
            divergence = root * self._divergence(epsilon, x)
        return epsilon.detach(), divergence

    def _epsilon(self, x: Tensor, k: int) -> Tensor:
        time = self.times[k].to(x.device).expand(len(x))
        given = x if self.device is None else x.to(self.dtype)
        output = output_tensor(self.model(given, time, **self.model_kwargs))
        # A learned variance comes behind the prediction.
        if output.shape not in (x.shape, (len(x), 2 * x.shape[1], *x.shape[2:])):
            raise ValueError(f"the network's output must have shape {tuple(x.shape)}, got {tuple(output.shape)}")
        output = output[:, : x.shape[1]].to(x.dtype)
        if self.prediction == "epsilon":
            return output
        signal, deviation = self.signal[k], self.deviation[k]
        epsilon: Tensor = (
            (x - signal * output) / deviation if self.prediction == "x0" else signal * output + deviation * x
        )
        return epsilon

    def _divergence(self, epsilon: Tensor, x: Tensor) -> Tensor:
        """The trace of the Jacobian of `epsilon`, or an estimate of it."""
        if not epsilon.requires_grad:  # a constant
            return torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if self.vectors is not None:
            products = [_backward(epsilon, x, vector) * vector for vector in self.vectors]
            return torch.stack([product.double().flatten(1).sum(1) for product in products]).mean(0)
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for element in range(x[0].numel()):
            unit = torch.zeros_like(x)
            unit.view(len(x), -1)[:, element] = 1.0
            total += _backward(epsilon, x, unit).reshape(len(x), -1)[:, element]
        return total


def _backward(epsilon: Tensor, x: Tensor, vector: Tensor) -> Tensor:
    (product,) = torch.autograd.grad(epsilon, x, vector, retain_graph=True)
    return product


# ---------------------------------------------------------------------- parts


def _levels(name: str, tensor: Tensor, t: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """sqrt(abar) and sqrt(1 - abar) at t, shaped to multiply `tensor`, in the dtype to compute in."""
    _check_schedule(schedule)
    for label, given in ((name, tensor), ("t", t)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(given).__name__}")
    if tensor.dim() < 2 or tensor.dtype not in _FLOATS:
        raise ValueError(f"{name} must be floating-point (N, C, *), got {tensor.dtype} of shape {tuple(tensor.shape)}")
    if t.dtype != torch.int64 or t.shape != tensor.shape[:1] or t.device != tensor.device:
        raise ValueError(
            f"t must be int64 of shape ({tensor.shape[0]},) on {tensor.device}, "
            f"got {t.dtype} of shape {tuple(t.shape)} on {t.device}"
        )
    _check.rows_in_range(t, schedule.timesteps, "t")
    if tensor.dtype == torch.float64:
        columns = [schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod]
        table = torch.stack(columns, dim=1).to(tensor.device)
    else:
        table = schedule.noising_coefficients(tensor.device)
    rows = table[t].reshape(-1, 2, *[1] * (tensor.dim() - 1))
    return rows[:, 0], rows[:, 1]


def _log_sigmas(values: Tensor, name: str, schedule: NoiseSchedule) -> Tensor:
    _check_schedule(schedule)
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    _check_signal(schedule)
    return (-0.5 * schedule.snr.log()).to(values.device)


def _check_schedule(schedule: NoiseSchedule) -> None:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")


def _check_signal(schedule: NoiseSchedule) -> None:
    if not torch.compiler.is_compiling() and schedule.alphas_cumprod[-1].item() == 0.0:
        raise ValueError("the schedule ends without signal (alphas_cumprod is 0), where epsilon says nothing about x0")
