"""Hooks of the Sampler: against openai's loops with theirs, and what they cost and refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast.sampler import Sampler
from ddpm_fast.sampler import step as step_module
from ddpm_fast.sampler.guidance import mixed
from ddpm_fast.schedule import NoiseSchedule
from tests.originals.guided import GaussianDiffusion, ModelMeanType, ModelVarType
from tests.originals.network import Net

SHAPE = (2, 3, 8, 8)
BETAS = np.linspace(1e-4, 0.02, 1000)
FULL = NoiseSchedule.linear(1000)
MEAN_TYPES = {"epsilon": ModelMeanType.EPSILON, "x0": ModelMeanType.START_X}
VAR_TYPES = {
    "fixed_small": ModelVarType.FIXED_SMALL,
    "fixed_large": ModelVarType.FIXED_LARGE,
    "learned": ModelVarType.LEARNED,
    "learned_range": ModelVarType.LEARNED_RANGE,
}


def soft(x0: Tensor) -> Tensor:
    return torch.tanh(x0) * 1.25


def toward_target(x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
    """A gradient through autograd, as a classifier's is, that depends on t."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        score = -((x - 0.3) ** 2 * (1 + t.float()[:, None, None, None] / 1000)).sum()
        return torch.autograd.grad(score, x)[0]


def gently(x: Tensor, t: Tensor) -> Tensor:
    return toward_target(x, t) * 0.1


def both(
    steps: int, variance: str = "fixed_small", prediction: str = "epsilon", loop: str = "p_sample_loop", **hooks: object
) -> tuple[Tensor, Tensor]:
    """The original's result and ours, from the same torch seed."""
    outputs = 2 if variance.startswith("learned") else 1
    respaced = FULL.respace(steps)
    diffusion = GaussianDiffusion(
        respaced.betas.numpy(),
        MEAN_TYPES[prediction],
        VAR_TYPES[variance],
        timestep_map=respaced.timestep_map.tolist(),
        original_num_steps=1000,
    )
    net = Net(outputs=outputs)
    theirs = {k: v for k, v in hooks.items() if k not in ("cond_mode", "solver")}
    torch.manual_seed(0)
    expected = getattr(diffusion, loop)(net, SHAPE, **theirs)
    sampler = Sampler(net, FULL, steps=steps, prediction=prediction, variance=variance, **hooks)
    torch.manual_seed(0)
    result = sampler.sample(SHAPE, generator=torch.default_generator)
    assert torch.isfinite(expected).all()
    return expected, result


# ---------------------------------------------------------------------- against openai's loops


