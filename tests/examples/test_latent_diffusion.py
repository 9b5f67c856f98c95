"""examples/latent_diffusion.py against CompVis' DDIMSampler and PLMSSampler, written out, from the same torch seed."""

from __future__ import annotations

import latent_diffusion as example
import pytest
import torch
from torch import Tensor

from tests.originals.latent_diffusion import DDIMSampler, LatentDiffusion, PLMSSampler

Y = torch.tensor([0, 1])
EMPTY = torch.full_like(Y, example.EMPTY)
SHAPE = (2, *example.LATENTS)
SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler}


def decode_first_stage(vae: example.TinyVAE, z: Tensor) -> Tensor:
    return vae.decode(1.0 / example.SCALE_FACTOR * z)


@pytest.mark.parametrize("inpainting", [False, True], ids=["whole", "inpainting"])
@pytest.mark.parametrize("solver", SAMPLERS)
def test_same_images_from_the_same_torch_seed(solver, inpainting):
    model, vae = example.network(), example.TinyVAE()
    kept = {"mask": torch.zeros(1, 1, 16, 16), "x0": torch.randn(SHAPE)} if inpainting else {}
    if inpainting:
        kept["mask"][..., :8] = 1.0
    original = SAMPLERS[solver](LatentDiffusion(model), 50, 0.0)
    torch.manual_seed(0)
    expected = original.sample(SHAPE, Y, EMPTY, example.GUIDANCE_SCALE, **kept)
    after = torch.randn(1)

    ours = {"mask": kept["mask"], "known": kept["x0"]} if inpainting else {}
    torch.manual_seed(0)
    result = example.generate(model, Y, solver, generator=torch.default_generator, **ours)
    assert torch.equal(torch.randn(1), after)
    # Theirs rounds each of nine float32 operations a step, ours four, on latents up to 4; guidance takes the
    # difference of two outputs five times; measured 2.9e-6.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        images = vae.decode(result / example.SCALE_FACTOR)
        torch.testing.assert_close(images, decode_first_stage(vae, expected), rtol=0, atol=2e-5)


def test_the_condition_and_the_guidance_matter():
    model = example.network()
    one, other = (example.generate(model, y, steps=5, seed=0) for y in (Y, Y.flip(0)))
    assert not torch.allclose(one, other, atol=0.1)


def test_script_writes_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["latent_diffusion.py", "--out", str(tmp_path / "out")])
    example.main()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ddim.png", "inpainted.png", "plms.png"]
