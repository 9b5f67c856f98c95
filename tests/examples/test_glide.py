"""examples/glide.py against GLIDE's loops, written out from its paper and the arithmetic of its code."""

from __future__ import annotations

import glide as example
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.schedule import NoiseSchedule
from tests.originals.guided import GaussianDiffusion, ModelVarType

Y = torch.tensor([0, 1])
N = len(Y)
EMPTY = torch.full_like(Y, example.EMPTY)
SMALL = (N, 3, example.SMALL, example.SMALL)
LARGE = (N, 3, example.LARGE, example.LARGE)


def diffusion(schedule: NoiseSchedule, timesteps: list[int]) -> GaussianDiffusion:
    """A respaced diffusion: the betas that keep abar at `timesteps`."""
    abar = schedule.alphas_cumprod.numpy()
    betas, last = [], 1.0
    for t in timesteps:
        betas.append(1 - abar[t] / last)
        last = abar[t]
    return GaussianDiffusion(
        betas, var_type=ModelVarType.LEARNED_RANGE, timestep_map=timesteps, original_num_steps=1000
    )


def space_timesteps(counts: list[int], total: int = 1000) -> list[int]:
    """A section for each count, each with evenly spaced steps from its first to its last."""
    chosen, start, size = [], 0, total // len(counts)
    for count in counts:
        position = 0.0
        for _ in range(count):
            chosen.append(start + round(position))
            position += (size - 1) / (count - 1)
        start += size
    return chosen


def guided_function(model: nn.Module, **shown: Tensor):
    """GLIDE's model_fn on a batch of 2N, whose first half is the conditional one."""

    def model_fn(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        half = x_t[: len(x_t) // 2]
        output = model(torch.cat([half, half]), t, y, **{name: torch.cat([s, s]) for name, s in shown.items()})
        epsilon, rest = output[:, :3], output[:, 3:]
        conditional, unconditional = epsilon.chunk(2)
        mixed = unconditional + example.GUIDANCE_SCALE * (conditional - unconditional)
        return torch.cat([torch.cat([mixed, mixed]), rest], dim=1)

    return model_fn


@pytest.mark.parametrize("inpainting", [False, True], ids=["text", "inpainting"])
def test_base_images_from_the_same_noise(inpainting):
    model = example.inpainting_network() if inpainting else example.base_network()
    known, mask = torch.rand(SMALL) * 2 - 1, torch.zeros(1, 1, example.SMALL, example.SMALL)
    mask[..., : example.SMALL // 2] = 1.0
    shown, denoised_fn = {}, None
    if inpainting:
        shown = {"beside": torch.cat([known * mask, mask.expand(N, 1, -1, -1)], dim=1)}

        def denoised_fn(x_start: Tensor) -> Tensor:
            twice = torch.cat([known, known])
            return x_start * (1 - mask) + twice * mask

    # What the loop will draw: x_T and a tensor a step, for both halves.
    torch.manual_seed(0)
    x_T = torch.randn(2 * N, *SMALL[1:])
    noise = torch.stack([torch.randn(2 * N, *SMALL[1:]) for _ in range(100)])

    torch.manual_seed(0)
    expected = diffusion(NoiseSchedule.cosine(1000), space_timesteps([100])).p_sample_loop(
        guided_function(model, **shown),
        (2 * N, *SMALL[1:]),
        denoised_fn=denoised_fn,
        model_kwargs={"y": torch.cat([Y, EMPTY])},
    )[:N]
    source = {"x_T": x_T[:N], "noise": noise[:, :N]}
    kept = (known, mask) if inpainting else ()
    result = example.generate(model, Y, *kept, **source)
    # The exponential of a learned variance is ours, within 4 ulp of theirs; 100 steps of it; measured 6e-7.
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-6)
    assert result.std() > 0.1
    assert (result.abs() < 1).float().mean() > 0.5
    if inpainting:
        # The last step returns its x0, which is the known image where it is known.
        assert torch.equal(result[..., : example.SMALL // 2], known[..., : example.SMALL // 2])


def test_upsampled_images_from_the_same_noise():
    model, small, x_T = example.upsampling_network(), torch.rand(SMALL) * 2 - 1, torch.randn(LARGE)
    timesteps = space_timesteps([10, 10, 3, 2, 2])
    timesteps[-1] = 997  # "fast27": less of the artefacts that DDIM makes of the noisiest step
    low_res = ((small + 1) * 127.5).round() / 127.5 - 1
    low_res = F.interpolate(low_res, LARGE[2:], mode="bilinear")
    assert len(torch.unique(((example.requantized(small) + 1) * 127.5).round())) <= 256

    expected = diffusion(NoiseSchedule.linear(1000), timesteps).ddim_sample_loop(
        model, LARGE, noise=x_T * 0.997, model_kwargs={"y": Y, "beside": low_res}
    )
    result = example.upsample(model, Y, small, x_T)
    # Theirs derives epsilon from the clipped x0 in float32 at each of 27 steps; measured 1.7e-6.
    torch.testing.assert_close(result, expected, rtol=0, atol=6e-6)
    assert (result.abs() < 1).float().mean() > 0.5


def test_script_writes_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["glide.py", "--out", str(tmp_path)])
    example.main()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inpainted.png", "large.png", "small.png"]
