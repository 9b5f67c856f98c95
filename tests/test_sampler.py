"""Sampler: against loops written out in plain PyTorch, and everything that a run may be asked to do."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor, nn

from ddpm_fast.backends import available_backends, use_backend
from ddpm_fast.ops.random import randn
from ddpm_fast.sampler import Sampler, SamplerState
from ddpm_fast.schedule import NoiseSchedule
from tests.ops.common import bits_of_torchs_quantile

SHAPE = (2, 3, 8, 8)
FULL = NoiseSchedule.linear(1000)


class Toy(nn.Module):
    """A network of products and sums: what it returns for a sample has the same bits in any batch."""

    def __init__(self, channels: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.7], dtype=dtype))
        self.dropout = nn.Dropout()
        self.channels = channels

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        assert not self.training
        mixed = x * self.scale + x.roll(1, -1).clamp(-1, 1) * x * 0.125
        mixed = mixed + (t.to(x.dtype) * 0.0005).reshape(-1, *[1] * (x.dim() - 1))
        if y is not None:
            mixed = mixed + y.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)) * 0.0625
        return mixed if self.channels == 1 else torch.cat([mixed, (mixed * 0.5 - 0.25).clamp(-1, 1)], dim=1)


def readable(value: object) -> str:
    """A parameter in a test's name: of a tensor, its shape."""
    if isinstance(value, Tensor):
        return "x".join(map(str, value.shape))
    if isinstance(value, dict):
        return "-".join(f"{name}={readable(v)}" for name, v in value.items()) or "none"
    return value.__name__ if isinstance(value, type) else str(value)


def draws(steps: int, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator), torch.randn(steps, *shape, generator=generator)


def openai_step(
    schedule: NoiseSchedule,
    x: Tensor,
    output: Tensor,
    k: int,
    z: Tensor,
    *,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    clip: bool = True,
) -> Tensor:
    """One p_sample as openai's code does it: every float64 table entry cast to float32 and broadcast."""

    def read(table: Tensor) -> Tensor:
        return table[k].float().expand(x.shape)

    channels = x.shape[1]
    small = schedule.posterior_log_variance_clipped
    log_betas = schedule.betas.log()
    if variance == "learned":
        log_variance = output[:, channels:]
    elif variance == "learned_range":
        fraction = (output[:, channels:] + 1) / 2
        log_variance = fraction * read(log_betas) + (1 - fraction) * read(small)
    else:
        log_variance = read(small if variance == "fixed_small" else torch.cat([small[:1], log_betas[1:]]))
    output = output[:, :channels]
    if prediction == "epsilon":
        x0 = read(schedule.sqrt_recip_alphas_cumprod) * x - read(schedule.sqrt_recipm1_alphas_cumprod) * output
    elif prediction == "v":
        x0 = read(schedule.sqrt_alphas_cumprod) * x - read(schedule.sqrt_one_minus_alphas_cumprod) * output
    else:
        x0 = output
    if clip:
        x0 = x0.clamp(-1, 1)
    mean = read(schedule.posterior_mean_coef1) * x0 + read(schedule.posterior_mean_coef2) * x
    if prediction == "x_prev":
        mean = output
    mask = float(k != 0)
    return mean + mask * torch.exp(0.5 * log_variance) * z


def openai_loop(schedule: NoiseSchedule, model: nn.Module, x: Tensor, noise: Tensor, **how: object) -> Tensor:
    model.eval()
    steps = schedule.timesteps
    with torch.no_grad():
        for i in range(steps):
            k = steps - 1 - i
            t = torch.full((len(x),), int(schedule.timestep_map[k]))
            x = openai_step(schedule, x, model(x, t), k, noise[i], **how)
    return x


# ---------------------------------------------------------------------- the loop, bit for bit


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "noclip"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_thousand_steps_are_bit_equal_to_openais_loop(prediction, variance, clip):
    x_T, noise = draws(1000)
    expected = openai_loop(FULL, Toy(), x_T, noise, prediction=prediction, variance=variance, clip=clip)
    sampler = Sampler(Toy(), FULL, prediction=prediction, variance=variance, clip="auto" if clip else None)
    result = sampler.sample(SHAPE, x_T=x_T, noise=noise)
    assert torch.isfinite(expected).all()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("steps", ["ddim50", 40, "10,10,5"])
def test_respaced_steps_are_bit_equal_to_openais_loop(steps, backend):
    x_T, noise = draws(50)
    respaced = FULL.respace(steps)
    expected = openai_loop(respaced, Toy(), x_T, noise)
    with use_backend(backend):
        sampler = Sampler(Toy(), FULL, steps=steps)
        assert sampler.schedule == respaced
        assert torch.equal(sampler.sample(SHAPE, x_T=x_T, noise=noise), expected)


