"""Reference modes: the same torch seed gives the images of the loop that is replaced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_fast.modes import MODES
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.solvers import COLUMNS
from tests.originals import annotated
from tests.originals.guided import GaussianDiffusion
from tests.originals.latent_diffusion import DDIMSampler, LatentDiffusion, PLMSSampler
from tests.originals.network import Net

SHAPE = (2, 3, 8, 8)
LATENTS = (2, 4, 8, 8)
FULL = NoiseSchedule.linear(1000)
SCALED = NoiseSchedule.scaled_linear(1000)


def seeded(sampler: Sampler, shape: tuple[int, ...], **kwargs: object) -> tuple[Tensor, Tensor]:
    """Our samples after torch.manual_seed(0), and the next number of torch's."""
    torch.manual_seed(0)
    return sampler.sample(shape, generator=torch.default_generator, **kwargs), torch.randn(1)


# ---------------------------------------------------------------------- guided


def test_guided_is_bit_equal_from_the_same_torch_seed():
    net = Net()
    torch.manual_seed(0)
    expected = GaussianDiffusion(FULL.betas.numpy()).p_sample_loop(net, SHAPE)
    after = torch.randn(1)
    result, next_number = seeded(Sampler(net, FULL), SHAPE)
    assert torch.equal(result, expected)
    assert torch.equal(next_number, after)


# ---------------------------------------------------------------------- latent-diffusion


def test_every_number_of_steps_gives_latent_diffusions_timesteps():
    for steps in range(1, 1001):
        chosen = MODES["latent-diffusion"].choose(SCALED, steps)
        original = np.arange(0, 1000, 1000 // steps) + 1
        # Where the last is no timestep it fails.
        assert chosen == (original if original[-1] < 1000 else original - 1).tolist(), steps


def test_thirty_of_a_thousand_steps_are_thirty_one():
    sampler = Sampler(Net(4), SCALED, solver="ddim", steps=30, reference="latent-diffusion")
    assert sampler.steps == 31
    assert sampler.timesteps[[0, -1]].tolist() == [991, 1]
    assert Sampler(Net(4), SCALED, solver="ddim", steps=1000, reference="latent-diffusion").steps == 1000


@pytest.mark.parametrize("steps", [20, 30])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(("eta", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.5, 0.7)])
def test_latent_diffusions_ddim_agrees_up_to_rounding(eta, temperature, guided, steps):
    net = Net(4)
    cond = {"cond": torch.tensor([1.0, -2.0]), "uncond": torch.zeros(2), "scale": 5.0} if guided else {"cond": None}
    torch.manual_seed(0)
    expected = DDIMSampler(LatentDiffusion(net), steps, eta).sample(LATENTS, temperature=temperature, **cond)
    after = torch.randn(1)
    sampler = Sampler(
        net,
        SCALED,
        solver="ddim",
        steps=steps,
        eta=eta,
        temperature=temperature,
        guidance_scale=5.0 if guided else None,
        reference="latent-diffusion",
    )
    kwargs = {"model_kwargs": {"y": cond["cond"]}, "uncond_kwargs": {"y": cond["uncond"]}} if guided else {}
    result, next_number = seeded(sampler, LATENTS, **kwargs)
    scale = expected.abs().max().item()
    # Theirs rounds each of nine float32 operations a step, on numbers of the size of the largest.
    torch.testing.assert_close(result, expected, rtol=0, atol=4e-6 * scale)
    assert torch.equal(next_number, after)


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_plms_agrees_up_to_rounding_and_draws_once_more_than_it_steps(steps, guided):
    net = Net(4)
    cond = {"cond": torch.tensor([1.0, -2.0]), "uncond": torch.zeros(2), "scale": 5.0} if guided else {"cond": None}
    # Theirs fails for a stride that ends at T - 1.
    schedule = NoiseSchedule.scaled_linear(998) if steps < 4 else SCALED
    torch.manual_seed(0)
    expected = PLMSSampler(LatentDiffusion(net, schedule.timesteps), steps, 0.0).sample(LATENTS, **cond)
    after = torch.randn(1)
    sampler = Sampler(
        net,
        schedule,
        solver="plms",
        steps=steps,
        guidance_scale=5.0 if guided else None,
        reference="latent-diffusion",
    )
    kwargs = {"model_kwargs": {"y": cond["cond"]}, "uncond_kwargs": {"y": cond["uncond"]}} if guided else {}
    result, next_number = seeded(sampler, LATENTS, **kwargs)
    torch.testing.assert_close(result, expected, rtol=0, atol=4e-6 * expected.abs().max().item())
    assert torch.equal(next_number, after)
    *_, last = sampler.stream(LATENTS, seed=1, **kwargs)
    assert torch.equal(last.x, sampler.sample(LATENTS, seed=1, **kwargs))


