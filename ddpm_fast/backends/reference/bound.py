"""The terms of the variational bound (Ho et al. 2020, equations 5, 8 and 13), in bits per dimension, and their
derivative.

    t > 0:  L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
    t = 0:  L_0 = -log p(x_0 | x_1), the normal distribution cut into bins of 2 / 255, the first and the last open

All of it in float64, whatever the dtypes, and rounded once: what the kernels' errors are measured against.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.backends.reference.denoise import PREDICTIONS, VARIANCES
from ddpm_fast.backends.reference.noising import as_image

# The normal distribution function as openai's and Ho's code have it: the logistic function of s (z + c z^3).
_S, _C = 2 * math.sqrt(2 / math.pi), 0.044715
_HALF_BIN = 1 / 255
_EDGE = 0.999  # beyond, a bin is open
_SMALLEST_PROBABILITY = 1e-12


def _per_sample(values: Tensor, dim: int) -> Tensor:
    return values.reshape(-1, *[1] * (dim - 1))


def _bins(x0: Tensor, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The logits of a bin's two ends and their difference, and the ends in standard deviations."""
    inverse = torch.exp(-0.5 * log_variance)
    plus, minus = inverse * (x0 - mean + _HALF_BIN), inverse * (x0 - mean - _HALF_BIN)
    # upper - lower, written so that nothing cancels.
    width = _S * 2 * _HALF_BIN * inverse * (1 + _C * (plus * plus + plus * minus + minus * minus))
    return _S * (plus + _C * plus**3), _S * (minus + _C * minus**3), width, plus, minus


def _decoder(x0: Tensor, upper: Tensor, lower: Tensor, width: Tensor) -> Tensor:
    """-log of a bin's probability, sigmoid(upper) - sigmoid(lower) = sigmoid(upper) sigmoid(-lower) (1 - e^-width)."""
    inner = F.softplus(-upper) + F.softplus(lower) - torch.log(-torch.expm1(-width))
    nll = torch.where(x0 < -_EDGE, F.softplus(-upper), torch.where(x0 > _EDGE, F.softplus(lower), inner))
    return nll.clamp(max=-math.log(_SMALLEST_PROBABILITY))


