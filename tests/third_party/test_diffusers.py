"""Sampler and NoiseSchedule beside diffusers: its U-Net as it is, and its schedulers' loops."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule

SHAPE = (2, 3, 16, 16)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).train()


def scheduler_loop(
    scheduler: object, unet: nn.Module, x: Tensor, generator: torch.Generator, **options: object
) -> Tensor:
    """The loop of DDPMPipeline and DDIMPipeline."""
    unet.eval()
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, generator=generator, **options).prev_sample
    unet.train()
    return x


def start(seed: int = 0) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator), generator


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddpm_loop_agrees_up_to_its_rounding(unet, prediction, variance):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, variance_type=variance)
    scheduler.set_timesteps(25)
    x_T, generator = start()
    expected = scheduler_loop(scheduler, unet, x_T, generator)
    sampler = Sampler(
        unet,
        NoiseSchedule.linear(1000),
        prediction={"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}[prediction],
        variance=variance,
        timesteps=scheduler.timesteps,
    )
    _, generator = start()
    result = sampler.sample(SHAPE, x_T=x_T, generator=generator)
    assert unet.training
    # Its coefficients are rederived in float32 from a float32 alphas_cumprod; measured 1.6e-5.
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_loop_agrees_up_to_its_rounding(unet, eta):
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(25)
    x_T, generator = start()
    expected = scheduler_loop(scheduler, unet, x_T, generator, eta=eta, use_clipped_model_output=True)
    sampler = Sampler(unet, NoiseSchedule.linear(1000), solver="ddim", eta=eta, timesteps=scheduler.timesteps)
    _, generator = start()
    result = sampler.sample(SHAPE, x_T=x_T, generator=generator)
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-5)


def test_thresholding_agrees_up_to_its_rounding(unet):
    scheduler = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5, clip_sample=False
    )
    scheduler.set_timesteps(10)
    x_T, generator = start()
    expected = scheduler_loop(scheduler, unet, x_T, generator)
    sampler = Sampler(unet, NoiseSchedule.linear(1000), threshold=(0.9, 1.5), timesteps=scheduler.timesteps)
    _, generator = start()
    torch.testing.assert_close(sampler.sample(SHAPE, x_T=x_T, generator=generator), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unet_is_used_as_it_is(unet, dtype, memory_format):
    model = diffusers.UNet2DModel.from_config(unet.config).to(dtype).to(memory_format=memory_format)
    x = Sampler(model, NoiseSchedule.linear(1000), steps=4).sample(SHAPE, seed=1)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=memory_format)
    assert torch.isfinite(x).all()
    assert x.abs().max() <= 1  # the last step returns the clipped x0


# ---------------------------------------------------------------------- schedules


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_number_of_steps_is_spaced_as_in_diffusers(spacing):
    schedule = NoiseSchedule.linear(1000)
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    for count in (*range(1, 60), 77, 99, 128, 250, 333, 499, 500, 501, 750, 999, 1000):
        scheduler.set_timesteps(count)
        kept = schedule.respace(count, spacing=spacing).timestep_map.flip(0)
        # For some counts (499) its trailing spacing has one timestep too many, a -1 at the end.
        assert torch.equal(kept, scheduler.timesteps[scheduler.timesteps >= 0]), count


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (NoiseSchedule.linear(1000), {}),
        (NoiseSchedule.cosine(1000), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            NoiseSchedule.scaled_linear(1000),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (NoiseSchedule.sigmoid(1000), {"beta_schedule": "sigmoid"}),
        (NoiseSchedule.linear(1000).rescale_zero_terminal_snr(), {"rescale_betas_zero_snr": True}),
    ],
    ids=["linear", "cosine", "scaled_linear", "sigmoid", "zero-snr"],
)
def test_schedules_agree_with_its_float32(schedule, options):
    scheduler = diffusers.DDPMScheduler(**options)
    # A float32 product of 1000 factors near 1, each rounded to 6e-8.
    torch.testing.assert_close(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod.float(), rtol=1e-4, atol=1e-6)


def test_zero_terminal_snr_samples_with_v_prediction(unet):
    schedule = NoiseSchedule.linear(1000).rescale_zero_terminal_snr()
    x = Sampler(unet, schedule, prediction="v", timesteps=range(999, -1, -100)).sample(SHAPE)
    assert torch.isfinite(x).all()
