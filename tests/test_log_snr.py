"""Continuous-time schedules: against Imagen's loop, written out in plain PyTorch from the paper's formulas."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor

from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule
from tests.originals.imagen import log_snr

SHAPE = (2, 3, 8, 8)


def net(x: Tensor, condition: Tensor) -> Tensor:
    """Depends on the log-SNR that it is told."""
    assert condition.dtype == torch.float32
    return torch.tanh(x * 0.7 + x.roll(1, -1) * 0.2 + condition.reshape(-1, 1, 1, 1) * 0.01)


def imagen_loop(name: str, steps: int, prediction: str, percentile: float | None, x: Tensor, noise: Tensor) -> Tensor:
    times = torch.linspace(1.0, 0.0, steps + 1)
    for i in range(steps):
        now, then = log_snr(name, times[i]), log_snr(name, times[i + 1])
        alpha, sigma = now.sigmoid().sqrt(), (-now).sigmoid().sqrt()
        alpha_next, sigma_next = then.sigmoid().sqrt(), (-then).sigmoid().sqrt()
        output = net(x, now.expand(len(x)))
        if prediction == "epsilon":
            x0 = (x - sigma * output) / alpha.clamp(min=1e-8)
        elif prediction == "v":
            x0 = alpha * x - sigma * output
        else:
            x0 = output
        if percentile is None:
            x0 = x0.clamp(-1.0, 1.0)
        else:
            s = torch.quantile(x0.flatten(1).abs(), percentile, dim=-1).clamp(min=1.0)[:, None, None, None]
            x0 = x0.clamp(-s, s) / s
        c = -torch.expm1(now - then)
        mean = alpha_next * (x * (1 - c) / alpha + c * x0)
        log_variance = torch.log((sigma_next**2 * c).clamp(min=1e-20))
        x = mean + float(i + 1 < steps) * (0.5 * log_variance).exp() * noise[i]
    return x


@pytest.mark.parametrize("percentile", [None, 0.95], ids=["static", "dynamic"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_sampler_follows_imagens_loop(name, prediction, percentile):
    x_T, noise = torch.randn(SHAPE), torch.randn(50, *SHAPE)
    expected = imagen_loop(name, 50, prediction, percentile, x_T, noise)
    sampler = Sampler(net, NoiseSchedule.log_snr(name, 50), prediction=prediction, threshold=percentile)
    result = sampler.sample(SHAPE, x_T=x_T, noise=noise)
    # Theirs has its tables in float32, down to alpha = 4e-8; measured 3e-6.
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_tables_are_the_levels(name):
    schedule = NoiseSchedule.log_snr(name, 100)
    t = torch.linspace(1.0, 0.0, 101)
    values = log_snr(name, t).flip(0)
    assert torch.equal(schedule.network_times, values[1:])
    torch.testing.assert_close(schedule.alphas_cumprod, values[1:].double().sigmoid(), rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.alphas_cumprod_prev, values[:-1].double().sigmoid(), rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.snr.log(), values[1:].double(), rtol=1e-6, atol=1e-6)


def test_the_last_level_is_not_clean():
    assert NoiseSchedule.log_snr("cosine", 10).alphas_cumprod_prev[0].item() == pytest.approx(
        1 / (1 + math.exp(-8.77)), abs=1e-6
    )
    sampler = Sampler(lambda x, t: x * 0, NoiseSchedule.log_snr("cosine", 10), prediction="x0")
    # The mean of the last step lies between x0, here 0, and x_t.
    assert sampler.table.rows64[-1, 3] > 0


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "plms"])
def test_other_solvers_end_at_the_last_level_too(solver):
    schedule = NoiseSchedule.log_snr("linear", 40)
    data = torch.full(SHAPE, 0.25)

    def exact(x, t):
        abar = torch.sigmoid(t).reshape(-1, 1, 1, 1)
        return (x - abar.sqrt() * data) / (1 - abar).sqrt()

    x_T = torch.randn(SHAPE)
    result = Sampler(exact, schedule, solver=solver, clip=None).sample(SHAPE, x_T=x_T)
    end, start = schedule.alphas_cumprod_prev[0], schedule.alphas_cumprod[-1]
    epsilon = (x_T - start.sqrt().float() * data) / (1 - start).sqrt().float()
    expected = end.sqrt().float() * data + (1 - end).sqrt().float() * epsilon
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_time_input_may_be_a_function_of_the_ratio():
    seen = []

    def model(x, t):
        seen.append(t.clone())
        return x * 0.5

    schedule = NoiseSchedule.log_snr("cosine", 3)
    Sampler(model, schedule, time_input=lambda t: t * 2).sample(SHAPE)
    assert torch.equal(torch.stack(seen)[:, 0], schedule.network_times.flip(0) * 2)
    assert NoiseSchedule.linear(3).network_times.tolist() == [0, 1, 2]


def test_equality_and_pickling():
    schedule = NoiseSchedule.log_snr("cosine", 5)
    assert schedule == NoiseSchedule.log_snr("cosine", 5)
    assert schedule != NoiseSchedule.log_snr("linear", 5)
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert torch.equal(copy.alphas_cumprod_prev, schedule.alphas_cumprod_prev)
    assert torch.equal(copy.network_times, schedule.network_times)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NoiseSchedule.log_snr("sigmoid", 5), ValueError, "unknown log_snr schedule 'sigmoid': choose one of"),
        (lambda: NoiseSchedule.log_snr("cosine", 0), ValueError, "timesteps must be at least 1, got 0"),
        (lambda: NoiseSchedule.log_snr("cosine", 2.0), TypeError, "timesteps must be an int, got float"),
        (lambda: NoiseSchedule.log_snr("cosine", 5).respace(2), ValueError, "a log_snr schedule cannot be respaced"),
        (
            lambda: NoiseSchedule.log_snr("cosine", 5).rescale_zero_terminal_snr(),
            ValueError,
            "a log_snr schedule cannot be rescaled",
        ),
        (
            lambda: Sampler(net, NoiseSchedule.log_snr("cosine", 5), reference="diffusers"),
            ValueError,
            "a log_snr schedule has no float32 betas",
        ),
        (
            lambda: Sampler(net, NoiseSchedule.log_snr("cosine", 5), time_input="scaled"),
            ValueError,
            "time_input='scaled' scales timesteps",
        ),
    ],
    ids=["name", "zero", "float", "respace", "rescale", "diffusers", "scaled"],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---------------------------------------------------------------------- from_tables


def test_from_tables_keeps_the_tables_given():
    betas = NoiseSchedule.linear(10).betas.float()
    abar = torch.cumprod(1 - betas, dim=0)
    schedule = NoiseSchedule.from_tables({"betas": betas, "alphas_cumprod": abar}, list(range(5, 15)), 20)
    assert torch.equal(schedule.alphas_cumprod.float(), abar)
    assert schedule.is_imported
    assert schedule.timestep_map.tolist() == list(range(5, 15))
    assert schedule.original_timesteps == 20
    assert schedule != NoiseSchedule.from_betas(betas)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    kept = schedule.respace([0, 4, 9])
    assert kept.timestep_map.tolist() == [5, 9, 14]
    torch.testing.assert_close(kept.alphas_cumprod, abar[[0, 4, 9]].double(), rtol=1e-14, atol=0)
    assert not kept.is_imported


@pytest.mark.parametrize(
    ("tables", "error", "message"),
    [
        ({}, ValueError, "tables must hold 'betas'"),
        ({"betas": [[0.1]]}, ValueError, r"betas must have one dimension, got shape \(1, 1\)"),
        ({"betas": [0.0]}, ValueError, r"betas\[0\] = 0.0 is outside"),
        ({"betas": ["a"]}, TypeError, "betas must be a tensor, array or sequence of real numbers"),
        ({"betas": [0.1], "beta": [0.1]}, ValueError, "tables holds 'beta', which is none of alphas"),
        ({"betas": [0.1], "alphas": [0.9, 0.8]}, ValueError, r"alphas must have shape \(1,\) as betas has, got \(2,\)"),
    ],
    ids=["none", "shape", "range", "type", "name", "length"],
)
def test_from_tables_refuses(tables, error, message):
    with pytest.raises(error, match=message):
        NoiseSchedule.from_tables(tables)


def test_from_tables_refuses_a_map_of_another_length():
    with pytest.raises(ValueError, match="timestep_map must have 1 entries, got 2"):
        NoiseSchedule.from_tables({"betas": [0.1]}, [1, 2], 5)
