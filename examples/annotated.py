"""The Annotated Diffusion Model, before and after ddpm_fast.

Hugging Face's article (Rogge and Rasul 2022) builds DDPM from nothing: a U-Net, four schedules, the forward process, a
loss, training on Fashion-MNIST and the sampling loop. Here is the whole of it, with a U-Net of the article's structure,
twice: as the article writes it, and with `df.diffusion_loss`, `df.accelerate` and `df.Sampler`. Both are timed, taking
turns, and draw the same images from the same noise.

    python examples/annotated.py --data /usr/share/datasets/fashion-mnist            # a few minutes on a CPU
    python examples/annotated.py --data DIR --epochs 5 --batch-size 128              # the article's training
    python examples/annotated.py --dataset digits --steps 200                        # no files needed
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.interop import annotated
from ddpm_fast.training import load_dataset

# ---------------------------------------------------------------------- the network


class SinusoidalEmbedding(nn.Module):
    """Positions as sines and cosines of geometrically spaced frequencies (Vaswani et al. 2017)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
        angles = t[:, None] * frequencies[None, :]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class WeightStandardizedConv2d(nn.Conv2d):
    """A convolution whose kernels have mean 0 and variance 1 (Qiao et al. 2019); goes well with GroupNorm."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = self.weight.var(dim=(1, 2, 3), unbiased=False, keepdim=True)
        weight = (self.weight - mean) * (variance + 1e-5).rsqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Block(nn.Module):
    """Convolution, GroupNorm, the time's scale and shift, SiLU."""

    def __init__(self, dim: int, dim_out: int, groups: int) -> None:
        super().__init__()
        self.proj = WeightStandardizedConv2d(dim, dim_out, 3, padding=1)
        self.norm = nn.GroupNorm(groups, dim_out)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return self.act(x)


class ResnetBlock(nn.Module):
    """Two blocks around which the input is carried (He et al. 2015), the first told the time."""

    def __init__(self, dim: int, dim_out: int, time_dim: int, groups: int = 4) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, dim_out * 2))
        self.block1 = Block(dim, dim_out, groups)
        self.block2 = Block(dim_out, dim_out, groups)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.mlp(time)[:, :, None, None].chunk(2, dim=1)
        return self.block2(self.block1(x, (scale, shift))) + self.res_conv(x)


class ConvNextBlock(nn.Module):
    """The article's other block (Liu et al. 2022): a 7x7 convolution a channel, then a wide and a narrow 3x3 one."""

    def __init__(self, dim: int, dim_out: int, time_dim: int, mult: int = 2) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(time_dim, dim))
        self.ds_conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.net = nn.Sequential(
            nn.GroupNorm(1, dim),
            nn.Conv2d(dim, dim_out * mult, 3, padding=1),
            nn.GELU(),
            nn.GroupNorm(1, dim_out * mult),
            nn.Conv2d(dim_out * mult, dim_out, 3, padding=1),
        )
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.ds_conv(x) + self.mlp(time)[:, :, None, None]
        return self.net(h) + self.res_conv(x)


class Attention(nn.Module):
    """Each pixel looks at all others."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.to_qkv = nn.Conv2d(dim, heads * dim_head * 3, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        q, k, v = self.to_qkv(x).reshape(n, 3, self.heads, -1, height * width).unbind(1)
        weights = torch.softmax((q * self.scale).transpose(-2, -1) @ k, dim=-1)
        return self.to_out((v @ weights.transpose(-2, -1)).reshape(n, -1, height, width))


class LinearAttention(nn.Module):
    """Attention whose cost grows with the pixels, not with their square (Shen et al. 2018)."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.to_qkv = nn.Conv2d(dim, heads * dim_head * 3, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, dim, 1), nn.GroupNorm(1, dim))

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        q, k, v = self.to_qkv(x).reshape(n, 3, self.heads, -1, height * width).unbind(1)
        q = q.softmax(dim=-2) * self.scale
        context = k.softmax(dim=-1) @ v.transpose(-2, -1)
        return self.to_out((context.transpose(-2, -1) @ q).reshape(n, -1, height, width))


