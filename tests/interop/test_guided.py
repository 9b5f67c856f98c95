"""Sampler.from_guided: the images of openai's loops, from their diffusion object."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import NoiseSchedule
from tests.originals.guided import GaussianDiffusion, ModelMeanType, ModelVarType
from tests.originals.latent_diffusion import LatentDiffusion
from tests.originals.network import Net

SHAPE = (2, 3, 8, 8)
BETAS = np.linspace(1e-4, 0.02, 1000)


def spaced(steps: str, **options: object) -> GaussianDiffusion:
    """What SpacedDiffusion makes of 1000 linear betas."""
    respaced = NoiseSchedule.linear(1000).respace(steps)
    return GaussianDiffusion(
        respaced.betas.numpy(), timestep_map=respaced.timestep_map.tolist(), original_num_steps=1000, **options
    )


@pytest.mark.parametrize("rescale", [False, True], ids=["integers", "rescaled"])
@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE], ids=lambda v: v.name)
@pytest.mark.parametrize("mean_type", ModelMeanType, ids=lambda m: m.name)
def test_spaced_diffusion_is_bit_equal(mean_type, var_type, rescale):
    net, diffusion = Net(), spaced("50", mean_type=mean_type, var_type=var_type, rescale_timesteps=rescale)
    torch.manual_seed(0)
    expected = diffusion.p_sample_loop(net, SHAPE)
    torch.manual_seed(0)
    result = Sampler.from_guided(diffusion, net).sample(SHAPE, generator=torch.default_generator)
    assert torch.isfinite(expected).all()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("var_type", [ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE], ids=lambda v: v.name)
def test_learned_variances_agree_up_to_their_exponential(var_type):
    net, diffusion = Net(outputs=2), spaced("10,10,5", var_type=var_type)
    torch.manual_seed(0)
    expected = diffusion.p_sample_loop(net, SHAPE)
    torch.manual_seed(0)
    result = Sampler.from_guided(diffusion, net).sample(SHAPE, generator=torch.default_generator)
    # 25 steps whose standard deviations are within an ulp or two.
    torch.testing.assert_close(result, expected, rtol=0, atol=4e-6 * expected.abs().max().item())


def test_tables_are_the_objects_own():
    net = Net()
    torch.manual_seed(0)
    expected = spaced("ddim20").p_sample_loop(net, SHAPE)
    other = spaced("ddim20")
    other.posterior_mean_coef1 = other.posterior_mean_coef1 * 1.0625
    torch.manual_seed(0)
    changed = other.p_sample_loop(net, SHAPE)
    torch.manual_seed(0)
    result = Sampler.from_guided(other, net).sample(SHAPE, generator=torch.default_generator)
    assert torch.equal(result, changed)
    assert not torch.equal(result, expected)


def test_ddim_and_further_options_are_passed_on():
    net, diffusion = Net(), spaced("ddim25")
    torch.manual_seed(0)
    expected = diffusion.ddim_sample_loop(net, SHAPE, eta=0.5, clip_denoised=False)
    sampler = Sampler.from_guided(diffusion, net, solver="ddim", eta=0.5, clip=None)
    torch.manual_seed(0)
    result = sampler.sample(SHAPE, generator=torch.default_generator)
    torch.testing.assert_close(result, expected, rtol=0, atol=4e-6 * expected.abs().max().item())


def test_glides_diffusion_is_epsilon_with_a_learned_range():
    diffusion = spaced("ddim20", var_type=ModelVarType.LEARNED_RANGE)
    glide = types.SimpleNamespace(
        **{
            k: v
            for k, v in vars(diffusion).items()
            if k not in ("model_mean_type", "model_var_type", "rescale_timesteps")
        }
    )
    net = Net(outputs=2)
    ours = Sampler.from_guided(glide, net)
    assert (ours.table.prediction, ours.table.variance) == ("epsilon", "learned_range")
    assert torch.equal(ours.sample(SHAPE), Sampler.from_guided(diffusion, net).sample(SHAPE))


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"prediction": "v"}, TypeError, "prediction is read from the GaussianDiffusion of openai's"),
        ({}, {"time_input": "auto"}, TypeError, "time_input is read from"),
        ({}, {"reference": "diffusers"}, TypeError, "reference is read from"),
        ({"model_mean_type": "VELOCITY"}, {}, ValueError, "model_mean_type is 'VELOCITY'; a Sampler has EPSILON"),
        ({"model_var_type": 7}, {}, ValueError, "model_var_type is 7; a Sampler has FIXED_SMALL"),
        ({"posterior_variance": np.ones(3)}, {}, ValueError, r"posterior_variance must have shape \(1000,\)"),
        ({"betas": np.zeros(1000)}, {}, ValueError, r"betas\[0\] = 0.0 is outside"),
    ],
    ids=["prediction", "time", "reference", "mean", "variance", "table", "betas"],
)
def test_refusals(change, options, error, message):
    diffusion = GaussianDiffusion(BETAS)
    for name, value in change.items():
        setattr(diffusion, name, value)
    with pytest.raises(error, match=message):
        Sampler.from_guided(diffusion, Net(), **options)


def test_a_subclass_is_refused_where_it_samples_differently():
    class Guided(GaussianDiffusion):
        def p_sample_loop(self, *args, **kwargs):
            return super().p_sample_loop(*args, **kwargs)

    diffusion = Guided(BETAS)
    with pytest.raises(ValueError, match="Guided has a p_sample_loop of its own, which a Sampler cannot stand in for"):
        Sampler.from_guided(diffusion, Net())
    assert Sampler.from_guided(diffusion, Net(), solver="ddim").steps == 1000  # whose loop is the original's
    Guided.__name__ = "SpacedDiffusion"  # openai's own subclass, whose methods call those of its base
    assert Sampler.from_guided(diffusion, Net()).steps == 1000
    diffusion.ddim_sample_loop = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="SpacedDiffusion has a ddim_sample_loop of its own"):
        Sampler.from_guided(diffusion, Net(), solver="ddim")


def test_another_object_is_refused():
    with pytest.raises(TypeError, match="object has no 'betas' and is no GaussianDiffusion of openai's"):
        Sampler.from_guided(object(), Net())


def test_modules_with_tables_of_the_same_names_are_refused():
    with pytest.raises(TypeError, match=r"LatentDiffusion is an nn\.Module and no GaussianDiffusion of openai's"):
        Sampler.from_guided(LatentDiffusion(Net(4)), Net(4))
