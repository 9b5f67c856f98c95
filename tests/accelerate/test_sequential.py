"""Norms and activations side by side in Sequentials, sliced, shared and iterated over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df

from . import originals as o


def layers() -> nn.Sequential:
    return o.fill(
        nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.GroupNorm(4, 4), nn.Dropout(0.0), nn.SiLU())
    )


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 3, 5)


def test_pairs_are_one_pass(x: Tensor, passes: list[str]) -> None:
    model = layers()
    want = model(x)
    torch.testing.assert_close(df.accelerate(model)(x), want, rtol=1e-5, atol=1e-6)
    # Behind the second norm is a dropout.
    assert passes == ["norm+silu", "norm"]
    assert len(model) == 6
    assert isinstance(model[1], nn.SiLU)


@pytest.mark.parametrize("cut", range(7))
def test_slices_anywhere_compose(cut: int, x: Tensor) -> None:
    model = layers()
    want = model(x)
    parts = [model[:cut](x)]
    df.accelerate(model)
    first, rest = model[:cut], model[cut:]
    assert (len(first), len(rest)) == (cut, 6 - cut)
    torch.testing.assert_close(first(x), parts[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rest(first(x)), want, rtol=1e-5, atol=1e-6)


def test_one_by_one(x: Tensor, passes: list[str]) -> None:
    model = layers()
    want, h = [], x
    for layer in model:
        h = layer(h)
        want.append(h)
    df.accelerate(model)
    h = x
    for layer, expected in zip(model, want, strict=True):
        h = layer(h)
        torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-6)
    assert passes == ["norm", "norm"]


def test_one_activation_for_all(x: Tensor, passes: list[str]) -> None:
    """A shared SiLU is still one where no norm comes before it."""
    act = nn.SiLU()
    model = o.fill(nn.Sequential(act, nn.GroupNorm(2, 4), act, nn.Conv2d(4, 4, 1), act, nn.Sequential(act)))
    want = model(x)
    torch.testing.assert_close(df.accelerate(model)(x), want, rtol=1e-5, atol=1e-6)
    assert passes == ["norm+silu"]


def test_one_norm_in_two_places(x: Tensor, passes: list[str]) -> None:
    norm = nn.GroupNorm(2, 4)
    model = o.fill(nn.Sequential(nn.Sequential(norm, nn.SiLU()), nn.Sequential(norm, nn.ReLU())))
    want = model(x)
    torch.testing.assert_close(df.accelerate(model)(x), want, rtol=1e-5, atol=1e-6)
    assert passes == ["norm+silu", "norm"]
    assert df.acceleration_report(model).fused == ["0.0"]


def test_a_sequential_with_its_own_forward_is_left_alone(x: Tensor) -> None:
    class Backwards(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(self):
                x = layer(x)
            return x

    model = o.fill(Backwards(nn.GroupNorm(2, 4), nn.SiLU()))
    want = model(x)
    torch.testing.assert_close(df.accelerate(model)(x), want, rtol=1e-5, atol=1e-6)
    assert type(model) is Backwards


def test_changed_afterwards(x: Tensor, passes: list[str]) -> None:
    model = df.accelerate(layers())
    model[1] = nn.Tanh()
    model.append(nn.GroupNorm(2, 4))
    model.append(nn.SiLU())
    got = model(x)
    assert passes == ["norm", "norm"]  # the new norm is not accelerated
    torch.testing.assert_close(got, df.restore(model)(x), rtol=1e-5, atol=1e-6)
    passes.clear()
    df.accelerate(model)(x)
    assert passes == ["norm", "norm", "norm+silu"]
