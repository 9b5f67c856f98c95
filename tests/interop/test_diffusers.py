"""diffusers: Sampler.from_diffusers, and the schedulers that take its schedulers' place in a pipeline."""

from __future__ import annotations

import copy
import sys

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ddpm_fast.interop.diffusers import FastDDIMScheduler, FastDDPMScheduler
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule
from tests.originals.network import Net

SHAPE = (2, 3, 8, 8)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
TOLERANCE = 1e-5  # of its own result, on samples of size 1


def loop(scheduler: object, net: nn.Module, generator: torch.Generator, **options: object) -> Tensor:
    """The loop of DDPMPipeline and DDIMPipeline."""
    x = torch.randn(SHAPE, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t), t, x, generator=generator, **options).prev_sample
    return x


def compare(scheduler: object, net: nn.Module, tolerance: float = TOLERANCE, **options: object) -> Sampler:
    """The samples of a Sampler made from the scheduler against the scheduler's loop."""
    generator = torch.Generator().manual_seed(0)
    eta = options.get("eta", 0.0)
    expected = loop(scheduler, net, generator, **options)
    after = torch.randn(1, generator=generator)
    ours = {"use_clipped_model_output": True} if options.get("use_clipped_model_output") else {}
    sampler = Sampler.from_diffusers(scheduler, net, eta=eta, **ours)
    result = sampler.sample(SHAPE, generator=generator.manual_seed(0))
    assert torch.isfinite(expected).all()
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * scale)
    assert torch.equal(torch.randn(1, generator=generator), after)
    return sampler


# ---------------------------------------------------------------------- Sampler.from_diffusers


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_with_every_variance_and_spacing(prediction, variance, spacing):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, variance_type=variance, timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    compare(scheduler, Net())


def test_ddpm_of_all_timesteps():
    scheduler = diffusers.DDPMScheduler()
    assert compare(scheduler, Net()).steps == 1000


def test_ddpm_learned_range():
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(20)
    compare(scheduler, Net(outputs=2))


def test_ddpm_fixed_large_log_is_nan_there_and_fixed_large_here():
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large_log")
    scheduler.set_timesteps(5)
    assert torch.isnan(loop(scheduler, Net(), torch.Generator())).any()
    right = diffusers.DDPMScheduler(variance_type="fixed_large")
    right.set_timesteps(5)
    ours = [Sampler.from_diffusers(s, Net()).sample(SHAPE) for s in (scheduler, right)]
    assert torch.equal(*ours)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample": False},
        {"clip_sample_range": 1.5},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
        {"trained_betas": [0.01 * (k + 1) for k in range(50)], "num_train_timesteps": 50},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ],
    ids=lambda o: "-".join(o),
)
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
def test_configurations(kind, options):
    scheduler = getattr(diffusers, kind)(**options)
    scheduler.set_timesteps(20)
    compare(scheduler, Net())


@pytest.mark.parametrize("clipped", [False, True], ids=["raw-epsilon", "clipped-epsilon"])
@pytest.mark.parametrize("clip", [False, True], ids=["noclip", "clip"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_every_prediction(prediction, eta, clip, clipped):
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=clip)
    scheduler.set_timesteps(20)
    sampler = compare(scheduler, Net(), eta=eta, use_clipped_model_output=clipped)
    # A second kernel only where x0 is clipped and epsilon is not its.
    assert (sampler.table.output_weight is not None) == (clip and not clipped)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_one", [False, True], ids=["abar0", "one"])
@pytest.mark.parametrize("steps", [7, 30])
def test_ddim_looks_back_a_stride_whatever_the_spacing(steps, to_one, spacing):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, set_alpha_to_one=to_one)
    scheduler.set_timesteps(steps)
    compare(scheduler, Net(), eta=0.3)


