"""The blocks of well-known diffusion models, in our own lines: same attributes, same structure, same arithmetic."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

EMBEDDING = 12


def fill(module: nn.Module) -> nn.Module:
    """Weights of no special value, the zero-initialised ones too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


# openai: guided-diffusion and improved-diffusion


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class OldSiLU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class TimestepBlock(nn.Module):
    pass


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class GuidedResBlock(TimestepBlock):
    def __init__(self, channels, out_channels, scale_shift, up=False, act=nn.SiLU, checkpointed=False):
        super().__init__()
        self.use_scale_shift_norm = scale_shift
        self.use_checkpoint = checkpointed
        self.in_layers = nn.Sequential(GroupNorm32(4, channels), act(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.updown = up
        self.h_upd = self.x_upd = nn.Upsample(scale_factor=2) if up else nn.Identity()
        self.emb_layers = nn.Sequential(act(), nn.Linear(EMBEDDING, out_channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            GroupNorm32(4, out_channels),
            act(),
            nn.Dropout(p=0.1),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        if self.use_checkpoint:
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x, emb):
        if self.updown:
            in_rest, in_conv = self.in_layers[:-1], self.in_layers[-1]
            h = in_rest(x)
            h = self.h_upd(h)
            x = self.x_upd(x)
            h = in_conv(h)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        if self.use_scale_shift_norm:
            out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = torch.chunk(emb_out, 2, dim=1)
            h = out_norm(h) * (1 + scale) + shift
            h = out_rest(h)
        else:
            h = h + emb_out
            h = self.out_layers(h)
        return self.skip_connection(x) + h


class GuidedAttention(nn.Module):
    def __init__(self, channels, norm=GroupNorm32):
        super().__init__()
        self.norm = norm(4, channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=1)
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / c**0.5, dim=-1)
        h = self.proj_out(torch.einsum("bts,bcs->bct", weight, v))
        return (x + h).reshape(b, c, *spatial)


class Recomputed(torch.autograd.Function):
    """Keeps its inputs alone for the backward pass."""

    @staticmethod
    def forward(ctx, run, count, *tensors):
        ctx.run, ctx.count = run, count
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return run(*tensors[:count])

    @staticmethod
    def backward(ctx, gradient):
        tensors = [t.detach().requires_grad_() for t in ctx.saved_tensors[: ctx.count]]
        parameters = ctx.saved_tensors[ctx.count :]
        with torch.enable_grad():
            y = ctx.run(*tensors)
        return None, None, *torch.autograd.grad(y, [*tensors, *parameters], gradient)


def recomputed(run, inputs, parameters, flag):
    if not flag:
        return run(*inputs)
    return Recomputed.apply(run, len(inputs), *inputs, *parameters)


class GuidedHeads(nn.Module):
    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        n, width, length = qkv.shape
        if width % (3 * self.n_heads):
            raise ValueError(f"{width} channels for {self.n_heads} heads")
        q, k, v = qkv.reshape(n * self.n_heads, -1, length).chunk(3, dim=1)
        root = math.sqrt(math.sqrt(q.shape[1]))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q / root, k / root).float(), dim=-1).type(q.dtype)
        return torch.einsum("bts,bcs->bct", weight, v).reshape(n, -1, length)


class GuidedAttentionBlock(nn.Module):
    """With the heads in a module of their own, recomputation in the backward pass, and GLIDE's argument."""

    def __init__(self, channels, num_heads=1):
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm32(4, channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.attention = GuidedHeads(num_heads)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        self.encoder_channels = None

    def forward(self, x, encoder_out=None):
        return recomputed(self._forward, (x,), self.parameters(), True)

    def _forward(self, x, encoder_out=None):
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(x))
        if self.encoder_channels is not None:
            qkv = torch.cat([qkv, self.encoder_kv(encoder_out)], dim=-1)
        h = self.proj_out(self.attention(qkv))
        return (x + h).reshape(b, c, *spatial)


