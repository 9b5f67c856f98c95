"""Solvers in sigma space: against the algorithms of the papers, in their own variables and in float64."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch import Tensor

from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.solvers import SIGMA_SOLVERS
from tests.originals.network import Net

SHAPE = (2, 3, 8, 8)
FULL = NoiseSchedule.linear(1000)


class Denoiser:
    """k-diffusion's view of a network of epsilon: D(x, sigma), x = x_0 + sigma * noise, in float64."""

    def __init__(self, schedule: NoiseSchedule, net: Net, clip: float | None, karras: int | None = None) -> None:
        """At the schedule's own levels, or at `karras` levels of Karras et al. between its last and its first."""
        self.net, self.clip, self.calls = net.double().eval(), clip, 0
        abar = schedule.alphas_cumprod
        sigmas = ((1 - abar) / abar).sqrt()
        if karras is None:
            self.times = schedule.timestep_map.flip(0)
            self.sigmas = [*sigmas.flip(0).tolist(), 0.0]
        else:
            ramp = torch.linspace(0, 1, karras, dtype=torch.float64)
            low, high = sigmas[0] ** (1 / 7), sigmas[-1] ** (1 / 7)
            spaced = (high + ramp * (low - high)) ** 7
            self.times = torch.stack([sigma_to_t(sigma, sigmas) for sigma in spaced])
            self.sigmas = [*spaced.tolist(), 0.0]

    def __call__(self, x: Tensor, i: int) -> Tensor:
        self.calls += 1
        sigma = self.sigmas[i]
        with torch.no_grad():
            e = self.net(x / (1 + sigma**2) ** 0.5, self.times[i].expand(len(x)))
        x0 = x - sigma * e
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip)


def sigma_to_t(sigma: Tensor, sigmas: Tensor) -> Tensor:
    """k-diffusion's: linear in log sigma between the two timesteps beside it."""
    log_sigma, log_sigmas = sigma.log(), sigmas.log()
    below = int((log_sigmas <= log_sigma).sum().clamp(1, len(sigmas) - 1)) - 1
    w = (log_sigmas[below] - log_sigma) / (log_sigmas[below] - log_sigmas[below + 1])
    return below + w.clamp(0, 1)


class DoubleNet(Net):
    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        dtype = self.last.weight.dtype
        time = self.time(t.reshape(-1, 1).to(dtype) / 1000)[:, :, None, None]
        return self.last(torch.nn.functional.silu(self.first(x) + time))


def euler(denoise: Denoiser, x: Tensor, noise: Tensor) -> Tensor:
    for i, (s, s_next) in enumerate(zip(denoise.sigmas[:-1], denoise.sigmas[1:], strict=True)):
        x = x + (s_next - s) * (x - denoise(x, i)) / s
    return x


def heun(denoise: Denoiser, x: Tensor, noise: Tensor) -> Tensor:
    for i, (s, s_next) in enumerate(zip(denoise.sigmas[:-1], denoise.sigmas[1:], strict=True)):
        d = (x - denoise(x, i)) / s
        end = x + (s_next - s) * d
        if s_next > 0:
            d = (d + (end - denoise(end, i + 1)) / s_next) / 2
        x = x + (s_next - s) * d
    return x


def euler_ancestral(denoise: Denoiser, x: Tensor, noise: Tensor) -> Tensor:
    for i, (s, s_next) in enumerate(zip(denoise.sigmas[:-1], denoise.sigmas[1:], strict=True)):
        up = min(s_next, (s_next**2 * (s**2 - s_next**2) / s**2) ** 0.5)
        down = (s_next**2 - up**2) ** 0.5
        x = x + (down - s) * (x - denoise(x, i)) / s
        if s_next > 0:
            x = x + up * noise[i]
    return x