@pytest.mark.parametrize("prediction", MEAN_TYPES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("hooks", [{"denoised_fn": soft}, {"cond_fn": toward_target}], ids=lambda h: next(iter(h)))
def test_hooks_of_p_sample_are_bit_equal(hooks, variance, prediction):
    expected, result = both(250, variance, prediction, **hooks)
    assert torch.equal(result, expected)


def test_both_hooks_at_once_are_bit_equal():
    expected, result = both(100, denoised_fn=soft, cond_fn=toward_target)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_hooks_with_a_learned_variance(variance):
    # The log variances of an untrained network are about 0: a long gradient would go off to infinity.
    expected, result = both(50, variance, denoised_fn=soft, cond_fn=gently)
    # 50 steps whose exponential is ours, within an ulp or two of torch.exp; measured 4e-7.
    torch.testing.assert_close(result, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(
    "hooks",
    [{}, {"denoised_fn": soft}, {"cond_fn": toward_target, "cond_mode": "score"}],
    ids=["plain", "denoised_fn", "cond_fn"],
)
def test_ddim_with_hooks_agrees_up_to_rounding(hooks, eta):
    expected, result = both(50, loop="ddim_sample_loop", solver="ddim", eta=eta, **hooks)
    # Theirs derives epsilon from x0 and x_t in float32, ours is one linear step.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_score_mode_of_an_ancestral_step_is_openais_condition_score():
    x, output, noise = torch.randn(3, *SHAPE)
    diffusion = GaussianDiffusion(BETAS)
    sampler = Sampler(Net(), FULL, cond_fn=toward_target, cond_mode="score")
    for i in (0, 250, 500, 998):
        k = 999 - i
        _, _, log_variance, x0 = diffusion.predictions(output, x, k, True, None)
        abar = diffusion.read(diffusion.alphas_cumprod, k, x)
        gradient = toward_target(x, torch.full((2,), k))
        epsilon = diffusion.epsilon_from_x0(x, k, x0) - (1 - abar).sqrt() * gradient
        mean = diffusion.posterior_mean(diffusion.x0_from_epsilon(x, k, epsilon), x, k)
        expected = mean + torch.exp(0.5 * log_variance) * noise
        # sqrt is rounded correctly here and not in torch: an ulp of a term that is at most 20 times larger.
        torch.testing.assert_close(sampler.step(x, output, i, noise), expected, rtol=2e-6, atol=2e-6)


def test_cond_fn_gets_the_networks_time_and_arguments_and_gradients():
    seen = []

    def cond_fn(x, t, y):
        assert torch.is_grad_enabled()
        seen.append((x.shape, t.clone(), y))
        return torch.zeros_like(x)

    schedule = NoiseSchedule.linear(500)
    y = torch.tensor([1.0, 2.0])
    sampler = Sampler(Net(), schedule, timesteps=[400, 0], cond_fn=cond_fn, time_input="scaled", guidance_scale=2.0)
    result = sampler.sample(SHAPE, model_kwargs={"y": y}, uncond_kwargs={"y": torch.zeros(2)})
    assert [t.tolist() for _, t, _ in seen] == [[800.0, 800.0], [0.0, 0.0]]
    assert all(shape == SHAPE and given is y for shape, _, given in seen)
    # A gradient of zero moves nothing.
    plain = Sampler(Net(), schedule, timesteps=[400, 0], time_input="scaled", guidance_scale=2.0)
    assert torch.equal(result, plain.sample(SHAPE, model_kwargs={"y": y}, uncond_kwargs={"y": torch.zeros(2)}))


def test_steps_with_hooks_are_the_loop():
    options = {"denoised_fn": soft, "cond_fn": toward_target, "threshold": 0.9}
    sampler = Sampler(Net(), FULL, steps=5, **options)
    states = list(sampler.stream(SHAPE, seed=3))
    model = Net().eval()
    x = states[0].x
    for state in states[1:]:
        with torch.no_grad():
            output = model(x, torch.full((2,), state.t))
        x = sampler.step(x, output, state.i, seed=3)
        assert torch.equal(x, state.x)
        assert state.x0.abs().max() <= 1
    assert torch.equal(x, sampler.sample(SHAPE, seed=3))


# ---------------------------------------------------------------------- self-conditioning


def test_self_conditioning_passes_the_last_clipped_x0():
    seen = []

    class Recording(Net):
        def forward(self, x, t, x_self_cond=None, y=None):
            seen.append(None if x_self_cond is None else x_self_cond.clone())
            return super().forward(x, t, x_self_cond, y)

    sampler = Sampler(Recording(self_condition=True), FULL, steps=5, self_condition=True)
    states = list(sampler.stream(SHAPE))
    assert seen[0] is None
    for last, state in zip(seen[1:], states, strict=False):
        assert torch.equal(last, state.x0)
    assert states[0].x0.data_ptr() != states[1].x0.data_ptr()
    assert torch.equal(states[-1].x, sampler.sample(SHAPE))


def test_self_conditioning_names_its_keyword_and_doubles_for_guidance():
    seen = []

    def model(x, t, y, previous):
        seen.append((len(x), None if previous is None else previous.clone()))
        return x * 0.5 + y.reshape(-1, 1, 1, 1) * 0.01

    sampler = Sampler(model, FULL, steps=3, self_condition="previous", guidance_scale=2.0)
    sampler.sample(SHAPE, model_kwargs={"y": torch.ones(2)}, uncond_kwargs={"y": torch.zeros(2)})
    assert seen[0] == (4, None)
    for size, previous in seen[1:]:
        assert size == 4
        assert torch.equal(previous[:2], previous[2:])


def test_self_conditioning_in_half_precision_gets_the_networks_dtype():
    seen = set()

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, x, t, x_self_cond):
            seen.add(None if x_self_cond is None else x_self_cond.dtype)
            return x * self.weight

    Sampler(Half(), FULL, steps=3, self_condition=True).sample(SHAPE)
    assert seen == {None, torch.bfloat16}


# ---------------------------------------------------------------------- guidance rescale, temperature


def test_guidance_rescale_brings_back_the_standard_deviation():
    c, u = torch.randn(2, *SHAPE) * torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1, 1)
    e = u + 7.5 * (c - u)
    full = mixed(c, u, 7.5, 1.0)
    torch.testing.assert_close(full.std((1, 2, 3)), c.std((1, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(mixed(c, u, 7.5, 0.7), 0.7 * full + 0.3 * e, rtol=1e-5, atol=1e-6)
    assert torch.equal(mixed(c, u, 7.5, 0.0), e)


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_guidance_rescale_in_the_step_leaves_the_variance_alone(variance):
    channels = 6 if variance == "learned_range" else 3
    x, noise = torch.randn(2, *SHAPE)
    u, c = torch.randn(2, 2, channels, 8, 8)
    rescaled = Sampler(Net(), FULL, variance=variance, guidance_scale=3.0, guidance_rescale=0.7)
    e = torch.cat([mixed(c[:, :3], u[:, :3], 3.0, 0.7), c[:, 3:]], dim=1)
    plain = Sampler(Net(), FULL, variance=variance)
    assert torch.equal(rescaled.step(x, (u, c), 400, noise), plain.step(x, e, 400, noise))
    assert not torch.equal(
        rescaled.step(x, (u, c), 400, noise),
        Sampler(Net(), FULL, variance=variance, guidance_scale=3.0).step(x, (u, c), 400, noise),
    )


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_temperature_scales_the_noise(temperature, variance):
    channels = 6 if variance == "learned_range" else 3
    x, noise = torch.randn(2, *SHAPE)
    output = torch.randn(2, channels, 8, 8)
    hot = Sampler(Net(), FULL, variance=variance, temperature=temperature)
    # Powers of two: the factor may stand anywhere.
    expected = Sampler(Net(), FULL, variance=variance).step(x, output, 400, noise * temperature)
    assert torch.equal(hot.step(x, output, 400, noise), expected)


# ---------------------------------------------------------------------- what a step costs


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, 1),
        ({"self_condition": True}, 1),
        ({"temperature": 0.5}, 1),
        ({"guidance_scale": 2.0}, 1),
        ({"guidance_scale": 2.0, "guidance_rescale": 0.5}, 1),
        ({"cond_fn": toward_target}, 2),
        ({"denoised_fn": soft}, 2),
    ],
    ids=str,
)
def test_absent_hooks_leave_one_kernel_a_step(options, calls, monkeypatch):
    count = []

    def counted(*args, **kwargs):
        count.append(1)
        return original(*args, **kwargs)

    original = step_module.denoise
    monkeypatch.setattr(step_module, "denoise", counted)
    kwargs = {"uncond_kwargs": {}} if "guidance_scale" in options else {}
    Sampler(Net(), FULL, steps=4, **options).sample(SHAPE, **kwargs)
    assert len(count) == 4 * calls


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"denoised_fn": 3}, TypeError, "denoised_fn must be callable, got int"),
        ({"cond_fn": "a"}, TypeError, "cond_fn must be callable, got str"),
        ({"cond_mode": "grad"}, ValueError, "cond_mode must be 'mean' or 'score', got 'grad'"),
        ({"cond_fn": soft, "solver": "ddim"}, ValueError, "use 'score' with solver='ddim'"),
        ({"cond_fn": soft, "solver": "plms"}, ValueError, "solver='plms' has no cond_fn"),
        ({"cond_fn": soft, "cond_mode": "score", "prediction": "x_prev"}, ValueError, "makes no use of"),
        ({"denoised_fn": soft, "prediction": "x_prev"}, ValueError, "denoised_fn changes x0"),
        ({"guidance_rescale": 0.5}, ValueError, "guidance_rescale needs guidance_scale"),
        ({"guidance_rescale": 1.5, "guidance_scale": 2.0}, ValueError, r"must lie in \[0.0, 1.0\], got 1.5"),
        ({"guidance_rescale": "1"}, TypeError, "guidance_rescale must be a real number, got str"),
        ({"temperature": -1.0}, ValueError, "temperature must be at least 0.0, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
        ({"self_condition": 1}, TypeError, "self_condition must be a bool or a keyword's name, got int"),
        ({"self_condition": "x y"}, ValueError, "self_condition must name a keyword"),
    ],
    ids=str,
)
def test_constructor_refuses(options, error, message):
    with pytest.raises(error, match=message):
        Sampler(Net(), FULL, **options)


@pytest.mark.parametrize("hook", ["denoised_fn", "cond_fn"])
def test_a_hook_must_return_what_looks_like_its_argument(hook):
    with pytest.raises(TypeError, match=f"{hook} must return a tensor, got int"):
        Sampler(Net(), FULL, steps=2, **{hook: lambda *args: 3}).sample(SHAPE)
    with pytest.raises(ValueError, match=rf"{hook} must return a tensor of shape \(2, 3, 8, 8\)"):
        Sampler(Net(), FULL, steps=2, **{hook: lambda x, *args: x[:1]}).sample(SHAPE)
