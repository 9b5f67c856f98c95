"""Sampler.from_latent_diffusion: the latents of CompVis' samplers, from their model object."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.sampler import Sampler
from tests.originals.latent_diffusion import DDIMSampler, LatentDiffusion, PLMSSampler
from tests.originals.network import Net

SHAPE = (2, 4, 8, 8)
C, UC = torch.tensor([1.0, -2.0]), torch.zeros(2)


@pytest.mark.parametrize(("timesteps", "v_posterior"), [(100, 0.0), (100, 0.3), (1000, 0.0)])
@pytest.mark.parametrize("clip", [False, True], ids=["noclip", "clip"])
@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_ddpm_is_bit_equal(parameterization, clip, timesteps, v_posterior):
    """Betas of its own: its buffers are float32, and are read, not computed."""
    ldm = LatentDiffusion(Net(4), timesteps, parameterization, clip, v_posterior)
    torch.manual_seed(0)
    expected = ldm.p_sample_loop(C, SHAPE)
    torch.manual_seed(0)
    result = Sampler.from_latent_diffusion(ldm).sample(SHAPE, generator=torch.default_generator, model_kwargs={"c": C})
    assert torch.isfinite(expected).all()
    assert torch.equal(result, expected)


def test_temperature_of_ddpm():
    ldm = LatentDiffusion(Net(4), 50)
    torch.manual_seed(0)
    expected = ldm.p_sample_loop(C, SHAPE, temperature=0.5)
    torch.manual_seed(0)
    result = Sampler.from_latent_diffusion(ldm, temperature=0.5).sample(
        SHAPE, generator=torch.default_generator, model_kwargs={"c": C}
    )
    assert torch.equal(result, expected)  # a power of two may stand anywhere


@pytest.mark.parametrize("solver", ["ddim", "plms"])
def test_implicit_samplers_with_guidance(solver):
    ldm = LatentDiffusion(Net(4))
    original = (DDIMSampler if solver == "ddim" else PLMSSampler)(ldm, 20, 0.0)
    torch.manual_seed(0)
    expected = original.sample(SHAPE, C, UC, 7.5)
    sampler = Sampler.from_latent_diffusion(ldm, solver=solver, steps=20, guidance_scale=7.5)
    torch.manual_seed(0)
    result = sampler.sample(SHAPE, generator=torch.default_generator, model_kwargs={"c": C}, uncond_kwargs={"c": UC})
    torch.testing.assert_close(result, expected, rtol=0, atol=4e-6 * expected.abs().max().item())


def test_a_condition_that_is_no_tensor_goes_to_apply_model_as_it_is():
    seen = []

    class Crossed(LatentDiffusion):
        def apply_model(self, x, t, cond):
            seen.append(cond)
            return x * 0.5

    c, uc = {"c_crossattn": [C]}, {"c_crossattn": [UC]}
    sampler = Sampler.from_latent_diffusion(Crossed(Net(4)), solver="ddim", steps=2, guidance_scale=2.0)
    sampler.sample(SHAPE, model_kwargs={"c": c}, uncond_kwargs={"c": uc})
    assert [cond is uc for cond in seen] == [True, False] * 2


def test_a_plain_ddpm_is_taken():
    class DDPM(LatentDiffusion):
        apply_model = property()  # type: ignore[assignment]

    ddpm = DDPM(Net(4), 20)
    latent = LatentDiffusion(Net(4), 20)
    result = Sampler.from_latent_diffusion(ddpm).sample(SHAPE)
    assert torch.equal(result, Sampler.from_latent_diffusion(latent).sample(SHAPE))
    with pytest.raises(TypeError, match="DDPM has no apply_model and takes no condition 'c'"):
        Sampler.from_latent_diffusion(ddpm).sample(SHAPE, model_kwargs={"c": C})


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"prediction": "v"}, TypeError, "prediction is read from the DDPM of latent-diffusion"),
        ({"parameterization": "score"}, {}, ValueError, "parameterization is 'score'; a Sampler has eps, x0, v"),
        ({"shorten_cond_schedule": True}, {}, ValueError, "has shorten_cond_schedule"),
    ],
    ids=["prediction", "parameterization", "condition"],
)
def test_refusals(change, options, error, message):
    ldm = LatentDiffusion(Net(4))
    for name, value in change.items():
        setattr(ldm, name, value)
    with pytest.raises(error, match=message):
        Sampler.from_latent_diffusion(ldm, **options)


def test_a_subclass_is_refused_where_it_samples_differently():
    class Upscaling(LatentDiffusion):
        def p_sample_loop(self, *args, **kwargs):
            return super().p_sample_loop(*args, **kwargs)

    with pytest.raises(ValueError, match="Upscaling has a p_sample_loop of its own"):
        Sampler.from_latent_diffusion(Upscaling(Net(4)))
    # DDIMSampler and PLMSSampler have loops of their own, and ask the model for its network alone.
    assert Sampler.from_latent_diffusion(Upscaling(Net(4)), solver="ddim", steps=50).steps == 50


def test_another_object_is_refused():
    with pytest.raises(TypeError, match="Net has no 'model' and is no DDPM of latent-diffusion"):
        Sampler.from_latent_diffusion(Net())
    with pytest.raises(TypeError, match="ddpm must be a DDPM of latent-diffusion, got int"):
        Sampler.from_latent_diffusion(3)