def test_custom_timesteps_and_steps():
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 77, 3])
    assert compare(scheduler, Net()).timesteps.tolist() == [900, 500, 77, 3]
    fresh = diffusers.DDPMScheduler(timestep_spacing="trailing")
    sampler = Sampler.from_diffusers(fresh, Net(), steps=10)
    fresh.set_timesteps(10)
    assert torch.equal(sampler.timesteps, fresh.timesteps)


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
def test_a_part_of_the_timesteps_keeps_the_schedulers_stride(kind):
    """What image-to-image pipelines run: DDIM still looks back T // 20, not T // 8."""
    scheduler, net, x = getattr(diffusers, kind)(), Net().eval(), torch.randn(SHAPE)
    scheduler.set_timesteps(20)
    part, generator = scheduler.timesteps[12:], torch.Generator().manual_seed(0)
    expected = x
    with torch.no_grad():
        for t in part:
            expected = scheduler.step(net(expected, t), t, expected, generator=generator).prev_sample
    given = Sampler.from_diffusers(scheduler, net, timesteps=part)
    scheduler.timesteps = part
    for sampler in (given, Sampler.from_diffusers(scheduler, net)):
        result = sampler.sample(SHAPE, x_T=x, generator=generator.manual_seed(0))
        torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)


def test_guidance_goes_before_the_raw_epsilon():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(10)
    net, y, null = Net().eval(), torch.tensor([1.0, -2.0]), torch.zeros(2)
    sampler = Sampler.from_diffusers(scheduler, net, guidance_scale=3.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            u, c = net(x, t, y=null), net(x, t, y=y)
            x_prev = scheduler.step(u + 3.0 * (c - u), t, x).prev_sample
            # A few ulp of a state up to 2; measured 2.4e-7.
            torch.testing.assert_close(sampler.step(x, (u, c), i), x_prev, rtol=0, atol=1e-6)
            x = x_prev
    result = sampler.sample(SHAPE, generator=generator.manual_seed(0), model_kwargs={"y": y}, uncond_kwargs={"y": null})
    # Guidance adds five of the network's outputs, which amplify what rounding there is; measured 1.2e-5.
    torch.testing.assert_close(result, x, rtol=0, atol=5e-5)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_the_mode_follows_its_schedulers_from_their_betas(solver):
    scheduler = (diffusers.DDPMScheduler if solver == "ddpm" else diffusers.DDIMScheduler)()
    scheduler.set_timesteps(10)
    imported = Sampler.from_diffusers(scheduler, Net())
    sampler = Sampler(Net(), NoiseSchedule.from_betas(scheduler.betas), solver=solver, steps=10, reference="diffusers")
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    assert torch.equal(sampler.table.rows, imported.table.rows)


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "noclip"])
@pytest.mark.parametrize("steps", [50, 1000])
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_each_step_is_its_to_an_ulp_and_with_float64_coefficients_better(kind, steps, clip):
    """State and output as in a run, at every timestep: ours against its step, and both against float64."""
    scheduler = (diffusers.DDPMScheduler if kind == "ddpm" else diffusers.DDIMScheduler)(clip_sample=clip)
    scheduler.set_timesteps(steps)
    ours = Sampler.from_diffusers(scheduler, Net())
    accurate = Sampler.from_diffusers(scheduler, Net(), coefficients="float64")
    abar = NoiseSchedule.linear(1000).alphas_cumprod
    apart, errors = 0.0, {"theirs": 0.0, "ours": 0.0, "accurate": 0.0}
    for i, t in enumerate(scheduler.timesteps.tolist()):
        clean, noise, mistake = torch.rand(SHAPE) * 2 - 1, *torch.randn(2, *SHAPE)
        before = t - 1000 // steps
        a, previous = abar[t], abar[before] if before >= 0 else torch.ones((), dtype=torch.float64)
        x = (a.sqrt() * clean + (1 - a).sqrt() * noise).float()
        output = noise + 0.1 * mistake
        x0 = (x.double() - (1 - a).sqrt() * output.double()) / a.sqrt()
        x0 = x0.clamp(-1, 1) if clip else x0
        generator = torch.Generator().manual_seed(t)
        theirs = scheduler.step(output, t, x, generator=generator).prev_sample
        z = torch.randn(SHAPE, generator=generator.manual_seed(t))
        if kind == "ddim":
            exact = previous.sqrt() * x0 + (1 - previous).sqrt() * output.double()
        else:
            alpha = a / previous
            exact = (previous.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - previous) * x.double()) / (1 - a)
            exact += ((1 - previous) / (1 - a) * (1 - alpha)).sqrt() * z.double() if t > 0 else 0.0
        results = {"theirs": theirs, "ours": ours.step(x, output, i, z), "accurate": accurate.step(x, output, i, z)}
        apart = max(apart, (results["ours"] - theirs).abs().max().item())
        for name, result in results.items():
            errors[name] = max(errors[name], (result.double() - exact).abs().max().item())
    assert apart < 1e-6  # measured 7.2e-7: a few ulp of a state up to 4
    assert errors["accurate"] < 1e-6  # measured 6.0e-7, rounding alone
    # Its coefficients at small t: measured 2.7e-6 to 4.1e-6 for DDIM, 5.7e-6 (50 steps) and 8.1e-5 for DDPM. Ours, by
    # default, are the same.
    assert errors["theirs"] > 2e-6
    assert 0.9 < errors["ours"] / errors["theirs"] < 1.1