def test_x_prev_prediction_is_bit_equal_to_openais_loop():
    x_T, noise = draws(30)
    schedule = NoiseSchedule.cosine(30)
    expected = openai_loop(schedule, Toy(), x_T, noise, prediction="x_prev")
    assert torch.isfinite(expected).all()
    assert torch.equal(Sampler(Toy(), schedule, prediction="x_prev").sample(SHAPE, x_T=x_T, noise=noise), expected)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_learned_variance_is_within_four_ulp_of_openais_step(variance):
    """Its exponential is ours, so a step, not the loop, is compared; 4 ulp of the largest noise term."""
    x, noise = draws(1000)
    model = Toy(channels=2).eval()
    sampler = Sampler(model, FULL, variance=variance)
    ulp = torch.finfo(torch.float32).eps
    for i in (*range(0, 1000, 37), 998, 999):
        k = 999 - i
        with torch.no_grad():
            output = model(x, torch.full((2,), k))
        expected = openai_step(FULL, x, output, k, noise[i], variance=variance)
        silent = openai_step(FULL, x, output, k, torch.zeros_like(x), variance=variance)
        largest = (expected - silent).abs().max() + silent.abs().max()
        assert (sampler.step(x, output, i, noise[i]) - expected).abs().max() <= 4 * ulp * largest
        x = expected


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_loop_is_made_of_steps(variance):
    """sample, stream and S calls of step agree to the bit; the noise is the contract's."""
    model = Toy(channels=2 if variance == "learned_range" else 1)
    sampler = Sampler(model, FULL, steps=20, variance=variance)
    result = sampler.sample(SHAPE, seed=11, sample_ids=[5, 9])
    x = randn(SHAPE, seed=11, sample_ids=[5, 9], stream="x_T")
    given = x.clone()
    model.eval()
    for i, t in enumerate(sampler.timesteps):
        with torch.no_grad():
            output, output_given = model(x, t.expand(2)), model(given, t.expand(2))
        x = sampler.step(x, output, i, seed=11, sample_ids=[5, 9])
        given = sampler.step(given, output_given, i, randn(SHAPE, seed=11, sample_ids=[5, 9], step=i))
    model.train()
    assert torch.equal(x, result)
    assert torch.equal(given, result)
    *_, last = sampler.stream(SHAPE, seed=11, sample_ids=torch.tensor([5, 9]))
    assert torch.equal(last.x, result)


def test_generator_draws_like_openais_loop():
    """x_T first, then once a step, the last one included, whatever the layout of the state."""
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(SHAPE, generator=generator)
    noise = torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(50)])
    after = torch.randn(4, generator=generator)
    expected = openai_loop(FULL.respace(50), Toy(), x_T, noise)
    for out in (None, torch.empty(SHAPE, memory_format=torch.channels_last)):
        generator.manual_seed(0)
        result = Sampler(Toy(), FULL, steps=50).sample(SHAPE, generator=generator, out=out)
        assert torch.equal(result, expected)
        assert torch.equal(torch.randn(4, generator=generator), after)


def test_generator_draws_unused_noise_too():
    generator = torch.Generator().manual_seed(0)
    Sampler(Toy(), FULL, steps=5, solver="ddim").sample(SHAPE, generator=generator)
    other = torch.Generator().manual_seed(0)
    for _ in range(6):
        torch.randn(SHAPE, generator=other)
    assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=other))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_follows_the_paper(eta):
    x, noise = draws(50)
    schedule = FULL.respace("ddim50")
    result = Sampler(Toy(), FULL, steps="ddim50", solver="ddim", eta=eta).sample(SHAPE, x_T=x, noise=noise)
    model = Toy(dtype=torch.float64).eval()
    x, noise = x.double(), noise.double()
    with torch.no_grad():
        for i in range(50):
            k = 49 - i
            abar, previous = schedule.alphas_cumprod[k], schedule.alphas_cumprod_prev[k]
            output = model(x, schedule.timestep_map[k].expand(2))
            x0 = ((x - (1 - abar).sqrt() * output) / abar.sqrt()).clamp(-1, 1)
            epsilon = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
            sigma = eta * ((1 - previous) / (1 - abar) * (1 - abar / previous)).sqrt()
            x = previous.sqrt() * x0 + (1 - previous - sigma**2).sqrt() * epsilon + sigma * noise[i]
    # 50 float32 steps on numbers of size 1, amplified by a network that is not a contraction.
    torch.testing.assert_close(result.double(), x, rtol=0, atol=2e-4)


# ---------------------------------------------------------------------- one sample, any batch


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"solver": "ddim", "eta": 0.7}, {"threshold": 0.9}], ids=str)
def test_sample_7_of_64_is_sample_7_alone(backend, memory_format, threads, options):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend(backend):
            sampler = Sampler(Toy(), FULL, steps=10, **options)
            out = torch.empty((64, 3, 16, 16), memory_format=memory_format)
            batch = sampler.sample((64, 3, 16, 16), seed=4, out=out)
            alone = sampler.sample((1, 3, 16, 16), seed=4, sample_ids=[7])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(batch[7], alone[0])
    assert not torch.equal(batch[7], batch[8])


def test_seed_changes_the_samples_and_its_type_does_not():
    sampler = Sampler(Toy(), FULL, steps=3)
    first = sampler.sample(SHAPE)
    assert torch.equal(first, sampler.sample(SHAPE, seed=0))
    assert torch.equal(first, sampler.sample(SHAPE, seed=torch.tensor([0])))
    assert not torch.equal(first, sampler.sample(SHAPE, seed=1))
    assert sampler.sample(SHAPE, seed=2**64 - 1).isfinite().all()


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (2, 3, 5, 7), (1, 2, 3, 4, 5)], ids=str)
def test_any_number_of_dimensions(shape):
    assert Sampler(Toy(), FULL, steps=3).sample(shape).shape == shape