def dpmpp_2m(denoise: Denoiser, x: Tensor, noise: Tensor) -> Tensor:
    lam = [-torch.tensor(s, dtype=torch.float64).log() for s in denoise.sigmas]
    old = None
    for i, (s, s_next) in enumerate(zip(denoise.sigmas[:-1], denoise.sigmas[1:], strict=True)):
        x0 = denoise(x, i)
        h = lam[i + 1] - lam[i]
        d = x0
        if old is not None and s_next > 0:
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
        x = (s_next / s) * x - torch.expm1(-h) * d
        old = x0
    return x


ALGORITHMS = {"euler": euler, "heun": heun, "euler_ancestral": euler_ancestral, "dpmpp_2m": dpmpp_2m}


def test_every_solver_has_its_algorithm_here():
    assert set(ALGORITHMS) == set(SIGMA_SOLVERS)


@pytest.mark.parametrize("clip", [None, 1.0], ids=["noclip", "clip"])
@pytest.mark.parametrize("steps", [1, 4, 15])
@pytest.mark.parametrize("solver", ALGORITHMS)
def test_solver_follows_its_paper(solver, steps, clip):
    x_T, noise = torch.randn(SHAPE), torch.randn(steps, *SHAPE)
    sampler = Sampler(DoubleNet(), FULL, solver=solver, steps=steps, clip=None if clip is None else (-clip, clip))
    result = sampler.sample(SHAPE, x_T=x_T, noise=noise)
    denoise = Denoiser(sampler.schedule, DoubleNet(), clip)
    # DPM-Solver++ starts from x_T, the others from sigma * x_T in their variables.
    scale = denoise.sigmas[0] if solver != "dpmpp_2m" else (1 + denoise.sigmas[0] ** 2) ** 0.5
    expected = ALGORITHMS[solver](denoise, x_T.double() * scale, noise.double())
    # float32 on numbers of the size of the largest; an x0 at sigma 157 is rounded to 2e-5 before it is clipped.
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=4e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("clip", [None, 1.0], ids=["noclip", "clip"])
@pytest.mark.parametrize("steps", [1, 4, 15])
@pytest.mark.parametrize("solver", ALGORITHMS)
def test_solver_at_karras_levels_follows_its_paper(solver, steps, clip):
    x_T, noise = torch.randn(SHAPE), torch.randn(steps, *SHAPE)
    options = {"solver": solver, "clip": None if clip is None else (-clip, clip)}
    sampler = Sampler(DoubleNet(), FULL, steps=steps, timesteps="karras", **options)
    result = sampler.sample(SHAPE, x_T=x_T, noise=noise)
    denoise = Denoiser(FULL, DoubleNet(), clip, karras=steps)
    start = x_T.double() * denoise.sigmas[0]
    if solver == "dpmpp_2m":  # which takes x_T as it is
        start = x_T.double() * (1 + denoise.sigmas[0] ** 2) ** 0.5
    expected = ALGORITHMS[solver](denoise, start, noise.double())
    # As above; and the network gets a float32 t.
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=4e-5 * max(1.0, expected.abs().max().item()))
    made = Sampler(DoubleNet(), FULL.karras(steps), **options).sample(SHAPE, x_T=x_T, noise=noise)
    assert torch.equal(made, result)