@pytest.mark.parametrize("steps", [50, 1000])
def test_ddim_without_noise_drifts_from_its_run_no_more_than_both_do_from_float64(steps):
    """No noise covers the rounding, and the network amplifies it: the size of the drift is float32's, not ours."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(steps)
    net, x_T = Net().eval(), torch.randn(SHAPE)
    abar, exact, x = NoiseSchedule.linear(1000).alphas_cumprod, x_T.double(), x_T
    with torch.no_grad():
        for t in scheduler.timesteps.tolist():
            time = torch.full((2,), t)
            before = t - 1000 // steps
            a, previous = abar[t], abar[before] if before >= 0 else torch.ones((), dtype=torch.float64)
            output = in_float64(net, exact, time)
            x0 = ((exact - (1 - a).sqrt() * output) / a.sqrt()).clamp(-1, 1)
            exact = previous.sqrt() * x0 + (1 - previous).sqrt() * output
            x = scheduler.step(net(x, time), t, x).prev_sample
    runs = {
        "theirs": x,
        "ours": Sampler.from_diffusers(scheduler, net).sample(SHAPE, x_T=x_T),
        "accurate": Sampler.from_diffusers(scheduler, net, coefficients="float64").sample(SHAPE, x_T=x_T),
    }
    rms = {name: (run - exact).square().mean().sqrt().item() for name, run in runs.items()}
    for name in ("ours", "accurate"):
        assert rms[name] < 2 * rms["theirs"]
    # Measured 1.0e-5 and 6.1e-5; its own distance from float64 is 1.4e-5 and 4.0e-5.
    assert (runs["ours"] - x).abs().max() < (2e-5 if steps == 50 else 2e-4)


def in_float64(net: Net, x: Tensor, t: Tensor) -> Tensor:
    """The network's output with every operation in float64; it takes t as float32."""
    double = copy.deepcopy(net).double()
    time = torch.nn.functional.linear(t.reshape(-1, 1).double() / 1000, double.time.weight, double.time.bias)
    return double.last(torch.nn.functional.silu(double.first(x) + time[:, :, None, None]))


