"""The ops: each file has an op's schema, its autograd and its public function side by side."""

from ddpm_fast.ops.bound import bound_terms
from ddpm_fast.ops.conv import conv3x3, plan_conv3x3, prepare_conv3x3
from ddpm_fast.ops.denoise import denoise
from ddpm_fast.ops.linear_attention import linear_attention, projected_linear_attention
from ddpm_fast.ops.noising import noised, q_sample
from ddpm_fast.ops.norm_act import group_norm_silu
from ddpm_fast.ops.quantile import abs_quantile
from ddpm_fast.ops.random import randn, random_timesteps
from ddpm_fast.ops.rms_norm_act import rms_norm_silu
from ddpm_fast.ops.target_loss import target_loss

__all__ = [
    "abs_quantile",
    "bound_terms",
    "conv3x3",
    "denoise",
    "group_norm_silu",
    "linear_attention",
    "noised",
    "plan_conv3x3",
    "prepare_conv3x3",
    "projected_linear_attention",
    "q_sample",
    "randn",
    "random_timesteps",
    "rms_norm_silu",
    "target_loss",
]
