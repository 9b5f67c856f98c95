"""Changes of resolution in accelerated models: which go into the convolution behind them, and when they do not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from einops.layers.torch import Rearrange
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.accelerate import acceleration_report, convolutions, fused
from tests.ops.common import needs_vectors

from . import originals as o

CL = torch.channels_last


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of the fused op whether the image is doubled in it."""
    seen: list[bool] = []
    op = convolutions.conv3x3

    def spy(*tensors: Any, upsample: bool, mode: str) -> Tensor:
        seen.append(upsample)
        return op(*tensors, upsample=upsample, mode=mode)

    monkeypatch.setattr(convolutions, "conv3x3", spy)
    return seen


def sequential(*, scale_factor: Any = 2, mode: str = "nearest", size: Any = None, channels: int = 20) -> nn.Sequential:
    doubling = nn.Upsample(size, None if size is not None else scale_factor, mode)
    return nn.Sequential(doubling, nn.Conv2d(channels, 24, 3, padding=1), nn.SiLU())


FOLDED: dict[str, Callable[[], nn.Module]] = {
    "Sequential": sequential,
    "Sequential, a factor for each side": lambda: sequential(scale_factor=(2.0, 2.0)),
    "diffusers": lambda: Upsample2D(20, use_conv=True, out_channels=24),
    "diffusers, the older name": lambda: Upsample2D(20, use_conv=True, out_channels=24, name="Conv2d_0"),
}
ORIGINAL: dict[str, Callable[[], nn.Module]] = {
    "bilinear": lambda: sequential(mode="bilinear"),
    "nearest-exact": lambda: sequential(mode="nearest-exact"),
    "threefold": lambda: sequential(scale_factor=3),
    "to a size": lambda: sequential(size=(10, 14)),
    "few channels": lambda: sequential(channels=8),
    "diffusers, transposed": lambda: Upsample2D(20, use_conv_transpose=True),
    "diffusers, no convolution": lambda: Upsample2D(20),
    "diffusers, a norm": lambda: Upsample2D(20, use_conv=True, norm_type="ln_norm", eps=1e-5, elementwise_affine=True),
    "diffusers, not doubled": lambda: Upsample2D(20, use_conv=True, interpolate=False),
}


def image(layout: torch.memory_format = torch.contiguous_format, channels: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, channels, 5, 7, generator=generator).contiguous(memory_format=layout)


def rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


@needs_vectors
@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", FOLDED)
@torch.no_grad()
def test_goes_into_the_convolution(name: str, layout: torch.memory_format, calls: list[bool]) -> None:
    model = o.fill(FOLDED[name]())
    keys, x = list(model.state_dict()), image(layout)
    want, exact = model(x), copy.deepcopy(model).double()(x.double())
    got = df.accelerate(model)(x)
    assert calls == [True]
    assert got.is_contiguous(memory_format=layout)
    assert rms(got - exact) <= rms(want - exact)
    assert list(model.state_dict()) == keys
    assert len(acceleration_report(model).convs_fused) == 1
    calls.clear()
    assert torch.equal(df.restore(model)(x), want)
    assert calls == []


@pytest.mark.parametrize("name", ORIGINAL)
@torch.no_grad()
def test_what_is_no_doubling_before_a_fused_convolution_stays(name: str, calls: list[bool]) -> None:
    model = o.fill(ORIGINAL[name]())
    x = image(channels=8 if name == "few channels" else 20)
    want = model(x)
    torch.testing.assert_close(df.accelerate(model)(x), want, rtol=1e-5, atol=1e-5)
    assert True not in calls


@needs_vectors
@pytest.mark.parametrize("name", FOLDED)
@torch.no_grad()
def test_hooks_see_the_large_image(name: str, calls: list[bool]) -> None:
    model = df.accelerate(o.fill(FOLDED[name]()))
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    seen: list[torch.Size] = []
    conv.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    model(image())
    assert seen == [(2, 20, 10, 14)]
    assert calls == [False]


@needs_vectors
@torch.no_grad()
def test_a_hook_on_the_doubling_and_a_slice_of_it(calls: list[bool]) -> None:
    model = df.accelerate(o.fill(sequential()))
    large = model[:1](image())
    assert large.shape == (2, 20, 10, 14)
    torch.testing.assert_close(model[1:](large), model(image()), rtol=1e-5, atol=1e-6)
    assert calls == [False, True]
    model[0].register_forward_hook(lambda m, args, output: output * 0)
    calls.clear()
    torch.testing.assert_close(model(image()), model[1:](large * 0))
    assert calls == [False, False]


