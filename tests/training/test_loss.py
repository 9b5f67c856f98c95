"""The training objective against its formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.ops import q_sample, random_timesteps
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.training import diffusion_loss

SCHEDULE = NoiseSchedule.linear(100)


def model(x: Tensor, t: Tensor, gain: float = 0.5) -> Tensor:
    return gain * x + t.reshape(-1, 1, 1, 1) / 100


@pytest.fixture
def x0() -> Tensor:
    return torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))


T = torch.tensor([0, 3, 50, 99])


def target(prediction: str, x0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and what the network should say, in float64."""
    column = lambda table: table[T].reshape(-1, 1, 1, 1)  # noqa: E731
    signal, sigma = column(SCHEDULE.sqrt_alphas_cumprod), column(SCHEDULE.sqrt_one_minus_alphas_cumprod)
    x0, noise = x0.double(), noise.double()
    x_t = signal * x0 + sigma * noise
    targets = {
        "epsilon": noise,
        "x0": x0,
        "v": signal * noise - sigma * x0,
        "x_prev": column(SCHEDULE.posterior_mean_coef1) * x0 + column(SCHEDULE.posterior_mean_coef2) * x_t,
    }
    return x_t, targets[prediction]


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "x_prev"])
@pytest.mark.parametrize(
    ("loss", "distance"),
    [
        ("mse", lambda d: d * d),
        ("l1", torch.abs),
        ("huber", lambda d: torch.where(d.abs() < 1, d * d / 2, d.abs() - 0.5)),
    ],
    ids=["mse", "l1", "huber"],
)
def test_formula(loss: str, distance: Callable[[Tensor], Tensor], prediction: str, x0: Tensor, noise: Tensor) -> None:
    x_t, wanted = target(prediction, x0, noise)
    expected = distance(model(x_t, T) - wanted).flatten(1).mean(1)
    got = diffusion_loss(model, SCHEDULE, x0, T, loss=loss, prediction=prediction, noise=noise)
    assert got.shape == (4,)
    # float32 against float64, means of 18 elements.
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_draws_come_from_their_streams(x0: Tensor) -> None:
    ids = [7, 1, 2, 9]
    t = random_timesteps(4, 100, seed=5, sample_ids=ids, step=3)
    x_t, noise = q_sample(x0, t, SCHEDULE, seed=5, sample_ids=ids, step=3)
    expected = F.mse_loss(model(x_t, t), noise, reduction="none").flatten(1).mean(1)
    got = diffusion_loss(model, SCHEDULE, x0, seed=5, sample_ids=ids, step=3)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)  # the same numbers, summed in another order
    assert diffusion_loss(model, SCHEDULE, x0[1:2], seed=5, sample_ids=[1], step=3).equal(got[1:2])
    assert not diffusion_loss(model, SCHEDULE, x0, seed=5, sample_ids=ids, step=4).equal(got)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "x_prev"])
def test_bytes_are_scaled(prediction: str, noise: Tensor) -> None:
    images = torch.randint(256, noise.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    got = diffusion_loss(model, SCHEDULE, images, T, prediction=prediction, noise=noise)
    expected = diffusion_loss(model, SCHEDULE, images.float() / 127.5 - 1, T, prediction=prediction, noise=noise)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_weighting_and_keyword_arguments(x0: Tensor, noise: Tensor) -> None:
    plain = diffusion_loss(model, SCHEDULE, x0, T, noise=noise)
    weights = torch.arange(100.0)
    assert diffusion_loss(model, SCHEDULE, x0, T, noise=noise, weighting=weights).equal(plain * T)
    assert not diffusion_loss(model, SCHEDULE, x0, T, noise=noise, model_kwargs={"gain": 2.0}).equal(plain)


def test_gradient_reaches_the_model(x0: Tensor, noise: Tensor) -> None:
    gain = torch.tensor(0.5, requires_grad=True)
    diffusion_loss(model, SCHEDULE, x0, T, noise=noise, model_kwargs={"gain": gain}).sum().backward()
    x_t, wanted = target("epsilon", x0, noise)
    expected = (2 * (model(x_t, T) - wanted) * x_t).flatten(1).mean(1).sum()
    torch.testing.assert_close(gain.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_rejects(x0: Tensor, noise: Tensor) -> None:
    with pytest.raises(ValueError, match="loss must be one of"):
        diffusion_loss(model, SCHEDULE, x0, T, noise=noise, loss="l3")
    with pytest.raises(ValueError, match="prediction must be one of"):
        diffusion_loss(model, SCHEDULE, x0, T, noise=noise, prediction="score")
    with pytest.raises(ValueError, match="seed is needed"):
        diffusion_loss(model, SCHEDULE, x0, T)
    with pytest.raises(ValueError, match="seed is needed"):
        diffusion_loss(model, SCHEDULE, x0, noise=noise)
    with pytest.raises(ValueError, match="weighting"):
        diffusion_loss(model, SCHEDULE, x0, T, noise=noise, weighting=torch.ones(99))
    with pytest.raises(ValueError, match="the model must return"):
        diffusion_loss(lambda x, t: x[:, :1], SCHEDULE, x0, T, noise=noise)
    with pytest.raises(TypeError, match="x0 must be a tensor"):
        diffusion_loss(model, SCHEDULE, [1.0], T, noise=noise)  # type: ignore[arg-type]
