"""Imagen (Saharia et al. 2022): log-SNR schedules, dynamic thresholds, noise-conditioned super-resolution; RePaint.

python examples/imagen.py --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from networks import ConditionedUNet
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.cascade import low_resolution
from ddpm_fast.cli.images import grid, write_png

PROMPTS = ("a brain riding a rocketship", "a dragon fruit wearing a karate belt")
EMPTY = len(PROMPTS)  # the label of the empty prompt
GUIDANCE_SCALE = 5.0
PERCENTILE = 0.95
SMALL, LARGE = 16, 64
STEPS = 32
AUGMENTATION = df.NoiseSchedule.log_snr("linear", 1000)
LEVEL = 199  # the 200th step of 1000: the time 0.2


class SuperResolution(nn.Module):
    """A network that is shown the noised small image, and how much noise is in it."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.unet = ConditionedUNet(3, 3, beside=4, labels=EMPTY + 1, seed=seed)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, low_res: Tensor, low_res_time: Tensor) -> Tensor:
        level = (low_res_time / 10)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return self.unet(x, t, y, torch.cat([low_res, level], dim=1))


def base_network() -> ConditionedUNet:
    return ConditionedUNet(3, 3, labels=EMPTY + 1, seed=0)


def sampler(model: nn.Module, schedule: str) -> df.Sampler:
    """Both stages: the network is told the log signal-to-noise ratio; x0 is clipped to a quantile and divided by it."""
    return df.Sampler(
        model, df.NoiseSchedule.log_snr(schedule, STEPS), guidance_scale=GUIDANCE_SCALE, threshold=PERCENTILE
    )


def generate(model: nn.Module, y: Tensor, **options: Any) -> Tensor:
    """Small images for the labels `y`; `options` go to `sample`."""
    return sampler(model, "cosine").sample(
        (len(y), 3, SMALL, SMALL),
        model_kwargs={"y": y},
        uncond_kwargs={"y": torch.full_like(y, EMPTY)},
        **options,
    )


def upsample(
    model: nn.Module, y: Tensor, small: Tensor, seed: int = 0, augmentation: Tensor | None = None, **options: Any
) -> Tensor:
    """Large images from small ones, which are noised to a fixed level first: from `seed`, or `augmentation`."""
    source: dict[str, Any] = {"seed": seed} if augmentation is None else {"noise": augmentation}
    low_res, time = low_resolution(small, LARGE, AUGMENTATION, LEVEL, **source)
    shown = {"low_res": low_res, "low_res_time": time}
    return sampler(model, "linear").sample(
        (len(y), 3, LARGE, LARGE),
        seed=seed,
        model_kwargs={"y": y, **shown},
        uncond_kwargs={"y": torch.full_like(y, EMPTY), **shown},
        **options,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("imagen"), help="folder for the images")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    y = torch.arange(len(PROMPTS)).repeat_interleave(2)

    base = base_network()
    small = generate(base, y, seed=0)
    large = upsample(SuperResolution(), y, small, seed=1)  # each stage has a seed of its own
    # RePaint (Lugmayr et al. 2022): the network knows nothing of the mask; each step is made three times.
    mask = torch.ones(1, 1, SMALL, SMALL)
    mask[..., SMALL // 4 : -SMALL // 4, SMALL // 4 : -SMALL // 4] = 0.0
    inpainted = generate(base, y.flip(0), seed=2, mask=mask, known=small, blend="repaint", resample=3)
    for name, images in {"small": small, "large": large, "inpainted": inpainted}.items():
        write_png(out / f"{name}.png", grid(images))
        print(f"{out / name}.png: {len(images)} images of {images.shape[-1]} pixels")


if __name__ == "__main__":
    main()
