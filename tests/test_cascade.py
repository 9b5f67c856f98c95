"""Low-resolution conditioning: against Imagen's and DALL-E 2's, written out, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ddpm_fast as df
from ddpm_fast.cascade import low_resolution
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule

IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
DISCRETE, CONTINUOUS = NoiseSchedule.linear(1000), NoiseSchedule.log_snr("linear", 1000)


def test_a_level_in_continuous_time_is_imagens():
    noise = torch.randn(2, 3, 8, 8)
    noised, time = low_resolution(IMAGES, 8, CONTINUOUS, 199, noise=noise)
    log_snr = -torch.log(torch.expm1(1e-4 + 10 * torch.tensor(0.2) ** 2))
    expected = log_snr.sigmoid().sqrt() * F.interpolate(IMAGES, 8) + (-log_snr).sigmoid().sqrt() * noise
    # Theirs computes its factors in float32.
    torch.testing.assert_close(noised, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(time, log_snr.expand(2), rtol=1e-6, atol=0)
    assert time.dtype == torch.float32


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_a_level_in_discrete_time_is_q_sample_of_the_enlarged_images(mode, backend):
    noised, time = low_resolution(IMAGES, (8, 12), DISCRETE, 200, mode=mode, seed=3, sample_ids=[5, 9])
    noise = df.randn((2, 3, 8, 12), seed=3, sample_ids=[5, 9], stream="augmentation")
    expected, _ = df.q_sample(F.interpolate(IMAGES, (8, 12), mode=mode), torch.tensor([200, 200]), DISCRETE, noise)
    assert torch.equal(noised, expected)
    assert time.tolist() == [200, 200]
    assert time.dtype == torch.int64


def test_a_samples_augmentation_does_not_depend_on_its_batch():
    both, _ = low_resolution(IMAGES, 8, DISCRETE, 200, seed=1)
    alone, _ = low_resolution(IMAGES[1:], 8, DISCRETE, 200, seed=1, sample_ids=[1])
    assert torch.equal(both[1:], alone)


def test_the_seed_of_the_next_stage_gives_noise_of_its_own():
    noised, _ = low_resolution(torch.zeros(1, 3, 4, 4), 8, DISCRETE, 999, seed=4)
    start = df.randn((1, 3, 8, 8), seed=4, stream="x_T")
    step = df.randn((1, 3, 8, 8), seed=4, stream="noise")
    for noise in (start, step):
        assert (noised * noise).mean().abs() < 0.3


def test_a_guided_stage_gets_the_same_images_in_both_halves():
    seen = []

    def model(x, t, y, low_res, low_res_time):
        seen.append((low_res, low_res_time))
        return x * 0.5 + y.reshape(-1, 1, 1, 1) * 0.1

    low_res, time = low_resolution(IMAGES, 8, CONTINUOUS, 99, seed=0)
    shown = {"low_res": low_res, "low_res_time": time}
    Sampler(model, NoiseSchedule.log_snr("cosine", 2), guidance_scale=2.0, threshold=0.95).sample(
        (2, 3, 8, 8), model_kwargs={"y": torch.ones(2), **shown}, uncond_kwargs={"y": torch.zeros(2), **shown}
    )
    assert len(seen) == 2  # one call a step
    for images, times in seen:
        assert torch.equal(images, torch.cat([low_res, low_res]))
        assert torch.equal(times, time[0].expand(4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": [1]}, TypeError, "images must be a tensor, got list"),
        ({"images": IMAGES[0]}, ValueError, r"images must be floating-point \(N, C, H, W\), got torch.float32 \(3, 4"),
        ({"images": IMAGES.int()}, ValueError, "images must be floating-point"),
        ({"schedule": 3}, TypeError, "schedule must be a NoiseSchedule, got int"),
        ({"t": 0.2}, TypeError, "t must be an int, got float"),
        ({"t": 1000}, ValueError, r"t must lie in \[0, 1000\), got 1000"),
        ({"mode": "cubic"}, ValueError, "mode must be one of nearest, bilinear, bicubic, got 'cubic'"),
        ({"noise": torch.zeros(2, 3, 4, 4)}, ValueError, r"noise must be .* of shape \(2, 3, 8, 8\)"),
        ({"noise": torch.zeros(2, 3, 8, 8), "seed": 1}, ValueError, "noise and seed exclude each other"),
    ],
    ids=["list", "shape", "dtype", "schedule", "float", "range", "mode", "noise", "both"],
)
def test_refusals(change, error, message):
    arguments = {"images": IMAGES, "size": 8, "schedule": DISCRETE, "t": 200, **change}
    with pytest.raises(error, match=message):
        low_resolution(**arguments)
