"""openai's loops, written out in plain PyTorch from the papers (Ho et al. 2020; Dhariwal, Nichol 2021; GLIDE).

What is kept of the original is its arithmetic: float64 tables in numpy, each entry cast to float32 when it is
read, its order of operations, and where it draws noise. Its objects keep their names, for the importer.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ModelMeanType(enum.Enum):
    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class GaussianDiffusion:
    """A diffusion object; with `timestep_map` that of a respaced one."""

    def __init__(
        self,
        betas: np.ndarray,
        mean_type: ModelMeanType = ModelMeanType.EPSILON,
        var_type: ModelVarType = ModelVarType.FIXED_SMALL,
        rescale_timesteps: bool = False,
        timestep_map: list[int] | None = None,
        original_num_steps: int | None = None,
    ) -> None:
        self.model_mean_type, self.model_var_type = mean_type, var_type
        self.rescale_timesteps = rescale_timesteps
        self.betas = np.array(betas, dtype=np.float64)
        self.num_timesteps = len(betas)
        if timestep_map is not None:
            self.timestep_map, self.original_num_steps = timestep_map, original_num_steps
        alphas = 1.0 - self.betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)
        self.posterior_variance = self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_log_variance_clipped = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)

    # ------------------------------------------------------------------ parts

    def read(self, table: np.ndarray, k: int, x: Tensor) -> Tensor:
        return torch.from_numpy(table)[torch.full((len(x),), k)].float()[:, None, None, None].expand(x.shape)

    def time(self, k: int, samples: int) -> Tensor:
        mapped = self.timestep_map[k] if hasattr(self, "timestep_map") else k
        t = torch.full((samples,), mapped)
        total = self.original_num_steps if hasattr(self, "timestep_map") else self.num_timesteps
        return t.float() * (1000.0 / total) if self.rescale_timesteps else t

    def x0_from_epsilon(self, x: Tensor, k: int, epsilon: Tensor) -> Tensor:
        recip, recipm1 = (
            self.read(t, k, x) for t in (self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod)
        )
        return recip * x - recipm1 * epsilon

    def epsilon_from_x0(self, x: Tensor, k: int, x0: Tensor) -> Tensor:
        recip, recipm1 = (
            self.read(t, k, x) for t in (self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod)
        )
        return (recip * x - x0) / recipm1

    def posterior_mean(self, x0: Tensor, x: Tensor, k: int) -> Tensor:
        return self.read(self.posterior_mean_coef1, k, x) * x0 + self.read(self.posterior_mean_coef2, k, x) * x

    def predictions(
        self, output: Tensor, x: Tensor, k: int, clip: bool, denoised_fn: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The mean, the variance, the log variance and x0."""
        channels = x.shape[1]
        kind = self.model_var_type
        if kind in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            output, values = output[:, :channels], output[:, channels:]
            if kind == ModelVarType.LEARNED_RANGE:
                low = self.read(self.posterior_log_variance_clipped, k, x)
                high = self.read(np.log(self.betas), k, x)
                fraction = (values + 1) / 2
                values = fraction * high + (1 - fraction) * low
            log_variance, variance = values, torch.exp(values)
        elif kind == ModelVarType.FIXED_LARGE:
            large = np.append(self.posterior_variance[1], self.betas[1:])
            variance, log_variance = self.read(large, k, x), self.read(np.log(large), k, x)
        else:
            variance = self.read(self.posterior_variance, k, x)
            log_variance = self.read(self.posterior_log_variance_clipped, k, x)

        def processed(x0: Tensor) -> Tensor:
            x0 = x0 if denoised_fn is None else denoised_fn(x0)
            return x0.clamp(-1, 1) if clip else x0

        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            recip = self.read(1.0 / self.posterior_mean_coef1, k, x)
            ratio = self.read(self.posterior_mean_coef2 / self.posterior_mean_coef1, k, x)
            return output, variance, log_variance, processed(recip * output - ratio * x)
        x0 = output if self.model_mean_type == ModelMeanType.START_X else self.x0_from_epsilon(x, k, output)
        x0 = processed(x0)
        return self.posterior_mean(x0, x, k), variance, log_variance, x0

    # ------------------------------------------------------------------ loops

    def p_sample_loop(
        self,
        model: Callable[..., Tensor],
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Ancestral sampling; algorithm 1 of Dhariwal, Nichol with `cond_fn`."""
        x = torch.randn(*shape) if noise is None else noise
        kwargs = model_kwargs or {}
        for k in reversed(range(self.num_timesteps)):
            with torch.no_grad():
                t = self.time(k, len(x))
                mean, variance, log_variance, _ = self.predictions(
                    model(x, t, **kwargs), x, k, clip_denoised, denoised_fn
                )
                z = torch.randn_like(x)
                if cond_fn is not None:
                    mean = mean.float() + variance * cond_fn(x, t, **kwargs).float()
                x = mean + float(k != 0) * torch.exp(0.5 * log_variance) * z
        return x

    def ddim_sample_loop(
        self,
        model: Callable[..., Tensor],
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> Tensor:
        """DDIM; algorithm 2 of Dhariwal, Nichol with `cond_fn`."""
        x = torch.randn(*shape) if noise is None else noise
        kwargs = model_kwargs or {}
        for k in reversed(range(self.num_timesteps)):
            with torch.no_grad():
                t = self.time(k, len(x))
                *_, x0 = self.predictions(model(x, t, **kwargs), x, k, clip_denoised, denoised_fn)
                abar = self.read(self.alphas_cumprod, k, x)
                if cond_fn is not None:
                    epsilon = self.epsilon_from_x0(x, k, x0) - (1 - abar).sqrt() * cond_fn(x, t, **kwargs)
                    x0 = self.x0_from_epsilon(x, k, epsilon)
                epsilon = self.epsilon_from_x0(x, k, x0)
                previous = self.read(self.alphas_cumprod_prev, k, x)
                sigma = eta * torch.sqrt((1 - previous) / (1 - abar)) * torch.sqrt(1 - abar / previous)
                z = torch.randn_like(x)
                mean = x0 * torch.sqrt(previous) + torch.sqrt(1 - previous - sigma**2) * epsilon
                x = mean + float(k != 0) * sigma * z
        return x
