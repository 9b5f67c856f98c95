"""Self-attention: which kernel computes it, and the folded projections of one head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast.nn import eager_copy
from ddpm_fast.nn.blocks import SelfAttention

CL = torch.channels_last


class Calls(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def layer(channels: int = 64, heads: int = 1) -> SelfAttention:
    made = SelfAttention(channels, num_heads=heads, num_groups=4)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=channels**-0.5)
    return made.requires_grad_(False)


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("heads", [1, 2])
def test_never_on_the_slow_path_by_accident(heads: int, channels_last: bool, grad: bool) -> None:
    x = torch.randn(2, 64, 7, 7).contiguous(memory_format=CL if channels_last else torch.contiguous_format)
    with Calls() as calls, torch.set_grad_enabled(grad):
        layer(heads=heads).requires_grad_(grad)(x)
    assert calls.names.count("_scaled_dot_product_flash_attention_for_cpu") == 1
    assert not {"bmm", "_softmax", "_scaled_dot_product_attention_math"} & set(calls.names)


@pytest.mark.parametrize(("channels", "side"), [(64, 7), (256, 16), (96, 5), (256, 4)])
def test_folded_projections_err_less(channels: int, side: int) -> None:
    ours, eagers = 0.0, 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        module = layer(channels)
        x = torch.randn(2, channels, side, side).contiguous(memory_format=CL)
        plain = eager_copy(module)
        assert not plain.folds
        exact = copy.deepcopy(plain).double()(x.double())
        ours += rms(module(x) - exact)
        eagers += rms(plain(x) - exact)
        assert not torch.equal(module(x), plain(x))
    assert ours <= eagers


def test_where_it_cannot_fold_it_is_the_four_projections() -> None:
    module = layer()
    plain = eager_copy(module)
    module.norm, plain.norm = nn.Identity(), nn.Identity()
    x = torch.randn(2, 64, 4, 4)
    assert torch.equal(module.double()(x.double()), plain.double()(x.double()))
    module.float()
    plain.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), plain(x))
    assert torch.equal(torch.func.vmap(module)(x[:, None]), torch.func.vmap(plain)(x[:, None]))
    for made in (module, plain):
        made.requires_grad_(True)
        made(x).square().sum().backward()
    assert torch.equal(module.qkv.weight.grad, plain.qkv.weight.grad)


@torch.no_grad()
def test_new_weights_are_seen() -> None:
    module, other = layer(), layer()
    x = torch.randn(2, 64, 4, 4)
    module(x)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))
    before = module(x)
    for name in ("qkv", "project"):
        for parameter in getattr(module, name).parameters():
            parameter.mul_(2)
            after = module(x)
            assert not torch.equal(after, before)
            before = after


@torch.no_grad()
def test_copies_fold_weights_of_their_own() -> None:
    module = layer()
    x = torch.randn(2, 64, 4, 4)
    want = module(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), want)
    twin.qkv.weight.zero_()
    assert not torch.equal(twin(x), want)
    assert torch.equal(module(x), want)
    assert list(module.state_dict()) == [
        "norm.weight", "norm.bias", "qkv.weight", "qkv.bias", "project.weight", "project.bias",
    ]  # fmt: skip