# ---------------------------------------------------------------------- noise from outside


def test_noise_function_is_told_the_draw_the_timestep_and_the_shape():
    x_T, noise = draws(5)
    calls = []

    def function(draw, t, shape):
        calls.append((draw, t, shape))
        return noise[draw]

    sampler = Sampler(Toy(), FULL, steps="ddim5")
    result = sampler.sample(SHAPE, x_T=x_T, noise=function)
    assert calls == [(i, 800 - 200 * i, SHAPE) for i in range(5)]
    assert torch.equal(result, sampler.sample(SHAPE, x_T=x_T, noise=noise))


def test_extra_rows_of_noise_are_ignored():
    x_T, noise = draws(8)
    sampler = Sampler(Toy(), FULL, steps=5)
    few = sampler.sample(SHAPE, x_T=x_T, noise=noise[:5])
    assert torch.equal(sampler.sample(SHAPE, x_T=x_T, noise=noise), few)


def test_given_noise_leaves_x_T_to_the_seed():
    _, noise = draws(5)
    sampler = Sampler(Toy(), FULL, steps=5)
    expected = sampler.sample(SHAPE, x_T=randn(SHAPE, seed=8, stream="x_T"), noise=noise)
    assert torch.equal(sampler.sample(SHAPE, seed=8, noise=noise), expected)


# ---------------------------------------------------------------------- states, callback, every, progress


def test_stream_yields_each_step():
    sampler = Sampler(Toy(), FULL, steps="ddim4")
    states = list(sampler.stream(SHAPE, seed=1))
    assert [s.i for s in states] == [0, 1, 2, 3]
    assert [s.t for s in states] == [750, 500, 250, 0]
    # Kept states are not overwritten by later steps, and each follows from the one before.
    model = Toy().eval()
    x = randn(SHAPE, seed=1, stream="x_T")
    for state in states:
        with torch.no_grad():
            output = model(x, torch.full((2,), state.t))
        k = 3 - state.i
        tables = sampler.schedule
        x0 = (
            tables.sqrt_recip_alphas_cumprod[k].float() * x - tables.sqrt_recipm1_alphas_cumprod[k].float() * output
        ).clamp(-1, 1)
        assert torch.equal(state.x0, x0)
        assert torch.equal(state.x, sampler.step(x, output, state.i, seed=1))
        x = state.x


def test_writing_into_a_state_changes_nothing():
    sampler = Sampler(Toy(), FULL, steps=4)
    for state in sampler.stream(SHAPE):
        last = state.x.clone()
        state.x.zero_()
        state.x0.zero_()
    assert torch.equal(last, sampler.sample(SHAPE))


def test_callback_sees_every_state_and_can_stop():
    sampler = Sampler(Toy(), FULL, steps=6)
    states = list(sampler.stream(SHAPE))
    seen: list[SamplerState] = []

    def callback(state):
        seen.append(state)
        return state.i == 2

    result = sampler.sample(SHAPE, callback=callback)
    assert [s.i for s in seen] == [0, 1, 2]
    assert torch.equal(result, states[2].x)
    for ours, expected in zip(seen, states, strict=False):
        assert torch.equal(ours.x, expected.x)
        assert torch.equal(ours.x0, expected.x0)


def test_a_callback_stops_with_true_only():
    sampler = Sampler(Toy(), FULL, steps=4)
    seen = []
    sampler.sample(SHAPE, callback=lambda state: seen.append(state.i) or "truthy")
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(("every", "kept"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [2, 5]), (7, [6])])
def test_every_collects_states(every, kept):
    sampler = Sampler(Toy(), FULL, steps=7)
    states = [s.x for s in sampler.stream(SHAPE)]
    x, collected = sampler.sample(SHAPE, every=every)
    assert collected.dtype == torch.float32
    assert torch.equal(collected, torch.stack([states[k] for k in kept]))
    assert torch.equal(x, states[-1])


def test_every_returns_what_was_collected_before_a_stop():
    sampler = Sampler(Toy(), FULL, steps=7)
    _, collected = sampler.sample(SHAPE, every=2, callback=lambda state: state.i == 4)
    assert collected.shape == (2, *SHAPE)


def test_progress_bar_is_off_unless_asked_for(capsys):
    sampler = Sampler(Toy(), FULL, steps=4)
    sampler.sample(SHAPE)
    assert capsys.readouterr().err == ""
    sampler.sample(SHAPE, progress=True)
    assert "4/4" in capsys.readouterr().err
    list(sampler.stream(SHAPE, progress=True))
    assert "4/4" in capsys.readouterr().err


# ---------------------------------------------------------------------- buffers and layouts


def test_state_is_one_buffer_through_the_run():
    seen = []

    def model(x, t):
        seen.append(x.data_ptr())
        return x * 0.5

    out = torch.empty(SHAPE)
    result = Sampler(model, FULL, steps=6).sample(SHAPE, out=out)
    assert result is out
    assert set(seen) == {out.data_ptr()}


def test_x_T_is_not_written_to_unless_it_is_out():
    x_T = torch.randn(SHAPE)
    before = x_T.clone()
    sampler = Sampler(Toy(), FULL, steps=3)
    expected = sampler.sample(SHAPE, x_T=x_T)
    assert torch.equal(x_T, before)
    assert torch.equal(sampler.sample(SHAPE, x_T=x_T, out=x_T), expected)
    assert torch.equal(x_T, expected)


