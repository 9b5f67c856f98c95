"""GLIDE (Nichol et al. 2022): guidance on a doubled batch, a DDIM upsampler in 27 steps, inpainting.

python examples/glide.py --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import ConditionedUNet
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.cli.images import grid, write_png

PROMPTS = ("an oil painting of a corgi", "a hedgehog using a calculator")
EMPTY = len(PROMPTS)  # the label of the empty prompt
GUIDANCE_SCALE = 3.0
UPSAMPLE_TEMPERATURE = 0.997
SMALL, LARGE = 16, 64
BASE_SCHEDULE, UPSAMPLER_SCHEDULE = df.NoiseSchedule.cosine(1000), df.NoiseSchedule.linear(1000)


def base_network() -> ConditionedUNet:
    return ConditionedUNet(3, 6, labels=EMPTY + 1, seed=0)


def inpainting_network() -> ConditionedUNet:
    """Beside the state it is shown what is known of the image, and where."""
    return ConditionedUNet(3, 6, beside=4, labels=EMPTY + 1, seed=1)


def upsampling_network() -> ConditionedUNet:
    """Beside the state it is shown the small image, enlarged."""
    return ConditionedUNet(3, 6, beside=3, labels=EMPTY + 1, seed=2)


def generate(
    model: nn.Module, y: Tensor, known: Tensor | None = None, mask: Tensor | None = None, **source: Any
) -> Tensor:
    """Small images for the labels `y`, in 100 steps with a learned variance; `source` is a seed, or noise.

    Both halves of a guided batch are one state: a Sampler doubles it for the network, unconditional half first, and
    mixes epsilon alone. With `known`, x0 is made to agree with it where `mask` is 1.
    """
    shown: dict[str, Tensor] = {}
    if known is not None and mask is not None:
        shown = {"beside": torch.cat([known * mask, mask.expand(len(y), 1, SMALL, SMALL)], dim=1)}

    def put_known(x0: Tensor) -> Tensor:
        return x0 * (1 - mask) + known * mask

    sampler = df.Sampler(
        model,
        BASE_SCHEDULE,
        steps="100",
        variance="learned_range",
        guidance_scale=GUIDANCE_SCALE,
        denoised_fn=put_known if shown else None,
    )
    return sampler.sample(
        (len(y), 3, SMALL, SMALL),
        model_kwargs={"y": y, **shown},
        uncond_kwargs={"y": torch.full_like(y, EMPTY), **shown},
        **source,
    )


def requantized(images: Tensor) -> Tensor:
    """Rounded to the 256 values of a stored image, which is what the upsampler was trained on."""
    return ((images + 1) * 127.5).round() / 127.5 - 1


def upsample(model: nn.Module, y: Tensor, small: Tensor, x_T: Tensor) -> Tensor:
    """Large images from small ones: DDIM, without guidance, from noise turned down a little."""
    low_res = F.interpolate(requantized(small), (LARGE, LARGE), mode="bilinear", align_corners=False)
    sampler = df.Sampler(model, UPSAMPLER_SCHEDULE, steps="fast27", solver="ddim", variance="learned_range")
    return sampler.sample(
        (len(y), 3, LARGE, LARGE), x_T=x_T * UPSAMPLE_TEMPERATURE, model_kwargs={"y": y, "beside": low_res}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("glide"), help="folder for the images")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    y = torch.arange(len(PROMPTS)).repeat_interleave(2)

    small = generate(base_network(), y, seed=0)
    mask = torch.ones(1, 1, SMALL, SMALL)
    mask[..., SMALL // 4 : -SMALL // 4, SMALL // 4 : -SMALL // 4] = 0.0  # the middle is made again
    inpainted = generate(inpainting_network(), y.flip(0), requantized(small), mask, seed=1)
    # Another seed for the second stage: noise is a function of the seed, and its x_T would begin as the first one's.
    start = df.randn((len(y), 3, LARGE, LARGE), seed=2, stream="x_T")
    large = upsample(upsampling_network(), y, small, start)
    for name, images in {"small": small, "inpainted": inpainted, "large": large}.items():
        write_png(out / f"{name}.png", grid(images))
        print(f"{out / name}.png: {len(images)} images of {images.shape[-1]} pixels")


if __name__ == "__main__":
    main()