def test_float64_coefficients_end_where_the_scheduler_does():
    scheduler = diffusers.DDIMScheduler(set_alpha_to_one=False, clip_sample=False)
    scheduler.set_timesteps(10)
    rows = [Sampler.from_diffusers(scheduler, Net(), coefficients=c).table.rows64 for c in ("float32", "float64")]
    # A float32 abar near 1 has 1 - abar to 6e-4.
    torch.testing.assert_close(*rows, rtol=3e-4, atol=4e-6)
    assert not torch.equal(*rows)
    # The last step goes from abar_0 to abar_0: x0 has no part in it.
    torch.testing.assert_close(rows[1][-1, 2:4], torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_guided_is_closer_to_float64_than_the_schedulers_coefficients():
    """Both are offered: `reference="guided"` with the scheduler's timesteps is the accurate one."""
    schedule = NoiseSchedule.linear(1000)
    x, output = torch.randn(2, *SHAPE)
    errors = {}
    for reference in ("guided", "diffusers"):
        sampler = Sampler(Net(), schedule, reference=reference, clip=None)
        i = 999 - 2
        exact = Sampler(Net(), schedule, clip=None).table.rows64[i]
        x0 = exact[0] * x.double() - exact[1] * output.double()
        mean = exact[2] * x0 + exact[3] * x.double()
        errors[reference] = (sampler.step(x, output, i, torch.zeros(SHAPE)).double() - mean).abs().max().item()
    assert errors["guided"] < 1e-6 < errors["diffusers"] < 1e-3


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (diffusers.PNDMScheduler, {}, ValueError, "must be a DDPMScheduler or a DDIMScheduler .* got PNDMScheduler"),
        (
            lambda: diffusers.DDPMScheduler(variance_type="learned"),
            {},
            ValueError,
            "variance_type is 'learned'; a Sampler has fixed_small",
        ),
        (diffusers.DDPMScheduler, {"prediction": "v"}, TypeError, "prediction is read from the scheduler"),
        (diffusers.DDPMScheduler, {"use_clipped_model_output": True}, ValueError, "a parameter of DDIMScheduler"),
        (diffusers.DDPMScheduler, {"coefficients": "exact"}, ValueError, "must be 'float32' or 'float64', got 'exact'"),
        (diffusers.DDPMScheduler, {"steps": 2.0}, TypeError, "steps must be an int, as set_timesteps takes it"),
        (diffusers.DDPMScheduler, {"steps": 2, "timesteps": [1]}, ValueError, "exclude each other"),
        (
            lambda: diffusers.DDIMScheduler(timestep_spacing="trailing"),
            {"steps": 499},
            ValueError,
            r"-1 is outside 0 \.\. 999",
        ),
        (
            diffusers.DDIMScheduler,
            {"cond_fn": lambda x, t: x, "cond_mode": "score"},
            ValueError,
            "no DDIM step with cond_fn and a clip",
        ),
        (
            type("Mine", (diffusers.DDIMScheduler,), {"step": lambda self, output, t, x: x}),
            {},
            ValueError,
            "Mine has a step of its own",
        ),
    ],
    ids=["pndm", "learned", "prediction", "ddpm", "coefficients", "float", "both", "minus-one", "cond_fn", "subclass"],
)
def test_refusals(make, options, error, message):
    with pytest.raises(error, match=message):
        Sampler.from_diffusers(make(), Net(), **options)


# ---------------------------------------------------------------------- the schedulers


PAIRS = {"ddpm": (diffusers.DDPMScheduler, FastDDPMScheduler), "ddim": (diffusers.DDIMScheduler, FastDDIMScheduler)}


def pair(kind: str, steps: int | None = 10, **config: object) -> tuple[object, object]:
    """Theirs, and ours from its configuration."""
    slow, fast = PAIRS[kind]
    theirs = slow(**config)
    ours = fast.from_config(theirs.config)
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }
    if steps is not None:
        theirs.set_timesteps(steps)
        ours.set_timesteps(steps)
    return theirs, ours


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        ("ddpm", {}, {}),
        ("ddpm", {"variance_type": "learned_range"}, {}),
        ("ddpm", {"timestep_spacing": "trailing", "variance_type": "fixed_large"}, {}),
        ("ddpm", {"thresholding": True, "sample_max_value": 1.5}, {}),
        ("ddim", {}, {}),
        ("ddim", {}, {"eta": 0.5}),
        ("ddim", {"prediction_type": "v_prediction"}, {"use_clipped_model_output": True}),
        ("ddim", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, {"eta": 1.0}),
    ],
    ids=str,
)
def test_fast_scheduler_in_the_same_loop(kind, config, options, monkeypatch):
    theirs, ours = pair(kind, **config)
    net = Net(outputs=2 if "variance_type" in config and config["variance_type"] == "learned_range" else 1)
    generator = torch.Generator().manual_seed(0)
    expected = loop(theirs, net, generator, **options)
    after = torch.randn(1, generator=generator)

    def slow_step(*args, **kwargs):
        raise AssertionError("left to the scheduler's own step")

    monkeypatch.setattr(PAIRS[kind][0], "step", slow_step)
    result = loop(ours, net, generator.manual_seed(0), **options)
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE * scale)
    assert torch.equal(torch.randn(1, generator=generator), after)