def test_layout_follows_x_T_then_the_network():
    seen = set()

    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, t):
            seen.add(x.is_contiguous(memory_format=torch.channels_last))
            return self.conv(x)

    model = Conv()
    channels_last = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    result = Sampler(model, FULL, steps=3).sample(SHAPE, x_T=channels_last)
    assert seen == {True}
    assert result.is_contiguous(memory_format=torch.channels_last)
    seen.clear()
    assert Sampler(model, FULL, steps=3).sample(SHAPE).is_contiguous()
    assert seen == {False}
    seen.clear()
    model = model.to(memory_format=torch.channels_last)
    sampler = Sampler(model, FULL, steps=3)
    assert sampler.sample(SHAPE).is_contiguous(memory_format=torch.channels_last)
    assert seen == {True}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.9}], ids=str)
def test_values_do_not_depend_on_the_layout(channels, options):
    shape = (2, channels, 6, 5)
    sampler = Sampler(Toy(), FULL, steps=5, **options)
    noise = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    out = torch.empty(shape, memory_format=torch.channels_last)
    seen = []
    result = sampler.sample(shape, noise=noise, out=out, callback=seen.append)
    assert result.stride() == out.stride()
    assert torch.equal(result, sampler.sample(shape, noise=noise))


OUTPUTS = {
    "transposed": lambda e: e.transpose(2, 3).contiguous().transpose(2, 3),
    "channels-last": lambda e: e.contiguous(memory_format=torch.channels_last),
    "every-other-column": lambda e: torch.stack([e, e], dim=4).flatten(3)[..., ::2],
    "part-of-the-channels": lambda e: torch.cat([e, e], dim=1)[:, : e.shape[1]],
    "misaligned": lambda e: torch.cat([e.flatten()[:1], e.flatten()])[1:].view(e.shape),
}


@pytest.mark.parametrize("shape", [(1, 3, 7, 5), (3, 1, 9, 4), (2, 3, 8, 8)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("layout", OUTPUTS)
def test_an_output_may_lie_in_memory_as_it_likes(layout, shape):
    def network(x, t):
        return 0.3 * x.sin() + 0.05 * t.reshape(-1, 1, 1, 1)

    schedule = NoiseSchedule.linear(5)
    expected = Sampler(network, schedule).sample(shape)
    result = Sampler(lambda x, t: OUTPUTS[layout](network(x, t)), schedule).sample(shape)
    assert torch.equal(result, expected)


def test_a_network_may_return_a_view_of_its_input():
    def transposed(x, t):
        return x.transpose(2, 3)

    def copied(x, t):
        return x.transpose(2, 3).clone()

    expected = Sampler(copied, FULL, steps=5).sample(SHAPE)
    assert torch.equal(Sampler(transposed, FULL, steps=5).sample(SHAPE), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "ddim"},
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "guidance_rescale": 0.5},
        {"threshold": (0.9, 2.0)},
        {"denoised_fn": torch.tanh, "cond_fn": lambda x, t: x},
        {"cond_fn": lambda x, t: x, "cond_mode": "score"},
        {"reference": "diffusers", "solver": "ddim"},
        {"reference": "annotated"},
        {"solver": "plms"},
        {"solver": "heun"},
        {"solver": "dpmpp_2m"},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("blend", [None, "before", "repaint"])
def test_loop_never_reads_a_tensor_on_the_host(options, blend):
    """Tensors on the meta device have no values: reading one is an error."""
    sampler = Sampler(lambda x, t: x * 0.5, FULL, steps=4, **options)
    kwargs: dict[str, object] = {"uncond_kwargs": {}} if "guidance_scale" in options else {}
    if blend is not None:
        empty = torch.empty(SHAPE, device="meta")
        kwargs.update(mask=empty[:, :1], known=empty, blend=blend)
    with use_backend("reference"):
        result = sampler.sample(SHAPE, x_T=torch.empty(SHAPE, device="meta"), **kwargs)
    assert result.device.type == "meta"


# ---------------------------------------------------------------------- the network


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_state_is_float32_and_the_network_gets_its_own_dtype(dtype):
    seen = set()

    class Recording(Toy):
        def forward(self, x, t, y=None):
            seen.add((x.dtype, t.dtype))
            return super().forward(x, t, y)

    x_T, noise = draws(10)
    sampler = Sampler(Recording(dtype=dtype), FULL, steps=10)
    result = sampler.sample(SHAPE, x_T=x_T, noise=noise)
    assert seen == {(dtype, torch.int64)}
    assert result.dtype == torch.float32

    model = Toy(dtype=dtype).eval()
    x = x_T
    with torch.no_grad():
        for i, t in enumerate(sampler.timesteps):
            output = model(x.to(dtype), t.expand(2)).float()
            x = openai_step(sampler.schedule, x, output, 9 - i, noise[i])
    assert torch.equal(result, x)


def test_modes_are_restored_module_by_module():
    model = nn.ModuleDict({"a": Toy(), "b": Toy()})
    model["b"].eval()
    model.train()
    model["b"].eval()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x, t):
            assert not any(m.training for m in self.modules())
            return self.parts["a"](x, t) + self.parts["b"](x, t)

    both = Both()
    before = [m.training for m in both.modules()]
    assert set(before) == {True, False}
    before_b = [m.training for m in model["b"].modules()]
    Sampler(both, FULL, steps=2).sample(SHAPE)
    assert [m.training for m in both.modules()] == before
    assert [m.training for m in model["b"].modules()] == before_b == [False, False]