def test_karras_levels_are_k_diffusions():
    schedule = FULL.karras(50)
    denoise = Denoiser(FULL, DoubleNet(), None, karras=50)
    sigmas = torch.tensor(denoise.sigmas[:-1], dtype=torch.float64).flip(0)
    torch.testing.assert_close(((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt(), sigmas)
    torch.testing.assert_close(schedule.network_times, denoise.times.flip(0).float(), rtol=1e-6, atol=1e-6)
    assert schedule.network_times.dtype == torch.float32
    assert torch.equal(schedule.network_times[[0, -1]], torch.tensor([0.0, 999.0]))
    assert torch.equal(schedule.timestep_map, denoise.times.flip(0).round().long())
    assert schedule.original_timesteps == 1000
    assert (schedule.network_times.diff() > 0).all()


def test_karras_levels_between_the_steps_of_a_respaced_schedule_keep_its_numbers():
    times = FULL.respace([100, 500, 999]).karras(7).network_times
    assert times[[0, -1]].tolist() == [100.0, 999.0]
    assert (times.diff() > 0).all()


def test_the_network_gets_the_place_between_two_timesteps():
    seen = []

    def model(x, t):
        seen.append(t.clone())
        return x * 0.5

    sampler = Sampler(model, FULL, solver="euler", steps=9, timesteps="karras")
    states = list(sampler.stream(SHAPE))
    times = FULL.karras(9).network_times.flip(0)
    assert torch.equal(torch.stack(seen), times[:, None].expand(-1, 2))
    assert (times.frac() != 0).any()
    assert [state.t for state in states] == times.round().long().tolist() == sampler.timesteps.tolist()
    seen.clear()
    half = NoiseSchedule.linear(500)
    Sampler(model, half, solver="euler", steps=9, timesteps="karras", time_input="scaled").sample(SHAPE)
    assert torch.equal(torch.stack(seen)[:, 0], half.karras(9).network_times.flip(0) * 2.0)


def test_karras_levels_inpaint_and_pickle_and_compare():
    known = torch.full(SHAPE, 0.25)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    sampler = Sampler(Net(), FULL, solver="euler", steps=6, timesteps="karras")
    result = sampler.sample(SHAPE, mask=mask, known=known, blend="repaint", resample=2)
    assert torch.equal(result[..., :4], known[..., :4])
    schedule = FULL.karras(6)
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule != FULL.karras(6, rho=5.0)
    assert torch.equal(copy.network_times, schedule.network_times)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m"])
def test_second_order_is_closer_to_the_flow(solver, prediction):
    """With a network that knows the flow of N(0, 0.25): x0 = 0.25 sqrt(abar) x / (0.25 abar + 1 - abar)."""
    abar = FULL.alphas_cumprod.float()

    def model(x, t):
        a = abar[t].reshape(-1, 1, 1, 1)
        x0 = 0.25 * a.sqrt() * x / (0.25 * a + 1 - a)
        return x0 if prediction == "x0" else (a.sqrt() * x - x0) / (1 - a).sqrt()

    x_T = torch.randn(SHAPE)
    errors = {}
    for name in ("euler", solver):
        sampler = Sampler(model, FULL, solver=name, steps=250, prediction=prediction, clip=None)
        start = x_T * (1 - sampler.schedule.alphas_cumprod[-1]).sqrt().float() if name != "dpmpp_2m" else x_T
        last = abar[-1]
        exact = start * (0.25 / (0.25 * last + 1 - last)).sqrt()
        errors[name] = (sampler.sample(SHAPE, x_T=x_T) - exact).abs().mean().item()
    assert errors[solver] < 0.5 * errors["euler"]


@pytest.mark.parametrize("solver", ALGORITHMS)
def test_stream_is_sample_and_states_keep_their_x0(solver):
    sampler = Sampler(Net(), FULL, solver=solver, steps=6)
    states = list(sampler.stream(SHAPE, seed=2))
    assert torch.equal(states[-1].x, sampler.sample(SHAPE, seed=2))
    assert len({state.x0.data_ptr() for state in states}) == 6
    assert all(state.x0.abs().max() <= 1 for state in states)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 6), ("heun", 11), ("euler_ancestral", 6), ("dpmpp_2m", 6)])
def test_calls_and_draws(solver, calls):
    count, draws = [], []

    def model(x, t):
        count.append(int(t[0]))
        return x * 0.5

    def noise(draw, t, shape):
        draws.append(draw)
        return torch.zeros(shape)

    Sampler(model, FULL, solver=solver, steps=6).sample(SHAPE, noise=noise)
    assert len(count) == calls
    assert draws == (list(range(5)) if solver == "euler_ancestral" else [])


