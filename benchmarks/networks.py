"""The networks of the whole-loop benchmarks, with random weights, all called as model(x, t)."""

from __future__ import annotations

import itertools
import math

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def filled(model: nn.Module) -> nn.Module:
    """Ready to sample; the branches that training starts from zero, which would hide an error in them, filled."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def cifar() -> nn.Module:
    """The 35.7M-parameter U-Net of Ho et al. 2020 for CIFAR-10, as diffusers' google/ddpm-cifar10-32 configures it."""
    return filled(
        diffusers.UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
        )
    )


def article() -> nn.Module:
    """The annotated article's U-Net for Fashion-MNIST: width 28, three levels, 4 heads."""
    return filled(ArticleUNet(28, (1, 2, 4), channels=1))


class Block(nn.Module):
    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = nn.GroupNorm(4, dim_out)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return self.act(x)


class ResnetBlock(nn.Module):
    def __init__(self, dim: int, dim_out: int, time_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * dim_out))
        self.block1, self.block2 = Block(dim, dim_out), Block(dim_out, dim_out)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale_shift = self.mlp(time)[:, :, None, None].chunk(2, dim=1)
        h = self.block1(x, scale_shift=scale_shift)
        return self.block2(h) + self.res_conv(x)


class Attention(nn.Module):
    """Softmax attention over the positions, or with `linear` over the channels of each head."""

    heads, dim_head = 4, 32

    def __init__(self, dim: int, linear: bool) -> None:
        super().__init__()
        hidden = self.heads * self.dim_head
        self.linear = linear
        self.norm = nn.GroupNorm(1, dim)
        self.to_qkv = nn.Conv2d(dim, 3 * hidden, 1, bias=False)
        self.to_out = nn.Conv2d(hidden, dim, 1)
        self.out_norm = nn.GroupNorm(1, dim) if linear else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).chunk(3, dim=1)
        q, k, v = (t.reshape(n, self.heads, self.dim_head, h * w) for t in qkv)
        scale = self.dim_head**-0.5
        if self.linear:
            context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
            out = torch.einsum("bhde,bhdn->bhen", context, q.softmax(dim=-2) * scale)
        else:
            similarity = torch.einsum("bhdi,bhdj->bhij", q * scale, k)
            attention = (similarity - similarity.amax(dim=-1, keepdim=True)).softmax(dim=-1)
            out = torch.einsum("bhij,bhdj->bhdi", attention, v)
        return self.out_norm(self.to_out(out.reshape(n, -1, h, w))) + x


class Level(nn.Module):
    """Two residual blocks, linear attention, and the convolution that changes size and width."""

    def __init__(self, dim: int, skip: int, resize: nn.Conv2d, time_dim: int) -> None:
        super().__init__()
        self.block1, self.block2 = (ResnetBlock(dim + skip, dim, time_dim) for _ in range(2))
        self.attention = Attention(dim, linear=True)
        self.resize = resize


class ArticleUNet(nn.Module):
    """The structure of the article: residual and linear-attention blocks, softmax attention in the middle."""

    # What lucidrains' GaussianDiffusion asks of a network.
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, dim: int, mults: tuple[int, ...], channels: int) -> None:
        super().__init__()
        time_dim = 4 * dim
        self.dim = dim
        self.channels = self.out_dim = channels
        widths = [dim, *(dim * factor for factor in mults)]
        self.init_conv = nn.Conv2d(channels, dim, 7, padding=3)
        self.time_mlp = nn.Sequential(nn.Linear(dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim))
        pairs = list(itertools.pairwise(widths))
        # The last level on the way down, and the last on the way up, keep their size.
        halving = [nn.Conv2d(4 * a, b, 1) for a, b in pairs[:-1]]
        self.downs = nn.ModuleList(
            Level(a, 0, resize, time_dim)
            for (a, _), resize in zip(pairs, [*halving, nn.Conv2d(*pairs[-1], 3, padding=1)], strict=True)
        )
        self.mid1, self.mid2 = (ResnetBlock(widths[-1], widths[-1], time_dim) for _ in range(2))
        self.mid_attention = Attention(widths[-1], linear=False)
        self.ups = nn.ModuleList(Level(b, a, nn.Conv2d(b, a, 3, padding=1), time_dim) for a, b in reversed(pairs))
        self.final_block = ResnetBlock(2 * dim, dim, time_dim)
        self.final_conv = nn.Conv2d(dim, channels, 1)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: None = None) -> Tensor:
        x = first = self.init_conv(x)
        half = self.dim // 2
        angles = t[:, None] * torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / (half - 1)))
        time = self.time_mlp(torch.cat((angles.sin(), angles.cos()), dim=1).to(x.dtype))
        skips = []
        for i, level in enumerate(self.downs):
            x = level.block1(x, time)
            skips.append(x)
            x = level.attention(level.block2(x, time))
            skips.append(x)
            if i < len(self.downs) - 1:
                x = F.pixel_unshuffle(x, 2)
            x = level.resize(x)
        x = self.mid2(self.mid_attention(self.mid1(x, time)), time)
        for i, level in enumerate(self.ups):
            x = level.block1(torch.cat((x, skips.pop()), dim=1), time)
            x = level.attention(level.block2(torch.cat((x, skips.pop()), dim=1), time))
            if i < len(self.ups) - 1:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = level.resize(x)
        return self.final_conv(self.final_block(torch.cat((x, first), dim=1), time))
