"""examples/imagen.py against Imagen's loops and RePaint's algorithm 1, written out, from the same torch seed."""

from __future__ import annotations

from collections.abc import Callable

import imagen as example
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.originals import imagen

Y = torch.tensor([0, 1])
EMPTY = torch.full_like(Y, example.EMPTY)
SMALL = (2, 3, example.SMALL, example.SMALL)
LARGE = (2, 3, example.LARGE, example.LARGE)


def guided(model: nn.Module, **shown: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def epsilon(x: Tensor, ratio: Tensor) -> Tensor:
        with torch.no_grad():
            conditional, null = (model(x, ratio, y, **shown) for y in (Y, EMPTY))
        return null + (conditional - null) * example.GUIDANCE_SCALE

    return epsilon


@pytest.mark.parametrize("resample", [None, 1, 3], ids=["whole", "inpainting", "repaint"])
def test_base_images_from_the_same_torch_seed(resample):
    model, known, mask = example.base_network(), torch.rand(SMALL) * 2 - 1, torch.zeros(1, 1, *SMALL[2:])
    mask[..., : example.SMALL // 2] = 1.0
    kept = {} if resample is None else {"known": known, "mask": mask, "resample": resample}
    torch.manual_seed(0)
    expected = imagen.sample_loop(guided(model), "cosine", example.STEPS, SMALL, example.PERCENTILE, **kept)
    torch.manual_seed(0)
    ours = {**kept, "blend": "repaint"} if kept else {}
    result = example.generate(model, Y, generator=torch.default_generator, **ours)
    # Theirs has its tables in float32, down to an alpha of 4e-8; measured 1.1e-6.
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-6)
    assert (result.abs() < 1).float().mean() > 0.5
    if kept:
        assert torch.equal(result[..., : example.SMALL // 2], known[..., : example.SMALL // 2])


def test_upsampled_images_from_the_same_torch_seed():
    model, small, augmentation = example.SuperResolution(), torch.rand(SMALL) * 2 - 1, torch.randn(LARGE)
    low_res, ratio = imagen.q_sample("linear", F.interpolate(small, LARGE[2:], mode="nearest"), 0.2, augmentation)
    shown = {"low_res": low_res, "low_res_time": ratio.expand(2)}
    torch.manual_seed(0)
    expected = imagen.sample_loop(guided(model, **shown), "linear", example.STEPS, LARGE, example.PERCENTILE)
    torch.manual_seed(0)
    result = example.upsample(model, Y, small, augmentation=augmentation, generator=torch.default_generator)
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-6)  # measured 9e-7
    assert (result.abs() < 1).float().mean() > 0.5


def test_the_small_image_and_its_noise_matter():
    model, small = example.SuperResolution(), torch.rand(SMALL) * 2 - 1
    images = [example.upsample(model, Y, s, seed=0) for s in (small, -small)]
    assert not torch.allclose(*images, atol=0.1)
    other = example.upsample(model, Y, small, seed=0, augmentation=torch.zeros(LARGE))
    assert not torch.allclose(images[0], other, atol=0.01)


def test_script_writes_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["imagen.py", "--out", str(tmp_path)])
    example.main()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inpainted.png", "large.png", "small.png"]