@pytest.mark.parametrize("solver", ALGORITHMS)
def test_guidance_and_hooks_work_in_every_evaluation(solver):
    net, y = Net(), torch.tensor([1.0, -1.0])

    def mixture(x, t):
        u, c = net(x, t, y=torch.zeros(2)), net(x, t, y=y)
        return u + 2.0 * (c - u)

    seen = []

    def halved(x0):
        seen.append(1)
        return x0 * 0.5

    options = {"solver": solver, "steps": 4, "denoised_fn": halved}
    guided = Sampler(net, FULL, guidance_scale=2.0, **options)
    result = guided.sample(SHAPE, model_kwargs={"y": y}, uncond_kwargs={"y": torch.zeros(2)})
    count = len(seen)
    assert count == (7 if solver == "heun" else 4)
    # The mixture in one call on a batch of 2N may round differently in the convolutions.
    torch.testing.assert_close(result, Sampler(mixture, FULL, **options).sample(SHAPE), rtol=0, atol=1e-5)


def test_a_learned_variance_is_not_used():
    plain = Sampler(Net(), FULL, solver="euler", steps=3)
    learned = Sampler(Net(outputs=2), FULL, solver="euler", steps=3, variance="learned_range")
    assert dataclasses.astuple(plain.table)[0] == dataclasses.astuple(learned.table)[0] == "euler"
    assert learned.sample(SHAPE).shape == SHAPE


@pytest.mark.parametrize(
    ("solver", "message"),
    [("heun", "asks the network twice a step"), ("dpmpp_2m", "has a history, which step does not keep: use stream")],
)
def test_single_steps_are_refused(solver, message):
    with pytest.raises(ValueError, match=message):
        Sampler(Net(), FULL, solver=solver).step(torch.zeros(SHAPE), torch.zeros(SHAPE), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "lucidrains"}, "reference='lucidrains' has solver ddpm or ddim, got 'euler'"),
        ({"eta": 0.5}, "eta is a parameter of solver='ddim'"),
        ({"prediction": "x_prev"}, "use solver='ddpm'"),
        ({"timesteps": "karras"}, "timesteps='karras' needs steps, the number of them, got None"),
        ({"timesteps": "karras", "steps": "ddim50"}, "needs steps, the number of them, got 'ddim50'"),
        ({"timesteps": "exponential", "steps": 5}, "must be the steps' numbers or 'karras', got 'exponential'"),
    ],
    ids=str,
)
def test_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(Net(), FULL, solver="euler", **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FULL.karras(0), ValueError, "steps must be at least 1, got 0"),
        (lambda: FULL.karras(2.0), TypeError, "steps must be an int, got float"),
        (lambda: FULL.karras(2, rho=0), ValueError, "rho must be more than 0, got 0"),
        (lambda: FULL.karras(5).karras(3), ValueError, "a karras schedule has levels of its own"),
        (lambda: FULL.karras(5).respace(2), ValueError, "a karras schedule cannot be respaced"),
        (lambda: FULL.karras(5).rescale_zero_terminal_snr(), ValueError, "a karras schedule cannot be rescaled"),
        (lambda: NoiseSchedule.log_snr("cosine", 9).karras(3), ValueError, "a log_snr schedule has levels of its own"),
        (lambda: FULL.rescale_zero_terminal_snr().karras(3), ValueError, "the last level .* has no signal"),
        (
            lambda: Sampler(Net(), FULL, solver="ddim", steps=5, timesteps="karras"),
            ValueError,
            "timesteps='karras' is for solver dpmpp_2m, euler, heun, euler_ancestral, got 'ddim'",
        ),
        (
            lambda: Sampler(Net(), FULL.karras(5), reference="diffusers"),
            ValueError,
            "a karras schedule has no float32 betas",
        ),
    ],
    ids=["zero", "float", "rho", "twice", "respace", "rescale", "log_snr", "zero-snr", "ddim", "diffusers"],
)
def test_karras_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