class GuidedUNet(nn.Module):
    def __init__(self, scale_shift=True, act=nn.SiLU, checkpointed=False):
        super().__init__()
        res = {"scale_shift": scale_shift, "act": act, "checkpointed": checkpointed}
        self.input_blocks = nn.ModuleList(
            [
                TimestepEmbedSequential(nn.Conv2d(3, 8, 3, padding=1)),
                TimestepEmbedSequential(GuidedResBlock(8, 8, **res), GuidedAttention(8)),
            ]
        )
        self.middle_block = TimestepEmbedSequential(GuidedResBlock(8, 16, **res))
        self.output_blocks = nn.ModuleList([TimestepEmbedSequential(GuidedResBlock(24, 8, up=True, **res))])
        self.out = nn.Sequential(GroupNorm32(4, 8), act(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x, emb):
        h = self.input_blocks[0](x, emb)
        skip = h = self.input_blocks[1](h, emb)
        h = self.middle_block(h, emb)
        h = self.output_blocks[0](torch.cat([h, skip], dim=1), emb)
        return self.out(h)


# GLIDE: SiLU inside the norm


class GlideNorm(nn.GroupNorm):
    def __init__(self, num_groups, num_channels, swish, eps=1e-5):
        super().__init__(num_groups=num_groups, num_channels=num_channels, eps=eps)
        self.swish = swish

    def forward(self, x):
        y = super().forward(x.float()).to(x.dtype)
        if self.swish == 1.0:
            y = F.silu(y)
        elif self.swish:
            y = y * torch.sigmoid(y * float(self.swish))
        return y


class GlideResBlock(nn.Module):
    def __init__(self, channels, scale_shift):
        super().__init__()
        self.use_scale_shift_norm = scale_shift
        self.in_layers = nn.Sequential(
            GlideNorm(4, channels, swish=1.0), nn.Identity(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDING, channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            GlideNorm(4, channels, swish=0.0 if scale_shift else 1.0),
            nn.SiLU() if scale_shift else nn.Identity(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.odd = GlideNorm(4, channels, swish=1.5)

    def forward(self, x, emb):
        h = self.in_layers(x)
        emb_out = self.emb_layers(emb)[:, :, None, None]
        if self.use_scale_shift_norm:
            out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = emb_out.chunk(2, dim=1)
            h = out_norm(h) * (1 + scale) + shift
            h = out_rest(h)
        else:
            h = h + emb_out
            h = self.out_layers(h)
        return self.odd(x + h)


# CompVis: the autoencoder of latent diffusion


def nonlinearity(x):
    # swish
    return x * torch.sigmoid(x)


def Normalize(in_channels, num_groups=4):
    return nn.GroupNorm(num_groups=num_groups, num_channels=in_channels, eps=1e-6, affine=True)


class CompVisResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, temb_channels=EMBEDDING):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.norm1 = Normalize(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = Normalize(out_channels)
        self.dropout = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, temb):
        h = x
        h = self.norm1(h)
        h = nonlinearity(h)
        h = self.conv1(h)

        if temb is not None:
            h = h + self.temb_proj(nonlinearity(temb))[:, :, None, None]

        h = self.norm2(h)
        h = nonlinearity(h)
        h = self.dropout(h)
        h = self.conv2(h)

        if self.in_channels != self.out_channels:
            x = self.nin_shortcut(x)
        return x + h


class CompVisAttnBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = Normalize(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h_ = x
        h_ = self.norm(h_)
        b, c, height, width = h_.shape
        q, k, v = (layer(h_).reshape(b, c, height * width) for layer in (self.q, self.k, self.v))
        w_ = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * c**-0.5, dim=2)
        h_ = torch.bmm(v, w_.permute(0, 2, 1)).reshape(b, c, height, width)
        return x + self.proj_out(h_)


class CompVisEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1 = CompVisResnetBlock(8, 16)
        self.mid.attn_1 = CompVisAttnBlock(16)
        self.mid.block_2 = CompVisResnetBlock(16, 16)
        self.norm_out = Normalize(16)
        self.conv_out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x, temb):
        h = self.conv_in(x)
        h = self.mid.block_1(h, temb)
        h = self.mid.attn_1(h)
        h = self.mid.block_2(h, temb)

        # end
        h = self.norm_out(h)
        h = nonlinearity(h)
        return self.conv_out(h)


# DALL-E 2, Imagen, the annotated article, lucidrains


def exists(x):
    return x is not None


class ArticleBlock(nn.Module):
    def __init__(self, dim, dim_out, groups=4):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = nn.GroupNorm(groups, dim_out)
        self.act = nn.SiLU()

    def forward(self, x, scale_shift=None):
        x = self.proj(x)
        x = self.norm(x)

        if exists(scale_shift):
            scale, shift = scale_shift
            x = x * (scale + 1) + shift

        x = self.act(x)
        return x  # noqa: RET504 - as they write it


class ImagenBlock(nn.Module):
    def __init__(self, dim, dim_out, groups=4, norm=True):
        super().__init__()
        self.groupnorm = nn.GroupNorm(groups, dim) if norm else nn.Identity()
        self.activation = nn.SiLU()
        self.project = nn.Conv2d(dim, dim_out, 3, padding=1)

    def forward(self, x, scale_shift=None):
        x = self.groupnorm(x)

        if exists(scale_shift):
            scale, shift = scale_shift
            x = x * (scale + 1) + shift

        x = self.activation(x)
        return self.project(x)


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = dim**0.5
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.g * self.scale


class ArticleResnetBlock(nn.Module):
    def __init__(self, dim, dim_out, block=ArticleBlock):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDING, dim_out * 2))
        self.block1 = block(dim, dim_out)
        self.block2 = block(dim_out, dim_out)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x, time_emb=None):
        scale_shift = None
        if exists(self.mlp) and exists(time_emb) and self.block1 is not None:
            time_emb = self.mlp(time_emb)
            scale_shift = time_emb[:, :, None, None].chunk(2, dim=1)
        h = self.block1(x, scale_shift=scale_shift if self.res_conv is not None else None)
        h = self.block2(h)
        return h + self.res_conv(x)


class ImagenResnetBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.time_mlp = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDING, dim * 2))
        self.block1 = ImagenBlock(dim, dim)
        self.block2 = ImagenBlock(dim, dim)
        self.final = ImagenBlock(dim, dim, norm=False)
        self.rms = RMSNorm(dim)

    def forward(self, x, time_emb):
        scale_shift = self.time_mlp(time_emb)[:, :, None, None].chunk(2, dim=1)
        h = self.block1(x)
        h = self.block2(h, scale_shift=scale_shift)
        return self.rms(self.final(h)) + x


class ScoreResnetBlock(nn.Module):
    """score_sde's: everything in one expression, one activation for all."""

    def __init__(self, channels, act):
        super().__init__()
        self.act = act
        self.GroupNorm_0 = nn.GroupNorm(4, channels, eps=1e-6)
        self.Conv_0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.Dense_0 = nn.Linear(EMBEDDING, channels)
        self.GroupNorm_1 = nn.GroupNorm(4, channels, eps=1e-6)
        self.Conv_1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, temb):
        h = self.act(self.GroupNorm_0(x))
        h = self.Conv_0(h)
        h += self.Dense_0(self.act(temb))[:, :, None, None]
        h = self.act(self.GroupNorm_1(h))
        h = self.Conv_1(h)
        return (x + h) / 2**0.5
