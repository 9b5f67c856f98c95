"""Timestep samplers and weightings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.ops import random_timesteps
from ddpm_fast.training import LossSecondMoment, UniformTimesteps, diffusion_loss, weighting
from ddpm_fast.training.weighting import WEIGHTINGS, min_snr, p2, truncated_snr

SCHEDULE = df.NoiseSchedule.linear(1000)


class Resampler:
    """improved-diffusion's LossSecondMomentResampler, written out: its memory and its probabilities."""

    def __init__(self, timesteps: int, history: int = 10, uniform: float = 0.001) -> None:
        self.timesteps, self.history, self.uniform = timesteps, history, uniform
        self.losses = np.zeros([timesteps, history])
        self.counts = np.zeros([timesteps], dtype=int)

    def weights(self) -> np.ndarray:
        if not (self.counts == self.history).all():
            return np.ones([self.timesteps])
        weights = np.sqrt(np.mean(self.losses**2, axis=-1))
        weights /= np.sum(weights)
        weights *= 1 - self.uniform
        return weights + self.uniform / len(weights)

    def update(self, ts: list[int], losses: list[float]) -> None:
        for t, loss in zip(ts, losses, strict=True):
            if self.counts[t] == self.history:
                self.losses[t, :-1] = self.losses[t, 1:]
                self.losses[t, -1] = loss
            else:
                self.losses[t, self.counts[t]] = loss
                self.counts[t] += 1


@settings(max_examples=60, deadline=None)
@given(
    updates=st.lists(st.tuples(st.integers(0, 3), st.floats(0.0, 100.0)), max_size=60),
    history=st.integers(1, 4),
    uniform=st.floats(0.001, 0.9),
)
def test_probabilities_are_improved_diffusions(updates: list[tuple[int, float]], history: int, uniform: float) -> None:
    ours, theirs = LossSecondMoment(4, history=history, uniform=uniform), Resampler(4, history, uniform)
    # Every timestep with some loss: without any their division is 0 / 0, where ours stays even.
    updates = [(t, 1.0) for t in range(4)] * history + updates
    for t, loss in updates:
        ours.update(torch.tensor([t]), torch.tensor([loss], dtype=torch.float64))
        theirs.update([t], [loss])
    weights = theirs.weights()
    if np.isfinite(weights).all():
        np.testing.assert_allclose(ours.probabilities().numpy(), weights / weights.sum(), rtol=1e-12)


def test_uniform_until_every_timestep_has_its_history() -> None:
    sampler = LossSecondMoment(3, history=2)
    for t in (0, 0, 0, 1, 1, 2):
        sampler.update(torch.tensor([t]), torch.tensor([float(1 + t)]))
        assert torch.equal(sampler.probabilities(), torch.full((3,), 1 / 3, dtype=torch.float64))
    sampler.update(torch.tensor([2]), torch.tensor([3.0]))
    expected = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) / 6 * 0.999 + 0.001 / 3
    torch.testing.assert_close(sampler.probabilities(), expected)


def test_timesteps_follow_the_probabilities_and_the_weights_undo_them() -> None:
    sampler = LossSecondMoment(4, history=1, uniform=0.01)
    losses = torch.tensor([0.5, 1.0, 4.0, 2.5])
    sampler.update(torch.arange(4), losses)
    n = 40000
    t, weights = sampler.sample(n, seed=3, step=2)
    p = sampler.probabilities()
    # Six standard deviations of a binomial count.
    assert bool(((t.bincount(minlength=4) / n - p).abs() < 6 * (p * (1 - p) / n).sqrt()).all())
    torch.testing.assert_close(weights, (1 / (4 * p[t])).float())
    # The weighted mean estimates the plain one, with hardly any variance: the weights are the losses' reciprocals.
    assert float((weights * losses[t]).mean()) == pytest.approx(float(losses.mean()), rel=0.01)
    assert float((weights * losses[t]).std()) < 0.1 * float(losses[t].std())


def test_draws_are_functions_of_seed_step_and_id() -> None:
    sampler = LossSecondMoment(50)
    t, _ = sampler.sample(16, seed=1, step=5)
    assert torch.equal(t, sampler.sample(16, seed=1, step=5)[0])
    assert torch.equal(t[7:9], sampler.sample(2, seed=1, step=5, sample_ids=[7, 8])[0])
    assert not torch.equal(t, sampler.sample(16, seed=1, step=6)[0])
    uniform, weights = UniformTimesteps(50).sample(16, seed=1, step=5)
    assert torch.equal(uniform, random_timesteps(16, 50, seed=1, step=5))
    assert weights.eq(1).all()