class Residual(nn.Module):
    """A GroupNorm of one group, then `fn`, and the input added."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.GroupNorm(1, dim), fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x)) + x


def downsample(dim: int, dim_out: int) -> nn.Module:
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(dim * 4, dim_out, 1))


def upsample(dim: int, dim_out: int) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, dim_out, 3, padding=1))


class Unet(nn.Module):
    """The article's U-Net: two blocks and linear attention a level, full attention in the middle.

    Args:
        dim: channels of the first level.
        channels: of the images.
        dim_mults: factors of the levels; each but the last halves the image.
        convnext: ConvNeXt blocks in place of ResNet's.
    """

    def __init__(self, dim: int, channels: int, dim_mults: tuple[int, ...] = (1, 2, 4), convnext: bool = False) -> None:
        super().__init__()
        block = ConvNextBlock if convnext else ResnetBlock
        time_dim = dim * 4
        self.init_conv = nn.Conv2d(channels, dim, 1)
        self.time_mlp = nn.Sequential(
            SinusoidalEmbedding(dim), nn.Linear(dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim)
        )
        dims = [dim, *(dim * mult for mult in dim_mults)]
        levels = list(pairwise(dims))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, (dim_in, dim_out) in enumerate(levels):
            last = i == len(levels) - 1
            parts = [
                block(dim_in, dim_in, time_dim),
                block(dim_in, dim_in, time_dim),
                Residual(dim_in, LinearAttention(dim_in)),
                nn.Conv2d(dim_in, dim_out, 3, padding=1) if last else downsample(dim_in, dim_out),
            ]
            self.downs.append(nn.ModuleList(parts))
        middle = dims[-1]
        self.mid_block1 = block(middle, middle, time_dim)
        self.mid_attn = Residual(middle, Attention(middle))
        self.mid_block2 = block(middle, middle, time_dim)
        for i, (dim_in, dim_out) in enumerate(reversed(levels)):
            last = i == len(levels) - 1
            parts = [
                block(dim_out + dim_in, dim_out, time_dim),
                block(dim_out + dim_in, dim_out, time_dim),
                Residual(dim_out, LinearAttention(dim_out)),
                nn.Conv2d(dim_out, dim_in, 3, padding=1) if last else upsample(dim_out, dim_in),
            ]
            self.ups.append(nn.ModuleList(parts))
        self.final_res_block = block(dim * 2, dim, time_dim)
        self.final_conv = nn.Conv2d(dim, channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.init_conv(x)
        first = x
        t = self.time_mlp(time)
        skips = []
        for block1, block2, attention, down in self.downs:
            x = block1(x, t)
            skips.append(x)
            x = attention(block2(x, t))
            skips.append(x)
            x = down(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, t)), t)
        for block1, block2, attention, up in self.ups:
            x = block1(torch.cat([x, skips.pop()], dim=1), t)
            x = attention(block2(torch.cat([x, skips.pop()], dim=1), t))
            x = up(x)
        return self.final_conv(self.final_res_block(torch.cat([x, first], dim=1), t))


# ---------------------------------------------------------------------- before: the article's diffusion


class Before:
    """Tables, loss and sampling loop as the article writes them, in float32."""

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps
        self.betas = torch.linspace(0.0001, 0.02, timesteps)
        alphas = 1.0 - self.betas
        abar = torch.cumprod(alphas, dim=0)
        previous = F.pad(abar[:-1], (1, 0), value=1.0)
        self.sqrt_recip_alphas = torch.sqrt(1.0 / alphas)
        self.sqrt_abar, self.sqrt_one_minus_abar = torch.sqrt(abar), torch.sqrt(1.0 - abar)
        self.posterior_variance = self.betas * (1.0 - previous) / (1.0 - abar)

    @staticmethod
    def extract(table: Tensor, t: Tensor, shape: torch.Size) -> Tensor:
        return table.gather(-1, t).reshape(len(t), *(1,) * (len(shape) - 1))

    def loss(self, model: nn.Module, x0: Tensor) -> Tensor:
        t = torch.randint(0, self.timesteps, (len(x0),))
        noise = torch.randn_like(x0)
        x_t = (
            self.extract(self.sqrt_abar, t, x0.shape) * x0 + self.extract(self.sqrt_one_minus_abar, t, x0.shape) * noise
        )
        return F.smooth_l1_loss(noise, model(x_t, t))

    @torch.no_grad()
    def p_sample(self, model: nn.Module, x: Tensor, t: Tensor, index: int) -> Tensor:
        betas = self.extract(self.betas, t, x.shape)
        root = self.extract(self.sqrt_one_minus_abar, t, x.shape)
        recip = self.extract(self.sqrt_recip_alphas, t, x.shape)
        mean = recip * (x - betas * model(x, t) / root)
        if index == 0:
            return mean
        return mean + torch.sqrt(self.extract(self.posterior_variance, t, x.shape)) * torch.randn_like(x)

    def sample(self, model: nn.Module, shape: tuple[int, ...]) -> Iterator[Tensor]:
        model.eval()
        x = torch.randn(shape)
        for index in reversed(range(self.timesteps)):
            x = self.p_sample(model, x, torch.full((shape[0],), index), index)
            yield x


# ---------------------------------------------------------------------- after: the same with ddpm_fast


class After:
    """The same schedule, loss and loop."""

    def __init__(self, timesteps: int) -> None:
        self.schedule = annotated.schedule("linear", timesteps)
        self.step = 0

    def loss(self, model: nn.Module, x0: Tensor) -> Tensor:
        self.step += 1
        return df.diffusion_loss(model, self.schedule, x0, loss="huber", seed=0, step=self.step).mean()

    def sample(self, model: nn.Module, shape: tuple[int, ...]) -> Iterator[Tensor]:
        # A generator in place of a seed: the article's draws, in its order. A seed is faster.
        sampler = df.Sampler(model, self.schedule, reference="annotated")
        for state in sampler.stream(shape, generator=torch.default_generator):
            yield state.x


# ---------------------------------------------------------------------- both, taking turns


def batches(images: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Shuffled batches without end, half of the images mirrored, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(images), generator=generator).split(size):
            if len(rows) < size:
                continue
            x = images[rows].float() / 127.5 - 1.0
            mirrored = torch.rand(len(x), generator=generator) < 0.5
            x[mirrored] = x[mirrored].flip(-1)
            yield x


def train(
    ways: dict[str, tuple[nn.Module, Before | After]], images: Tensor, steps: int, batch_size: int
) -> dict[str, float]:
    """Train each model its way, on the same batches; seconds in all."""
    seconds = dict.fromkeys(ways, 0.0)
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=1e-3) for name, (model, _) in ways.items()}
    data = batches(images, batch_size, seed=0)
    for step in range(steps):
        x0, losses = next(data), {}
        for name, (model, diffusion) in ways.items():
            started = time.perf_counter()
            model.train()
            loss = diffusion.loss(model, x0)
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            losses[name] = loss.item()
            seconds[name] += time.perf_counter() - started
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
    return seconds


def sample(
    ways: dict[str, tuple[nn.Module, Before | After]], shape: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Draw images each way, from the same noise, a step of each in turn; the images, and seconds in all."""
    seconds = dict.fromkeys(ways, 0.0)
    images: dict[str, Tensor] = {}
    states = dict.fromkeys(ways, torch.Generator().manual_seed(0).get_state())
    loops = {name: diffusion.sample(model, shape) for name, (model, diffusion) in ways.items()}
    running = True
    while running:
        for name, loop in loops.items():
            torch.set_rng_state(states[name])
            started = time.perf_counter()
            x = next(loop, None)
            seconds[name] += time.perf_counter() - started
            states[name] = torch.get_rng_state()
            if x is None:
                running = False
            else:
                images[name] = x
    return images, seconds


