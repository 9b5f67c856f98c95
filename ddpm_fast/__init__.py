"""Fused kernels and a drop-in sampler for denoising diffusion models in PyTorch."""

from ddpm_fast.accelerate import accelerate, acceleration_report, restore
from ddpm_fast.backends import available_backends, use_backend
from ddpm_fast.ops import conv3x3, group_norm_silu, linear_attention, q_sample, randn, rms_norm_silu
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.scores import (
    epsilon_from_score,
    log_likelihood,
    score_from_epsilon,
    sigma_from_timestep,
    timestep_from_sigma,
    x0_from_epsilon,
)
from ddpm_fast.training.bound import bits_per_dim
from ddpm_fast.training.loss import diffusion_loss

__version__ = "0.1.0"

__all__ = [
    "NoiseSchedule",
    "Sampler",
    "accelerate",
    "acceleration_report",
    "available_backends",
    "bits_per_dim",
    "conv3x3",
    "diffusion_loss",
    "epsilon_from_score",
    "group_norm_silu",
    "linear_attention",
    "log_likelihood",
    "q_sample",
    "randn",
    "restore",
    "rms_norm_silu",
    "score_from_epsilon",
    "sigma_from_timestep",
    "timestep_from_sigma",
    "use_backend",
    "x0_from_epsilon",
]