@needs_vectors
@pytest.mark.parametrize("name", FOLDED)
def test_gradients_other_dtypes_and_sizes_are_the_originals(name: str, calls: list[bool]) -> None:
    model = o.fill(FOLDED[name]())
    x = image()
    with torch.no_grad():
        want64 = copy.deepcopy(model).double()(x.double())
    wants = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    df.accelerate(model)
    grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, wants, strict=True))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).double()(x.double()), want64)
        assert calls == []
        if isinstance(model, Upsample2D):
            assert model(x, output_size=(9, 13)).shape == model(x, (9, 13)).shape == (2, 24, 9, 13)
            assert model(x, None).shape == (2, 24, 10, 14)
            assert calls == [False, False, True]


@needs_vectors
@pytest.mark.parametrize("name", FOLDED)
@torch.no_grad()
def test_copies_are_accelerated(name: str, calls: list[bool]) -> None:
    model, x = df.accelerate(o.fill(FOLDED[name]())), image()
    want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(twin(x), want)
        assert calls == [True]
        assert type(df.restore(twin)) is type(FOLDED[name]())


# ---- Pixel-unshuffle ----

UNSHUFFLE = "b c (h p1) (w p2) -> b (c p1 p2) h w"
UNSHUFFLED: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.PixelUnshuffle(2),
    "torch, by 4": lambda: nn.PixelUnshuffle(4),
    "einops": lambda: Rearrange(UNSHUFFLE, p1=2, p2=2),
}


def downsample(unshuffle: nn.Module, **options: Any) -> nn.Sequential:
    factor = getattr(unshuffle, "downscale_factor", 2)
    return o.fill(nn.Sequential(unshuffle, nn.Conv2d(6 * factor**2, 10, 1, **options)))


@pytest.fixture
def strides(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The strides of the convolutions that stand for an unshuffled image's."""
    seen: list[int] = []
    unshuffled = fused._unshuffled

    def spy(x: Tensor, factor: int, conv: nn.Module) -> Tensor | None:
        y = unshuffled(x, factor, conv)
        if y is not None:
            seen.append(factor)
        return y

    monkeypatch.setattr(fused, "_unshuffled", spy)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", UNSHUFFLED)
def test_an_unshuffle_goes_into_the_projection(
    name: str, layout: torch.memory_format, bias: bool, strides: list[int]
) -> None:
    model = downsample(UNSHUFFLED[name](), bias=bias)
    x = torch.randn(2, 6, 8, 12).contiguous(memory_format=layout)
    want = model(x)
    wants = torch.autograd.grad(want.square().sum(), list(model.parameters()))
    df.accelerate(model, channels_last=layout == CL)
    got = model(x)
    assert strides == [4 if name == "torch, by 4" else 2]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=layout)
    grads = torch.autograd.grad(got.square().sum(), list(model.parameters()))
    for ours, theirs in zip(grads, wants, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert torch.equal(df.restore(model)(x), want)


UNSHUFFLES_LEFT: dict[str, Callable[[], nn.Module]] = {
    "another order": lambda: downsample(Rearrange("b c (h p1) (w p2) -> b (p1 p2 c) h w", p1=2, p2=2)),
    "two factors": lambda: nn.Sequential(Rearrange(UNSHUFFLE, p1=2, p2=4), o.fill(nn.Conv2d(48, 10, 1))),
    "a shuffle": lambda: nn.Sequential(nn.PixelShuffle(1), o.fill(nn.Conv2d(6, 10, 1))),
    "a larger kernel": lambda: nn.Sequential(nn.PixelUnshuffle(2), o.fill(nn.Conv2d(24, 10, 3, padding=1))),
    "groups": lambda: downsample(nn.PixelUnshuffle(2), groups=2),
    "a stride": lambda: downsample(nn.PixelUnshuffle(2), stride=2),
}


@pytest.mark.parametrize("name", UNSHUFFLES_LEFT)
@torch.no_grad()
def test_other_downsamplings_stay(name: str, strides: list[int]) -> None:
    model = UNSHUFFLES_LEFT[name]()
    x = torch.randn(2, 6, 8, 12)
    want = model(x)
    # The 3x3 convolution may be on the fused op.
    torch.testing.assert_close(df.accelerate(model)(x), want, rtol=1e-5, atol=1e-5)
    assert strides == []


@pytest.mark.parametrize("which", [0, 1])
@torch.no_grad()
def test_hooks_around_the_unshuffled_image(which: int, strides: list[int]) -> None:
    model = df.accelerate(downsample(nn.PixelUnshuffle(2)))
    seen: list[torch.Size] = []
    model[which].register_forward_hook(lambda m, args, output: seen.append(output.shape))
    model(torch.randn(2, 6, 8, 12))
    assert seen == [(2, (24, 10)[which], 4, 6)]
    assert strides == []


def test_images_that_cannot_be_unshuffled_are_torchs_error(strides: list[int]) -> None:
    model = df.accelerate(downsample(nn.PixelUnshuffle(2)))
    for shape in ((2, 6, 7, 12), (2, 5, 8, 12)):
        with pytest.raises(RuntimeError):
            model(torch.randn(shape))
    assert model(torch.randn(6, 8, 12)).shape == (10, 4, 6)
    assert strides == []
