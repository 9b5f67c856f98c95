"""The module around the fused norm, and the plain twin of a model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast.nn import EagerGroupNormSiLU, GroupNormSiLU, UNet, eager_copy


def filled(activation: str | None = "silu", channels: int = 6) -> GroupNormSiLU:
    norm = GroupNormSiLU(3, channels, eps=1e-4, activation=activation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels, generator=generator))
        norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm


@pytest.mark.parametrize("activation", ["silu", None])
def test_is_group_norm_then_silu(activation: str | None) -> None:
    norm = filled(activation)
    x = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(1))
    expected = F.group_norm(x.double(), 3, norm.weight.double(), norm.bias.double(), 1e-4)
    if activation == "silu":
        expected = F.silu(expected)
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [("embedding",), ("scale", "shift"), ("embedding", "scale", "shift")], ids="-".join)
def test_modulation_equals_the_eager_twin(given: tuple[str, ...]) -> None:
    norm = filled()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 6, 5, 4, generator=generator, requires_grad=True)
    extra = {name: torch.randn(2, 6, generator=generator, requires_grad=True) for name in given}
    leaves = [x, *extra.values(), norm.weight, norm.bias]
    upstream = torch.randn(2, 6, 5, 4, generator=generator)
    results = []
    for module in (norm, eager_copy(norm)):
        leaves[-2:] = [module.weight, module.bias]
        out = module(x, **extra)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for fused, plain in zip(*results, strict=True):
        # Both round in float32, sums of up to 40 terms in the gradients.
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_state_dict_is_group_norms() -> None:
    plain = nn.GroupNorm(3, 6)
    fused = filled()
    plain.load_state_dict(fused.state_dict())
    fused.load_state_dict(plain.state_dict())
    assert list(fused.state_dict()) == ["weight", "bias"]


def test_repr() -> None:
    assert repr(filled()).startswith("GroupNormSiLU(3, 6, eps=0.0001, affine=True")
    assert repr(filled(None)).endswith("activation=None)")


def test_rejects() -> None:
    with pytest.raises(ValueError, match="multiple of num_groups, got 6 and 4"):
        GroupNormSiLU(4, 6)
    with pytest.raises(ValueError, match="activation"):
        GroupNormSiLU(3, 6, activation="relu")


@pytest.mark.parametrize("time_embedding", ["add", "scale_shift"])
def test_eager_copy_of_a_unet(time_embedding: str) -> None:
    torch.manual_seed(0)
    small = {"in_channels": 1, "base_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "num_groups": 4}
    model = UNet(**small, time_embedding=time_embedding).requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    twin = eager_copy(model)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 800])
    torch.testing.assert_close(twin(x, t), model(x, t), rtol=1e-4, atol=1e-5)
    assert not any(type(m) is GroupNormSiLU for m in twin.modules())
    assert any(type(m) is EagerGroupNormSiLU for m in twin.modules())
    assert any(type(m) is GroupNormSiLU for m in model.modules())
    # Copies, not the model's own parameters.
    twin.conv_out.weight.zero_()
    assert model.conv_out.weight.any()
