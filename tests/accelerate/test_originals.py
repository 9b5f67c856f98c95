"""Accelerated models beside the originals: outputs, gradients, and everything that must not change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import diffusers
import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.accelerate import acceleration_report

from . import originals as o


class _Wrapped(nn.Module):
    """A block in the place of a U-Net."""

    def __init__(self, block: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.block = block

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.block(self.conv_in(x), emb)


class _Timestep(nn.Module):
    """A diffusers model behind the same two arguments."""

    def __init__(self, unet: nn.Module, **kwargs: Tensor) -> None:
        super().__init__()
        self.unet, self.kwargs = unet, kwargs

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.unet(x, torch.tensor([3, 700]), **self.kwargs).sample


def _unet2d(**options: object) -> nn.Module:
    return _Timestep(
        diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **options,
        )
    )


def _unet_condition() -> nn.Module:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return _Timestep(unet, encoder_hidden_states=torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(5)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "guided-scale_shift": lambda: o.GuidedUNet(scale_shift=True),
    "guided-add": lambda: o.GuidedUNet(scale_shift=False),
    "guided-old_silu": lambda: o.GuidedUNet(scale_shift=True, act=o.OldSiLU),
    "guided-checkpoint": lambda: o.GuidedUNet(scale_shift=True, checkpointed=True),
    "glide-scale_shift": lambda: _Wrapped(o.GlideResBlock(8, scale_shift=True)),
    "glide-add": lambda: _Wrapped(o.GlideResBlock(8, scale_shift=False)),
    "compvis": o.CompVisEncoder,
    "article": lambda: _Wrapped(o.ArticleResnetBlock(8, 16)),
    "imagen": lambda: _Wrapped(o.ImagenResnetBlock(8)),
    "score": lambda: _Wrapped(o.ScoreResnetBlock(8, nn.SiLU())),
    "diffusers": _unet2d,
    "diffusers-scale_shift": lambda: _unet2d(resnet_time_scale_shift="scale_shift"),
    "diffusers-condition": _unet_condition,
}

# How often each pattern runs in one forward.
EXPECTED: dict[str, dict[str, int]] = {
    "guided-scale_shift": {"norm+silu": 4, "norm+modulation+silu": 3, "norm": 1},
    "guided-add": {"norm+silu": 4, "embedding+norm+silu": 3, "norm": 1},
    "guided-old_silu": {"norm+silu": 4, "norm+modulation+silu": 3, "norm": 1},
    "guided-checkpoint": {"norm+silu": 4, "norm+modulation+silu": 3, "norm": 1},
    "glide-scale_shift": {"norm+silu": 1, "norm+modulation+silu": 1},
    "glide-add": {"norm+silu": 2},
    "compvis": {"norm+silu": 3, "embedding+norm+silu": 2, "norm": 1},
    "article": {"norm+modulation+silu": 1, "norm+silu": 1},
    "imagen": {"norm+modulation+silu": 1, "norm+silu": 1},
    "score": {"norm+silu": 2},
    "diffusers": {"norm+silu": 9, "embedding+norm+silu": 8, "norm": 4},
    "diffusers-scale_shift": {"norm+silu": 9, "norm+modulation+silu": 8, "norm": 3},
    "diffusers-condition": {"norm+silu": 9, "embedding+norm+silu": 8, "norm": 4},
}

every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> nn.Module:
    return o.fill(MODELS[name]())


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, 3, 8, 8, generator=generator, dtype=dtype), torch.randn(
        2, o.EMBEDDING, generator=generator, dtype=dtype
    )


def assert_close(got: Tensor, want: Tensor, factor: float = 1e-5, floor: float = 0.0) -> None:
    """To a few roundings of the largest value, since a norm mixes a whole group; or of `floor`, if that is larger."""
    torch.testing.assert_close(got, want, rtol=0, atol=factor * max(floor, want.abs().max().item()))


@every_model
def test_same_output_and_restored_bit_for_bit(name: str, passes: list[str]) -> None:
    model = make(name)
    x, emb = inputs()
    with torch.no_grad():
        want = model(x, emb)
        assert df.accelerate(model) is model
        got = model(x, emb)
        assert {kind: passes.count(kind) for kind in passes} == EXPECTED[name]
        assert_close(got, want)
        assert df.restore(model) is model
        passes.clear()
        assert torch.equal(model(x, emb), want)
    assert passes == []


@every_model
def test_same_gradients(name: str) -> None:
    model = make(name).train()
    x, emb = inputs()
    x.requires_grad_()
    emb.requires_grad_()
    results = []
    for _ in range(2):
        torch.manual_seed(1)  # dropout
        out = model(x, emb)
        leaves = [x, emb, *model.parameters()]
        gradients = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
        results.append([out, *gradients])
        df.accelerate(model)
    plain, fused = results
    # The bias of an attention's keys has a gradient of zero, which each computes to its own rounding.
    floor = 1e-3 * max(g.abs().max().item() for g in plain if g is not None)
    names = ["output", "x", "emb", *(n for n, _ in model.named_parameters())]
    for label, want, got in zip(names, plain, fused, strict=True):
        assert (want is None) == (got is None), label
        if want is not None:
            assert_close(got, want, 5e-5, floor)


@every_model
def test_nothing_else_changes(name: str) -> None:
    model = make(name)
    before = {
        "modules": [(n, id(m), m.training) for n, m in model.named_modules()],
        "parameters": [(n, id(p), p.data_ptr()) for n, p in model.named_parameters()],
        "keys": list(model.state_dict()),
        "repr": repr(model),
        "classes": [type(m) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }
    df.accelerate(model)
    assert [(n, id(m), m.training) for n, m in model.named_modules()] == before["modules"]
    assert [(n, id(p), p.data_ptr()) for n, p in model.named_parameters()] == before["parameters"]
    assert list(model.state_dict()) == before["keys"]
    assert all(isinstance(m, c) for m, c in zip(model.modules(), before["classes"], strict=True))
    assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in before["classes"]]
    df.restore(model)
    assert [type(m) for m in model.modules()] == before["classes"]
    assert [sorted(vars(m)) for m in model.modules()] == before["attributes"]
    assert repr(model) == before["repr"]


@every_model
def test_twice_is_once(name: str) -> None:
    model = df.accelerate(make(name))
    classes = [type(m) for m in model.modules()]
    report = acceleration_report(model)
    df.accelerate(model)
    assert [type(m) for m in model.modules()] == classes
    assert acceleration_report(model) == report
    df.restore(model)
    assert not any("original_class" in vars(type(m)) for m in model.modules())


@every_model
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_accelerated(name: str, how: str, passes: list[str]) -> None:
    model = df.accelerate(make(name))
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    x, emb = inputs()
    with torch.no_grad():
        want = model(x, emb)
        first = list(passes)
        passes.clear()
        assert torch.equal(twin(x, emb), want)
    assert passes == first
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert acceleration_report(twin) == acceleration_report(model)
    df.restore(twin)
    assert [type(m) for m in df.restore(model).modules()] == [type(m) for m in twin.modules()]


@every_model
def test_bfloat16(name: str, passes: list[str]) -> None:
    model = make(name).bfloat16()
    if isinstance(model, _Timestep) and model.kwargs:
        model.kwargs = {k: v.bfloat16() for k, v in model.kwargs.items()}
    if "guided" in name or "glide" in name:
        # As their own convert_to_fp16: the norms keep float32 weights.
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.float()
    exact = o.fill(MODELS[name]())
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    x, emb = inputs(torch.bfloat16)
    with torch.no_grad():
        want = model(x, emb)
        reference = exact(x.float(), emb.float())
        got = df.accelerate(model)(x, emb)
    assert passes
    assert got.dtype == want.dtype
    # Fewer roundings than the original has, which is why the reference is neither of the two.
    scale = reference.abs().max()
    error, error_before = ((y.float() - reference).abs().max() / scale for y in (got, want))
    assert error <= 1.5 * error_before + 2**-8
