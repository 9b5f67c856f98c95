"""Images of one channel, whose memory format is open, in models that accelerate lays out in channels_last."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from examples import annotated

from . import originals as o

CL = torch.channels_last


def first_conv(**options: int) -> nn.Conv2d:
    return o.fill(nn.Conv2d(1, 24, 1, **options))


@torch.no_grad()
def test_a_1x1_convolution_of_one_channel_gives_channels_last() -> None:
    conv = first_conv()
    x = torch.randn(3, 1, 6, 5)
    want = conv(x)
    df.accelerate(conv)
    assert conv(x).is_contiguous()
    df.accelerate(conv, channels_last=True)
    for image in (x, x[:, :, ::2, 1:], x.expand(3, 1, 6, 5)):
        got = conv(image)
        assert got.is_contiguous(memory_format=CL)
        assert not got.is_contiguous()
        torch.testing.assert_close(got, copy.deepcopy(df.restore(conv))(image), rtol=1e-6, atol=1e-6)
        df.accelerate(conv, channels_last=True)
    torch.testing.assert_close(conv(x[0]), want[0], rtol=1e-6, atol=1e-6)
    df.restore(conv)
    assert type(conv) is nn.Conv2d
    assert torch.equal(conv(x), want)


def test_its_gradients_and_errors_are_torchs() -> None:
    conv = first_conv()
    x = torch.randn(3, 1, 6, 5, requires_grad=True)
    wants = torch.autograd.grad(conv(x).square().sum(), [x, *conv.parameters()])
    df.accelerate(conv, channels_last=True)
    for got, want in zip(torch.autograd.grad(conv(x).square().sum(), [x, *conv.parameters()]), wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="to have 1 channels, but got 2"):
        conv(torch.randn(1, 2, 3, 3))


@torch.no_grad()
def test_the_articles_network_stays_in_channels_last() -> None:
    model = df.accelerate(o.fill(annotated.Unet(16, 1, (1, 2))).eval(), channels_last=True)
    contiguous: list[tuple[int, ...]] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.dim() == 4 and output.shape[1] > 1 and not output.is_contiguous(memory_format=CL):
            contiguous.append(tuple(output.shape))

    for name, module in model.named_modules():
        # Attention over all pixels is a product of contiguous matrices, as its author wrote it.
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)) and not name.startswith("mid_attn"):
            module.register_forward_hook(look)
    model(torch.randn(2, 1, 16, 16), torch.tensor([3, 700]))
    assert contiguous == []
