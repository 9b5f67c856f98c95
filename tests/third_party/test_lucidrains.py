"""The loop of denoising_diffusion_pytorch, run as it is, against Sampler: the same images to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule
from tests.third_party.lucidrains import import_package

package = import_package()

PREDICTIONS = {"pred_noise": "epsilon", "pred_x0": "x0", "pred_v": "v"}
SHAPE = (2, 3, 8, 8)


class Net(nn.Module):
    """A small convolutional network with what GaussianDiffusion asks of one."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.time = nn.Linear(1, 8)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        time = self.time(t[:, None].float() / 1000)[:, :, None, None]
        return self.last(torch.nn.functional.silu(self.first(x) + time))


def diffusion(timesteps: int, schedule: str, objective: str, **options: object) -> nn.Module:
    return package.GaussianDiffusion(
        Net(),
        image_size=8,
        timesteps=timesteps,
        beta_schedule=schedule,
        objective=objective,
        auto_normalize=False,
        **options,
    )


@pytest.mark.parametrize("objective", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_thousand_steps_from_the_same_torch_seed_are_bit_equal(objective, schedule, capsys):
    original = diffusion(1000, schedule, objective)
    torch.manual_seed(0)
    expected = original.sample(batch_size=2)
    sampler = Sampler(Net(), NoiseSchedule.named(schedule, 1000), prediction=PREDICTIONS[objective])
    torch.manual_seed(0)
    result = sampler.sample(SHAPE, generator=torch.default_generator)
    assert torch.isfinite(expected).all()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_tables_are_bit_equal_once_cast(schedule):
    original, ours = diffusion(1000, schedule, "pred_noise"), NoiseSchedule.named(schedule, 1000)
    for name in (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ):
        assert torch.equal(getattr(ours, name).float(), getattr(original, name)), name
    # Index 0 has another floor there (1e-20), which no step reads.
    assert torch.equal(ours.posterior_log_variance_clipped.float()[1:], original.posterior_log_variance_clipped[1:])


@pytest.mark.parametrize("objective", PREDICTIONS)
def test_ddim_agrees_up_to_rounding(objective, capsys):
    original = diffusion(1000, "cosine", objective, sampling_timesteps=20, ddim_sampling_eta=0.5)
    torch.manual_seed(0)
    expected = original.sample(batch_size=2)
    chosen = torch.linspace(-1, 999, 21).int().flip(0)[:-1]
    sampler = Sampler(
        Net(),
        NoiseSchedule.cosine(1000),
        prediction=PREDICTIONS[objective],
        solver="ddim",
        eta=0.5,
        timesteps=chosen.tolist(),
    )
    torch.manual_seed(0)
    result = sampler.sample(SHAPE, generator=torch.default_generator)
    # Theirs divides by a float32 sqrt(1 / abar - 1) at each of 20 steps; measured 1e-6.
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-6)


def test_a_linear_schedule_of_few_steps_is_nan_there_and_an_error_here():
    assert torch.isnan(diffusion(10, "linear", "pred_noise").sqrt_alphas_cumprod).any()
    with pytest.raises(ValueError, match="beta_end must lie in"):
        NoiseSchedule.linear(10, 0.1 / 10, 20 / 10)
