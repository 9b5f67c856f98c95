"""Convolutions that compute their weight: their forward is the author's, its conv2d is the fused op's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from annotated import WeightStandardizedConv2d
from einops import reduce
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.accelerate import acceleration_report, computed, standardized
from ddpm_fast.ops.conv import conv3x3
from tests.ops.common import needs_vectors

pytestmark = needs_vectors


class Lucidrains(nn.Conv2d):
    """As lucidrains' packages have had it, and the article after them."""

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-5 if x.dtype == torch.float32 else 1e-3
        weight = self.weight
        mean = reduce(weight, "o ... -> o 1 1 1", "mean")
        var = reduce(weight, "o ... -> o 1 1 1", partial(torch.var, unbiased=False))
        normalized_weight = (weight - mean) * (var + eps).rsqrt()
        return F.conv2d(x, normalized_weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ByKeyword(nn.Conv2d):
    """By torch's other name, and only now and then."""

    def forward(self, x: Tensor, halved: bool = False) -> Tensor:
        if halved:
            return torch.conv2d(x, self.weight, bias=self.bias, padding=(1, 1), stride=2)
        return torch.conv2d(x, 0.5 * self.weight, bias=self.bias, padding=1)


class Divided(nn.Conv2d):
    """The article's, but for an operator."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = self.weight.var(dim=(1, 2, 3), unbiased=False, keepdim=True)
        weight = (self.weight - mean) / (variance + 1e-5).rsqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


STANDARDIZED = {"article": WeightStandardizedConv2d, "lucidrains": Lucidrains}
KINDS = {**STANDARDIZED, "by_keyword": ByKeyword, "divided": Divided}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_standardized_kind = pytest.mark.parametrize("kind", STANDARDIZED)


def make(kind: str) -> nn.Conv2d:
    return KINDS[kind](24, 40, 3, padding=1).requires_grad_(False)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The mode of each call of the fused op."""
    seen: list[str] = []
    op = conv3x3

    def spy(*args: Any, mode: str) -> Tensor:
        seen.append(mode)
        return op(*args, mode=mode)

    monkeypatch.setattr(computed, "conv3x3", spy)
    monkeypatch.setattr(standardized, "conv3x3", spy)
    return seen


@pytest.fixture
def standardizations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that were standardised to be kept."""
    seen: list[Tensor] = []
    prepare = standardized._prepared

    def spy(weight: Tensor) -> Any:
        seen.append(weight.clone())
        return prepare(weight)

    monkeypatch.setattr(standardized, "_prepared", spy)
    return seen


@every_kind
@pytest.mark.parametrize("mode", ["exact", "strict", "fast"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_op_is_called_with_the_weight_that_was_computed(
    kind: str, mode: str, layout: torch.memory_format, modes: list[str]
) -> None:
    conv, x = make(kind), torch.randn(2, 24, 10, 9).contiguous(memory_format=layout)
    want = conv(x)
    keys = list(conv.state_dict())
    df.accelerate(conv, conv=mode)
    got = conv(x)
    assert modes == [mode]
    assert got.stride() == want.stride()
    # A layer's own error, of either convolution (tests/ops/test_conv.py).
    assert (got - want).norm() <= 2e-6 * want.norm()
    assert list(conv.state_dict()) == keys
    assert acceleration_report(conv).convs_fused[""].startswith(f"{mode}, F(")
    conv.weight.mul_(torch.linspace(0.5, 2, 24)[:, None, None])
    changed = conv(x)
    assert (changed - df.restore(conv)(x)).norm() <= 2e-6 * want.norm()
    assert type(conv) is KINDS[kind]
    assert modes == [mode] * 2


def test_another_call_in_the_same_forward_is_torchs(modes: list[str]) -> None:
    conv, x = make("by_keyword"), torch.randn(1, 24, 8, 8)
    want = conv(x, halved=True)
    assert torch.equal(df.accelerate(conv)(x, halved=True), want)
    assert modes == []


def test_a_weight_computed_in_inference_mode_is_taken(modes: list[str]) -> None:
    conv, x = df.accelerate(make("article")), torch.randn(1, 24, 8, 8)
    want = conv(x)
    with torch.inference_mode():
        assert torch.equal(conv(x), want)
    assert modes == ["exact"] * 2


@every_standardized_kind
def test_a_standardised_weight_is_kept_until_the_parameter_changes(kind: str, standardizations: list[Tensor]) -> None:
    conv, x = df.accelerate(make(kind)), torch.randn(1, 24, 8, 8)
    with torch.inference_mode():
        in_inference_mode = conv(x)
    assert torch.equal(conv(x), in_inference_mode)
    assert len(standardizations) == 1
    other = make(kind)
    conv.load_state_dict(other.state_dict())
    want = other(x)
    assert (conv(x) - want).norm() <= 2e-6 * want.norm()
    optimizer = torch.optim.SGD([conv.weight], lr=0.1, fused=True)
    conv.weight.grad = torch.randn_like(conv.weight)
    optimizer.step()
    want = df.accelerate(make(kind)).eval()
    want.load_state_dict(conv.state_dict())
    assert torch.equal(conv(x), want(x))
    assert len(standardizations) == 4  # the one of `want` among them


@every_standardized_kind
def test_a_parameter_made_in_inference_mode_is_standardised_in_every_call(
    kind: str, standardizations: list[Tensor], modes: list[str]
) -> None:
    with torch.inference_mode():
        conv, x = df.accelerate(make(kind)), torch.randn(1, 24, 8, 8)
        conv(x)
        conv.weight.mul_(torch.linspace(0.5, 2, 24)[:, None, None])
        got, want = conv(x), df.restore(conv)(x)
    assert (got - want).norm() <= 2e-6 * want.norm()
    assert modes == ["exact"] * 2
    assert standardizations == []


def test_a_forward_that_differs_in_an_operator_is_not_taken_for_the_articles(standardizations: list[Tensor]) -> None:
    conv, x = make("divided"), torch.randn(1, 24, 8, 8)
    want = conv(x)
    got = df.accelerate(conv)(x)
    assert (got - want).norm() <= 2e-6 * want.norm()
    assert standardizations == []


@every_kind
def test_gradients_are_torchs_bit_for_bit(kind: str, modes: list[str]) -> None:
    conv = make(kind).requires_grad_(True)
    x = torch.randn(2, 24, 6, 6)
    want = torch.autograd.grad(conv(x).square().sum(), list(conv.parameters()))
    got = torch.autograd.grad(df.accelerate(conv)(x).square().sum(), list(conv.parameters()))
    assert all(map(torch.equal, got, want))
    assert modes == []


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@every_kind
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_accelerated(kind: str, how: str, modes: list[str]) -> None:
    conv, x = df.accelerate(make(kind), conv="strict"), torch.randn(1, 24, 8, 8)
    want = conv(x)
    twin = COPIES[how](conv)
    assert torch.equal(twin(x), want)
    assert modes == ["strict"] * 2
    assert acceleration_report(twin) == acceleration_report(conv)
    assert type(df.restore(twin)) is KINDS[kind]


def test_compiles_as_one_graph() -> None:
    conv, x = make("article"), torch.randn(1, 24, 8, 8)
    want = conv(x)
    torch.testing.assert_close(torch.compile(df.accelerate(conv), backend="eager", fullgraph=True)(x), want)


def test_a_forward_without_torchs_conv2d_is_named() -> None:
    class Hidden(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    report = acceleration_report(df.accelerate(Hidden(24, 40, 3, padding=1)))
    assert report.convs_skipped == {"": "it has a forward of its own, in which no call of torch's conv2d can be seen"}