@pytest.mark.parametrize("kind", PAIRS)
def test_fast_scheduler_returns_what_theirs_returns(kind):
    theirs, ours = pair(kind)
    x, output = torch.randn(2, *SHAPE)
    t = theirs.timesteps[3]
    noise = {"generator": torch.Generator().manual_seed(1)}
    expected = theirs.step(output, t, x, **noise)
    noise["generator"].manual_seed(1)
    result = ours.step(output, int(t), x, **noise)  # an int is a timestep too
    assert type(result) is type(expected)
    torch.testing.assert_close(result.prev_sample, expected.prev_sample, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(result.pred_original_sample, expected.pred_original_sample, rtol=0, atol=TOLERANCE)
    noise["generator"].manual_seed(1)
    first, x0 = ours.step(output, t, x, return_dict=False, **noise)
    assert torch.equal(first, result.prev_sample)
    assert torch.equal(x0, result.pred_original_sample)


def test_variance_noise_takes_the_generators_place():
    theirs, ours = pair("ddim")
    x, output, noise = torch.randn(3, *SHAPE)
    t = theirs.timesteps[2]
    expected = theirs.step(output, t, x, eta=0.5, variance_noise=noise).prev_sample
    result = ours.step(output, t, x, eta=0.5, variance_noise=noise).prev_sample
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)


def test_a_copied_scheduler_goes_on():
    _, ours = pair("ddim")
    x, output = torch.randn(2, *SHAPE)
    first = ours.step(output, ours.timesteps[0], x).prev_sample
    copied = copy.deepcopy(ours)
    assert torch.equal(copied.step(output, copied.timesteps[0], x).prev_sample, first)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_is_computed_in_float32(kind, dtype):
    _, ours = pair(kind)
    x, output = torch.randn(2, *SHAPE).to(dtype)
    t = ours.timesteps[3]
    result = ours.step(output, t, x, generator=torch.Generator().manual_seed(1))
    assert result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=dtype).float()
    sampler = Sampler.from_diffusers(ours, Net())
    assert sampler.table.solver == kind
    exact = sampler.step(x.float(), output.float(), 3, z if kind == "ddpm" else None)
    assert torch.equal(result.prev_sample, exact.to(dtype))


def test_what_the_kernel_does_not_do_is_left_to_their_step():
    theirs, ours = pair("ddpm")
    x, output = torch.randn(2, *SHAPE, dtype=torch.float64)
    t = theirs.timesteps[3]
    for a, b in ((x, output), (x.float(), output.float().requires_grad_())):
        expected = theirs.step(b, t, a, generator=torch.Generator().manual_seed(1)).prev_sample
        result = ours.step(b, t, a, generator=torch.Generator().manual_seed(1)).prev_sample
        assert torch.equal(result, expected)
        assert result.requires_grad == expected.requires_grad
    theirs, ours = pair("ddim")
    x, output, noise = torch.randn(3, *SHAPE)
    broadcast = {"eta": 0.5, "variance_noise": noise[:1]}
    assert torch.equal(
        ours.step(output, t, x, **broadcast).prev_sample, theirs.step(output, t, x, **broadcast).prev_sample
    )
    with pytest.raises(ValueError, match="both generator and variance_noise"):
        ours.step(output, t, x, eta=0.5, variance_noise=noise, generator=torch.Generator())
    theirs, ours = pair("ddpm")
    with pytest.raises(IndexError):  # a timestep that it does not make, as there
        ours.step(output.float(), 5, x.float())