def test_plms_counts_its_draws():
    calls = []

    def noise(draw, t, shape):
        calls.append((draw, t))
        return torch.zeros(shape)

    sampler = Sampler(Net(4), SCALED, solver="plms", steps=50, reference="latent-diffusion")
    sampler.sample(LATENTS, noise=noise)
    assert [draw for draw, _ in calls] == list(range(51))
    assert [t for _, t in calls[:3]] == [981, 981, 961]
    with pytest.raises(ValueError, match="each of the 51 draws of these 50 steps"):
        sampler.sample(LATENTS, noise=torch.zeros(50, *LATENTS))


def test_plms_keeps_its_history_from_a_network_that_reuses_its_output():
    buffer = torch.empty(LATENTS)

    def reusing(x, t):
        return buffer.copy_(x).mul_(0.5).add_(t.reshape(-1, 1, 1, 1) * 1e-4)

    def fresh(x, t):
        return x * 0.5 + t.reshape(-1, 1, 1, 1) * 1e-4

    results = [
        Sampler(f, SCALED, solver="plms", steps=8, reference="latent-diffusion").sample(LATENTS)
        for f in (reusing, fresh)
    ]
    assert torch.equal(*results)


def test_plms_refuses_single_steps():
    with pytest.raises(ValueError, match="solver='plms' has a history, which step does not keep: use stream"):
        Sampler(Net(), FULL, solver="plms").step(torch.zeros(SHAPE), torch.zeros(SHAPE), 0)


# ---------------------------------------------------------------------- annotated


@pytest.mark.parametrize(
    ("name", "timesteps"), [("linear", 1000), ("cosine", 300), ("quadratic", 300), ("sigmoid", 300)]
)
def test_annotated_loop_agrees_up_to_rounding(name, timesteps):
    net, betas = Net(), annotated.betas(name, timesteps)
    torch.manual_seed(0)
    expected = annotated.p_sample_loop(net, betas, SHAPE)
    after = torch.randn(1)
    sampler = Sampler(net, NoiseSchedule.from_betas(betas), reference="annotated")
    result, next_number = seeded(sampler, SHAPE)
    scale = expected.abs().max().item()
    # Same float32 tables, one rounding less a step in (beta * eps) / sqrt(1 - abar).
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * scale)
    assert torch.equal(next_number, after)


def test_annotated_states_carry_the_true_x0():
    betas = annotated.betas("linear", 1000)
    sampler = Sampler(Net(), NoiseSchedule.from_betas(betas), steps=10, reference="annotated")
    model = Net().eval()
    abar = sampler.schedule.alphas_cumprod.flip(0)
    x = None
    for state in sampler.stream(SHAPE):
        if x is not None:
            with torch.no_grad():
                e = model(x, torch.full((2,), state.t)).double()
            x0 = (x.double() - (1 - abar[state.i]).sqrt() * e) / abar[state.i].sqrt()
            torch.testing.assert_close(state.x0.double(), x0, rtol=1e-4, atol=1e-4)
        x = state.x
    assert torch.equal(x, sampler.sample(SHAPE))


