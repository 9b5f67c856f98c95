"""Hooks see what they saw before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.accelerate import acceleration_report

from . import originals as o


class Pair(nn.Module):
    """A norm and an activation, called in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.conv = nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = self.act(h)
        return self.conv(h)


def sequential() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1))


both_kinds = pytest.mark.parametrize("make", [Pair, sequential], ids=["block", "sequential"])


def children(model: nn.Module) -> tuple[str, nn.Module, nn.Module]:
    (name, norm), (_, act), _ = model.named_children()
    return name, norm, act


def recorder(seen: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
        seen.extend(t.detach().clone() for t in (*args, *output))

    return hook


@both_kinds
@pytest.mark.parametrize("where", ["norm", "act"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_between_the_two_is_a_reason_to_skip(make, where: str, kind: str) -> None:
    model = o.fill(make())
    name, norm, act = children(model)
    watched = {"norm": norm, "act": act}[where]
    getattr(watched, f"register_{kind}_hook")(lambda *args: None)
    df.accelerate(model)
    report = acceleration_report(model)
    assert report.fused == []
    assert list(report.skipped) == [name]
    watched_name = next(n for n, m in model.named_modules() if m is watched)
    assert f"hook on {watched_name!r}" in report.skipped[name]
    assert type(norm) is nn.GroupNorm


@both_kinds
def test_hooks_of_before_and_after_see_the_same(make, passes: list[str]) -> None:
    model = o.fill(make())
    x = torch.randn(2, 4, 3, 3)
    _, norm, act = children(model)
    seen: list[list[Tensor]] = []
    want = model(x)
    for when in ("original", "accelerated"):
        if when == "accelerated":
            df.accelerate(model)
            assert torch.allclose(model(x), want, atol=1e-6)
            assert passes == ["norm+silu"]
        now: list[Tensor] = []
        handles = [m.register_forward_hook(recorder(now)) for m in (norm, act, model)]
        model(x)
        for handle in handles:
            handle.remove()
        seen.append(now)
    # Registered after accelerate, they separate the pair again; the norm alone stays fused.
    assert passes == ["norm+silu", "norm"]
    for before, after in zip(*seen, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    model(x)
    assert passes[-1] == "norm+silu"


@both_kinds
def test_a_hook_that_removes_itself(make) -> None:
    """It is gone when the activation is reached, which must be applied all the same."""
    model = o.fill(make())
    x = torch.randn(2, 4, 3, 3)
    want = model(x)
    df.accelerate(model)
    _, norm, _ = children(model)
    handle = norm.register_forward_hook(lambda *args: handle.remove())
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)


@both_kinds
def test_global_hooks(make) -> None:
    model = df.accelerate(o.fill(make()))
    _, norm, act = children(model)
    called: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: called.append(module))
    try:
        model(torch.randn(2, 4, 3, 3))
    finally:
        handle.remove()
    assert norm in called
    assert act in called


def test_a_hook_on_a_norm_alone_takes_nothing_away(passes: list[str]) -> None:
    norm = nn.GroupNorm(2, 4)
    seen: list[Tensor] = []
    norm.register_forward_hook(recorder(seen))
    model = df.accelerate(nn.Sequential(norm, nn.ReLU()))
    assert acceleration_report(model).fused == ["0"]
    x = torch.randn(2, 4, 3, 3)
    model(x)
    assert passes == ["norm"]
    torch.testing.assert_close(seen[1], nn.functional.group_norm(x, 2, norm.weight, norm.bias), rtol=1e-5, atol=1e-6)


def test_hooks_survive_restore() -> None:
    model = df.accelerate(o.fill(Pair()))
    seen: list[Tensor] = []
    model.act.register_forward_hook(recorder(seen))
    df.restore(model)(torch.randn(2, 4, 3, 3))
    assert len(seen) == 2


def test_hooks_elsewhere_do_not_matter(passes: list[str]) -> None:
    model = o.fill(Pair())
    seen: list[Tensor] = []
    model.conv.register_forward_hook(recorder(seen))
    model.register_forward_pre_hook(recorder(seen))
    df.accelerate(model)(torch.randn(2, 4, 3, 3))
    assert passes == ["norm+silu"]
    assert len(seen) == 3