def test_the_memory_can_be_carried_over() -> None:
    first, second = LossSecondMoment(5, history=2), LossSecondMoment(5, history=2)
    first.update(torch.arange(5).repeat(3), torch.rand(15))
    for name, tensor in second.state().items():
        tensor.copy_(first.state()[name])
    assert torch.equal(first.sample(30, seed=0)[0], second.sample(30, seed=0)[0])
    assert UniformTimesteps(5).state() == {}


def test_losses_that_are_not_finite_are_forgotten() -> None:
    sampler = LossSecondMoment(2, history=1)
    sampler.update(torch.tensor([0, 1, 0, 1]), torch.tensor([1.0, 1.0, float("nan"), float("inf")]))
    torch.testing.assert_close(sampler.probabilities(), torch.full((2,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    "arguments", [{"timesteps": 0}, {"timesteps": 5, "history": 0}, {"timesteps": 5, "uniform": 1.0}], ids=str
)
def test_bad_samplers_are_named(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        LossSecondMoment(**arguments)


def weight_of_x0(name: str, snr: Tensor) -> Tensor:
    """The papers' weights of the squared error of x0."""
    return {"min_snr": snr.clamp(max=5), "p2": snr / (1 + snr), "truncated_snr": snr.clamp(min=1)}[name]


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "x_prev"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_weighted_loss_is_the_weighted_error_of_x0(name: str, prediction: str) -> None:
    """Whatever is predicted: an error d of x0 shows as the right multiple of d, and the weight takes it away."""
    schedule = df.NoiseSchedule.cosine(20)
    x0, noise = torch.rand(19, 1, 2, 2) * 2 - 1, torch.randn(19, 1, 2, 2)
    t = torch.arange(19)  # at the last one the signal is 1e-5 of the noise
    column = lambda table: table[t].reshape(-1, 1, 1, 1)  # noqa: E731
    signal, sigma = column(schedule.sqrt_alphas_cumprod), column(schedule.sqrt_one_minus_alphas_cumprod)
    x_t = signal * x0 + sigma * noise
    wrong = x0.double() + 0.5
    epsilon = (x_t - signal * wrong) / sigma
    output = {
        "epsilon": epsilon,
        "x0": wrong,
        "v": signal * epsilon - sigma * wrong,
        "x_prev": column(schedule.posterior_mean_coef1) * wrong + column(schedule.posterior_mean_coef2) * x_t,
    }[prediction]
    got = diffusion_loss(
        lambda x, t: output, schedule, x0.double(), t, noise=noise.double(), prediction=prediction, weighting=name
    )
    torch.testing.assert_close(got, 0.25 * weight_of_x0(name, schedule.snr)[t], rtol=2e-4, atol=0)


def test_weightings_as_tensors() -> None:
    snr = SCHEDULE.snr
    torch.testing.assert_close(min_snr(SCHEDULE, 3.0), snr.clamp(max=3) / snr)
    torch.testing.assert_close(min_snr(SCHEDULE, prediction="v"), snr.clamp(max=5) / (snr + 1))
    torch.testing.assert_close(p2(SCHEDULE, 0.5, 2.0), (2 + snr) ** -0.5)
    torch.testing.assert_close(truncated_snr(SCHEDULE, prediction="x0"), snr.clamp(min=1))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: min_snr(SCHEDULE, 0.0), "gamma must be positive"),
        (lambda: min_snr(SCHEDULE, math.inf), "gamma must be positive and finite"),
        (lambda: p2(SCHEDULE, k=-1.0), "k must be positive"),
        (lambda: min_snr(SCHEDULE, prediction="score"), "prediction must be one of"),
        (lambda: truncated_snr(SCHEDULE.rescale_zero_terminal_snr()), "no finite weight for epsilon at timestep 999"),
        (lambda: weighting.named_weighting("snr", SCHEDULE, "epsilon", torch.device("cpu")), "weighting must be"),
    ],
    ids=["gamma", "infinite", "k", "prediction", "no-signal", "name"],
)
def test_bad_weightings_are_named(call: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()  # type: ignore[operator]