def test_mode_is_restored_after_an_error_and_after_an_abandoned_stream():
    model = Toy().train()

    def fail(state):
        raise KeyError("stop here")

    with pytest.raises(KeyError, match="stop here"):
        Sampler(model, FULL, steps=3).sample(SHAPE, callback=fail)
    assert model.training
    stream = Sampler(model, FULL, steps=3).stream(SHAPE)
    next(stream)
    assert not model.training
    stream.close()
    assert model.training
    assert model.dropout.training


def test_no_gradient_is_recorded_and_the_callers_mode_is_untouched():
    model = Toy()
    sampler = Sampler(model, FULL, steps=3)
    assert not sampler.sample(SHAPE).requires_grad
    for state in sampler.stream(SHAPE):
        assert torch.is_grad_enabled()
        assert not state.x.requires_grad
    result = sampler.sample(SHAPE)
    assert not result.is_inference()
    x = torch.randn(SHAPE, requires_grad=True)
    assert not sampler.step(x, x * 2, 0).requires_grad


def test_an_output_with_sample_is_taken():
    plain = Toy()
    wrapped = Toy()
    wrapped.register_forward_hook(lambda module, args, output: types.SimpleNamespace(sample=output))
    expected = Sampler(plain, FULL, steps=3).sample(SHAPE)
    assert torch.equal(Sampler(wrapped, FULL, steps=3).sample(SHAPE), expected)


def test_time_input():
    def record(seen):
        def model(x, t):
            seen.append(t.clone())
            return x * 0.5

        return model

    shape = (2, 1, 2, 2)
    schedule = NoiseSchedule.linear(500)
    for time_input, expected in (
        ("auto", torch.tensor([[400, 400], [200, 200], [0, 0]])),
        ("scaled", torch.tensor([[800.0, 800.0], [400.0, 400.0], [0.0, 0.0]])),
        (lambda t: t.float() / 7, torch.tensor([[400, 400], [200, 200], [0, 0]]).float() / 7),
    ):
        seen: list[Tensor] = []
        sampler = Sampler(record(seen), schedule, timesteps=[400, 200, 0], time_input=time_input)
        sampler.sample(shape)
        assert torch.equal(torch.stack(seen), expected)
        assert seen[0].dtype == expected.dtype


def test_explicit_timesteps():
    sampler = Sampler(Toy(), FULL, timesteps=[981, 500, 3])
    assert sampler.timesteps.tolist() == [981, 500, 3]
    assert sampler.steps == 3
    assert torch.equal(Sampler(Toy(), FULL, timesteps=torch.tensor([981, 500, 3])).sample(SHAPE), sampler.sample(SHAPE))


# ---------------------------------------------------------------------- guidance


def guided_reference(schedule, x, noise, weight, cond, uncond, channels=1, **how):
    model = Toy(channels=channels).eval()
    with torch.no_grad():
        for i in range(schedule.timesteps):
            k = schedule.timesteps - 1 - i
            t = schedule.timestep_map[k].expand(len(x))
            c, u = model(x, t, **cond), model(x, t, **uncond)
            e = u[:, :3] + weight * (c[:, :3] - u[:, :3])
            x = openai_step(schedule, x, torch.cat([e, c[:, 3:]], dim=1), k, noise[i], **how)
    return x


Y = {"y": torch.tensor([2.0, -1.0])}
NULL = {"y": torch.zeros(2)}


def test_guidance_runs_one_batch_of_both_halves():
    batches = []

    class Recording(Toy):
        def forward(self, x, t, y=None):
            batches.append((x.clone(), t.clone(), y.clone()))
            return super().forward(x, t, y)

    x_T, noise = draws(6)
    sampler = Sampler(Recording(), FULL, steps=6, guidance_scale=3.0)
    result = sampler.sample(SHAPE, x_T=x_T, noise=noise, model_kwargs=Y, uncond_kwargs=NULL)
    assert torch.equal(result, guided_reference(FULL.respace(6), x_T, noise, 3.0, Y, NULL))
    assert len(batches) == 6
    for x, t, y in batches:
        assert torch.equal(x[:2], x[2:])
        assert len(t) == 4
        assert y.tolist() == [0.0, 0.0, 2.0, -1.0]