def save_grid(path: Path, x: Tensor, columns: int = 8) -> None:
    """Images in [-1, 1] side by side."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    rows = [torch.cat(list(row), dim=-1) for row in pixels.split(columns) if len(row) == min(columns, len(pixels))]
    canvas = torch.cat(rows, dim=-2).permute(1, 2, 0).squeeze(-1)
    Image.fromarray(canvas.numpy()).resize((canvas.shape[1] * 2, canvas.shape[0] * 2), Image.Resampling.NEAREST).save(
        path
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=("fashion-mnist", "digits"), default="fashion-mnist")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps")
    parser.add_argument("--epochs", type=int, help="passes through the images, in place of --steps")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--timesteps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--convnext", action="store_true", help="ConvNeXt blocks in place of ResNet's")
    parser.add_argument("--out", type=Path, default=Path("annotated.png"))
    options = parser.parse_args(arguments)
    if options.out.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--out must end as an image's name does, such as .png, not {options.out.name!r}")
    if options.dataset == "fashion-mnist" and options.data is None:
        parser.error("--dataset fashion-mnist needs --data, the folder that holds its files")

    images = load_dataset(options.dataset, options.data).images
    steps = options.steps if options.epochs is None else options.epochs * (len(images) // options.batch_size)
    torch.manual_seed(0)
    side = images.shape[-1]
    model = Unet(
        dim=max(side, 16), channels=1, dim_mults=(1, 2, 4) if side == 28 else (1, 2), convnext=options.convnext
    )
    ways: dict[str, tuple[nn.Module, Before | After]] = {
        "the article": (model, Before(options.timesteps)),
        "ddpm_fast": (df.accelerate(copy.deepcopy(model), channels_last=True), After(options.timesteps)),
    }
    trained = train(ways, images, steps, options.batch_size)

    # The weights of one for both, so that the images can be compared.
    df.restore(ways["ddpm_fast"][0]).load_state_dict(model.state_dict())
    df.accelerate(ways["ddpm_fast"][0], channels_last=True)
    drawn, sampled = sample(ways, (options.samples, *images.shape[1:]))
    before, after = drawn["the article"], drawn["ddpm_fast"]
    save_grid(options.out, after)

    what = (("training", steps, trained), ("sampling", options.timesteps, sampled))
    print(f"\n{'':<10}{'steps':>7}{'the article':>16}{'ddpm_fast':>16}{'times as fast':>16}")
    for name, count, seconds in what:
        a, b = seconds["the article"], seconds["ddpm_fast"]
        print(f"{name:<10}{count:>7}{a:>14.2f} s{b:>14.2f} s{a / b:>16.2f}")
    print(
        f"largest difference of the {options.samples} images: {(before - after).abs().max():.2g}; wrote {options.out}"
    )


if __name__ == "__main__":
    main()