def test_annotated_by_way_of_x0_is_the_same_step():
    schedule = NoiseSchedule.from_betas(annotated.betas("cosine", 1000))
    direct = Sampler(Net(), schedule, reference="annotated")
    clipped = Sampler(Net(), schedule, reference="annotated", clip=(-1e6, 1e6))
    assert direct.table.x0_rows is not None
    assert clipped.table.x0_rows is None
    x, output, noise = torch.randn(3, *SHAPE)
    for i in range(0, 1000, 111):
        a, b = direct.step(x, output, i, noise), clipped.step(x, output, i, noise)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "v"}, "has prediction='epsilon' and variance='fixed_small' only, got 'v'"),
        ({"variance": "fixed_large"}, "got 'epsilon' and 'fixed_large'"),
        ({"solver": "ddim"}, "reference='annotated' has solver ddpm, got 'ddim'"),
    ],
    ids=str,
)
def test_annotated_refuses_what_the_article_has_not(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(Net(), FULL, reference="annotated", **options)


# ---------------------------------------------------------------------- what holds for all


@pytest.mark.parametrize("name", MODES)
def test_modes_clip_as_their_originals(name):
    x, output = torch.randn(2, *SHAPE) * 3
    state = next(iter(Sampler(lambda x, t: output, FULL, timesteps=[999, 0], reference=name).stream(SHAPE, x_T=x)))
    clipped = state.x0.abs().max() <= 1
    assert clipped == (name not in ("latent-diffusion", "annotated"))


@pytest.mark.parametrize("name", ["guided", "lucidrains", "latent-diffusion"])
def test_the_variance_at_the_cleanest_step_is_clipped_as_there(name):
    """openai puts the next step's in its place, the others 1e-20; a hook's or a bound's weight shows it."""
    table = Sampler(Net(outputs=2), FULL, variance="learned_range", reference=name, timesteps=[600, 300, 0]).table
    floor = FULL.respace([0, 300, 600]).posterior_variance[1] if name == "guided" else torch.tensor(1e-20).double()
    assert table.rows[-1, COLUMNS.index("log_min")] == floor.log().float()


@pytest.mark.parametrize(
    ("name", "options", "draws"),
    [
        ("guided", {}, [1, 1, 1, 1]),
        ("guided", {"solver": "ddim"}, [1, 1, 1, 1]),
        ("lucidrains", {}, [1, 1, 1, 0]),
        ("lucidrains", {"solver": "ddim"}, [1, 1, 1, 0]),
        ("latent-diffusion", {}, [1, 1, 1, 1]),
        ("latent-diffusion", {"solver": "ddim"}, [1, 1, 1, 1]),
        ("latent-diffusion", {"solver": "plms"}, [2, 1, 1, 1]),
        ("annotated", {}, [1, 1, 1, 0]),
        ("diffusers", {}, [1, 1, 1, 0]),
        ("diffusers", {"solver": "ddim"}, [0, 0, 0, 0]),
        ("diffusers", {"solver": "ddim", "eta": 0.5}, [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_modes_draw_as_their_originals(name, options, draws):
    sampler = Sampler(Net(), FULL, timesteps=[900, 600, 300, 0], reference=name, **options)
    calls: list[int] = []

    def noise(draw, t, shape):
        calls.append(t)
        return torch.zeros(shape)

    sampler.sample(SHAPE, noise=noise)
    assert [calls.count(t) for t in (900, 600, 300, 0)] == draws


@pytest.mark.parametrize("name", MODES)
def test_the_seeds_noise_does_not_depend_on_the_mode(name):
    """Streams and counters are the contract's; where a mode does not draw, none is added."""
    x, output = torch.randn(2, *SHAPE)
    sampler = Sampler(Net(), FULL, timesteps=[900, 0], reference=name, clip=None)
    from ddpm_fast.ops.random import randn

    given = sampler.step(x, output, 0, randn(SHAPE, seed=5, step=0))
    assert torch.equal(sampler.step(x, output, 0, seed=5), given)
    assert not torch.equal(sampler.step(x, output, 0, seed=6), given)
    assert torch.equal(sampler.step(x, output, 1, seed=5), sampler.step(x, output, 1, seed=6))
