"""Latent Diffusion (Rombach et al. 2022): guided DDIM and PLMS in the latents of a VAE, inpainting, decoding.

python examples/latent_diffusion.py --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import ConditionedUNet, randomized
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.cli.images import grid, write_png

PROMPTS = ("a painting of a virus monster", "a map of the moon")
EMPTY = len(PROMPTS)  # the label of the empty prompt
GUIDANCE_SCALE = 5.0
SCALE_FACTOR = 0.18215  # brings the latents to variance 1
LATENTS = (4, 16, 16)
SCHEDULE = df.NoiseSchedule.scaled_linear(1000)


class TinyVAE(nn.Module):
    """A first stage that stands for the autoencoder: 4 channels at a quarter of the size."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 4, 3, 2, 1)
        self.third, self.fourth = nn.Conv2d(4, 16, 3, 1, 1), nn.Conv2d(16, 3, 3, 1, 1)
        randomized(self, seed)

    def encode(self, images: Tensor) -> Tensor:
        return self.second(F.silu(self.first(images)))

    def decode(self, latents: Tensor) -> Tensor:
        h = F.silu(self.third(F.interpolate(latents, scale_factor=2)))
        return torch.tanh(self.fourth(F.interpolate(h, scale_factor=2)))


def network() -> ConditionedUNet:
    return ConditionedUNet(4, 4, labels=EMPTY + 1, seed=0)


def generate(model: nn.Module, y: Tensor, solver: str = "ddim", steps: int = 50, **options: Any) -> Tensor:
    """Latents for the labels `y`; `options` go to `sample`: a seed, or noise, and what is to be kept of an image.

    `reference="latent-diffusion"` is CompVis' loop: no clip, its timesteps, its last step. To start from one of its
    checkpoints, `df.Sampler.from_latent_diffusion(ddpm, ...)` reads the rest from the object.
    """
    sampler = df.Sampler(
        model,
        SCHEDULE,
        solver=solver,
        steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        reference="latent-diffusion",
    )
    return sampler.sample(
        (len(y), *LATENTS),
        model_kwargs={"y": y},
        uncond_kwargs={"y": torch.full_like(y, EMPTY)},
        **options,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("latent-diffusion"), help="folder for the images")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    model, vae = network(), TinyVAE()
    y = torch.arange(len(PROMPTS)).repeat_interleave(2)

    with torch.no_grad():
        latents = {solver: generate(model, y, solver, seed=0) for solver in ("ddim", "plms")}
        # The left half stays as it was, the right half is made again.
        mask = torch.zeros(1, 1, *LATENTS[1:])
        mask[..., : LATENTS[2] // 2] = 1.0
        known = vae.encode(vae.decode(latents["ddim"] / SCALE_FACTOR)) * SCALE_FACTOR
        latents["inpainted"] = generate(model, y.flip(0), seed=1, mask=mask, known=known, blend="before")
        for name, z in latents.items():
            write_png(out / f"{name}.png", grid(vae.decode(z / SCALE_FACTOR)))
            print(f"{out / name}.png: latents with a standard deviation of {z.std():.2f}")


if __name__ == "__main__":
    main()
