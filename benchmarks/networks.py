"""The networks of the whole-loop benchmarks, with random weights, all called as model(x, t)."""

from __future__ import annotations

import copy

import diffusers
from torch import Tensor, nn

from examples.annotated import SinusoidalEmbedding, Unet


def filled(model: nn.Module) -> nn.Module:
    """Ready to sample; the branches that training starts from zero, which would hide an error in them, filled."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64; the article's embedding of the time is float32 whatever the model is, and rounded as ever."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if isinstance(module, SinusoidalEmbedding):
            module.register_forward_hook(lambda _module, _inputs, embedding: embedding.double())
    return twin


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
    return filled(Article())


class Article(nn.Module):
    """The network of examples/annotated.py with what lucidrains' GaussianDiffusion asks of one."""

    self_condition = random_or_learned_sinusoidal_cond = False
    channels = out_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.unet = Unet(28, self.channels)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: None = None) -> Tensor:
        return self.unet(x, t)
