"""The samplers, the likelihood and the variational bound on a mixture of Gaussians, where everything is known exactly.

The statistical tests run with fixed seeds. For exact samples the chance that one of the statistics of `deviations`
exceeds its limit is below 1e-3; `test_what_the_statistics_find` shows that small faults exceed them by far.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from tests.mixture import Mixture

SCHEDULE = df.NoiseSchedule.linear(1000)
WEIGHTS, MEANS, SCALES = [0.3, 0.7], [[-0.6, 0.2], [0.5, -0.3]], [0.15, 0.3]
MIXTURE = Mixture(SCHEDULE, WEIGHTS, MEANS, SCALES)
DIRECTIONS = [torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64) for a in (0.0, 0.8, 1.6, 2.4)]

# sqrt(n) times a Kolmogorov-Smirnov distance is beyond 2.1 with probability 3e-4, on one of four lines with less than
# 1.2e-3 (lines are correlated); a normal is beyond 4.1 standard deviations with 4e-5.
LIMITS = {"distance": 2.1, "weight": 4.1, "log density": 4.1}


@pytest.fixture(scope="module")
def exact() -> dict[str, float]:
    """Of a million exact samples: the weight of the disc around the first part, and the log density's moments."""
    x = MIXTURE.draw(1_000_000, seed=0)
    density = MIXTURE.log_density(x, torch.zeros(len(x), dtype=torch.int64))
    return {"weight": in_disc(x).item(), "mean": density.mean().item(), "deviation": density.std().item()}


def in_disc(x: Tensor) -> Tensor:
    return ((x - MIXTURE.means[0]).norm(dim=1) < 0.45).double().mean()


def deviations(x: Tensor, exact: dict[str, float]) -> dict[str, float]:
    """How far samples are from the mixture, in units of what chance makes of exact ones."""
    x, n = x.double(), len(x)
    order = torch.arange(n + 1, dtype=torch.float64) / n
    distance = 0.0
    for direction in DIRECTIONS:
        cdf = MIXTURE.marginal_cdf((x @ direction).sort().values, direction)
        distance = max(distance, float((cdf - order[:-1]).max()), float((order[1:] - cdf).max()))
    weight = (in_disc(x).item() - exact["weight"]) / math.sqrt(exact["weight"] * (1.0 - exact["weight"]) / n)
    density = MIXTURE.log_density(x, torch.zeros(n, dtype=torch.int64)).mean().item()
    return {
        "distance": math.sqrt(n) * distance,
        "weight": abs(weight),
        "log density": abs(density - exact["mean"]) / exact["deviation"] * math.sqrt(n),
    }


def exceeded(found: dict[str, float]) -> list[str]:
    return [name for name, limit in LIMITS.items() if found[name] > limit]


@pytest.mark.parametrize(
    ("parts", "caught"),
    [
        (([0.34, 0.66], MEANS, SCALES), "weight"),
        ((WEIGHTS, [[-0.6, 0.2], [0.54, -0.3]], SCALES), "distance"),
        ((WEIGHTS, MEANS, [0.15, 0.32]), "log density"),
    ],
    ids=["weight-by-0.04", "mean-by-0.04", "scale-by-7-percent"],
)
def test_what_the_statistics_find(parts, caught, exact):
    """Power: each fault is found in every one of 20 sets of 8000, exact samples in none."""
    wrong = Mixture(SCHEDULE, *parts)
    assert all(caught in exceeded(deviations(wrong.draw(8000, seed), exact)) for seed in range(20))
    assert not any(exceeded(deviations(MIXTURE.draw(8000, seed), exact)) for seed in range(20))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "heun", "steps": 50},
        {"solver": "ddim", "steps": 250},
        {"solver": "ddim", "steps": 250, "corrector_steps": 1, "corrector_snr": 0.3},
    ],
    ids=["ddpm", "heun-50", "ddim-250", "ddim-250-corrector"],
)
def test_samples_are_distributed_as_the_mixture(options, exact):
    sampler = df.Sampler(MIXTURE, SCHEDULE, clip=None, **options)
    assert exceeded(deviations(sampler.sample((8000, 2), seed=0), exact)) == []


def test_annealed_langevin_dynamics_reach_the_mixture(exact):
    sampler = df.Sampler(
        MIXTURE, SCHEDULE, clip=None, solver="langevin", steps=500, corrector_steps=4, corrector_snr=0.4
    )
    found = deviations(sampler.sample((2000, 2), seed=0), exact)
    # Steps of finite size lag behind the levels: their samples are slightly too wide whatever the number of samples,
    # by 0.07 nats of the mean log density here, which 2000 samples resolve to 0.02.
    assert found["distance"] < LIMITS["distance"]
    assert found["weight"] < LIMITS["weight"]
    assert found["log density"] / math.sqrt(2000) * exact["deviation"] < 0.12


def test_a_corrector_repairs_what_few_steps_spoil(exact):
    few = df.Sampler(MIXTURE, SCHEDULE, clip=None, steps=50)
    corrected = df.Sampler(MIXTURE, SCHEDULE, clip=None, steps=50, corrector_steps=3, corrector_snr=0.4)
    before, after = (deviations(sampler.sample((8000, 2), seed=0), exact) for sampler in (few, corrected))
    assert "distance" in exceeded(before)
    assert after["distance"] < 0.7 * before["distance"]
    assert after["log density"] < 0.7 * before["log density"]