class _Terms:
    """What the terms and their derivative are made of; argument meanings: `ddpm_fast.ops.bound`."""

    def __init__(
        self,
        x0: Tensor,
        x_t: Tensor,
        model_output: Tensor,
        coefficients: Tensor,
        t: Tensor,
        prediction: int,
        variance: int,
        clip_low: float | None,
        clip_high: float | None,
    ) -> None:
        self.prediction, self.variance = PREDICTIONS[prediction], VARIANCES[variance]
        columns = (_per_sample(column, x_t.dim()) for column in coefficients.double()[t].unbind(-1))
        (x0_from_x, self.x0_from_output, self.mean_from_x0, mean_from_x, log_posterior, log_min, log_max) = columns
        self.decoding = _per_sample(t == 0, x_t.dim())
        self.x0, x, output = as_image(x0).double(), x_t.double(), model_output.double()
        channels = x.shape[1]
        e, values = output[:, :channels], output[:, channels:]

        if self.prediction == "x0":
            predicted = e
        elif self.prediction == "x_prev":
            predicted = (e - mean_from_x * x) / self.mean_from_x0
        else:
            predicted = x0_from_x * x - self.x0_from_output * e
        clipped = predicted
        if clip_low is not None and clip_high is not None:
            clipped = predicted.clamp(clip_low, clip_high)
        self.inside = clipped == predicted
        self.error = self.x0 - clipped
        if self.prediction == "x_prev":
            self.mean = e
            self.difference = self.mean_from_x0 * self.x0 + mean_from_x * x - e
        else:
            self.mean = self.mean_from_x0 * clipped + mean_from_x * x
            self.difference = self.mean_from_x0 * self.error

        if self.variance == "learned":
            self.log_variance = values
        elif self.variance == "learned_range":
            fraction = (values + 1) / 2
            self.log_variance = fraction * log_max + (1 - fraction) * log_min
        else:
            self.log_variance = log_max.expand_as(x)
        self.range = log_max - log_min
        self.excess = self.log_variance - log_posterior
        self.inverse_variance = torch.exp(-self.log_variance)

    def bound(self) -> Tensor:
        """(N,), in bits per dimension."""
        kl = 0.5 * (self.excess + torch.expm1(-self.excess) + self.difference**2 * self.inverse_variance)
        upper, lower, width, _, _ = _bins(self.x0, self.mean, self.log_variance)
        nats = torch.where(self.decoding, _decoder(self.x0, upper, lower, width), kl)
        return nats.flatten(1).mean(1) / math.log(2)

    def derivatives(self) -> tuple[Tensor, Tensor]:
        """Of each element's term in nats, with respect to the mean and to the log variance of p."""
        by_mean = -self.difference * self.inverse_variance
        by_log_variance = 0.5 * (-torch.expm1(-self.excess) - self.difference**2 * self.inverse_variance)

        upper, lower, width, plus, minus = _bins(self.x0, self.mean, self.log_variance)
        first, last = self.x0 < -_EDGE, self.x0 > _EDGE
        narrowing = 1 / torch.expm1(width)
        by_upper = -torch.sigmoid(-upper) - torch.where(first, 0.0, narrowing)
        by_lower = torch.sigmoid(lower) + torch.where(last, 0.0, narrowing)
        clamped = _decoder(self.x0, upper, lower, width) >= -math.log(_SMALLEST_PROBABILITY)
        by_plus = torch.where(last | clamped, 0.0, by_upper * _S * (1 + 3 * _C * plus**2))
        by_minus = torch.where(first | clamped, 0.0, by_lower * _S * (1 + 3 * _C * minus**2))
        decoder_by_mean = -torch.exp(-0.5 * self.log_variance) * (by_plus + by_minus)
        decoder_by_log_variance = -0.5 * (plus * by_plus + minus * by_minus)
        return (
            torch.where(self.decoding, decoder_by_mean, by_mean),
            torch.where(self.decoding, decoder_by_log_variance, by_log_variance),
        )


def bound_terms(
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    t: Tensor,
    prediction: int,
    variance: int,
    clip_low: float | None,
    clip_high: float | None,
    bound: Tensor,
    x0_mse: Tensor,
) -> None:
    """Writes the term at t in bits per dimension, and the mean of (x0 - predicted x0)^2, both (N,)."""
    terms = _Terms(x0, x_t, model_output, coefficients, t, prediction, variance, clip_low, clip_high)
    bound.copy_(terms.bound())
    x0_mse.copy_(terms.error.square().flatten(1).mean(1))


def bound_terms_backward(
    grad_bound: Tensor,
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    t: Tensor,
    prediction: int,
    variance: int,
    clip_low: float | None,
    clip_high: float | None,
    mean_gradient: bool,
    grad_output: Tensor,
) -> None:
    """Writes the gradient like model_output; without `mean_gradient` the mean of p counts as a constant."""
    terms = _Terms(x0, x_t, model_output, coefficients, t, prediction, variance, clip_low, clip_high)
    by_mean, by_log_variance = terms.derivatives()
    elements = math.prod(x_t.shape[1:])
    scale = _per_sample(grad_bound.double() / (elements * math.log(2)), x_t.dim())
    channels = x_t.shape[1]
    if not mean_gradient:
        grad_output[:, :channels].zero_()
    else:
        by_output = by_mean
        if terms.prediction != "x_prev":
            by_output = torch.where(terms.inside, terms.mean_from_x0 * by_mean, 0.0)
            if terms.prediction != "x0":
                by_output = -terms.x0_from_output * by_output
        grad_output[:, :channels].copy_(scale * by_output)
    if terms.variance != "fixed":
        by_values = by_log_variance * (0.5 * terms.range if terms.variance == "learned_range" else 1.0)
        grad_output[:, channels:].copy_(scale * by_values)
