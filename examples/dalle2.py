"""DALL-E 2 (Ramesh et al. 2022): a prior over CLIP's image embeddings, and a cascade that decodes one into an image.

python examples/dalle2.py --out DIR
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
from ddpm_fast.cascade import low_resolution
from ddpm_fast.cli.images import grid, write_png
from ddpm_fast.nn.embedding import timestep_embedding

EMBEDDING = 32
EMBEDDING_SCALE = EMBEDDING**0.5  # an embedding of length 1 becomes one whose elements have variance 1
PRIOR_SCALE, DECODER_SCALE = 2.0, 3.0
SMALL, LARGE = 16, 32
COSINE, LINEAR = df.NoiseSchedule.cosine(100), df.NoiseSchedule.linear(1000)
NOISE_LEVEL = 200


class Prior(nn.Module):
    """Predicts an image embedding from a noisy one and a text embedding; zeros stand for the empty text."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * EMBEDDING, 128), nn.SiLU(), nn.Linear(128, EMBEDDING))
        randomized(self, seed)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.layers(torch.cat([x, timestep_embedding(t, EMBEDDING), text * EMBEDDING_SCALE], dim=1))


class Decoder(nn.Module):
    """A U-Net that is shown an image embedding as planes; the second stage also a small image and its noise level."""

    def __init__(self, low_res: bool = False, seed: int = 1) -> None:
        super().__init__()
        self.planes = nn.Linear(EMBEDDING, 4)
        self.unet = ConditionedUNet(3, 6, beside=8 if low_res else 4)
        randomized(self, seed)

    def forward(
        self, x: Tensor, t: Tensor, image: Tensor, low_res: Tensor | None = None, low_res_time: Tensor | None = None
    ) -> Tensor:
        planes = [self.planes(image * EMBEDDING_SCALE)[:, :, None, None].expand(-1, -1, *x.shape[2:])]
        if low_res is not None and low_res_time is not None:
            planes += [low_res, (low_res_time / 1000)[:, None, None, None].expand(-1, 1, *x.shape[2:])]
        return self.unet(x, t, beside=torch.cat(planes, dim=1))


def clamped(embeddings: Tensor) -> Tensor:
    """At the length that every embedding has: what clipping is to an image."""
    return F.normalize(embeddings, dim=-1) * EMBEDDING_SCALE


def embed(model: nn.Module, text: Tensor, **source: Any) -> Tensor:
    """Image embeddings ``(N, D)`` of length 1 for text embeddings; `source` is a seed, or noise.

    The state is no image: a Sampler asks for (N, C, *) and no more. x0 is predicted, and clamped at each step.
    """
    sampler = df.Sampler(
        model,
        COSINE,
        prediction="x0",
        clip=None,
        denoised_fn=clamped,
        guidance_scale=PRIOR_SCALE,
        reference="lucidrains",
    )
    x = sampler.sample(
        tuple(text.shape), model_kwargs={"text": text}, uncond_kwargs={"text": torch.zeros_like(text)}, **source
    )
    return clamped(x) / EMBEDDING_SCALE


def most_similar(embeddings: Tensor, text: Tensor, candidates: int) -> Tensor:
    """Of each text's `candidates` embeddings, which follow each other, the one nearest to it (section 2.2)."""
    similarities = (embeddings * text).sum(dim=1).reshape(-1, candidates)
    chosen = similarities.argmax(dim=1) + torch.arange(0, len(text), candidates)
    return embeddings[chosen]


def decode(model: nn.Module, image: Tensor, **source: Any) -> Tensor:
    """Small images of image embeddings: guided, with a learned variance; `source` is a seed, or noise."""
    sampler = df.Sampler(model, COSINE, variance="learned_range", guidance_scale=DECODER_SCALE, reference="lucidrains")
    return sampler.sample(
        (len(image), 3, SMALL, SMALL),
        model_kwargs={"image": image},
        uncond_kwargs={"image": torch.zeros_like(image)},
        **source,
    )


def upsample(
    model: nn.Module, image: Tensor, small: Tensor, seed: int = 0, augmentation: Tensor | None = None, **source: Any
) -> Tensor:
    """Large images from small ones, which are noised to a fixed level first: from `seed`, or `augmentation`."""
    noise: dict[str, Any] = {"seed": seed} if augmentation is None else {"noise": augmentation}
    low_res, time = low_resolution(small, LARGE, LINEAR, NOISE_LEVEL, **noise)
    sampler = df.Sampler(model, LINEAR.respace(50), variance="learned_range", reference="lucidrains")
    return sampler.sample(
        (len(image), 3, LARGE, LARGE),
        seed=seed,
        model_kwargs={"image": image, "low_res": low_res, "low_res_time": time},
        **source,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("dalle2"), help="folder for the images")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    # Two embeddings for each of four texts, and of the two the better one.
    text = F.normalize(df.randn((4, EMBEDDING), seed=100), dim=1).repeat_interleave(2, dim=0)
    image = most_similar(embed(Prior(), text, seed=0), text, 2)
    small = decode(Decoder(), image, seed=1)
    large = upsample(Decoder(low_res=True, seed=2), image, small, seed=2)  # each stage has a seed of its own
    for name, images in {"small": small, "large": large}.items():
        write_png(out / f"{name}.png", grid(images))
        print(f"{out / name}.png: {len(images)} images of {images.shape[-1]} pixels")


if __name__ == "__main__":
    main()
