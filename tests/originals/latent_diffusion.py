"""CompVis' loops, written out in plain PyTorch from the papers (Rombach 2022, Song 2021, Liu 2022).

What is kept of the original is its arithmetic, its float32 buffers, its timesteps and where it draws noise. Its
objects keep their names, for the importer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class LatentDiffusion(nn.Module):
    """The DDPM object: float32 buffers of float64 tables, and the network behind `apply_model`."""

    def __init__(
        self,
        network: nn.Module,
        timesteps: int = 1000,
        parameterization: str = "eps",
        clip_denoised: bool = False,
        v_posterior: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.parameterization, self.clip_denoised = network, parameterization, clip_denoised
        self.num_timesteps, self.v_posterior = timesteps, v_posterior
        betas = np.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=np.float64) ** 2
        alphas = 1.0 - betas
        abar = np.cumprod(alphas)
        previous = np.append(1.0, abar[:-1])
        variance = (1 - v_posterior) * betas * (1.0 - previous) / (1.0 - abar) + v_posterior * betas
        for name, table in {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": previous,
            "sqrt_alphas_cumprod": np.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - abar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / abar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / abar - 1),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - abar),
            "posterior_mean_coef2": (1.0 - previous) * np.sqrt(alphas) / (1.0 - abar),
        }.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.float32))

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.model(x, t, y=cond)

    def q_sample(self, x0: Tensor, t: Tensor) -> Tensor:
        signal, deviation = (
            table.gather(-1, t).reshape(-1, 1, 1, 1)
            for table in (self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)
        )
        return signal * x0 + deviation * torch.randn_like(x0)

    def p_sample_loop(
        self, cond: Any, shape: tuple[int, ...], x_T: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        x = torch.randn(shape) if x_T is None else x_T

        def read(table: Tensor, t: Tensor) -> Tensor:
            return table.gather(-1, t).reshape(-1, 1, 1, 1)

        for k in reversed(range(self.num_timesteps)):
            t = torch.full((len(x),), k, dtype=torch.long)
            with torch.no_grad():
                output = self.apply_model(x, t, cond)
                if self.parameterization == "x0":
                    x0 = output
                elif self.parameterization == "v":
                    x0 = read(self.sqrt_alphas_cumprod, t) * x - read(self.sqrt_one_minus_alphas_cumprod, t) * output
                else:
                    x0 = (
                        read(self.sqrt_recip_alphas_cumprod, t) * x - read(self.sqrt_recipm1_alphas_cumprod, t) * output
                    )
                if self.clip_denoised:
                    x0 = x0.clamp(-1.0, 1.0)
                mean = read(self.posterior_mean_coef1, t) * x0 + read(self.posterior_mean_coef2, t) * x
                z = torch.randn(shape) * temperature
                mask = (1 - (t == 0).float()).reshape(-1, 1, 1, 1)
                x = mean + mask * (0.5 * read(self.posterior_log_variance_clipped, t)).exp() * z
        return x


class _Implicit:
    """What DDIMSampler and PLMSSampler share: the timesteps and the step from an epsilon."""

    def __init__(self, ldm: LatentDiffusion, steps: int, eta: float) -> None:
        self.ldm = ldm
        total = ldm.num_timesteps
        self.timesteps = np.arange(0, total, total // steps) + 1
        abar = ldm.alphas_cumprod.double().numpy()
        self.alphas = abar[self.timesteps]
        self.alphas_prev = np.array([abar[0], *abar[self.timesteps[:-1]]])
        self.sigmas = eta * np.sqrt((1 - self.alphas_prev) / (1 - self.alphas) * (1 - self.alphas / self.alphas_prev))
        self.roots = np.sqrt(1.0 - self.alphas)

    def output(self, x: Tensor, t: Tensor, cond: Any, uncond: Any, scale: float) -> Tensor:
        if uncond is None:
            return self.ldm.apply_model(x, t, cond)
        pair = self.ldm.apply_model(torch.cat([x] * 2), torch.cat([t] * 2), torch.cat([uncond, cond]))
        without, with_condition = pair.chunk(2)
        return without + scale * (with_condition - without)

    def blended(self, x: Tensor, t: Tensor, mask: Tensor | None, x0: Tensor | None) -> Tensor:
        """The state with what is known of it: the mask is 1 there."""
        if mask is None or x0 is None:
            return x
        return self.ldm.q_sample(x0, t) * mask + (1.0 - mask) * x

    def step(self, x: Tensor, e: Tensor, index: int, temperature: float) -> Tensor:
        def full(value: float) -> Tensor:
            return torch.full((len(x), 1, 1, 1), float(value))

        a, previous, sigma = full(self.alphas[index]), full(self.alphas_prev[index]), full(self.sigmas[index])
        x0 = (x - full(self.roots[index]) * e) / a.sqrt()
        direction = (1.0 - previous - sigma**2).sqrt() * e
        z = sigma * torch.randn(x.shape) * temperature
        return previous.sqrt() * x0 + direction + z


class DDIMSampler(_Implicit):
    def sample(
        self,
        shape: tuple[int, ...],
        cond: Any,
        uncond: Any = None,
        scale: float = 1.0,
        temperature: float = 1.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
    ) -> Tensor:
        x = torch.randn(shape)
        with torch.no_grad():
            for index in reversed(range(len(self.timesteps))):
                t = torch.full((len(x),), int(self.timesteps[index]))
                x = self.blended(x, t, mask, x0)
                x = self.step(x, self.output(x, t, cond, uncond, scale), index, temperature)
        return x


class PLMSSampler(_Implicit):
    def sample(
        self,
        shape: tuple[int, ...],
        cond: Any,
        uncond: Any = None,
        scale: float = 1.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
    ) -> Tensor:
        x = torch.randn(shape)
        old: list[Tensor] = []
        with torch.no_grad():
            for index in reversed(range(len(self.timesteps))):
                t = torch.full((len(x),), int(self.timesteps[index]))
                x = self.blended(x, t, mask, x0)
                e = self.output(x, t, cond, uncond, scale)
                if not old:
                    ahead = self.step(x, e, index, 1.0)
                    t_next = torch.full((len(x),), int(self.timesteps[max(index - 1, 0)]))
                    prime = (e + self.output(ahead, t_next, cond, uncond, scale)) / 2
                elif len(old) == 1:
                    prime = (3 * e - old[-1]) / 2
                elif len(old) == 2:
                    prime = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
                else:
                    prime = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
                x = self.step(x, prime, index, 1.0)
                old = [*old, e][-3:]
        return x
