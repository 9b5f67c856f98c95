"""Which modules are norms, which of those are GroupNorm, and which modules and functions are SiLU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.accelerate import acceleration_report
from ddpm_fast.accelerate.activations import find_silu_function, find_silu_module
from ddpm_fast.nn import GroupNormSiLU

from . import originals as o


class Halved(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class OffsetWeight(nn.GroupNorm):
    """Its weight is kept as a difference from one; at the value that it starts from it looks like any other."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, 1 + self.weight, self.bias, self.eps)


class StraightThrough(nn.GroupNorm):
    """The right values and another derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (super().forward(x) - x).detach()


class PerFrame(nn.GroupNorm):
    """The norm of each frame of a video; of images what nn.GroupNorm computes."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 5:
            return super().forward(x)
        n, c, t, h, w = x.shape
        return super().forward(x.transpose(1, 2).reshape(n * t, c, h, w)).reshape(n, t, c, h, w).transpose(1, 2)


def skipped(norm: nn.Module) -> str:
    model = df.accelerate(nn.Sequential(norm))
    report = acceleration_report(model)
    assert report.fused == []
    assert not type(norm).__mro__[1].__name__.startswith("Fused")
    return report.skipped["0"]


@pytest.mark.parametrize("cls", [Halved, OffsetWeight, StraightThrough])
def test_a_subclass_that_computes_something_else(cls: type[nn.GroupNorm]) -> None:
    assert skipped(cls(2, 4)) == f"{cls.__name__} does not compute what nn.GroupNorm does"


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(4), nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.RMSNorm(4), nn.LocalResponseNorm(2)],
    ids=lambda norm: type(norm).__name__ + type(norm).__module__[:1],
)
def test_other_norms_are_named(norm: nn.Module) -> None:
    assert skipped(norm) == (
        f"{type(norm).__name__} is neither a GroupNorm nor an RMSNorm over the channels: there is no fused op for it"
    )


def test_a_forward_on_the_instance() -> None:
    norm = nn.GroupNorm(2, 4)
    norm.forward = lambda x: x
    assert skipped(norm) == "its forward was replaced on the instance"


def test_a_parametrized_weight() -> None:
    norm = nn.utils.parametrizations.weight_norm(nn.GroupNorm(2, 4))
    model = df.accelerate(nn.Sequential(norm))
    report = acceleration_report(model)
    assert list(report.skipped) == ["0"]
    assert "not a plain parameter" in report.skipped["0"]


def test_eps_of_zero() -> None:
    assert skipped(nn.GroupNorm(2, 4, eps=0.0)).startswith("eps is 0.0")


def test_scripted() -> None:
    norm = torch.jit.script(nn.GroupNorm(2, 4))
    assert acceleration_report(df.accelerate(nn.Sequential(norm))).skipped == {
        "0": "scripted: its forward cannot be replaced"
    }


def test_slots() -> None:
    class Slotted(nn.GroupNorm):
        __slots__ = ("extra",)

    model = df.accelerate(nn.Sequential(Slotted(2, 4)))
    x = torch.randn(2, 4, 3, 3)
    assert acceleration_report(model).fused + list(acceleration_report(model).skipped) == ["0"]
    torch.testing.assert_close(model(x), F.group_norm(x, 2))


def test_a_registry_of_subclasses_does_not_see_ours() -> None:
    class Registered(nn.GroupNorm):
        known: list[str] = []  # noqa: RUF012

        def __init_subclass__(cls, **kwargs: object) -> None:
            Registered.known.append(cls.__name__)

    df.accelerate(nn.Sequential(Registered(2, 4)))
    assert Registered.known == []


def test_only_the_dimensions_tried_out_are_fused(passes: list[str]) -> None:
    norm = PerFrame(2, 4)
    model = nn.Sequential(norm)
    video, image = torch.randn(2, 4, 3, 5, 5), torch.randn(2, 4, 5, 5)
    want = model(video)
    df.accelerate(model)
    assert torch.equal(model(video), want)
    assert passes == []
    torch.testing.assert_close(model(image), F.group_norm(image, 2), rtol=1e-5, atol=1e-6)
    assert passes == ["norm"]


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 7), (3, 4, 5, 2), (3, 4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_any_number_of_dimensions(shape: tuple[int, ...], affine: bool, passes: list[str]) -> None:
    norm = o.fill(nn.GroupNorm(2, 4, affine=affine))
    x = torch.randn(shape)
    want = norm(x)
    torch.testing.assert_close(df.accelerate(norm)(x), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm(input=x), want)
    assert passes[0] == "norm"


def test_errors_are_the_originals() -> None:
    plain, fused = nn.GroupNorm(2, 4), df.accelerate(nn.GroupNorm(2, 4))
    for x in (torch.randn(2, 6, 3), torch.randn(4), torch.randn(1, 4, 1)[:, :2], torch.ones(2, 4, 3, dtype=torch.long)):
        with pytest.raises((RuntimeError, ValueError)) as before:
            plain(x)
        with pytest.raises(type(before.value)) as after:
            fused(x)
        assert str(after.value) == str(before.value)
    assert fused(torch.ones(0, 4, 3)).shape == (0, 4, 3)


def test_one_value_a_group_is_pytorchs_affair(passes: list[str]) -> None:
    for shape in ((1, 4), (1, 4, 1, 1)):
        x = torch.randn(shape)
        norm = nn.GroupNorm(4, 4)
        for module in (norm, df.accelerate(norm)):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
                module(x)
    assert passes == []


def test_tensor_subclasses_run_the_original(passes: list[str]) -> None:
    class Own(Tensor):
        pass

    norm = df.accelerate(nn.GroupNorm(2, 4))
    assert type(norm(torch.randn(2, 4, 3).as_subclass(Own))) is Own
    assert passes == []


def test_the_packages_own_module_counts_as_fused() -> None:
    model = df.accelerate(nn.Sequential(GroupNormSiLU(2, 4)))
    assert type(model[0]) is GroupNormSiLU
    assert acceleration_report(model).fused == ["0"]


# SiLU


class OldSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * s * (1 + x * (1 - s))


class FrugalSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Swish.apply(x)


class InplaceSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(x.sigmoid())


class SiLULike(nn.Module):
    """Called so, but with a beta."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LearnedSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x.detach())


@pytest.mark.parametrize("cls", [nn.SiLU, OldSwish, FrugalSwish])
def test_silu_modules(cls: type[nn.Module], passes: list[str]) -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), cls())
    x = torch.randn(2, 4, 3, 3)
    want = model(x)
    torch.testing.assert_close(df.accelerate(model)(x), want, rtol=1e-5, atol=1e-6)
    assert passes == ["norm+silu"]


@pytest.mark.parametrize(
    "cls", [nn.ReLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Identity, nn.Dropout, SiLULike, LearnedSwish, Detached]
)
def test_other_activations(cls: type[nn.Module]) -> None:
    module = cls()
    attributes = dict(vars(module))
    assert not find_silu_module(module)
    assert vars(module) == attributes


def nonlinearity(x):
    return x * torch.sigmoid(x)


def keeps_a_list(x):
    seen.append(x)
    return F.silu(x)


seen: list[Tensor] = []


def test_silu_functions() -> None:
    assert all(find_silu_function(f) for f in (F.silu, nonlinearity, o.nonlinearity))
    others = (F.relu, torch.sigmoid, F.gelu, print, lambda x: x * torch.sigmoid(2 * x), keeps_a_list, None, 3)
    assert not any(find_silu_function(f) for f in others)
    assert seen == []
