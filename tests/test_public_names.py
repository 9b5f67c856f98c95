"""The calls that users may rely on: names, order and keywords of the public functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ddpm_fast as df
from ddpm_fast.interop.diffusers import FastDDIMScheduler, FastDDPMScheduler

SOURCES = "seed sample_ids x_T noise generator model_kwargs uncond_kwargs mask known blend resample progress"

# What may be given by position, and what by name.
CALLS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "randn": (df.randn, "shape seed sample_ids step stream", "dtype device memory_format out"),
    "q_sample": (df.q_sample, "x0 t schedule noise seed sample_ids step", ""),
    "group_norm_silu": (
        df.group_norm_silu,
        "x num_groups weight bias eps scale shift activation out",
        "",
    ),
    "linear": (df.NoiseSchedule.linear, "timesteps beta_start beta_end", ""),
    "cosine": (df.NoiseSchedule.cosine, "timesteps s max_beta", ""),
    "quadratic": (df.NoiseSchedule.quadratic, "timesteps", ""),
    "sigmoid": (df.NoiseSchedule.sigmoid, "timesteps", ""),
    "scaled_linear": (df.NoiseSchedule.scaled_linear, "timesteps beta_start beta_end", ""),
    "from_betas": (df.NoiseSchedule.from_betas, "betas", ""),
    "named": (df.NoiseSchedule.named, "name timesteps", ""),
    "log_snr": (df.NoiseSchedule.log_snr, "name steps", ""),
    "respace": (df.NoiseSchedule.respace, "self steps spacing", ""),
    "Sampler": (
        df.Sampler.__init__,
        "self model schedule",
        "prediction variance solver steps timesteps eta clip threshold guidance_scale guidance_rescale reference "
        "time_input cond_fn cond_mode denoised_fn self_condition temperature",
    ),
    "sample": (df.Sampler.sample, "self shape", f"{SOURCES} callback every out"),
    "stream": (df.Sampler.stream, "self shape", f"{SOURCES} out"),
    "step": (df.Sampler.step, "self x_t model_output i noise", ""),
    "from_guided": (df.Sampler.from_guided, "diffusion model", "solver eta"),
    "from_lucidrains": (df.Sampler.from_lucidrains, "diffusion", "steps"),
    "from_latent_diffusion": (df.Sampler.from_latent_diffusion, "ddpm", "solver steps"),
    "from_diffusers": (df.Sampler.from_diffusers, "scheduler unet", "eta"),
    "accelerate": (df.accelerate, "model", ""),
    "restore": (df.restore, "model", ""),
    "acceleration_report": (df.acceleration_report, "model", ""),
    "available_backends": (df.available_backends, "", ""),
    "use_backend": (df.use_backend, "name", ""),
    "diffusion_loss": (
        df.diffusion_loss,
        "model schedule x0 t",
        "loss prediction variance weighting seed sample_ids step noise model_kwargs",
    ),
    "bits_per_dim": (df.bits_per_dim, "model schedule x0", "prediction variance clip seed noise model_kwargs"),
    "score_from_epsilon": (df.score_from_epsilon, "epsilon t schedule", ""),
    "epsilon_from_score": (df.epsilon_from_score, "score t schedule", ""),
    "x0_from_epsilon": (df.x0_from_epsilon, "x_t epsilon t schedule", ""),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_where_they_are_expected(name: str) -> None:
    function, positions, keywords = CALLS[name]
    bound = inspect.signature(function).bind(*positions.split(), **{key: key for key in keywords.split()})
    for parameter, value in bound.arguments.items():
        # Each value is its own name; `options` hold what goes on to Sampler.
        if isinstance(value, str):
            assert parameter == value


@pytest.mark.parametrize("cls", [FastDDPMScheduler, FastDDIMScheduler])
@pytest.mark.parametrize("method", ["__init__", "step", "add_noise", "set_timesteps", "from_config"])
def test_schedulers_are_called_as_theirs(cls: type, method: str) -> None:
    def parameters(owner: type) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(getattr(owner, method)).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    theirs = next(base for base in cls.__mro__ if base.__module__.startswith("diffusers.schedulers.scheduling_dd"))
    assert parameters(cls) == parameters(theirs)


def test_positions_are_what_their_names_say() -> None:
    schedule, x0, t = df.NoiseSchedule.linear(10), torch.zeros(2, 3, 4, 4), torch.tensor([1, 2])
    noise = df.randn((2, 3), 5, [7, 9], 4, "training")
    assert torch.equal(noise, df.randn((2, 3), seed=5, sample_ids=[7, 9], step=4, stream="training"))
    result = df.q_sample(x0, t, schedule, None, 5, [7, 9], 4)
    assert torch.equal(result[1], df.q_sample(x0, t, schedule, seed=5, sample_ids=[7, 9], step=4)[1])