# ---------------------------------------------------------------------- the likelihood


def test_the_flows_likelihood_is_the_mixtures():
    x = MIXTURE.draw(300, seed=2)
    expected = MIXTURE.log_density(x, torch.zeros(300, dtype=torch.int64))
    error = df.log_likelihood(MIXTURE, SCHEDULE, x, divergence="exact") - expected
    # Heun's error at 1000 levels, 1e-3 on average; in the tails the mixture at the last level is not quite normal:
    # its mean, 0.4 * sqrt(4e-5), times an x_T of 3 or 4.
    assert error.mean().abs() < 3e-3
    assert error.abs().max() < 0.03


def test_the_flows_error_is_of_second_order():
    x = MIXTURE.draw(300, seed=2)
    levels = [
        df.log_likelihood(MIXTURE, SCHEDULE.respace(steps), x, divergence="exact").mean() for steps in (100, 200, 400)
    ]
    # Halving the steps divides the error by four, and so the differences.
    assert 3.0 < (levels[0] - levels[1]) / (levels[1] - levels[2]) < 5.0


def test_the_bound_brackets_the_likelihood():
    """-log p lies below every bound, and bounds of finer processes come down to within a tenth of a nat of it."""
    x0 = MIXTURE.draw(16_000, seed=3)
    exact = -MIXTURE.log_density(x0, torch.zeros(len(x0), dtype=torch.int64))
    gaps, errors = {}, {}
    for steps in (20, 50, 250):
        difference = bound(x0, SCHEDULE.respace(steps)) - exact
        gaps[steps], errors[steps] = difference.mean().item(), difference.std().item() / math.sqrt(len(x0))
    assert gaps[20] > 5 * errors[20]
    assert gaps[50] > 5 * errors[50]
    assert gaps[20] > gaps[50] > gaps[250] > 2 * errors[250]
    assert gaps[250] + 3 * errors[250] < 0.1
    flow = -df.log_likelihood(MIXTURE, SCHEDULE, x0[:1000], divergence="exact")
    assert (flow - exact[:1000]).mean().abs().item() < 0.005


def test_bits_per_dim_bound_the_entropy_of_bytes():
    """One pixel of 256 values, whose probabilities and best denoiser are known: no bound lies below -log2 p."""
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1.0
    bumps = [w * torch.exp(-0.5 * ((values - m) / s) ** 2) / s for w, m, s in ((0.3, -0.5, 0.1), (0.7, 0.4, 0.2))]
    p = sum(bumps) / sum(bumps).sum()

    def epsilon(x: Tensor, t: Tensor) -> Tensor:
        abar, x = SCHEDULE.alphas_cumprod[t][:, None], x.double()
        posterior = torch.softmax(p.log() - 0.5 * (x - abar.sqrt() * values) ** 2 / (1.0 - abar), dim=1)
        x0 = (posterior * values).sum(1, keepdim=True)
        return ((x - abar.sqrt() * x0) / (1.0 - abar).sqrt()).float()

    bytes_ = torch.multinomial(p, 4000, replacement=True, generator=torch.Generator().manual_seed(0))
    x0 = values[bytes_, None].float()
    gaps, errors = [], []
    for steps in (20, 100):
        total = df.bits_per_dim(epsilon, SCHEDULE.respace(steps), x0, variance="fixed_large").total.double()
        difference = total + p[bytes_].log2()
        gaps.append(difference.mean().item())
        errors.append(difference.std().item() / math.sqrt(len(x0)))
    assert gaps[0] > gaps[1] > 3 * errors[1]
    assert gaps[1] + 3 * errors[1] < 0.3


def bound(x0: Tensor, schedule: df.NoiseSchedule) -> Tensor:
    """Of -log p(x0), ``(N,)`` nats: L_T + sum of L_{t-1} + L_0 (Ho et al. 2020, eq. 5), one draw of x_t a term.

    The variance of a step is beta, the best one for smooth data; the last step's normal distribution is the decoder.
    """
    generator = torch.Generator().manual_seed(4)
    signal, deviation = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    mean_sq, variance = (signal[-1] * x0).square().sum(1), deviation[-1] ** 2
    dimensions = x0.shape[1]
    total = 0.5 * (mean_sq + dimensions * (variance - 1.0 - variance.log()))
    from_x0, posterior, betas = schedule.posterior_mean_coef1, schedule.posterior_variance, schedule.betas
    for k, t in enumerate(schedule.timestep_map.tolist()):
        x_t = signal[k] * x0 + deviation[k] * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        time = torch.full((len(x0),), t)
        estimate = (x_t - deviation[k] * MIXTURE(x_t, time)) / signal[k]
        distance = (from_x0[k] * (x0 - estimate)).square().sum(1)
        if k > 0:
            ratio = posterior[k] / betas[k]
            total = total + 0.5 * (distance / betas[k] + dimensions * (ratio - 1.0 - ratio.log()))
        else:
            total = total + 0.5 * (distance / betas[0] + dimensions * (2.0 * math.pi * betas[0]).log())
    return total