@pytest.mark.parametrize(
    ("cond", "uncond"),
    [
        (Y, {}),
        ({"y": torch.tensor(2.0)}, {"y": torch.tensor(0.0)}),
        ({"y": torch.ones(1)}, {"y": torch.zeros(1)}),
    ],
    ids=["other-names", "scalars", "broadcast"],
)
def test_guidance_calls_twice_where_arguments_are_no_batches(cond, uncond):
    sizes = []

    class Recording(Toy):
        def forward(self, x, t, y=None):
            sizes.append(len(x))
            return super().forward(x, t, y)

    x_T, noise = draws(6)
    sampler = Sampler(Recording(), FULL, steps=6, guidance_scale=3.0)
    result = sampler.sample(SHAPE, x_T=x_T, noise=noise, model_kwargs=cond, uncond_kwargs=uncond)
    assert torch.equal(result, guided_reference(FULL.respace(6), x_T, noise, 3.0, cond, uncond))
    assert sizes == [2] * 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_ways_of_calling_agree(dtype):
    sampler = Sampler(Toy(dtype=dtype), FULL, steps=6, guidance_scale=1.5)
    joined = sampler.sample(SHAPE, model_kwargs={"y": torch.ones(2)}, uncond_kwargs=NULL)
    twice = sampler.sample(SHAPE, model_kwargs={"y": torch.ones(1)}, uncond_kwargs={"y": torch.zeros(1)})
    assert torch.equal(joined, twice)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_halves_are_the_state_in_the_networks_dtype_and_the_states_layout(dtype, memory_format):
    seen = []

    class Recording(Toy):
        def forward(self, x, t, y=None):
            seen.append(x.clone())
            return super().forward(x, t, y)

    x_T = draws(2)[0].contiguous(memory_format=memory_format)
    sampler = Sampler(Recording(dtype=dtype), FULL, steps=2, guidance_scale=1.5)
    states = list(sampler.stream(SHAPE, x_T=x_T, model_kwargs=Y, uncond_kwargs=NULL))
    for x, state in zip(seen, (x_T, states[0].x), strict=True):
        assert torch.equal(x, torch.cat([state, state]).to(dtype))
        assert x.is_contiguous(memory_format=memory_format)


def test_guidance_leaves_the_learned_variance_to_the_condition():
    x_T, noise = draws(6)
    schedule = FULL.respace(6)
    sampler = Sampler(Toy(channels=2), FULL, steps=6, variance="learned_range", guidance_scale=3.0)
    result = sampler.sample(SHAPE, x_T=x_T, noise=noise, model_kwargs=Y, uncond_kwargs=NULL)
    expected = guided_reference(schedule, x_T, noise, 3.0, Y, NULL, channels=2, variance="learned_range")
    # Six steps of an exponential that may differ by an ulp or two, of numbers of size 1.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_ddim_drops_the_learned_variance():
    plain = Sampler(Toy(), FULL, steps=6, solver="ddim").sample(SHAPE)
    learned = Sampler(Toy(channels=2), FULL, steps=6, solver="ddim", variance="learned_range").sample(SHAPE)
    assert torch.equal(plain, learned)


def test_step_takes_the_pair_of_outputs():
    x, noise = draws(1)
    u, c = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    guided = Sampler(Toy(), FULL, guidance_scale=2.5).step(x, (u, c), 400, noise[0])
    assert torch.equal(guided, Sampler(Toy(), FULL).step(x, u + 2.5 * (c - u), 400, noise[0]))


# ---------------------------------------------------------------------- thresholding


@bits_of_torchs_quantile
@pytest.mark.parametrize("threshold", [0.995, 0.5, 1.0, 1, (0.7, 1.5), (0.995, 1.0)], ids=str)
def test_threshold_is_the_quantile_of_each_sample(threshold):
    ratio, maximum = threshold if isinstance(threshold, tuple) else (threshold, float("inf"))
    x, noise = draws(1)
    output = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)) * 2
    sampler = Sampler(Toy(), FULL, prediction="x0", threshold=threshold)
    s = torch.quantile(output.abs().flatten(1), float(ratio), dim=1).clamp(1.0, maximum)[:, None, None, None]
    x0 = torch.minimum(torch.maximum(output, -s), s) / s
    unclipped = Sampler(Toy(), FULL, prediction="x0", clip=None)
    assert torch.equal(sampler.step(x, output, 500, noise[0]), unclipped.step(x, x0, 500, noise[0]))


def test_threshold_in_the_loop_is_threshold_in_the_steps():
    sampler = Sampler(Toy(), FULL, steps=8, threshold=0.8)
    result = sampler.sample(SHAPE)
    x = randn(SHAPE, seed=0, stream="x_T")
    model = Toy().eval()
    for i, t in enumerate(sampler.timesteps):
        with torch.no_grad():
            output = model(x, t.expand(2))
        x = sampler.step(x, output, i)
    assert torch.equal(x, result)
    *_, last = sampler.stream(SHAPE)
    assert last.x0.abs().max() <= 1
    assert not torch.equal(result, Sampler(Toy(), FULL, steps=8).sample(SHAPE))


