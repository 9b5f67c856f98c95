"""k-diffusion's samplers and its wrappers of discrete models, as they are, against timesteps="karras"."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule
from tests.originals.latent_diffusion import LatentDiffusion
from tests.originals.network import Net
from tests.third_party.stand_ins import import_alone

external = import_alone(
    "k_diffusion.external", ("torchvision", "torchvision.transforms", "torchdiffeq", "torchsde", "scipy")
)
sampling = external.sampling

SHAPE = (2, 3, 8, 8)
SCHEDULE = NoiseSchedule.scaled_linear(1000)
WRAPPERS = {"epsilon": external.DiscreteEpsDDPMDenoiser, "v": external.DiscreteVDDPMDenoiser}


def wrapped(prediction: str) -> torch.nn.Module:
    return WRAPPERS[prediction](Net().eval(), SCHEDULE.alphas_cumprod.float(), quantize=False)


@pytest.mark.parametrize("prediction", WRAPPERS)
@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "euler_ancestral"])
@torch.no_grad()
def test_same_images_at_karras_levels(solver, steps, prediction):
    wrapper = wrapped(prediction)
    sigmas = sampling.get_sigmas_karras(steps, wrapper.sigma_min.item(), wrapper.sigma_max.item(), rho=7.0)
    x_T, noise = torch.randn(SHAPE), torch.randn(steps, *SHAPE)
    options = {}
    if solver == "euler_ancestral":
        rows = itertools.count()
        options["noise_sampler"] = lambda sigma, sigma_next: noise[next(rows)]
    expected = getattr(sampling, f"sample_{solver}")(wrapper, x_T * sigmas[0], sigmas, disable=True, **options)

    sampler = Sampler(Net(), SCHEDULE, prediction=prediction, solver=solver, steps=steps, timesteps="karras", clip=None)
    # DPM-Solver++ takes x_T as it is, the others make it sigma * x_T themselves.
    start = x_T * (sigmas[0] / (1 + sigmas[0] ** 2).sqrt()) if solver == "dpmpp_2m" else x_T
    result = sampler.sample(SHAPE, x_T=start, noise=noise)
    # Its sigmas are float32, and so is its state, which starts 15 times as large; measured 2.5e-6.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_compvis_denoiser_with_a_condition_and_guidance():
    ldm, x_T = LatentDiffusion(Net(4).eval()), torch.randn(2, 4, 8, 8)
    y, null = torch.tensor([1.0, -2.0]), torch.zeros(2)
    wrapper = external.CompVisDenoiser(ldm)
    sigmas = sampling.get_sigmas_karras(10, wrapper.sigma_min.item(), wrapper.sigma_max.item())

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        """CFGDenoiser of the scripts that use it."""
        uncond, cond = wrapper(torch.cat([x] * 2), torch.cat([sigma] * 2), cond=torch.cat([null, y])).chunk(2)
        return uncond + (cond - uncond) * 5.0

    expected = sampling.sample_euler(guided, x_T * sigmas[0], sigmas, disable=True)
    sampler = Sampler.from_latent_diffusion(ldm, solver="euler", steps=10, timesteps="karras", guidance_scale=5.0)
    result = sampler.sample((2, 4, 8, 8), x_T=x_T, model_kwargs={"c": y}, uncond_kwargs={"c": null})
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_levels_and_times_are_its():
    wrapper = wrapped("epsilon")
    sigmas = sampling.get_sigmas_karras(30, wrapper.sigma_min.item(), wrapper.sigma_max.item())[:-1].flip(0)
    schedule = SCHEDULE.karras(30)
    ours = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt().float()
    # Its abar is float32: 6e-8 of a first 1 - abar of 8.5e-4, and half of that ratio in the root.
    torch.testing.assert_close(ours, sigmas, rtol=3.6e-5, atol=0)
    # Of which a timestep makes 1e-2 where the error of its sigma is 1e-5.
    torch.testing.assert_close(schedule.network_times, wrapper.sigma_to_t(sigmas), rtol=0, atol=3e-3)
