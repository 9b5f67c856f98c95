"""openai's variational bound (guided-diffusion's losses.py and gaussian_diffusion.py), written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_fast.schedule import NoiseSchedule


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    centered, inv_stdv = x - means, torch.exp(-log_scales)
    cdf_plus = approx_standard_normal_cdf(inv_stdv * (centered + 1.0 / 255.0))
    cdf_min = approx_standard_normal_cdf(inv_stdv * (centered - 1.0 / 255.0))
    log_cdf_plus = torch.log(cdf_plus.clamp(min=1e-12))
    log_one_minus_cdf_min = torch.log((1.0 - cdf_min).clamp(min=1e-12))
    log_delta = torch.log((cdf_plus - cdf_min).clamp(min=1e-12))
    return torch.where(x < -0.999, log_cdf_plus, torch.where(x > 0.999, log_one_minus_cdf_min, log_delta))


def mean_flat(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


class Terms(NamedTuple):
    output: Tensor
    pred_xstart: Tensor


class Bound:
    """What their GaussianDiffusion computes of the bound; `prediction` and `variance` are this package's names."""

    def __init__(self, schedule: NoiseSchedule, prediction: str, variance: str) -> None:
        self.schedule, self.prediction, self.variance = schedule, prediction, variance

    def read(self, table: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return table[t].reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        s = self.schedule
        signal, sigma = s.sqrt_alphas_cumprod, s.sqrt_one_minus_alphas_cumprod
        return self.read(signal, t, x_start) * x_start + self.read(sigma, t, x_start) * noise

    def q_posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        first, second = self.schedule.posterior_mean_coef1, self.schedule.posterior_mean_coef2
        return self.read(first, t, x_t) * x_start + self.read(second, t, x_t) * x_t

    def p_mean_variance(
        self, output: Tensor, x: Tensor, t: Tensor, clip: tuple[float, float] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, the log variance and the predicted x0."""
        s, channels = self.schedule, x.shape[1]
        if self.variance in ("learned", "learned_range"):
            output, log_variance = output[:, :channels], output[:, channels:]
            if self.variance == "learned_range":
                low, high = self.read(s.posterior_log_variance_clipped, t, x), self.read(s.betas.log(), t, x)
                fraction = (log_variance + 1) / 2
                log_variance = fraction * high + (1 - fraction) * low
        elif self.variance == "fixed_large":
            large = torch.cat([s.posterior_variance[1:2], s.betas[1:]]).log()
            log_variance = self.read(large, t, x)
        else:
            log_variance = self.read(s.posterior_log_variance_clipped, t, x)

        def processed(x0: Tensor) -> Tensor:
            return x0 if clip is None else x0.clamp(*clip)

        if self.prediction == "x_prev":
            first, second = (self.read(c, t, x) for c in (s.posterior_mean_coef1, s.posterior_mean_coef2))
            return output, log_variance, processed((output - second * x) / first)
        if self.prediction == "epsilon":
            recip, recipm1 = s.sqrt_recip_alphas_cumprod, s.sqrt_recipm1_alphas_cumprod
            output = self.read(recip, t, x) * x - self.read(recipm1, t, x) * output
        elif self.prediction == "v":
            signal, sigma = s.sqrt_alphas_cumprod, s.sqrt_one_minus_alphas_cumprod
            output = self.read(signal, t, x) * x - self.read(sigma, t, x) * output
        x0 = processed(output)
        return self.q_posterior_mean(x0, x, t), log_variance, x0

    def vb_terms_bpd(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, clip: tuple[float, float] | None
    ) -> Terms:
        true_mean = self.q_posterior_mean(x_start, x_t, t)
        true_log_variance = self.read(self.schedule.posterior_log_variance_clipped, t, x_t)
        mean, log_variance, pred_xstart = self.p_mean_variance(output, x_t, t, clip)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, mean, log_variance)) / math.log(2.0)
        nll = -discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance)
        return Terms(torch.where(t == 0, mean_flat(nll) / math.log(2.0), kl), pred_xstart)

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        t = torch.full((len(x_start),), self.schedule.timesteps - 1)
        s = self.schedule
        mean = self.read(s.sqrt_alphas_cumprod, t, x_start) * x_start
        log_variance = self.read((1.0 - s.alphas_cumprod).log(), t, x_start)
        return mean_flat(normal_kl(mean, log_variance, torch.zeros_like(mean), torch.zeros_like(mean))) / math.log(2.0)

    def calc_bpd_loop(
        self, model: Callable[[Tensor, Tensor], Tensor], x_start: Tensor, noise: Tensor, clip: bool = True
    ) -> dict[str, Tensor]:
        """`noise` has a row for each timestep, in the order of the loop."""
        vb, xstart_mse, mse = [], [], []
        s = self.schedule
        for row, number in zip(noise, reversed(range(s.timesteps)), strict=True):
            t = torch.full((len(x_start),), number)
            x_t = self.q_sample(x_start, t, row)
            terms = self.vb_terms_bpd(model(x_t, t), x_start, x_t, t, (-1.0, 1.0) if clip else None)
            vb.append(terms.output)
            xstart_mse.append(mean_flat((terms.pred_xstart - x_start) ** 2))
            recip, recipm1 = s.sqrt_recip_alphas_cumprod, s.sqrt_recipm1_alphas_cumprod
            eps = (self.read(recip, t, x_t) * x_t - terms.pred_xstart) / self.read(recipm1, t, x_t)
            mse.append(mean_flat((eps - row) ** 2))
        result = {"vb": torch.stack(vb, 1), "xstart_mse": torch.stack(xstart_mse, 1), "mse": torch.stack(mse, 1)}
        prior = self.prior_bpd(x_start)
        return {**result, "prior_bpd": prior, "total_bpd": result["vb"].sum(1) + prior}