def test_threshold_has_no_limit_on_the_size():
    """2^24 + 20 elements in one sample: values k / 2^24, whose quantile is known."""
    from ddpm_fast.sampler.threshold import dynamic_bound

    count = (1 << 24) + 20
    values = torch.arange(count, dtype=torch.float32).mul_(2.0**-22)  # 0 .. 4, exact below 2^24
    bound = dynamic_bound(values.reshape(1, 1, -1), 0.75, float("inf"))
    assert bound.item() == pytest.approx(0.75 * (count - 1) * 2.0**-22, rel=1e-6)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": 3}, TypeError, r"model must be callable as model\(x, t\), got int"),
        ({"schedule": 1000}, TypeError, "schedule must be a NoiseSchedule, got int"),
        (
            {"prediction": "noise"},
            ValueError,
            "prediction must be one of epsilon, x0, v, x_prev, got 'noise'",
        ),
        ({"variance": "big"}, ValueError, "variance must be one of fixed_small"),
        ({"solver": "rk4"}, ValueError, "solver must be one of ddpm, ddim, .* got 'rk4'"),
        ({"reference": "openai"}, ValueError, "reference must be one of guided, lucidrains, .* got 'openai'"),
        ({"steps": 0}, ValueError, "between 1 and the schedule's 1000, got 0"),
        ({"steps": 1001}, ValueError, "got 1001"),
        ({"steps": 5.0}, TypeError, "steps must be None, an int or a string, got float"),
        ({"steps": True}, TypeError, "got bool"),
        ({"steps": 5, "timesteps": [3, 2]}, ValueError, "steps and timesteps exclude each other"),
        ({"timesteps": [2, 3]}, ValueError, "timesteps must be descending"),
        ({"timesteps": [3, 3]}, ValueError, "3 more than once"),
        ({"timesteps": [1000]}, ValueError, r"1000 is outside 0 \.\. 999"),
        ({"timesteps": 5}, TypeError, "timesteps must be the steps' numbers, got int"),
        ({"timesteps": []}, ValueError, "empty"),
        ({"eta": 0.5}, ValueError, "eta is a parameter of solver='ddim'"),
        ({"solver": "ddim", "eta": 2.0}, ValueError, r"eta must lie in \[0, 1\], got 2\.0"),
        ({"solver": "ddim", "prediction": "x_prev"}, ValueError, "use solver='ddpm'"),
        ({"clip": "no"}, ValueError, r"clip must be 'auto', None or \(low, high\), got 'no'"),
        ({"clip": True}, TypeError, "clip must be .* got bool"),
        ({"clip": (1.0, -1.0)}, ValueError, "low < high"),
        ({"clip": (0.0, float("inf"))}, ValueError, "clip must be finite"),
        ({"clip": (0.0, 1.0, 2.0)}, ValueError, "got 3 values"),
        ({"threshold": 0.0}, ValueError, r"quantile must lie in \(0, 1\], got 0\.0"),
        ({"threshold": 1.5}, ValueError, r"quantile must lie in \(0, 1\], got 1\.5"),
        ({"threshold": (0.9, 0.5)}, ValueError, r"maximum must be at least 1, got 0\.5"),
        ({"threshold": (0.9,)}, ValueError, "got 1 values"),
        ({"threshold": "a"}, TypeError, "threshold must be a real number, got str"),
        ({"guidance_scale": "7"}, TypeError, "guidance_scale must be a real number, got str"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be finite"),
        ({"time_input": "seconds"}, ValueError, "time_input must be 'auto', 'scaled' or a function"),
        ({"schedule": FULL.rescale_zero_terminal_snr()}, ValueError, "cannot recover x0 at timestep 999"),
    ],
    ids=readable,
)
def test_constructor_refuses(options, error, message):
    arguments = {"model": Toy(), "schedule": FULL, **options}
    with pytest.raises(error, match=message):
        Sampler(arguments.pop("model"), arguments.pop("schedule"), **arguments)


def never(x, t, **kwargs):
    raise AssertionError("the model must not be called")


@pytest.mark.parametrize("run", ["sample", "stream"])
@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        ((2,), {}, ValueError, r"shape must be \(N, C, \*\)"),
        ((0, 3, 8, 8), {}, ValueError, "ints >= 1"),
        ((2, 3.0, 8, 8), {}, ValueError, "ints >= 1"),
        (16, {}, TypeError, "shape must be .* got int"),
        (SHAPE, {"x_T": [0.0]}, TypeError, "x_T must be a torch.Tensor, got list"),
        (SHAPE, {"x_T": torch.zeros(2, 3, 8, 9)}, ValueError, r"x_T must be float32 of shape \(2, 3, 8, 8\)"),
        (SHAPE, {"x_T": torch.zeros(SHAPE).half()}, ValueError, "got torch.float16"),
        (SHAPE, {"out": torch.zeros(SHAPE).double()}, ValueError, "out must be float32"),
        (SHAPE, {"out": torch.zeros(2, 8, 3, 8).transpose(1, 2)}, ValueError, "contiguous or channels_last"),
        (
            SHAPE,
            {"noise": torch.zeros(4, *SHAPE)},
            ValueError,
            r"each of the 5 draws of these 5 steps, got shape \(4, 2",
        ),
        (SHAPE, {"noise": torch.zeros(5, 1, *SHAPE[1:])}, ValueError, "noise must have a row of shape"),
        (SHAPE, {"noise": torch.zeros(5, *SHAPE).double()}, ValueError, "noise must be float32"),
        (SHAPE, {"noise": 3}, TypeError, "noise must be a tensor of rows or"),
        (SHAPE, {"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        (
            SHAPE,
            {"generator": torch.Generator(), "noise": torch.zeros(5, *SHAPE)},
            ValueError,
            "noise and generator exclude each other",
        ),
        (SHAPE, {"generator": torch.Generator(), "sample_ids": [1, 2]}, ValueError, "exclude generator"),
        (SHAPE, {"seed": -1}, ValueError, "seed"),
        (SHAPE, {"seed": 1.5}, TypeError, "seed"),
        (SHAPE, {"sample_ids": [1]}, ValueError, "sample_ids"),
        (SHAPE, {"sample_ids": [1, -1]}, ValueError, "sample_ids"),
        (SHAPE, {"model_kwargs": [1]}, TypeError, "model_kwargs must be a mapping .* got list"),
        (SHAPE, {"uncond_kwargs": {}}, ValueError, "uncond_kwargs needs a Sampler with guidance_scale"),
    ],
    ids=readable,
)
def test_a_run_is_refused_before_the_model_is_called(run, shape, options, error, message):
    sampler = Sampler(never, FULL, steps=5)
    with pytest.raises(error, match=message):
        getattr(sampler, run)(shape, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, r"every must lie in 1 \.\. 5, got 0"),
        ({"every": 6}, ValueError, "got 6"),
        ({"every": 2.0}, TypeError, "every must be an int, got float"),
        ({"callback": 3}, TypeError, "callback must be callable, got int"),
    ],
    ids=readable,
)
def test_sample_refuses(options, error, message):
    with pytest.raises(error, match=message):
        Sampler(never, FULL, steps=5).sample(SHAPE, **options)


