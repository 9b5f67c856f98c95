"""examples/dalle2.py against the prior's and the decoder's loops, written out, on shared noise."""

from __future__ import annotations

import dalle2 as example
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.schedule import NoiseSchedule
from tests.originals.dalle2 import NoiseScheduler, decoder_loop, prior_loop

N = 3
SMALL, LARGE = (N, 3, example.SMALL, example.SMALL), (N, 3, example.LARGE, example.LARGE)


def embeddings(seed: int) -> Tensor:
    return F.normalize(torch.randn(N, example.EMBEDDING, generator=torch.Generator().manual_seed(seed)), dim=1)


def doubled(model: nn.Module, condition: Tensor, scale: float, channels: int):
    """Classifier-free guidance of the first `channels`; zeros are the empty condition."""
    both = torch.cat([torch.zeros_like(condition), condition])

    def output(x: Tensor, t: Tensor) -> Tensor:
        null, conditional = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        mixed = null[:, :channels] + (conditional[:, :channels] - null[:, :channels]) * scale
        return torch.cat([mixed, conditional[:, channels:]], dim=1)

    return output


def test_prior_is_bit_equal_on_shared_noise():
    model, text = example.Prior(), embeddings(0)
    x_T, noise = torch.randn(N, example.EMBEDDING), torch.randn(100, N, example.EMBEDDING)
    predict = doubled(model, text, example.PRIOR_SCALE, example.EMBEDDING)
    expected = prior_loop(NoiseScheduler(example.COSINE.betas), predict, x_T, iter(noise), example.EMBEDDING_SCALE)
    result = example.embed(model, text, x_T=x_T, noise=noise)
    assert torch.equal(result, expected)
    torch.testing.assert_close(result.norm(dim=1), torch.ones(N))


def test_decoder_from_the_same_noise():
    model, image = example.Decoder(), embeddings(1)
    x_T, noise = torch.randn(SMALL), torch.randn(100, *SMALL)
    expected = decoder_loop(
        NoiseScheduler(example.COSINE.betas),
        doubled(model, image, example.DECODER_SCALE, 3),
        x_T,
        iter(noise),
        list(range(100)),
    )
    result = example.decode(model, image, x_T=x_T, noise=noise)
    # The exponential of a learned variance is ours, within 4 ulp of theirs; measured 7e-7.
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-6)
    assert (result.abs() < 1).float().mean() > 0.5


def test_upsampler_from_the_same_noise():
    model, image, small = example.Decoder(low_res=True, seed=2), embeddings(2), torch.rand(SMALL) * 2 - 1
    x_T, noise, augmentation = torch.randn(LARGE), torch.randn(50, *LARGE), torch.randn(LARGE)
    full = NoiseScheduler(NoiseSchedule.linear(1000).betas)
    low_res = full.q_sample(F.interpolate(small, LARGE[2:], mode="nearest"), 200, augmentation)

    def output(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, image, low_res, torch.full((N,), 200))

    abar = NoiseSchedule.linear(1000).alphas_cumprod
    timesteps = [round(k * 999 / 49) for k in range(50)]
    kept = abar[timesteps]
    betas = 1 - kept / F.pad(kept[:-1], (1, 0), value=1.0)
    expected = decoder_loop(NoiseScheduler(betas), output, x_T, iter(noise), timesteps)
    result = example.upsample(model, image, small, augmentation=augmentation, x_T=x_T, noise=noise)
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-6)  # measured 5e-7
    assert (result.abs() < 1).float().mean() > 0.5


def test_the_more_similar_embedding_is_chosen():
    text = embeddings(0)[:2].repeat_interleave(2, dim=0)
    found = text + torch.tensor([0.1, 0.5, 0.5, 0.1])[:, None] * embeddings(3)[0]
    assert torch.equal(example.most_similar(F.normalize(found, dim=1), text, 2), F.normalize(found, dim=1)[[0, 3]])


def test_script_writes_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dalle2.py", "--out", str(tmp_path)])
    example.main()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.png", "small.png"]