@pytest.mark.parametrize("kind", PAIRS)
def test_add_noise_is_bit_equal(kind):
    theirs, ours = pair(kind, None)
    x, noise = torch.randn(2, 5, 3, 8, 8)
    t = torch.tensor([0, 1, 500, 998, 999])
    assert torch.equal(ours.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
    half = ours.add_noise(x.half(), noise.half(), t)
    assert torch.equal(half, theirs.add_noise(x.half(), noise.half(), t))
    one = torch.tensor([7])
    assert torch.equal(ours.add_noise(x, noise, one), theirs.add_noise(x, noise, one))


def test_timesteps_are_never_read_in_the_loop(monkeypatch):
    """A timestep of the scheduler's own is found by where it lies; reading one would wait for a GPU."""
    _, ours = pair("ddim")
    x, output = torch.randn(2, *SHAPE)
    timesteps = list(ours.timesteps)
    ours.step(output, timesteps[0], x)

    def read(self):
        raise AssertionError("a timestep was read on the host")

    monkeypatch.setattr(Tensor, "__int__", read)
    monkeypatch.setattr(Tensor, "item", read)
    for t in timesteps:
        x = ours.step(output, t, x).prev_sample
    assert torch.isfinite(x).all()


def test_tables_follow_the_timesteps():
    theirs, ours = pair("ddim", 10)
    x, output = torch.randn(2, *SHAPE)
    ours.step(output, ours.timesteps[0], x)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(4)
    for t in theirs.timesteps:
        expected = theirs.step(output, t, x).prev_sample
        torch.testing.assert_close(ours.step(output, t, x).prev_sample, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cut", [slice(3, None), slice(None, None, 2), slice(9, None)], ids=["end", "half", "one"])
@pytest.mark.parametrize("kind", PAIRS)
def test_timesteps_of_the_users_own_cut(kind, cut):
    """A view of the scheduler's timesteps in their place, and timesteps that are views of another's memory."""
    theirs, ours = pair(kind, 10)
    x, output = torch.randn(2, *SHAPE)
    before = list(ours.timesteps)
    for scheduler in (theirs, ours):
        scheduler.timesteps = scheduler.timesteps[cut]
    for t in before[cut] + list(ours.timesteps) + list(theirs.timesteps):
        noise = [{"generator": torch.Generator().manual_seed(1)} for _ in range(2)]
        expected = theirs.step(output, t, x, **noise[0]).prev_sample
        torch.testing.assert_close(ours.step(output, t, x, **noise[1]).prev_sample, expected, rtol=0, atol=TOLERANCE)


def small_unet() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )


@pytest.mark.parametrize("kind", PAIRS)
def test_an_unmodified_pipeline_gives_the_same_images(kind):
    theirs, ours = pair(kind, None)
    pipeline = (diffusers.DDPMPipeline if kind == "ddpm" else diffusers.DDIMPipeline)(small_unet(), theirs)
    pipeline.set_progress_bar_config(disable=True)
    call = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    expected = pipeline(generator=torch.Generator().manual_seed(0), **call).images
    pipeline.scheduler = ours
    result = pipeline(generator=torch.Generator().manual_seed(0), **call).images
    assert abs(result - expected).max() <= TOLERANCE


@pytest.mark.parametrize("kind", PAIRS)
def test_configurations_are_saved_and_loaded(kind, tmp_path):
    slow, fast = PAIRS[kind]
    pipeline = (diffusers.DDPMPipeline if kind == "ddpm" else diffusers.DDIMPipeline)(small_unet(), slow())
    pipeline.scheduler = fast.from_config(pipeline.scheduler.config, clip_sample_range=1.5)
    pipeline.save_pretrained(tmp_path)
    loaded = type(pipeline).from_pretrained(tmp_path)
    # DDIMPipeline makes a DDIMScheduler of whatever it is given; other pipelines take what was saved.
    assert type(loaded.scheduler) is (fast if kind == "ddpm" else slow)
    for cls in (slow, fast):
        scheduler = cls.from_pretrained(tmp_path, subfolder="scheduler")
        assert type(scheduler) is cls
        assert scheduler.config.clip_sample_range == loaded.scheduler.config.clip_sample_range == 1.5


def test_without_diffusers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "ddpm_fast.interop.diffusers")
    monkeypatch.delattr("ddpm_fast.interop.diffusers")
    with pytest.raises(ImportError, match=r"pip install 'ddpm_fast\[diffusers\]'"):
        Sampler.from_diffusers(object(), Net())