def test_guidance_needs_unconditional_arguments():
    with pytest.raises(ValueError, match="uncond_kwargs must be given"):
        Sampler(never, FULL, steps=5, guidance_scale=2.0).sample(SHAPE, model_kwargs=Y)


@pytest.mark.parametrize(
    ("model", "variance", "error", "message"),
    [
        (
            lambda x, t: (x,),
            "fixed_small",
            TypeError,
            "must return a tensor, or an output with .sample, got tuple",
        ),
        (lambda x, t: None, "fixed_small", TypeError, "got NoneType"),
        (
            lambda x, t: x[:, :1],
            "fixed_small",
            ValueError,
            r"shape \(2, 3, 8, 8\) for samples .* got \(2, 1, 8, 8\)",
        ),
        (lambda x, t: x, "learned_range", ValueError, r"must have shape \(2, 6, 8, 8\)"),
        (lambda x, t: torch.cat([x, x], 1), "fixed_large", ValueError, r"got \(2, 6, 8, 8\)"),
    ],
    ids=["tuple", "none", "channels", "no-variance", "unexpected-variance"],
)
def test_a_wrong_output_is_refused(model, variance, error, message):
    with pytest.raises(error, match=message):
        Sampler(model, FULL, steps=5, variance=variance).sample(SHAPE)


def test_a_noise_function_must_return_what_it_was_asked_for():
    sampler = Sampler(Toy(), FULL, steps=5)
    with pytest.raises(TypeError, match="noise must be a tensor, got int"):
        sampler.sample(SHAPE, noise=lambda draw, t, shape: 0)
    with pytest.raises(ValueError, match=r"noise must be float32 of shape \(2, 3, 8, 8\)"):
        sampler.sample(SHAPE, noise=lambda draw, t, shape: torch.zeros(shape).double())


@pytest.mark.parametrize(
    ("x", "output", "i", "options", "error", "message"),
    [
        (torch.zeros(SHAPE), torch.zeros(SHAPE), 5, {}, ValueError, r"i must lie in 0 \.\. 4, got 5"),
        (torch.zeros(SHAPE), torch.zeros(SHAPE), -1, {}, ValueError, "got -1"),
        (torch.zeros(SHAPE), torch.zeros(SHAPE), 1.0, {}, TypeError, "i must be an int, got float"),
        (3, torch.zeros(SHAPE), 1, {}, TypeError, "x_t must be a tensor, got int"),
        (torch.zeros(SHAPE).half(), torch.zeros(SHAPE), 1, {}, ValueError, "x_t must be float32"),
        (torch.zeros(SHAPE), torch.zeros(2, 6, 8, 8), 1, {}, ValueError, "output must have shape"),
        (
            torch.zeros(SHAPE),
            (torch.zeros(SHAPE),) * 2,
            1,
            {},
            TypeError,
            "needs a Sampler with guidance_scale",
        ),
        (
            torch.zeros(SHAPE),
            torch.zeros(SHAPE),
            1,
            {"noise": 1},
            TypeError,
            "noise must be a tensor, got int",
        ),
        (
            torch.zeros(SHAPE),
            torch.zeros(SHAPE),
            1,
            {"noise": torch.zeros(2)},
            ValueError,
            "noise must be float32",
        ),
    ],
)
def test_step_refuses(x, output, i, options, error, message):
    with pytest.raises(error, match=message):
        Sampler(Toy(), FULL, steps=5).step(x, output, i, **options)


def test_step_under_guidance_wants_a_pair():
    with pytest.raises(TypeError, match=r"the tuple \(unconditional, conditional\)"):
        Sampler(Toy(), FULL, guidance_scale=2.0).step(torch.zeros(SHAPE), torch.zeros(SHAPE), 0)


def test_repr_tells_what_will_run():
    assert repr(Sampler(Toy(), FULL, steps=50)) == (
        "Sampler(solver='ddpm', prediction='epsilon', variance='fixed_small', steps=50 of 1000, "
        "clip=(-1.0, 1.0), guidance_scale=None, reference='guided')"
    )
    assert "threshold=(0.9, 2.0)" in repr(Sampler(Toy(), FULL, threshold=(0.9, 2)))
