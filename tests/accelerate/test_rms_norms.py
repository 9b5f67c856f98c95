"""RMSNorm over the channels: which modules are one, and what becomes of them in whole networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.accelerate.rms_norms import FusedRMSNorm

from ..third_party.lucidrains import import_package
from . import originals as o


class ChanRMSNorm(nn.Module):
    """imagen-pytorch's, whose weight has no dimension for the batch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.scale * self.gamma


class AddsEpsNorm(ChanRMSNorm):
    """The mean of squares with an eps inside the root: the same but for small x."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.gamma


class LastDimensionNorm(ChanRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale * self.gamma


class OffsetWeightNorm(ChanRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.scale * (self.gamma + 1)


class CentredNorm(ChanRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x - x.mean(1, keepdim=True), dim=1) * self.scale * self.gamma


@pytest.mark.parametrize("cls", [o.RMSNorm, ChanRMSNorm])
def test_found_by_what_it_computes(cls: type[nn.Module]) -> None:
    norm = cls(12)
    nn.init.normal_(next(norm.parameters()))
    x = torch.randn(2, 12, 5, 5)
    expected = norm(x)
    model = df.accelerate(nn.Sequential(norm))
    assert df.acceleration_report(model).fused == ["0"]
    assert isinstance(norm, FusedRMSNorm)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    df.restore(model)
    assert type(norm) is cls
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("cls", [AddsEpsNorm, LastDimensionNorm, OffsetWeightNorm, CentredNorm])
def test_what_computes_something_else_is_left_alone(cls: type[nn.Module]) -> None:
    model = df.accelerate(nn.Sequential(cls(3)))
    assert "neither a GroupNorm nor an RMSNorm" in df.acceleration_report(model).skipped["0"]


def test_with_a_silu_behind_it_and_in_a_block() -> None:
    blocks = nn.ModuleList([nn.Sequential(o.RMSNorm(8), nn.SiLU()), o.ImagenResnetBlock(8)])
    report = df.acceleration_report(df.accelerate(blocks))
    assert report.patterns["0.0"] == "RMSNorm + SiLU"
    assert "1.rms" in report.fused


@pytest.mark.parametrize("channels_last", [False, True])
def test_lucidrains_network(channels_last: bool) -> None:
    torch.manual_seed(0)
    model = import_package().Unet(16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, full_attn=(False, True)).eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 900])
    plain = model(x, t)
    expected = torch.autograd.grad(plain.square().sum(), list(model.parameters()))
    report = df.acceleration_report(df.accelerate(model, channels_last=channels_last))
    assert not report.skipped
    assert sum("scale" in pattern for pattern in report.patterns.values()) > 8, report
    y = model(x, t)
    got = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    assert (y - plain).abs().max() < 1e-5 * plain.abs().max()
    for (name, _), ours, theirs in zip(model.named_parameters(), got, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max(), name
    df.restore(model)
    assert torch.equal(model(x, t), plain)


def test_the_original_runs_where_the_result_would_be_of_another_dtype() -> None:
    norm = o.RMSNorm(8)
    df.accelerate(nn.Sequential(norm))
    x = torch.randn(2, 8, 4, 4)
    assert norm.fused(x) is not None
    assert norm.fused(x.bfloat16()) is None
    assert norm(x.bfloat16()).dtype == torch.float32
    assert norm.fused(x.double()) is None
    with torch.autocast("cpu"):
        assert norm.fused(x) is None
    norm.bfloat16()
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_an_embedding_is_added_before() -> None:
    norm = o.RMSNorm(8)
    df.accelerate(nn.Sequential(norm))
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 1, 1)
    torch.testing.assert_close(norm.fused(x, True, embedding=embedding), F.silu(norm(x + embedding)))
