"""The peers: what users' code does, in PyTorch's own operations.

The arithmetic and the way the tables are looked up are those of lucidrains' denoising_diffusion_pytorch: float32
buffers, gathered with a tensor of timesteps at each use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import NoiseSchedule


def gathered(buffer: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """The buffer's values at t, shaped to multiply x."""
    return buffer.gather(-1, t).reshape(t.shape[0], *((1,) * (x.dim() - 1)))


class EagerDiffusion:
    """The forward process and the ancestral step, with a network's output given."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        device = torch.get_default_device()
        self.sqrt_alphas_cumprod = schedule.sqrt_alphas_cumprod.to(device, torch.float32)
        self.sqrt_one_minus_alphas_cumprod = schedule.sqrt_one_minus_alphas_cumprod.to(device, torch.float32)
        self.sqrt_recip_alphas_cumprod = schedule.sqrt_recip_alphas_cumprod.to(device, torch.float32)
        self.sqrt_recipm1_alphas_cumprod = schedule.sqrt_recipm1_alphas_cumprod.to(device, torch.float32)
        self.posterior_mean_coef1 = schedule.posterior_mean_coef1.to(device, torch.float32)
        self.posterior_mean_coef2 = schedule.posterior_mean_coef2.to(device, torch.float32)
        self.posterior_variance = schedule.posterior_variance.to(device, torch.float32)
        self.posterior_log_variance_clipped = schedule.posterior_log_variance_clipped.to(device, torch.float32)
        self.log_betas = schedule.betas.log().to(device, torch.float32)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x0.dtype == torch.uint8:
            x0 = x0.float() / 127.5 - 1
        noise = torch.randn_like(x0) if noise is None else noise
        signal, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        return gathered(signal, t, x0) * x0 + gathered(sigma, t, x0) * noise, noise

    @torch.inference_mode()
    def p_sample(self, x: Tensor, output: Tensor, t: int, noise: Tensor | None = None) -> Tensor:
        """x_{t-1}; `noise` takes the place of the draw."""
        times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
        mean, _, log_variance = self._posterior(x, output, times)
        return self._drawn(mean, log_variance, t, noise)

    @torch.inference_mode()
    def p_sample_learned_range(self, x: Tensor, output: Tensor, t: int, noise: Tensor | None = None) -> Tensor:
        """The step with a variance between two bounds, which the network's other channels choose."""
        times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
        epsilon, v = output.chunk(2, dim=1)
        mean, _, low = self._posterior(x, epsilon, times)
        fraction = (v + 1) / 2
        log_variance = fraction * gathered(self.log_betas, times, x) + (1 - fraction) * low
        return self._drawn(mean, log_variance, t, noise)

    @torch.inference_mode()
    def p_sample_guided(
        self, x: Tensor, conditional: Tensor, unconditional: Tensor, scale: float, t: int, noise: Tensor | None = None
    ) -> Tensor:
        """The step with classifier-free guidance."""
        return self.p_sample(x, unconditional + scale * (conditional - unconditional), t, noise)

    def _posterior(self, x: Tensor, epsilon: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x0 = (
            gathered(self.sqrt_recip_alphas_cumprod, times, x) * x
            - gathered(self.sqrt_recipm1_alphas_cumprod, times, x) * epsilon
        )
        x0.clamp_(-1.0, 1.0)
        mean = gathered(self.posterior_mean_coef1, times, x) * x0 + gathered(self.posterior_mean_coef2, times, x) * x
        variance = gathered(self.posterior_variance, times, x)
        return mean, variance, gathered(self.posterior_log_variance_clipped, times, x)

    def _drawn(self, mean: Tensor, log_variance: Tensor, t: int, noise: Tensor | None) -> Tensor:
        z: Tensor | float = 0.0  # the last step adds none
        if t > 0:
            z = torch.randn_like(mean) if noise is None else noise
        return mean + (0.5 * log_variance).exp() * z


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    embedding: Tensor | None = None,
) -> Tensor:
    """GroupNorm and SiLU as a residual block writes them."""
    if embedding is not None:
        x = x + embedding[:, :, None, None]
    y = F.group_norm(x, num_groups, weight, bias)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y)


def rms_norm_silu(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """lucidrains' RMSNorm, scale and shift, and SiLU as its residual block writes them."""
    y = F.normalize(x, dim=1) * weight[:, None, None] * x.shape[1] ** 0.5
    return F.silu(y * (scale[:, :, None, None] + 1) + shift[:, :, None, None])
